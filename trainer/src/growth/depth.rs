//! Whether a growth plan fits its source, and which source layer every target layer copies.

use growth_crds::plan::growth_width::WidthPlanError;
use growth_crds::plan::{GrowthOperator, GrowthPlan, ModelConfig};

/// Why a growth plan cannot be carried out.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum LayerMapError {
    /// The list is empty.
    #[error("the growth plan lists no layers; list at least one source layer")]
    Empty,
    /// The list names a layer that does not exist.
    #[error(
        "layers[{target}] of the growth plan is {source_layer}, but the source has {source_layers} layers: write 0 \
         to {}", source_layers - 1
    )]
    OutOfRange {
        /// Target layer.
        target: usize,
        /// Source layer in the list.
        source_layer: u32,
        /// Layers of the source.
        source_layers: u32,
    },
    /// The plan says `Stack` but does not repeat the whole model.
    #[error(
        "layers[{target}] of the growth plan is {found}, but Stack repeats the whole model of {source_layers} \
         layers, so it must be {expected}; use LayerMap for other lists"
    )]
    NotAStack {
        /// Target layer.
        target: usize,
        /// Source layer in the list.
        found: u32,
        /// Source layer of a stack.
        expected: u32,
        /// Layers of the source.
        source_layers: u32,
    },
    /// A layer is to be zeroed that the target does not have.
    #[error("zeroOutput of the growth plan names layer {layer}, but the target has {target_layers} layers")]
    ZeroOutOfRange {
        /// The layer.
        layer: u32,
        /// Layers of the target.
        target_layers: usize,
    },
    /// New layers lie above the old ones, which stay as they are.
    #[error(
        "the growth plan adds {added} new layers to {found} of the {source_layers} layers of the source: list all of \
         them, 0 to {}, and add at least one", source_layers - 1
    )]
    NotOnTop {
        /// New layers.
        added: u32,
        /// Old layers that are listed.
        found: usize,
        /// Layers of the source.
        source_layers: u32,
    },
    /// The widths do not fit.
    #[error(transparent)]
    Width(#[from] WidthPlanError),
    /// The plan says `Stack` but ends inside a repetition.
    #[error(
        "the growth plan makes {found} layers by Stack, but the source has {source_layers}: make a multiple of it, \
         or use LayerMap"
    )]
    NotAMultiple {
        /// Target layers.
        found: usize,
        /// Layers of the source.
        source_layers: u32,
    },
}

/// The configuration of the grown model.
///
/// # Errors
/// When the plan does not fit the source.
pub fn grown_config(source: &ModelConfig, plan: &GrowthPlan) -> Result<ModelConfig, LayerMapError> {
    check(source.num_hidden_layers, plan)?;
    if let Some(width) = &plan.width {
        width.check(source)?;
    }
    if let Some(width) = plan.learn.as_ref().and_then(|learn| learn.width.as_ref()) {
        width.check(source)?;
    }
    Ok(plan.grown(source))
}

fn check(source_layers: u32, plan: &GrowthPlan) -> Result<(), LayerMapError> {
    if plan.layers.is_empty() {
        return Err(LayerMapError::Empty);
    }
    for (target, &source_layer) in plan.layers.iter().enumerate() {
        if source_layer >= source_layers {
            return Err(LayerMapError::OutOfRange { target, source_layer, source_layers });
        }
    }
    let target_layers = plan.layers.len();
    if let Some(&layer) = plan.zero_output.iter().find(|layer| **layer as usize >= target_layers) {
        return Err(LayerMapError::ZeroOutOfRange { layer, target_layers });
    }
    if let Some(new) = plan.new_layers
        && (new.count == 0 || !plan.layers.iter().copied().eq(0..source_layers))
    {
        let (added, found) = (new.count, plan.layers.len());
        return Err(LayerMapError::NotOnTop { added, found, source_layers });
    }
    match plan.operator {
        GrowthOperator::Stack => check_stack(source_layers, &plan.layers),
        _ => Ok(()),
    }
}

fn check_stack(source_layers: u32, layers: &[u32]) -> Result<(), LayerMapError> {
    for ((target, &found), expected) in layers.iter().enumerate().zip((0..source_layers).cycle()) {
        if found != expected {
            return Err(LayerMapError::NotAStack { target, found, expected, source_layers });
        }
    }
    if !layers.len().is_multiple_of(source_layers as usize) {
        return Err(LayerMapError::NotAMultiple { found: layers.len(), source_layers });
    }
    Ok(())
}

/// The source tensor of a target tensor; tensors outside the layers keep their name.
pub(super) fn source_name(target: &str, layers: &[u32]) -> String {
    const PREFIX: &str = "model.layers.";
    let source = || {
        let (layer, part) = target.strip_prefix(PREFIX)?.split_once('.')?;
        Some(format!("{PREFIX}{}.{part}", layers.get(layer.parse::<usize>().ok()?)?))
    };
    source().unwrap_or_else(|| target.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use growth_crds::plan::{Initializer, NewLayersPlan, OptimizerStatePolicy};

    fn plan(operator: GrowthOperator, layers: &[u32]) -> GrowthPlan {
        GrowthPlan {
            from_stage: "small".to_owned(),
            operator,
            layers: layers.to_vec(),
            new_layers: None,
            zero_output: Vec::new(),
            width: None,
            learn: None,
            noise: None,
            optimizer_state: OptimizerStatePolicy::Reset,
        }
    }

    #[test]
    fn a_stack_repeats_the_whole_model() {
        let stack = |layers: &[u32]| check(2, &plan(GrowthOperator::Stack, layers));
        assert_eq!(stack(&[0, 1, 0, 1, 0, 1]), Ok(()));
        assert_eq!(stack(&[]), Err(LayerMapError::Empty));
        let error = stack(&[0, 0, 1, 1]).unwrap_err();
        assert_eq!(error, LayerMapError::NotAStack { target: 1, found: 0, expected: 1, source_layers: 2 });
        assert!(error.to_string().contains("use LayerMap"), "{error}");
        assert_eq!(stack(&[0, 1, 0]), Err(LayerMapError::NotAMultiple { found: 3, source_layers: 2 }));
    }

    #[test]
    fn a_layer_map_repeats_and_leaves_out_as_it_likes() {
        let map = |layers: &[u32]| check(6, &plan(GrowthOperator::LayerMap, layers));
        assert_eq!(map(&[0, 1, 2, 3, 4, 2, 3, 4, 5]), Ok(()));
        assert_eq!(map(&[5, 0]), Ok(()));
        let error = map(&[0, 6]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layers[1] of the growth plan is 6, but the source has 6 layers: write 0 to 5"
        );
    }

    #[test]
    fn new_layers_lie_above_all_old_ones() {
        let new = |layers: &[u32], count| {
            let new_layers = Some(NewLayersPlan { count, initializer: Initializer::HuggingFace, seed: 1 });
            check(2, &GrowthPlan { new_layers, ..plan(GrowthOperator::RandomDepth, layers) })
        };
        assert_eq!(new(&[0, 1], 3), Ok(()));
        for (layers, count) in [(&[0, 1][..], 0), (&[0], 1), (&[1, 0], 1), (&[0, 1, 1], 1)] {
            let error = new(layers, count).unwrap_err().to_string();
            assert!(error.contains("of the 2 layers of the source: list all of them, 0 to 1"), "{error}");
        }
    }

    #[test]
    fn only_layers_of_the_target_are_zeroed() {
        let mut plan = plan(GrowthOperator::ZeroDepth, &[0, 0, 1, 1]);
        plan.zero_output = vec![1, 4];
        let error = check(2, &plan).unwrap_err();
        assert_eq!(error, LayerMapError::ZeroOutOfRange { layer: 4, target_layers: 4 });
    }

    #[test]
    fn only_layers_are_renamed() {
        let name = |target: &str| source_name(target, &[0, 1, 1]);
        assert_eq!(name("model.norm.weight"), "model.norm.weight");
        assert_eq!(
            name("model.layers.2.mlp.up_proj.weight/exp_avg"),
            "model.layers.1.mlp.up_proj.weight/exp_avg"
        );
    }
}

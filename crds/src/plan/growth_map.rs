//! Which source layer every target layer copies.

use super::ModelConfig;
use super::error::Findings;
use super::{GrowthOperator, GrowthPlan};
use crate::spec::stage::{GrowthSpec, LayerMapSpec};

/// Most layers a model may have.
pub const MAX_LAYERS: u32 = 1024;

/// G_stack: the whole model, `factor` times.
pub fn stack(source_layers: u32, factor: u32) -> Vec<u32> {
    (0..factor).flat_map(|_| 0..source_layers).collect()
}

/// Why a pattern cannot be read.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum PatternError {
    /// A part is not digits with an optional repetition.
    #[error(
        "{part:?} is no part of a pattern; write layers as digits from 1, with *n to repeat: 12-3456*5-56"
    )]
    Syntax {
        /// The part.
        part: String,
    },
    /// It describes more layers than a model may have.
    #[error("the pattern makes more than {MAX_LAYERS} layers; lower the repetitions")]
    TooLong,
}

/// Reads the paper's notation `12-3456*5-56` (layers from 1, one digit each) into layers from 0.
///
/// # Errors
/// When a part is not digits 1 to 9 with an optional `*n`, or when the result is too long.
pub fn parse_pattern(pattern: &str) -> Result<Vec<u32>, PatternError> {
    let mut layers = Vec::new();
    for part in pattern.split('-') {
        let (block, times) =
            parse_part(part).ok_or_else(|| PatternError::Syntax { part: part.to_owned() })?;
        if u64::from(times) * block.len() as u64 + layers.len() as u64 > u64::from(MAX_LAYERS) {
            return Err(PatternError::TooLong);
        }
        (0..times).for_each(|_| layers.extend(&block));
    }
    Ok(layers)
}

fn parse_part(part: &str) -> Option<(Vec<u32>, u32)> {
    let (digits, times) = part.split_once('*').unwrap_or((part, "1"));
    let block: Option<Vec<u32>> =
        digits.chars().map(|digit| digit.to_digit(10)?.checked_sub(1)).collect::<Option<_>>();
    let times: u32 = times.parse().ok().filter(|times| *times > 0)?;
    block.filter(|block| !block.is_empty()).map(|block| (block, times))
}

/// The paper's connection rate R_c as a fraction: neighbours of the source that are still neighbours, of all pairs.
pub fn connection_rate(layers: &[u32]) -> (usize, usize) {
    let kept = layers.windows(2).filter(|pair| pair[0].checked_add(1) == Some(pair[1])).count();
    (kept, layers.len().saturating_sub(1))
}

/// Resolves the growth of a stage; `None` when it is wrong, with the reason in `findings`.
pub(super) fn resolve_growth(
    growth: &GrowthSpec,
    field: &str,
    target_layers: Option<u32>,
    source: &ModelConfig,
    from_stage: &str,
    findings: &mut Findings,
) -> Option<GrowthPlan> {
    let layers = match growth.operator {
        GrowthOperator::Stack => resolve_stack(growth, field, target_layers, source, findings),
        GrowthOperator::LayerMap => resolve_map(growth, field, target_layers, source, findings),
    }?;
    Some(GrowthPlan {
        from_stage: from_stage.to_owned(),
        operator: growth.operator,
        layers,
        optimizer_state: growth.optimizer_state,
    })
}

fn resolve_stack(
    growth: &GrowthSpec,
    field: &str,
    target_layers: Option<u32>,
    source: &ModelConfig,
    findings: &mut Findings,
) -> Option<Vec<u32>> {
    let depth = source.num_hidden_layers;
    if growth.layer_map.is_some() {
        findings.error(
            format!("{field}.growth.layerMap"),
            "layerMap belongs to operator LayerMap; remove it or change operator",
        );
        return None;
    }
    let factor = match (growth.factor, target_layers) {
        (Some(factor), None) => factor,
        (Some(factor), Some(target)) if depth.checked_mul(factor) == Some(target) => factor,
        (Some(factor), Some(target)) => {
            findings.error(
                format!("{field}.growth.factor"),
                format!(
                    "factor {factor} makes {} of {depth} layers, but model.numHiddenLayers says {target}; remove one of them",
                    u64::from(depth) * u64::from(factor)
                ),
            );
            return None;
        }
        (None, Some(target)) if target % depth == 0 => target / depth,
        (None, Some(target)) => {
            findings.error(
                format!("{field}.model.numHiddenLayers"),
                format!(
                    "{target} layers are no multiple of the {depth} that are stacked; choose a multiple, or use operator LayerMap"
                ),
            );
            return None;
        }
        (None, None) => {
            findings.error(
                format!("{field}.growth.factor"),
                "Stack needs to know how deep; set factor (4 is the paper's choice) or model.numHiddenLayers",
            );
            return None;
        }
    };
    check_factor(factor, field, source, findings)
}

fn check_factor(factor: u32, field: &str, source: &ModelConfig, findings: &mut Findings) -> Option<Vec<u32>> {
    let depth = source.num_hidden_layers;
    if factor < 2 {
        findings
            .error(format!("{field}.growth.factor"), format!("factor {factor} does not grow; use 2 or more"));
        return None;
    }
    if depth.checked_mul(factor).is_none_or(|layers| layers > MAX_LAYERS) {
        findings.error(
            format!("{field}.growth.factor"),
            format!("{depth} layers times {factor} are more than {MAX_LAYERS}; lower factor"),
        );
        return None;
    }
    if factor > 8 {
        findings.note(format!(
            "{field}: factor {factor} is far above the 2 to 4 that the paper found best; the base may be too small to help"
        ));
    }
    if depth < 2 {
        findings.note(format!(
            "{field}: a base of {depth} layer lost to training from scratch in the paper; use at least 2 layers"
        ));
    }
    Some(stack(depth, factor))
}

fn resolve_map(
    growth: &GrowthSpec,
    field: &str,
    target_layers: Option<u32>,
    source: &ModelConfig,
    findings: &mut Findings,
) -> Option<Vec<u32>> {
    let Some(map) = &growth.layer_map else {
        findings.error(
            format!("{field}.growth.layerMap"),
            "operator LayerMap needs layerMap; set layers or pattern",
        );
        return None;
    };
    if growth.factor.is_some() {
        findings.error(
            format!("{field}.growth.factor"),
            "factor belongs to operator Stack; remove it, layerMap says how deep the model becomes",
        );
        return None;
    }
    let (member, layers) = read_map(map, field, findings)?;
    let place = format!("{field}.growth.layerMap.{member}");
    let depth = source.num_hidden_layers;
    let (first_label, last_label) = if member == "pattern" { (1, depth) } else { (0, depth - 1) };
    if let Some(layer) = layers.iter().find(|layer| **layer >= depth) {
        findings.error(
            place,
            format!(
                "there is no layer {}; the source has {depth} layers, {first_label} to {last_label}",
                layer.saturating_add(first_label)
            ),
        );
        return None;
    }
    if let Some(target) = target_layers.filter(|target| *target as usize != layers.len()) {
        findings.error(
            place,
            format!(
                "it lists {} layers, but model.numHiddenLayers says {target}; remove numHiddenLayers or correct the list",
                layers.len()
            ),
        );
        return None;
    }
    if layers.len() < depth as usize {
        findings.note(format!(
            "{field}: the layer map shrinks the model from {depth} to {} layers",
            layers.len()
        ));
    }
    Some(layers)
}

fn read_map(map: &LayerMapSpec, field: &str, findings: &mut Findings) -> Option<(&'static str, Vec<u32>)> {
    match (&map.layers, &map.pattern) {
        (Some(layers), None) if layers.is_empty() || layers.len() > MAX_LAYERS as usize => {
            findings.error(
                format!("{field}.growth.layerMap.layers"),
                format!("it lists {} layers; list 1 to {MAX_LAYERS}", layers.len()),
            );
            None
        }
        (Some(layers), None) => Some(("layers", layers.clone())),
        (None, Some(pattern)) => match parse_pattern(pattern) {
            Ok(layers) => Some(("pattern", layers)),
            Err(error) => {
                findings.error(format!("{field}.growth.layerMap.pattern"), error.to_string());
                None
            }
        },
        _ => {
            findings.error(
                format!("{field}.growth.layerMap"),
                "set exactly one of layers and pattern in layerMap",
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stack_repeats_the_whole_model() {
        let layers = stack(6, 4);
        assert_eq!(layers.len(), 24);
        assert!(layers.iter().enumerate().all(|(target, source)| *source == target as u32 % 6));
    }

    #[test]
    fn the_papers_partial_stacks() {
        // Table 5, "a-bcd*k-ef": how many of 23 pairs are kept.
        let table = [
            ("123456*4", 20),
            ("12-3456*5-56", 18),
            ("12-345*7-6", 17),
            ("123-456*7", 17),
            ("1234-56*10", 14),
            ("12-34*10-56", 14),
            ("1-234*7-56", 17),
            ("123*7-456", 17),
        ];
        for (pattern, kept) in table {
            let layers = parse_pattern(pattern).unwrap();
            assert_eq!(layers.len(), 24, "{pattern}");
            assert_eq!(connection_rate(&layers), (kept, 23), "{pattern}");
        }
    }

    #[test]
    fn stack_and_interleave_of_eight_layers() {
        assert_eq!(connection_rate(&stack(8, 3)), (21, 23));
        let interleaved: Vec<u32> = (0..24).map(|target| target / 3).collect();
        assert_eq!(connection_rate(&interleaved), (7, 23));
    }

    #[test]
    fn solar_is_a_list() {
        // Depth up-scaling of 32 layers to 48, dropping 8: 0..=23, then 8..=31.
        let solar: Vec<u32> = (0..24).chain(8..32).collect();
        assert_eq!(solar.len(), 48);
        assert_eq!(connection_rate(&solar), (46, 47));
    }

    #[test]
    fn wrong_patterns_say_what_to_write() {
        for pattern in ["", "0", "12-", "-1", "1*0", "1*", "a", "1**2", "1*2*3", "12 34", "1*99999999999"] {
            let error = parse_pattern(pattern).unwrap_err();
            assert!(error.to_string().contains("12-3456*5-56"), "{pattern}: {error}");
        }
        assert_eq!(parse_pattern("12*600"), Err(PatternError::TooLong));
        assert_eq!(parse_pattern("12*4000000000"), Err(PatternError::TooLong));
    }
}

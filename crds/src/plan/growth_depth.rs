//! Resolution of the depth: which list of layers an operator means.

use super::GrowthOperator;
use super::LayerOrder;
use super::error::Findings;
use super::growth_map::{
    MAX_LAYERS, further_copies, interleave, lidas, llama_pro, midas, parse_pattern, repeat, solar,
};
use crate::spec::stage::{GrowthSpec, LayerMapSpec};

/// What a growth of the depth is resolved from.
pub(super) struct DepthRequest<'a> {
    pub operator: GrowthOperator,
    pub factor: Option<u32>,
    /// Where `factor` stands: `spec.stages[1].growth`, or its `depth`.
    pub place: String,
    pub growth: &'a GrowthSpec,
    /// The stage.
    pub field: &'a str,
    pub target_layers: Option<u32>,
    pub source_layers: u32,
}

/// A resolved depth.
pub(super) struct Depth {
    pub layers: Vec<u32>,
    pub zero_output: Vec<u32>,
    /// Layers above these that have no source.
    pub new_layers: u32,
}

impl Depth {
    /// Copies, all of them live.
    pub fn of(layers: Vec<u32>) -> Self {
        Self { layers, zero_output: Vec::new(), new_layers: 0 }
    }
}

impl DepthRequest<'_> {
    /// The layers, or `None` with the reason in `findings`.
    pub fn resolve(&self, findings: &mut Findings) -> Option<Depth> {
        if self.operator == GrowthOperator::LayerMap {
            return self.resolve_map(findings);
        }
        let target = self.resolve_target(findings)?;
        let (source, order) = (self.source_layers, self.growth.zero_depth.unwrap_or_default().order);
        if self.operator == GrowthOperator::RandomDepth {
            // The old layers as they are, and new ones above them.
            return Some(Depth { new_layers: target - source, ..Depth::of((0..source).collect()) });
        }
        let layers = match (self.operator, order) {
            (GrowthOperator::Interleave, _) | (GrowthOperator::ZeroDepth, LayerOrder::Interleaved) => {
                interleave(source, target)
            }
            _ => repeat(source, target),
        };
        let zero = self.operator == GrowthOperator::ZeroDepth;
        let zero_output = if zero { further_copies(&layers) } else { Vec::new() };
        Some(Depth { zero_output, ..Depth::of(layers) })
    }

    /// How deep the model becomes.
    fn resolve_target(&self, findings: &mut Findings) -> Option<u32> {
        let (depth, place, operator) = (self.source_layers, &self.place, self.operator);
        let target = match (self.factor, self.target_layers) {
            (Some(factor), None) => self.multiply(factor, findings)?,
            (Some(factor), Some(target)) if depth.checked_mul(factor) == Some(target) => {
                self.multiply(factor, findings)?
            }
            (Some(factor), Some(target)) => {
                let made = u64::from(depth) * u64::from(factor);
                let message = format!(
                    "factor {factor} makes {made} of {depth} layers, but model.numHiddenLayers says {target}; remove one of them"
                );
                findings.error(format!("{place}.factor"), message);
                return None;
            }
            (None, Some(target)) => self.check_target(target, findings)?,
            (None, None) => {
                let message = format!(
                    "{operator:?} needs to know how deep; set factor (4 is the paper's choice) or model.numHiddenLayers"
                );
                findings.error(format!("{place}.factor"), message);
                return None;
            }
        };
        self.note_extremes(target, findings);
        Some(target)
    }

    fn multiply(&self, factor: u32, findings: &mut Findings) -> Option<u32> {
        let (depth, place) = (self.source_layers, &self.place);
        if factor < 2 {
            findings
                .error(format!("{place}.factor"), format!("factor {factor} does not grow; use 2 or more"));
            return None;
        }
        let target = depth.checked_mul(factor).filter(|layers| *layers <= MAX_LAYERS);
        if target.is_none() {
            let message = format!("{depth} layers times {factor} are more than {MAX_LAYERS}; lower factor");
            findings.error(format!("{place}.factor"), message);
        }
        target
    }

    fn check_target(&self, target: u32, findings: &mut Findings) -> Option<u32> {
        let (depth, operator) = (self.source_layers, self.operator);
        // These add single layers, as many as are needed.
        let any_depth = matches!(
            operator,
            GrowthOperator::Interleave
                | GrowthOperator::ZeroDepth
                | GrowthOperator::RandomDepth
                | GrowthOperator::LearnDepth
        );
        let message = if target <= depth {
            format!("{target} layers are no more than the {depth} that grow; use more")
        } else if target > MAX_LAYERS {
            format!("{target} layers are more than {MAX_LAYERS}; use fewer")
        } else if !any_depth && !target.is_multiple_of(depth) {
            format!(
                "{target} layers are no multiple of the {depth} that grow, which {operator:?} repeats as a whole; choose a multiple, or use operator Interleave, ZeroDepth, RandomDepth, LearnDepth or LayerMap"
            )
        } else {
            return Some(target);
        };
        findings.error(format!("{}.model.numHiddenLayers", self.field), message);
        None
    }

    fn note_extremes(&self, target: u32, findings: &mut Findings) {
        let (depth, field) = (self.source_layers, self.field);
        if u64::from(target) > 8 * u64::from(depth) {
            let factor = target.div_ceil(depth.max(1));
            findings.note(format!(
                "{field}: factor {factor} is far above the 2 to 4 that the paper found best; the base may be too small to help"
            ));
        }
        if depth < 2 {
            findings.note(format!(
                "{field}: a base of {depth} layer lost to training from scratch in the paper; use at least 2 layers"
            ));
        }
    }

    fn resolve_map(&self, findings: &mut Findings) -> Option<Depth> {
        let (field, depth) = (self.field, self.source_layers);
        let Some(map) = &self.growth.layer_map else {
            let message = "operator LayerMap needs layerMap; set layers, pattern or a preset";
            findings.error(format!("{field}.growth.layerMap"), message);
            return None;
        };
        if self.factor.is_some() {
            let message =
                "factor does not go with LayerMap; remove it, layerMap says how deep the model becomes";
            findings.error(format!("{}.factor", self.place), message);
            return None;
        }
        let (member, layers) = self.read_map(map, findings)?;
        let place = format!("{field}.growth.layerMap.{member}");
        let (first_label, last_label) = if member == "pattern" { (1, depth) } else { (0, depth - 1) };
        if let Some(layer) = layers.iter().find(|layer| **layer >= depth) {
            let layer = layer.saturating_add(first_label);
            let message = format!(
                "there is no layer {layer}; the source has {depth} layers, {first_label} to {last_label}"
            );
            findings.error(place, message);
            return None;
        }
        if let Some(target) = self.target_layers.filter(|target| *target as usize != layers.len()) {
            let message = format!(
                "it lists {} layers, but model.numHiddenLayers says {target}; remove numHiddenLayers or correct the list",
                layers.len()
            );
            findings.error(place, message);
            return None;
        }
        if layers.len() < depth as usize {
            let message =
                format!("{field}: the layer map shrinks the model from {depth} to {} layers", layers.len());
            findings.note(message);
        }
        let zero = map.zero_output.unwrap_or(map.llama_pro.is_some());
        let zero_output = if zero { further_copies(&layers) } else { Vec::new() };
        Some(Depth { zero_output, ..Depth::of(layers) })
    }

    fn read_map(&self, map: &LayerMapSpec, findings: &mut Findings) -> Option<(&'static str, Vec<u32>)> {
        let depth = self.source_layers;
        let given = [
            map.layers.is_some(),
            map.pattern.is_some(),
            map.solar.is_some(),
            map.midas.is_some(),
            map.lidas.is_some(),
            map.llama_pro.is_some(),
        ];
        let place = format!("{}.growth.layerMap", self.field);
        if given.iter().filter(|given| **given).count() != 1 {
            let message = "set exactly one of layers, pattern, solar, midas, lidas and llamaPro in layerMap";
            findings.error(place, message);
            return None;
        }
        let (member, layers) = if let Some(layers) = &map.layers {
            ("layers", Ok(layers.clone()))
        } else if let Some(pattern) = &map.pattern {
            ("pattern", parse_pattern(pattern).map_err(|error| error.to_string()))
        } else if let Some(solar) = map.solar {
            ("solar", solar_layers(depth, solar.drop_layers))
        } else if let Some(midas) = map.midas {
            ("midas", midas_layers(depth, midas.block_layers))
        } else if let Some(lidas) = map.lidas {
            ("lidas", lidas_layers(depth, lidas.block_layers))
        } else {
            let pro = map.llama_pro?;
            ("llamaPro", llama_pro_layers(depth, pro.groups, pro.copies.unwrap_or(1)))
        };
        match layers {
            Ok(layers) if layers.is_empty() || layers.len() > MAX_LAYERS as usize => {
                let message = format!("it lists {} layers; list 1 to {MAX_LAYERS}", layers.len());
                findings.error(format!("{place}.{member}"), message);
                None
            }
            Ok(layers) => Some((member, layers)),
            Err(message) => {
                findings.error(format!("{place}.{member}"), message);
                None
            }
        }
    }
}

fn solar_layers(depth: u32, dropped: u32) -> Result<Vec<u32>, String> {
    let wrong = || format!("{dropped} layers cannot be dropped of {depth}; lower dropLayers");
    solar(depth, dropped).ok_or_else(wrong)
}

fn midas_layers(depth: u32, block: u32) -> Result<Vec<u32>, String> {
    let wrong = || format!("{depth} layers are no whole blocks of {block}; choose a divisor as blockLayers");
    midas(depth, block).ok_or_else(wrong)
}

fn lidas_layers(depth: u32, block: u32) -> Result<Vec<u32>, String> {
    let wrong = || {
        format!(
            "half a block of {block} on each side of the middle of {depth} layers is not possible; both must be even, and the block no longer than the model"
        )
    };
    lidas(depth, block).ok_or_else(wrong)
}

fn llama_pro_layers(depth: u32, groups: u32, copies: u32) -> Result<Vec<u32>, String> {
    let wrong = || {
        format!(
            "{groups} groups of {depth} layers with {copies} copied of each are not possible; groups must divide the layers, and copies be at most the layers of a group"
        )
    };
    llama_pro(depth, groups, copies).ok_or_else(wrong)
}

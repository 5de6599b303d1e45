//! What a growth step did and what was measured: `growth.json` in the grown checkpoint, a record beside the state.

use crate::plan::growth_mask::GrowthMasks;
use crate::plan::{GrowthOperator, GrowthPlan, ModelConfig, OptimizerStatePolicy, growth::GrowthEffect};
use serde::{Deserialize, Serialize};

/// Name of the record inside a checkpoint's folder.
pub const GROWTH_RECORD_FILE: &str = "growth.json";

/// Name of the object of a checkpoint inside the ramp of its growth: what is masked, and how much. It is part of the
/// state, for without it the weights are those of another function.
pub const GROWTH_MASK_FILE: &str = "growth_mask.json";

/// Content of [`GROWTH_MASK_FILE`]. The weights beside it are the ones that are trained; the model runs with them times
/// their masks.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GrowthMaskRecord {
    /// The growth, which says what is new.
    pub growth: GrowthPlan,
    /// Where its masks stand.
    pub masks: GrowthMasks,
}

impl GrowthMaskRecord {
    /// Whether it is about a model of this architecture, with masks from 0 to 1.
    pub fn fits(&self, config: &ModelConfig) -> bool {
        let GrowthMasks { intermediate, hidden, heads, layers } = self.masks;
        let masks = [intermediate, hidden, heads, layers].iter().all(|mask| (0.0..=1.0).contains(mask));
        let widths = self
            .growth
            .width
            .as_ref()
            .is_none_or(|width| width.maps(config).iter().all(|(_, map, size)| map.target() == *size));
        masks && widths && self.growth.target_layers() == config.num_hidden_layers
    }
}

/// Name of the learned matrices inside a checkpoint's folder.
pub const LEARNED_MATRICES_FILE: &str = "learned.safetensors";

/// What a growth step did.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GrowthRecord {
    /// The operator.
    pub operator: GrowthOperator,
    /// Source layer of every target layer that has one.
    pub layers: Vec<u32>,
    /// Layers above these, which have none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub new_layers: u32,
    /// Neighbours of the source that are still neighbours, and all pairs: the paper's connection rate R_c.
    pub connection_rate: ConnectionRate,
    /// Parameters before.
    pub source_parameters: u64,
    /// Parameters after.
    pub target_parameters: u64,
    /// What became of the moments.
    pub optimizer_state: OptimizerStatePolicy,
    /// What the growth does to the function by its definition.
    pub expected: GrowthEffect,
    /// Why.
    pub reason: String,
    /// What was measured; absent where measuring was switched off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<GrowthMeasurement>,
    /// What was learned, where the operator learns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<LearnRecord>,
    /// Tensors of layers that are further copies of their source, or have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub new_tensors: Vec<String>,
    /// Tensors that got rows or columns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub widened_tensors: Vec<String>,
    /// Tensors that are zero at first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zero_tensors: Vec<String>,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// How the matrices of LearnDepth and LearnWidth were learned.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LearnRecord {
    /// Steps.
    pub steps: u64,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Mean loss of the batch of every step before its update, in nats.
    pub losses: Vec<f64>,
}

/// The connection rate as a fraction.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRate {
    /// Pairs of neighbours that are neighbours in the source.
    pub kept: usize,
    /// All pairs of neighbours.
    pub pairs: usize,
}

/// Source and target on the same tokens. A number that is not finite is absent.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GrowthMeasurement {
    /// The tokens.
    pub sample: GrowthSample,
    /// How many were predicted.
    pub tokens: u64,
    /// Largest absolute difference of two logits.
    pub max_logit_difference: Option<f64>,
    /// Largest absolute logit of the source.
    pub max_logit: Option<f64>,
    /// Mean loss of the source, in nats.
    pub loss_before: Option<f64>,
    /// Mean loss of the target, in nats.
    pub loss_after: Option<f64>,
}

/// Tokens that a growth step was measured on.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrowthSample {
    /// Held-out text of the job.
    HeldOut,
    /// Seeded random tokens, where no text is known: only the difference of the losses means something.
    Random,
}

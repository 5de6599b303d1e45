//! How a stage is trained.

use crate::quantity::TokenCount;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How every stage is trained; a stage may override parts of it.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainingSpec {
    /// Tokens of one training sequence.
    #[schemars(range(min = 2, max = 1048576))]
    pub sequence_length: u32,
    /// Tokens of one optimizer step, over all replicas; a multiple of microBatchTokens.
    pub global_batch_tokens: TokenCount,
    /// Tokens that one forward and backward pass works on; a multiple of sequenceLength. Default: globalBatchTokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<TokenCount>,
    /// The optimizer.
    #[serde(default)]
    pub optimizer: OptimizerSpec,
    /// The learning rate over the stage.
    #[serde(default)]
    pub schedule: ScheduleSpec,
    /// Precision of weights, activations and gradients.
    #[serde(default)]
    pub precision: Precision,
    /// Global norm to which gradients are clipped; 0 switches clipping off.
    #[serde(default = "default_gradient_clip")]
    #[schemars(range(min = 0.0))]
    pub gradient_clip: f64,
    /// Seed of the weights and of the order of the data.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub seed: i64,
    /// Whether the weights are the same bits on any number of replicas. False allows any number of replicas up to the
    /// micro-batches of a step; a run that changes their number then ends in slightly different weights.
    #[serde(default = "yes")]
    pub reproducible: bool,
}

fn yes() -> bool {
    true
}

fn default_gradient_clip() -> f64 {
    1.0
}

/// The optimizer; exactly one member.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct OptimizerSpec {
    /// AdamW with decoupled weight decay (Loshchilov and Hutter, 2019).
    #[serde(default)]
    pub adam_w: AdamWSpec,
}

/// AdamW.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AdamWSpec {
    /// Peak learning rate.
    #[schemars(range(min = 0.0))]
    pub learning_rate: f64,
    /// Decay of the first moment.
    #[schemars(range(min = 0.0, max = 0.9999999))]
    pub beta1: f64,
    /// Decay of the second moment.
    #[schemars(range(min = 0.0, max = 0.9999999))]
    pub beta2: f64,
    /// Term that keeps the division finite.
    #[schemars(range(min = 0.0))]
    pub epsilon: f64,
    /// Decoupled weight decay.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Whether norm gains and embeddings decay too, as in the paper's runs.
    pub decay_norms_and_embeddings: bool,
}

impl Default for AdamWSpec {
    fn default() -> Self {
        Self {
            learning_rate: 3e-4,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            decay_norms_and_embeddings: true,
        }
    }
}

/// The learning rate over a stage; exactly one member. All lengths are in tokens. The rate of a step is taken at
/// the tokens consumed before it, so a warm-up begins at 0.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "(has(self.cosine) ? 1 : 0) + (has(self.wsd) ? 1 : 0) + (has(self.constant) ? 1 : 0) == 1"
    )
    .message("set exactly one of cosine, wsd and constant in schedule"),
)]
pub struct ScheduleSpec {
    /// Warm-up, then half a cosine down to the minimum.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine: Option<CosineSchedule>,
    /// Warm-up, a plateau, then a linear decay (warm-up, stable, decay).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wsd: Option<WsdSchedule>,
    /// Warm-up, then constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constant: Option<ConstantSchedule>,
}

impl Default for ScheduleSpec {
    fn default() -> Self {
        Self { cosine: Some(CosineSchedule::default()), wsd: None, constant: None }
    }
}

/// Warm-up, then half a cosine down to the minimum.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CosineSchedule {
    /// Tokens of linear warm-up.
    pub warmup_tokens: TokenCount,
    /// Learning rate at the end, as a share of the peak.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_learning_rate_ratio: f64,
    /// Tokens at which the cosine ends. Default: the tokens of the stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub horizon_tokens: Option<TokenCount>,
}

impl Default for CosineSchedule {
    fn default() -> Self {
        Self { warmup_tokens: TokenCount(0), min_learning_rate_ratio: 0.1, horizon_tokens: None }
    }
}

/// Warm-up, plateau, linear decay.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct WsdSchedule {
    /// Tokens of linear warm-up.
    pub warmup_tokens: TokenCount,
    /// Tokens of the linear decay that ends with the stage.
    pub decay_tokens: TokenCount,
    /// Learning rate at the end, as a share of the peak.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_learning_rate_ratio: f64,
}

impl Default for WsdSchedule {
    fn default() -> Self {
        Self { warmup_tokens: TokenCount(0), decay_tokens: TokenCount(0), min_learning_rate_ratio: 0.0 }
    }
}

/// Warm-up, then constant.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConstantSchedule {
    /// Tokens of linear warm-up.
    pub warmup_tokens: TokenCount,
}

/// Precision of weights, activations and gradients.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, JsonSchema)]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    #[serde(rename = "float32")]
    Float32,
}

//! What a resolved job looks like: everything a trainer needs for one stage, with nothing left to default.

use crate::spec::data::DataSpec;
use crate::spec::storage::StorageSpec;
use crate::spec::training::{AdamWSpec, Precision};
use serde::{Deserialize, Serialize};

/// A resolved job.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct JobPlan {
    /// Name of the job.
    pub job: String,
    /// Stages in order.
    pub stages: Vec<StagePlan>,
    /// What a person should know: a clamped guideline, a rounded token count, a base that is too shallow.
    pub notes: Vec<String>,
}

/// One resolved stage: the plan file that a trainer pod reads.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StagePlan {
    /// Name of the job.
    pub job: String,
    /// Name of the stage.
    pub stage: String,
    /// Position of the stage in the job, from 0.
    pub index: u32,
    /// Where checkpoints and data live.
    pub storage: StorageSpec,
    /// Text and tokenizer.
    pub data: DataSpec,
    /// Architecture.
    pub model: ModelConfig,
    /// Where the first weights come from.
    pub start: StageStart,
    /// Position in the data at which the stage begins: the tokens of all stages before it.
    pub first_token: u64,
    /// Tokens the stage trains: `steps * training.global_batch_tokens`.
    pub tokens: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// How it trains.
    pub training: TrainingPlan,
    /// When checkpoints are written and how many are kept.
    pub checkpoint: CheckpointPlan,
    /// When the validation loss is measured.
    pub evaluation: EvaluationPlan,
    /// Parameters.
    pub parameters: ParameterCounts,
    /// Floating-point operations of the whole stage.
    pub flops: FlopCount,
    /// Memory of one trainer process, on the fewest replicas that the stage allows.
    pub memory: MemoryEstimate,
}

/// Architecture of a LLaMA; field names are those of Hugging Face's `config.json`.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width inside the MLP.
    pub intermediate_size: u32,
    /// Layers.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: u32,
    /// Width of a head; independent of `hidden_size / num_attention_heads`.
    pub head_dim: u32,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Longest sequence.
    pub max_position_embeddings: u32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Term inside the root of RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
}

/// Distribution of random initial weights. Default: HuggingFace.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, schemars::JsonSchema)]
pub enum Initializer {
    /// Normal with standard deviation 0.02 for every matrix, as Hugging Face does.
    #[default]
    HuggingFace,
    /// The released code of "Stacking Your Transformers": N(0, 2/(5 fan_in)), the MLP's down projection
    /// N(0, 1/(fan_in L^2)).
    Paper,
}

/// Where the first weights of a stage come from.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub enum StageStart {
    /// Random weights.
    Random {
        /// Their distribution.
        initializer: Initializer,
    },
    /// The weights of a Hugging Face folder.
    Checkpoint {
        /// The folder.
        uri: String,
    },
    /// The grown last checkpoint of the stage before.
    Growth(GrowthPlan),
}

/// A resolved depth growth.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GrowthPlan {
    /// The stage whose last checkpoint is grown.
    pub from_stage: String,
    /// `Stack` or `LayerMap`.
    pub operator: GrowthOperator,
    /// Source layer of every target layer, from 0.
    pub layers: Vec<u32>,
    /// What becomes of the optimizer's moments.
    pub optimizer_state: OptimizerStatePolicy,
}

/// Growth operators, by the paper's names.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, schemars::JsonSchema)]
pub enum GrowthOperator {
    /// G_stack: the whole model repeated; target layer i is source layer i mod L.
    Stack,
    /// An explicit list of source layers.
    LayerMap,
}

/// What becomes of the optimizer's moments at a growth step.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, schemars::JsonSchema)]
pub enum OptimizerStatePolicy {
    /// Fresh moments and step 0, as in the paper.
    #[default]
    Reset,
    /// The moments are grown as the weights are, and the step count goes on.
    Keep,
}

/// How a stage trains.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TrainingPlan {
    /// Tokens of a sequence.
    pub sequence_length: u32,
    /// Tokens of an optimizer step.
    pub global_batch_tokens: u64,
    /// Tokens of one forward and backward pass.
    pub micro_batch_tokens: u64,
    /// The optimizer.
    pub adam_w: AdamWSpec,
    /// The learning rate.
    pub schedule: SchedulePlan,
    /// Precision.
    pub precision: Precision,
    /// Global norm to clip to; 0 for none.
    pub gradient_clip: f64,
    /// Seed of weights and data order.
    pub seed: u64,
    /// Whether any number of ranks must compute the same bits.
    pub reproducible: bool,
}

impl TrainingPlan {
    /// Forward and backward passes of an optimizer step.
    pub fn micro_batches(&self) -> u64 {
        self.global_batch_tokens / self.micro_batch_tokens
    }
}

/// A learning-rate schedule with every length in tokens of this stage. The peak is `adam_w.learning_rate`.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub enum SchedulePlan {
    /// Warm-up, half a cosine to `min_ratio` at `horizon_tokens`, then flat.
    #[serde(rename_all = "camelCase")]
    Cosine {
        /// Linear warm-up.
        warmup_tokens: u64,
        /// End of the cosine.
        horizon_tokens: u64,
        /// Final share of the peak.
        min_ratio: f64,
    },
    /// Warm-up, plateau, linear decay over the last `decay_tokens` before `end_tokens`.
    #[serde(rename_all = "camelCase")]
    Wsd {
        /// Linear warm-up.
        warmup_tokens: u64,
        /// Linear decay.
        decay_tokens: u64,
        /// End of the stage.
        end_tokens: u64,
        /// Final share of the peak.
        min_ratio: f64,
    },
    /// Warm-up, then constant.
    #[serde(rename_all = "camelCase")]
    Constant {
        /// Linear warm-up.
        warmup_tokens: u64,
    },
}

/// When checkpoints are written.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointPlan {
    /// Every so many tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub every_tokens: Option<u64>,
    /// Every so many seconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub every_seconds: Option<u64>,
    /// How many of a stage are kept.
    pub keep_last: u32,
}

/// When the validation loss is measured: before the first step, every `every_tokens`, after the last step.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationPlan {
    /// Distance between two measurements.
    pub every_tokens: u64,
    /// Tokens that one measurement reads at most.
    pub tokens: u64,
}

/// Parameters of a model.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ParameterCounts {
    /// Embedding, and the output head where it is not tied.
    pub embedding: u64,
    /// Everything else: the paper's N.
    pub non_embedding: u64,
    /// All.
    pub total: u64,
}

/// Floating-point operations of a stage, forward and backward.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct FlopCount {
    /// 6 N D with the non-embedding N, as the paper counts.
    pub six_nd: f64,
    /// Every multiply-add of every matrix product, output head and causal attention included, times two.
    pub exact: f64,
}

/// Memory of one trainer process, in bytes.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct MemoryEstimate {
    /// Weights.
    pub weights_bytes: u64,
    /// Gradients: one buffer a level of the summation tree.
    pub gradients_bytes: u64,
    /// Both moments.
    pub optimizer_bytes: u64,
    /// Activations of one micro-batch.
    pub activations_bytes: u64,
    /// Copy that a checkpoint is written from.
    pub snapshot_bytes: u64,
    /// Gradients and weights on their way between ranks.
    pub communication_bytes: u64,
    /// Sum.
    pub total_bytes: u64,
}

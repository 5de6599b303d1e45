//! What a resolved job looks like: everything a trainer needs for one stage, with nothing left to default.

use super::GrowthTrainingPlan;
use super::growth_learn::LearnPlan;
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
    /// Another job, whose stage of the same name has trained this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_by: Option<String>,
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
    /// Tokens of the stage over which the masks of its growth rise; absent where nothing is masked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_ramp_tokens: Option<u64>,
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

/// A resolved growth: where every layer and every channel of the target comes from.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GrowthPlan {
    /// The stage whose last checkpoint is grown.
    pub from_stage: String,
    /// What was asked for.
    pub operator: GrowthOperator,
    /// Source layer of every target layer that has one, from 0.
    pub layers: Vec<u32>,
    /// Layers above these that have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_layers: Option<NewLayersPlan>,
    /// Target layers whose attention output and MLP down projections are zero at first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zero_output: Vec<u32>,
    /// Where the channels come from; absent where every width stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<Box<WidthPlan>>,
    /// What is learned, where the weights are learned mixtures of the source's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learn: Option<Box<LearnPlan>>,
    /// Noise that is mixed in at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise: Option<NoisePlan>,
    /// What becomes of the optimizer's moments.
    pub optimizer_state: OptimizerStatePolicy,
}

/// New layers on top of the old ones, with random weights; their outputs are masked at first.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NewLayersPlan {
    /// How many.
    pub count: u32,
    /// Distribution of their weights: that of the target.
    pub initializer: Initializer,
    /// Seed of their weights.
    pub seed: u64,
}

/// Where the channels of a wider model come from.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct WidthPlan {
    /// Channels of the residual stream.
    pub hidden: WidthMap,
    /// Query heads.
    pub heads: WidthMap,
    /// Key and value heads.
    pub key_value_heads: WidthMap,
    /// Channels inside the MLP.
    pub intermediate: WidthMap,
    /// How weights follow from the maps.
    pub rule: WidthRule,
}

/// The source of every target channel, or head, in runs.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct WidthMap {
    /// Channels of the source. A source channel that has several copies is divided among them where it is read.
    pub source: u32,
    /// Target channels in order.
    pub runs: Vec<WidthRun>,
}

/// Target channels side by side whose sources lie side by side too.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct WidthRun {
    /// Source of the first of them; absent where they are new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u32>,
    /// How many.
    pub count: u32,
}

/// How the weights of a wider model follow from the maps.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub enum WidthRule {
    /// New channels are copies; what reads them is divided.
    #[serde(rename_all = "camelCase")]
    Direct {
        /// How.
        split: WidthSplit,
        /// Seed of the noise of `Noisy`.
        seed: u64,
    },
    /// New channels are zero at first, and what belongs to them is random.
    #[serde(rename_all = "camelCase")]
    Zero {
        /// Distribution of the random weights: that of the target.
        initializer: Initializer,
        /// Their seed.
        seed: u64,
        /// Term inside the root of the target's norms.
        rms_norm_eps: f64,
    },
    /// Whatever belongs to new channels is random, and their outputs are masked at first.
    #[serde(rename_all = "camelCase")]
    Random {
        /// Distribution of the random weights: that of the target.
        initializer: Initializer,
        /// Their seed.
        seed: u64,
        /// Term inside the root of the target's norms.
        rms_norm_eps: f64,
    },
}

/// How a weight is divided among the copies of the channel that it reads. Default: Uneven.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, schemars::JsonSchema)]
pub enum WidthSplit {
    /// Equally. With fresh moments the copies stay equal for ever.
    Even,
    /// 7 to 3, 49 to 21 to 9, and so on: copies drift apart slowly.
    #[default]
    Uneven,
    /// Equally, plus noise that cancels: copies part with the first step.
    Noisy,
}

/// Where the new layers of ZeroDepth lie. Default: Interleaved.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, schemars::JsonSchema)]
pub enum LayerOrder {
    /// Each right above its source.
    #[default]
    Interleaved,
    /// All above the old layers.
    Stacked,
}

/// Noise in the matrices of a grown model.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NoisePlan {
    /// Its share.
    pub share: f64,
    /// Its seed.
    pub seed: u64,
}

/// Growth operators.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, schemars::JsonSchema)]
pub enum GrowthOperator {
    /// G_stack: the whole model repeated; target layer i is source layer i mod L.
    Stack,
    /// Every layer repeated in its place; target layer i of L' is source layer floor(i L / L').
    Interleave,
    /// An explicit list of source layers.
    LayerMap,
    /// Copies whose outputs are zero at first, so that the function stays.
    ZeroDepth,
    /// Copies of channels, heads and neurons; what reads them is divided.
    DirectWidth,
    /// New channels that are zero at first, with random weights.
    ZeroWidth,
    /// New layers with random weights on top, whose outputs a mask lets in step by step.
    RandomDepth,
    /// New channels, heads and neurons with random weights, which masks let in step by step.
    RandomWidth,
    /// LiGO in depth: every layer is a learned mixture of the source's layers.
    LearnDepth,
    /// LiGO in width: every weight is multiplied by learned matrices on both sides.
    LearnWidth,
}

impl GrowthOperator {
    /// Whether it changes widths.
    pub fn is_width(self) -> bool {
        matches!(self, Self::DirectWidth | Self::ZeroWidth | Self::RandomWidth | Self::LearnWidth)
    }

    /// Whether its weights are learned mixtures.
    pub fn is_learned(self) -> bool {
        matches!(self, Self::LearnDepth | Self::LearnWidth)
    }
}

/// What becomes of the optimizer's moments at a growth step.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, schemars::JsonSchema)]
pub enum OptimizerStatePolicy {
    /// Fresh moments and step 0, as in the paper.
    #[default]
    Reset,
    /// Moments of copied layers are copied, moments of new or zeroed weights are zero, and the step count goes on.
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
    /// What is special because the stage has grown.
    #[serde(default, skip_serializing_if = "GrowthTrainingPlan::is_ordinary")]
    pub after_growth: GrowthTrainingPlan,
}

impl TrainingPlan {
    /// Forward and backward passes of an optimizer step.
    pub fn micro_batches(&self) -> u64 {
        self.global_batch_tokens / self.micro_batch_tokens
    }
}

/// A learning-rate schedule with every length in tokens: of this stage, or of all stages that it runs over
/// (`after_growth.schedule_start_tokens` is where this one begins). The peak is `adam_w.learning_rate`.
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
        /// End of the last stage that it runs over.
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
    /// 6 N D with the non-embedding N, as the paper counts, whatever is frozen.
    pub six_nd: f64,
    /// Every multiply-add of every matrix product, output head and causal attention included, times two. What is frozen
    /// saves its share.
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
    /// Weights with the masks of a growth applied, while its ramp runs.
    #[serde(default)]
    pub masked_weights_bytes: u64,
    /// Sum.
    pub total_bytes: u64,
}

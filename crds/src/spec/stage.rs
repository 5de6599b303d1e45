//! Stages and growth.

use super::factor::GrowthFactor;
use super::model::ModelSpec;
use super::schema::without_descriptions;
use super::training::ScheduleSpec;
use crate::plan::{
    Freeze, GrowthOperator, LayerOrder, OptimizerStatePolicy, ScheduleAcrossGrowth, WidthSplit,
};
use crate::quantity::{StageTokens, TokenCount};
use k8s_openapi::api::core::v1::{ResourceRequirements, Toleration};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Steps for which LearnDepth and LearnWidth learn if nothing is said, as in the original LiGO (arXiv 2303.00980).
pub const DEFAULT_LEARN_STEPS: u32 = 100;

/// One architecture, trained for a number of tokens.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.replicas) || !has(self.elastic)")
        .message("set replicas for a fixed size or elastic for a range, not both"),
    validation = Rule::new(
        "!has(self.growth) || !(self.growth.operator in ['Stack', 'Interleave', 'ZeroDepth', 'RandomDepth', 'LearnDepth']) || has(self.growth.factor) || (has(self.model) && has(self.model.numHiddenLayers))"
    )
    .message("this operator needs to know how deep: set growth.factor (4 is the paper's choice) or model.numHiddenLayers"),
    validation = Rule::new(
        "!has(self.growth) || !has(self.growth.depth) || self.growth.depth.operator == 'LayerMap' || has(self.growth.depth.factor) || (has(self.model) && has(self.model.numHiddenLayers))"
    )
    .message("growth.depth needs to know how deep: set growth.depth.factor or model.numHiddenLayers"),
    validation = Rule::new(
        "!has(self.growth) || !(self.growth.operator in ['DirectWidth', 'ZeroWidth', 'RandomWidth', 'LearnWidth']) || has(self.growth.factor) || (has(self.model) && (has(self.model.hiddenSize) || has(self.model.intermediateSize) || has(self.model.numAttentionHeads) || has(self.model.numKeyValueHeads)))"
    )
    .message("operators of the width need to know how wide: set growth.factor, or the sizes that grow in the stage's model"),
    validation = Rule::new(
        "!has(self.growth) || !(self.growth.operator in ['DirectWidth', 'ZeroWidth', 'RandomWidth', 'LearnWidth']) || has(self.growth.depth) || !has(self.model) || !has(self.model.numHiddenLayers)"
    )
    .message("operators of the width keep the depth: remove model.numHiddenLayers, or add growth.depth"),
    validation = Rule::new(
        "!has(self.growth) || !has(self.model) || self.growth.operator in ['DirectWidth', 'ZeroWidth', 'RandomWidth', 'LearnWidth'] || !(has(self.model.hiddenSize) || has(self.model.intermediateSize) || has(self.model.numAttentionHeads) || has(self.model.numKeyValueHeads) || has(self.model.headDim))"
    )
    .message("this operator changes the depth only: keep numHiddenLayers and remove the sizes from the stage's model, or use an operator of the width"),
    validation = Rule::new(
        "!has(self.growth) || !has(self.model) || !(has(self.model.vocabSize) || has(self.model.maxPositionEmbeddings) || has(self.model.ropeTheta) || has(self.model.tieWordEmbeddings))"
    )
    .message("no growth changes vocabSize, maxPositionEmbeddings, ropeTheta or tieWordEmbeddings: remove them from the stage's model"),
    validation = Rule::new(
        "!has(self.growth) || !has(self.model) || self.growth.operator in ['ZeroWidth', 'RandomWidth'] || !has(self.model.rmsNormEps)"
    )
    .message("in a stage that grows, rmsNormEps belongs to operators ZeroWidth and RandomWidth: remove it from the stage's model"),
    validation = Rule::new(
        "!has(self.growth) || !has(self.model) || self.growth.operator in ['ZeroWidth', 'RandomDepth', 'RandomWidth'] || !has(self.model.initializer)"
    )
    .message("in a stage that grows, initializer belongs to operators ZeroWidth, RandomDepth and RandomWidth: remove it from the stage's model"),
    validation = Rule::new(
        "!has(self.growth) || !has(self.growth.schedule) || self.growth.schedule != 'Continue' || !has(self.training) || !has(self.training.schedule)"
    )
    .message("with growth.schedule: Continue the stage goes on in the schedule of the one before: remove training.schedule, or growth.schedule"),
    validation = Rule::new(
        "has(self.model) == has(oldSelf.model) && (!has(self.model) || self.model == oldSelf.model)"
    )
    .message("the model of a stage cannot be changed; create a new job instead"),
    validation = Rule::new(
        "has(self.growth) == has(oldSelf.growth) && (!has(self.growth) || self.growth == oldSelf.growth)"
    )
    .message("the growth of a stage cannot be changed; create a new job instead"),
    validation = Rule::new(
        "has(self.initFrom) == has(oldSelf.initFrom) && (!has(self.initFrom) || self.initFrom == oldSelf.initFrom)"
    )
    .message("initFrom cannot be changed; create a new job instead"),
    validation = Rule::new(
        "has(self.trainedBy) == has(oldSelf.trainedBy) && (!has(self.trainedBy) || self.trainedBy == oldSelf.trainedBy)"
    )
    .message("trainedBy cannot be changed; create a new job instead"),
    validation = Rule::new(
        "has(self.training) == has(oldSelf.training) && (!has(self.training) || self.training == oldSelf.training)"
    )
    .message("the training of a stage cannot be changed; create a new job instead"),
)]
pub struct StageSpec {
    /// Name, unique in the job.
    #[schemars(length(min = 1, max = 12), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Architecture where it differs from the job's. A stage that grows sets only what its operator changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSpec>,
    /// How the model is made from the stage before. Every stage but the first has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthSpec>,
    /// Weights that the first stage starts from. Default: random ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<InitFromSpec>,
    /// Another job that trains the first stage for this one: several jobs that begin alike train that part once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_by: Option<TrainedBySpec>,
    /// Tokens it trains, rounded up to whole steps; auto is the paper's guideline for when to grow. May be changed
    /// until the stage has finished.
    pub tokens: StageTokens,
    /// Trainer pods, fixed. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub replicas: Option<i32>,
    /// Trainer pods, following spec.replicas within bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elastic: Option<ElasticSpec>,
    /// How it trains, where it differs from the job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<StageTrainingSpec>,
    /// Parts of the trainer pods of this stage, merged over spec.template; a change takes effect at the next attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<StageTemplate>,
}

/// How the last checkpoint of one stage becomes the first one of the next.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "(self.operator == 'LayerMap' || (has(self.depth) && self.depth.operator == 'LayerMap')) == has(self.layerMap)"
    )
    .message("layerMap belongs to operator LayerMap: set both or neither"),
    validation = Rule::new("self.operator != 'LayerMap' || !has(self.factor)")
        .message("factor does not go with LayerMap: the list says how deep the model becomes, remove factor"),
    validation = Rule::new(
        "!has(self.zeroDepth) || self.operator == 'ZeroDepth' || (has(self.depth) && self.depth.operator == 'ZeroDepth')"
    )
    .message("zeroDepth belongs to operator ZeroDepth; remove it, or change operator"),
    validation = Rule::new("!has(self.directWidth) || self.operator == 'DirectWidth'")
        .message("directWidth belongs to operator DirectWidth; remove it, or change operator"),
    validation = Rule::new("!has(self.randomDepth) || self.operator == 'RandomDepth'")
        .message("randomDepth belongs to operator RandomDepth; remove it, or change operator"),
    validation = Rule::new("!has(self.randomWidth) || self.operator == 'RandomWidth'")
        .message("randomWidth belongs to operator RandomWidth; remove it, or change operator"),
    validation = Rule::new("!has(self.depth) || self.operator in ['DirectWidth', 'ZeroWidth', 'RandomWidth', 'LearnWidth']")
        .message("depth belongs to operators of the width, which can grow the depth in the same step; remove it"),
    validation = Rule::new(
        "!has(self.depth) || self.depth.operator != 'LearnDepth' || self.operator == 'LearnWidth'"
    )
    .message("depth.operator LearnDepth is learned together with LearnWidth; use operator LearnWidth, or another depth.operator"),
    validation = Rule::new("!has(self.learn) || self.operator in ['LearnDepth', 'LearnWidth']")
        .message("learn belongs to LearnDepth and LearnWidth; remove it, or change operator"),
    validation = Rule::new(
        "!(self.operator in ['LearnDepth', 'LearnWidth']) || !has(self.optimizerState) || self.optimizerState == 'Reset'"
    )
    .message("LearnDepth and LearnWidth mix weights, and moments of a mixture are not defined: use optimizerState Reset"),
    validation = Rule::new(
        "!has(self.freeze) || self.freeze == 'Nothing' || (!self.operator.startsWith('Learn') && (!self.operator.endsWith('Width') || has(self.depth)))"
    )
    .message("freeze trains new layers only, and neither a growth of the width nor a learned one has any: remove freeze, or add depth to the width"),
    validation = Rule::new("!has(self.freezeTokens) || (has(self.freeze) && self.freeze != 'Nothing')")
        .message("freezeTokens says how long something is frozen: set freeze to Source or SourceButHead, or remove it"),
    validation = Rule::new("!has(self.rewarmTokens) || (has(self.schedule) && self.schedule == 'Continue')")
        .message("rewarmTokens belongs to schedule: Continue; a schedule that restarts has warmupTokens, set those instead"),
)]
pub struct GrowthSpec {
    /// Depth: Stack, Interleave, LayerMap, ZeroDepth, RandomDepth, LearnDepth. Width: DirectWidth, ZeroWidth,
    /// RandomWidth, LearnWidth. docs/growth.md describes each.
    pub operator: GrowthOperator,
    /// How many times the layers (operators of the depth), or hiddenSize, intermediateSize and both numbers of heads
    /// (operators of the width) are multiplied; auto is the paper's guideline, four times the parameters. The stage's
    /// model can say it instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<GrowthFactor>,
    /// Source layers of LayerMap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_map: Option<LayerMapSpec>,
    /// Options of ZeroDepth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_depth: Option<ZeroDepthSpec>,
    /// Options of DirectWidth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_width: Option<DirectWidthSpec>,
    /// Options of RandomDepth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub random_depth: Option<RandomGrowthSpec>,
    /// Options of RandomWidth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub random_width: Option<RandomGrowthSpec>,
    /// Options of LearnDepth and LearnWidth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learn: Option<LearnSpec>,
    /// A growth of the depth in the same step as one of the width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<DepthGrowthSpec>,
    /// Share of random noise in all matrices afterwards, W = (1 - noise) W + noise E: the paper's ablation, best at
    /// 0.2 and harmful above. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub noise: Option<f64>,
    /// What becomes of the optimizer's moments. Default: Reset.
    #[serde(default)]
    pub optimizer_state: OptimizerStatePolicy,
    /// What does not train after the growth. With Source new layers alone train, with SourceButHead the final norm and
    /// the head too. Default: Nothing.
    #[serde(default)]
    pub freeze: Freeze,
    /// Tokens of the stage after which everything trains. Default: the tokens of the stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freeze_tokens: Option<TokenCount>,
    /// Whether the stage has a learning-rate schedule of its own, or goes on in that of the stage before. Default: Restart.
    #[serde(default)]
    pub schedule: ScheduleAcrossGrowth,
    /// With schedule Continue, tokens over which the learning rate rises again, linearly from 0. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewarm_tokens: Option<TokenCount>,
    /// Another learning rate for the parameters that the growth has added.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_parameters: Option<NewParametersSpec>,
}

/// Learning rate of the parameters that a growth has added: new layers, and new rows and columns (SPARKLING, arXiv
/// 2602.02472).
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NewParametersSpec {
    /// Their learning rate as a multiple of that of all others: 1.3 in SPARKLING.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub learning_rate_ratio: f64,
    /// Tokens over which the multiple goes from 1 to that. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ramp_tokens: Option<TokenCount>,
}

/// The source layer of every target layer; exactly one member beside zeroOutput.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "(has(self.layers) ? 1 : 0) + (has(self.pattern) ? 1 : 0) + (has(self.solar) ? 1 : 0) + (has(self.midas) ? 1 : 0) + (has(self.lidas) ? 1 : 0) + (has(self.llamaPro) ? 1 : 0) == 1"
    )
    .message("set exactly one of layers, pattern, solar, midas, lidas and llamaPro in layerMap"),
)]
pub struct LayerMapSpec {
    /// Source layers from 0, from the input up: [0, 1, 0, 1].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024), inner(range(max = 1023)))]
    pub layers: Option<Vec<u32>>,
    /// The paper's notation with layers from 1, one digit each: 12-3456*5-56 is layers 1 2, five times 3 4 5 6, then 5 6.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024), regex(pattern = r"^[1-9]+(\*[0-9]+)?(-[1-9]+(\*[0-9]+)?)*$"))]
    pub pattern: Option<String>,
    /// SOLAR's depth up-scaling: the model without its last layers, then the model without its first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solar: Option<SolarSpec>,
    /// MIDAS: the middle block is repeated next to itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub midas: Option<MiddleBlockSpec>,
    /// LIDAS: half of the block below the middle and half of the one above it are repeated in the middle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lidas: Option<MiddleBlockSpec>,
    /// LLaMA Pro: after every group of layers copies of its last ones, whose outputs are zero at first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llama_pro: Option<LlamaProSpec>,
    /// Whether every further copy of a layer begins with outputs of zero. Default: true with llamaPro, else false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_output: Option<bool>,
}

/// SOLAR's depth up-scaling.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SolarSpec {
    /// Layers that each of the two copies lacks: 8 makes 48 of 32.
    #[schemars(range(min = 0, max = 1023))]
    pub drop_layers: u32,
}

/// A block in the middle.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MiddleBlockSpec {
    /// Layers of a block, which is what is added.
    #[schemars(range(min = 1, max = 1023))]
    pub block_layers: u32,
}

/// LLaMA Pro.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LlamaProSpec {
    /// Groups that the layers are divided into.
    #[schemars(range(min = 1, max = 1023))]
    pub groups: u32,
    /// Layers added after each group. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1023))]
    pub copies: Option<u32>,
}

/// Options of ZeroDepth.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ZeroDepthSpec {
    /// Whether a new layer lies right above its source, or the new layers lie above all old ones.
    pub order: LayerOrder,
}

/// Options of DirectWidth.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DirectWidthSpec {
    /// How a weight is divided among the copies of the channel that it reads.
    pub split: WidthSplit,
}

/// Options of RandomDepth and RandomWidth.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RandomGrowthSpec {
    /// Tokens of the stage over which what is new is let into the model, from 0 to the whole of it. Default: a tenth of
    /// the stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ramp_tokens: Option<TokenCount>,
}

/// How the matrices of LearnDepth and LearnWidth are learned: on batches of the stage, with its AdamW and clipping.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LearnSpec {
    /// Steps that they are trained for; 0 leaves them as they begin, which makes LearnDepth a Stack.
    #[schemars(range(min = 0, max = 10000))]
    pub steps: u32,
    /// Their learning rate, constant over the steps. Default: the peak of the stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub learning_rate: Option<f64>,
}

impl Default for LearnSpec {
    fn default() -> Self {
        Self { steps: DEFAULT_LEARN_STEPS, learning_rate: None }
    }
}

/// A growth of the depth beside one of the width; layerMap and zeroDepth stand in growth.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.operator in ['Stack', 'Interleave', 'LayerMap', 'ZeroDepth', 'LearnDepth']")
        .message("depth.operator is one of Stack, Interleave, LayerMap, ZeroDepth and LearnDepth"),
    validation = Rule::new("self.operator != 'LayerMap' || !has(self.factor)")
        .message("depth.factor does not go with LayerMap: the list says how deep the model becomes, remove it"),
)]
pub struct DepthGrowthSpec {
    /// Stack, Interleave, LayerMap, ZeroDepth, or beside LearnWidth LearnDepth.
    pub operator: GrowthOperator,
    /// How many times the layers are multiplied; auto is 2, for the width multiplies the parameters already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<GrowthFactor>,
}

/// Given weights.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct InitFromSpec {
    /// Folder with config.json and safetensors, as Hugging Face lays it out: file://, s3://, gs:// or az://. Its
    /// architecture must be the one of the stage.
    #[schemars(length(max = 1024), regex(pattern = r"^(file|s3|gs|az)://.+$"))]
    pub uri: String,
}

/// A job whose first stage has the same name and is trained in the same way on the same data. This job waits until that
/// stage is complete and begins with a copy of its last checkpoint.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainedBySpec {
    /// Its name, in the same namespace and with the same storage.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub job: String,
}

/// Bounds of the number of trainer pods.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.minReplicas <= self.maxReplicas")
        .message("minReplicas is larger than maxReplicas; swap or change them"),
    validation = Rule::new(
        "!has(self.allowedReplicas) || self.allowedReplicas.all(r, self.minReplicas <= r && r <= self.maxReplicas)"
    )
    .message("every one of allowedReplicas must lie between minReplicas and maxReplicas"),
)]
pub struct ElasticSpec {
    /// Fewest pods that train.
    #[schemars(range(min = 1, max = 4096))]
    pub min_replicas: i32,
    /// Most pods that train.
    #[schemars(range(min = 1, max = 4096))]
    pub max_replicas: i32,
    /// The only sizes that are used. Default: every size whose ranks share the global batch evenly.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), inner(range(min = 1, max = 4096)))]
    pub allowed_replicas: Option<Vec<i32>>,
    /// Seconds that a larger size must be wanted before the stage restarts with it. Default: 300.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604800))]
    pub scale_up_delay_seconds: Option<i32>,
    /// Seconds that some pods may lack a node before the stage goes on with the largest size for which there are nodes;
    /// more than an autoscaler takes to add one. Default: 60.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604800))]
    pub capacity_timeout_seconds: Option<i32>,
}

/// What a stage trains differently from the job. What is left out is taken from spec.training.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageTrainingSpec {
    /// Tokens of one optimizer step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub global_batch_tokens: Option<TokenCount>,
    /// Tokens of one forward and backward pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<TokenCount>,
    /// The optimizer, member by member.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<StageOptimizerSpec>,
    /// The learning rate over the stage, as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleSpec>,
    /// Global norm to which gradients are clipped; 0 switches clipping off.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub gradient_clip: Option<f64>,
}

/// What a stage optimizes differently from the job.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageOptimizerSpec {
    /// AdamW.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adam_w: Option<StageAdamWSpec>,
}

/// AdamW; what is left out is taken from spec.training.optimizer.adamW.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageAdamWSpec {
    /// Peak learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub learning_rate: Option<f64>,
    /// Decay of the first moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.9999999))]
    pub beta1: Option<f64>,
    /// Decay of the second moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.9999999))]
    pub beta2: Option<f64>,
    /// Term that keeps the division finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub epsilon: Option<f64>,
    /// Decoupled weight decay.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub weight_decay: Option<f64>,
    /// Whether norm gains and embeddings decay too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_norms_and_embeddings: Option<bool>,
}

/// Parts of the trainer pods of one stage.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageTemplate {
    /// Resources of the trainer container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "without_descriptions::<Option<ResourceRequirements>>")]
    pub resources: Option<ResourceRequirements>,
    /// Labels of the nodes that the pods run on, added to those of spec.template.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pods tolerate, added to those of spec.template.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), schema_with = "without_descriptions::<Vec<Toleration>>")]
    pub tolerations: Vec<Toleration>,
}

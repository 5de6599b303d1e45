//! The `GrowthTrainingJob` object.

use super::data::DataSpec;
use super::model::ModelSpec;
use super::policy::{CheckpointSpec, EvaluationSpec, FailurePolicy, RunPolicy, SchedulingSpec};
use super::schema::without_descriptions;
use super::stage::StageSpec;
use super::storage::StorageSpec;
use super::training::TrainingSpec;
use crate::status::GrowthTrainingJobStatus;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// Trains a language model in stages; between two stages the model grows.
#[derive(CustomResource, Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[cfg_attr(feature = "cel", kube(cel))]
#[kube(
    group = "growth.dev",
    version = "v1alpha1",
    kind = "GrowthTrainingJob",
    plural = "growthtrainingjobs",
    shortname = "gtj",
    category = "training",
    namespaced,
    doc = "Trains a language model in stages; between two stages the model grows.",
    status = "GrowthTrainingJobStatus",
    derive = "PartialEq",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.currentStage"),
    printcolumn(
        name = "Progress",
        type_ = "integer",
        description = "Per cent of all tokens",
        json_path = ".status.progress.percent"
    ),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.progress.loss"),
    printcolumn(name = "Tokens/s", type_ = "integer", json_path = ".status.progress.tokensPerSecond"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restarts"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("size(self.metadata.name) <= 32").message(
        "metadata.name must be at most 32 characters, so that the names of its pods stay within 63; shorten it"
    ),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message(
        "metadata.name names Services too: start it with a letter and use only a-z, 0-9 and -"
    ),
    validation = Rule::new(
        "!has(self.spec.stages[0].trainedBy) || self.spec.stages[0].trainedBy.job != self.metadata.name"
    )
    .message("the first stage is trained by this job itself; remove trainedBy, or name another job")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.stages[0].growth)")
        .message("the first stage has no stage to grow from; remove growth from it"),
    validation = Rule::new("self.stages.filter(s, has(s.growth)).size() >= self.stages.size() - 1")
        .message("every stage after the first must grow the one before; add growth to it"),
    validation = Rule::new(
        "self.stages.filter(s, has(s.initFrom)).size() == (has(self.stages[0].initFrom) ? 1 : 0)"
    )
    .message("only the first stage can start from a given checkpoint; remove initFrom from the others"),
    validation = Rule::new(
        "self.stages.filter(s, has(s.trainedBy)).size() == (has(self.stages[0].trainedBy) ? 1 : 0)"
    )
    .message("only the first stage can be trained by another job; remove trainedBy from the others"),
    validation = Rule::new("self.stages[self.stages.size() - 1].tokens != 'auto'")
        .message("tokens: auto needs a later stage to grow into; write the tokens of the last stage"),
    validation = Rule::new(
        "has(self.model.numHiddenLayers) || (has(self.stages[0].model) && has(self.stages[0].model.numHiddenLayers))"
    )
    .message("numHiddenLayers is missing; set it in the model of the first stage"),
    validation = Rule::new(
        "has(self.model.hiddenSize) || (has(self.stages[0].model) && has(self.stages[0].model.hiddenSize))"
    )
    .message("hiddenSize is missing; set it in model"),
    validation = Rule::new(
        "has(self.model.intermediateSize) || (has(self.stages[0].model) && has(self.stages[0].model.intermediateSize))"
    )
    .message("intermediateSize is missing; set it in model (about 8/3 of hiddenSize is usual)"),
    validation = Rule::new(
        "has(self.model.numAttentionHeads) || (has(self.stages[0].model) && has(self.stages[0].model.numAttentionHeads))"
    )
    .message("numAttentionHeads is missing; set it in model"),
    validation = Rule::new(
        "has(self.model.vocabSize) || has(self.data.tokenizer.train) || (has(self.stages[0].model) && has(self.stages[0].model.vocabSize))"
    )
    .message("vocabSize is missing; set it in model to the size of the tokenizer at data.tokenizer.uri"),
    validation = Rule::new(
        "!has(self.model.vocabSize) || !has(self.data.tokenizer.train) || self.model.vocabSize >= self.data.tokenizer.train.vocabSize"
    )
    .message("model.vocabSize is smaller than data.tokenizer.train.vocabSize; remove it or make it at least as large"),
    validation = Rule::new(
        "!has(self.model.maxPositionEmbeddings) || self.training.sequenceLength <= self.model.maxPositionEmbeddings"
    )
    .message("training.sequenceLength is longer than model.maxPositionEmbeddings; lower the one or raise the other"),
    validation = Rule::new(
        "!self.stages.exists(s, has(s.growth) && has(s.growth.freeze) && s.growth.freeze == 'SourceButHead') || !((has(self.stages[0].model) && has(self.stages[0].model.tieWordEmbeddings)) ? self.stages[0].model.tieWordEmbeddings : (has(self.model.tieWordEmbeddings) && self.model.tieWordEmbeddings))"
    )
    .message("freeze: SourceButHead trains the head, but with tieWordEmbeddings the head is the embedding; use freeze: Source, or untie them"),
    // Sixteen indices are all there are; joining the names instead exceeds the API server's cost budget.
    validation = Rule::new(
        "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15].all(i, i >= oldSelf.stages.size() || (i < self.stages.size() && self.stages[i].name == oldSelf.stages[i].name))"
    )
    .message("stages may be appended but not removed, renamed or reordered; create a new job instead"),
    validation = Rule::new(
        "(has(self.managedBy) ? self.managedBy : '') == (has(oldSelf.managedBy) ? oldSelf.managedBy : '')"
    )
    .message("managedBy cannot be changed; create a new job instead"),
)]
pub struct GrowthTrainingJobSpec {
    /// Ends the current attempt after a checkpoint and frees its resources; false goes on from that checkpoint.
    #[serde(default)]
    pub suspend: bool,
    /// Controller that runs this job. Default: this operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub managed_by: Option<String>,
    /// Trainer pods of elastic stages, kept within the bounds of the stage; the target of /scale.
    #[serde(default = "one_replica")]
    #[schemars(range(min = 1, max = 4096))]
    pub replicas: i32,
    /// Architecture that all stages share; the first stage may override it, later ones grow.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("model cannot be changed; create a new job instead"))]
    pub model: ModelSpec,
    /// Text and tokenizer.
    #[x_kube(validation = Rule::new("self == oldSelf").message("data cannot be changed; create a new job instead"))]
    pub data: DataSpec,
    /// Where checkpoints and prepared data live.
    #[x_kube(validation = Rule::new("self == oldSelf").message("storage cannot be changed; create a new job instead"))]
    pub storage: StorageSpec,
    /// How every stage is trained.
    #[x_kube(validation = Rule::new("self == oldSelf").message("training cannot be changed; create a new job instead"))]
    pub training: TrainingSpec,
    /// When checkpoints are written and how many are kept.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// When the validation loss is measured.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// What is trained, in order. Stages may be appended while the job runs.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub stages: Vec<StageSpec>,
    /// Base of all trainer pods; a change takes effect at the next attempt. Default: the operator's trainer image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "without_descriptions::<Option<PodTemplateSpec>>")]
    pub template: Option<PodTemplateSpec>,
    /// Deadlines, and what remains after the end.
    #[serde(default)]
    pub run_policy: RunPolicy,
    /// What a failure means.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Queue and priority.
    #[serde(default)]
    pub scheduling: SchedulingSpec,
}

fn one_replica() -> i32 {
    1
}

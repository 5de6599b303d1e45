//! The observed state: what the operator reports.

use crate::conditions::MAX_CONDITIONS;
use crate::plan::GrowthOperator;
use crate::plan::growth::GrowthEffect;
use crate::spec::schema::without_descriptions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const _: () = assert!(MAX_CONDITIONS == 16, "the schema below says 16");

/// What the operator has observed.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrowthTrainingJobStatus {
    /// Generation of the spec that this status describes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Summary of the conditions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Stage that runs, or that ran last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_stage: Option<String>,
    /// Trainer pods of the current attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Trainer pods that are ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,
    /// Labels of the trainer pods, for /scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Restarts that count towards maxRestarts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarts: Option<i32>,
    /// Of these, the ones since restartWindowStart: what maxRestarts is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarts_in_window: Option<i32>,
    /// First counted restart of the present failurePolicy.windowSeconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_window_start: Option<Time>,
    /// Times that work has been started, resumes and preemptions included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution_attempts: Option<i32>,
    /// Seconds that the pods of attempts that have ended were at work: what activeDeadlineSeconds is compared with, together
    /// with the time since readyTime of the attempt that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_seconds: Option<i64>,
    /// When the first pod was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the job ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// How far it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// The preparation of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<AttemptStatus>,
    /// Stages that have begun, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub stages: Vec<StageStatus>,
    /// Kubernetes conditions: Accepted, Suspended, PodsScheduled, Running, Progressing, CheckpointAvailable, Scaling,
    /// Degraded, Complete, Failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), schema_with = "without_descriptions::<Vec<Condition>>")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Summary of the conditions, for people; programs read the conditions.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, Hash, JsonSchema)]
pub enum Phase {
    /// Nothing has been started.
    #[default]
    Pending,
    /// The text is being turned into tokens.
    Preparing,
    /// A growth step runs.
    Transforming,
    /// Waits for quota or for a place on the nodes.
    Queued,
    /// Pods are starting.
    Starting,
    /// Steps advance.
    Training,
    /// The last checkpoint of a stage is being committed.
    Committing,
    /// An attempt ended and the next one is being prepared.
    Restarting,
    /// The attempt ends because the job is to be suspended.
    Suspending,
    /// Suspended; holds no pods.
    Suspended,
    /// All stages are complete.
    Complete,
    /// Ended without finishing.
    Failed,
}

impl Phase {
    /// Whether the job has ended for good.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Complete | Self::Failed)
    }
}

/// How far a job is.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// Per cent of the tokens of all stages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
    /// Tokens trained, over all stages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<i64>,
    /// Tokens a second, over all pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<i64>,
    /// Training loss in nats a token, as text: 2.31.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<String>,
    /// Seconds to the end of the job at the present speed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
    /// When the trainer said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_updated: Option<Time>,
}

/// One stage that has begun.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageStatus {
    /// Name of the stage.
    pub name: String,
    /// Where it is.
    pub state: StageState,
    /// The growth step, of a stage that grows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transform: Option<AttemptStatus>,
    /// What the growth step did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthStatus>,
    /// The training attempt that runs or ran last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<AttemptStatus>,
    /// The newest attempt that the storage knew before this object began: a job that ran elsewhere goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known_attempts: Option<i32>,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Trainer pods that it should have; an elastic stage may have others for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_replicas: Option<i32>,
    /// Trainer pods that are ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,
    /// What the nodes had room for, when some pods of an elastic stage found none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<CapacityStatus>,
    /// Its last committed checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointStatus>,
    /// Its last failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<FailureStatus>,
}

/// A growth step that is done: a summary of growth.json in its checkpoints. Numbers are text.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrowthStatus {
    /// Its operator.
    pub operator: GrowthOperator,
    /// The paper's R_c: pairs of neighbouring layers that were neighbours before, of all pairs, as 21/23.
    pub connection_rate: String,
    /// What it does to the function by its definition.
    pub expected_effect: GrowthEffect,
    /// Largest absolute difference of two logits before and after, where that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_logit_difference: Option<String>,
    /// Loss right before, in nats a token, where it was measured on held-out text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_before: Option<String>,
    /// Loss right after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_after: Option<String>,
}

impl std::fmt::Display for GrowthStatus {
    /// In one line, for people.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { operator, connection_rate, expected_effect, .. } = self;
        write!(formatter, "{operator:?}, connection rate {connection_rate}, {expected_effect}")?;
        if let (Some(before), Some(after)) = (&self.loss_before, &self.loss_after) {
            write!(formatter, ", loss {before} -> {after}")?;
        }
        if let Some(difference) = &self.max_logit_difference {
            write!(formatter, ", largest difference of two logits {difference}")?;
        }
        Ok(())
    }
}

/// How many pods of a stage found a node.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CapacityStatus {
    /// Pods that had one.
    pub replicas: i32,
    /// Pods that the stage should have had. When it should have another number, that is tried without waiting.
    pub desired_replicas: i32,
    /// When that was. After scaleUpDelaySeconds, and ten minutes at least, it is tried again.
    pub time: Time,
}

/// One attempt at a piece of work: a Job with its pods.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptStatus {
    /// From 1. It fences checkpoints: an attempt must not commit once a higher one has.
    pub number: i32,
    /// Its Job.
    pub job_name: String,
    /// The Job, once it was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_uid: Option<String>,
    /// Not to be started before: the back-off after a failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Time>,
    /// When its Job was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// Since when all its pods have been ready: the deadline for starting ends here. Absent once the attempt has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_time: Option<Time>,
    /// When its work was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

/// Where a stage is.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, Hash, JsonSchema)]
pub enum StageState {
    /// Has not begun.
    #[default]
    Pending,
    /// Its growth step runs.
    Transforming,
    /// Trains, or is about to.
    Training,
    /// Has its last checkpoint.
    Complete,
    /// Ended without finishing.
    Failed,
}

/// A committed checkpoint.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointStatus {
    /// Its folder.
    pub uri: String,
    /// Optimizer steps done in the stage.
    pub step: i64,
    /// Tokens trained in the stage.
    pub tokens: i64,
    /// Digest of the state.
    pub digest: String,
    /// When it was committed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub committed_at: Option<Time>,
}

/// Why an attempt ended.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailureStatus {
    /// One word.
    pub reason: String,
    /// One sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Node of the pod that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Exit code of its trainer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// When.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

//! Checkpoints, evaluation, deadlines, failures and queues: all of it may change while a job runs.

use crate::quantity::TokenCount;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// When checkpoints are written and how many are kept. Every stage ends with one.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CheckpointSpec {
    /// Writes one every so many tokens, besides everySeconds. Default: by time only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_tokens: Option<TokenCount>,
    /// Writes one every so many seconds: the most that a failure can cost.
    #[schemars(range(min = 1, max = 604800))]
    pub every_seconds: i64,
    /// How many of each stage are kept. The one that a later stage starts from is always kept.
    #[schemars(range(min = 1, max = 1000))]
    pub keep_last: i32,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every_tokens: None, every_seconds: 600, keep_last: 2 }
    }
}

/// When the validation loss is measured: at the start of a stage, at its end, and in between.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EvaluationSpec {
    /// Tokens trained between two measurements. Default: a tenth of the stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_tokens: Option<TokenCount>,
    /// Tokens that one measurement reads at most.
    pub tokens: TokenCount,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self { every_tokens: None, tokens: TokenCount(65_536) }
    }
}

/// Deadlines, and what remains after the end.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RunPolicy {
    /// Seconds that pods may be at work (status.activeSeconds): queues, starts and suspensions do not count. Default: no
    /// limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub active_deadline_seconds: Option<i64>,
    /// Seconds within which all pods of an attempt must be ready once they were admitted. Default: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub startup_deadline_seconds: Option<i64>,
    /// Seconds without a finished step after which an attempt counts as failed.
    #[schemars(range(min = 1))]
    pub progress_deadline_seconds: i64,
    /// Seconds after the end at which the object deletes itself. Checkpoints stay. Default: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i64>,
}

impl Default for RunPolicy {
    fn default() -> Self {
        Self {
            active_deadline_seconds: None,
            startup_deadline_seconds: None,
            progress_deadline_seconds: 1800,
            ttl_seconds_after_finished: None,
        }
    }
}

/// What a failure means. A preemption or a drained node is no failure: it restarts the stage at no cost.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FailurePolicy {
    /// Restarts after which the job fails.
    #[schemars(range(min = 0, max = 100000))]
    pub max_restarts: i32,
    /// Seconds after which a restart no longer counts towards maxRestarts. Default: it always counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 60))]
    pub window_seconds: Option<i64>,
    /// The first rule that matches decides; without a match the stage restarts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub rules: Vec<FailureRule>,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: 10, window_seconds: None, rules: Vec::new() }
    }
}

/// What certain failures mean.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.onExitCodes) != has(self.onReasons)")
        .message("set exactly one of onExitCodes and onReasons in a failure rule"),
)]
pub struct FailureRule {
    /// Name, shown in conditions and events.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// What to do.
    pub action: FailureAction,
    /// Exit codes of the trainer that match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(range(min = 1, max = 255)))]
    pub on_exit_codes: Option<Vec<i32>>,
    /// Reasons that match: of the pod or of the container (OOMKilled, Evicted, ...).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 64)))]
    pub on_reasons: Option<Vec<String>>,
}

/// What a failure rule does.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, JsonSchema)]
pub enum FailureAction {
    /// Ends the job.
    FailJob,
    /// Restarts the stage from its last checkpoint; counts towards maxRestarts.
    RestartStage,
    /// Restarts the stage from its last checkpoint; does not count.
    RestartStageAndIgnoreMaxRestarts,
}

/// Queue and priority of all pods.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SchedulingSpec {
    /// Kueue queue in the job's namespace; every stage is admitted by itself. Default: no queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub queue_name: Option<String>,
    /// PriorityClass of the pods. Default: that of spec.template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
}

//! What rank 0 of a training attempt answers at `/progress`.

use crate::status::CheckpointStatus;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// How far an attempt is.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// The stage.
    pub stage: String,
    /// The attempt.
    pub attempt: i32,
    /// Optimizer steps done in the stage.
    pub step: u64,
    /// Tokens trained in the stage.
    pub tokens: u64,
    /// Tokens of the whole stage.
    pub total_tokens: u64,
    /// Tokens a second over the last steps of this attempt; 0 before the first.
    pub tokens_per_second: f64,
    /// Training loss of the last step in nats a token; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss: Option<f64>,
    /// The last checkpoint that this attempt started from or has committed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub checkpoint: Option<CheckpointStatus>,
    /// When the last step was done, or when the attempt began.
    pub updated_at: Timestamp,
}

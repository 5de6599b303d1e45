//! The last word of a trainer pod. It goes into the pod's termination message, so it survives an operator that was away.

use super::{CheckpointManifest, contract::MAX_OUTCOME_BYTES};
use crate::status::CheckpointStatus;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How a pod's work ended.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// What became of it.
    pub result: OutcomeResult,
    /// Training and growth: the checkpoint that is committed now.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub checkpoint: Option<CheckpointStatus>,
    /// Data preparation: the newest attempt of every stage that the storage knows already, so that a job that began
    /// elsewhere goes on with higher numbers.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub attempts: BTreeMap<String, i32>,
    /// Failure: what is wrong, where, and what to do.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<String>,
}

/// What became of a pod's work.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutcomeResult {
    /// All of it is done.
    Finished,
    /// It was asked to stop and has committed where it stood.
    Stopped,
    /// It failed.
    Failed,
}

impl Outcome {
    /// All is done.
    pub fn finished(checkpoint: Option<CheckpointStatus>) -> Self {
        Self { result: OutcomeResult::Finished, checkpoint, attempts: BTreeMap::new(), message: None }
    }

    /// It stopped where `checkpoint` is.
    pub fn stopped(checkpoint: CheckpointStatus) -> Self {
        Self { result: OutcomeResult::Stopped, ..Self::finished(Some(checkpoint)) }
    }

    /// It failed. A message that is too long for a termination message loses its end.
    pub fn failed(message: &str) -> Self {
        // JSON may need two bytes for one, and the frame needs some.
        let mut end = message.len().min(MAX_OUTCOME_BYTES / 2 - 100);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        let message = Some(message[..end].to_owned());
        Self { result: OutcomeResult::Failed, message, ..Self::finished(None) }
    }

    /// Reads a termination message. `None`: it is none of ours, which a killed pod's is not.
    pub fn parse(termination_message: &str) -> Option<Self> {
        serde_json::from_str(termination_message).ok()
    }
}

/// What the status says of the checkpoint with this manifest, in the folder `uri`.
pub fn checkpoint_status(manifest: &CheckpointManifest, uri: &str) -> CheckpointStatus {
    CheckpointStatus {
        uri: uri.to_owned(),
        step: i64::try_from(manifest.step).unwrap_or(i64::MAX),
        tokens: i64::try_from(manifest.tokens).unwrap_or(i64::MAX),
        digest: manifest.digest.clone(),
        committed_at: Some(Time(manifest.committed_at)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_outcome_is_read_as_it_was_written() {
        let checkpoint = CheckpointStatus {
            uri: "s3://b/x".into(),
            step: 3,
            tokens: 12,
            digest: "blake3:0".into(),
            committed_at: None,
        };
        let outcome = Outcome::stopped(checkpoint);
        assert_eq!(Outcome::parse(&serde_json::to_string(&outcome).unwrap()), Some(outcome));
        assert_eq!(Outcome::parse("Killed"), None);
    }

    #[test]
    fn a_long_failure_fits_a_termination_message() {
        for text in ["\"".repeat(10_000), "ä".repeat(10_000), String::new()] {
            let json = serde_json::to_string(&Outcome::failed(&text)).unwrap();
            assert!(json.len() <= MAX_OUTCOME_BYTES, "{}", json.len());
            assert_eq!(Outcome::parse(&json).unwrap().result, OutcomeResult::Failed);
        }
    }
}

//! The last word of a trainer pod. It goes into the pod's termination message, so it survives an operator that was away.

use super::{CheckpointManifest, GrowthRecord, GrowthSample, contract::MAX_OUTCOME_BYTES};
use crate::status::{CheckpointStatus, GrowthStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// How a pod's work ended.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// What became of it.
    pub result: OutcomeResult,
    /// Training and growth: the checkpoint that is committed now. Data preparation: the last one of the first stage, where
    /// another job has trained that (`trainedBy`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub checkpoint: Option<CheckpointStatus>,
    /// Growth: what it did, where the checkpoint says so.
    #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "readable")]
    pub growth: Option<GrowthStatus>,
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
        let attempts = BTreeMap::new();
        Self { result: OutcomeResult::Finished, checkpoint, growth: None, attempts, message: None }
    }

    /// A growth step is done.
    pub fn grown(checkpoint: CheckpointStatus, record: Option<&GrowthRecord>) -> Self {
        Self { growth: record.map(growth_status), ..Self::finished(Some(checkpoint)) }
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

/// `None` for what this version cannot read: a record for people is not worth the outcome that it comes with.
fn readable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<GrowthStatus>, D::Error> {
    Ok(serde_json::from_value(serde_json::Value::deserialize(deserializer)?).ok())
}

/// What the status says of a growth step.
pub fn growth_status(record: &GrowthRecord) -> GrowthStatus {
    let number = |value: Option<f64>, text: fn(f64) -> String| value.map_or("not finite".to_owned(), text);
    // The loss of random tokens says nothing.
    let held_out = record.measured.as_ref().filter(|measured| measured.sample == GrowthSample::HeldOut);
    let loss = |loss: Option<f64>| number(loss, |loss| format!("{loss:.4}"));
    GrowthStatus {
        operator: record.operator,
        connection_rate: format!("{}/{}", record.connection_rate.kept, record.connection_rate.pairs),
        expected_effect: record.expected,
        max_logit_difference: record
            .measured
            .as_ref()
            .map(|measured| number(measured.max_logit_difference, |difference| format!("{difference:.2e}"))),
        loss_before: held_out.map(|measured| loss(measured.loss_before)),
        loss_after: held_out.map(|measured| loss(measured.loss_after)),
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
    use super::super::{ConnectionRate, GrowthMeasurement};
    use super::*;
    use crate::plan::growth::GrowthEffect;
    use crate::plan::{GrowthOperator, OptimizerStatePolicy};

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

    fn record(sample: GrowthSample, loss_after: Option<f64>) -> GrowthRecord {
        GrowthRecord {
            operator: GrowthOperator::Stack,
            layers: vec![0, 1, 0, 1],
            new_layers: 0,
            connection_rate: ConnectionRate { kept: 2, pairs: 3 },
            source_parameters: 10,
            target_parameters: 20,
            optimizer_state: OptimizerStatePolicy::Reset,
            expected: GrowthEffect::Spike,
            reason: "layers run more than once".into(),
            measured: Some(GrowthMeasurement {
                sample,
                tokens: 512,
                max_logit_difference: Some(3.25),
                max_logit: Some(9.0),
                loss_before: Some(4.0),
                loss_after,
            }),
            learned: None,
            // More than a termination message holds.
            new_tensors: vec!["model.layers.2.mlp.down_proj.weight".into(); 500],
            widened_tensors: Vec::new(),
            zero_tensors: Vec::new(),
        }
    }

    #[test]
    fn a_growth_step_says_what_it_did_in_few_words() {
        let outcome = Outcome::grown(CheckpointStatus::default(), Some(&record(GrowthSample::HeldOut, None)));
        let json = serde_json::to_string(&outcome).unwrap();
        assert!(json.len() <= MAX_OUTCOME_BYTES / 4, "{}", json.len());
        assert_eq!(Outcome::parse(&json), Some(outcome.clone()));
        assert_eq!(
            outcome.growth.unwrap().to_string(),
            "Stack, connection rate 2/3, the loss jumps at first, loss 4.0000 -> not finite, largest difference of two \
             logits 3.25e0"
        );
        let random = growth_status(&record(GrowthSample::Random, Some(4.5)));
        assert_eq!((random.loss_before, random.max_logit_difference.as_deref()), (None, Some("3.25e0")));
    }

    #[test]
    fn an_unknown_growth_costs_nothing_else() {
        let said = r#"{"result": "Finished", "growth": {"operator": "FutureDepth"}}"#;
        assert_eq!(Outcome::parse(said), Some(Outcome::finished(None)));
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

//! The record of a stage: losses, learning rates, validation. It travels inside each checkpoint, so a resumed run
//! goes on writing the same record, and a report needs nothing else.

use serde::{Deserialize, Serialize};

/// Step records kept at most; beyond that every second one goes.
const MAX_STEP_RECORDS: usize = 4096;

/// The record of a stage up to a checkpoint.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// One record every `stride` steps.
    pub steps: Vec<StepRecord>,
    /// Distance of the records in `steps`.
    pub stride: u64,
    /// Validation.
    pub evaluations: Vec<EvaluationRecord>,
    /// Seconds spent in steps, over all attempts, up to this checkpoint.
    pub training_seconds: f64,
}

/// One optimizer step.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens of the stage, this step included.
    pub tokens: u64,
    /// Mean loss, in nats.
    pub loss: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Gradient norm before clipping.
    pub gradient_norm: f64,
}

/// One measurement of the validation loss.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationRecord {
    /// Steps done before it.
    pub step: u64,
    /// Tokens of the stage trained before it.
    pub tokens: u64,
    /// Mean loss, in nats.
    pub loss: f64,
}

impl History {
    /// Adds a step, and thins the records when there are many.
    pub fn record_step(&mut self, record: StepRecord) {
        self.stride = self.stride.max(1);
        if record.step.is_multiple_of(self.stride) {
            self.steps.push(record);
        }
        if self.steps.len() > MAX_STEP_RECORDS {
            self.stride *= 2;
            let stride = self.stride;
            self.steps.retain(|record| record.step.is_multiple_of(stride));
        }
    }

    /// Whether the validation loss after `step` steps is known.
    pub fn has_evaluation(&self, step: u64) -> bool {
        self.evaluations.iter().any(|record| record.step == step)
    }

    /// Validation loss before the first step.
    pub fn first_loss(&self) -> Option<f64> {
        self.evaluations.first().filter(|record| record.step == 0).map(|record| record.loss)
    }

    /// The latest validation loss.
    pub fn last_loss(&self) -> Option<f64> {
        self.evaluations.last().map(|record| record.loss)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_record_is_thinned_evenly() {
        let mut history = History::default();
        for step in 1..=20_000 {
            history.record_step(StepRecord {
                step,
                tokens: step,
                loss: 1.0,
                learning_rate: 1.0,
                gradient_norm: 1.0,
            });
        }
        assert!(history.steps.len() <= MAX_STEP_RECORDS && history.steps.len() > MAX_STEP_RECORDS / 2);
        assert!(history.steps.windows(2).all(|pair| pair[1].step - pair[0].step == history.stride));
    }
}

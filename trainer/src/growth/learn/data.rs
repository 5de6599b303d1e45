//! The batches that matrices are learned on.

use super::{LearnError, Result};
use crate::checkpoint::digest_bytes;
use crate::data::{Dataset, TrainingOrder};
use growth_crds::plan::{LearnPlan, ModelConfig};
use serde_json::{Value, json};

/// Where the tokens come from.
#[derive(Debug, Clone)]
pub enum LearnData<'a> {
    /// What a stage will train on, from its first token. The stage begins there all the same: these tokens are seen again.
    Stage {
        /// The prepared data.
        dataset: &'a Dataset,
        /// Weights of its sources.
        weights: Vec<f64>,
        /// Position of the stage in the data.
        first_token: u64,
    },
    /// A text, sequence after sequence, and again from the beginning.
    Text(Vec<u32>),
}

impl LearnData<'_> {
    /// What the batches depend on beside the plan.
    pub(super) fn identity(&self) -> Value {
        match self {
            Self::Stage { dataset, weights, first_token } => {
                json!({"dataset": dataset.digest(), "weights": weights, "firstToken": first_token})
            }
            Self::Text(ids) => json!({"text": digest_bytes(bytemuck::cast_slice(ids))}),
        }
    }

    pub(super) fn open(&self, plan: &LearnPlan, model: &ModelConfig) -> Result<Batches<'_>> {
        let sequence = plan.sequence_length as usize;
        match self {
            Self::Stage { dataset, weights, first_token } => {
                let (tokenizer, model) = (dataset.tokenizer().vocab_size(), model.vocab_size);
                if tokenizer > model {
                    return Err(LearnError::Vocabulary { tokenizer, model });
                }
                let order = TrainingOrder::new(dataset, weights, sequence, plan.seed)?;
                Ok(Batches::Stage { dataset, order, first_sample: first_token / sequence as u64 })
            }
            Self::Text(ids) => {
                if ids.len() <= sequence {
                    return Err(LearnError::ShortText { tokens: ids.len(), needed: sequence + 1 });
                }
                let largest = ids.iter().copied().max().unwrap_or_default();
                if largest >= model.vocab_size {
                    return Err(LearnError::Vocabulary { tokenizer: largest + 1, model: model.vocab_size });
                }
                Ok(Batches::Text { ids, sequence })
            }
        }
    }
}

/// Batches in order.
pub(super) enum Batches<'a> {
    Stage { dataset: &'a Dataset, order: TrainingOrder, first_sample: u64 },
    Text { ids: &'a [u32], sequence: usize },
}

impl Batches<'_> {
    /// Fills whole sequences, from the sequence `first` on.
    pub(super) fn fill(&self, first: u64, ids: &mut [u32], targets: &mut [u32]) -> Result<()> {
        match self {
            Self::Stage { dataset, order, first_sample } => {
                Ok(dataset.batch(order, first_sample + first, ids, targets)?)
            }
            Self::Text { ids: text, sequence } => {
                let sequences = (text.len() - 1) / sequence;
                let rows = ids.chunks_exact_mut(*sequence).zip(targets.chunks_exact_mut(*sequence));
                for (row, (ids, targets)) in rows.enumerate() {
                    let start = (first as usize + row) % sequences * sequence;
                    ids.copy_from_slice(&text[start..start + sequence]);
                    targets.copy_from_slice(&text[start + 1..start + 1 + sequence]);
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_again_from_its_beginning() {
        let text: Vec<u32> = (0..8).collect();
        let batches = Batches::Text { ids: &text, sequence: 3 };
        let (mut ids, mut targets) = ([0; 6], [0; 6]);
        batches.fill(1, &mut ids, &mut targets).unwrap();
        assert_eq!((ids, targets), ([3, 4, 5, 0, 1, 2], [4, 5, 6, 1, 2, 3]));
    }
}

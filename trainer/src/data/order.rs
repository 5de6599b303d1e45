//! Which sequence the n-th sample of a job is: a pure function, so that no restart, batch size or number of
//! replicas repeats or skips one.

use super::permutation::Permutation;
use super::{Dataset, Result, field_error};
use growth_crds::spec::data::DataSource;

/// Samples in which the shares of the sources are exact.
const BLOCK: u64 = 4096;

/// The order of a job's training sequences.
#[derive(Debug, Clone)]
pub struct TrainingOrder {
    sequence_length: u32,
    seed: u64,
    sources: Vec<SourceOrder>,
}

#[derive(Debug, Clone)]
struct SourceOrder {
    /// Whole sequences of the source.
    sequences: u64,
    /// Samples of a block that are of this source.
    quota: u64,
}

/// A training sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sample {
    /// Position of the source in `spec.data.train`.
    pub source: usize,
    /// Position of the sequence in the source: its first token is that times the sequence length.
    pub sequence: u64,
}

impl TrainingOrder {
    /// The order in which the prepared `sources` are read, mixed by their weights.
    ///
    /// # Errors
    /// When a source holds no whole sequence, or its share is too small for the mixture.
    pub fn new(dataset: &Dataset, sources: &[DataSource], sequence_length: u32, seed: u64) -> Result<Self> {
        let tokens: Vec<u64> = dataset.training_parts().iter().map(|part| part.tokens).collect();
        let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        Self::from_sizes(&tokens, &weights, sequence_length, seed)
    }

    fn from_sizes(tokens: &[u64], weights: &[f64], sequence_length: u32, seed: u64) -> Result<Self> {
        if tokens.len() != weights.len() {
            let reason = format!("the prepared data has {} sources, the job {}", tokens.len(), weights.len());
            return Err(field_error("spec.data.train", reason));
        }
        let mut sources = Vec::new();
        for (index, (&tokens, quota)) in tokens.iter().zip(quotas(weights)).enumerate() {
            // The target of a sequence's last token is the token after it.
            let sequences = tokens.saturating_sub(1) / u64::from(sequence_length);
            let field = format!("spec.data.train[{index}]");
            if sequences == 0 {
                let reason = format!("{tokens} tokens hold no sequence of {sequence_length}; add text, or lower spec.training.sequenceLength");
                return Err(field_error(field, reason));
            }
            if quota == 0 {
                let reason = format!("its share of the mixture is below 1/{BLOCK}; raise it, or leave the source out");
                return Err(field_error(format!("{field}.weight"), reason));
            }
            sources.push(SourceOrder { sequences, quota });
        }
        Ok(Self { sequence_length, seed, sources })
    }

    /// Tokens of a sequence.
    pub fn sequence_length(&self) -> u32 {
        self.sequence_length
    }

    /// The sample at position `index` of the job, from 0.
    ///
    /// A block of [`BLOCK`] samples deals its slots to the sources in proportion to their weights, in an order of
    /// its own. The n-th slot of a source is the n-th sequence of its endless list of epochs, each in an order of
    /// its own.
    pub fn sample(&self, index: u64) -> Sample {
        let (block, position) = (index / BLOCK, index % BLOCK);
        let mut slot = Permutation::new(BLOCK, self.seed, "mixture", block).apply(position);
        for (source, order) in self.sources.iter().enumerate() {
            if slot < order.quota {
                let sequence = self.sequence(source, block * order.quota + slot);
                return Sample { source, sequence };
            }
            slot -= order.quota;
        }
        unreachable!("the quotas of a block add up to its size")
    }

    fn sequence(&self, source: usize, index: u64) -> u64 {
        let sequences = self.sources[source].sequences;
        let (epoch, position) = (index / sequences, index % sequences);
        Permutation::new(sequences, self.seed, &format!("sequences of source {source}"), epoch).apply(position)
    }

    /// How often `tokens` training tokens read each source through.
    pub fn epochs(&self, tokens: u64) -> Vec<f64> {
        let samples = tokens as f64 / f64::from(self.sequence_length);
        let share = |order: &SourceOrder| order.quota as f64 / BLOCK as f64;
        self.sources.iter().map(|order| samples * share(order) / order.sequences as f64).collect()
    }
}

/// Whole slots of a block for each weight, by largest remainder: what is left after rounding down goes to those that
/// lost most, the first among equals.
fn quotas(weights: &[f64]) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| weight / total * BLOCK as f64).collect();
    let mut quotas: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
    let mut by_loss: Vec<usize> = (0..weights.len()).collect();
    by_loss.sort_by(|&a, &b| (exact[b].fract()).total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let left = BLOCK.saturating_sub(quotas.iter().sum()) as usize;
    for &index in by_loss.iter().cycle().take(left) {
        quotas[index] += 1;
    }
    quotas
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn an_epoch_holds_every_sequence_once(sequences in 1u64..6000, seed: u64, epoch in 0u64..3) {
            let order = TrainingOrder::from_sizes(&[sequences * 8 + 1], &[1.0], 8, seed).unwrap();
            // Whole blocks cover whole slots; the list of one source is read in order of its slots.
            let mut seen: Vec<u64> = (0..sequences).map(|i| order.sequence(0, epoch * sequences + i)).collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..sequences));
        }

        #[test]
        fn a_block_holds_each_list_position_once(weights in prop::collection::vec(0.01f64..10.0, 1..6), seed: u64, block in 0u64..4) {
            let tokens = vec![1 << 40; weights.len()];
            let order = TrainingOrder::from_sizes(&tokens, &weights, 16, seed).unwrap();
            let mut counts: HashMap<usize, u64> = HashMap::new();
            let mut samples: Vec<Sample> = (block * BLOCK..(block + 1) * BLOCK).map(|i| order.sample(i)).collect();
            for sample in &samples {
                *counts.entry(sample.source).or_default() += 1;
            }
            samples.sort_unstable();
            samples.dedup();
            prop_assert_eq!(samples.len() as u64, BLOCK, "no sequence twice");
            let total: f64 = weights.iter().sum();
            for (source, weight) in weights.iter().enumerate() {
                let share = weight / total * BLOCK as f64;
                prop_assert!((counts[&source] as f64 - share).abs() <= 1.0, "quota {} for share {share}", counts[&source]);
            }
        }
    }

    #[test]
    fn too_little_text_and_too_small_a_share_are_named() {
        let error = TrainingOrder::from_sizes(&[1000, 16], &[1.0, 1.0], 16, 0).unwrap_err().to_string();
        assert!(error.starts_with("spec.data.train[1]: 16 tokens hold no sequence of 16"), "{error}");
        let error = TrainingOrder::from_sizes(&[1000, 1000], &[1.0, 1e-6], 16, 0).unwrap_err().to_string();
        assert!(error.starts_with("spec.data.train[1].weight: its share"), "{error}");
    }

    #[test]
    fn epochs_count_passes_over_the_text() {
        let order = TrainingOrder::from_sizes(&[1001, 4001], &[3.0, 1.0], 10, 0).unwrap();
        assert_eq!(order.epochs(4000), [3.0, 0.25]);
    }
}

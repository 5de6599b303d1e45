//! Which sequence the n-th training sample is: a pure function of the seed, the sources and n.

use super::dataset::{Dataset, sequences};
use super::permutation::Permutation;
use super::{Result, field_error};

/// Samples of a block: in every block each source has exactly its share.
const BLOCK: u64 = 4096;

/// One training sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sample {
    /// Place of the source in the job.
    pub source: usize,
    /// Sequence of the source.
    pub sequence: u64,
}

/// The order of the training samples. Sources take turns by weight; each goes through all of its sequences in a
/// random order, then through all of them in another.
#[derive(Debug, Clone)]
pub struct TrainingOrder {
    seed: u64,
    sequence_length: usize,
    sources: Vec<SourceShare>,
}

#[derive(Debug, Clone)]
struct SourceShare {
    /// Sequences that the source has.
    sequences: u64,
    /// Samples in a block.
    quota: u64,
}

impl TrainingOrder {
    /// The order for sequences of `sequence_length` tokens, with one weight for every source of the dataset.
    ///
    /// # Errors
    /// When a source is shorter than one sequence, or has so small a weight that it would never be used.
    ///
    /// # Panics
    /// When there are not as many weights as sources.
    pub fn new(dataset: &Dataset, weights: &[f64], sequence_length: usize, seed: u64) -> Result<Self> {
        let tokens: Vec<u64> = dataset.train().iter().map(|part| part.tokens).collect();
        Self::of_tokens(&tokens, weights, sequence_length, seed)
    }

    fn of_tokens(tokens: &[u64], weights: &[f64], sequence_length: usize, seed: u64) -> Result<Self> {
        assert_eq!(tokens.len(), weights.len(), "one weight for every source");
        let mut sources = Vec::with_capacity(tokens.len());
        for (index, (&tokens, quota)) in tokens.iter().zip(quotas(weights)).enumerate() {
            let sequences = sequences(tokens, sequence_length);
            if sequences == 0 {
                return Err(field_error(
                    format!("spec.data.train[{index}]"),
                    format!(
                        "its text has {tokens} tokens, fewer than one sequence of {sequence_length} and its target; \
                         add text, or shorten the sequence"
                    ),
                ));
            }
            if quota == 0 {
                return Err(field_error(
                    format!("spec.data.train[{index}].weight"),
                    format!(
                        "less than a share of 1/{BLOCK} of all weights is never used; raise it, or leave the source out"
                    ),
                ));
            }
            sources.push(SourceShare { sequences, quota });
        }
        Ok(Self { seed, sequence_length, sources })
    }

    /// Tokens of a sequence.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// The samples numbered from `first` on.
    pub fn samples(&self, first: u64, count: usize) -> Vec<Sample> {
        let mut samples = Vec::with_capacity(count);
        let mut epochs: Vec<Option<(u64, Permutation)>> = vec![None; self.sources.len()];
        let mut next = first;
        while samples.len() < count {
            let block = next / BLOCK;
            let slots = self.block(block);
            let from = (next % BLOCK) as usize;
            let taken = (count - samples.len()).min(slots.len() - from);
            for &(source, rank) in &slots[from..from + taken] {
                let index = block * self.sources[source].quota + rank;
                let sequence = self.sequence(source, index, &mut epochs[source]);
                samples.push(Sample { source, sequence });
            }
            next += taken as u64;
        }
        samples
    }

    /// How often each source is gone through by training on `tokens`.
    pub fn epochs(&self, tokens: u64) -> Vec<f64> {
        let samples = tokens as f64 / self.sequence_length as f64;
        let epochs =
            |source: &SourceShare| samples * source.quota as f64 / BLOCK as f64 / source.sequences as f64;
        self.sources.iter().map(epochs).collect()
    }

    /// Source and rank among the block's samples of that source, for every slot of a block.
    fn block(&self, block: u64) -> Vec<(usize, u64)> {
        if self.sources.len() == 1 {
            return (0..BLOCK).map(|slot| (0, slot)).collect();
        }
        let permutation = Permutation::new(BLOCK, self.seed, "mixture", block);
        let cards: Vec<usize> = self
            .sources
            .iter()
            .enumerate()
            .flat_map(|(i, source)| (0..source.quota).map(move |_| i))
            .collect();
        let mut ranks = vec![0; self.sources.len()];
        let slot = |slot| {
            let source = cards[permutation.apply(slot) as usize];
            ranks[source] += 1;
            (source, ranks[source] - 1)
        };
        (0..BLOCK).map(slot).collect()
    }

    /// The sequence that is the source's sample number `index`; the last epoch's permutation is kept at hand.
    fn sequence(&self, source: usize, index: u64, kept: &mut Option<(u64, Permutation)>) -> u64 {
        let length = self.sources[source].sequences;
        let (epoch, position) = (index / length, index % length);
        let permutation = match kept.take() {
            Some((of, permutation)) if of == epoch => permutation,
            _ => Permutation::new(length, self.seed, &format!("source {source}"), epoch),
        };
        let sequence = permutation.apply(position);
        *kept = Some((epoch, permutation));
        sequence
    }
}

/// Slots of a block for every weight, by largest remainder; among equal remainders the first source wins.
fn quotas(weights: &[f64]) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let shares: Vec<f64> = weights.iter().map(|weight| weight / total * BLOCK as f64).collect();
    let mut quotas: Vec<u64> = shares.iter().map(|share| share.floor() as u64).collect();
    let mut by_remainder: Vec<usize> = (0..shares.len()).collect();
    by_remainder.sort_by(|&a, &b| shares[b].fract().total_cmp(&shares[a].fract()));
    let left = BLOCK - quotas.iter().sum::<u64>().min(BLOCK);
    by_remainder.into_iter().take(left as usize).for_each(|source| quotas[source] += 1);
    quotas
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn order(tokens: &[u64], weights: &[f64], seed: u64) -> TrainingOrder {
        TrainingOrder::of_tokens(tokens, weights, 10, seed).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_epoch_has_every_sequence_once(tokens in 11u64..5000, seed: u64, epoch in 0u64..5) {
            let order = order(&[tokens], &[1.0], seed);
            let length = sequences(tokens, 10);
            let samples = order.samples(epoch * length, length as usize);
            let mut seen: Vec<u64> = samples.iter().map(|sample| sample.sequence).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..length).collect::<Vec<_>>());
        }

        #[test]
        fn in_a_mixture_too(tokens in prop::collection::vec(11u64..3000, 2..5), seed: u64) {
            let weights: Vec<f64> = (1..=tokens.len()).map(|i| i as f64).collect();
            let order = order(&tokens, &weights, seed);
            for (source, &tokens) in tokens.iter().enumerate() {
                let length = sequences(tokens, 10);
                let of_source = order.samples(0, 8192).into_iter().filter(|sample| sample.source == source);
                let of_source: Vec<u64> = of_source.map(|sample| sample.sequence).collect();
                for epoch in of_source.chunks_exact(length as usize) {
                    let mut seen = epoch.to_vec();
                    seen.sort_unstable();
                    prop_assert_eq!(seen, (0..length).collect::<Vec<_>>());
                }
            }
        }

        #[test]
        fn any_split_gives_the_same_stream(
            first in 0u64..20_000, cuts in prop::collection::vec(0usize..3000, 1..6), seed: u64,
        ) {
            let order = order(&[5000, 800, 91], &[3.0, 1.0, 0.5], seed);
            let mut parts = Vec::new();
            for &cut in &cuts {
                parts.extend(order.samples(first + parts.len() as u64, cut));
            }
            prop_assert_eq!(order.samples(first, parts.len()), parts);
        }

        #[test]
        fn quotas_fill_the_block(weights in prop::collection::vec(1e-6..1e6f64, 1..65)) {
            let quotas = quotas(&weights);
            prop_assert_eq!(quotas.iter().sum::<u64>(), BLOCK);
            let total: f64 = weights.iter().sum();
            for (quota, weight) in quotas.iter().zip(&weights) {
                prop_assert!((*quota as f64 - weight / total * BLOCK as f64).abs() < 1.0);
            }
        }
    }

    #[test]
    fn every_block_has_the_quotas() {
        let order = order(&[100_000, 100_000, 100_000], &[0.7, 0.2, 0.1], 3);
        for block in [0, 1, 1 << 30] {
            let mut counts: HashMap<usize, u64> = HashMap::new();
            for sample in order.samples(block * BLOCK, BLOCK as usize) {
                *counts.entry(sample.source).or_default() += 1;
            }
            assert_eq!((counts[&0], counts[&1], counts[&2]), (2867, 819, 410));
        }
    }

    #[test]
    fn seeds_and_epochs_differ() {
        let sequence = |seed, first| order(&[1001], &[1.0], seed).samples(first, 100);
        assert_ne!(sequence(1, 0), sequence(2, 0));
        assert_ne!(sequence(1, 0), sequence(1, 100));
    }

    #[test]
    fn epochs_are_counted_by_source() {
        let order = order(&[1001, 101], &[1.0, 1.0], 1);
        assert_eq!(order.epochs(2000), [1.0, 10.0]);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let error =
            |tokens, weights| TrainingOrder::of_tokens(tokens, weights, 10, 0).unwrap_err().to_string();
        let short = error(&[1000, 10], &[1.0, 1.0]);
        assert!(
            short.starts_with("spec.data.train[1]: its text has 10 tokens, fewer than one sequence of 10"),
            "{short}"
        );
        let light = error(&[1000, 1000], &[1e6, 1.0]);
        assert!(light.starts_with("spec.data.train[1].weight: less than a share of 1/4096"), "{light}");
    }
}

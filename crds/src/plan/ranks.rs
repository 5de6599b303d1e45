//! How the ranks of a stage share the micro-batches of a step.
//!
//! The gradients of a step are summed in a balanced binary tree over the index of the micro-batch. A rank that owns an
//! aligned run of 2^k micro-batches owns a subtree, so any number of such ranks computes the sum that one alone does, bit
//! for bit.

use super::TrainingPlan;
use super::error::Findings;
use crate::spec::stage::{ElasticSpec, StageSpec};
use std::ops::Range;

/// Whether `ranks` ranks compute the bits that one rank does: each owns 2^k of the micro-batches, for one k.
pub fn keeps_bits(micro_batches: u64, ranks: u64) -> bool {
    let each = micro_batches.checked_div(ranks).unwrap_or(0);
    ranks == 1 || (each.is_power_of_two() && each.checked_mul(ranks) == Some(micro_batches))
}

/// Whether `ranks` ranks can train together; `reproducible`: with the bits of one.
pub fn can_share(micro_batches: u64, ranks: u64, reproducible: bool) -> bool {
    match reproducible {
        true => keeps_bits(micro_batches, ranks),
        false => (1..=micro_batches.max(1)).contains(&ranks),
    }
}

/// The micro-batches that `rank` of `ranks` works on; equally many for each where the numbers allow it.
pub fn share(micro_batches: u64, ranks: u64, rank: u64) -> Range<u64> {
    let first = |rank: u64| {
        let position = u128::from(micro_batches) * u128::from(rank) / u128::from(ranks.max(1));
        u64::try_from(position).unwrap_or(u64::MAX)
    };
    first(rank)..first(rank + 1)
}

/// The numbers of ranks in `sizes` that can train together.
pub fn possible_sizes(micro_batches: u64, sizes: Range<u64>, reproducible: bool) -> Vec<u64> {
    let last = sizes.end.min(micro_batches.max(1).saturating_add(1));
    (sizes.start..last).filter(|ranks| can_share(micro_batches, *ranks, reproducible)).collect()
}

/// The sizes that an elastic stage may have, smallest first.
pub fn elastic_sizes(elastic: &ElasticSpec, micro_batches: u64, reproducible: bool) -> Vec<i32> {
    let bounds = positive(elastic.min_replicas)..positive(elastic.max_replicas).saturating_add(1);
    let possible = possible_sizes(micro_batches, bounds, reproducible);
    let allowed = |size: &i32| elastic.allowed_replicas.as_ref().is_none_or(|sizes| sizes.contains(size));
    possible.into_iter().filter_map(|size| i32::try_from(size).ok()).filter(allowed).collect()
}

/// The sizes that a stage may have, smallest first; one that is not elastic has one.
pub fn stage_sizes(stage: &StageSpec, training: &TrainingPlan) -> Vec<i32> {
    match &stage.elastic {
        Some(elastic) => elastic_sizes(elastic, training.micro_batches(), training.reproducible),
        None => vec![stage.replicas.unwrap_or(1)],
    }
}

/// The largest of the sizes, which ascend, that is at most `most`.
pub fn largest_size(sizes: &[i32], most: i32) -> Option<i32> {
    sizes.iter().rev().copied().find(|size| *size <= most)
}

/// The size that a stage should have when the job wants `replicas`: the next smaller one, else the smallest.
pub fn wanted_size(sizes: &[i32], replicas: i32) -> i32 {
    largest_size(sizes, replicas).or(sizes.first().copied()).unwrap_or(1)
}

/// The fewest pods that the stage trains on; wrong numbers become findings.
pub(super) fn check_replicas(
    stage: &StageSpec,
    micro_batches: u64,
    reproducible: bool,
    field: &str,
    findings: &mut Findings,
) -> Option<u64> {
    let limits = Limits { micro_batches, reproducible };
    let Some(elastic) = &stage.elastic else {
        let replicas = positive(stage.replicas.unwrap_or(1));
        return limits.check(replicas, format!("{field}.replicas"), findings).then_some(replicas);
    };
    let allowed = elastic.allowed_replicas.iter().flatten();
    for (index, size) in allowed.enumerate() {
        limits.check(positive(*size), format!("{field}.elastic.allowedReplicas[{index}]"), findings);
    }
    let smallest = elastic_sizes(elastic, micro_batches, reproducible).first().copied();
    if smallest.is_none() {
        let (least, most) = (elastic.min_replicas, elastic.max_replicas);
        let message = format!("none of {least} to {most} replicas is possible: {}", limits.advice());
        findings.error(format!("{field}.elastic"), message);
    }
    smallest.map(positive)
}

fn positive(value: i32) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

struct Limits {
    micro_batches: u64,
    reproducible: bool,
}

impl Limits {
    fn check(&self, replicas: u64, field: String, findings: &mut Findings) -> bool {
        let possible = can_share(self.micro_batches, replicas, self.reproducible);
        if !possible {
            findings.error(field, format!("{replicas} is not possible: {}", self.advice()));
        }
        possible
    }

    fn advice(&self) -> String {
        let Self { micro_batches, reproducible } = *self;
        let sizes = possible_sizes(micro_batches, 1..4097, reproducible);
        let sizes: Vec<String> = sizes.iter().map(ToString::to_string).collect();
        let mut text = format!(
            "a step has {micro_batches} micro-batches (globalBatchTokens / microBatchTokens), which {} replicas can \
             share; use one of these or a smaller microBatchTokens",
            if sizes.len() > 16 { format!("1 to {micro_batches}") } else { sizes.join(", ") }
        );
        if reproducible && micro_batches > 1 {
            text +=
                ", or set spec.training.reproducible: false for any number up to that of the micro-batches";
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn powers_of_two_of_micro_batches_keep_the_bits() {
        let sizes = |micro_batches| possible_sizes(micro_batches, 1..100, true);
        assert_eq!(sizes(1), [1]);
        assert_eq!(sizes(8), [1, 2, 4, 8]);
        assert_eq!(sizes(12), [1, 3, 6, 12]);
        assert_eq!(possible_sizes(6, 1..100, false), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn an_elastic_stage_keeps_to_bounds_and_list() {
        let mut elastic = ElasticSpec {
            min_replicas: 2,
            max_replicas: 8,
            allowed_replicas: None,
            scale_up_delay_seconds: None,
            capacity_timeout_seconds: None,
        };
        assert_eq!(elastic_sizes(&elastic, 8, true), [2, 4, 8]);
        elastic.allowed_replicas = Some(vec![4, 8]);
        assert_eq!(elastic_sizes(&elastic, 8, true), [4, 8]);
        assert!(elastic_sizes(&elastic, 3, true).is_empty());
    }

    proptest! {
        #[test]
        fn every_micro_batch_has_one_rank(micro_batches in 1u64..200, ranks in 1u64..200) {
            let shares: Vec<Range<u64>> = (0..ranks).map(|rank| share(micro_batches, ranks, rank)).collect();
            prop_assert_eq!((shares[0].start, shares[ranks as usize - 1].end), (0, micro_batches));
            prop_assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
            let lengths: Vec<u64> = shares.iter().map(|share| share.end - share.start).collect();
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
            if keeps_bits(micro_batches, ranks) {
                prop_assert!(ranks == 1 || lengths.iter().all(|len| len.is_power_of_two() && *len == lengths[0]));
            }
            prop_assert_eq!(can_share(micro_batches, ranks, false), lengths.iter().all(|len| *len > 0));
        }
    }
}

//! Which part of the flat buffer each rank owns: ZeRO-1's partition of the optimizer's state.
//!
//! Every bucket (a layer, the embedding, the head) is cut into one slice a rank, so that all ranks have work in each, and
//! a layer's gradients can be reduced while the backward pass is at the next. Slices end at whole units of the gradient
//! norm.

use crate::model::layout::ParameterLayout;
use crate::ops::gradient::UNIT;
use std::ops::Range;

/// The partition, and one rank's view of it.
#[derive(Debug, Clone)]
pub struct Shards {
    buckets: Vec<Bucket>,
    rank: usize,
    own_len: usize,
}

/// A bucket and its slices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Elements of the flat buffer.
    pub range: Range<usize>,
    /// Slice of each rank, in the flat buffer.
    pub slices: Vec<Range<usize>>,
    /// Where this rank's slice begins in its own part, which holds its slices one after another.
    pub own_start: usize,
}

impl Shards {
    /// The partition among `world_size` ranks, seen from `rank`. One rank owns everything, in the order of the layout.
    pub fn new(layout: &ParameterLayout, rank: usize, world_size: usize) -> Self {
        let mut own_len = 0;
        let bucket = |range: Range<usize>| {
            let units = range.len().div_ceil(UNIT);
            let at = |rank: usize| (range.start + units * rank / world_size * UNIT).min(range.end);
            let slices: Vec<Range<usize>> = (0..world_size).map(|rank| at(rank)..at(rank + 1)).collect();
            let own_start = own_len;
            own_len += slices[rank].len();
            Bucket { range, slices, own_start }
        };
        let buckets = layout.buckets().into_iter().map(bucket).collect();
        Self { buckets, rank, own_len }
    }

    /// The buckets, by offset.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.buckets.first().map_or(1, |bucket| bucket.slices.len())
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Elements that this rank owns.
    pub fn own_len(&self) -> usize {
        self.own_len
    }

    /// Elements that the rank with the largest part owns.
    pub fn largest_len(&self) -> usize {
        let of = |rank: usize| self.buckets.iter().map(|bucket| bucket.slices[rank].len()).sum();
        (0..self.world_size()).map(of).max().unwrap_or(0)
    }

    /// The part of `range`, which lies in one bucket, that `rank` owns; empty where it owns none.
    pub fn part(&self, range: &Range<usize>, rank: usize) -> Range<usize> {
        let slice = &self.bucket_of(range).slices[rank];
        let part = range.start.max(slice.start)..range.end.min(slice.end);
        if part.is_empty() { range.start..range.start } else { part }
    }

    /// Where `range`, which this rank owns and which lies in one bucket, is in its own part.
    pub fn own(&self, range: &Range<usize>) -> Range<usize> {
        if range.is_empty() {
            return 0..0;
        }
        let bucket = self.bucket_of(range);
        let start = bucket.own_start + range.start - bucket.slices[self.rank].start;
        start..start + range.len()
    }

    fn bucket_of(&self, range: &Range<usize>) -> &Bucket {
        &self.buckets[self.buckets.partition_point(|bucket| bucket.range.end <= range.start)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::layout::tests::configs;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_element_has_one_owner(config in configs(), world in 1usize..6) {
            let layout = ParameterLayout::new(&config);
            let ranks: Vec<Shards> = (0..world).map(|rank| Shards::new(&layout, rank, world)).collect();
            let mut owners = vec![0; layout.total_len()];
            for shards in &ranks {
                let mut own = 0;
                for bucket in shards.buckets() {
                    let slice = &bucket.slices[shards.rank()];
                    prop_assert_eq!(bucket.own_start, own);
                    prop_assert!(slice.is_empty() || (slice.start - bucket.range.start).is_multiple_of(UNIT));
                    own += slice.len();
                    slice.clone().for_each(|element| owners[element] += 1);
                }
                prop_assert_eq!(own, shards.own_len());
            }
            prop_assert!(owners.iter().all(|count| *count == 1));
        }

        #[test]
        fn tensors_are_the_sum_of_their_parts(config in configs(), world in 1usize..6) {
            let layout = ParameterLayout::new(&config);
            for tensor in layout.tensors() {
                let mut end = tensor.offset;
                for rank in 0..world {
                    let shards = Shards::new(&layout, rank, world);
                    let part = shards.part(&tensor.range(), rank);
                    prop_assert!(part.start >= tensor.offset && part.end <= tensor.range().end);
                    if part.is_empty() {
                        prop_assert!(shards.own(&part).is_empty());
                        continue;
                    }
                    prop_assert_eq!(part.start, end);
                    end = part.end;
                    prop_assert_eq!(shards.own(&part).len(), part.len());
                    prop_assert!(shards.own(&part).end <= shards.own_len());
                }
                prop_assert_eq!(end, tensor.range().end);
            }
        }
    }

    #[test]
    fn one_rank_owns_all_in_order() {
        let config = growth_crds::plan::ModelConfig {
            hidden_size: 48,
            intermediate_size: 100,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 12,
            vocab_size: 300,
            max_position_embeddings: 64,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
        };
        let layout = ParameterLayout::new(&config);
        let shards = Shards::new(&layout, 0, 1);
        assert_eq!(shards.own_len(), layout.total_len());
        assert!(layout.tensors().iter().all(|tensor| shards.own(&tensor.range()) == tensor.range()));
        let of_four: usize = (0..4).map(|rank| Shards::new(&layout, rank, 4).own_len()).sum();
        assert_eq!(of_four, layout.total_len());
        assert!(Shards::new(&layout, 0, 4).largest_len() < layout.total_len() / 3);
    }
}

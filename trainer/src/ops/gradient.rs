//! Gradients of a step: their sum over micro-batches in a balanced tree, and their global norm.
//!
//! The tree makes the sum independent of who computes which micro-batch: a rank that owns an aligned run of
//! micro-batches owns a subtree. The norm is made of units of a fixed size, so that it does not matter who owns which.

use growth_crds::plan::memory::gradient_levels;
use rayon::prelude::*;
use std::ops::Range;

/// Elements whose squares are summed before all sums are added in order: parts of ranks begin and end between units.
pub const UNIT: usize = 1 << 10;

/// Elements that one task adds.
const CHUNK: usize = 1 << 16;

/// Units that one task squares.
const CHUNK_UNITS: usize = CHUNK / UNIT;

/// Sums gradients in a balanced binary tree over the index of the micro-batch, as a binary counter does: buffer k
/// waits with the sum of 2^(k-1) neighbours until as many have arrived on its right. Buffer 0 is the leaf at work.
pub struct GradientTree {
    buffers: Vec<Vec<f32>>,
    waiting: Vec<bool>,
}

impl GradientTree {
    /// A tree over `leaves` micro-batches of gradients of `len` elements.
    pub fn new(len: usize, leaves: usize) -> Self {
        let buffers = Self::buffers(leaves);
        Self { buffers: (0..buffers).map(|_| vec![0.0; len]).collect(), waiting: vec![false; buffers] }
    }

    /// Buffers that a tree over `leaves` micro-batches holds; one leaf needs one.
    pub fn buffers(leaves: usize) -> usize {
        gradient_levels(leaves as u64) as usize
    }

    /// Where the next micro-batch writes its gradient, over whatever is there.
    pub fn leaf(&mut self) -> &mut [f32] {
        &mut self.buffers[0]
    }

    /// The last leaf of a step, and what waits to be added to it. A gradient that is complete can be summed at once, while
    /// others are still computed.
    pub fn last_leaf(&mut self) -> (&mut [f32], Waiting<'_>) {
        let (leaf, buffers) = self.buffers.split_at_mut(1);
        (&mut leaf[0], Waiting { buffers, waiting: &self.waiting[1..] })
    }

    /// The sum of the step, after the last leaf has taken all that waited; the next step begins.
    pub fn finish(&mut self) -> &mut [f32] {
        self.waiting.fill(false);
        &mut self.buffers[0]
    }

    /// Takes the leaf into the sum.
    pub fn push(&mut self) {
        for level in 1..self.buffers.len() {
            if !self.waiting[level] {
                self.buffers.swap(0, level);
                self.waiting[level] = true;
                return;
            }
            self.take(level);
        }
    }

    /// Adds what waits at `level` to buffer 0.
    fn take(&mut self, level: usize) {
        let (leaf, rest) = self.buffers.split_at_mut(1);
        add(&mut leaf[0], &rest[level - 1]);
        self.waiting[level] = false;
    }
}

/// Subtrees to the left of the last leaf.
pub struct Waiting<'a> {
    buffers: &'a [Vec<f32>],
    waiting: &'a [bool],
}

impl Waiting<'_> {
    /// Adds a part of what waits to the same part of the last leaf: the smallest subtree, its neighbour, first.
    pub fn add_to(&self, leaf: &mut [f32], part: Range<usize>) {
        for (buffer, _) in self.buffers.iter().zip(self.waiting).filter(|(_, waits)| **waits) {
            add(&mut leaf[part.clone()], &buffer[part.clone()]);
        }
    }
}

/// `a += b`
fn add(a: &mut [f32], b: &[f32]) {
    a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    });
}

/// Sums of squares of the units of `gradients`, which begins with one.
pub fn unit_squares(gradients: &[f32]) -> Vec<f64> {
    let units = gradients.par_chunks(UNIT).with_min_len(CHUNK_UNITS);
    units.map(sum_of_squares).collect()
}

fn sum_of_squares(chunk: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    let blocks = chunk.chunks_exact(LANES);
    for (lane, x) in blocks.remainder().iter().enumerate() {
        lanes[lane] += f64::from(*x) * f64::from(*x);
    }
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = f64::from(*x).mul_add(f64::from(*x), *lane);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::uniform;

    /// The sum as the definition reads: split at the largest power of two.
    fn balanced(leaves: &[Vec<f32>]) -> Vec<f32> {
        if leaves.len() == 1 {
            return leaves[0].clone();
        }
        let half = leaves.len().next_power_of_two() / 2;
        let (mut left, right) = (balanced(&leaves[..half]), balanced(&leaves[half..]));
        add(&mut left, &right);
        left
    }

    #[test]
    fn sums_in_a_balanced_tree() {
        for count in 1..20 {
            let leaves: Vec<Vec<f32>> = (0..count).map(|i| uniform(i, 100)).collect();
            let mut tree = GradientTree::new(100, count as usize);
            for _step in 0..2 {
                let (last, others) = leaves.split_last().unwrap();
                for leaf in others {
                    tree.leaf().copy_from_slice(leaf);
                    tree.push();
                }
                let (leaf, waiting) = tree.last_leaf();
                leaf.copy_from_slice(last);
                [60..100, 0..60].into_iter().for_each(|part| waiting.add_to(leaf, part));
                assert!(tree.finish() == balanced(&leaves), "{count} leaves");
            }
        }
    }

    #[test]
    fn squares_of_units_do_not_depend_on_threads() {
        let gradients = uniform(1, 200_001);
        let reference = gradients.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let squares = unit_squares(&gradients);
        assert_eq!(squares.len(), 200_001usize.div_ceil(UNIT));
        assert!((squares.iter().sum::<f64>() - reference).abs() < 1e-9 * reference);
        assert_eq!(squares, pool.install(|| unit_squares(&gradients)));
    }
}

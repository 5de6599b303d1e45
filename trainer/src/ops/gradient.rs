//! Gradients of a step: their sum over micro-batches in a balanced tree, and their global norm.
//!
//! The tree makes the sum independent of who computes which micro-batch: a rank that owns an aligned run of
//! micro-batches owns a subtree.

use growth_crds::plan::memory::gradient_levels;
use rayon::prelude::*;

/// Elements that one task adds or squares; the norm sums these chunks in order.
const CHUNK: usize = 1 << 16;

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

    /// The sum of all leaves pushed since the last call.
    pub fn sum(&mut self) -> &mut [f32] {
        // Leaves that fill the tree have already met in buffer 0; others wait, the smallest subtree last.
        let mut found = !self.waiting.contains(&true);
        for level in 1..self.buffers.len() {
            if !self.waiting[level] {
                continue;
            }
            if found {
                self.take(level);
            } else {
                self.buffers.swap(0, level);
                self.waiting[level] = false;
                found = true;
            }
        }
        &mut self.buffers[0]
    }

    /// Adds what waits at `level` to buffer 0.
    fn take(&mut self, level: usize) {
        let (leaf, rest) = self.buffers.split_at_mut(1);
        add(&mut leaf[0], &rest[level - 1]);
        self.waiting[level] = false;
    }
}

/// `a += b`
fn add(a: &mut [f32], b: &[f32]) {
    a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    });
}

/// Euclidean norm over all gradients: f64 sums over fixed chunks, added in order.
pub fn norm(gradients: &[f32]) -> f64 {
    let squares: Vec<f64> = gradients.par_chunks(CHUNK).map(sum_of_squares).collect();
    squares.iter().sum::<f64>().sqrt()
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
                for leaf in &leaves {
                    tree.leaf().copy_from_slice(leaf);
                    tree.push();
                }
                assert!(tree.sum() == balanced(&leaves), "{count} leaves");
            }
        }
    }

    #[test]
    fn norm_is_euclidean_on_any_number_of_threads() {
        let gradients = uniform(1, 200_001);
        let reference = gradients.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert!((norm(&gradients) - reference).abs() < 1e-9 * reference);
        assert_eq!(norm(&gradients), pool.install(|| norm(&gradients)));
    }
}

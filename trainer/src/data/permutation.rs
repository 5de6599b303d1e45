//! A keyed permutation of 0..n that needs no memory: position i of a shuffled list without the list.

use crate::random::generator;
use rand::Rng;

/// Rounds of the Feistel network; four are proven to be enough for a strong permutation with random functions.
const ROUNDS: usize = 8;

/// A bijection on 0..n: a balanced Feistel network on the next even number of bits, walked until it is inside.
#[derive(Debug, Clone)]
pub(crate) struct Permutation {
    length: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of 0..length that (seed, purpose, index) means.
    pub(crate) fn new(length: u64, seed: u64, purpose: &str, index: u64) -> Self {
        let mut generator = generator(seed, purpose, index);
        let bits = u64::BITS - length.saturating_sub(1).leading_zeros();
        Self {
            length,
            half_bits: bits.div_ceil(2).max(1),
            keys: std::array::from_fn(|_| generator.next_u64()),
        }
    }

    /// Where `position` goes; `position` is below the length.
    pub(crate) fn apply(&self, position: u64) -> u64 {
        debug_assert!(position < self.length);
        // The network permutes at most four times as many numbers, so a walk takes fewer than four steps on average.
        let mut value = self.network(position);
        while value >= self.length {
            value = self.network(value);
        }
        value
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_a_bijection(length in 1u64..3000, seed: u64, index: u64) {
            let permutation = Permutation::new(length, seed, "test", index);
            let mut seen = vec![false; length as usize];
            for position in 0..length {
                let image = permutation.apply(position) as usize;
                prop_assert!(!std::mem::replace(&mut seen[image], true));
            }
        }

        #[test]
        fn stays_inside_large_domains(length in 1u64..=1 << 62, seed: u64, share in 0.0..1.0f64) {
            let position = ((length as f64 * share) as u64).min(length - 1);
            prop_assert!(Permutation::new(length, seed, "test", 0).apply(position) < length);
        }
    }

    #[test]
    fn spreads_neighbours() {
        let permutation = Permutation::new(100_000, 5, "test", 0);
        let distance: u64 = (1..1000).map(|i| permutation.apply(i).abs_diff(permutation.apply(i - 1))).sum();
        // A third of the length between two random positions.
        assert!((30_000..37_000).contains(&(distance / 999)), "{}", distance / 999);
    }

    #[test]
    fn another_key_is_another_order() {
        let order = |seed, index| {
            let permutation = Permutation::new(50, seed, "test", index);
            (0..50).map(|i| permutation.apply(i)).collect::<Vec<_>>()
        };
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), order(1, 1));
    }
}

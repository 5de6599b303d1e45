//! Counter-based random numbers: every number is a function of (seed, purpose, index), never of what ran before.

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

/// Keeps our keys apart from every other use of blake3.
const CONTEXT: &str = "growth-operator 2026-11 random generator";

/// Normal numbers that one task makes; even, since Box-Muller makes pairs.
const CHUNK: usize = 1 << 14;

/// 32-bit words of the generator that one pair of normal numbers uses.
const WORDS_PER_PAIR: u128 = 4;

/// The generator of (seed, purpose, index): the same numbers on every machine, whatever was generated before.
pub fn generator(seed: u64, purpose: &str, index: u64) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&seed.to_le_bytes());
    hasher.update(&index.to_le_bytes());
    hasher.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// Fills `out` with normal numbers of mean 0. Element i depends on (seed, tensor name, i) alone, so neither the
/// number of threads nor the length of `out` changes it.
pub fn normal(seed: u64, tensor_name: &str, std: f64, out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| {
        normal_from(seed, tensor_name, std, index * CHUNK, chunk);
    });
}

/// The elements from `first` on of what [`normal`] fills.
pub fn normal_from(seed: u64, tensor_name: &str, std: f64, first: usize, out: &mut [f32]) {
    let mut generator = generator(seed, tensor_name, 0);
    generator.set_word_pos((first / 2) as u128 * WORDS_PER_PAIR);
    // Of a pair that begins before `first` the second number is the first that is wanted.
    let (head, pairs) = out.split_at_mut((first % 2).min(out.len()));
    if let Some(element) = head.first_mut() {
        *element = (normal_pair(&mut generator)[1] * std) as f32;
    }
    for pair in pairs.chunks_mut(2) {
        let values = normal_pair(&mut generator);
        for (element, value) in pair.iter_mut().zip(values) {
            *element = (value * std) as f32;
        }
    }
}

/// Box-Muller on `libm`, whose results do not depend on the machine as those of the system's library do.
fn normal_pair(generator: &mut ChaCha8Rng) -> [f64; 2] {
    // In (0, 1], so that the logarithm is finite.
    let radius = (-2.0 * libm::log(1.0 - unit(generator.next_u64()))).sqrt();
    let (sine, cosine) = libm::sincos(2.0 * std::f64::consts::PI * unit(generator.next_u64()));
    [radius * cosine, radius * sine]
}

/// The upper 53 bits as a number in [0, 1).
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run)
    }

    #[test]
    fn an_element_depends_only_on_its_index() {
        let mut long = vec![0.0; 3 * CHUNK + 7];
        with_threads(2, || normal(7, "lm_head.weight", 0.02, &mut long));
        for length in [1, 2, 3, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 3] {
            let mut short = vec![0.0; length];
            with_threads(1, || normal(7, "lm_head.weight", 0.02, &mut short));
            assert!(short == long[..length], "length {length}");
        }
    }

    #[test]
    fn any_part_can_be_made_alone() {
        let mut whole = vec![0.0; CHUNK + 50];
        normal(7, "lm_head.weight", 0.02, &mut whole);
        for (first, length) in [(0, 3), (1, 4), (6, 1), (7, 1), (9, 0), (CHUNK - 3, 40)] {
            let mut part = vec![0.0; length];
            normal_from(7, "lm_head.weight", 0.02, first, &mut part);
            assert!(part == whole[first..first + length], "{length} from {first}");
        }
    }

    #[test]
    fn values_are_pinned() {
        let mut values = [0.0; 3];
        normal(1, "x", 1.0, &mut values);
        assert_eq!(values.map(f32::to_bits), PINNED);
    }

    /// What every machine has to make of seed 1 and name "x": a change breaks resumed jobs.
    const PINNED: [u32; 3] = [0x3f9b_61c4, 0x3eb2_b5ff, 0xbf0f_b987];

    #[test]
    fn moments_are_those_of_a_normal_distribution() {
        let mut values = vec![0.0; 1 << 20];
        normal(3, "weights", 2.0, &mut values);
        let count = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / count;
        let fourth = values.iter().map(|&x| f64::from(x).powi(4)).sum::<f64>() / count;
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((variance - 4.0).abs() < 0.03, "{variance}");
        assert!((fourth / (variance * variance) - 3.0).abs() < 0.05, "{fourth}");
    }

    #[test]
    fn seed_purpose_and_index_all_count() {
        let first = |seed, purpose, index| generator(seed, purpose, index).next_u64();
        let base = first(1, "a", 0);
        assert_ne!(base, first(2, "a", 0));
        assert_ne!(base, first(1, "b", 0));
        assert_ne!(base, first(1, "a", 1));
    }
}

//! The operations of a LLaMA step: one file each, with forward, backward, shapes, equation and tests.
//!
//! Every function takes its outputs first, then its inputs, then its sizes, and works on buffers that the caller
//! owns. Results do not depend on the number of threads: work is split over rows or heads, and every sum runs in
//! an order that the code spells out.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod embedding;
pub mod gemm;
pub mod gradient;
pub mod linear;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;
pub mod vector;

/// Rows that one task of a row-wise operation handles, and the block in which gains sum over rows.
pub(crate) const ROW_BLOCK: usize = 64;

#[cfg(test)]
pub(crate) mod testing {
    use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

    /// Reproducible numbers in -1..1.
    pub fn uniform(seed: u64, len: usize) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..len).map(|_| random.random_range(-1.0..1.0)).collect()
    }

    /// Largest difference relative to the largest reference value.
    pub fn relative_error(actual: &[f32], reference: &[f32]) -> f64 {
        assert_eq!(actual.len(), reference.len());
        let scale = reference.iter().fold(1e-12, |m, x| f64::max(m, f64::from(x.abs())));
        // A maximum skips NaN, so that it must not get there.
        let difference =
            |(a, r): (&f32, &f32)| if a.is_nan() { f64::INFINITY } else { f64::from((a - r).abs()) };
        actual.iter().zip(reference).map(difference).fold(0.0, f64::max) / scale
    }
}

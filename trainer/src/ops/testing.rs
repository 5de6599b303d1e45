//! Inputs, tolerances and references of the tests of the operations.

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

/// Allowed error of an f32 output against f64, relative to the largest value: about a hundred roundings of
/// 2^-24, more than the sums of these tests gather.
pub const FORWARD_TOLERANCE: f64 = 1e-5;
/// Allowed error of an f32 gradient, relative to the largest value: sums run over hundreds of rows, and
/// terms that cancel leave the rounding of the larger ones.
pub const GRADIENT_TOLERANCE: f64 = 1e-4;
/// Step of the central differences: in f64 both its truncation (h^2) and its rounding (2^-53 / h) stay
/// near 1e-8, far below what f32 resolves.
const STEP: f64 = 1e-4;
/// Elements of a gradient that are compared: each costs two passes of the reference.
const SAMPLES: usize = 24;

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
    let difference = |(a, r): (&f32, &f32)| if a.is_nan() { f64::INFINITY } else { f64::from((a - r).abs()) };
    actual.iter().zip(reference).map(difference).fold(0.0, f64::max) / scale
}

/// As f64.
pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Largest difference from an f64 reference, relative to its largest value.
pub fn error_against(actual: &[f32], reference: &[f64]) -> f64 {
    let reference: Vec<f32> = reference.iter().map(|x| *x as f32).collect();
    relative_error(actual, &reference)
}

/// Sum of products.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Largest difference of `gradient` from the central differences of `loss` at `x`, relative to the largest of
/// these; at [`SAMPLES`] elements spread over `x`.
pub fn gradient_error(gradient: &[f32], x: &[f32], loss: impl Fn(&[f64]) -> f64) -> f64 {
    assert_eq!(gradient.len(), x.len());
    let mut x = widen(x);
    let (mut actual, mut reference) = (Vec::new(), Vec::new());
    for i in samples(x.len()) {
        let old = x[i];
        x[i] = old + STEP;
        let above = loss(&x);
        x[i] = old - STEP;
        let below = loss(&x);
        x[i] = old;
        actual.push(gradient[i]);
        reference.push((above - below) / (2.0 * STEP));
    }
    error_against(&actual, &reference)
}

/// All elements of a short buffer, else multiples of the golden ratio: no stride of rows or columns.
fn samples(len: usize) -> Vec<usize> {
    if len <= SAMPLES {
        return (0..len).collect();
    }
    (0..SAMPLES).map(|k| ((k as f64 * 0.618_033_988_749_895).fract() * len as f64) as usize).collect()
}

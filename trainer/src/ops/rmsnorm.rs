//! RMSNorm (Zhang and Sennrich, 2019): `out = x / rms(x) * gain`, `rms(x) = sqrt(mean(x^2) + epsilon)`.

use crate::ops::{ROW_BLOCK, vector};
use rayon::prelude::*;

/// Normalises the rows of `x` [rows, hidden] into `out`, and keeps `1 / rms` [rows] for the backward pass.
pub fn forward(out: &mut [f32], inverse_rms: &mut [f32], x: &[f32], gain: &[f32], epsilon: f32) {
    let hidden = gain.len();
    (
        out.par_chunks_mut(ROW_BLOCK * hidden),
        inverse_rms.par_chunks_mut(ROW_BLOCK),
        x.par_chunks(ROW_BLOCK * hidden),
    )
        .into_par_iter()
        .for_each(|(out, inverse_rms, x)| {
            for (inverse_rms, x) in inverse_rms.iter_mut().zip(x.chunks_exact(hidden)) {
                *inverse_rms = 1.0 / (vector::dot(x, x) / hidden as f32 + epsilon).sqrt();
            }
            scale_rows(out, inverse_rms, x, gain);
        });
}

/// The output of [`forward`] again, from the kept `1 / rms`: cheaper than keeping it.
pub fn recompute(out: &mut [f32], inverse_rms: &[f32], x: &[f32], gain: &[f32]) {
    let hidden = gain.len();
    (
        out.par_chunks_mut(ROW_BLOCK * hidden),
        inverse_rms.par_chunks(ROW_BLOCK),
        x.par_chunks(ROW_BLOCK * hidden),
    )
        .into_par_iter()
        .for_each(|(out, inverse_rms, x)| scale_rows(out, inverse_rms, x, gain));
}

fn scale_rows(out: &mut [f32], inverse_rms: &[f32], x: &[f32], gain: &[f32]) {
    let hidden = gain.len();
    let rows = out.chunks_exact_mut(hidden).zip(x.chunks_exact(hidden));
    for ((out, x), inverse_rms) in rows.zip(inverse_rms) {
        for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
            *out = x * inverse_rms * gain;
        }
    }
}

/// Adds the gradient of `x` to `d_x` [rows, hidden] and overwrites `d_gain` [hidden].
///
/// With n = x / rms and g = d_out * gain: d_x = (g - n mean(g n)) / rms, and d_gain = sum over rows of d_out * n,
/// in blocks of [`ROW_BLOCK`] rows. `partial_gains` holds one row of [hidden] a block.
pub fn backward(
    d_x: &mut [f32],
    d_gain: &mut [f32],
    partial_gains: &mut [f32],
    d_out: &[f32],
    x: &[f32],
    inverse_rms: &[f32],
    gain: &[f32],
) {
    let hidden = gain.len();
    let blocks = inverse_rms.len().div_ceil(ROW_BLOCK);
    (
        d_x.par_chunks_mut(ROW_BLOCK * hidden),
        partial_gains[..blocks * hidden].par_chunks_mut(hidden),
        d_out.par_chunks(ROW_BLOCK * hidden),
        x.par_chunks(ROW_BLOCK * hidden),
        inverse_rms.par_chunks(ROW_BLOCK),
    )
        .into_par_iter()
        .for_each(|(d_x, partial_gain, d_out, x, inverse_rms)| {
            partial_gain.fill(0.0);
            let rows =
                d_x.chunks_exact_mut(hidden).zip(d_out.chunks_exact(hidden)).zip(x.chunks_exact(hidden));
            for (((d_x, d_out), x), &inverse_rms) in rows.zip(inverse_rms) {
                backward_row(d_x, partial_gain, d_out, x, inverse_rms, gain);
            }
        });
    d_gain.fill(0.0);
    for partial_gain in partial_gains[..blocks * hidden].chunks_exact(hidden) {
        d_gain.iter_mut().zip(partial_gain).for_each(|(sum, partial)| *sum += partial);
    }
}

fn backward_row(
    d_x: &mut [f32],
    d_gain: &mut [f32],
    d_out: &[f32],
    x: &[f32],
    inverse_rms: f32,
    gain: &[f32],
) {
    let mean = vector::dot3(d_out, gain, x) * inverse_rms / gain.len() as f32;
    for ((d_gain, d_out), x) in d_gain.iter_mut().zip(d_out).zip(x) {
        *d_gain = (d_out * inverse_rms).mul_add(*x, *d_gain);
    }
    for (((d_x, d_out), x), gain) in d_x.iter_mut().zip(d_out).zip(x).zip(gain) {
        let direct = d_out * gain;
        *d_x += (x * inverse_rms).mul_add(-mean, direct) * inverse_rms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        FORWARD_TOLERANCE, GRADIENT_TOLERANCE, dot, error_against, gradient_error, uniform, widen,
    };
    use proptest::prelude::*;

    const EPSILON: f32 = 1e-3;

    fn reference(x: &[f64], gain: &[f64]) -> Vec<f64> {
        let width = gain.len() as f64;
        let mut out = Vec::new();
        for row in x.chunks_exact(gain.len()) {
            let rms = (row.iter().map(|x| x * x).sum::<f64>() / width + f64::from(EPSILON)).sqrt();
            out.extend(row.iter().zip(gain).map(|(x, gain)| x / rms * gain));
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn normalises_and_its_gradients_are_slopes(rows in 1usize..200, hidden in 3usize..90) {
            let (x, gain, d_out) = (uniform(1, rows * hidden), uniform(2, hidden), uniform(3, rows * hidden));
            let (mut out, mut inverse_rms) = (vec![f32::NAN; x.len()], vec![f32::NAN; rows]);
            forward(&mut out, &mut inverse_rms, &x, &gain, EPSILON);
            let (x64, gain64, d64) = (widen(&x), widen(&gain), widen(&d_out));
            prop_assert!(error_against(&out, &reference(&x64, &gain64)) < FORWARD_TOLERANCE);
            let mut again = vec![f32::NAN; x.len()];
            recompute(&mut again, &inverse_rms, &x, &gain);
            prop_assert_eq!(&again, &out);

            // The gradient of the input adds to what is there; 0.5 is exact in the difference below.
            let (mut d_x, mut d_gain) = (vec![0.5; x.len()], vec![f32::NAN; hidden]);
            let mut partial_gains = vec![f32::NAN; rows.div_ceil(ROW_BLOCK) * hidden];
            backward(&mut d_x, &mut d_gain, &mut partial_gains, &d_out, &x, &inverse_rms, &gain);
            d_x.iter_mut().for_each(|d_x| *d_x -= 0.5);
            let of_x = gradient_error(&d_x, &x, |x| dot(&reference(x, &gain64), &d64));
            let of_gain = gradient_error(&d_gain, &gain, |gain| dot(&reference(&x64, gain), &d64));
            prop_assert!(of_x < GRADIENT_TOLERANCE, "input: {of_x}");
            prop_assert!(of_gain < GRADIENT_TOLERANCE, "gain: {of_gain}");
        }
    }

    #[test]
    fn a_row_of_zeros_stays_finite() {
        let (mut out, mut inverse_rms) = (vec![f32::NAN; 5], vec![f32::NAN; 1]);
        forward(&mut out, &mut inverse_rms, &[0.0; 5], &[1.0; 5], 1e-6);
        assert!(out == [0.0; 5] && inverse_rms[0].is_finite());
    }
}

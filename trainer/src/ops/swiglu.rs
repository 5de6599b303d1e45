//! SwiGLU (Shazeer, 2020): `out = silu(gate) * up`, `silu(z) = z / (1 + e^-z)`.

use crate::ops::ROW_BLOCK;
use crate::ops::vector::exp;
use rayon::prelude::*;

/// `out` [rows, ffn] from `gate_up` [rows, 2 ffn], whose rows hold the gates, then the ups.
pub fn forward(out: &mut [f32], gate_up: &[f32], ffn: usize) {
    (out.par_chunks_mut(ROW_BLOCK * ffn), gate_up.par_chunks(ROW_BLOCK * 2 * ffn)).into_par_iter().for_each(
        |(out, gate_up)| {
            for (out, gate_up) in out.chunks_exact_mut(ffn).zip(gate_up.chunks_exact(2 * ffn)) {
                let (gate, up) = gate_up.split_at(ffn);
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *out = gate / (1.0 + exp(-gate)) * up;
                }
            }
        },
    );
}

/// Turns `gate_up` [rows, 2 ffn] into its gradient in place, and `d_out` [rows, ffn] into the forward output
/// (which the gradient of the down projection needs) in place.
///
/// With s = sigmoid(gate): d_up = d_out * gate * s, d_gate = d_out * up * s * (1 + gate * (1 - s)).
pub fn backward_in_place(gate_up: &mut [f32], d_out: &mut [f32], ffn: usize) {
    (gate_up.par_chunks_mut(ROW_BLOCK * 2 * ffn), d_out.par_chunks_mut(ROW_BLOCK * ffn))
        .into_par_iter()
        .for_each(|(gate_up, d_out)| {
            for (gate_up, d_out) in gate_up.chunks_exact_mut(2 * ffn).zip(d_out.chunks_exact_mut(ffn)) {
                let (gate, up) = gate_up.split_at_mut(ffn);
                backward_row(gate, up, d_out);
            }
        });
}

/// A function of its own: its arguments are known not to overlap, without which the loop is not vectorised.
#[inline(never)]
fn backward_row(gate: &mut [f32], up: &mut [f32], d_out: &mut [f32]) {
    for ((gate, up), d_out) in gate.iter_mut().zip(up).zip(d_out) {
        let (z, u, d) = (*gate, *up, *d_out);
        let sigmoid = 1.0 / (1.0 + exp(-z));
        let silu = z * sigmoid;
        *d_out = silu * u;
        *up = d * silu;
        *gate = d * u * sigmoid * z.mul_add(1.0 - sigmoid, 1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        FORWARD_TOLERANCE, GRADIENT_TOLERANCE, dot, error_against, gradient_error, uniform, widen,
    };
    use proptest::prelude::*;

    fn reference(gate_up: &[f64], ffn: usize) -> Vec<f64> {
        let of_row = |row: &[f64]| -> Vec<f64> {
            (0..ffn).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[ffn + i]).collect()
        };
        gate_up.chunks_exact(2 * ffn).flat_map(of_row).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn gates_and_its_gradients_are_slopes(rows in 1usize..150, ffn in 1usize..90, size in 0.1f32..20.0) {
            let gate_up: Vec<f32> = uniform(1, rows * 2 * ffn).iter().map(|x| x * size).collect();
            let d_out = uniform(2, rows * ffn);
            let mut out = vec![f32::NAN; rows * ffn];
            forward(&mut out, &gate_up, ffn);
            prop_assert!(error_against(&out, &reference(&widen(&gate_up), ffn)) < FORWARD_TOLERANCE);

            let (mut gradient, mut output) = (gate_up.clone(), d_out.clone());
            backward_in_place(&mut gradient, &mut output, ffn);
            let d64 = widen(&d_out);
            let error = gradient_error(&gradient, &gate_up, |gate_up| dot(&reference(gate_up, ffn), &d64));
            prop_assert!(error < GRADIENT_TOLERANCE, "{error}");
            prop_assert!(error_against(&output, &widen(&out)) < FORWARD_TOLERANCE);
        }
    }

    #[test]
    fn large_gates_saturate() {
        let (mut gate_up, mut d_out) = ([1e4, -1e4, 3.0, 3.0], [1.0, 1.0]);
        let mut out = [0.0; 2];
        forward(&mut out, &gate_up, 2);
        backward_in_place(&mut gate_up, &mut d_out, 2);
        assert!(out[0] == 3e4 && out[1].abs() < 1e-30);
        assert!(gate_up[0] == 3.0 && gate_up[1].abs() < 1e-30);
        assert!(gate_up[2] == 1e4 && gate_up[3].abs() < 1e-30);
    }
}

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
    (gate_up.par_chunks_mut(ROW_BLOCK * 2 * ffn), d_out.par_chunks_mut(ROW_BLOCK * ffn)).into_par_iter().for_each(
        |(gate_up, d_out)| {
            for (gate_up, d_out) in gate_up.chunks_exact_mut(2 * ffn).zip(d_out.chunks_exact_mut(ffn)) {
                let (gate, up) = gate_up.split_at_mut(ffn);
                for ((gate, up), d_out) in gate.iter_mut().zip(up).zip(d_out) {
                    let (z, u, d) = (*gate, *up, *d_out);
                    let sigmoid = 1.0 / (1.0 + exp(-z));
                    let silu = z * sigmoid;
                    *d_out = silu * u;
                    *up = d * silu;
                    *gate = d * u * sigmoid * z.mul_add(1.0 - sigmoid, 1.0);
                }
            }
        },
    );
}

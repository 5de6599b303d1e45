//! One LLaMA layer: `middle = x + W_o attention(rope(W_qkv norm(x)))`,
//! `out = middle + W_down swiglu(W_gate_up norm(middle))`, and the same list upside down.

use crate::model::activations::{BlockActivations, Scratch, Sizes};
use crate::ops::gemm::Output::{Accumulate, Overwrite};
use crate::ops::rope::RopeTable;
use crate::ops::{attention, linear, rmsnorm, rope, swiglu};

/// Weights of a layer, each as Hugging Face stores it; neighbours that one product serves are one matrix.
pub struct BlockWeights<'a> {
    /// [hidden]
    pub input_norm: &'a [f32],
    /// Queries, keys, values: [qkv_width, hidden]
    pub qkv: &'a [f32],
    /// [hidden, context_width]
    pub o: &'a [f32],
    /// [hidden]
    pub post_norm: &'a [f32],
    /// Gates, ups: [2 ffn, hidden]
    pub gate_up: &'a [f32],
    /// [hidden, ffn]
    pub down: &'a [f32],
}

/// Where the gradients of a layer's weights go; the old content is overwritten.
pub struct BlockGradients<'a> {
    /// [hidden]
    pub input_norm: &'a mut [f32],
    /// [qkv_width, hidden]
    pub qkv: &'a mut [f32],
    /// [hidden, context_width]
    pub o: &'a mut [f32],
    /// [hidden]
    pub post_norm: &'a mut [f32],
    /// [2 ffn, hidden]
    pub gate_up: &'a mut [f32],
    /// [hidden, ffn]
    pub down: &'a mut [f32],
    /// Whether the matrices' are wanted. Of a frozen layer they are not, and cost nothing; the gains' come with the
    /// gradient of the input.
    pub of_matrices: bool,
}

/// `out` [rows, hidden] from `a.input` [rows, hidden]; keeps in `a` what [`backward`] needs.
pub fn forward(
    out: &mut [f32],
    a: &mut BlockActivations,
    s: &mut Scratch,
    w: &BlockWeights<'_>,
    table: &RopeTable,
    sizes: &Sizes,
) {
    rmsnorm::forward(&mut s.norm, &mut a.input_inverse_rms, &a.input, w.input_norm, sizes.epsilon);
    linear::forward(&mut s.qkv_rows, &s.norm, w.qkv, sizes.qkv(), Overwrite);
    rope::split_heads(&mut a.qkv, &s.qkv_rows, table, &sizes.heads);
    attention::forward(&mut a.context, &mut a.log_sums, &a.qkv, &sizes.heads);
    attention::merge_heads(&mut s.context_rows, &a.context, &sizes.heads);
    a.middle.copy_from_slice(&a.input);
    linear::forward(&mut a.middle, &s.context_rows, w.o, sizes.o(), Accumulate);

    rmsnorm::forward(&mut s.norm, &mut a.middle_inverse_rms, &a.middle, w.post_norm, sizes.epsilon);
    linear::forward(&mut a.gate_up, &s.norm, w.gate_up, sizes.gate_up(), Overwrite);
    swiglu::forward(&mut s.mlp, &a.gate_up, sizes.ffn);
    out.copy_from_slice(&a.middle);
    linear::forward(out, &s.mlp, w.down, sizes.down(), Accumulate);
}

/// Turns `d_residual` [rows, hidden], the gradient of the block's output, into that of its input, and writes the
/// gradients of the weights that are wanted. Uses up `a.gate_up`.
pub fn backward(
    d_residual: &mut [f32],
    d_w: &mut BlockGradients<'_>,
    a: &mut BlockActivations,
    s: &mut Scratch,
    w: &BlockWeights<'_>,
    table: &RopeTable,
    sizes: &Sizes,
) {
    linear::backward_input(&mut s.mlp, d_residual, w.down, sizes.down());
    swiglu::backward_in_place(&mut a.gate_up, &mut s.mlp, sizes.ffn);
    if d_w.of_matrices {
        linear::backward_weight(d_w.down, d_residual, &s.mlp, sizes.down());
        rmsnorm::recompute(&mut s.norm, &a.middle_inverse_rms, &a.middle, w.post_norm);
        linear::backward_weight(d_w.gate_up, &a.gate_up, &s.norm, sizes.gate_up());
    }
    linear::backward_input(&mut s.d_norm, &a.gate_up, w.gate_up, sizes.gate_up());
    let partial = &mut s.partial_gains;
    rmsnorm::backward(
        d_residual,
        d_w.post_norm,
        partial,
        &s.d_norm,
        &a.middle,
        &a.middle_inverse_rms,
        w.post_norm,
    );

    if d_w.of_matrices {
        attention::merge_heads(&mut s.context_rows, &a.context, &sizes.heads);
        linear::backward_weight(d_w.o, d_residual, &s.context_rows, sizes.o());
    }
    linear::backward_input(&mut s.context_rows, d_residual, w.o, sizes.o());
    attention::unmerge_heads(&mut s.d_context, &s.context_rows, &sizes.heads);
    attention::backward(&mut s.d_qkv, &s.d_context, &a.context, &a.qkv, &a.log_sums, &sizes.heads);
    rope::split_heads_backward(&mut s.qkv_rows, &s.d_qkv, table, &sizes.heads);
    if d_w.of_matrices {
        rmsnorm::recompute(&mut s.norm, &a.input_inverse_rms, &a.input, w.input_norm);
        linear::backward_weight(d_w.qkv, &s.qkv_rows, &s.norm, sizes.qkv());
    }
    linear::backward_input(&mut s.d_norm, &s.qkv_rows, w.qkv, sizes.qkv());
    let partial = &mut s.partial_gains;
    rmsnorm::backward(
        d_residual,
        d_w.input_norm,
        partial,
        &s.d_norm,
        &a.input,
        &a.input_inverse_rms,
        w.input_norm,
    );
}

//! Causal attention with grouped key and value heads (Ainslie et al., 2023):
//! `context = softmax(Q K^T / sqrt(head_dim), masked) V`.
//!
//! Scores exist only as tiles of [`QUERY_BLOCK`] rows (FlashAttention, Dao et al., 2022, without its split over
//! keys: a tile holds all keys that its rows see). The backward pass computes them again from the kept log-sum.

use crate::ops::gemm::{Matrix, MatrixMut, Output, gemm_serial};
use crate::ops::vector;
use rayon::prelude::*;

/// Query rows of one tile.
const QUERY_BLOCK: usize = 64;

/// Sizes of an attention, and of the head-major layout of its operands.
///
/// `qkv` is [batch, kv_heads, group + 2, sequence, head_dim]: the `group` query heads of a key head, then the key
/// head, then the value head. What one task reads lies together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Sequences.
    pub batch: usize,
    /// Positions of a sequence.
    pub sequence: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Query heads that share a key head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Heads of queries, keys and values together.
    pub fn qkv_heads(&self) -> usize {
        self.heads + 2 * self.kv_heads
    }

    /// Width of a row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        self.qkv_heads() * self.head_dim
    }

    /// Width of a row of the context.
    pub fn context_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Whether the head-major head `part` of a sequence is a value head.
    pub fn is_value(&self, part: usize) -> bool {
        part % (self.group() + 2) == self.group() + 1
    }

    /// First column, in a row [queries | keys | values], of the head-major head `part`.
    pub fn column_of(&self, part: usize) -> usize {
        let (kv_head, member) = (part / (self.group() + 2), part % (self.group() + 2));
        let head = match member.checked_sub(self.group()) {
            None => kv_head * self.group() + member,
            Some(0) => self.heads + kv_head,
            Some(_) => self.heads + self.kv_heads + kv_head,
        };
        head * self.head_dim
    }

    fn head_len(&self) -> usize {
        self.sequence * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Splits the operands of one key head into queries [group, sequence, head_dim], keys and values.
    fn split<'a>(&self, qkv: &'a [f32]) -> (&'a [f32], &'a [f32], &'a [f32]) {
        let (queries, rest) = qkv.split_at(self.group() * self.head_len());
        let (keys, values) = rest.split_at(self.head_len());
        (queries, keys, values)
    }

    /// Tiles of the query rows: (first row, row after the last).
    fn tiles(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let sequence = self.sequence;
        (0..sequence).step_by(QUERY_BLOCK).map(move |first| (first, sequence.min(first + QUERY_BLOCK)))
    }
}

/// `context` [batch, heads, sequence, head_dim] and the logarithm of each row's softmax sum, `log_sums`
/// [batch, heads, sequence], from the head-major `qkv`.
pub fn forward(context: &mut [f32], log_sums: &mut [f32], qkv: &[f32], shape: &HeadShape) {
    let (group, head_len) = (shape.group(), shape.head_len());
    (
        context.par_chunks_mut(group * head_len),
        log_sums.par_chunks_mut(group * shape.sequence),
        qkv.par_chunks((group + 2) * head_len),
    )
        .into_par_iter()
        .for_each_init(
            || vec![0.0; QUERY_BLOCK * shape.sequence],
            |tile, (context, log_sums, qkv)| {
                let (queries, keys, values) = shape.split(qkv);
                for head in 0..group {
                    let context = &mut context[head * head_len..][..head_len];
                    let log_sums = &mut log_sums[head * shape.sequence..][..shape.sequence];
                    let queries = &queries[head * head_len..][..head_len];
                    forward_head(context, log_sums, queries, keys, values, tile, shape);
                }
            },
        );
}

fn forward_head(
    context: &mut [f32],
    log_sums: &mut [f32],
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    tile: &mut [f32],
    shape: &HeadShape,
) {
    let head_dim = shape.head_dim;
    for (first, end) in shape.tiles() {
        let (rows, seen) = (end - first, end);
        let queries = Matrix::new(&queries[first * head_dim..], rows, head_dim);
        let keys = Matrix::new(keys, seen, head_dim);
        let tile = &mut tile[..rows * seen];
        gemm_serial(MatrixMut::new(tile, rows, seen), queries, keys.t(), shape.scale(), Output::Overwrite);
        for (row, scores) in tile.chunks_exact_mut(seen).enumerate() {
            log_sums[first + row] = softmax(scores, first + row + 1);
        }
        let context = MatrixMut::new(&mut context[first * head_dim..end * head_dim], rows, head_dim);
        let values = Matrix::new(values, seen, head_dim);
        gemm_serial(context, Matrix::new(tile, rows, seen), values, 1.0, Output::Overwrite);
    }
}

/// Softmax over the first `visible` scores, in place; the others become 0. Returns the logarithm of the sum.
fn softmax(scores: &mut [f32], visible: usize) -> f32 {
    let (scores, masked) = scores.split_at_mut(visible);
    masked.fill(0.0);
    let max = vector::max(scores);
    for score in scores.iter_mut() {
        *score = vector::exp(*score - max);
    }
    let sum = vector::sum(scores);
    let inverse = 1.0 / sum;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
    max + libm::logf(sum)
}

/// The gradients `d_qkv` (head-major) of the operands, from `d_context` and the forward pass's `context`, both
/// [batch, heads, sequence, head_dim].
///
/// Per tile, with P the probabilities: dV += P^T dC, dS = P (dC V^T - rowsum(dC C)), dQ = dS K scale,
/// dK += dS^T Q scale.
pub fn backward(
    d_qkv: &mut [f32],
    d_context: &[f32],
    context: &[f32],
    qkv: &[f32],
    log_sums: &[f32],
    shape: &HeadShape,
) {
    let (group, head_len) = (shape.group(), shape.head_len());
    (
        d_qkv.par_chunks_mut((group + 2) * head_len),
        d_context.par_chunks(group * head_len),
        context.par_chunks(group * head_len),
        qkv.par_chunks((group + 2) * head_len),
        log_sums.par_chunks(group * shape.sequence),
    )
        .into_par_iter()
        .for_each_init(
            || vec![0.0; 2 * QUERY_BLOCK * shape.sequence],
            |tiles, (d_qkv, d_context, context, qkv, log_sums)| {
                let (queries, keys, values) = shape.split(qkv);
                let (d_queries, d_rest) = d_qkv.split_at_mut(group * head_len);
                d_rest.fill(0.0);
                let (d_keys, d_values) = d_rest.split_at_mut(head_len);
                for head in 0..group {
                    let of_head = head * head_len..(head + 1) * head_len;
                    let d_queries = &mut d_queries[of_head.clone()];
                    let forward = ForwardHead {
                        queries: &queries[of_head.clone()],
                        keys,
                        values,
                        context: &context[of_head.clone()],
                        log_sums: &log_sums[head * shape.sequence..][..shape.sequence],
                    };
                    backward_head(d_queries, d_keys, d_values, &d_context[of_head], &forward, tiles, shape);
                }
            },
        );
}

/// What the backward pass of one query head reads of the forward pass.
struct ForwardHead<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    context: &'a [f32],
    log_sums: &'a [f32],
}

fn backward_head(
    d_queries: &mut [f32],
    d_keys: &mut [f32],
    d_values: &mut [f32],
    d_context: &[f32],
    forward: &ForwardHead<'_>,
    tiles: &mut [f32],
    shape: &HeadShape,
) {
    let (head_dim, scale) = (shape.head_dim, shape.scale());
    let (probabilities, d_scores) = tiles.split_at_mut(QUERY_BLOCK * shape.sequence);
    for (first, end) in shape.tiles() {
        let (rows, seen) = (end - first, end);
        let of_tile = first * head_dim..end * head_dim;
        let queries = Matrix::new(&forward.queries[of_tile.clone()], rows, head_dim);
        let d_out = Matrix::new(&d_context[of_tile.clone()], rows, head_dim);
        let keys = Matrix::new(forward.keys, seen, head_dim);
        let values = Matrix::new(forward.values, seen, head_dim);
        let probabilities = &mut probabilities[..rows * seen];
        let d_scores = &mut d_scores[..rows * seen];

        gemm_serial(MatrixMut::new(probabilities, rows, seen), queries, keys.t(), scale, Output::Overwrite);
        gemm_serial(MatrixMut::new(d_scores, rows, seen), d_out, values.t(), 1.0, Output::Overwrite);
        let tile_rows = probabilities.chunks_exact_mut(seen).zip(d_scores.chunks_exact_mut(seen));
        for (row, (probabilities, d_scores)) in tile_rows.enumerate() {
            let of_row = (first + row) * head_dim..(first + row + 1) * head_dim;
            let correction = vector::dot(&d_context[of_row.clone()], &forward.context[of_row]);
            backward_row(probabilities, d_scores, first + row + 1, forward.log_sums[first + row], correction);
        }
        let (p, ds) = (Matrix::new(probabilities, rows, seen), Matrix::new(d_scores, rows, seen));
        let d_values = MatrixMut::new(&mut d_values[..seen * head_dim], seen, head_dim);
        gemm_serial(d_values, p.t(), d_out, 1.0, Output::Accumulate);
        let d_keys = MatrixMut::new(&mut d_keys[..seen * head_dim], seen, head_dim);
        gemm_serial(d_keys, ds.t(), queries, scale, Output::Accumulate);
        let d_queries = MatrixMut::new(&mut d_queries[of_tile], rows, head_dim);
        gemm_serial(d_queries, ds, keys, scale, Output::Overwrite);
    }
}

/// One row: scores become probabilities, the gradient of the probabilities becomes that of the scores.
fn backward_row(scores: &mut [f32], d_scores: &mut [f32], visible: usize, log_sum: f32, correction: f32) {
    scores[visible..].fill(0.0);
    d_scores[visible..].fill(0.0);
    for (score, d_score) in scores[..visible].iter_mut().zip(d_scores) {
        *score = vector::exp(*score - log_sum);
        *d_score = *score * (*d_score - correction);
    }
}

/// Moves a head-major `context` to `rows` [batch * sequence, context_width].
pub fn merge_heads(rows: &mut [f32], context: &[f32], shape: &HeadShape) {
    let HeadShape { sequence, heads, head_dim, .. } = *shape;
    rows.par_chunks_mut(sequence * heads * head_dim).enumerate().for_each(|(batch, rows)| {
        for (position, row) in rows.chunks_exact_mut(heads * head_dim).enumerate() {
            for (head, out) in row.chunks_exact_mut(head_dim).enumerate() {
                let first = ((batch * heads + head) * sequence + position) * head_dim;
                out.copy_from_slice(&context[first..first + head_dim]);
            }
        }
    });
}

/// The inverse of [`merge_heads`].
pub fn unmerge_heads(context: &mut [f32], rows: &[f32], shape: &HeadShape) {
    let HeadShape { sequence, heads, head_dim, .. } = *shape;
    context.par_chunks_mut(sequence * head_dim).enumerate().for_each(|(index, out)| {
        let (batch, head) = (index / heads, index % heads);
        for (position, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let first = ((batch * sequence + position) * heads + head) * head_dim;
            out.copy_from_slice(&rows[first..first + head_dim]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        FORWARD_TOLERANCE, GRADIENT_TOLERANCE, dot, error_against, gradient_error, uniform, widen,
    };
    use proptest::prelude::*;

    /// Context and log-sums of the head-major operands, a query at a time.
    fn reference(qkv: &[f64], shape: &HeadShape) -> (Vec<f64>, Vec<f64>) {
        let HeadShape { batch, sequence, heads, kv_heads, head_dim } = *shape;
        let group = heads / kv_heads;
        let (mut context, mut log_sums) = (Vec::new(), Vec::new());
        for (batch, head, query) in
            (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..sequence).map(move |q| (b, h, q))))
        {
            let row = |member: usize, position: usize| {
                let part = (batch * kv_heads + head / group) * (group + 2) + member;
                &qkv[(part * sequence + position) * head_dim..][..head_dim]
            };
            let scale = 1.0 / (head_dim as f64).sqrt();
            let score = |key| (dot(row(head % group, query), row(group, key)) * scale).exp();
            let weights: Vec<f64> = (0..=query).map(score).collect();
            let sum: f64 = weights.iter().sum();
            log_sums.push(sum.ln());
            let mean = |i| weights.iter().enumerate().map(|(key, w)| w / sum * row(group + 1, key)[i]).sum();
            context.extend((0..head_dim).map(|i| -> f64 { mean(i) }));
        }
        (context, log_sums)
    }

    /// Groups of 1 to 4, any even width, sequences of up to three tiles.
    fn shapes() -> impl Strategy<Value = HeadShape> {
        (1usize..3, 1usize..150, 1usize..3, 1usize..5, 1usize..13).prop_map(
            |(batch, sequence, kv_heads, group, half)| HeadShape {
                batch,
                sequence,
                heads: kv_heads * group,
                kv_heads,
                head_dim: 2 * half,
            },
        )
    }

    fn forward_of(qkv: &[f32], shape: &HeadShape) -> (Vec<f32>, Vec<f32>) {
        let rows = shape.batch * shape.sequence;
        let mut context = vec![f32::NAN; rows * shape.context_width()];
        let mut log_sums = vec![f32::NAN; rows * shape.heads];
        forward(&mut context, &mut log_sums, qkv, shape);
        (context, log_sums)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn attends_and_its_gradient_is_the_slope(shape in shapes(), size in 0.5f32..3.0) {
            let rows = shape.batch * shape.sequence;
            let qkv: Vec<f32> = uniform(1, rows * shape.qkv_width()).iter().map(|x| x * size).collect();
            let (context, log_sums) = forward_of(&qkv, &shape);
            let (context64, log_sums64) = reference(&widen(&qkv), &shape);
            prop_assert!(error_against(&context, &context64) < FORWARD_TOLERANCE);
            // Log-sums can all be small; they go into an exponent, so that the absolute error counts.
            for (log_sum, expected) in log_sums.iter().zip(&log_sums64) {
                prop_assert!((f64::from(*log_sum) - expected).abs() < FORWARD_TOLERANCE * expected.abs().max(1.0));
            }

            let d_context = uniform(2, context.len());
            let mut d_qkv = vec![f32::NAN; qkv.len()];
            backward(&mut d_qkv, &d_context, &context, &qkv, &log_sums, &shape);
            let d64 = widen(&d_context);
            let error = gradient_error(&d_qkv, &qkv, |qkv| dot(&reference(qkv, &shape).0, &d64));
            prop_assert!(error < GRADIENT_TOLERANCE, "{error}");
        }

        #[test]
        fn heads_merge_and_part_again(shape in shapes()) {
            let HeadShape { batch, sequence, heads, head_dim, .. } = shape;
            let context = uniform(1, batch * sequence * shape.context_width());
            let mut rows = vec![f32::NAN; context.len()];
            merge_heads(&mut rows, &context, &shape);
            let (b, h, t) = (batch - 1, heads / 2, sequence / 2);
            let at_row = ((b * sequence + t) * heads + h) * head_dim;
            let at_head = ((b * heads + h) * sequence + t) * head_dim;
            prop_assert_eq!(rows[at_row], context[at_head]);
            let mut back = vec![f32::NAN; context.len()];
            unmerge_heads(&mut back, &rows, &shape);
            prop_assert_eq!(back, context);
        }
    }

    #[test]
    fn the_future_is_not_seen() {
        let shape = HeadShape { batch: 1, sequence: 70, heads: 2, kv_heads: 1, head_dim: 4 };
        let mut qkv = uniform(1, 70 * shape.qkv_width());
        let before = forward_of(&qkv, &shape).0;
        // Other keys and values at the last position only.
        for part in 2..4 {
            qkv[(part * 70 + 69) * 4..][..4].fill(7.0);
        }
        let after = forward_of(&qkv, &shape).0;
        for head in 0..2 {
            assert_eq!(before[head * 280..][..276], after[head * 280..][..276]);
            assert_ne!(before[head * 280 + 276..][..4], after[head * 280 + 276..][..4]);
        }
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let shape = HeadShape { batch: 1, sequence: 3, heads: 1, kv_heads: 1, head_dim: 2 };
        let qkv: Vec<f32> = uniform(1, 18).iter().map(|x| x * 1e3).collect();
        let (context, log_sums) = forward_of(&qkv, &shape);
        let mut d_qkv = vec![f32::NAN; 18];
        backward(&mut d_qkv, &[1.0; 6], &context, &qkv, &log_sums, &shape);
        assert!(context.iter().chain(&log_sums).chain(&d_qkv).all(|x| x.is_finite()));
    }
}

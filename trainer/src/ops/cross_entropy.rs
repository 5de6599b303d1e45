//! Output head and cross-entropy together, in chunks of rows, so that the logits of the batch never exist at once:
//! `logits = hidden W^T`, `loss[r] = log(sum(exp(logits[r]))) - logits[r][target[r]]`.

use crate::ops::gemm::{Matrix, MatrixMut, Output, gemm};
use crate::ops::vector;
use rayon::prelude::*;

/// Rows whose logits exist at a time. Part of the order of summation of the head's gradient.
pub const CHUNK_ROWS: usize = 256;

/// Rows that one task normalises.
const TASK_ROWS: usize = 8;

/// `losses` [rows] from `hidden` [rows, hidden] and the head `weight` [vocab, hidden]. `logits` is scratch of
/// [[`CHUNK_ROWS`], vocab].
pub fn forward(
    losses: &mut [f32],
    logits: &mut [f32],
    hidden: &[f32],
    weight: Matrix<'_>,
    targets: &[u32],
    vocab: usize,
) {
    let width = hidden.len() / targets.len();
    let chunks =
        losses.chunks_mut(CHUNK_ROWS).zip(targets.chunks(CHUNK_ROWS)).zip(hidden.chunks(CHUNK_ROWS * width));
    for ((losses, targets), hidden) in chunks {
        let logits = &mut logits[..targets.len() * vocab];
        let hidden = Matrix::new(hidden, targets.len(), width);
        gemm(MatrixMut::new(logits, targets.len(), vocab), hidden, weight.t(), Output::Overwrite);
        normalise(losses, logits, targets, vocab, 0.0);
    }
}

/// As [`forward`], and overwrites `d_hidden` [rows, hidden] and, where it is wanted, `d_weight` [vocab, hidden] with the
/// gradients of `scale * sum(losses)`.
#[expect(clippy::too_many_arguments, reason = "three outputs, one scratch, four inputs")]
pub fn forward_backward(
    losses: &mut [f32],
    d_hidden: &mut [f32],
    mut d_weight: Option<&mut [f32]>,
    logits: &mut [f32],
    hidden: &[f32],
    weight: Matrix<'_>,
    targets: &[u32],
    scale: f32,
) {
    let width = hidden.len() / targets.len();
    let vocab = weight.rows();
    let mut output = Output::Overwrite;
    for (chunk, targets) in targets.chunks(CHUNK_ROWS).enumerate() {
        let (first, rows) = (chunk * CHUNK_ROWS, targets.len());
        let logits = &mut logits[..rows * vocab];
        let hidden = Matrix::new(&hidden[first * width..], rows, width);
        gemm(MatrixMut::new(logits, rows, vocab), hidden, weight.t(), Output::Overwrite);
        normalise(&mut losses[first..first + rows], logits, targets, vocab, scale);
        let d_logits = Matrix::new(logits, rows, vocab);
        let d_hidden = MatrixMut::new(&mut d_hidden[first * width..(first + rows) * width], rows, width);
        gemm(d_hidden, d_logits, weight, Output::Overwrite);
        if let Some(d_weight) = d_weight.as_deref_mut() {
            gemm(MatrixMut::new(d_weight, vocab, width), d_logits.t(), hidden, output);
            output = Output::Accumulate;
        }
    }
}

/// Losses of a chunk; with a scale that is not 0, logits become `scale * (softmax - one-hot target)` in place.
fn normalise(losses: &mut [f32], logits: &mut [f32], targets: &[u32], vocab: usize, scale: f32) {
    (
        losses.par_chunks_mut(TASK_ROWS),
        logits.par_chunks_mut(TASK_ROWS * vocab),
        targets.par_chunks(TASK_ROWS),
    )
        .into_par_iter()
        .for_each(|(losses, logits, targets)| {
            for ((loss, logits), &target) in
                losses.iter_mut().zip(logits.chunks_exact_mut(vocab)).zip(targets)
            {
                *loss = normalise_row(logits, target as usize, scale);
            }
        });
}

fn normalise_row(logits: &mut [f32], target: usize, scale: f32) -> f32 {
    let max = vector::max(logits);
    let target_logit = logits[target] - max;
    for logit in logits.iter_mut() {
        *logit = vector::exp(*logit - max);
    }
    let sum = vector::sum(logits);
    if scale != 0.0 {
        let factor = scale / sum;
        for logit in logits.iter_mut() {
            *logit *= factor;
        }
        logits[target] -= scale;
    }
    libm::logf(sum) - target_logit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        FORWARD_TOLERANCE, GRADIENT_TOLERANCE, dot, error_against, gradient_error, uniform, widen,
    };
    use proptest::prelude::*;

    fn reference(hidden: &[f64], weight: &[f64], targets: &[u32]) -> Vec<f64> {
        let width = hidden.len() / targets.len();
        let of_row = |(hidden, &target): (&[f64], &u32)| {
            let logits: Vec<f64> = weight.chunks_exact(width).map(|w| dot(hidden, w)).collect();
            logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[target as usize]
        };
        hidden.chunks_exact(width).zip(targets).map(of_row).collect()
    }

    fn some_targets(rows: usize, vocab: usize) -> Vec<u32> {
        (0..rows).map(|row| ((row * row + 3 * row) % vocab) as u32).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn losses_and_gradients(rows in 1usize..600, width in 1usize..24, vocab in 2usize..70, scale in 0.1f32..2.0) {
            let (hidden, weight) = (uniform(1, rows * width), uniform(2, vocab * width));
            let targets = some_targets(rows, vocab);
            let mut logits = vec![f32::NAN; rows.min(CHUNK_ROWS) * vocab];
            let head = Matrix::new(&weight, vocab, width);
            let mut losses = vec![f32::NAN; rows];
            forward(&mut losses, &mut logits, &hidden, head, &targets, vocab);
            let (hidden64, weight64) = (widen(&hidden), widen(&weight));
            prop_assert!(error_against(&losses, &reference(&hidden64, &weight64, &targets)) < FORWARD_TOLERANCE);

            let (mut d_hidden, mut d_weight) = (vec![f32::NAN; hidden.len()], vec![f32::NAN; weight.len()]);
            let mut again = vec![f32::NAN; rows];
            forward_backward(
                &mut again, &mut d_hidden, Some(&mut d_weight), &mut logits, &hidden, head, &targets, scale,
            );
            let mut alone = vec![f32::NAN; hidden.len()];
            forward_backward(&mut again, &mut alone, None, &mut logits, &hidden, head, &targets, scale);
            prop_assert_eq!(&alone, &d_hidden);
            prop_assert_eq!(again, losses);
            let sum = |losses: Vec<f64>| f64::from(scale) * losses.iter().sum::<f64>();
            let of_hidden = gradient_error(&d_hidden, &hidden, |x| sum(reference(x, &weight64, &targets)));
            let of_weight = gradient_error(&d_weight, &weight, |w| sum(reference(&hidden64, w, &targets)));
            prop_assert!(of_hidden < GRADIENT_TOLERANCE, "hidden: {of_hidden}");
            prop_assert!(of_weight < GRADIENT_TOLERANCE, "weight: {of_weight}");
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let (weight, mut losses, mut logits) = ([1e4, -1e4, 0.0], [0.0; 2], [0.0; 6]);
        forward(&mut losses, &mut logits, &[1.0, 1.0], Matrix::new(&weight, 3, 1), &[0, 1], 3);
        assert_eq!(losses, [0.0, 2e4]);
    }
}

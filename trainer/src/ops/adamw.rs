//! AdamW (Loshchilov and Hutter, 2019), in the arithmetic of PyTorch's `torch.optim.AdamW`.

use rayon::prelude::*;

/// Elements that one task updates.
const CHUNK: usize = 1 << 14;

/// The numbers of one update.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Updates done, this one included: from 1.
    pub step: u64,
    /// What gradients are multiplied by first: the clipping.
    pub gradient_scale: f64,
}

/// Updates the parameters `p` and both moments in place from the gradients `g`; all have one length.
///
/// p -= lr wd p; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + epsilon)
pub fn update(p: &mut [f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], g: &[f32], step: &AdamWStep) {
    let exponent = i32::try_from(step.step).unwrap_or(i32::MAX);
    let correction1 = 1.0 - libm::pow(step.beta1, f64::from(exponent));
    let correction2 = 1.0 - libm::pow(step.beta2, f64::from(exponent));
    let keep = (1.0 - step.learning_rate * step.weight_decay) as f32;
    let rate = (step.learning_rate / correction1) as f32;
    let root_scale = (1.0 / correction2.sqrt()) as f32;
    let (beta1, one_minus_beta1) = (step.beta1 as f32, (1.0 - step.beta1) as f32);
    let (beta2, one_minus_beta2) = (step.beta2 as f32, (1.0 - step.beta2) as f32);
    let (epsilon, scale) = (step.epsilon as f32, step.gradient_scale as f32);
    (p.par_chunks_mut(CHUNK), exp_avg.par_chunks_mut(CHUNK), exp_avg_sq.par_chunks_mut(CHUNK), g.par_chunks(CHUNK))
        .into_par_iter()
        .for_each(|(p, m, v, g)| {
            for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
                let g = g * scale;
                *m = beta1.mul_add(*m, one_minus_beta1 * g);
                *v = beta2.mul_add(*v, one_minus_beta2 * g * g);
                let denominator = v.sqrt().mul_add(root_scale, epsilon);
                *p = (*p * keep) - rate * (*m / denominator);
            }
        });
}

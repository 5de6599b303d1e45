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

/// What a gradient of this global norm is multiplied by, so that its norm is at most `clip`; 0 is no limit.
pub fn clip_scale(clip: f64, norm: f64) -> f64 {
    if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }
}

/// Updates the parameters `p` and both moments in place from the gradients `g`; all have one length.
///
/// p -= lr wd p; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + epsilon)
pub fn update(p: &mut [f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], g: &[f32], step: &AdamWStep) {
    let constants = Constants::of(step);
    (
        p.par_chunks_mut(CHUNK),
        exp_avg.par_chunks_mut(CHUNK),
        exp_avg_sq.par_chunks_mut(CHUNK),
        g.par_chunks(CHUNK),
    )
        .into_par_iter()
        .for_each(|(p, m, v, g)| constants.update(p, m, v, g));
}

/// Which elements of a matrix are new: those in a new row or in a new column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewElements {
    /// Whether each row is new.
    pub rows: Vec<bool>,
    /// Whether each column is new.
    pub columns: Vec<bool>,
}

impl NewElements {
    /// Whether the element at this place of the flat matrix is new.
    pub fn contains(&self, element: usize) -> bool {
        let width = self.columns.len();
        self.rows[element / width] || self.columns[element % width]
    }
}

/// [`update`] of a part of a matrix that begins at its element `first`, where new elements have a learning rate of
/// their own: `old` and `new` differ in that only.
pub fn update_with_new(
    [p, exp_avg, exp_avg_sq]: [&mut [f32]; 3],
    g: &[f32],
    first: usize,
    elements: &NewElements,
    [old, new]: [&AdamWStep; 2],
) {
    let [old, new] = [old, new].map(Constants::of);
    let of_column = |value: fn(&Constants) -> f32| -> Vec<f32> {
        elements.columns.iter().map(|is_new| value(if *is_new { &new } else { &old })).collect()
    };
    let (keep, rate) = (of_column(|constants| constants.keep), of_column(|constants| constants.rate));
    let width = elements.columns.len();
    (
        p.par_chunks_mut(CHUNK),
        exp_avg.par_chunks_mut(CHUNK),
        exp_avg_sq.par_chunks_mut(CHUNK),
        g.par_chunks(CHUNK),
    )
        .into_par_iter()
        .enumerate()
        .for_each(|(chunk, (p, m, v, g))| {
            let mut done = 0;
            while done < p.len() {
                let at = first + chunk * CHUNK + done;
                let (row, column) = (at / width, at % width);
                let part = done..p.len().min(done + width - column);
                done = part.end;
                let (p, m, v, g) =
                    (&mut p[part.clone()], &mut m[part.clone()], &mut v[part.clone()], &g[part]);
                if elements.rows[row] {
                    new.update(p, m, v, g);
                } else {
                    old.update_at(p, m, v, g, &keep[column..], &rate[column..]);
                }
            }
        });
}

/// The numbers of a step as every element needs them.
#[derive(Clone, Copy)]
struct Constants {
    keep: f32,
    rate: f32,
    root_scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    epsilon: f32,
    scale: f32,
}

impl Constants {
    fn of(step: &AdamWStep) -> Self {
        let exponent = i32::try_from(step.step).unwrap_or(i32::MAX);
        let correction1 = 1.0 - libm::pow(step.beta1, f64::from(exponent));
        let correction2 = 1.0 - libm::pow(step.beta2, f64::from(exponent));
        Self {
            keep: (1.0 - step.learning_rate * step.weight_decay) as f32,
            rate: (step.learning_rate / correction1) as f32,
            root_scale: (1.0 / correction2.sqrt()) as f32,
            beta1: step.beta1 as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            epsilon: step.epsilon as f32,
            scale: step.gradient_scale as f32,
        }
    }

    fn update(self, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
            self.element(p, m, v, *g, self.keep, self.rate);
        }
    }

    /// With a decay and a rate for every element.
    fn update_at(self, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], keep: &[f32], rate: &[f32]) {
        for (((((p, m), v), g), keep), rate) in p.iter_mut().zip(m).zip(v).zip(g).zip(keep).zip(rate) {
            self.element(p, m, v, *g, *keep, *rate);
        }
    }

    #[inline(always)]
    fn element(self, p: &mut f32, m: &mut f32, v: &mut f32, g: f32, keep: f32, rate: f32) {
        let g = g * self.scale;
        *m = self.beta1.mul_add(*m, self.one_minus_beta1 * g);
        *v = self.beta2.mul_add(*v, self.one_minus_beta2 * g * g);
        let denominator = v.sqrt().mul_add(self.root_scale, self.epsilon);
        *p = (*p * keep) - rate * (*m / denominator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{error_against, uniform, widen};

    /// Allowed error after 50 steps, relative to the largest value: each step rounds a parameter and its moments
    /// a few times to 2^-24.
    const TOLERANCE: f64 = 1e-5;
    const STEPS: u64 = 50;

    /// An element's state in f64, updated by the lines of PyTorch's single-tensor AdamW.
    #[derive(Clone, Default)]
    struct Element {
        parameter: f64,
        exp_avg: f64,
        exp_avg_sq: f64,
    }

    impl Element {
        fn update(&mut self, gradient: f64, s: &AdamWStep) {
            let gradient = gradient * s.gradient_scale;
            self.parameter *= 1.0 - s.learning_rate * s.weight_decay;
            self.exp_avg += (gradient - self.exp_avg) * (1.0 - s.beta1);
            self.exp_avg_sq = self.exp_avg_sq * s.beta2 + gradient * gradient * (1.0 - s.beta2);
            let step_size = s.learning_rate / (1.0 - s.beta1.powi(s.step as i32));
            let bias_correction2 = 1.0 - s.beta2.powi(s.step as i32);
            let denominator = self.exp_avg_sq.sqrt() / bias_correction2.sqrt() + s.epsilon;
            self.parameter -= step_size * self.exp_avg / denominator;
        }
    }

    fn settings(step: u64, weight_decay: f64, gradient_scale: f64) -> AdamWStep {
        let learning_rate = 1e-2 / step as f64;
        let (beta1, beta2, epsilon) = (0.9, 0.95, 1e-8);
        AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, step, gradient_scale }
    }

    fn compare(len: usize, weight_decay: f64, gradient_scale: f64) {
        let (mut p, mut m, mut v) = (uniform(1, len), vec![0.0; len], vec![0.0; len]);
        let mut reference: Vec<Element> =
            widen(&p).into_iter().map(|parameter| Element { parameter, ..Element::default() }).collect();
        for step in 1..=STEPS {
            let gradient = uniform(1 + step, len);
            let settings = settings(step, weight_decay, gradient_scale);
            update(&mut p, &mut m, &mut v, &gradient, &settings);
            reference.iter_mut().zip(&gradient).for_each(|(e, g)| e.update(f64::from(*g), &settings));
        }
        let field = |f: fn(&Element) -> f64| -> Vec<f64> { reference.iter().map(f).collect() };
        assert!(error_against(&p, &field(|e| e.parameter)) < TOLERANCE);
        assert!(error_against(&m, &field(|e| e.exp_avg)) < TOLERANCE);
        assert!(error_against(&v, &field(|e| e.exp_avg_sq)) < TOLERANCE);
    }

    #[test]
    fn follows_pytorch_over_many_steps() {
        for (len, weight_decay, gradient_scale) in
            [(1, 0.1, 1.0), (37, 0.0, 1.0), (37, 0.1, 0.01), (CHUNK + 5, 0.5, 1.0), (CHUNK + 5, 0.0, 0.3)]
        {
            compare(len, weight_decay, gradient_scale);
        }
    }

    #[test]
    fn without_gradient_only_the_decay_acts() {
        let (mut p, mut m, mut v) = ([2.0], [0.0], [0.0]);
        update(&mut p, &mut m, &mut v, &[0.0], &settings(1, 0.5, 1.0));
        assert_eq!((p, m, v), ([2.0 * (1.0f32 - 0.005)], [0.0], [0.0]));
    }

    #[test]
    fn new_elements_have_the_bits_of_their_own_rate() {
        let (rows, width) = (70, 517);
        let elements = NewElements {
            rows: (0..rows).map(|row| row % 7 > 4).collect(),
            columns: (0..width).map(|column| column / 10 % 3 == 1).collect(),
        };
        let [old, new] = [1.0, 1.3].map(|ratio| {
            let settings = settings(3, 0.1, 0.5);
            AdamWStep { learning_rate: ratio * settings.learning_rate, ..settings }
        });
        // The whole matrix, and parts that begin and end inside rows.
        for part in [0..rows * width, 1000..1001, 700..30_000] {
            let len = part.len();
            let state =
                || [uniform(1, len), uniform(2, len), uniform(3, len).iter().map(|v| v.abs()).collect()];
            let gradient = uniform(4, len);
            let (mut mixed, mut all_old, mut all_new) = (state(), state(), state());
            update_with_new(
                mixed.each_mut().map(|x| &mut x[..]),
                &gradient,
                part.start,
                &elements,
                [&old, &new],
            );
            for ([p, m, v], step) in [(&mut all_old, &old), (&mut all_new, &new)] {
                update(p, m, v, &gradient, step);
            }
            let mut found = [0; 2];
            for (index, element) in part.enumerate() {
                let is_new = elements.rows[element / width] || elements.columns[element % width];
                let expected = if is_new { &all_new } else { &all_old };
                assert_eq!(mixed[0][index].to_bits(), expected[0][index].to_bits(), "element {element}");
                found[usize::from(is_new)] += 1;
            }
            assert!(mixed[1] == all_old[1] && mixed[2] == all_old[2], "moments know no rate");
            assert!(len == 1 || found.iter().all(|count| *count > 100), "{found:?}");
            assert!(all_old[0] != all_new[0]);
        }
    }
}

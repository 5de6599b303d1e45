//! Training of the matrices: the loss of the target that they generate, and AdamW.

use super::data::Batches;
use super::generator::{Generator, Workspace};
use super::progress::ProgressFolder;
use super::{LearnError, LearnProgress, Learning, Result};
use crate::model::activations::{Activations, Sizes};
use crate::model::llama::{Llama, Tokens};
use crate::ops::adamw::{self, AdamWStep};
use crate::ops::gradient::{GradientTree, unit_squares};
use growth_crds::plan::{LearnPlan, ModelConfig};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Steps between two objects of progress.
const STORE_EVERY_STEPS: u64 = 10;

/// Time after which one is written in any case.
const STORE_EVERY: Duration = Duration::from_secs(60);

/// Where learning stands.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct LearnState {
    pub(super) step: u64,
    pub(super) matrices: Vec<f32>,
    pub(super) exp_avg: Vec<f32>,
    pub(super) exp_avg_sq: Vec<f32>,
    /// Loss of every step, before its update.
    pub(super) losses: Vec<f64>,
}

impl LearnState {
    pub(super) fn first(matrices: Vec<f32>) -> Self {
        let zeros = vec![0.0; matrices.len()];
        Self { exp_avg: zeros.clone(), exp_avg_sq: zeros, matrices, ..Self::default() }
    }
}

/// The buffers of a step.
pub(super) struct Learner<'a> {
    plan: &'a LearnPlan,
    generator: &'a Generator,
    source: &'a [f32],
    model: Llama,
    activations: Activations,
    gradients: GradientTree,
    target: Vec<f32>,
    space: Workspace,
    d_matrices: Vec<f32>,
}

impl<'a> Learner<'a> {
    pub(super) fn new(
        plan: &'a LearnPlan,
        generator: &'a Generator,
        source: &'a [f32],
        target: &ModelConfig,
    ) -> Self {
        let sequence = plan.sequence_length as usize;
        let batch = plan.micro_batch_tokens as usize / sequence;
        let model = Llama::new(target.clone(), sequence);
        let len = model.layout().total_len();
        Self {
            activations: Activations::for_training(&Sizes::new(target, batch, sequence)),
            gradients: GradientTree::new(len, plan.micro_batches() as usize),
            target: vec![0.0; len],
            space: Workspace::default(),
            d_matrices: vec![0.0; generator.len()],
            plan,
            generator,
            source,
            model,
        }
    }

    /// Trains from `state` to the last step. What was stored is gone on from.
    pub(super) fn run(
        &mut self,
        mut state: LearnState,
        batches: &Batches<'_>,
        learning: &Learning<'_>,
        progress: Option<&ProgressFolder>,
    ) -> Result<LearnState> {
        let (steps, tokens) = (self.plan.steps, self.plan.batch_tokens);
        let (mut ids, mut targets) = (vec![0; tokens as usize], vec![0; tokens as usize]);
        let mut stored = Instant::now();
        while state.step < steps {
            if learning.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                progress.map_or(Ok(()), |progress| progress.store(&state))?;
                return Err(LearnError::Stopped { step: state.step, steps });
            }
            let first = state.step * tokens / u64::from(self.plan.sequence_length);
            batches.fill(first, &mut ids, &mut targets)?;
            let loss = self.step(&mut state, &ids, &targets)?;
            let due = state.step.is_multiple_of(STORE_EVERY_STEPS) || stored.elapsed() >= STORE_EVERY;
            if let Some(progress) = progress.filter(|_| due) {
                progress.store(&state)?;
                stored = Instant::now();
            }
            (learning.report)(LearnProgress { tokens: state.step * tokens, total: steps * tokens, loss });
        }
        Ok(state)
    }

    /// One step on a batch; the loss before it.
    fn step(&mut self, state: &mut LearnState, ids: &[u32], targets: &[u32]) -> Result<f64> {
        let loss = self.gradient(&state.matrices, ids, targets);
        let norm = unit_squares(&self.d_matrices).iter().sum::<f64>().sqrt();
        state.step += 1;
        if !loss.is_finite() || !norm.is_finite() {
            return Err(LearnError::Diverged { step: state.step, loss });
        }
        let LearnPlan { adam_w, gradient_clip: clip, .. } = self.plan;
        let numbers = AdamWStep {
            learning_rate: adam_w.learning_rate,
            beta1: adam_w.beta1,
            beta2: adam_w.beta2,
            epsilon: adam_w.epsilon,
            weight_decay: adam_w.weight_decay,
            step: state.step,
            gradient_scale: adamw::clip_scale(*clip, norm),
        };
        let LearnState { matrices, exp_avg, exp_avg_sq, .. } = state;
        adamw::update(matrices, exp_avg, exp_avg_sq, &self.d_matrices, &numbers);
        state.losses.push(loss);
        Ok(loss)
    }

    /// Mean loss of a batch, and its gradient in `d_matrices`.
    pub(super) fn gradient(&mut self, matrices: &[f32], ids: &[u32], targets: &[u32]) -> f64 {
        let Self { plan, generator, source, model, activations, gradients, target, space, d_matrices } = self;
        generator.generate(space, source, matrices, target);
        let tokens = Tokens { ids, targets, sequence: plan.sequence_length as usize };
        let (size, scale) = (plan.micro_batch_tokens as usize, 1.0 / ids.len() as f32);
        let ready = &mut |_: usize, _: &mut [f32]| ();
        let losses = model.train_micro_batches(gradients, activations, target, (tokens, size), scale, ready);
        generator.pull_back(space, source, matrices, gradients.finish(), d_matrices);
        losses.iter().sum::<f64>() / ids.len() as f64
    }
}

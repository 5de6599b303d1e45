//! One optimizer step: micro-batches, the sum of their gradients, clipping, AdamW.

use crate::model::activations::{Activations, Sizes};
use crate::model::layout::TensorKind;
use crate::model::llama::{Llama, Tokens};
use crate::ops::adamw::{self, AdamWStep};
use crate::ops::gradient::{self, GradientTree};
use growth_crds::plan::ModelConfig;
use growth_crds::spec::training::AdamWSpec;

/// Weights, moments and counts that training continues from; flat, in the order of the parameter layout.
pub use crate::checkpoint::TrainingState;

/// The buffers and sizes of a step. What it computes depends on the weights and the tokens only.
pub struct StepEngine {
    model: Llama,
    activations: Activations,
    gradients: GradientTree,
    sequence: usize,
    micro_batch_tokens: usize,
    global_batch_tokens: usize,
}

/// What the optimizer does with the gradients of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings<'a> {
    /// The optimizer's constants.
    pub adam_w: &'a AdamWSpec,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Global norm to clip to; 0 for none.
    pub gradient_clip: f64,
}

/// What a step measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the step's tokens, in nats.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
}

impl StepEngine {
    /// Allocates every buffer of a step of `global_batch_tokens` tokens in micro-batches of `micro_batch_tokens`.
    pub fn new(
        config: ModelConfig,
        sequence: u32,
        micro_batch_tokens: u64,
        global_batch_tokens: u64,
    ) -> Self {
        let (sequence, micro_batch_tokens) = (sequence as usize, micro_batch_tokens as usize);
        let global_batch_tokens = global_batch_tokens as usize;
        let sizes = Sizes::new(&config, micro_batch_tokens / sequence, sequence);
        let model = Llama::new(config, sequence);
        let activations = Activations::for_training(&sizes);
        let gradients =
            GradientTree::new(model.layout().total_len(), global_batch_tokens / micro_batch_tokens);
        Self { model, activations, gradients, sequence, micro_batch_tokens, global_batch_tokens }
    }

    /// The model.
    pub fn model(&self) -> &Llama {
        &self.model
    }

    /// Tokens of a step.
    pub fn global_batch_tokens(&self) -> usize {
        self.global_batch_tokens
    }

    /// Bytes of activations and gradients.
    pub fn bytes(&self) -> u64 {
        let buffers = GradientTree::buffers(self.global_batch_tokens / self.micro_batch_tokens);
        self.activations.bytes() + (buffers * self.model.layout().total_len() * size_of::<f32>()) as u64
    }

    /// Trains one step on `ids` and the `targets` that follow them, both [global_batch_tokens].
    pub fn step(
        &mut self,
        state: &mut TrainingState,
        ids: &[u32],
        targets: &[u32],
        settings: StepSettings<'_>,
    ) -> StepReport {
        let scale = 1.0 / self.global_batch_tokens as f32;
        let mut loss = 0.0;
        let micro_batches = ids.chunks_exact(self.micro_batch_tokens);
        for (ids, targets) in micro_batches.zip(targets.chunks_exact(self.micro_batch_tokens)) {
            let tokens = Tokens { ids, targets, sequence: self.sequence };
            let leaf = self.gradients.leaf();
            loss += self.model.train(leaf, &mut self.activations, &state.parameters, tokens, scale);
            self.gradients.push();
        }
        let gradients = self.gradients.sum();
        let gradient_norm = gradient::norm(gradients);
        update(state, gradients, gradient_norm, &self.model, settings);
        StepReport { loss: loss / self.global_batch_tokens as f64, gradient_norm }
    }

    /// Mean loss of `ids`, whole sequences of any number, in nats. A last micro-batch that they do not fill is
    /// filled up with the first sequences, whose losses then do not count twice.
    pub fn evaluate(&mut self, parameters: &[f32], ids: &[u32], targets: &[u32]) -> f64 {
        let mut sum = 0.0;
        for (ids, targets) in ids.chunks(self.micro_batch_tokens).zip(targets.chunks(self.micro_batch_tokens))
        {
            let fill = |tokens: &[u32]| -> Vec<u32> {
                tokens.iter().cycle().take(self.micro_batch_tokens).copied().collect()
            };
            let (counted, ids, targets) = (ids.len(), fill(ids), fill(targets));
            let tokens = Tokens { ids: &ids, targets: &targets, sequence: self.sequence };
            let losses = self.model.losses(&mut self.activations, parameters, tokens);
            // One by one, so that the sum does not depend on the size of a micro-batch.
            sum = losses[..counted].iter().fold(sum, |sum, loss| sum + f64::from(*loss));
        }
        sum / ids.len() as f64
    }
}

fn update(
    state: &mut TrainingState,
    gradients: &[f32],
    gradient_norm: f64,
    model: &Llama,
    settings: StepSettings<'_>,
) {
    let StepSettings { adam_w, learning_rate, gradient_clip } = settings;
    state.optimizer_step += 1;
    let clipped = gradient_clip > 0.0 && gradient_norm > gradient_clip;
    for tensor in model.layout().tensors() {
        let decays = adam_w.decay_norms_and_embeddings
            || !matches!(tensor.kind, TensorKind::Norm | TensorKind::Embedding);
        let step = AdamWStep {
            learning_rate,
            beta1: adam_w.beta1,
            beta2: adam_w.beta2,
            epsilon: adam_w.epsilon,
            weight_decay: if decays { adam_w.weight_decay } else { 0.0 },
            step: state.optimizer_step,
            gradient_scale: if clipped { gradient_clip / gradient_norm } else { 1.0 },
        };
        let range = tensor.range();
        adamw::update(
            &mut state.parameters[range.clone()],
            &mut state.exp_avg[range.clone()],
            &mut state.exp_avg_sq[range.clone()],
            &gradients[range],
            &step,
        );
    }
}

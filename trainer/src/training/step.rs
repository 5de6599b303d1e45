//! One optimizer step: micro-batches, the sum of their gradients over ranks, clipping, AdamW.

use crate::checkpoint::copy;
use crate::collective::{Collective, CollectiveError};
use crate::model::activations::{Activations, Sizes};
use crate::model::layout::TensorKind;
use crate::model::llama::{Llama, Tokens};
use crate::model::mask::WeightMasks;
use crate::model::trainable::Trainable;
use crate::ops::adamw::{self, AdamWStep};
use crate::ops::gradient::{GradientTree, unit_squares};
use crate::training::after_growth::{AfterGrowth, NewPart};
use crate::training::shards::{Bucket, Shards};
use growth_crds::plan::{ModelConfig, ranks};
use growth_crds::spec::training::AdamWSpec;
use std::ops::Range;

/// Weights, moments and counts that training continues from; flat, in the order of the parameter layout. Of several
/// ranks each has all weights, but only the moments of its own part ([`Shards`]).
pub use crate::checkpoint::TrainingState;

/// Sizes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSizes {
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Tokens of one forward and backward pass.
    pub micro_batch_tokens: usize,
    /// Tokens of the step, over all ranks.
    pub global_batch_tokens: usize,
}

/// The buffers and sizes of a step. What it computes depends on the weights and the tokens only.
pub struct StepEngine {
    model: Llama,
    activations: Activations,
    gradients: GradientTree,
    shards: Shards,
    sizes: StepSizes,
    /// The micro-batches of this rank.
    share: Range<usize>,
    masked: Option<MaskedWeights>,
    after_growth: AfterGrowth,
}

/// While masks of a growth are on, the model runs with weights of its own: the trained ones times their masks.
struct MaskedWeights {
    masks: WeightMasks,
    weights: Vec<f32>,
}

impl MaskedWeights {
    fn of(&mut self, parameters: &[f32]) -> &[f32] {
        copy(&mut self.weights, parameters);
        self.masks.scale(0, &mut self.weights);
        &self.weights
    }
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

/// What a step measured, over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the step's tokens, in nats.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
}

impl StepEngine {
    /// Allocates every buffer of a step for one rank of `world_size`.
    pub fn new(config: ModelConfig, sizes: StepSizes, rank: usize, world_size: usize) -> Self {
        let StepSizes { sequence, micro_batch_tokens, global_batch_tokens } = sizes;
        let activations =
            Activations::for_training(&Sizes::new(&config, micro_batch_tokens / sequence, sequence));
        let model = Llama::new(config, sequence);
        let micro_batches = (global_batch_tokens / micro_batch_tokens) as u64;
        let share = ranks::share(micro_batches, world_size as u64, rank as u64);
        let share = share.start as usize..share.end as usize;
        let gradients = GradientTree::new(model.layout().total_len(), share.len());
        let shards = Shards::new(model.layout(), rank, world_size);
        let after_growth = AfterGrowth::default();
        Self { model, activations, gradients, shards, sizes, share, masked: None, after_growth }
    }

    /// With what is special about the steps of a stage that has grown.
    pub fn after_growth(self, after_growth: AfterGrowth) -> Self {
        Self { after_growth, ..self }
    }

    /// From now on the model runs with the weights times these masks, or with the weights as they are. Training changes
    /// the weights themselves, by gradients that go through the masks.
    pub fn set_masks(&mut self, masks: Option<WeightMasks>) {
        let len = self.model.layout().total_len();
        self.masked = masks.map(|masks| {
            let before = self.masked.take().map(|masked| masked.weights);
            MaskedWeights { masks, weights: before.unwrap_or_else(|| vec![0.0; len]) }
        });
    }

    /// The model.
    pub fn model(&self) -> &Llama {
        &self.model
    }

    /// Who owns what of the optimizer's state.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// Position of this rank's tokens in those of a step.
    pub fn own_tokens(&self) -> Range<usize> {
        let tokens = self.sizes.micro_batch_tokens;
        self.share.start * tokens..self.share.end * tokens
    }

    /// Bytes of activations and gradients, and of masked weights while there are masks.
    pub fn bytes(&self) -> u64 {
        let buffers = GradientTree::buffers(self.share.len()) + usize::from(self.masked.is_some());
        self.activations.bytes() + (buffers * self.model.layout().total_len() * size_of::<f32>()) as u64
    }

    /// Trains one step together with the other ranks, on `ids` and the `targets` that follow them: this rank's tokens
    /// ([`StepEngine::own_tokens`]).
    ///
    /// # Errors
    /// When a rank is lost; weights and moments may then be half updated.
    pub fn step(
        &mut self,
        collective: &mut dyn Collective,
        state: &mut TrainingState,
        ids: &[u32],
        targets: &[u32],
        settings: StepSettings<'_>,
    ) -> Result<StepReport, CollectiveError> {
        self.choose_trainable(state.step);
        let losses = self.backward(collective, &state.parameters, ids, targets)?;
        let Self { model, gradients, shards, after_growth, masked, .. } = self;
        let gradients = gradients.finish();
        let buckets =
            || shards.buckets().iter().enumerate().filter(|(index, _)| model.trainable().bucket(*index));
        for (_, bucket) in buckets().rev() {
            collective.finish_reduce_scatter(gradients, &bucket.slices)?;
            if let Some(masked) = masked {
                let own = bucket.slices[shards.rank()].clone();
                masked.masks.scale(own.start, &mut gradients[own]);
            }
        }
        let trained: Vec<&Bucket> = buckets().map(|(_, bucket)| bucket).collect();
        let report = measure(
            collective,
            (&trained, shards.rank()),
            &losses,
            gradients,
            self.sizes.global_batch_tokens,
        )?;
        state.optimizer_step += 1;
        let update = Update { model, shards, settings, report, after_growth };
        for (index, bucket) in buckets() {
            update.bucket(index, state, gradients);
            collective.start_all_gather(&state.parameters, &bucket.slices)?;
        }
        for bucket in trained {
            collective.finish_all_gather(&mut state.parameters, &bucket.slices)?;
        }
        Ok(report)
    }

    /// Freezes what the stage freezes after so many steps.
    fn choose_trainable(&mut self, step: u64) {
        match self.after_growth.trainable(step) {
            Some(trainable) if trainable != self.model.trainable() => {
                self.model.train_only(trainable.clone())
            }
            None if self.after_growth.freezes() => {
                let layers = self.model.layout().layers().len();
                self.model.train_only(Trainable::everything(layers));
            }
            _ => {}
        }
    }

    /// Runs this rank's micro-batches and returns the sums of their losses. In the last one each bucket of gradients goes
    /// on its way as soon as it is complete.
    fn backward(
        &mut self,
        collective: &mut dyn Collective,
        parameters: &[f32],
        ids: &[u32],
        targets: &[u32],
    ) -> Result<Vec<f64>, CollectiveError> {
        let Self { model, activations, gradients, shards, sizes, masked, .. } = self;
        let parameters = masked.as_mut().map_or(parameters, |masked| masked.of(parameters));
        let tokens = Tokens { ids, targets, sequence: sizes.sequence };
        let scale = 1.0 / sizes.global_batch_tokens as f32;
        let mut sent = Ok(());
        let mut ready = |bucket: usize, gradients: &mut [f32]| {
            if sent.is_ok() {
                sent = collective.start_reduce_scatter(gradients, &shards.buckets()[bucket].slices);
            }
        };
        let losses = model.train_micro_batches(
            gradients,
            activations,
            parameters,
            (tokens, sizes.micro_batch_tokens),
            scale,
            &mut ready,
        );
        sent.map(|()| losses)
    }

    /// Mean loss of `ids`, whole sequences of any number, in nats; the ranks share them. A last micro-batch that they do
    /// not fill is filled up with the first sequences, whose losses then do not count twice.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn evaluate(
        &mut self,
        collective: &mut dyn Collective,
        parameters: &[f32],
        ids: &[u32],
        targets: &[u32],
    ) -> Result<f64, CollectiveError> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let size = self.sizes.micro_batch_tokens;
        let parameters = self.masked.as_mut().map_or(parameters, |masked| masked.of(parameters));
        let mut own = Vec::new();
        for (ids, targets) in ids.chunks(size).zip(targets.chunks(size)).skip(rank).step_by(world_size) {
            let fill = |tokens: &[u32]| -> Vec<u32> { tokens.iter().cycle().take(size).copied().collect() };
            let (counted, ids, targets) = (ids.len(), fill(ids), fill(targets));
            let tokens = Tokens { ids: &ids, targets: &targets, sequence: self.sizes.sequence };
            let losses = self.model.losses(&mut self.activations, parameters, tokens);
            own.extend_from_slice(&losses[..counted]);
        }
        let all = collective.exchange(bytemuck::cast_slice(&own))?;
        let mut by_rank: Vec<_> = all.iter().map(|bytes| bytes.as_chunks::<4>().0.iter()).collect();
        // One by one, so that the sum depends neither on the size of a micro-batch nor on the ranks.
        let in_order = (0..ids.len()).filter_map(|token| by_rank[token / size % world_size].next());
        let sum = in_order.fold(0.0, |sum, loss| sum + f64::from(f32::from_le_bytes(*loss)));
        Ok(sum / ids.len() as f64)
    }
}

/// Loss, and gradient norm over the buckets that train, of all ranks, each summed in one fixed order.
fn measure(
    collective: &mut dyn Collective,
    (buckets, rank): (&[&Bucket], usize),
    losses: &[f64],
    gradients: &[f32],
    tokens: usize,
) -> Result<StepReport, CollectiveError> {
    let squares = buckets.iter().map(|bucket| unit_squares(&gradients[bucket.slices[rank].clone()]));
    let squares: Vec<Vec<f64>> = squares.collect();
    // How many losses, the losses, the squares of all buckets.
    let mine = [&[losses.len() as f64], losses, &squares.concat()].concat();
    let all = collective.exchange(bytemuck::cast_slice(&mine))?;
    let mut by_rank: Vec<_> = all
        .iter()
        .map(|bytes| bytes.as_chunks::<8>().0.iter().map(|number| f64::from_le_bytes(*number)))
        .collect();
    let mut loss = 0.0;
    for numbers in &mut by_rank {
        let count = numbers.next().unwrap_or(0.0) as usize;
        loss = numbers.by_ref().take(count).fold(loss, |sum, loss| sum + loss);
    }
    let mut square = 0.0;
    for bucket in buckets {
        for (numbers, slice) in by_rank.iter_mut().zip(&bucket.slices) {
            let units = slice.len().div_ceil(crate::ops::gradient::UNIT);
            square = numbers.by_ref().take(units).fold(square, |sum, square| sum + square);
        }
    }
    Ok(StepReport { loss: loss / tokens as f64, gradient_norm: square.sqrt() })
}

/// AdamW on this rank's part.
struct Update<'a> {
    model: &'a Llama,
    shards: &'a Shards,
    settings: StepSettings<'a>,
    report: StepReport,
    after_growth: &'a AfterGrowth,
}

impl Update<'_> {
    fn bucket(&self, index: usize, state: &mut TrainingState, gradients: &[f32]) {
        let bucket = &self.shards.buckets()[index];
        let tensors = self.model.layout().tensors();
        let first = tensors.partition_point(|tensor| tensor.offset < bucket.range.start);
        let here = tensors.iter().enumerate().skip(first);
        let step = state.optimizer_step - self.after_growth.missed_steps(index, state.step);
        for (position, tensor) in here.take_while(|(_, tensor)| tensor.offset < bucket.range.end) {
            let part = self.shards.part(&tensor.range(), self.shards.rank());
            let own = self.shards.own(&part);
            let (p, m) = (&mut state.parameters[part.clone()], &mut state.exp_avg[own.clone()]);
            let (v, g) = (&mut state.exp_avg_sq[own], &gradients[part.clone()]);
            let numbers = self.numbers(tensor.kind, step);
            let Some((new, ratio)) = self.after_growth.new_part(position, state.tokens) else {
                adamw::update(p, m, v, g, &numbers);
                continue;
            };
            let new_numbers = AdamWStep { learning_rate: ratio * numbers.learning_rate, ..numbers };
            match new {
                NewPart::Nothing => adamw::update(p, m, v, g, &numbers),
                NewPart::All => adamw::update(p, m, v, g, &new_numbers),
                NewPart::Elements(elements) => {
                    let first = part.start - tensor.offset;
                    adamw::update_with_new([p, m, v], g, first, elements, [&numbers, &new_numbers]);
                }
            }
        }
    }

    fn numbers(&self, kind: TensorKind, step: u64) -> AdamWStep {
        let StepSettings { adam_w, learning_rate, gradient_clip } = self.settings;
        let decays =
            adam_w.decay_norms_and_embeddings || !matches!(kind, TensorKind::Norm | TensorKind::Embedding);
        AdamWStep {
            learning_rate,
            beta1: adam_w.beta1,
            beta2: adam_w.beta2,
            epsilon: adam_w.epsilon,
            weight_decay: if decays { adam_w.weight_decay } else { 0.0 },
            step,
            gradient_scale: adamw::clip_scale(gradient_clip, self.report.gradient_norm),
        }
    }
}

//! The whole model: embedding, blocks, final norm, output head.

use crate::model::activations::{Activations, Sizes};
use crate::model::block::{self, BlockGradients, BlockWeights};
use crate::model::layout::ParameterLayout;
use crate::model::trainable::Trainable;
use crate::ops::gemm::{Matrix, MatrixMut, Output, gemm};
use crate::ops::gradient::GradientTree;
use crate::ops::rope::RopeTable;
use crate::ops::{cross_entropy, embedding, rmsnorm};
use growth_crds::plan::ModelConfig;
use std::ops::Range;

/// A LLaMA's architecture with its parameter layout. Parameters and gradients are flat buffers in that layout.
pub struct Llama {
    config: ModelConfig,
    layout: ParameterLayout,
    table: RopeTable,
    trainable: Trainable,
}

/// Token ids of a micro-batch: `batch` sequences of equal length, one after another.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// [batch * sequence]
    pub ids: &'a [u32],
    /// The id after each of `ids`: [batch * sequence]; empty where no loss is asked for.
    pub targets: &'a [u32],
    /// Tokens of a sequence.
    pub sequence: usize,
}

impl Llama {
    /// A model for sequences of at most `sequence` tokens.
    pub fn new(config: ModelConfig, sequence: usize) -> Self {
        let layout = ParameterLayout::new(&config);
        let table = RopeTable::new(sequence, config.head_dim as usize, config.rope_theta);
        let trainable = Trainable::everything(layout.layers().len());
        Self { config, layout, table, trainable }
    }

    /// What trains: at first everything.
    pub fn trainable(&self) -> &Trainable {
        &self.trainable
    }

    /// Freezes all but these parts.
    pub fn train_only(&mut self, trainable: Trainable) {
        self.trainable = trainable;
    }

    /// Its architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where each tensor lies in a flat buffer.
    pub fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    /// Sizes of a pass over `tokens`.
    pub fn sizes(&self, tokens: &Tokens<'_>) -> Sizes {
        Sizes::new(&self.config, tokens.ids.len() / tokens.sequence, tokens.sequence)
    }

    /// Forward and backward pass: overwrites `gradients` with those of `scale` times the sum of the token losses,
    /// and returns that sum (not scaled), in nats. What stands in the gradients of frozen parts means nothing.
    pub fn train(
        &self,
        gradients: &mut [f32],
        activations: &mut Activations,
        parameters: &[f32],
        tokens: Tokens<'_>,
        scale: f32,
    ) -> f64 {
        self.train_with(gradients, activations, parameters, tokens, scale, &mut |_, _| ())
    }

    /// [`Llama::train`] on micro-batches of `size` tokens, one after another: their gradients are summed in `gradients`,
    /// to be taken from there by [`GradientTree::finish`], and the sum of losses of each is returned. Calls `ready` as
    /// [`Llama::train_with`] does, in the last micro-batch, when the bucket of the whole sum is complete.
    pub fn train_micro_batches(
        &self,
        gradients: &mut GradientTree,
        activations: &mut Activations,
        parameters: &[f32],
        (tokens, size): (Tokens<'_>, usize),
        scale: f32,
        ready: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Vec<f64> {
        let buckets = self.layout.buckets();
        let count = tokens.ids.len() / size;
        let micro_batches = tokens.ids.chunks_exact(size).zip(tokens.targets.chunks_exact(size));
        let micro_batches = micro_batches.map(|(ids, targets)| Tokens { ids, targets, ..tokens });
        let mut losses = Vec::with_capacity(count);
        for (index, tokens) in micro_batches.enumerate() {
            if index + 1 < count {
                losses.push(self.train(gradients.leaf(), activations, parameters, tokens, scale));
                gradients.push();
                continue;
            }
            let (leaf, waiting) = gradients.last_leaf();
            let mut complete = |bucket: usize, leaf: &mut [f32]| {
                waiting.add_to(leaf, buckets[bucket].clone());
                ready(bucket, leaf);
            };
            losses.push(self.train_with(leaf, activations, parameters, tokens, scale, &mut complete));
        }
        losses
    }

    /// [`Llama::train`], which calls `ready` with the number of each bucket ([`ParameterLayout::buckets`]) and all
    /// gradients as soon as those of the bucket are complete: the last one first. Frozen ones are left out.
    pub fn train_with(
        &self,
        gradients: &mut [f32],
        activations: &mut Activations,
        parameters: &[f32],
        tokens: Tokens<'_>,
        scale: f32,
        ready: &mut dyn FnMut(usize, &mut [f32]),
    ) -> f64 {
        let sizes = self.sizes(&tokens);
        self.forward(activations, parameters, tokens, &sizes);
        self.final_norm(activations, parameters, &sizes);
        let a = activations;
        let trainable = &self.trainable;
        let tied = self.config.tie_word_embeddings;
        let head_trains = if tied { trainable.embedding } else { trainable.head };
        // The gradient of the final norm's output, then of its input.
        cross_entropy::forward_backward(
            &mut a.losses,
            &mut a.scratch.d_norm,
            head_trains.then(|| &mut gradients[self.layout.head()]),
            &mut a.logits,
            &a.scratch.norm,
            self.head(parameters),
            tokens.targets,
            scale,
        );
        a.d_residual.fill(0.0);
        rmsnorm::backward(
            &mut a.d_residual,
            &mut gradients[self.layout.final_norm()],
            &mut a.scratch.partial_gains,
            &a.scratch.d_norm,
            &a.output,
            &a.output_inverse_rms,
            &parameters[self.layout.final_norm()],
        );
        if trainable.head {
            ready(sizes.layers + 1, gradients);
        }
        for layer in (trainable.lowest_layer()..sizes.layers).rev() {
            let weights = self.weights(parameters, layer);
            let mut d_weights = self.gradients(gradients, layer);
            let kept = &mut a.blocks[layer];
            block::backward(
                &mut a.d_residual,
                &mut d_weights,
                kept,
                &mut a.scratch,
                &weights,
                &self.table,
                &sizes,
            );
            if trainable.layers[layer] {
                ready(layer + 1, gradients);
            }
        }
        if trainable.embedding {
            let d_embedding = &mut gradients[self.layout.embedding()];
            if !tied {
                // A tied embedding already holds the gradient of the head.
                d_embedding.fill(0.0);
            }
            embedding::backward(d_embedding, &a.d_residual, tokens.ids, sizes.hidden);
            ready(0, gradients);
        }
        a.losses.iter().map(|loss| f64::from(*loss)).sum()
    }

    /// The loss of each token, in nats; it stays in `activations.losses`.
    pub fn losses<'a>(
        &self,
        activations: &'a mut Activations,
        parameters: &[f32],
        tokens: Tokens<'_>,
    ) -> &'a [f32] {
        let sizes = self.sizes(&tokens);
        self.forward(activations, parameters, tokens, &sizes);
        self.final_norm(activations, parameters, &sizes);
        let a = activations;
        let (head, hidden) = (self.head(parameters), &a.scratch.norm);
        cross_entropy::forward(&mut a.losses, &mut a.logits, hidden, head, tokens.targets, sizes.vocab);
        &a.losses
    }

    /// Logits of the rows `rows` of the pass, [rows, vocab].
    pub fn logits(
        &self,
        out: &mut [f32],
        activations: &mut Activations,
        parameters: &[f32],
        tokens: Tokens<'_>,
        rows: Range<usize>,
    ) {
        let sizes = self.sizes(&tokens);
        self.forward(activations, parameters, tokens, &sizes);
        self.final_norm(activations, parameters, &sizes);
        let hidden = &activations.scratch.norm[rows.start * sizes.hidden..rows.end * sizes.hidden];
        let hidden = Matrix::new(hidden, rows.len(), sizes.hidden);
        let out = MatrixMut::new(out, rows.len(), sizes.vocab);
        gemm(out, hidden, self.head(parameters).t(), Output::Overwrite);
    }

    /// Embedding and blocks, into `activations.output`.
    fn forward(&self, activations: &mut Activations, parameters: &[f32], tokens: Tokens<'_>, sizes: &Sizes) {
        let Activations { blocks, scratch, output, .. } = activations;
        let table = &parameters[self.layout.embedding()];
        embedding::forward(&mut blocks[0].input, table, tokens.ids, sizes.hidden);
        for layer in 0..sizes.layers {
            let weights = self.weights(parameters, layer);
            // With buffers for one block only, its output becomes the input of the next.
            let current = layer.min(blocks.len() - 1);
            let (done, later) = blocks.split_at_mut(current + 1);
            let kept = &mut done[current];
            let out = later.first_mut().map_or(&mut *output, |next| &mut next.input);
            block::forward(out, kept, scratch, &weights, &self.table, sizes);
            if blocks.len() == 1 && layer + 1 < sizes.layers {
                std::mem::swap(output, &mut blocks[0].input);
            }
        }
    }

    /// The final norm of `activations.output`, into the scratch buffer of norms.
    fn final_norm(&self, a: &mut Activations, parameters: &[f32], sizes: &Sizes) {
        let gain = &parameters[self.layout.final_norm()];
        rmsnorm::forward(&mut a.scratch.norm, &mut a.output_inverse_rms, &a.output, gain, sizes.epsilon);
    }

    fn head<'a>(&self, parameters: &'a [f32]) -> Matrix<'a> {
        let (vocab, hidden) = (self.config.vocab_size as usize, self.config.hidden_size as usize);
        Matrix::new(&parameters[self.layout.head()], vocab, hidden)
    }

    fn weights<'a>(&self, parameters: &'a [f32], layer: usize) -> BlockWeights<'a> {
        let at = self.layout.layer(layer);
        BlockWeights {
            input_norm: &parameters[at.input_norm.clone()],
            qkv: &parameters[at.qkv.clone()],
            o: &parameters[at.o.clone()],
            post_norm: &parameters[at.post_norm.clone()],
            gate_up: &parameters[at.gate_up.clone()],
            down: &parameters[at.down.clone()],
        }
    }

    fn gradients<'a>(&self, gradients: &'a mut [f32], layer: usize) -> BlockGradients<'a> {
        let at = self.layout.layer(layer).clone();
        let ranges = [at.input_norm, at.qkv, at.o, at.post_norm, at.gate_up, at.down];
        #[expect(clippy::expect_used, reason = "the layout places tensors side by side")]
        let [input_norm, qkv, o, post_norm, gate_up, down] =
            gradients.get_disjoint_mut(ranges).expect("tensors of a layout do not overlap");
        let of_matrices = self.trainable.layers[layer];
        BlockGradients { input_norm, qkv, o, post_norm, gate_up, down, of_matrices }
    }
}

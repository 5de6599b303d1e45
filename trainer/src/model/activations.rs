//! Every buffer that a forward and backward pass needs, allocated once.

use crate::ops::ROW_BLOCK;
use crate::ops::attention::HeadShape;
use crate::ops::cross_entropy::CHUNK_ROWS;
use crate::ops::linear::LinearShape;
use growth_crds::plan::ModelConfig;

/// Sizes of a pass over one micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Tokens: sequences times positions.
    pub rows: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Layers.
    pub layers: usize,
    /// Heads, sequences and positions.
    pub heads: HeadShape,
    /// Term inside the root of RMSNorm.
    pub epsilon: f32,
}

impl Sizes {
    /// Sizes for `batch` sequences of `sequence` tokens.
    pub fn new(config: &ModelConfig, batch: usize, sequence: usize) -> Self {
        let heads = HeadShape {
            batch,
            sequence,
            heads: config.num_attention_heads as usize,
            kv_heads: config.num_key_value_heads as usize,
            head_dim: config.head_dim as usize,
        };
        Self {
            rows: batch * sequence,
            hidden: config.hidden_size as usize,
            ffn: config.intermediate_size as usize,
            vocab: config.vocab_size as usize,
            layers: config.num_hidden_layers as usize,
            heads,
            epsilon: config.rms_norm_eps as f32,
        }
    }

    fn linear(&self, inputs: usize, outputs: usize) -> LinearShape {
        LinearShape { rows: self.rows, inputs, outputs }
    }

    /// Queries, keys and values from the residual stream.
    pub fn qkv(&self) -> LinearShape {
        self.linear(self.hidden, self.heads.qkv_width())
    }

    /// Back to the residual stream from attention.
    pub fn o(&self) -> LinearShape {
        self.linear(self.heads.context_width(), self.hidden)
    }

    /// Gates and ups from the residual stream.
    pub fn gate_up(&self) -> LinearShape {
        self.linear(self.hidden, 2 * self.ffn)
    }

    /// Back to the residual stream from the MLP.
    pub fn down(&self) -> LinearShape {
        self.linear(self.ffn, self.hidden)
    }
}

/// What the backward pass of a block needs of its forward pass. Norm outputs, merged heads and the MLP's inner
/// product are cheap to compute again and are not kept.
pub struct BlockActivations {
    /// Residual stream before the block [rows, hidden].
    pub input: Vec<f32>,
    /// 1 / rms of `input` [rows].
    pub input_inverse_rms: Vec<f32>,
    /// Queries, keys and values, turned and head-major [rows * qkv_width].
    pub qkv: Vec<f32>,
    /// Logarithms of the softmax sums [rows * heads].
    pub log_sums: Vec<f32>,
    /// Output of attention, head-major [rows * context_width].
    pub context: Vec<f32>,
    /// Residual stream between attention and MLP [rows, hidden].
    pub middle: Vec<f32>,
    /// 1 / rms of `middle` [rows].
    pub middle_inverse_rms: Vec<f32>,
    /// Gates and ups [rows, 2 ffn]; the backward pass overwrites them with their gradient.
    pub gate_up: Vec<f32>,
}

/// Buffers that every block uses in turn.
pub struct Scratch {
    /// Output of a norm [rows, hidden].
    pub norm: Vec<f32>,
    /// Gradient of a norm's output [rows, hidden].
    pub d_norm: Vec<f32>,
    /// Queries, keys and values, or their gradient, in rows [rows, qkv_width].
    pub qkv_rows: Vec<f32>,
    /// Gradient of queries, keys and values, head-major [rows * qkv_width].
    pub d_qkv: Vec<f32>,
    /// Output of attention, or its gradient, in rows [rows, context_width].
    pub context_rows: Vec<f32>,
    /// Gradient of the output of attention, head-major [rows * context_width].
    pub d_context: Vec<f32>,
    /// Inner product of the MLP, or its gradient [rows, ffn].
    pub mlp: Vec<f32>,
    /// Partial sums of a norm's gain [row blocks, hidden].
    pub partial_gains: Vec<f32>,
}

/// All buffers of a micro-batch.
pub struct Activations {
    /// One per layer; a single one, used by all layers in turn, where no backward pass follows.
    pub blocks: Vec<BlockActivations>,
    /// Shared by the blocks.
    pub scratch: Scratch,
    /// Residual stream after the last block [rows, hidden].
    pub output: Vec<f32>,
    /// 1 / rms of `output` [rows].
    pub output_inverse_rms: Vec<f32>,
    /// Gradient of the residual stream [rows, hidden].
    pub d_residual: Vec<f32>,
    /// Logits of one chunk of rows, then their gradient.
    pub logits: Vec<f32>,
    /// Loss of each row.
    pub losses: Vec<f32>,
}

impl BlockActivations {
    fn new(sizes: &Sizes) -> Self {
        let zeros = |width: usize| vec![0.0; sizes.rows * width];
        Self {
            input: zeros(sizes.hidden),
            input_inverse_rms: zeros(1),
            qkv: zeros(sizes.heads.qkv_width()),
            log_sums: zeros(sizes.heads.heads),
            context: zeros(sizes.heads.context_width()),
            middle: zeros(sizes.hidden),
            middle_inverse_rms: zeros(1),
            gate_up: zeros(2 * sizes.ffn),
        }
    }
}

impl Activations {
    /// Buffers for a forward and a backward pass.
    pub fn for_training(sizes: &Sizes) -> Self {
        Self::new(sizes, sizes.layers)
    }

    /// Buffers for forward passes alone.
    pub fn for_inference(sizes: &Sizes) -> Self {
        Self::new(sizes, 1)
    }

    fn new(sizes: &Sizes, blocks: usize) -> Self {
        let zeros = |width: usize| vec![0.0; sizes.rows * width];
        let chunk_rows = sizes.rows.min(CHUNK_ROWS);
        Self {
            blocks: (0..blocks).map(|_| BlockActivations::new(sizes)).collect(),
            scratch: Scratch {
                norm: zeros(sizes.hidden),
                d_norm: zeros(sizes.hidden),
                qkv_rows: zeros(sizes.heads.qkv_width()),
                d_qkv: zeros(sizes.heads.qkv_width()),
                context_rows: zeros(sizes.heads.context_width()),
                d_context: zeros(sizes.heads.context_width()),
                mlp: zeros(sizes.ffn),
                partial_gains: vec![0.0; sizes.rows.div_ceil(ROW_BLOCK) * sizes.hidden],
            },
            output: zeros(sizes.hidden),
            output_inverse_rms: zeros(1),
            d_residual: zeros(sizes.hidden),
            logits: vec![0.0; chunk_rows * sizes.vocab],
            losses: zeros(1),
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        let block = |b: &BlockActivations| {
            [
                &b.input,
                &b.input_inverse_rms,
                &b.qkv,
                &b.log_sums,
                &b.context,
                &b.middle,
                &b.middle_inverse_rms,
            ]
            .iter()
            .map(|buffer| buffer.len())
            .sum::<usize>()
                + b.gate_up.len()
        };
        let s = &self.scratch;
        let scratch = [&s.norm, &s.d_norm, &s.qkv_rows, &s.d_qkv, &s.context_rows, &s.d_context, &s.mlp];
        let rest = [&self.output, &self.output_inverse_rms, &self.d_residual, &self.logits, &self.losses];
        let floats = self.blocks.iter().map(block).sum::<usize>()
            + scratch.iter().chain(&rest).map(|buffer| buffer.len()).sum::<usize>()
            + s.partial_gains.len();
        floats as u64 * size_of::<f32>() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_plan_predicts_the_allocation(
            heads in 1u32..5, group in 1u32..4, half_dim in 1u32..9, hidden in 4u32..40, ffn in 4u32..60,
            layers in 1u32..4, batch in 1usize..5, sequence in 2usize..150, vocab in 260u32..400,
        ) {
            let config = ModelConfig {
                hidden_size: hidden,
                intermediate_size: ffn,
                num_hidden_layers: layers,
                num_attention_heads: heads * group,
                num_key_value_heads: heads,
                head_dim: 2 * half_dim,
                vocab_size: vocab,
                max_position_embeddings: 150,
                rope_theta: 1e4,
                rms_norm_eps: 1e-5,
                tie_word_embeddings: false,
            };
            let activations = Activations::for_training(&Sizes::new(&config, batch, sequence));
            let predicted = config.memory((batch * sequence) as u64, 1, 1).activations_bytes;
            prop_assert_eq!(activations.bytes(), predicted);
        }
    }
}

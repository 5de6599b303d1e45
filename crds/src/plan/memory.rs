//! How much memory one trainer process needs.

use super::{MemoryEstimate, ModelConfig};

/// Bytes of a 32-bit float.
const FLOAT: u64 = 4;

/// Rows whose logits exist at a time.
const LOGIT_ROWS: u64 = 256;

/// Rows over which the gradient of a gain is summed before the sums are added.
const GAIN_ROWS: u64 = 64;

/// Levels of the balanced tree in which the gradients of the micro-batches are summed: one buffer each.
pub fn gradient_levels(micro_batches: u64) -> u64 {
    match micro_batches {
        0 | 1 => 1,
        // ceil(log2(n)) buffers hold partial sums, one the micro-batch at hand.
        many => 1 + u64::from((many - 1).ilog2()) + 1,
    }
}

impl ModelConfig {
    /// Memory of one of `ranks` processes that share the `micro_batches` of a step. Each holds all weights, its part of
    /// the optimizer's state (ZeRO-1: Rajbhandari et al., SC 2020, section 5.1) and works on one micro-batch at a time.
    pub fn memory(&self, micro_batch_tokens: u64, micro_batches: u64, ranks: u64) -> MemoryEstimate {
        let ranks = ranks.max(1);
        let weights_bytes = self.parameter_counts().total.saturating_mul(FLOAT);
        let part_bytes = weights_bytes.div_ceil(ranks);
        let gradients_bytes = weights_bytes.saturating_mul(gradient_levels(micro_batches.div_ceil(ranks)));
        let optimizer_bytes = part_bytes.saturating_mul(2);
        let activations_bytes = self.activations_bytes(micro_batch_tokens);
        // Weights and both moments.
        let snapshot_bytes = part_bytes.saturating_mul(3);
        // A part for every other rank on its way out, and one from every other on its way in.
        let communication_bytes = part_bytes.saturating_mul(2 * (ranks - 1));
        let parts = [
            weights_bytes,
            gradients_bytes,
            optimizer_bytes,
            activations_bytes,
            snapshot_bytes,
            communication_bytes,
        ];
        let total_bytes = parts.into_iter().fold(0, u64::saturating_add);
        MemoryEstimate {
            weights_bytes,
            gradients_bytes,
            optimizer_bytes,
            activations_bytes,
            snapshot_bytes,
            communication_bytes,
            masked_weights_bytes: 0,
            total_bytes,
        }
    }

    /// Buffers of one micro-batch of `rows` tokens, as the trainer allocates them (its `model/activations.rs`, which
    /// a test compares with this): what the backward pass needs of every layer, and what the layers share.
    fn activations_bytes(&self, rows: u64) -> u64 {
        let (hidden, ffn) = (u64::from(self.hidden_size), u64::from(self.intermediate_size));
        let query = self.query_size();
        let qkv = query.saturating_add(self.key_value_size().saturating_mul(2));
        let heads = u64::from(self.num_attention_heads);
        let layer = (2 * hidden + 2 * ffn + heads + 2).saturating_add(qkv).saturating_add(query);
        let layers = u64::from(self.num_hidden_layers).saturating_mul(layer);
        let shared = (4 * hidden + ffn + 2)
            .saturating_add(qkv.saturating_mul(2))
            .saturating_add(query.saturating_mul(2));
        let logits = rows.min(LOGIT_ROWS).saturating_mul(u64::from(self.vocab_size));
        let gains = rows.div_ceil(GAIN_ROWS).saturating_mul(hidden);
        rows.saturating_mul(layers.saturating_add(shared))
            .saturating_add(logits)
            .saturating_add(gains)
            .saturating_mul(FLOAT)
    }
}

impl MemoryEstimate {
    /// The same with a second buffer of weights: those that the model runs with while masks are on.
    pub fn with_masks(self) -> Self {
        let masked_weights_bytes = self.weights_bytes;
        let total_bytes = self.total_bytes.saturating_add(masked_weights_bytes);
        Self { masked_weights_bytes, total_bytes, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_one_more_than_the_depth_of_the_tree() {
        let levels: Vec<u64> = [1, 2, 3, 4, 5, 8, 9].into_iter().map(gradient_levels).collect();
        assert_eq!(levels, [1, 2, 3, 3, 4, 4, 5]);
    }
}

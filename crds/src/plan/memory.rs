//! How much memory one trainer process needs.

use super::{MemoryEstimate, ModelConfig};

/// Bytes of a 32-bit float.
const FLOAT: u64 = 4;

/// Levels of the balanced tree in which the gradients of the micro-batches are summed: one buffer each.
pub fn gradient_levels(micro_batches: u64) -> u64 {
    match micro_batches {
        0 | 1 => 1,
        // ceil(log2(n)) buffers hold partial sums, one the micro-batch at hand.
        many => 1 + u64::from((many - 1).ilog2()) + 1,
    }
}

impl ModelConfig {
    /// Memory of a process that holds the whole model and works on one micro-batch at a time.
    pub fn memory(&self, micro_batch_tokens: u64, micro_batches: u64) -> MemoryEstimate {
        let weights_bytes = self.parameter_counts().total.saturating_mul(FLOAT);
        let gradients_bytes = weights_bytes.saturating_mul(gradient_levels(micro_batches));
        let optimizer_bytes = weights_bytes.saturating_mul(2);
        let activations_bytes = self.activations_bytes(micro_batch_tokens);
        // Weights and both moments.
        let snapshot_bytes = weights_bytes.saturating_mul(3);
        let parts = [weights_bytes, gradients_bytes, optimizer_bytes, activations_bytes, snapshot_bytes];
        let total_bytes = parts.into_iter().fold(0, u64::saturating_add);
        MemoryEstimate {
            weights_bytes,
            gradients_bytes,
            optimizer_bytes,
            activations_bytes,
            snapshot_bytes,
            total_bytes,
        }
    }

    /// What the backward pass needs of every layer, and scratch for the layer at work and the logits.
    fn activations_bytes(&self, tokens: u64) -> u64 {
        let (hidden, ffn) = (u64::from(self.hidden_size), u64::from(self.intermediate_size));
        let query = self.query_size();
        let heads = query.saturating_add(self.key_value_size().saturating_mul(2)).saturating_add(query);
        let layer = (2 * hidden + 2 * ffn).saturating_add(heads);
        let layers = u64::from(self.num_hidden_layers).saturating_mul(layer);
        let scratch = (4 * hidden + 2 * ffn).saturating_add(u64::from(self.vocab_size));
        tokens.saturating_mul(layers.saturating_add(scratch)).saturating_mul(FLOAT)
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

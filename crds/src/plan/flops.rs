//! How much arithmetic a stage is.

use super::{FlopCount, ModelConfig};

/// Floating-point operations of the forward pass, a token.
pub(super) struct ForwardFlops {
    /// The matrices of a layer.
    pub layer_matrices: f64,
    /// The attention products of a layer.
    pub layer_attention: f64,
    /// The output head.
    pub head: f64,
}

impl ModelConfig {
    /// The parts of the forward pass in sequences of this length: two for every weight of every matrix, and two products
    /// over the visible half of the attention square.
    pub(super) fn forward_flops(&self, sequence_length: u32) -> ForwardFlops {
        ForwardFlops {
            layer_matrices: 2.0 * self.layer_matrix_parameters() as f64,
            // Of T(T+1)/2 visible pairs a sequence, (T+1)/2 belong to a token; query.key and weight.value, two each.
            layer_attention: 4.0 * self.query_size() as f64 * (f64::from(sequence_length) + 1.0) / 2.0,
            head: 2.0 * f64::from(self.hidden_size) * f64::from(self.vocab_size),
        }
    }

    /// Floating-point operations of the forward pass, a token, in sequences of this length, the output head included.
    pub fn forward_flops_per_token(&self, sequence_length: u32) -> f64 {
        let ForwardFlops { layer_matrices, layer_attention, head } = self.forward_flops(sequence_length);
        f64::from(self.num_hidden_layers) * (layer_matrices + layer_attention) + head
    }

    /// Floating-point operations of training on so many tokens: the backward pass is twice the forward pass.
    pub fn training_flops(&self, sequence_length: u32, tokens: u64) -> FlopCount {
        let tokens = tokens as f64;
        FlopCount {
            six_nd: 6.0 * self.parameter_counts().non_embedding as f64 * tokens,
            exact: 3.0 * self.forward_flops_per_token(sequence_length) * tokens,
        }
    }
}

/// How much more arithmetic scratch training needs than growth to reach the same loss, as the paper defines
/// speedup: 0.546 is 54.6 %. Negative when growth needs more.
pub fn speedup(scratch_flops: f64, growth_flops: f64) -> f64 {
    scratch_flops / growth_flops - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::architecture::tests::paper_1b;

    #[test]
    fn a_base_costs_its_share_of_target_tokens() {
        // 10 B tokens of a base at a quarter of the target's blocks are 2.5 B tokens of the target.
        let base = paper_1b(6).training_flops(2048, 10_000_000_000).six_nd;
        let target = paper_1b(24).training_flops(2048, 2_500_000_000).six_nd;
        assert!((base / target - 1.0).abs() < 1e-5, "{}", base / target);
    }

    #[test]
    fn the_paper_counts_speedup_so() {
        assert_eq!((speedup(300.0, 194.0) * 1000.0).round(), 546.0);
        assert!(speedup(74.3, 100.0) < 0.0);
    }

    #[test]
    fn exact_matches_a_loop_over_positions() {
        let model = paper_1b(6);
        let (hidden, ffn, vocab) = (2048u64, 5632u64, 32_000u64);
        let mut total = 0u64;
        for position in 0..64u64 {
            total += 6 * (4 * 2 * hidden * hidden + 3 * 2 * hidden * ffn);
            total += 6 * 2 * (2 * hidden * (position + 1));
            total += 2 * hidden * vocab;
        }
        let exact = model.training_flops(64, 64).exact;
        assert!((exact / (3 * total) as f64 - 1.0).abs() < 1e-12);
    }
}

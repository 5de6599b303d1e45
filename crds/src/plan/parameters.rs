//! How many parameters a model has.

use super::{ModelConfig, ParameterCounts};

impl ModelConfig {
    /// Width of all query heads side by side.
    pub fn query_size(&self) -> u64 {
        u64::from(self.num_attention_heads) * u64::from(self.head_dim)
    }

    /// Width of all key heads, or of all value heads, side by side.
    pub fn key_value_size(&self) -> u64 {
        u64::from(self.num_key_value_heads) * u64::from(self.head_dim)
    }

    /// Weights of the matrices of one layer: each is used in one multiply-add a token.
    pub(super) fn layer_matrix_parameters(&self) -> u64 {
        let hidden = u64::from(self.hidden_size);
        let query_and_output = self.query_size().saturating_mul(2 * hidden);
        let key_and_value = self.key_value_size().saturating_mul(2 * hidden);
        let mlp = (3 * hidden).saturating_mul(u64::from(self.intermediate_size));
        query_and_output.saturating_add(key_and_value).saturating_add(mlp)
    }

    /// Parameters: embedding [V, H] (twice if the head is not tied), per layer q, k, v, o, gate, up, down and two
    /// norm gains, and the final norm gain.
    pub fn parameter_counts(&self) -> ParameterCounts {
        let hidden = u64::from(self.hidden_size);
        let table = u64::from(self.vocab_size).saturating_mul(hidden);
        let embedding = if self.tie_word_embeddings { table } else { table.saturating_mul(2) };
        let layer = self.layer_matrix_parameters().saturating_add(2 * hidden);
        let non_embedding = u64::from(self.num_hidden_layers).saturating_mul(layer).saturating_add(hidden);
        ParameterCounts { embedding, non_embedding, total: embedding.saturating_add(non_embedding) }
    }
}

#[cfg(test)]
mod tests {
    use crate::plan::architecture::tests::paper_1b;

    #[test]
    fn the_papers_models() {
        let counts = |layers| paper_1b(layers).parameter_counts();
        // 0.308 B and 1.233 B non-embedding, 0.439 B and 1.364 B in all.
        assert_eq!(counts(6).non_embedding, 6 * (4 * 2048 * 2048 + 3 * 2048 * 5632 + 2 * 2048) + 2048);
        assert_eq!(counts(24).total / 1_000_000, 1_364);
        assert_eq!(counts(6).total / 1_000_000, 439);
        // The final norm gain is not multiplied.
        assert_eq!(counts(24).non_embedding - 2048, 4 * (counts(6).non_embedding - 2048));
    }

    #[test]
    fn a_tied_head_is_counted_once() {
        let mut model = paper_1b(6);
        model.tie_word_embeddings = true;
        assert_eq!(model.parameter_counts().embedding, 32_000 * 2_048);
    }
}

//! Small models with random weights, and random tokens.

use growth_crds::plan::ModelConfig;
use growth_trainer::model::layout::{ParameterLayout, TensorKind};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// Grouped queries, heads that are not hidden / heads wide, an untied head.
pub fn small() -> ModelConfig {
    ModelConfig {
        hidden_size: 16,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        vocab_size: 23,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    }
}

/// [`weights_from`] of a seed.
pub fn weights(layout: &ParameterLayout, seed: u64) -> Vec<f32> {
    weights_from(&mut ChaCha8Rng::seed_from_u64(seed), layout)
}

/// Gains around 1 but never 1, matrices that keep the size of a row, embeddings of size 1; flat, in the layout's order.
pub fn weights_from(random: &mut ChaCha8Rng, layout: &ParameterLayout) -> Vec<f32> {
    let mut parameters = vec![0.0; layout.total_len()];
    for tensor in layout.tensors() {
        let (middle, size) = match tensor.kind {
            TensorKind::Norm => (1.0, 0.6),
            TensorKind::Embedding => (0.0, 1.0),
            TensorKind::Matrix | TensorKind::Head => (0.0, (3.0 / tensor.shape[1] as f32).sqrt()),
        };
        parameters[tensor.range()].fill_with(|| middle + size * random.random_range(-1.0f32..1.0));
    }
    parameters
}

pub fn tokens(vocabulary: u32, count: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(0..vocabulary)).collect()
}

pub fn widen(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|number| f64::from(*number)).collect()
}

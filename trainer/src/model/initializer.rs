//! Random first weights.

use crate::model::layout::{ParameterLayout, ParameterTensor, TensorKind};
use crate::random;
use growth_crds::plan::{Initializer, ModelConfig};

/// Standard deviation of every matrix in Hugging Face's initialisation.
const HUGGING_FACE_STD: f64 = 0.02;

/// Random weights in the order of the layout; gains are 1. Each tensor depends on its name and the seed alone.
pub fn initialize(config: &ModelConfig, initializer: Initializer, seed: u64) -> Vec<f32> {
    let layout = ParameterLayout::new(config);
    let mut parameters = vec![0.0; layout.total_len()];
    for tensor in layout.tensors() {
        let weights = &mut parameters[tensor.range()];
        match tensor.kind {
            TensorKind::Norm => weights.fill(1.0),
            _ => random::normal(seed, &tensor.name, standard_deviation(tensor, config, initializer), weights),
        }
    }
    parameters
}

/// The released code of "Stacking Your Transformers": sqrt(2 / (5 fan_in)), and 1 / (sqrt(fan_in) layers) for the
/// MLP's down projection.
pub(crate) fn standard_deviation(
    tensor: &ParameterTensor,
    config: &ModelConfig,
    initializer: Initializer,
) -> f64 {
    let fan_in = tensor.shape.last().copied().unwrap_or(1) as f64;
    match initializer {
        Initializer::HuggingFace => HUGGING_FACE_STD,
        Initializer::Paper if tensor.name.ends_with("down_proj.weight") => {
            1.0 / (fan_in.sqrt() * f64::from(config.num_hidden_layers))
        }
        Initializer::Paper => (2.0 / (5.0 * fan_in)).sqrt(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            hidden_size: 64,
            intermediate_size: 160,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 300,
            max_position_embeddings: 32,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
        }
    }

    fn measured_std(parameters: &[f32], name: &str) -> f64 {
        let layout = ParameterLayout::new(&config());
        let weights = &parameters[layout.find(name).unwrap().range()];
        let sum: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
        (sum / weights.len() as f64).sqrt()
    }

    #[test]
    fn standard_deviations_are_the_documented_ones() {
        let hugging_face = initialize(&config(), Initializer::HuggingFace, 1);
        let paper = initialize(&config(), Initializer::Paper, 1);
        for (name, expected) in [
            ("model.embed_tokens.weight", (2.0 / (5.0 * 64.0f64)).sqrt()),
            ("model.layers.1.self_attn.q_proj.weight", (2.0 / (5.0 * 64.0f64)).sqrt()),
            ("model.layers.2.mlp.down_proj.weight", 1.0 / (160f64.sqrt() * 3.0)),
        ] {
            assert!((measured_std(&hugging_face, name) / 0.02 - 1.0).abs() < 0.05);
            assert!((measured_std(&paper, name) / expected - 1.0).abs() < 0.05);
        }
    }

    #[test]
    fn gains_are_one_and_seeds_differ() {
        let layout = ParameterLayout::new(&config());
        let one = initialize(&config(), Initializer::HuggingFace, 1);
        assert!(one[layout.final_norm()].iter().all(|gain| *gain == 1.0));
        assert!(one == initialize(&config(), Initializer::HuggingFace, 1));
        assert!(one != initialize(&config(), Initializer::HuggingFace, 2));
        assert!(one[layout.layer(0).down.clone()] != one[layout.layer(1).down.clone()]);
    }
}

//! A trained model at work: loss of a text, and text of its own.

use crate::checkpoint::{CheckpointError, HuggingFaceFolder};
use crate::model::activations::{Activations, Sizes};
use crate::model::llama::{Llama, Tokens};
use crate::random;
use crate::storage::Storage;
use growth_crds::plan::ModelConfig;
use rand::RngExt;

/// Tokens of one forward pass of an evaluation.
const PASS_TOKENS: usize = 2048;

/// Positions by which the window of a generation grows: a pass works on a whole multiple.
const WINDOW_STEP: usize = 64;

/// A model with its weights.
pub struct LoadedModel {
    config: ModelConfig,
    parameters: Vec<f32>,
    tokenizer: Option<bytes::Bytes>,
}

/// Loss of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Mean loss of a token, in nats.
    pub mean: f64,
    /// Tokens that were predicted.
    pub tokens: u64,
}

/// How the next token is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most likely token.
    pub temperature: f32,
    /// Only the most likely `top_k` tokens can be drawn; 0 for all.
    pub top_k: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl LoadedModel {
    /// Loads any Hugging Face LLaMA folder, one of our checkpoints among them.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn open(folder: &Storage) -> Result<Self, CheckpointError> {
        let folder = HuggingFaceFolder::open(folder)?;
        let parameters = folder.load()?.parameters;
        Ok(Self { config: folder.config().clone(), parameters, tokenizer: folder.tokenizer()? })
    }

    /// Architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Content of the folder's `tokenizer.json`, if it has one.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        self.tokenizer.as_deref()
    }

    /// Mean loss over next tokens of `ids`, cut into pieces of `sequence` predictions.
    pub fn loss(&self, ids: &[u32], sequence: usize) -> Loss {
        let predictions = ids.len().saturating_sub(1);
        let whole = predictions / sequence * sequence;
        let mut sum = 0.0;
        let per_pass = (PASS_TOKENS / sequence).max(1) * sequence;
        for first in (0..whole).step_by(per_pass) {
            sum += self.loss_sum(ids, first, whole.min(first + per_pass), sequence);
        }
        if whole < predictions {
            sum += self.loss_sum(ids, whole, predictions, predictions - whole);
        }
        Loss { mean: sum / predictions.max(1) as f64, tokens: predictions as u64 }
    }

    fn loss_sum(&self, ids: &[u32], first: usize, end: usize, sequence: usize) -> f64 {
        let tokens = Tokens { ids: &ids[first..end], targets: &ids[first + 1..end + 1], sequence };
        let (model, mut activations) = self.pass(tokens);
        let losses = model.losses(&mut activations, &self.parameters, tokens);
        losses.iter().map(|loss| f64::from(*loss)).sum()
    }

    /// Logits of all positions of one sequence: [ids, vocab].
    pub fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let tokens = Tokens { ids, targets: &[], sequence: ids.len() };
        let (model, mut activations) = self.pass(tokens);
        let mut logits = vec![0.0; ids.len() * self.config.vocab_size as usize];
        model.logits(&mut logits, &mut activations, &self.parameters, tokens, 0..ids.len());
        logits
    }

    fn pass(&self, tokens: Tokens<'_>) -> (Llama, Activations) {
        let model = Llama::new(self.config.clone(), tokens.sequence);
        let sizes = Sizes::new(&self.config, tokens.ids.len() / tokens.sequence, tokens.sequence);
        (model, Activations::for_inference(&sizes))
    }

    /// Continues `prompt` by up to `count` tokens, or until `end` is drawn.
    pub fn generate(&self, prompt: &[u32], count: usize, end: Option<u32>, sampling: Sampling) -> Vec<u32> {
        let mut ids = prompt.to_vec();
        let mut generated = Vec::new();
        for index in 0..count {
            let logits = self.next_logits(&ids);
            let id = draw(logits, sampling, index as u64);
            if Some(id) == end {
                break;
            }
            ids.push(id);
            generated.push(id);
        }
        generated
    }

    /// Logits after the last token. What stands to its right does not matter to it, so the window is filled up.
    fn next_logits(&self, ids: &[u32]) -> Vec<f32> {
        let longest = self.config.max_position_embeddings as usize;
        let window = &ids[ids.len().saturating_sub(longest)..];
        let sequence = window.len().next_multiple_of(WINDOW_STEP).min(longest);
        let mut padded = window.to_vec();
        padded.resize(sequence, 0);
        let tokens = Tokens { ids: &padded, targets: &[], sequence };
        let (model, mut activations) = self.pass(tokens);
        let mut logits = vec![0.0; self.config.vocab_size as usize];
        let last = window.len() - 1;
        model.logits(&mut logits, &mut activations, &self.parameters, tokens, last..last + 1);
        logits
    }
}

/// Draws from the softmax of `logits`.
fn draw(logits: Vec<f32>, sampling: Sampling, index: u64) -> u32 {
    let mut ranked: Vec<(f32, u32)> = logits.into_iter().zip(0..).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    if sampling.top_k > 0 {
        ranked.truncate(sampling.top_k);
    }
    let Some(&(best, likeliest)) = ranked.first() else { return 0 };
    if sampling.temperature <= 0.0 {
        return likeliest;
    }
    let weights: Vec<f64> =
        ranked.iter().map(|(logit, _)| f64::from((logit - best) / sampling.temperature).exp()).collect();
    let mut left =
        random::generator(sampling.seed, "generate", index).random::<f64>() * weights.iter().sum::<f64>();
    for ((_, id), weight) in ranked.iter().zip(weights) {
        left -= weight;
        if left <= 0.0 {
            return *id;
        }
    }
    likeliest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_temperature_and_top_k() {
        let logits = vec![0.0, 3.0, 1.0, 2.9];
        let sampling = |temperature, top_k| Sampling { temperature, top_k, seed: 1 };
        assert_eq!(draw(logits.clone(), sampling(0.0, 0), 0), 1);
        let drawn: Vec<u32> = (0..200).map(|i| draw(logits.clone(), sampling(1.0, 2), i)).collect();
        assert!(drawn.iter().all(|id| [1, 3].contains(id)));
        assert!(drawn.contains(&1) && drawn.contains(&3));
        let hot: Vec<u32> = (0..500).map(|i| draw(logits.clone(), sampling(100.0, 0), i)).collect();
        assert!((0..4).all(|id| hot.contains(&id)));
    }
}

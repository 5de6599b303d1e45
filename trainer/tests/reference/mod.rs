//! A LLaMA in f64, written from its equations: one row, one head, one key at a time. Slow, plain, and independent
//! of the trainer's operations; it shares with them only the names of the tensors.

pub mod autograd;
#[allow(dead_code, reason = "for the operators with masks")]
pub mod masked;
#[allow(dead_code, reason = "for models without a shape of their own")]
pub mod random;

use growth_crds::plan::ModelConfig;
use growth_trainer::model::layout::ParameterLayout;

/// A model and its weights, in the flat layout.
pub struct Reference<'a> {
    pub config: &'a ModelConfig,
    pub layout: &'a ParameterLayout,
    pub parameters: &'a [f64],
}

impl Reference<'_> {
    /// Losses of sequences of `sequence` tokens each.
    pub fn losses(&self, ids: &[u32], targets: &[u32], sequence: usize) -> Vec<f64> {
        let logits = ids.chunks(sequence).flat_map(|ids| self.logits(ids));
        let loss = |(logits, &target): (Vec<f64>, &u32)| {
            logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[target as usize]
        };
        logits.zip(targets).map(loss).collect()
    }

    /// Logits of each position of one sequence.
    pub fn logits(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let width = self.config.hidden_size as usize;
        let embedding = self.tensor("model.embed_tokens.weight");
        let mut x: Vec<Vec<f64>> =
            ids.iter().map(|&id| embedding[id as usize * width..][..width].to_vec()).collect();
        for layer in 0..self.config.num_hidden_layers {
            self.attend(&mut x, layer);
            self.feed_forward(&mut x, layer);
        }
        let head = if self.config.tie_word_embeddings { embedding } else { self.tensor("lm_head.weight") };
        let gain = self.tensor("model.norm.weight");
        x.iter().map(|x| times(head, &self.norm(x, gain))).collect()
    }

    fn tensor(&self, name: &str) -> &[f64] {
        &self.parameters[self.layout.find(name).expect(name).range()]
    }

    fn of_layer(&self, layer: u32, part: &str) -> &[f64] {
        self.tensor(&format!("model.layers.{layer}.{part}.weight"))
    }

    fn norm(&self, x: &[f64], gain: &[f64]) -> Vec<f64> {
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let rms = (mean_square + self.config.rms_norm_eps).sqrt();
        x.iter().zip(gain).map(|(x, gain)| x / rms * gain).collect()
    }

    /// `x += W_o attention(rope(W_q n), rope(W_k n), W_v n)` with `n = norm(x)`.
    fn attend(&self, x: &mut [Vec<f64>], layer: u32) {
        let gain = self.of_layer(layer, "input_layernorm");
        let normed: Vec<Vec<f64>> = x.iter().map(|x| self.norm(x, gain)).collect();
        let project = |part| normed.iter().map(|n| times(self.of_layer(layer, part), n)).collect();
        let mut queries: Vec<Vec<f64>> = project("self_attn.q_proj");
        let mut keys: Vec<Vec<f64>> = project("self_attn.k_proj");
        let values: Vec<Vec<f64>> = project("self_attn.v_proj");
        for rows in [&mut queries, &mut keys] {
            rows.iter_mut().enumerate().for_each(|(position, row)| self.turn(row, position));
        }
        let output = self.of_layer(layer, "self_attn.o_proj");
        for (position, x) in x.iter_mut().enumerate() {
            let context = self.context(&queries[position], &keys[..=position], &values);
            add(x, &times(output, &context));
        }
    }

    /// Hugging Face's rotary embedding of every head of a row; its angles are f32 numbers, as there.
    fn turn(&self, row: &mut [f64], position: usize) {
        let width = self.config.head_dim as usize;
        for head in row.chunks_exact_mut(width) {
            for i in 0..width / 2 {
                let frequency = self.config.rope_theta.powf(-((2 * i) as f64) / width as f64) as f32;
                let angle = f64::from(position as f32 * frequency);
                let (a, b) = (head[i], head[i + width / 2]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + width / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    }

    /// All heads of one query row over the keys and values up to its position.
    fn context(&self, query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
        let width = self.config.head_dim as usize;
        let group = (self.config.num_attention_heads / self.config.num_key_value_heads) as usize;
        let mut context = Vec::new();
        for (head, query) in query.chunks_exact(width).enumerate() {
            let first = head / group * width;
            let scores = keys.iter().map(|key| dot(query, &key[first..][..width]) / (width as f64).sqrt());
            let weights: Vec<f64> = scores.map(f64::exp).collect();
            let sum: f64 = weights.iter().sum();
            context.extend((0..width).map(|i| {
                weights.iter().zip(values).map(|(weight, value)| weight / sum * value[first + i]).sum::<f64>()
            }));
        }
        context
    }

    /// `x += W_down (silu(W_gate n) * W_up n)` with `n = norm(x)`.
    fn feed_forward(&self, x: &mut [Vec<f64>], layer: u32) {
        for x in x {
            let normed = self.norm(x, self.of_layer(layer, "post_attention_layernorm"));
            let gate = times(self.of_layer(layer, "mlp.gate_proj"), &normed);
            let up = times(self.of_layer(layer, "mlp.up_proj"), &normed);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(z, up)| z / (1.0 + (-z).exp()) * up).collect();
            add(x, &times(self.of_layer(layer, "mlp.down_proj"), &inner));
        }
    }
}

/// `matrix x`, with the matrix row by row.
fn times(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

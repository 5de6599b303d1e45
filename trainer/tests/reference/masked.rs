//! The LLaMA of this folder with the masks of MSG (arXiv 2305.02869) where the definition has them: on the outputs of the
//! embedding, of every matrix but the head, and of every norm, and on the outputs of both parts of a new layer.

use super::{add, dot, times};
use growth_crds::plan::ModelConfig;
use growth_trainer::model::layout::ParameterLayout;

/// A model, its weights in the flat layout, and a mask for each of its channels and heads.
pub struct Masked<'a> {
    pub config: &'a ModelConfig,
    pub layout: &'a ParameterLayout,
    pub parameters: &'a [f64],
    /// Of each channel of the residual stream.
    pub hidden: &'a [f64],
    /// Of each channel inside the MLP.
    pub inner: &'a [f64],
    /// Of each query head.
    pub heads: &'a [f64],
    /// Of each key and value head.
    pub keys: &'a [f64],
    /// Of each layer's outputs.
    pub layers: &'a [f64],
}

impl Masked<'_> {
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
        let row = |&id: &u32| mask(&embedding[id as usize * width..][..width], self.hidden);
        let mut x: Vec<Vec<f64>> = ids.iter().map(row).collect();
        for layer in 0..self.config.num_hidden_layers {
            self.attend(&mut x, layer);
            for x in &mut x {
                let out = self.feed_forward(x, layer);
                add(x, &out);
            }
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

    /// Masked, and scaled by the root of the share of channels that are there.
    fn norm(&self, x: &[f64], gain: &[f64]) -> Vec<f64> {
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let rms = (mean_square + self.config.rms_norm_eps).sqrt();
        let share = self.hidden.iter().sum::<f64>() / self.hidden.len() as f64;
        let normed: Vec<f64> = x.iter().zip(gain).map(|(x, gain)| share.sqrt() * x / rms * gain).collect();
        mask(&normed, self.hidden)
    }

    fn attend(&self, x: &mut [Vec<f64>], layer: u32) {
        let gain = self.of_layer(layer, "input_layernorm");
        let normed: Vec<Vec<f64>> = x.iter().map(|x| self.norm(x, gain)).collect();
        let project = |part, masks: &[f64]| -> Vec<Vec<f64>> {
            let masks: Vec<f64> = masks.iter().flat_map(|mask| vec![*mask; self.width()]).collect();
            normed.iter().map(|n| mask(&times(self.of_layer(layer, part), n), &masks)).collect()
        };
        let mut queries = project("self_attn.q_proj", self.heads);
        let mut keys = project("self_attn.k_proj", self.keys);
        let values = project("self_attn.v_proj", self.keys);
        for rows in [&mut queries, &mut keys] {
            rows.iter_mut().enumerate().for_each(|(position, row)| self.turn(row, position));
        }
        let output = self.of_layer(layer, "self_attn.o_proj");
        for (position, x) in x.iter_mut().enumerate() {
            let context = self.context(&queries[position], &keys[..=position], &values);
            let out = mask(&times(output, &context), self.hidden);
            add(x, &out.iter().map(|out| self.layers[layer as usize] * out).collect::<Vec<f64>>());
        }
    }

    fn width(&self) -> usize {
        self.config.head_dim as usize
    }

    fn turn(&self, row: &mut [f64], position: usize) {
        let width = self.width();
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

    /// All heads of one query row. A new query head that reads old values, which are not masked, is masked itself.
    fn context(&self, query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
        let width = self.width();
        let group = (self.config.num_attention_heads / self.config.num_key_value_heads) as usize;
        let mut context = Vec::new();
        for (head, query) in query.chunks_exact(width).enumerate() {
            let key = head / group;
            let scores =
                keys.iter().map(|row| dot(query, &row[key * width..][..width]) / (width as f64).sqrt());
            let weights: Vec<f64> = scores.map(f64::exp).collect();
            let sum: f64 = weights.iter().sum();
            let mask = if self.keys[key] == 1.0 { self.heads[head] } else { 1.0 };
            context.extend((0..width).map(|i| {
                let weighted = weights.iter().zip(values);
                mask * weighted.map(|(weight, value)| weight / sum * value[key * width + i]).sum::<f64>()
            }));
        }
        context
    }

    fn feed_forward(&self, x: &[f64], layer: u32) -> Vec<f64> {
        let normed = self.norm(x, self.of_layer(layer, "post_attention_layernorm"));
        let gate = mask(&times(self.of_layer(layer, "mlp.gate_proj"), &normed), self.inner);
        let up = mask(&times(self.of_layer(layer, "mlp.up_proj"), &normed), self.inner);
        let inner: Vec<f64> = gate.iter().zip(up).map(|(z, up)| z / (1.0 + (-z).exp()) * up).collect();
        let out = mask(&times(self.of_layer(layer, "mlp.down_proj"), &inner), self.hidden);
        out.iter().map(|out| self.layers[layer as usize] * out).collect()
    }
}

fn mask(x: &[f64], masks: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), masks.len());
    x.iter().zip(masks).map(|(x, mask)| x * mask).collect()
}

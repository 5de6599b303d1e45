//! The same LLaMA in tensor operations of candle, in f64, for the gradients of its autograd.

use candle_core::{D, Device, Result, Tensor, Var};
use growth_crds::plan::ModelConfig;
use growth_trainer::model::layout::ParameterLayout;
use std::collections::HashMap;

/// The model with one variable per tensor.
pub struct Autograd<'a> {
    config: &'a ModelConfig,
    variables: HashMap<&'a str, Var>,
}

impl<'a> Autograd<'a> {
    pub fn new(config: &'a ModelConfig, layout: &'a ParameterLayout, parameters: &[f64]) -> Result<Self> {
        let mut variables = HashMap::new();
        for tensor in layout.tensors() {
            let value =
                Tensor::from_slice(&parameters[tensor.range()], tensor.shape.as_slice(), &Device::Cpu)?;
            variables.insert(tensor.name.as_str(), Var::from_tensor(&value)?);
        }
        Ok(Self { config, variables })
    }

    /// The sum of the losses, and the gradient of `scale` times it by tensor name.
    pub fn gradients(
        &self,
        ids: &[u32],
        targets: &[u32],
        sequence: usize,
        scale: f64,
    ) -> Result<(f64, HashMap<&'a str, Vec<f64>>)> {
        let sum = self.losses(ids, targets, sequence)?.sum_all()?;
        let store = (&sum * scale)?.backward()?;
        let mut gradients = HashMap::new();
        for (&name, variable) in &self.variables {
            let gradient = store.get(variable).expect("every tensor takes part");
            gradients.insert(name, gradient.flatten_all()?.to_vec1()?);
        }
        Ok((sum.to_scalar()?, gradients))
    }

    fn losses(&self, ids: &[u32], targets: &[u32], sequence: usize) -> Result<Tensor> {
        let (rows, width) = (ids.len(), self.config.hidden_size as usize);
        let ids = Tensor::from_slice(ids, rows, &Device::Cpu)?;
        let targets = Tensor::from_slice(targets, (rows, 1), &Device::Cpu)?;
        let embedding = self.variables["model.embed_tokens.weight"].as_tensor();
        let mut x = embedding.index_select(&ids, 0)?.reshape((rows / sequence, sequence, width))?;
        for layer in 0..self.config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            x = (&x + self.attention(&self.norm(&x, &name("input_layernorm"))?, &name)?)?;
            x = (&x + self.mlp(&self.norm(&x, &name("post_attention_layernorm"))?, &name)?)?;
        }
        let x = self.norm(&x, "model.norm.weight")?.reshape((rows, width))?;
        let tied = self.config.tie_word_embeddings;
        let head = if tied { embedding } else { self.variables["lm_head.weight"].as_tensor() };
        let logits = x.matmul(&head.t()?)?;
        let log_sums = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        log_sums - logits.gather(&targets, D::Minus1)?
    }

    fn norm(&self, x: &Tensor, gain: &str) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = (mean_square + self.config.rms_norm_eps)?.sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(&self.variables[gain])
    }

    fn linear(&self, x: &Tensor, weight: &str) -> Result<Tensor> {
        let (batch, sequence, width) = x.dims3()?;
        let out = x.reshape((batch * sequence, width))?.matmul(&self.variables[weight].t()?)?;
        out.reshape((batch, sequence, ()))
    }

    fn attention(&self, x: &Tensor, name: &dyn Fn(&str) -> String) -> Result<Tensor> {
        let (batch, sequence, _) = x.dims3()?;
        let queries = self.turn(&self.heads(x, &name("self_attn.q_proj"))?)?;
        let keys = self.repeat(&self.turn(&self.heads(x, &name("self_attn.k_proj"))?)?)?;
        let values = self.repeat(&self.heads(x, &name("self_attn.v_proj"))?)?;
        let scale = 1.0 / f64::from(self.config.head_dim).sqrt();
        let scores = (queries.matmul(&keys.t()?.contiguous()?)? * scale)?.broadcast_add(&mask(sequence)?)?;
        let weights = scores.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let context =
            weights.matmul(&values)?.transpose(1, 2)?.contiguous()?.reshape((batch, sequence, ()))?;
        self.linear(&context, &name("self_attn.o_proj"))
    }

    /// [batch, heads, sequence, head_dim]
    fn heads(&self, x: &Tensor, weight: &str) -> Result<Tensor> {
        let (batch, sequence, _) = x.dims3()?;
        let out = self.linear(x, weight)?;
        out.reshape((batch, sequence, (), self.config.head_dim as usize))?.transpose(1, 2)?.contiguous()
    }

    /// Each key or value head once for every query head that it serves.
    fn repeat(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, kv_heads, sequence, width) = x.dims4()?;
        let group = self.config.num_attention_heads as usize / kv_heads;
        let x = x.unsqueeze(2)?.broadcast_as((batch, kv_heads, group, sequence, width))?;
        x.contiguous()?.reshape((batch, kv_heads * group, sequence, width))
    }

    /// Hugging Face's `x cos + rotate_half(x) sin`.
    fn turn(&self, x: &Tensor) -> Result<Tensor> {
        let (sequence, half) = (x.dim(2)?, self.config.head_dim as usize / 2);
        let frequency = |i: usize| self.config.rope_theta.powf(-(i as f64) / half as f64) as f32;
        let angles: Vec<f64> = (0..sequence)
            .flat_map(|p| (0..2 * half).map(move |i| f64::from(p as f32 * frequency(i % half))))
            .collect();
        let angles = Tensor::from_vec(angles, (sequence, 2 * half), &Device::Cpu)?;
        let half_turned =
            Tensor::cat(&[&x.narrow(D::Minus1, half, half)?.neg()?, &x.narrow(D::Minus1, 0, half)?], 3)?;
        x.broadcast_mul(&angles.cos()?)? + half_turned.broadcast_mul(&angles.sin()?)?
    }

    fn mlp(&self, x: &Tensor, name: &dyn Fn(&str) -> String) -> Result<Tensor> {
        let gate = self.linear(x, &name("mlp.gate_proj"))?;
        let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
        self.linear(&(silu * self.linear(x, &name("mlp.up_proj"))?)?, &name("mlp.down_proj"))
    }
}

/// What is added to the scores [sequence, sequence]: -infinity, or as good as that, after the query's position.
fn mask(sequence: usize) -> Result<Tensor> {
    let of = |(query, key)| if key > query { -1e9 } else { 0.0 };
    let mask: Vec<f64> = (0..sequence).flat_map(|q| (0..sequence).map(move |k| of((q, k)))).collect();
    Tensor::from_vec(mask, (sequence, sequence), &Device::Cpu)
}

//! Where every tensor of a LLaMA lies in the one flat buffer that holds all its parameters.

use growth_crds::plan::ModelConfig;
use std::collections::HashMap;
use std::ops::Range;

/// Every tensor starts at a multiple of so many f32 (64 bytes, a cache line), unless it continues a fused matrix.
const ALIGNMENT: usize = 16;

/// What a tensor is for; decides how it is initialised and whether weight decay applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorKind {
    /// The input embedding.
    Embedding,
    /// The output head, where it is not the embedding.
    Head,
    /// The gain of a norm.
    Norm,
    /// A weight matrix of a layer.
    Matrix,
}

/// One tensor of the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterTensor {
    /// Name in a Hugging Face checkpoint.
    pub name: String,
    /// Rows and columns, or the length of a vector.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Elements.
    pub len: usize,
    /// What it is for.
    pub kind: TensorKind,
    /// Its layer, from 0.
    pub layer: Option<u32>,
}

impl ParameterTensor {
    /// Its elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// What the forward pass reads of one layer; fused matrices are one range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTensors {
    /// Gain before the attention, `[H]`.
    pub input_norm: Range<usize>,
    /// Query, key and value projections, `[(heads + 2 kv) D, H]`.
    pub qkv: Range<usize>,
    /// Output projection, `[H, heads D]`.
    pub o: Range<usize>,
    /// Gain before the MLP, `[H]`.
    pub post_norm: Range<usize>,
    /// Gate and up projections, `[2 F, H]`.
    pub gate_up: Range<usize>,
    /// Down projection, `[H, F]`.
    pub down: Range<usize>,
}

/// The tensor table of one model.
#[derive(Debug, Clone)]
pub struct ParameterLayout {
    tensors: Vec<ParameterTensor>,
    by_name: HashMap<String, usize>,
    layers: Vec<LayerTensors>,
    embedding: Range<usize>,
    final_norm: Range<usize>,
    head: Range<usize>,
    total_len: usize,
}

impl ParameterLayout {
    /// Lays out the parameters of `config`.
    pub fn new(config: &ModelConfig) -> Self {
        let (hidden, vocabulary) = (config.hidden_size as usize, config.vocab_size as usize);
        let mut table = Table::default();
        let embedding =
            table.tensor("model.embed_tokens.weight", &[vocabulary, hidden], TensorKind::Embedding);
        let layers = (0..config.num_hidden_layers).map(|layer| table.layer(config, layer)).collect();
        let final_norm = table.tensor("model.norm.weight", &[hidden], TensorKind::Norm);
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            table.tensor("lm_head.weight", &[vocabulary, hidden], TensorKind::Head)
        };
        let by_name = table.tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index));
        Self {
            by_name: by_name.collect(),
            layers,
            embedding,
            final_norm,
            head,
            total_len: table.end.next_multiple_of(ALIGNMENT),
            tensors: table.tensors,
        }
    }

    /// All tensors, in the order of their offsets.
    pub fn tensors(&self) -> &[ParameterTensor] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<&ParameterTensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// Position of the tensor of that name in [`ParameterLayout::tensors`].
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Length of the flat buffer, gaps included.
    pub fn total_len(&self) -> usize {
        self.total_len
    }

    /// Parameters, gaps not included.
    pub fn parameter_count(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.len as u64).sum()
    }

    /// The tensors of a layer, from 0.
    pub fn layer(&self, layer: usize) -> &LayerTensors {
        &self.layers[layer]
    }

    /// The tensors of all layers.
    pub fn layers(&self) -> &[LayerTensors] {
        &self.layers
    }

    /// Parts of the flat buffer whose gradients become complete one after another in a backward pass, by offset: the
    /// embedding, each layer, the last norm with an untied head. Gaps belong to the part before them.
    pub fn buckets(&self) -> Vec<Range<usize>> {
        let starts = std::iter::once(0)
            .chain(self.layers.iter().map(|layer| layer.input_norm.start))
            .chain([self.final_norm.start]);
        let ends = starts.clone().skip(1).chain([self.total_len]);
        starts.zip(ends).map(|(start, end)| start..end).collect()
    }

    /// The input embedding, `[V, H]`.
    pub fn embedding(&self) -> Range<usize> {
        self.embedding.clone()
    }

    /// The gain of the last norm, `[H]`.
    pub fn final_norm(&self) -> Range<usize> {
        self.final_norm.clone()
    }

    /// The output head, `[V, H]`: the embedding where they are tied.
    pub fn head(&self) -> Range<usize> {
        self.head.clone()
    }
}

/// The table while it is being built.
#[derive(Default)]
struct Table {
    tensors: Vec<ParameterTensor>,
    end: usize,
    layer: Option<u32>,
}

impl Table {
    fn layer(&mut self, config: &ModelConfig, layer: u32) -> LayerTensors {
        let (hidden, inner) = (config.hidden_size as usize, config.intermediate_size as usize);
        let query = (config.num_attention_heads * config.head_dim) as usize;
        let key = (config.num_key_value_heads * config.head_dim) as usize;
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        self.layer = Some(layer);
        let tensors = LayerTensors {
            input_norm: self.tensor(&name("input_layernorm"), &[hidden], TensorKind::Norm),
            qkv: self.fused(&[
                (name("self_attn.q_proj"), [query, hidden]),
                (name("self_attn.k_proj"), [key, hidden]),
                (name("self_attn.v_proj"), [key, hidden]),
            ]),
            o: self.tensor(&name("self_attn.o_proj"), &[hidden, query], TensorKind::Matrix),
            post_norm: self.tensor(&name("post_attention_layernorm"), &[hidden], TensorKind::Norm),
            gate_up: self
                .fused(&[(name("mlp.gate_proj"), [inner, hidden]), (name("mlp.up_proj"), [inner, hidden])]),
            down: self.tensor(&name("mlp.down_proj"), &[hidden, inner], TensorKind::Matrix),
        };
        self.layer = None;
        tensors
    }

    /// Adds a tensor at the next aligned offset.
    fn tensor(&mut self, name: &str, shape: &[usize], kind: TensorKind) -> Range<usize> {
        self.end = self.end.next_multiple_of(ALIGNMENT);
        self.push(name, shape, kind)
    }

    /// Adds matrices without a gap, so that one product reads them all.
    fn fused(&mut self, members: &[(String, [usize; 2])]) -> Range<usize> {
        self.end = self.end.next_multiple_of(ALIGNMENT);
        let start = self.end;
        for (name, shape) in members {
            self.push(name, shape, TensorKind::Matrix);
        }
        start..self.end
    }

    fn push(&mut self, name: &str, shape: &[usize], kind: TensorKind) -> Range<usize> {
        let tensor = ParameterTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            offset: self.end,
            len: shape.iter().product(),
            kind,
            layer: self.layer,
        };
        let range = tensor.range();
        self.end = range.end;
        self.tensors.push(tensor);
        range
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Small models of every shape: grouped heads, heads wider than `hidden / heads`, tied and untied.
    pub(crate) fn configs() -> impl Strategy<Value = ModelConfig> {
        let heads = (1u32..4, 1u32..3);
        (1u32..20, 1u32..20, 1u32..4, heads, 1u32..5, 1u32..40, any::<bool>()).prop_map(
            |(hidden, inner, layers, (kv, group), half_head, vocabulary, tied)| ModelConfig {
                hidden_size: hidden,
                intermediate_size: inner,
                num_hidden_layers: layers,
                num_attention_heads: kv * group,
                num_key_value_heads: kv,
                head_dim: 2 * half_head,
                vocab_size: vocabulary,
                max_position_embeddings: 64,
                rope_theta: 10_000.0,
                rms_norm_eps: 1e-5,
                tie_word_embeddings: tied,
            },
        )
    }

    fn brute_force_count(config: &ModelConfig) -> u64 {
        let [h, f, v, d] =
            [config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim].map(u64::from);
        let [heads, kv] = [config.num_attention_heads, config.num_key_value_heads].map(u64::from);
        let layer = h + heads * d * h + kv * d * h + kv * d * h + h * heads * d + h + f * h + f * h + h * f;
        let head = if config.tie_word_embeddings { 0 } else { v * h };
        v * h + u64::from(config.num_hidden_layers) * layer + h + head
    }

    proptest! {
        #[test]
        fn the_table_is_the_model(config in configs()) {
            let layout = ParameterLayout::new(&config);
            prop_assert_eq!(layout.parameter_count(), brute_force_count(&config));
            let mut end = 0;
            for tensor in layout.tensors() {
                prop_assert!(tensor.offset >= end && tensor.offset < end + ALIGNMENT);
                prop_assert_eq!(tensor.len, tensor.shape.iter().product::<usize>());
                prop_assert_eq!(layout.find(&tensor.name), Some(tensor));
                end = tensor.range().end;
            }
            prop_assert!(layout.total_len() >= end && layout.total_len() < end + ALIGNMENT);
            prop_assert_eq!(layout.find("lm_head.weight").is_none(), config.tie_word_embeddings);
            prop_assert_eq!(layout.head() == layout.embedding(), config.tie_word_embeddings);
        }

        #[test]
        fn fused_matrices_have_no_gaps(config in configs()) {
            let layout = ParameterLayout::new(&config);
            for (index, layer) in layout.layers().iter().enumerate() {
                let range = |part: &str| {
                    layout.find(&format!("model.layers.{index}.{part}.weight")).unwrap().range()
                };
                let (q, k, v) = (range("self_attn.q_proj"), range("self_attn.k_proj"), range("self_attn.v_proj"));
                prop_assert_eq!((q.end, k.end), (k.start, v.start));
                prop_assert_eq!(&layer.qkv, &(q.start..v.end));
                let (gate, up) = (range("mlp.gate_proj"), range("mlp.up_proj"));
                prop_assert_eq!(gate.end, up.start);
                prop_assert_eq!(&layer.gate_up, &(gate.start..up.end));
                prop_assert_eq!(&layer.o, &range("self_attn.o_proj"));
                prop_assert_eq!(&layer.down, &range("mlp.down_proj"));
                prop_assert_eq!(&layer.input_norm, &range("input_layernorm"));
                prop_assert_eq!(&layer.post_norm, &range("post_attention_layernorm"));
                for start in [q.start, gate.start, layer.o.start, layer.down.start] {
                    prop_assert_eq!(start % ALIGNMENT, 0);
                }
            }
        }
    }
}

//! The architecture, as a user writes it.

use crate::plan::Initializer;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// Architecture of a LLaMA; the names are those of Hugging Face's config.json.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.numAttentionHeads) || !has(self.numKeyValueHeads) || self.numAttentionHeads % self.numKeyValueHeads == 0"
    )
    .message("numKeyValueHeads must divide numAttentionHeads; lower it to a divisor, or remove it"),
    validation = Rule::new("!has(self.headDim) || self.headDim % 2 == 0")
        .message("headDim must be even: rotary positions turn pairs of channels"),
    validation = Rule::new(
        "has(self.headDim) || !has(self.hiddenSize) || !has(self.numAttentionHeads) || self.hiddenSize % self.numAttentionHeads == 0"
    )
    .message("hiddenSize is not a multiple of numAttentionHeads; set headDim, or change one of them"),
)]
pub struct ModelSpec {
    /// Layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub num_hidden_layers: Option<u32>,
    /// Width of the residual stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 131072))]
    pub hidden_size: Option<u32>,
    /// Width inside the MLP.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 524288))]
    pub intermediate_size: Option<u32>,
    /// Query heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub num_attention_heads: Option<u32>,
    /// Key and value heads. Default: numAttentionHeads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub num_key_value_heads: Option<u32>,
    /// Width of a head. Default: hiddenSize / numAttentionHeads.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 4096))]
    pub head_dim: Option<u32>,
    /// Rows of the embedding. Default: data.tokenizer.train.vocabSize.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 16777216))]
    pub vocab_size: Option<u32>,
    /// Longest sequence. Default: training.sequenceLength.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 16777216))]
    pub max_position_embeddings: Option<u32>,
    /// Base of the rotary frequencies. Default: 10000.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = 1e12))]
    pub rope_theta: Option<f64>,
    /// Term inside the root of RMSNorm. Default: 1e-5.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1e-12, max = 1.0))]
    pub rms_norm_eps: Option<f64>,
    /// Whether the output head is the embedding. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie_word_embeddings: Option<bool>,
    /// Distribution of random initial weights. Default: HuggingFace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initializer: Option<Initializer>,
}

//! Where the text comes from and how it becomes tokens.

use crate::quantity::ByteCount;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Text to train and to validate on, and the tokenizer.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.validation) && self.validation.size() > 0) != has(self.holdOutPercent)")
        .message("set exactly one of data.validation and data.holdOutPercent"),
)]
pub struct DataSpec {
    /// Text to train on; several sources are mixed by weight.
    #[schemars(length(min = 1, max = 64))]
    pub train: Vec<DataSource>,
    /// Text that is only evaluated on. Exactly one of validation and holdOutPercent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub validation: Vec<DataSource>,
    /// Share of the training documents, chosen by a hash of their content, that is kept apart for validation.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.01, max = 50.0))]
    pub hold_out_percent: Option<f64>,
    /// Tokenizer of every stage.
    pub tokenizer: TokenizerSpec,
    /// Token that separates documents. Default: the tokenizer's end-of-text token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub document_separator: Option<String>,
}

/// One set of files.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataSource {
    /// Files: file://, s3://, gs://, az:// or https://, with * and ** (not over http). Plain or .gz or .zst.
    #[schemars(length(max = 1024), regex(pattern = r"^(file|s3|gs|az|https?)://.+$"))]
    pub uri: String,
    /// Share of the tokens relative to the other sources.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 0.000001, max = 1000000.0))]
    pub weight: f64,
    /// How a file is read. Default: by its name (.jsonl, .parquet, otherwise text: one document a file).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DataFormat>,
    /// Field (jsonl) or column (parquet) that holds the text.
    #[serde(default = "default_field")]
    #[schemars(length(min = 1, max = 256))]
    pub field: String,
    /// Reads a seeded random sample of the files that holds about this many bytes, instead of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<ByteCount>,
}

fn default_weight() -> f64 {
    1.0
}

fn default_field() -> String {
    "text".to_owned()
}

/// How a file is read. Default: by its name (.jsonl, .parquet, otherwise text: one document a file).
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, JsonSchema)]
pub enum DataFormat {
    /// One document a file.
    Text,
    /// One JSON object a line.
    Jsonl,
    /// Apache Parquet, one document a row.
    Parquet,
}

/// The tokenizer of every stage; exactly one of uri and train.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.uri) != has(self.train)")
        .message("set exactly one of tokenizer.uri and tokenizer.train"),
)]
pub struct TokenizerSpec {
    /// A Hugging Face tokenizer.json.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024), regex(pattern = r"^(file|s3|gs|az|https?)://.+$"))]
    pub uri: Option<String>,
    /// Trains a byte-level BPE on the training text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainTokenizerSpec>,
}

/// A byte-level BPE, trained on the training text.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainTokenizerSpec {
    /// Entries of the vocabulary, the 256 bytes and the end-of-text token included.
    #[schemars(range(min = 257, max = 1048576))]
    pub vocab_size: u32,
    /// Bytes of text it is trained on.
    #[serde(default = "default_sample_bytes")]
    pub sample_bytes: ByteCount,
}

fn default_sample_bytes() -> ByteCount {
    ByteCount(16_000_000)
}

//! `config.json` in the form that Hugging Face transformers reads, and back.

use super::CONFIG_FILE;
use super::error::{CheckpointError, Result};
use crate::storage::Storage;
use bytes::Bytes;
use growth_crds::plan::ModelConfig;
use serde_json::{Map, Value, json};

/// Special tokens that a model generates and stops with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenIds {
    /// First token of a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

impl TokenIds {
    fn eos_value(&self) -> Value {
        match self.eos.as_slice() {
            [] => Value::Null,
            [only] => json!(only),
            several => json!(several),
        }
    }
}

/// Content of `config.json`, for transformers 4 and 5: the rotary base is written in both their places, and unknown
/// token ids as null, because an absent one would mean 1 and 2.
pub fn config_json(config: &ModelConfig, token_ids: &TokenIds) -> Bytes {
    let content = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": token_ids.bos,
        "eos_token_id": token_ids.eos_value(),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    pretty(content)
}

/// Content of `generation_config.json`, or `None` when no special token is known.
pub fn generation_config_json(token_ids: &TokenIds) -> Option<Bytes> {
    if *token_ids == TokenIds::default() {
        return None;
    }
    let content = json!({
        "_from_model_config": true,
        "bos_token_id": token_ids.bos,
        "eos_token_id": token_ids.eos_value(),
    });
    Some(pretty(content))
}

/// JSON for people: indented, with a last newline, and with the keys in order whatever features `serde_json` has.
pub(super) fn pretty(mut content: Value) -> Bytes {
    content.sort_all_objects();
    Bytes::from(format!("{content:#}\n"))
}

/// Reads `config.json` of a folder.
pub(super) fn read_config(folder: &Storage) -> Result<(ModelConfig, TokenIds)> {
    let Some(_) = folder.head(CONFIG_FILE)? else {
        let advice = "name the folder of a Hugging Face model".to_owned();
        let (uri, object) = (folder.uri().to_owned(), CONFIG_FILE.to_owned());
        return Err(CheckpointError::Missing { uri, object, advice });
    };
    parse_config(&folder.uri_of(CONFIG_FILE), &folder.get(CONFIG_FILE)?)
}

/// Reads the content of a `config.json`; `uri` is its name in errors.
///
/// # Errors
/// When it is no JSON, when a field is missing or wrong, or when it describes what this trainer cannot run.
pub fn parse_config(uri: &str, bytes: &[u8]) -> Result<(ModelConfig, TokenIds)> {
    let content: Map<String, Value> = serde_json::from_slice(bytes)
        .map_err(|error| CheckpointError::Format { uri: uri.to_owned(), problem: error.to_string() })?;
    let fields = Fields { uri, content: &content };
    fields.refuse_other_models()?;
    let heads = fields.count("num_attention_heads", None)?;
    let hidden = fields.count("hidden_size", None)?;
    let config = ModelConfig {
        hidden_size: hidden,
        intermediate_size: fields.count("intermediate_size", None)?,
        num_hidden_layers: fields.count("num_hidden_layers", None)?,
        num_attention_heads: heads,
        num_key_value_heads: fields.count("num_key_value_heads", Some(heads))?,
        head_dim: fields.head_dim(hidden, heads)?,
        vocab_size: fields.count("vocab_size", None)?,
        max_position_embeddings: fields.count("max_position_embeddings", Some(2048))?,
        rope_theta: fields.rope_theta()?,
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        tie_word_embeddings: fields.flag("tie_word_embeddings")?,
    };
    if !heads.is_multiple_of(config.num_key_value_heads) {
        return Err(
            fields.error("num_key_value_heads", &format!("it must divide num_attention_heads ({heads})"))
        );
    }
    Ok((config, fields.token_ids()?))
}

/// The fields of one `config.json`; null counts as absent, as transformers has it.
struct Fields<'a> {
    uri: &'a str,
    content: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.content.get(field).filter(|value| !value.is_null())
    }

    fn error(&self, field: &str, expected: &str) -> CheckpointError {
        CheckpointError::Config {
            uri: self.uri.to_owned(),
            field: field.to_owned(),
            found: self.content.get(field).map_or_else(|| "absent".to_owned(), Value::to_string),
            expected: expected.to_owned(),
        }
    }

    /// A positive whole number.
    fn count(&self, field: &str, default: Option<u32>) -> Result<u32> {
        let Some(value) = self.get(field) else {
            return default.ok_or_else(|| self.error(field, "a LLaMA needs it"));
        };
        let count = value.as_u64().and_then(|count| u32::try_from(count).ok()).filter(|&count| count > 0);
        count.ok_or_else(|| self.error(field, "it must be a positive whole number"))
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|&number| number > 0.0);
        number.map(Some).ok_or_else(|| self.error(field, "it must be a positive number"))
    }

    fn flag(&self, field: &str) -> Result<bool> {
        let Some(value) = self.get(field) else {
            return Ok(false);
        };
        value.as_bool().ok_or_else(|| self.error(field, "it must be true or false"))
    }

    fn refuse_other_models(&self) -> Result<()> {
        if self.get("model_type").and_then(Value::as_str) != Some("llama") {
            return Err(self.error("model_type", "this trainer runs models of the type \"llama\" only"));
        }
        if self.get("hidden_act").is_some_and(|value| value != "silu") {
            return Err(self.error("hidden_act", "this trainer runs \"silu\" only"));
        }
        for field in ["attention_bias", "mlp_bias"] {
            if self.flag(field)? {
                return Err(self.error(field, "this trainer runs models without biases only"));
            }
        }
        let sliding = self.content.get("use_sliding_window") != Some(&Value::Bool(false));
        if self.get("sliding_window").is_some() && sliding {
            return Err(self.error("sliding_window", "this trainer runs full attention only"));
        }
        if self.get("quantization_config").is_some() {
            return Err(
                self.error("quantization_config", "this trainer needs weights that are not quantized")
            );
        }
        if self.get("pretraining_tp").is_some_and(|value| value != 1) {
            return Err(self.error("pretraining_tp", "this trainer runs 1 only"));
        }
        self.refuse_rope_scaling()
    }

    /// transformers 4 writes `rope_scaling`, 5 writes `rope_parameters`; the older key of the kind is `type`.
    fn refuse_rope_scaling(&self) -> Result<()> {
        for field in ["rope_scaling", "rope_parameters"] {
            let Some(rope) = self.get(field) else { continue };
            let kind = rope.get("rope_type").or_else(|| rope.get("type"));
            let partial = rope.get("partial_rotary_factor").and_then(Value::as_f64).unwrap_or(1.0);
            if kind.is_some_and(|kind| kind != "default") || partial != 1.0 || !rope.is_object() {
                return Err(self.error(field, "this trainer runs plain rotary embeddings (\"default\") only"));
            }
        }
        if self.number("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
            return Err(self.error("partial_rotary_factor", "this trainer runs whole rotary embeddings only"));
        }
        Ok(())
    }

    fn rope_theta(&self) -> Result<f64> {
        let inside = self.get("rope_parameters").and_then(|rope| rope.get("rope_theta"));
        match inside {
            Some(theta) => theta
                .as_f64()
                .filter(|&theta| theta > 0.0)
                .ok_or_else(|| self.error("rope_parameters", "its rope_theta must be a positive number")),
            None => Ok(self.number("rope_theta")?.unwrap_or(10_000.0)),
        }
    }

    fn head_dim(&self, hidden: u32, heads: u32) -> Result<u32> {
        if self.get("head_dim").is_none() && !hidden.is_multiple_of(heads) {
            return Err(
                self.error("head_dim", "hidden_size is no multiple of num_attention_heads, so it is needed")
            );
        }
        let head_dim = self.count("head_dim", Some((hidden / heads).max(1)))?;
        if head_dim.is_multiple_of(2) {
            return Ok(head_dim);
        }
        Err(self.error("head_dim", &format!("a head of width {head_dim} cannot be rotated: it must be even")))
    }

    fn token_ids(&self) -> Result<TokenIds> {
        let id = |field: &str, value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| self.error(field, "it must be a token id"))
        };
        let bos = self.get("bos_token_id").map(|value| id("bos_token_id", value)).transpose()?;
        let eos = match self.get("eos_token_id") {
            None => Vec::new(),
            Some(Value::Array(several)) => {
                several.iter().map(|value| id("eos_token_id", value)).collect::<Result<_>>()?
            }
            Some(value) => vec![id("eos_token_id", value)?],
        };
        Ok(TokenIds { bos, eos })
    }
}

//! Text to token ids and back: a Hugging Face `tokenizer.json`, and what a checkpoint folder needs beside it.

use serde_json::{Value, json};
use tokenizers::models::ModelWrapper;

/// Tokens that usually end a document, the most usual first.
const USUAL_SEPARATORS: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>"];

/// Words whose tokens a thread remembers; English text has about 100,000 different words in 50 MB.
const REMEMBERED_WORDS: usize = 1 << 17;

/// What is wrong with a tokenizer.
#[derive(thiserror::Error, Debug)]
pub enum TokenizerError {
    /// The file is no tokenizer.
    #[error(
        "not a Hugging Face tokenizer.json: {reason}; write one with `tokenizer.save_pretrained(...)` of a fast tokenizer"
    )]
    Unreadable {
        /// What the parser said.
        reason: String,
    },
    /// The separator that the job names is no token.
    #[error(
        "spec.data.documentSeparator: the tokenizer has no token {token:?}; name a token of its vocabulary, or add it there"
    )]
    UnknownSeparator {
        /// The token as written.
        token: String,
    },
    /// No usual separator is in the vocabulary.
    #[error(
        "spec.data.documentSeparator: the tokenizer has none of {}; name the token that ends a document",
        USUAL_SEPARATORS.join(", ")
    )]
    NoSeparator,
    /// The model cannot express the text.
    #[error("the tokenizer cannot encode a text: {reason}; a byte-level tokenizer encodes every text")]
    Encode {
        /// What the model said.
        reason: String,
    },
    /// Ids that are no text.
    #[error("the tokenizer cannot decode {count} tokens: {reason}")]
    Decode {
        /// How many tokens.
        count: usize,
        /// What the decoder said.
        reason: String,
    },
}

/// Result of a tokenizer operation.
pub type Result<T> = std::result::Result<T, TokenizerError>;

/// A tokenizer and its document separator.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: String,
    separator: u32,
    separator_token: String,
    splits_at_newlines: bool,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`; without a named separator the first usual one in the vocabulary is taken.
    ///
    /// # Errors
    /// When the text is no tokenizer, or the separator is not one of its tokens.
    pub fn from_json(json: &str, separator: Option<&str>) -> Result<Self> {
        let unreadable = |reason: String| TokenizerError::Unreadable { reason };
        let value: Value = serde_json::from_str(json).map_err(|error| unreadable(error.to_string()))?;
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|error| unreadable(error.to_string()))?;
        // A document is encoded whole: nothing is cut off, padded or, by dropout, left to chance.
        inner.with_truncation(None).map_err(|error| unreadable(error.to_string()))?;
        inner.with_padding(None);
        prepare_model(&mut inner);
        let (separator_token, separator) = find_separator(&inner, separator)?;
        let splits_at_newlines = splits_at_newlines(&value);
        Ok(Self { inner, json: json.to_owned(), separator, separator_token, splits_at_newlines })
    }

    /// The ids of a text, without tokens that a template would add.
    ///
    /// # Errors
    /// When the model cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self.inner.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(TokenizerError::Encode { reason: error.to_string() }),
        }
    }

    /// The text of ids, special tokens included.
    ///
    /// # Errors
    /// When the decoder refuses the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let decoded = self.inner.decode(ids, false);
        decoded.map_err(|error| TokenizerError::Decode { count: ids.len(), reason: error.to_string() })
    }

    /// Rows of an embedding that has one for every id.
    pub fn vocab_size(&self) -> u32 {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id + 1)
    }

    /// Id of the token that follows every document.
    pub fn separator(&self) -> u32 {
        self.separator
    }

    /// The token that follows every document.
    pub fn separator_token(&self) -> &str {
        &self.separator_token
    }

    /// The `tokenizer.json`, byte for byte as it was read.
    pub fn to_json(&self) -> String {
        self.json.clone()
    }

    /// The `tokenizer_config.json` with which `AutoTokenizer` opens a folder.
    pub fn config_json(&self, model_max_length: u64) -> String {
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.separator_token,
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": false,
        });
        format!("{config:#}\n")
    }

    /// Whether a text cut after a lone newline has the tokens of the whole text.
    pub(crate) fn splits_at_newlines(&self) -> bool {
        self.splits_at_newlines
    }
}

fn prepare_model(tokenizer: &mut tokenizers::Tokenizer) {
    if let ModelWrapper::BPE(model) = tokenizer.get_model() {
        let mut model = model.clone();
        model.dropout = None;
        model.resize_cache(REMEMBERED_WORDS);
        tokenizer.with_model(model);
    }
}

fn find_separator(tokenizer: &tokenizers::Tokenizer, named: Option<&str>) -> Result<(String, u32)> {
    let find = |token: &str| tokenizer.token_to_id(token).map(|id| (token.to_owned(), id));
    match named {
        Some(token) => {
            find(token).ok_or_else(|| TokenizerError::UnknownSeparator { token: token.to_owned() })
        }
        None => USUAL_SEPARATORS.into_iter().find_map(find).ok_or(TokenizerError::NoSeparator),
    }
}

/// True for GPT-2's pre-tokenizer, whose expression puts a lone newline between two words by itself. Others are
/// taken as unknown: their texts stay whole as long as memory allows.
fn splits_at_newlines(tokenizer: &Value) -> bool {
    let splitter = &tokenizer["pre_tokenizer"];
    let added = tokenizer["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let plain = |token: &Value| {
        token["lstrip"] != json!(true) && !token["content"].as_str().unwrap_or_default().contains('\n')
    };
    tokenizer["normalizer"].is_null()
        && splitter["type"] == "ByteLevel"
        && splitter["add_prefix_space"] == json!(false)
        && splitter["use_regex"] != json!(false)
        && added.iter().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::bpe;

    fn trained(text: &str, vocab_size: u32) -> String {
        bpe::train(bpe::count_words(text).unwrap(), vocab_size).unwrap()
    }

    #[test]
    fn every_text_comes_back() {
        let tokenizer = Tokenizer::from_json(&trained("the cat sat on the mat, the end", 300), None).unwrap();
        for text in ["", "the cat", "  naïve 漢字 🦀\r\n\t x", "\u{feff}a\u{0}b"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
        assert!(tokenizer.splits_at_newlines());
        assert_eq!(tokenizer.separator(), 0);
        assert_eq!(tokenizer.separator_token(), "<|endoftext|>");
    }

    #[test]
    fn the_separator_is_named_or_usual() {
        let json = trained("a b", 257).replace("<|endoftext|>", "</s>");
        assert_eq!(Tokenizer::from_json(&json, None).unwrap().separator(), 0);
        let named = Tokenizer::from_json(&json, Some("!")).unwrap();
        assert_eq!(named.decode(&[named.separator()]).unwrap(), "!");
        let error = Tokenizer::from_json(&json, Some("<end>")).unwrap_err().to_string();
        assert!(
            error.starts_with("spec.data.documentSeparator: the tokenizer has no token \"<end>\""),
            "{error}"
        );
        let error = Tokenizer::from_json(&json.replace("</s>", "<odd>"), None).unwrap_err().to_string();
        assert!(
            error.contains("spec.data.documentSeparator: the tokenizer has none of <|endoftext|>, </s>"),
            "{error}"
        );
    }

    #[test]
    fn nonsense_is_no_tokenizer() {
        let error = Tokenizer::from_json("{}", None).unwrap_err().to_string();
        assert!(error.starts_with("not a Hugging Face tokenizer.json"), "{error}");
    }

    #[test]
    fn the_configuration_names_the_end() {
        let tokenizer = Tokenizer::from_json(&trained("a", 257), None).unwrap();
        let config: Value = serde_json::from_str(&tokenizer.config_json(2048)).unwrap();
        assert_eq!(config["eos_token"], "<|endoftext|>");
        assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
        assert_eq!(config["model_max_length"], 2048);
    }

    #[test]
    fn other_pre_tokenizers_keep_texts_whole() {
        let json = trained("a", 257).replacen("\"add_prefix_space\":false", "\"add_prefix_space\":true", 1);
        assert!(!Tokenizer::from_json(&json, None).unwrap().splits_at_newlines());
    }
}

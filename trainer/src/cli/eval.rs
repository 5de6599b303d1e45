//! `growth-trainer eval`

use super::{End, Options, print_json};
use anyhow::{Context, ensure};
use growth_crds::spec::data::DataSource;
use growth_trainer::data;
use growth_trainer::inference::{LoadedModel, Loss};
use growth_trainer::storage::{Storage, StorageOptions};
use growth_trainer::tokenizer::Tokenizer;
use safetensors::tensor::{Dtype, TensorView};
use std::path::{Path, PathBuf};

/// Measures the loss of a checkpoint, or any Hugging Face LLaMA folder, on a text.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of the checkpoint
    #[arg(long)]
    checkpoint: String,
    /// Text: a file or a pattern, as in spec.data.train (text, jsonl or parquet, plain, .gz or .zst)
    #[arg(long, required_unless_present = "token_ids")]
    text: Option<String>,
    /// Field or column of jsonl and parquet that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Tokens instead of a text: a JSON list of lists of ids, equally long
    #[arg(long, conflicts_with = "text")]
    token_ids: Option<PathBuf>,
    /// Predictions of one window; each window begins without context. Default: the model's longest sequence
    #[arg(long)]
    sequence_length: Option<usize>,
    /// Read at most this many tokens of the text
    #[arg(long, default_value_t = 1_000_000)]
    max_tokens: usize,
    /// With --token-ids: also write all logits, as safetensors [sequences, length, vocabulary]
    #[arg(long, requires = "token_ids")]
    logits_out: Option<PathBuf>,
}

/// Prints mean loss and perplexity.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let model = LoadedModel::open(&Storage::open(&arguments.checkpoint, &StorageOptions::default())?)?;
    let loss = match &arguments.token_ids {
        Some(path) => token_loss(&model, path, arguments.logits_out.as_deref())?,
        None => text_loss(&model, arguments)?,
    };
    let (mean, perplexity) = (loss.mean, loss.mean.exp());
    if options.json {
        print_json(&serde_json::json!({ "loss": mean, "perplexity": perplexity, "tokens": loss.tokens }))?;
    } else {
        println!("loss {mean:.4} nats per token, perplexity {perplexity:.2}, over {} tokens", loss.tokens);
    }
    Ok(End::Done)
}

fn text_loss(model: &LoadedModel, arguments: &Arguments) -> anyhow::Result<Loss> {
    let json =
        model.tokenizer_json().with_context(|| format!("{} has no tokenizer.json", arguments.checkpoint))?;
    let tokenizer = Tokenizer::from_json(std::str::from_utf8(json)?, None)?;
    let source = DataSource {
        uri: absolute(arguments.text.as_deref().unwrap_or_default()),
        weight: 1.0,
        format: None,
        field: arguments.field.clone(),
        max_bytes: None,
    };
    let ids = data::tokens_of("--text", &source, &tokenizer, arguments.max_tokens)?;
    let longest = model.config().max_position_embeddings as usize;
    Ok(model.loss(&ids, arguments.sequence_length.unwrap_or(longest).clamp(1, longest)))
}

/// A bare path means a file, as in a shell.
pub(super) fn absolute(text: &str) -> String {
    if text.contains("://") { text.to_owned() } else { format!("file://{text}") }
}

fn token_loss(model: &LoadedModel, path: &Path, logits_out: Option<&Path>) -> anyhow::Result<Loss> {
    let sequences: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(path)?)
        .with_context(|| format!("{}: expected a JSON list of lists of token ids", path.display()))?;
    let length = sequences.first().map_or(0, Vec::len);
    ensure!(
        length > 1 && sequences.iter().all(|ids| ids.len() == length),
        "{}: give lists of equal length, of at least two tokens",
        path.display()
    );
    let vocab = model.config().vocab_size;
    let largest = sequences.iter().flatten().max().copied().unwrap_or(0);
    ensure!(largest < vocab, "{}: token id {largest} is outside the vocabulary of {vocab}", path.display());
    let losses: Vec<Loss> = sequences.iter().map(|ids| model.loss(ids, length - 1)).collect();
    if let Some(out) = logits_out {
        let logits: Vec<f32> = sequences.iter().flat_map(|ids| model.logits(ids)).collect();
        let shape = vec![sequences.len(), length, vocab as usize];
        let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(&logits))?;
        safetensors::serialize_to_file([("logits", view)], None, out)?;
    }
    let mean = losses.iter().map(|loss| loss.mean).sum::<f64>() / losses.len() as f64;
    Ok(Loss { mean, tokens: losses.iter().map(|loss| loss.tokens).sum() })
}

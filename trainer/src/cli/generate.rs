//! `growth-trainer generate`

use super::{End, Options, print_json};
use anyhow::Context;
use growth_trainer::inference::{LoadedModel, Sampling};
use growth_trainer::storage::{Storage, StorageOptions};
use growth_trainer::tokenizer::Tokenizer;

/// Continues a text with a checkpoint, or any Hugging Face LLaMA folder that has a tokenizer.json.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of the checkpoint
    #[arg(long)]
    checkpoint: String,
    /// Text to continue
    #[arg(long, default_value = "")]
    prompt: String,
    /// Tokens to add at most
    #[arg(long, default_value_t = 100)]
    tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Draw from this many of the likeliest tokens; 0 for all
    #[arg(long, default_value_t = 40)]
    top_k: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Prints the continued text.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let model = LoadedModel::open(&Storage::open(&arguments.checkpoint, &StorageOptions::default())?)?;
    let json =
        model.tokenizer_json().with_context(|| format!("{} has no tokenizer.json", arguments.checkpoint))?;
    let tokenizer = Tokenizer::from_json(std::str::from_utf8(json)?, None)?;
    let mut prompt = tokenizer.encode(&arguments.prompt)?;
    if prompt.is_empty() {
        prompt.push(tokenizer.separator());
    }
    let Arguments { temperature, top_k, seed, .. } = *arguments;
    let sampling = Sampling { temperature, top_k, seed };
    let ids = model.generate(&prompt, arguments.tokens, Some(tokenizer.separator()), sampling);
    let text = tokenizer.decode(&ids)?;
    if options.json {
        print_json(&serde_json::json!({ "prompt": arguments.prompt, "text": text, "tokens": ids.len() }))?;
    } else {
        println!("{}{text}", arguments.prompt);
    }
    Ok(End::Done)
}

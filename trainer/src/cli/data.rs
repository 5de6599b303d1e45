//! `growth-trainer data`

use super::{End, Options, end_at_sigterm, load_job, plan::find_stage, print_json};
use growth_crds::protocol::Outcome;
use growth_trainer::job_file::LoadedJob;
use growth_trainer::progress::{self, bytes, count};
use growth_trainer::storage::Storage;
use growth_trainer::training::stage::{status_of, training_order};
use growth_trainer::{checkpoint, job};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What to do with data.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Read the sources, train the tokenizer if the job asks for it, and write token shards; done once
    Prepare {
        /// Manifest of the job
        job: PathBuf,
    },
    /// Write the tokens that a stage trains on, step by step, as safetensors: inputs and targets, int32
    /// [steps, sequences, sequence length]
    Batches {
        /// Manifest of the job
        job: PathBuf,
        /// Name of the stage
        #[arg(long)]
        stage: String,
        /// Steps to write. Default: all of the stage
        #[arg(long)]
        steps: Option<u64>,
        /// File to write
        #[arg(long)]
        out: PathBuf,
    },
}

/// Prepares data or writes batches.
pub fn run(command: &Command, options: &Options) -> anyhow::Result<End> {
    match command {
        Command::Prepare { job } => prepare(job, options),
        Command::Batches { job, stage, steps, out } => batches(job, stage, *steps, out, options),
    }
}

/// The newest attempt of every stage that the storage knows.
fn attempts(loaded: &LoadedJob, storage: &Storage) -> anyhow::Result<BTreeMap<String, i32>> {
    let mut attempts = BTreeMap::new();
    for plan in &loaded.plan.stages {
        let newest = checkpoint::next_attempt(storage, &plan.job, &plan.stage)? - 1;
        attempts.insert(plan.stage.clone(), i32::try_from(newest)?);
    }
    Ok(attempts)
}

fn prepare(path: &std::path::Path, options: &Options) -> anyhow::Result<End> {
    // What is prepared again is the same.
    end_at_sigterm()?;
    let loaded = load_job(path)?;
    let storage = job::open_storage(&loaded.job.spec.storage)?;
    let mut reporter = options.reporter();
    let base = job::take_base(&loaded.plan, &storage, &reporter)?;
    let dataset = job::prepare_data(&loaded.plan, &storage, &mut reporter)?;
    drop(reporter);
    let checkpoint = base.map(|manifest| status_of(&storage, &manifest));
    options.report(&Outcome { attempts: attempts(&loaded, &storage)?, ..Outcome::finished(checkpoint) })?;
    if options.json {
        print_json(
            &serde_json::json!({ "digest": dataset.digest(), "parts": dataset.parts().collect::<Vec<_>>() }),
        )?;
        return Ok(End::Done);
    }
    let titles = ["PART", "DOCUMENTS", "TEXT", "TOKENS", "BYTES/TOKEN", "SKIPPED"];
    let rows = dataset.parts().map(|part| {
        [
            part.uri.clone(),
            part.documents.to_string(),
            bytes(part.bytes),
            count(part.tokens as f64),
            format!("{:.2}", part.bytes as f64 / part.tokens.max(1) as f64),
            part.skipped.to_string(),
        ]
    });
    let table = progress::table(titles, 1, rows);
    println!("{table}\n\nvocabulary {}, dataset {}", dataset.tokenizer().vocab_size(), dataset.digest());
    Ok(End::Done)
}

fn batches(
    path: &std::path::Path,
    stage: &str,
    steps: Option<u64>,
    out: &std::path::Path,
    options: &Options,
) -> anyhow::Result<End> {
    let loaded = load_job(path)?;
    let storage = job::open_storage(&loaded.job.spec.storage)?;
    let dataset = job::prepare_data(&loaded.plan, &storage, &mut options.reporter())?;
    let plan = find_stage(&loaded.plan, stage)?;
    let training = &plan.training;
    let steps = steps.unwrap_or(plan.steps).min(plan.steps) as usize;
    let (batch, sequence) = (training.global_batch_tokens as usize, training.sequence_length as usize);
    let order = training_order(plan, &dataset)?;
    let (mut inputs, mut targets) = (vec![0u32; steps * batch], vec![0u32; steps * batch]);
    let first_sample = plan.first_token / sequence as u64;
    dataset.batch(&order, first_sample, &mut inputs, &mut targets)?;
    let shape = vec![steps, batch / sequence, sequence];
    // Token ids fit an int32, and as one they have the same bits.
    let tensors = [
        ("inputs", TensorView::new(Dtype::I32, shape.clone(), bytemuck::cast_slice(&inputs))?),
        ("targets", TensorView::new(Dtype::I32, shape.clone(), bytemuck::cast_slice(&targets))?),
    ];
    safetensors::serialize_to_file(tensors, None, out)?;
    Ok(End::Done)
}

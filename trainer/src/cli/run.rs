//! `growth-trainer run`

use super::{End, Options, load_job, report, stop_flag};
use growth_trainer::inference::{LoadedModel, Sampling};
use growth_trainer::job::{self, JobEnd};
use growth_trainer::job_file::LoadedJob;
use growth_trainer::storage::Storage;
use growth_trainer::tokenizer::Tokenizer;
use std::path::PathBuf;

/// Tokens of the validation text that the sample begins with.
const PROMPT_TOKENS: usize = 16;
/// Tokens that the sample adds.
const SAMPLE_TOKENS: usize = 80;

/// Runs every step of a job in this process: prepares the data, trains the first stage, grows it, trains the next.
///
/// Everything lies below spec.storage.uri: prepared data, checkpoints, the report. Ctrl-C finishes the current step,
/// writes a checkpoint and ends with exit code 130; the same command goes on from there. So it does after a crash,
/// from the last checkpoint, and ends in the same bits.
///
/// A stage of several replicas trains in as many processes, which share the threads of this machine.
#[derive(clap::Args)]
pub struct Arguments {
    /// Manifest of the job
    job: PathBuf,
    /// Processes that train each stage together; the bits do not depend on it. Default: the stage's replicas
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=4096))]
    ranks: Option<u64>,
}

/// Runs the job and shows what came out.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let loaded = load_job(&arguments.job)?;
    let stop = stop_flag()?;
    let mut reporter = options.reporter();
    let ranks = arguments.ranks.and_then(|ranks| usize::try_from(ranks).ok());
    let end = job::run(&loaded, ranks, &stop, &mut reporter)?;
    drop(reporter);
    let storage = job::open_storage(&loaded.job.spec.storage)?;
    match end {
        JobEnd::Stopped => {
            eprintln!("stopped; the same command goes on from the last checkpoint");
            Ok(End::Stopped)
        }
        JobEnd::AlreadyFinished => {
            eprintln!("{} is finished already; nothing to do", loaded.plan.job);
            report::show(&loaded.plan, &storage, options)?;
            Ok(End::Done)
        }
        JobEnd::Finished => {
            finish(&loaded, &storage, options)?;
            Ok(End::Done)
        }
    }
}

fn finish(loaded: &LoadedJob, storage: &Storage, options: &Options) -> anyhow::Result<()> {
    let stages = report::show(&loaded.plan, storage, options)?;
    if options.json {
        return Ok(());
    }
    if let Some(checkpoint) = stages.last().and_then(|stage| stage.checkpoint.as_ref()) {
        print_sample(loaded, storage, checkpoint)?;
    }
    Ok(())
}

/// A few lines that the trained model writes after the beginning of a validation text.
fn print_sample(loaded: &LoadedJob, storage: &Storage, checkpoint: &str) -> anyhow::Result<()> {
    let model =
        LoadedModel::open(&Storage::open(checkpoint, &job::storage_options(&loaded.job.spec.storage))?)?;
    let Some(json) = model.tokenizer_json() else { return Ok(()) };
    let separator = loaded.job.spec.data.document_separator.as_deref();
    let tokenizer = Tokenizer::from_json(std::str::from_utf8(json)?, separator)?;
    let prompt = prompt(loaded, storage)?;
    let sampling = Sampling { temperature: 0.8, top_k: 40, seed: 0 };
    let continuation = model.generate(&prompt, SAMPLE_TOKENS, Some(tokenizer.separator()), sampling);
    println!("\nThe model continues a text that it has not seen:\n");
    println!("{}\u{2502}{}", tokenizer.decode(&prompt)?, tokenizer.decode(&continuation)?);
    println!("\nLet it write more: growth-trainer generate --checkpoint {checkpoint} --prompt '...'");
    Ok(())
}

fn prompt(loaded: &LoadedJob, storage: &Storage) -> anyhow::Result<Vec<u32>> {
    let mut reporter = growth_trainer::progress::Reporter::quiet();
    let dataset = job::prepare_data(&loaded.plan, storage, &mut reporter)?;
    let (ids, _) = dataset.validation_tokens(loaded.job.spec.training.sequence_length as usize, 1)?;
    Ok(ids.into_iter().take(PROMPT_TOKENS).collect())
}

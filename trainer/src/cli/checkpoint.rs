//! `growth-trainer checkpoint`

use super::{End, Options, load_job, print_json};
use growth_trainer::checkpoint::{self, Commit, HuggingFaceFolder};
use growth_trainer::job;
use growth_trainer::progress::{self, bytes, count};
use growth_trainer::storage::{Storage, StorageOptions};
use std::path::PathBuf;

/// What to do with checkpoints.
#[derive(clap::Subcommand)]
pub enum Command {
    /// List the checkpoints of a job
    Ls {
        /// Manifest of the job
        job: PathBuf,
    },
    /// Read every object of a checkpoint and compare it with the manifest; exit code 1 when something is wrong
    Verify {
        /// Folder of the checkpoint
        uri: String,
    },
}

/// Lists or verifies.
pub fn run(command: &Command, options: &Options) -> anyhow::Result<End> {
    match command {
        Command::Ls { job } => list(job, options),
        Command::Verify { uri } => verify(uri, options),
    }
}

fn list(path: &std::path::Path, options: &Options) -> anyhow::Result<End> {
    let loaded = load_job(path)?;
    let storage = job::open_storage(&loaded.job.spec.storage)?;
    let mut rows = Vec::new();
    for stage in &loaded.plan.stages {
        for found in checkpoint::list(&storage, &stage.job, &stage.stage)? {
            let size: u64 = found
                .committed()
                .map_or(0, |manifest| manifest.objects.iter().map(|object| object.bytes).sum());
            rows.push(serde_json::json!({
                "stage": stage.stage,
                "step": found.step,
                "attempt": found.attempt,
                "state": match &found.commit {
                    Commit::Yes(_) => "committed".to_owned(),
                    Commit::No => "unfinished".to_owned(),
                    Commit::Damaged(problem) => format!("damaged: {problem}"),
                },
                "tokens": found.committed().map(|manifest| manifest.tokens),
                "bytes": size,
                "committedAt": found.committed().map(|manifest| manifest.committed_at.to_string()),
                "uri": checkpoint::stage_folder(&storage, &stage.job, &stage.stage).uri_of(&found.name()),
            }));
        }
    }
    if options.json {
        print_json(&rows)?;
        return Ok(End::Done);
    }
    let titles = ["STAGE", "STEP", "ATTEMPT", "STATE", "TOKENS", "SIZE", "COMMITTED", "URI"];
    let cells = rows.iter().map(|row| {
        let text = |name: &str| row[name].as_str().map_or_else(|| row[name].to_string(), ToOwned::to_owned);
        let number = |name: &str| row[name].as_u64().unwrap_or(0);
        [
            text("stage"),
            text("step"),
            text("attempt"),
            text("state"),
            count(number("tokens") as f64),
            bytes(number("bytes")),
            text("committedAt"),
            text("uri"),
        ]
    });
    println!("{}", progress::table(titles, titles.len(), cells));
    Ok(End::Done)
}

fn verify(uri: &str, options: &Options) -> anyhow::Result<End> {
    let folder = Storage::open(uri, &StorageOptions::default())?;
    let opened = HuggingFaceFolder::open(&folder)?;
    let Some(manifest) = opened.manifest() else {
        anyhow::bail!(
            "{uri} has no manifest.json: it is not committed, or not a checkpoint of growth-trainer"
        );
    };
    let problems = checkpoint::verify(&folder, manifest)?;
    if options.json {
        let problems: Vec<String> =
            problems.iter().map(|problem| format!("{}: {}", problem.uri, problem.problem)).collect();
        print_json(&serde_json::json!({ "digest": manifest.digest, "problems": problems }))?;
    } else if problems.is_empty() {
        println!(
            "{uri} is good: {} objects, step {}, state {}",
            manifest.objects.len(),
            manifest.step,
            manifest.digest
        );
    } else {
        for problem in &problems {
            println!("{}: {}", problem.uri, problem.problem);
        }
    }
    Ok(if problems.is_empty() { End::Done } else { End::Failed })
}

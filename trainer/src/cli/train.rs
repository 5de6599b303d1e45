//! `growth-trainer train`

use super::{End, Options, print_json, stop_flag};
use anyhow::Context;
use growth_crds::plan::{JobPlan, StagePlan};
use growth_crds::protocol::{Outcome, contract};
use growth_trainer::training::board::ProgressBoard;
use growth_trainer::training::stage::{self, StageEnd, StageInputs, TrainError};
use growth_trainer::{job, server};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Trains one stage from a plan file (`growth-trainer plan job.yaml --stage NAME -o plan.json`), from its newest
/// checkpoint to its last token. This is what a trainer pod runs. SIGTERM finishes the current step, writes a
/// checkpoint and ends with exit code 0.
#[derive(clap::Args)]
pub struct Arguments {
    /// Plan file of the stage
    plan: PathBuf,
    /// Number of this attempt, from 1: it must not commit once a higher one has. Default: one more than the storage has
    /// seen
    #[arg(long, env = contract::ENV_ATTEMPT, value_parser = clap::value_parser!(u32).range(1..))]
    attempt: Option<u32>,
    /// Pods that train this stage together
    #[arg(long, env = contract::ENV_REPLICAS, default_value_t = 1)]
    replicas: u32,
    /// Serve /progress (JSON), /metrics (Prometheus) and /healthz here, for example 0.0.0.0:8080
    #[arg(long, env = contract::ENV_LISTEN, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
}

/// Trains the stage and prints the manifest of its last checkpoint.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let plan = read_plan(&arguments.plan)?;
    let (index, replicas) = (plan.index, arguments.replicas);
    if replicas > 1 {
        return Err(TrainError::Replicas { index, replicas }.into());
    }
    let stop = stop_flag()?;
    let storage = job::open_storage(&plan.storage)?;
    let mut reporter = options.reporter();
    let board = Arc::new(ProgressBoard::default());
    if let Some(address) = arguments.listen {
        server::start(address, board.clone()).with_context(|| format!("--listen {address}"))?;
    }
    let of_job = JobPlan { job: plan.job.clone(), stages: vec![plan.clone()], notes: Vec::new() };
    let dataset = job::prepare_data(&of_job, &storage, &mut reporter)?;
    let attempt = arguments.attempt;
    let inputs = StageInputs {
        plan: &plan,
        storage: &storage,
        dataset: &dataset,
        stop: &stop,
        attempt,
        board: &board,
    };
    let end = stage::train(&inputs, &mut reporter)?;
    drop(reporter);
    let (manifest, outcome) = match end {
        StageEnd::Finished(manifest) => {
            let status = stage::status_of(&storage, &manifest);
            (manifest, Outcome::finished(Some(status)))
        }
        StageEnd::Stopped(manifest) => {
            let status = stage::status_of(&storage, &manifest);
            (manifest, Outcome::stopped(status))
        }
    };
    options.report(&outcome)?;
    if options.json {
        print_json(&manifest)?;
    } else {
        let folder = growth_trainer::checkpoint::checkpoint_folder(&storage, &manifest);
        println!("step {} of {}: {}", manifest.step, plan.steps, folder.uri());
    }
    Ok(End::Done)
}

/// Reads a plan file.
pub fn read_plan(path: &Path) -> anyhow::Result<StagePlan> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is not a plan file; write one with growth-trainer plan JOB --stage NAME -o FILE",
            path.display()
        )
    })
}

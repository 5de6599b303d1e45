//! `growth-trainer train`

use super::{End, Options, print_json, stop_flag};
use anyhow::Context;
use growth_crds::plan::{JobPlan, StagePlan};
use growth_trainer::job;
use growth_trainer::training::stage::{self, StageEnd, StageInputs};
use std::path::{Path, PathBuf};

/// Trains one stage from a plan file (`growth-trainer plan job.yaml --stage NAME -o plan.json`), from its newest
/// checkpoint to its last token. This is what a trainer pod runs. SIGTERM finishes the current step, writes a
/// checkpoint and ends with exit code 0.
#[derive(clap::Args)]
pub struct Arguments {
    /// Plan file of the stage
    plan: PathBuf,
}

/// Trains the stage and prints the manifest of its last checkpoint.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let plan = read_plan(&arguments.plan)?;
    let stop = stop_flag()?;
    let storage = job::open_storage(&plan.storage)?;
    let mut reporter = options.reporter();
    let of_job = JobPlan { job: plan.job.clone(), stages: vec![plan.clone()], notes: Vec::new() };
    let dataset = job::prepare_data(&of_job, &storage, &mut reporter)?;
    let inputs = StageInputs { plan: &plan, storage: &storage, dataset: &dataset, stop: &stop };
    let (StageEnd::Finished(manifest) | StageEnd::Stopped(manifest)) = stage::train(&inputs, &mut reporter)?;
    drop(reporter);
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

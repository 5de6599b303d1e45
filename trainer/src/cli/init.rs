//! `growth-trainer init`

use super::{End, Options, load_job, plan::find_stage, print_json};
use anyhow::bail;
use growth_crds::plan::StageStart;
use growth_trainer::checkpoint::{CheckpointLocation, CheckpointWriter, TokenIds, TrainingState};
use growth_trainer::model::initializer::initialize;
use growth_trainer::model::layout::ParameterLayout;
use growth_trainer::storage::{Storage, StorageOptions};
use std::path::PathBuf;

/// Writes the random weights that a stage starts from as a Hugging Face folder: the same bits that training starts
/// from, for a comparison with another trainer.
#[derive(clap::Args)]
pub struct Arguments {
    /// Manifest of the job
    job: PathBuf,
    /// Name of the stage
    #[arg(long)]
    stage: String,
    /// Folder to write
    #[arg(long)]
    out: String,
}

/// Writes the folder.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let loaded = load_job(&arguments.job)?;
    let plan = find_stage(&loaded.plan, &arguments.stage)?;
    let StageStart::Random { initializer } = &plan.start else {
        bail!("stage {} does not start from random weights", plan.stage)
    };
    let layout = ParameterLayout::new(&plan.model);
    let parameters = initialize(&plan.model, *initializer, plan.training.seed);
    let state = TrainingState {
        parameters,
        exp_avg: Vec::new(),
        exp_avg_sq: Vec::new(),
        ..TrainingState::zeros(&layout)
    };
    let folder = Storage::open(&arguments.out, &StorageOptions::default())?;
    let location = CheckpointLocation {
        storage: folder.clone(),
        job: plan.job.clone(),
        stage: plan.stage.clone(),
        attempt: 0,
    };
    CheckpointWriter::new(location, plan.model.clone(), TokenIds::default(), Vec::new())
        .export(&folder, &state)?;
    if options.json {
        print_json(&serde_json::json!({ "uri": folder.uri() }))?;
    } else {
        println!("{}", folder.uri());
    }
    Ok(End::Done)
}

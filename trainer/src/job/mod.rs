//! A whole job on one machine: the walk over data, stages and growth steps that the operator does on a cluster, in
//! this process, over the same storage.

mod base;
pub mod gang;
mod growing;
mod record;

use crate::checkpoint;
use crate::collective::{Alone, CollectiveError};
use crate::data::{self, Dataset, Verification};
use crate::growth;
use crate::job_file::{LoadedJob, Problem};
use crate::progress::{Reporter, Unit};
use crate::report::{Goodput, GrowthReport, StageReport};
use crate::storage::{Storage, StorageOptions};
use crate::training::attempt;
use crate::training::board::ProgressBoard;
use crate::training::history::History;
use crate::training::stage::{self, StageEnd, StageInputs, TrainError, read_history};
use growth_crds::GrowthTrainingJob;
use growth_crds::plan::{GrowthPlan, JobPlan, StagePlan, StageStart, ranks};
use growth_crds::protocol::{CheckpointManifest, GROWTH_RECORD_FILE, GrowthRecord};
use growth_crds::spec::storage::StorageSpec;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use base::take_base;
pub use growing::{GrowthReporter, GrowthStep, grow_checkpoint};
use record::pin_dataset;
pub use record::{JobRecord, agree_on_dataset, pinned_dataset};

/// Why a job stopped.
#[derive(thiserror::Error, Debug)]
pub enum JobError {
    /// Storage.
    #[error(transparent)]
    Storage(#[from] crate::storage::StorageError),
    /// Data.
    #[error(transparent)]
    Data(#[from] data::DataError),
    /// Checkpoints.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Growth.
    #[error(transparent)]
    Growth(#[from] growth::GrowthError),
    /// The storage holds another job of this name, or one that may not change so.
    #[error("{uri} holds this job already, and {}", describe(.problems))]
    Changed {
        /// The job's record.
        uri: String,
        /// What may not change.
        problems: Vec<Problem>,
    },
    /// The processes of a stage could not be started.
    #[error("the {ranks} ranks of stage {stage} could not be started: {problem}")]
    Ranks {
        /// The stage.
        stage: String,
        /// Their number.
        ranks: usize,
        /// Why.
        problem: String,
    },
    /// The job that is to train the first stage has not done so.
    #[error(
        "spec.stages[0].trainedBy: job {job} has not trained its stage {stage} to the end in {storage}; run that job \
         first, or remove trainedBy"
    )]
    NotTrained {
        /// The other job.
        job: String,
        /// Its stage.
        stage: String,
        /// Where it was looked for.
        storage: String,
    },
    /// It has trained another one.
    #[error("{0}")]
    OtherStage(String),
    /// A record of the job cannot be read.
    #[error("{uri} cannot be read: {reason}; restore it, or name the job differently")]
    Record {
        /// The record.
        uri: String,
        /// Why.
        reason: String,
    },
}

impl JobError {
    /// Whether the job or its files are at fault, so that trying again cannot help.
    pub fn is_input_error(&self) -> bool {
        match self {
            Self::Storage(error) => matches!(error, crate::storage::StorageError::Address { .. }),
            Self::Data(error) => error.is_input_error(),
            Self::Checkpoint(error) => error.is_input_error(),
            Self::Train(error) => error.is_input_error(),
            Self::Growth(error) => error.is_input_error(),
            Self::Changed { .. } | Self::NotTrained { .. } | Self::OtherStage(_) => true,
            Self::Record { .. } | Self::Ranks { .. } => false,
        }
    }

    /// Whether a growth step was asked to stop and can go on.
    pub fn is_stopped(&self) -> bool {
        matches!(self, Self::Growth(growth::GrowthError::Learn(growth::LearnError::Stopped { .. })))
    }

    /// Whether the ranks have not met.
    fn is_rendezvous(&self) -> bool {
        matches!(self, Self::Train(TrainError::Collective(CollectiveError::Rendezvous { .. })))
    }

    /// Whether this process only ends because another rank did.
    pub fn is_peer_lost(&self) -> bool {
        matches!(self, Self::Train(error) if error.is_peer_lost())
    }
}

fn describe(problems: &[Problem]) -> String {
    let texts: Vec<String> = problems
        .iter()
        .map(|problem| format!("{} may not change: {}", problem.field, problem.message))
        .collect();
    texts.join("; ")
}

/// Result of a job step.
pub type Result<T> = std::result::Result<T, JobError>;

/// How a run of a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEnd {
    /// Every stage is trained.
    Finished,
    /// Every stage had been trained before: nothing was done.
    AlreadyFinished,
    /// It was asked to stop, and the next run goes on from there.
    Stopped,
}

/// Opens the storage of a job.
///
/// # Errors
/// When the address cannot be understood.
pub fn open_storage(spec: &StorageSpec) -> Result<Storage> {
    Ok(Storage::open(&spec.uri, &storage_options(spec))?)
}

/// How sources and storage are reached.
pub fn storage_options(spec: &StorageSpec) -> StorageOptions {
    StorageOptions { endpoint: spec.endpoint.clone(), region: spec.region.clone() }
}

/// Runs a job to its end, or goes on where an earlier run stopped. A stage of several replicas trains in as many
/// processes; `ranks` is their number for every stage, where the job's own is not wanted.
///
/// # Errors
/// Whatever stops it; everything committed before stays good.
pub fn run(
    loaded: &LoadedJob,
    ranks: Option<usize>,
    stop: &AtomicBool,
    reporter: &mut Reporter,
) -> Result<JobEnd> {
    let plan = &loaded.plan;
    let storage = open_storage(&loaded.job.spec.storage)?;
    JobRecord::check_and_store(&storage, &loaded.job)?;
    for note in &plan.notes {
        reporter.note(&format!("note: {note}"));
    }
    if let Some(last) = plan.stages.last()
        && finished(&storage, last, reporter)?.is_some()
    {
        return Ok(JobEnd::AlreadyFinished);
    }
    take_base(plan, &storage, reporter)?;
    let dataset = prepare_data(plan, &storage, reporter)?;
    for (index, stage) in plan.stages.iter().enumerate() {
        if finished(&storage, stage, reporter)?.is_some() {
            continue;
        }
        if let (StageStart::Growth(growth), Some(before)) = (&stage.start, index.checked_sub(1)) {
            let before = &plan.stages[before];
            match grow(&storage, before, (stage, growth), &dataset, stop, reporter) {
                Err(error) if error.is_stopped() => return Ok(JobEnd::Stopped),
                grown => grown?,
            }
        }
        let ranks = ranks.unwrap_or_else(|| ranks_of(&loaded.job, stage));
        let board = ProgressBoard::default();
        let attempt = Some(checkpoint::next_attempt(&storage, &stage.job, &stage.stage)?);
        let (dataset, storage) = (&dataset, &storage);
        let began = Instant::now();
        let inputs = StageInputs { plan: stage, storage, dataset, stop, attempt, began, board: &board };
        let end = match ranks {
            1 => stage::train(&inputs, &mut Alone, reporter)?,
            _ => match gang::train_in_processes(&inputs, ranks, reporter) {
                Err(error) if error.is_rendezvous() && stop.load(Ordering::Relaxed) => {
                    return Ok(JobEnd::Stopped);
                }
                end => end?,
            },
        };
        if let StageEnd::Stopped(_) = end {
            return Ok(JobEnd::Stopped);
        }
    }
    Ok(JobEnd::Finished)
}

/// The number of ranks that the job wants for a stage.
fn ranks_of(job: &GrowthTrainingJob, plan: &StagePlan) -> usize {
    let Some(stage) = job.spec.stages.get(plan.index as usize) else { return 1 };
    let size = ranks::wanted_size(&ranks::stage_sizes(stage, &plan.training), job.spec.replicas);
    usize::try_from(size).unwrap_or(1)
}

/// Whether a stage has a checkpoint of its last step. [`finished`] finds out whether that is good, and reads every byte
/// for it.
///
/// # Errors
/// When the storage does not answer.
pub fn seems_finished(storage: &Storage, stage: &StagePlan) -> Result<bool> {
    let found = checkpoint::list(storage, &stage.job, &stage.stage)?;
    Ok(found.iter().any(|found| found.committed().is_some_and(|manifest| manifest.step >= stage.steps)))
}

/// The last checkpoint of a stage that has trained all its tokens.
///
/// # Errors
/// When the storage does not answer.
pub fn finished(
    storage: &Storage,
    stage: &StagePlan,
    reporter: &Reporter,
) -> Result<Option<CheckpointManifest>> {
    if !seems_finished(storage, stage)? {
        return Ok(None);
    }
    let mut warn = |text: String| reporter.note(&format!("warning: {text}"));
    let newest = checkpoint::latest_valid(storage, &stage.job, &stage.stage, &mut warn)?;
    Ok(newest.filter(|manifest| manifest.step >= stage.steps))
}

/// The job's prepared data: the dataset that an earlier run pinned, or one prepared now. Once pinned, changed
/// source files change nothing for this job. Its content was verified before it was pinned; a start after that checks
/// sizes only, for it must not take longer the more data there is.
///
/// # Errors
/// When sources or storage cannot be read.
pub fn prepare_data(plan: &JobPlan, storage: &Storage, reporter: &mut Reporter) -> Result<Dataset> {
    let Some(first) = plan.stages.first() else {
        return Err(JobError::Record { uri: plan.job.clone(), reason: "the job has no stages".to_owned() });
    };
    prepare_data_of_stage(first, storage, reporter)
}

/// [`prepare_data`] for who knows one stage only: all stages of a job have the same data.
///
/// # Errors
/// When sources or storage cannot be read.
pub fn prepare_data_of_stage(
    plan: &StagePlan,
    storage: &Storage,
    reporter: &mut Reporter,
) -> Result<Dataset> {
    if let Some(digest) = pinned_dataset(storage, &plan.job)? {
        return Ok(Dataset::open(storage, &digest, Verification::Sizes)?);
    }
    reporter.begin("data", Unit::Bytes, 0, 0);
    let shown = RefCell::new(&mut *reporter);
    let dataset =
        data::prepare(&plan.data, storage, &storage_options(&plan.storage), plan.training.seed, &|p| {
            shown.borrow_mut().advance(p.bytes_done, p.bytes_total, p.phase.to_string());
        })?;
    reporter.finish();
    pin_dataset(storage, &plan.job, dataset.digest())?;
    Ok(dataset)
}

/// The job's data, to compare models on: that it cannot be had is no reason not to grow.
pub fn held_out(storage: &Storage, job: &str) -> Option<Dataset> {
    Dataset::open(storage, &pinned_dataset(storage, job).ok()??, Verification::Sizes).ok()
}

/// Makes the first checkpoint of `stage` from the last one of `before`, unless it is there.
fn grow(
    storage: &Storage,
    before: &StagePlan,
    (stage, growth): (&StagePlan, &GrowthPlan),
    dataset: &Dataset,
    stop: &AtomicBool,
    reporter: &mut Reporter,
) -> Result<()> {
    if checkpoint::list(storage, &stage.job, &stage.stage)?.iter().any(|found| found.committed().is_some()) {
        return Ok(());
    }
    let Some(source) = finished(storage, before, reporter)? else {
        let (stage, from) = (stage.stage.clone(), before.stage.clone());
        return Err(TrainError::NotGrown { stage, from }.into());
    };
    let (expected, dataset, stop) = (Some(&before.model), Some(dataset), Some(stop));
    let step = GrowthStep { source: &source, expected, stage, growth, dataset, stop };
    grow_checkpoint(storage, &step, reporter)?;
    Ok(())
}

/// What the storage knows of every stage of a job.
///
/// # Errors
/// When the storage does not answer.
pub fn report(plan: &JobPlan, storage: &Storage) -> Result<Vec<StageReport>> {
    let mut flops_before = 0.0;
    let mut stages = Vec::new();
    let mut before: Option<&StagePlan> = None;
    for stage in &plan.stages {
        let found = checkpoint::list(storage, &stage.job, &stage.stage)?;
        let newest = found.iter().rev().find_map(|found| found.committed());
        let (tokens, history, folder) = match newest {
            Some(manifest) => {
                let folder = checkpoint::checkpoint_folder(storage, manifest).uri().to_owned();
                (manifest.tokens, read_history(storage, manifest)?, Some(folder))
            }
            None => (0, History::default(), None),
        };
        let attempts = attempt::list(storage, &stage.job, &stage.stage)?;
        let step_tokens = stage.training.global_batch_tokens;
        let goodput = Goodput::new(&attempts, step_tokens, newest.map_or(0, |manifest| manifest.step));
        if newest.is_some() {
            flops_before += stage.learning_flops();
        }
        let mut report = StageReport::new(stage, tokens, &history, flops_before, folder, goodput);
        if let (Some(before), Some(record)) = (before, growth_record(storage, &found)?) {
            report.growth = Some(GrowthReport::new(before, stage, &record));
        }
        flops_before += report.flops;
        stages.push(report);
        before = Some(stage);
    }
    Ok(stages)
}

/// The record of the growth step in the newest checkpoint that has one; another trainer may not pass it on.
fn growth_record(storage: &Storage, checkpoints: &[checkpoint::Found]) -> Result<Option<GrowthRecord>> {
    for manifest in checkpoints.iter().rev().filter_map(|found| found.committed()) {
        let folder = checkpoint::checkpoint_folder(storage, manifest);
        if let Some(bytes) = checkpoint::read_record(&folder, manifest, GROWTH_RECORD_FILE)? {
            return Ok(serde_json::from_slice(&bytes).ok());
        }
    }
    Ok(None)
}

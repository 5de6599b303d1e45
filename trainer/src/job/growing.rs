//! One growth step of a job: from the last checkpoint of a stage to the first one of the next.

use super::Result;
use crate::checkpoint::{self, CheckpointLocation};
use crate::data::Dataset;
use crate::growth::{self, GrownCheckpoint, GrowthData, GrowthTarget, LearnProgress, Learning, Measure};
use crate::progress::{Reporter, Unit};
use crate::storage::Storage;
use growth_crds::plan::{GrowthPlan, ModelConfig, StagePlan};
use growth_crds::protocol::CheckpointManifest;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

/// What is grown.
#[derive(Clone, Copy)]
pub struct GrowthStep<'a> {
    /// The checkpoint that it starts from.
    pub source: &'a CheckpointManifest,
    /// The architecture that it must have, where it is known.
    pub expected: Option<&'a ModelConfig>,
    /// The stage that gets its first checkpoint.
    pub stage: &'a StagePlan,
    /// How.
    pub growth: &'a GrowthPlan,
    /// The job's data: both models are compared on its held-out part, else on random tokens. Operators that learn need it.
    pub dataset: Option<&'a Dataset>,
    /// Set when an operator that learns shall stop after its current step.
    pub stop: Option<&'a AtomicBool>,
}

/// Grows a checkpoint into the first one of a stage, under an attempt number of its own.
///
/// # Errors
/// When the plan does not fit, the source is damaged, or the storage fails.
pub fn grow_checkpoint(
    storage: &Storage,
    step: &GrowthStep<'_>,
    reporter: &mut Reporter,
) -> Result<GrownCheckpoint> {
    let GrowthStep { stage, growth, .. } = step;
    let target = GrowthTarget::Stage(CheckpointLocation {
        storage: storage.clone(),
        job: stage.job.clone(),
        stage: stage.stage.clone(),
        attempt: checkpoint::next_attempt(storage, &stage.job, &stage.stage)?,
    });
    let detail = format!("{:?} to {} layers", growth.operator, stage.model.num_hidden_layers);
    let shown = GrowthReporter::new(reporter, detail);
    let report = |progress| shown.learned(progress);
    let dataset = step.dataset.filter(|_| growth.learn.is_some());
    let learning = dataset.map(|data| Learning::of_stage(stage, data, storage, step.stop, &report));
    let measure = Measure { held_out: step.dataset, ..Measure::default() };
    let data = GrowthData { measure, learning };
    let folder = checkpoint::checkpoint_folder(storage, step.source);
    let mut progress = |done, total| shown.bytes(done, total);
    let grown = growth::grow_with(&folder, step.expected, growth, &target, &[], &data, &mut progress)?;
    reporter.finish();
    Ok(grown)
}

/// Shows a growth step: bytes, and in between the tokens that are learned on.
pub struct GrowthReporter<'a> {
    shown: Mutex<Shown<'a>>,
    detail: String,
}

struct Shown<'a> {
    reporter: &'a mut Reporter,
    learns: bool,
}

impl<'a> GrowthReporter<'a> {
    /// Begins to show; `detail` stands beside the bytes.
    pub fn new(reporter: &'a mut Reporter, detail: String) -> Self {
        reporter.begin("growth", Unit::Bytes, 0, 0);
        Self { shown: Mutex::new(Shown { reporter, learns: false }), detail }
    }

    /// Bytes done, of so many.
    pub fn bytes(&self, done: u64, total: u64) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut shown.learns) {
            shown.reporter.begin("growth", Unit::Bytes, total, done);
        }
        shown.reporter.advance(done, total, self.detail.clone());
    }

    /// A step of learning.
    pub fn learned(&self, LearnProgress { tokens, total, loss }: LearnProgress) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut shown.learns, true) {
            shown.reporter.begin("learn", Unit::Tokens, total, tokens);
        }
        shown.reporter.advance(tokens, total, format!("loss {loss:.3}"));
    }
}

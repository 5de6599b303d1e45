//! Trains one stage from its newest checkpoint to its last token: what a trainer pod does.

use super::start::{Start, ramp_of, start_state};
use crate::checkpoint::{
    self, AsyncCheckpointer, CheckpointError, CheckpointLocation, CheckpointWriter, Committed, ExtraFile,
    HISTORY_FILE, ObjectTable, Retention, TokenIds, TrainingState,
};
use crate::collective::Collective;
use crate::data::{Dataset, TrainingOrder};
use crate::progress::{Reporter, Unit};
use crate::storage::Storage;
use crate::training::after_growth::AfterGrowth;
use crate::training::attempt::{Activity, AttemptRecord, Recorder};
use crate::training::board::ProgressBoard;
use crate::training::history::{EvaluationRecord, History, StepRecord};
use crate::training::ramp::Ramp;
use crate::training::resharding;
use crate::training::schedule::stage_learning_rate;
use crate::training::step::{StepEngine, StepSettings, StepSizes};
use bytes::Bytes;
use growth_crds::plan::{StagePlan, TrainingPlan, ranks};
use growth_crds::protocol::{CheckpointManifest, GROWTH_RECORD_FILE, Progress, checkpoint_status};
use growth_crds::status::CheckpointStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use super::error::{Result, TrainError};
pub use super::start::read_history;

/// How a stage ended.
#[derive(Debug, Clone)]
pub enum StageEnd {
    /// Its last token is trained and its last checkpoint committed.
    Finished(CheckpointManifest),
    /// It was asked to stop and has committed where it stood.
    Stopped(CheckpointManifest),
}

/// What a stage works with.
pub struct StageInputs<'a> {
    /// What to train.
    pub plan: &'a StagePlan,
    /// The job's storage.
    pub storage: &'a Storage,
    /// The prepared data.
    pub dataset: &'a Dataset,
    /// Set when the stage shall stop after its current step.
    pub stop: &'a AtomicBool,
    /// The attempt, where a controller counts them. `None`: one more than the storage has seen.
    pub attempt: Option<u32>,
    /// When this attempt began, before anything was read.
    pub began: Instant,
    /// Told of every step and every committed checkpoint.
    pub board: &'a ProgressBoard,
}

/// Trains the stage together with the ranks of `collective`, of which it takes leave at the end. Checkpoints that others
/// committed are never touched; this attempt writes under a number of its own.
///
/// # Errors
/// When data or checkpoints cannot be read, when the last checkpoint cannot be written, when the loss diverges, when
/// another rank is lost.
pub fn train(
    inputs: &StageInputs<'_>,
    collective: &mut dyn Collective,
    reporter: &mut Reporter,
) -> Result<StageEnd> {
    let end = train_to_the_end(inputs, collective, reporter);
    collective.leave(end.as_ref().err().map(ToString::to_string).as_deref());
    end
}

fn train_to_the_end(
    inputs: &StageInputs<'_>,
    collective: &mut dyn Collective,
    reporter: &mut Reporter,
) -> Result<StageEnd> {
    let mut run = StageRun::start(inputs, collective, reporter)?;
    run.spent(|activity| &mut activity.starting, inputs.began.elapsed().as_secs_f64());
    let plan = inputs.plan;
    reporter.begin(&plan.stage, Unit::Tokens, plan.tokens, run.state.tokens);
    while run.state.step < plan.steps {
        let signals = run.agree(inputs.stop)?;
        if signals.stop {
            return Ok(StageEnd::Stopped(run.last_checkpoint(reporter)?));
        }
        run.evaluate_if_due()?;
        run.step(reporter)?;
        run.checkpoint_if_due(signals.checkpoint_is_due, reporter)?;
    }
    run.evaluate_if_due()?;
    reporter.finish();
    Ok(StageEnd::Finished(run.last_checkpoint(reporter)?))
}

/// What all ranks have agreed on before a step.
#[derive(Debug, Clone, Copy)]
struct Signals {
    /// One of them was asked to stop.
    stop: bool,
    /// So much time has passed by the clock of rank 0.
    checkpoint_is_due: bool,
}

struct StageRun<'a> {
    plan: &'a StagePlan,
    storage: &'a Storage,
    dataset: &'a Dataset,
    board: &'a ProgressBoard,
    collective: &'a mut dyn Collective,
    order: TrainingOrder,
    engine: StepEngine,
    table: ObjectTable,
    state: TrainingState,
    history: History,
    /// What the growth step wrote about itself: every checkpoint of the stage carries it, for the first one goes.
    growth_record: Option<Bytes>,
    checkpointer: AsyncCheckpointer,
    /// The newest checkpoint that is known to be committed.
    committed: Option<CheckpointManifest>,
    last_checkpoint: Instant,
    /// Only rank 0 keeps the record of the attempt.
    recorder: Option<Recorder>,
    activity: Activity,
    ids: Vec<u32>,
    targets: Vec<u32>,
    validation: (Vec<u32>, Vec<u32>),
    /// While masks of a growth rise.
    ramp: Option<Ramp<'a>>,
}

impl<'a> StageRun<'a> {
    fn start(
        inputs: &StageInputs<'a>,
        collective: &'a mut dyn Collective,
        reporter: &Reporter,
    ) -> Result<Self> {
        let StageInputs { plan, storage, dataset, board, began, .. } = *inputs;
        check_vocabulary(plan, dataset)?;
        check_ranks(plan, collective.world_size())?;
        let training = &plan.training;
        let attempt = match inputs.attempt {
            Some(attempt) => attempt,
            None => checkpoint::next_attempt(storage, &plan.job, &plan.stage)?,
        };
        let (rank, world_size) = (collective.rank(), collective.world_size());
        if rank == 0 && !ranks::keeps_bits(training.micro_batches(), world_size as u64) {
            reporter.note(&format!(
                "note: {world_size} ranks round sums in an order of their own (reproducible: false): another number of \
                 ranks ends in slightly different weights"
            ));
        }
        let engine = StepEngine::new(plan.model.clone(), sizes_of(training), rank, world_size);
        let special = AfterGrowth::of(plan, engine.model().layout());
        let engine = engine.after_growth(special);
        let Start { state, history, growth_record, resumed } =
            start_state(inputs, &engine, collective, reporter)?;
        let location = CheckpointLocation {
            storage: storage.clone(),
            job: plan.job.clone(),
            stage: plan.stage.clone(),
            attempt,
        };
        let retention = Retention { keep_last: plan.checkpoint.keep_last, ..Retention::default() };
        let last_good = resumed.as_ref().map(|manifest| checkpoint::checkpoint_folder(storage, manifest));
        let last_good = last_good.map(|folder| folder.uri().to_owned());
        board.begin(Progress {
            stage: plan.stage.clone(),
            attempt: i32::try_from(attempt).unwrap_or(i32::MAX),
            step: state.step,
            tokens: state.tokens,
            total_tokens: plan.tokens,
            tokens_per_second: 0.0,
            loss: None,
            checkpoint: resumed.as_ref().map(|manifest| status_of(storage, manifest)),
            updated_at: jiff::Timestamp::now(),
        });
        let writer = writer(plan, location, dataset);
        let table = writer.table();
        let checkpointer = AsyncCheckpointer::start(writer, retention, last_good, collective.notes())?;
        let validation =
            dataset.validation_tokens(training.sequence_length as usize, plan.evaluation.tokens)?;
        let tokens = engine.own_tokens().len();
        let first = AttemptRecord {
            attempt,
            ranks: world_size,
            started_at: jiff::Timestamp::now() - began.elapsed(),
            updated_at: jiff::Timestamp::now(),
            first_step: state.step,
            step: state.step,
            seconds: Activity::default(),
        };
        let ramp = ramp_of(plan, storage, resumed.as_ref())?;
        let recorder = (rank == 0).then(|| Recorder::start(storage, &plan.job, &plan.stage, first));
        let mut run = Self {
            plan,
            storage,
            dataset,
            board,
            collective,
            order: training_order(plan, dataset)?,
            engine,
            table,
            state,
            history,
            growth_record,
            checkpointer,
            committed: resumed,
            last_checkpoint: Instant::now(),
            // Without a thread there is no record, and training goes on.
            recorder: recorder.and_then(std::io::Result::ok),
            activity: Activity::default(),
            ids: vec![0; tokens],
            targets: vec![0; tokens],
            validation,
            ramp,
        };
        run.follow_ramp();
        Ok(run)
    }

    /// Brings the masks of a growth to where the stage stands; after the ramp there are none.
    fn follow_ramp(&mut self) {
        let Some(ramp) = &self.ramp else { return };
        let masks = ramp.masks(self.state.tokens, self.engine.model());
        if masks.is_none() {
            self.ramp = None;
        }
        self.engine.set_masks(masks);
    }

    /// Tells the others what this rank wants, and does what any of them wants.
    fn agree(&mut self, stop: &AtomicBool) -> Result<Signals> {
        let elapsed = self.last_checkpoint.elapsed().as_secs();
        let due = self.plan.checkpoint.every_seconds.is_some_and(|interval| elapsed >= interval);
        let mine = [stop.load(Ordering::Relaxed), due && self.collective.rank() == 0].map(u8::from);
        let all = self.collective.exchange(&mine)?;
        let any = |signal: usize| all.iter().any(|of_rank| of_rank.get(signal) == Some(&1));
        Ok(Signals { stop: any(0), checkpoint_is_due: any(1) })
    }

    fn step(&mut self, reporter: &mut Reporter) -> Result<()> {
        let begin = Instant::now();
        let waited = self.collective.waited();
        let training = &self.plan.training;
        let own = self.engine.own_tokens().start as u64;
        let first_sample = first_sample(self.plan, self.state.tokens, own);
        self.dataset.batch(&self.order, first_sample, &mut self.ids, &mut self.targets)?;
        let learning_rate = stage_learning_rate(training, self.state.tokens);
        let settings =
            StepSettings { adam_w: &training.adam_w, learning_rate, gradient_clip: training.gradient_clip };
        let report =
            self.engine.step(self.collective, &mut self.state, &self.ids, &self.targets, settings)?;
        self.state.step += 1;
        self.state.tokens += training.global_batch_tokens;
        self.follow_ramp();
        if !report.loss.is_finite() || !report.gradient_norm.is_finite() {
            let (stage, step) = (self.plan.stage.clone(), self.state.step);
            return Err(TrainError::Diverged { stage, step, loss: report.loss });
        }
        self.history.record_step(StepRecord {
            step: self.state.step,
            tokens: self.state.tokens,
            loss: report.loss,
            learning_rate,
            gradient_norm: report.gradient_norm,
        });
        let (step, tokens, elapsed) = (self.state.step, self.state.tokens, begin.elapsed());
        self.history.training_seconds += elapsed.as_secs_f64();
        let waited = (self.collective.waited() - waited).as_secs_f64();
        self.activity.waiting += waited;
        self.spent(|activity| &mut activity.stepping, elapsed.as_secs_f64() - waited);
        self.board.step(step, tokens, report.loss, training.global_batch_tokens, elapsed);
        reporter.advance(self.state.tokens, self.plan.tokens, self.progress_detail(report.loss));
        Ok(())
    }

    fn spent(&mut self, on: impl FnOnce(&mut Activity) -> &mut f64, seconds: f64) {
        *on(&mut self.activity) += seconds;
        self.board.spent(self.activity);
        if let Some(recorder) = &mut self.recorder {
            recorder.update(self.state.step, self.activity);
        }
    }

    fn progress_detail(&self, loss: f64) -> String {
        match self.history.last_loss() {
            Some(validation) => format!("loss {loss:.3}  validation {validation:.3}"),
            None => format!("loss {loss:.3}"),
        }
    }

    /// Measures the validation loss before the first step, at every interval and after the last step.
    fn evaluate_if_due(&mut self) -> Result<()> {
        let (step, tokens) = (self.state.step, self.state.tokens);
        let due = step == 0 || step == self.plan.steps || self.crosses(self.plan.evaluation.every_tokens);
        if !due || self.history.has_evaluation(step) {
            return Ok(());
        }
        let begin = Instant::now();
        let (ids, targets) = &self.validation;
        let loss = self.engine.evaluate(self.collective, &self.state.parameters, ids, targets)?;
        self.spent(|activity| &mut activity.evaluating, begin.elapsed().as_secs_f64());
        self.history.evaluations.push(EvaluationRecord { step, tokens, loss });
        Ok(())
    }

    /// Whether the last step passed a multiple of `interval` tokens.
    fn crosses(&self, interval: u64) -> bool {
        let before = self.state.tokens.saturating_sub(self.plan.training.global_batch_tokens);
        interval > 0 && self.state.tokens / interval > before / interval
    }

    fn checkpoint_if_due(&mut self, by_time: bool, reporter: &Reporter) -> Result<()> {
        if let Some(outcome) = self.checkpointer.poll() {
            self.note_outcome(outcome, reporter)?;
        }
        let by_tokens = self.plan.checkpoint.every_tokens.is_some_and(|interval| self.crosses(interval));
        // The last step has a checkpoint of its own, which also holds the last validation loss.
        if self.state.step == self.plan.steps || !(by_tokens || by_time) {
            return Ok(());
        }
        if let Some(outcome) = self.submit()? {
            self.note_outcome(outcome, reporter)?;
        }
        Ok(())
    }

    fn note_outcome(&mut self, outcome: checkpoint::Outcome, reporter: &Reporter) -> Result<()> {
        if let Ok(Committed { manifest, .. }) = &outcome {
            self.board.committed(status_of(self.storage, manifest));
            self.committed = Some(manifest.clone());
        }
        note_outcome(outcome, reporter)
    }

    fn submit(&mut self) -> Result<Option<checkpoint::Outcome>> {
        let begin = Instant::now();
        self.last_checkpoint = begin;
        let history = serde_json::to_vec(&self.history);
        let history = history.ok().map(|bytes| ExtraFile::new(HISTORY_FILE, bytes));
        let growth = self.growth_record.clone().map(|bytes| ExtraFile::new(GROWTH_RECORD_FILE, bytes));
        let mask = self.ramp.as_ref().and_then(|ramp| ramp.file(self.state.tokens));
        let records = history.into_iter().chain(growth).chain(mask).collect();
        let Self { state, table, engine, collective, .. } = self;
        let layout = engine.model().layout();
        let before = self.checkpointer.submit(records, |snapshot| {
            resharding::fill(snapshot, state, table, layout, engine.shards(), *collective)
        })?;
        self.spent(|activity| &mut activity.checkpointing, begin.elapsed().as_secs_f64());
        Ok(before)
    }

    /// Writes where the stage stands, waits for it, and says where it is.
    fn last_checkpoint(&mut self, reporter: &Reporter) -> Result<CheckpointManifest> {
        // What is being written may be of this very step, and no step is written twice.
        if let Some(outcome) = self.checkpointer.settle() {
            self.note_outcome(outcome, reporter)?;
        }
        if let Some(manifest) = self.committed.take_if(|manifest| manifest.step == self.state.step) {
            return Ok(manifest);
        }
        let _superseded_by_this_one = self.submit()?;
        let begin = Instant::now();
        let written = self.checkpointer.finish()?;
        self.spent(|activity| &mut activity.checkpointing, begin.elapsed().as_secs_f64());
        match written {
            Some(Committed { manifest, .. }) => Ok(manifest),
            None => Err(CheckpointError::Thread {
                problem: "lost the checkpoint that it was given".to_owned(),
                last_good: self.checkpointer.last_good().unwrap_or("none").to_owned(),
            }
            .into()),
        }
    }
}

/// A checkpoint as the operator's status shows it.
pub fn status_of(storage: &Storage, manifest: &CheckpointManifest) -> CheckpointStatus {
    checkpoint_status(manifest, checkpoint::checkpoint_folder(storage, manifest).uri())
}

/// The order in which the stage's job reads its training data.
///
/// # Errors
/// When a source holds no whole sequence, or its share of the mixture is too small.
pub fn training_order(plan: &StagePlan, dataset: &Dataset) -> Result<TrainingOrder> {
    let weights: Vec<f64> = plan.data.train.iter().map(|source| source.weight).collect();
    let StagePlan { training, .. } = plan;
    Ok(TrainingOrder::new(dataset, &weights, training.sequence_length as usize, training.seed)?)
}

/// The sample with which a rank begins a step after `tokens` tokens of the stage, whose tokens begin `own` tokens into
/// those of the step.
pub fn first_sample(plan: &StagePlan, tokens: u64, own: u64) -> u64 {
    (plan.first_token + tokens + own) / u64::from(plan.training.sequence_length)
}

/// Sizes of a step of the stage.
pub fn sizes_of(training: &TrainingPlan) -> StepSizes {
    StepSizes {
        sequence: training.sequence_length as usize,
        micro_batch_tokens: training.micro_batch_tokens as usize,
        global_batch_tokens: training.global_batch_tokens as usize,
    }
}

/// Whether so many ranks can train the stage.
///
/// # Errors
/// When they cannot share its steps, with the numbers that can.
pub fn check_ranks(plan: &StagePlan, ranks: usize) -> Result<()> {
    let micro_batches = plan.training.micro_batches();
    if ranks::can_share(micro_batches, ranks as u64, plan.training.reproducible) {
        return Ok(());
    }
    let possible = ranks::possible_sizes(micro_batches, 1..1025, plan.training.reproducible);
    let possible: Vec<String> = possible.iter().map(ToString::to_string).collect();
    let possible = possible.join(", ");
    Err(TrainError::Ranks { stage: plan.stage.clone(), ranks, micro_batches, possible })
}

fn check_vocabulary(plan: &StagePlan, dataset: &Dataset) -> Result<()> {
    let (tokenizer, model) = (dataset.tokenizer().vocab_size(), plan.model.vocab_size);
    if tokenizer > model {
        return Err(TrainError::Vocabulary { tokenizer, model });
    }
    Ok(())
}

fn writer(plan: &StagePlan, location: CheckpointLocation, dataset: &Dataset) -> CheckpointWriter {
    let tokenizer = dataset.tokenizer();
    let token_ids = TokenIds { bos: None, eos: vec![tokenizer.separator()] };
    CheckpointWriter::new(location, plan.model.clone(), token_ids, tokenizer_files(plan, dataset))
}

/// The files with which `AutoTokenizer` opens a checkpoint.
pub fn tokenizer_files(plan: &StagePlan, dataset: &Dataset) -> Vec<ExtraFile> {
    let tokenizer = dataset.tokenizer();
    let longest = u64::from(plan.model.max_position_embeddings);
    vec![
        ExtraFile::new("tokenizer.json", tokenizer.to_json()),
        ExtraFile::new("tokenizer_config.json", tokenizer.config_json(longest)),
    ]
}

/// A checkpoint that could not be written is tried again at the next interval; only a newer attempt ends this one.
fn note_outcome(outcome: checkpoint::Outcome, reporter: &Reporter) -> Result<()> {
    match outcome {
        Ok(Committed { warning: None, .. }) => Ok(()),
        Ok(Committed { warning: Some(warning), .. }) => {
            reporter.note(&format!("warning: {warning}"));
            Ok(())
        }
        Err(error @ (CheckpointError::Superseded { .. } | CheckpointError::Collective(_))) => {
            Err(error.into())
        }
        Err(error) => {
            reporter.note(&format!(
                "warning: a checkpoint could not be written and is tried again later: {error}"
            ));
            Ok(())
        }
    }
}

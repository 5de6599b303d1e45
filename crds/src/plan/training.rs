//! How a stage trains: the job's settings, the stage's overrides, and the sizes of batches.

use super::error::Findings;
use super::growth_training::ScheduleSpan;
use super::schedule::{StageLength, resolve_schedule};
use super::{CheckpointPlan, EvaluationPlan, GrowthTrainingPlan, SchedulePlan, TrainingPlan};
use crate::quantity::TokenCount;
use crate::spec::policy::{CheckpointSpec, EvaluationSpec};
use crate::spec::stage::{StageAdamWSpec, StageSpec, StageTrainingSpec};
use crate::spec::training::{AdamWSpec, TrainingSpec};

/// Tokens of an optimizer step, and of one pass within it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    pub global: u64,
    pub micro: u64,
}

impl Batch {
    /// Steps that hold at least so many tokens.
    pub fn steps(&self, tokens: u64) -> u64 {
        tokens.div_ceil(self.global)
    }

    /// So many tokens, rounded up to whole steps.
    pub fn round_up(&self, tokens: u64) -> Option<u64> {
        self.steps(tokens).checked_mul(self.global)
    }
}

/// The place of a training field: at the stage where the stage says it, else at the job.
fn place(stage_field: &str, overridden: bool, name: &str) -> String {
    if overridden { format!("{stage_field}.training.{name}") } else { format!("spec.training.{name}") }
}

/// The batch of a stage; `None` when it is wrong, with the reason in `findings`.
pub(super) fn resolve_batch(
    training: &TrainingSpec,
    stage: &StageSpec,
    field: &str,
    findings: &mut Findings,
) -> Option<Batch> {
    let over = stage.training.clone().unwrap_or_default();
    let sequence = u64::from(training.sequence_length);
    if sequence < 2 {
        findings.error("spec.training.sequenceLength", "a sequence needs at least 2 tokens; raise it");
        return None;
    }
    let global = over.global_batch_tokens.unwrap_or(training.global_batch_tokens);
    let global_place = place(field, over.global_batch_tokens.is_some(), "globalBatchTokens");
    if global.0 == 0 {
        findings
            .error(global_place, format!("a step needs tokens; use a multiple of sequenceLength {sequence}"));
        return None;
    }
    let micro = over.micro_batch_tokens.or(training.micro_batch_tokens);
    let micro_place = place(field, over.micro_batch_tokens.is_some(), "microBatchTokens");
    let Some(micro) = micro else {
        let message = multiple_of(global, sequence, "sequenceLength")?;
        return check(message, global_place, findings).map(|()| Batch { global: global.0, micro: global.0 });
    };
    if micro.0 == 0 {
        findings
            .error(micro_place, format!("a pass needs tokens; use a multiple of sequenceLength {sequence}"));
        return None;
    }
    check(multiple_of(micro, sequence, "sequenceLength")?, micro_place, findings)?;
    check(multiple_of(global, micro.0, "microBatchTokens")?, global_place, findings)?;
    Some(Batch { global: global.0, micro: micro.0 })
}

/// `Some("")` when it is a multiple, else what to write instead.
fn multiple_of(value: TokenCount, unit: u64, name: &str) -> Option<String> {
    if value.0.checked_rem(unit)? == 0 {
        return Some(String::new());
    }
    let below = value.0 - value.0 % unit;
    let above = below.checked_add(unit).unwrap_or(below);
    let near = if below == 0 { format!("{above}") } else { format!("{below} or {above}") };
    Some(format!("{} is not a multiple of {name} {unit}; use {near}", value.0))
}

fn check(message: String, place: String, findings: &mut Findings) -> Option<()> {
    if message.is_empty() {
        return Some(());
    }
    findings.error(place, message);
    None
}

/// What is resolved beside the settings of a stage.
pub(super) struct ScheduledStage<'a> {
    /// What its schedule runs over.
    pub span: &'a ScheduleSpan,
    /// The stage whose schedule that is, and its field.
    pub scheduled_by: (&'a StageSpec, String),
    pub after_growth: GrowthTrainingPlan,
}

/// How a stage trains.
pub(super) fn resolve_training(
    training: &TrainingSpec,
    stage: &StageSpec,
    batch: Batch,
    scheduled: ScheduledStage<'_>,
    field: &str,
    findings: &mut Findings,
) -> Option<TrainingPlan> {
    let over = stage.training.clone().unwrap_or_default();
    let adam_w = resolve_adam_w(training, &over, field, findings);
    let gradient_clip = over.gradient_clip.unwrap_or(training.gradient_clip);
    let clip_place = place(field, over.gradient_clip.is_some(), "gradientClip");
    let gradient_clip = at_least_zero(gradient_clip, clip_place, findings);
    let seed = u64::try_from(training.seed).ok();
    if seed.is_none() {
        findings.error("spec.training.seed", format!("{} is negative; use 0 or more", training.seed));
    }
    let schedule = scheduled.schedule(training, findings);
    Some(TrainingPlan {
        sequence_length: training.sequence_length,
        global_batch_tokens: batch.global,
        micro_batch_tokens: batch.micro,
        adam_w: adam_w?,
        schedule: schedule?,
        precision: training.precision,
        gradient_clip: gradient_clip?,
        seed: seed?,
        reproducible: training.reproducible,
        after_growth: scheduled.after_growth,
    })
}

impl ScheduledStage<'_> {
    fn schedule(&self, training: &TrainingSpec, findings: &mut Findings) -> Option<SchedulePlan> {
        let (stage, field) = &self.scheduled_by;
        let over = stage.training.as_ref().and_then(|over| over.schedule.as_ref());
        let place = place(field, over.is_some(), "schedule");
        let length = StageLength { name: &self.span.name, tokens: self.span.tokens };
        resolve_schedule(over.unwrap_or(&training.schedule), length, &place, findings)
    }
}

impl AdamWSpec {
    /// These settings with what `over` says in their place.
    pub fn merged(&self, over: &StageAdamWSpec) -> Self {
        Self {
            learning_rate: over.learning_rate.unwrap_or(self.learning_rate),
            beta1: over.beta1.unwrap_or(self.beta1),
            beta2: over.beta2.unwrap_or(self.beta2),
            epsilon: over.epsilon.unwrap_or(self.epsilon),
            weight_decay: over.weight_decay.unwrap_or(self.weight_decay),
            decay_norms_and_embeddings: over
                .decay_norms_and_embeddings
                .unwrap_or(self.decay_norms_and_embeddings),
        }
    }
}

fn resolve_adam_w(
    training: &TrainingSpec,
    over: &StageTrainingSpec,
    field: &str,
    findings: &mut Findings,
) -> Option<AdamWSpec> {
    let over = over.optimizer.as_ref().and_then(|optimizer| optimizer.adam_w.clone()).unwrap_or_default();
    let adam_w = training.optimizer.adam_w.merged(&over);
    let at = |set: bool, name: &str| place(field, set, &format!("optimizer.adamW.{name}"));
    let checks = [
        at_least_zero(adam_w.learning_rate, at(over.learning_rate.is_some(), "learningRate"), findings),
        at_least_zero(adam_w.epsilon, at(over.epsilon.is_some(), "epsilon"), findings),
        at_least_zero(adam_w.weight_decay, at(over.weight_decay.is_some(), "weightDecay"), findings),
        decay_rate(adam_w.beta1, at(over.beta1.is_some(), "beta1"), findings),
        decay_rate(adam_w.beta2, at(over.beta2.is_some(), "beta2"), findings),
    ];
    checks.iter().all(Option::is_some).then_some(adam_w)
}

fn at_least_zero(value: f64, place: String, findings: &mut Findings) -> Option<f64> {
    if value.is_finite() && value >= 0.0 {
        return Some(value);
    }
    findings.error(place, format!("{value} is not a finite number from 0 up; correct it"));
    None
}

fn decay_rate(value: f64, place: String, findings: &mut Findings) -> Option<f64> {
    if (0.0..1.0).contains(&value) {
        return Some(value);
    }
    findings.error(place, format!("{value} is no decay rate; use 0 up to, but not including, 1"));
    None
}

/// When checkpoints of a stage are written.
pub(super) fn resolve_checkpoint(
    checkpoint: &CheckpointSpec,
    batch: Batch,
    findings: &mut Findings,
) -> Option<CheckpointPlan> {
    let every_tokens = checkpoint
        .every_tokens
        .map(|tokens| whole_steps(tokens, batch, "spec.checkpoint.everyTokens", findings));
    let every_seconds = u64::try_from(checkpoint.every_seconds).ok().filter(|seconds| *seconds > 0);
    if every_seconds.is_none() {
        findings.error("spec.checkpoint.everySeconds", "it must be at least 1 second; raise it");
    }
    let keep_last = u32::try_from(checkpoint.keep_last).ok().filter(|keep| *keep > 0);
    if keep_last.is_none() {
        findings.error("spec.checkpoint.keepLast", "at least 1 checkpoint must be kept; raise it");
    }
    Some(CheckpointPlan {
        every_tokens: every_tokens.map_or(Some(None), |tokens| tokens.map(Some))?,
        every_seconds: Some(every_seconds?),
        keep_last: keep_last?,
    })
}

/// When the validation loss of a stage is measured.
pub(super) fn resolve_evaluation(
    evaluation: &EvaluationSpec,
    sequence_length: u32,
    batch: Batch,
    stage_tokens: u64,
    findings: &mut Findings,
) -> Option<EvaluationPlan> {
    let every = evaluation.every_tokens.unwrap_or(TokenCount(stage_tokens.div_ceil(10)));
    let every_tokens = whole_steps(every, batch, "spec.evaluation.everyTokens", findings);
    let tokens = evaluation.tokens.0;
    if tokens < u64::from(sequence_length) {
        let message = format!(
            "{tokens} tokens are less than one sequence of {sequence_length}; raise it to a few sequences"
        );
        findings.error("spec.evaluation.tokens", message);
        return None;
    }
    Some(EvaluationPlan { every_tokens: every_tokens?, tokens })
}

fn whole_steps(tokens: TokenCount, batch: Batch, place: &str, findings: &mut Findings) -> Option<u64> {
    let rounded = batch.round_up(tokens.0).filter(|tokens| *tokens > 0);
    if rounded.is_none() {
        findings.error(
            place,
            format!("{tokens} tokens are no distance; use at least one step of {}", batch.global),
        );
    }
    rounded
}

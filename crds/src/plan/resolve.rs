//! A job becomes a list of stage plans.

use super::architecture::first_architecture;
use super::error::{Findings, PlanErrors};
use super::growth::GrowthRequest;
use super::growth_mask::resolve_ramp;
use super::growth_training::{
    GrowthTrainingRequest, ScheduleSpan, check_continued_schedules, exact_flops, schedule_spans,
};
use super::guideline::{self, LARGEST_SHARE};
use super::ranks::check_replicas;
use super::training::{
    Batch, ScheduledStage, resolve_batch, resolve_checkpoint, resolve_evaluation, resolve_training,
};
use super::{FlopCount, GrowthTrainingPlan, JobPlan, ModelConfig, StagePlan, StageStart};
use crate::quantity::{StageTokens, TokenCount};
use crate::spec::GrowthTrainingJobSpec;
use crate::spec::stage::StageSpec;
use std::collections::BTreeSet;

/// Longest name of a job: names of its pods must stay within 63 characters.
const MAX_JOB_NAME: usize = 32;

/// Longest name of a stage.
const MAX_STAGE_NAME: usize = 12;

/// Most stages.
const MAX_STAGES: usize = 16;

/// Resolves a job into one plan a stage, with nothing left to default.
///
/// # Errors
/// Everything that is wrong with the spec, as far as one pass can tell.
pub fn resolve(name: &str, spec: &GrowthTrainingJobSpec) -> Result<JobPlan, PlanErrors> {
    let mut findings = Findings::default();
    check_names(name, spec, &mut findings);
    let shapes = resolve_shapes(spec, &mut findings);
    let batches: Vec<Option<Batch>> = spec
        .stages
        .iter()
        .enumerate()
        .map(|(index, stage)| resolve_batch(&spec.training, stage, &stage_field(index), &mut findings))
        .collect();
    let tokens = resolve_tokens(spec, &shapes, &batches, &mut findings);
    check_continued_schedules(spec, &mut findings);
    let spans = schedule_spans(spec, &tokens);
    let mut first_token = Some(0u64);
    let mut stages = Vec::new();
    for (index, shape) in shapes.into_iter().enumerate() {
        let (batch, span) = (batches[index], spans[index].as_ref());
        let stage = StageInput { name, spec, index, shape, batch, tokens: tokens[index], span };
        stages.extend(stage.resolve(first_token, &mut findings));
        first_token = first_token.zip(tokens[index]).and_then(|(first, tokens)| first.checked_add(tokens));
        if first_token.is_none_or(|first| first > i64::MAX as u64) && tokens.iter().all(Option::is_some) {
            findings
                .error("spec.stages", "all stages together train more than 2^63 tokens; lower their tokens");
            break;
        }
    }
    let notes = findings.finish()?;
    Ok(JobPlan { job: name.to_owned(), stages, notes })
}

fn stage_field(index: usize) -> String {
    format!("spec.stages[{index}]")
}

/// Whether a name can be part of the name of a Service.
fn is_label(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.chars().all(|other| other.is_ascii_lowercase() || other.is_ascii_digit() || other == '-')
}

fn check_names(name: &str, spec: &GrowthTrainingJobSpec, findings: &mut Findings) {
    if name.len() > MAX_JOB_NAME {
        findings.error("metadata.name", format!("it is longer than {MAX_JOB_NAME} characters; shorten it"));
    }
    if !is_label(name) {
        findings.error("metadata.name", "start it with a letter and use only a-z, 0-9 and -");
    }
    match spec.stages.first().and_then(|stage| stage.trained_by.as_ref()) {
        Some(by) if by.job == name => {
            let message = format!("{name} is this job itself; remove trainedBy, or name another job");
            findings.error("spec.stages[0].trainedBy.job", message);
        }
        Some(by) => findings.note(format!("{}: job {} trains it", stage_field(0), by.job)),
        None => {}
    }
    if spec.stages.is_empty() || spec.stages.len() > MAX_STAGES {
        let message = format!("there are {} stages; write 1 to {MAX_STAGES}", spec.stages.len());
        findings.error("spec.stages", message);
    }
    let mut names = BTreeSet::new();
    for (index, stage) in spec.stages.iter().enumerate() {
        let field = format!("{}.name", stage_field(index));
        if stage.name.len() > MAX_STAGE_NAME {
            findings.error(&field, format!("it is longer than {MAX_STAGE_NAME} characters; shorten it"));
        }
        if !is_label(&stage.name) {
            findings.error(&field, "start it with a letter and use only a-z, 0-9 and -");
        }
        if !names.insert(&stage.name) {
            findings.error(&field, format!("another stage is called {} too; rename one of them", stage.name));
        }
    }
}

/// Architecture of a stage and where its weights come from.
struct Shape {
    model: ModelConfig,
    start: StageStart,
    /// What it grows from.
    source: Option<ModelConfig>,
}

/// Shapes of all stages; those after a wrong one are unknown too.
fn resolve_shapes(spec: &GrowthTrainingJobSpec, findings: &mut Findings) -> Vec<Option<Shape>> {
    let mut shapes: Vec<Option<Shape>> = Vec::new();
    for (index, stage) in spec.stages.iter().enumerate() {
        let shape = match index {
            0 => first_shape(spec, stage, findings),
            _ => {
                let source = shapes[index - 1].as_ref().map(|shape| &shape.model);
                grown_shape(spec, index, source, findings)
            }
        };
        shapes.push(shape);
    }
    shapes
}

fn first_shape(spec: &GrowthTrainingJobSpec, stage: &StageSpec, findings: &mut Findings) -> Option<Shape> {
    if stage.growth.is_some() {
        findings.error(
            "spec.stages[0].growth",
            "the first stage has no stage to grow from; remove growth from it",
        );
    }
    let model = first_architecture(spec, findings)?;
    let start = match &stage.init_from {
        Some(from) => StageStart::Checkpoint { uri: from.uri.clone() },
        None => {
            let over = stage.model.as_ref().and_then(|model| model.initializer);
            StageStart::Random { initializer: over.or(spec.model.initializer).unwrap_or_default() }
        }
    };
    Some(Shape { model, start, source: None })
}

fn grown_shape(
    spec: &GrowthTrainingJobSpec,
    index: usize,
    source: Option<&ModelConfig>,
    findings: &mut Findings,
) -> Option<Shape> {
    let (field, stage) = (stage_field(index), &spec.stages[index]);
    if stage.init_from.is_some() {
        let message = "only the first stage can start from a given checkpoint; remove initFrom";
        findings.error(format!("{field}.initFrom"), message);
    }
    if stage.trained_by.is_some() {
        let message = "only the first stage can be trained by another job; remove trainedBy";
        findings.error(format!("{field}.trainedBy"), message);
    }
    let Some(growth) = &stage.growth else {
        let message = "every stage after the first must grow the one before; add growth to it";
        findings.error(format!("{field}.growth"), message);
        return None;
    };
    let model = stage.model.as_ref();
    let over = model.and_then(|model| model.initializer);
    let source = source?;
    let request = GrowthRequest {
        growth,
        model,
        field: &field,
        source,
        from_stage: &spec.stages[index - 1].name,
        initializer: over.or(spec.model.initializer).unwrap_or_default(),
        seed: u64::try_from(spec.training.seed).unwrap_or_default(),
    };
    let growth = request.resolve(findings)?;
    let model = growth.grown(source);
    Some(Shape { model, start: StageStart::Growth(growth), source: Some(source.clone()) })
}

/// Tokens of every stage, in whole steps. The last stage comes first, because `auto` looks ahead.
fn resolve_tokens(
    spec: &GrowthTrainingJobSpec,
    shapes: &[Option<Shape>],
    batches: &[Option<Batch>],
    findings: &mut Findings,
) -> Vec<Option<u64>> {
    let count = spec.stages.len();
    let mut tokens: Vec<Option<u64>> = vec![None; count];
    let mut notes = Vec::new();
    for index in (0..count).rev() {
        let field = stage_field(index);
        let (Some(batch), written) = (batches[index], spec.stages[index].tokens) else {
            continue;
        };
        tokens[index] = match written {
            StageTokens::Count(wanted) => whole_steps(wanted, batch, &field, &mut notes, findings),
            StageTokens::Auto if index + 1 == count => {
                let message = "auto needs a later stage to grow into; write the tokens of the last stage";
                findings.error(format!("{field}.tokens"), message);
                None
            }
            StageTokens::Auto => {
                let target = shapes[count - 1].as_ref().map(|shape| &shape.model);
                let auto = target.zip(tokens[count - 1]).zip(tokens[index + 1]);
                auto.map(|((target, target_tokens), next_tokens)| {
                    let next = &spec.stages[index + 1].name;
                    let auto = Auto { target, target_tokens, next, next_tokens, batch };
                    auto.tokens(&field, &mut notes)
                })
            }
        };
    }
    notes.into_iter().rev().for_each(|note| findings.note(note));
    tokens
}

fn whole_steps(
    wanted: TokenCount,
    batch: Batch,
    field: &str,
    notes: &mut Vec<String>,
    findings: &mut Findings,
) -> Option<u64> {
    let rounded = batch.round_up(wanted.0).filter(|tokens| (1..=i64::MAX as u64).contains(tokens));
    match rounded {
        None => {
            let message = format!("{wanted} tokens are no stage; use 1 to {}", i64::MAX);
            findings.error(format!("{field}.tokens"), message);
        }
        Some(tokens) if tokens != wanted.0 => notes.push(format!(
            "{field}: {wanted} tokens are not whole steps of {}; it trains {tokens} in {} steps",
            batch.global,
            batch.steps(tokens)
        )),
        Some(_) => {}
    }
    rounded
}

/// What `tokens: auto` is decided from.
struct Auto<'a> {
    target: &'a ModelConfig,
    target_tokens: u64,
    next: &'a str,
    next_tokens: u64,
    batch: Batch,
}

impl Auto<'_> {
    /// The guideline's tokens, between one step and a tenth of the next stage, in whole steps; the reason is noted.
    fn tokens(&self, field: &str, notes: &mut Vec<String>) -> u64 {
        let parameters = self.target.parameter_counts().non_embedding as f64;
        let flops = 6.0 * parameters * self.target_tokens as f64;
        let wanted = guideline::growth_tokens(parameters, flops);
        let cap = self.next_tokens as f64 * LARGEST_SHARE;
        // Rounded down, so that the cap holds; a step is the least that can be trained.
        let steps = (wanted.min(cap) / self.batch.global as f64).floor().max(1.0) as u64;
        let tokens = steps.saturating_mul(self.batch.global);
        let mut note = format!("{field}: tokens: auto: the guideline says {} tokens", about(wanted));
        if wanted > cap {
            note += &format!(", limited to {}, a tenth of stage {}", about(cap), self.next);
        }
        note += &format!("; it trains {tokens} in {steps} steps");
        if !guideline::is_fitted(parameters, flops) {
            note += &format!(
                "; the guideline was fitted on {}, this target has {} and {flops:.1e}: judge for yourself",
                guideline::fitted_range(),
                about(parameters),
            );
        }
        notes.push(note);
        tokens
    }
}

/// A number to three digits: 20.8B.
pub(super) fn about(value: f64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")];
    let (factor, unit) = units.into_iter().find(|(factor, _)| value >= *factor).unwrap_or((1.0, ""));
    let scaled = value / factor;
    let decimals = if scaled >= 99.95 {
        0
    } else if scaled >= 9.995 {
        1
    } else {
        2
    };
    let text = format!("{scaled:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

/// What a stage plan is made from.
struct StageInput<'a> {
    name: &'a str,
    spec: &'a GrowthTrainingJobSpec,
    index: usize,
    shape: Option<Shape>,
    batch: Option<Batch>,
    tokens: Option<u64>,
    /// What its learning-rate schedule runs over.
    span: Option<&'a ScheduleSpan>,
}

impl StageInput<'_> {
    fn resolve(self, first_token: Option<u64>, findings: &mut Findings) -> Option<StagePlan> {
        let stage = &self.spec.stages[self.index];
        let (batch, tokens, span) = (self.batch?, self.tokens?, self.span?);
        let field = stage_field(self.index);
        let after_growth = self.after_growth(batch, tokens, span, findings);
        let scheduled = ScheduledStage {
            span,
            scheduled_by: (&self.spec.stages[span.first], stage_field(span.first)),
            after_growth: after_growth.clone().unwrap_or_default(),
        };
        let training = resolve_training(&self.spec.training, stage, batch, scheduled, &field, findings);
        let checkpoint = resolve_checkpoint(&self.spec.checkpoint, batch, findings);
        let sequence = self.spec.training.sequence_length;
        let evaluation = resolve_evaluation(&self.spec.evaluation, sequence, batch, tokens, findings);
        let micro_batches = batch.global / batch.micro;
        let ranks = check_replicas(stage, micro_batches, self.spec.training.reproducible, &field, findings);
        let ramp = resolve_ramp(stage, batch, tokens, &field, findings);
        let (Shape { model, mut start, source }, training) = (self.shape?, training?);
        if let (StageStart::Growth(plan), Some(growth), Some(source)) = (&mut start, &stage.growth, &source) {
            plan.learn_on_stage(growth, &training);
            plan.note_learning(&field, source, findings);
        }
        let memory = model.memory(batch.micro, micro_batches, ranks?);
        let mask_ramp_tokens = ramp?;
        let freeze = after_growth?.freeze;
        let exact = exact_flops(&model, sequence, freeze.as_ref(), tokens);
        Some(StagePlan {
            job: self.name.to_owned(),
            stage: stage.name.clone(),
            index: u32::try_from(self.index).ok()?,
            storage: self.spec.storage.clone(),
            data: self.spec.data.clone(),
            start,
            trained_by: stage.trained_by.as_ref().map(|by| by.job.clone()),
            first_token: first_token?,
            tokens,
            steps: batch.steps(tokens),
            training,
            checkpoint: checkpoint?,
            evaluation: evaluation?,
            parameters: model.parameter_counts(),
            flops: FlopCount { exact, ..model.training_flops(sequence, tokens) },
            memory: if mask_ramp_tokens.is_some() { memory.with_masks() } else { memory },
            mask_ramp_tokens,
            model,
        })
    }

    /// What is special because it has grown; `None` with the reason in `findings`.
    fn after_growth(
        &self,
        batch: Batch,
        tokens: u64,
        span: &ScheduleSpan,
        findings: &mut Findings,
    ) -> Option<GrowthTrainingPlan> {
        let growth = self.spec.stages[self.index].growth.as_ref();
        let (Some(growth), Some(Shape { model, start: StageStart::Growth(plan), .. })) =
            (growth, &self.shape)
        else {
            return Some(GrowthTrainingPlan::default());
        };
        let (field, schedule_start_tokens) = (&*stage_field(self.index), span.start_tokens);
        GrowthTrainingRequest { growth, plan, model, field, batch, tokens, schedule_start_tokens }
            .resolve(findings)
    }
}

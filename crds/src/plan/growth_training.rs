//! How a stage trains after its growth: what is frozen, where it stands in the learning-rate schedule, and the
//! learning rate of new parameters.

use super::error::Findings;
use super::growth_map::further_copies;
use super::training::Batch;
use super::{GrowthPlan, ModelConfig, StagePlan};
use crate::quantity::TokenCount;
use crate::spec::GrowthTrainingJobSpec;
use crate::spec::stage::{GrowthSpec, StageSpec};
use serde::{Deserialize, Serialize};

/// What does not train after a growth. Default: Nothing.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, schemars::JsonSchema)]
pub enum Freeze {
    /// Everything trains.
    #[default]
    Nothing,
    /// Only new layers train; the layers of the source, embedding, final norm and head do not (LLaMA Pro, arXiv
    /// 2401.02415).
    Source,
    /// New layers, final norm and head train (MSLT).
    SourceButHead,
}

/// What becomes of the learning-rate schedule at a growth. Default: Restart.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq, schemars::JsonSchema)]
pub enum ScheduleAcrossGrowth {
    /// The stage has a schedule of its own and begins at its beginning, as in the paper.
    #[default]
    Restart,
    /// The stage goes on in the schedule of the stage before; the lengths of that are those of both stages together.
    Continue,
}

/// What is special about the training of a stage that has grown.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct GrowthTrainingPlan {
    /// Position in the schedule at which the stage begins: the tokens of the stages whose schedule it continues.
    #[serde(skip_serializing_if = "is_zero")]
    pub schedule_start_tokens: u64,
    /// Tokens over which the learning rate rises from 0 to that of the schedule again.
    #[serde(skip_serializing_if = "is_zero")]
    pub rewarm_tokens: u64,
    /// What does not train at first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezePlan>,
    /// Learning rate of new parameters, where it is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_parameters: Option<NewParametersPlan>,
}

fn is_zero(tokens: &u64) -> bool {
    *tokens == 0
}

impl GrowthTrainingPlan {
    /// Whether nothing is special.
    pub fn is_ordinary(&self) -> bool {
        *self == Self::default()
    }
}

/// What trains while the rest is frozen. The embedding never does.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct FreezePlan {
    /// Layers that train, from 0 and in order.
    pub layers: Vec<u32>,
    /// Whether the final norm and the head train.
    pub head: bool,
    /// Tokens of the stage after which everything trains, in whole steps.
    pub tokens: u64,
}

/// Learning rate of new parameters.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NewParametersPlan {
    /// Their learning rate as a multiple of that of the schedule, after the ramp.
    pub learning_rate_ratio: f64,
    /// Tokens over which the multiple goes linearly from 1 to that.
    pub ramp_tokens: u64,
}

impl NewParametersPlan {
    /// The multiple of the step that begins after `tokens` tokens of the stage.
    pub fn ratio(&self, tokens: u64) -> f64 {
        if tokens >= self.ramp_tokens {
            return self.learning_rate_ratio;
        }
        1.0 + (self.learning_rate_ratio - 1.0) * tokens as f64 / self.ramp_tokens as f64
    }
}

impl GrowthPlan {
    /// Target layers that the source does not have, in order: further copies of its layers, and layers without a source.
    pub fn added_layers(&self) -> Vec<u32> {
        let mut layers = further_copies(&self.layers);
        layers.extend(self.layers.len() as u32..self.target_layers());
        layers
    }

    /// Whether the target has parameters that the source has not.
    fn adds_parameters(&self) -> bool {
        !self.added_layers().is_empty() || self.width.is_some()
    }
}

impl ModelConfig {
    /// Floating-point operations of a training step while `freeze` holds, a token: the whole forward pass; of the
    /// backward pass, which ends at the lowest layer that trains, the gradients of activations above that layer and
    /// of the weights that train.
    pub fn frozen_training_flops_per_token(&self, sequence_length: u32, freeze: &FreezePlan) -> f64 {
        let forward = self.forward_flops(sequence_length);
        let lowest = freeze.layers.iter().min().copied().unwrap_or(self.num_hidden_layers);
        let reached = f64::from(self.num_hidden_layers.saturating_sub(lowest));
        let activations = forward.head + reached * (forward.layer_matrices + 2.0 * forward.layer_attention);
        let head = if freeze.head { forward.head } else { 0.0 };
        let weights = freeze.layers.len() as f64 * forward.layer_matrices + head;
        self.forward_flops_per_token(sequence_length) + activations + weights
    }
}

impl StagePlan {
    /// Floating-point operations of the first `tokens` tokens of the stage, counted as [`super::FlopCount::exact`].
    pub fn exact_flops(&self, tokens: u64) -> f64 {
        let sequence = self.training.sequence_length;
        exact_flops(&self.model, sequence, self.training.after_growth.freeze.as_ref(), tokens)
    }
}

/// Floating-point operations of training on so many tokens, of which the first are under `freeze`.
pub(super) fn exact_flops(
    model: &ModelConfig,
    sequence: u32,
    freeze: Option<&FreezePlan>,
    tokens: u64,
) -> f64 {
    let frozen_tokens = freeze.map_or(0, |freeze| freeze.tokens.min(tokens));
    let frozen = freeze.map_or(0.0, |freeze| model.frozen_training_flops_per_token(sequence, freeze));
    let free = 3.0 * model.forward_flops_per_token(sequence);
    frozen * frozen_tokens as f64 + free * (tokens - frozen_tokens) as f64
}

/// The stages that one schedule runs over, seen from one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScheduleSpan {
    /// The first of them, whose schedule it is.
    pub first: usize,
    /// Tokens of those before this one.
    pub start_tokens: u64,
    /// Tokens of all.
    pub tokens: u64,
    /// In words: `stage small`, `stages small to large`.
    pub name: String,
}

/// The span of every stage; `None` where the tokens of one of its stages are not known.
pub(super) fn schedule_spans(
    spec: &GrowthTrainingJobSpec,
    tokens: &[Option<u64>],
) -> Vec<Option<ScheduleSpan>> {
    let stages = &spec.stages;
    let goes_on = |index: usize| {
        let growth = stages.get(index).and_then(|stage| stage.growth.as_ref());
        index > 0 && growth.is_some_and(|growth| growth.schedule == ScheduleAcrossGrowth::Continue)
    };
    let span = |index: usize| {
        let first = (0..=index).rev().find(|index| !goes_on(*index)).unwrap_or(0);
        let last = (index..stages.len()).take_while(|last| *last == index || goes_on(*last)).last()?;
        let sum = |range: std::ops::Range<usize>| {
            tokens[range].iter().try_fold(0u64, |sum, tokens| sum.checked_add((*tokens)?))
        };
        let name = match first == last {
            true => format!("stage {}", stages[first].name),
            false => format!("stages {} to {}", stages[first].name, stages[last].name),
        };
        Some(ScheduleSpan { first, start_tokens: sum(first..index)?, tokens: sum(first..last + 1)?, name })
    };
    (0..stages.len()).map(span).collect()
}

/// A stage that continues a schedule has none of its own, and a peak of its own makes the rate jump.
pub(super) fn check_continued_schedules(spec: &GrowthTrainingJobSpec, findings: &mut Findings) {
    let rate = |stage: &StageSpec| {
        let over = stage.training.as_ref().and_then(|training| training.optimizer.as_ref()?.adam_w.as_ref());
        let own = over.and_then(|adam_w| adam_w.learning_rate);
        own.unwrap_or(spec.training.optimizer.adam_w.learning_rate)
    };
    for (index, pair) in spec.stages.windows(2).enumerate() {
        let [before, stage] = pair else { continue };
        let field = format!("spec.stages[{}]", index + 1);
        if stage.growth.as_ref().is_none_or(|growth| growth.schedule != ScheduleAcrossGrowth::Continue) {
            continue;
        }
        if stage.training.as_ref().is_some_and(|training| training.schedule.is_some()) {
            let message = format!(
                "growth.schedule: Continue goes on in the schedule of stage {}; remove this one, or growth.schedule",
                before.name
            );
            findings.error(format!("{field}.training.schedule"), message);
        }
        let (old, new) = (rate(before), rate(stage));
        if old != new {
            findings.note(format!(
                "{field}: it goes on in the schedule of stage {}, but with a peak of {new} instead of {old}: the learning rate jumps",
                before.name
            ));
        }
    }
}

/// What the training after a growth is resolved from.
pub(super) struct GrowthTrainingRequest<'a> {
    pub growth: &'a GrowthSpec,
    pub plan: &'a GrowthPlan,
    /// The target.
    pub model: &'a ModelConfig,
    /// The stage: `spec.stages[1]`.
    pub field: &'a str,
    pub batch: Batch,
    /// Tokens of the stage.
    pub tokens: u64,
    pub schedule_start_tokens: u64,
}

impl GrowthTrainingRequest<'_> {
    /// The plan, or `None` with the reason in `findings`.
    pub fn resolve(&self, findings: &mut Findings) -> Option<GrowthTrainingPlan> {
        let rewarm_tokens = self.rewarm(findings);
        let freeze = self.freeze(findings);
        let new_parameters = self.new_parameters(findings);
        Some(GrowthTrainingPlan {
            schedule_start_tokens: self.schedule_start_tokens,
            rewarm_tokens: rewarm_tokens?,
            freeze: freeze?,
            new_parameters: new_parameters?,
        })
    }

    fn error<T>(&self, name: &str, message: impl Into<String>, findings: &mut Findings) -> Option<T> {
        findings.error(format!("{}.growth.{name}", self.field), message);
        None
    }

    fn rewarm(&self, findings: &mut Findings) -> Option<u64> {
        let Some(tokens) = self.growth.rewarm_tokens else { return Some(0) };
        if self.growth.schedule != ScheduleAcrossGrowth::Continue {
            let message = "a schedule that restarts has a warm-up of its own; set warmupTokens in training.schedule, or schedule: Continue";
            return self.error("rewarmTokens", message, findings);
        }
        if tokens.0 > self.tokens {
            let message = format!(
                "a warm-up of {tokens} tokens is longer than the stage ({}); shorten it",
                TokenCount(self.tokens)
            );
            return self.error("rewarmTokens", message, findings);
        }
        Some(tokens.0)
    }

    fn freeze(&self, findings: &mut Findings) -> Option<Option<FreezePlan>> {
        let freeze = self.growth.freeze;
        if freeze == Freeze::Nothing {
            return match self.growth.freeze_tokens {
                None => Some(None),
                Some(_) => {
                    let message =
                        "nothing is frozen; set freeze to Source or SourceButHead, or remove freezeTokens";
                    self.error("freezeTokens", message, findings)
                }
            };
        }
        let operator = self.growth.operator;
        if operator.is_learned() {
            let message =
                format!("{operator:?} mixes layers, so that none of them is the source's; remove freeze");
            return self.error("freeze", message, findings);
        }
        let layers = self.plan.added_layers();
        if layers.is_empty() {
            let message = format!(
                "{freeze:?} trains new layers only, and {:?} adds none here; remove freeze, or add layers{}",
                self.growth.operator,
                if self.growth.operator.is_width() { " with growth.depth" } else { "" },
            );
            return self.error("freeze", message, findings);
        }
        let head = freeze == Freeze::SourceButHead;
        if head && self.model.tie_word_embeddings {
            let message = "the head is to train, but with tieWordEmbeddings it is the embedding; use Source, or set tieWordEmbeddings: false";
            return self.error("freeze", message, findings);
        }
        let tokens = self.freeze_tokens(findings)?;
        Some(Some(FreezePlan { layers, head, tokens }))
    }

    /// Whole steps, the stage's at most.
    fn freeze_tokens(&self, findings: &mut Findings) -> Option<u64> {
        let Some(wanted) = self.growth.freeze_tokens else { return Some(self.tokens) };
        let fits = |tokens: &u64| (1..=self.tokens).contains(tokens);
        let Some(tokens) = self.batch.round_up(wanted.0).filter(fits) else {
            let message = format!(
                "{wanted} tokens are no part of the stage ({}); use fewer than it has, or remove freezeTokens",
                TokenCount(self.tokens)
            );
            return self.error("freezeTokens", message, findings);
        };
        if tokens != wanted.0 {
            findings.note(format!(
                "{}: freezeTokens {wanted} are not whole steps of {}; it unfreezes after {tokens}",
                self.field, self.batch.global
            ));
        }
        Some(tokens)
    }

    fn new_parameters(&self, findings: &mut Findings) -> Option<Option<NewParametersPlan>> {
        let Some(new) = self.growth.new_parameters else { return Some(None) };
        let operator = self.growth.operator;
        if operator.is_learned() {
            let message = format!("{operator:?} mixes weights, so that all of them are new; remove it");
            return self.error("newParameters", message, findings);
        }
        let ratio = new.learning_rate_ratio;
        if !ratio.is_finite() || ratio < 0.0 {
            let message = format!("{ratio} is no multiple of a learning rate; use a number from 0 up");
            return self.error("newParameters.learningRateRatio", message, findings);
        }
        if !self.plan.adds_parameters() {
            let message = "this growth adds no parameters; remove it";
            return self.error("newParameters", message, findings);
        }
        let ramp = new.ramp_tokens.unwrap_or_default();
        if ramp.0 > self.tokens {
            let message = format!(
                "a ramp of {ramp} tokens is longer than the stage ({}); shorten it",
                TokenCount(self.tokens)
            );
            return self.error("newParameters.rampTokens", message, findings);
        }
        Some(Some(NewParametersPlan { learning_rate_ratio: ratio, ramp_tokens: ramp.0 }))
    }
}

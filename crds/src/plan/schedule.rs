//! The learning rate over a stage.

use super::SchedulePlan;
use super::error::Findings;
use crate::quantity::TokenCount;
use crate::spec::training::{CosineSchedule, ScheduleSpec, WsdSchedule};
use std::fmt;

/// What a schedule runs over: a stage, or several of which each continues the schedule of the one before.
#[derive(Clone, Copy)]
pub(super) struct StageLength<'a> {
    /// In words: `stage small`.
    pub name: &'a str,
    pub tokens: u64,
}

impl fmt::Display for StageLength<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({} tokens)", self.name, TokenCount(self.tokens))
    }
}

/// Resolves a schedule for a stage; `field` is where the schedule is written.
pub(super) fn resolve_schedule(
    schedule: &ScheduleSpec,
    stage: StageLength<'_>,
    field: &str,
    findings: &mut Findings,
) -> Option<SchedulePlan> {
    match (&schedule.cosine, &schedule.wsd, &schedule.constant) {
        (Some(cosine), None, None) => resolve_cosine(cosine, stage, field, findings),
        (None, Some(wsd), None) => resolve_wsd(wsd, stage, field, findings),
        (None, None, Some(constant)) => {
            let place = format!("{field}.constant");
            let warmup_tokens = check_warmup(constant.warmup_tokens, stage, &place, findings)?;
            Some(SchedulePlan::Constant { warmup_tokens })
        }
        _ => {
            findings.error(field, "set exactly one of cosine, wsd and constant in schedule");
            None
        }
    }
}

fn resolve_cosine(
    cosine: &CosineSchedule,
    stage: StageLength<'_>,
    field: &str,
    findings: &mut Findings,
) -> Option<SchedulePlan> {
    let field = format!("{field}.cosine");
    let min_ratio = check_ratio(cosine.min_learning_rate_ratio, &field, findings);
    let warmup_tokens = check_warmup(cosine.warmup_tokens, stage, &field, findings)?;
    let horizon_tokens = cosine.horizon_tokens.map_or(stage.tokens, |horizon| horizon.0);
    if horizon_tokens < warmup_tokens || horizon_tokens == 0 {
        let message = format!(
            "the cosine ends at {} tokens, before its warm-up of {}; raise horizonTokens or lower warmupTokens",
            TokenCount(horizon_tokens),
            cosine.warmup_tokens
        );
        findings.error(format!("{field}.horizonTokens"), message);
        return None;
    }
    Some(SchedulePlan::Cosine { warmup_tokens, horizon_tokens, min_ratio: min_ratio? })
}

fn resolve_wsd(
    wsd: &WsdSchedule,
    stage: StageLength<'_>,
    field: &str,
    findings: &mut Findings,
) -> Option<SchedulePlan> {
    let field = format!("{field}.wsd");
    let min_ratio = check_ratio(wsd.min_learning_rate_ratio, &field, findings);
    let warmup_tokens = check_warmup(wsd.warmup_tokens, stage, &field, findings)?;
    let decay_tokens = wsd.decay_tokens.0;
    if decay_tokens > stage.tokens - warmup_tokens {
        let message = format!(
            "a warm-up of {} and a decay of {} tokens do not fit into {stage}; shorten one of them",
            wsd.warmup_tokens, wsd.decay_tokens,
        );
        findings.error(format!("{field}.decayTokens"), message);
        return None;
    }
    Some(SchedulePlan::Wsd { warmup_tokens, decay_tokens, end_tokens: stage.tokens, min_ratio: min_ratio? })
}

fn check_warmup(
    warmup: TokenCount,
    stage: StageLength<'_>,
    field: &str,
    findings: &mut Findings,
) -> Option<u64> {
    if warmup.0 <= stage.tokens {
        return Some(warmup.0);
    }
    let message = format!(
        "a warm-up of {warmup} tokens is longer than {stage}; shorten it (1 % to 3 % of the stage is usual)"
    );
    findings.error(format!("{field}.warmupTokens"), message);
    None
}

fn check_ratio(ratio: f64, field: &str, findings: &mut Findings) -> Option<f64> {
    if (0.0..=1.0).contains(&ratio) {
        return Some(ratio);
    }
    let message = format!("{ratio} is no share of the peak; use 0 to 1");
    findings.error(format!("{field}.minLearningRateRatio"), message);
    None
}

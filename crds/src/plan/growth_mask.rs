//! The masks of RandomDepth and RandomWidth (MSG, arXiv 2305.02869): what is new is random, and its outputs are
//! multiplied by a mask that rises from 0, where the source's function stays, to 1, where the model is a plain one.
//!
//! The masks are a function of the tokens that the stage has trained, so they need no state of their own: a run that was
//! interrupted goes on with the masks that it would have had.

use super::error::Findings;
use super::training::Batch;
use super::{GrowthOperator, GrowthPlan, WidthMap, WidthPlan, WidthRule};
use crate::quantity::TokenCount;
use crate::spec::stage::StageSpec;
use serde::{Deserialize, Serialize};

/// A ramp lasts one part in so many of its stage, if nothing else is said.
const DEFAULT_RAMP_PART: u64 = 10;

/// Masks of what a growth has added, each from 0 to 1; 1 where nothing of the kind is new.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrowthMasks {
    /// New channels inside the MLP.
    pub intermediate: f64,
    /// New channels of the residual stream.
    pub hidden: f64,
    /// New query heads, and new key and value heads.
    pub heads: f64,
    /// Outputs of new layers.
    pub layers: f64,
}

impl GrowthMasks {
    /// All of them 1: a plain model.
    pub const OPEN: Self = Self { intermediate: 1.0, hidden: 1.0, heads: 1.0, layers: 1.0 };
}

impl GrowthPlan {
    /// Whether what is new is masked at first.
    pub fn is_masked(&self) -> bool {
        self.new_layers.is_some() || self.masked_width().is_some()
    }

    /// The widths, where new channels are masked at first.
    pub fn masked_width(&self) -> Option<&WidthPlan> {
        self.width.as_deref().filter(|width| matches!(width.rule, WidthRule::Random { .. }))
    }

    /// The masks after so many tokens of a ramp of `ramp_tokens`. What grows takes turns, with an equal part of the ramp
    /// each and linear in it: channels inside the MLP, the residual stream, heads (the order of MSG's code), layers.
    pub fn masks(&self, tokens: u64, ramp_tokens: u64) -> GrowthMasks {
        let mut masks = GrowthMasks::OPEN;
        let progress = (tokens as f64 / ramp_tokens.max(1) as f64).min(1.0);
        let width = self.masked_width();
        let grows = |map: fn(&WidthPlan) -> &WidthMap| width.is_some_and(|width| map(width).has_new());
        let turns = [
            (grows(|width| &width.intermediate), &mut masks.intermediate),
            (grows(|width| &width.hidden), &mut masks.hidden),
            (grows(|width| &width.heads) || grows(|width| &width.key_value_heads), &mut masks.heads),
            (self.new_layers.is_some(), &mut masks.layers),
        ];
        let turns: Vec<_> = turns.into_iter().filter(|(grows, _)| *grows).collect();
        let count = turns.len() as f64;
        for (turn, (_, mask)) in turns.into_iter().enumerate() {
            *mask = (progress * count - turn as f64).clamp(0.0, 1.0);
        }
        masks
    }
}

impl WidthMap {
    /// Whether some channels have no source.
    pub fn has_new(&self) -> bool {
        self.runs.iter().any(|run| run.from.is_none())
    }
}

/// Tokens of the ramp of a stage; `Some(None)` where its growth masks nothing. It must end before the stage does, whose
/// last checkpoint is a plain model.
pub(super) fn resolve_ramp(
    stage: &StageSpec,
    batch: Batch,
    tokens: u64,
    field: &str,
    findings: &mut Findings,
) -> Option<Option<u64>> {
    let Some(growth) = &stage.growth else { return Some(None) };
    let (options, name) = match growth.operator {
        GrowthOperator::RandomDepth => (growth.random_depth, "randomDepth"),
        GrowthOperator::RandomWidth => (growth.random_width, "randomWidth"),
        _ => return Some(None),
    };
    let place = format!("{field}.growth.{name}.rampTokens");
    let Some(ramp) = options.and_then(|options| options.ramp_tokens) else {
        let ramp = batch.round_up(tokens.div_ceil(DEFAULT_RAMP_PART))?;
        if ramp >= tokens {
            let message = format!(
                "{tokens} tokens are a single step, which leaves no room for the ramp of {:?}; train at least two steps of {}",
                growth.operator, batch.global
            );
            findings.error(format!("{field}.tokens"), message);
            return None;
        }
        return Some(Some(ramp));
    };
    if ramp.0 < batch.global {
        let message = format!("{ramp} tokens are less than one step; use at least {}", batch.global);
        findings.error(place, message);
        return None;
    }
    if ramp.0 >= tokens {
        let message = format!(
            "a ramp of {ramp} tokens does not end before stage {} ({} tokens) does; shorten it (a tenth of the stage is the default)",
            stage.name,
            TokenCount(tokens)
        );
        findings.error(place, message);
        return None;
    }
    Some(Some(ramp.0))
}

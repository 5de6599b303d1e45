//! The growth of a stage: depth and width, resolved to a plan that a trainer only carries out.

use super::architecture::check_grown_model;
use super::error::{Findings, PlanErrors};
use super::growth_depth::{Depth, DepthRequest};
use super::growth_learn::{LearnPlan, LearnedWidth};
use super::growth_map::MAX_LAYERS;
use super::growth_width::WidthRequest;
use super::guideline::auto_factor;
use super::{
    GrowthOperator, GrowthPlan, Initializer, ModelConfig, NewLayersPlan, NoisePlan, WidthPlan, WidthRule,
};
use crate::spec::factor::GrowthFactor;
use crate::spec::model::ModelSpec;
use crate::spec::stage::GrowthSpec;
use serde::{Deserialize, Serialize};

/// What a growth does to the function that the model computes.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, schemars::JsonSchema)]
pub enum GrowthEffect {
    /// Nothing, but for rounding.
    Preserving,
    /// The loss jumps, and has to be trained down again.
    Spike,
}

impl std::fmt::Display for GrowthEffect {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Preserving => "the function stays",
            Self::Spike => "the loss jumps at first",
        })
    }
}

impl GrowthPlan {
    /// What the growth of a source with so many layers does to its function, and why.
    pub fn effect(&self, source_layers: u32) -> (GrowthEffect, &'static str) {
        if self.learn.is_some() {
            return (GrowthEffect::Spike, "weights are learned mixtures of the source's");
        }
        let live = (0u32..).zip(&self.layers).filter(|(target, _)| !self.zero_output.contains(target));
        if !live.map(|(_, source)| *source).eq(0..source_layers) {
            return (GrowthEffect::Spike, "layers run more than once, or in another order");
        }
        if let Some(width) = &self.width
            && matches!(width.rule, WidthRule::Direct { .. })
            && !width.hidden.is_uniform()
        {
            return (
                GrowthEffect::Spike,
                "channels have different numbers of copies, which the norms do not even out",
            );
        }
        if self.noise.is_some() {
            return (GrowthEffect::Spike, "noise is mixed in");
        }
        let reason = match self.width.as_deref() {
            Some(WidthPlan { rule: WidthRule::Direct { .. }, .. }) => {
                "what reads a channel is divided among its copies"
            }
            Some(WidthPlan { rule: WidthRule::Zero { .. }, .. }) => "new channels are zero at first",
            Some(WidthPlan { rule: WidthRule::Random { .. }, .. }) => "new channels are masked at first",
            None if self.new_layers.is_some() => "new layers are masked at first",
            None if self.zero_output.is_empty() => "nothing is new",
            None => "new layers add nothing at first",
        };
        (GrowthEffect::Preserving, reason)
    }

    /// Layers of the target.
    pub fn target_layers(&self) -> u32 {
        let with_source = u32::try_from(self.layers.len()).unwrap_or(MAX_LAYERS);
        with_source.saturating_add(self.new_layers.map_or(0, |new| new.count))
    }

    /// Whether a layer of the target has no source.
    pub fn lacks_source(&self, layer: u32) -> bool {
        layer as usize >= self.layers.len()
    }

    /// The source with the depth and the widths of the target.
    pub fn grown(&self, source: &ModelConfig) -> ModelConfig {
        let learned = self.learn.as_ref().and_then(|learn| learn.width.as_ref());
        let widened = match (&self.width, learned) {
            (Some(width), _) => width.grown(source),
            (None, Some(width)) => width.grown(source),
            (None, None) => source.clone(),
        };
        ModelConfig { num_hidden_layers: self.target_layers(), ..widened }
    }
}

/// What the growth of a stage is resolved from.
pub(super) struct GrowthRequest<'a> {
    pub growth: &'a GrowthSpec,
    pub model: Option<&'a ModelSpec>,
    /// The stage: `spec.stages[1]`.
    pub field: &'a str,
    pub source: &'a ModelConfig,
    pub from_stage: &'a str,
    /// Distribution of random weights.
    pub initializer: Initializer,
    pub seed: u64,
}

impl GrowthRequest<'_> {
    /// The plan, or `None` with the reason in `findings`.
    pub fn resolve(&self, findings: &mut Findings) -> Option<GrowthPlan> {
        check_grown_model(self.growth.operator, self.model, self.field, findings);
        self.check_options(findings)?;
        let depth = self.depth(findings);
        let width = match self.growth.operator.is_width() {
            true => Some(Box::new(self.width(findings)?)),
            false => None,
        };
        let Depth { layers, zero_output, new_layers } = depth?;
        let (initializer, seed) = (self.initializer, self.seed);
        let new_layers = (new_layers > 0).then_some(NewLayersPlan { count: new_layers, initializer, seed });
        let (width, learn) = match self.growth.operator.is_learned() {
            true => (None, Some(Box::new(self.learn(width.as_deref(), findings)?))),
            false => (width, None),
        };
        Some(GrowthPlan {
            from_stage: self.from_stage.to_owned(),
            operator: self.growth.operator,
            layers,
            new_layers,
            zero_output,
            width,
            learn,
            noise: self.noise(findings)?,
            optimizer_state: self.growth.optimizer_state,
        })
    }

    fn target_layers(&self) -> Option<u32> {
        self.model.and_then(|model| model.num_hidden_layers)
    }

    /// The depth's operator: that of the growth, or of its `depth`.
    fn depth_operator(&self) -> Option<GrowthOperator> {
        let growth = self.growth;
        if growth.operator.is_width() {
            growth.depth.map(|depth| depth.operator)
        } else {
            Some(growth.operator)
        }
    }

    /// Options of other operators.
    fn check_options(&self, findings: &mut Findings) -> Option<()> {
        let (growth, depth) = (self.growth, self.depth_operator());
        let wrong = [
            ("layerMap", "LayerMap", growth.layer_map.is_some() && depth != Some(GrowthOperator::LayerMap)),
            (
                "zeroDepth",
                "ZeroDepth",
                growth.zero_depth.is_some() && depth != Some(GrowthOperator::ZeroDepth),
            ),
            (
                "directWidth",
                "DirectWidth",
                growth.direct_width.is_some() && growth.operator != GrowthOperator::DirectWidth,
            ),
            (
                "randomDepth",
                "RandomDepth",
                growth.random_depth.is_some() && growth.operator != GrowthOperator::RandomDepth,
            ),
            (
                "randomWidth",
                "RandomWidth",
                growth.random_width.is_some() && growth.operator != GrowthOperator::RandomWidth,
            ),
            ("learn", "LearnDepth or LearnWidth", growth.learn.is_some() && !growth.operator.is_learned()),
        ];
        let mut fine = Some(());
        for (name, operator, _) in wrong.into_iter().filter(|(.., wrong)| *wrong) {
            let message = format!("{name} belongs to operator {operator}; remove it or change operator");
            findings.error(format!("{}.growth.{name}", self.field), message);
            fine = None;
        }
        if growth.depth.is_some() && !growth.operator.is_width() {
            let message = format!(
                "depth belongs to operators of the width; {:?} grows the depth already, remove it",
                growth.operator
            );
            findings.error(format!("{}.growth.depth", self.field), message);
            fine = None;
        }
        fine
    }

    fn depth(&self, findings: &mut Findings) -> Option<Depth> {
        let (field, source_layers) = (self.field, self.source.num_hidden_layers);
        let target_layers = self.target_layers();
        let Some(operator) = self.depth_operator() else {
            if target_layers.is_some_and(|target| target != source_layers) {
                let message = format!(
                    "{:?} keeps the {source_layers} layers of the source; remove it, or add growth.depth",
                    self.growth.operator
                );
                findings.error(format!("{field}.model.numHiddenLayers"), message);
                return None;
            }
            return Some(Depth::of((0..source_layers).collect()));
        };
        if operator.is_width() {
            let message =
                format!("{operator:?} does not grow the depth; use Stack, Interleave, LayerMap or ZeroDepth");
            findings.error(format!("{field}.growth.depth.operator"), message);
            return None;
        }
        if operator == GrowthOperator::RandomDepth && self.growth.depth.is_some() {
            let message = "RandomDepth lets its layers in over a ramp of its own, which a growth of the width has no place for; grow the width in one stage and the depth in the next";
            findings.error(format!("{field}.growth.depth.operator"), message);
            return None;
        }
        if operator == GrowthOperator::LearnDepth && !self.growth.operator.is_learned() {
            let message = format!(
                "LearnDepth is learned together with the width; use operator LearnWidth instead of {:?}, or another depth.operator",
                self.growth.operator
            );
            findings.error(format!("{field}.growth.depth.operator"), message);
            return None;
        }
        let (factor, place) = match self.growth.depth {
            Some(depth) => (depth.factor, format!("{field}.growth.depth")),
            None => (self.growth.factor, format!("{field}.growth")),
        };
        let factor = self.factor(operator, factor, &place, findings);
        let growth = self.growth;
        DepthRequest { operator, factor, place, growth, field, target_layers, source_layers }
            .resolve(findings)
    }

    /// The factor as a number; what `auto` becomes is noted.
    fn factor(
        &self,
        operator: GrowthOperator,
        factor: Option<GrowthFactor>,
        place: &str,
        findings: &mut Findings,
    ) -> Option<u32> {
        match factor? {
            GrowthFactor::Times(factor) => Some(factor),
            GrowthFactor::Auto => {
                let (factor, reason) = auto_factor(operator, self.growth.operator.is_width());
                findings.note(format!("{place}.factor: auto is {factor}: {reason}"));
                Some(factor)
            }
        }
    }

    fn width(&self, findings: &mut Findings) -> Option<WidthPlan> {
        let (growth, field, source) = (self.growth, self.field, self.source);
        let factor = self.factor(growth.operator, growth.factor, &format!("{field}.growth"), findings);
        if factor.is_some_and(|factor| factor < 2) {
            findings.error(format!("{field}.growth.factor"), "a factor below 2 does not grow; use 2 or more");
            return None;
        }
        let model = self.model.cloned().unwrap_or_default();
        let (initializer, seed) = (self.initializer, self.seed);
        WidthRequest { growth, factor, model: &model, field, source, initializer, seed }.resolve(findings)
    }

    fn learn(&self, width: Option<&WidthPlan>, findings: &mut Findings) -> Option<LearnPlan> {
        let depth = self.depth_operator() == Some(GrowthOperator::LearnDepth);
        let width = width.map(LearnedWidth::of);
        LearnPlan::resolve(self.growth, self.source, (depth, width), (self.field, self.seed), findings)
    }

    fn noise(&self, findings: &mut Findings) -> Option<Option<NoisePlan>> {
        let Some(share) = self.growth.noise.filter(|share| *share != 0.0) else { return Some(None) };
        if !(0.0..=1.0).contains(&share) {
            let message = format!("{share} is no share; use a number from 0 to 1");
            findings.error(format!("{}.growth.noise", self.field), message);
            return None;
        }
        if share > 0.2 {
            findings.note(format!("{}: noise above 0.2 was clearly worse in the paper", self.field));
        }
        Some(Some(NoisePlan { share, seed: self.seed }))
    }
}

/// A growth outside of a job.
#[derive(Debug, Clone, Copy)]
pub struct CheckpointGrowth<'a> {
    /// How it grows.
    pub growth: &'a GrowthSpec,
    /// Sizes of the target that differ, as in a stage.
    pub model: &'a ModelSpec,
    /// Architecture of the source.
    pub source: &'a ModelConfig,
    /// Seed of random weights and noise.
    pub seed: u64,
}

/// Resolves a growth outside of a job, and what a person should know of it. Fields in errors begin with `stage`.
///
/// # Errors
/// Everything that is wrong, as far as one pass can tell.
pub fn resolve_checkpoint_growth(
    CheckpointGrowth { growth, model, source, seed }: CheckpointGrowth<'_>,
) -> Result<(GrowthPlan, Vec<String>), PlanErrors> {
    let mut findings = Findings::default();
    let initializer = model.initializer.unwrap_or_default();
    let request = GrowthRequest {
        growth,
        model: Some(model),
        field: "stage",
        source,
        from_stage: "source",
        initializer,
        seed,
    };
    let plan = request.resolve(&mut findings);
    if let Some(plan) = &plan {
        plan.note_learning("stage", source, &mut findings);
    }
    let notes = findings.finish()?;
    plan.map(|plan| (plan, notes)).ok_or_else(|| PlanErrors::of("stage.growth", "it cannot be carried out"))
}

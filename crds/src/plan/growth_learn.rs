//! Growth by learned mixtures of the source's weights: G_learn of "Stacking Your Transformers" (appendix A.6), which is
//! LiGO (Wang et al., ICLR 2023, arXiv 2303.00980).

use super::error::Findings;
use super::growth_width::WidthPlanError;
use super::{
    GrowthPlan, Initializer, ModelConfig, OptimizerStatePolicy, StagePlan, StageStart, TrainingPlan,
    WidthMap, WidthPlan, WidthRule,
};
use crate::spec::stage::{GrowthSpec, LearnSpec};
use crate::spec::training::AdamWSpec;
use serde::{Deserialize, Serialize};

/// Most steps of learning.
pub const MAX_LEARN_STEPS: u32 = 10_000;

/// Kinds of tensors of a layer, each of which has a depth matrix of its own.
pub const LAYER_KINDS: u64 = 9;

/// Longest sequence that is learned on outside of a job.
const LONGEST_SEQUENCE: u32 = 256;

/// Sequences of one pass, and passes of a step, outside of a job.
const SEQUENCES: u64 = 4;
const PASSES: u64 = 4;

/// Norm to which gradients are clipped outside of a job.
const GRADIENT_CLIP: f64 = 1.0;

/// What is learned, and how: nothing is left to default.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LearnPlan {
    /// Whether layers are mixed by learned matrices; else they are the copies that `layers` of the growth lists.
    pub depth: bool,
    /// The learned matrices of the widths; absent where every width stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<LearnedWidth>,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens of a sequence.
    pub sequence_length: u32,
    /// Tokens of a step.
    pub batch_tokens: u64,
    /// Tokens of one forward and backward pass.
    pub micro_batch_tokens: u64,
    /// The optimizer; its learning rate is constant.
    pub adam_w: AdamWSpec,
    /// Global norm to clip to; 0 for none.
    pub gradient_clip: f64,
    /// Seed of the first matrices and of the order of the data.
    pub seed: u64,
}

/// Where the learned matrices of the widths begin with ones: row i, column j where channel i of the target comes from
/// channel j of the source. Rows of new channels begin random.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LearnedWidth {
    /// Channels of the residual stream: B_emb.
    pub hidden: WidthMap,
    /// Query heads: B_Q.
    pub heads: WidthMap,
    /// Key and value heads: B_K and B_V.
    pub key_value_heads: WidthMap,
    /// Channels inside the MLP: B_mlp.
    pub intermediate: WidthMap,
}

impl LearnedWidth {
    pub(super) fn of(plan: &WidthPlan) -> Self {
        let WidthPlan { hidden, heads, key_value_heads, intermediate, .. } = plan.clone();
        Self { hidden, heads, key_value_heads, intermediate }
    }

    /// Whether it can be carried out on `source`.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self, source: &ModelConfig) -> Result<(), WidthPlanError> {
        self.as_maps(source).check(source)
    }

    /// The source with the widths of the target.
    pub fn grown(&self, source: &ModelConfig) -> ModelConfig {
        self.as_maps(source).grown(source)
    }

    /// For every query head of the target the place of a source's query head in its group, whose part of the attention
    /// output it carries; `None` where the target's groups are larger.
    pub fn slots(&self, source: &ModelConfig) -> Vec<Option<u32>> {
        let group = source.num_attention_heads / source.num_key_value_heads;
        let target_group = self.heads.target() / self.key_value_heads.target();
        let parts = (group / target_group).max(1);
        let part = group / parts;
        let slot = |head: u32| {
            let (key, place) = (head / target_group, head % target_group);
            (place < part).then(|| (key % parts) * part + place)
        };
        (0..self.heads.target()).map(slot).collect()
    }

    /// The same maps with a rule that changes nothing else.
    fn as_maps(&self, source: &ModelConfig) -> WidthPlan {
        let Self { hidden, heads, key_value_heads, intermediate } = self.clone();
        let rms_norm_eps = source.rms_norm_eps;
        let rule = WidthRule::Zero { initializer: Initializer::default(), seed: 0, rms_norm_eps };
        WidthPlan { hidden, heads, key_value_heads, intermediate, rule }
    }

    /// Elements of the five matrices.
    fn elements(&self, head_dim: u32) -> u64 {
        let of = |map: &WidthMap, width: u32| {
            u64::from(map.target()) * u64::from(map.source) * u64::from(width).pow(2)
        };
        of(&self.hidden, 1)
            + of(&self.heads, head_dim)
            + 2 * of(&self.key_value_heads, head_dim)
            + of(&self.intermediate, 1)
    }
}

impl LearnPlan {
    /// The plan outside of a job, or `None` with the reason in `findings`; `learned` is what is learned, and `place` the
    /// stage and the seed.
    pub(super) fn resolve(
        growth: &GrowthSpec,
        source: &ModelConfig,
        learned: (bool, Option<LearnedWidth>),
        place: (&str, u64),
        findings: &mut Findings,
    ) -> Option<Self> {
        let (field, seed) = place;
        let spec = growth.learn.unwrap_or_default();
        let mut fine = check_options(&spec, field, findings);
        if growth.optimizer_state == OptimizerStatePolicy::Keep {
            let message = format!(
                "{:?} mixes weights, and moments of a mixture are not defined; use Reset",
                growth.operator
            );
            findings.error(format!("{field}.growth.optimizerState"), message);
            fine = None;
        }
        fine?;
        let sequence_length = source.max_position_embeddings.min(LONGEST_SEQUENCE);
        let micro_batch_tokens = SEQUENCES * u64::from(sequence_length);
        let adam_w = AdamWSpec::default();
        let learning_rate = spec.learning_rate.unwrap_or(adam_w.learning_rate);
        Some(Self {
            depth: learned.0,
            width: learned.1,
            steps: u64::from(spec.steps),
            sequence_length,
            batch_tokens: PASSES * micro_batch_tokens,
            micro_batch_tokens,
            adam_w: AdamWSpec { learning_rate, ..adam_w },
            gradient_clip: GRADIENT_CLIP,
            seed,
        })
    }

    /// The plan with the batches and the optimizer of a stage.
    fn on_stage(&mut self, spec: LearnSpec, training: &TrainingPlan) {
        let learning_rate = spec.learning_rate.unwrap_or(training.adam_w.learning_rate);
        self.adam_w = AdamWSpec { learning_rate, ..training.adam_w.clone() };
        self.sequence_length = training.sequence_length;
        self.batch_tokens = training.global_batch_tokens;
        self.micro_batch_tokens = training.micro_batch_tokens;
        self.gradient_clip = training.gradient_clip;
        self.seed = training.seed;
    }

    /// Tokens of all steps.
    pub fn tokens(&self) -> u64 {
        self.steps.saturating_mul(self.batch_tokens)
    }

    /// Floating-point operations of all steps, for a target of this architecture.
    fn flops(&self, target: &ModelConfig) -> f64 {
        target.training_flops(self.sequence_length, self.tokens()).exact
    }

    /// Forward and backward passes of a step.
    pub fn micro_batches(&self) -> u64 {
        self.batch_tokens / self.micro_batch_tokens
    }

    /// Bytes that learning holds in memory: source, target, gradients, activations, matrices with their moments.
    pub fn memory_bytes(&self, source: &ModelConfig, target: &ModelConfig) -> u64 {
        const FLOAT: u64 = 4;
        let bytes = |model: &ModelConfig| model.parameter_counts().total.saturating_mul(FLOAT);
        let of_target = target.memory(self.micro_batch_tokens, self.micro_batches(), 1);
        let (mut matrices, mut wide) = (0, 0);
        if self.depth {
            let layers = [source.num_hidden_layers, target.num_hidden_layers].map(u64::from);
            matrices += LAYER_KINDS * layers[0] * layers[1];
        }
        if let Some(width) = &self.width {
            matrices += width.elements(source.head_dim);
            // The source's layers in the target's widths, and their gradient.
            let layers = source.num_hidden_layers;
            wide = 2 * bytes(&ModelConfig { num_hidden_layers: layers, ..target.clone() });
        }
        // The matrices, their gradient and both moments.
        let parts = [
            bytes(source),
            wide,
            of_target.weights_bytes,
            of_target.gradients_bytes,
            of_target.activations_bytes,
            matrices.saturating_mul(4 * FLOAT),
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

fn check_options(spec: &LearnSpec, field: &str, findings: &mut Findings) -> Option<()> {
    let mut fine = Some(());
    if spec.steps > MAX_LEARN_STEPS {
        let message = format!("{} steps are more than {MAX_LEARN_STEPS}; lower it", spec.steps);
        findings.error(format!("{field}.growth.learn.steps"), message);
        fine = None;
    }
    if let Some(rate) = spec.learning_rate.filter(|rate| !rate.is_finite() || *rate < 0.0) {
        let message = format!("{rate} is no learning rate; use a number from 0");
        findings.error(format!("{field}.growth.learn.learningRate"), message);
        fine = None;
    }
    fine
}

impl StagePlan {
    /// Floating-point operations of learning the stage's growth, before its first step; 0 where nothing is learned.
    pub fn learning_flops(&self) -> f64 {
        match &self.start {
            StageStart::Growth(GrowthPlan { learn: Some(learn), .. }) => learn.flops(&self.model),
            _ => 0.0,
        }
    }
}

impl GrowthPlan {
    /// Learns as the stage trains, where it learns.
    pub(super) fn learn_on_stage(&mut self, spec: &GrowthSpec, training: &TrainingPlan) {
        if let Some(learn) = &mut self.learn {
            learn.on_stage(spec.learn.unwrap_or_default(), training);
        }
    }

    /// What a person should know before a growth that learns.
    pub(super) fn note_learning(&self, field: &str, source: &ModelConfig, findings: &mut Findings) {
        let Some(learn) = &self.learn else { return };
        let target = self.grown(source);
        findings.note(format!(
            "{field}: {:?} learns for {} steps of {} tokens ({:.1e} FLOPs) and holds source, target and gradients in memory, about {:.1} GB; other operators need no more for a larger model",
            self.operator,
            learn.steps,
            learn.batch_tokens,
            learn.flops(&target),
            learn.memory_bytes(source, &target) as f64 / 1e9,
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::architecture::tests::paper_1b;

    fn width(source: &ModelConfig, heads: &[Option<u32>], keys: &[Option<u32>]) -> LearnedWidth {
        LearnedWidth {
            hidden: WidthMap::identity(source.hidden_size),
            heads: WidthMap::from_sources(source.num_attention_heads, heads.iter().copied()),
            key_value_heads: WidthMap::from_sources(source.num_key_value_heads, keys.iter().copied()),
            intermediate: WidthMap::identity(source.intermediate_size),
        }
    }

    #[test]
    fn a_query_head_carries_the_place_that_its_source_had() {
        let source = ModelConfig { num_attention_heads: 4, num_key_value_heads: 2, ..paper_1b(2) };
        let same =
            width(&source, &[Some(0), Some(1), Some(2), Some(3), None, None], &[Some(0), Some(1), None]);
        assert_eq!(same.check(&source), Ok(()));
        let places = |width: &LearnedWidth| -> Vec<i64> {
            width.slots(&source).into_iter().map(|slot| slot.map_or(-1, i64::from)).collect()
        };
        assert_eq!(places(&same), [0, 1, 0, 1, 0, 1]);
        // Three queries to a key: the third has no place.
        let larger = width(&source, &[Some(0), Some(1), None, Some(2), Some(3), None], &[Some(0), Some(1)]);
        assert_eq!(larger.check(&source), Ok(()));
        assert_eq!(places(&larger), [0, 1, -1, 0, 1, -1]);
        // A key for each query.
        let split =
            width(&source, &[Some(0), Some(1), Some(2), Some(3)], &[Some(0), Some(0), Some(1), Some(1)]);
        assert_eq!(split.check(&source), Ok(()));
        assert_eq!(places(&split), [0, 1, 0, 1]);
    }
}

//! The architecture of a stage: the job's model, the first stage's overrides, defaults; then growth.

use super::error::Findings;
use super::growth_map::MAX_LAYERS;
use super::{GrowthOperator, ModelConfig};
use crate::spec::GrowthTrainingJobSpec;
use crate::spec::model::ModelSpec;

/// Base of the rotary frequencies where nothing is said.
pub const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// Term inside the root of RMSNorm where nothing is said.
pub const DEFAULT_RMS_NORM_EPS: f64 = 1e-5;

impl ModelSpec {
    /// This model with what `over` says in its place.
    pub fn merged(&self, over: &Self) -> Self {
        Self {
            num_hidden_layers: over.num_hidden_layers.or(self.num_hidden_layers),
            hidden_size: over.hidden_size.or(self.hidden_size),
            intermediate_size: over.intermediate_size.or(self.intermediate_size),
            num_attention_heads: over.num_attention_heads.or(self.num_attention_heads),
            num_key_value_heads: over.num_key_value_heads.or(self.num_key_value_heads),
            head_dim: over.head_dim.or(self.head_dim),
            vocab_size: over.vocab_size.or(self.vocab_size),
            max_position_embeddings: over.max_position_embeddings.or(self.max_position_embeddings),
            rope_theta: over.rope_theta.or(self.rope_theta),
            rms_norm_eps: over.rms_norm_eps.or(self.rms_norm_eps),
            tie_word_embeddings: over.tie_word_embeddings.or(self.tie_word_embeddings),
            initializer: over.initializer.or(self.initializer),
        }
    }

    /// Names of the fields beside numHiddenLayers that are set.
    fn fixed_by_growth(&self) -> Vec<&'static str> {
        let fields = [
            ("hiddenSize", self.hidden_size.is_some()),
            ("intermediateSize", self.intermediate_size.is_some()),
            ("numAttentionHeads", self.num_attention_heads.is_some()),
            ("numKeyValueHeads", self.num_key_value_heads.is_some()),
            ("headDim", self.head_dim.is_some()),
            ("vocabSize", self.vocab_size.is_some()),
            ("maxPositionEmbeddings", self.max_position_embeddings.is_some()),
            ("ropeTheta", self.rope_theta.is_some()),
            ("rmsNormEps", self.rms_norm_eps.is_some()),
            ("tieWordEmbeddings", self.tie_word_embeddings.is_some()),
            ("initializer", self.initializer.is_some()),
        ];
        fields.into_iter().filter(|(_, set)| *set).map(|(name, _)| name).collect()
    }
}

/// The architecture of the first stage; `None` when it is wrong, with every reason in `findings`.
pub(super) fn first_architecture(
    spec: &GrowthTrainingJobSpec,
    findings: &mut Findings,
) -> Option<ModelConfig> {
    let over = spec.stages.first()?.model.clone().unwrap_or_default();
    let model = spec.model.merged(&over);
    let mut fields = Fields { over: &over, findings, failed: false };
    let layers =
        fields.required("numHiddenLayers", model.num_hidden_layers, MAX_LAYERS, "say how many layers");
    let hidden = fields.required("hiddenSize", model.hidden_size, 131_072, "say how wide");
    let advice = "about 8/3 of hiddenSize is usual";
    let intermediate = fields.required("intermediateSize", model.intermediate_size, 524_288, advice);
    let heads = fields.required(
        "numAttentionHeads",
        model.num_attention_heads,
        4_096,
        "64 to 128 channels a head is usual",
    );
    let key_value_heads = fields.key_value_heads(model.num_key_value_heads, heads);
    let head_dim = fields.head_dim(model.head_dim, hidden, heads);
    let vocab_size = fields.vocab_size(model.vocab_size, spec);
    let max_position_embeddings = fields.max_position_embeddings(model.max_position_embeddings, spec);
    let rope_theta = fields.positive("ropeTheta", model.rope_theta.unwrap_or(DEFAULT_ROPE_THETA));
    let rms_norm_eps = fields.positive("rmsNormEps", model.rms_norm_eps.unwrap_or(DEFAULT_RMS_NORM_EPS));
    if fields.failed {
        return None;
    }
    Some(ModelConfig {
        hidden_size: hidden?,
        intermediate_size: intermediate?,
        num_hidden_layers: layers?,
        num_attention_heads: heads?,
        num_key_value_heads: key_value_heads?,
        head_dim: head_dim?,
        vocab_size: vocab_size?,
        max_position_embeddings,
        rope_theta,
        rms_norm_eps,
        tie_word_embeddings: model.tie_word_embeddings.unwrap_or(false),
    })
}

/// What a stage that grows may set: what its operator changes.
pub(super) fn check_grown_model(
    operator: GrowthOperator,
    model: Option<&ModelSpec>,
    field: &str,
    findings: &mut Findings,
) {
    let sizes: &[&str] =
        &["hiddenSize", "intermediateSize", "numAttentionHeads", "numKeyValueHeads", "headDim"];
    // What random weights are drawn from, and what a padded row's norm needs.
    let of_random_weights = [
        ("rmsNormEps", &[GrowthOperator::ZeroWidth, GrowthOperator::RandomWidth][..]),
        (
            "initializer",
            &[GrowthOperator::ZeroWidth, GrowthOperator::RandomDepth, GrowthOperator::RandomWidth],
        ),
    ];
    for name in model.map(ModelSpec::fixed_by_growth).unwrap_or_default() {
        let place = format!("{field}.model.{name}");
        if sizes.contains(&name) {
            if !operator.is_width() {
                let message = "a stage that grows in depth keeps the width of the stage before; remove it, or use DirectWidth, ZeroWidth or RandomWidth";
                findings.error(place, message);
            }
        } else if let Some((_, operators)) = of_random_weights.iter().find(|(field, _)| *field == name) {
            if !operators.contains(&operator) {
                let message = format!("in a stage that grows it belongs to one of {operators:?}; remove it");
                findings.error(place, message);
            }
        } else {
            findings.error(
                place,
                "no growth changes it, so the stage keeps what the stage before has; remove it",
            );
        }
    }
    let eps = model.and_then(|model| model.rms_norm_eps);
    if let Some(eps) = eps.filter(|eps| !eps.is_finite() || *eps <= 0.0) {
        let message = format!("{eps} is not above 0; use a positive number");
        findings.error(format!("{field}.model.rmsNormEps"), message);
    }
}

/// Checks fields and names the place where each was, or should be, written.
struct Fields<'a> {
    over: &'a ModelSpec,
    findings: &'a mut Findings,
    failed: bool,
}

impl Fields<'_> {
    fn fail(&mut self, name: &str, overridden: bool, message: String) {
        let place = if overridden { "spec.stages[0].model" } else { "spec.model" };
        self.findings.error(format!("{place}.{name}"), message);
        self.failed = true;
    }

    fn is_overridden(&self, name: &str) -> bool {
        name == "numHiddenLayers" && self.over.num_hidden_layers.is_some()
            || self.over.fixed_by_growth().contains(&name)
    }

    fn required(&mut self, name: &str, value: Option<u32>, max: u32, advice: &str) -> Option<u32> {
        let overridden = self.is_overridden(name);
        match value {
            Some(value) if (1..=max).contains(&value) => return Some(value),
            Some(value) => {
                self.fail(name, overridden, format!("{value} is out of range; use 1 to {max}"));
            }
            None => self.fail(name, overridden, format!("it is missing; {advice}")),
        }
        None
    }

    fn key_value_heads(&mut self, given: Option<u32>, heads: Option<u32>) -> Option<u32> {
        let (heads, given) = (heads?, given.or(heads)?);
        if given == 0 || heads % given != 0 {
            let overridden = self.is_overridden("numKeyValueHeads");
            let message = format!(
                "{given} does not divide the {heads} of numAttentionHeads; use a divisor, or remove it"
            );
            self.fail("numKeyValueHeads", overridden, message);
            return None;
        }
        Some(given)
    }

    fn head_dim(&mut self, given: Option<u32>, hidden: Option<u32>, heads: Option<u32>) -> Option<u32> {
        let overridden = self.is_overridden("headDim");
        let head_dim = match (given, hidden, heads) {
            (Some(head_dim), ..) => head_dim,
            (None, Some(hidden), Some(heads)) if hidden % heads == 0 => hidden / heads,
            (None, Some(hidden), Some(heads)) => {
                let message = format!(
                    "it is missing, and hiddenSize {hidden} is no multiple of numAttentionHeads {heads}; set it, or change one of them"
                );
                self.fail("headDim", overridden, message);
                return None;
            }
            _ => return None,
        };
        if head_dim == 0 || head_dim % 2 != 0 || head_dim > 131_072 {
            let message = format!(
                "a head of {head_dim} channels cannot carry rotary positions; use an even number (hiddenSize / numAttentionHeads by default)"
            );
            self.fail("headDim", overridden, message);
            return None;
        }
        Some(head_dim)
    }

    fn vocab_size(&mut self, given: Option<u32>, spec: &GrowthTrainingJobSpec) -> Option<u32> {
        let trained = spec.data.tokenizer.train.as_ref().map(|train| train.vocab_size);
        let advice = "set it to the size of the tokenizer at data.tokenizer.uri";
        let size = self.required("vocabSize", given.or(trained), 16_777_216, advice)?;
        if let Some(trained) = trained.filter(|trained| *trained > size) {
            let overridden = self.is_overridden("vocabSize");
            let message = format!(
                "{size} is smaller than data.tokenizer.train.vocabSize {trained}; remove it or make it at least as large"
            );
            self.fail("vocabSize", overridden, message);
            return None;
        }
        Some(size)
    }

    fn max_position_embeddings(&mut self, given: Option<u32>, spec: &GrowthTrainingJobSpec) -> u32 {
        let sequence = spec.training.sequence_length;
        let longest = given.unwrap_or(sequence);
        if longest < sequence {
            let overridden = self.is_overridden("maxPositionEmbeddings");
            let message = format!(
                "{longest} is shorter than training.sequenceLength {sequence}; raise it or lower sequenceLength"
            );
            self.fail("maxPositionEmbeddings", overridden, message);
        }
        longest
    }

    fn positive(&mut self, name: &str, value: f64) -> f64 {
        if !value.is_finite() || value <= 0.0 {
            let overridden = self.is_overridden(name);
            self.fail(name, overridden, format!("{value} is not above 0; use a positive number"));
        }
        value
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The paper's model of 1.1 B, and its base with 6 layers.
    pub(crate) fn paper_1b(num_hidden_layers: u32) -> ModelConfig {
        ModelConfig {
            hidden_size: 2048,
            intermediate_size: 5632,
            num_hidden_layers,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 64,
            vocab_size: 32_000,
            max_position_embeddings: 2048,
            rope_theta: DEFAULT_ROPE_THETA,
            rms_norm_eps: DEFAULT_RMS_NORM_EPS,
            tie_word_embeddings: false,
        }
    }
}

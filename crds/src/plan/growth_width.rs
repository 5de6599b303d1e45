//! Where the channels of a wider model come from.

use super::error::Findings;
use super::{Initializer, ModelConfig, WidthMap, WidthPlan, WidthRule, WidthRun};
use crate::plan::GrowthOperator;
use crate::spec::model::ModelSpec;
use crate::spec::stage::GrowthSpec;

/// Largest width of each kind, as the API has them.
const MAX_HIDDEN: u32 = 131_072;
const MAX_INTERMEDIATE: u32 = 524_288;
const MAX_HEADS: u32 = 4096;

/// Why a width plan cannot be carried out.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum WidthPlanError {
    /// A map was made for a source of another size.
    #[error("width.{map} of the growth plan is for {expected} channels, but the source has {found}")]
    OtherSource {
        /// The map.
        map: &'static str,
        /// Channels of the source.
        found: u32,
        /// Channels that the map is for.
        expected: u32,
    },
    /// A run names channels that do not exist, or is empty.
    #[error(
        "width.{map}.runs of the growth plan takes {count} channels from {from}, but the source has {source_size}"
    )]
    OutOfRange {
        /// The map.
        map: &'static str,
        /// First source channel.
        from: u32,
        /// Channels of the run.
        count: u32,
        /// Channels of the source.
        source_size: u32,
    },
    /// A source channel has no copy, or a map of copies has new channels.
    #[error("width.{map} of the growth plan does not fit its rule: {reason}")]
    Rule {
        /// The map.
        map: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// A query head is put beside a key head that it did not belong to.
    #[error(
        "width.heads of the growth plan puts query head {head} with a copy of another key head than its source has"
    )]
    OtherKeyHead {
        /// Target query head.
        head: usize,
    },
}

impl WidthMap {
    /// As it is.
    pub fn identity(size: u32) -> Self {
        Self { source: size, runs: vec![WidthRun { from: Some(0), count: size }] }
    }

    /// Target channel j is source channel j mod `source`.
    pub fn repeat(source: u32, target: u32) -> Self {
        Self::from_sources(source, (0..target).map(|channel| channel.checked_rem(source)))
    }

    /// The source, then new channels.
    pub fn pad(source: u32, target: u32) -> Self {
        Self::from_sources(source, (0..target).map(|channel| (channel < source).then_some(channel)))
    }

    /// Joins neighbours into runs.
    pub fn from_sources(source: u32, sources: impl IntoIterator<Item = Option<u32>>) -> Self {
        let mut runs: Vec<WidthRun> = Vec::new();
        for from in sources {
            match runs.last_mut() {
                Some(run) if from == run.from.map(|first| first + run.count) => run.count += 1,
                _ => runs.push(WidthRun { from, count: 1 }),
            }
        }
        Self { source, runs }
    }

    /// Channels of the target.
    pub fn target(&self) -> u32 {
        self.runs.iter().fold(0, |sum: u32, run| sum.saturating_add(run.count))
    }

    /// The source of every target channel.
    pub fn sources(&self) -> impl Iterator<Item = Option<u32>> {
        self.runs.iter().flat_map(|run| (0..run.count).map(move |index| Some(run.from? + index)))
    }

    /// The same map where every channel is `width` side by side: of heads, their channels.
    pub fn times(&self, width: u32) -> Self {
        let scaled = |run: &WidthRun| WidthRun {
            from: run.from.map(|from| from.saturating_mul(width)),
            count: run.count.saturating_mul(width),
        };
        Self { source: self.source.saturating_mul(width), runs: self.runs.iter().map(scaled).collect() }
    }

    /// Copies of every source channel.
    pub fn copies(&self) -> Vec<u32> {
        let mut copies = vec![0; self.source as usize];
        for source in self.sources().flatten() {
            copies[source as usize] += 1;
        }
        copies
    }

    /// Whether every source channel has the same number of copies, and nothing is new.
    pub fn is_uniform(&self) -> bool {
        let copies = self.copies();
        let total: u32 = copies.iter().sum();
        total == self.target() && copies.iter().all(|count| Some(count) == copies.first())
    }

    /// Whether nothing changes.
    pub fn is_identity(&self) -> bool {
        *self == Self::identity(self.source)
    }

    fn check(&self, map: &'static str, source: u32) -> Result<(), WidthPlanError> {
        if self.source != source {
            return Err(WidthPlanError::OtherSource { map, found: source, expected: self.source });
        }
        for run in &self.runs {
            let from = run.from.unwrap_or(0);
            if run.count == 0
                || run.from.is_some() && from.checked_add(run.count).is_none_or(|end| end > source)
            {
                return Err(WidthPlanError::OutOfRange { map, from, count: run.count, source_size: source });
            }
        }
        Ok(())
    }
}

impl WidthPlan {
    /// The maps with their names and the sizes of a model.
    pub(crate) fn maps<'a>(&'a self, model: &ModelConfig) -> [(&'static str, &'a WidthMap, u32); 4] {
        [
            ("hidden", &self.hidden, model.hidden_size),
            ("heads", &self.heads, model.num_attention_heads),
            ("keyValueHeads", &self.key_value_heads, model.num_key_value_heads),
            ("intermediate", &self.intermediate, model.intermediate_size),
        ]
    }

    /// Of every query head of the target whether it is new beside a key and value head that is not: it passes old values
    /// on.
    pub fn new_heads_at_old_keys(&self) -> Vec<bool> {
        let group = (self.heads.target() / self.key_value_heads.target().max(1)).max(1) as usize;
        let keys: Vec<bool> = self.key_value_heads.sources().map(|source| source.is_some()).collect();
        let passes_on =
            |(head, source): (usize, Option<u32>)| source.is_none() && keys.get(head / group) == Some(&true);
        self.heads.sources().enumerate().map(passes_on).collect()
    }

    /// Whether the plan can be carried out on `source`.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self, source: &ModelConfig) -> Result<(), WidthPlanError> {
        for (name, map, size) in self.maps(source) {
            map.check(name, size)?;
            if map.has_new() && matches!(self.rule, WidthRule::Direct { .. }) {
                let reason = "copies have no new channels";
                return Err(WidthPlanError::Rule { map: name, reason });
            }
            if map.copies().contains(&0) {
                let reason = "a source channel is left out";
                return Err(WidthPlanError::Rule { map: name, reason });
            }
        }
        let (heads, keys) = (self.heads.target(), self.key_value_heads.target());
        if !heads.is_multiple_of(keys) {
            let reason = "numKeyValueHeads does not divide numAttentionHeads";
            return Err(WidthPlanError::Rule { map: "heads", reason });
        }
        if matches!(self.rule, WidthRule::Zero { .. } | WidthRule::Random { .. })
            && self.hidden.copies().iter().any(|copies| *copies > 1)
        {
            return Err(WidthPlanError::Rule { map: "hidden", reason: "a channel is copied" });
        }
        self.check_groups(source)
    }

    /// A query head computes the same only beside the keys and values that it had.
    fn check_groups(&self, source: &ModelConfig) -> Result<(), WidthPlanError> {
        let group = source.num_attention_heads / source.num_key_value_heads;
        let target_group = (self.heads.target() / self.key_value_heads.target()) as usize;
        let keys: Vec<Option<u32>> = self.key_value_heads.sources().collect();
        for (head, from) in self.heads.sources().enumerate() {
            if from.is_some_and(|from| keys[head / target_group] != Some(from / group)) {
                return Err(WidthPlanError::OtherKeyHead { head });
            }
        }
        Ok(())
    }

    /// The source with the widths of the target.
    pub fn grown(&self, source: &ModelConfig) -> ModelConfig {
        let rms_norm_eps = match self.rule {
            WidthRule::Direct { .. } => source.rms_norm_eps,
            WidthRule::Zero { rms_norm_eps, .. } | WidthRule::Random { rms_norm_eps, .. } => rms_norm_eps,
        };
        ModelConfig {
            hidden_size: self.hidden.target(),
            intermediate_size: self.intermediate.target(),
            num_attention_heads: self.heads.target(),
            num_key_value_heads: self.key_value_heads.target(),
            rms_norm_eps,
            ..source.clone()
        }
    }
}

/// What a growth of the width is resolved from.
pub(super) struct WidthRequest<'a> {
    pub growth: &'a GrowthSpec,
    /// Its factor as a number.
    pub factor: Option<u32>,
    pub model: &'a ModelSpec,
    pub field: &'a str,
    pub source: &'a ModelConfig,
    pub initializer: Initializer,
    pub seed: u64,
}

/// Sizes of the target.
#[derive(Clone, Copy, PartialEq)]
struct Sizes {
    hidden: u32,
    intermediate: u32,
    heads: u32,
    key_value_heads: u32,
}

impl Sizes {
    fn of(model: &ModelConfig) -> Self {
        Self {
            hidden: model.hidden_size,
            intermediate: model.intermediate_size,
            heads: model.num_attention_heads,
            key_value_heads: model.num_key_value_heads,
        }
    }
}

impl WidthRequest<'_> {
    /// The plan, or `None` with the reason in `findings`.
    pub fn resolve(&self, findings: &mut Findings) -> Option<WidthPlan> {
        let sizes = self.sizes(findings)?;
        let direct = self.growth.operator == GrowthOperator::DirectWidth;
        let (heads, key_value_heads) = self.head_maps(sizes, direct, findings)?;
        let widen = if direct { WidthMap::repeat } else { WidthMap::pad };
        let source = Sizes::of(self.source);
        let plan = WidthPlan {
            hidden: widen(source.hidden, sizes.hidden),
            heads,
            key_value_heads,
            intermediate: widen(source.intermediate, sizes.intermediate),
            rule: match self.growth.operator {
                GrowthOperator::DirectWidth => self.direct_rule(),
                GrowthOperator::RandomWidth => self.random_rule(sizes.hidden),
                _ => self.zero_rule(sizes.hidden),
            },
        };
        if direct && !plan.hidden.is_uniform() {
            findings.note(format!(
                "{}: hiddenSize {} is no multiple of {}, so DirectWidth changes what the model computes: expect a higher loss at first",
                self.field, sizes.hidden, source.hidden
            ));
        }
        if !sizes.hidden.is_multiple_of(sizes.heads) {
            findings.note(format!(
                "{}: hiddenSize {} is no multiple of {} numAttentionHeads; it trains, but transformers 5 does not open such a model",
                self.field, sizes.hidden, sizes.heads
            ));
        }
        Some(plan)
    }

    fn direct_rule(&self) -> WidthRule {
        WidthRule::Direct { split: self.growth.direct_width.unwrap_or_default().split, seed: self.seed }
    }

    /// The mean square of a padded row is smaller by d / D; with an eps that is smaller too, the norm is the same but
    /// for a factor that the gains take.
    fn padded_eps(&self, hidden: u32) -> f64 {
        let scaled = self.source.rms_norm_eps * f64::from(self.source.hidden_size) / f64::from(hidden);
        self.model.rms_norm_eps.unwrap_or(scaled)
    }

    fn zero_rule(&self, hidden: u32) -> WidthRule {
        let rms_norm_eps = self.padded_eps(hidden);
        WidthRule::Zero { initializer: self.initializer, seed: self.seed, rms_norm_eps }
    }

    /// While the masks are 0 a row is a padded one too.
    fn random_rule(&self, hidden: u32) -> WidthRule {
        let rms_norm_eps = self.padded_eps(hidden);
        WidthRule::Random { initializer: self.initializer, seed: self.seed, rms_norm_eps }
    }

    fn sizes(&self, findings: &mut Findings) -> Option<Sizes> {
        let source = Sizes::of(self.source);
        if let Some(head_dim) = self.model.head_dim.filter(|head_dim| *head_dim != self.source.head_dim) {
            let message = format!(
                "heads keep their width of {}, not {head_dim}; remove it, and change numAttentionHeads instead",
                self.source.head_dim
            );
            findings.error(format!("{}.model.headDim", self.field), message);
            return None;
        }
        let hidden = self.size("hiddenSize", self.model.hidden_size, source.hidden, MAX_HIDDEN, findings);
        let intermediate = self.size(
            "intermediateSize",
            self.model.intermediate_size,
            source.intermediate,
            MAX_INTERMEDIATE,
            findings,
        );
        let heads = self.model.num_attention_heads;
        let heads = self.size("numAttentionHeads", heads, source.heads, MAX_HEADS, findings);
        let key_value_heads = self.key_value_heads(heads?, findings);
        let sizes = Sizes {
            hidden: hidden?,
            intermediate: intermediate?,
            heads: heads?,
            key_value_heads: key_value_heads?,
        };
        if sizes == source {
            let message = "nothing becomes wider; set factor, or larger sizes in the stage's model";
            findings.error(format!("{}.growth", self.field), message);
            return None;
        }
        Some(sizes)
    }

    /// The size that the stage's model or the factor gives.
    fn size(
        &self,
        name: &str,
        given: Option<u32>,
        source: u32,
        max: u32,
        findings: &mut Findings,
    ) -> Option<u32> {
        let place = format!("{}.model.{name}", self.field);
        let multiplied = u64::from(source) * u64::from(self.factor.unwrap_or(1));
        let size = u64::from(given.unwrap_or(0)).max(if given.is_some() { 0 } else { multiplied });
        if self.factor.is_some() && size != multiplied {
            let message =
                format!("factor makes {multiplied} of {source}, but this says {size}; remove one of them");
            findings.error(place, message);
            return None;
        }
        if size < u64::from(source) {
            findings
                .error(place, format!("{size} is smaller than the {source} that grow; raise or remove it"));
            return None;
        }
        if size > u64::from(max) {
            findings.error(place, format!("{size} is more than {max}; lower it, or factor"));
            return None;
        }
        u32::try_from(size).ok()
    }

    /// As given, or as many query heads to a key head as in the source.
    fn key_value_heads(&self, heads: u32, findings: &mut Findings) -> Option<u32> {
        let (name, source) = ("numKeyValueHeads", Sizes::of(self.source));
        let place = format!("{}.model.{name}", self.field);
        let given = self.model.num_key_value_heads;
        let group = source.heads / source.key_value_heads;
        if given.is_none() && self.factor.is_none() {
            if heads.is_multiple_of(group) {
                return Some(heads / group);
            }
            let message = format!(
                "it is missing, and {heads} query heads cannot be grouped by {group} as in the source; set it"
            );
            findings.error(place, message);
            return None;
        }
        let size = self.size(name, given, source.key_value_heads, MAX_HEADS, findings)?;
        if !heads.is_multiple_of(size) {
            findings.error(
                place,
                format!("{size} does not divide the {heads} of numAttentionHeads; use a divisor"),
            );
            return None;
        }
        Some(size)
    }

    /// Maps of query heads and of key heads. A query head stays with the keys it had; where a key head gets fewer
    /// queries than before, it is repeated for the parts of its group, which computes the same.
    fn head_maps(&self, sizes: Sizes, repeat: bool, findings: &mut Findings) -> Option<(WidthMap, WidthMap)> {
        let source = Sizes::of(self.source);
        let group = source.heads / source.key_value_heads;
        let target_group = sizes.heads / sizes.key_value_heads;
        let parts = if target_group < group { group / target_group } else { 1 };
        if group != target_group * parts && target_group < group {
            let message = format!(
                "{target_group} query heads to a key head cannot be made of groups of {group}; use a divisor or more than {group}"
            );
            findings.error(format!("{}.model.numKeyValueHeads", self.field), message);
            return None;
        }
        let (keys, part) = (source.key_value_heads * parts, group / parts);
        let key = |key: u32| (repeat || key < keys).then(|| (key % keys) / parts);
        let query = |head: u32| {
            let (key, place) = (head / target_group, head % target_group);
            (repeat || key < keys && place < part).then(|| (key % keys) * part + place % part)
        };
        let heads = WidthMap::from_sources(source.heads, (0..sizes.heads).map(query));
        let keys = WidthMap::from_sources(source.key_value_heads, (0..sizes.key_value_heads).map(key));
        Some((heads, keys))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(map: &WidthMap) -> Vec<i64> {
        map.sources().map(|source| source.map_or(-1, i64::from)).collect()
    }

    #[test]
    fn runs_are_as_long_as_they_can_be() {
        let run = |from, count| WidthRun { from, count };
        assert_eq!(WidthMap::repeat(4, 10).runs, [run(Some(0), 4), run(Some(0), 4), run(Some(0), 2)]);
        assert_eq!(WidthMap::pad(4, 6).runs, [run(Some(0), 4), run(None, 2)]);
        assert_eq!(WidthMap::repeat(4, 4), WidthMap::identity(4));
        assert_eq!(WidthMap::pad(4, 6).times(2).runs, [run(Some(0), 8), run(None, 4)]);
        assert_eq!(WidthMap::repeat(4, 10).copies(), [3, 3, 2, 2]);
        assert!(WidthMap::repeat(4, 8).is_uniform() && !WidthMap::repeat(4, 10).is_uniform());
        assert!(!WidthMap::pad(4, 8).is_uniform());
        assert_eq!(sources(&WidthMap::pad(2, 4).times(2)), [0, 1, 2, 3, -1, -1, -1, -1]);
    }

    #[test]
    fn a_map_reads_as_it_was_written() {
        let text = serde_json::to_string(&WidthMap::pad(4, 6)).unwrap();
        assert_eq!(text, r#"{"source":4,"runs":[{"from":0,"count":4},{"count":2}]}"#);
        assert_eq!(serde_json::from_str::<WidthMap>(&text).unwrap(), WidthMap::pad(4, 6));
    }
}

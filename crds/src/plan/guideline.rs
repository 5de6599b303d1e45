//! When to grow and by how much: the paper's guidelines, and what they promise.

use super::GrowthOperator;
use super::resolve::about;
use serde::Serialize;

/// Growth factor that the paper recommends; its optimum lay between 2 and 4.
pub const FACTOR: u32 = 4;

/// Factor of all widths that multiplies the parameters by [`FACTOR`]: matrices grow with its square.
pub const WIDTH_FACTOR: u32 = 2;

/// Least factor of a growth.
const LEAST_FACTOR: u32 = 2;

/// What `factor: auto` of an operator is, and why. A depth that grows beside the width gets the least that is a growth,
/// for the width takes all that the guideline allows.
pub(super) fn auto_factor(operator: GrowthOperator, beside_width: bool) -> (u32, &'static str) {
    match (operator.is_width(), beside_width) {
        (true, _) => {
            (WIDTH_FACTOR, "twice the widths are about four times the parameters, the paper's guideline")
        }
        (false, true) => {
            (LEAST_FACTOR, "the width grows in the same step, so the depth grows as little as it can")
        }
        (false, false) => (FACTOR, "the paper's guideline"),
    }
}

/// Parameters of the models that the guideline was fitted on.
pub const FITTED_PARAMETERS: std::ops::RangeInclusive<f64> = 4e8..=3e9;

/// Training budgets, in floating-point operations, that it was fitted on.
pub const FITTED_FLOPS: std::ops::RangeInclusive<f64> = 0.8e20..=12e20;

/// Largest share of the next stage's tokens that a base gets: the ratio of the paper's 1.1 B run.
pub const LARGEST_SHARE: f64 = 0.1;

/// Tokens after which to grow: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, for a target of N non-embedding
/// parameters and a budget of C floating-point operations.
pub fn growth_tokens(parameters: f64, flops: f64) -> f64 {
    10f64.powf(0.88 * parameters.log10() + 163.27 / flops.log10() - 5.74)
}

/// Whether the guideline was fitted on models and budgets like these.
pub fn is_fitted(parameters: f64, flops: f64) -> bool {
    FITTED_PARAMETERS.contains(&parameters) && FITTED_FLOPS.contains(&flops)
}

/// These models and budgets, in words.
pub(super) fn fitted_range() -> String {
    format!(
        "{} to {} parameters and {:e} to {:e} FLOP",
        about(*FITTED_PARAMETERS.start()),
        about(*FITTED_PARAMETERS.end()),
        FITTED_FLOPS.start(),
        FITTED_FLOPS.end()
    )
}

/// Speedups that the paper printed: target parameters, tokens that training from scratch would take, and how much
/// more arithmetic that is than growing.
const SPEEDUPS: [(f64, f64, f64); 9] = [
    (4.1e8, 4e11, 0.531),
    (4.1e8, 7e11, 0.31),
    (1.1e9, 1e11, 0.491),
    (3e9, 1.8e11, 0.486),
    (3e9, 2.4e11, 0.545),
    (7e9, 1.6e11, 0.408),
    (7e9, 2.2e11, 0.553),
    (7e9, 2.8e11, 0.538),
    (7e9, 3e11, 0.546),
];

/// How far from a printed size, and from the tokens printed for it, a speedup is still taken from it.
const NEAR: f64 = 1.3;

/// What the paper would do for a target.
#[derive(Serialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Guide {
    /// Non-embedding parameters of the target.
    pub parameters: f64,
    /// Tokens of the target.
    pub tokens: f64,
    /// Training budget of the target, 6 N D.
    pub flops: f64,
    /// Tokens after which to grow, by the fitted formula.
    pub growth_tokens: f64,
    /// The same, at most a tenth of the target's.
    pub base_tokens: f64,
    /// Growth factor.
    pub factor: u32,
    /// Non-embedding parameters of the base: the target's divided by the factor.
    pub base_parameters: f64,
    /// Arithmetic of the base.
    pub base_flops: f64,
    /// Tokens of the target that the base costs as much as.
    pub base_equivalent_tokens: f64,
    /// Arithmetic of both.
    pub total_flops: f64,
    /// How much more arithmetic training from scratch would need for the same loss, where the paper measured
    /// something like it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speedup: Option<ExpectedSpeedup>,
    /// Where this leaves what was measured.
    pub warnings: Vec<String>,
}

/// A speedup of the paper.
#[derive(Serialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ExpectedSpeedup {
    /// 0.546 is 54.6 %.
    pub value: f64,
    /// Parameters of the run that it was measured on.
    pub parameters: f64,
    /// Tokens from scratch of that run.
    pub tokens: f64,
}

/// The guidelines for a target of so many non-embedding parameters that is trained on so many tokens.
pub fn guide(parameters: f64, tokens: f64) -> Guide {
    let flops = 6.0 * parameters * tokens;
    let growth_tokens = growth_tokens(parameters, flops);
    let base_tokens = growth_tokens.min(tokens * LARGEST_SHARE);
    let base_parameters = parameters / f64::from(FACTOR);
    let base_flops = 6.0 * base_parameters * base_tokens;
    let speedup = expected_speedup(parameters, tokens);
    let mut warnings = Vec::new();
    if base_tokens < growth_tokens {
        warnings.push(format!(
            "the formula says {} tokens for the base; limited to {}, a tenth of the target's",
            about(growth_tokens),
            about(base_tokens)
        ));
    }
    if !is_fitted(parameters, flops) {
        warnings.push(format!(
            "the formula was fitted on {}; this target has {} and {flops:.1e}",
            fitted_range(),
            about(parameters)
        ));
    }
    if speedup.is_none() {
        warnings.push(
            "the paper printed no speedup near these parameters and tokens (410M, 1.1B, 3B, 7B at 100B to 700B)"
                .to_owned(),
        );
    }
    Guide {
        parameters,
        tokens,
        flops,
        growth_tokens,
        base_tokens,
        factor: FACTOR,
        base_parameters,
        base_flops,
        base_equivalent_tokens: base_flops / (6.0 * parameters),
        total_flops: flops + base_flops,
        speedup,
        warnings,
    }
}

/// The nearest printed speedup, if it is near.
fn expected_speedup(parameters: f64, tokens: f64) -> Option<ExpectedSpeedup> {
    let distance = |a: f64, b: f64| (a / b).ln().abs();
    let near = |&&(size, length, _): &&(f64, f64, f64)| {
        distance(size, parameters) <= NEAR.ln() && distance(length, tokens) <= NEAR.ln()
    };
    let total =
        |&&(size, length, _): &&(f64, f64, f64)| distance(size, parameters) + distance(length, tokens);
    let nearest = SPEEDUPS.iter().filter(near).min_by(|a, b| total(a).total_cmp(&total(b)))?;
    Some(ExpectedSpeedup { value: nearest.2, parameters: nearest.0, tokens: nearest.1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_table() {
        // Table 4: parameters and tokens of known models, and when to grow them, in billions of tokens.
        let table = [(8e9, 15e12, 6.581), (7e9, 2e12, 11.113), (13e9, 2e12, 15.844), (70e9, 2e12, 42.475)];
        for (parameters, tokens, billions) in table {
            let found = growth_tokens(parameters, 6.0 * parameters * tokens) / 1e9;
            assert!((found - billions).abs() < 0.0005, "{parameters:e}: {found} instead of {billions}");
        }
    }

    #[test]
    fn a_guide_counts_the_base() {
        let guide = guide(7e9, 3e11);
        assert!((guide.growth_tokens / 1e9 - 20.5).abs() < 0.1, "{guide:?}");
        assert_eq!((guide.factor, guide.base_parameters), (4, 1.75e9));
        // A base at a quarter of the size costs a quarter of its tokens.
        assert!((guide.base_equivalent_tokens / guide.base_tokens - 0.25).abs() < 1e-12);
        assert!((guide.total_flops - guide.flops - guide.base_flops).abs() < 1e12);
        assert_eq!(guide.speedup, Some(ExpectedSpeedup { value: 0.546, parameters: 7e9, tokens: 3e11 }));
        assert_eq!(guide.warnings.len(), 1, "7 B is outside of the fitted range: {:?}", guide.warnings);
    }

    #[test]
    fn inside_the_range_there_is_nothing_to_warn_of() {
        let guide = guide(1.1e9, 1.25e11);
        assert_eq!(guide.warnings, Vec::<String>::new());
        assert!((guide.growth_tokens / 1e9 - 10.5).abs() < 0.1, "{guide:?}");
        assert_eq!(guide.speedup.map(|speedup| speedup.value), Some(0.491));
    }

    #[test]
    fn far_outside_the_base_is_limited_and_nothing_is_promised() {
        let guide = guide(1e7, 2e8);
        assert_eq!(guide.base_tokens, 2e7);
        assert_eq!((guide.speedup, guide.warnings.len()), (None, 3));
    }

    #[test]
    fn the_fitted_range_is_narrow() {
        assert!(is_fitted(1.1e9, 7e20) && is_fitted(4e8, 0.8e20) && is_fitted(3e9, 12e20));
        for (parameters, flops) in [(3.9e8, 7e20), (3.1e9, 7e20), (1.1e9, 7.9e19), (1.1e9, 1.21e21)] {
            assert!(!is_fitted(parameters, flops), "{parameters:e}, {flops:e}");
        }
    }
}

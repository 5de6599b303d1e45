//! When to grow: the paper's guideline for the tokens of a base.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_table() {
        // Table 4: parameters and tokens of known models, and when to grow them, in billions of tokens.
        let table = [(8e9, 15e12, 6.58), (7e9, 2e12, 11.11), (13e9, 2e12, 15.84), (70e9, 2e12, 42.48)];
        for (parameters, tokens, billions) in table {
            let found = growth_tokens(parameters, 6.0 * parameters * tokens) / 1e9;
            assert!((found - billions).abs() < 0.005, "{parameters:e}: {found} instead of {billions}");
        }
    }

    #[test]
    fn the_fitted_range_is_narrow() {
        assert!(is_fitted(1.1e9, 7e20));
        assert!(!is_fitted(7e9, 7e20));
        assert!(!is_fitted(1.1e9, 7e19));
    }
}

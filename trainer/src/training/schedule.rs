//! The learning rate as a function of the tokens that a stage has consumed.

use growth_crds::plan::{SchedulePlan, TrainingPlan};

/// Learning rate of the step that begins after `tokens` tokens of a stage: that of its schedule at the tokens of the
/// stages whose schedule it continues and its own, and after a growth with re-warm-up the share of it that has risen.
pub fn stage_learning_rate(training: &TrainingPlan, tokens: u64) -> f64 {
    let after_growth = &training.after_growth;
    let position = after_growth.schedule_start_tokens.saturating_add(tokens);
    let rate = learning_rate(&training.schedule, training.adam_w.learning_rate, position);
    match after_growth.rewarm_tokens {
        0 => rate,
        rewarm => rate * share(tokens, rewarm),
    }
}

/// Learning rate of the step that begins after `tokens` tokens of the schedule, for the peak `peak`.
///
/// A warm-up rises linearly from 0 at the first step (the released code of "Stacking Your Transformers" does the
/// same). Cosine: `min + (1 + cos(pi t)) / 2 (peak - min)` with t the share of the way from the end of the warm-up
/// to the horizon, then the minimum.
pub fn learning_rate(schedule: &SchedulePlan, peak: f64, tokens: u64) -> f64 {
    let warmup = warmup_tokens(schedule);
    if tokens < warmup {
        return peak * tokens as f64 / warmup as f64;
    }
    match *schedule {
        SchedulePlan::Constant { .. } => peak,
        SchedulePlan::Cosine { horizon_tokens, min_ratio, .. } => {
            let way = share(tokens - warmup, horizon_tokens.saturating_sub(warmup));
            let cosine = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * way));
            peak * (min_ratio + (1.0 - min_ratio) * cosine)
        }
        SchedulePlan::Wsd { decay_tokens, end_tokens, min_ratio, .. } => {
            let decay_start = end_tokens.saturating_sub(decay_tokens);
            let way = if tokens < decay_start { 0.0 } else { share(tokens - decay_start, decay_tokens) };
            peak * (1.0 - (1.0 - min_ratio) * way)
        }
    }
}

fn warmup_tokens(schedule: &SchedulePlan) -> u64 {
    match *schedule {
        SchedulePlan::Cosine { warmup_tokens, .. }
        | SchedulePlan::Wsd { warmup_tokens, .. }
        | SchedulePlan::Constant { warmup_tokens } => warmup_tokens,
    }
}

/// `part / whole`, at most 1; 1 of nothing.
fn share(part: u64, whole: u64) -> f64 {
    if part >= whole { 1.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const COSINE: SchedulePlan =
        SchedulePlan::Cosine { warmup_tokens: 100, horizon_tokens: 1100, min_ratio: 0.1 };
    const WSD: SchedulePlan =
        SchedulePlan::Wsd { warmup_tokens: 100, decay_tokens: 200, end_tokens: 1000, min_ratio: 0.0 };

    #[test]
    fn cosine_starts_at_zero_and_ends_at_the_minimum() {
        let at = |tokens| learning_rate(&COSINE, 2.0, tokens);
        assert_eq!(at(0), 0.0);
        assert_eq!(at(50), 1.0);
        assert_eq!(at(100), 2.0);
        assert!((at(600) - (0.2 + 0.5 * 1.8)).abs() < 1e-12);
        assert!((at(1100) - 0.2).abs() < 1e-12 && (at(5000) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn wsd_keeps_a_plateau_then_decays_linearly() {
        let at = |tokens| learning_rate(&WSD, 1.0, tokens);
        assert_eq!([at(0), at(100), at(800), at(900), at(1000)], [0.0, 1.0, 1.0, 0.5, 0.0]);
    }

    #[test]
    fn constant_without_warmup_is_constant() {
        let schedule = SchedulePlan::Constant { warmup_tokens: 0 };
        assert_eq!(learning_rate(&schedule, 3.0, 0), 3.0);
        assert_eq!(learning_rate(&schedule, 3.0, u64::MAX), 3.0);
    }

    proptest! {
        #[test]
        fn stays_between_zero_and_the_peak(tokens in 0u64..3000, warmup in 0u64..500, rest in 0u64..500, ratio in 0.0..1.0) {
            let end = warmup + rest;
            for schedule in [
                SchedulePlan::Cosine { warmup_tokens: warmup, horizon_tokens: end, min_ratio: ratio },
                SchedulePlan::Wsd { warmup_tokens: warmup, decay_tokens: rest, end_tokens: end, min_ratio: ratio },
                SchedulePlan::Constant { warmup_tokens: warmup },
            ] {
                let rate = learning_rate(&schedule, 1.0, tokens);
                prop_assert!((0.0..=1.0).contains(&rate));
            }
        }
    }
}

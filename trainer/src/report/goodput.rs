//! What a stage's wall time was spent on, over all its attempts, and what had to be done twice.

use crate::progress::{self, count, duration};
use crate::training::attempt::AttemptRecord;
use serde::Serialize;

/// The time of a stage, from the first attempt's start to the last one's end. The parts add up to `wall_seconds`, but for
/// what the trainers did not measure.
#[derive(Serialize, Debug, Clone, Copy, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Goodput {
    /// Attempts.
    pub attempts: usize,
    /// All of the time.
    pub wall_seconds: f64,
    /// Steps whose result was kept.
    pub productive_seconds: f64,
    /// Waiting for other ranks in such steps.
    pub waiting_seconds: f64,
    /// Validation.
    pub evaluation_seconds: f64,
    /// Training that stood still for a checkpoint.
    pub checkpoint_seconds: f64,
    /// From the end of an attempt to the first step of the next, and before the first one.
    pub restart_seconds: f64,
    /// Steps that a later attempt did again.
    pub lost_seconds: f64,
    /// Tokens of these steps.
    pub lost_tokens: u64,
}

impl Goodput {
    /// Of the attempts of a stage, in order, whose steps have `step_tokens` tokens. `committed_step` is that of the
    /// newest checkpoint: what was done beyond it is lost.
    pub fn new(attempts: &[AttemptRecord], step_tokens: u64, committed_step: u64) -> Self {
        let mut sum = Self { attempts: attempts.len(), ..Self::default() };
        for (index, attempt) in attempts.iter().enumerate() {
            let next = attempts.get(index + 1);
            let kept_until = next.map_or(committed_step, |next| next.first_step);
            let done = attempt.step.saturating_sub(attempt.first_step);
            let lost = attempt.step.saturating_sub(kept_until).min(done);
            let kept = if done == 0 { 0.0 } else { (done - lost) as f64 / done as f64 };
            let seconds = &attempt.seconds;
            sum.productive_seconds += seconds.stepping * kept;
            sum.waiting_seconds += seconds.waiting * kept;
            sum.lost_seconds += (seconds.stepping + seconds.waiting) * (1.0 - kept);
            sum.lost_tokens += lost * step_tokens;
            sum.evaluation_seconds += seconds.evaluating;
            sum.checkpoint_seconds += seconds.checkpointing;
            sum.restart_seconds += seconds.starting;
            sum.restart_seconds += next.map_or(0.0, |next| {
                (next.started_at.as_millisecond() - attempt.updated_at.as_millisecond()).max(0) as f64 / 1e3
            });
        }
        if let (Some(first), Some(last)) = (attempts.first(), attempts.last()) {
            let wall = last.updated_at.as_millisecond() - first.started_at.as_millisecond();
            sum.wall_seconds = wall.max(0) as f64 / 1e3;
        }
        sum
    }

    /// Share of the time that went into steps which were kept.
    pub fn share(&self) -> f64 {
        if self.wall_seconds > 0.0 { (self.productive_seconds / self.wall_seconds).min(1.0) } else { 0.0 }
    }
}

/// One row a stage; nothing where no attempt is known.
pub fn goodput_table<'a>(stages: impl IntoIterator<Item = (&'a str, Goodput)>) -> Option<String> {
    let titles = [
        "STAGE",
        "ATTEMPTS",
        "WALL TIME",
        "PRODUCTIVE",
        "WAITING",
        "VALIDATION",
        "CHECKPOINT",
        "RESTART",
        "LOST",
        "LOST TOKENS",
    ];
    let known = stages.into_iter().filter(|(_, goodput)| goodput.attempts > 0);
    let rows: Vec<_> = known
        .map(|(stage, goodput)| {
            [
                stage.to_owned(),
                goodput.attempts.to_string(),
                duration(goodput.wall_seconds),
                format!("{:.1}%", 100.0 * goodput.share()),
                duration(goodput.waiting_seconds),
                duration(goodput.evaluation_seconds),
                duration(goodput.checkpoint_seconds),
                duration(goodput.restart_seconds),
                duration(goodput.lost_seconds),
                count(goodput.lost_tokens as f64),
            ]
        })
        .collect();
    (!rows.is_empty()).then(|| progress::table(titles, 1, rows))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::training::attempt::Activity;
    use jiff::Timestamp;

    fn attempt(attempt: u32, from: i64, to: i64, first_step: u64, step: u64) -> AttemptRecord {
        let seconds =
            Activity { starting: 2.0, stepping: 8.0, waiting: 2.0, evaluating: 1.0, checkpointing: 0.5 };
        let at = |second| Timestamp::from_second(second).unwrap();
        AttemptRecord {
            attempt,
            ranks: 2,
            started_at: at(from),
            updated_at: at(to),
            first_step,
            step,
            seconds,
        }
    }

    #[test]
    fn what_a_later_attempt_did_again_is_lost() {
        // The first was killed at step 10 and had committed step 5; the second stopped in order.
        let attempts = [attempt(1, 0, 14, 0, 10), attempt(2, 20, 34, 5, 15), attempt(3, 36, 50, 15, 25)];
        let goodput = Goodput::new(&attempts, 100, 25);
        assert_eq!((goodput.attempts, goodput.lost_tokens, goodput.wall_seconds), (3, 500, 50.0));
        assert_eq!((goodput.productive_seconds, goodput.waiting_seconds), (4.0 + 16.0, 1.0 + 4.0));
        assert_eq!((goodput.lost_seconds, goodput.restart_seconds), (5.0, 6.0 + 6.0 + 2.0));
        assert_eq!((goodput.evaluation_seconds, goodput.checkpoint_seconds), (3.0, 1.5));
        let table = goodput_table([("small", goodput)]).unwrap();
        assert!(table.contains("40.0%") && table.contains("500"), "{table}");
    }

    #[test]
    fn what_is_not_committed_yet_counts_as_lost() {
        let goodput = Goodput::new(&[attempt(1, 0, 10, 0, 10)], 100, 8);
        assert_eq!(goodput.lost_tokens, 200);
        assert!(goodput_table([("small", Goodput::new(&[], 1, 0))]).is_none());
    }
}

//! How a background writer shares the machine with the training.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A writer at work rests three times as long as it has worked: on a machine whose cores all compute, the cost of a
/// checkpoint then spreads over several steps instead of slowing the one after it.
const REST_PER_WORK: u32 = 3;

/// The longest rest, after which it looks whether somebody waits for the checkpoint.
const REST_AT_ONCE: Duration = Duration::from_millis(20);

/// Lets a writer rest, unless somebody waits for it. The default never rests.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    unhurried: Option<Arc<AtomicBool>>,
}

impl Pace {
    /// A pace that rests until it is hurried.
    pub(crate) fn gentle() -> Self {
        Self { unhurried: Some(Arc::new(AtomicBool::new(true))) }
    }

    /// Whether the writer may rest from now on.
    pub(crate) fn set_unhurried(&self, value: bool) {
        if let Some(unhurried) = &self.unhurried {
            unhurried.store(value, Ordering::Relaxed);
        }
    }

    /// Rests after work that began at `begin`.
    pub(crate) fn rest(&self, begin: Instant) {
        let Some(unhurried) = &self.unhurried else { return };
        let mut left = begin.elapsed() * REST_PER_WORK;
        while !left.is_zero() && unhurried.load(Ordering::Relaxed) {
            let now = left.min(REST_AT_ONCE);
            std::thread::sleep(now);
            left -= now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Work that began so long ago that a full rest would take longer than any test.
    fn long_ago() -> Instant {
        Instant::now().checked_sub(Duration::from_secs(600)).unwrap()
    }

    #[test]
    fn nobody_rests_while_somebody_waits() {
        let begin = Instant::now();
        Pace::default().rest(long_ago());
        let pace = Pace::gentle();
        pace.set_unhurried(false);
        pace.rest(long_ago());
        assert!(begin.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_gentle_pace_rests_longer_than_it_works() {
        let pace = Pace::gentle();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(5) {}
        let worked = begin.elapsed();
        pace.rest(begin);
        assert!(begin.elapsed() >= worked * (1 + REST_PER_WORK));
    }
}

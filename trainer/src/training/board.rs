//! What a running stage tells those who ask: how far it is, how fast, and which checkpoint is committed.

use crate::training::attempt::Activity;
use growth_crds::protocol::Progress;
use growth_crds::status::CheckpointStatus;
use jiff::Timestamp;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Share of the past in the speed after one step: about the last twenty steps count.
const SPEED_MEMORY: f64 = 0.95;

/// Written by the loop, read by the server of `/progress`.
#[derive(Debug, Default)]
pub struct ProgressBoard {
    progress: Mutex<Option<Progress>>,
    activity: Mutex<Activity>,
}

impl ProgressBoard {
    /// Puts up how an attempt begins.
    pub fn begin(&self, progress: Progress) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }

    /// A step is done, `step_tokens` in `elapsed`.
    pub fn step(&self, step: u64, tokens: u64, loss: f64, step_tokens: u64, elapsed: Duration) {
        self.change(|progress| {
            let speed = step_tokens as f64 / elapsed.as_secs_f64().max(1e-9);
            let before = progress.tokens_per_second;
            progress.tokens_per_second =
                if before == 0.0 { speed } else { SPEED_MEMORY * before + (1.0 - SPEED_MEMORY) * speed };
            (progress.step, progress.tokens, progress.loss) = (step, tokens, Some(loss));
            progress.updated_at = Timestamp::now();
        });
    }

    /// A checkpoint is committed.
    pub fn committed(&self, checkpoint: CheckpointStatus) {
        self.change(|progress| progress.checkpoint = Some(checkpoint));
    }

    /// What the time was spent on so far.
    pub fn spent(&self, activity: Activity) {
        *self.activity.lock().unwrap_or_else(PoisonError::into_inner) = activity;
    }

    /// What the time of this attempt was spent on.
    pub fn activity(&self) -> Activity {
        *self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it says now; nothing before the stage has begun.
    pub fn read(&self) -> Option<Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        if let Some(progress) = self.progress.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            change(progress);
        }
    }
}

//! The record of an attempt: when it ran, how far it came, what it spent its time on. It lies in the job's storage beside
//! the checkpoints, is written every few seconds, and so tells of attempts that were killed, too.

use crate::storage::{Result, Storage, StorageError, yield_to_computation};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two records: what a killed attempt did after its last one is not known.
const INTERVAL: Duration = Duration::from_secs(5);

/// What an attempt spent its time on, in seconds.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// Before the first step: reading data and checkpoint, meeting the other ranks.
    pub starting: f64,
    /// In steps, `waiting` not counted.
    pub stepping: f64,
    /// In steps, for other ranks.
    pub waiting: f64,
    /// Measuring the validation loss.
    pub evaluating: f64,
    /// Copying states for checkpoints, and waiting for them to be written.
    pub checkpointing: f64,
}

impl Activity {
    /// Names and seconds.
    pub fn parts(&self) -> [(&'static str, f64); 5] {
        [
            ("starting", self.starting),
            ("stepping", self.stepping),
            ("waiting", self.waiting),
            ("evaluating", self.evaluating),
            ("checkpointing", self.checkpointing),
        ]
    }
}

/// One attempt at a stage.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AttemptRecord {
    /// Its number.
    pub attempt: u32,
    /// Its ranks.
    pub ranks: usize,
    /// When its process began.
    pub started_at: Timestamp,
    /// When this was written.
    pub updated_at: Timestamp,
    /// Steps that were done before it: those of the checkpoint that it resumed from.
    pub first_step: u64,
    /// Steps done.
    pub step: u64,
    /// What it spent its time on.
    pub seconds: Activity,
}

fn folder(storage: &Storage, job: &str, stage: &str) -> Storage {
    storage.join(&format!("{job}/attempts/{stage}"))
}

/// The attempts at a stage that the storage knows, in order.
///
/// # Errors
/// When the storage does not answer.
pub fn list(storage: &Storage, job: &str, stage: &str) -> Result<Vec<AttemptRecord>> {
    let folder = folder(storage, job, stage);
    let mut records = Vec::new();
    for entry in folder.list()? {
        match folder.get(&entry.name) {
            // One that cannot be read is worth less than the report on the others.
            Ok(bytes) => records.extend(serde_json::from_slice::<AttemptRecord>(&bytes)),
            Err(StorageError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    records.sort_by_key(|record| record.attempt);
    Ok(records)
}

/// Writes the record of the running attempt in a thread of its own: training does not wait for it.
pub struct Recorder {
    record: AttemptRecord,
    written: Option<Instant>,
    sender: Option<SyncSender<AttemptRecord>>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Records the attempt `first`, of a stage of a job.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(storage: &Storage, job: &str, stage: &str, first: AttemptRecord) -> std::io::Result<Self> {
        let folder = folder(storage, job, stage);
        let (sender, records) = sync_channel::<AttemptRecord>(1);
        let thread = std::thread::Builder::new().name("record".to_owned()).spawn(move || {
            yield_to_computation();
            for record in records {
                let bytes = serde_json::to_vec(&record).unwrap_or_default();
                // A record that is missing makes a report less exact, and nothing else.
                let _ = folder.put(&format!("{:05}.json", record.attempt), bytes);
            }
        })?;
        Ok(Self { record: first, written: None, sender: Some(sender), thread: Some(thread) })
    }

    /// Takes over where the attempt stands, and has it written where that is due.
    pub fn update(&mut self, step: u64, seconds: Activity) {
        (self.record.step, self.record.seconds, self.record.updated_at) = (step, seconds, Timestamp::now());
        if self.written.is_none_or(|time| time.elapsed() >= INTERVAL) {
            self.written = Some(Instant::now());
            if let Some(sender) = &self.sender {
                // The thread is still at the one before: this one comes with the next.
                let _ = sender.try_send(self.record.clone());
            }
        }
    }
}

impl Drop for Recorder {
    /// The last word of the attempt.
    fn drop(&mut self) {
        if let Some(sender) = self.sender.take() {
            let _ = sender.send(self.record.clone());
        }
        if let Some(thread) = self.thread.take() {
            // Its panic would have ended the records, which nobody depends on.
            let _ = thread.join();
        }
    }
}

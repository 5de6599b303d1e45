//! Writes checkpoints in a thread of its own while training goes on.

use super::error::{CheckpointError, Result};
use super::retention::{Retention, prune, remove_unfinished};
use super::{CheckpointWriter, ExtraFile, Pace, Snapshot, folder_name, gang};
use crate::collective::Notes;
use crate::storage::yield_to_computation;
use growth_crds::protocol::CheckpointManifest;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

/// A checkpoint that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// Its manifest.
    pub manifest: CheckpointManifest,
    /// Address of its folder.
    pub uri: String,
    /// What went wrong after the commit: the checkpoint is good, but an old one could not be deleted.
    pub warning: Option<String>,
}

/// What became of a submitted checkpoint.
pub type Outcome = Result<Committed>;

struct Task {
    snapshot: Snapshot,
    records: Vec<ExtraFile>,
}

struct Done {
    snapshot: Snapshot,
    outcome: Outcome,
}

/// Where the one snapshot is.
enum Place {
    Here(Snapshot),
    Writing,
    Lost,
}

/// Writes one checkpoint at a time in the background, from a snapshot that is allocated once.
pub struct AsyncCheckpointer {
    tasks: Option<SyncSender<Task>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    snapshot: Place,
    outcome: Option<Outcome>,
    last_good: Option<String>,
    pace: Pace,
}

impl AsyncCheckpointer {
    /// Starts the thread. `last_good` is the address of the checkpoint that this run started from; `notes` lead to the
    /// other ranks, each of which has such a thread.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        mut writer: CheckpointWriter,
        retention: Retention,
        last_good: Option<String>,
        notes: Option<Notes>,
    ) -> Result<Self> {
        let (rank, world_size) = notes.as_ref().map_or((0, 1), |notes| (notes.rank(), notes.world_size()));
        let pace = Pace::gentle();
        writer.pace = pace.clone();
        let snapshot = Place::Here(Snapshot::new(&writer.table(), &writer.layout, rank, world_size));
        let (tasks, inbox) = sync_channel::<Task>(1);
        let (outbox, done) = sync_channel(1);
        let work = move || {
            yield_to_computation();
            for Task { snapshot, records } in inbox {
                let outcome = write(&writer, &retention, notes.as_ref(), &snapshot, &records);
                if outbox.send(Done { snapshot, outcome }).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(work);
        let thread = thread.map_err(|error| CheckpointError::Thread {
            problem: format!("could not be started: {error}"),
            last_good: describe(last_good.as_deref()),
        })?;
        Ok(Self { tasks: Some(tasks), done, thread: Some(thread), snapshot, outcome: None, last_good, pace })
    }

    /// Waits for the checkpoint before, lets `fill` copy the state into the snapshot (which holds an older state),
    /// and hands it to the thread. Returns what became of the one before, if that was not asked for yet; after an
    /// error the folder is uncommitted, the last checkpoint is good, and this one is tried all the same.
    ///
    /// # Errors
    /// That of `fill`; nothing is submitted then.
    pub fn submit<E>(
        &mut self,
        records: Vec<ExtraFile>,
        fill: impl FnOnce(&mut Snapshot) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Outcome>, E> {
        self.wait();
        let before = self.outcome.take();
        match std::mem::replace(&mut self.snapshot, Place::Lost) {
            Place::Here(mut snapshot) => {
                let filled = fill(&mut snapshot);
                if filled.is_err() {
                    self.snapshot = Place::Here(snapshot);
                    return filled.map(|()| before);
                }
                self.send(Task { snapshot, records });
            }
            Place::Writing | Place::Lost => self.outcome = Some(Err(self.dead())),
        }
        Ok(before)
    }

    fn send(&mut self, task: Task) {
        self.pace.set_unhurried(true);
        match self.tasks.as_ref().map(|tasks| tasks.send(task)) {
            Some(Ok(())) => self.snapshot = Place::Writing,
            _ => self.outcome = Some(Err(self.dead())),
        }
    }

    /// What became of the last submitted checkpoint, once, if it is finished; does not wait.
    pub fn poll(&mut self) -> Option<Outcome> {
        self.receive_if_done();
        self.outcome.take()
    }

    /// As [`AsyncCheckpointer::poll`], but waits for what is being written.
    pub fn settle(&mut self) -> Option<Outcome> {
        self.wait();
        self.outcome.take()
    }

    /// Whether a checkpoint is being written.
    pub fn is_busy(&mut self) -> bool {
        self.receive_if_done();
        matches!(self.snapshot, Place::Writing)
    }

    /// Address of the newest checkpoint known to be committed.
    pub fn last_good(&self) -> Option<&str> {
        self.last_good.as_deref()
    }

    /// Waits for the last checkpoint of the stage. Returns it, unless [`AsyncCheckpointer::poll`] already did.
    ///
    /// # Errors
    /// [`CheckpointError::Final`], which says from where training can go on.
    pub fn finish(&mut self) -> Result<Option<Committed>> {
        self.wait();
        self.outcome.take().transpose().map_err(|source| CheckpointError::Final {
            last_good: describe(self.last_good.as_deref()),
            source: Box::new(source),
        })
    }

    fn wait(&mut self) {
        if matches!(self.snapshot, Place::Writing) {
            self.pace.set_unhurried(false);
            let done = self.done.recv().ok();
            self.receive(done);
        }
    }

    fn receive_if_done(&mut self) {
        if matches!(self.snapshot, Place::Writing) {
            match self.done.try_recv() {
                Ok(done) => self.receive(Some(done)),
                Err(TryRecvError::Disconnected) => self.receive(None),
                Err(TryRecvError::Empty) => {}
            }
        }
    }

    fn receive(&mut self, done: Option<Done>) {
        match done {
            Some(Done { snapshot, outcome }) => {
                self.snapshot = Place::Here(snapshot);
                if let Ok(committed) = &outcome {
                    self.last_good = Some(committed.uri.clone());
                }
                self.outcome = Some(outcome);
            }
            None => {
                self.snapshot = Place::Lost;
                self.outcome = Some(Err(self.dead()));
            }
        }
    }

    fn dead(&self) -> CheckpointError {
        CheckpointError::Thread {
            problem: "has died".to_owned(),
            last_good: describe(self.last_good.as_deref()),
        }
    }
}

impl Drop for AsyncCheckpointer {
    /// Lets a checkpoint in flight finish: it is worth more than the time.
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported as an outcome, or nobody asked.
            let _ = thread.join();
        }
    }
}

fn describe(last_good: Option<&str>) -> String {
    last_good
        .map_or_else(|| "the start of the stage (no checkpoint is committed yet)".to_owned(), str::to_owned)
}

fn write(
    writer: &CheckpointWriter,
    retention: &Retention,
    notes: Option<&Notes>,
    snapshot: &Snapshot,
    records: &[ExtraFile],
) -> Outcome {
    let location = &writer.location;
    let leads = notes.is_none_or(|notes| notes.rank() == 0);
    if leads {
        // A write that failed may have filled the disk. If this fails too, the write below says why. Other ranks may be
        // at work in the folder of this one already.
        let current = notes.map(|_| folder_name(snapshot.step, location.attempt)).unwrap_or_default();
        let _ =
            remove_unfinished(&location.storage, &location.job, &location.stage, location.attempt, &current);
    }
    let manifest = gang::write(writer, notes, snapshot, records)?;
    let pruned = if leads { prune(&location.storage, &manifest, retention).map(drop) } else { Ok(()) };
    let warning =
        pruned.err().map(|error| format!("old checkpoints were not deleted and take space: {error}"));
    Ok(Committed { uri: location.folder(manifest.step).uri().to_owned(), manifest, warning })
}

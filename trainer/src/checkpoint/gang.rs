//! How the ranks of a stage write one checkpoint: each its objects, rank 0 the rest and, when all are there, the manifest.

use super::error::{CheckpointError, Result};
use super::{CheckpointWriter, ExtraFile, Snapshot};
use crate::collective::Notes;
use growth_crds::protocol::{CheckpointManifest, CheckpointObject};
use serde::{Deserialize, Serialize};

/// What a rank tells rank 0.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
enum Report {
    Written(Vec<CheckpointObject>),
    Failed(String),
}

/// What rank 0 tells the others.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
enum Verdict {
    Committed(Box<CheckpointManifest>),
    Superseded { uri: String, attempt: u32, newer: u32 },
    Failed(String),
}

/// Writes this rank's part of a checkpoint and learns what became of the whole.
///
/// # Errors
/// When a part could not be written, when a newer attempt has taken over, when a rank is lost.
pub(super) fn write(
    writer: &CheckpointWriter,
    notes: Option<&Notes>,
    snapshot: &Snapshot,
    records: &[ExtraFile],
) -> Result<CheckpointManifest> {
    match notes {
        None => writer.begin(snapshot, records, 1).and_then(|objects| writer.commit(snapshot, objects)),
        Some(notes) if notes.rank() == 0 => lead(writer, notes, snapshot, records),
        Some(notes) => follow(writer, notes, snapshot),
    }
}

fn lead(
    writer: &CheckpointWriter,
    notes: &Notes,
    snapshot: &Snapshot,
    records: &[ExtraFile],
) -> Result<CheckpointManifest> {
    let own = writer.begin(snapshot, records, notes.world_size());
    // All are heard, whatever happened here: else they would be taken for those of the next checkpoint.
    let ranks = 1..notes.world_size();
    let parts: Vec<Report> = ranks.clone().map(|rank| receive(notes, rank)).collect::<Result<_>>()?;
    let result = own.and_then(|own| {
        let objects = ranks.clone().zip(parts).try_fold(own, |objects, (rank, part)| match part {
            Report::Written(written) => Ok([objects, written].concat()),
            Report::Failed(problem) => Err(CheckpointError::Rank { rank, problem }),
        })?;
        writer.commit(snapshot, objects)
    });
    let verdict = match &result {
        Ok(manifest) => Verdict::Committed(Box::new(manifest.clone())),
        Err(CheckpointError::Superseded { uri, attempt, newer }) => {
            Verdict::Superseded { uri: uri.clone(), attempt: *attempt, newer: *newer }
        }
        Err(error) => Verdict::Failed(error.to_string()),
    };
    ranks.into_iter().try_for_each(|rank| send(notes, rank, &verdict))?;
    result
}

fn follow(writer: &CheckpointWriter, notes: &Notes, snapshot: &Snapshot) -> Result<CheckpointManifest> {
    let part = match writer.write_part(snapshot, notes.rank(), notes.world_size()) {
        Ok(objects) => Report::Written(objects),
        Err(error) => Report::Failed(error.to_string()),
    };
    send(notes, 0, &part)?;
    match receive(notes, 0)? {
        Verdict::Committed(manifest) => Ok(*manifest),
        Verdict::Superseded { uri, attempt, newer } => {
            Err(CheckpointError::Superseded { uri, attempt, newer })
        }
        Verdict::Failed(problem) => Err(CheckpointError::Rank { rank: 0, problem }),
    }
}

fn send(notes: &Notes, rank: usize, message: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(message).map_err(|error| unreadable(rank, &error))?;
    Ok(notes.send(rank, &json)?)
}

fn receive<T: for<'a> Deserialize<'a>>(notes: &Notes, rank: usize) -> Result<T> {
    serde_json::from_slice(&notes.receive(rank)?).map_err(|error| unreadable(rank, &error))
}

fn unreadable(rank: usize, error: &serde_json::Error) -> CheckpointError {
    CheckpointError::Rank { rank, problem: format!("its message cannot be read: {error}") }
}

//! Deletes old checkpoints.

use super::error::Result;
use super::reader::{Commit, Found, list};
use super::stage_folder;
use crate::storage::Storage;
use growth_crds::protocol::{CheckpointManifest, MANIFEST_FILE};
use std::collections::BTreeSet;

/// Which checkpoints of a stage are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; one is kept in any case.
    pub keep_last: u32,
    /// Names of folders that are never deleted: another stage starts from them.
    pub protected: BTreeSet<String>,
}

/// Deletes what the stage does not need any more, now that `written` is committed: committed checkpoints beyond
/// `keep_last`, and folders that this attempt or an older one left without a manifest. Checkpoints newer than
/// `written` are neither counted nor touched: they may be damaged, or those of an attempt that took over. Returns the
/// names of the deleted folders.
///
/// # Errors
/// When the storage fails; the checkpoints that are kept are good all the same.
pub fn prune(storage: &Storage, written: &CheckpointManifest, retention: &Retention) -> Result<Vec<String>> {
    let stage = stage_folder(storage, &written.job, &written.stage);
    let found = list(storage, &written.job, &written.stage)?;
    let newest = (written.step, written.attempt);
    let committed: Vec<&Found> = found
        .iter()
        .filter(|found| found.committed().is_some() && (found.step, found.attempt) <= newest)
        .collect();
    let surplus = committed.len().saturating_sub(retention.keep_last.max(1) as usize);
    let surplus = committed[..surplus].iter().copied();
    let names: Vec<String> = surplus
        .chain(unfinished(&found, written.attempt))
        .map(Found::name)
        .filter(|name| !retention.protected.contains(name))
        .collect();
    for name in &names {
        delete(&stage.join(name))?;
    }
    Ok(names)
}

/// Deletes what `attempt` and older attempts left without a manifest, so that it does not fill the disk; not the folder
/// `current`, which is being written. Returns the names of the deleted folders.
///
/// # Errors
/// When the storage fails.
pub fn remove_unfinished(
    storage: &Storage,
    job: &str,
    stage: &str,
    attempt: u32,
    current: &str,
) -> Result<Vec<String>> {
    let found = list(storage, job, stage)?;
    let names = unfinished(&found, attempt).map(Found::name).filter(|name| name != current);
    let names: Vec<String> = names.collect();
    for name in &names {
        delete(&stage_folder(storage, job, stage).join(name))?;
    }
    Ok(names)
}

fn unfinished(found: &[Found], attempt: u32) -> impl Iterator<Item = &Found> {
    found.iter().filter(move |found| found.commit == Commit::No && found.attempt <= attempt)
}

/// The manifest goes first, so that a half-deleted checkpoint is not taken for one.
fn delete(folder: &Storage) -> Result<()> {
    folder.delete(MANIFEST_FILE)?;
    Ok(folder.delete_all()?)
}

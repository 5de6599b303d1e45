//! A checkpoint of one job becomes one of another.

use super::error::{CheckpointError, Result};
use super::writer::{CheckpointLocation, Commitment};
use super::{checkpoint_folder, refuse_if_committed, remove_unfinished};
use growth_crds::protocol::CheckpointManifest;

/// Copies a committed checkpoint to the stage of `target`, byte by byte, under a manifest of that stage: the state
/// digest stays. What an earlier attempt left unfinished there is removed.
///
/// # Errors
/// When the target is there already, or the storage fails; the copy is committed whole or not at all.
pub fn adopt(source: &CheckpointManifest, target: &CheckpointLocation) -> Result<CheckpointManifest> {
    let CheckpointLocation { storage, job, stage, attempt } = target;
    let (from, to) = (checkpoint_folder(storage, source), target.folder(source.step));
    refuse_if_committed(&to)?;
    remove_unfinished(storage, job, stage, *attempt, "")?;
    for object in &source.objects {
        let mut writer = to.writer(&object.name)?;
        std::io::copy(&mut from.reader(&object.name)?, &mut writer)
            .map_err(|error| CheckpointError::Stream { uri: to.uri_of(&object.name), source: error })?;
        writer.finish()?;
    }
    let commitment = Commitment {
        job: job.clone(),
        stage: stage.clone(),
        attempt: *attempt,
        step: source.step,
        tokens: source.tokens,
        origin: source.origin.clone(),
    };
    commitment.commit(&to, source.objects.clone())
}

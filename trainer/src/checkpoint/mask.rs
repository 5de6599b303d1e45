//! The object that marks a checkpoint inside the ramp of a growth ([`GROWTH_MASK_FILE`]).

use super::ExtraFile;
use super::config::pretty;
use super::error::{CheckpointError, Result};
use crate::storage::Storage;
use growth_crds::plan::ModelConfig;
use growth_crds::protocol::{CheckpointManifest, GROWTH_MASK_FILE, GrowthMaskRecord};
use serde_json::json;

/// Whether a checkpoint is one inside the ramp of a growth.
pub fn has_mask(manifest: &CheckpointManifest) -> bool {
    manifest.lists(GROWTH_MASK_FILE)
}

/// The object for a checkpoint, which is part of its state.
pub fn mask_file(record: &GrowthMaskRecord) -> ExtraFile {
    ExtraFile { state: true, ..ExtraFile::new(GROWTH_MASK_FILE, pretty(json!(record))) }
}

/// The record of a folder; of a checkpoint its manifest says whether there is one.
pub(super) fn read_mask(
    folder: &Storage,
    manifest: Option<&CheckpointManifest>,
    config: &ModelConfig,
) -> Result<Option<GrowthMaskRecord>> {
    let is_there = match manifest {
        Some(manifest) => has_mask(manifest),
        None => folder.head(GROWTH_MASK_FILE)?.is_some(),
    };
    if !is_there {
        return Ok(None);
    }
    let wrong = |problem: String| CheckpointError::Format { uri: folder.uri_of(GROWTH_MASK_FILE), problem };
    let record: GrowthMaskRecord =
        serde_json::from_slice(&folder.get(GROWTH_MASK_FILE)?).map_err(|error| wrong(error.to_string()))?;
    if !record.fits(config) {
        return Err(wrong("it is about another model than config.json".to_owned()));
    }
    Ok(Some(record))
}

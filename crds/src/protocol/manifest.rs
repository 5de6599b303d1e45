//! The manifest that commits a checkpoint. It is written last, by a create-only put: no manifest, no checkpoint.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Name of the manifest inside a checkpoint's folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Version of the layout that this code writes.
pub const MANIFEST_VERSION: u32 = 1;

/// A committed checkpoint.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointManifest {
    /// Version of the layout.
    pub version: u32,
    /// Name of the job.
    pub job: String,
    /// Name of the stage.
    pub stage: String,
    /// Attempt that wrote it: the fencing token.
    pub attempt: u32,
    /// Optimizer steps done in this stage.
    pub step: u64,
    /// Tokens trained in this stage.
    pub tokens: u64,
    /// Digest of the state: `blake3:<hex>` over one line `<hex>  <name>` for every object whose `state` is true, in
    /// the byte order of the names, which is what `b3sum <names> | b3sum` prints.
    pub digest: String,
    /// Where it came from, if a growth step or an import made it: equal origins give equal state digests.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub origin: Option<CheckpointOrigin>,
    /// When it was committed.
    pub committed_at: Timestamp,
    /// Version of the writer.
    pub writer: String,
    /// Every other object of the checkpoint, by name.
    pub objects: Vec<CheckpointObject>,
}

impl CheckpointManifest {
    /// Whether the checkpoint has an object of that name.
    pub fn lists(&self, name: &str) -> bool {
        self.objects.iter().any(|object| object.name == name)
    }
}

/// One object of a checkpoint.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointObject {
    /// Name inside the checkpoint's folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// `blake3:<hex>`.
    pub digest: String,
    /// Whether it is part of the state that training continues from (weights, moments, position), or a record
    /// about it (times, losses).
    pub state: bool,
}

/// What a grown checkpoint was made from.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointOrigin {
    /// State digest of the source.
    pub source_digest: String,
    /// Digest of the growth plan.
    pub plan_digest: String,
}

//! Checkpoints: a Hugging Face folder, the optimizer's state beside it, and a manifest that commits both.
//! The format is described in `docs/checkpoint-format.md`.

mod adopt;
mod background;
mod config;
mod error;
mod gang;
mod huggingface;
mod mask;
mod objects;
mod pace;
mod reader;
mod retention;
mod snapshot;
mod tensor_file;
mod writer;

pub use adopt::adopt;
pub use background::{AsyncCheckpointer, Committed, Outcome};
pub use config::{TokenIds, config_json, generation_config_json, parse_config};
pub use error::{CheckpointError, Result};
pub use huggingface::HuggingFaceFolder;
pub use mask::{has_mask, mask_file};
pub use objects::{Problem, read_record, state_digest, verify};
pub use pace::Pace;
pub use reader::{Commit, Found, LoadedPart, latest_valid, list, load, load_part, next_attempt, resume};
pub use retention::{Retention, prune, remove_unfinished};
pub use snapshot::{ObjectTable, Snapshot, copy};
pub use writer::{CheckpointLocation, CheckpointWriter, DEFAULT_SHARD_BYTES};

pub(crate) use objects::{digest_bytes, digest_object, put_object, verify_objects};
pub(crate) use reader::{commit_of, read_trainer_state};
pub(crate) use snapshot::object_bytes;
pub(crate) use tensor_file::{PIECE_BYTES, TensorIndex, TensorSpec};
pub(crate) use writer::{
    Commitment, MODEL_INDEX_FILE, ShardSet, model_specs, moment_specs, put_small_objects, put_trainer_state,
    refuse_if_committed,
};

use crate::model::layout::ParameterLayout;
use crate::storage::Storage;
use bytes::Bytes;
use growth_crds::protocol::CheckpointManifest;
use serde::{Deserialize, Serialize};

// Tensors are written as they lie in memory, and safetensors is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// Architecture of the model, in Hugging Face form.
pub const CONFIG_FILE: &str = "config.json";
/// The tokenizer, in Hugging Face form.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Where training stands.
pub const TRAINER_STATE_FILE: &str = "trainer_state.json";
/// What happened so far: losses and times, for people. Not part of the state.
pub const HISTORY_FILE: &str = "history.json";

/// Everything that training continues from. The vectors are laid out by a [`ParameterLayout`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainingState {
    /// Optimizer steps done in this stage.
    pub step: u64,
    /// Tokens trained in this stage: the position in its data.
    pub tokens: u64,
    /// Steps that the optimizer's moments have seen; differs from `step` when growth kept the moments.
    pub optimizer_step: u64,
    /// Weights.
    pub parameters: Vec<f32>,
    /// First moments; empty means zeros.
    pub exp_avg: Vec<f32>,
    /// Second moments; empty means zeros.
    pub exp_avg_sq: Vec<f32>,
}

impl TrainingState {
    /// All zeros, moments included.
    pub fn zeros(layout: &ParameterLayout) -> Self {
        let zeros = || vec![0.0; layout.total_len()];
        Self { parameters: zeros(), exp_avg: zeros(), exp_avg_sq: zeros(), ..Self::default() }
    }

    /// Whether there are moments.
    pub fn has_moments(&self) -> bool {
        !self.exp_avg.is_empty()
    }
}

/// Which vector of a state.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Weights.
    Parameters,
    /// First moments.
    ExpAvg,
    /// Second moments.
    ExpAvgSq,
}

/// One tensor of a state.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StateTensor {
    /// The vector that it lies in.
    pub part: Part,
    /// Its position in the layout.
    pub tensor: usize,
}

impl StateTensor {
    /// The vector of `state` that it lies in.
    pub fn vector_of(self, state: &TrainingState) -> &Vec<f32> {
        match self.part {
            Part::Parameters => &state.parameters,
            Part::ExpAvg => &state.exp_avg,
            Part::ExpAvgSq => &state.exp_avg_sq,
        }
    }

    /// The vector of `state` that it lies in, to be changed.
    pub fn vector_of_mut(self, state: &mut TrainingState) -> &mut Vec<f32> {
        match self.part {
            Part::Parameters => &mut state.parameters,
            Part::ExpAvg => &mut state.exp_avg,
            Part::ExpAvgSq => &mut state.exp_avg_sq,
        }
    }
}

/// A small object handed in by the caller: `tokenizer.json`, `history.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraFile {
    /// Name inside the checkpoint's folder.
    pub name: String,
    /// Content.
    pub bytes: Bytes,
    /// Whether it is part of the state.
    pub state: bool,
}

impl ExtraFile {
    /// An object of that name, which is not part of the state.
    pub fn new(name: impl Into<String>, bytes: impl Into<Bytes>) -> Self {
        Self { name: name.into(), bytes: bytes.into(), state: false }
    }
}

/// Content of `trainer_state.json`. No times in it: equal runs write equal bytes.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TrainerState {
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    pub(crate) optimizer_step: u64,
}

/// The folder that holds the checkpoints of a stage.
pub fn stage_folder(storage: &Storage, job: &str, stage: &str) -> Storage {
    storage.join(&format!("{job}/checkpoints/{stage}"))
}

/// Name of a checkpoint's folder.
pub fn folder_name(step: u64, attempt: u32) -> String {
    format!("{step:08}-{attempt}")
}

/// The folder of a committed checkpoint.
pub fn checkpoint_folder(storage: &Storage, manifest: &CheckpointManifest) -> Storage {
    stage_folder(storage, &manifest.job, &manifest.stage).join(&folder_name(manifest.step, manifest.attempt))
}

/// Step and attempt of a folder's name, or `None` when it is not the folder of a checkpoint.
fn parse_folder_name(name: &str) -> Option<(u64, u32)> {
    let (step, attempt) = name.split_once('-')?;
    let (step, attempt) = (step.parse().ok()?, attempt.parse().ok()?);
    // One spelling for one checkpoint: "1-01" is not ours.
    (folder_name(step, attempt) == name).then_some((step, attempt))
}

/// Name of the weights' object `number` of `count`, from 1.
fn shard_name(kind: &str, number: usize, count: usize) -> String {
    format!("{kind}-{number:05}-of-{count:05}.safetensors")
}

fn is_shard_of(kind: &str, name: &str) -> bool {
    name.strip_prefix(kind).is_some_and(|rest| rest.starts_with('-')) && name.ends_with(".safetensors")
}

/// The weights of a small model in one object: we write shards, but other writers may not.
const SINGLE_FILE: &str = "model.safetensors";

/// Whether the object of a checkpoint holds weights.
pub(crate) fn is_model_shard(name: &str) -> bool {
    name == SINGLE_FILE || is_shard_of("model", name)
}

/// Whether the object of a checkpoint holds moments.
pub(crate) fn is_optimizer_shard(name: &str) -> bool {
    is_shard_of("optimizer", name)
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;

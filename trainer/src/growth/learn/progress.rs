//! What a growth step that was killed goes on from: matrices, moments and losses, in one object named by its content.

use super::training::LearnState;
use super::{LearnError, Result};
use crate::storage::{Storage, StorageError};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Key of the header in the metadata.
const HEADER: &str = "progress";

/// The folder of one growth step.
pub(super) struct ProgressFolder {
    folder: Storage,
    /// Digest of everything that the result depends on.
    identity: String,
}

#[derive(Serialize, Deserialize)]
struct Header {
    identity: String,
    step: u64,
    losses: Vec<f64>,
}

impl ProgressFolder {
    pub(super) fn new(folder: Storage, identity: String) -> Self {
        Self { folder, identity }
    }

    /// Writes where learning stands, and deletes what is older than the object before.
    pub(super) fn store(&self, state: &LearnState) -> Result<()> {
        let header =
            Header { identity: self.identity.clone(), step: state.step, losses: state.losses.clone() };
        let header = serde_json::to_string(&header).map_err(|error| self.unreadable(error.to_string()))?;
        let bytes = serialize(state, header).map_err(|error| self.unreadable(error.to_string()))?;
        let name = object_name(state.step, &bytes);
        self.folder.put(&name, bytes)?;
        let others: Vec<String> = self.names()?.into_iter().filter(|other| *other != name).collect();
        // The one before stays, for this one may turn out damaged; what lies ahead is of another plan.
        let before = others.iter().filter(|other| step_of(other).is_some_and(|step| step <= state.step));
        let before = before.max();
        for other in others.iter().filter(|other| Some(*other) != before) {
            self.folder.delete(other)?;
        }
        Ok(())
    }

    /// The newest state of this growth step; a damaged object, or one of another growth step, is passed over.
    pub(super) fn load(&self, len: usize) -> Result<Option<LearnState>> {
        let mut names = self.names()?;
        names.sort();
        for name in names.iter().rev() {
            let bytes = match self.folder.get(name) {
                // Another attempt at the same growth step has gone on meanwhile.
                Err(StorageError::NotFound { .. }) => continue,
                bytes => bytes?,
            };
            if step_of(name).is_some_and(|step| object_name(step, &bytes) == *name)
                && let Some(state) = self.parse(&bytes).filter(|state| state.matrices.len() == len)
            {
                return Ok(Some(state));
            }
        }
        Ok(None)
    }

    fn parse(&self, bytes: &[u8]) -> Option<LearnState> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).ok()?;
        let header: Header = serde_json::from_str(metadata.metadata().as_ref()?.get(HEADER)?).ok()?;
        let tensors = SafeTensors::deserialize(bytes).ok()?;
        let vector = |name: &str| -> Option<Vec<f32>> {
            let (numbers, _) = tensors.tensor(name).ok()?.data().as_chunks::<4>();
            Some(numbers.iter().map(|number| f32::from_le_bytes(*number)).collect())
        };
        let state = LearnState {
            step: header.step,
            matrices: vector("matrices")?,
            exp_avg: vector("exp_avg")?,
            exp_avg_sq: vector("exp_avg_sq")?,
            losses: header.losses,
        };
        let fits = header.identity == self.identity && state.losses.len() as u64 == state.step;
        fits.then_some(state)
    }

    /// Deletes everything, now that the growth step is done.
    pub(super) fn clear(folder: &Storage) -> Result<()> {
        Ok(folder.delete_all()?)
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.folder.list()?.into_iter().map(|entry| entry.name).collect())
    }

    fn unreadable(&self, reason: String) -> LearnError {
        LearnError::Progress { uri: self.folder.uri().to_owned(), reason }
    }
}

fn serialize(
    state: &LearnState,
    header: String,
) -> std::result::Result<Vec<u8>, safetensors::SafeTensorError> {
    let vectors =
        [("matrices", &state.matrices), ("exp_avg", &state.exp_avg), ("exp_avg_sq", &state.exp_avg_sq)];
    let mut views = Vec::new();
    for (name, vector) in vectors {
        let bytes = bytemuck::cast_slice(vector);
        views.push((name, TensorView::new(Dtype::F32, vec![vector.len()], bytes)?));
    }
    safetensors::serialize(views, Some(HashMap::from([(HEADER.to_owned(), header)])))
}

fn object_name(step: u64, bytes: &[u8]) -> String {
    format!("{step:08}-{}.safetensors", blake3::hash(bytes).to_hex())
}

fn step_of(name: &str) -> Option<u64> {
    name.split_once('-')?.0.parse().ok()
}

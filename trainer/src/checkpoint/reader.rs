//! Finds, checks and loads checkpoints.

use super::error::{CheckpointError, Result};
use super::objects::{HashingReader, Problem, check_manifest, object_problem, verify, verify_objects};
use super::tensor_file::{TensorPlace, read_header};
use super::{
    Part, StateTensor, TRAINER_STATE_FILE, TrainerState, TrainingState, checkpoint_folder, folder_name,
    is_model_shard, is_optimizer_shard, parse_folder_name, stage_folder,
};
use crate::model::layout::{ParameterLayout, ParameterTensor};
use crate::storage::{Storage, StorageError};
use growth_crds::protocol::{CheckpointManifest, CheckpointObject, MANIFEST_FILE, MANIFEST_VERSION};
use std::collections::HashSet;

/// Whether a checkpoint's folder is committed.
#[derive(Debug, Clone, PartialEq)]
pub enum Commit {
    /// It has no manifest: it is being written, or its writer died.
    No,
    /// It has a manifest that cannot be used, and why.
    Damaged(String),
    /// It has a manifest. Its objects were not looked at yet.
    Yes(Box<CheckpointManifest>),
}

/// A checkpoint's folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Optimizer steps done in the stage.
    pub step: u64,
    /// Attempt that wrote it.
    pub attempt: u32,
    /// Whether it is committed.
    pub commit: Commit,
}

impl Found {
    /// Name of the folder.
    pub fn name(&self) -> String {
        folder_name(self.step, self.attempt)
    }

    /// The manifest of a committed checkpoint of that job and stage; one that cannot be used is told to `warn`.
    pub fn usable(
        self,
        storage: &Storage,
        (job, stage): (&str, &str),
        warn: &mut dyn FnMut(String),
    ) -> Option<CheckpointManifest> {
        let name = self.name();
        match self.commit {
            Commit::No => None,
            Commit::Damaged(problem) => {
                warn(skipped(&stage_folder(storage, job, stage).join(&name), &problem));
                None
            }
            Commit::Yes(manifest) => Some(*manifest),
        }
    }

    /// The manifest of a committed checkpoint.
    pub fn committed(&self) -> Option<&CheckpointManifest> {
        match &self.commit {
            Commit::Yes(manifest) => Some(manifest),
            _ => None,
        }
    }
}

/// The checkpoints of a stage, committed or not, in the order of (step, attempt).
///
/// # Errors
/// When the storage does not answer.
pub fn list(storage: &Storage, job: &str, stage: &str) -> Result<Vec<Found>> {
    let folder = stage_folder(storage, job, stage);
    let mut names: Vec<(u64, u32)> =
        folder.folders()?.iter().filter_map(|name| parse_folder_name(name)).collect();
    names.sort_unstable();
    let found = names.into_iter().map(|(step, attempt)| {
        let commit = commit_of(&folder.join(&folder_name(step, attempt)), |manifest| {
            (&*manifest.job, &*manifest.stage, manifest.step, manifest.attempt) == (job, stage, step, attempt)
        })?;
        Ok(Found { step, attempt, commit })
    });
    found.collect()
}

/// One more than the largest attempt of the stage, committed or not: the number of the next one.
///
/// # Errors
/// When the storage does not answer.
pub fn next_attempt(storage: &Storage, job: &str, stage: &str) -> Result<u32> {
    let folders = stage_folder(storage, job, stage).folders()?;
    let largest = folders.iter().filter_map(|name| parse_folder_name(name)).map(|(_, attempt)| attempt).max();
    Ok(largest.map_or(1, |attempt| attempt.saturating_add(1)))
}

/// The manifest of a folder; `belongs` says whether the manifest is the one of this folder.
pub(crate) fn commit_of(folder: &Storage, belongs: impl Fn(&CheckpointManifest) -> bool) -> Result<Commit> {
    let bytes = match folder.get(MANIFEST_FILE) {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound { .. }) => return Ok(Commit::No),
        Err(error) => return Err(error.into()),
    };
    let manifest: CheckpointManifest = match serde_json::from_slice(&bytes) {
        Ok(manifest) => manifest,
        Err(error) => return Ok(Commit::Damaged(format!("its manifest cannot be read: {error}"))),
    };
    if manifest.version > MANIFEST_VERSION {
        let version = manifest.version;
        return Ok(Commit::Damaged(format!(
            "it has version {version}; this program knows {MANIFEST_VERSION}"
        )));
    }
    if !belongs(&manifest) {
        return Ok(Commit::Damaged("its manifest is the one of another checkpoint".to_owned()));
    }
    if manifest.objects.iter().any(|object| object.name.contains('/') || object.name.starts_with('.')) {
        return Ok(Commit::Damaged("its manifest names an object outside the folder".to_owned()));
    }
    Ok(Commit::Yes(Box::new(manifest)))
}

/// The newest checkpoint of a stage whose manifest and objects are all good. Damaged ones are reported to `warn` and
/// left alone.
///
/// # Errors
/// When the storage does not answer.
pub fn latest_valid(
    storage: &Storage,
    job: &str,
    stage: &str,
    warn: &mut dyn FnMut(String),
) -> Result<Option<CheckpointManifest>> {
    let found = newest_first(storage, job, stage, warn, |folder, manifest| {
        let problems = verify(folder, manifest)?;
        match problems.into_iter().next() {
            None => read_trainer_state(folder, manifest).map(drop),
            Some(Problem { uri, problem }) => Err(CheckpointError::Damaged { uri, problem }),
        }
    })?;
    Ok(found.map(|(manifest, ())| manifest))
}

/// The newest good checkpoint of a stage, loaded: [`latest_valid`] and [`load`] in one pass over its bytes.
///
/// # Errors
/// When the storage does not answer, or the checkpoint is one of another model.
pub fn resume(
    storage: &Storage,
    job: &str,
    stage: &str,
    layout: &ParameterLayout,
    warn: &mut dyn FnMut(String),
) -> Result<Option<(CheckpointManifest, TrainingState)>> {
    newest_first(storage, job, stage, warn, |folder, manifest| load_from(folder, manifest, layout))
}

/// The newest checkpoint that `attempt` does not find damaged.
fn newest_first<T>(
    storage: &Storage,
    job: &str,
    stage: &str,
    warn: &mut dyn FnMut(String),
    attempt: impl Fn(&Storage, &CheckpointManifest) -> Result<T>,
) -> Result<Option<(CheckpointManifest, T)>> {
    for found in list(storage, job, stage)?.into_iter().rev() {
        let Some(manifest) = found.usable(storage, (job, stage), warn) else { continue };
        let folder = checkpoint_folder(storage, &manifest);
        match attempt(&folder, &manifest) {
            Ok(value) => return Ok(Some((manifest, value))),
            Err(error) if error.is_damage() => warn(skipped(&folder, &error.to_string())),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn skipped(folder: &Storage, problem: &str) -> String {
    format!("skipped the checkpoint {}: {problem}", folder.uri())
}

/// Loads a committed checkpoint and verifies what it reads.
///
/// # Errors
/// When an object is damaged, or the tensors are not those of `layout`.
pub fn load(
    storage: &Storage,
    manifest: &CheckpointManifest,
    layout: &ParameterLayout,
) -> Result<TrainingState> {
    load_from(&checkpoint_folder(storage, manifest), manifest, layout)
}

fn load_from(
    folder: &Storage,
    manifest: &CheckpointManifest,
    layout: &ParameterLayout,
) -> Result<TrainingState> {
    let LoadedPart { state, tensors } = load_some(folder, manifest, layout, 0, 1)?;
    check_complete(folder, layout, &tensors)?;
    Ok(state)
}

/// What one rank has loaded of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedPart {
    /// Whole vectors, of which only `tensors` are filled in; moments are empty where none were loaded.
    pub state: TrainingState,
    /// The tensors that were loaded, in the order of the objects.
    pub tensors: Vec<StateTensor>,
}

impl LoadedPart {
    /// Checks that the parts of all ranks together are the whole model; moments may be absent altogether.
    ///
    /// # Errors
    /// The tensor that is missing.
    pub fn check_complete(
        storage: &Storage,
        manifest: &CheckpointManifest,
        layout: &ParameterLayout,
        tensors: &[StateTensor],
    ) -> Result<()> {
        check_complete(&checkpoint_folder(storage, manifest), layout, tensors)
    }
}

/// Loads and verifies every `world_size`-th object with tensors, beginning with object `rank`.
///
/// # Errors
/// When an object is damaged, or its tensors are not those of `layout`.
pub fn load_part(
    storage: &Storage,
    manifest: &CheckpointManifest,
    layout: &ParameterLayout,
    rank: usize,
    world_size: usize,
) -> Result<LoadedPart> {
    load_some(&checkpoint_folder(storage, manifest), manifest, layout, rank, world_size)
}

fn load_some(
    folder: &Storage,
    manifest: &CheckpointManifest,
    layout: &ParameterLayout,
    rank: usize,
    world_size: usize,
) -> Result<LoadedPart> {
    let (shards, others): (Vec<_>, Vec<_>) = manifest
        .objects
        .iter()
        .partition(|object| is_model_shard(&object.name) || is_optimizer_shard(&object.name));
    let problems = [check_manifest(folder, manifest), verify_objects(folder, &others, &|_| ())?].concat();
    if let Some(Problem { uri, problem }) = problems.into_iter().next() {
        return Err(CheckpointError::Damaged { uri, problem });
    }
    let position = read_trainer_state(folder, manifest)?;
    let mut loader = Loader::new(folder, layout);
    loader.state.step = position.step;
    loader.state.tokens = position.tokens;
    loader.state.optimizer_step = position.optimizer_step;
    for object in shards.into_iter().skip(rank).step_by(world_size) {
        // A damaged header may look like a wrong model, so the digest has the first word on every error.
        if let Err(error) = loader.object(object) {
            return Err(damage_of(folder, object)?.unwrap_or(error));
        }
    }
    Ok(LoadedPart { state: loader.state, tensors: loader.tensors })
}

/// The damage of an object, if there is one.
fn damage_of(folder: &Storage, object: &CheckpointObject) -> Result<Option<CheckpointError>> {
    let problem = verify_objects(folder, &[object], &|_| ())?.into_iter().next();
    Ok(problem.map(|Problem { uri, problem }| CheckpointError::Damaged { uri, problem }))
}

/// Reads and verifies `trainer_state.json`.
pub(crate) fn read_trainer_state(folder: &Storage, manifest: &CheckpointManifest) -> Result<TrainerState> {
    let uri = folder.uri_of(TRAINER_STATE_FILE);
    let damaged = |problem: String| CheckpointError::Damaged { uri: uri.clone(), problem };
    let Some(object) = manifest.objects.iter().find(|object| object.name == TRAINER_STATE_FILE) else {
        return Err(damaged("its manifest does not list it".to_owned()));
    };
    let bytes = folder.get(TRAINER_STATE_FILE)?;
    if let Some(problem) = object_problem(object, bytes.len() as u64, &super::digest_bytes(&bytes)) {
        return Err(damaged(problem));
    }
    let position: TrainerState =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if (position.step, position.tokens) != (manifest.step, manifest.tokens) {
        return Err(damaged("its step or tokens are not those of the manifest".to_owned()));
    }
    Ok(position)
}

/// Fills a state object by object.
struct Loader<'a> {
    folder: &'a Storage,
    layout: &'a ParameterLayout,
    state: TrainingState,
    tensors: Vec<StateTensor>,
    piece: Vec<u8>,
}

impl<'a> Loader<'a> {
    fn new(folder: &'a Storage, layout: &'a ParameterLayout) -> Self {
        let state = TrainingState { parameters: vec![0.0; layout.total_len()], ..TrainingState::default() };
        Self { folder, layout, state, tensors: Vec::new(), piece: Vec::new() }
    }

    /// Reads one object from front to back, and its digest with it.
    fn object(&mut self, object: &CheckpointObject) -> Result<()> {
        let tensors = read_header(self.folder, &object.name)?;
        let mut reader = HashingReader::new(self.folder, &object.name)?;
        let data: u64 = tensors.iter().map(|(_, place)| place.bytes.end - place.bytes.start).sum();
        let mut header = vec![0; (reader.bytes() - data) as usize];
        reader.read_exact(&mut header)?;
        for (name, place) in &tensors {
            let found = self.place_of(&object.name, name)?;
            let tensor = &self.layout.tensors()[found.tensor];
            if place.shape != tensor.shape {
                return Err(CheckpointError::WrongShape {
                    uri: self.folder.uri_of(&object.name),
                    tensor: name.clone(),
                    found: place.shape.clone(),
                    expected: tensor.shape.clone(),
                });
            }
            self.tensors.push(found);
            self.tensor(&mut reader, place, tensor, found)?;
        }
        match object_problem(object, reader.bytes(), &reader.digest()) {
            None => Ok(()),
            Some(problem) => Err(CheckpointError::Damaged { uri: self.folder.uri_of(&object.name), problem }),
        }
    }

    /// The tensor of the state that `name` of an object means.
    fn place_of(&self, object: &str, name: &str) -> Result<StateTensor> {
        let (tensor, part) = match name.rsplit_once('/') {
            Some((tensor, "exp_avg")) => (tensor, Part::ExpAvg),
            Some((tensor, "exp_avg_sq")) => (tensor, Part::ExpAvgSq),
            _ => (name, Part::Parameters),
        };
        let tensor = self.layout.position(tensor).ok_or_else(|| CheckpointError::UnknownTensor {
            uri: self.folder.uri_of(object),
            tensor: name.to_owned(),
        })?;
        Ok(StateTensor { part, tensor })
    }

    fn tensor(
        &mut self,
        reader: &mut HashingReader,
        place: &TensorPlace,
        tensor: &ParameterTensor,
        found: StateTensor,
    ) -> Result<()> {
        let vector = found.vector_of_mut(&mut self.state);
        vector.resize(self.layout.total_len(), 0.0);
        let width = place.number_type.bytes();
        for numbers in vector[tensor.range()].chunks_mut(self.folder.part_bytes() / width) {
            self.piece.resize(numbers.len() * width, 0);
            reader.read_exact(&mut self.piece)?;
            place.number_type.decode(&self.piece, numbers);
        }
        Ok(())
    }
}

/// Whether every tensor of the model is there; moments may be absent altogether.
fn check_complete(folder: &Storage, layout: &ParameterLayout, tensors: &[StateTensor]) -> Result<()> {
    let found: HashSet<&StateTensor> = tensors.iter().collect();
    let mut parts = vec![(Part::Parameters, "")];
    if tensors.iter().any(|tensor| tensor.part != Part::Parameters) {
        parts.extend([(Part::ExpAvg, "/exp_avg"), (Part::ExpAvgSq, "/exp_avg_sq")]);
    }
    for (index, tensor) in layout.tensors().iter().enumerate() {
        for (part, suffix) in &parts {
            if !found.contains(&StateTensor { part: *part, tensor: index }) {
                return Err(CheckpointError::MissingTensor {
                    uri: folder.uri().to_owned(),
                    tensor: format!("{}{suffix}", tensor.name),
                    expected: tensor.shape.clone(),
                });
            }
        }
    }
    Ok(())
}

//! Writes a checkpoint: the objects first, the manifest that commits them last.

use super::config::{config_json, generation_config_json, pretty};
use super::error::{CheckpointError, Result};
use super::objects::{HashingWriter, put_object, state_digest};
use super::pace::Pace;
use super::reader::{Commit, commit_of};
use super::snapshot::{ObjectTable, Snapshot, object_bytes};
use super::tensor_file::{TensorSpec, header};
use super::{
    CONFIG_FILE, ExtraFile, StateTensor, TRAINER_STATE_FILE, TokenIds, TrainerState, TrainingState,
    folder_name, parse_folder_name, shard_name, stage_folder,
};
use crate::model::layout::ParameterLayout;
use crate::storage::{Storage, StorageError};
use bytes::Bytes;
use growth_crds::plan::ModelConfig;
use growth_crds::protocol::{
    CheckpointManifest, CheckpointObject, CheckpointOrigin, MANIFEST_FILE, MANIFEST_VERSION,
};
use jiff::Timestamp;
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::ops::Range;

/// Largest weights' object, unless one tensor is larger.
pub const DEFAULT_SHARD_BYTES: u64 = 1 << 30;

/// The object that says which weights' object holds which tensor.
pub(crate) const MODEL_INDEX_FILE: &str = "model.safetensors.index.json";

/// Where the checkpoints of one attempt of a stage go.
#[derive(Debug, Clone)]
pub struct CheckpointLocation {
    /// The job's storage.
    pub storage: Storage,
    /// Name of the job.
    pub job: String,
    /// Name of the stage.
    pub stage: String,
    /// The attempt.
    pub attempt: u32,
}

impl CheckpointLocation {
    /// The folder of the checkpoint after `step`.
    pub fn folder(&self, step: u64) -> Storage {
        stage_folder(&self.storage, &self.job, &self.stage).join(&folder_name(step, self.attempt))
    }

    /// Refuses when a newer attempt has written past the stage's first checkpoint. Growth steps write step 0 and
    /// count their attempts by themselves, so step 0 says nothing.
    fn refuse_if_superseded(&self, folder: &Storage) -> Result<()> {
        let names = stage_folder(&self.storage, &self.job, &self.stage).folders()?;
        let attempts = names.iter().filter_map(|name| parse_folder_name(name)).filter(|(step, _)| *step > 0);
        match attempts.map(|(_, attempt)| attempt).max() {
            Some(newer) if newer > self.attempt => {
                let (uri, attempt) = (folder.uri().to_owned(), self.attempt);
                Err(CheckpointError::Superseded { uri, attempt, newer })
            }
            _ => Ok(()),
        }
    }
}

/// Writes the checkpoints of one attempt of a stage.
#[derive(Debug, Clone)]
pub struct CheckpointWriter {
    /// Where they go.
    pub location: CheckpointLocation,
    /// Architecture.
    pub config: ModelConfig,
    /// The tensors of a state.
    pub layout: ParameterLayout,
    /// Special tokens, for `config.json`.
    pub token_ids: TokenIds,
    /// Objects that every checkpoint carries: the tokenizer.
    pub files: Vec<ExtraFile>,
    /// Largest weights' object.
    pub shard_bytes: u64,
    /// How it shares the machine.
    pub pace: Pace,
}

impl CheckpointWriter {
    /// A writer whose objects have the size that suits the model.
    pub fn new(
        location: CheckpointLocation,
        config: ModelConfig,
        token_ids: TokenIds,
        files: Vec<ExtraFile>,
    ) -> Self {
        let layout = ParameterLayout::new(&config);
        Self {
            location,
            config,
            shard_bytes: object_bytes(layout.parameter_count() * size_of::<f32>() as u64),
            layout,
            token_ids,
            files,
            pace: Pace::default(),
        }
    }

    /// Which objects its checkpoints consist of.
    pub fn table(&self) -> ObjectTable {
        ObjectTable::new(&self.layout, self.shard_bytes)
    }

    /// Writes and commits a checkpoint. `records` are small objects beside the tensors. Until the manifest is there, an
    /// error leaves an uncommitted folder, which the same call may write again.
    ///
    /// # Errors
    /// When the storage fails, when the folder is committed already, when a newer attempt has taken over.
    pub fn write(&self, state: &TrainingState, records: &[ExtraFile]) -> Result<CheckpointManifest> {
        let objects = self.write_state(&self.open(state.step)?, state, records)?;
        self.close(state.step, state.tokens, objects)
    }

    /// Writes and commits a checkpoint in a folder of any name.
    ///
    /// # Errors
    /// When the storage fails, or when the folder is committed already.
    pub fn export(&self, folder: &Storage, state: &TrainingState) -> Result<CheckpointManifest> {
        refuse_if_committed(folder)?;
        let objects = self.write_state(folder, state, &[])?;
        self.commitment(state.step, state.tokens).commit(folder, objects)
    }

    /// Writes what rank 0 of `world_size` writes of a checkpoint.
    pub(super) fn begin(
        &self,
        snapshot: &Snapshot,
        records: &[ExtraFile],
        world_size: usize,
    ) -> Result<Vec<CheckpointObject>> {
        let folder = self.open(snapshot.step)?;
        let position = [snapshot.step, snapshot.tokens, snapshot.optimizer_step];
        self.write_beside(&folder, position, records, || self.write_part(snapshot, 0, world_size))
    }

    /// Writes the tensors that `rank` of `world_size` writes of a checkpoint.
    pub(super) fn write_part(
        &self,
        snapshot: &Snapshot,
        rank: usize,
        world_size: usize,
    ) -> Result<Vec<CheckpointObject>> {
        let folder = self.location.folder(snapshot.step);
        let table = self.table();
        let numbers = |tensor: StateTensor| snapshot.numbers(tensor).unwrap_or_default();
        let objects = table.of_rank(rank, world_size);
        objects.map(|object| table.write(&folder, object, &numbers, &self.pace)).collect()
    }

    /// Commits a checkpoint whose objects are all written, by whomever.
    pub(super) fn commit(
        &self,
        snapshot: &Snapshot,
        mut objects: Vec<CheckpointObject>,
    ) -> Result<CheckpointManifest> {
        objects.sort_by(|one, other| one.name.cmp(&other.name));
        self.close(snapshot.step, snapshot.tokens, objects)
    }

    /// The folder of a checkpoint that may be written.
    fn open(&self, step: u64) -> Result<Storage> {
        let folder = self.location.folder(step);
        refuse_if_committed(&folder)?;
        self.location.refuse_if_superseded(&folder)?;
        Ok(folder)
    }

    /// Commits what was written, unless a newer attempt has taken over meanwhile.
    fn close(&self, step: u64, tokens: u64, objects: Vec<CheckpointObject>) -> Result<CheckpointManifest> {
        let folder = self.location.folder(step);
        self.location.refuse_if_superseded(&folder)?;
        self.commitment(step, tokens).commit(&folder, objects)
    }

    fn write_state(
        &self,
        folder: &Storage,
        state: &TrainingState,
        records: &[ExtraFile],
    ) -> Result<Vec<CheckpointObject>> {
        self.check(state)?;
        let table = self.table();
        let numbers =
            |tensor: StateTensor| &tensor.vector_of(state)[self.layout.tensors()[tensor.tensor].range()];
        let position = [state.step, state.tokens, state.optimizer_step];
        self.write_beside(folder, position, records, || {
            let objects =
                table.objects().filter(|object| state.has_moments() || !table.holds_moments(*object));
            objects.map(|object| table.write(folder, object, &numbers, &self.pace)).collect()
        })
    }

    /// Writes everything but tensors, which `write_tensors` does.
    fn write_beside(
        &self,
        folder: &Storage,
        [step, tokens, optimizer_step]: [u64; 3],
        records: &[ExtraFile],
        write_tensors: impl FnOnce() -> Result<Vec<CheckpointObject>>,
    ) -> Result<Vec<CheckpointObject>> {
        let mut objects = put_small_objects(folder, &self.config, &self.token_ids, &self.files)?;
        objects.extend(write_tensors()?);
        objects.push(self.table().write_index(folder)?);
        objects.push(put_trainer_state(folder, step, tokens, optimizer_step)?);
        for record in records {
            objects.push(put_object(folder, &record.name, record.bytes.clone(), record.state)?);
        }
        Ok(objects)
    }

    fn commitment(&self, step: u64, tokens: u64) -> Commitment {
        Commitment {
            job: self.location.job.clone(),
            stage: self.location.stage.clone(),
            attempt: self.location.attempt,
            step,
            tokens,
            origin: None,
        }
    }

    fn check(&self, state: &TrainingState) -> Result<()> {
        let expected = self.layout.total_len();
        let moments = [("first moments", &state.exp_avg), ("second moments", &state.exp_avg_sq)];
        let moments = moments.into_iter().filter(|_| state.has_moments() || !state.exp_avg_sq.is_empty());
        for (buffer, vector) in [("parameters", &state.parameters)].into_iter().chain(moments) {
            if vector.len() != expected {
                return Err(CheckpointError::WrongLength { buffer, found: vector.len(), expected });
            }
        }
        Ok(())
    }
}

/// The tensors of the weights' objects.
pub(crate) fn model_specs(layout: &ParameterLayout) -> Vec<TensorSpec> {
    let spec = |name: &String, shape: &Vec<usize>| TensorSpec { name: name.clone(), shape: shape.clone() };
    layout.tensors().iter().map(|tensor| spec(&tensor.name, &tensor.shape)).collect()
}

/// The tensors of the moments' objects, first and second in turn: whole, so that they do not depend on how many processes trained.
pub(crate) fn moment_specs(layout: &ParameterLayout) -> Vec<TensorSpec> {
    let moments = |tensor: TensorSpec| {
        ["exp_avg", "exp_avg_sq"].map(|moment| TensorSpec {
            name: format!("{}/{moment}", tensor.name),
            shape: tensor.shape.clone(),
        })
    };
    model_specs(layout).into_iter().flat_map(moments).collect()
}

/// A folder with a manifest is never written into.
pub(crate) fn refuse_if_committed(folder: &Storage) -> Result<()> {
    match commit_of(folder, |_| true)? {
        Commit::No => Ok(()),
        _ => Err(CheckpointError::AlreadyCommitted { uri: folder.uri().to_owned() }),
    }
}

/// Writes the configuration and the files handed in; a file handed in wins over one made here.
pub(crate) fn put_small_objects(
    folder: &Storage,
    config: &ModelConfig,
    token_ids: &TokenIds,
    files: &[ExtraFile],
) -> Result<Vec<CheckpointObject>> {
    let mut contents: BTreeMap<&str, Bytes> = BTreeMap::new();
    if let Some(bytes) = generation_config_json(token_ids) {
        contents.insert("generation_config.json", bytes);
    }
    contents.extend(files.iter().map(|file| (file.name.as_str(), file.bytes.clone())));
    // The configuration is what the weights mean: it is part of the state, and always ours.
    contents.insert(CONFIG_FILE, config_json(config, token_ids));
    contents.into_iter().map(|(name, bytes)| put_object(folder, name, bytes, name == CONFIG_FILE)).collect()
}

/// Writes `trainer_state.json`.
pub(crate) fn put_trainer_state(
    folder: &Storage,
    step: u64,
    tokens: u64,
    optimizer_step: u64,
) -> Result<CheckpointObject> {
    let content = json!(TrainerState { step, tokens, optimizer_step });
    put_object(folder, TRAINER_STATE_FILE, pretty(content), true)
}

/// Tensors, cut into objects at their boundaries.
#[derive(Debug, Clone)]
pub(crate) struct ShardSet {
    tensors: Vec<TensorSpec>,
    shards: Vec<(String, Range<usize>)>,
}

impl ShardSet {
    /// Fills one object after the other up to `shard_bytes`; a tensor larger than that has one for itself.
    pub(crate) fn new(kind: &str, tensors: Vec<TensorSpec>, shard_bytes: u64) -> Self {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut filled = 0;
        for (index, tensor) in tensors.iter().enumerate() {
            match ranges.last_mut() {
                Some(range) if filled + tensor.bytes() <= shard_bytes => {
                    filled += tensor.bytes();
                    range.end = index + 1;
                }
                _ => {
                    filled = tensor.bytes();
                    ranges.push(index..index + 1);
                }
            }
        }
        let count = ranges.len();
        let name = |index| shard_name(kind, index + 1, count);
        let shards = ranges.into_iter().enumerate().map(|(index, range)| (name(index), range)).collect();
        Self { tensors, shards }
    }

    /// Bytes of all tensors.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorSpec::bytes).sum()
    }

    /// Writes some of the objects; `fill` gets a tensor with its index and writes its numbers.
    pub(crate) fn write<E: From<CheckpointError>>(
        &self,
        folder: &Storage,
        shards: Range<usize>,
        mut fill: impl FnMut(usize, &TensorSpec, &mut HashingWriter) -> std::result::Result<(), E>,
    ) -> std::result::Result<Vec<CheckpointObject>, E> {
        shards.map(|shard| self.write_one(folder, shard, &mut fill)).collect()
    }

    /// Writes one object, as [`ShardSet::write`] does.
    pub(crate) fn write_one<E: From<CheckpointError>>(
        &self,
        folder: &Storage,
        shard: usize,
        fill: &mut impl FnMut(usize, &TensorSpec, &mut HashingWriter) -> std::result::Result<(), E>,
    ) -> std::result::Result<CheckpointObject, E> {
        let (name, range) = &self.shards[shard];
        let mut writer = HashingWriter::new(folder, name)?;
        writer.write(&header(&self.tensors[range.clone()]))?;
        for index in range.clone() {
            let tensor = &self.tensors[index];
            let end = writer.bytes() + tensor.bytes();
            fill(index, tensor, &mut writer)?;
            debug_assert_eq!(writer.bytes(), end, "{} is written in another size", tensor.name);
        }
        Ok(writer.finish(true)?)
    }

    /// Number of objects.
    pub(crate) fn len(&self) -> usize {
        self.shards.len()
    }

    /// The tensors of one object.
    pub(crate) fn range(&self, shard: usize) -> Range<usize> {
        self.shards[shard].1.clone()
    }

    /// Writes the index of the weights.
    pub(crate) fn write_index(&self, folder: &Storage) -> Result<CheckpointObject> {
        let mut weight_map = Map::new();
        for (object, range) in &self.shards {
            let tensors = &self.tensors[range.clone()];
            weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(object))));
        }
        let content = json!({"metadata": {"total_size": self.data_bytes()}, "weight_map": weight_map});
        put_object(folder, MODEL_INDEX_FILE, pretty(content), false)
    }
}

/// What a manifest says beside its objects.
pub(crate) struct Commitment {
    pub(crate) job: String,
    pub(crate) stage: String,
    pub(crate) attempt: u32,
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    pub(crate) origin: Option<CheckpointOrigin>,
}

impl Commitment {
    /// Looks whether every object arrived whole, then writes the manifest.
    pub(crate) fn commit(
        self,
        folder: &Storage,
        objects: Vec<CheckpointObject>,
    ) -> Result<CheckpointManifest> {
        confirm_sizes(folder, &objects)?;
        let manifest = CheckpointManifest {
            version: MANIFEST_VERSION,
            job: self.job,
            stage: self.stage,
            attempt: self.attempt,
            step: self.step,
            tokens: self.tokens,
            digest: state_digest(&objects),
            origin: self.origin,
            committed_at: Timestamp::now(),
            writer: concat!("growth-trainer ", env!("CARGO_PKG_VERSION")).to_owned(),
            objects,
        };
        match folder.create(MANIFEST_FILE, pretty(json!(manifest))) {
            Ok(()) => Ok(manifest),
            Err(StorageError::AlreadyExists { .. }) => {
                Err(CheckpointError::AlreadyCommitted { uri: folder.uri().to_owned() })
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn confirm_sizes(folder: &Storage, objects: &[CheckpointObject]) -> Result<()> {
    let stored: BTreeMap<String, u64> =
        folder.list()?.into_iter().map(|entry| (entry.name, entry.bytes)).collect();
    for object in objects {
        let problem = match stored.get(&object.name) {
            Some(&bytes) if bytes == object.bytes => continue,
            Some(bytes) => format!("{bytes} of its {} bytes arrived", object.bytes),
            None => "it did not arrive".to_owned(),
        };
        return Err(CheckpointError::Damaged { uri: folder.uri_of(&object.name), problem });
    }
    Ok(())
}

//! Growth: turns the last checkpoint of a small model into the first one of a larger model, tensor by tensor, so that
//! memory does not depend on the model's size, and measures whether both compute the same.

mod depth;
pub mod learn;
mod measure;
mod transform;

pub use depth::{LayerMapError, grown_config};
pub use learn::{LearnData, LearnError, LearnProgress, Learning};
pub use measure::{DEFAULT_MEASURED_TOKENS, Measure};

use crate::checkpoint::{
    CheckpointError, CheckpointLocation, Commit, Commitment, ExtraFile, HuggingFaceFolder, Problem, ShardSet,
    TensorIndex, commit_of, digest_bytes, list, mask_file, model_specs, moment_specs, object_bytes,
    put_object, put_small_objects, put_trainer_state, read_record, read_trainer_state, refuse_if_committed,
    stage_folder, verify,
};
use crate::model::layout::ParameterLayout;
use crate::model::mask::WeightMasks;
use crate::storage::Storage;
use growth_crds::plan::growth_map::connection_rate;
use growth_crds::plan::{GrowthPlan, ModelConfig, OptimizerStatePolicy};
use growth_crds::protocol::{
    CheckpointManifest, CheckpointObject, CheckpointOrigin, ConnectionRate, GROWTH_MASK_FILE,
    GROWTH_RECORD_FILE, GrowthMaskRecord, GrowthMeasurement, GrowthRecord,
};
use measure::{Sample, StoredModel};
use serde_json::json;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use transform::{Buffers, Transform};

/// Files that belong to the tokenizer and to text generation; growth copies those that the source has.
const COPIED_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// What can go wrong with a growth step.
#[derive(thiserror::Error, Debug)]
pub enum GrowthError {
    /// Source or target.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Matrices could not be learned.
    #[error(transparent)]
    Learn(#[from] LearnError),
    /// The plan does not fit the source.
    #[error("{uri} cannot be grown: {source}")]
    Layers {
        /// The source.
        uri: String,
        /// Why.
        source: LayerMapError,
    },
    /// The plan was made for another source.
    #[error(
        "{uri} has another architecture than the growth plan was made for: {field} is {found} instead of {expected}; \
         check which checkpoint the stage starts from"
    )]
    OtherSource {
        /// The source.
        uri: String,
        /// First field that differs.
        field: String,
        /// Its value in the source.
        found: String,
        /// Its value in the plan.
        expected: String,
    },
    /// `Keep` of a plain model, or of one that was trained with another optimizer.
    #[error("{uri} holds no moments of AdamW, which optimizerState: Keep needs; use Reset")]
    NoMoments {
        /// The source.
        uri: String,
    },
    /// The source's own growth is not finished.
    #[error(
        "{uri} is a checkpoint inside the ramp of its own growth ({GROWTH_MASK_FILE}); grow one after the ramp, when \
         all of it has become part of the model"
    )]
    InsideRamp {
        /// The source.
        uri: String,
    },
    /// The target folder given by a person is in use.
    #[error(
        "{uri} is not empty and holds no checkpoint of this growth step; name another folder, or delete it"
    )]
    FolderInUse {
        /// The folder.
        uri: String,
    },
    /// The target is already there, but damaged.
    #[error(
        "the grown checkpoint is already there, but damaged: {0}; delete its folder to have it written again"
    )]
    DamagedTarget(Problem),
}

impl GrowthError {
    /// Whether source, plan or target are at fault, so that trying again cannot help.
    pub fn is_input_error(&self) -> bool {
        match self {
            Self::Checkpoint(error) => error.is_input_error(),
            Self::Learn(error) => error.is_input_error(),
            Self::Layers { .. }
            | Self::OtherSource { .. }
            | Self::NoMoments { .. }
            | Self::InsideRamp { .. }
            | Self::FolderInUse { .. } => true,
            Self::DamagedTarget(_) => false,
        }
    }
}

impl From<crate::storage::StorageError> for GrowthError {
    fn from(error: crate::storage::StorageError) -> Self {
        Self::Checkpoint(error.into())
    }
}

/// Result of a growth step.
pub type Result<T> = std::result::Result<T, GrowthError>;

/// Where the grown checkpoint goes.
#[derive(Debug, Clone)]
pub enum GrowthTarget {
    /// The first checkpoint of a stage.
    Stage(CheckpointLocation),
    /// Any folder, empty or absent.
    Folder {
        /// The folder.
        folder: Storage,
        /// Name of the job in the manifest.
        job: String,
        /// Name of the stage in the manifest.
        stage: String,
    },
}

impl GrowthTarget {
    fn folder(&self) -> Storage {
        match self {
            Self::Stage(location) => location.folder(0),
            Self::Folder { folder, .. } => folder.clone(),
        }
    }

    fn commitment(&self, origin: CheckpointOrigin) -> Commitment {
        let (job, stage, attempt) = match self {
            Self::Stage(CheckpointLocation { job, stage, attempt, .. }) => (job, stage, *attempt),
            Self::Folder { job, stage, .. } => (job, stage, 0),
        };
        let (job, stage) = (job.clone(), stage.clone());
        Commitment { job, stage, attempt, step: 0, tokens: 0, origin: Some(origin) }
    }
}

/// A grown checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct GrownCheckpoint {
    /// Its manifest.
    pub manifest: CheckpointManifest,
    /// Address of its folder.
    pub uri: String,
    /// Whether it was there before; nothing was written then.
    pub reused: bool,
    /// What the growth step did, where the checkpoint says it.
    pub record: Option<GrowthRecord>,
}

/// Grows the model in the folder `source`. `expected` is the architecture that the plan was made for, if one is
/// known. `files` replace or add to the tokenizer files that are copied from the source. `progress` hears of bytes
/// done and bytes in all. The same source and plan give the same state digest, and a checkpoint that is there
/// already is used again.
///
/// # Errors
/// When the plan does not fit, the source is damaged, or the storage fails; a target is committed whole or not at all.
pub fn grow(
    source: &Storage,
    expected: Option<&ModelConfig>,
    plan: &GrowthPlan,
    target: &GrowthTarget,
    files: &[ExtraFile],
    progress: Progress<'_>,
) -> Result<GrownCheckpoint> {
    grow_and_measure(source, expected, plan, target, files, &Measure::default(), progress)
}

/// [`grow`], measured on tokens of the caller's choice.
///
/// # Errors
/// As [`grow`].
pub fn grow_and_measure(
    source: &Storage,
    expected: Option<&ModelConfig>,
    plan: &GrowthPlan,
    target: &GrowthTarget,
    files: &[ExtraFile],
    measure: &Measure<'_>,
    progress: Progress<'_>,
) -> Result<GrownCheckpoint> {
    let data = GrowthData { measure: measure.clone(), learning: None };
    grow_with(source, expected, plan, target, files, &data, progress)
}

/// Tokens of a growth step.
#[derive(Default)]
pub struct GrowthData<'a> {
    /// To compare source and target on.
    pub measure: Measure<'a>,
    /// To learn on, for operators that learn.
    pub learning: Option<Learning<'a>>,
}

/// [`grow_and_measure`], with tokens to learn on.
///
/// # Errors
/// As [`grow`], and when an operator that learns has no tokens, or its loss diverges.
pub fn grow_with(
    source: &Storage,
    expected: Option<&ModelConfig>,
    plan: &GrowthPlan,
    target: &GrowthTarget,
    files: &[ExtraFile],
    data: &GrowthData<'_>,
    progress: Progress<'_>,
) -> Result<GrownCheckpoint> {
    let mut growth = Growth::open(source, expected, plan)?;
    growth.learning = data.learning.as_ref();
    growth.run(target, files, &data.measure, progress)
}

/// One growth step: everything is known and checked, nothing is written.
struct Growth<'a> {
    source: HuggingFaceFolder,
    plan: &'a GrowthPlan,
    config: ModelConfig,
    layout: ParameterLayout,
    /// Objects of the source's moments, when they are kept.
    moments: Vec<String>,
    optimizer_step: u64,
    shard_bytes: u64,
    learning: Option<&'a Learning<'a>>,
}

impl<'a> Growth<'a> {
    fn open(source: &Storage, expected: Option<&ModelConfig>, plan: &'a GrowthPlan) -> Result<Self> {
        let source = HuggingFaceFolder::open(source)?;
        if let Some(expected) = expected {
            check_source(&source, expected)?;
        }
        let uri = || source.folder().uri().to_owned();
        if source.mask().is_some() {
            return Err(GrowthError::InsideRamp { uri: uri() });
        }
        let config = grown_config(source.config(), plan)
            .map_err(|error| GrowthError::Layers { uri: uri(), source: error })?;
        let layout = ParameterLayout::new(&config);
        let mut growth = Self {
            // As training cuts them: equal models have equal objects.
            shard_bytes: object_bytes(layout.parameter_count() * size_of::<f32>() as u64),
            layout,
            config,
            plan,
            moments: Vec::new(),
            optimizer_step: 0,
            learning: None,
            source,
        };
        if plan.optimizer_state == OptimizerStatePolicy::Keep {
            growth.keep_moments()?;
        }
        Ok(growth)
    }

    fn keep_moments(&mut self) -> Result<()> {
        let folder = self.source.folder();
        let no_moments = || GrowthError::NoMoments { uri: folder.uri().to_owned() };
        let manifest = self.source.manifest().ok_or_else(no_moments)?;
        let optimizer_step = read_trainer_state(folder, manifest)?.optimizer_step;
        let moments = self.source.optimizer_files();
        // Before the first step no moments mean zeros, which grow to zeros.
        if moments.is_empty() && optimizer_step > 0 {
            return Err(no_moments());
        }
        (self.moments, self.optimizer_step) = (moments, optimizer_step);
        Ok(())
    }

    fn run(
        &self,
        target: &GrowthTarget,
        files: &[ExtraFile],
        measure: &Measure<'_>,
        progress: Progress<'_>,
    ) -> Result<GrownCheckpoint> {
        self.check_learning()?;
        // With a manifest the digest is known, and a finished growth step costs no read of the source.
        if let Some(manifest) = self.source.manifest()
            && let Some(grown) = Self::reusable(target, &self.origin(manifest.digest.clone()))?
        {
            return Ok(grown);
        }
        let meter = Meter::new(self.bytes_to_read()? + self.bytes_to_write(), progress);
        let origin = self.origin(self.read_source(&meter)?);
        if self.source.manifest().is_none()
            && let Some(grown) = Self::reusable(target, &origin)?
        {
            return Ok(grown);
        }
        refuse_used_folder(target)?;
        let (manifest, record) = self.write(target, origin, files, measure, &meter)?;
        self.clear_progress()?;
        let uri = target.folder().uri().to_owned();
        Ok(GrownCheckpoint { manifest, uri, reused: false, record: Some(record) })
    }

    fn origin(&self, source_digest: String) -> CheckpointOrigin {
        let mut content = json!({"config": self.config, "growth": self.plan});
        if let Some(data) = self.learning_identity() {
            content["data"] = data;
        }
        content.sort_all_objects();
        CheckpointOrigin { source_digest, plan_digest: digest_bytes(content.to_string().as_bytes()) }
    }

    fn read_files(&self) -> Vec<String> {
        self.source.model_files().map(str::to_owned).chain(self.moments.iter().cloned()).collect()
    }

    fn bytes_to_read(&self) -> Result<u64> {
        let folder = self.source.folder();
        let mut total = 0;
        for name in self.read_files() {
            total += folder.head(&name)?.map_or(0, |entry| entry.bytes);
        }
        Ok(total)
    }

    fn bytes_to_write(&self) -> u64 {
        self.model_shards().data_bytes() + self.moment_shards().map_or(0, |shards| shards.data_bytes())
    }

    fn model_shards(&self) -> ShardSet {
        ShardSet::new("model", model_specs(&self.layout), self.shard_bytes)
    }

    fn moment_shards(&self) -> Option<ShardSet> {
        let kept = !self.moments.is_empty();
        kept.then(|| ShardSet::new("optimizer", moment_specs(&self.layout), self.shard_bytes))
    }

    /// Verifies what will be read, and gives its digest. What is grown must be what was committed, so this reads the
    /// source once more; a plain folder has no other name that changes with its content.
    fn read_source(&self, meter: &Meter<'_>) -> Result<String> {
        let digest = match self.source.manifest() {
            Some(manifest) => {
                self.source.verify_files(&self.read_files(), &|bytes| meter.add(bytes))?;
                manifest.digest.clone()
            }
            None => self.source.digest_of_files(&|bytes| meter.add(bytes))?,
        };
        self.source.check_tied_head()?;
        Ok(digest)
    }

    /// A committed target of the same origin.
    fn reusable(target: &GrowthTarget, origin: &CheckpointOrigin) -> Result<Option<GrownCheckpoint>> {
        match target {
            GrowthTarget::Stage(location) => reusable_of_stage(location, origin),
            GrowthTarget::Folder { folder, .. } => reusable_folder(folder, origin),
        }
    }

    fn write(
        &self,
        target: &GrowthTarget,
        origin: CheckpointOrigin,
        files: &[ExtraFile],
        measure: &Measure<'_>,
        meter: &Meter<'_>,
    ) -> Result<(CheckpointManifest, GrowthRecord)> {
        let learned = self.learn(&origin)?;
        let folder = target.folder();
        let files = self.files(files)?;
        let mut objects = put_small_objects(&folder, &self.config, self.source.token_ids(), &files)?;
        let model = self.model_shards();
        let weights = match &learned {
            Some(learned) => self.write_learned(&folder, &model, learned, meter)?,
            None => self.write_shards(&folder, &model, self.source.tensors(), meter)?,
        };
        let mut record = self.record(self.measure(&folder, &weights, measure)?);
        if let (Some(learned), Some(plan)) = (&learned, &self.plan.learn) {
            record.learned = Some(learned.record(plan));
            objects.push(self.write_matrices(&folder, learned)?);
        }
        objects.extend(weights);
        objects.push(model.write_index(&folder)?);
        if let Some(moments) = self.moment_shards() {
            let tensors = TensorIndex::read(self.source.folder(), &self.moments)?;
            objects.extend(self.write_shards(&folder, &moments, &tensors, meter)?);
        }
        objects.push(put_trainer_state(&folder, 0, 0, self.optimizer_step)?);
        if let Some(masks) = self.masks() {
            let file = mask_file(&masks);
            objects.push(put_object(&folder, &file.name, file.bytes, file.state)?);
        }
        let text = format!("{:#}\n", json!(record));
        objects.push(put_object(&folder, GROWTH_RECORD_FILE, text.into(), false)?);
        Ok((target.commitment(origin).commit(&folder, objects)?, record))
    }

    /// What the first checkpoint says of the masks of this growth, which are 0.
    fn masks(&self) -> Option<GrowthMaskRecord> {
        let growth = self.plan;
        growth.is_masked().then(|| GrowthMaskRecord { growth: growth.clone(), masks: growth.masks(0, 1) })
    }

    /// Makes every target tensor from its source, in pieces: memory is bounded by a piece, not by a tensor. Two objects at
    /// a time: while one waits for the disk or the bucket, the other goes on.
    fn write_shards(
        &self,
        folder: &Storage,
        shards: &ShardSet,
        tensors: &TensorIndex,
        meter: &Meter<'_>,
    ) -> Result<Vec<CheckpointObject>> {
        let transform = Transform::new(self.plan, self.source.config(), &self.config, &self.layout);
        let write = |objects: Range<usize>| {
            let mut buffers = Buffers::default();
            shards.write(folder, objects, |_, tensor, writer| {
                transform.write(tensor, (self.source.folder(), tensors), &mut buffers, |numbers| {
                    meter.add(4 * numbers.len() as u64);
                    Ok(writer.write_numbers(numbers)?)
                })
            })
        };
        let middle = shards.len() / 2;
        let (first, second) = rayon::join(|| write(0..middle), || write(middle..shards.len()));
        let mut objects: Vec<CheckpointObject> = first?;
        objects.extend(second?);
        Ok(objects)
    }

    /// Runs source and target, as it was written, on the same tokens.
    fn measure(
        &self,
        folder: &Storage,
        weights: &[CheckpointObject],
        measure: &Measure<'_>,
    ) -> Result<Option<GrowthMeasurement>> {
        let Some(sample) = Sample::choose(measure, &self.config) else { return Ok(None) };
        let names: Vec<String> = weights.iter().map(|object| object.name.clone()).collect();
        let tensors = TensorIndex::read(folder, &names)?;
        let source = StoredModel {
            folder: self.source.folder(),
            tensors: self.source.tensors(),
            config: self.source.config(),
            masks: None,
        };
        let masks = self.masks().map(|GrowthMaskRecord { growth, masks }| {
            (WeightMasks::new(&self.layout, &self.config, &growth, &masks), &self.layout)
        });
        let target = StoredModel { folder, tensors: &tensors, config: &self.config, masks };
        measure::compare(&source, &target, &sample).map(Some)
    }

    fn record(&self, measured: Option<GrowthMeasurement>) -> GrowthRecord {
        let (plan, source) = (self.plan, self.source.config());
        let small = ParameterLayout::new(source);
        let (kept, pairs) = connection_rate(&plan.layers);
        let (expected, reason) = plan.effect(source.num_hidden_layers);
        let without_source = plan.new_layers.map_or(0, |new| new.count);
        let added_layers: BTreeSet<u32> = plan.added_layers().into_iter().collect();
        let mut record = GrowthRecord {
            operator: plan.operator,
            layers: plan.layers.clone(),
            new_layers: without_source,
            connection_rate: ConnectionRate { kept, pairs: pairs + without_source as usize },
            source_parameters: small.parameter_count(),
            target_parameters: self.layout.parameter_count(),
            optimizer_state: plan.optimizer_state,
            expected,
            reason: reason.to_owned(),
            measured,
            learned: None,
            new_tensors: Vec::new(),
            widened_tensors: Vec::new(),
            zero_tensors: Vec::new(),
        };
        for tensor in self.layout.tensors() {
            let from = small.find(&depth::source_name(&tensor.name, &plan.layers));
            if tensor.layer.is_some_and(|layer| added_layers.contains(&layer)) {
                record.new_tensors.push(tensor.name.clone());
            } else if from.is_some_and(|from| from.shape != tensor.shape) {
                record.widened_tensors.push(tensor.name.clone());
            }
            if transform::is_zeroed(plan, tensor) {
                record.zero_tensors.push(tensor.name.clone());
            }
        }
        record
    }

    /// The tokenizer's files: those of the source, then those handed in, which win.
    fn files(&self, handed_in: &[ExtraFile]) -> Result<Vec<ExtraFile>> {
        let source = self.source.folder();
        let mut files = Vec::new();
        for name in COPIED_FILES {
            if source.head(name)?.is_some() {
                files.push(ExtraFile::new(name, source.get(name)?));
            }
        }
        files.extend_from_slice(handed_in);
        Ok(files)
    }
}

/// A folder that a person named is theirs: nothing in it is overwritten.
fn refuse_used_folder(target: &GrowthTarget) -> Result<()> {
    match target {
        GrowthTarget::Folder { folder, .. } if !folder.list()?.is_empty() => {
            Err(GrowthError::FolderInUse { uri: folder.uri().to_owned() })
        }
        _ => Ok(refuse_if_committed(&target.folder())?),
    }
}

/// A committed and undamaged first checkpoint of the stage with that origin.
fn reusable_of_stage(
    location: &CheckpointLocation,
    origin: &CheckpointOrigin,
) -> Result<Option<GrownCheckpoint>> {
    let stage = stage_folder(&location.storage, &location.job, &location.stage);
    for found in list(&location.storage, &location.job, &location.stage)?.into_iter().rev() {
        let folder = stage.join(&found.name());
        if let Commit::Yes(manifest) = found.commit
            && found.step == 0
            && manifest.origin.as_ref() == Some(origin)
            && verify(&folder, &manifest)?.is_empty()
        {
            return reused(&folder, *manifest).map(Some);
        }
    }
    Ok(None)
}

/// The checkpoint in a folder that a person named, if it has that origin.
fn reusable_folder(folder: &Storage, origin: &CheckpointOrigin) -> Result<Option<GrownCheckpoint>> {
    let Commit::Yes(manifest) = commit_of(folder, |_| true)? else {
        return Ok(None);
    };
    if manifest.origin.as_ref() != Some(origin) {
        return Ok(None);
    }
    match verify(folder, &manifest)?.into_iter().next() {
        Some(problem) => Err(GrowthError::DamagedTarget(problem)),
        None => reused(folder, *manifest).map(Some),
    }
}

fn reused(folder: &Storage, manifest: CheckpointManifest) -> Result<GrownCheckpoint> {
    // An earlier version wrote none; one that cannot be read says nothing about the checkpoint.
    let record = read_record(folder, &manifest, GROWTH_RECORD_FILE)?;
    let record = record.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Ok(GrownCheckpoint { manifest, uri: folder.uri().to_owned(), reused: true, record })
}

/// Compares the source with the architecture that the plan was made for, field by field.
fn check_source(source: &HuggingFaceFolder, expected: &ModelConfig) -> Result<()> {
    let (found, expected) = (json!(source.config()), json!(expected));
    let fields = expected.as_object().into_iter().flatten();
    for (field, expected) in fields {
        if found[field] != *expected {
            return Err(GrowthError::OtherSource {
                uri: source.folder().uri().to_owned(),
                field: field.clone(),
                found: found[field].to_string(),
                expected: expected.to_string(),
            });
        }
    }
    Ok(())
}

/// Hears of bytes done and bytes in all.
pub type Progress<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

/// Counts bytes, also from the threads that verify.
struct Meter<'a> {
    total: u64,
    state: Mutex<(u64, Progress<'a>)>,
}

impl<'a> Meter<'a> {
    fn new(total: u64, progress: Progress<'a>) -> Self {
        Self { total, state: Mutex::new((0, progress)) }
    }

    fn add(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += bytes;
        let done = state.0;
        (state.1)(done, self.total);
    }
}

#[cfg(test)]
mod tests;

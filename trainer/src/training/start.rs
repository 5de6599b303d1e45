//! What a stage starts from: its newest good checkpoint, else its first weights.

use super::error::{Result, TrainError};
use super::history::History;
use super::ramp::Ramp;
use super::resharding;
use super::stage::StageInputs;
use super::step::StepEngine;
use crate::checkpoint::{self, HISTORY_FILE, HuggingFaceFolder, TrainingState};
use crate::collective::Collective;
use crate::model::initializer::initialize;
use crate::progress::Reporter;
use crate::storage::{Storage, StorageOptions};
use bytes::Bytes;
use growth_crds::plan::{StagePlan, StageStart};
use growth_crds::protocol::{CheckpointManifest, GROWTH_MASK_FILE, GROWTH_RECORD_FILE};

/// The state that a stage starts or goes on from.
pub(super) struct Start {
    pub state: TrainingState,
    pub history: History,
    pub growth_record: Option<Bytes>,
    pub resumed: Option<CheckpointManifest>,
}

/// Newest good checkpoint of the stage, else its first weights.
pub(super) fn start_state(
    inputs: &StageInputs<'_>,
    engine: &StepEngine,
    collective: &mut dyn Collective,
    reporter: &Reporter,
) -> Result<Start> {
    let StageInputs { plan, storage, .. } = *inputs;
    let (layout, shards) = (engine.model().layout(), engine.shards());
    let mut warn = |text: String| reporter.note(&format!("warning: {text}"));
    let name = (&*plan.job, &*plan.stage);
    let found = resharding::resume(storage, name, layout, shards, collective, &mut warn)?;
    if let Some((manifest, mut state)) = found {
        add_moments(&mut state, shards.own_len());
        let history = read_history(storage, &manifest)?;
        let folder = checkpoint::checkpoint_folder(storage, &manifest);
        let growth_record = checkpoint::read_record(&folder, &manifest, GROWTH_RECORD_FILE)?;
        return Ok(Start { state, history, growth_record, resumed: Some(manifest) });
    }
    let parameters = match &plan.start {
        StageStart::Random { initializer } => initialize(&plan.model, *initializer, plan.training.seed),
        StageStart::Checkpoint { uri } => import(plan, uri)?,
        StageStart::Growth(growth) => {
            return Err(TrainError::NotGrown { stage: plan.stage.clone(), from: growth.from_stage.clone() });
        }
    };
    let mut state = TrainingState { parameters, ..TrainingState::default() };
    add_moments(&mut state, shards.own_len());
    Ok(Start { state, history: History::default(), growth_record: None, resumed: None })
}

/// The ramp of the stage's growth, unless the checkpoint that it goes on from is past it.
pub(super) fn ramp_of<'a>(
    plan: &'a StagePlan,
    storage: &Storage,
    resumed: Option<&CheckpointManifest>,
) -> Result<Option<Ramp<'a>>> {
    let Some(manifest) = resumed.filter(|manifest| checkpoint::has_mask(manifest)) else { return Ok(None) };
    let no_ramp = || TrainError::NoRamp {
        stage: plan.stage.clone(),
        uri: checkpoint::checkpoint_folder(storage, manifest).uri().to_owned(),
    };
    Ramp::of(plan).map(Some).ok_or_else(no_ramp)
}

/// A grown or imported checkpoint has no moments: they start at zero.
fn add_moments(state: &mut TrainingState, len: usize) {
    for moments in [&mut state.exp_avg, &mut state.exp_avg_sq] {
        moments.resize(len, 0.0);
    }
}

/// The record inside a checkpoint; a grown one has none yet.
///
/// # Errors
/// When the storage does not answer.
pub fn read_history(storage: &Storage, manifest: &CheckpointManifest) -> Result<History> {
    let folder = checkpoint::checkpoint_folder(storage, manifest);
    let history = checkpoint::read_record(&folder, manifest, HISTORY_FILE)?;
    // A record that cannot be read is worth less than the training that could go on without it.
    Ok(history.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default())
}

/// Weights of the Hugging Face folder that the first stage starts from.
fn import(plan: &StagePlan, uri: &str) -> Result<Vec<f32>> {
    let options =
        StorageOptions { endpoint: plan.storage.endpoint.clone(), region: plan.storage.region.clone() };
    let folder = HuggingFaceFolder::open(&Storage::open(uri, &options)?)?;
    if folder.mask().is_some() {
        return Err(TrainError::InsideRamp { uri: uri.to_owned(), file: GROWTH_MASK_FILE });
    }
    check_architecture(plan, uri, &folder)?;
    Ok(folder.load()?.parameters)
}

fn check_architecture(plan: &StagePlan, uri: &str, folder: &HuggingFaceFolder) -> Result<()> {
    let fields = |config| match serde_json::to_value(config) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (found, expected) = (fields(folder.config()), fields(&plan.model));
    for (field, expected) in &expected {
        // A longer or shorter context does not change the tensors.
        if field != "max_position_embeddings" && found.get(field) != Some(expected) {
            let found = found.get(field).map(ToString::to_string).unwrap_or_default();
            let (field, expected) = (field.clone(), expected.to_string());
            return Err(TrainError::OtherArchitecture { uri: uri.to_owned(), field, found, expected });
        }
    }
    Ok(())
}

//! A source, its growths, and a few steps of training after them.

use crate::reference::Reference;
pub use crate::reference::random::{small as base, tokens};
use crate::reference::random::{weights, widen};
use growth_crds::plan::{CheckpointGrowth, GrowthPlan, ModelConfig, resolve_checkpoint_growth};
use growth_crds::protocol::{CheckpointManifest, GrowthRecord};
use growth_crds::spec::model::ModelSpec;
use growth_crds::spec::stage::GrowthSpec;
use growth_trainer::checkpoint::{
    CheckpointLocation, CheckpointWriter, HuggingFaceFolder, TokenIds, TrainingState, load,
};
use growth_trainer::growth::{GrownCheckpoint, GrowthTarget, Measure, grow_and_measure};
use growth_trainer::model::activations::Activations;
use growth_trainer::model::layout::ParameterLayout;
use growth_trainer::model::llama::{Llama, Tokens};
use growth_trainer::ops::adamw::{self, AdamWStep};
use growth_trainer::storage::{Storage, StorageOptions};
use serde_json::Value;
use std::collections::BTreeSet;

/// Tokens of a sequence.
pub const SEQUENCE: usize = 12;

pub fn tied() -> ModelConfig {
    ModelConfig { tie_word_embeddings: true, ..base() }
}

/// A model with its weights.
#[derive(Clone)]
pub struct Model {
    pub config: ModelConfig,
    pub layout: ParameterLayout,
    pub parameters: Vec<f32>,
}

impl Model {
    pub fn random(config: &ModelConfig, seed: u64) -> Self {
        let layout = ParameterLayout::new(config);
        let parameters = weights(&layout, seed);
        Self { config: config.clone(), layout, parameters }
    }

    pub fn tensor(&self, name: &str) -> &[f32] {
        &self.parameters[self.layout.find(name).expect(name).range()]
    }

    pub fn of_layer(&self, layer: u32, part: &str) -> &[f32] {
        self.tensor(&format!("model.layers.{layer}.{part}.weight"))
    }

    /// In f64, [positions][vocabulary].
    pub fn logits(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let parameters = widen(&self.parameters);
        Reference { config: &self.config, layout: &self.layout, parameters: &parameters }.logits(ids)
    }

    pub fn losses(&self, ids: &[u32], targets: &[u32], sequence: usize) -> Vec<f64> {
        let parameters = widen(&self.parameters);
        let reference = Reference { config: &self.config, layout: &self.layout, parameters: &parameters };
        reference.losses(ids, targets, sequence)
    }

    /// Largest difference of two logits, relative to the largest logit.
    pub fn difference(&self, other: &Self) -> f64 {
        let ids = tokens(self.config.vocab_size, SEQUENCE, 3);
        let (ours, theirs) = (self.logits(&ids), other.logits(&ids));
        let largest = ours.iter().flatten().fold(0.0f64, |most, x| most.max(x.abs()));
        let pairs = ours.iter().flatten().zip(theirs.iter().flatten());
        pairs.fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / largest
    }
}

/// A growth as a user writes it.
pub fn spec(growth: Value) -> GrowthSpec {
    serde_json::from_value(growth).unwrap()
}

pub fn sizes(model: Value) -> ModelSpec {
    serde_json::from_value(model).unwrap()
}

/// A folder with a source and its growths.
pub struct Folder {
    _folder: tempfile::TempDir,
    pub storage: Storage,
}

/// A grown model.
pub struct Grown {
    pub model: Model,
    pub plan: GrowthPlan,
    pub record: GrowthRecord,
    pub checkpoint: GrownCheckpoint,
}

impl Folder {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::open(folder.path().to_str().unwrap(), &StorageOptions::default()).unwrap();
        Self { _folder: folder, storage }
    }

    /// Writes a checkpoint of `small`.
    pub fn write(&self, name: &str, model: &Model, moments: bool) -> TrainingState {
        let location = CheckpointLocation {
            storage: self.storage.clone(),
            job: "job".to_owned(),
            stage: "small".to_owned(),
            attempt: 1,
        };
        let ids = TokenIds::default();
        let writer = CheckpointWriter::new(location, model.config.clone(), ids, Vec::new());
        let vector = |seed| Model::random(&model.config, seed).parameters.iter().map(|x| x * x).collect();
        let mut state = TrainingState { parameters: model.parameters.clone(), ..TrainingState::default() };
        if moments {
            state.optimizer_step = 40;
            (state.exp_avg, state.exp_avg_sq) = (vector(71), vector(72));
        }
        writer.export(&self.storage.join(name), &state).unwrap();
        state
    }

    pub fn grow(&self, from: &str, to: &str, plan: &GrowthPlan, measure: &Measure<'_>) -> GrownCheckpoint {
        let folder = self.storage.join(to);
        let target = GrowthTarget::Folder { folder, job: "job".to_owned(), stage: "large".to_owned() };
        let source = self.storage.join(from);
        grow_and_measure(&source, None, plan, &target, &[], measure, &mut |_, _| ()).unwrap()
    }

    pub fn load(&self, name: &str) -> Model {
        let folder = HuggingFaceFolder::open(&self.storage.join(name)).unwrap();
        let config = folder.config().clone();
        let layout = ParameterLayout::new(&config);
        Model { config, layout, parameters: folder.load().unwrap().parameters }
    }

    /// The state of a grown checkpoint.
    pub fn state(
        &self,
        name: &str,
        manifest: &CheckpointManifest,
        layout: &ParameterLayout,
    ) -> TrainingState {
        // A checkpoint in the place that its manifest names, for the reader of jobs.
        let place = format!("{name}-job/job/checkpoints/large/00000000-0");
        for object in manifest.objects.iter().map(|object| object.name.as_str()).chain(["manifest.json"]) {
            let bytes = self.storage.join(name).get(object).unwrap();
            self.storage.join(&place).put(object, bytes).unwrap();
        }
        load(&self.storage.join(&format!("{name}-job")), manifest, layout).unwrap()
    }
}

pub fn resolve(source: &ModelConfig, growth: &GrowthSpec, model: &ModelSpec) -> GrowthPlan {
    resolve_checkpoint_growth(CheckpointGrowth { growth, model, source, seed: 9 }).unwrap().0
}

/// Grows through a checkpoint in a folder of its own.
pub fn grow(source: &Model, growth: Value, model: Value) -> Grown {
    let folder = Folder::new();
    folder.write("source", source, false);
    let plan = resolve(&source.config, &spec(growth), &sizes(model));
    let checkpoint = folder.grow("source", "grown", &plan, &Measure::default());
    let record = checkpoint.record.clone().unwrap();
    Grown { model: folder.load("grown"), plan, record, checkpoint }
}

/// Gradients of one batch; two batches in turn, which together hold every token.
pub struct Training {
    pub model: Llama,
    pub parameters: Vec<f32>,
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
    /// Largest gradient that each weight has seen.
    pub seen: Vec<f32>,
    pub losses: Vec<f64>,
}

impl Training {
    pub fn new(model: &Model) -> Self {
        let zeros = vec![0.0; model.parameters.len()];
        Self {
            model: Llama::new(model.config.clone(), 2 * SEQUENCE),
            parameters: model.parameters.clone(),
            exp_avg: zeros.clone(),
            exp_avg_sq: zeros.clone(),
            seen: zeros,
            losses: Vec::new(),
        }
    }

    pub fn batch(&self) -> (Vec<u32>, Vec<u32>) {
        // Each token once in a shuffled order, and some twice.
        let vocabulary = self.model.config().vocab_size;
        let count = 4 * SEQUENCE;
        let ids: Vec<u32> =
            (0..count as u32).map(|index| (index * 7 + index / vocabulary) % vocabulary).collect();
        let targets = ids.iter().map(|id| (id * 3 + 1) % vocabulary).collect();
        (ids, targets)
    }

    pub fn gradients(&self) -> (f64, Vec<f32>) {
        let (ids, targets) = self.batch();
        let tokens = Tokens { ids: &ids, targets: &targets, sequence: SEQUENCE };
        let mut activations = Activations::for_training(&self.model.sizes(&tokens));
        let mut gradients = vec![0.0; self.parameters.len()];
        let scale = 1.0 / ids.len() as f32;
        let loss = self.model.train(&mut gradients, &mut activations, &self.parameters, tokens, scale);
        (loss / ids.len() as f64, gradients)
    }

    pub fn step(&mut self) -> Vec<f32> {
        let (loss, gradients) = self.gradients();
        self.losses.push(loss);
        self.seen.iter_mut().zip(&gradients).for_each(|(seen, gradient)| *seen = seen.max(gradient.abs()));
        let settings = AdamWStep {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step: self.losses.len() as u64,
            gradient_scale: 1.0,
        };
        let Self { parameters, exp_avg, exp_avg_sq, .. } = self;
        adamw::update(parameters, exp_avg, exp_avg_sq, &gradients, &settings);
        gradients
    }

    /// Tensors some of whose weights have never had a gradient.
    pub fn dead(&self) -> BTreeSet<String> {
        let tensors = self.model.layout().tensors().iter();
        let dead = tensors.filter(|tensor| self.seen[tensor.range()].contains(&0.0));
        dead.map(|tensor| tensor.name.clone()).collect()
    }
}

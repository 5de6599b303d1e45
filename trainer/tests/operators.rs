//! Growth operators on whole models: what they do to the function, to the gradients and to the moments, against a
//! LLaMA in f64.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code, reason = "the autograd is for other tests")]
mod reference;

use growth_crds::plan::growth::GrowthEffect;
use growth_crds::plan::{
    CheckpointGrowth, GrowthPlan, Initializer, ModelConfig, OptimizerStatePolicy, WidthRule,
    resolve_checkpoint_growth,
};
use growth_crds::protocol::{GrowthRecord, GrowthSample};
use growth_crds::spec::model::ModelSpec;
use growth_crds::spec::stage::GrowthSpec;
use growth_trainer::checkpoint::{
    CheckpointLocation, CheckpointWriter, HuggingFaceFolder, TokenIds, TrainingState, load,
};
use growth_trainer::growth::{GrownCheckpoint, GrowthTarget, Measure, grow_and_measure};
use growth_trainer::model::activations::Activations;
use growth_trainer::model::initializer::initialize;
use growth_trainer::model::layout::{ParameterLayout, TensorKind};
use growth_trainer::model::llama::{Llama, Tokens};
use growth_trainer::ops::adamw::{self, AdamWStep};
use growth_trainer::storage::{Storage, StorageOptions};
use proptest::prelude::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use reference::Reference;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Tokens of a sequence.
const SEQUENCE: usize = 12;

/// Grouped queries, heads that are not hidden / heads wide, an untied head.
fn base() -> ModelConfig {
    ModelConfig {
        hidden_size: 16,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        vocab_size: 23,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    }
}

fn tied() -> ModelConfig {
    ModelConfig { tie_word_embeddings: true, ..base() }
}

/// A model with its weights.
#[derive(Clone)]
struct Model {
    config: ModelConfig,
    layout: ParameterLayout,
    parameters: Vec<f32>,
}

impl Model {
    /// Gains around 1 but never 1, matrices that keep the size of a row, embeddings of size 1.
    fn random(config: &ModelConfig, seed: u64) -> Self {
        let layout = ParameterLayout::new(config);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut parameters = vec![0.0; layout.total_len()];
        for tensor in layout.tensors() {
            let (middle, size) = match tensor.kind {
                TensorKind::Norm => (1.0, 0.6),
                TensorKind::Embedding => (0.0, 1.0),
                TensorKind::Matrix | TensorKind::Head => (0.0, (3.0 / tensor.shape[1] as f32).sqrt()),
            };
            parameters[tensor.range()].fill_with(|| middle + size * random.random_range(-1.0f32..1.0));
        }
        Self { config: config.clone(), layout, parameters }
    }

    fn tensor(&self, name: &str) -> &[f32] {
        &self.parameters[self.layout.find(name).expect(name).range()]
    }

    fn of_layer(&self, layer: u32, part: &str) -> &[f32] {
        self.tensor(&format!("model.layers.{layer}.{part}.weight"))
    }

    /// In f64, [positions][vocabulary].
    fn logits(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let parameters: Vec<f64> = self.parameters.iter().map(|x| f64::from(*x)).collect();
        Reference { config: &self.config, layout: &self.layout, parameters: &parameters }.logits(ids)
    }

    fn losses(&self, ids: &[u32], targets: &[u32], sequence: usize) -> Vec<f64> {
        let parameters: Vec<f64> = self.parameters.iter().map(|x| f64::from(*x)).collect();
        let reference = Reference { config: &self.config, layout: &self.layout, parameters: &parameters };
        reference.losses(ids, targets, sequence)
    }

    /// Largest difference of two logits, relative to the largest logit.
    fn difference(&self, other: &Self) -> f64 {
        let ids = tokens(self.config.vocab_size, SEQUENCE, 3);
        let (ours, theirs) = (self.logits(&ids), other.logits(&ids));
        let largest = ours.iter().flatten().fold(0.0f64, |most, x| most.max(x.abs()));
        let pairs = ours.iter().flatten().zip(theirs.iter().flatten());
        pairs.fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / largest
    }
}

fn tokens(vocabulary: u32, count: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(0..vocabulary)).collect()
}

/// A growth as a user writes it.
fn spec(growth: Value) -> GrowthSpec {
    serde_json::from_value(growth).unwrap()
}

fn sizes(model: Value) -> ModelSpec {
    serde_json::from_value(model).unwrap()
}

/// A folder with a source and its growths.
struct Folder {
    _folder: tempfile::TempDir,
    storage: Storage,
}

/// A grown model.
struct Grown {
    model: Model,
    plan: GrowthPlan,
    record: GrowthRecord,
    checkpoint: GrownCheckpoint,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::open(folder.path().to_str().unwrap(), &StorageOptions::default()).unwrap();
        Self { _folder: folder, storage }
    }

    /// Writes a checkpoint of `small`.
    fn write(&self, name: &str, model: &Model, moments: bool) -> TrainingState {
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

    fn grow(&self, from: &str, to: &str, plan: &GrowthPlan, measure: &Measure<'_>) -> GrownCheckpoint {
        let folder = self.storage.join(to);
        let target = GrowthTarget::Folder { folder, job: "job".to_owned(), stage: "large".to_owned() };
        let source = self.storage.join(from);
        grow_and_measure(&source, None, plan, &target, &[], measure, &mut |_, _| ()).unwrap()
    }

    fn load(&self, name: &str) -> Model {
        let folder = HuggingFaceFolder::open(&self.storage.join(name)).unwrap();
        let config = folder.config().clone();
        let layout = ParameterLayout::new(&config);
        Model { config, layout, parameters: folder.load().unwrap().parameters }
    }
}

fn resolve(source: &ModelConfig, growth: &GrowthSpec, model: &ModelSpec) -> GrowthPlan {
    resolve_checkpoint_growth(CheckpointGrowth { growth, model, source, seed: 9 }).unwrap().0
}

/// Grows through a checkpoint in a folder of its own.
fn grow(source: &Model, growth: Value, model: Value) -> Grown {
    let folder = Folder::new();
    folder.write("source", source, false);
    let plan = resolve(&source.config, &spec(growth), &sizes(model));
    let checkpoint = folder.grow("source", "grown", &plan, &Measure::default());
    let record = checkpoint.record.clone().unwrap();
    Grown { model: folder.load("grown"), plan, record, checkpoint }
}

/// Gradients of one batch; two batches in turn, which together hold every token.
struct Training {
    model: Llama,
    parameters: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    /// Largest gradient that each weight has seen.
    seen: Vec<f32>,
    losses: Vec<f64>,
}

impl Training {
    fn new(model: &Model) -> Self {
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

    fn batch(&self) -> (Vec<u32>, Vec<u32>) {
        // Each token once in a shuffled order, and some twice.
        let vocabulary = self.model.config().vocab_size;
        let count = 4 * SEQUENCE;
        let ids: Vec<u32> =
            (0..count as u32).map(|index| (index * 7 + index / vocabulary) % vocabulary).collect();
        let targets = ids.iter().map(|id| (id * 3 + 1) % vocabulary).collect();
        (ids, targets)
    }

    fn gradients(&self) -> (f64, Vec<f32>) {
        let (ids, targets) = self.batch();
        let tokens = Tokens { ids: &ids, targets: &targets, sequence: SEQUENCE };
        let mut activations = Activations::for_training(&self.model.sizes(&tokens));
        let mut gradients = vec![0.0; self.parameters.len()];
        let scale = 1.0 / ids.len() as f32;
        let loss = self.model.train(&mut gradients, &mut activations, &self.parameters, tokens, scale);
        (loss / ids.len() as f64, gradients)
    }

    fn step(&mut self) -> Vec<f32> {
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
    fn dead(&self) -> BTreeSet<String> {
        let tensors = self.model.layout().tensors().iter();
        let dead = tensors.filter(|tensor| self.seen[tensor.range()].contains(&0.0));
        dead.map(|tensor| tensor.name.clone()).collect()
    }

    fn model(&self) -> Model {
        let (config, layout) = (self.model.config().clone(), self.model.layout().clone());
        Model { config, layout, parameters: self.parameters.clone() }
    }
}

/// Every operator, with the sizes it needs, and what it does to the function.
fn growths() -> Vec<(&'static str, Value, Value, GrowthEffect)> {
    let none = || json!({});
    let (stays, spikes) = (GrowthEffect::Preserving, GrowthEffect::Spike);
    vec![
        ("stack", json!({"operator": "Stack", "factor": 2}), none(), spikes),
        ("interleave", json!({"operator": "Interleave", "factor": 2}), none(), spikes),
        ("list", json!({"operator": "LayerMap", "layerMap": {"layers": [0, 1, 1]}}), none(), spikes),
        ("solar", json!({"operator": "LayerMap", "layerMap": {"solar": {"dropLayers": 0}}}), none(), spikes),
        ("midas", json!({"operator": "LayerMap", "layerMap": {"midas": {"blockLayers": 1}}}), none(), spikes),
        ("lidas", json!({"operator": "LayerMap", "layerMap": {"lidas": {"blockLayers": 2}}}), none(), spikes),
        (
            "llama pro",
            json!({"operator": "LayerMap", "layerMap": {"llamaPro": {"groups": 2}}}),
            none(),
            stays,
        ),
        ("zero depth", json!({"operator": "ZeroDepth", "factor": 2}), none(), stays),
        (
            "zero depth, stacked",
            json!({"operator": "ZeroDepth", "factor": 3, "zeroDepth": {"order": "Stacked"}}),
            none(),
            stays,
        ),
        (
            "even",
            json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": "Even"}}),
            none(),
            stays,
        ),
        ("uneven", json!({"operator": "DirectWidth", "factor": 2}), none(), stays),
        (
            "noisy",
            json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": "Noisy"}}),
            none(),
            stays,
        ),
        ("uneven copies", json!({"operator": "DirectWidth"}), json!({"hiddenSize": 24}), spikes),
        (
            "copied neurons and heads",
            json!({"operator": "DirectWidth"}),
            json!({"intermediateSize": 33, "numAttentionHeads": 9, "numKeyValueHeads": 3}),
            stays,
        ),
        ("zero width", json!({"operator": "ZeroWidth", "factor": 2}), none(), stays),
        ("padded stream", json!({"operator": "ZeroWidth"}), json!({"hiddenSize": 25}), stays),
        ("padded neurons", json!({"operator": "ZeroWidth"}), json!({"intermediateSize": 31}), stays),
        ("padded heads", json!({"operator": "ZeroWidth"}), json!({"numAttentionHeads": 8}), stays),
        (
            "padded queries",
            json!({"operator": "ZeroWidth"}),
            json!({"numAttentionHeads": 8, "numKeyValueHeads": 2}),
            stays,
        ),
        (
            "all of it padded unevenly",
            json!({"operator": "ZeroWidth"}),
            json!({"hiddenSize": 19, "intermediateSize": 21, "numAttentionHeads": 9, "numKeyValueHeads": 3}),
            stays,
        ),
        (
            "bert2BERT",
            json!({"operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2}}),
            none(),
            spikes,
        ),
        (
            "wider and deeper",
            json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "ZeroDepth", "factor": 2}}),
            none(),
            stays,
        ),
        ("noise", json!({"operator": "ZeroDepth", "factor": 2, "noise": 0.2}), none(), spikes),
    ]
}

/// Function-preserving operators differ by what rounding of shares and gains to f32 does to the logits.
const SAME: f64 = 1e-6;

#[test]
fn the_function_stays_or_changes_as_the_definition_says() {
    for config in [base(), tied()] {
        let source = Model::random(&config, 1);
        for (name, growth, model, expected) in growths() {
            let grown = grow(&source, growth, model);
            let difference = source.difference(&grown.model);
            println!("{name}, tied {}: {difference:.1e}", config.tie_word_embeddings);
            assert_eq!(grown.record.expected, expected, "{name}");
            match expected {
                GrowthEffect::Preserving => assert!(difference <= SAME, "{name}: {difference}"),
                GrowthEffect::Spike => assert!(difference > 1e-3, "{name}: {difference}"),
            }
            // What grow measured, in f32 on other tokens, says the same.
            let measured = grown.record.measured.unwrap();
            let share = measured.max_logit_difference.unwrap() / measured.max_logit.unwrap();
            assert_eq!(share <= 2e-6, expected == GrowthEffect::Preserving, "{name}: {share}");
            assert_eq!(measured.sample, GrowthSample::Random);
        }
    }
}

#[test]
fn a_stack_is_not_the_function_of_its_source() {
    let source = Model::random(&base(), 1);
    let grown = grow(&source, json!({"operator": "Stack", "factor": 2}), json!({}));
    assert!(source.difference(&grown.model) > 0.05);
    assert_eq!((grown.record.connection_rate.kept, grown.record.connection_rate.pairs), (2, 3));
    assert_eq!(grown.record.new_tensors.len(), 2 * 9);
    assert!(grown.record.widened_tensors.is_empty() && grown.record.zero_tensors.is_empty());
}

#[test]
fn new_layers_of_zero_depth_do_nothing_and_learn() {
    let source = Model::random(&base(), 1);
    for order in ["Interleaved", "Stacked"] {
        let growth = json!({"operator": "ZeroDepth", "factor": 2, "zeroDepth": {"order": order}});
        let grown = grow(&source, growth, json!({}));
        // Nothing is rounded: exactly the same in f64.
        assert_eq!(source.difference(&grown.model), 0.0, "{order}");
        let zero: &[u32] = if order == "Stacked" { &[2, 3] } else { &[1, 3] };
        assert_eq!(grown.plan.zero_output, zero);
        assert_eq!(grown.record.zero_tensors.len(), 4);
        let mut training = Training::new(&grown.model);
        let (first, second) = (training.step(), training.step());
        for layer in 0..4 {
            for part in ["q", "k", "v", "o"]
                .map(|part| format!("self_attn.{part}_proj"))
                .into_iter()
                .chain(["gate", "up", "down"].map(|part| format!("mlp.{part}_proj")))
            {
                let name = format!("model.layers.{layer}.{part}.weight");
                let range = grown.model.layout.find(&name).unwrap().range();
                let alive =
                    |gradients: &[f32]| gradients[range.clone()].iter().any(|gradient| *gradient != 0.0);
                let output = part.ends_with("o_proj") || part.ends_with("down_proj");
                let is_new = zero.contains(&layer);
                if is_new && output {
                    assert!(grown.model.tensor(&name).iter().all(|weight| *weight == 0.0));
                }
                assert_eq!(alive(&first), !is_new || output, "{order}: {name} in the first step");
                assert!(alive(&second), "{order}: {name} in the second step");
            }
        }
    }
}

#[test]
fn every_operator_is_followed_by_training() {
    for config in [base(), tied()] {
        let source = Model::random(&config, 2);
        for (name, growth, model, _) in growths() {
            let grown = grow(&source, growth, model);
            let mut training = Training::new(&grown.model);
            (0..20).for_each(|_| drop(training.step()));
            assert_eq!(training.dead(), BTreeSet::new(), "{name}");
            let (first, last) = (training.losses[0], training.losses[19]);
            assert!(last.is_finite() && last < first, "{name}: {first} -> {last}");
        }
    }
}

/// Tensors with weights that had no gradient in three steps.
fn dead_after_three_steps(model: &Model) -> BTreeSet<String> {
    let mut training = Training::new(model);
    (0..3).for_each(|_| drop(training.step()));
    training.dead()
}

#[test]
fn no_channel_of_zero_width_is_dead() {
    let source = Model::random(&base(), 1);
    let grow = |model| grow(&source, json!({"operator": "ZeroWidth"}), model).model;
    for model in [
        json!({"hiddenSize": 32, "intermediateSize": 40, "numAttentionHeads": 8}),
        json!({"hiddenSize": 24}),
        json!({"intermediateSize": 40}),
        json!({"numAttentionHeads": 8}),
        json!({"numAttentionHeads": 8, "numKeyValueHeads": 2}),
    ] {
        assert_eq!(dead_after_three_steps(&grow(model.clone())), BTreeSet::new(), "{model}");
    }
    // The test can fail: with both factors of a product zero, none of them ever learns.
    let mut neurons = grow(json!({"intermediateSize": 40}));
    zero_new_rows(&mut neurons, &source, &["mlp.gate_proj", "mlp.up_proj"]);
    let dead = dead_after_three_steps(&neurons);
    for part in ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
        assert!(dead.contains(&format!("model.layers.0.{part}.weight")), "{part}: {dead:?}");
    }
    let mut heads = grow(json!({"numAttentionHeads": 8}));
    zero_new_rows(&mut heads, &source, &["self_attn.q_proj", "self_attn.k_proj"]);
    let dead = dead_after_three_steps(&heads);
    for part in ["self_attn.q_proj", "self_attn.k_proj"] {
        assert!(dead.contains(&format!("model.layers.1.{part}.weight")), "{part}: {dead:?}");
    }
}

fn zero_new_rows(model: &mut Model, source: &Model, parts: &[&str]) {
    for layer in 0..model.config.num_hidden_layers {
        for part in parts {
            let name = format!("model.layers.{layer}.{part}.weight");
            let range = model.layout.find(&name).unwrap().range();
            let old = source.layout.find(&name).unwrap().len;
            model.parameters[range][old..].fill(0.0);
        }
    }
}

#[test]
fn zero_width_needs_its_gains_and_its_eps() {
    let source = Model::random(&base(), 1);
    let exact = grow(&source, json!({"operator": "ZeroWidth", "factor": 2}), json!({}));
    assert_eq!(exact.model.config.rms_norm_eps, 0.5e-5);
    assert!(source.difference(&exact.model) <= SAME);
    // With the eps of the source the error is that of eps alone.
    let same_eps = json!({"rmsNormEps": 1e-5});
    let inexact = grow(&source, json!({"operator": "ZeroWidth", "factor": 2}), same_eps).model;
    let difference = source.difference(&inexact);
    assert!(difference > SAME && difference < 1e-4, "{difference}");
    // Gains that are copied as they are make the norms too large by the root of 2.
    let mut unscaled = exact.model.clone();
    for tensor in unscaled.layout.clone().tensors().iter().filter(|tensor| tensor.kind == TensorKind::Norm) {
        let gains = source.tensor(&tensor.name);
        unscaled.parameters[tensor.offset..tensor.offset + gains.len()].copy_from_slice(gains);
    }
    assert!(source.difference(&unscaled) > 0.1);
    // The random blocks are the target's own first weights.
    let WidthRule::Zero { initializer, seed, .. } = exact.plan.width.unwrap().rule else { panic!() };
    assert_eq!(initializer, Initializer::HuggingFace);
    let fresh = initialize(&exact.model.config, initializer, seed);
    let range = exact.model.layout.layer(1).o.clone();
    let (fresh, grown) = (&fresh[range.clone()], &exact.model.parameters[range]);
    let width = 48;
    assert_eq!(grown[24..width], fresh[24..width], "new columns of an old row");
    assert_eq!(grown[16 * width + 24..17 * width], fresh[16 * width + 24..17 * width], "of a new row");
    assert!(grown[16 * width..16 * width + 24].iter().all(|weight| *weight == 0.0));
}

#[test]
fn copies_share_what_the_source_had() {
    let source = Model::random(&base(), 1);
    for (split, share) in [("Even", 0.5), ("Uneven", 0.7), ("Noisy", f32::NAN)] {
        let growth = json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": split}});
        let grown = grow(&source, growth, json!({})).model;
        // Rows are copied, columns divided: 16 channels to 32, 20 neurons to 40.
        let (wide, narrow) = (grown.of_layer(1, "mlp.down_proj"), source.of_layer(1, "mlp.down_proj"));
        for row in 0..32 {
            for column in 0..20 {
                let (first, second) = (wide[row * 40 + column], wide[row * 40 + 20 + column]);
                let whole = narrow[(row % 16) * 20 + column];
                assert!((first + second - whole).abs() <= 2e-7, "{split}: {first} + {second} != {whole}");
                if !share.is_nan() {
                    assert!((first - share * whole).abs() <= 1e-7, "{split}: {first} of {whole}");
                }
            }
        }
        assert_eq!(grown.of_layer(0, "input_layernorm"), source.of_layer(0, "input_layernorm").repeat(2));
        let embedding =
            |model: &Model, width: usize| model.tensor("model.embed_tokens.weight")[..width].to_vec();
        assert_eq!(embedding(&grown, 32), embedding(&source, 16).repeat(2));
    }
    // Three copies: 49, 21 and 9 of 79.
    let tripled = grow(&source, json!({"operator": "DirectWidth"}), json!({"intermediateSize": 60})).model;
    let (wide, whole) = (tripled.of_layer(0, "mlp.down_proj"), source.of_layer(0, "mlp.down_proj")[0]);
    for (copy, share) in [49.0, 21.0, 9.0].into_iter().enumerate() {
        assert!((wide[copy * 20] - whole * share / 79.0).abs() < 1e-7);
    }
}

#[test]
fn equal_copies_stay_equal_unless_something_tells_them_apart() {
    let source = Model::random(&base(), 1);
    // Largest distance of a neuron's gates from those of its copy after some steps.
    let distance = |split: &str, asymmetric_moments: bool| {
        let growth = json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": split}});
        let grown = grow(&source, growth, json!({})).model;
        let mut training = Training::new(&grown);
        if asymmetric_moments {
            // The moments of the old neurons, as Keep leaves them; new ones have none.
            let gate = grown.layout.find("model.layers.0.mlp.gate_proj.weight").unwrap().range();
            training.exp_avg[gate.start..gate.start + gate.len() / 2].fill(1e-3);
        }
        (0..10).for_each(|_| drop(training.step()));
        let trained = training.model();
        let gates = trained.of_layer(0, "mlp.gate_proj");
        let (old, new) = gates.split_at(gates.len() / 2);
        old.iter().zip(new).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()))
    };
    assert!(distance("Even", false) < 1e-6, "{}", distance("Even", false));
    assert!(distance("Uneven", false) > 1e-6);
    assert!(distance("Noisy", false) > 1e-3);
    assert!(distance("Even", true) > 1e-3);
}

#[test]
fn kept_moments_are_those_of_old_weights() {
    let folder = Folder::new();
    let source = Model::random(&base(), 1);
    let small = folder.write("source", &source, true);
    for operator in ["DirectWidth", "ZeroWidth"] {
        let growth = json!({"operator": operator, "factor": 2, "optimizerState": "Keep"});
        let plan = resolve(&source.config, &spec(growth), &ModelSpec::default());
        assert_eq!(plan.optimizer_state, OptimizerStatePolicy::Keep);
        let grown = folder.grow("source", operator, &plan, &Measure { tokens: 0, ..Measure::default() });
        assert_eq!(grown.record.unwrap().measured, None);
        let layout = ParameterLayout::new(&plan.grown(&source.config));
        let wide = state(&folder, operator, &grown.manifest, &layout);
        assert_eq!((wide.step, wide.optimizer_step), (0, 40));
        for (wide, small) in [(&wide.exp_avg, &small.exp_avg), (&wide.exp_avg_sq, &small.exp_avg_sq)] {
            for tensor in layout.tensors() {
                let old = source.layout.find(&tensor.name).unwrap();
                let expected = padded(&small[old.range()], &old.shape, &tensor.shape);
                assert!(wide[tensor.range()] == expected, "{operator}: {}", tensor.name);
            }
        }
    }
}

/// S' = [S, 0].
fn padded(small: &[f32], from: &[usize], to: &[usize]) -> Vec<f32> {
    let (columns, wide) = (*from.last().unwrap(), *to.last().unwrap());
    let mut out = vec![0.0; to.iter().product()];
    for (row, values) in small.chunks_exact(columns).enumerate() {
        out[row * wide..row * wide + columns].copy_from_slice(values);
    }
    out
}

fn state(
    folder: &Folder,
    name: &str,
    manifest: &growth_crds::protocol::CheckpointManifest,
    layout: &ParameterLayout,
) -> TrainingState {
    // A checkpoint in the place that its manifest names, for the reader of jobs.
    let place = format!("{name}-job/job/checkpoints/large/00000000-0");
    for object in manifest.objects.iter().map(|object| object.name.as_str()).chain(["manifest.json"]) {
        let bytes = folder.storage.join(name).get(object).unwrap();
        folder.storage.join(&place).put(object, bytes).unwrap();
    }
    load(&folder.storage.join(&format!("{name}-job")), manifest, layout).unwrap()
}

#[test]
fn kept_moments_of_zeroed_layers_are_zero() {
    let folder = Folder::new();
    let source = Model::random(&base(), 1);
    let small = folder.write("source", &source, true);
    let growth = json!({"operator": "ZeroDepth", "factor": 2, "optimizerState": "Keep"});
    let plan = resolve(&source.config, &spec(growth), &ModelSpec::default());
    let grown = folder.grow("source", "grown", &plan, &Measure::default());
    let layout = ParameterLayout::new(&plan.grown(&source.config));
    let large = state(&folder, "grown", &grown.manifest, &layout);
    for (layer, part, is_zero) in [
        (0, "mlp.down_proj", false),
        (1, "mlp.down_proj", true),
        (1, "self_attn.o_proj", true),
        (1, "mlp.up_proj", false),
    ] {
        let range = layout.find(&format!("model.layers.{layer}.{part}.weight")).unwrap().range();
        let from = source.layout.find(&format!("model.layers.0.{part}.weight")).unwrap().range();
        for (large, small) in [(&large.exp_avg, &small.exp_avg), (&large.exp_avg_sq, &small.exp_avg_sq)] {
            if is_zero {
                assert!(large[range.clone()].iter().all(|moment| *moment == 0.0), "{layer} {part}");
            } else {
                assert!(large[range.clone()] == small[from.clone()], "{layer} {part}");
            }
        }
    }
}

#[test]
fn noise_has_the_variance_of_the_ablation() {
    let config = ModelConfig { hidden_size: 96, intermediate_size: 128, vocab_size: 200, ..base() };
    let source = Model::random(&config, 1);
    let share = 0.25f32;
    let quiet = grow(&source, json!({"operator": "Stack", "factor": 2, "noise": 0.0}), json!({})).model;
    assert_eq!(
        quiet.parameters,
        grow(&source, json!({"operator": "Stack", "factor": 2}), json!({})).model.parameters
    );
    let noisy = grow(&source, json!({"operator": "Stack", "factor": 2, "noise": share}), json!({})).model;
    let (hidden, layers) = (96.0, 4.0f64);
    for (name, variance) in [
        ("model.embed_tokens.weight", 2.0 / (5.0 * hidden)),
        ("lm_head.weight", 2.0 / (5.0 * hidden)),
        ("model.layers.3.self_attn.q_proj.weight", 2.0 / (5.0 * hidden)),
        ("model.layers.2.mlp.gate_proj.weight", 2.0 / (5.0 * hidden)),
        ("model.layers.0.self_attn.o_proj.weight", 1.0 / (hidden * layers * layers)),
        ("model.layers.1.mlp.down_proj.weight", 1.0 / (hidden * layers * layers)),
    ] {
        let noise = noisy.tensor(name).iter().zip(quiet.tensor(name));
        let noise: Vec<f64> =
            noise.map(|(noisy, quiet)| f64::from((noisy - (1.0 - share) * quiet) / share)).collect();
        let measured = noise.iter().map(|x| x * x).sum::<f64>() / noise.len() as f64;
        // A sample of n has a relative error of sqrt(2 / n): less than 3 % here; four of them.
        assert!((measured / variance - 1.0).abs() < 0.12, "{name}: {measured} instead of {variance}");
    }
    assert_eq!(noisy.tensor("model.norm.weight"), source.tensor("model.norm.weight"));
}

#[test]
fn growing_again_gives_the_same_bits_and_another_seed_others() {
    let source = Model::random(&base(), 1);
    let digest = |growth: &Value, seed: u64| {
        let folder = Folder::new();
        folder.write("source", &source, false);
        let growth = spec(growth.clone());
        let model = ModelSpec::default();
        let request = CheckpointGrowth { growth: &growth, model: &model, source: &source.config, seed };
        let plan = resolve_checkpoint_growth(request).unwrap().0;
        folder.grow("source", "grown", &plan, &Measure::default()).manifest.digest
    };
    for growth in [
        json!({"operator": "ZeroWidth", "factor": 2}),
        json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": "Noisy"}}),
        json!({"operator": "Interleave", "factor": 2, "noise": 0.1}),
    ] {
        assert_eq!(digest(&growth, 1), digest(&growth, 1), "{growth}");
        assert_ne!(digest(&growth, 1), digest(&growth, 2), "{growth}");
    }
}

#[test]
fn what_is_measured_is_what_the_models_compute() {
    let folder = Folder::new();
    let source = Model::random(&base(), 1);
    folder.write("source", &source, false);
    let plan =
        resolve(&source.config, &spec(json!({"operator": "Stack", "factor": 3})), &ModelSpec::default());
    let text = tokens(23, 200, 8);
    let measure = Measure { tokens: 150, text: Some(text.clone()), ..Measure::default() };
    let grown = folder.grow("source", "grown", &plan, &measure);
    let again = folder.grow("source", "grown", &plan, &measure);
    assert!(again.reused && again.record == grown.record);
    let measured = grown.record.unwrap().measured.unwrap();
    let large = folder.load("grown");
    // Two sequences of 64, the longest that the model takes.
    assert_eq!((measured.sample, measured.tokens), (GrowthSample::HeldOut, 128));
    let mean = |model: &Model| model.losses(&text[..128], &text[1..129], 64).iter().sum::<f64>() / 128.0;
    let close = |measured: Option<f64>, expected: f64| (measured.unwrap() / expected - 1.0).abs() < 1e-5;
    assert!(close(measured.loss_before, mean(&source)), "{measured:?}");
    assert!(close(measured.loss_after, mean(&large)), "{measured:?}");
    let largest = text[..128].chunks(64).flat_map(|ids| {
        let pairs = source.logits(ids).into_iter().flatten().zip(large.logits(ids).into_iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).collect::<Vec<_>>()
    });
    assert!(close(measured.max_logit_difference, largest.fold(0.0, f64::max)), "{measured:?}");
}

#[test]
fn a_growth_is_a_checkpoint_like_any_other() {
    let source = Model::random(&tied(), 1);
    let grown = grow(&source, json!({"operator": "DirectWidth", "factor": 2}), json!({}));
    let objects = &grown.checkpoint.manifest.objects;
    let record = objects.iter().find(|object| object.name == "growth.json").unwrap();
    assert!(!record.state);
    assert_eq!(grown.model.layout.parameter_count(), grown.record.target_parameters);
    // All of it is wider, but the width of heads is not.
    assert_eq!(grown.record.widened_tensors.len(), grown.model.layout.tensors().len());
    // The gain before a tied head takes the division, because the head is the embedding too.
    let (wide, narrow) = (grown.model.tensor("model.norm.weight"), source.tensor("model.norm.weight"));
    assert!((wide[0] - 0.7 * narrow[0]).abs() < 1e-6 && (wide[16] - 0.3 * narrow[0]).abs() < 1e-6);
}

prop_compose! {
    /// A source of any shape, and larger sizes for it.
    fn shapes()(
        hidden in 2u32..14, inner in 1u32..12, layers in 1u32..4, keys in 1u32..4, group in 1u32..4,
        half in 1u32..4, vocabulary in 2u32..30, tied in any::<bool>(), times in 1u32..4, more in 0u32..9,
        more_inner in 0u32..14, more_keys in 0u32..3, target_group in 1u32..6, eps in prop::sample::select(vec![1e-5, 1e-2]),
    ) -> (ModelConfig, Value, Value) {
        let config = ModelConfig {
            hidden_size: hidden, intermediate_size: inner, num_hidden_layers: layers,
            num_attention_heads: keys * group, num_key_value_heads: keys, head_dim: 2 * half,
            vocab_size: vocabulary, rms_norm_eps: eps, tie_word_embeddings: tied, ..base()
        };
        // Parts of a group must be equal.
        let target_group = if target_group < group && group % target_group != 0 { group } else { target_group };
        let target_keys = (keys + more_keys).max((keys * group).div_ceil(target_group));
        let heads = json!({"numAttentionHeads": target_keys * target_group, "numKeyValueHeads": target_keys});
        let sizes = |hidden: u32| {
            let mut sizes = heads.clone();
            sizes["hiddenSize"] = json!(hidden);
            sizes["intermediateSize"] = json!(inner + 1 + more_inner);
            sizes
        };
        (config, sizes(hidden * times), sizes(hidden + more))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_keeps_its_function(
        (config, multiple, padded) in shapes(), seed: u64, order in prop::sample::select(vec!["Interleaved", "Stacked"]),
        split in prop::sample::select(vec!["Even", "Uneven", "Noisy"]), deeper in any::<bool>(),
    ) {
        let source = Model::random(&config, seed);
        let mut direct = json!({"operator": "DirectWidth", "directWidth": {"split": split}});
        let mut zero = json!({"operator": "ZeroWidth"});
        if deeper {
            for growth in [&mut direct, &mut zero] {
                growth["depth"] = json!({"operator": "ZeroDepth", "factor": 2});
                growth["zeroDepth"] = json!({"order": order});
            }
        }
        for (growth, model) in [(direct, multiple), (zero, padded)] {
            let grown = grow(&source, growth.clone(), model.clone());
            prop_assert_eq!(grown.record.expected, GrowthEffect::Preserving);
            let difference = source.difference(&grown.model);
            prop_assert!(difference < 1e-5, "{} {}: {:e}", growth, model, difference);
        }
    }
}

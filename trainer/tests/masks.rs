//! RandomDepth and RandomWidth on whole models: what is grown, what the masks do to the function and to the gradients
//! against a masked LLaMA in f64 that knows nothing of scaled weights, and training through a ramp.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code, reason = "the autograd is for other tests")]
mod reference;

use growth_crds::plan::growth::GrowthEffect;
use growth_crds::plan::growth_mask::GrowthMasks;
use growth_crds::plan::{CheckpointGrowth, GrowthPlan, Initializer, ModelConfig, resolve_checkpoint_growth};
use growth_crds::protocol::{GROWTH_MASK_FILE, GrowthMaskRecord};
use growth_crds::spec::model::ModelSpec;
use growth_crds::spec::stage::GrowthSpec;
use growth_crds::spec::training::AdamWSpec;
use growth_trainer::checkpoint::{
    CheckpointLocation, CheckpointWriter, HuggingFaceFolder, TokenIds, TrainingState, checkpoint_folder, load,
};
use growth_trainer::collective::Alone;
use growth_trainer::growth::{GrownCheckpoint, GrowthTarget, grow};
use growth_trainer::model::activations::Activations;
use growth_trainer::model::initializer::initialize;
use growth_trainer::model::layout::ParameterLayout;
use growth_trainer::model::llama::{Llama, Tokens};
use growth_trainer::model::mask::WeightMasks;
use growth_trainer::storage::{Storage, StorageOptions};
use growth_trainer::training::step::{StepEngine, StepSettings, StepSizes};
use proptest::prelude::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use reference::Reference;
use reference::masked::Masked;
use reference::random::{small as base, tokens, weights as random_weights, widen};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Tokens of a sequence.
const SEQUENCE: usize = 12;

/// Step of the finite differences: truncation and rounding in f64 stay near 1e-8.
const STEP: f64 = 1e-4;

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// A source in a storage of its own.
struct Source {
    _folder: tempfile::TempDir,
    storage: Storage,
    folder: Storage,
    config: ModelConfig,
    layout: ParameterLayout,
    state: TrainingState,
}

/// A growth of it.
struct Grown {
    plan: GrowthPlan,
    checkpoint: GrownCheckpoint,
    folder: Storage,
    config: ModelConfig,
    layout: ParameterLayout,
    state: TrainingState,
}

impl Source {
    fn new(config: &ModelConfig, seed: u64) -> Self {
        let _folder = tempfile::tempdir().unwrap();
        let storage = Storage::open(_folder.path().to_str().unwrap(), &StorageOptions::default()).unwrap();
        let layout = ParameterLayout::new(config);
        let place = location(&storage, "small");
        let writer = CheckpointWriter::new(place, config.clone(), TokenIds::default(), Vec::new());
        let state = TrainingState {
            step: 40,
            tokens: 4000,
            optimizer_step: 40,
            parameters: random_weights(&layout, seed),
            exp_avg: random_weights(&layout, 71),
            exp_avg_sq: random_weights(&layout, 72).iter().map(|moment| moment * moment).collect(),
        };
        let folder = checkpoint_folder(&storage, &writer.write(&state, &[]).unwrap());
        Self { _folder, storage, folder, config: config.clone(), layout, state }
    }

    fn plan(&self, growth: &Value, model: &Value) -> GrowthPlan {
        let growth: GrowthSpec = serde_json::from_value(growth.clone()).unwrap();
        let model: ModelSpec = serde_json::from_value(model.clone()).unwrap();
        let request = CheckpointGrowth { growth: &growth, model: &model, source: &self.config, seed: 9 };
        resolve_checkpoint_growth(request).unwrap().0
    }

    fn grow(&self, growth: &Value, model: &Value) -> Grown {
        let plan = self.plan(growth, model);
        let target = GrowthTarget::Stage(location(&self.storage, "large"));
        let checkpoint = grow(&self.folder, Some(&self.config), &plan, &target, &[], &mut |_, _| ()).unwrap();
        let config = plan.grown(&self.config);
        let layout = ParameterLayout::new(&config);
        let state = load(&self.storage, &checkpoint.manifest, &layout).unwrap();
        let folder = checkpoint_folder(&self.storage, &checkpoint.manifest);
        Grown { plan, checkpoint, folder, config, layout, state }
    }

    fn logits(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let parameters = widen(&self.state.parameters);
        Reference { config: &self.config, layout: &self.layout, parameters: &parameters }.logits(ids)
    }
}

fn location(storage: &Storage, stage: &str) -> CheckpointLocation {
    CheckpointLocation {
        storage: storage.clone(),
        job: "job".to_owned(),
        stage: stage.to_owned(),
        attempt: 1,
    }
}

/// Masks of single channels, for the reference.
struct Channels {
    hidden: Vec<f64>,
    inner: Vec<f64>,
    heads: Vec<f64>,
    keys: Vec<f64>,
    layers: Vec<f64>,
}

impl Grown {
    /// By the positions of old and new channels, which the caller knows from the sizes.
    fn channels(&self, masks: &GrowthMasks) -> Channels {
        let Self { plan, config, .. } = self;
        let of = |sources: Option<Vec<Option<u32>>>, count: u32, mask: f64| match sources {
            Some(sources) => sources.iter().map(|from| if from.is_none() { mask } else { 1.0 }).collect(),
            None => vec![1.0; count as usize],
        };
        let width = plan.width.as_ref();
        let layer = |layer: u32| if layer < plan.layers.len() as u32 { 1.0 } else { masks.layers };
        Channels {
            hidden: of(width.map(|width| width.hidden.sources().collect()), config.hidden_size, masks.hidden),
            inner: of(
                width.map(|width| width.intermediate.sources().collect()),
                config.intermediate_size,
                masks.intermediate,
            ),
            heads: of(
                width.map(|width| width.heads.sources().collect()),
                config.num_attention_heads,
                masks.heads,
            ),
            keys: of(
                width.map(|width| width.key_value_heads.sources().collect()),
                config.num_key_value_heads,
                masks.heads,
            ),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
        }
    }

    fn masked<'a>(&'a self, channels: &'a Channels, parameters: &'a [f64]) -> Masked<'a> {
        let Channels { hidden, inner, heads, keys, layers } = channels;
        let (config, layout) = (&self.config, &self.layout);
        Masked { config, layout, parameters, hidden, inner, heads, keys, layers }
    }

    fn masks(&self, masks: &GrowthMasks) -> WeightMasks {
        WeightMasks::new(&self.layout, &self.config, &self.plan, masks)
    }

    /// The weights that the model runs with.
    fn effective(&self, masks: &GrowthMasks) -> Vec<f32> {
        let mut weights = self.state.parameters.clone();
        self.masks(masks).scale(0, &mut weights);
        weights
    }

    fn logits(&self, parameters: &[f32], ids: &[u32]) -> Vec<Vec<f64>> {
        let parameters = widen(parameters);
        Reference { config: &self.config, layout: &self.layout, parameters: &parameters }.logits(ids)
    }

    /// Loss and gradients of the model with these weights.
    fn gradients(&self, parameters: &[f32], ids: &[u32], targets: &[u32]) -> Vec<f32> {
        let model = Llama::new(self.config.clone(), SEQUENCE);
        let tokens = Tokens { ids, targets, sequence: SEQUENCE };
        let mut activations = Activations::for_training(&model.sizes(&tokens));
        let mut gradients = vec![0.0; parameters.len()];
        model.train(&mut gradients, &mut activations, parameters, tokens, 1.0 / ids.len() as f32);
        gradients
    }
}

/// Largest difference of two logits, relative to the largest.
fn difference(one: &[Vec<f64>], other: &[Vec<f64>]) -> f64 {
    let largest = one.iter().flatten().fold(0.0f64, |most, x| most.max(x.abs()));
    let pairs = one.iter().flatten().zip(other.iter().flatten());
    pairs.fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / largest
}

/// Masks of every kind somewhere between 0 and 1.
const BETWEEN: GrowthMasks = GrowthMasks { intermediate: 0.6, hidden: 0.3, heads: 0.45, layers: 0.3 };

/// Both operators, with what they can grow.
fn growths() -> Vec<(&'static str, Value, Value)> {
    let width = |model: Value| (json!({"operator": "RandomWidth"}), model);
    let of = |name, (growth, model)| (name, growth, model);
    vec![
        of("depth", (json!({"operator": "RandomDepth", "factor": 2}), json!({}))),
        of("a single layer", (json!({"operator": "RandomDepth"}), json!({"numHiddenLayers": 3}))),
        of("width", (json!({"operator": "RandomWidth", "factor": 2}), json!({}))),
        of("stream", width(json!({"hiddenSize": 25}))),
        of("neurons", width(json!({"intermediateSize": 31}))),
        of("heads", width(json!({"numAttentionHeads": 8}))),
        of("queries", width(json!({"numAttentionHeads": 8, "numKeyValueHeads": 2}))),
        of("keys", width(json!({"numAttentionHeads": 4, "numKeyValueHeads": 4}))),
        of(
            "all of it unevenly",
            width(json!({
                "hiddenSize": 19, "intermediateSize": 21, "numAttentionHeads": 9, "numKeyValueHeads": 3,
            })),
        ),
        of(
            "width and copies of layers that do nothing",
            (
                json!({"operator": "RandomWidth", "factor": 2, "depth": {"operator": "ZeroDepth", "factor": 2}}),
                json!({}),
            ),
        ),
    ]
}

/// Configurations of sources.
fn sources() -> [ModelConfig; 2] {
    [base(), ModelConfig { tie_word_embeddings: true, ..base() }]
}

#[test]
fn the_function_stays_while_the_masks_are_0() {
    for config in sources() {
        let ids = tokens(config.vocab_size, SEQUENCE, 3);
        for (name, growth, model) in growths() {
            let source = Source::new(&config, 1);
            let grown = source.grow(&growth, &model);
            // What every tool of this program opens are the weights that the model runs with.
            let opened = HuggingFaceFolder::open(&grown.folder).unwrap();
            let weights = opened.load().unwrap().parameters;
            let masks = grown.plan.masks(0, 1);
            assert_eq!(opened.mask(), Some(&GrowthMaskRecord { growth: grown.plan.clone(), masks }));
            assert_eq!(bits(&weights), bits(&grown.effective(&masks)));
            let change = difference(&source.logits(&ids), &grown.logits(&weights, &ids));
            println!("{name}, tied {}: {change:.1e}", config.tie_word_embeddings);
            assert!(change <= 1e-6, "{name}: {change}");
            let record = grown.checkpoint.record.clone().unwrap();
            assert_eq!(record.expected, GrowthEffect::Preserving, "{name}");
            let measured = record.measured.unwrap();
            let share = measured.max_logit_difference.unwrap() / measured.max_logit.unwrap();
            assert!(share <= 2e-6, "{name}: measured {share}");
            // Without masks the function is another one, but of new key heads that are copies.
            let unmasked = grown.logits(&grown.state.parameters, &ids);
            let change = difference(&source.logits(&ids), &unmasked);
            assert_eq!(change > 1e-5, name != "keys", "{name}: {change}");
        }
    }
}

#[test]
fn scaled_weights_are_masked_outputs() {
    for config in sources() {
        let ids = tokens(config.vocab_size, SEQUENCE, 3);
        for (name, growth, model) in growths() {
            let source = Source::new(&config, 1);
            let grown = source.grow(&growth, &model);
            let parameters = widen(&grown.state.parameters);
            for masks in [grown.plan.masks(0, 1), BETWEEN, GrowthMasks::OPEN] {
                let channels = grown.channels(&masks);
                let masked = grown.masked(&channels, &parameters).logits(&ids);
                let change = difference(&masked, &grown.logits(&grown.effective(&masks), &ids));
                assert!(change <= 1e-6, "{name}, {masks:?}: {change}");
            }
        }
    }
}

#[test]
fn with_masks_of_1_it_is_the_plain_model_bit_for_bit() {
    for config in sources() {
        for (name, growth, model) in growths() {
            let grown = Source::new(&config, 1).grow(&growth, &model);
            let weights = grown.effective(&GrowthMasks::OPEN);
            assert!(bits(&weights) == bits(&grown.state.parameters), "{name}");
            let train = |masks: Option<WeightMasks>| {
                let mut engine = engine(&grown);
                engine.set_masks(masks);
                let mut state = fresh(&grown);
                let losses = [(); 3].map(|()| train_step(&mut engine, &mut state));
                (state, losses)
            };
            assert!(train(Some(grown.masks(&GrowthMasks::OPEN))) == train(None), "{name}");
        }
    }
}

/// Central difference of the masked reference's loss along `direction`, which starts at `offset`.
fn slope(loss: &dyn Fn(&[f64]) -> f64, parameters: &[f64], offset: usize, direction: &[f64]) -> f64 {
    let at = |step: f64| {
        let mut moved = parameters.to_vec();
        moved[offset..].iter_mut().zip(direction).for_each(|(x, d)| *x += step * d);
        loss(&moved)
    };
    (at(STEP) - at(-STEP)) / (2.0 * STEP)
}

#[test]
fn gradients_go_through_the_masks() {
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    for config in sources() {
        let (ids, targets) =
            (tokens(config.vocab_size, 2 * SEQUENCE, 4), tokens(config.vocab_size, 2 * SEQUENCE, 5));
        for (name, growth, model) in growths() {
            let grown = Source::new(&config, 1).grow(&growth, &model);
            let mut gradients = grown.gradients(&grown.effective(&BETWEEN), &ids, &targets);
            grown.masks(&BETWEEN).scale(0, &mut gradients);
            let gradients = widen(&gradients);
            let channels = grown.channels(&BETWEEN);
            let loss = |parameters: &[f64]| {
                let losses = grown.masked(&channels, parameters).losses(&ids, &targets, SEQUENCE);
                losses.iter().sum::<f64>() / ids.len() as f64
            };
            let parameters = widen(&grown.state.parameters);
            let floor = 1e-2 * norm(&gradients);
            for tensor in grown.layout.tensors() {
                let gradient = &gradients[tensor.range()];
                let size = norm(gradient).max(floor);
                // Along the gradient the slope is its norm; along another direction it need not be.
                let mut random = ChaCha8Rng::seed_from_u64(8);
                let along: Vec<f64> = gradient.iter().map(|x| x / norm(gradient).max(1e-30)).collect();
                let any: Vec<f64> = gradient.iter().map(|_| random.random_range(-1.0..1.0)).collect();
                let any: Vec<f64> = any.iter().map(|x| x / norm(&any)).collect();
                for direction in [along, any] {
                    let expected = slope(&loss, &parameters, tensor.offset, &direction);
                    let found: f64 = gradient.iter().zip(&direction).map(|(a, b)| a * b).sum();
                    let error = (found - expected).abs() / size;
                    assert!(error < 1e-4, "{name}, {}: {found} instead of {expected}", tensor.name);
                }
            }
        }
    }
}

/// Positions of a tensor whose weights are not those of the source.
fn is_new(source: &Source, name: &str, row: usize, column: usize) -> bool {
    let Some(old) = source.layout.find(name) else { return true };
    match old.shape.as_slice() {
        [columns] => column >= *columns,
        [rows, columns] => row >= *rows || column >= *columns,
        _ => unreachable!("tensors have one or two axes"),
    }
}

#[test]
fn old_weights_are_copied_and_new_ones_are_the_first_ones_of_the_target() {
    for (growth, model) in [
        (json!({"operator": "RandomDepth"}), json!({"numHiddenLayers": 5, "initializer": "Paper"})),
        (json!({"operator": "RandomWidth", "factor": 2}), json!({})),
        (json!({"operator": "RandomWidth"}), json!({"hiddenSize": 19, "intermediateSize": 23})),
    ] {
        let source = Source::new(&base(), 1);
        let grown = source.grow(&growth, &model);
        let initializer =
            if model["initializer"] == "Paper" { Initializer::Paper } else { Initializer::HuggingFace };
        let fresh = initialize(&grown.config, initializer, 9);
        let mut old_weights = 0;
        for tensor in grown.layout.tensors() {
            let width = *tensor.shape.last().unwrap();
            for (index, element) in tensor.range().enumerate() {
                let (row, column) = (index / width, index % width);
                let found = grown.state.parameters[element];
                if is_new(&source, &tensor.name, row, column) {
                    assert_eq!(found, fresh[element], "{growth} {} {row} {column}", tensor.name);
                    continue;
                }
                let old = source.layout.find(&tensor.name).unwrap();
                let from = old.offset + row * old.shape.last().unwrap() + column;
                assert_eq!(found, source.state.parameters[from], "{growth} {}", tensor.name);
                old_weights += 1;
            }
        }
        assert_eq!(old_weights, source.layout.parameter_count());
        let record = grown.checkpoint.record.unwrap();
        let added = grown.config.num_hidden_layers - 2;
        assert_eq!((record.new_layers, record.new_tensors.len() as u32), (added, 9 * added));
        assert_eq!(record.connection_rate.pairs, grown.config.num_hidden_layers as usize - 1);
    }
}

#[test]
fn kept_moments_are_those_of_old_weights() {
    for (growth, model) in [
        (json!({"operator": "RandomDepth", "factor": 2, "optimizerState": "Keep"}), json!({})),
        (json!({"operator": "RandomWidth", "factor": 2, "optimizerState": "Keep"}), json!({})),
    ] {
        let source = Source::new(&base(), 1);
        let grown = source.grow(&growth, &model);
        assert_eq!((grown.state.step, grown.state.optimizer_step), (0, 40));
        for (large, small) in [
            (&grown.state.exp_avg, &source.state.exp_avg),
            (&grown.state.exp_avg_sq, &source.state.exp_avg_sq),
        ] {
            for tensor in grown.layout.tensors() {
                let width = *tensor.shape.last().unwrap();
                for (index, element) in tensor.range().enumerate() {
                    let (row, column) = (index / width, index % width);
                    let expected = match source.layout.find(&tensor.name) {
                        Some(old) if !is_new(&source, &tensor.name, row, column) => {
                            small[old.offset + row * old.shape.last().unwrap() + column]
                        }
                        _ => 0.0,
                    };
                    assert_eq!(large[element], expected, "{growth} {}", tensor.name);
                }
            }
        }
    }
}

fn engine(grown: &Grown) -> StepEngine {
    let tokens = 4 * SEQUENCE;
    let sizes =
        StepSizes { sequence: SEQUENCE, micro_batch_tokens: 2 * SEQUENCE, global_batch_tokens: tokens };
    StepEngine::new(grown.config.clone(), sizes, 0, 1)
}

fn fresh(grown: &Grown) -> TrainingState {
    let zeros = vec![0.0; grown.layout.total_len()];
    TrainingState {
        parameters: grown.state.parameters.clone(),
        exp_avg: zeros.clone(),
        exp_avg_sq: zeros,
        ..TrainingState::default()
    }
}

/// Each token once in a shuffled order, and some twice.
fn batch() -> (Vec<u32>, Vec<u32>) {
    let ids: Vec<u32> = (0..4 * SEQUENCE as u32).map(|index| (index * 7 + index / 23) % 23).collect();
    let targets = ids.iter().map(|id| (id * 3 + 1) % 23).collect();
    (ids, targets)
}

fn train_step(engine: &mut StepEngine, state: &mut TrainingState) -> f64 {
    let adam_w = AdamWSpec::default();
    let settings = StepSettings { adam_w: &adam_w, learning_rate: 1e-3, gradient_clip: 1.0 };
    let (ids, targets) = batch();
    engine.step(&mut Alone, state, &ids, &targets, settings).unwrap().loss
}

#[test]
fn training_through_the_ramp_wakes_all_that_is_new() {
    const RAMP: u64 = 12;
    for config in sources() {
        for (name, growth, model) in growths() {
            let source = Source::new(&config, 2);
            let grown = source.grow(&growth, &model);
            let mut engine = engine(&grown);
            let mut state = fresh(&grown);
            let mut losses = Vec::new();
            for step in 0..20 {
                let masks = grown.plan.masks(step, RAMP);
                engine.set_masks((masks != GrowthMasks::OPEN).then(|| grown.masks(&masks)));
                losses.push(train_step(&mut engine, &mut state));
                if step == 0 {
                    // Behind a closed mask nothing new has a gradient, and what is old has.
                    let asleep = without_moments(&grown, &state);
                    let of_new_layers = 9 * grown.plan.new_layers.map_or(0, |new| new.count) as usize;
                    assert!(name == "keys" || !asleep.is_empty(), "{name}");
                    assert!(of_new_layers == 0 || asleep.len() == of_new_layers, "{name}: {asleep:?}");
                }
            }
            assert_eq!(without_moments(&grown, &state), BTreeSet::new(), "{name}");
            assert!(losses[19].is_finite() && losses[19] < losses[0], "{name}: {losses:?}");
            assert_eq!(state.optimizer_step, 20);
        }
    }
}

/// Tensors some of whose weights have never had a gradient.
fn without_moments(grown: &Grown, state: &TrainingState) -> BTreeSet<String> {
    let tensors = grown.layout.tensors().iter();
    let asleep = tensors.filter(|tensor| state.exp_avg_sq[tensor.range()].contains(&0.0));
    asleep.map(|tensor| tensor.name.clone()).collect()
}

#[test]
fn evaluation_runs_with_the_masks_and_training_only_adds_their_memory() {
    let grown = Source::new(&base(), 1).grow(&json!({"operator": "RandomWidth", "factor": 2}), &json!({}));
    let (ids, targets) = batch();
    let mut plain = engine(&grown);
    let bytes = plain.bytes();
    let weights = grown.effective(&BETWEEN);
    let expected = plain.evaluate(&mut Alone, &weights, &ids, &targets).unwrap();
    plain.set_masks(Some(grown.masks(&BETWEEN)));
    let found = plain.evaluate(&mut Alone, &grown.state.parameters, &ids, &targets).unwrap();
    assert_eq!(found, expected);
    assert_eq!(plain.bytes(), bytes + 4 * grown.layout.total_len() as u64);
    plain.set_masks(None);
    assert_eq!(plain.bytes(), bytes);
    assert_ne!(plain.evaluate(&mut Alone, &grown.state.parameters, &ids, &targets).unwrap(), expected);
}

#[test]
fn the_norm_of_the_gradient_is_that_of_the_weights_that_are_trained() {
    let grown = Source::new(&base(), 1).grow(&json!({"operator": "RandomWidth", "factor": 2}), &json!({}));
    let (ids, targets) = batch();
    let mut gradients = grown.gradients(&grown.effective(&BETWEEN), &ids, &targets);
    grown.masks(&BETWEEN).scale(0, &mut gradients);
    let expected = widen(&gradients).iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut engine = engine(&grown);
    engine.set_masks(Some(grown.masks(&BETWEEN)));
    let adam_w = AdamWSpec::default();
    let settings = StepSettings { adam_w: &adam_w, learning_rate: 1e-3, gradient_clip: 1.0 };
    let report = engine.step(&mut Alone, &mut fresh(&grown), &ids, &targets, settings).unwrap();
    assert!((report.gradient_norm / expected - 1.0).abs() < 1e-5, "{report:?} instead of {expected}");
}

#[test]
fn a_growth_is_the_same_again_and_its_masks_are_part_of_the_state() {
    let digest = |seed: u64| {
        let source = Source::new(&base(), 1);
        let growth: GrowthSpec =
            serde_json::from_value(json!({"operator": "RandomDepth", "factor": 2})).unwrap();
        let model = ModelSpec::default();
        let request = CheckpointGrowth { growth: &growth, model: &model, source: &source.config, seed };
        let plan = resolve_checkpoint_growth(request).unwrap().0;
        let target = GrowthTarget::Stage(location(&source.storage, "large"));
        let grown = grow(&source.folder, None, &plan, &target, &[], &mut |_, _| ()).unwrap();
        let again = grow(&source.folder, None, &plan, &target, &[], &mut |_, _| ()).unwrap();
        assert!(again.reused && again.manifest == grown.manifest);
        let mask = grown.manifest.objects.iter().find(|object| object.name == GROWTH_MASK_FILE).unwrap();
        assert!(mask.state);
        grown.manifest.digest
    };
    assert_eq!(digest(1), digest(1));
    assert_ne!(digest(1), digest(2));
}

#[test]
fn a_folder_inside_a_ramp_does_not_grow_again() {
    let source = Source::new(&base(), 1);
    let grown = source.grow(&json!({"operator": "RandomDepth", "factor": 2}), &json!({}));
    let plan = source.plan(&json!({"operator": "Stack", "factor": 2}), &json!({}));
    let target = GrowthTarget::Stage(location(&source.storage, "larger"));
    let error = grow(&grown.folder, None, &plan, &target, &[], &mut |_, _| ()).unwrap_err();
    assert!(error.is_input_error() && error.to_string().contains("inside the ramp"), "{error}");
}

#[test]
fn masks_that_do_not_fit_the_model_are_refused() {
    let source = Source::new(&base(), 1);
    let grown = source.grow(&json!({"operator": "RandomWidth", "factor": 2}), &json!({}));
    // A plain folder, as somebody may have copied it.
    let copy = source.storage.join("copy");
    for object in &grown.checkpoint.manifest.objects {
        copy.put(&object.name, grown.folder.get(&object.name).unwrap()).unwrap();
    }
    let fine = HuggingFaceFolder::open(&copy).unwrap();
    assert_eq!(bits(&fine.load().unwrap().parameters), bits(&grown.effective(&grown.plan.masks(0, 1))));
    let text = String::from_utf8(grown.folder.get(GROWTH_MASK_FILE).unwrap().to_vec()).unwrap();
    for (from, to) in [
        ("\"hidden\": 0.0", "\"hidden\": 1.5"),
        ("\"count\": 16", "\"count\": 17"),
        ("\"masks\"", "\"mask\""),
    ] {
        assert!(text.contains(from), "{text}");
        copy.put(GROWTH_MASK_FILE, text.replacen(from, to, 1).into_bytes()).unwrap();
        let error = HuggingFaceFolder::open(&copy).unwrap_err().to_string();
        assert!(error.contains(GROWTH_MASK_FILE), "{to}: {error}");
    }
}

prop_compose! {
    /// A source of any shape, and larger sizes for it.
    fn shapes()(
        hidden in 2u32..14, inner in 1u32..12, layers in 1u32..4, keys in 1u32..4, group in 1u32..4,
        half in 1u32..4, vocabulary in 2u32..30, tied in any::<bool>(), more in 0u32..9, more_inner in 0u32..14,
        more_keys in 0u32..3, target_group in 1u32..6, eps in prop::sample::select(vec![1e-5, 1e-2]),
    ) -> (ModelConfig, Value) {
        let config = ModelConfig {
            hidden_size: hidden, intermediate_size: inner, num_hidden_layers: layers,
            num_attention_heads: keys * group, num_key_value_heads: keys, head_dim: 2 * half,
            vocab_size: vocabulary, rms_norm_eps: eps, tie_word_embeddings: tied, ..base()
        };
        // Parts of a group must be equal.
        let target_group = if target_group < group && group % target_group != 0 { group } else { target_group };
        let target_keys = (keys + more_keys).max((keys * group).div_ceil(target_group));
        let sizes = json!({
            "numAttentionHeads": target_keys * target_group, "numKeyValueHeads": target_keys,
            "hiddenSize": hidden + more, "intermediateSize": inner + 1 + more_inner,
        });
        (config, sizes)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_keeps_its_function_and_is_masked_as_defined(
        (config, sizes) in shapes(), seed: u64, share in 0.0f64..1.0, added in 1u32..4,
    ) {
        let ids = tokens(config.vocab_size, SEQUENCE, 3);
        let depth = json!({"numHiddenLayers": config.num_hidden_layers + added});
        for (operator, model) in [("RandomWidth", sizes), ("RandomDepth", depth)] {
            let source = Source::new(&config, seed);
            let grown = source.grow(&json!({"operator": operator}), &model);
            let at_first = grown.logits(&grown.effective(&grown.plan.masks(0, 1)), &ids);
            let change = difference(&source.logits(&ids), &at_first);
            prop_assert!(change < 1e-5, "{} {}: {:e}", operator, model, change);
            let masks = grown.plan.masks((share * 1e6) as u64, 1_000_000);
            let (channels, parameters) = (grown.channels(&masks), widen(&grown.state.parameters));
            let masked = grown.masked(&channels, &parameters).logits(&ids);
            let change = difference(&masked, &grown.logits(&grown.effective(&masks), &ids));
            prop_assert!(change < 1e-5, "{} {} {:?}: {:e}", operator, model, masks, change);
        }
    }
}

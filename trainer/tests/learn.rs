//! LearnDepth and LearnWidth: the generator and its gradient against the definition in f64, what is learned, and that
//! whatever stops it, it ends in the same bits.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
#[allow(dead_code, reason = "the autograd is for other tests")]
mod reference;

use common::{Folder, JOB, read_json, signal, stderr, wait_until};
use growth_crds::plan::{
    CheckpointGrowth, GrowthPlan, LearnPlan, ModelConfig, OptimizerStatePolicy, resolve_checkpoint_growth,
};
use growth_crds::protocol::GrowthRecord;
use growth_trainer::checkpoint::{
    CheckpointLocation, CheckpointWriter, HuggingFaceFolder, TokenIds, TrainingState,
};
use growth_trainer::growth::learn::{Generator, Workspace};
use growth_trainer::growth::{
    self, GrownCheckpoint, GrowthData, GrowthError, GrowthTarget, LearnData, LearnError, Learning, Measure,
};
use growth_trainer::model::activations::Activations;
use growth_trainer::model::layout::ParameterLayout;
use growth_trainer::model::llama::{Llama, Tokens};
use growth_trainer::storage::{Storage, StorageOptions};
use proptest::prelude::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use reference::Reference;
use reference::random::{small, weights as random_weights, widen};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn base() -> ModelConfig {
    ModelConfig { hidden_size: 8, intermediate_size: 10, head_dim: 4, max_position_embeddings: 16, ..small() }
}

fn weights(config: &ModelConfig, seed: u64) -> Vec<f32> {
    random_weights(&ParameterLayout::new(config), seed)
}

fn resolve(source: &ModelConfig, growth: Value, model: Value) -> GrowthPlan {
    let (growth, model) = (serde_json::from_value(growth).unwrap(), serde_json::from_value(model).unwrap());
    resolve_checkpoint_growth(CheckpointGrowth { growth: &growth, model: &model, source, seed: 9 }).unwrap().0
}

fn learn_of(plan: &GrowthPlan) -> &LearnPlan {
    plan.learn.as_deref().unwrap()
}

/// Matrices by name: rows, columns and numbers.
type Matrices = HashMap<String, (usize, usize, Vec<f64>)>;

fn by_name(generator: &Generator, matrices: &[f32]) -> Matrices {
    let of = |range: std::ops::Range<usize>| matrices[range].iter().map(|x| f64::from(*x)).collect();
    generator
        .matrices()
        .map(|matrix| (matrix.name.clone(), (matrix.rows, matrix.columns, of(matrix.range()))))
        .collect()
}

/// `a b` or `a b^T`, row by row.
fn times(a: &[f64], rows: usize, b: &[f64], columns: usize, transposed: bool) -> Vec<f64> {
    let inner = a.len() / rows;
    let at = |k: usize, j: usize| if transposed { b[j * inner + k] } else { b[k * columns + j] };
    let element = |index: usize| {
        let (i, j) = (index / columns, index % columns);
        (0..inner).map(|k| a[i * inner + k] * at(k, j)).sum()
    };
    (0..rows * columns).map(element).collect()
}

/// The weights of the target as equations 37 to 42 of the paper have them, layers mixed before they are widened.
struct Naive<'a> {
    source: &'a ModelConfig,
    plan: &'a GrowthPlan,
    parameters: Vec<f64>,
}

impl Naive<'_> {
    fn generate(&self, matrices: &Matrices) -> Vec<f64> {
        let layout = ParameterLayout::new(&self.plan.grown(self.source));
        let mut target = vec![0.0; layout.total_len()];
        for tensor in layout.tensors() {
            let part = tensor.name.trim_end_matches(".weight").rsplit_once('.').map_or("", |(_, part)| part);
            let mixed = match tensor.layer {
                Some(layer) => self.mixed(&tensor.name, layer, matrices),
                None => self.tensor(&tensor.name).to_vec(),
            };
            target[tensor.range()].copy_from_slice(&self.widened(part, mixed, matrices));
        }
        target
    }

    fn tensor(&self, name: &str) -> &[f64] {
        let layout = ParameterLayout::new(self.source);
        &self.parameters[layout.find(name).expect(name).range()]
    }

    fn mixed(&self, name: &str, layer: u32, matrices: &Matrices) -> Vec<f64> {
        let kind = name.split_once(&format!("layers.{layer}.")).unwrap().1.trim_end_matches(".weight");
        let of = |source: u32| self.tensor(&format!("model.layers.{source}.{kind}.weight"));
        let Some((_, columns, mix)) = matrices.get(&format!("depth.{kind}")) else {
            let writes = kind.ends_with("o_proj") || kind.ends_with("down_proj");
            let zero = writes && self.plan.zero_output.contains(&layer);
            let scale = if zero { 0.0 } else { 1.0 };
            return of(self.plan.layers[layer as usize]).iter().map(|x| scale * x).collect();
        };
        let row = &mix[layer as usize * columns..][..*columns];
        let mut out = vec![0.0; of(0).len()];
        for (source, share) in (0..).zip(row) {
            out.iter_mut().zip(of(source)).for_each(|(out, x)| *out += share * x);
        }
        out
    }

    fn widened(&self, part: &str, weights: Vec<f64>, matrices: &Matrices) -> Vec<f64> {
        if !matrices.contains_key("width.hidden") {
            return weights;
        }
        let axis = |name: &str| matrices[&format!("width.{name}")].clone();
        let context = || self.context(&matrices["width.value"]);
        let (rows, columns) = match part {
            "q_proj" => (Some(axis("query")), axis("hidden")),
            "k_proj" => (Some(axis("key")), axis("hidden")),
            "v_proj" => (Some(axis("value")), axis("hidden")),
            "o_proj" => (Some(axis("hidden")), context()),
            "gate_proj" | "up_proj" => (Some(axis("intermediate")), axis("hidden")),
            "down_proj" => (Some(axis("hidden")), axis("intermediate")),
            _ => (None, axis("hidden")),
        };
        let (outputs, inputs, right) = columns;
        let half = times(&weights, weights.len() / inputs, &right, outputs, true);
        match rows {
            Some((rows, _, left)) => times(&left, rows, &half, outputs, false),
            None => half,
        }
    }

    /// B_V, repeated for the query heads of a group.
    fn context(&self, (_, value_columns, value): &(usize, usize, Vec<f64>)) -> (usize, usize, Vec<f64>) {
        let maps = learn_of(self.plan).width.as_ref().unwrap();
        let width = self.source.head_dim as usize;
        let heads = self.source.num_attention_heads as usize;
        let group = heads / self.source.num_key_value_heads as usize;
        let target_group = (maps.heads.target() / maps.key_value_heads.target()) as usize;
        let places = maps.slots(self.source);
        // A head that comes from a head of the source carries the place of that one.
        for (head, source) in maps.heads.sources().enumerate() {
            assert!(source.is_none_or(|source| places[head] == Some(source % group as u32)));
        }
        let (rows, columns) = (places.len() * width, heads * width);
        let mut out = vec![0.0; rows * columns];
        for (index, out) in out.iter_mut().enumerate() {
            let (row, column) = (index / columns, index % columns);
            let (head, source) = (row / width, column / width);
            if places[head] == Some((source % group) as u32) {
                let value_row = head / target_group * width + row % width;
                *out = value[value_row * value_columns + source / group * width + column % width];
            }
        }
        (rows, columns, out)
    }
}

/// A generator with matrices that are near their first values.
fn generator(source: &ModelConfig, plan: &GrowthPlan, disturbed: f32) -> (Generator, Vec<f32>) {
    let generator = Generator::new(source, plan, learn_of(plan));
    let mut matrices = generator.initial(&plan.layers);
    let mut random = ChaCha8Rng::seed_from_u64(4);
    matrices.iter_mut().for_each(|x| *x += disturbed * random.random_range(-1.0f32..1.0));
    (generator, matrices)
}

/// Growths that learn, with the sizes they need.
fn growths() -> Vec<(Value, Value)> {
    let width = |depth: Value| json!({"operator": "LearnWidth", "factor": 2, "depth": depth});
    vec![
        (json!({"operator": "LearnDepth", "factor": 2}), json!({})),
        (json!({"operator": "LearnDepth"}), json!({"numHiddenLayers": 5})),
        (json!({"operator": "LearnWidth", "factor": 2}), json!({})),
        (json!({"operator": "LearnWidth"}), json!({"hiddenSize": 11, "intermediateSize": 13})),
        (json!({"operator": "LearnWidth"}), json!({"numAttentionHeads": 6, "numKeyValueHeads": 3})),
        (json!({"operator": "LearnWidth"}), json!({"numAttentionHeads": 6, "numKeyValueHeads": 2})),
        (json!({"operator": "LearnWidth"}), json!({"numAttentionHeads": 4, "numKeyValueHeads": 4})),
        (width(json!({"operator": "LearnDepth", "factor": 2})), json!({})),
        (width(json!({"operator": "Stack", "factor": 2})), json!({})),
        (width(json!({"operator": "ZeroDepth", "factor": 2})), json!({})),
    ]
}

/// Largest difference over largest value.
fn difference(ours: &[f32], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(1e-30f64, |most, x| most.max(x.abs()));
    ours.iter().zip(theirs).fold(0.0, |most: f64, (a, b)| most.max((f64::from(*a) - b).abs() / largest))
}

/// Rounding of a product of three factors.
const GENERATED: f64 = 1e-6;

#[test]
fn weights_follow_the_equations() {
    for tied in [false, true] {
        let source = ModelConfig { tie_word_embeddings: tied, ..base() };
        let parameters = weights(&source, 1);
        for (growth, model) in growths() {
            let plan = resolve(&source, growth.clone(), model.clone());
            let (generator, matrices) = generator(&source, &plan, 0.1);
            let mut target = vec![0.0; generator.target().total_len()];
            generator.generate(&mut Workspace::default(), &parameters, &matrices, &mut target);
            let naive = Naive { source: &source, plan: &plan, parameters: widen(&parameters) };
            let expected = naive.generate(&by_name(&generator, &matrices));
            let difference = difference(&target, &expected);
            println!("{growth} {model}: {difference:.1e}");
            assert!(difference < GENERATED, "{growth} {model}: {difference:e}");
        }
    }
}

/// Tokens and what follows them.
fn batch(vocabulary: u32, count: usize, seed: u64) -> (Vec<u32>, Vec<u32>) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let ids: Vec<u32> = (0..=count).map(|_| random.random_range(0..vocabulary)).collect();
    (ids[..count].to_vec(), ids[1..].to_vec())
}

/// Central differences in f64 against the gradient in f32, relative to the largest of a matrix.
const GRADIENT: f64 = 1e-4;

#[test]
fn gradients_are_those_of_the_loss() {
    let (sequence, step) = (8, 1e-5);
    for tied in [false, true] {
        let source = ModelConfig { tie_word_embeddings: tied, ..base() };
        let parameters = weights(&source, 1);
        for (growth, model) in growths() {
            let plan = resolve(&source, growth.clone(), model);
            let (generator, matrices) = generator(&source, &plan, 0.1);
            let target_config = plan.grown(&source);
            let (ids, targets) = batch(source.vocab_size, 2 * sequence, 3);
            let llama = Llama::new(target_config.clone(), sequence);
            let tokens = Tokens { ids: &ids, targets: &targets, sequence };
            let mut activations = Activations::for_training(&llama.sizes(&tokens));
            let (mut space, mut target) = (Workspace::default(), vec![0.0; llama.layout().total_len()]);
            let mut d_target = target.clone();
            generator.generate(&mut space, &parameters, &matrices, &mut target);
            let scale = 1.0 / ids.len() as f32;
            llama.train(&mut d_target, &mut activations, &target, tokens, scale);
            let mut gradient = vec![0.0; generator.len()];
            generator.pull_back(&mut space, &parameters, &matrices, &d_target, &mut gradient);

            let naive = Naive { source: &source, plan: &plan, parameters: widen(&parameters) };
            let loss = |matrices: &Matrices| {
                let parameters = naive.generate(matrices);
                let (config, layout) = (&target_config, llama.layout());
                let losses =
                    Reference { config, layout, parameters: &parameters }.losses(&ids, &targets, sequence);
                losses.iter().sum::<f64>() / ids.len() as f64
            };
            let (mut named, mut worst) = (by_name(&generator, &matrices), 0.0f64);
            for matrix in generator.matrices() {
                let ours = &gradient[matrix.range()];
                let largest = ours.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                assert!(largest > 0.0, "{growth}: {} has no gradient", matrix.name);
                for index in [0, ours.len() / 3, ours.len() / 2, ours.len() - 1] {
                    let mut at = |shift: f64| {
                        let number = &mut named.get_mut(&matrix.name).unwrap().2[index];
                        let before = std::mem::replace(number, *number + shift);
                        let loss = loss(&named);
                        named.get_mut(&matrix.name).unwrap().2[index] = before;
                        loss
                    };
                    let expected = (at(step) - at(-step)) / (2.0 * step);
                    let error = (f64::from(ours[index]) - expected).abs() / f64::from(largest);
                    worst = worst.max(error);
                    assert!(
                        error < GRADIENT,
                        "{growth}: {}[{index}] is {} instead of {expected}",
                        matrix.name,
                        ours[index]
                    );
                }
            }
            println!("{growth}: {worst:.1e}");
        }
    }
}

/// A growth of heads and neurons whose new rows are zero, with the residual stream as it is, changes nothing: the value
/// matrix reaches the attention output of the right query heads, for any groups.
#[test]
fn without_its_random_rows_a_growth_of_heads_keeps_the_function() {
    let source = ModelConfig { num_attention_heads: 6, num_key_value_heads: 2, ..base() };
    let parameters = weights(&source, 5);
    let (ids, _) = batch(source.vocab_size, 12, 6);
    let logits = |config: &ModelConfig, parameters: &[f32]| -> Vec<f64> {
        let layout = ParameterLayout::new(config);
        let parameters = widen(parameters);
        let model = Reference { config, layout: &layout, parameters: &parameters };
        model.logits(&ids).concat()
    };
    let expected = logits(&source, &parameters);
    for (heads, keys) in [(9, 3), (8, 2), (12, 3), (6, 6), (9, 9), (12, 12)] {
        let sizes = json!({"numAttentionHeads": heads, "numKeyValueHeads": keys, "intermediateSize": 17});
        let plan = resolve(&source, json!({"operator": "LearnWidth"}), sizes);
        let generator = Generator::new(&source, &plan, learn_of(&plan));
        let mut matrices = generator.initial(&plan.layers);
        matrices.iter_mut().filter(|x| **x != 1.0).for_each(|x| *x = 0.0);
        let mut target = vec![0.0; generator.target().total_len()];
        generator.generate(&mut Workspace::default(), &parameters, &matrices, &mut target);
        let target: Vec<f32> = logits(&plan.grown(&source), &target).iter().map(|x| *x as f32).collect();
        assert!(difference(&target, &expected) < 1e-6, "{heads} heads, {keys} keys");
    }
}

/// A storage with a source in it.
struct Place {
    _folder: tempfile::TempDir,
    storage: Storage,
    source: ModelConfig,
    parameters: Vec<f32>,
    text: Vec<u32>,
}

impl Place {
    fn new(source: ModelConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::open(folder.path().to_str().unwrap(), &StorageOptions::default()).unwrap();
        let parameters = weights(&source, 2);
        let location = CheckpointLocation {
            storage: storage.clone(),
            job: "job".to_owned(),
            stage: "small".to_owned(),
            attempt: 1,
        };
        let writer = CheckpointWriter::new(location, source.clone(), TokenIds::default(), Vec::new());
        let state = TrainingState { parameters: parameters.clone(), ..TrainingState::default() };
        writer.export(&storage.join("source"), &state).unwrap();
        // Something to learn: each token says which is next.
        let text = (0..800u32).map(|index| index * index % 13 + index % 5).collect();
        Self { _folder: folder, storage, source, parameters, text }
    }

    fn run(
        &self,
        to: &str,
        plan: &GrowthPlan,
        data: Option<LearnData<'_>>,
        stop_after: Option<u64>,
    ) -> growth::Result<GrownCheckpoint> {
        let target = GrowthTarget::Folder {
            folder: self.storage.join(to),
            job: "job".to_owned(),
            stage: "large".to_owned(),
        };
        let stop = AtomicBool::new(false);
        let tokens = learn_of(plan).batch_tokens;
        let report = |progress: growth::LearnProgress| {
            if stop_after.is_some_and(|steps| progress.tokens >= steps * tokens) {
                stop.store(true, Ordering::Relaxed);
            }
        };
        let learning = data.map(|data| Learning {
            data,
            progress: Some(self.storage.join("progress")),
            stop: Some(&stop),
            report: &report,
        });
        let data = GrowthData { measure: Measure::default(), learning };
        growth::grow_with(&self.storage.join("source"), None, plan, &target, &[], &data, &mut |_, _| ())
    }

    fn grow(&self, to: &str, plan: &GrowthPlan) -> GrownCheckpoint {
        self.run(to, plan, Some(LearnData::Text(self.text.clone())), None).unwrap()
    }

    fn weights_of(&self, name: &str) -> Vec<f32> {
        HuggingFaceFolder::open(&self.storage.join(name)).unwrap().load().unwrap().parameters
    }

    fn progress(&self) -> Vec<String> {
        self.storage.join("progress").list().unwrap().into_iter().map(|entry| entry.name).collect()
    }
}

/// A plan with batches of four sequences of 16.
fn plan(source: &ModelConfig, growth: Value, model: Value, steps: u64, rate: f64) -> GrowthPlan {
    let mut plan = resolve(source, growth, model);
    let learn = plan.learn.as_mut().unwrap();
    (learn.steps, learn.sequence_length, learn.micro_batch_tokens, learn.batch_tokens) = (steps, 16, 32, 64);
    learn.adam_w.learning_rate = rate;
    plan
}

#[test]
fn without_a_step_learned_depth_is_a_stack() {
    for tied in [false, true] {
        let place = Place::new(ModelConfig { tie_word_embeddings: tied, ..base() });
        let learned = plan(&place.source, json!({"operator": "LearnDepth", "factor": 3}), json!({}), 0, 0.0);
        let stack = resolve(&place.source, json!({"operator": "Stack", "factor": 3}), json!({}));
        let ours = place.run("learned", &learned, None, None).unwrap();
        let folder = place.storage.join("stacked");
        let target = GrowthTarget::Folder { folder, job: "job".to_owned(), stage: "large".to_owned() };
        let source = place.storage.join("source");
        let theirs = growth::grow(&source, None, &stack, &target, &[], &mut |_, _| ()).unwrap();
        assert_eq!(ours.manifest.digest, theirs.manifest.digest, "bit for bit");
        // And for a depth that is no multiple, the list that is no Stack.
        let five = resolve(&place.source, json!({"operator": "LearnDepth"}), json!({"numHiddenLayers": 5}));
        assert_eq!(five.layers, [0, 1, 0, 1, 0]);
    }
}

#[test]
fn learning_lowers_the_loss_and_what_is_written_is_what_was_learned() {
    for (growth, model) in growths() {
        let place = Place::new(base());
        let plan = plan(&place.source, growth.clone(), model, 60, 1e-2);
        let grown = place.grow("grown", &plan);
        let record: GrowthRecord = grown.record.unwrap();
        let learned = record.learned.unwrap();
        assert_eq!((learned.steps, learned.tokens, learned.losses.len()), (60, 60 * 64, 60));
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        // The text is gone through every 12 steps.
        let (first, last) = (mean(&learned.losses[..12]), mean(&learned.losses[48..]));
        println!("{growth}: {first:.3} -> {last:.3}");
        assert!(last < first - 0.05, "{growth}: {first} -> {last}");

        let bytes = place.storage.get("grown/learned.safetensors").unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let generator = Generator::new(&place.source, &plan, learn_of(&plan));
        let mut matrices = vec![0.0f32; generator.len()];
        for matrix in generator.matrices() {
            let tensor = file.tensor(&matrix.name).unwrap();
            assert_eq!(tensor.shape(), [matrix.rows, matrix.columns]);
            let numbers = tensor.data().as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw));
            matrices[matrix.range()].iter_mut().zip(numbers).for_each(|(to, from)| *to = from);
        }
        let mut target = vec![0.0; generator.target().total_len()];
        generator.generate(&mut Workspace::default(), &place.parameters, &matrices, &mut target);
        assert!(target == place.weights_of("grown"), "{growth}");
        let objects = &grown.manifest.objects;
        assert!(objects.iter().any(|object| object.name == "learned.safetensors" && !object.state));
    }
}

/// Depth and width together, which is everything that is learned.
fn both(source: &ModelConfig, steps: u64) -> GrowthPlan {
    let growth =
        json!({"operator": "LearnWidth", "factor": 2, "depth": {"operator": "LearnDepth", "factor": 2}});
    plan(source, growth, json!({}), steps, 1e-2)
}

fn with_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run)
}

#[test]
fn stopped_anywhere_it_ends_in_the_same_bits() {
    let place = Place::new(base());
    let plan = both(&place.source, 34);
    let text = || Some(LearnData::Text(place.text.clone()));
    let expected = with_threads(1, || place.grow("undisturbed", &plan)).manifest;
    assert!(place.progress().is_empty(), "a finished growth step leaves no progress");

    let stopped = |after| match place.run("grown", &plan, text(), Some(after)) {
        Err(GrowthError::Learn(LearnError::Stopped { step, .. })) => step,
        other => panic!("{other:?}"),
    };
    assert_eq!(stopped(7), 7);
    assert_eq!(place.progress().len(), 1);
    assert_eq!(stopped(26), 26);
    // Of steps 7, 10, 20 and 26 the last two are there.
    let names = place.progress();
    assert!(names.len() == 2 && names[0].starts_with("00000020-") && names[1].starts_with("00000026-"));
    assert!(place.storage.join("grown").list().unwrap().is_empty(), "nothing is written yet");
    // The newest is damaged, and one of another plan lies beside it.
    let damaged = format!("progress/{}", names[1]);
    let mut bytes = place.storage.get(&damaged).unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    place.storage.put(&damaged, bytes).unwrap();
    let grown = with_threads(3, || place.grow("grown", &plan));
    assert_eq!(grown.manifest.digest, expected.digest);
    assert_eq!(grown.manifest.origin, expected.origin);
    assert_eq!(grown.record.as_ref().unwrap().learned.as_ref().unwrap().losses.len(), 34);
    assert!(place.progress().is_empty());

    let again = place.grow("grown", &plan);
    assert!(again.reused);
    assert_eq!(again.manifest, grown.manifest);
}

#[test]
fn progress_of_another_growth_is_not_used() {
    let place = Place::new(base());
    let text = || Some(LearnData::Text(place.text.clone()));
    let expected = place.grow("undisturbed", &both(&place.source, 12)).manifest.digest;
    let other = both(&place.source, 30);
    place.run("other", &other, text(), Some(20)).unwrap_err();
    assert_eq!(place.progress().len(), 2);
    assert_eq!(place.grow("grown", &both(&place.source, 12)).manifest.digest, expected);
    // Other text, other matrices.
    let mut changed = place.text.clone();
    changed.reverse();
    let grown = place.run("changed", &both(&place.source, 12), Some(LearnData::Text(changed)), None).unwrap();
    assert_ne!(grown.manifest.digest, expected);
    assert_ne!(grown.manifest.origin, place.grow("undisturbed", &both(&place.source, 12)).manifest.origin);
}

#[test]
fn wrong_input_is_named() {
    let place = Place::new(base());
    let learned = both(&place.source, 3);
    let fails = |plan: &GrowthPlan, data: Option<LearnData<'_>>, expected: &str| {
        let error = place.run("grown", plan, data, None).unwrap_err();
        assert!(error.is_input_error() && error.to_string().contains(expected), "{error}");
        assert!(place.storage.join("grown").list().unwrap().is_empty());
    };
    fails(&learned, None, "LearnWidth learns on text, and there is none");
    fails(
        &learned,
        Some(LearnData::Text(vec![1; 16])),
        "16 tokens, fewer than one sequence and its target, 17",
    );
    fails(&learned, Some(LearnData::Text(vec![23; 40])), "tokens up to 24, but the model only 23");
    let keep = GrowthPlan { optimizer_state: OptimizerStatePolicy::Keep, ..learned.clone() };
    fails(&keep, Some(LearnData::Text(place.text.clone())), "moments of a mixture are not defined");
    let mut wild = learned.clone();
    wild.learn.as_mut().unwrap().adam_w.learning_rate = 1e30;
    fails(&wild, Some(LearnData::Text(place.text.clone())), "lower growth.learn.learningRate");
}

#[test]
fn noise_comes_after_learning() {
    let place = Place::new(base());
    let growth = json!({"operator": "LearnDepth", "factor": 2, "noise": 0.2});
    place.run("noisy", &plan(&place.source, growth, json!({}), 0, 0.0), None, None).unwrap();
    let stack = json!({"operator": "Stack", "factor": 2, "noise": 0.2});
    let stack = resolve(&place.source, stack, json!({}));
    let folder = place.storage.join("stacked");
    let target = GrowthTarget::Folder { folder, job: "job".to_owned(), stage: "large".to_owned() };
    growth::grow(&place.storage.join("source"), None, &stack, &target, &[], &mut |_, _| ()).unwrap();
    assert!(place.weights_of("noisy") == place.weights_of("stacked"));
}

prop_compose! {
    /// A source of any shape, and larger sizes for it.
    fn shapes()(
        hidden in 2u32..12, inner in 1u32..12, layers in 1u32..4, keys in 1u32..4, group in 1u32..4, half in 1u32..4,
        vocabulary in 2u32..30, tied in any::<bool>(), more in 0u32..9, more_inner in 1u32..9, more_keys in 0u32..3,
        target_group in 1u32..6, depth in prop::sample::select(vec![None, Some("LearnDepth"), Some("Interleave"), Some("ZeroDepth")]),
    ) -> (ModelConfig, Value, Value) {
        let config = ModelConfig {
            hidden_size: hidden, intermediate_size: inner, num_hidden_layers: layers,
            num_attention_heads: keys * group, num_key_value_heads: keys, head_dim: 2 * half,
            vocab_size: vocabulary, tie_word_embeddings: tied, ..base()
        };
        let target_group = if target_group < group && group % target_group != 0 { group } else { target_group };
        let target_keys = (keys + more_keys).max((keys * group).div_ceil(target_group));
        let sizes = json!({
            "numAttentionHeads": target_keys * target_group, "numKeyValueHeads": target_keys,
            "hiddenSize": hidden + more, "intermediateSize": inner + more_inner,
        });
        let mut growth = json!({"operator": "LearnWidth"});
        if let Some(depth) = depth {
            growth["depth"] = json!({"operator": depth, "factor": 2});
        }
        (config, growth, sizes)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_follows_the_equations((config, growth, sizes) in shapes(), seed: u64) {
        let parameters = weights(&config, seed);
        let plan = resolve(&config, growth, sizes);
        let (generator, matrices) = generator(&config, &plan, 0.1);
        let (mut space, mut target) = (Workspace::default(), vec![0.0; generator.target().total_len()]);
        generator.generate(&mut space, &parameters, &matrices, &mut target);
        let naive = Naive { source: &config, plan: &plan, parameters: widen(&parameters) };
        let named = by_name(&generator, &matrices);
        let expected = naive.generate(&named);
        prop_assert!(difference(&target, &expected) < GENERATED);
        // The gradient of <target, g>, which is linear in each matrix: its product with a matrix is what the matrix
        // contributes, <target, g> itself for depth, and for a matrix that stands on both sides twice of it.
        let direction = weights(&plan.grown(&config), seed ^ 1);
        let mut gradient = vec![0.0; generator.len()];
        generator.pull_back(&mut space, &parameters, &matrices, &direction, &mut gradient);
        let step = 1e-3;
        for matrix in generator.matrices() {
            let value = |sign: f64| {
                let mut moved = named.clone();
                let numbers = &mut moved.get_mut(&matrix.name).unwrap().2;
                numbers.iter_mut().enumerate().for_each(|(i, x)| *x += sign * step * ((i % 7) as f64 - 3.0));
                let target = naive.generate(&moved);
                target.iter().zip(&direction).map(|(a, b)| a * f64::from(*b)).sum::<f64>()
            };
            // Of degree two at most in any one matrix: the central difference is exact.
            let expected = (value(1.0) - value(-1.0)) / (2.0 * step);
            let ours: Vec<f64> =
                gradient[matrix.range()].iter().enumerate().map(|(i, x)| f64::from(*x) * ((i % 7) as f64 - 3.0)).collect();
            let size = ours.iter().map(|x| x.abs()).sum::<f64>().max(1e-3);
            let error = (ours.iter().sum::<f64>() - expected).abs() / size;
            prop_assert!(error < 1e-5, "{}: {error:e}", matrix.name);
        }
    }
}

/// The tiny job with a growth that learns.
fn job() -> String {
    let growth =
        "{operator: LearnWidth, factor: 2, learn: {steps: 60}, depth: {operator: LearnDepth, factor: 2}}";
    let large = JOB.replace("{operator: Stack, factor: 2}", growth);
    assert_ne!(large, JOB);
    // One micro-batch a step, and a stage of a few steps: the growth is what this is about.
    large.replace("microBatchTokens: 128\n", "microBatchTokens: 512\n")
}

/// Waits for a sign of progress of a process that runs.
fn wait_for_progress(child: &mut Child, seen: impl Fn() -> bool) {
    wait_until(Duration::from_secs(120), "no progress appeared", || {
        seen() || {
            assert!(child.try_wait().unwrap().is_none(), "it ended before");
            false
        }
    });
}

#[test]
fn killed_while_it_learns_a_job_ends_in_the_same_bits() {
    let undisturbed = Folder::new(&job());
    undisturbed.run_ok(&["run", "job.yaml", "--quiet", "--threads", "2"]);
    let expected = undisturbed.final_state("large");

    let folder = Folder::new(&job());
    let progress = folder.path("runs/tiny/learn/large");
    let stored = || progress.read_dir().map_or(0, |entries| entries.flatten().count());
    for kill in 1..=2 {
        let mut command = folder.command(&["run", "job.yaml", "--quiet", "--threads", "1"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The second life goes on from what the first has stored, and is killed when it has stored more.
        wait_for_progress(&mut child, || stored() >= kill);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(stored() >= kill, "it was killed while it learned");
        assert!(folder.checkpoints("large").is_empty());
    }
    folder.run_ok(&["run", "job.yaml", "--quiet"]);
    assert_eq!(folder.final_state("large"), expected);
    assert_eq!(stored(), 0);
}

#[test]
fn a_growth_pod_learns_on_the_data_of_the_job() {
    let job = job().replace("keepLast: 2", "keepLast: 30");
    let folder = Folder::new(&job);
    folder.run_ok(&["run", "job.yaml", "--quiet"]);
    let first = folder.checkpoints("large").remove(0);
    let expected = read_json(&first.join("manifest.json"));
    let record = read_json(&first.join("growth.json"));
    assert_eq!(record["learned"]["steps"], 60);
    assert_eq!(record["learned"]["losses"].as_array().unwrap().len(), 60);
    assert_eq!(record["measured"]["sample"], "HeldOut");

    std::fs::remove_dir_all(folder.path("runs/tiny/checkpoints/large")).unwrap();
    folder.run_ok(&["plan", "job.yaml", "--stage", "large", "-o", "large.json"]);
    // Told to end, it stores what it has learned.
    let progress = folder.path("runs/tiny/learn/large");
    let mut pod = folder.command(&["grow", "--plan", "large.json", "--quiet"]).spawn().unwrap();
    wait_for_progress(&mut pod, || progress.read_dir().is_ok_and(|mut entries| entries.next().is_some()));
    assert!(signal("-TERM", pod.id()));
    assert_eq!(pod.wait().unwrap().code(), Some(130));
    assert!(folder.checkpoints("large").is_empty());
    folder.run_ok(&["grow", "--plan", "large.json", "--quiet"]);
    let grown = read_json(&folder.checkpoints("large")[0].join("manifest.json"));
    assert_eq!(grown["digest"], expected["digest"]);
    assert_eq!(grown["origin"], expected["origin"]);

    let note = folder.run_ok(&["plan", "job.yaml"]);
    assert!(note.contains("LearnWidth learns for 60 steps of 512 tokens"), "{note}");
}

#[test]
fn a_folder_learns_on_a_text() {
    let small = JOB.split("  - name: large").next().unwrap();
    let folder = Folder::new(small);
    folder.run_ok(&["run", "job.yaml", "--quiet"]);
    let from = folder.checkpoints("small").pop().unwrap();
    let from = from.to_str().unwrap();
    let arguments = |to: &'static str| {
        [
            "grow",
            "--from",
            from,
            "--to",
            to,
            "--operator",
            "LearnDepth",
            "--factor",
            "2",
            "--learn-steps",
            "3",
        ]
    };
    let output = folder.run(&arguments("none"));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("LearnDepth learns on text"), "{}", stderr(&output));
    let text = [&arguments("large")[..], &["--text", "text/*.txt", "--learn-rate", "0.001"]].concat();
    let said = folder.run_ok(&text);
    assert!(said.contains("learned          3 steps"), "{said}");
    let keep = [&text[..], &["--keep-optimizer-state"]].concat();
    let output = folder.run(&keep);
    assert!(
        stderr(&output).contains("stage.growth.optimizerState: LearnDepth mixes weights"),
        "{}",
        stderr(&output)
    );
}

//! The whole model and the optimizer step against references that share no code with them: a naive f64 LLaMA and
//! its finite differences, candle's autograd, PyTorch's AdamW in f64.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod reference;

use growth_crds::plan::ModelConfig;
use growth_crds::spec::training::AdamWSpec;
use growth_trainer::checkpoint::TrainingState;
use growth_trainer::collective::Alone;
use growth_trainer::model::activations::{Activations, BlockActivations, Scratch, Sizes};
use growth_trainer::model::llama::{Llama, Tokens};
use growth_trainer::training::step::{StepEngine, StepReport, StepSettings, StepSizes};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use reference::Reference;
use reference::autograd::Autograd;
use reference::random::{weights, weights_from, widen};

/// Allowed error of an f32 output against f64, relative to the largest value: about a hundred roundings of 2^-24.
const FORWARD_TOLERANCE: f64 = 1e-5;
/// Allowed error of an f32 gradient against f64, relative to the largest value of its tensor: both passes through
/// all layers round, and the softmax's gradient subtracts numbers of like size.
const GRADIENT_TOLERANCE: f64 = 1e-4;
/// Smallest scale of a gradient, relative to the largest one of the model: what cancels to less than this (queries
/// that see few keys) keeps the rounding of the larger terms.
const GRADIENT_FLOOR: f64 = 1e-2;
/// Step of the finite differences: truncation and rounding in f64 stay near 1e-8.
const STEP: f64 = 1e-4;

/// A model with everything that one pass takes.
struct Case {
    model: Llama,
    parameters: Vec<f32>,
    ids: Vec<u32>,
    targets: Vec<u32>,
    sequence: usize,
}

impl Case {
    fn new(config: ModelConfig, batch: usize, sequence: usize, seed: u64) -> Self {
        let vocab = config.vocab_size;
        // A table longer than the sequence.
        let model = Llama::new(config, sequence + 3);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let parameters = weights_from(&mut random, model.layout());
        let mut tokens = || (0..batch * sequence).map(|_| random.random_range(0..vocab)).collect();
        Self { parameters, ids: tokens(), targets: tokens(), sequence, model }
    }

    fn tokens(&self) -> Tokens<'_> {
        Tokens { ids: &self.ids, targets: &self.targets, sequence: self.sequence }
    }

    fn sizes(&self) -> Sizes {
        self.model.sizes(&self.tokens())
    }

    fn scale(&self) -> f32 {
        1.0 / self.ids.len() as f32
    }

    /// Loss and gradients of the trainer; what it leaves unwritten is NaN.
    fn train(&self) -> (f64, Vec<f32>) {
        let mut gradients = vec![f32::NAN; self.parameters.len()];
        let mut activations = Activations::for_training(&self.sizes());
        let loss =
            self.model.train(&mut gradients, &mut activations, &self.parameters, self.tokens(), self.scale());
        (loss, gradients)
    }

    fn losses(&self, mut activations: Activations) -> Vec<f32> {
        self.model.losses(&mut activations, &self.parameters, self.tokens()).to_vec()
    }

    fn inference(&self) -> Activations {
        Activations::for_inference(&self.sizes())
    }

    fn logits(&self, rows: std::ops::Range<usize>) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows.len() * self.model.config().vocab_size as usize];
        self.model.logits(&mut out, &mut self.inference(), &self.parameters, self.tokens(), rows);
        out
    }

    fn reference<'a>(&'a self, parameters: &'a [f64]) -> Reference<'a> {
        Reference { config: self.model.config(), layout: self.model.layout(), parameters }
    }
}

/// The largest absolute value.
fn largest(x: impl IntoIterator<Item = f64>) -> f64 {
    x.into_iter().fold(0.0, |largest, x| {
        assert!(x.is_finite(), "a maximum would skip NaN");
        largest.max(x.abs())
    })
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    largest(a.iter().zip(b).map(|(a, b)| a - b))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Largest difference relative to the largest reference value.
fn relative_error(actual: &[f32], reference: &[f64]) -> f64 {
    largest_difference(&widen(actual), reference) / largest(reference.iter().copied())
}

/// A model as small tests want it; the cases change what they are about.
fn base() -> ModelConfig {
    ModelConfig {
        hidden_size: 24,
        intermediate_size: 37,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        vocab_size: 41,
        max_position_embeddings: 128,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    }
}

/// Models of every kind: heads alone, in groups and all on one key, tied or not, any widths.
fn configs() -> impl Strategy<Value = ModelConfig> {
    let widths = (8u32..40, 1u32..50, 2u32..60, 1u32..9);
    let counts = (1u32..4, 1u32..4, 1u32..5);
    let theta = prop_oneof![Just(100.0), Just(10_000.0), Just(500_000.0)];
    (widths, counts, theta, prop_oneof![Just(1e-6), Just(1e-3)], any::<bool>()).prop_map(
        |((hidden, inner, vocab, half), (layers, kv_heads, group), rope_theta, rms_norm_eps, tied)| {
            ModelConfig {
                hidden_size: hidden,
                intermediate_size: inner,
                num_hidden_layers: layers,
                num_attention_heads: kv_heads * group,
                num_key_value_heads: kv_heads,
                head_dim: 2 * half,
                vocab_size: vocab,
                rope_theta,
                rms_norm_eps,
                tie_word_embeddings: tied,
                ..base()
            }
        },
    )
}

/// The shapes that the trainer promises, by name.
fn named_configs() -> Vec<(&'static str, ModelConfig)> {
    vec![
        ("grouped heads", base()),
        ("a key head per query head", ModelConfig { num_key_value_heads: 4, ..base() }),
        ("one key head", ModelConfig { num_key_value_heads: 1, ..base() }),
        ("tied", ModelConfig { tie_word_embeddings: true, ..base() }),
        ("wide heads", ModelConfig { head_dim: 20, ..base() }),
        ("narrow heads", ModelConfig { head_dim: 2, ..base() }),
        ("another base", ModelConfig { rope_theta: 500_000.0, ..base() }),
        ("one layer", ModelConfig { num_hidden_layers: 1, ..base() }),
        ("tied, one key head", ModelConfig { tie_word_embeddings: true, num_key_value_heads: 1, ..base() }),
        ("wider than a kernel's block", ModelConfig { hidden_size: 300, intermediate_size: 520, ..base() }),
    ]
}

/// Largest error of all tensors against candle's autograd, and of the loss.
fn autograd_error(case: &Case) -> (f64, f64) {
    let (loss, gradients) = case.train();
    let layout = case.model.layout();
    let autograd = Autograd::new(case.model.config(), layout, &widen(&case.parameters)).unwrap();
    let (expected_loss, expected) =
        autograd.gradients(&case.ids, &case.targets, case.sequence, f64::from(case.scale())).unwrap();
    let floor = GRADIENT_FLOOR * largest(expected.values().flatten().copied());
    let of_tensors = layout.tensors().iter().map(|tensor| {
        let (actual, expected) = (widen(&gradients[tensor.range()]), &expected[tensor.name.as_str()]);
        largest_difference(&actual, expected) / largest(expected.iter().copied()).max(floor)
    });
    (largest(of_tensors), (loss - expected_loss).abs() / expected_loss)
}

#[test]
fn gradients_equal_autograd_for_each_kind_of_model() {
    for (name, config) in named_configs() {
        // 4 * 70 rows: two tiles of attention, two chunks of the head.
        let (gradients, loss) = autograd_error(&Case::new(config, 4, 70, 1));
        println!("{name}: gradients {gradients:.1e}, loss {loss:.1e}");
        assert!(gradients < GRADIENT_TOLERANCE, "{name}: {gradients}");
        assert!(loss < FORWARD_TOLERANCE, "{name}: loss {loss}");
    }
}

/// Largest error of directional derivatives (relative to the gradient's norm) and of single elements (relative to
/// the largest) over all tensors.
fn finite_difference_error(case: &Case, seed: u64) -> f64 {
    let gradients = widen(&case.train().1);
    let parameters = widen(&case.parameters);
    let loss = |parameters: &[f64]| {
        let losses = case.reference(parameters).losses(&case.ids, &case.targets, case.sequence);
        f64::from(case.scale()) * losses.iter().sum::<f64>()
    };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let tensors = case.model.layout().tensors();
    let norm_floor = tensors.iter().map(|t| norm(&gradients[t.range()])).fold(0.0, f64::max) * GRADIENT_FLOOR;
    let floor = largest(tensors.iter().flat_map(|t| gradients[t.range()].to_vec())) * GRADIENT_FLOOR;
    let mut error: f64 = 0.0;
    for tensor in tensors {
        let gradient = &gradients[tensor.range()];
        let (norm_scale, scale) =
            (norm(gradient).max(norm_floor), largest(gradient.iter().copied()).max(floor));
        for direction in directions(gradient, &mut random) {
            let slope = slope(&parameters, tensor.offset, &direction, loss);
            error = error.max(largest([dot(gradient, &direction) - slope]) / norm_scale);
        }
        for _ in 0..2 {
            let i = random.random_range(0..tensor.len);
            let slope = slope(&parameters, tensor.offset + i, &[1.0], loss);
            error = error.max(largest([gradient[i] - slope]) / scale);
        }
    }
    error
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// Unit vectors: along the gradient, where the slope is its norm, and one at random.
fn directions(gradient: &[f64], random: &mut ChaCha8Rng) -> [Vec<f64>; 2] {
    let unit = |x: Vec<f64>| {
        let norm = norm(&x).max(f64::MIN_POSITIVE);
        x.into_iter().map(|x| x / norm).collect()
    };
    let any = gradient.iter().map(|_| random.random_range(-1.0..1.0)).collect();
    [unit(gradient.to_vec()), unit(any)]
}

/// Central difference along `direction`, which starts at `offset`.
fn slope(parameters: &[f64], offset: usize, direction: &[f64], loss: impl Fn(&[f64]) -> f64) -> f64 {
    let at = |step: f64| {
        let mut moved = parameters.to_vec();
        moved[offset..].iter_mut().zip(direction).for_each(|(x, d)| *x += step * d);
        loss(&moved)
    };
    (at(STEP) - at(-STEP)) / (2.0 * STEP)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn gradients_are_slopes(config in configs(), batch in 1usize..4, sequence in 2usize..14, seed: u64) {
        let error = finite_difference_error(&Case::new(config, batch, sequence, seed), seed);
        println!("finite differences: {error:.1e}");
        prop_assert!(error < GRADIENT_TOLERANCE, "{error}");
    }

    #[test]
    fn gradients_equal_autograd(config in configs(), batch in 1usize..4, sequence in 2usize..100, seed: u64) {
        let (gradients, loss) = autograd_error(&Case::new(config, batch, sequence, seed));
        println!("autograd: gradients {gradients:.1e}, loss {loss:.1e}");
        prop_assert!(gradients < GRADIENT_TOLERANCE, "{gradients}");
        prop_assert!(loss < FORWARD_TOLERANCE, "{loss}");
    }

    #[test]
    fn logits_and_losses(config in configs(), batch in 1usize..4, sequence in 1usize..100, seed: u64) {
        let case = Case::new(config, batch, sequence, seed);
        let (logits, losses) = forward_errors(&case);
        println!("logits {logits:.1e}, losses {losses:.1e}");
        prop_assert!(logits < FORWARD_TOLERANCE, "logits {logits}");
        prop_assert!(losses < FORWARD_TOLERANCE, "losses {losses}");
        the_same_bits_in_any_buffers(&case);
        the_same_bits_in_any_batch(&case);
    }
}

/// Largest errors of the logits and of the losses, relative to the largest, or to 1 where all are smaller: they go
/// into exponentials, and a few logits of a narrow model can all cancel.
fn forward_errors(case: &Case) -> (f64, f64) {
    let parameters = widen(&case.parameters);
    let reference = case.reference(&parameters);
    let logits: Vec<f64> =
        case.ids.chunks(case.sequence).flat_map(|ids| reference.logits(ids).into_iter().flatten()).collect();
    let losses = reference.losses(&case.ids, &case.targets, case.sequence);
    let error = |actual: &[f32], expected: &[f64]| {
        largest_difference(&widen(actual), expected) / largest(expected.iter().copied()).max(1.0)
    };
    (error(&case.logits(0..case.ids.len()), &logits), error(&case.losses(case.inference()), &losses))
}

/// Buffers for training, for inference, used ones; a longer table; a part of the rows.
fn the_same_bits_in_any_buffers(case: &Case) {
    let losses = case.losses(case.inference());
    assert_eq!(case.losses(Activations::for_training(&case.sizes())), losses);

    let mut used = Activations::for_training(&case.sizes());
    let mut gradients = [vec![0.0; case.parameters.len()], vec![7.0; case.parameters.len()]];
    for gradients in &mut gradients {
        case.model.train(gradients, &mut used, &case.parameters, case.tokens(), case.scale());
        assert_eq!(used.losses, losses);
    }
    for tensor in case.model.layout().tensors() {
        assert_eq!(gradients[0][tensor.range()], gradients[1][tensor.range()], "{}", tensor.name);
    }

    let model = Llama::new(case.model.config().clone(), 3 * case.sequence + 50);
    assert_eq!(model.losses(&mut case.inference(), &case.parameters, case.tokens()), losses);

    let (rows, vocab) = (case.ids.len(), case.model.config().vocab_size as usize);
    let last = case.logits(rows - 1..rows);
    assert_eq!(last, case.logits(0..rows)[(rows - 1) * vocab..]);
}

/// A sequence's losses do not depend on what runs beside it.
fn the_same_bits_in_any_batch(case: &Case) {
    let mut alone = Vec::new();
    for (ids, targets) in case.ids.chunks(case.sequence).zip(case.targets.chunks(case.sequence)) {
        let tokens = Tokens { ids, targets, sequence: case.sequence };
        let mut activations = Activations::for_inference(&case.model.sizes(&tokens));
        alone.extend_from_slice(case.model.losses(&mut activations, &case.parameters, tokens));
    }
    assert_eq!(case.losses(case.inference()), alone);
}

#[test]
fn a_wide_model_has_the_same_bits_in_any_batch() {
    // Wide enough that products run in parallel and in several blocks of the inner dimension.
    let config = ModelConfig { hidden_size: 300, intermediate_size: 520, ..base() };
    let case = Case::new(config, 5, 67, 3);
    the_same_bits_in_any_batch(&case);
    the_same_bits_in_any_buffers(&case);
}

#[test]
fn a_position_does_not_see_later_ones() {
    let mut case = Case::new(base(), 1, 70, 4);
    let before = case.losses(case.inference());
    case.ids[66] = (case.ids[66] + 1) % 41;
    let after = case.losses(case.inference());
    assert_eq!(before[..66], after[..66]);
    assert!(before[66..].iter().zip(&after[66..]).all(|(before, after)| before != after));
}

/// An engine's state with random weights.
fn random_state(model: &Llama, seed: u64) -> TrainingState {
    let parameters = weights(model.layout(), seed);
    let zeros = vec![0.0; parameters.len()];
    TrainingState {
        step: 0,
        tokens: 0,
        parameters,
        exp_avg: zeros.clone(),
        exp_avg_sq: zeros,
        optimizer_step: 0,
    }
}

fn random_tokens(count: usize, vocab: u32, seed: u64) -> (Vec<u32>, Vec<u32>) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut tokens = || (0..count).map(|_| random.random_range(0..vocab)).collect();
    (tokens(), tokens())
}

/// Trains `steps` steps of `micro_batches` times `per_micro_batch` sequences of 70 tokens.
fn sizes(sequence: usize, micro_batch_tokens: usize, global_batch_tokens: usize) -> StepSizes {
    StepSizes { sequence, micro_batch_tokens, global_batch_tokens }
}

fn train_steps(
    micro_batches: usize,
    per_micro_batch: usize,
    steps: u64,
    adam_w: &AdamWSpec,
) -> (TrainingState, Vec<StepReport>) {
    let config = ModelConfig { hidden_size: 48, intermediate_size: 100, vocab_size: 157, ..base() };
    let tokens = 70 * micro_batches * per_micro_batch;
    let mut engine = StepEngine::new(config, sizes(70, 70 * per_micro_batch, tokens), 0, 1);
    let mut state = random_state(engine.model(), 5);
    let settings = StepSettings { adam_w, learning_rate: 1e-3, gradient_clip: 1.0 };
    let reports = (0..steps).map(|step| {
        let (ids, targets) = random_tokens(tokens, 157, 6 + step);
        engine.step(&mut Alone, &mut state, &ids, &targets, settings).unwrap()
    });
    let reports = reports.collect();
    (state, reports)
}

#[test]
fn bits_of_a_step_do_not_depend_on_threads() {
    let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
    for micro_batches in 1..5 {
        let with_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| train_steps(micro_batches, 2, 3, &AdamWSpec::default()))
        };
        let (one, reports) = with_threads(1);
        for threads in [2, 3, 5] {
            let (state, again) = with_threads(threads);
            let name = format!("{micro_batches} micro-batches, {threads} threads");
            assert_eq!(again, reports, "{name}");
            assert!(bits(&state.parameters) == bits(&one.parameters), "parameters, {name}");
            assert!(bits(&state.exp_avg) == bits(&one.exp_avg), "first moments, {name}");
            assert!(bits(&state.exp_avg_sq) == bits(&one.exp_avg_sq), "second moments, {name}");
        }
    }
}

#[test]
fn micro_batches_sum_to_the_whole_batch() {
    // An epsilon of the size of the gradients: AdamW's first step is near their sign otherwise, which rounding flips.
    let adam_w = AdamWSpec { epsilon: 1e-3, ..AdamWSpec::default() };
    let (whole, whole_reports) = train_steps(1, 12, 1, &adam_w);
    for micro_batches in [2, 3, 4, 6, 12] {
        let (parts, reports) = train_steps(micro_batches, 12 / micro_batches, 1, &adam_w);
        let (report, expected) = (reports[0], whole_reports[0]);
        assert!((report.loss - expected.loss).abs() < 1e-12 * expected.loss);
        assert!((report.gradient_norm / expected.gradient_norm - 1.0).abs() < FORWARD_TOLERANCE);
        for (parts, whole) in [
            (&parts.parameters, &whole.parameters),
            (&parts.exp_avg, &whole.exp_avg),
            (&parts.exp_avg_sq, &whole.exp_avg_sq),
        ] {
            let error = relative_error(parts, &widen(whole));
            assert!(error < FORWARD_TOLERANCE, "{micro_batches}: {error}");
        }
    }
}

/// Elements of all buffers; names every field, so that a new one does not compile until it is here.
fn elements(activations: &Activations) -> usize {
    let Activations { blocks, scratch, output, output_inverse_rms, d_residual, logits, losses } = activations;
    let Scratch { norm, d_norm, qkv_rows, d_qkv, context_rows, d_context, mlp, partial_gains } = scratch;
    let of_block = |block: &BlockActivations| {
        let BlockActivations {
            input,
            input_inverse_rms,
            qkv,
            log_sums,
            context,
            middle,
            middle_inverse_rms,
            gate_up,
        } = block;
        [input, input_inverse_rms, qkv, log_sums, context, middle, middle_inverse_rms, gate_up].map(Vec::len)
    };
    let shared = [norm, d_norm, qkv_rows, d_qkv, context_rows, d_context, mlp, partial_gains].map(Vec::len);
    let rest = [output, output_inverse_rms, d_residual, logits, losses].map(Vec::len);
    blocks.iter().flat_map(of_block).chain(shared).chain(rest).sum()
}

#[test]
fn bytes_count_every_buffer() {
    // Micro-batches, buffers of the tree: a leaf and one for each doubling.
    for (micro_batches, buffers) in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4)] {
        let engine = StepEngine::new(base(), sizes(10, 20, 20 * micro_batches), 0, 1);
        let activations = Activations::for_training(&Sizes::new(&base(), 2, 10));
        let floats = elements(&activations) + buffers * engine.model().layout().total_len();
        assert_eq!(engine.bytes(), 4 * floats as u64, "{micro_batches} micro-batches");
    }
}

/// PyTorch's AdamW in f64 with its clipping, for a whole model.
struct Optimizer {
    parameters: Vec<f64>,
    exp_avg: Vec<f64>,
    exp_avg_sq: Vec<f64>,
    step: i32,
}

impl Optimizer {
    fn new(parameters: &[f32]) -> Self {
        let zeros = vec![0.0; parameters.len()];
        Self { parameters: widen(parameters), exp_avg: zeros.clone(), exp_avg_sq: zeros, step: 0 }
    }

    fn step(&mut self, model: &Llama, gradients: &[f64], settings: StepSettings<'_>) {
        let StepSettings { adam_w, learning_rate, gradient_clip } = settings;
        self.step += 1;
        let norm = norm(gradients);
        let coefficient = if gradient_clip > 0.0 { (gradient_clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        for tensor in model.layout().tensors() {
            let spared = tensor.name.contains("norm") || tensor.name.contains("embed_tokens");
            let decay = if spared && !adam_w.decay_norms_and_embeddings { 0.0 } else { adam_w.weight_decay };
            for i in tensor.range() {
                self.parameters[i] *= 1.0 - learning_rate * decay;
                self.element(i, coefficient * gradients[i], adam_w, learning_rate);
            }
        }
    }

    fn element(&mut self, i: usize, gradient: f64, adam_w: &AdamWSpec, learning_rate: f64) {
        self.exp_avg[i] += (gradient - self.exp_avg[i]) * (1.0 - adam_w.beta1);
        self.exp_avg_sq[i] = self.exp_avg_sq[i] * adam_w.beta2 + gradient * gradient * (1.0 - adam_w.beta2);
        let correction1 = 1.0 - adam_w.beta1.powi(self.step);
        let correction2 = 1.0 - adam_w.beta2.powi(self.step);
        let denominator = self.exp_avg_sq[i].sqrt() / correction2.sqrt() + adam_w.epsilon;
        self.parameters[i] -= learning_rate / correction1 * self.exp_avg[i] / denominator;
    }
}

/// 50 steps of the engine beside 50 of the f64 optimizer, on the gradients of the engine's weights.
fn compare_optimizers(config: ModelConfig, decay_norms_and_embeddings: bool, gradient_clip: f64) {
    let mut engine = StepEngine::new(config, sizes(10, 20, 20), 0, 1);
    let mut state = random_state(engine.model(), 7);
    let mut reference = Optimizer::new(&state.parameters);
    let adam_w = AdamWSpec { decay_norms_and_embeddings, ..AdamWSpec::default() };
    let settings = StepSettings { adam_w: &adam_w, learning_rate: 3e-3, gradient_clip };
    let mut activations = Activations::for_training(&Sizes::new(engine.model().config(), 2, 10));
    let mut gradients = vec![0.0; state.parameters.len()];
    for step in 0..50 {
        let (ids, targets) = random_tokens(20, 41, 8 + step);
        let tokens = Tokens { ids: &ids, targets: &targets, sequence: 10 };
        engine.model().train(&mut gradients, &mut activations, &state.parameters, tokens, 1.0 / 20.0);
        reference.step(engine.model(), &widen(&gradients), settings);
        let report = engine.step(&mut Alone, &mut state, &ids, &targets, settings).unwrap();
        assert!((report.gradient_norm / norm(&widen(&gradients)) - 1.0).abs() < 1e-12);
    }
    assert_eq!(state.optimizer_step, 50);
    for (actual, expected) in [
        (&state.parameters, &reference.parameters),
        (&state.exp_avg, &reference.exp_avg),
        (&state.exp_avg_sq, &reference.exp_avg_sq),
    ] {
        let error = relative_error(actual, expected);
        println!("AdamW: {error:.1e}");
        assert!(error < FORWARD_TOLERANCE, "{error}");
    }
}

#[test]
fn the_optimizer_is_that_of_pytorch() {
    for tie_word_embeddings in [false, true] {
        let config = ModelConfig { tie_word_embeddings, ..base() };
        for decay_norms_and_embeddings in [false, true] {
            for gradient_clip in [0.0, 0.1] {
                compare_optimizers(config.clone(), decay_norms_and_embeddings, gradient_clip);
            }
        }
    }
}

#[test]
fn a_norm_below_the_limit_is_not_clipped() {
    let clip_at = |gradient_clip| {
        let mut engine = StepEngine::new(base(), sizes(10, 20, 20), 0, 1);
        let mut state = random_state(engine.model(), 9);
        let (ids, targets) = random_tokens(20, 41, 10);
        let adam_w = AdamWSpec::default();
        let settings = StepSettings { adam_w: &adam_w, learning_rate: 1e-3, gradient_clip };
        engine.step(&mut Alone, &mut state, &ids, &targets, settings).unwrap();
        state.exp_avg
    };
    assert_eq!(clip_at(1e6), clip_at(0.0));
    assert_ne!(clip_at(1e-3), clip_at(0.0));
}

#[test]
fn evaluates_any_number_of_sequences() {
    let count = 5;
    let case = Case::new(base(), count, 12, 11);
    let parameters = widen(&case.parameters);
    let expected: f64 = case.reference(&parameters).losses(&case.ids, &case.targets, 12).iter().sum::<f64>()
        / case.ids.len() as f64;
    let means: Vec<f64> = [1, 2, 3, 5, 8]
        .map(|per_micro_batch| {
            let mut engine =
                StepEngine::new(base(), sizes(12, 12 * per_micro_batch, 12 * per_micro_batch), 0, 1);
            engine.evaluate(&mut Alone, &case.parameters, &case.ids, &case.targets).unwrap()
        })
        .into();
    assert!((means[0] / expected - 1.0).abs() < FORWARD_TOLERANCE, "{} {expected}", means[0]);
    assert!(means.iter().all(|mean| *mean == means[0]), "{means:?}");
}

#[test]
fn evaluating_between_steps_changes_nothing() {
    let run = |evaluate: bool| {
        let mut engine = StepEngine::new(base(), sizes(10, 20, 60), 0, 1);
        let mut state = random_state(engine.model(), 12);
        let adam_w = AdamWSpec::default();
        for step in 0..2 {
            let (ids, targets) = random_tokens(60, 41, 13 + step);
            if evaluate {
                engine.evaluate(&mut Alone, &state.parameters, &targets[..50], &ids[..50]).unwrap();
            }
            let settings = StepSettings { adam_w: &adam_w, learning_rate: 1e-3, gradient_clip: 1.0 };
            engine.step(&mut Alone, &mut state, &ids, &targets, settings).unwrap();
        }
        state.parameters
    };
    assert!(run(true) == run(false));
}

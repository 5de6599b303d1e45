//! What is frozen stays bit for bit, what trains does as if nothing else were different, new parameters have their
//! own rate; on any number of ranks.
#![allow(clippy::unwrap_used)]

use super::after_growth::{AfterGrowth, NewPart, new_parts};
use super::schedule::{learning_rate, stage_learning_rate};
use super::stage::first_sample;
use super::step::{StepEngine, StepReport, StepSettings, StepSizes, TrainingState};
use crate::collective::testing::together;
use crate::collective::{Alone, Collective};
use crate::model::initializer::initialize;
use crate::model::layout::{ParameterLayout, ParameterTensor};
use growth_crds::plan::{Initializer, JobPlan, StagePlan};
use growth_crds::spec::training::AdamWSpec;
use growth_crds::{GrowthTrainingJob, resolve};
use proptest::prelude::*;
use serde_json::{Value, json};

const SEQUENCE: u64 = 12;
/// Four micro-batches of a sequence.
const GLOBAL: u64 = 4 * SEQUENCE;

/// The plans of a job of two stages, of which the second has this growth.
fn job_plan(growth: Value, model: Value) -> JobPlan {
    let job = json!({
        "apiVersion": "growth.dev/v1alpha1", "kind": "GrowthTrainingJob", "metadata": {"name": "tiny"},
        "spec": {
            "model": {
                "hiddenSize": 24, "intermediateSize": 40, "numAttentionHeads": 4, "numKeyValueHeads": 2,
                "vocabSize": 97, "numHiddenLayers": 3,
            },
            "data": {
                "train": [{"uri": "file:///t"}], "holdOutPercent": 1.0,
                "tokenizer": {"uri": "file:///tokenizer.json"},
            },
            "storage": {"uri": "file:///runs"},
            "training": {
                "sequenceLength": SEQUENCE, "globalBatchTokens": GLOBAL, "microBatchTokens": SEQUENCE,
                "schedule": {"cosine": {"warmupTokens": 2 * GLOBAL}},
            },
            "stages": [
                {"name": "small", "tokens": 10 * GLOBAL, "model": {}},
                {"name": "large", "tokens": 10 * GLOBAL, "growth": growth, "model": model},
            ],
        },
    });
    let job: GrowthTrainingJob = serde_json::from_value(job).unwrap();
    resolve("tiny", &job.spec).unwrap()
}

/// The plan of the grown stage.
fn grown(growth: Value) -> StagePlan {
    job_plan(growth, json!({})).stages.remove(1)
}

/// A growth by two top layers of which the new ones train, and more.
fn frozen(freeze: &str, more: Value) -> StagePlan {
    let mut growth = json!({
        "operator": "LayerMap", "layerMap": {"layers": [0, 1, 1, 2, 2]}, "freeze": freeze,
    });
    growth.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    grown(growth)
}

fn engine_of(plan: &StagePlan, rank: usize, ranks: usize) -> StepEngine {
    let training = &plan.training;
    let sizes = StepSizes {
        sequence: SEQUENCE as usize,
        micro_batch_tokens: training.micro_batch_tokens as usize,
        global_batch_tokens: training.global_batch_tokens as usize,
    };
    StepEngine::new(plan.model.clone(), sizes, rank, ranks)
}

/// The first weights of the stage: the same for every engine.
fn first_state(plan: &StagePlan, engine: &StepEngine) -> TrainingState {
    let moments = vec![0.0; engine.shards().own_len()];
    TrainingState {
        parameters: initialize(&plan.model, Initializer::HuggingFace, 3),
        exp_avg: moments.clone(),
        exp_avg_sq: moments,
        ..TrainingState::default()
    }
}

/// One step as the training loop takes it.
fn step(
    engine: &mut StepEngine,
    collective: &mut dyn Collective,
    state: &mut TrainingState,
    (learning_rate, gradient_clip): (f64, f64),
) -> StepReport {
    let vocab = engine.model().config().vocab_size;
    let begin = state.tokens as u32;
    let token = |i: usize| (i as u32 * 31 + begin * 17 + 5) % vocab;
    let own = engine.own_tokens();
    let ids: Vec<u32> = own.clone().map(token).collect();
    let targets: Vec<u32> = own.map(|i| token(i + 1)).collect();
    let adam_w = AdamWSpec::default();
    let settings = StepSettings { adam_w: &adam_w, learning_rate, gradient_clip };
    let report = engine.step(collective, state, &ids, &targets, settings).unwrap();
    state.step += 1;
    state.tokens += GLOBAL;
    report
}

/// The weights after each step, and what the steps reported.
fn train(
    plan: &StagePlan,
    collective: &mut dyn Collective,
    steps: u64,
    rates: (f64, f64),
) -> (Vec<TrainingState>, Vec<StepReport>) {
    let mut engine = engine_of(plan, collective.rank(), collective.world_size());
    let special = AfterGrowth::of(plan, engine.model().layout());
    engine = engine.after_growth(special);
    let mut state = first_state(plan, &engine);
    let mut states = vec![state.clone()];
    let mut reports = Vec::new();
    for _ in 0..steps {
        reports.push(step(&mut engine, collective, &mut state, rates));
        states.push(state.clone());
    }
    (states, reports)
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Whether a tensor trains while the source is frozen: new layers, and with them perhaps norm and head.
fn trains(tensor: &ParameterTensor, plan: &StagePlan) -> bool {
    let freeze = plan.training.after_growth.freeze.as_ref().unwrap();
    match tensor.layer {
        Some(layer) => freeze.layers.contains(&layer),
        None => freeze.head && tensor.name != "model.embed_tokens.weight",
    }
}

#[test]
fn what_is_frozen_stays_and_the_rest_trains_as_it_would() {
    for freeze in ["Source", "SourceButHead"] {
        let plan = frozen(freeze, json!({}));
        let layout = ParameterLayout::new(&plan.model);
        let (states, _) = train(&plan, &mut Alone, 5, (1e-2, 0.0));
        // The reference computes and applies all gradients, then puts the frozen tensors back.
        let mut reference = engine_of(&plan, 0, 1);
        let mut state = first_state(&plan, &reference);
        let first = state.parameters.clone();
        for after in &states[1..] {
            step(&mut reference, &mut Alone, &mut state, (1e-2, 0.0));
            for tensor in layout.tensors() {
                let range = tensor.range();
                if trains(tensor, &plan) {
                    assert!(bits(&after.parameters[range.clone()]) != bits(&first[range]), "{}", tensor.name);
                } else {
                    state.parameters[range.clone()].copy_from_slice(&first[range.clone()]);
                    assert!(after.exp_avg[range.clone()].iter().all(|moment| *moment == 0.0));
                    assert!(bits(&after.parameters[range.clone()]) == bits(&first[range]), "{}", tensor.name);
                }
            }
            assert!(bits(&after.parameters) == bits(&state.parameters), "{freeze}, step {}", after.step);
        }
    }
}

#[test]
fn the_gradient_norm_is_that_of_what_trains() {
    let plan = frozen("SourceButHead", json!({}));
    let layout = ParameterLayout::new(&plan.model);
    // Without decay and from fresh moments, the first moments are a tenth of the gradients.
    let (states, _) = train(&plan, &mut Alone, 1, (0.0, 0.0));
    let (_, reports) = train(&plan, &mut Alone, 1, (0.0, 0.0));
    let trained = layout.tensors().iter().filter(|tensor| trains(tensor, &plan));
    let square: f64 = trained
        .flat_map(|tensor| &states[1].exp_avg[tensor.range()])
        .map(|moment| (10.0 * f64::from(*moment)).powi(2))
        .sum();
    let norm = reports[0].gradient_norm;
    assert!((square.sqrt() / norm - 1.0).abs() < 1e-6, "{} {norm}", square.sqrt());
    let whole = train(
        &grown(json!({"operator": "LayerMap", "layerMap": {"layers": [0, 1, 1, 2, 2]}})),
        &mut Alone,
        1,
        (0.0, 0.0),
    );
    assert!(whole.1[0].gradient_norm > 1.001 * norm);
}

#[test]
fn unfrozen_parts_begin_as_in_a_first_step() {
    let plan = frozen("SourceButHead", json!({"freezeTokens": 3 * GLOBAL}));
    let (states, _) = train(&plan, &mut Alone, 5, (1e-2, 0.0));
    let layout = ParameterLayout::new(&plan.model);
    let embedding = layout.embedding();
    assert!(states[3].parameters[embedding.clone()] == states[0].parameters[embedding.clone()]);
    // Of a fresh AdamW the first step is near the learning rate times the sign, whatever the size of the gradient: with
    // the correction of the fourth step it would be about half of that.
    let (before, after) = (&states[3], &states[4]);
    let mut moved: Vec<f32> = Vec::new();
    for i in embedding {
        let decayed = before.parameters[i] * (1.0 - 1e-2 * 0.1);
        if after.exp_avg[i].abs() > 1e-6 {
            moved.push((after.parameters[i] - decayed).abs());
        }
    }
    assert!(moved.len() > 500, "{}", moved.len());
    assert!(moved.iter().all(|step| (step / 1e-2 - 1.0).abs() < 1e-2), "{moved:?}");
    assert_eq!(after.optimizer_step, 4);
}

#[test]
fn a_resumed_stage_freezes_as_long_as_it_would_have() {
    let plan = frozen("Source", json!({"freezeTokens": 3 * GLOBAL}));
    let (states, _) = train(&plan, &mut Alone, 6, (1e-2, 0.5));
    for from in [1, 3, 4] {
        let engine = engine_of(&plan, 0, 1);
        let special = AfterGrowth::of(&plan, engine.model().layout());
        let mut engine = engine.after_growth(special);
        let mut state = states[from].clone();
        for _ in from..6 {
            step(&mut engine, &mut Alone, &mut state, (1e-2, 0.5));
        }
        assert!(bits(&state.parameters) == bits(&states[6].parameters), "from step {from}");
    }
}

#[test]
fn any_number_of_ranks_computes_the_same_bits_after_a_growth() {
    let new = json!({"learningRateRatio": 1.3, "rampTokens": 4 * GLOBAL});
    let plans = [
        frozen("Source", json!({"freezeTokens": 2 * GLOBAL})),
        frozen("SourceButHead", json!({"newParameters": new})),
        grown(json!({"operator": "DirectWidth", "factor": 2, "newParameters": new})),
        grown(json!({
            "operator": "ZeroWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2}, "newParameters": new,
            "freeze": "Source", "freezeTokens": 2 * GLOBAL,
        })),
    ];
    for plan in &plans {
        let (alone, reports) = train(plan, &mut Alone, 4, (1e-2, 0.5));
        for ranks in [2, 4] {
            for (states, found) in together(ranks, |collective| train(plan, collective, 4, (1e-2, 0.5))) {
                assert_eq!(found, reports, "{ranks} ranks");
                assert!(bits(&states[4].parameters) == bits(&alone[4].parameters), "{ranks} ranks");
            }
        }
    }
}

#[test]
fn new_parameters_have_their_own_rate() {
    let (rate, ratio) = (1e-2, 1.3);
    for operator in ["DirectWidth", "ZeroWidth"] {
        let depth = json!({"operator": "Stack", "factor": 2});
        let spec = |more: Value| {
            let mut growth = json!({"operator": operator, "factor": 2, "depth": depth});
            growth.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            grown(growth)
        };
        let plan = spec(json!({"newParameters": {"learningRateRatio": ratio}}));
        let plain = spec(json!({}));
        let layout = ParameterLayout::new(&plan.model);
        let mixed = &train(&plan, &mut Alone, 1, (rate, 0.0)).0[1].parameters;
        let old = &train(&plain, &mut Alone, 1, (rate, 0.0)).0[1].parameters;
        let new = &train(&plain, &mut Alone, 1, (ratio * rate, 0.0)).0[1].parameters;
        for tensor in layout.tensors() {
            // New: the layers of the second half, and what is right of or below the old part. Heads are 4 and 2.
            let (height, width) = match *tensor.shape {
                [width] => (1, width),
                [height, width] => (height, width),
                _ => unreachable!(),
            };
            let vocabulary = tensor.layer.is_none() || height == 1;
            let is_new = |i: usize| {
                let (row, column) = (i / width, i % width);
                tensor.layer.is_some_and(|layer| layer >= 3)
                    || column >= width / 2
                    || !vocabulary && row >= height / 2
            };
            let mut counts = [0; 2];
            for (i, element) in tensor.range().enumerate() {
                let expected = if is_new(i) { new } else { old };
                assert_eq!(
                    mixed[element].to_bits(),
                    expected[element].to_bits(),
                    "{operator} {} {i}",
                    tensor.name
                );
                counts[usize::from(is_new(i))] += 1;
            }
            assert!(counts[1] >= counts[0], "{}: {counts:?}", tensor.name);
        }
        assert!(old != new);
    }
}

#[test]
fn a_ratio_of_one_is_the_ordinary_step() {
    let new = |ratio: f64| {
        grown(json!({"operator": "DirectWidth", "factor": 2, "newParameters": {"learningRateRatio": ratio}}))
    };
    let plain = train(&grown(json!({"operator": "DirectWidth", "factor": 2})), &mut Alone, 3, (1e-2, 0.5)).0;
    assert!(
        bits(&train(&new(1.0), &mut Alone, 3, (1e-2, 0.5)).0[3].parameters) == bits(&plain[3].parameters)
    );
    assert!(
        bits(&train(&new(1.1), &mut Alone, 3, (1e-2, 0.5)).0[3].parameters) != bits(&plain[3].parameters)
    );
}

#[test]
fn the_ratio_rises_linearly_and_stays() {
    let plan =
        frozen("Nothing", json!({"newParameters": {"learningRateRatio": 1.4, "rampTokens": 4 * GLOBAL}}));
    let layout = ParameterLayout::new(&plan.model);
    let special = AfterGrowth::of(&plan, &layout);
    let new = layout.position("model.layers.2.mlp.down_proj.weight").unwrap();
    let old = layout.position("model.layers.1.mlp.down_proj.weight").unwrap();
    let ratio = |tokens: u64| special.new_part(new, tokens).map_or(1.0, |(_, ratio)| ratio);
    let found: Vec<f64> = [0, 1, 2, 4, 9].map(|steps| ratio(steps * GLOBAL)).into();
    for (found, expected) in found.iter().zip([1.0, 1.1, 1.2, 1.4, 1.4]) {
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }
    assert!(special.new_part(old, 9 * GLOBAL).is_none());
}

#[test]
fn further_copies_and_padding_are_new() {
    // Heads 01--23-- of two channels each: only those of the padding are new.
    let plan =
        job_plan(json!({"operator": "ZeroWidth"}), json!({"numAttentionHeads": 8, "numKeyValueHeads": 2}));
    let plan = &plan.stages[1];
    let growth_crds::plan::StageStart::Growth(growth) = &plan.start else { panic!() };
    let layout = ParameterLayout::new(&plan.model);
    let parts = new_parts(growth, plan.model.head_dim, &layout);
    let of = |name: &str| &parts[layout.position(&format!("model.layers.1.{name}.weight")).unwrap()];
    let NewPart::Elements(queries) = of("self_attn.q_proj") else { panic!() };
    let heads: Vec<bool> = queries.rows.chunks(6).map(|head| head[0]).collect();
    assert_eq!(heads, [false, false, true, true, false, false, true, true]);
    assert!(queries.rows.chunks(6).all(|head| head.iter().all(|row| *row == head[0])));
    let NewPart::Elements(output) = of("self_attn.o_proj") else { panic!() };
    assert_eq!((&output.columns, output.rows.contains(&true)), (&queries.rows, false));
    for unchanged in ["self_attn.k_proj", "mlp.up_proj", "input_layernorm"] {
        assert_eq!(*of(unchanged), NewPart::Nothing, "{unchanged}");
    }
}

#[test]
fn a_restarted_schedule_begins_at_zero_and_rises_linearly() {
    // Check 12 of the acceptance checks: 0, then linear, the maximum at the end of the warm-up, then the cosine.
    let plan = grown(json!({"operator": "Stack", "factor": 2}));
    let training = &plan.training;
    let (peak, end) = (training.adam_w.learning_rate, 10 * GLOBAL);
    let at = |tokens: u64| stage_learning_rate(training, tokens);
    assert_eq!([at(0), at(GLOBAL), at(2 * GLOBAL)], [0.0, 0.5 * peak, peak]);
    let middle = peak * (0.1 + 0.9 * 0.5);
    assert!((at(6 * GLOBAL) / middle - 1.0).abs() < 1e-12 && (at(end) / (0.1 * peak) - 1.0).abs() < 1e-12);
}

#[test]
fn a_continued_schedule_is_one_schedule() {
    let plans = job_plan(json!({"operator": "Stack", "factor": 2, "schedule": "Continue"}), json!({})).stages;
    let (small, large) = (&plans[0].training, &plans[1].training);
    assert_eq!(small.schedule, large.schedule);
    let peak = large.adam_w.learning_rate;
    // The cosine of 20 steps after a warm-up of two: the same rate on both sides of the growth.
    let closed =
        |step: f64| peak * (0.1 + 0.9 * 0.5 * (1.0 + (std::f64::consts::PI * (step - 2.0) / 18.0).cos()));
    for step in 2..=20u64 {
        let tokens = step * GLOBAL;
        let found = match tokens.checked_sub(10 * GLOBAL) {
            Some(own) => stage_learning_rate(large, own),
            None => stage_learning_rate(small, tokens),
        };
        assert!((found / closed(step as f64) - 1.0).abs() < 1e-12, "step {step}: {found}");
    }
    assert_eq!(stage_learning_rate(small, 10 * GLOBAL), stage_learning_rate(large, 0));
}

#[test]
fn a_second_warm_up_rises_to_the_schedule() {
    let growth =
        json!({"operator": "Stack", "factor": 2, "schedule": "Continue", "rewarmTokens": 4 * GLOBAL});
    let plan = grown(growth);
    let of_schedule = |steps: u64| {
        learning_rate(&plan.training.schedule, plan.training.adam_w.learning_rate, (10 + steps) * GLOBAL)
    };
    for (steps, share) in [(0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0), (7, 1.0), (10, 1.0)] {
        let found = stage_learning_rate(&plan.training, steps * GLOBAL);
        assert!((found - share * of_schedule(steps)).abs() < 1e-15, "{steps}: {found}");
    }
}

proptest! {
    #[test]
    fn every_sample_is_read_once_whatever_the_sizes(
        micro in prop::sample::select(vec![1u64, 2, 4]), more in 1u64..4, ranks in prop::sample::select(vec![1usize, 2, 4]),
        steps in 1u64..5,
    ) {
        // Check 13: the cursor is exact in tokens over a growth with other batches and over any number of ranks.
        let mut plans = job_plan(json!({"operator": "Stack", "factor": 2}), json!({})).stages;
        plans[1].training.micro_batch_tokens = micro * SEQUENCE;
        plans[1].training.global_batch_tokens = micro * 4 * more * SEQUENCE;
        let mut read = Vec::new();
        for (plan, ranks) in plans.iter().zip([1, ranks]) {
            let global = plan.training.global_batch_tokens;
            let steps = if plan.index == 0 { plan.steps } else { steps };
            for step in 0..steps {
                for rank in 0..ranks {
                    let own = engine_of(plan, rank, ranks).own_tokens();
                    let first = first_sample(plan, step * global, own.start as u64);
                    read.extend((0..own.len() as u64 / SEQUENCE).map(|sample| first + sample));
                }
            }
        }
        let expected: Vec<u64> = (0..read.len() as u64).collect();
        prop_assert_eq!(read, expected);
    }
}

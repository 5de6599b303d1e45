//! Jobs that grow step by step: frozen layers keep their bits, one schedule runs over a growth, on one rank and on two.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, STEPS, read_json, stderr};
use growth_trainer::checkpoint::HuggingFaceFolder;
use growth_trainer::model::layout::ParameterLayout;
use growth_trainer::storage::{Storage, StorageOptions};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Tokens of a step and of a stage of the job.
const GLOBAL: u64 = 512;
const TOKENS: u64 = STEPS * GLOBAL;

/// The stages of MSLT: 2, 4, 6 layers; the last one unfreezes half-way.
fn mslt() -> String {
    let large = "  - name: large\n    growth: {operator: Stack, factor: 2}\n    tokens: 20480\n";
    assert!(JOB.contains(large));
    let stage = |name: &str, layers: &str, more: &str| {
        format!(
            "  - name: {name}\n    growth: {{operator: LayerMap, layerMap: {{layers: {layers}}}, freeze: SourceButHead{more}}}\n    \
             tokens: 20480\n"
        )
    };
    let stages =
        stage("large", "[0, 1, 0, 1]", "") + &stage("huge", "[0, 1, 2, 3, 2, 3]", ", freezeTokens: 10240");
    JOB.replace(large, &stages)
}

/// The tensors of a checkpoint as bits, by name.
fn tensors(folder: &Path) -> BTreeMap<String, Vec<u32>> {
    let storage = Storage::open(&format!("file://{}", folder.display()), &StorageOptions::default()).unwrap();
    let folder = HuggingFaceFolder::open(&storage).unwrap();
    let parameters = folder.load().unwrap().parameters;
    let layout = ParameterLayout::new(folder.config());
    let bits = |range: Range<usize>| parameters[range].iter().map(|number| number.to_bits()).collect();
    layout.tensors().iter().map(|tensor| (tensor.name.clone(), bits(tensor.range()))).collect()
}

fn last(folder: &Folder, stage: &str) -> BTreeMap<String, Vec<u32>> {
    folder.final_state(stage);
    tensors(&folder.checkpoints(stage).pop().unwrap())
}

/// Learning rates of a stage, step by step.
fn rates(folder: &Folder, stage: &str) -> Vec<f64> {
    let history = read_json(&folder.checkpoints(stage).pop().unwrap().join("history.json"));
    let steps = history["steps"].as_array().unwrap();
    let rates: Vec<f64> = steps.iter().map(|step| step["learningRate"].as_f64().unwrap()).collect();
    assert_eq!(rates.len() as u64, STEPS, "{stage}");
    rates
}

#[test]
fn what_is_frozen_keeps_its_bits_over_a_stage() {
    let folder = Folder::new(&mslt());
    folder.run_ok(&["run", "job.yaml", "--quiet"]);
    let (small, large, huge) = (last(&folder, "small"), last(&folder, "large"), last(&folder, "huge"));
    for (name, old) in &small {
        let trains = name == "model.norm.weight" || name == "lm_head.weight";
        assert_eq!(large[name] != *old, trains, "{name}");
    }
    let of_layer = |model: &BTreeMap<String, Vec<u32>>, layer: u32, part: &str| {
        model[&format!("model.layers.{layer}.{part}.weight")].clone()
    };
    for part in ["self_attn.q_proj", "mlp.down_proj", "input_layernorm"] {
        assert!(of_layer(&large, 2, part) != of_layer(&small, 0, part), "{part}");
        // The second half of the last stage trains everything.
        assert!(of_layer(&huge, 0, part) != of_layer(&large, 0, part), "{part}");
    }
    let two = Folder::new(&mslt());
    let output = two.run(&["run", "job.yaml", "--quiet", "--ranks", "2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(two.final_state("huge"), folder.final_state("huge"));
}

#[test]
fn one_schedule_runs_over_a_growth() {
    let job = JOB.replace(
        "growth: {operator: Stack, factor: 2}",
        "growth: {operator: Stack, factor: 2, schedule: Continue}",
    );
    let folder = Folder::new(&job);
    folder.run_ok(&["run", "job.yaml", "--quiet"]);
    let found = [rates(&folder, "small"), rates(&folder, "large")].concat();
    let (warmup, end) = (2048.0, 2.0 * TOKENS as f64);
    for (step, rate) in found.iter().enumerate() {
        let tokens = step as f64 * GLOBAL as f64;
        let share = match tokens < warmup {
            true => tokens / warmup,
            false => 0.1 + 0.45 * (1.0 + (std::f64::consts::PI * (tokens - warmup) / (end - warmup)).cos()),
        };
        assert!((rate - 3e-3 * share).abs() < 1e-15, "step {step}: {rate}");
    }
}

#[test]
fn a_schedule_that_restarts_begins_at_zero_again() {
    let folder = Folder::new(JOB);
    folder.run_ok(&["run", "job.yaml", "--quiet"]);
    let (small, large) = (rates(&folder, "small"), rates(&folder, "large"));
    assert_eq!(small, large);
    let begin: Vec<f64> = [0.0, 0.25, 0.5, 0.75, 1.0].iter().map(|share| 3e-3 * share).collect();
    assert_eq!(large[..5], begin);
}

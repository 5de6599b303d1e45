//! A comparison from its spec to its results, with the real program: equal FLOPs, a base trained once, the bits of
//! ordinary jobs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, read_json, stderr};
use serde_json::Value;
use std::collections::BTreeMap;

/// A target of four layers, from scratch and out of two: by two recipes that share their base, with two seeds.
const SPEC: &str = "\
kind: GrowthComparison
name: tiny
model: {numHiddenLayers: 4, hiddenSize: 32, intermediateSize: 80, numAttentionHeads: 4, numKeyValueHeads: 2}
data:
  train:
  - uri: file://./text/*.txt
  holdOutPercent: 10
  tokenizer: {train: {vocabSize: 320}}
storage: {uri: \"file://./runs\"}
training:
  sequenceLength: 32
  globalBatchTokens: 512
  optimizer: {adamW: {learningRate: 3.0e-3}}
  schedule: {cosine: {warmupTokens: 1024}}
evaluation: {everyTokens: 2048, tokens: 1024}
checkpoint: {keepLast: 2}
scratchTokens: 12288
seeds: [1, 2]
recipes:
- name: halves
  base:
    model: {numHiddenLayers: 2}
    tokens: 4096
    training: {schedule: {constant: {warmupTokens: 1024}}}
  growth: {operator: Interleave, factor: 2}
- name: stack
  base:
    model: {numHiddenLayers: 2}
    tokens: 4096
    training: {schedule: {constant: {warmupTokens: 1024}}}
  growth: {operator: Stack, factor: 2}
";

fn with_spec(spec: &str) -> Folder {
    let folder = Folder::new(JOB);
    std::fs::write(folder.path("spec.yaml"), spec).unwrap();
    folder
}

/// Content of every file below the storage that is a checkpoint's manifest, by path.
fn manifests(folder: &Folder) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for job in std::fs::read_dir(folder.path("runs")).unwrap() {
        let stages = job.unwrap().path().join("checkpoints");
        for stage in std::fs::read_dir(stages).into_iter().flatten() {
            for checkpoint in std::fs::read_dir(stage.unwrap().path()).unwrap() {
                let file = checkpoint.unwrap().path().join("manifest.json");
                let name = file.strip_prefix(folder.path("runs")).unwrap().display().to_string();
                found.insert(name, read_json(&file));
            }
        }
    }
    found
}

/// State digest of the last checkpoint of a stage.
fn digest(folder: &Folder, job: &str, stage: &str) -> String {
    let prefix = format!("{job}/checkpoints/{stage}/");
    let found = manifests(folder).into_iter().rfind(|(name, _)| name.starts_with(&prefix));
    let (_, manifest) = found.expect("the stage has a checkpoint");
    manifest["digest"].as_str().unwrap().to_owned()
}

fn base_jobs(folder: &Folder) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path("runs")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("tiny-base-")).collect();
    names.sort();
    names
}

#[test]
fn recipes_and_scratch_are_trained_at_equal_flops_and_compared() {
    let folder = with_spec(SPEC);
    let report: Value = serde_json::from_str(&folder.run_ok(&["compare", "spec.yaml", "--json"])).unwrap();
    let recipes = report["recipes"].as_array().unwrap();
    let names: Vec<&str> = recipes.iter().map(|recipe| recipe["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["scratch", "stack", "halves"], "scratch, the paper's operators, others");
    assert_eq!(recipes[1]["paperName"], "direct-D");

    let budget = report["budgetFlops"].as_f64().unwrap();
    let step = budget / (12288.0 / 512.0);
    for recipe in recipes {
        let flops = recipe["flops"].as_f64().unwrap();
        assert!((flops - budget).abs() <= 0.5 * step * 1.000_001, "{flops} of {budget}");
        assert_eq!(recipe["finalLoss"]["seeds"], 2);
        for run in recipe["runs"].as_array().unwrap() {
            let last = run["curves"].as_array().unwrap().last().unwrap()["points"]
                .as_array()
                .unwrap()
                .last()
                .unwrap();
            assert_eq!(last["loss"], run["finalLoss"]);
            assert!(
                (last["flops"].as_f64().unwrap() / flops - 1.0).abs() < 1e-9,
                "the curve ends at its FLOPs"
            );
        }
    }
    assert!(recipes[0]["speedup"].is_null() || recipes[0]["speedup"]["mean"] == 0.0);
    for recipe in &recipes[1..] {
        assert!(recipe["speedup"]["mean"].as_f64().unwrap().is_finite());
        assert!(recipe["maxLogitDifference"].as_f64().unwrap() > 0.0);
        assert!(recipe["lossAfterGrowth"]["mean"].as_f64() > recipe["lossBeforeGrowth"]["mean"].as_f64());
        assert!(recipe["baseFlopsShare"].as_f64().unwrap() > 0.1);
    }
    for file in ["comparison.md", "comparison.json", "loss-vs-flops.svg", "final-loss.svg"] {
        assert!(folder.path("runs/tiny").join(file).exists(), "{file}");
    }

    // Each base was trained once a seed and copied to both recipes; one dataset serves all.
    let bases = base_jobs(&folder);
    assert_eq!(bases.len(), 2, "{bases:?}");
    for (base, seed) in bases.iter().zip([1, 2]) {
        let trained = digest(&folder, base, "base");
        assert_eq!(digest(&folder, &format!("tiny-stack-s{seed}"), "base"), trained);
        assert_eq!(digest(&folder, &format!("tiny-halves-s{seed}"), "base"), trained);
        assert!(!folder.path(&format!("runs/tiny-stack-s{seed}/attempts/base")).exists());
    }
    assert_eq!(std::fs::read_dir(folder.path("runs/data")).unwrap().count(), 1);

    // Once more: nothing is done, and the results are the same.
    let before = manifests(&folder);
    let again: Value = serde_json::from_str(&folder.run_ok(&["compare", "spec.yaml", "--json"])).unwrap();
    assert_eq!(manifests(&folder), before);
    assert_eq!(again, report);
}

#[test]
fn jobs_written_for_a_cluster_end_in_the_bits_of_the_comparison() {
    let one_seed = SPEC.replace("seeds: [1, 2]", "seeds: [2]");
    let folder = with_spec(&one_seed);
    folder.run_ok(&["compare", "spec.yaml", "--jobs", "2"]);
    folder.run_ok(&["compare", "spec.yaml", "--write-jobs", "jobs"]);
    let base = base_jobs(&folder).remove(0);
    let moved = |name: &str, change: &dyn Fn(String) -> String| {
        let job = std::fs::read_to_string(folder.path(&format!("jobs/{name}.yaml"))).unwrap();
        assert!(job.contains("./runs"), "{job}");
        std::fs::write(folder.path("elsewhere.yaml"), change(job.replace("./runs", "./elsewhere"))).unwrap();
        folder.run(&["run", "elsewhere.yaml"])
    };
    let as_written = |name: &str| moved(name, &|job| job);
    let ends_in_the_same_bits = || {
        let stage = folder.path("elsewhere/tiny-stack-s2/checkpoints/grown");
        let last =
            std::fs::read_dir(stage).unwrap().map(|checkpoint| checkpoint.unwrap().path()).max().unwrap();
        let reached = read_json(&last.join("manifest.json"));
        assert_eq!(reached["digest"].as_str().unwrap(), digest(&folder, "tiny-stack-s2", "grown"));
    };

    // Without its base a job says what it waits for; with it, it trains the rest.
    let output = as_written("tiny-stack-s2");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let expected = format!("spec.stages[0].trainedBy: job {base} has not trained its stage base to the end");
    assert!(stderr(&output).contains(&expected), "{}", stderr(&output));
    assert!(as_written(&base).status.success());
    assert!(as_written("tiny-stack-s2").status.success());
    ends_in_the_same_bits();
    assert!(!folder.path("elsewhere/tiny-stack-s2/attempts/base").exists(), "it has trained no base");

    // One that was not trained in the same way is no base.
    let output = moved("tiny-halves-s2", &|job| job.replacen("seed: 2", "seed: 3", 1));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("differs in training"), "{}", stderr(&output));

    // Nor does it matter who trains it.
    std::fs::remove_dir_all(folder.path("elsewhere")).unwrap();
    let alone = |job: String| job.replace(&format!("    trainedBy:\n      job: {base}\n"), "");
    let output = moved("tiny-stack-s2", &alone);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(folder.path("elsewhere/tiny-stack-s2/attempts/base").exists(), "it has trained its own base");
    ends_in_the_same_bits();
    // What a job of the comparison says of itself is what it wrote as a manifest.
    folder.run_ok(&["run", "jobs/tiny-stack-s2.yaml"]);

    // A changed spec does not mix with the runs that are there.
    std::fs::write(folder.path("spec.yaml"), one_seed.replace("tokens: 4096", "tokens: 2048")).unwrap();
    let output = folder.run(&["compare", "spec.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("give the comparison another name"), "{}", stderr(&output));
}

/// The spec with one text replaced must be refused with exit code 2, saying `expected`.
fn refused(folder: &Folder, text: &str, replacement: &str, expected: &[&str]) {
    assert!(SPEC.contains(text), "{text}");
    std::fs::write(folder.path("spec.yaml"), SPEC.replacen(text, replacement, 1)).unwrap();
    let output = folder.run(&["compare", "spec.yaml", "--dry-run"]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{replacement}: {message}");
    for expected in expected {
        assert!(message.contains(expected), "{replacement}: {expected:?} is not in\n{message}");
    }
}

#[test]
fn mistakes_in_the_spec_are_placed() {
    let folder = with_spec(SPEC);
    let refused = |text, replacement, expected: &[&str]| refused(&folder, text, replacement, expected);
    refused(
        "kind: GrowthComparison",
        "kind: GrowthTrainingJob",
        &["spec.yaml:1:1: kind: must be GrowthComparison"],
    );
    refused(
        "growth: {operator: Int",
        "growht: {operator: Int",
        &["spec.yaml:", "recipes[0].growht:", "mean growth?"],
    );
    refused("factor: 2}\n- name", "factr: 2}\n- name", &["recipes[0].growth.factr:", "did you mean factor?"]);
    refused(
        "globalBatchTokens: 512",
        "globalBatchTokens: 500",
        &["spec.yaml:12:", ": training.globalBatchTokens:"],
    );
    refused("sequenceLength: 32", "sequenceLength: 32\n  seed: 3", &["training.seed: is not a field"]);
    refused("scratchTokens: 12288", "flops: -1", &["flops: no budget"]);
    refused("scratchTokens: 12288\n", "", &["exactly one of scratchTokens and flops"]);
    refused("seeds: [1, 2]", "seeds: [1, 1]", &["spec.yaml:18:12:", "seeds[1]: stands here twice"]);
    refused("name: halves", "name: stack", &["recipes[1].name: another recipe"]);
    refused("name: halves", "name: scratch", &["recipes[0].name: scratch and base"]);
    refused(
        "name: halves",
        "name: a-name-that-goes-on-and-on-and-on",
        &["recipes[0].name: its job tiny-a-name"],
    );
    refused(
        "factor: 2}\n- name",
        "factor: 3}\n- name",
        &["recipes[0]: it ends with num_hidden_layers 6, but model has 4"],
    );
    refused("tokens: 4096", "tokens: 40960", &["spec.yaml:", "recipes[0].base.tokens:", "of a budget of"]);
    refused(
        "constant: {warmupTokens: 1024}",
        "constant: {warmupTokens: 9999}",
        &["recipes[0].base.training.schedule.constant.warmupTokens: a warm-up"],
    );
    refused(
        "growth: {operator: Interleave, factor: 2}",
        "growths: [{growth: {operator: Stack, factor: 2}, tokens: 512}]",
        &["recipes[0].growths[0].tokens: the last one trains what the budget leaves"],
    );
}

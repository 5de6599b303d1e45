//! Input that cannot work gets one clear error, with its field and its line, before any work, and exit code 2.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, stderr};

/// Runs the job with one text replaced by another; it must fail with exit code 2, say `expected`, and write nothing.
fn refused(text: &str, replacement: &str, expected: &[&str]) {
    assert!(JOB.contains(text), "the job contains {text:?}");
    let folder = Folder::new(&JOB.replacen(text, replacement, 1));
    let output = folder.run(&["run", "job.yaml"]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{replacement}: {message}");
    for expected in expected {
        assert!(message.contains(expected), "{replacement}: {expected:?} is not in\n{message}");
    }
    assert!(!folder.path("runs/tiny/checkpoints").exists(), "{replacement}: nothing was trained");
}

#[test]
fn mistakes_in_the_manifest_are_placed() {
    refused(
        "numKeyValueHeads: 2",
        "numKeyValueHead: 2",
        &["job.yaml:5:", "spec.model.numKeyValueHead:", "did you mean numKeyValueHeads?"],
    );
    refused(
        "numKeyValueHeads: 2",
        "numKeyValueHeads: 3",
        &["job.yaml:5:", "spec.model", "numKeyValueHeads must divide"],
    );
    refused("hiddenSize: 32", "hiddenSize: thirty", &["job.yaml:5:", "spec.model.hiddenSize:", "integer"]);
    refused("hiddenSize: 32", "hiddenSize: 0", &["spec.model.hiddenSize:"]);
    refused(
        "globalBatchTokens: 512",
        "globalBatchTokens: 500",
        &["job.yaml:14:", "spec.training.globalBatchTokens:"],
    );
    refused(
        "microBatchTokens: 128",
        "microBatchTokens: 100",
        &["job.yaml:15:", "spec.training.microBatchTokens:"],
    );
    refused("tokens: 20480\n  - name: large", "tokens: 10X\n  - name: large", &["spec.stages[0].tokens:"]);
    refused("factor: 2", "factor: 1", &["spec.stages[1].growth.factor:"]);
    refused(
        "operator: Stack, factor: 2",
        "operator: LayerMap, layerMap: {layers: [0, 5]}",
        &["spec.stages[1].growth", "5"],
    );
    refused("  - name: large\n", "  - name: small\n", &["spec.stages[1].name:"]);
    refused("uri: \"file://./runs\"", "uri: \"ftp://x\"", &["job.yaml:11:", "spec.storage.uri:"]);
    refused("kind: GrowthTrainingJob", "kind: Job", &["kind", "GrowthTrainingJob"]);
    refused("spec:", "spec: [", &["job.yaml:", "YAML"]);
}

#[test]
fn mistakes_in_the_data_name_the_source() {
    refused("file://./text/*.txt", "file://./texts/*.txt", &["spec.data.train[0].uri", "texts"]);
    refused(
        "holdOutPercent: 10",
        "validation: [{uri: \"file://./none.txt\"}]",
        &["spec.data.validation[0].uri", "none.txt"],
    );
    refused(
        "tokenizer: {train: {vocabSize: 320}}",
        "tokenizer: {uri: \"file://./tokenizer.json\"}",
        &["spec: vocabSize is missing", "data.tokenizer.uri"],
    );
    refused("sequenceLength: 32", "sequenceLength: 64\n    precision: float16", &["spec.training.precision"]);
}

#[test]
fn a_job_file_that_is_missing_is_named() {
    let folder = Folder::new(JOB);
    let output = folder.run(&["run", "other.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("other.yaml: cannot be read"), "{}", stderr(&output));
}

#[test]
fn what_may_not_change_is_refused_and_what_may_goes_on() {
    let folder = Folder::new(JOB.split("  - name: large").next().unwrap());
    folder.run_ok(&["run", "job.yaml"]);
    folder.write_job(&JOB.replace("seed: 7", "seed: 8"));
    let output = folder.run(&["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("spec.training"), "{}", stderr(&output));
    // A stage may be appended, and retention may change.
    folder.write_job(&JOB.replace("keepLast: 2", "keepLast: 1"));
    folder.run_ok(&["run", "job.yaml"]);
    assert_eq!(folder.checkpoints("large").len(), 1);
}

#[test]
fn a_tokenizer_that_does_not_fit_the_model_is_refused() {
    let folder = Folder::new(JOB);
    folder.run_ok(&["data", "prepare", "job.yaml"]);
    let data = std::fs::read_dir(folder.path("runs/data")).unwrap().next().unwrap().unwrap().path();
    std::fs::copy(data.join("tokenizer.json"), folder.path("tokenizer.json")).unwrap();
    let job = JOB
        .replace("{train: {vocabSize: 320}}", "{uri: \"file://./tokenizer.json\"}")
        .replace("numKeyValueHeads: 2", "numKeyValueHeads: 2, vocabSize: 300")
        .replace("name: tiny", "name: other");
    folder.write_job(&job);
    let output = folder.run(&["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("spec.model.vocabSize"), "{}", stderr(&output));
}

#[test]
fn start_weights_of_another_shape_are_refused() {
    let folder = Folder::new(JOB);
    folder.run_ok(&["init", "job.yaml", "--stage", "small", "--out", "weights"]);
    let fitting = JOB.replace(
        "model: {numHiddenLayers: 2}",
        "model: {numHiddenLayers: 2}\n    initFrom: {uri: \"file://./weights\"}",
    );
    folder.write_job(&fitting.replace("intermediateSize: 80", "intermediateSize: 96"));
    let output = folder.run(&["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let message = stderr(&output);
    assert!(
        message.contains("spec.stages[0].initFrom") && message.contains("intermediate_size"),
        "{message}"
    );

    folder.write_job(&fitting.replace("name: tiny", "name: fits"));
    folder.run_ok(&["run", "job.yaml"]);
}

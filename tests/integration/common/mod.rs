//! What tests of training in a cluster share: a corpus and a small job in the bucket, the trainer on this machine, and
//! the bits of a checkpoint.
#![allow(dead_code, reason = "no test uses all of it")]

#[path = "../../../crds/tests/common/mod.rs"]
mod fixture;
pub mod jobs;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use growth_tests::images::{self, Linking};
use growth_tests::testing::{Environment, TestNamespace};
use growth_tests::workspace;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::{ObjectStore, ObjectStoreExt};
use serde_json::{Value, json};

/// The image of a program as it is tested, for the cluster.
pub fn test_image(program: &str) -> Result<PathBuf> {
    Ok(images::build(program, &workspace().join("target/images"), Linking::Shared)?.path)
}

pub fn s3(environment: &Environment) -> AmazonS3 {
    let s3 = &environment.s3;
    let builder = AmazonS3Builder::new()
        .with_endpoint(&s3.endpoint)
        .with_allow_http(true)
        .with_bucket_name(&s3.bucket)
        .with_region(&s3.region)
        .with_access_key_id(&s3.access_key_id)
        .with_secret_access_key(&s3.secret_access_key);
    builder.build().unwrap()
}

/// Some text that is always there: this project's documents.
pub async fn upload_corpus(environment: &Environment, prefix: &str) -> Result<()> {
    let store = s3(environment);
    for entry in std::fs::read_dir(workspace().join("docs"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "md") {
            let name = path.file_name().unwrap().to_str().unwrap();
            let folder = if name == "performance.md" { "held-out" } else { "corpus" };
            store.put(&format!("{prefix}/{folder}/{name}").into(), std::fs::read(&path)?.into()).await?;
        }
    }
    Ok(())
}

/// One stage of 40 steps with a checkpoint every second step. `runs` is where the job keeps its own.
pub fn job(environment: &Environment, prefix: &str, runs: &str, endpoint: &str) -> Value {
    let s3 = &environment.s3;
    let mut job = fixture::example();
    let spec = &mut job["spec"];
    spec["data"] = json!({
        "train": [{"uri": format!("s3://{}/{prefix}/corpus/*.md", s3.bucket)}],
        "validation": [{"uri": format!("s3://{}/{prefix}/held-out/*.md", s3.bucket)}],
        "tokenizer": {"train": {"vocabSize": 512, "sampleBytes": "1M"}},
    });
    spec["storage"] = json!({
        "uri": format!("s3://{}/{prefix}/{runs}", s3.bucket),
        "endpoint": endpoint,
        "region": s3.region,
        "credentialsSecretRef": {"name": "s3-keys"},
    });
    spec["training"] =
        json!({"sequenceLength": 64, "globalBatchTokens": 512, "microBatchTokens": 128, "seed": 7});
    spec["evaluation"] = json!({"tokens": 512});
    spec["checkpoint"] = json!({"everyTokens": 1024, "keepLast": 2});
    spec["stages"] = json!([{"name": "small", "model": {"numHiddenLayers": 2}, "tokens": 20480}]);
    job
}

/// The trainer on this machine, as a user runs it.
pub fn trainer(environment: &Environment, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(workspace().join("target/release/growth-trainer"));
    command
        .args(arguments)
        .env("AWS_ENDPOINT_URL", &environment.s3.endpoint)
        .env("AWS_REGION", &environment.s3.region);
    command.envs(environment.s3.credentials());
    let output = command.output().context("cargo build --release -p growth-trainer")?;
    if !output.status.success() {
        bail!("growth-trainer {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

pub fn write(folder: &Path, name: &str, content: &Value) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content.to_string()).unwrap();
    path
}

/// The address of a stage's last checkpoint, of the run that keeps its own below `runs`.
pub async fn newest_checkpoint(namespace: &TestNamespace, runs: &str, stage: &str) -> Result<String> {
    let environment = &namespace.environment;
    let folder = format!("{}/{runs}/tiny/checkpoints/{stage}", namespace.name);
    let listing = s3(environment).list_with_delimiter(Some(&folder.into())).await?;
    let newest = listing.common_prefixes.iter().max().context("no checkpoint")?;
    Ok(format!("s3://{}/{newest}", environment.s3.bucket))
}

/// The bytes of everything in a checkpoint that training has computed.
pub async fn tensors(environment: &Environment, checkpoint: &str) -> Result<BTreeMap<String, Vec<u8>>> {
    let store = s3(environment);
    let prefix = checkpoint.strip_prefix(&format!("s3://{}/", environment.s3.bucket)).unwrap();
    let objects: Vec<_> = store.list(Some(&prefix.into())).try_collect().await?;
    let mut found = BTreeMap::new();
    for object in objects.into_iter().filter(|object| object.location.as_ref().ends_with(".safetensors")) {
        let bytes = store.get(&object.location).await?.bytes().await?.to_vec();
        let name = object.location.as_ref().trim_start_matches(prefix).to_string();
        found.insert(name, bytes);
    }
    Ok(found)
}

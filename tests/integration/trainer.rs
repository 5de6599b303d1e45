//! The trainer's image in restricted pods, with its data and checkpoints on a real S3 server, which also fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use common::{job, newest_checkpoint, tensors, trainer, upload_corpus, write};
use growth_tests::images::{self, Linking};
use growth_tests::s3_proxy::{Fault, FaultKind};
use growth_tests::testing::{Environment, TestNamespace};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use serde_json::{Value, json};

/// At most, for one pod: image start, data, 40 steps, 20 checkpoints, with faults.
const POD_TIMEOUT: Duration = Duration::from_secs(180);

/// A pod as the operator will make it: restricted, without a token, credentials from the Secret only.
fn pod(environment: &Environment, name: &str, files: &str, arguments: &[&str]) -> Value {
    json!({
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "OnFailure",
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "trainer",
                "image": environment.image("growth-trainer"),
                "imagePullPolicy": "IfNotPresent",
                "args": arguments,
                "envFrom": [{"secretRef": {"name": "s3-keys"}}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "job", "mountPath": "/job", "readOnly": true}],
            }],
            "volumes": [{"name": "job", "configMap": {"name": files}}],
        },
    })
}

/// Prepares the data and trains in pods. Returns the address of the last checkpoint.
async fn train_in_pods(namespace: &TestNamespace, runs: &str) -> Result<String> {
    let environment = &namespace.environment;
    let folder = tempfile::tempdir()?;
    let job = job(environment, &namespace.name, runs, &environment.s3.endpoint_in_cluster);
    let job_file = write(folder.path(), "job.json", &job);
    let plan_file = folder.path().join("plan.json");
    trainer(
        environment,
        &["plan", job_file.to_str().unwrap(), "--stage", "small", "--output", plan_file.to_str().unwrap()],
    )?;
    let files =
        BTreeMap::from([("job.json", job.to_string()), ("plan.json", std::fs::read_to_string(plan_file)?)]);
    namespace.create::<ConfigMap>(json!({"metadata": {"name": runs}, "data": files})).await?;

    let data = format!("{runs}-data");
    let prepare = pod(environment, &data, runs, &["data", "prepare", "/job/job.json"]);
    namespace.create::<Pod>(prepare).await?;
    namespace.pod_succeeds(&data, POD_TIMEOUT).await?;

    let stage = format!("{runs}-small");
    let train = pod(environment, &stage, runs, &["train", "/job/plan.json", "--threads", "1"]);
    namespace.create::<Pod>(train).await?;
    namespace.pod_succeeds(&stage, POD_TIMEOUT).await?;

    newest_checkpoint(namespace, runs, "small").await
}

/// What S3 does to its clients on a bad day, and worse. Only this run's objects are concerned.
fn faults(prefix: &str) -> Vec<Fault> {
    let here = |kind| Fault::always(kind).path(prefix);
    vec![
        // The commit of a checkpoint succeeds and nobody hears of it.
        here(FaultKind::LoseAnswer).path("manifest.json").method("PUT").times(3),
        here(FaultKind::Status { code: 503 }).percent(10),
        here(FaultKind::Drop).percent(5),
        here(FaultKind::CutUpload { bytes: 1000 }).method("PUT").percent(10),
        here(FaultKind::CutDownload { bytes: 1000 }).method("GET").percent(10),
        here(FaultKind::LoseAnswer).method("PUT").percent(5),
        here(FaultKind::Delay { milliseconds: 200 }).percent(10),
    ]
}

#[test]
#[ignore = "long: compiles the dependencies of the program again"]
fn the_image_for_users_is_small_and_reproducible() -> Result<()> {
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
    let first = images::build("growth-trainer", folders[0].path(), Linking::Static)?;
    let second = images::build("growth-trainer", folders[1].path(), Linking::Static)?;
    assert_eq!(first.digest, second.digest);
    assert!(first.digest.starts_with("sha256:"), "{}", first.digest);
    let root = folders[0].path().join("growth-trainer.files/rootfs/growth-trainer");
    let program = root.join("usr/bin/growth-trainer");
    assert!(program.metadata()?.len() < 60_000_000, "{} bytes", program.metadata()?.len());
    let sbom: Value =
        serde_json::from_slice(&std::fs::read(root.join("usr/share/sbom/growth-trainer.cdx.json"))?)?;
    let names: Vec<_> =
        sbom["components"].as_array().unwrap().iter().map(|component| &component["name"]).collect();
    assert!(names.contains(&&json!("object_store")) && !names.contains(&&json!("proptest")), "{names:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn trains_in_restricted_pods_on_s3_and_loses_nothing_to_faults() -> Result<()> {
    let environment = Environment::connect().await?;
    if let Some(cluster) = &environment.cluster {
        cluster.load_image(&common::test_image("growth-trainer")?)?;
    }
    environment
        .in_namespace("trainer", async |namespace| {
            let environment = &namespace.environment;
            let secret = BTreeMap::from(environment.s3.credentials());
            namespace
                .create::<Secret>(json!({"metadata": {"name": "s3-keys"}, "stringData": secret}))
                .await?;
            upload_corpus(environment, &namespace.name).await?;

            let calm = train_in_pods(namespace, "calm").await?;
            // The checkpoint in the bucket opens on this machine.
            trainer(environment, &["checkpoint", "verify", &calm])?;
            let text = trainer(
                environment,
                &["generate", "--checkpoint", &calm, "--prompt", "The ", "--tokens", "8"],
            )?;
            assert!(text.starts_with("The "), "{text}");

            // The same run on this machine, against the same bucket, computes the same.
            let folder = tempfile::tempdir()?;
            let local = job(environment, &namespace.name, "local", &environment.s3.endpoint);
            let file = write(folder.path(), "job.json", &local);
            trainer(environment, &["run", file.to_str().unwrap(), "--quiet"])?;
            let local = calm.replace("/calm/", "/local/");
            let expected = tensors(environment, &calm).await?;
            assert!(expected.len() >= 2, "{:?}", expected.keys());
            assert!(
                expected == tensors(environment, &local).await?,
                "the run on this machine has other bits"
            );

            let Some(cluster) = &environment.cluster else {
                eprintln!("left out: faults of S3, which an external cluster's cannot be told to have");
                return Ok(());
            };
            let before = cluster.s3_faults_injected();
            cluster.set_s3_faults(&faults(&format!("{}/stormy", namespace.name)))?;
            let stormy = train_in_pods(namespace, "stormy").await;
            cluster.set_s3_faults(&[])?;
            let stormy = stormy?;
            let injected = cluster.s3_faults_injected() - before;
            eprintln!("{injected} faults injected");
            assert!(injected > 20, "only {injected} faults: the run has not met them");
            assert_eq!(stormy.replace("/stormy/", "/calm/"), calm);
            assert!(expected == tensors(environment, &stormy).await?, "the run with faults has other bits");
            trainer(environment, &["checkpoint", "verify", &stormy])?;

            // Four ranks write each checkpoint together, on a day as bad.
            let gang = job(environment, &namespace.name, "gang", &environment.s3.endpoint);
            let file = write(folder.path(), "gang.json", &gang);
            cluster.set_s3_faults(&faults(&format!("{}/gang", namespace.name)))?;
            let run = trainer(environment, &["run", file.to_str().unwrap(), "--quiet", "--ranks", "4"]);
            cluster.set_s3_faults(&[])?;
            run?;
            let gang = newest_checkpoint(namespace, "gang", "small").await?;
            assert!(expected == tensors(environment, &gang).await?, "four ranks with faults have other bits");
            trainer(environment, &["checkpoint", "verify", &gang]).map(drop)
        })
        .await
}

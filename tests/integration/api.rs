//! The CRD on a real API server, mostly through `kubectl`, as users meet it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../crds/tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use common::rules::{Case, creation_cases, update_cases};
use common::{Edit, edit, example};
use growth_tests::testing::{Environment, TestNamespace};
use growth_tests::workspace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::runtime::wait::{await_condition, conditions};
use serde_json::{Value, json};

/// The cluster with the CRD of this work tree, applied the way users do: client side, so that the size limit on
/// `last-applied-configuration` holds.
async fn with_crd() -> Environment {
    // Two clients that create it at once would not both succeed, as with any object.
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = ONE_AT_A_TIME.lock().await;
    let environment = Environment::connect().await.unwrap();
    let file = workspace().join("crds/growthtrainingjobs.yaml");
    environment.kubectl().args(["apply", "--filename", file.to_str().unwrap()]).run().unwrap();
    let api: Api<CustomResourceDefinition> = Api::all(environment.client.clone());
    let established = await_condition(api, "growthtrainingjobs.growth.dev", conditions::is_crd_established());
    tokio::time::timeout(Duration::from_secs(30), established).await.unwrap().unwrap();
    environment
}

fn edited(edits: &[Edit]) -> Value {
    let mut object = example();
    edits.iter().for_each(|(path, value)| edit(&mut object, path, value));
    object
}

fn list(items: Vec<Value>) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}

/// Files in a folder and below; not those of `growth-trainer compare`, which no API server reads.
fn manifests(folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_file() {
            files.push(path.to_string_lossy().into_owned());
        } else if !path.ends_with("compare") {
            files.extend(manifests(&path)?);
        }
    }
    Ok(files)
}

/// The API server's refusals of a list of jobs, in its order.
fn refusals(namespace: &TestNamespace, jobs: Vec<Value>) -> Vec<String> {
    let apply = namespace.kubectl().args(["apply", "--dry-run=server", "--filename", "-"]).input(list(jobs));
    let output = apply.output().unwrap();
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    errors.split("Error from server (Invalid)").skip(1).map(String::from).collect()
}

fn assert_each_says_its_message(cases: &[Case], refusals: &[String]) {
    assert_eq!(refusals.len(), cases.len(), "{refusals:#?}");
    for (case, refusal) in cases.iter().zip(refusals) {
        assert!(refusal.contains(case.message), "{}: {refusal}", case.message);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_accepts_and_refuses_on_the_api_server() -> Result<()> {
    with_crd()
        .await
        .in_namespace("rules", async |namespace| {
            let cases = creation_cases();
            // kubectl applies a list one by one, so every case needs a name of its own.
            let named = |number: usize, edits: &[Edit]| {
                let mut job = edited(edits);
                if job["metadata"]["name"] == "tiny" {
                    job["metadata"]["name"] = json!(format!("case-{number}"));
                }
                job
            };
            let accepted =
                cases.iter().enumerate().map(|(number, case)| named(number, &case.accepted)).collect();
            let apply = namespace.kubectl().args(["apply", "--dry-run=server", "--filename", "-"]);
            apply.input(list(accepted)).run()?;

            let refused =
                cases.iter().enumerate().map(|(number, case)| named(number, &case.refused)).collect();
            let refusals = refusals(namespace, refused);
            assert_each_says_its_message(&cases, &refusals);
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_on_changes_accepts_and_refuses_on_the_api_server() -> Result<()> {
    with_crd()
        .await
        .in_namespace("changes", async |namespace| {
            let apply = || namespace.kubectl().args(["apply", "--filename", "-"]);
            apply().input(example().to_string()).run()?;

            let cases = update_cases();
            let accepted = cases.iter().map(|case| edited(&case.accepted)).collect();
            apply().args(["--dry-run=server"]).input(list(accepted)).run()?;

            let refusals = refusals(namespace, cases.iter().map(|case| edited(&case.refused)).collect());
            assert_each_says_its_message(&cases, &refusals);
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_example_is_accepted() -> Result<()> {
    with_crd()
        .await
        .in_namespace("examples", async |namespace| {
            let folder: PathBuf = workspace().join("examples");
            let apply = namespace.kubectl().args(["apply", "--dry-run=server", "--validate=strict"]);
            let files = manifests(&folder)?;
            let said = apply.args(files.iter().flat_map(|file| ["--filename", file.as_str()])).run()?;
            assert_eq!(said.lines().count(), files.len(), "{said}");
            Ok(())
        })
        .await
}

/// What one sees of a job right after `kubectl apply`: defaults, columns, explanations, the scale subresource.
#[tokio::test(flavor = "multi_thread")]
async fn kubectl_shows_defaults_columns_explanations_and_scale() -> Result<()> {
    with_crd()
        .await
        .in_namespace("kubectl", async |namespace| {
            let kubectl = |line: &str| namespace.kubectl().args(line.split(' '));
            kubectl("apply --filename -").input(example().to_string()).run()?;

            let stored: Value = serde_json::from_str(&kubectl("get gtj tiny --output json").run()?)?;
            let defaults = [
                ("/spec/suspend", json!(false)),
                ("/spec/training/optimizer/adamW/beta1", json!(0.9)),
                ("/spec/checkpoint/keepLast", json!(2)),
                ("/spec/stages/1/growth/optimizerState", json!("Reset")),
            ];
            for (path, value) in defaults {
                assert_eq!(stored.pointer(path), Some(&value), "{path} in {stored:#}");
            }

            let table = kubectl("get gtj").run()?;
            let header: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
            assert_eq!(
                header,
                ["NAME", "PHASE", "STAGE", "PROGRESS", "LOSS", "TOKENS/S", "READY", "RESTARTS", "AGE"],
                "{table}"
            );
            assert!(kubectl("get growthtrainingjobs").run()?.contains("tiny"));

            let explained = kubectl("explain gtj.spec.stages").run()?;
            for text in ["growth", "numHiddenLayers", "tokens"] {
                assert!(kubectl("explain gtj.spec.stages --recursive").run()?.contains(text), "{text}");
            }
            assert!(explained.contains("DESCRIPTION") && explained.contains("-required-"), "{explained}");

            kubectl("scale gtj/tiny --replicas=7").run()?;
            assert_eq!(kubectl("get gtj tiny --output jsonpath={.spec.replicas}").run()?, "7");
            let scale: Value =
                serde_json::from_str(&kubectl("get gtj tiny --subresource=scale --output json").run()?)?;
            assert_eq!(scale["spec"]["replicas"], json!(7));
            Ok(())
        })
        .await
}

/// A typing error must not be dropped in silence.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_field_is_named_with_its_path() -> Result<()> {
    with_crd()
        .await
        .in_namespace("unknown", async |namespace| {
            let job = edited(&[("/spec/stages/1/tokenz", json!(1))]).to_string();
            let apply = |validate: &str| {
                let line = ["apply", "--dry-run=server", validate, "--filename", "-"];
                namespace.kubectl().args(line).input(job.clone()).output()
            };
            let strict = apply("--validate=strict")?;
            let said = String::from_utf8_lossy(&strict.stderr).into_owned();
            assert!(!strict.status.success() && said.contains("spec.stages[1].tokenz"), "{said}");

            let warned = apply("--validate=warn")?;
            let said = String::from_utf8_lossy(&warned.stderr).into_owned();
            assert!(warned.status.success(), "{said}");
            assert!(said.contains("Warning: unknown field \"spec.stages[1].tokenz\""), "{said}");
            Ok(())
        })
        .await
}

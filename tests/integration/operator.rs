//! The operator on a real cluster, installed by its chart: a GrowthTrainingJob from `kubectl apply` to Complete.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod common;

use anyhow::Result;
use common::jobs::{
    OPERATOR_NAMESPACE, TIMEOUT, apply, expected, final_tensors, is_in, kill_trainer, kubectl, pod_of,
    submit, trains, two_stages, wait, with_operator,
};
use growth_crds::GrowthTrainingJob;
use growth_crds::plan::GrowthOperator;
use growth_crds::status::Phase;
use growth_tests::testing::{Environment, TestNamespace};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{EvictParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_from_apply_to_complete_and_has_the_bits_of_one_machine() -> Result<()> {
    with_operator()
        .await
        .in_namespace("main-path", async |namespace| {
            submit(namespace, 40, |_| ()).await?;
            let job = wait(namespace, |job| is_in(job, Phase::Complete)).await?;
            assert!(final_tensors(namespace, &job).await? == expected(namespace, 40).await?, "other bits");

            kubectl(namespace, "wait gtj/tiny --for=condition=Complete --timeout=10s")?;
            let table = kubectl(namespace, "get gtj")?;
            assert!(table.contains("Complete") && table.contains("100"), "{table}");
            let described = kubectl(namespace, "describe gtj tiny")?;
            let events = ["DataPrepared", "StageComplete", "StageGrown", "Complete"].map(|event| {
                described.rfind(event).unwrap_or_else(|| panic!("no event {event} in {described}"))
            });
            assert_eq!(events.len(), 4);
            let status = job.status.as_ref().unwrap();
            assert_eq!((status.restarts, status.execution_attempts), (None, Some(4)));
            let growth = status.stages[1].growth.as_ref().unwrap();
            assert_eq!((growth.operator, &*growth.connection_rate), (GrowthOperator::Stack, "2/3"));
            assert!(growth.loss_before.is_some() && growth.loss_after.is_some(), "{growth:?}");
            assert!(described.contains(&format!("has its first checkpoint: {growth}")), "{described}");
            print_calls(namespace)?;
            // Nothing is held after the end, and deleting the job takes its children along; checkpoints stay.
            kubectl(namespace, "delete gtj tiny --cascade=foreground --timeout=60s")?;
            kubectl(namespace, "wait pod --all --for=delete --timeout=60s").map(drop)
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_evicted_suspended_job_whose_operator_dies_ends_in_the_same_bits() -> Result<()> {
    let environment = with_operator().await;
    if environment.cluster.is_none() {
        eprintln!("left out: processes of an external cluster cannot be killed");
        return Ok(());
    }
    environment
        .in_namespace("disturbed", async |namespace| {
            const STEPS: u64 = 1500;
            submit(namespace, STEPS, |_| ()).await?;
            let pods: Api<Pod> = namespace.api();
            wait(namespace, trains(1)).await?;
            kill_trainer(&pod_of(namespace, 1).await?)?;
            wait(namespace, trains(2)).await?;
            pods.evict(&pod_of(namespace, 2).await?.name_any(), &EvictParams::default()).await?;

            wait(namespace, trains(3)).await?;
            let jobs: Api<GrowthTrainingJob> = namespace.api();
            let suspend = |value: bool| Patch::Merge(json!({"spec": {"suspend": value}}));
            jobs.patch("tiny", &PatchParams::default(), &suspend(true)).await?;
            wait(namespace, |job| is_in(job, Phase::Suspended)).await?;
            let held = pods.list(&ListParams::default().labels("growth.dev/work=train")).await?.items;
            let live = held.iter().filter(|pod| {
                let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
                matches!(phase, Some("Running" | "Pending"))
            });
            assert_eq!(live.count(), 0);

            // The operator dies, and is not there while the job is resumed.
            let operator: Api<Pod> = Api::namespaced(environment.client.clone(), OPERATOR_NAMESPACE);
            let labels = ListParams::default().labels("app.kubernetes.io/name=growth-operator");
            for pod in operator.list(&labels).await?.items {
                environment
                    .kubectl()
                    .args(["--namespace", OPERATOR_NAMESPACE, "delete", "pod", &pod.name_any()])
                    .args(["--force", "--grace-period=0"])
                    .run()?;
            }
            jobs.patch("tiny", &PatchParams::default(), &suspend(false)).await?;

            let job = wait(namespace, |job| is_in(job, Phase::Complete)).await?;
            let status = job.status.as_ref().unwrap();
            assert_eq!(status.restarts, Some(1), "only the kill counts: {status:#?}");
            assert!(status.stages[0].attempt.as_ref().unwrap().number >= 4, "{status:#?}");
            assert!(final_tensors(namespace, &job).await? == expected(namespace, STEPS).await?, "other bits");
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_another_job_trains_is_waited_for_and_taken() -> Result<()> {
    let environment = with_operator().await;
    environment
        .in_namespace("trained-by", async |namespace| {
            // The job that waits is there first.
            submit(namespace, 40, |job| job["spec"]["stages"][0]["trainedBy"] = json!({"job": "base"}))
                .await?;
            let why =
                wait_for_message(namespace, "tiny", "Running", "job base, which does not exist").await?;
            assert!(why.starts_with("WaitingForJob"), "{why}");
            let endpoint = &environment.s3.endpoint_in_cluster;
            let mut base = two_stages(&environment, &namespace.name, "runs", endpoint, 40);
            base["metadata"]["name"] = json!("base");
            base["spec"]["stages"].as_array_mut().unwrap().truncate(1);
            apply(namespace, &base)?;

            let job = wait(namespace, |job| is_in(job, Phase::Complete)).await?;
            let status = job.status.as_ref().unwrap();
            assert_eq!(status.execution_attempts, Some(3), "data, growth and the large stage: {status:#?}");
            let labels = "growth.dev/job=tiny,growth.dev/stage=small";
            let pods = namespace.api::<Pod>().list(&ListParams::default().labels(labels)).await?.items;
            assert!(pods.is_empty(), "the small stage had a pod");
            assert!(final_tensors(namespace, &job).await? == expected(namespace, 40).await?, "other bits");
            Ok(())
        })
        .await
}

/// The operator's calls about this namespace, by kind, from the audit log; and none of them failed.
fn print_calls(namespace: &TestNamespace) -> Result<()> {
    let Some(cluster) = &namespace.environment.cluster else { return Ok(()) };
    let log = std::fs::read_to_string(cluster.log("audit")?)?;
    let user = format!("system:serviceaccount:{OPERATOR_NAMESPACE}:growth-operator");
    let mut calls = BTreeMap::<String, usize>::new();
    for line in log.lines().filter(|line| line.contains(&user) && line.contains(&namespace.name)) {
        let call: Value = serde_json::from_str(line)?;
        let text = |pointer: &str| call.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        if text("/objectRef/namespace") != namespace.name || text("/stage") != "ResponseComplete" {
            continue;
        }
        let code = call["responseStatus"]["code"].as_u64().unwrap_or_default();
        let kind = [text("/verb"), text("/objectRef/resource"), text("/objectRef/subresource")].join(" ");
        *calls.entry(format!("{} {code}", kind.trim_end())).or_default() += 1;
    }
    println!("calls of the operator for one job of two stages: {calls:#?}");
    let of = |name: &str| {
        calls.iter().filter(|(kind, _)| kind.starts_with(name)).map(|(_, count)| count).sum::<usize>()
    };
    // docs/operator.md argues for these.
    assert_eq!(of("create jobs"), 4);
    assert!(of("update growthtrainingjobs status") <= 30, "{calls:?}");
    assert!(calls.values().sum::<usize>() <= 50, "{calls:?}");
    Ok(())
}

/// A job of another name, whose pods never come to train.
fn stuck(environment: &Environment, namespace: &TestNamespace, name: &str, template: Value) -> Value {
    let endpoint = &environment.s3.endpoint_in_cluster;
    let mut job = two_stages(environment, &namespace.name, "runs", endpoint, 40);
    job["metadata"]["name"] = json!(name);
    job["spec"]["template"] = template;
    job
}

async fn wait_for_message(
    namespace: &TestNamespace,
    job: &str,
    condition: &str,
    text: &str,
) -> Result<String> {
    let message = |job: &GrowthTrainingJob| {
        let conditions = &job.status.as_ref()?.conditions;
        let found = conditions.iter().find(|found| found.type_ == condition)?;
        found.message.contains(text).then(|| format!("{}: {}", found.reason, found.message))
    };
    let says = |job: Option<&GrowthTrainingJob>| job.and_then(message).is_some();
    let job: GrowthTrainingJob = namespace.wait(job, TIMEOUT, says).await?;
    Ok(message(&job).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_job_from_running_is_said() -> Result<()> {
    let environment = with_operator().await;
    environment
        .in_namespace("trouble", async |namespace| {
            // There is no Secret s3-keys here.
            apply(namespace, &stuck(&environment, namespace, "no-secret", json!({})))?;
            let image =
                json!({"spec": {"containers": [{"name": "trainer", "image": "localhost/nowhere:1"}]}});
            apply(namespace, &stuck(&environment, namespace, "no-image", image))?;
            let large = json!({"spec": {"containers": [
                {"name": "trainer", "resources": {"requests": {"cpu": "1000"}}},
            ]}});
            let mut unschedulable = stuck(&environment, namespace, "no-node", large);
            unschedulable["spec"]["runPolicy"] = json!({"startupDeadlineSeconds": 5});
            apply(namespace, &unschedulable)?;

            wait_for_message(namespace, "no-secret", "Running", "s3-keys").await?;
            let said = wait_for_message(namespace, "no-image", "Running", "localhost/nowhere:1").await?;
            assert!(said.starts_with("ImagePullFailed"), "{said}");
            let said = wait_for_message(namespace, "no-node", "Failed", "Insufficient cpu").await?;
            assert!(said.starts_with("StartupDeadlineExceeded"), "{said}");
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_is_appended_other_edits_are_refused_and_the_object_goes_in_its_time() -> Result<()> {
    let environment = with_operator().await;
    environment
        .in_namespace("life-cycle", async |namespace| {
            submit(namespace, 40, |_| ()).await?;
            wait(namespace, |job| is_in(job, Phase::Training)).await?;
            let jobs: Api<GrowthTrainingJob> = namespace.api();
            let patch =
                async |patch: Value| jobs.patch("tiny", &PatchParams::default(), &Patch::Merge(patch)).await;
            let refused =
                patch(json!({"spec": {"model": {"hiddenSize": 128}}})).await.unwrap_err().to_string();
            assert!(refused.contains("model cannot be changed; create a new job instead"), "{refused}");

            let mut stages = serde_json::to_value(&jobs.get("tiny").await?.spec.stages)?;
            let huge =
                json!({"name": "huge", "growth": {"operator": "Stack", "factor": 2}, "tokens": 5 * 512});
            stages.as_array_mut().unwrap().push(huge);
            patch(json!({"spec": {"stages": stages}})).await?;
            let job = wait(namespace, |job| is_in(job, Phase::Complete)).await?;
            let stages = job.status.unwrap().stages;
            assert_eq!(
                stages.iter().map(|stage| stage.name.as_str()).collect::<Vec<_>>(),
                ["small", "large", "huge"]
            );

            patch(json!({"spec": {"runPolicy": {"ttlSecondsAfterFinished": 1}}})).await?;
            kubectl(namespace, "wait gtj tiny --for=delete --timeout=60s")?;
            kubectl(namespace, "wait job --all --for=delete --timeout=60s")?;
            let checkpoint = stages[2].checkpoint.as_ref().unwrap();
            assert!(
                !common::tensors(&environment, &checkpoint.uri).await?.is_empty(),
                "checkpoints are gone"
            );
            Ok(())
        })
        .await
}

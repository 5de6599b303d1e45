//! Nodes, storage and the control plane fail under a job: it ends in the bits of an undisturbed run, and nothing of it counts
//! as a restart.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod common;

use anyhow::{Context, Result};
use common::jobs::{
    TIMEOUT, ends_as_if_nothing_had_been, is_in, kubectl, kubectl_operator, mend, node_of, own_cluster,
    pod_of, status, submit, trainer_processes, trains, wait,
};
use common::s3;
use futures::TryStreamExt;
use growth_crds::GrowthTrainingJob;
use growth_crds::protocol::CheckpointManifest;
use growth_crds::status::Phase;
use growth_tests::s3_proxy::{Fault, FaultKind};
use growth_tests::testing::{Environment, TestNamespace, within};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use object_store::ObjectStore;
use serde_json::{Value, json};
use std::time::Duration;

/// The small stage takes more than a minute, for it has little of a processor.
fn slowly(job: &mut Value) {
    job["spec"]["stages"][0]["template"] =
        json!({"resources": {"requests": {"cpu": "100m"}, "limits": {"cpu": "150m", "memory": "256Mi"}}});
    job["spec"]["checkpoint"]["keepLast"] = json!(1000);
}

/// When Kubernetes noticed that the node does not answer.
async fn unreachable_since(environment: &Environment, node: &str) -> Result<Timestamp> {
    let node = Api::<Node>::all(environment.client.clone()).get(node).await?;
    let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
    let ready = conditions.into_iter().find(|one| one.type_ == "Ready" && one.status == "Unknown");
    ready.and_then(|one| one.last_transition_time).map(|time| time.0).context("the node is not unreachable")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: tests/run --long"]
async fn nodes_are_lost_drained_and_cut_off() -> Result<()> {
    const STEPS: u64 = 1500;
    let Some((environment, cluster, _alone)) = own_cluster().await else { return Ok(()) };
    environment
        .in_namespace("nodes", async |namespace| {
            // The operator is on n1. Two nodes are enough.
            kubectl(namespace, "cordon n1")?;
            if cluster.nodes() > 2 {
                kubectl(namespace, "cordon n3")?;
            }
            submit(namespace, STEPS, slowly).await?;
            wait(namespace, trains(1)).await?;
            kubectl(namespace, "uncordon n1")?;
            assert_eq!(node_of(&pod_of(namespace, 1).await?), Some("n2"));

            // Lost for good, as far as the job is concerned.
            cluster.kill_node(2)?;
            let job = wait(namespace, trains(2)).await?;
            let started = status(&job).stages[0].attempt.as_ref().unwrap().start_time.as_ref().unwrap().0;
            let seconds = started.as_second() - unreachable_since(&environment, "n2").await?.as_second();
            println!("the next attempt started {seconds} s after the node had become unreachable");
            assert!(seconds <= 60, "{seconds} s");
            assert_eq!(node_of(&pod_of(namespace, 2).await?), Some("n1"));
            cluster.start_node(2).await?;

            // Drained: the pods are evicted, write a checkpoint and go.
            kubectl(
                namespace,
                "drain n1 --pod-selector=growth.dev/job=tiny --delete-emptydir-data --ignore-daemonsets",
            )?;
            wait(namespace, trains(3)).await?;
            kubectl(namespace, "uncordon n1")?;

            // Cut off from the API server, but not from S3: the old attempt trains on beside the new one.
            let old = pod_of(namespace, 3).await?;
            assert_eq!(node_of(&old), Some("n2"));
            cluster.partition_node(2)?;
            wait(namespace, trains(4)).await?;
            assert!(!trainer_processes(&old)?.is_empty(), "the old attempt does not run any more");
            let first = first_commit(namespace, 4).await?;
            within(TIMEOUT, "the fence ends the old attempt", async || {
                Ok(trainer_processes(&old)?.is_empty().then_some(()))
            })
            .await?;
            println!("the old attempt has ended, behind the fence");
            for commit in commits(namespace).await?.iter().filter(|commit| commit.attempt == 3) {
                assert!(commit.committed_at <= first, "attempt 3 commits after attempt 4: {commit:?}");
            }
            cluster.heal_node(2)?;

            let job = ends_as_if_nothing_had_been(namespace, STEPS).await?;
            assert_eq!(status(&job).stages[0].attempt.as_ref().unwrap().number, 4, "{:#?}", status(&job));
            mend(&cluster).await
        })
        .await
}

/// Manifests of the small stage, of all attempts.
async fn commits(namespace: &TestNamespace) -> Result<Vec<CheckpointManifest>> {
    let store = s3(&namespace.environment);
    let folder = format!("{}/runs/tiny/checkpoints/small", namespace.name);
    let objects: Vec<_> = store.list(Some(&folder.into())).try_collect().await?;
    let mut manifests = Vec::new();
    for object in objects.iter().filter(|object| object.location.as_ref().ends_with("/manifest.json")) {
        let bytes = object_store::ObjectStoreExt::get(&store, &object.location).await?.bytes().await?;
        manifests.push(serde_json::from_slice(&bytes)?);
    }
    Ok(manifests)
}

/// When an attempt at the small stage first committed.
async fn first_commit(namespace: &TestNamespace, attempt: u32) -> Result<Timestamp> {
    within(TIMEOUT, &format!("the first commit of attempt {attempt}"), async || {
        let all = commits(namespace).await?;
        Ok(all.iter().filter(|one| one.attempt == attempt).map(|one| one.committed_at).min())
    })
    .await
}

/// A minute without storage, in training and at the last commit of the stage.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: tests/run --long"]
async fn storage_is_away_for_a_minute() -> Result<()> {
    const STEPS: u64 = 1500;
    let Some((environment, cluster, _alone)) = own_cluster().await else { return Ok(()) };
    environment
        .in_namespace("storage", async |namespace| {
            submit(namespace, STEPS, |_| ()).await?;
            wait(namespace, trains(1)).await?;
            cluster.set_s3_faults(&[Fault::always(FaultKind::Drop)])?;
            let injected = cluster.s3_faults_injected();
            tokio::time::sleep(Duration::from_secs(60)).await;
            let job = Api::<GrowthTrainingJob>::namespaced(environment.client.clone(), &namespace.name)
                .get("tiny")
                .await?;
            assert!(status(&job).stages[0].completion_time.is_none(), "the stage was over before");
            assert!(cluster.s3_faults_injected() > injected, "nobody asked for anything");
            cluster.set_s3_faults(&[])?;
            let job = ends_as_if_nothing_had_been(namespace, STEPS).await?;
            assert_eq!(status(&job).stages[0].attempt.as_ref().unwrap().number, 1);
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: tests/run --long"]
async fn the_control_plane_fails_and_the_operator_is_away() -> Result<()> {
    const STEPS: u64 = 1500;
    let Some((environment, cluster, _alone)) = own_cluster().await else { return Ok(()) };
    environment
        .in_namespace("control-plane", async |namespace| {
            submit(namespace, STEPS, slowly).await?;
            wait(namespace, trains(1)).await?;
            // Its Job is deleted by hand.
            kubectl(namespace, "delete job tiny-small-t1")?;
            wait(namespace, trains(2)).await?;

            // The API server dies and comes back; etcd stands still for a while, and again.
            cluster.stop_component("kube-apiserver")?;
            cluster.start_component("kube-apiserver").await?;
            for _ in 0..3 {
                cluster.pause_component("etcd", Duration::from_secs(3)).await?;
                wait(namespace, |job| !is_in(job, Phase::Restarting)).await?;
            }
            wait(namespace, trains(2)).await?;

            // The operator is away while the stage ends.
            kubectl_operator(&environment, "scale deployment growth-operator --replicas=0")?;
            let is_complete = |job: Option<&Job>| {
                let conditions = job.and_then(|job| job.status.as_ref()?.conditions.as_ref());
                conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Complete"))
            };
            namespace.wait::<Job>("tiny-small-t2", TIMEOUT, is_complete).await?;
            kubectl_operator(&environment, "scale deployment growth-operator --replicas=1")?;
            let job = ends_as_if_nothing_had_been(namespace, STEPS).await?;
            assert_eq!(status(&job).stages[0].attempt.as_ref().unwrap().number, 2, "{:#?}", status(&job));
            Ok(())
        })
        .await
}

/// Each stage on its own pool, and nothing else there: neither what needs no GPU, nor the other stage.
#[tokio::test(flavor = "multi_thread")]
async fn stages_land_on_their_own_pools() -> Result<()> {
    let Some((environment, cluster, _alone)) = own_cluster().await else { return Ok(()) };
    if cluster.nodes() < 3 {
        eprintln!("left out: two GPU pools and a node without GPUs need three nodes");
        return Ok(());
    }
    environment
        .in_namespace("pools", async |namespace| {
            for (number, pool) in [(2, "small"), (3, "large")] {
                cluster.set_gpus(number, 8).await?;
                kubectl(namespace, &format!("label node n{number} pool={pool}"))?;
                kubectl(namespace, &format!("taint node n{number} nvidia.com/gpu=present:NoSchedule"))?;
            }
            let pool = |name: &str, gpus: u32| {
                json!({
                    "nodeSelector": {"pool": name},
                    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
                    "resources": {"limits": {"nvidia.com/gpu": gpus.to_string()}},
                })
            };
            submit(namespace, 40, |job| {
                job["spec"]["stages"][0]["template"] = pool("small", 1);
                job["spec"]["stages"][1]["template"] = pool("large", 8);
            })
            .await?;
            wait(namespace, |job| is_in(job, Phase::Complete)).await?;
            let pods = Api::<Pod>::namespaced(environment.client.clone(), &namespace.name);
            let mut placed = Vec::new();
            for pod in pods.list(&ListParams::default()).await?.items {
                let label = |name: &str| pod.labels().get(name).cloned().unwrap_or_default();
                let is_protected = pod.annotations().contains_key("karpenter.sh/do-not-disrupt")
                    && pod.annotations().contains_key("cluster-autoscaler.kubernetes.io/safe-to-evict");
                assert_eq!(is_protected, label("growth.dev/work") == "train");
                placed.push(
                    [label("growth.dev/work"), label("growth.dev/stage"), node_of(&pod).unwrap().to_owned()]
                        .join(" "),
                );
            }
            placed.sort();
            assert_eq!(placed, ["data  n1", "train large n3", "train small n2", "transform large n1"]);
            Ok(())
        })
        .await?;
    mend(&cluster).await
}

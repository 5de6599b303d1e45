//! The operator on a real cluster, installed by its chart: a GrowthTrainingJob from `kubectl apply` to Complete.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use common::{job, newest_checkpoint, tensors, trainer, upload_corpus, write};
use growth_crds::GrowthTrainingJob;
use growth_crds::status::Phase;
use growth_tests::cluster::command::output;
use growth_tests::testing::{Environment, TestNamespace};
use growth_tests::{images, workspace};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{EvictParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(180);
const OPERATOR_NAMESPACE: &str = "growth-system";

/// The cluster with the chart installed and the images of this work tree. Once for all tests of this program.
async fn with_operator() -> Environment {
    static INSTALLED: tokio::sync::Mutex<bool> = tokio::sync::Mutex::const_new(false);
    let mut installed = INSTALLED.lock().await;
    let environment = Environment::connect().await.unwrap();
    if !*installed {
        install(&environment).unwrap();
        *installed = true;
    }
    environment
}

fn install(environment: &Environment) -> Result<()> {
    if let Some(cluster) = &environment.cluster {
        for program in images::PROGRAMS {
            cluster.load_image(&images::build(program, &workspace().join("target/images"))?.path)?;
        }
    }
    // Helm leaves a CRD alone that is there already.
    let crd = workspace().join("crds/growthtrainingjobs.yaml");
    environment
        .kubectl()
        .args(["apply", "--server-side", "--force-conflicts", "--filename", crd.to_str().unwrap()])
        .run()?;
    let mut helm =
        environment.cluster.as_ref().map_or_else(|| Command::new("helm"), |cluster| cluster.helm());
    helm.args(["upgrade", "--install", "growth-operator"]).arg(workspace().join("charts/growth-operator"));
    helm.args(["--namespace", OPERATOR_NAMESPACE, "--create-namespace", "--skip-crds"]);
    for (key, program) in [("image", "growth-operator"), ("trainer.image", "growth-trainer")] {
        let image = environment.image(program);
        let (repository, tag) = image.rsplit_once(':').context("an image has a tag")?;
        helm.args(["--set", &format!("{key}.repository={repository},{key}.tag={tag}")]);
    }
    output(&mut helm)?;
    let mut lint =
        environment.cluster.as_ref().map_or_else(|| Command::new("helm"), |cluster| cluster.helm());
    output(lint.args(["lint", "--strict"]).arg(workspace().join("charts/growth-operator")))?;
    // The tag is the same for every build.
    let kubectl = |line: &str| {
        environment.kubectl().args(["--namespace", OPERATOR_NAMESPACE]).args(line.split(' ')).run()
    };
    kubectl("rollout restart deployment/growth-operator")?;
    kubectl("rollout status deployment/growth-operator --timeout=60s").map(drop)
}

/// Two stages: `steps` of the small one, then forty of the stacked one.
fn two_stages(environment: &Environment, prefix: &str, runs: &str, endpoint: &str, steps: u64) -> Value {
    let mut job = job(environment, prefix, runs, endpoint);
    job["spec"]["stages"] = json!([
        {"name": "small", "model": {"numHiddenLayers": 2}, "tokens": steps * 512},
        {"name": "large", "growth": {"operator": "Stack", "factor": 2}, "tokens": 40 * 512},
    ]);
    job["spec"]["checkpoint"]["everyTokens"] = json!(steps * 512 / 10);
    job
}

/// The bits of the last checkpoint of an undisturbed run on this machine.
async fn expected(namespace: &TestNamespace, steps: u64) -> Result<BTreeMap<String, Vec<u8>>> {
    let environment = &namespace.environment;
    let folder = tempfile::tempdir()?;
    let job = two_stages(environment, &namespace.name, "local", &environment.s3.endpoint, steps);
    let file = write(folder.path(), "job.json", &job);
    trainer(environment, &["run", file.to_str().unwrap(), "--quiet"])?;
    let tensors = tensors(environment, &newest_checkpoint(namespace, "local", "large").await?).await?;
    assert!(tensors.len() >= 2, "{:?}", tensors.keys());
    Ok(tensors)
}

async fn submit(namespace: &TestNamespace, steps: u64) -> Result<()> {
    let environment = &namespace.environment;
    let secret = BTreeMap::from(environment.s3.credentials());
    namespace.create::<Secret>(json!({"metadata": {"name": "s3-keys"}, "stringData": secret})).await?;
    upload_corpus(environment, &namespace.name).await?;
    let job = two_stages(environment, &namespace.name, "runs", &environment.s3.endpoint_in_cluster, steps);
    namespace.kubectl().args(["apply", "--filename", "-"]).input(job.to_string()).run().map(drop)
}

async fn wait(
    namespace: &TestNamespace,
    holds: impl Fn(&GrowthTrainingJob) -> bool + Send,
) -> Result<GrowthTrainingJob> {
    let condition =
        move |job: Option<&GrowthTrainingJob>| job.is_some_and(|job| is_failed(job) || holds(job));
    let job = namespace.wait("tiny", TIMEOUT, condition).await?;
    assert!(!is_failed(&job), "{:#?}", job.status);
    Ok(job)
}

fn is_failed(job: &GrowthTrainingJob) -> bool {
    job.status.as_ref().and_then(|status| status.phase) == Some(Phase::Failed)
}

fn is_in(job: &GrowthTrainingJob, phase: Phase) -> bool {
    job.status.as_ref().and_then(|status| status.phase) == Some(phase)
}

async fn final_tensors(
    namespace: &TestNamespace,
    job: &GrowthTrainingJob,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let checkpoint = job.status.as_ref().unwrap().stages[1].checkpoint.as_ref().unwrap();
    tensors(&namespace.environment, &checkpoint.uri).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_from_apply_to_complete_and_has_the_bits_of_one_machine() -> Result<()> {
    with_operator()
        .await
        .in_namespace("main-path", async |namespace| {
            submit(namespace, 40).await?;
            let job = wait(namespace, |job| is_in(job, Phase::Complete)).await?;
            assert!(final_tensors(namespace, &job).await? == expected(namespace, 40).await?, "other bits");

            let kubectl = |line: &str| namespace.kubectl().args(line.split(' ')).run();
            kubectl("wait gtj/tiny --for=condition=Complete --timeout=10s")?;
            let table = kubectl("get gtj")?;
            assert!(table.contains("Complete") && table.contains("100"), "{table}");
            let described = kubectl("describe gtj tiny")?;
            let events = ["DataPrepared", "StageComplete", "StageGrown", "Complete"].map(|event| {
                described.rfind(event).unwrap_or_else(|| panic!("no event {event} in {described}"))
            });
            assert_eq!(events.len(), 4);
            let status = job.status.unwrap();
            assert_eq!((status.restarts, status.execution_attempts), (None, Some(4)));
            // Nothing is held after the end, and deleting the job takes its children along; checkpoints stay.
            kubectl("delete gtj tiny --cascade=foreground --timeout=60s")?;
            kubectl("wait pod --all --for=delete --timeout=60s").map(drop)
        })
        .await
}

/// Kills the trainer of the pod as the kernel's out-of-memory killer would.
fn kill_trainer(pod: &Pod) -> Result<()> {
    let uid = pod.uid().context("a pod has a uid")?;
    let line = format!(
        "for p in $(grep --files-with-matches {uid} /proc/[0-9]*/cgroup | cut -d/ -f3); do \
         grep --quiet growth-trainer /proc/$p/comm && kill -KILL $p; done; true"
    );
    output(Command::new("sh").args(["-c", &line])).map(drop)
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
            submit(namespace, STEPS).await?;
            // Training, with a checkpoint of this attempt to go on from.
            let trains = |attempt: i32| {
                move |job: &GrowthTrainingJob| {
                    is_in(job, Phase::Training)
                        && job.status.as_ref().is_some_and(|status| {
                            let stage = &status.stages[0];
                            stage.attempt.as_ref().is_some_and(|known| known.number == attempt)
                        })
                }
            };
            let pods: Api<Pod> = namespace.api();
            let pod_of = async |attempt: i32| -> Result<Pod> {
                let labels =
                    format!("growth.dev/work=train,growth.dev/stage=small,growth.dev/attempt={attempt}");
                let found = pods.list(&ListParams::default().labels(&labels)).await?.items;
                found.into_iter().next().context("no trainer pod")
            };

            wait(namespace, trains(1)).await?;
            kill_trainer(&pod_of(1).await?)?;
            wait(namespace, trains(2)).await?;
            pods.evict(&pod_of(2).await?.name_any(), &EvictParams::default()).await?;

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

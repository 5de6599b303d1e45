//! What tests of the operator share: the chart installed once, a job of two stages, and what an undisturbed run of it gives.

use super::{job, newest_checkpoint, tensors, test_image, trainer, upload_corpus, write};
use anyhow::{Context, Result};
use growth_crds::GrowthTrainingJob;
use growth_crds::status::{GrowthTrainingJobStatus, Phase, StageState};
use growth_tests::cluster::Cluster;
use growth_tests::cluster::command::output;
use growth_tests::testing::{Environment, TestNamespace};
use growth_tests::{images, workspace};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

pub const TIMEOUT: Duration = Duration::from_secs(180);
pub const OPERATOR_NAMESPACE: &str = "growth-system";

/// The APIService that a test registers.
pub const EXTERNAL_METRICS: &str = "v1beta1.external.metrics.k8s.io";

/// The cluster with the chart installed and the images of this work tree. Once for all tests of this program.
pub async fn with_operator() -> Environment {
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
            cluster.load_image(&test_image(program)?)?;
        }
    }
    let mut helm =
        environment.cluster.as_ref().map_or_else(|| Command::new("helm"), |cluster| cluster.helm());
    helm.args(["upgrade", "--install", "growth-operator"]).arg(workspace().join("charts/growth-operator"));
    // The CRD may have been applied by another test.
    helm.args([
        "--namespace",
        OPERATOR_NAMESPACE,
        "--create-namespace",
        "--take-ownership",
        "--force-conflicts",
    ]);
    if environment.cluster.is_some() {
        // Tests take the other nodes down.
        helm.args(["--set", "nodeSelector.kubernetes\\.io/hostname=n1"]);
    }
    for (key, program) in [("image", "growth-operator"), ("trainer.image", "growth-trainer")] {
        let image = environment.image(program);
        let (repository, tag) = image.rsplit_once(':').context("an image has a tag")?;
        helm.args(["--set", &format!("{key}.repository={repository},{key}.tag={tag}")]);
    }
    output(&mut helm)?;
    // The tag is the same for every build.
    kubectl_operator(environment, "rollout restart deployment/growth-operator")?;
    kubectl_operator(environment, "rollout status deployment/growth-operator --timeout=60s").map(drop)
}

/// Two stages: `steps` of the small one, then forty of the stacked one.
pub fn two_stages(environment: &Environment, prefix: &str, runs: &str, endpoint: &str, steps: u64) -> Value {
    let mut job = job(environment, prefix, runs, endpoint);
    job["spec"]["stages"] = json!([
        {"name": "small", "model": {"numHiddenLayers": 2}, "tokens": steps * 512},
        {"name": "large", "growth": {"operator": "Stack", "factor": 2}, "tokens": 40 * 512},
    ]);
    job["spec"]["checkpoint"]["everyTokens"] = json!(steps * 512 / 10);
    job
}

/// The bits of the last checkpoint of an undisturbed run on this machine.
pub async fn expected(namespace: &TestNamespace, steps: u64) -> Result<BTreeMap<String, Vec<u8>>> {
    expected_of(namespace, steps, |_| ()).await
}

/// The same of the job after `change`.
pub async fn expected_of(
    namespace: &TestNamespace,
    steps: u64,
    change: impl FnOnce(&mut Value),
) -> Result<BTreeMap<String, Vec<u8>>> {
    let environment = &namespace.environment;
    let folder = tempfile::tempdir()?;
    let mut job = two_stages(environment, &namespace.name, "local", &environment.s3.endpoint, steps);
    change(&mut job);
    let file = write(folder.path(), "job.json", &job);
    trainer(environment, &["run", file.to_str().unwrap(), "--quiet"])?;
    let tensors = tensors(environment, &newest_checkpoint(namespace, "local", "large").await?).await?;
    assert!(tensors.len() >= 2, "{:?}", tensors.keys());
    Ok(tensors)
}

/// Applies the job after `change`; its corpus and its Secret are there before it.
pub async fn submit(namespace: &TestNamespace, steps: u64, change: impl FnOnce(&mut Value)) -> Result<()> {
    let environment = &namespace.environment;
    let secret = BTreeMap::from(environment.s3.credentials());
    namespace.create::<Secret>(json!({"metadata": {"name": "s3-keys"}, "stringData": secret})).await?;
    upload_corpus(environment, &namespace.name).await?;
    let endpoint = &environment.s3.endpoint_in_cluster;
    let mut job = two_stages(environment, &namespace.name, "runs", endpoint, steps);
    change(&mut job);
    apply(namespace, &job)
}

pub fn apply(namespace: &TestNamespace, job: &Value) -> Result<()> {
    namespace.kubectl().args(["apply", "--filename", "-"]).input(job.to_string()).run().map(drop)
}

/// `kubectl` in the namespace.
pub fn kubectl(namespace: &TestNamespace, line: &str) -> Result<String> {
    namespace.kubectl().args(line.split(' ')).run()
}

/// `kubectl` in the operator's namespace.
pub fn kubectl_operator(environment: &Environment, line: &str) -> Result<String> {
    environment.kubectl().args(["--namespace", OPERATOR_NAMESPACE]).args(line.split(' ')).run()
}

pub async fn wait(
    namespace: &TestNamespace,
    holds: impl Fn(&GrowthTrainingJob) -> bool + Send,
) -> Result<GrowthTrainingJob> {
    let condition =
        move |job: Option<&GrowthTrainingJob>| job.is_some_and(|job| is_failed(job) || holds(job));
    let job = namespace.wait("tiny", TIMEOUT, condition).await?;
    assert!(!is_failed(&job), "{:#?}", job.status);
    Ok(job)
}

pub fn is_failed(job: &GrowthTrainingJob) -> bool {
    job.status.as_ref().and_then(|status| status.phase) == Some(Phase::Failed)
}

pub fn is_in(job: &GrowthTrainingJob, phase: Phase) -> bool {
    job.status.as_ref().and_then(|status| status.phase) == Some(phase)
}

pub async fn final_tensors(
    namespace: &TestNamespace,
    job: &GrowthTrainingJob,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let checkpoint = job.status.as_ref().unwrap().stages[1].checkpoint.as_ref().unwrap();
    tensors(&namespace.environment, &checkpoint.uri).await
}

/// The small stage trains in this attempt.
pub fn trains(attempt: i32) -> impl Fn(&GrowthTrainingJob) -> bool + Send {
    move |job| {
        is_in(job, Phase::Training)
            && job.status.as_ref().is_some_and(|status| {
                status.stages[0].state == StageState::Training
                    && status.stages[0].attempt.as_ref().is_some_and(|known| known.number == attempt)
            })
    }
}

/// The pod of an attempt at the small stage.
pub async fn pod_of(namespace: &TestNamespace, attempt: i32) -> Result<Pod> {
    let labels = format!("growth.dev/work=train,growth.dev/stage=small,growth.dev/attempt={attempt}");
    let pods: Api<Pod> = namespace.api();
    let found = pods.list(&ListParams::default().labels(&labels)).await?.items;
    found.into_iter().next().context("no trainer pod")
}

/// Processes of a pod's trainer, wherever its node is: they are visible from here.
pub fn trainer_processes(pod: &Pod) -> Result<Vec<String>> {
    let uid = pod.uid().context("a pod has a uid")?;
    let line = format!(
        "for p in $(grep --files-with-matches {uid} /proc/[0-9]*/cgroup 2>/dev/null | cut -d/ -f3); do \
         grep --quiet growth-trainer /proc/$p/comm 2>/dev/null && echo $p; done; true"
    );
    Ok(output(Command::new("sh").args(["-c", &line]))?.split_whitespace().map(String::from).collect())
}

/// Kills the trainer of the pod as the kernel's out-of-memory killer would.
pub fn kill_trainer(pod: &Pod) -> Result<()> {
    for process in trainer_processes(pod)? {
        output(Command::new("kill").args(["-KILL", &process]))?;
    }
    Ok(())
}

pub fn status(job: &GrowthTrainingJob) -> &GrowthTrainingJobStatus {
    job.status.as_ref().unwrap()
}

/// Ends Complete, with no restart counted, in the bits of an undisturbed run.
pub async fn ends_as_if_nothing_had_been(namespace: &TestNamespace, steps: u64) -> Result<GrowthTrainingJob> {
    let job = wait(namespace, |job| is_in(job, Phase::Complete)).await?;
    assert_eq!(status(&job).restarts, None, "{:#?}", status(&job));
    assert!(final_tensors(namespace, &job).await? == expected(namespace, steps).await?, "other bits");
    Ok(job)
}

pub fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// These tests share nodes, storage and control plane.
static CLUSTER: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Our own cluster, for one test at a time; in another one nothing can be made to fail.
pub async fn own_cluster() -> Option<(Environment, Cluster, tokio::sync::MutexGuard<'static, ()>)> {
    let one_at_a_time = CLUSTER.lock().await;
    if let Some(cluster) = &Environment::connect().await.unwrap().cluster {
        mend(cluster).await.unwrap();
    }
    let environment = with_operator().await;
    let cluster = environment.cluster.clone();
    if cluster.is_none() {
        eprintln!("left out: an external cluster cannot be made to fail");
    }
    Some((environment, cluster?, one_at_a_time))
}

/// A test that failed has left things as they were then.
pub async fn mend(cluster: &Cluster) -> Result<()> {
    cluster.set_s3_faults(&[])?;
    cluster.start_component("kube-apiserver").await?;
    // While nobody serves it, namespaces cannot be deleted.
    let _ = cluster.kubectl().args(["delete", "apiservice", EXTERNAL_METRICS]).output()?;
    for number in 1..=cluster.nodes() {
        cluster.start_node(number).await?;
        cluster.heal_node(number)?;
        cluster.set_gpus(number, 0).await?;
        for line in ["uncordon n{}", "label node n{} pool-", "taint node n{} nvidia.com/gpu-"] {
            let line = line.replace("{}", &number.to_string());
            // What is not there cannot be removed, and need not be.
            let _ = cluster.kubectl().args(line.split(' ')).output()?;
        }
    }
    Ok(())
}

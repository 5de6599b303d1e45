//! A stage of several pods on a real cluster: it changes its size, loses nodes and ranks, and ends in the bits of one machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod common;

use anyhow::{Context, Result, ensure};
use common::jobs::{
    EXTERNAL_METRICS, expected_of, final_tensors, is_in, kill_trainer, kubectl, mend, node_of, own_cluster,
    status, submit, wait,
};
use growth_crds::GrowthTrainingJob;
use growth_crds::status::{Phase, StageState};
use growth_tests::cluster::Cluster;
use growth_tests::testing::{Environment, TestNamespace};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// Of the small stage, and of the large one.
const SMALL_STEPS: u64 = 40;
const LARGE_STEPS: u64 = 1500;

/// The large stage has four pods, or as many as are asked for.
fn elastic(job: &mut Value) {
    let spec = &mut job["spec"];
    spec["replicas"] = json!(4);
    // Four a step.
    spec["training"]["microBatchTokens"] = json!(128);
    spec["checkpoint"]["everyTokens"] = json!(LARGE_STEPS * 512 / 20);
    spec["stages"][1]["tokens"] = json!(LARGE_STEPS * 512);
    spec["stages"][1]["elastic"] = json!({
        "minReplicas": 1, "maxReplicas": 4, "scaleUpDelaySeconds": 2, "capacityTimeoutSeconds": 5,
    });
    // So slow that things can happen meanwhile, and spread over the nodes.
    spec["stages"][1]["template"] =
        json!({"resources": {"requests": {"cpu": "50m"}, "limits": {"cpu": "200m", "memory": "256Mi"}}});
    spec["template"] = json!({"spec": {
        "topologySpreadConstraints": [{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"growth.dev/work": "train"}},
        }],
        "containers": [{"name": "trainer"}],
    }});
}

/// The large stage trains on so many pods, and no other number is wanted.
fn trains_on(size: i32) -> impl Fn(&GrowthTrainingJob) -> bool + Send {
    move |job| {
        let Some(status) = &job.status else { return false };
        is_in(job, Phase::Training)
            && status.stages.get(1).is_some_and(|stage| stage.state == StageState::Training)
            && (status.replicas, status.ready_replicas) == (Some(size), Some(size))
            && condition(job, "Scaling").is_none_or(|(status, ..)| status != "True")
    }
}

fn condition<'a>(job: &'a GrowthTrainingJob, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let found = job.status.as_ref()?.conditions.iter().find(|one| one.type_ == kind)?;
    Some((&found.status, &found.reason, &found.message))
}

fn says(kind: &'static str, reason: &'static str) -> impl Fn(&GrowthTrainingJob) -> bool + Send {
    move |job| condition(job, kind).is_some_and(|(_, found, _)| found == reason)
}

fn attempt(job: &GrowthTrainingJob) -> i32 {
    status(job).stages[1].attempt.as_ref().unwrap().number
}

/// Pods of the attempt at the large stage that runs, by rank.
async fn gang(namespace: &TestNamespace, job: &GrowthTrainingJob) -> Result<Vec<Pod>> {
    let labels = format!("growth.dev/work=train,growth.dev/stage=large,growth.dev/attempt={}", attempt(job));
    let pods: Api<Pod> = namespace.api();
    let mut pods = pods.list(&ListParams::default().labels(&labels)).await?.items;
    pods.sort_by_key(ResourceExt::name_any);
    Ok(pods)
}

fn nodes_of(pods: &[Pod]) -> BTreeSet<&str> {
    pods.iter().filter_map(node_of).collect()
}

/// Ends Complete in the bits of an undisturbed run on this machine.
async fn has_the_bits_of_one_machine(namespace: &TestNamespace) -> Result<GrowthTrainingJob> {
    let job = wait(namespace, |job| is_in(job, Phase::Complete)).await?;
    let expected = expected_of(namespace, SMALL_STEPS, elastic).await?;
    ensure!(final_tensors(namespace, &job).await? == expected, "other bits: {:#?}", status(&job));
    Ok(job)
}

/// The job with `change`, in its own namespace, until the large stage trains on `size` pods.
async fn with_job(
    environment: &Environment,
    purpose: &str,
    size: i32,
    change: impl FnOnce(&mut Value),
    test: impl AsyncFnOnce(&TestNamespace, GrowthTrainingJob) -> Result<()>,
) -> Result<()> {
    environment
        .in_namespace(purpose, async |namespace| {
            submit(namespace, SMALL_STEPS, |job| {
                elastic(job);
                change(job);
            })
            .await?;
            let job = wait(namespace, trains_on(size)).await?;
            test(namespace, job).await
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a minute or two"]
async fn four_pods_on_two_nodes_have_the_bits_of_one_machine() -> Result<()> {
    let Some((environment, _, _alone)) = own_cluster().await else { return Ok(()) };
    let test = async |namespace: &TestNamespace, job| {
        let pods = gang(namespace, &job).await?;
        assert_eq!(pods.len(), 4);
        assert!(nodes_of(&pods).len() >= 2, "{:?}", nodes_of(&pods));
        let job = has_the_bits_of_one_machine(namespace).await?;
        let status = status(&job);
        // The data, the small stage, the growth, and the large stage once.
        assert_eq!((status.restarts, status.execution_attempts), (None, Some(4)), "{status:#?}");
        Ok(())
    };
    with_job(&environment, "gang", 4, |_| (), test).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_is_scaled_down_and_up_while_it_trains() -> Result<()> {
    let Some((environment, _, _alone)) = own_cluster().await else { return Ok(()) };
    let test = async |namespace: &TestNamespace, _| {
        for size in [2, 4] {
            let began = Timestamp::now();
            kubectl(namespace, &format!("scale gtj/tiny --replicas={size}"))?;
            let job = wait(namespace, trains_on(size)).await?;
            let seconds = (Timestamp::now() - began).total(k8s_openapi::jiff::Unit::Second)?;
            println!("{seconds:.1} s from kubectl scale to {size} pods at work");
            assert_eq!(gang(namespace, &job).await?.len(), usize::try_from(size)?);
            let scale =
                kubectl(namespace, "get gtj tiny --subresource=scale --output jsonpath={.status.replicas}")?;
            assert_eq!(scale, size.to_string());
        }
        let job = has_the_bits_of_one_machine(namespace).await?;
        let status = status(&job);
        assert_eq!((status.restarts, attempt(&job)), (None, 3), "{status:#?}");
        assert_eq!(status.stages[1].last_failure, None);
        Ok(())
    };
    with_job(&environment, "scale", 4, |_| (), test).await
}

/// Each pod needs a GPU, and there are two.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a minute or two"]
async fn a_stage_goes_on_with_the_nodes_that_there_are() -> Result<()> {
    let Some((environment, cluster, _alone)) = own_cluster().await else { return Ok(()) };
    set_gpus(&cluster, 1).await?;
    let on_gpu = |job: &mut Value| {
        job["spec"]["stages"][1]["template"]["resources"]["limits"]["nvidia.com/gpu"] = json!("1");
    };
    let test = async |namespace: &TestNamespace, job: GrowthTrainingJob| {
        let (status_word, reason, message) = condition(&job, "Degraded").context("not Degraded")?;
        assert_eq!((status_word, reason), ("True", "InsufficientCapacity"));
        assert!(message.contains("2 of 4") && message.contains("Insufficient nvidia.com/gpu"), "{message}");
        assert_eq!(status(&job).stages[1].desired_replicas, Some(4));

        // Two are enough; then four, for which there are GPUs by then.
        kubectl(namespace, "scale gtj/tiny --replicas=2")?;
        wait(namespace, says("Degraded", "FullSize")).await?;
        set_gpus(&cluster, 2).await?;
        kubectl(namespace, "scale gtj/tiny --replicas=4")?;
        wait(namespace, trains_on(4)).await?;
        let job = has_the_bits_of_one_machine(namespace).await?;
        assert_eq!(status(&job).restarts, None, "{:#?}", status(&job));
        Ok(())
    };
    with_job(&environment, "capacity", 2, on_gpu, test).await?;
    mend(&cluster).await
}

/// On two of the nodes.
async fn set_gpus(cluster: &Cluster, each: u32) -> Result<()> {
    for number in [1, 2] {
        cluster.set_gpus(number, each).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a minute or two"]
async fn a_node_is_lost_under_a_gang() -> Result<()> {
    let Some((environment, cluster, _alone)) = own_cluster().await else { return Ok(()) };
    let test = async |namespace: &TestNamespace, job| {
        let pods = gang(namespace, &job).await?;
        assert!(nodes_of(&pods).contains("n2"), "{:?}", nodes_of(&pods));
        cluster.kill_node(2)?;
        let job = wait(namespace, |job| attempt(job) == 2 && trains_on(4)(job)).await?;
        let pods = gang(namespace, &job).await?;
        assert!(!nodes_of(&pods).contains("n2"), "{:?}", nodes_of(&pods));
        cluster.start_node(2).await?;
        let job = has_the_bits_of_one_machine(namespace).await?;
        assert_eq!(status(&job).restarts, None, "{:#?}", status(&job));
        Ok(())
    };
    with_job(&environment, "lost-node", 4, |_| (), test).await?;
    mend(&cluster).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a minute or two"]
async fn a_rank_is_killed() -> Result<()> {
    let Some((environment, _, _alone)) = own_cluster().await else { return Ok(()) };
    let test = async |namespace: &TestNamespace, job| {
        let pods = gang(namespace, &job).await?;
        kill_trainer(&pods[2])?;
        let job = has_the_bits_of_one_machine(namespace).await?;
        let failure = status(&job).stages[1].last_failure.clone().unwrap();
        assert_eq!((status(&job).restarts, attempt(&job)), (Some(1), 2), "{:#?}", status(&job));
        assert_eq!(failure.exit_code, Some(137), "{failure:?}");
        assert!(failure.message.as_ref().unwrap().contains(&pods[2].name_any()), "{failure:?}");
        Ok(())
    };
    with_job(&environment, "killed-rank", 4, |_| (), test).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a minute or two"]
async fn an_autoscaler_drives_a_stage() -> Result<()> {
    let Some((environment, cluster, _alone)) = own_cluster().await else { return Ok(()) };
    let slots = Arc::new(AtomicU32::new(1));
    let address = serve_metrics(cluster.api_server().ip(), slots.clone()).await?;
    let one = |job: &mut Value| job["spec"]["replicas"] = json!(1);
    let test = async |namespace: &TestNamespace, _| {
        register_metrics(namespace, address).await?;
        let manifest = include_str!("../../examples/elastic-hpa/hpa.yaml");
        let manifest = manifest.replace("name: elastic", "name: tiny");
        namespace.kubectl().args(["apply", "--filename", "-"]).input(manifest).run()?;
        slots.store(4, Ordering::Relaxed);
        let job = wait(namespace, trains_on(4)).await?;
        assert_eq!(job.spec.replicas, 4);
        let job = has_the_bits_of_one_machine(namespace).await?;
        assert_eq!(status(&job).restarts, None, "{:#?}", status(&job));
        Ok(())
    };
    with_job(&environment, "autoscaler", 1, one, test).await?;
    mend(&cluster).await
}

/// Serves `external.metrics.k8s.io`: one metric, whose value is that of `slots`.
async fn serve_metrics(host: IpAddr, slots: Arc<AtomicU32>) -> Result<SocketAddr> {
    let certified = rcgen::generate_simple_self_signed(["metrics".to_owned()])?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der()));
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)?;
    let tls = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind((host, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, slots) = (tls.clone(), slots.clone());
            tokio::spawn(async move {
                let Ok(stream) = tls.accept(stream).await else { return };
                let answer = service_fn(async |request: Request<Incoming>| {
                    Ok::<_, hyper::Error>(answer(&request, slots.load(Ordering::Relaxed)))
                });
                // The API server closes connections as it likes.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), answer)
                    .await;
            });
        }
    });
    Ok(address)
}

/// To a question for a metric, else for what is served here.
fn answer(request: &Request<Incoming>, slots: u32) -> Response<Full<Bytes>> {
    let version = "external.metrics.k8s.io/v1beta1";
    let body = if request.uri().path().ends_with("/training_slots") {
        json!({"kind": "ExternalMetricValueList", "apiVersion": version, "metadata": {}, "items": [{
            "metricName": "training_slots", "metricLabels": {}, "timestamp": Timestamp::now(),
            "value": slots.to_string(),
        }]})
    } else {
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": [{
            "name": "training_slots", "singularName": "", "namespaced": true,
            "kind": "ExternalMetricValueList", "verbs": ["get"],
        }]})
    };
    let answer = Response::builder().header("Content-Type", "application/json");
    answer.body(Full::new(Bytes::from(body.to_string()))).unwrap()
}

/// Makes the API server ask there.
async fn register_metrics(namespace: &TestNamespace, address: SocketAddr) -> Result<()> {
    let service = json!({"metadata": {"name": "metrics"}, "spec": {"ports": [{"port": 443}]}});
    namespace.create::<Service>(service).await?;
    let slice = json!({
        "metadata": {"name": "metrics", "labels": {"kubernetes.io/service-name": "metrics"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address.ip()], "conditions": {"ready": true}}],
        "ports": [{"name": "", "port": address.port(), "protocol": "TCP"}],
    });
    namespace.create::<EndpointSlice>(slice).await?;
    let (group, version) = ("external.metrics.k8s.io", "v1beta1");
    let api_service = json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": EXTERNAL_METRICS},
        "spec": {
            "group": group, "version": version, "groupPriorityMinimum": 100, "versionPriority": 100,
            "insecureSkipTLSVerify": true, "service": {"namespace": namespace.name, "name": "metrics"},
        },
    });
    namespace.kubectl().args(["apply", "--filename", "-"]).input(api_service.to_string()).run()?;
    kubectl(namespace, &format!("wait apiservice/{EXTERNAL_METRICS} --for=condition=Available --timeout=60s"))
        .map(drop)
}

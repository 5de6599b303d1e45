//! The cluster itself: that its nodes are real ones, can be lost, cut off and brought back, and that it leaves nothing
//! behind. An external cluster is left alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;
use growth_tests::cluster::Cluster;
use growth_tests::testing::Environment;
use k8s_openapi::api::core::v1::{Node, Pod, Secret};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Held while a test needs all nodes well, or makes them unwell.
static NODES: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn own_cluster() -> Option<(Environment, Cluster)> {
    let environment = Environment::connect().await.unwrap();
    let Some(cluster) = environment.cluster.clone() else {
        eprintln!("left out: the nodes of an external cluster");
        return None;
    };
    Some((environment, cluster))
}

/// Runs a shell line on a node, at most two seconds.
fn on_node(cluster: &Cluster, node: u8, line: &str) -> bool {
    let mut command = cluster.on_node(node).unwrap();
    command.args(["timeout", "2", "bash", "-c", line]).stderr(Stdio::null()).status().unwrap().success()
}

fn connects(address: impl std::fmt::Display, port: u16) -> String {
    format!("</dev/tcp/{address}/{port}")
}

/// The CoreDNS pod on a node.
async fn dns_pod(client: &Client, node: &str) -> Pod {
    let pods: Api<Pod> = Api::namespaced(client.clone(), "kube-system");
    let here = ListParams::default().labels("k8s-app=kube-dns").fields(&format!("spec.nodeName={node}"));
    pods.list(&here).await.unwrap().items.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_services_and_logs_work_across_nodes() -> Result<()> {
    let Some((environment, cluster)) = own_cluster().await else { return Ok(()) };
    let _nodes = NODES.lock().await;
    cluster.wait_for_dns().await?;
    let pod = dns_pod(&environment.client, "n2").await;
    let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).unwrap();
    assert!(on_node(&cluster, 1, &connects(address, 5353)), "n1 does not reach a pod of n2");
    // kube-proxy leads the Service's address to a pod of the same node.
    assert!(on_node(&cluster, 1, &connects("10.96.0.10", 53)), "n1 does not reach the DNS Service");
    assert!(on_node(&cluster, 1, &connects("10.96.0.1", 443)), "n1 does not reach the API Service");

    let logs = ["--namespace", "kube-system", "logs", &pod.name_any()];
    let said = environment.kubectl().args(logs).run()?;
    assert!(said.contains("CoreDNS"), "{said}");
    Ok(())
}

/// A kubelet may change its own node only, and read the Secrets of its own pods only.
#[tokio::test(flavor = "multi_thread")]
async fn kubelets_have_the_rights_of_their_own_node() -> Result<()> {
    let Some((environment, cluster)) = own_cluster().await else { return Ok(()) };
    let kubelet = cluster.node_client(1).await?;
    let nodes: Api<Node> = Api::all(kubelet.clone());
    let patch = Patch::Merge(json!({"metadata": {"annotations": {"growth-tests": "x"}}}));
    nodes.patch("n1", &PatchParams::default(), &patch).await?;
    let refused = nodes.patch("n2", &PatchParams::default(), &patch).await.unwrap_err().to_string();
    assert!(refused.contains("not allowed to modify node \"n2\""), "{refused}");

    environment
        .in_namespace("rights", async |namespace| {
            namespace.create::<Secret>(json!({"metadata": {"name": "s"}, "stringData": {"k": "v"}})).await?;
            let secrets: Api<Secret> = Api::namespaced(kubelet.clone(), &namespace.name);
            let refused = secrets.get("s").await.unwrap_err().to_string();
            assert!(refused.contains("no relationship found between node 'n1' and this object"), "{refused}");
            Ok(())
        })
        .await
}

/// A pod that the cluster's own image serves; `spec` adds to it.
fn pause(name: &str, spec: Value) -> Value {
    let mut pod = json!({
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "pause",
                "image": "localhost/pause:test",
                "imagePullPolicy": "Never",
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    for (key, value) in spec.as_object().unwrap() {
        pod["spec"][key] = value.clone();
    }
    pod
}

#[tokio::test(flavor = "multi_thread")]
async fn the_restricted_profile_is_enforced() -> Result<()> {
    let Some((environment, _)) = own_cluster().await else { return Ok(()) };
    environment
        .in_namespace("restricted", async |namespace| {
            namespace.create::<Pod>(pause("good", json!({}))).await?;
            let refused = namespace.create::<Pod>(pause("bad", json!({"hostNetwork": true}))).await;
            let refused = format!("{:#}", refused.unwrap_err());
            assert!(refused.contains("violates PodSecurity \"restricted:latest\""), "{refused}");
            Ok(())
        })
        .await
}

/// Nodes that pose as GPU pools, and what losing and cutting off a node looks like. One test, since they share nodes.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_pose_as_gpu_pools_are_lost_cut_off_and_come_back() -> Result<()> {
    let Some((environment, cluster)) = own_cluster().await else { return Ok(()) };
    let _nodes = NODES.lock().await;
    let program = env!("CARGO_BIN_EXE_cluster");
    for line in
        ["node gpus n2 8", "node label n2 pool=large", "node taint n2 nvidia.com/gpu=present:NoSchedule"]
    {
        assert!(Command::new(program).args(line.split(' ')).status()?.success(), "{line}");
    }
    environment
        .in_namespace("pools", async |namespace| {
            let is_running = |pod: Option<&Pod>| {
                pod.and_then(|pod| pod.status.as_ref())
                    .is_some_and(|status| status.phase.as_deref() == Some("Running"))
            };
            let gpu = json!({"limits": {"nvidia.com/gpu": "2"}});
            let mut pod = pause(
                "gpu",
                json!({
                    "nodeSelector": {"pool": "large"},
                    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                }),
            );
            pod["spec"]["containers"][0]["resources"] = gpu;
            namespace.create::<Pod>(pod).await?;
            let pod = namespace.wait("gpu", TIMEOUT, is_running).await?;
            assert_eq!(pod.spec.unwrap().node_name.as_deref(), Some("n2"));
            // Without a toleration, another node.
            namespace.create::<Pod>(pause("cpu", json!({}))).await?;
            let pod = namespace.wait("cpu", TIMEOUT, is_running).await?;
            assert_ne!(pod.spec.unwrap().node_name.as_deref(), Some("n2"));

            // A partition: its pods run on and reach S3, but not the API server and not the other node.
            let (api, s3) = (cluster.api_server(), cluster.api_server().ip());
            let pod = dns_pod(&environment.client, "n2").await.status.unwrap();
            let (pod_address, kubelet_address) = (pod.pod_ip.unwrap(), pod.host_ip.unwrap());
            let (pod, kubelet) = (connects(pod_address, 5353), connects(kubelet_address, 10250));
            let api_server = connects(api.ip(), api.port());
            for line in [&pod, &kubelet, &api_server] {
                assert!(on_node(&cluster, 1, line), "n1 does not reach {line}");
            }
            cluster.partition_node(1)?;
            for line in [&pod, &kubelet, &api_server] {
                assert!(!on_node(&cluster, 1, line), "n1 still reaches {line}");
            }
            assert!(on_node(&cluster, 1, &connects(s3, 9000)), "n1 does not reach S3");
            // A power cut on the other one.
            cluster.kill_node(2)?;
            assert!(cluster.on_node(2).is_err());
            tokio::try_join!(cluster.wait_for_node_loss(1), cluster.wait_for_node_loss(2))?;

            cluster.heal_node(1)?;
            cluster.start_node(2).await?;
            for line in [&kubelet, &api_server] {
                assert!(on_node(&cluster, 1, line), "n1 is still cut off from {line}");
            }
            let node = Api::<Node>::all(environment.client.clone()).get("n2").await?;
            let allocatable = node.status.unwrap().allocatable.unwrap();
            assert_eq!(allocatable["nvidia.com/gpu"].0, "8");
            Ok(())
        })
        .await?;
    cluster.set_gpus(2, 0).await?;
    for line in ["node label n2 pool-", "node taint n2 nvidia.com/gpu-"] {
        assert!(Command::new(program).args(line.split(' ')).status()?.success(), "{line}");
    }
    Ok(())
}

/// What of a cluster is still on this machine.
fn traces(id: &str, folder: &Path) -> Vec<String> {
    let output = |line: &str| {
        let output = Command::new("sh").args(["-c", line]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect::<Vec<_>>()
    };
    let folder = folder.display();
    [
        format!("ls /sys/class/net | grep gk{id}"),
        format!("find /sys/fs/cgroup -name 'gk-{id}'"),
        format!("grep -l 'GROWTH_CLUSTER_DAEMON={folder}#' --null-data /proc/*/environ 2>/dev/null"),
        format!("cat /proc/*/mountinfo 2>/dev/null | grep '{folder}/'"),
        format!("ip route | grep gk{id}"),
        format!("find '{folder}' -mindepth 1 -maxdepth 1 ! -name logs ! -name .lock"),
    ]
    .iter()
    .flat_map(|line| output(line))
    .collect()
}

/// `up` is killed at the worst moment, and `down` is all that follows.
#[tokio::test(flavor = "multi_thread")]
async fn down_leaves_nothing_behind_after_a_crash_of_up() -> Result<()> {
    let Some((_, other)) = own_cluster().await else { return Ok(()) };
    let program = env!("CARGO_BIN_EXE_cluster");
    let folder = Cluster::default_root().join("crashed");
    let cluster = |line: &str| {
        let mut command = Command::new(program);
        command.args(["--name", "crashed"]).args(line.split(' '));
        command
    };
    assert!(cluster("down").status()?.success());
    if folder.exists() {
        // Logs of an earlier run would look like this one's.
        std::fs::remove_dir_all(&folder)?;
    }
    let mut up = cluster("up --nodes 1").stdout(Stdio::null()).spawn()?;
    // The node has come to life, its pods have not.
    let kubelet = folder.join("logs/n1-kubelet.log");
    let deadline = Instant::now() + TIMEOUT;
    while !kubelet.exists() {
        assert!(up.try_wait()?.is_none() && Instant::now() < deadline, "no kubelet started");
        std::thread::sleep(Duration::from_millis(1));
    }
    up.kill()?;
    up.wait()?;
    let id = Cluster::attach(&Cluster::default_root(), "crashed")?.id();
    assert!(!traces(&id, &folder).is_empty(), "the test looks for the wrong traces");

    assert!(cluster("down").status()?.success());
    let left = traces(&id, &folder);
    assert!(left.is_empty(), "{left:#?}");
    // The other cluster has not noticed.
    assert!(other.processes()?.iter().any(|(name, _)| name == "kube-apiserver"));
    assert!(!traces(&other.id(), &Cluster::default_root().join("default")).is_empty());
    Ok(())
}

//! For tests that need a cluster: which one it is, a namespace per test, waiting on watches, and all that is known
//! when a test fails.

use std::fmt::Debug;
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::future::ready;
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::{Event, Namespace, Pod};
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::runtime::wait::Condition;
use kube::runtime::{WatchStreamExt, watcher::watch_object};
use kube::{Api, Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::cluster::{Cluster, S3, client_of};

/// Asks again and again, where there is nothing to watch, until there is an answer. Errors: `ask` failed; none within
/// `limit`.
pub async fn within<T>(
    limit: Duration,
    what: &str,
    mut ask: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "{what}: not within {} s", limit.as_secs());
        tokio::time::sleep(BETWEEN_QUESTIONS).await;
    }
}

const BETWEEN_QUESTIONS: Duration = Duration::from_millis(20);

/// The cluster that the tests use: the one of `cluster up` (name `default`), or with `GROWTH_TEST_CLUSTER=external`
/// whatever `KUBECONFIG` points to, with S3 and images as `docs/testing.md` says.
#[derive(Clone)]
pub struct Environment {
    /// With all rights.
    pub client: Client,
    /// Reached by pods and by the host.
    pub s3: S3,
    /// Absent when the cluster is external: nodes and S3 cannot be made to fail then.
    pub cluster: Option<Cluster>,
    kubeconfig: PathBuf,
    image_prefix: String,
}

impl Environment {
    /// Errors: no cluster is up, or a variable that an external one needs is missing.
    pub async fn connect() -> Result<Self> {
        match std::env::var("GROWTH_TEST_CLUSTER").as_deref() {
            Ok("external") => Self::external().await,
            Ok(other) => bail!("GROWTH_TEST_CLUSTER={other}: only `external` is known"),
            Err(_) => {
                let cluster = Cluster::attach(&Cluster::default_root(), "default")?;
                Ok(Environment {
                    client: cluster.client().await?,
                    s3: cluster.s3(),
                    kubeconfig: cluster.kubeconfig(),
                    cluster: Some(cluster),
                    image_prefix: "localhost".to_string(),
                })
            }
        }
    }

    async fn external() -> Result<Self> {
        let variable = |name: &str| {
            std::env::var(name)
                .with_context(|| format!("GROWTH_TEST_CLUSTER=external needs {name}: see docs/testing.md"))
        };
        let kubeconfig = PathBuf::from(variable("KUBECONFIG")?);
        let endpoint = variable("AWS_ENDPOINT_URL")?;
        Ok(Environment {
            client: client_of(&kubeconfig).await?,
            s3: S3 {
                endpoint_in_cluster: variable("GROWTH_TEST_S3_ENDPOINT_IN_CLUSTER")
                    .unwrap_or(endpoint.clone()),
                endpoint,
                bucket: variable("GROWTH_TEST_S3_BUCKET")?,
                region: variable("AWS_REGION")?,
                access_key_id: variable("AWS_ACCESS_KEY_ID")?,
                secret_access_key: variable("AWS_SECRET_ACCESS_KEY")?,
            },
            cluster: None,
            kubeconfig,
            image_prefix: variable("GROWTH_TEST_IMAGE_PREFIX")?,
        })
    }

    /// The image of a program, as pods call it.
    pub fn image(&self, program: &str) -> String {
        format!("{}/{program}:test", self.image_prefix)
    }

    /// `kubectl`, pointed at the cluster.
    pub fn kubectl(&self) -> Kubectl {
        let command = self.cluster.as_ref().map_or_else(|| Command::new("kubectl"), Cluster::kubectl);
        Kubectl { command, input: String::new() }.env("KUBECONFIG", &self.kubeconfig)
    }

    /// Runs a test in a namespace of its own that enforces the restricted Pod Security profile. It is removed after a
    /// success; after a failure its events, pods, logs and API calls are printed and it stays.
    pub async fn in_namespace(
        &self,
        purpose: &str,
        test: impl AsyncFnOnce(&TestNamespace) -> Result<()>,
    ) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let object = serde_json::from_value(json!({"metadata": {
            "generateName": format!("{purpose}-"),
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        }}))?;
        let created = namespaces.create(&PostParams::default(), &object).await?;
        let namespace = TestNamespace { environment: self.clone(), name: created.name_any() };
        match AssertUnwindSafe(test(&namespace)).catch_unwind().await {
            Ok(Ok(())) => {
                namespaces.delete(&namespace.name, &DeleteParams::background()).await?;
                Ok(())
            }
            Ok(Err(error)) => {
                namespace.print_all().await;
                Err(error)
            }
            Err(panic) => {
                namespace.print_all().await;
                std::panic::resume_unwind(panic)
            }
        }
    }
}

/// The namespace of one test.
pub struct TestNamespace {
    /// Where it is.
    pub environment: Environment,
    /// Unique in the cluster.
    pub name: String,
}

impl TestNamespace {
    /// An API of this namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.environment.client.clone(), &self.name)
    }

    /// Creates an object written as JSON.
    pub async fn create<K>(&self, object: serde_json::Value) -> Result<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K: Clone + Debug + serde::Serialize + DeserializeOwned,
        K::DynamicType: Default,
    {
        let object: K = serde_json::from_value(object)?;
        Ok(self.api().create(&PostParams::default(), &object).await?)
    }

    /// Watches an object until `condition` holds and returns it as it was then. Errors: not within `timeout`.
    pub async fn wait<K>(&self, name: &str, timeout: Duration, condition: impl Condition<K>) -> Result<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + Debug
            + Send
            + DeserializeOwned,
        K: 'static,
        K::DynamicType: Default,
    {
        // The API server may go and come back meanwhile.
        let objects = watch_object(self.api::<K>(), name).default_backoff();
        let mut matching = pin!(
            objects
                .filter_map(|object| ready(object.ok()))
                .filter(|object| { ready(condition.matches_object(object.as_ref())) })
        );
        match tokio::time::timeout(timeout, matching.next()).await {
            Ok(object) => object.flatten().with_context(|| format!("{name} was deleted")),
            Err(_) => bail!("{name}: not within {} s", timeout.as_secs()),
        }
    }

    /// Waits until a pod has ended. `Ok` with its log when it succeeded.
    pub async fn pod_succeeds(&self, name: &str, timeout: Duration) -> Result<String> {
        let ended = |pod: Option<&Pod>| matches!(phase(pod), Some("Succeeded" | "Failed"));
        let pod: Pod = self.wait(name, timeout, ended).await?;
        let log = self.log(name, None).await?;
        match phase(Some(&pod)) {
            Some("Succeeded") => Ok(log),
            _ => bail!("pod {name} failed:\n{log}"),
        }
    }

    /// The log of a pod's first container, or its last lines.
    pub async fn log(&self, pod: &str, tail_lines: Option<i64>) -> Result<String> {
        Ok(self.api::<Pod>().logs(pod, &LogParams { tail_lines, ..LogParams::default() }).await?)
    }

    /// `kubectl` in this namespace.
    pub fn kubectl(&self) -> Kubectl {
        self.environment.kubectl().args(["--namespace", &self.name])
    }

    /// Everything that explains a failure.
    async fn print_all(&self) {
        eprintln!("---- namespace {}, kept ----", self.name);
        if let Err(error) = self.try_print_all().await {
            eprintln!("the cluster does not tell more: {error:#}");
        }
    }

    async fn try_print_all(&self) -> Result<()> {
        let mut events = self.api::<Event>().list(&ListParams::default()).await?.items;
        events.sort_by_key(|event| event.last_timestamp.clone().map(|time| time.0));
        for event in events {
            eprintln!(
                "event  {} {}: {} {}",
                event.involved_object.kind.unwrap_or_default(),
                event.involved_object.name.unwrap_or_default(),
                event.reason.unwrap_or_default(),
                event.message.unwrap_or_default()
            );
        }
        for pod in self.api::<Pod>().list(&ListParams::default()).await?.items {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            let status = pod.status.clone().unwrap_or_default();
            eprintln!(
                "pod    {} on {node}: {}",
                pod.name_any(),
                serde_json::to_string(&status.container_statuses)?
            );
            match self.log(&pod.name_any(), Some(60)).await {
                Ok(log) => log.lines().for_each(|line| eprintln!("       | {line}")),
                Err(error) => eprintln!("       no log: {error}"),
            }
        }
        self.print_audit_tail()
    }

    /// The last calls that concerned this namespace.
    fn print_audit_tail(&self) -> Result<()> {
        let Some(cluster) = &self.environment.cluster else { return Ok(()) };
        let log = std::fs::read_to_string(cluster.log("audit")?)?;
        let field = format!("\"namespace\":\"{}\"", self.name);
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(&field)).collect();
        for line in &lines[lines.len().saturating_sub(40)..] {
            let call: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            let text =
                |pointer: &str| call.pointer(pointer).and_then(|value| value.as_str()).unwrap_or_default();
            let code = call.pointer("/responseStatus/code").cloned().unwrap_or_default();
            eprintln!(
                "call   {} {} {} -> {code}",
                text("/user/username"),
                text("/verb"),
                text("/requestURI")
            );
        }
        Ok(())
    }
}

fn phase(pod: Option<&Pod>) -> Option<&str> {
    pod?.status.as_ref()?.phase.as_deref()
}

/// A `kubectl` call.
pub struct Kubectl {
    command: Command,
    input: String,
}

impl Kubectl {
    /// More arguments.
    pub fn args<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(arguments);
        self
    }

    /// What it reads from standard input.
    pub fn input(mut self, text: impl Into<String>) -> Self {
        self.input = text.into();
        self
    }

    fn env(mut self, name: &str, value: &Path) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it to its end, whatever that is.
    pub fn output(mut self) -> Result<Output> {
        let piped = self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().context("cannot start kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl has no standard input")?;
        // In a thread: kubectl may print more than a pipe holds before it has read everything.
        let input = self.input;
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        // kubectl may well end before it has read all.
        let _ = writer.join();
        Ok(output)
    }

    /// What it printed. Errors: it failed; its own words are in the message.
    pub fn run(self) -> Result<String> {
        let output = self.output()?;
        if !output.status.success() {
            bail!("kubectl: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

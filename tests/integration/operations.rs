//! The operator in operation, as a process beside a control plane of its own: leader election, an API server that goes
//! away, its end, and what it costs with a thousand jobs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../crds/tests/common/mod.rs"]
mod fixture;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use growth_crds::GrowthTrainingJob;
use growth_tests::cluster::command::output;
use growth_tests::cluster::{Cluster, Options, wait_for};
use growth_tests::testing::within;
use growth_tests::workspace;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::conditions::is_crd_established;
use kube::{Api, Client, CustomResourceExt};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const CLUSTER: &str = "operations";
const NAMESPACE: &str = "growth-system";
/// Of the chart, with this release's name.
const CLUSTER_ROLE: &str = "growth-system-growth-operator";
const LEASE_ROLE: &str = "growth-operator-lease";
const TIMEOUT: Duration = Duration::from_secs(30);
/// How many jobs there are where it matters.
const JOBS: usize = 1000;

/// A control plane with the CRD, and operators as processes.
struct World {
    cluster: Cluster,
    client: Client,
    folder: tempfile::TempDir,
}

/// Runs a test on a control plane of its own, one at a time, and ends that whatever happens.
async fn on_control_plane(test: impl AsyncFnOnce(&World) -> Result<()>) -> Result<()> {
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    if std::env::var_os("GROWTH_TEST_CLUSTER").is_some() {
        eprintln!("left out: the API server of an external cluster");
        return Ok(());
    }
    let _alone = ALONE.lock().await;
    let root = Cluster::default_root();
    let result = AssertUnwindSafe(async {
        let world = World::up(&root).await?;
        let result = AssertUnwindSafe(test(&world)).catch_unwind().await;
        if !matches!(result, Ok(Ok(()))) {
            world.print_logs();
        }
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
    .catch_unwind()
    .await;
    Cluster::down(&root, CLUSTER)?;
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl World {
    async fn up(root: &Path) -> Result<Self> {
        let cluster = Cluster::up(root, CLUSTER, Options { nodes: 0 }).await?;
        let client = cluster.client().await?;
        let crd = workspace().join("crds/growthtrainingjobs.yaml");
        output(cluster.kubectl().args(["apply", "--server-side", "--filename"]).arg(crd))?;
        let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
        wait_for(crds, GrowthTrainingJob::crd_name(), "the CRD", is_crd_established()).await?;
        let world = World { cluster, client, folder: tempfile::tempdir()? };
        world.create_role().await?;
        Ok(world)
    }

    /// What an operator may do: what the chart says, and no more.
    async fn create_role(&self) -> Result<()> {
        create::<Namespace>(Api::all(self.client.clone()), json!({"metadata": {"name": NAMESPACE}})).await?;
        let mut helm = self.cluster.helm();
        helm.args(["template", "growth-operator", "--namespace", NAMESPACE]);
        helm.args(["--show-only", "templates/rbac.yaml"]).arg(workspace().join("charts/growth-operator"));
        let file = self.folder.path().join("rbac.yaml");
        std::fs::write(&file, output(&mut helm)?)?;
        output(self.cluster.kubectl().args(["apply", "--filename"]).arg(file)).map(drop)
    }

    /// An operator with an identity of its own.
    async fn operator(&self, name: &str) -> Result<Operator> {
        let accounts = Api::namespaced(self.client.clone(), NAMESPACE);
        create::<ServiceAccount>(accounts, json!({"metadata": {"name": name}})).await?;
        let binding = |kind: &str, role: &str| {
            json!({
                "metadata": {"name": name},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
                "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}],
            })
        };
        let everywhere = binding("ClusterRole", CLUSTER_ROLE);
        create::<ClusterRoleBinding>(Api::all(self.client.clone()), everywhere).await?;
        let here = Api::namespaced(self.client.clone(), NAMESPACE);
        create::<RoleBinding>(here, binding("Role", LEASE_ROLE)).await?;
        let token = output(self.cluster.kubectl().args(["--namespace", NAMESPACE, "create", "token", name]))?;
        let mut config: Value = serde_saphyr::from_str(&std::fs::read_to_string(self.cluster.kubeconfig())?)?;
        config["users"][0]["user"] = json!({"token": token.trim()});
        let kubeconfig = self.folder.path().join(format!("{name}.kubeconfig"));
        std::fs::write(&kubeconfig, config.to_string())?;
        Ok(Operator {
            name: name.to_owned(),
            kubeconfig,
            log: self.folder.path().join(format!("{name}.log")),
            port: std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port(),
            child: None,
        })
    }

    fn print_logs(&self) {
        for entry in std::fs::read_dir(self.folder.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|end| end == "log") {
                let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("---- {} ----", entry.path().display());
                lines[lines.len().saturating_sub(60)..].iter().for_each(|line| eprintln!("{line}"));
            }
        }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    /// Stores a job and waits for its first Job.
    async fn first_job_of(&self, name: &str) -> Result<()> {
        create::<GrowthTrainingJob>(self.api(), job(name)).await?;
        let created = |job: Option<&Job>| job.is_some();
        wait_for(self.api::<Job>(), &format!("{name}-data--t1"), "the first Job", created).await
    }

    /// API calls of operators since a mark.
    fn calls(&self, since: Mark) -> Result<Vec<Call>> {
        let log = std::fs::read(self.cluster.log("audit")?)?;
        let lines = log[since.0..].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let mut calls = BTreeMap::new();
        for line in lines {
            // The last line may be half written.
            let Ok(line) = serde_json::from_slice::<Value>(line) else { continue };
            let text = |path: &str| line.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
            let Some(operator) = text("/user/username")
                .strip_prefix(&format!("system:serviceaccount:{NAMESPACE}:"))
                .map(str::to_owned)
            else {
                continue;
            };
            assert!(text("/userAgent").starts_with("growth-operator/"), "{line}");
            let call = Call {
                operator,
                verb: text("/verb"),
                resource: text("/objectRef/resource"),
                name: text("/objectRef/name"),
                code: line.pointer("/responseStatus/code").and_then(Value::as_u64).unwrap_or_default(),
            };
            // A watch has two lines.
            calls.insert(text("/auditID"), call);
        }
        Ok(calls.into_values().collect())
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark(std::fs::read(self.cluster.log("audit")?)?.len()))
    }
}

/// A place in the audit log.
#[derive(Clone, Copy)]
struct Mark(usize);

/// One line of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Call {
    operator: String,
    verb: String,
    resource: String,
    name: String,
    code: u64,
}

impl Call {
    fn is_write(&self) -> bool {
        !["get", "list", "watch"].contains(&self.verb.as_str()) && self.resource != "leases"
    }
}

/// A process, or one that was.
struct Operator {
    name: String,
    kubeconfig: PathBuf,
    log: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Operator {
    fn start(&mut self, arguments: &[&str]) -> Result<()> {
        let program = workspace().join("target/release/growth-operator");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let child = Command::new(program)
            .args(["--listen", &format!("127.0.0.1:{}", self.port)])
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("POD_NAME", &self.name)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cargo test --release --workspace --no-run builds target/release/growth-operator")?;
        self.child = Some(child);
        Ok(())
    }

    fn start_with_lease(&mut self) -> Result<()> {
        self.start(&["--lease-namespace", NAMESPACE])
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().expect("it was started").id()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid() as i32).context("no process")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Waits for its end.
    async fn ended(&mut self) -> Result<ExitStatus> {
        until("the operator's end", async || {
            let child = self.child.as_mut().expect("it was started");
            Ok(child.try_wait()?)
        })
        .await
        .inspect(|_| self.child = None)
    }

    async fn get(&self, path: &str) -> Result<(u16, String)> {
        let answer = reqwest::get(format!("http://127.0.0.1:{}{path}", self.port)).await?;
        Ok((answer.status().as_u16(), answer.text().await?))
    }

    /// Waits until a probe answers so.
    async fn answers(&self, path: &str, status: u16, start: &str) -> Result<String> {
        until(&format!("{}: {path} {status} {start}", self.name), async || {
            let answer = self.get(path).await.ok();
            Ok(answer.filter(|(code, text)| *code == status && text.starts_with(start)).map(|(_, text)| text))
        })
        .await
    }

    /// A line of /metrics.
    async fn metric(&self, name: &str) -> Result<Option<f64>> {
        let (_, text) = self.get("/metrics").await?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        Ok(value)
    }

    async fn leads(&self) -> bool {
        self.metric("growth_operator_leader").await.is_ok_and(|value| value == Some(1.0))
    }

    async fn wait_until_leading(&self) -> Result<()> {
        until(&format!("{} leads", self.name), async || Ok(self.leads().await.then_some(()))).await
    }

    /// A line of its /proc/PID/status, in MiB.
    fn mebibytes(&self, field: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        let kibibytes: f64 = line.trim_matches([':', '\t', ' ', 'k', 'B']).parse()?;
        Ok(kibibytes / 1024.0)
    }

    /// Seconds of processor time so far.
    fn processor_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        let fields: Vec<&str> = stat.rsplit(')').next().context("no fields")?.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Asks again and again, for there is nothing to watch.
async fn until<T>(what: &str, ask: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    within(TIMEOUT, what, ask).await
}

async fn create<K>(api: Api<K>, object: Value) -> Result<K>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    Ok(api.create(&PostParams::default(), &serde_json::from_value(object)?).await?)
}

/// Its pods stay Pending: there are no nodes.
fn job(name: &str) -> Value {
    let mut job = fixture::example();
    job["metadata"]["name"] = json!(name);
    job
}

fn print(title: &str, figures: &[(&str, String)]) {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header([title, ""]);
    for (name, value) in figures {
        table.add_row([name, value.as_str()]);
    }
    eprintln!("{table}");
}

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_leads_and_the_other_follows_when_it_ends() -> Result<()> {
    on_control_plane(async |world| {
        let (mut one, mut two) = (world.operator("one").await?, world.operator("two").await?);
        let start = world.mark()?;
        one.start_with_lease()?;
        one.wait_until_leading().await?;
        two.start_with_lease()?;
        two.answers("/readyz", 200, "stands by").await?;
        one.answers("/readyz", 200, "ok").await?;
        world.first_job_of("first").await?;
        assert!(one.leads().await && !two.leads().await);
        let calls = world.calls(start)?;
        // One that repeats itself because its cache is behind is told 409.
        let created = |call: &&Call| call.verb == "create" && call.resource == "jobs" && call.code == 201;
        assert_eq!(calls.iter().filter(created).count(), 1, "{calls:#?}");
        let strange = |call: &&Call| call.operator == "two" && !["leases", ""].contains(&&*call.resource);
        assert_eq!(calls.iter().find(strange), None, "who stands by does no more than that");

        let killed = Instant::now();
        one.signal(Signal::KILL)?;
        one.ended().await?;
        two.wait_until_leading().await?;
        let after_kill = killed.elapsed();
        assert!(after_kill < Duration::from_secs(15), "{after_kill:?}");
        world.first_job_of("second").await?;

        one.start_with_lease()?;
        one.answers("/readyz", 200, "stands by").await?;
        assert!(!one.leads().await);

        let told = Instant::now();
        two.signal(Signal::TERM)?;
        let status = two.ended().await?;
        let after_term = told.elapsed();
        assert!(status.success() && after_term < Duration::from_secs(5), "{status}, {after_term:?}");
        one.wait_until_leading().await?;
        let after_release = told.elapsed();
        assert!(after_release < Duration::from_secs(3), "{after_release:?}");
        world.first_job_of("third").await?;

        // Whoever takes the lease by force is obeyed.
        let leases: Api<Lease> = Api::namespaced(world.client.clone(), NAMESPACE);
        let robbed = Patch::Merge(json!({"spec": {"holderIdentity": "nobody"}}));
        leases.patch("growth-operator", &PatchParams::default(), &robbed).await?;
        let status = one.ended().await?;
        assert_eq!(status.code(), Some(1), "who has lost the lease ends itself");

        print(
            "leader election",
            &[
                ("the other leads after SIGKILL", seconds(after_kill)),
                ("the other leads after SIGTERM", seconds(after_release)),
                ("end after SIGTERM", seconds(after_term)),
            ],
        );
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_goes_away_and_returns_is_found_again() -> Result<()> {
    on_control_plane(async |world| {
        let mut operator = world.operator("operator").await?;
        operator.start(&["--dead-watch-seconds", "3"])?;
        operator.answers("/readyz", 200, "ok").await?;
        assert!(operator.leads().await, "without a Lease it always acts");
        world.first_job_of("before").await?;
        operator.answers("/livez", 200, "ok").await?;

        // From before the stop: connections break while it is still under way.
        let away = Instant::now();
        world.cluster.stop_component("kube-apiserver")?;
        let sentence = operator.answers("/livez", 503, "the watch of ").await?;
        let dead_after = away.elapsed();
        assert!(dead_after > Duration::from_secs(3), "{dead_after:?}");
        world.cluster.start_component("kube-apiserver").await?;
        let back = Instant::now();
        world.first_job_of("after").await?;
        let recovered_after = back.elapsed();
        within(Duration::from_secs(60), "/livez", async || {
            Ok((operator.get("/livez").await?.0 == 200).then_some(()))
        })
        .await?;
        let alive_after = back.elapsed();

        operator.signal(Signal::TERM)?;
        let told = Instant::now();
        let status = operator.ended().await?;
        let ended_after = told.elapsed();
        assert!(status.success() && ended_after < Duration::from_secs(5), "{status}, {ended_after:?}");
        print(
            "API server away",
            &[
                ("/livez fails, limit 3 s", seconds(dead_after)),
                ("in words", sentence.trim().to_owned()),
                ("a new job has its first Job after the API server's return", seconds(recovered_after)),
                ("/livez is good again", seconds(alive_after)),
                ("end after SIGTERM", seconds(ended_after)),
            ],
        );
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_jobs_cost_little_and_a_restart_writes_nothing() -> Result<()> {
    on_control_plane(async |world| {
        let mut operator = world.operator("operator").await?;
        let first = world.mark()?;
        operator.start_with_lease()?;
        operator.answers("/readyz", 200, "ok").await?;
        let started = Instant::now();
        let empty = operator.mebibytes("VmRSS")?;

        let jobs = world.api::<GrowthTrainingJob>();
        stream::iter(0..JOBS)
            .map(|number| create(jobs.clone(), job(&format!("job-{number}"))))
            .buffer_unordered(16)
            .try_for_each(async |_| Ok(()))
            .await?;
        let stored_after = started.elapsed();
        let pods = world.api::<Pod>();
        // With a selector, an API server does not say how many more there are.
        let one = ListParams::default().limit(1);
        within(Duration::from_secs(120), "a Pending pod for each job", async || {
            let first = pods.list_metadata(&one).await?;
            let more = first.metadata.remaining_item_count.unwrap_or(0);
            Ok((first.items.len() + more as usize >= JOBS).then_some(()))
        })
        .await?;
        let pods_after = started.elapsed();
        settled(world).await?;
        let preparing = operator.metric("growth_jobs{phase=\"Preparing\"}").await?;
        assert_eq!(preparing, Some(JOBS as f64));
        let busy = operator.processor_seconds()?;
        let (resident, peak) = (operator.mebibytes("VmRSS")?, operator.mebibytes("VmHWM")?);

        let calls = world.calls(first)?;
        let all_calls = calls.len();
        let starts = calls.iter().filter(|call| call.verb == "create" && call.resource == "jobs").count();
        let idle = world.mark()?;
        const WINDOW: Duration = Duration::from_secs(30);
        tokio::time::sleep(WINDOW).await;
        let calls = world.calls(idle)?;
        let counted = |resource: &str| calls.iter().filter(|call| call.resource == resource).count();
        let other = calls.iter().find(|call| call.resource != "leases" && call.verb != "watch");
        assert_eq!(other, None, "idle, it only watches and renews its lease");
        let idle_seconds = operator.processor_seconds()? - busy;

        operator.signal(Signal::TERM)?;
        assert!(operator.ended().await?.success());
        let restart = world.mark()?;
        operator.start_with_lease()?;
        let restarted = Instant::now();
        until("all jobs are reconciled", async || {
            let runs = operator.metric("growth_operator_reconcile_runs_total").await.ok().flatten();
            Ok(runs.is_some_and(|runs| runs >= JOBS as f64).then_some(()))
        })
        .await?;
        let reconciled_after = restarted.elapsed();
        settled(world).await?;
        let writes: Vec<Call> = world.calls(restart)?.into_iter().filter(Call::is_write).collect();
        assert_eq!(writes, [], "a restart over jobs that have not changed writes nothing");
        let runs = operator.metric("growth_operator_reconcile_runs_total").await?.unwrap_or(0.0);
        let took = operator.metric("growth_operator_reconcile_duration_seconds_sum").await?.unwrap_or(0.0);
        let (resident_again, peak_again) = (operator.mebibytes("VmRSS")?, operator.mebibytes("VmHWM")?);

        let mebibytes = |value: f64| format!("{value:.1} MiB");
        print(
            &format!("{JOBS} jobs"),
            &[
                ("stored after", seconds(stored_after)),
                ("each has its data Job and a Pending pod after", seconds(pods_after)),
                ("calls of the operator until then", format!("{all_calls}, {starts} of them create a Job")),
                ("processor time of the operator until then", format!("{busy:.2} s")),
                ("resident without jobs", mebibytes(empty)),
                ("resident, peak", format!("{}, {}", mebibytes(resident), mebibytes(peak))),
                ("calls in 30 s idle: watches", (calls.len() - counted("leases")).to_string()),
                ("calls in 30 s idle: lease", counted("leases").to_string()),
                ("processor time in 30 s idle", format!("{idle_seconds:.2} s")),
                ("restarted: all reconciled after", seconds(reconciled_after)),
                ("restarted: mean reconcile", format!("{:.3} ms of {runs}", took / runs * 1000.0)),
                ("restarted: processor time", format!("{:.2} s", operator.processor_seconds()?)),
                (
                    "restarted: resident, peak",
                    format!("{}, {}", mebibytes(resident_again), mebibytes(peak_again)),
                ),
            ],
        );
        for value in [resident, resident_again] {
            assert!(value < 40.0, "{value} MiB");
        }
        Ok(())
    })
    .await
}

/// Waits until the operators have made no call but the lease's for five seconds.
async fn settled(world: &World) -> Result<()> {
    const QUIET: Duration = Duration::from_secs(5);
    let mut last = (world.mark()?, Instant::now());
    within(Duration::from_secs(120), "the operator comes to rest", async || {
        let is_busy = world.calls(last.0)?.iter().any(|call| call.resource != "leases");
        if is_busy {
            last = (world.mark()?, Instant::now());
        }
        Ok((last.1.elapsed() > QUIET).then_some(()))
    })
    .await
}

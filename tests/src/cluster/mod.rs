//! A real Kubernetes on one Linux machine: etcd, API server, controller manager, scheduler, and nodes with containerd
//! and kubelet, each in namespaces of its own. No Docker, no registry, no virtual machine.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use growth_tests::cluster::{Cluster, Options};
//! let cluster = Cluster::up(&Cluster::default_root(), "mine", Options { nodes: 2 }).await?;
//! let client = cluster.client().await?;
//! # Ok(()) }
//! ```

mod certificates;
mod cgroup;
pub mod command;
mod control_plane;
mod daemon;
pub mod layout;
mod node;
mod programs;
mod s3;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, NodeCondition};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::{Condition, await_condition};
use kube::{Api, Client, Config};
use serde::{Deserialize, Serialize};

pub use control_plane::COMPONENTS;
use layout::{Layout, MAX_NODES, Network, node_name};
pub use s3::S3;

use crate::images::{self, Archive};
use crate::s3_proxy::Fault;
use crate::workspace;

/// How long any single step may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// What kind of cluster `up` starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// At most 15. None: a control plane only, for tests of the API; it needs no root.
    pub nodes: u8,
}

/// A cluster that has been started.
#[derive(Debug, Clone)]
pub struct Cluster {
    layout: Layout,
    state: State,
}

/// What must be known to find the cluster again: kept in a file of its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    options: Options,
    network: Network,
    /// Extended resource `nvidia.com/gpu` per node.
    gpus: BTreeMap<u8, u32>,
}

/// One line of `cluster status`.
#[derive(Debug, Serialize)]
pub struct ComponentStatus {
    /// Its log is called so, too.
    pub component: String,
    /// `running`, `stopped`, or for nodes what Kubernetes says: `Ready`, `NotReady`.
    pub state: String,
}

impl Cluster {
    /// `target/cluster` in the workspace.
    pub fn default_root() -> PathBuf {
        workspace().join("target/cluster")
    }

    /// Starts the cluster `name` below `root` and returns when its nodes are ready and DNS answers. If it is up
    /// already with these options, nothing happens; what is left of an earlier one is removed first.
    pub async fn up(root: &Path, name: &str, options: Options) -> Result<Self> {
        let layout = Layout::new(root, name)?;
        check_prerequisites(options)?;
        let cluster_lock = lock(&layout.folder().join(".lock"))?;
        if let Ok(cluster) = Self::read(&layout) {
            if cluster.state.options == options && cluster.is_healthy().await {
                return Ok(cluster);
            }
            remove_everything(&layout)?;
        }
        if layout.logs().exists() {
            fs::remove_dir_all(layout.logs())?;
        }
        programs::build(&layout, options.nodes > 0)?;
        let images = if options.nodes > 0 { images::build_system_images(&layout)? } else { Vec::new() };

        let steps = Steps(Instant::now());
        let cluster = Self::claim(&layout, options)?;
        let started = cluster.start_everything(&images, &steps).await;
        drop(cluster_lock);
        started.with_context(|| format!("the logs are in {}", layout.logs().display()))?;
        Ok(cluster)
    }

    /// The cluster that an earlier [`Cluster::up`] has started. Errors: there is none.
    pub fn attach(root: &Path, name: &str) -> Result<Self> {
        let layout = Layout::new(root, name)?;
        Self::read(&layout).with_context(|| {
            format!(
                "no cluster in {}: `cargo run --release -p growth-tests --bin cluster -- up`",
                layout.folder().display()
            )
        })
    }

    /// Ends every process and removes every trace but the logs, whatever state the cluster is in.
    pub fn down(root: &Path, name: &str) -> Result<()> {
        let layout = Layout::new(root, name)?;
        if !layout.folder().exists() {
            return Ok(());
        }
        let _lock = lock(&layout.folder().join(".lock"))?;
        remove_everything(&layout)
    }

    fn read(layout: &Layout) -> Result<Self> {
        let content = fs::read(layout.state())?;
        Ok(Cluster { layout: layout.clone(), state: serde_json::from_slice(&content)? })
    }

    fn write_state(&self) -> Result<()> {
        Ok(fs::write(self.layout.state(), serde_json::to_vec_pretty(&self.state)?)?)
    }

    /// Chooses addresses and starts etcd, whose port marks them as taken.
    fn claim(layout: &Layout, options: Options) -> Result<Self> {
        let _lock = lock(&std::env::temp_dir().join("growth-cluster.lock"))?;
        let network = Network::unused()?;
        let cluster =
            Cluster { layout: layout.clone(), state: State { options, network, gpus: BTreeMap::new() } };
        cluster.write_state()?;
        if options.nodes > 0 {
            node::create_bridge(layout, network)?;
        }
        control_plane::start(layout, network, &options, "etcd")?;
        wait_until("etcd", || {
            Ok(std::net::TcpStream::connect((network.loopback(), layout::ETCD_PORT)).is_ok())
        })?;
        Ok(cluster)
    }

    async fn start_everything(&self, images: &[Archive], steps: &Steps) -> Result<()> {
        let Cluster { layout, state: State { options, network, .. } } = self;
        s3::start(layout, *network, options)?;
        control_plane::write_credentials(layout, *network, options)?;
        control_plane::start(layout, *network, options, "kube-apiserver")?;
        self.wait_for_api().await?;
        for component in ["kube-controller-manager", "kube-scheduler"] {
            control_plane::start(layout, *network, options, component)?;
        }
        steps.done("control plane");
        if options.nodes == 0 {
            return Ok(());
        }

        let boots = (1..=options.nodes).map(|number| {
            let (cluster, images) = (self.clone(), images.to_vec());
            tokio::task::spawn_blocking(move || {
                node::start(&cluster.layout, cluster.state.network, &cluster.state.options, number)?;
                images.iter().try_for_each(|image| node::load_image(&cluster.layout, number, &image.path))
            })
        });
        for boot in boots.collect::<Vec<_>>() {
            boot.await??;
        }
        steps.done("container runtimes and images");
        self.apply(&fs::read_to_string(workspace().join("tests/cluster/manifests/coredns.yaml"))?)?;
        let storage = fs::read_to_string(workspace().join("tests/cluster/manifests/s3.yaml"))?;
        self.apply(&storage.replace("@GATEWAY@", &network.gateway().to_string()))?;
        for number in 1..=options.nodes {
            self.wait_for_kubelet(number, Timestamp::UNIX_EPOCH).await?;
        }
        steps.done("nodes");
        self.wait_for_dns().await?;
        steps.done("DNS");
        Ok(())
    }

    /// The API server answers, here and now.
    async fn is_healthy(&self) -> bool {
        let Ok(status) = self.status().await else { return false };
        status.iter().all(|line| ["running", "Ready"].contains(&line.state.as_str()))
    }

    async fn wait_for_api(&self) -> Result<()> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            match self.client().await?.request_text(request).await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    bail!("the API server is not ready after {} s: {error}", STEP_TIMEOUT.as_secs())
                }
                // There is nothing to watch before the server listens.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Waits until the DNS pods of all nodes are ready.
    pub async fn wait_for_dns(&self) -> Result<()> {
        let api: Api<DaemonSet> = Api::namespaced(self.client().await?, "kube-system");
        let nodes = i32::from(self.state.options.nodes);
        let ready = move |set: Option<&DaemonSet>| {
            let status = set.and_then(|set| set.status.as_ref());
            status.is_some_and(|status| status.number_ready == nodes)
        };
        wait_for(api, "coredns", "DNS", ready).await
    }

    /// Waits until the node's kubelet has reported, after `since`, that it is ready.
    async fn wait_for_kubelet(&self, number: u8, since: Timestamp) -> Result<()> {
        let name = node_name(number);
        let api: Api<Node> = Api::all(self.client().await?);
        // Reports carry whole seconds.
        let since = since.as_second();
        let reported = move |node: Option<&Node>| {
            let condition = node.and_then(ready_condition);
            condition.is_some_and(|condition| {
                let heartbeat = condition.last_heartbeat_time.as_ref();
                condition.status == "True" && heartbeat.is_some_and(|time| time.0.as_second() >= since)
            })
        };
        wait_for(api, &name, &format!("node {name} Ready"), reported).await
    }

    /// Waits until Kubernetes has noticed that a node is lost.
    pub async fn wait_for_node_loss(&self, number: u8) -> Result<()> {
        let name = node_name(number);
        let api: Api<Node> = Api::all(self.client().await?);
        let lost = |node: Option<&Node>| node.is_some_and(|node| !is_ready(node));
        wait_for(api, &name, &format!("node {name} NotReady"), lost).await
    }

    /// A client with the administrator's rights.
    pub async fn client(&self) -> Result<Client> {
        client_of(&self.layout.kubeconfig()).await
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig()
    }

    /// What names this cluster's bridge, cables and cgroups.
    pub fn id(&self) -> String {
        self.layout.id()
    }

    /// The processes of this cluster by name and number: daemons and whatever they have started outside containers.
    pub fn processes(&self) -> Result<Vec<(String, u32)>> {
        Ok(daemon::running(&self.layout)?.into_iter().map(|daemon| (daemon.name, daemon.pid)).collect())
    }

    /// The API server, as nodes and pods reach it.
    pub fn api_server(&self) -> SocketAddr {
        (control_plane::api_address(self.state.network, &self.state.options), layout::API_PORT).into()
    }

    /// How many nodes it was started with.
    pub fn nodes(&self) -> u8 {
        self.state.options.nodes
    }

    /// The S3 server: addresses and credentials.
    pub fn s3(&self) -> S3 {
        S3::new(self.state.network)
    }

    /// `kubectl` of this cluster's version, pointed at it.
    pub fn kubectl(&self) -> Command {
        self.client_program("kubectl")
    }

    /// `helm`, pointed at this cluster.
    pub fn helm(&self) -> Command {
        self.client_program("helm")
    }

    fn client_program(&self, name: &str) -> Command {
        let mut command = Command::new(self.layout.program(name));
        command.env("KUBECONFIG", self.layout.kubeconfig());
        command
    }

    /// `kubectl apply` of manifests.
    fn apply(&self, manifests: &str) -> Result<()> {
        let file = self.layout.folder().join("apply.yaml");
        fs::write(&file, manifests)?;
        command::output(self.kubectl().args(["apply", "--server-side", "--filename"]).arg(file)).map(drop)
    }

    /// Every component, node and server with its state.
    pub async fn status(&self) -> Result<Vec<ComponentStatus>> {
        let daemons = daemon::running(&self.layout)?;
        let runs = |name: &str| daemons.iter().any(|daemon| daemon.name == name);
        let mut lines: Vec<ComponentStatus> = COMPONENTS
            .iter()
            .chain(&s3::COMPONENTS)
            .map(|name| ComponentStatus {
                component: (*name).to_string(),
                state: if runs(name) { "running" } else { "stopped" }.to_string(),
            })
            .collect();
        let nodes = match self.client().await {
            Ok(client) if runs("kube-apiserver") => {
                Api::<Node>::all(client).list(&Default::default()).await?.items
            }
            _ => Vec::new(),
        };
        for number in 1..=self.nodes() {
            let name = node_name(number);
            let known = nodes.iter().find(|node| node.metadata.name.as_deref() == Some(&name));
            let state = match known {
                _ if !runs(&name) => "stopped",
                Some(node) if is_ready(node) => "Ready",
                _ => "NotReady",
            };
            lines.push(ComponentStatus { component: name, state: state.to_string() });
        }
        Ok(lines)
    }

    /// The log of a component (`etcd`, `n1-kubelet`, `audit`, ...). Errors: it names those there are.
    pub fn log(&self, component: &str) -> Result<PathBuf> {
        let file = self.layout.log(component);
        if !file.exists() {
            bail!("no component {component}; there are: {}", self.log_names()?.join(", "));
        }
        Ok(file)
    }

    fn log_names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = fs::read_dir(self.layout.logs())?
            .flatten()
            .filter_map(|entry| entry.file_name().to_string_lossy().strip_suffix(".log").map(String::from))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Kills a component of the control plane, at once.
    pub fn stop_component(&self, component: &str) -> Result<()> {
        check_component(component)?;
        daemon::end_all(&self.layout, |name| name == component)
    }

    /// A component of the control plane stands still for a while, as on an overloaded machine.
    pub async fn pause_component(&self, component: &str, time: Duration) -> Result<()> {
        check_component(component)?;
        let pause = daemon::pause(&self.layout, component)?;
        tokio::time::sleep(time).await;
        drop(pause);
        Ok(())
    }

    /// Starts a component of the control plane that was stopped, and waits for the API server.
    pub async fn start_component(&self, component: &str) -> Result<()> {
        check_component(component)?;
        if daemon::running_as(&self.layout, component)?.is_empty() {
            control_plane::start(&self.layout, self.state.network, &self.state.options, component)?;
        }
        self.wait_for_api().await
    }

    /// Loads an OCI archive into every running node.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        for number in 1..=self.nodes() {
            if node::is_running(&self.layout, number)? {
                node::load_image(&self.layout, number, archive)?;
            }
        }
        Ok(())
    }

    /// A power cut: all that runs on the node ends at once. Kubernetes notices after 20 s.
    pub fn kill_node(&self, number: u8) -> Result<()> {
        self.check_node(number)?;
        node::kill(&self.layout, number)
    }

    /// Boots a killed node and waits until it is ready.
    pub async fn start_node(&self, number: u8) -> Result<()> {
        self.check_node(number)?;
        if !node::is_running(&self.layout, number)? {
            let now = Timestamp::now();
            node::start(&self.layout, self.state.network, &self.state.options, number)?;
            self.wait_for_kubelet(number, now).await?;
        }
        // Another process may have set them since this value was made.
        match Self::read(&self.layout)?.state.gpus.get(&number) {
            // The kubelet reports no devices that it does not manage.
            Some(gpus) => self.patch_gpus(number, *gpus).await,
            None => Ok(()),
        }
    }

    /// Cuts the node from the API server and the other nodes; S3 stays in reach.
    pub fn partition_node(&self, number: u8) -> Result<()> {
        self.check_node(number)?;
        node::partition(&self.layout, self.state.network, &self.state.options, number)
    }

    /// Ends a partition.
    pub fn heal_node(&self, number: u8) -> Result<()> {
        self.check_node(number)?;
        node::heal(&self.layout, number)
    }

    /// A command that runs inside the node: in its namespaces, with the host's programs.
    pub fn on_node(&self, number: u8) -> Result<Command> {
        self.check_node(number)?;
        node::inside(&self.layout, number)
    }

    /// A client with the rights of the node's kubelet.
    pub async fn node_client(&self, number: u8) -> Result<Client> {
        self.check_node(number)?;
        client_of(&self.layout.pki().join(format!("{}.kubeconfig", node_name(number)))).await
    }

    /// Gives the node `gpus` of the extended resource `nvidia.com/gpu`.
    pub async fn set_gpus(&self, number: u8, gpus: u32) -> Result<()> {
        self.check_node(number)?;
        self.patch_gpus(number, gpus).await?;
        let mut stored = Self::read(&self.layout)?;
        stored.state.gpus.insert(number, gpus);
        stored.write_state()
    }

    async fn patch_gpus(&self, number: u8, gpus: u32) -> Result<()> {
        let api: Api<Node> = Api::all(self.client().await?);
        let quantity = serde_json::json!({"nvidia.com/gpu": gpus.to_string()});
        let patch = serde_json::json!({"status": {"capacity": quantity, "allocatable": quantity}});
        api.patch_status(&node_name(number), &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Replaces the faults that the proxy in front of S3 injects.
    pub fn set_s3_faults(&self, faults: &[Fault]) -> Result<()> {
        crate::s3_proxy::write_faults(&self.layout.s3_faults(), faults)
    }

    /// The faults in force.
    pub fn s3_faults(&self) -> Result<Vec<Fault>> {
        crate::s3_proxy::read_faults(&self.layout.s3_faults())
    }

    /// How often a fault was injected since the cluster started.
    pub fn s3_faults_injected(&self) -> usize {
        let log = fs::read_to_string(self.layout.log("s3-proxy")).unwrap_or_default();
        log.lines().filter(|line| line.starts_with(crate::s3_proxy::INJECTED)).count()
    }

    fn check_node(&self, number: u8) -> Result<()> {
        match self.nodes() {
            0 => bail!("this cluster has no nodes"),
            nodes if (1..=nodes).contains(&number) => Ok(()),
            nodes => bail!("no node n{number}: there are n1 to n{nodes}"),
        }
    }
}

/// A client for any kubeconfig.
pub async fn client_of(kubeconfig: &Path) -> Result<Client> {
    // The second call finds the provider installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let content = kube::config::Kubeconfig::read_from(kubeconfig)?;
    Ok(Client::try_from(Config::from_custom_kubeconfig(content, &Default::default()).await?)?)
}

/// Watches an object until `condition` holds, at most two minutes.
pub async fn wait_for<K>(api: Api<K>, name: &str, what: &str, condition: impl Condition<K>) -> Result<()>
where
    K: Clone + std::fmt::Debug + Send + serde::de::DeserializeOwned + kube::Resource + 'static,
{
    match tokio::time::timeout(STEP_TIMEOUT, await_condition(api, name, condition)).await {
        Ok(result) => result.map(drop).with_context(|| format!("watching {what}")),
        Err(_) => bail!("{what}: not within {} s", STEP_TIMEOUT.as_secs()),
    }
}

fn ready_condition(node: &Node) -> Option<&NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == "Ready")
}

fn is_ready(node: &Node) -> bool {
    ready_condition(node).is_some_and(|condition| condition.status == "True")
}

fn check_component(component: &str) -> Result<()> {
    if COMPONENTS.contains(&component) {
        return Ok(());
    }
    bail!("no component {component} of the control plane; there are: {}", COMPONENTS.join(", "))
}

fn check_prerequisites(options: Options) -> Result<()> {
    if options.nodes > MAX_NODES {
        bail!("--nodes {}: at most {MAX_NODES}", options.nodes);
    }
    if options.nodes == 0 {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("nodes need root (namespaces, mounts, cgroups); `--control-plane-only` does not");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<&str> =
        [("ip", "iproute2"), ("nft", "nftables"), ("unshare", "util-linux"), ("buildah", "buildah")]
            .into_iter()
            .filter(|(program, _)| !std::env::split_paths(&path).any(|folder| folder.join(program).exists()))
            .map(|(_, package)| package)
            .collect();
    if !missing.is_empty() {
        bail!("missing on this machine (Debian: apt-get install {})", missing.join(" "));
    }
    Ok(())
}

fn remove_everything(layout: &Layout) -> Result<()> {
    daemon::end_all(layout, |_| true)?;
    if rustix::process::geteuid().is_root() {
        node::remove_network(layout)?;
        cgroup::remove(&layout.cgroup())?;
    }
    for entry in fs::read_dir(layout.folder())?.flatten() {
        let path = entry.path();
        // The lock is held by whoever removes; logs are what one wants after a failure.
        if path == layout.logs() || path.ends_with(".lock") {
            continue;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// An exclusive lock that ends with its holder, however that ends.
pub(crate) fn lock(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Reading is enough for a lock, and another user's file allows no more.
    let create = |_| File::options().create(true).append(true).open(path);
    let file = File::open(path).or_else(create);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Asks until the answer is yes, for things that the kernel or a starting process offers no way to wait on.
fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + STEP_TIMEOUT;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("{what}: not within {} s", STEP_TIMEOUT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Says what is ready, and when.
struct Steps(Instant);

impl Steps {
    fn done(&self, what: &str) {
        eprintln!("{:5.1} s  {what} ready", self.0.elapsed().as_secs_f64());
    }
}

//! Nodes: namespaces of their own with containerd, a kubelet and kube-proxy inside; how one is started, lost, cut off
//! and loaded with images.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::command::{output, run};
use super::layout::{API_PORT, Layout, Network, node_name};
use super::{Options, cgroup, daemon, wait_until};
use crate::workspace;

/// The bridge between the nodes and the control plane.
pub fn create_bridge(layout: &Layout, network: Network) -> Result<()> {
    let bridge = layout.bridge();
    run(&format!("ip link add name {bridge} type bridge"))?;
    run(&format!("ip address add {}/24 dev {bridge}", network.gateway()))?;
    run(&format!("ip link set {bridge} up")).map(drop)
}

/// Whatever is left of the bridge and the cables of this cluster, also after a crash.
pub fn remove_network(layout: &Layout) -> Result<()> {
    let bridge = layout.bridge();
    for link in fs::read_dir("/sys/class/net")? {
        let name = link?.file_name().to_string_lossy().into_owned();
        // The cables begin with the bridge's name, too.
        if name.starts_with(&bridge) {
            remove_link(&name)?;
        }
    }
    Ok(())
}

/// A cable whose other end was in a dying namespace goes by itself, some time.
fn remove_link(name: &str) -> Result<()> {
    let link = Path::new("/sys/class/net").join(name);
    if !link.exists() {
        return Ok(());
    }
    match run(&format!("ip link delete {name}")) {
        Err(error) if link.exists() => Err(error),
        _ => Ok(()),
    }
}

/// Boots node `number`: what its disk holds from an earlier life is still there.
pub fn start(layout: &Layout, network: Network, options: &Options, number: u8) -> Result<()> {
    let name = node_name(number);
    write_configuration(layout, network, number)?;
    // After a power cut the kubelet would take the cgroups of lost containers for running ones.
    let cgroup = format!("{}/{name}", layout.cgroup());
    cgroup::remove(&cgroup)?;
    cgroup::create(&cgroup)?;

    let routes = (1..=options.nodes)
        .filter(|other| *other != number)
        .map(|other| format!("{},{}", network.pod_subnet(other), network.node(other)));
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "sh"])
        .arg(workspace().join("tests/cluster/node/boot.sh"))
        .env("NAME", &name)
        .env("ADDRESS", network.node(number).to_string())
        .env("GATEWAY", network.gateway().to_string())
        .env("POD_ROUTES", routes.collect::<Vec<_>>().join(" "))
        .env("POD_NETWORK", network.pods())
        .env("FOLDER", layout.node(number))
        .env("BIN", layout.bin())
        .env("LOGS", layout.logs())
        .env("KUBECONFIG", layout.pki().join(format!("{name}.kubeconfig")))
        .env("KUBE_PROXY_KUBECONFIG", layout.pki().join("kube-proxy.kubeconfig"))
        .stdin(Stdio::piped());
    let mut child = daemon::start(layout, &name, &mut command)?;

    // Asked once more it may be hidden for a moment: while it becomes the shell it has no environment.
    let mut first = None;
    wait_until(&format!("the first process of {name}"), || {
        first = init_of(layout, number)?;
        Ok(first.is_some())
    })?;
    let init = first.with_context(|| format!("{name} has no first process"))?;
    let cable = layout.cable(number);
    run(&format!("ip link add {cable} type veth peer name eth0 netns {init}"))?;
    run(&format!("ip link set {cable} master {} up", layout.bridge()))?;
    run(&format!("ip route replace {} via {}", network.pod_subnet(number), network.node(number)))?;
    let mut boot = child.stdin.take().context("the node's first process has no standard input")?;
    boot.write_all(b"go\n")
        .with_context(|| format!("{name} ended at once: see {}", layout.log(&name).display()))
}

/// The power cut: everything that runs on the node ends at once, its disk stays.
pub fn kill(layout: &Layout, number: u8) -> Result<()> {
    let name = node_name(number);
    daemon::end_all(layout, |daemon| daemon == name)?;
    remove_link(&layout.cable(number))
}

/// Whether the node has power.
pub fn is_running(layout: &Layout, number: u8) -> Result<bool> {
    Ok(init_of(layout, number)?.is_some())
}

/// Cuts the node from the API server and from the other nodes and their pods. Its own pods run on, and reach S3.
pub fn partition(layout: &Layout, network: Network, options: &Options, number: u8) -> Result<()> {
    heal(layout, number)?;
    let others: Vec<String> = (1..=options.nodes)
        .filter(|other| *other != number)
        .flat_map(|other| [network.node(other).to_string(), network.pod_subnet(other)])
        .collect();
    let mut cut = vec![
        format!("ip daddr {gateway} tcp dport {API_PORT} drop", gateway = network.gateway()),
        format!("ip saddr {gateway} tcp sport {API_PORT} drop", gateway = network.gateway()),
    ];
    if !others.is_empty() {
        let others = others.join(", ");
        cut.extend([format!("ip saddr {{ {others} }} drop"), format!("ip daddr {{ {others} }} drop")]);
    }
    let chains = ["input", "output", "forward"].map(|hook| {
        format!("chain {hook} {{\ntype filter hook {hook} priority -300\n{}\n}}\n", cut.join("\n"))
    });
    let rules = layout.node(number).join("partition.nft");
    fs::write(&rules, format!("table ip {PARTITION} {{\n{}}}\n", chains.concat()))?;
    output(inside(layout, number)?.args(["nft", "--file"]).arg(rules)).map(drop)
}

const PARTITION: &str = "growth_partition";

/// Ends the partition, if there is one.
pub fn heal(layout: &Layout, number: u8) -> Result<()> {
    let tables = output(inside(layout, number)?.args(["nft", "list", "tables"]))?;
    if tables.contains(PARTITION) {
        output(inside(layout, number)?.args(["nft", "delete", "table", "ip", PARTITION]))?;
    }
    Ok(())
}

/// Gives the node's container runtime the image in an OCI archive. Waits for the runtime.
pub fn load_image(layout: &Layout, number: u8, archive: &Path) -> Result<()> {
    let name = node_name(number);
    let ctr = |arguments: &[&str]| -> Result<String> {
        output(inside(layout, number)?.arg(layout.program("ctr")).args(arguments))
    };
    wait_until(&format!("containerd of {name}"), || Ok(ctr(&["--connect-timeout=1s", "version"]).is_ok()))
        .with_context(|| layout.log(&format!("{name}-containerd")).display().to_string())?;
    let archive = archive.canonicalize().with_context(|| format!("cannot read {}", archive.display()))?;
    ctr(&["--namespace=k8s.io", "images", "import", &archive.to_string_lossy()])
        .with_context(|| format!("loading {} into {name}", archive.display()))
        .map(drop)
}

/// A command that runs inside the node.
pub fn inside(layout: &Layout, number: u8) -> Result<Command> {
    let Some(init) = init_of(layout, number)? else {
        bail!("{} is not running: `cluster node start {}`", node_name(number), node_name(number));
    };
    let mut command = Command::new("nsenter");
    command.args(["--target", &init.to_string(), "--mount", "--net", "--uts", "--ipc", "--pid", "--"]);
    Ok(command)
}

/// The node's process 1, by its number out here.
fn init_of(layout: &Layout, number: u8) -> Result<Option<u32>> {
    let first = |pid: u32| -> bool {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        let numbers: Vec<&str> = numbers.split_whitespace().collect();
        numbers.len() > 1 && numbers.last() == Some(&"1")
    };
    let daemons = daemon::running_as(layout, &node_name(number))?;
    Ok(daemons.iter().map(|daemon| daemon.pid).find(|pid| first(*pid)))
}

fn write_configuration(layout: &Layout, network: Network, number: u8) -> Result<()> {
    let folder = layout.node(number);
    fs::create_dir_all(folder.join("cni"))?;
    let values = [
        ("@NAME@", node_name(number)),
        ("@FOLDER@", folder.display().to_string()),
        ("@BIN@", layout.bin().display().to_string()),
        ("@PKI@", layout.pki().display().to_string()),
        ("@CGROUP@", format!("/{}/{}", layout.cgroup(), node_name(number))),
        ("@POD_SUBNET@", network.pod_subnet(number)),
    ];
    let templates = workspace().join("tests/cluster/node");
    for (template, file) in [
        ("containerd.toml", "containerd.toml"),
        ("kubelet.yaml", "kubelet.yaml"),
        ("cni.conflist", "cni/pods.conflist"),
    ] {
        let mut content = fs::read_to_string(templates.join(template))?;
        for (key, value) in &values {
            content = content.replace(key, value);
        }
        fs::write(folder.join(file), content)?;
    }
    // CoreDNS asks nobody else.
    Ok(fs::write(folder.join("resolv.conf"), "")?)
}

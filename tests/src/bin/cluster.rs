//! `cluster`: a real Kubernetes in one command.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};
use growth_tests::cluster::{COMPONENTS, Cluster, Options};
use growth_tests::s3_proxy::{self, Fault};

/// A real Kubernetes on this machine, with no Docker and no registry.
///
/// `up` builds what is missing (a quarter of an hour the first time), starts it and returns when it is ready. Several
/// clusters can stand side by side: give each its --name.
#[derive(Parser)]
#[command(name = "cluster", version)]
struct Cli {
    /// Folder for programs, images and clusters [default: target/cluster of the workspace]
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// Which cluster
    #[arg(long, global = true, default_value = "default")]
    name: String,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start the cluster and print what to export
    Up(Up),
    /// End every process and remove every trace but the logs
    Down,
    /// What runs, and which nodes are ready
    Status,
    /// Print what to export to use the cluster from this shell
    Env,
    /// Print a component's log: etcd, kube-apiserver, audit, n1-kubelet, ...
    Logs {
        component: String,
        /// Go on printing what is added
        #[arg(short, long)]
        follow: bool,
    },
    /// Run kubectl against the cluster
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Load images from OCI archives into every node
    Load {
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Lose nodes, cut them off, let them pose as GPU nodes
    #[command(subcommand)]
    Node(NodeVerb),
    /// Kill and start parts of the control plane
    #[command(subcommand)]
    ControlPlane(ControlPlaneVerb),
    /// Faults of the S3 server
    #[command(subcommand)]
    S3(S3Verb),
    /// The proxy itself; `up` starts it
    #[command(hide = true)]
    S3Proxy {
        #[arg(long, required = true)]
        listen: Vec<SocketAddr>,
        #[arg(long)]
        upstream: String,
        #[arg(long)]
        faults: PathBuf,
    },
}

#[derive(Args)]
struct Up {
    /// How many nodes
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// No nodes: for tests of the API. Needs no root
    #[arg(long, conflicts_with = "nodes")]
    control_plane_only: bool,
    /// Images to load into the nodes once they are ready
    #[arg(long)]
    load: Vec<PathBuf>,
}

#[derive(Subcommand)]
enum NodeVerb {
    /// Cut the power: everything on the node ends at once
    Kill { node: NodeNumber },
    /// Boot a killed node again
    Start { node: NodeNumber },
    /// Cut the node from the API server and the other nodes; S3 stays in reach
    Partition { node: NodeNumber },
    /// End a partition
    Heal { node: NodeNumber },
    /// Give the node GPUs: the extended resource nvidia.com/gpu
    Gpus { node: NodeNumber, count: u32 },
    /// kubectl label node
    Label {
        node: NodeNumber,
        #[arg(required = true, allow_hyphen_values = true)]
        labels: Vec<String>,
    },
    /// kubectl taint node
    Taint {
        node: NodeNumber,
        #[arg(required = true, allow_hyphen_values = true)]
        taints: Vec<String>,
    },
}

#[derive(Subcommand)]
enum ControlPlaneVerb {
    /// Kill a component
    Kill {
        #[arg(value_parser = COMPONENTS)]
        component: String,
    },
    /// Start a component that was killed
    Start {
        #[arg(value_parser = COMPONENTS)]
        component: String,
    },
}

#[derive(Subcommand)]
enum S3Verb {
    /// Add a fault, for example: --method PUT --percent 30 status 503
    Fault(Fault),
    /// Print the faults in force
    Faults,
    /// No more faults
    Heal,
}

/// `1` or `n1`.
#[derive(Clone, Copy)]
struct NodeNumber(u8);

impl std::str::FromStr for NodeNumber {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        text.trim_start_matches('n').parse().map(NodeNumber)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let root = cli.dir.unwrap_or_else(Cluster::default_root);
    let attach = || Cluster::attach(&root, &cli.name);
    match cli.command {
        Verb::Up(up) => {
            let started = Instant::now();
            let options = Options { nodes: if up.control_plane_only { 0 } else { up.nodes } };
            let cluster = Cluster::up(&root, &cli.name, options).await?;
            up.load.iter().try_for_each(|archive| cluster.load_image(archive))?;
            eprintln!("up after {:.1} s. To use it from this shell:\n", started.elapsed().as_secs_f64());
            print_exports(&cluster);
            Ok(())
        }
        Verb::Down => Cluster::down(&root, &cli.name),
        Verb::Status => {
            let mut table = comfy_table::Table::new();
            table.load_style(comfy_table::presets::NOTHING).set_header(["COMPONENT", "STATE"]);
            for line in attach()?.status().await? {
                table.add_row([line.component, line.state]);
            }
            print(&table.to_string());
            Ok(())
        }
        Verb::Env => {
            print_exports(&attach()?);
            Ok(())
        }
        Verb::Logs { component, follow } => {
            let file = attach()?.log(&component)?;
            let mut tail = Command::new("tail");
            tail.args(["--lines", "+1"]).args(follow.then_some("--follow")).arg(file);
            Err(tail.exec().into())
        }
        Verb::Kubectl { arguments } => Err(attach()?.kubectl().args(arguments).exec().into()),
        Verb::Load { archives } => {
            let cluster = attach()?;
            archives.iter().try_for_each(|archive| cluster.load_image(archive))
        }
        Verb::Node(verb) => node(attach()?, verb).await,
        Verb::ControlPlane(ControlPlaneVerb::Kill { component }) => attach()?.stop_component(&component),
        Verb::ControlPlane(ControlPlaneVerb::Start { component }) => {
            attach()?.start_component(&component).await
        }
        Verb::S3(verb) => s3(&attach()?, verb),
        Verb::S3Proxy { listen, upstream, faults } => s3_proxy::serve(&listen, upstream, faults).await,
    }
}

async fn node(cluster: Cluster, verb: NodeVerb) -> Result<()> {
    match verb {
        NodeVerb::Kill { node } => cluster.kill_node(node.0),
        NodeVerb::Start { node } => cluster.start_node(node.0).await,
        NodeVerb::Partition { node } => cluster.partition_node(node.0),
        NodeVerb::Heal { node } => cluster.heal_node(node.0),
        NodeVerb::Gpus { node, count } => cluster.set_gpus(node.0, count).await,
        NodeVerb::Label { node, labels } => kubectl(&cluster, "label", node, &labels),
        NodeVerb::Taint { node, taints } => kubectl(&cluster, "taint", node, &taints),
    }
}

fn kubectl(cluster: &Cluster, verb: &str, node: NodeNumber, arguments: &[String]) -> Result<()> {
    let mut command = cluster.kubectl();
    command.args([verb, "node", &format!("n{}", node.0), "--overwrite"]).args(arguments);
    if !command.status()?.success() {
        bail!("kubectl {verb} failed");
    }
    Ok(())
}

fn s3(cluster: &Cluster, verb: S3Verb) -> Result<()> {
    let mut faults = cluster.s3_faults()?;
    match verb {
        S3Verb::Fault(fault) => {
            faults.push(fault);
            cluster.set_s3_faults(&faults)
        }
        S3Verb::Faults => {
            print(&serde_json::to_string_pretty(&faults)?);
            Ok(())
        }
        S3Verb::Heal => cluster.set_s3_faults(&[]),
    }
}

fn print_exports(cluster: &Cluster) {
    let s3 = cluster.s3();
    let kubectl = cluster.kubectl();
    let bin = std::path::Path::new(kubectl.get_program()).parent().unwrap_or(std::path::Path::new("."));
    print(&format!("export KUBECONFIG={}", cluster.kubeconfig().display()));
    print(&format!("export PATH={}:$PATH", bin.display()));
    print(&format!("export AWS_ENDPOINT_URL={}", s3.endpoint));
    print(&format!("export AWS_REGION={}", s3.region));
    for (name, value) in s3.credentials() {
        print(&format!("export {name}={value}"));
    }
    eprintln!(
        "\nIn pods, S3 is {} with the bucket `{}`; faults concern both.",
        s3.endpoint_in_cluster, s3.bucket
    );
}

#[expect(clippy::print_stdout, reason = "the output of a command")]
fn print(text: &str) {
    println!("{text}");
}

//! Where a cluster's files lie, what its interfaces are called, and which addresses it has.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// The folders of one cluster. Programs and images lie in the root and are shared by all clusters below it; the rest
/// belongs to one cluster. Names in the kernel come from the folder's path, so that whatever a crashed run has left
/// can be found again, and nothing else is ever touched.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
    name: String,
}

impl Layout {
    /// The cluster `name` below `root`, which is created. Errors: a path that a node would hide from itself.
    pub fn new(root: &Path, name: &str) -> Result<Self> {
        let well_formed = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if !well_formed || ["bin", "images"].contains(&name) {
            bail!("--name {name}: use letters, digits and dashes, and neither `bin` nor `images`");
        }
        std::fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
        let root = root.canonicalize()?;
        if let Some(hidden) = ["/run", "/var/lib", "/var/log", "/proc"].iter().find(|p| root.starts_with(p)) {
            bail!("--dir {}: nodes mount their own {hidden}, so the folder cannot lie there", root.display());
        }
        Ok(Layout { root, name: name.to_string() })
    }

    /// The programs built from Go modules.
    pub fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// One program, as an absolute path.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin().join(name)
    }

    /// Archives of the images that every node gets.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Everything that belongs to this cluster alone.
    pub fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// One file per daemon, and the audit log. They outlive `down`.
    pub fn logs(&self) -> PathBuf {
        self.folder().join("logs")
    }

    /// The log of a daemon.
    pub fn log(&self, component: &str) -> PathBuf {
        self.logs().join(format!("{component}.log"))
    }

    /// Keys, certificates and the kubeconfigs of the components.
    pub fn pki(&self) -> PathBuf {
        self.folder().join("pki")
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder().join("kubeconfig")
    }

    /// What `up` was asked for and which addresses it chose.
    pub fn state(&self) -> PathBuf {
        self.folder().join("cluster.json")
    }

    /// The faults that the S3 proxy injects at present.
    pub fn s3_faults(&self) -> PathBuf {
        self.folder().join("s3-faults.json")
    }

    /// The objects of the S3 server: a folder per bucket.
    pub fn s3_objects(&self) -> PathBuf {
        self.folder().join("s3")
    }

    /// What lies on the disk of node `number`.
    pub fn node(&self, number: u8) -> PathBuf {
        self.folder().join(node_name(number))
    }

    /// Eight hexadecimal digits that tell this cluster's bridge, interfaces and cgroups from all others.
    pub fn id(&self) -> String {
        let digest = blake3::hash(self.folder().as_os_str().as_encoded_bytes());
        digest.to_hex().as_str()[..8].to_string()
    }

    /// The bridge that joins the nodes and the control plane.
    pub fn bridge(&self) -> String {
        format!("gk{}", self.id())
    }

    /// The bridge's end of a node's cable: at most 15 characters, as the kernel wants.
    pub fn cable(&self, node: u8) -> String {
        format!("gk{}n{node}", self.id())
    }

    /// The cgroup above all of this cluster's, relative to a hierarchy.
    pub fn cgroup(&self) -> String {
        format!("gk-{}", self.id())
    }
}

/// `n1`, `n2`, ...
pub fn node_name(number: u8) -> String {
    format!("n{number}")
}

/// The addresses of one of the sixteen clusters that can stand side by side on a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    index: u8,
}

/// Nodes are numbered from 1.
pub const MAX_NODES: u8 = 15;

impl Network {
    /// The first index whose addresses nobody uses. Hold the lock of [`super::lock`] until something listens on
    /// [`Network::loopback`].
    pub fn unused() -> Result<Self> {
        (0..16)
            .map(|index| Network { index })
            .find(|network| {
                let etcd_is_free = TcpListener::bind((network.loopback(), ETCD_PORT)).is_ok();
                let bridge_exists = TcpListener::bind((network.gateway(), 0)).is_ok();
                etcd_is_free && !bridge_exists
            })
            .context("sixteen clusters are up on this machine; `cluster down` one of them")
    }

    /// Where the control plane's own traffic and a cluster without nodes live.
    pub fn loopback(self) -> Ipv4Addr {
        Ipv4Addr::new(127, 77, self.index, 1)
    }

    /// The bridge's address: the API server and S3, as nodes and pods see them.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.index, 1)
    }

    /// A node's address, in the /24 of the bridge.
    pub fn node(self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.index, 10 + number)
    }

    /// The addresses of a node's pods.
    pub fn pod_subnet(self, node: u8) -> String {
        format!("10.78.{}.0/24", self.index * 16 + node)
    }

    /// The addresses of all pods.
    pub fn pods(self) -> String {
        format!("10.78.{}.0/20", self.index * 16)
    }
}

/// Client port of etcd.
pub const ETCD_PORT: u16 = 2379;
/// The API server.
pub const API_PORT: u16 = 6443;
/// The S3 server itself, on loopback.
pub const S3_SERVER_PORT: u16 = 9001;
/// The proxy in front of it, on loopback and for pods.
pub const S3_PORT: u16 = 9000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ_between_clusters() {
        let root = tempfile::tempdir().unwrap();
        let one = Layout::new(root.path(), "one").unwrap();
        let two = Layout::new(root.path(), "two").unwrap();
        assert!(one.cable(MAX_NODES).len() <= 15);
        assert_ne!(one.id(), two.id());
        assert_eq!(one.id(), Layout::new(root.path(), "one").unwrap().id());
    }

    #[test]
    fn addresses_of_clusters_and_nodes_do_not_overlap() {
        let mut seen = std::collections::HashSet::new();
        for index in 0..16 {
            let network = Network { index };
            for node in 1..=MAX_NODES {
                assert!(seen.insert(network.node(node).to_string()));
                assert!(seen.insert(network.pod_subnet(node)));
            }
        }
        assert_eq!(Network { index: 15 }.pod_subnet(15), "10.78.255.0/24");
    }

    #[test]
    fn a_folder_that_nodes_would_hide_is_refused() {
        let error = Layout::new(Path::new("/run"), "x").unwrap_err();
        assert!(error.to_string().contains("mount their own /run"), "{error}");
        let error = Layout::new(Path::new("/tmp"), "bin").unwrap_err();
        assert!(error.to_string().contains("--name bin"), "{error}");
    }
}

//! The programs of a cluster, built from the pinned Go modules in `tests/cluster/`. A program is built again only when
//! its module file, its sums or its flags have changed.

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::layout::Layout;
use crate::workspace;

/// A Go module with the programs that are built from it.
struct Module {
    /// Its folder in `tests/cluster/`.
    name: &'static str,
    /// The packages, each a program. The name of the program is that of the module when there is one only, and else
    /// the last word of the package.
    packages: &'static [&'static str],
    /// runc needs C for seccomp.
    cgo: bool,
    /// Roughly, without Go's build cache, on two cores: for the progress line.
    cold_seconds: u32,
}

/// What the control plane and the S3 server need.
const CONTROL_PLANE: &[Module] = &[
    Module { name: "etcd", packages: &["go.etcd.io/etcd/server/v3"], cgo: false, cold_seconds: 40 },
    Module {
        name: "kubernetes",
        packages: &[
            "k8s.io/kubernetes/cmd/kube-apiserver",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-proxy",
            "k8s.io/kubernetes/cmd/kube-scheduler",
            "k8s.io/kubernetes/cmd/kubectl",
            "k8s.io/kubernetes/cmd/kubelet",
        ],
        cgo: false,
        cold_seconds: 450,
    },
    Module {
        name: "versitygw",
        packages: &["github.com/versity/versitygw/cmd/versitygw"],
        cgo: false,
        cold_seconds: 50,
    },
];

/// What nodes need besides.
const NODES: &[Module] = &[
    Module {
        name: "containerd",
        packages: &[
            "github.com/containerd/containerd/v2/cmd/containerd",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            "github.com/containerd/containerd/v2/cmd/ctr",
        ],
        cgo: false,
        cold_seconds: 60,
    },
    Module { name: "runc", packages: &["github.com/opencontainers/runc"], cgo: true, cold_seconds: 15 },
    Module {
        name: "cni",
        packages: &[
            "github.com/containernetworking/plugins/plugins/main/bridge",
            "github.com/containernetworking/plugins/plugins/main/loopback",
            "github.com/containernetworking/plugins/plugins/ipam/host-local",
        ],
        cgo: false,
        cold_seconds: 5,
    },
    Module { name: "helm", packages: &["helm.sh/helm/v4/cmd/helm"], cgo: false, cold_seconds: 30 },
    Module { name: "coredns", packages: &["github.com/coredns/coredns"], cgo: false, cold_seconds: 50 },
];

/// Builds what is missing; a second caller waits for the first. `with_nodes` adds the container runtime, the network
/// plugins and CoreDNS.
pub fn build(layout: &Layout, with_nodes: bool) -> Result<()> {
    fs::create_dir_all(layout.bin())?;
    let _lock = super::lock(&layout.bin().join(".lock"))?;
    let wanted = CONTROL_PLANE.iter().chain(if with_nodes { NODES } else { &[] });
    let stale: Vec<_> = wanted.filter(|module| !module.is_built(layout)).collect();
    if stale.is_empty() {
        return Ok(());
    }
    if stale.iter().any(|module| module.cgo) && !libseccomp_exists() {
        bail!("runc needs libseccomp and pkg-config (Debian: apt-get install libseccomp-dev pkg-config)");
    }
    for (index, module) in stale.iter().enumerate() {
        module.build(layout, index + 1, stale.len())?;
    }
    Ok(())
}

fn libseccomp_exists() -> bool {
    let mut command = Command::new("pkg-config");
    command.args(["--exists", "libseccomp"]).status().is_ok_and(|status| status.success())
}

impl Module {
    fn folder(&self) -> PathBuf {
        workspace().join("tests/cluster").join(self.name)
    }

    fn stamp(&self, layout: &Layout) -> PathBuf {
        layout.bin().join(format!(".{}", self.name))
    }

    fn programs(&self) -> Vec<&'static str> {
        match self.packages {
            [_] => vec![self.name],
            several => several.iter().filter_map(|package| package.rsplit('/').next()).collect(),
        }
    }

    /// The digest of everything that the programs are made of.
    fn inputs(&self) -> Result<String> {
        let mut digest = blake3::Hasher::new();
        for file in ["go.mod", "go.sum"] {
            let path = self.folder().join(file);
            digest.update(&fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        digest.update(format!("{:?}", self.arguments(Path::new(""))?).as_bytes());
        Ok(digest.finalize().to_hex().to_string())
    }

    fn is_built(&self, layout: &Layout) -> bool {
        let stamp = fs::read_to_string(self.stamp(layout)).unwrap_or_default();
        self.inputs().is_ok_and(|inputs| inputs == stamp)
            && self.programs().iter().all(|name| layout.program(name).exists())
    }

    fn arguments(&self, bin: &Path) -> Result<Vec<String>> {
        let mut linker = "-s -w".to_string();
        if self.name == "kubernetes" {
            linker += &kubernetes_version_flags(&fs::read_to_string(self.folder().join("go.mod"))?)?;
        }
        // With several packages -o is the folder.
        let output = if self.packages.len() == 1 { bin.join(self.name) } else { bin.to_path_buf() };
        let mut arguments: Vec<String> =
            ["build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", &linker].map(String::from).to_vec();
        if self.name == "runc" {
            arguments.extend(["-tags".to_string(), "seccomp".to_string()]);
        }
        arguments.extend(["-o".to_string(), output.display().to_string()]);
        arguments.extend(self.packages.iter().map(|package| (*package).to_string()));
        Ok(arguments)
    }

    fn build(&self, layout: &Layout, number: usize, of: usize) -> Result<()> {
        let started = Instant::now();
        let title =
            format!("[{number}/{of}] go build {} (about {} s the first time)", self.name, self.cold_seconds);
        let progress = Progress::new(title);
        // A folder must exist and be named with a slash at its end.
        let mut command = Command::new("go");
        command
            .args(self.arguments(&layout.bin().join(""))?)
            .current_dir(self.folder())
            .env("CGO_ENABLED", if self.cgo { "1" } else { "0" })
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context(
            "cannot start go, which builds the cluster's programs: install Go 1.26 or newer (https://go.dev/dl)",
        )?;
        let errors = child.stderr.take().context("go has no standard error")?;
        let mut tail = Vec::new();
        for line in BufReader::new(errors).lines().map_while(std::result::Result::ok) {
            progress.package(&line);
            tail.push(line);
            if tail.len() > 20 {
                tail.remove(0);
            }
        }
        let status = child.wait()?;
        progress.finish();
        if !status.success() {
            bail!("go build {} ({status}):\n{}", self.name, tail.join("\n"));
        }
        eprintln!("built {} in {:.0} s", self.name, started.elapsed().as_secs_f64());
        Ok(fs::write(self.stamp(layout), self.inputs()?)?)
    }
}

/// Without a version Kubernetes takes itself for 0.0.0 and turns features off.
fn kubernetes_version_flags(module_file: &str) -> Result<String> {
    let version = module_file
        .lines()
        .find_map(|line| line.trim().trim_start_matches("require ").strip_prefix("k8s.io/kubernetes v"))
        .and_then(|rest| rest.split_whitespace().next())
        .context("tests/cluster/kubernetes/go.mod does not require k8s.io/kubernetes")?;
    let mut parts = version.split('.');
    let (Some(major), Some(minor)) = (parts.next(), parts.next()) else { bail!("strange version {version}") };
    let package = "k8s.io/component-base/version";
    Ok(format!(
        " -X {package}.gitVersion=v{version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
    ))
}

/// A line that moves on a terminal, and one every fifteen seconds elsewhere.
struct Progress {
    title: String,
    bar: ProgressBar,
    packages: std::cell::Cell<(usize, Instant)>,
}

impl Progress {
    fn new(title: String) -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        } else {
            eprintln!("{title}");
            ProgressBar::hidden()
        };
        bar.set_prefix(title.clone());
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress { title, bar, packages: std::cell::Cell::new((0, Instant::now())) }
    }

    fn package(&self, name: &str) {
        let (count, last_line) = self.packages.get();
        self.bar.set_message(format!("{} packages, {name}", count + 1));
        let due = self.bar.is_hidden() && last_line.elapsed() > Duration::from_secs(15);
        if due {
            eprintln!("{}: {} packages", self.title, count + 1);
        }
        self.packages.set((count + 1, if due { Instant::now() } else { last_line }));
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_is_pinned_and_names_its_programs() {
        for module in CONTROL_PLANE.iter().chain(NODES) {
            module.inputs().unwrap();
            let file = fs::read_to_string(module.folder().join("go.mod")).unwrap();
            for package in module.packages {
                assert!(file.contains(package), "{package} is not a tool of {}", module.name);
            }
        }
    }

    #[test]
    fn the_version_of_kubernetes_is_that_of_the_module_file() {
        let flags =
            kubernetes_version_flags("module x\n\nrequire k8s.io/kubernetes v1.37.2 // indirect\n").unwrap();
        assert!(flags.contains("gitVersion=v1.37.2 ") && flags.ends_with("gitMinor=37"), "{flags}");
    }
}

//! Container images without a registry and without a Docker engine: `buildah` builds the project's `Dockerfile` offline
//! around release binaries, as OCI archives that `cluster load` takes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};
use serde_json::json;

use crate::cluster::command::output;
use crate::cluster::layout::Layout;
use crate::workspace;

/// An image in a file.
#[derive(Debug, Clone)]
pub struct Archive {
    /// The OCI archive.
    pub path: PathBuf,
    /// The name that pods call it by.
    pub name: String,
    /// `sha256:...` of its manifest: what a registry would call it.
    pub digest: String,
}

/// The programs of this project that run in containers.
pub const PROGRAMS: [&str; 2] = ["growth-operator", "growth-trainer"];

/// What a pod's `image` says in the tests.
pub fn image_name(program: &str) -> String {
    format!("localhost/{program}:test")
}

/// Which binary goes into an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linking {
    /// The one for users, with libc inside. Cargo selects the features of dependencies by the packages that it builds, so
    /// for this one it compiles most of them again.
    Static,
    /// The one that `cargo test` has made for the workspace's tests, with this machine's libc beside it.
    Shared,
}

/// Builds the image of one of [`PROGRAMS`] into `folder`: the release binary, the CA bundle, the licence and the SBOM, by
/// the last stage of the `Dockerfile`. The same input gives the same bytes.
pub fn build(program: &str, folder: &Path, linking: Linking) -> Result<Archive> {
    let files = folder.join(format!("{program}.files"));
    // What Dockerfile's first stage makes from source with a network, made here from what is there.
    stage(program, &files.join("rootfs"), linking)?;
    let metadata = metadata()?;
    let version = &package(&metadata, program)?.version;
    let revision = output(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(workspace()));
    bud(
        &workspace(),
        folder,
        program,
        &[
            "--target".into(),
            program.into(),
            "--build-context".into(),
            format!("build={}", files.display()),
            "--build-arg".into(),
            format!("VERSION={version}"),
            "--build-arg".into(),
            format!("REVISION={}", revision.unwrap_or_default().trim()),
        ],
    )
}

/// Fills `rootfs` with one program's root file system, below a folder of its name: what the `Dockerfile` copies.
pub fn stage(program: &str, rootfs: &Path, linking: Linking) -> Result<()> {
    let root = rootfs.join(program);
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    let installed = root.join("usr/bin").join(program);
    match linking {
        Linking::Static => place(&static_binary(program)?, &installed, 0o755)?,
        Linking::Shared => place_with_libraries(&tested_binary(program)?, &installed, &root)?,
    }
    place(&ca_bundle()?, &root.join("etc/ssl/certs/ca-certificates.crt"), 0o644)?;
    place(&workspace().join("LICENSE"), &root.join("usr/share/doc").join(program).join("LICENSE"), 0o644)?;
    let sbom = root.join(format!("usr/share/sbom/{program}.cdx.json"));
    fs::create_dir_all(sbom.parent().context("no folder")?)?;
    fs::write(&sbom, serde_json::to_vec_pretty(&sbom_of(&metadata()?, program)?)?)?;
    fs::set_permissions(&sbom, fs::Permissions::from_mode(0o644))?;
    // User 65532 has no name and no home: programs write to /tmp, which a pod mounts, or nowhere.
    Ok(fs::create_dir_all(root.join("tmp"))?)
}

/// The release binary with libc inside.
fn static_binary(program: &str) -> Result<PathBuf> {
    // Symbols stay, for backtraces; debug information is three quarters of the file.
    let flags = ["-C", "target-feature=+crt-static", "-C", "strip=debuginfo"];
    let mut cargo = cargo("rustc");
    cargo.args(["--package", program, "--bin", program, "--"]).args(flags);
    executable(&mut cargo, program)
}

/// The release binary as it is there when the workspace is tested.
fn tested_binary(program: &str) -> Result<PathBuf> {
    let mut cargo = cargo("test");
    cargo.args(["--workspace", "--features", "growth-tests/cluster", "--no-run"]);
    executable(&mut cargo, program)
}

fn cargo(command: &str) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace()).args([command, "--release", "--locked", "--message-format=json"]);
    // Set for tests by the cargo that runs them; build scripts that watch them would run again.
    for (name, _) in std::env::vars() {
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// The program that cargo says it has built.
fn executable(cargo: &mut Command, program: &str) -> Result<PathBuf> {
    let messages = output(cargo)?;
    let artifact = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == *program && message["profile"]["test"] == false)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    artifact.with_context(|| format!("cargo built no executable {program}"))
}

/// The binary without debug information, and below `root` the libraries that it loads, where it looks for them.
fn place_with_libraries(binary: &Path, installed: &Path, root: &Path) -> Result<()> {
    place(binary, installed, 0o755)?;
    output(Command::new("strip").arg("--strip-debug").arg(installed))?;
    for line in output(Command::new("ldd").arg(binary))?.lines() {
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        if let Some(path) = path {
            place(Path::new(path), &root.join(path.trim_start_matches('/')), 0o755)?;
        }
    }
    Ok(())
}

fn ca_bundle() -> Result<PathBuf> {
    let known = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"].map(PathBuf::from);
    known
        .into_iter()
        .find(|path| path.exists())
        .context("this machine has no bundle of root certificates (Debian: apt-get install ca-certificates)")
}

fn place(from: &Path, to: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(to.parent().context("no folder")?)?;
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

/// The images that a cluster itself needs, pause and CoreDNS, from the programs in its folder.
pub fn build_system_images(layout: &Layout) -> Result<Vec<Archive>> {
    let folder = layout.images();
    let sources = workspace().join("tests/cluster/images");
    let pause = folder.join("pause.files");
    fs::create_dir_all(&pause)?;
    let coredns = folder.join("coredns.files");
    fs::create_dir_all(&coredns)?;

    let _lock = crate::cluster::lock(&folder.join(".lock"))?;
    let mut archives = Vec::new();
    for (name, files) in [("pause", &pause), ("coredns", &coredns)] {
        let dockerfile = sources.join(name).join("Dockerfile");
        fs::copy(&dockerfile, files.join("Dockerfile"))?;
        if name == "pause" {
            let mut compiler = Command::new("cc");
            compiler.args(["-Os", "-static", "-s", "-o"]).arg(files.join("pause"));
            output(compiler.arg(sources.join("pause/pause.c")))?;
        } else {
            place(&layout.program("coredns"), &files.join("coredns"), 0o755)?;
        }
        archives.push(bud(files, &folder, name, &[])?);
    }
    Ok(archives)
}

/// `buildah bud` of the `Dockerfile` in `context` into an OCI archive in `folder`. All files get the same time.
fn bud(context: &Path, folder: &Path, name: &str, arguments: &[String]) -> Result<Archive> {
    fs::create_dir_all(folder)?;
    let (path, name) = (folder.join(format!("{name}.tar")), image_name(name));
    if path.exists() {
        fs::remove_file(&path)?;
    }
    let storage = tempfile::tempdir()?;
    let buildah = || {
        let mut command = Command::new("buildah");
        command
            .args(["--storage-driver", "vfs", "--root"])
            .arg(storage.path().join("root"))
            .arg("--runroot")
            .arg(storage.path().join("run"));
        command
    };
    output(
        buildah()
            .args(["bud", "--isolation", "chroot", "--timestamp", "0", "--pull-never", "--tag", &name])
            .args(arguments)
            .arg(context),
    )
    .context("buildah builds images (Debian: apt-get install buildah)")?;
    let target = format!("oci-archive:{}:{name}", path.display());
    let digest = storage.path().join("digest");
    output(buildah().args(["push", "--digestfile"]).arg(&digest).args([&name, &target]))?;
    Ok(Archive { path, name, digest: fs::read_to_string(digest)?.trim().to_string() })
}

fn metadata() -> Result<Metadata> {
    let mut command = MetadataCommand::new();
    command.current_dir(workspace()).other_options(["--locked".to_string()]);
    // Only what this kind of machine compiles.
    command.other_options(["--filter-platform".to_string(), "x86_64-unknown-linux-gnu".to_string()]);
    Ok(command.exec()?)
}

fn package<'a>(metadata: &'a Metadata, name: &str) -> Result<&'a cargo_metadata::Package> {
    let found = metadata.packages.iter().find(|package| package.name.as_str() == name);
    found.with_context(|| format!("no package {name} in the workspace"))
}

/// What is linked into a program, in the CycloneDX format (<https://cyclonedx.org/docs/1.6/json>).
fn sbom_of(metadata: &Metadata, program: &str) -> Result<serde_json::Value> {
    let graph = metadata.resolve.as_ref().context("cargo has not resolved the dependencies")?;
    let edges: BTreeMap<&PackageId, Vec<&PackageId>> = graph
        .nodes
        .iter()
        .map(|node| {
            let linked = node.deps.iter().filter(|dependency| {
                dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal)
            });
            (&node.id, linked.map(|dependency| &dependency.pkg).collect())
        })
        .collect();
    let root = package(metadata, program)?;
    let mut linked = BTreeSet::new();
    let mut open = vec![&root.id];
    while let Some(id) = open.pop() {
        for dependency in edges.get(id).into_iter().flatten() {
            if linked.insert(*dependency) {
                open.push(dependency);
            }
        }
    }
    let mut components: Vec<_> =
        metadata.packages.iter().filter(|package| linked.contains(&package.id)).collect();
    components.sort_by_key(|package| (&package.name, &package.version));
    if components.is_empty() {
        bail!("{program} depends on nothing: cargo's answer is incomplete");
    }
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component(root, "application")},
        "components": components.iter().map(|package| component(package, "library")).collect::<Vec<_>>(),
    }))
}

fn component(package: &cargo_metadata::Package, kind: &str) -> serde_json::Value {
    let licenses = package.license.iter().map(|license| json!({"expression": license}));
    json!({
        "type": kind,
        "name": package.name.as_str(),
        "version": package.version.to_string(),
        "purl": format!("pkg:cargo/{}@{}", package.name, package.version),
        "licenses": licenses.collect::<Vec<_>>(),
    })
}

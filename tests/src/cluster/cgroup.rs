//! The cgroups above a node's pods, on hosts with cgroup v1, v2 or both.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::wait_until;

const ROOT: &str = "/sys/fs/cgroup";

/// Every mounted hierarchy.
fn hierarchies() -> Result<Vec<PathBuf>> {
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return Ok(vec![PathBuf::from(ROOT)]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(ROOT).with_context(|| format!("cannot read {ROOT}"))? {
        let path = entry?.path();
        if path.join("cgroup.procs").exists() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Creates `name` (`a/b`) in every hierarchy, able to hold containers.
pub fn create(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let mut parent = hierarchy;
        for part in name.split('/') {
            let child = parent.join(part);
            // Nodes that start at the same time have the same parent.
            if let Err(error) = fs::create_dir(&child)
                && error.kind() != ErrorKind::AlreadyExists
            {
                return Err(error).with_context(|| format!("cannot create {}", child.display()));
            }
            enable_controllers(&parent)?;
            // cgroup v1: without processors and memory of its own a cpuset takes no process.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if parent.join(file).exists() && is_empty(&child.join(file)) {
                    fs::write(child.join(file), fs::read(parent.join(file))?)?;
                }
            }
            parent = child;
        }
    }
    Ok(())
}

/// cgroup v2: children of `parent` get all the controllers that it has.
fn enable_controllers(parent: &Path) -> Result<()> {
    let Ok(controllers) = fs::read_to_string(parent.join("cgroup.controllers")) else { return Ok(()) };
    for controller in controllers.split_whitespace() {
        // One that cannot be delegated (cpu beside real-time processes) is missing in the pods, no more.
        let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    Ok(())
}

fn is_empty(file: &Path) -> bool {
    // On v2 the file of a fresh cgroup is empty, too, and stays so: empty means the parent's.
    !file.with_file_name("cgroup.type").exists()
        && fs::read_to_string(file).is_ok_and(|content| content.trim().is_empty())
}

/// Removes `name` and all below it, once the kernel has taken note of its last process.
pub fn remove(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let top = hierarchy.join(name);
        wait_until(&format!("the removal of {}", top.display()), || {
            remove_tree(&top);
            Ok(!top.exists())
        })?;
    }
    Ok(())
}

fn remove_tree(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        remove_tree(&entry.path());
    }
    let _ = fs::remove_dir(folder);
}

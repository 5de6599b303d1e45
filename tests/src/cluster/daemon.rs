//! Daemons that outlive the command that started them, and how to find every one again.
//!
//! A daemon carries a mark in its environment, the cluster's folder and its own name. Children inherit it. So no pid
//! file can be stale or missing: `/proc` tells at any time, also after a crash, which processes are a cluster's.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::layout::Layout;

const MARK: &str = "GROWTH_CLUSTER_DAEMON";

/// A running process of a cluster. The file descriptor names this very process, even when its number is used again.
pub struct Daemon {
    /// The name that it was started under: `etcd`, `n1`, ...
    pub name: String,
    /// In the namespace of this process.
    pub pid: u32,
    handle: OwnedFd,
}

/// Starts `command` in the background under `name`, its output appended to the log of that name.
pub fn start(layout: &Layout, name: &str, command: &mut Command) -> Result<Child> {
    fs::create_dir_all(layout.logs())?;
    let log: File = OpenOptions::new().create(true).append(true).open(layout.log(name))?;
    command
        .env(MARK, mark(layout, name))
        .stdout(log.try_clone()?)
        .stderr(log)
        .current_dir(layout.folder())
        // Ctrl-C in the terminal ends the command that waits for the cluster, not the cluster.
        .process_group(0);
    command.spawn().with_context(|| format!("cannot start {name}: {command:?}"))
}

/// [`start`] with nothing on standard input.
pub fn start_detached(layout: &Layout, name: &str, command: &mut Command) -> Result<()> {
    start(layout, name, command.stdin(Stdio::null())).map(drop)
}

/// All processes of the cluster, in the order of their numbers.
pub fn running(layout: &Layout) -> Result<Vec<Daemon>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
        // First the handle, then the mark: what is read belongs to the process that the handle names.
        let Ok(handle) = pidfd_open(id, PidfdFlags::empty()) else { continue };
        if let Some(name) = name_of(layout, pid) {
            found.push(Daemon { name, pid, handle });
        }
    }
    found.sort_by_key(|daemon| daemon.pid);
    Ok(found)
}

/// The processes started under `name`, and their children.
pub fn running_as(layout: &Layout, name: &str) -> Result<Vec<Daemon>> {
    Ok(running(layout)?.into_iter().filter(|daemon| daemon.name == name).collect())
}

/// Ends them at once and returns when they are gone. A process that begot another while this went on is found by
/// asking again, as [`end_all`] does.
fn end(daemons: &[Daemon]) -> Result<()> {
    for daemon in daemons {
        // An error means that it has ended by itself.
        let _ = pidfd_send_signal(&daemon.handle, Signal::KILL);
    }
    for daemon in daemons {
        poll(&mut [PollFd::new(&daemon.handle, PollFlags::IN)], None)
            .with_context(|| format!("waiting for {} ({})", daemon.name, daemon.pid))?;
    }
    Ok(())
}

/// Processes that stand still until this is dropped.
pub struct Pause(Vec<Daemon>);

/// Stops the processes started under `name`.
pub fn pause(layout: &Layout, name: &str) -> Result<Pause> {
    let pause = Pause(running_as(layout, name)?);
    for daemon in &pause.0 {
        pidfd_send_signal(&daemon.handle, Signal::STOP).with_context(|| format!("cannot pause {name}"))?;
    }
    Ok(pause)
}

impl Drop for Pause {
    fn drop(&mut self) {
        for daemon in &self.0 {
            // An error means that it has ended meanwhile.
            let _ = pidfd_send_signal(&daemon.handle, Signal::CONT);
        }
    }
}

/// Ends every process whose name `wanted` accepts, until none is left.
pub fn end_all(layout: &Layout, wanted: impl Fn(&str) -> bool) -> Result<()> {
    loop {
        let daemons: Vec<_> = running(layout)?.into_iter().filter(|daemon| wanted(&daemon.name)).collect();
        if daemons.is_empty() {
            return Ok(());
        }
        end(&daemons)?;
    }
}

fn mark(layout: &Layout, name: &str) -> String {
    format!("{}#{name}", layout.folder().display())
}

fn name_of(layout: &Layout, pid: u32) -> Option<String> {
    let environment = fs::read(Path::new("/proc").join(pid.to_string()).join("environ")).ok()?;
    let prefix = format!("{MARK}={}", mark(layout, ""));
    environment
        .split(|byte| *byte == 0)
        .find_map(|variable| variable.strip_prefix(prefix.as_bytes()))
        .map(|name| String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shell's child inherits the mark; a process of another cluster, and this test, are left alone.
    #[test]
    fn finds_and_ends_a_daemon_with_its_children_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| Layout::new(root.path(), name).unwrap());
        let mut children = Vec::new();
        for layout in [&one, &two] {
            fs::create_dir_all(layout.folder()).unwrap();
            let mut shell = Command::new("sh");
            shell.args(["-c", "sleep 600 & echo ready; wait"]).stdin(Stdio::null());
            children.push(start(layout, "shell", &mut shell).unwrap());
            // The shell has written once its child exists.
            while fs::read_to_string(layout.log("shell")).unwrap_or_default().is_empty() {
                std::thread::yield_now();
            }
        }
        assert_eq!(running_as(&one, "shell").unwrap().len(), 2);

        end_all(&one, |name| name == "shell").unwrap();
        assert_eq!(children[0].wait().unwrap().code(), None);
        assert!(running(&one).unwrap().is_empty());
        assert_eq!(running(&two).unwrap().len(), 2);

        end_all(&two, |_| true).unwrap();
        children[1].wait().unwrap();
    }
}

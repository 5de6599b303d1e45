//! Ranks that train together end in the bits of one that trains alone, whatever happens to them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, read_json, signal, stderr, wait_until};
use std::time::Duration;

/// State digests of both stages.
fn digests(folder: &Folder) -> [String; 2] {
    ["small", "large"].map(|stage| folder.final_state(stage))
}

#[test]
fn a_job_on_several_processes_ends_in_the_same_bits() {
    let alone = Folder::new(JOB);
    alone.run_ok(&["run", "job.yaml"]);
    for ranks in ["2", "4"] {
        let folder = Folder::new(JOB);
        let output = folder.run(&["run", "job.yaml", "--ranks", ranks]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(digests(&folder), digests(&alone), "{ranks} ranks");
        assert!(!stderr(&output).contains("warning"), "{}", stderr(&output));
    }
    let folder = Folder::new(&JOB.replace("factor: 2}", "factor: 2}\n    replicas: 2"));
    folder.run_ok(&["run", "job.yaml"]);
    assert_eq!(digests(&folder), digests(&alone), "the job's own replicas");
    let manifest = folder.checkpoints("large").pop().unwrap().join("manifest.json");
    assert!(read_json(&manifest)["objects"].as_array().unwrap().len() > 4);
}

#[test]
fn a_number_that_cannot_share_is_refused_before_any_work() {
    let folder = Folder::new(JOB);
    let output = folder.run(&["run", "job.yaml", "--ranks", "3"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("possible are 1, 2, 4"), "{}", stderr(&output));
    let folder = Folder::new(&JOB.replace("factor: 2}", "factor: 2}\n    replicas: 8"));
    let output = folder.run(&["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("spec.stages[1].replicas"), "{}", stderr(&output));
}

/// What can happen to a running job.
#[cfg(target_os = "linux")]
mod disturbed {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    use std::collections::BTreeMap;
    use std::net::{Shutdown, TcpStream};
    use std::process::{Child, Stdio};
    use std::sync::Mutex;
    use std::time::Instant;

    /// A signal to one process, a pause of it, or the end of one of its connections.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Disturbance {
        Kill,
        Terminate,
        Pause,
        Cut,
    }

    /// The ranks that the process has started.
    fn children(process: u32) -> Vec<u32> {
        let list = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
        list.unwrap_or_default().split_whitespace().map(|id| id.parse().unwrap()).collect()
    }

    /// Ends one of the connections of a process from outside, as a network does; false if it has none.
    fn cut(process: u32, random: &mut ChaCha8Rng) -> bool {
        let pid = i32::try_from(process).ok().and_then(Pid::from_raw).unwrap();
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
        let numbers: Vec<i32> = std::fs::read_dir(format!("/proc/{process}/fd"))
            .map(|entries| entries.flatten().filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect())
            .unwrap_or_default();
        let copies =
            numbers.into_iter().filter_map(|fd| pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).ok());
        let connections: Vec<TcpStream> =
            copies.map(TcpStream::from).filter(|socket| socket.peer_addr().is_ok()).collect();
        if connections.is_empty() {
            return false;
        }
        let connection = &connections[random.random_range(0..connections.len())];
        connection.shutdown(Shutdown::Both).is_ok()
    }

    fn start(folder: &Folder, ranks: &str) -> Child {
        let mut command = folder.command(&["run", "job.yaml", "--quiet", "--threads", "2", "--ranks", ranks]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Waits for the end of a process; it must come.
    fn wait(child: &mut Child, within: Duration, what: &str) {
        wait_until(within, &format!("{what}: it does not end"), || child.try_wait().unwrap().is_some());
    }

    /// Lives of one job with another number of ranks each, until `hits` disturbances have met a running rank.
    fn disturb(hits: usize, seed: u64) -> BTreeMap<Disturbance, usize> {
        let alone = Folder::new(JOB);
        let begin = Instant::now();
        alone.run_ok(&["run", "job.yaml"]);
        let duration = begin.elapsed() * 2;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut met = BTreeMap::new();
        while met.values().sum::<usize>() < hits {
            let folder = Folder::new(JOB);
            for life in 0..random.random_range(2..7) {
                let ranks = ["1", "2", "4"][random.random_range(0..3)];
                let mut child = start(&folder, ranks);
                // The point in time is what this test varies; nothing waits for it.
                std::thread::sleep(duration.mul_f64(random.random_range(0.02..0.9)));
                let mut victims = children(child.id());
                victims.push(child.id());
                let victim = victims[random.random_range(0..victims.len())];
                let kinds = [
                    Disturbance::Kill,
                    Disturbance::Kill,
                    Disturbance::Terminate,
                    Disturbance::Pause,
                    Disturbance::Cut,
                ];
                let mut kind = kinds[random.random_range(0..kinds.len())];
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                // A rank by itself, or one that has met nobody yet, has no connection to lose.
                if kind == Disturbance::Cut && !cut(victim, &mut random) {
                    kind = Disturbance::Kill;
                }
                *met.entry(kind).or_default() += 1;
                match kind {
                    Disturbance::Cut => {}
                    // A process that has ended in the meantime is beyond harm.
                    Disturbance::Kill => _ = signal("-KILL", victim),
                    Disturbance::Terminate => _ = signal("-TERM", victim),
                    Disturbance::Pause => {
                        signal("-STOP", victim);
                        std::thread::sleep(Duration::from_millis(random.random_range(10..400)));
                        signal("-CONT", victim);
                        continue_or_end(&mut child, &mut random, duration);
                    }
                }
                let within = Duration::from_secs(60);
                wait(&mut child, within, &format!("seed {seed}, life {life}, {ranks} ranks, {kind:?}"));
                for rank in victims {
                    // A rank that lost its parent ends by itself within ten seconds, and must not write meanwhile.
                    let stays = format!("rank process {rank} stays");
                    wait_until(Duration::from_secs(15), &stays, || !runs(rank));
                }
            }
            folder.run_ok(&["run", "job.yaml", "--quiet"]);
            assert_eq!(digests(&folder), digests(&alone), "seed {seed}, {met:?}");
        }
        met
    }

    /// After a pause it goes on; it is left to its end, or ended with a signal of its own.
    fn continue_or_end(child: &mut Child, random: &mut ChaCha8Rng, duration: Duration) {
        if random.random_range(0..2) == 0 {
            std::thread::sleep(duration.mul_f64(random.random_range(0.0..0.3)));
            signal("-TERM", child.id());
        }
    }

    fn runs(process: u32) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // A zombie has ended.
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
    }

    #[test]
    fn whatever_happens_to_any_rank_the_job_ends_in_the_same_bits() {
        println!("{:?}", disturb(20, 1));
    }

    #[test]
    #[ignore = "long: half an hour"]
    fn a_thousand_disturbances_end_in_the_same_bits() {
        // Most of the time they wait for each other, so several seeds share the machine.
        let seeds = Mutex::new(2..12);
        let all: Mutex<BTreeMap<Disturbance, usize>> = Mutex::default();
        let work = || {
            while let Some(seed) = { seeds.lock().unwrap().next() } {
                let met = disturb(100, seed);
                println!("seed {seed}: {met:?}");
                let mut all = all.lock().unwrap();
                met.into_iter().for_each(|(kind, count)| *all.entry(kind).or_default() += count);
            }
        };
        std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(work))));
        println!("{all:?}");
        assert!(all.into_inner().unwrap().values().sum::<usize>() >= 1000);
    }

    #[test]
    fn grown_and_shrunk_in_order_it_ends_in_the_same_bits() {
        let alone = Folder::new(JOB);
        alone.run_ok(&["run", "job.yaml"]);
        let folder = Folder::new(JOB);
        for ranks in ["1", "4", "2", "1"] {
            let newest = || [folder.checkpoints("small"), folder.checkpoints("large")];
            let before = newest();
            let mut child = start(&folder, ranks);
            wait_until(Duration::from_secs(60), "no checkpoint appeared", || {
                newest() != before || child.try_wait().unwrap().is_some()
            });
            signal("-TERM", child.id());
            let status = child.wait().unwrap();
            assert!(status.code() == Some(130) || status.success(), "{ranks} ranks: {status}");
        }
        folder.run_ok(&["run", "job.yaml", "--ranks", "4"]);
        assert_eq!(digests(&folder), digests(&alone));
    }

    #[test]
    fn ranks_whose_parent_ends_before_they_meet_it_end_too() {
        let folder = Folder::new(JOB);
        folder.run_ok(&["data", "prepare", "job.yaml"]);
        let mut child = start(&folder, "4");
        wait_until(Duration::from_secs(60), "no rank is started", || !children(child.id()).is_empty());
        // It listens no more, but the system still lets others call.
        signal("-STOP", child.id());
        let ranks = children(child.id());
        signal("-KILL", child.id());
        child.wait().unwrap();
        wait_until(Duration::from_secs(10), &format!("{ranks:?} stay"), || {
            !ranks.iter().any(|rank| runs(*rank))
        });
    }

    #[test]
    fn a_lost_rank_ends_the_others_within_ten_seconds() {
        let folder = Folder::new(&JOB.replace("tokens: 20480", "tokens: 20480000"));
        for silent in [false, true] {
            let mut command = folder.command(&["run", "job.yaml", "--quiet", "--ranks", "2"]);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            let known = folder.checkpoints("small");
            wait_until(Duration::from_secs(60), "no checkpoint appeared", || {
                folder.checkpoints("small") != known
            });
            let rank = children(child.id())[0];
            signal(if silent { "-STOP" } else { "-KILL" }, rank);
            let begin = Instant::now();
            wait(&mut child, Duration::from_secs(20), "rank 0");
            assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
            assert!(stderr(&output).contains("rank 1 is lost"), "{}", stderr(&output));
        }
    }
}

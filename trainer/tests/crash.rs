//! Whatever stops a job, the same command goes on, and ends in the bits of a run that nothing stopped.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, program, signal, stderr, wait_until};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// State digests of both stages of an undisturbed run, and how long it took.
fn undisturbed(threads: &str) -> ([String; 2], Duration) {
    let folder = Folder::new(JOB);
    let start = Instant::now();
    folder.run_ok(&["run", "job.yaml", "--threads", threads]);
    (["small", "large"].map(|stage| folder.final_state(stage)), start.elapsed())
}

/// Starts the job and kills it with SIGKILL after `delay`, unless it has ended before.
fn run_and_kill(folder: &Folder, threads: &str, delay: Duration) -> bool {
    let mut command = folder.command(&["run", "job.yaml", "--quiet", "--threads", threads]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // The point in time at which the process dies is what this test varies; nothing waits for it.
    std::thread::sleep(delay);
    let ended = child.try_wait().unwrap().is_some();
    child.kill().unwrap();
    child.wait().unwrap();
    !ended
}

/// Kills jobs at random points of their life until `kills` have hit a running one.
fn kill_at_random(kills: u32, seed: u64) {
    let (expected, duration) = undisturbed("2");
    assert_eq!(expected, undisturbed("1").0, "bits do not depend on threads");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut hits = 0;
    while hits < kills {
        let folder = Folder::new(JOB);
        // Short lives hit data preparation, longer ones training, checkpoints and growth.
        for _life in 0..random.random_range(2..8) {
            let threads = ["1", "2"][random.random_range(0..2)];
            let delay = duration.mul_f64(random.random_range(0.02..0.9));
            hits += u32::from(run_and_kill(&folder, threads, delay));
        }
        folder.run_ok(&["run", "job.yaml", "--quiet"]);
        assert_eq!(
            expected,
            ["small", "large"].map(|stage| folder.final_state(stage)),
            "seed {seed}, {hits} kills"
        );
    }
}

#[test]
fn killed_at_random_points_a_job_ends_in_the_same_bits() {
    kill_at_random(25, 1);
}

#[test]
#[ignore = "long: minutes"]
fn killed_many_times_a_job_ends_in_the_same_bits() {
    for seed in 2..6 {
        kill_at_random(100, seed);
    }
}

#[test]
fn a_finished_job_does_nothing() {
    let folder = Folder::new(JOB);
    folder.run_ok(&["run", "job.yaml"]);
    let before = folder.checkpoints("large");
    let output = folder.run(&["run", "job.yaml"]);
    assert!(
        output.status.success() && stderr(&output).contains("is finished already"),
        "{}",
        stderr(&output)
    );
    assert_eq!(before, folder.checkpoints("large"));
}

#[cfg(unix)]
#[test]
fn interrupted_it_commits_where_it_stands() {
    let folder = Folder::new(&JOB.replace("tokens: 20480", "tokens: 2048000"));
    let newest = || folder.checkpoints("small").pop();
    // It may be interrupted at the very step that it has just committed; not each time.
    let wrote_one_more = (0..5).any(|_| {
        let known = newest();
        let child = folder.command(&["run", "job.yaml"]).stderr(Stdio::piped()).spawn().unwrap();
        wait_until(Duration::from_secs(120), "no checkpoint appeared", || newest() != known);
        let before = newest();
        assert!(signal("-INT", child.id()));
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        newest() > before
    });
    assert!(wrote_one_more, "it never commits where it stands");
}

/// As the first process of a pod it would outlive a signal that it does not handle.
#[cfg(unix)]
#[test]
fn told_to_end_a_data_preparation_ends_at_once() {
    let folder = Folder::new(&JOB.replace("file://./runs", "s3://bucket/runs"));
    let silent_storage = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent_storage.local_addr().unwrap());
    let mut command = folder.command(&["data", "prepare", "job.yaml"]);
    let secrets = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "c")];
    let mut child = command.env("AWS_ENDPOINT_URL", endpoint).envs(secrets).spawn().unwrap();
    let _waits_for_an_answer = silent_storage.accept().unwrap();
    assert!(signal("-TERM", child.id()));
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_used() {
    let folder = Folder::new(JOB);
    folder.run_ok(&["run", "job.yaml"]);
    let expected = folder.final_state("large");
    let checkpoints = folder.checkpoints("large");
    assert_eq!(checkpoints.len(), 2, "keepLast");
    let weights = checkpoints[1].join("model-00001-of-00001.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();

    let verify = folder.run(&["checkpoint", "verify", checkpoints[1].to_str().unwrap()]);
    assert_eq!(verify.status.code(), Some(1));
    let output = folder.run(&["run", "job.yaml"]);
    let name = checkpoints[1].file_name().unwrap().to_str().unwrap().to_owned();
    assert!(output.status.success() && stderr(&output).contains(&name), "{}", stderr(&output));
    assert!(std::fs::read(&weights).unwrap() == bytes, "the damaged one is left as it is");
    assert_eq!(folder.final_state("large"), expected);
}

#[cfg(unix)]
#[test]
fn on_a_full_disk_the_last_checkpoint_stays_good() {
    let small = JOB.split("  - name: large").next().unwrap();
    let folder = Folder::new(small);
    folder.run_ok(&["run", "job.yaml"]);
    let before = folder.final_state("small");
    // The appended stage does not fit: no file may grow beyond 64 KiB.
    folder.write_job(JOB);
    let program = program().display();
    let script = format!("trap '' XFSZ; ulimit -f 64; exec {program} run job.yaml");
    let output = Command::new("bash").args(["-c", &script]).current_dir(folder.path("")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("File too large"), "{}", stderr(&output));
    assert_eq!(folder.final_state("small"), before);
    assert!(folder.checkpoints("large").is_empty());
    folder.run_ok(&["run", "job.yaml"]);
    assert_eq!(folder.final_state("large"), undisturbed("2").0[1]);
}

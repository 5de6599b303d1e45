//! A tiny job, and the real program to run it with.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, reason = "shared by several test programs")]

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Steps of each stage of [`JOB`].
pub const STEPS: u64 = 40;

/// Two layers that become four, on the text that [`Folder::new`] writes; checkpoints every eight steps.
pub const JOB: &str = "\
apiVersion: growth.dev/v1alpha1
kind: GrowthTrainingJob
metadata: {name: tiny}
spec:
  model: {hiddenSize: 32, intermediateSize: 80, numAttentionHeads: 4, numKeyValueHeads: 2}
  data:
    train:
    - uri: file://./text/*.txt
    holdOutPercent: 10
    tokenizer: {train: {vocabSize: 320}}
  storage: {uri: \"file://./runs\"}
  training:
    sequenceLength: 32
    globalBatchTokens: 512
    microBatchTokens: 128
    optimizer: {adamW: {learningRate: 3.0e-3}}
    schedule: {cosine: {warmupTokens: 2048}}
    seed: 7
  evaluation: {everyTokens: 8192, tokens: 2048}
  checkpoint: {everyTokens: 4096, keepLast: 2}
  stages:
  - name: small
    model: {numHiddenLayers: 2}
    tokens: 20480
  - name: large
    growth: {operator: Stack, factor: 2}
    tokens: 20480
";

/// The program under test, by a name of its own: a build that goes on meanwhile does not replace it.
pub fn program() -> &'static Path {
    static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
        let name = concat!("growth-trainer-of-", env!("CARGO_CRATE_NAME"));
        let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_file(&own);
        // A build takes the program away for a moment before it places the new one.
        let built = env!("CARGO_BIN_EXE_growth-trainer");
        wait_until(Duration::from_secs(5), built, || std::fs::hard_link(built, &own).is_ok());
        own
    });
    &PROGRAM
}

/// A folder with the job's text and its manifest, deleted with the value.
pub struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    /// Seeded text of forty documents, and `job` as job.yaml.
    pub fn new(job: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("text")).unwrap();
        for document in 0..40 {
            let text = text(document, 4000);
            std::fs::write(folder.path().join(format!("text/{document:02}.txt")), text).unwrap();
        }
        let this = Self { folder };
        this.write_job(job);
        this
    }

    /// Replaces the manifest.
    pub fn write_job(&self, job: &str) {
        std::fs::write(self.path("job.yaml"), job).unwrap();
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program with `arguments`, in the folder.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(arguments).current_dir(self.folder.path());
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the program, which must succeed, and returns what it printed.
    pub fn run_ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Folders of the committed checkpoints of a stage, oldest first.
    pub fn checkpoints(&self, stage: &str) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.path(&format!("runs/tiny/checkpoints/{stage}"))) else {
            return Vec::new();
        };
        let mut folders: Vec<PathBuf> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|folder| folder.join("manifest.json").exists())
            .collect();
        folders.sort();
        folders
    }

    /// State digest of the last checkpoint of a stage, which must be complete.
    pub fn final_state(&self, stage: &str) -> String {
        let folder = self.checkpoints(stage).pop().expect("the stage has a checkpoint");
        let manifest = read_json(&folder.join("manifest.json"));
        assert_eq!(manifest["step"], STEPS, "the stage is complete");
        manifest["digest"].as_str().unwrap().to_owned()
    }
}

/// Words of a small vocabulary in a seeded order, with some structure to learn.
fn text(seed: u64, len: usize) -> String {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let words = ["the", "small", "model", "grows", "large", "and", "learns", "to", "stack", "its", "layers"];
    let mut text = String::new();
    let mut word = 0;
    while text.len() < len {
        // Mostly the next word of the list: something that a model can predict.
        word = if random.random_range(0..10) < 8 { word + 1 } else { random.random_range(0..words.len()) };
        text.push_str(words[word % words.len()]);
        text.push(if random.random_range(0..12) == 0 { '\n' } else { ' ' });
    }
    text
}

/// Waits until something is seen, which must come within this time.
pub fn wait_until(within: Duration, missing: &str, mut seen: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !seen() {
        assert!(Instant::now() < deadline, "{missing}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a signal (`-TERM`); false if the process has ended in the meantime.
pub fn signal(name: &str, process: u32) -> bool {
    let mut command = Command::new("kill");
    command.args([name, &process.to_string()]).stderr(Stdio::null()).status().unwrap().success()
}

/// What the program said on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

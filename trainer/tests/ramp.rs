//! Jobs that grow by RandomDepth and RandomWidth, with the real program: stopped inside the ramp, and on several ranks,
//! they end in the bits of a run that nothing stopped, as plain models; inside the ramp checkpoints say what they are.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, STEPS, read_json, stderr, wait_until};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// Tokens of a step of [`JOB`].
const STEP_TOKENS: u64 = 512;

/// The ramp ends with the last step but one, so that whatever happens in the stage happens inside it.
const RAMP_TOKENS: u64 = (STEPS - 1) * STEP_TOKENS;

const STACK: &str = "{operator: Stack, factor: 2}";

/// The growths that are tried.
fn growths() -> [String; 2] {
    [
        format!("{{operator: RandomDepth, factor: 2, randomDepth: {{rampTokens: {RAMP_TOKENS}}}}}"),
        format!(
            "{{operator: RandomWidth, factor: 2, randomWidth: {{rampTokens: {RAMP_TOKENS}}}, optimizerState: Keep}}"
        ),
    ]
}

fn job(growth: &str) -> String {
    assert!(JOB.contains(STACK));
    JOB.replace(STACK, growth)
}

/// Runs the job until its grown stage has written a checkpoint of its own, and ends it with a signal.
fn run_into_the_ramp(folder: &Folder, signal: &str, ranks: &str) {
    let newest = || folder.checkpoints("large").pop().filter(|newest| !newest.ends_with("00000000-1"));
    let before = newest();
    let arguments = ["run", "job.yaml", "--quiet", "--threads", "1", "--ranks", ranks];
    let mut command = folder.command(&arguments);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until(Duration::from_secs(120), "no checkpoint appeared", || {
        newest() != before || child.try_wait().unwrap().is_some()
    });
    // A process that has ended in the meantime is beyond harm.
    common::signal(signal, child.id());
    child.wait().unwrap();
}

/// The masks that a checkpoint names.
fn masks(checkpoint: &std::path::Path) -> Option<Value> {
    let file = checkpoint.join("growth_mask.json");
    file.exists().then(|| read_json(&file)["masks"].clone())
}

fn last(folder: &Folder, stage: &str) -> PathBuf {
    folder.checkpoints(stage).pop().unwrap()
}

#[test]
fn stopped_inside_the_ramp_it_ends_in_the_same_bits() {
    let stops = [[("-KILL", "1"), ("-TERM", "2")], [("-TERM", "1"), ("-KILL", "4")]];
    for (growth, stops) in growths().into_iter().zip(stops) {
        let alone = Folder::new(&job(&growth));
        alone.run_ok(&["run", "job.yaml"]);
        let expected = alone.final_state("large");
        assert_eq!(masks(&last(&alone, "large")), None, "the finished stage is a plain model");
        let mut inside = 0;
        for (signal, ranks) in stops {
            let folder = Folder::new(&job(&growth));
            run_into_the_ramp(&folder, signal, ranks);
            let newest = last(&folder, "large");
            let manifest = read_json(&newest.join("manifest.json"));
            let tokens = manifest["tokens"].as_u64().unwrap();
            if let Some(masks) = masks(&newest) {
                inside += 1;
                check_masks(&growth, &masks, tokens);
            }
            // On another number of ranks than before.
            let others = if ranks == "1" { "2" } else { "1" };
            folder.run_ok(&["run", "job.yaml", "--ranks", others]);
            assert_eq!(folder.final_state("large"), expected, "{growth}, {signal}, {ranks} ranks");
            assert_eq!(masks(&last(&folder, "large")), None);
        }
        assert!(inside > 0, "it was never stopped inside the ramp");
    }
}

/// Linear in the tokens: all of the ramp for layers, a third of it for each kind of width.
fn check_masks(growth: &str, masks: &Value, tokens: u64) {
    let progress = tokens as f64 / RAMP_TOKENS as f64;
    let turn = |turn: f64| (3.0 * progress - turn).clamp(0.0, 1.0);
    let expected = match growth.contains("RandomDepth") {
        true => [("intermediate", 1.0), ("hidden", 1.0), ("heads", 1.0), ("layers", progress)],
        false => [("intermediate", turn(0.0)), ("hidden", turn(1.0)), ("heads", turn(2.0)), ("layers", 1.0)],
    };
    for (name, expected) in expected {
        let found = masks[name].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-12, "{name}: {found} instead of {expected} at {tokens} tokens");
    }
}

#[test]
fn a_checkpoint_inside_the_ramp_runs_with_its_masks_and_starts_nothing_else() {
    let folder = Folder::new(&job(&growths()[0]));
    folder.run_ok(&["run", "job.yaml"]);
    // The first checkpoint of the grown stage is gone by now; a growth by hand makes the same one.
    let source = last(&folder, "small");
    let source = source.to_str().unwrap();
    let report = folder.run_ok(&[
        "grow",
        "--from",
        source,
        "--operator",
        "RandomDepth",
        "--factor",
        "2",
        "--seed",
        "7",
        "--to",
        "grown",
        "--json",
    ]);
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["growth"]["newLayers"], 2);
    assert_eq!(report["growth"]["expected"], "Preserving");
    let difference = report["growth"]["measured"]["maxLogitDifference"].as_f64().unwrap();
    assert!(difference < 1e-5, "{difference}");
    let masks = masks(&folder.path("grown")).unwrap();
    assert_eq!(masks["layers"], 0.0);

    // With its masks it is the source.
    let loss = |checkpoint: &str| {
        let text = folder.run_ok(&["eval", "--checkpoint", checkpoint, "--text", "text/00.txt", "--json"]);
        serde_json::from_str::<Value>(&text).unwrap()["loss"].as_f64().unwrap()
    };
    assert!((loss("grown") - loss(source)).abs() < 1e-6);
    let prompt = |checkpoint: &str| {
        let arguments =
            ["generate", "--checkpoint", checkpoint, "--prompt", "the small", "--temperature", "0"];
        folder.run_ok(&[&arguments[..], &["--tokens", "20"]].concat())
    };
    assert_eq!(prompt("grown"), prompt(source));
    folder.run_ok(&["checkpoint", "verify", "grown"]);

    // It is no source of another growth, and no start of another job.
    let output = folder.run(&["grow", "--from", "grown", "--factor", "2", "--to", "again"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("inside the ramp of its own growth"), "{}", stderr(&output));
    let (model, tokenizer) = (folder.path("grown"), folder.path("grown/tokenizer.json"));
    let other = JOB
        .replace("name: tiny", "name: other")
        .replace(
            "{numHiddenLayers: 2}",
            &format!("{{numHiddenLayers: 4}}\n    initFrom: {{uri: \"file://{}\"}}", model.display()),
        )
        .replace("{train: {vocabSize: 320}}", &format!("{{uri: \"file://{}\"}}", tokenizer.display()))
        .replace("numKeyValueHeads: 2}", "numKeyValueHeads: 2, vocabSize: 320}");
    folder.write_job(&other);
    let output = folder.run(&["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("spec.stages[0].initFrom"), "{}", stderr(&output));
    assert!(stderr(&output).contains("inside the ramp"), "{}", stderr(&output));
}

#[test]
fn a_ramp_that_does_not_end_is_refused_before_any_work() {
    let growth = "{operator: RandomDepth, factor: 2, randomDepth: {rampTokens: 20480}}";
    let folder = Folder::new(&job(growth));
    let output = folder.run(&["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let message = stderr(&output);
    assert!(message.contains("spec.stages[1].growth.randomDepth.rampTokens"), "{message}");
    assert!(!folder.path("runs/tiny/checkpoints").exists());
}

#[test]
fn past_its_ramp_a_stage_that_is_prolonged_stays_so() {
    // The default ramp is a tenth of the stage: with a hundred times the tokens it would begin anew.
    let folder = Folder::new(&job("{operator: RandomDepth, factor: 2}"));
    folder.run_ok(&["run", "job.yaml"]);
    let text = folder.run_ok(&["plan", "job.yaml", "--json"]);
    let plan: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(plan["stages"][1]["maskRampTokens"], 2048);
    let before = last(&folder, "large");
    assert_eq!(masks(&before), None);
    // The newest checkpoint is one before the last step, as if the stage had been prolonged while it ran.
    std::fs::remove_dir_all(&before).unwrap();
    let long = job("{operator: RandomDepth, factor: 2}");
    let (head, tail) = long.rsplit_once("tokens: 20480").unwrap();
    folder.write_job(&format!("{head}tokens: 2048000{tail}"));
    let plan: Value = serde_json::from_str(&folder.run_ok(&["plan", "job.yaml", "--json"])).unwrap();
    assert_eq!(plan["stages"][1]["maskRampTokens"], 204_800);
    run_into_the_ramp(&folder, "-TERM", "1");
    let after = last(&folder, "large");
    assert!(after > before || after.file_name() == before.file_name(), "it went on");
    assert_eq!(masks(&after), None);
}

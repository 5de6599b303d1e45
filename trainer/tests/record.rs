//! What a growth step did can be read as long as its stage has a checkpoint.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, read_json};
use serde_json::Value;

#[test]
fn the_record_of_a_growth_outlives_its_checkpoint() {
    let folder = Folder::new(JOB);
    folder.run_ok(&["run", "job.yaml", "--quiet"]);
    let checkpoints = folder.checkpoints("large");
    let names: Vec<&str> =
        checkpoints.iter().map(|folder| folder.file_name().unwrap().to_str().unwrap()).collect();
    assert!(names.iter().all(|name| !name.starts_with("00000000-")), "the first one is gone: {names:?}");
    for checkpoint in &checkpoints {
        let record = read_json(&checkpoint.join("growth.json"));
        assert_eq!(record["operator"], "Stack");
        let manifest = read_json(&checkpoint.join("manifest.json"));
        let objects = manifest["objects"].as_array().unwrap();
        let object = objects.iter().find(|object| object["name"] == "growth.json").unwrap();
        assert_eq!(object["state"], false, "it is about the state, and no part of it");
    }
    for checkpoint in folder.checkpoints("small") {
        assert!(!checkpoint.join("growth.json").exists());
    }

    let table = folder.run_ok(&["report", "job.yaml"]);
    let row = table.lines().find(|line| line.contains("the loss jumps at first")).expect("a row a growth");
    assert!(row.contains("Stack") && row.contains("2 -> 4") && row.contains("2/3"), "{table}");

    let stages: Value = serde_json::from_str(&folder.run_ok(&["report", "job.yaml", "--json"])).unwrap();
    assert!(stages[0].get("growth").is_none());
    let growth = &stages[1]["growth"];
    assert_eq!((&growth["from"]["layers"], &growth["to"]["layers"]), (&2.into(), &4.into()));
    assert_eq!(growth["connectionRate"]["kept"], 2);
    assert!(growth.get("newTensors").is_none(), "{growth}");
    // Right before the growth is the end of the small stage, measured on other tokens of the same text.
    let measured = &growth["measured"];
    let (before, after) = (measured["lossBefore"].as_f64().unwrap(), measured["lossAfter"].as_f64().unwrap());
    let small = stages[0]["validationLossAfter"].as_f64().unwrap();
    assert!((before - small).abs() < 0.5 && after > before, "{small}: {measured}");
    assert!(measured["maxLogitDifference"].as_f64().unwrap() > 0.1, "{measured}");
}

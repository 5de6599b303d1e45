//! A small valid job, and how to change it.
#![allow(dead_code, reason = "no test uses all of it")]

pub mod rules;

use growth_crds::plan::JobPlan;
use growth_crds::{GrowthTrainingJob, resolve};
use serde_json::{Value, json};

/// Two stages: two layers, then eight.
pub fn example() -> Value {
    json!({
        "apiVersion": "growth.dev/v1alpha1",
        "kind": "GrowthTrainingJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"hiddenSize": 64, "intermediateSize": 176, "numAttentionHeads": 4},
            "data": {
                "train": [{"uri": "file:///books/*.txt"}],
                "validation": [{"uri": "file:///held-out/*.txt"}],
                "tokenizer": {"train": {"vocabSize": 2048}},
            },
            "storage": {"uri": "file:///runs"},
            "training": {"sequenceLength": 256, "globalBatchTokens": 4096},
            "stages": [
                {"name": "small", "model": {"numHiddenLayers": 2}, "tokens": 1_048_576},
                {"name": "large", "growth": {"operator": "Stack", "factor": 4}, "tokens": 4_194_304},
            ],
        },
    })
}

/// Reads an object as the real type.
pub fn job(object: Value) -> GrowthTrainingJob {
    serde_json::from_value(object).expect("a job")
}

/// Where, a JSON pointer, and what to put there; null removes.
pub type Edit = (&'static str, Value);

/// [`example`], edited.
pub fn edited(edits: &[Edit]) -> GrowthTrainingJob {
    let mut object = example();
    edits.iter().for_each(|(path, value)| edit(&mut object, path, value));
    job(object)
}

/// What [`edited`] resolves to, or its mistakes.
pub fn plan(edits: &[Edit]) -> Result<JobPlan, Vec<String>> {
    let job = edited(edits);
    let name = job.metadata.name.unwrap_or_default();
    resolve(&name, &job.spec).map_err(|errors| errors.into_iter().map(|error| error.to_string()).collect())
}

/// Puts a value at a JSON pointer, making objects on the way; null removes.
pub fn edit(object: &mut Value, path: &str, value: &Value) {
    let (parent, key) = path.rsplit_once('/').expect("a pointer");
    if object.pointer(parent).is_none() {
        edit(object, parent, &json!({}));
    }
    match object.pointer_mut(parent) {
        Some(Value::Object(members)) if value.is_null() => drop(members.remove(key)),
        Some(Value::Object(members)) => drop(members.insert(key.to_owned(), value.clone())),
        Some(Value::Array(items)) => {
            let index: usize = key.parse().expect("an index");
            if value.is_null() {
                items.remove(index);
            } else if index == items.len() {
                items.push(value.clone());
            } else {
                items[index] = value.clone();
            }
        }
        other => panic!("{path} is inside {other:?}"),
    }
}

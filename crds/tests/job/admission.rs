//! The schema without an API server: ranges, lengths, patterns, words, then rules.
use crate::common::{edited, example, job};
use growth_crds::admission::admission_errors;
use serde_json::{Value, json};

fn errors(path: &'static str, value: Value) -> Vec<String> {
    admission_errors(&edited(&[(path, value)]), None).unwrap().iter().map(ToString::to_string).collect()
}

#[test]
fn a_good_job_has_none() {
    assert_eq!(admission_errors(&job(example()), None).unwrap(), []);
}

#[test]
fn the_schema_is_checked() {
    let cases = [
        (
            "/spec/model/numKeyValueHeads",
            json!(0),
            "spec.model.numKeyValueHeads: 0 is too small; the least is 1",
        ),
        ("/spec/replicas", json!(5000), "spec.replicas: 5000 is too large; the most is 4096"),
        ("/spec/data/train", json!([]), "spec.data.train: has 0 items; it needs at least 1"),
        ("/spec/stages/1/name", json!("thirteenchars"), "has 13 characters; at most 12 are allowed"),
        ("/spec/stages/1/name", json!("Large"), "spec.stages[1].name: \"Large\" does not match"),
        ("/spec/stages/1/name", json!("small"), "spec.stages[1].name: another stage is called \"small\" too"),
        ("/spec/storage/uri", json!("ftp://host"), "spec.storage.uri: \"ftp://host\" does not match"),
        ("/spec/data/train/0/weight", json!(0.0), "spec.data.train[0].weight: 0 is too small"),
        ("/spec/stages/0/tokens", json!(0), "spec.stages[0].tokens: 0 is too small; the least is 1"),
    ];
    for (path, value, expected) in cases {
        let found = errors(path, value);
        assert!(found.iter().any(|error| error.contains(expected)), "{path}: {found:?}");
    }
}

#[test]
fn rules_follow_with_their_field() {
    let found = errors("/spec/stages/1/elastic", json!({"minReplicas": 3, "maxReplicas": 2}));
    assert_eq!(
        found,
        ["spec.stages[1].elastic: minReplicas is larger than maxReplicas; swap or change them"]
    );
}

#[test]
fn changes_are_checked_against_the_old_job() {
    let old = job(example());
    let mut new = old.clone();
    new.spec.training.seed = 7;
    let found = admission_errors(&new, Some(&old)).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].field, "spec.training");
}

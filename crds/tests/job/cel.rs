//! Every CEL rule of the CRD, with a job that it accepts and one that it refuses. The table is also tried on a real API
//! server (`tests/integration/api.rs`).
use crate::common::rules::{Case, creation_cases, update_cases};
use crate::common::{edited, example, job};
use serde_json::Value;
use std::collections::BTreeSet;

#[test]
fn rules_on_one_object() {
    for case in creation_cases() {
        let accepted = edited(&case.accepted).validate_cel();
        assert!(accepted.is_ok(), "{}: {}", case.message, accepted.unwrap_err());
        let refused = edited(&case.refused).validate_cel().unwrap_err().to_string();
        assert!(refused.contains(case.message), "{}: {refused}", case.message);
    }
}

#[test]
fn rules_on_a_change() {
    let old = job(example());
    for case in update_cases() {
        let accepted = edited(&case.accepted).validate_cel_update(&old);
        assert!(accepted.is_ok(), "{}: {}", case.message, accepted.unwrap_err());
        let refused = edited(&case.refused).validate_cel_update(&old).unwrap_err().to_string();
        assert!(refused.contains(case.message), "{}: {refused}", case.message);
    }
}

#[test]
fn a_reordered_list_of_stages_is_refused() {
    let old = job(example());
    let mut new = old.clone();
    new.spec.stages.reverse();
    let refused = new.validate_cel_update(&old).unwrap_err().to_string();
    assert!(refused.contains("stages may be appended"), "{refused}");
}

#[test]
fn every_rule_is_in_a_table() {
    let crd = serde_json::to_value(growth_crds::crd::crd().unwrap()).unwrap();
    let mut messages = BTreeSet::new();
    collect_messages(&crd, &mut messages);
    assert!(messages.len() > 30, "{messages:?}");
    let cases: Vec<Case> = creation_cases().into_iter().chain(update_cases()).collect();
    for message in &messages {
        let found = cases.iter().any(|case| message.contains(case.message));
        assert!(found, "no case for the rule that says {message:?}");
    }
    for case in &cases {
        let rules = messages.iter().filter(|message| message.contains(case.message)).count();
        assert!(rules >= 1, "no rule says {:?}", case.message);
    }
}

fn collect_messages(value: &Value, messages: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for rule in object.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten()
            {
                let message = rule["message"].as_str().expect("every rule has a message");
                messages.insert(message.to_owned());
            }
            object.values().for_each(|inner| collect_messages(inner, messages));
        }
        Value::Array(items) => items.iter().for_each(|inner| collect_messages(inner, messages)),
        _ => {}
    }
}

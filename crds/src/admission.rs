//! What an API server checks when a job is created or changed, without an API server: the ranges, lengths, patterns
//! and words of the schema, and its CEL rules. (Types and unknown fields are found when the object is read.)

use crate::crd;
use crate::plan::PlanError;
use crate::{GrowthTrainingJob, GrowthTrainingJobSpec};
use kube::core::cel::Validator;
use serde_json::{Value, json};

/// Everything that the schema and its rules refuse; empty when an API server would accept the job. With `old`, the
/// rules on changes apply too.
///
/// # Errors
/// When the object cannot be written as JSON, which no job that was read can cause.
pub fn admission_errors(
    job: &GrowthTrainingJob,
    old: Option<&GrowthTrainingJob>,
) -> Result<Vec<PlanError>, serde_json::Error> {
    let schema = crd::schema()?;
    let object = serde_json::to_value(job)?;
    let old = old.map(serde_json::to_value).transpose()?;
    let mut errors = Vec::new();
    check(&schema, &object, "", &mut errors);
    check_unique_stages(&job.spec, &mut errors);
    // Rules may rely on what the schema promises, so they come second.
    if errors.is_empty()
        && let Err(refused) = Validator::new().validate(&schema, &object, old.as_ref())
    {
        let found = refused.into_vec().into_iter();
        errors.extend(found.map(|error| PlanError { field: error.field_path, message: error.message }));
    }
    Ok(errors)
}

fn error(field: &str, message: String, errors: &mut Vec<PlanError>) {
    errors.push(PlanError { field: field.to_owned(), message });
}

fn join(field: &str, name: &str) -> String {
    if field.is_empty() { name.to_owned() } else { format!("{field}.{name}") }
}

fn check(schema: &Value, value: &Value, field: &str, errors: &mut Vec<PlanError>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let inner = schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
                if let Some(inner) = inner {
                    check(inner, member, &join(field, name), errors);
                }
            }
        }
        Value::Array(items) => {
            check_size(schema, items.len(), ("minItems", "maxItems", "items"), field, errors);
            for (index, item) in items.iter().enumerate() {
                check(&schema["items"], item, &format!("{field}[{index}]"), errors);
            }
        }
        Value::String(text) => check_text(schema, text, field, errors),
        Value::Number(number) => check_number(schema, number.as_f64().unwrap_or(f64::NAN), field, errors),
        Value::Bool(_) | Value::Null => {}
    }
}

fn check_size(
    schema: &Value,
    size: usize,
    (min, max, unit): (&str, &str, &str),
    field: &str,
    errors: &mut Vec<PlanError>,
) {
    let size = size as u64;
    if let Some(min) = schema[min].as_u64().filter(|min| size < *min) {
        error(field, format!("has {size} {unit}; it needs at least {min}"), errors);
    }
    if let Some(max) = schema[max].as_u64().filter(|max| size > *max) {
        error(field, format!("has {size} {unit}; at most {max} are allowed"), errors);
    }
}

fn check_text(schema: &Value, text: &str, field: &str, errors: &mut Vec<PlanError>) {
    check_size(schema, text.chars().count(), ("minLength", "maxLength", "characters"), field, errors);
    if let Some(words) = schema["enum"].as_array().filter(|words| !words.iter().any(|word| word == text)) {
        let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
        error(field, format!("{text:?} is not one of {}", words.join(", ")), errors);
    }
    if let Some(pattern) = schema["pattern"].as_str().filter(|pattern| !matches(pattern, text)) {
        error(field, format!("{text:?} does not match {pattern}"), errors);
    }
}

/// Whether a text matches a pattern of the schema, in the dialect of the rules.
fn matches(pattern: &str, text: &str) -> bool {
    let rule = format!("self.matches({})", json!(pattern));
    let schema = json!({"type": "string", "x-kubernetes-validations": [{"rule": rule}]});
    Validator::new().validate(&schema, &text.into(), None).is_ok()
}

fn check_number(schema: &Value, number: f64, field: &str, errors: &mut Vec<PlanError>) {
    if let Some(min) = schema["minimum"].as_f64().filter(|min| number < *min) {
        error(field, format!("{number} is too small; the least is {min}"), errors);
    }
    if let Some(max) = schema["maximum"].as_f64().filter(|max| number > *max) {
        error(field, format!("{number} is too large; the most is {max}"), errors);
    }
}

/// Stages are a map by name.
fn check_unique_stages(spec: &GrowthTrainingJobSpec, errors: &mut Vec<PlanError>) {
    for (index, stage) in spec.stages.iter().enumerate() {
        if spec.stages[..index].iter().any(|other| other.name == stage.name) {
            let message = format!("another stage is called {:?} too; rename one of them", stage.name);
            error(&format!("spec.stages[{index}].name"), message, errors);
        }
    }
}

//! The structure of a job against the CRD's schema: unknown and missing fields, and types. Values are checked on the
//! typed object afterwards.

use super::Problem;
use serde_json::{Map, Value};

/// Everything in `job` that the schema refuses.
pub fn check(job: &Value, schema: &Value) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (field, expected) in [("apiVersion", "growth.dev/v1alpha1"), ("kind", "GrowthTrainingJob")] {
        if job.get(field).and_then(Value::as_str) != Some(expected) {
            problems.push(Problem::of_field(field.to_owned(), format!("must be {expected}")));
        }
    }
    if job.pointer("/metadata/name").and_then(Value::as_str).is_none_or(str::is_empty) {
        problems.push(Problem::of_field(
            "metadata.name".to_owned(),
            "is required: give the job a name".to_owned(),
        ));
    }
    match (job.get("spec"), schema.pointer("/properties/spec")) {
        (Some(spec), Some(schema)) => check_value("spec", spec, schema, &mut problems),
        _ => problems.push(Problem::of_field("spec".to_owned(), "is required".to_owned())),
    }
    problems
}

/// Everything in `value`, whose own path is empty, that `schema` refuses.
pub fn check_fields(value: &Value, schema: &Value) -> Vec<Problem> {
    let mut problems = Vec::new();
    check_value("", value, schema, &mut problems);
    problems
}

fn check_value(field: &str, value: &Value, schema: &Value, problems: &mut Vec<Problem>) {
    let mut refuse = |message: String| problems.push(Problem::of_field(field.to_owned(), message));
    if value.is_null() {
        // The API server drops nulls of nullable fields; of others they are a mistake.
        if schema.get("nullable") != Some(&Value::Bool(true)) {
            refuse("has no value; give it one or remove it".to_owned());
        }
        return;
    }
    if let Some(message) = wrong_type(value, schema) {
        return refuse(message);
    }
    match value {
        Value::Object(object) => check_object(field, object, schema, problems),
        Value::Array(items) => check_array(field, items, schema, problems),
        _ => {}
    }
}

fn check_object(field: &str, object: &Map<String, Value>, schema: &Value, problems: &mut Vec<Problem>) {
    for required in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
        if let Some(name) = required.as_str()
            && !object.contains_key(name)
        {
            problems.push(Problem::of_field(member(field, name), "is required".to_owned()));
        }
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    let additional = schema.get("additionalProperties");
    let open = schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    for (name, value) in object {
        let path = member(field, name);
        match properties.and_then(|properties| properties.get(name)).or(additional) {
            Some(schema) => check_value(&path, value, schema, problems),
            None if open => {}
            None => problems.push(Problem::of_field(path, unknown_field(name, properties))),
        }
    }
}

fn check_array(field: &str, items: &[Value], schema: &Value, problems: &mut Vec<Problem>) {
    if let Some(schema) = schema.get("items") {
        for (index, item) in items.iter().enumerate() {
            check_value(&format!("{field}[{index}]"), item, schema, problems);
        }
    }
}

fn member(field: &str, name: &str) -> String {
    if field.is_empty() { name.to_owned() } else { format!("{field}.{name}") }
}

fn wrong_type(value: &Value, schema: &Value) -> Option<String> {
    if schema.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
        let fits = value.is_i64() || value.is_u64() || value.is_string();
        return (!fits)
            .then(|| format!("is {}; must be a whole number or a text such as 10B", describe(value)));
    }
    let expected = schema.get("type").and_then(Value::as_str)?;
    let fits = match expected {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        _ => true,
    };
    (!fits).then(|| format!("is {}; must be of type {expected}", describe(value)))
}

fn unknown_field(name: &str, properties: Option<&Map<String, Value>>) -> String {
    let known = properties.into_iter().flat_map(|properties| properties.keys());
    let near = known
        .map(|known| (strsim::damerau_levenshtein(&known.to_lowercase(), &name.to_lowercase()), known))
        .filter(|(distance, _)| *distance <= 3)
        .min();
    match near {
        Some((_, known)) => format!("is not a field; did you mean {known}?"),
        None => {
            let known: Vec<&str> = properties.into_iter().flat_map(Map::keys).map(String::as_str).collect();
            format!("is not a field; fields here are {}", known.join(", "))
        }
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        value => value.to_string(),
    }
}

//! `docs/job-format.md`, written from the schema that the API server uses.

use crate::crd::crd;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;

const INTRODUCTION: &str = "\
<!-- Generated from the types in crds/src by `cargo run -p growth-crds --bin crdgen`; do not edit. -->

# The job format

A `GrowthTrainingJob` (`growth.dev/v1alpha1`, namespaced, `kubectl get gtj`) is a list of stages. Each trains one
architecture for a number of tokens; between two stages the model grows. The same file runs on a cluster
(`kubectl apply -f job.yaml`) and on a laptop (`growth-trainer run job.yaml`).

Numbers of tokens and bytes are integers or decimals with a unit: `500K`, `97.5B`, `1.5G`. Units are powers of 1000:
K, M, B (or G), T. `kubectl explain gtj.spec` shows the same texts as this page.
";

const CHANGES: &str = "\
## What may change while a job runs

`suspend`, `replicas`, `checkpoint`, `evaluation`, `runPolicy`, `failurePolicy` and `scheduling`; the `tokens` of a stage
that has not finished; `replicas`, `elastic` and `template` of a stage, and `template` of the job, which take effect at the
next attempt. Stages may be appended. Everything else is refused with a message that says what to do instead.
";

/// Fields that a reader meets first.
const FIRST_FIELDS: &[&str] = &[
    "name", "uri", "operator", "model", "data", "storage", "training", "stages", "growth", "tokens", "phase",
];

/// The path of an object and its schema.
type Object<'a> = (String, &'a Value);

/// The page, with a complete example at its end.
///
/// # Errors
/// As [`crd`].
pub fn job_format(example: &str) -> Result<String, Box<dyn std::error::Error>> {
    let crd = serde_json::to_value(crd()?)?;
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut page = INTRODUCTION.to_owned();
    page.push_str("\n## Fields\n");
    let spec = objects("spec", &schema["properties"]["spec"]);
    tables(&mut page, &spec)?;
    rules(&mut page, schema, &spec)?;
    write!(page, "\n{CHANGES}\n## Status\n\nWhat the operator reports.\n")?;
    tables(&mut page, &objects("status", &schema["properties"]["status"]))?;
    write!(page, "\n## A complete example\n\n```yaml\n{example}```\n")?;
    Ok(page)
}

/// An object and all objects in it that have fields of our own.
fn objects<'a>(path: &str, schema: &'a Value) -> Vec<Object<'a>> {
    let mut found = vec![(path.to_owned(), schema)];
    for (name, property) in fields(schema) {
        let (inner, path) = match property.get("items") {
            Some(items) => (items, format!("{path}.{name}[]")),
            None => (property, format!("{path}.{name}")),
        };
        if is_ours(inner) {
            found.extend(objects(&path, inner));
        }
    }
    found
}

/// In the order in which a job is written; the rest by name.
fn fields(schema: &Value) -> Vec<(&String, &Value)> {
    let mut fields: Vec<_> = schema["properties"].as_object().into_iter().flatten().collect();
    let rank =
        |name: &str| FIRST_FIELDS.iter().position(|first| *first == name).unwrap_or(FIRST_FIELDS.len());
    fields.sort_by_key(|(name, _)| rank(name));
    fields
}

/// Schemas of Kubernetes' own objects carry no descriptions.
fn is_ours(schema: &Value) -> bool {
    fields(schema).iter().any(|(_, field)| field.get("description").is_some())
}

/// The object of the same shape that was described before, if any.
fn described_before<'a>(objects: &'a [Object<'_>], index: usize) -> Option<&'a str> {
    let shape = &objects[index].1["properties"];
    objects[..index].iter().find(|(_, other)| &other["properties"] == shape).map(|(path, _)| path.as_str())
}

fn tables(page: &mut String, objects: &[Object<'_>]) -> std::fmt::Result {
    for (index, (path, schema)) in objects.iter().enumerate() {
        write!(page, "\n### {path}\n\n")?;
        if let Some(description) = schema["description"].as_str() {
            write!(page, "{}\n\n", description)?;
        }
        if let Some(before) = described_before(objects, index) {
            writeln!(page, "The fields of [{before}](#{}).", anchor(before))?;
            continue;
        }
        page.push_str("| Field | Type | Default | What it is |\n|---|---|---|---|\n");
        let required: BTreeSet<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for (name, field) in fields(schema) {
            let (description, said) = split_default(field["description"].as_str().unwrap_or_default());
            let default = match (required.contains(name.as_str()), field.get("default")) {
                (true, _) => "required".to_owned(),
                (false, Some(default)) if !default.is_object() => format!("`{}`", bare(default)),
                _ => said,
            };
            writeln!(page, "| `{name}` | {} | {default} | {} |", type_of(field), cell(&description))?;
        }
    }
    Ok(())
}

/// Takes "Default: ..." out of a description.
fn split_default(description: &str) -> (String, String) {
    let Some((before, rest)) = description.split_once("Default: ") else {
        return (description.to_owned(), String::new());
    };
    // A dot inside a number or a path ends no sentence.
    let (default, after) = rest.split_once(". ").unwrap_or((rest.trim_end_matches('.'), ""));
    (format!("{before}{after}").trim().to_owned(), cell(default))
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// How GitHub writes the anchor of a heading.
fn anchor(heading: &str) -> String {
    heading.chars().filter(|character| character.is_alphanumeric()).collect::<String>().to_lowercase()
}

fn bare(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn type_of(schema: &Value) -> String {
    if let Some(words) = schema["enum"].as_array() {
        return words.iter().map(|word| format!("`{}`", bare(word))).collect::<Vec<_>>().join(" or ");
    }
    if schema["x-kubernetes-int-or-string"] == Value::Bool(true) {
        // A factor; quantities have no upper limit.
        if let (Some(_), Some(range)) = (schema.get("maximum"), range(schema, "minimum", "maximum")) {
            return format!("integer, {range}, or `auto`");
        }
        let auto = schema["pattern"].as_str().is_some_and(|pattern| pattern.contains("auto"));
        return if auto { "quantity, or `auto`".to_owned() } else { "quantity".to_owned() };
    }
    match schema["type"].as_str().unwrap_or_default() {
        "array" => list_of(schema),
        "string" if schema["format"] == "date-time" => "time".to_owned(),
        "string" => match range(schema, "minLength", "maxLength") {
            Some(range) => format!("text, {range} characters"),
            None => "text".to_owned(),
        },
        "boolean" => "true or false".to_owned(),
        "object" if schema.get("additionalProperties").is_some() => "map of texts".to_owned(),
        other => match range(schema, "minimum", "maximum") {
            Some(range) => format!("{other}, {range}"),
            None => other.to_owned(),
        },
    }
}

fn list_of(schema: &Value) -> String {
    let item = type_of(&schema["items"]);
    let (kind, limits) = item.split_once(", ").unwrap_or((&item, ""));
    let limits = if limits.is_empty() { String::new() } else { format!(" of {limits}") };
    let count = range(schema, "minItems", "maxItems").map(|range| range + " ").unwrap_or_default();
    format!("list of {count}{kind}s{limits}")
}

fn range(schema: &Value, min: &str, max: &str) -> Option<String> {
    // A least value of 0 says something about numbers, nothing about lengths.
    let shows_zero = matches!(schema["type"].as_str(), Some("number" | "integer"));
    let least = schema[min].as_f64().filter(|least| shows_zero || *least != 0.0);
    match (least, schema[max].as_f64()) {
        (Some(least), Some(most)) => Some(format!("{} to {}", decimal(least), decimal(most))),
        (Some(least), None) => Some(format!("from {}", decimal(least))),
        (None, Some(most)) => Some(format!("at most {}", decimal(most))),
        (None, None) => None,
    }
}

fn decimal(number: f64) -> String {
    let plain = (1e-5..1e9).contains(&number.abs()) || number == 0.0;
    if plain { number.to_string() } else { format!("{number:e}") }
}

fn rules(page: &mut String, schema: &Value, objects: &[Object<'_>]) -> std::fmt::Result {
    let mut on_create = Vec::new();
    let mut on_change = Vec::new();
    let mut seen = BTreeSet::new();
    let mut places = vec![("metadata".to_owned(), schema)];
    places.extend(objects.iter().cloned());
    for (path, schema) in places {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let (Some(message), Some(text)) = (rule["message"].as_str(), rule["rule"].as_str()) else {
                continue;
            };
            if !seen.insert(message) {
                continue;
            }
            let rules = if text.contains("oldSelf") { &mut on_change } else { &mut on_create };
            rules.push((path.clone(), message));
        }
    }
    page.push_str(
        "\n## Rules\n\nChecked before anything is stored, by the API server and by `growth-trainer run`.\n",
    );
    rule_table(page, &on_create)?;
    page.push_str("\nChecked when a job is changed:\n");
    rule_table(page, &on_change)
}

fn rule_table(page: &mut String, rules: &[(String, &str)]) -> std::fmt::Result {
    page.push_str("\n| Where | What it says |\n|---|---|\n");
    for (path, message) in rules {
        writeln!(page, "| `{path}` | {} |", cell(message))?;
    }
    Ok(())
}

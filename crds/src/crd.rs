//! The CustomResourceDefinition, as it is installed.

use crate::GrowthTrainingJob;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value};

/// `kubectl apply` stores the whole object in an annotation, and annotations end here.
pub const MAX_BYTES: usize = 262_144;

const HEADER: &str = "# Generated from crds/src by `cargo run -p growth-crds --bin crdgen`; do not edit.\n";

/// The CustomResourceDefinition of `GrowthTrainingJob`.
///
/// # Errors
/// When the derived definition is not one that Kubernetes knows, which a test rules out.
pub fn crd() -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut crd = serde_json::to_value(GrowthTrainingJob::crd())?;
    if let Some(versions) = crd.pointer_mut("/spec/versions").and_then(Value::as_array_mut) {
        for version in versions {
            if let Some(schema) = version.pointer_mut("/schema/openAPIV3Schema") {
                tidy_schema(schema);
            }
        }
    }
    serde_json::from_value(crd)
}

/// The schema of a whole object, as JSON.
///
/// # Errors
/// As [`crd`].
pub fn schema() -> Result<Value, serde_json::Error> {
    let crd = serde_json::to_value(crd()?)?;
    Ok(crd.pointer("/spec/versions/0/schema/openAPIV3Schema").cloned().unwrap_or_default())
}

/// The CustomResourceDefinition as a YAML file.
///
/// # Errors
/// As [`crd`], and when it cannot be written as YAML.
pub fn crd_yaml() -> Result<String, Box<dyn std::error::Error>> {
    let crd = serde_json::to_value(crd()?)?;
    Ok(format!("{HEADER}{}", serde_saphyr::to_string(&crd)?))
}

/// Walks a schema and the schemas inside it.
fn tidy_schema(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else {
        return;
    };
    tidy_keywords(object);
    for keyword in ["properties", "patternProperties"] {
        if let Some(properties) = object.get_mut(keyword).and_then(Value::as_object_mut) {
            properties.values_mut().for_each(tidy_schema);
        }
    }
    for keyword in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(keyword) {
            tidy_schema(inner);
        }
    }
}

fn tidy_keywords(schema: &mut Map<String, Value>) {
    // Without it a null is pruned, so that `has()` in a rule means what it says.
    schema.remove("nullable");
    // Formats that Kubernetes does not know bring a warning at every install.
    if let Some(description) = schema.get("description").and_then(Value::as_str) {
        // Doc comments are wrapped for readers of the code.
        let joined = description.split("\n\n").map(|text| text.replace('\n', " ")).collect::<Vec<_>>();
        schema.insert("description".to_owned(), joined.join("\n\n").into());
    }
    let format = schema.get("format").and_then(Value::as_str).unwrap_or_default();
    match format {
        "uint8" | "uint16" | "uint32" | "uint64" => {
            schema.insert("format".to_owned(), "int64".into());
        }
        _ => {}
    }
}

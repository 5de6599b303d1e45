//! Schemas of Kubernetes' own types.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::Value;

/// The full structural schema, so that typos are caught, without the descriptions: with them one pod template
/// alone pushes a CRD past the 256 KiB that `kubectl apply` can store.
pub(crate) fn without_descriptions<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = T::json_schema(generator);
    if let Some(object) = schema.as_object_mut() {
        object.values_mut().for_each(strip_descriptions);
    }
    schema
}

fn strip_descriptions(value: &mut Value) {
    match value {
        Value::Object(object) => {
            // A property may itself be called description; its schema is no string.
            if object.get("description").is_some_and(Value::is_string) {
                object.remove("description");
            }
            object.values_mut().for_each(strip_descriptions);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_descriptions),
        _ => {}
    }
}

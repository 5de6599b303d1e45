//! Generated files are fresh, and the CRD fits into what `kubectl apply` can store.
use growth_crds::crd::{MAX_BYTES, crd};
use growth_crds::generated;
use std::path::Path;

#[test]
fn generated_files_are_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for file in generated::files(&root).unwrap() {
        let stored = std::fs::read_to_string(root.join(file.path)).unwrap_or_default();
        assert!(
            stored == file.content,
            "{} is stale; run `cargo run -p growth-crds --bin crdgen`",
            file.path
        );
    }
}

#[test]
fn the_definition_fits_into_an_annotation() {
    let json = serde_json::to_string(&crd().unwrap()).unwrap();
    assert!(json.len() < MAX_BYTES, "{} bytes of JSON", json.len());
}

#[test]
fn the_yaml_says_what_the_definition_says() {
    let yaml: serde_json::Value = serde_saphyr::from_str(&growth_crds::crd::crd_yaml().unwrap()).unwrap();
    assert_eq!(yaml, serde_json::to_value(crd().unwrap()).unwrap());
}

#[test]
fn no_schema_is_nullable_or_of_an_unknown_format() {
    let json = serde_json::to_string(&crd().unwrap()).unwrap();
    for word in ["\"nullable\"", "\"uint32\"", "\"uint64\"", "\"anyOf\"", "\"oneOf\"", "\"$ref\""] {
        assert!(!json.contains(word), "{word}");
    }
}

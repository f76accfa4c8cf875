//! The description of the API against what is served, and against the copy that users read.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use super::openapi;

fn document() -> Value {
    serde_json::to_value(openapi()).unwrap()
}

/// All operations with their paths.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let methods = |(path, item): (&String, &Value)| {
        let item = item.as_object().unwrap().clone();
        item.into_iter().map(|(method, operation)| (path.clone(), method, operation)).collect::<Vec<_>>()
    };
    paths.iter().flat_map(methods).collect()
}

/// Every `$ref` in a value.
fn references(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(to)) = fields.get("$ref") {
                into.insert(to.clone());
            }
            fields.values().for_each(|field| references(field, into));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, into)),
        _ => {}
    }
}

/// `UPDATE_OPENAPI=1 cargo test -p vmm openapi` writes the file anew.
#[test]
fn the_copy_in_docs_is_the_description() {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json"));
    let made = format!("{}\n", serde_json::to_string_pretty(&document()).unwrap());
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(
        kept == made,
        "docs/openapi.json is not what is served: run UPDATE_OPENAPI=1 cargo test -p vmm openapi"
    );
}

#[test]
fn the_document_is_openapi_3_1() {
    let text = serde_json::to_string(&document()).unwrap();
    let parsed = oas3::from_json(&text).unwrap();
    assert!(parsed.validate_version().is_ok());
    assert!(parsed.operations().count() >= 16);
}

#[test]
fn every_reference_leads_somewhere_and_every_schema_is_used() {
    let document = document();
    let mut references_ = BTreeSet::new();
    references(&document, &mut references_);
    for to in &references_ {
        let pointer = to.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{to} leads nowhere");
    }
    for name in document["components"]["schemas"].as_object().unwrap().keys() {
        assert!(references_.contains(&format!("#/components/schemas/{name}")), "{name} is not used");
    }
}

#[test]
fn every_operation_is_whole() {
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(&document()) {
        let what = format!("{method} {path}");
        assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{what} has no summary");
        assert!(
            ids.insert(operation["operationId"].as_str().unwrap().to_owned()),
            "{what}: its id is not its own"
        );
        assert!(!operation["responses"].as_object().unwrap().is_empty(), "{what} has no responses");
        let declared: BTreeSet<&str> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|p| p["name"].as_str())
            .collect();
        let in_path: BTreeSet<&str> =
            path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect();
        assert_eq!(declared, in_path, "{what}");
    }
}

#[test]
fn every_field_has_a_description() {
    for (name, schema) in document()["components"]["schemas"].as_object().unwrap() {
        assert!(schema["description"].is_string(), "{name} has no description");
        for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
            // One that may be null is described inside.
            let inside =
                schema["oneOf"].as_array().into_iter().flatten().any(|one| one["description"].is_string());
            let described = schema["description"].is_string() || schema["$ref"].is_string() || inside;
            assert!(described, "{name}.{field} has no description");
        }
    }
}

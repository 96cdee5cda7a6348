//! From a type to a schema that the API server takes: a structural one (apiextensions v1), which has no references and
//! says a type at every place.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

/// The schema of a type.
pub(super) fn of<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    settings.meta_schema = None;
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    rewrite(&mut schema);
    schema
}

fn rewrite(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    // Names of types say nothing to people, and what serde takes for absent is no default that objects should be
    // filled in with.
    fields.remove("title");
    fields.remove("default");
    if let Some(text) = fields.get_mut("description") {
        *text = Value::from(joined(text.as_str().unwrap_or_default()));
    }
    // An `Option` takes null. `null` in an object is refused as in OVN-Kubernetes: absent is written as absent.
    if let Some(Value::Array(types)) = fields.get("type")
        && let Some(only) = types.iter().find(|t| *t != "null").cloned()
    {
        fields.insert("type".to_owned(), only);
    }
    integer_format(fields);
    for key in ["properties", "patternProperties"] {
        if let Some(Value::Object(properties)) = fields.get_mut(key) {
            properties.values_mut().for_each(rewrite);
            properties.values_mut().for_each(admit_empty);
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(schema) = fields.get_mut(key) {
            rewrite(schema);
        }
    }
    if let Some(values) = fields.get_mut("additionalProperties") {
        admit_empty(values);
    }
}

/// Lets a text that may be empty be empty. API servers up to 1.20 that were built by Go 1.18 or later take `""` for null
/// (go-openapi/validate, `type.go`: it compares `reflect.Value`s with that of the zero value), so that a label without a
/// value is refused unless null may stand there; it is read as the same.
fn admit_empty(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    let has = |key: &str| fields.contains_key(key);
    let pattern = fields.get("pattern").and_then(Value::as_str);
    let may_be_empty = !has("format") && !has("enum") && !has("anyOf") && !has("minLength");
    if fields.get("type").and_then(Value::as_str) == Some("string")
        && may_be_empty
        && pattern.is_none_or(|pattern| pattern.ends_with(")?$"))
    {
        fields.insert("nullable".to_owned(), json!(true));
    }
}

/// `OpenAPI` knows two formats of integers; the others are those with bounds.
fn integer_format(fields: &mut Map<String, Value>) {
    let (format, largest) = match fields.get("format").and_then(Value::as_str) {
        Some("uint8") => ("int32", Some(u64::from(u8::MAX))),
        Some("uint16") => ("int32", Some(u64::from(u16::MAX))),
        Some("uint32") => ("int64", Some(u64::from(u32::MAX))),
        Some("uint64") => ("int64", None),
        _ => return,
    };
    fields.insert("format".to_owned(), json!(format));
    fields.entry("minimum").or_insert(json!(0));
    if let Some(largest) = largest {
        let stated = fields.get("maximum").and_then(Value::as_u64).unwrap_or(largest);
        fields.insert("maximum".to_owned(), json!(stated.min(largest)));
    }
}

/// A doc comment's lines, joined to paragraphs.
fn joined(text: &str) -> String {
    let paragraphs = text.split("\n\n").map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

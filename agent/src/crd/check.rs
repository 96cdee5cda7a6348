//! Checks an object as the API server would: its kind's schema, then the CEL rules. Offline, for `outgate validate`.
//!
//! A walker over our own schemas and not a library of JSON Schema: those know nothing of pruning, which is where a slip in
//! a field's name ends, nor of Kubernetes' formats, and are as large as the rest of this program's checks. A test sees to
//! it that no schema has a keyword that is not checked here.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use kube::core::cel::{CompiledSchema, Validator, compile_schema};
use regex::Regex;
use serde_json::{Map, Value};

use super::Kind;
use crate::firewall::check::Expected;

/// Said of a field that is in no schema.
pub(crate) const UNKNOWN_FIELD: &str =
    "is no field of this kind: kubectl refuses it, or the API server drops it";

/// Something wrong with a field.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Mistake {
    /// The field, as in `spec.egress[0].to`.
    pub(crate) field: String,
    /// What is wrong with it. It reads on after the field.
    pub(crate) message: String,
}

/// Checks objects; what it needs of a kind is made once.
#[derive(Default)]
pub(crate) struct Checker {
    kinds: BTreeMap<&'static str, (Value, CompiledSchema)>,
    patterns: BTreeMap<String, Option<Regex>>,
}

impl Checker {
    /// What is wrong with an object of a kind. As on a server, CEL rules are looked at only when the schema is content.
    pub(crate) fn check(&mut self, kind: &'static Kind, object: &Value) -> Vec<Mistake> {
        let (schema, rules) = self.kinds.entry(kind.kind).or_insert_with(|| {
            let schema = kind.schema();
            let rules = compile_schema(&schema);
            (schema, rules)
        });
        let mut walk = Walk { patterns: &mut self.patterns, mistakes: Vec::new(), unknown: Vec::new() };
        let object = &without_nulls(object);
        walk.value("", schema, object);
        let Walk { mut mistakes, mut unknown, .. } = walk;
        if mistakes.is_empty()
            && let Err(errors) = Validator::new().validate_compiled(rules, object, None)
        {
            let errors = errors.into_vec().into_iter();
            mistakes.extend(errors.map(|e| Mistake { field: e.field_path, message: e.message }));
        }
        mistakes.append(&mut unknown);
        mistakes
    }
}

/// The same without fields that are null: a server drops them (tried with 1.20).
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let present = fields.iter().filter(|(_, value)| !value.is_null());
            Value::Object(present.map(|(name, value)| (name.clone(), without_nulls(value))).collect())
        }
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => other.clone(),
    }
}

struct Walk<'a> {
    patterns: &'a mut BTreeMap<String, Option<Regex>>,
    mistakes: Vec<Mistake>,
    /// Fields that are pruned.
    unknown: Vec<Mistake>,
}

impl Walk<'_> {
    fn wrong(&mut self, at: &str, message: impl fmt::Display) {
        self.mistakes.push(Mistake { field: at.to_owned(), message: message.to_string() });
    }

    fn value(&mut self, at: &str, schema: &Value, value: &Value) {
        match (schema["type"].as_str(), value) {
            (Some("object"), Value::Object(fields)) => self.object(at, schema, fields),
            (Some("array"), Value::Array(items)) => {
                self.count(at, schema, ["minItems", "maxItems"], items.len(), "item");
                for (index, item) in items.iter().enumerate() {
                    self.value(&format!("{at}[{index}]"), &schema["items"], item);
                }
            }
            (Some("string"), Value::String(text)) => self.text(at, schema, text),
            (Some("integer"), Value::Number(number)) if !number.is_f64() => {
                let (least, most) = (schema["minimum"].as_i64(), schema["maximum"].as_i64());
                let inside = number.as_i64().is_some_and(|n| {
                    least.is_none_or(|least| n >= least) && most.is_none_or(|most| n <= most)
                });
                if !inside {
                    let range = match (least, most) {
                        (Some(least), Some(most)) => format!("from {least} to {most}"),
                        (Some(least), None) => format!("{least} or more"),
                        (None, _) => "in range".to_owned(),
                    };
                    self.wrong(at, format_args!("{number} is not {range}"));
                }
            }
            (Some("boolean"), Value::Bool(_)) => {}
            (_, Value::Null) if schema["nullable"] == true => {}
            (expected, _) => {
                let expected = match expected {
                    Some("object") => "an object",
                    Some("array") => "a list",
                    Some("string") => "text",
                    Some("integer") => "a whole number",
                    _ => "true or false",
                };
                self.wrong(at, Expected(expected, value));
            }
        }
    }

    fn object(&mut self, at: &str, schema: &Value, fields: &Map<String, Value>) {
        let below = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(name) {
                self.wrong(&below(name), "is missing");
            }
        }
        // A field that is pruned does not count.
        let known =
            |name: &str| schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
        let count = fields.keys().filter(|name| known(name).is_some()).count();
        self.count(at, schema, ["minProperties", "maxProperties"], count, "field");
        for (name, value) in fields {
            match known(name) {
                Some(schema) => self.value(&below(name), schema, value),
                // Metadata has a schema of its own, on every server.
                None if at == "metadata" => {}
                None => self.unknown.push(Mistake {
                    field: below(name),
                    message: "is no field of this kind: kubectl refuses it, or the API server drops it"
                        .to_owned(),
                }),
            }
        }
    }

    fn text(&mut self, at: &str, schema: &Value, text: &str) {
        if let Some(words) = schema["enum"].as_array()
            && !words.iter().any(|word| word == text)
        {
            let words: Vec<_> = words.iter().filter_map(Value::as_str).collect();
            self.wrong(at, format_args!("{text:?} is none of {}", words.join(", ")));
        }
        self.count(at, schema, ["minLength", "maxLength"], text.chars().count(), "character");
        if let Some(pattern) = schema["pattern"].as_str() {
            let regex = self.patterns.entry(pattern.to_owned()).or_insert_with(|| Regex::new(pattern).ok());
            if !regex.as_ref().is_some_and(|regex| regex.is_match(text)) {
                let word = pattern.strip_prefix('^').and_then(|p| p.strip_suffix('$'));
                match word.filter(|word| word.bytes().all(|c| c.is_ascii_lowercase())) {
                    Some(word) => self.wrong(at, format_args!("is {text:?}; it must be {word}")),
                    None => self.wrong(at, format_args!("{text:?} is not of the form {pattern}")),
                }
            }
        }
        let formats: Vec<_> = schema["format"]
            .as_str()
            .into_iter()
            .chain(schema["anyOf"].as_array().into_iter().flatten().filter_map(|s| s["format"].as_str()))
            .collect();
        if !formats.is_empty() && !formats.iter().any(|format| is_of(format, text)) {
            let expected = if formats == ["cidr"] {
                "a network such as 10.0.0.0/16 or 2001:db8::/64"
            } else {
                "an IP address"
            };
            self.wrong(at, format_args!("{text:?} is not {expected}"));
        }
    }

    fn count(&mut self, at: &str, schema: &Value, [least, most]: [&str; 2], count: usize, what: &str) {
        let bound = |key: &str| schema[key].as_u64().and_then(|n| usize::try_from(n).ok());
        let few = bound(least).filter(|least| count < *least).map(|n| (n, "at least"));
        let many = bound(most).filter(|most| count > *most).map(|n| (n, "at most"));
        if let Some((bound, word)) = few.or(many) {
            let s = if count == 1 { "" } else { "s" };
            self.wrong(at, format_args!("has {count} {what}{s}; {word} {bound} may be there"));
        }
    }
}

/// Kubernetes' formats (`apiextensions-apiserver`, `formats.go`).
fn is_of(format: &str, text: &str) -> bool {
    match format {
        "ipv4" => text.parse::<Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<Ipv6Addr>().is_ok(),
        "cidr" => text.parse::<IpNet>().is_ok(),
        _ => false,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::crd::KINDS;

    /// What [`Walk`] looks at, and what is only for servers and people.
    const KEYWORDS: [&str; 16] = [
        "type",
        "nullable",
        "properties",
        "required",
        "items",
        "additionalProperties",
        "enum",
        "pattern",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
    ];
    const PASSED_OVER: [&str; 4] =
        ["description", "x-kubernetes-list-type", "x-kubernetes-map-type", "x-kubernetes-validations"];

    /// Every schema within a schema, with its path.
    pub(in crate::crd) fn each<'a>(at: &str, schema: &'a Value, seen: &mut dyn FnMut(&str, &'a Value)) {
        seen(at, schema);
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            each(&format!("{at}.{name}"), schema, seen);
        }
        for key in ["items", "additionalProperties"] {
            if let Some(schema) = schema.get(key) {
                each(&format!("{at}[]"), schema, seen);
            }
        }
    }

    #[test]
    fn every_keyword_of_the_schemas_is_checked() {
        for kind in &KINDS {
            each(kind.kind, &kind.schema(), &mut |at, schema| {
                for (keyword, value) in schema.as_object().unwrap() {
                    let formats: &[&str] = match schema["type"].as_str() {
                        Some("string") => &["ipv4", "ipv6", "cidr"],
                        _ => &["int32", "int64"],
                    };
                    let known = match keyword.as_str() {
                        "format" => formats.contains(&value.as_str().unwrap()),
                        "anyOf" => value.as_array().unwrap().iter().all(|s| {
                            s.as_object().unwrap().keys().eq(["format"])
                                && formats.contains(&s["format"].as_str().unwrap())
                        }),
                        "type" => ["object", "array", "string", "integer", "boolean"]
                            .contains(&value.as_str().unwrap()),
                        "pattern" => Regex::new(value.as_str().unwrap()).is_ok(),
                        keyword => KEYWORDS.contains(&keyword) || PASSED_OVER.contains(&keyword),
                    };
                    assert!(known, "{at}: {keyword}: {value}");
                }
                assert!(schema["type"].is_string(), "{at} has no type: the schema is not structural");
            });
        }
    }
}

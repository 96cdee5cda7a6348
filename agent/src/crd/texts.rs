//! Texts that have a form: addresses, networks, labels, names. Lengths bound what CEL rules cost.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Value, json};

use super::rules::{self, rules};

/// Labels of one selector; OVN-Kubernetes' own bound for its newer selectors.
pub(crate) const SELECTOR_LABELS: u32 = 64;
/// Demands of one selector; OVN-Kubernetes' own bound for its newer selectors.
pub(crate) const SELECTOR_EXPRESSIONS: u32 = 32;
/// Values of one demand of a selector: a list of namespaces by name may be long.
pub(crate) const SELECTOR_VALUES: u32 = 1000;
/// The longest idle time, a week in seconds, as [`crate::model`] has it.
pub(crate) const LONGEST_TIMEOUT: u32 = 604_800;

/// A label's key: a name of at most 63 characters, with or without a DNS name of at most 253 and `/` before it.
pub(crate) const LABEL_KEY: &str =
    "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";

/// A name as an EgressFirewall has it: labels of 63 characters (RFC 1035, 2.3.4), with `_`, which names of services have,
/// `*.` for one more label, and a dot at the end or not.
pub(super) const DNS_NAME: &str = r"^(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?$";

/// A label's value.
pub(crate) fn label_value() -> Value {
    json!({"type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"})
}

/// Schema of an IP address.
pub(crate) struct Address;

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "Address".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let mut schema = Schema::default();
        schema.insert("type".to_owned(), json!("string"));
        // The longest way to write one: an IPv6 address that ends in an IPv4 one.
        schema.insert("maxLength".to_owned(), json!(45));
        schema.insert("anyOf".to_owned(), json!([{"format": "ipv4"}, {"format": "ipv6"}]));
        schema.insert("x-kubernetes-validations".to_owned(), rules(&[rules::MAPPED_ADDRESS]));
        schema
    }
}

/// Schema of an IP network.
pub(crate) struct Network;

impl JsonSchema for Network {
    fn schema_name() -> Cow<'static, str> {
        "Network".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let mut schema = Schema::default();
        schema.insert("type".to_owned(), json!("string"));
        schema.insert("maxLength".to_owned(), json!(49));
        schema.insert("format".to_owned(), json!("cidr"));
        schema.insert("x-kubernetes-validations".to_owned(), rules(&[rules::MAPPED_NETWORK]));
        schema
    }
}

/// Schema of a label's value.
pub(crate) struct LabelValue;

impl JsonSchema for LabelValue {
    fn schema_name() -> Cow<'static, str> {
        "LabelValue".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let Value::Object(fields) = label_value() else { return Schema::default() };
        fields.into()
    }
}

//! The custom resource definitions (CRDs) of the five kinds. Their schemas are made from the types in
//! [`crate::objects`]; here is what the types do not say: names, scope, columns of `kubectl get`.
//!
//! - **EgressIP and EgressFirewall** are OVN-Kubernetes' (`k8s.ovn.org/v1`): group, names, scope, columns and fields are as
//!   there, so that every manifest that works there applies here. Bounds are added, and words are checked whole
//!   (`^Allow|Deny$` there takes `AllowX` too). Fields that are not known here are pruned, not refused.
//! - **Every kind that has a status has it as a subresource**, EgressFirewall as in OVN-Kubernetes, EgressIP unlike there:
//!   whoever may edit an EgressIP cannot forge who holds it, the controller needs no right to the spec, and the
//!   generation counts changes of the spec only.
//! - **CEL rules** ([`rules`]) say what a schema cannot. Servers before 1.25 ignore them; the agents check the same again.

pub(crate) mod check;
mod columns;
pub mod rules;
mod schema;
mod texts;
mod written;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::objects::{
    EgressAllocationSpec, EgressConfigSpec, EgressFirewallStatus, EgressIpSpec, EgressIpStatus,
    EgressNodeSpec, EgressNodeStatus, OUTGATE_API, OVN_API,
};

pub(crate) use rules::rules;
pub(crate) use texts::{
    Address, LABEL_KEY, LONGEST_TIMEOUT, LabelValue, Network, SELECTOR_EXPRESSIONS, SELECTOR_LABELS,
    SELECTOR_VALUES, label_value,
};

/// What is at the head of each file.
const HEADER: &str =
    "# Made from the types in agent/src/objects.rs by `cargo xtask codegen`: change those, not this file.\n";

/// A kind that has a CRD.
pub struct Kind {
    /// API group and version.
    pub api_version: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// The only name that an object of it may have.
    pub only_name: Option<&'static str>,
    short_names: &'static [&'static str],
    columns: &'static [columns::Column],
    description: &'static str,
    has_status: bool,
    needs_spec: bool,
    spec: fn() -> Value,
    status: Option<fn() -> Value>,
}

/// All of them.
pub const KINDS: [Kind; 5] = [
    Kind {
        api_version: OVN_API,
        kind: "EgressIP",
        namespaced: false,
        only_name: None,
        short_names: &["eip"],
        columns: columns::EGRESS_IP,
        description: "EgressIP gives the pods that it selects fixed addresses: whatever they send out of the cluster \
                      leaves with one of these as its source.",
        has_status: true,
        needs_spec: true,
        spec: schema::of::<EgressIpSpec>,
        status: Some(schema::of::<EgressIpStatus>),
    },
    Kind {
        api_version: OVN_API,
        kind: "EgressFirewall",
        namespaced: true,
        only_name: Some("default"),
        short_names: &[],
        columns: columns::EGRESS_FIREWALL,
        description: "EgressFirewall says what the pods of its namespace may reach outside the cluster. The first rule \
                      that matches decides; what none matches is allowed. A namespace has one, named default.",
        has_status: true,
        needs_spec: true,
        spec: schema::of::<written::EgressFirewallSpec>,
        status: Some(schema::of::<EgressFirewallStatus>),
    },
    Kind {
        api_version: OUTGATE_API,
        kind: "EgressConfig",
        namespaced: false,
        only_name: Some("default"),
        short_names: &["egc"],
        columns: columns::EGRESS_CONFIG,
        description: "EgressConfig holds Outgate's settings for the whole cluster. There is one, named default; without \
                      it all defaults hold.",
        has_status: false,
        needs_spec: true,
        spec: schema::of::<EgressConfigSpec>,
        status: None,
    },
    Kind {
        api_version: OUTGATE_API,
        kind: "EgressNode",
        namespaced: false,
        only_name: None,
        short_names: &["egn"],
        columns: columns::EGRESS_NODE,
        description: "EgressNode is what a node of the same name and Outgate's controller tell each other: the controller \
                      writes the spec, the node's agent the status. To look at, not to edit.",
        has_status: true,
        needs_spec: false,
        spec: schema::of::<EgressNodeSpec>,
        status: Some(schema::of::<EgressNodeStatus>),
    },
    Kind {
        api_version: OUTGATE_API,
        kind: "EgressAllocation",
        namespaced: false,
        only_name: None,
        short_names: &["ega"],
        columns: columns::EGRESS_ALLOCATION,
        description: "EgressAllocation says which node holds an egress IP and which nodes may use which of its ports. \
                      Written by Outgate's controller only. To look at, not to edit.",
        has_status: false,
        needs_spec: true,
        spec: schema::of::<EgressAllocationSpec>,
        status: None,
    },
];

impl Kind {
    /// The kind of an object, if it is one of these.
    #[must_use]
    pub fn find(api_version: &str, kind: &str) -> Option<&'static Self> {
        // A constant's address lasts as long as the program.
        const { &KINDS }.iter().find(|k| k.api_version == api_version && k.kind == kind)
    }

    /// API group.
    #[must_use]
    pub fn group(&self) -> &'static str {
        self.api_version.split('/').next().unwrap_or_default()
    }

    /// The name in the API's paths: lower case, plural.
    #[must_use]
    pub fn plural(&self) -> String {
        format!("{}s", self.kind.to_lowercase())
    }

    /// The schema of a whole object, as in the CRD.
    #[must_use]
    pub fn schema(&self) -> Value {
        let mut metadata = json!({"type": "object"});
        if let Some(name) = self.only_name {
            metadata["properties"] = json!({"name": {"type": "string", "pattern": format!("^{name}$")}});
        }
        let mut properties = json!({
            "apiVersion": {
                "type": "string",
                "description": format!("Version of the schema of this representation of the object: {}.", self.api_version),
            },
            "kind": {"type": "string", "description": format!("What the object is: {}.", self.kind)},
            "metadata": metadata,
            "spec": (self.spec)(),
        });
        if let Some(status) = self.status {
            properties["status"] = status();
        }
        let mut schema = json!({"type": "object", "description": self.description, "properties": properties});
        if self.needs_spec {
            schema["required"] = json!(["spec"]);
        }
        schema
    }

    /// The whole definition.
    #[must_use]
    pub fn definition(&self) -> Value {
        let version = self.api_version.split('/').nth(1).unwrap_or_default();
        let mut names = json!({
            "kind": self.kind,
            "listKind": format!("{}List", self.kind),
            "plural": self.plural(),
            "singular": self.kind.to_lowercase(),
            "categories": ["outgate"],
        });
        if !self.short_names.is_empty() {
            names["shortNames"] = json!(self.short_names);
        }
        let mut version = json!({
            "name": version,
            "served": true,
            "storage": true,
            "additionalPrinterColumns": self.columns.iter().map(columns::Column::value).collect::<Vec<_>>(),
            "schema": {"openAPIV3Schema": self.schema()},
        });
        if self.has_status {
            version["subresources"] = json!({"status": {}});
        }
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": format!("{}.{}", self.plural(), self.group()),
                // Whose definition it is: OVN-Kubernetes' of the same name lacks it.
                "labels": {"app.kubernetes.io/part-of": "outgate"},
            },
            "spec": {
                "group": self.group(),
                "names": names,
                "scope": if self.namespaced { "Namespaced" } else { "Cluster" },
                "versions": [version],
            },
        })
    }
}

/// All definitions as YAML documents, each with a header.
pub fn yaml() -> anyhow::Result<String> {
    let mut text = String::new();
    for kind in &KINDS {
        write!(text, "---\n{HEADER}{}", serde_saphyr::to_string(&ordered(kind.definition()))?)?;
    }
    Ok(text)
}

/// The same with its fields by name, whatever order `serde_json` was built to keep.
fn ordered(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let sorted: BTreeMap<_, _> = fields.into_iter().map(|(k, v)| (k, ordered(v))).collect();
            Value::Object(sorted.into_iter().collect())
        }
        Value::Array(items) => items.into_iter().map(ordered).collect(),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => other,
    }
}

#[cfg(test)]
mod tests;

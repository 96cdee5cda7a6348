//! Columns of `kubectl get`. A path that finds several values shows the first only (apiextensions-apiserver,
//! `tableconvertor.go`), so lists of texts are shown whole, as JSON, except where OVN-Kubernetes does otherwise.

use serde_json::{Value, json};

/// A column.
pub(super) struct Column {
    name: &'static str,
    path: &'static str,
    kind: &'static str,
    /// With `-o wide` only.
    wide: bool,
}

impl Column {
    const fn text(name: &'static str, path: &'static str) -> Self {
        Self { name, path, kind: "string", wide: false }
    }

    const fn wide(self) -> Self {
        Self { wide: true, ..self }
    }

    pub(super) fn value(&self) -> Value {
        let mut value = json!({"name": self.name, "jsonPath": self.path, "type": self.kind});
        if self.wide {
            value["priority"] = json!(1);
        }
        value
    }
}

const AGE: Column = Column { name: "Age", path: ".metadata.creationTimestamp", kind: "date", wide: false };

/// The first three are OVN-Kubernetes'.
pub(super) const EGRESS_IP: &[Column] = &[
    Column::text("EgressIPs", ".spec.egressIPs[*]"),
    Column::text("Assigned Node", ".status.items[*].node"),
    Column::text("Assigned EgressIPs", ".status.items[*].egressIP"),
    Column::text("Assignments", ".status.items").wide(),
    Column::text("Assigned", r#".status.conditions[?(@.type=="Assigned")].status"#).wide(),
    Column::text("Reason", r#".status.conditions[?(@.type=="Assigned")].message"#).wide(),
    AGE.wide(),
];

/// The first is OVN-Kubernetes'.
pub(super) const EGRESS_FIREWALL: &[Column] = &[
    Column::text("EgressFirewall Status", ".status.status"),
    Column::text("Reason", r#".status.conditions[?(@.type=="Applied")].message"#).wide(),
    AGE.wide(),
];

pub(super) const EGRESS_CONFIG: &[Column] = &[
    Column::text("Unassigned", ".spec.unassigned"),
    Column::text("Unknown Pods", ".spec.unknownPods"),
    Column::text("Spread", ".spec.spread"),
    Column::text("Cluster CIDRs", ".spec.clusterCIDRs").wide(),
    AGE,
];

pub(super) const EGRESS_NODE: &[Column] = &[
    Column::text("Tunnel", ".status.tunnelAddress"),
    Column::text("First Uplink", ".status.uplinks[*].name"),
    Column::text("Pod CIDRs", ".spec.podCIDRs"),
    Column::text("Addresses", ".status.addresses").wide(),
    Column::text("First EgressIP Used", ".spec.ranges[*].egressIP").wide(),
    Column::text("First EgressIP Loaded", ".status.loaded[*].egressIP").wide(),
    AGE,
];

pub(super) const EGRESS_ALLOCATION: &[Column] = &[
    Column::text("EgressIP", ".spec.egressIP"),
    Column::text("Owner", ".spec.owner"),
    Column::text("Standbys", ".spec.standbys"),
    Column::text("First Lease", ".spec.leases[*].node").wide(),
    AGE,
];

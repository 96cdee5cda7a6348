//! The kinds of objects that are read, and how: whatever the server sends becomes the types of [`crate::objects`], and a
//! bad object is bad by itself.

use kube::api::{ApiResource, DynamicObject, ObjectMeta};
use kube::core::GroupVersionKind;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::keep;
use crate::model::Checked;
use crate::objects::{
    Cluster, EGRESS_CAPACITY, EgressAllocation, EgressConfig, EgressFirewall, EgressFirewallReport, EgressIp,
    EgressIpReport, EgressNode, Meta, Namespace, Node, OVN_API, Pod, Service, Tunnel,
};

/// Namespace (empty for what is in none) and name.
pub(super) type Key = (String, String);

/// A kind of object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[expect(missing_docs, reason = "they are called what they are")]
pub enum Kind {
    Node,
    Namespace,
    Pod,
    Service,
    EgressIp,
    EgressFirewall,
    EgressConfig,
    EgressNode,
    EgressAllocation,
    /// Leases by which egress nodes' agents show that they live.
    Heartbeat,
    /// The Lease of whoever leads.
    Leader,
    /// The ConfigMap of what all nodes agree on.
    Cluster,
}

impl Kind {
    /// What the server calls it.
    pub(super) fn resource(self) -> ApiResource {
        let (group, version, kind, plural) = match self {
            Self::Node => ("", "v1", "Node", "nodes"),
            Self::Namespace => ("", "v1", "Namespace", "namespaces"),
            Self::Pod => ("", "v1", "Pod", "pods"),
            Self::Service => ("", "v1", "Service", "services"),
            Self::EgressIp => ("k8s.ovn.org", "v1", "EgressIP", "egressips"),
            Self::EgressFirewall => ("k8s.ovn.org", "v1", "EgressFirewall", "egressfirewalls"),
            Self::EgressConfig => ("outgate.dev", "v1alpha1", "EgressConfig", "egressconfigs"),
            Self::EgressNode => ("outgate.dev", "v1alpha1", "EgressNode", "egressnodes"),
            Self::EgressAllocation => ("outgate.dev", "v1alpha1", "EgressAllocation", "egressallocations"),
            Self::Heartbeat | Self::Leader => ("coordination.k8s.io", "v1", "Lease", "leases"),
            Self::Cluster => ("", "v1", "ConfigMap", "configmaps"),
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
    }

    /// As people and RBAC write it: `egressips.k8s.ovn.org`.
    pub(super) fn plural(self) -> String {
        let r = self.resource();
        if r.group.is_empty() { r.plural } else { format!("{}.{}", r.plural, r.group) }
    }
}

/// An object as it is kept.
#[derive(Clone, Debug)]
pub(super) enum Object {
    /// A Node, and whether OVN-Kubernetes runs it.
    Node(Node, bool),
    Namespace(Namespace),
    Pod(Pod),
    Service(Service),
    EgressIp(EgressIp, Option<EgressIpReport>),
    EgressFirewall(EgressFirewall, Option<EgressFirewallReport>),
    EgressConfig(Box<EgressConfig>),
    EgressNode(Box<EgressNode>),
    /// An allocation, and for who writes them the metadata that a replacement must leave alone.
    EgressAllocation(EgressAllocation, Option<Box<ObjectMeta>>),
    /// An allocation that makes sense, where it is only read.
    Checked(Checked),
    /// When a heartbeat was last renewed, as text.
    Heartbeat(String),
    Leader(Leader),
    Cluster(Cluster),
}

/// Who leads, as the Lease says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Leader {
    /// Its identity; empty for nobody.
    pub(super) holder: String,
    /// When it last said so, by its own clock, and for how many seconds that is good.
    renewed: Option<(jiff::Timestamp, i64)>,
}

impl Leader {
    fn of(lease: &Value) -> Self {
        let text = |field: &str| lease.pointer(field).and_then(Value::as_str);
        let renewed = text("/spec/renewTime").and_then(|t| t.parse().ok());
        let good = lease.pointer("/spec/leaseDurationSeconds").and_then(Value::as_i64);
        Self {
            holder: text("/spec/holderIdentity").unwrap_or_default().to_owned(),
            renewed: renewed.zip(good),
        }
    }

    /// Whether one may take itself for the leader, at this time by the clock by which it renews the Lease.
    pub(super) fn is_valid(&self, identity: &str, now: jiff::Timestamp) -> bool {
        self.holder == identity
            && self
                .renewed
                .is_some_and(|(at, good)| now.duration_since(at) < jiff::SignedDuration::from_secs(good))
    }
}

/// An object as a watch delivers it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Which.
    pub(super) key: Key,
    /// Its UID.
    pub(super) uid: String,
    /// Counts the changes of its spec; 0 where they are not counted.
    pub(super) generation: i64,
    /// Its resourceVersion, if that is a number.
    pub(super) version: Option<u64>,
    /// Itself, or why it cannot be read.
    pub(super) object: Result<Object, Bad>,
}

/// An object that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Bad {
    /// Why not.
    pub(super) message: String,
    /// Of an EgressIP, what can be: if that is what it selects, its pods are not let out by their nodes' addresses.
    pub(super) rest: Option<Box<EgressIp>>,
}

/// A resourceVersion as a number. They are opaque in general; that of every object is etcd's revision of its last change,
/// and Kubernetes has declared them comparable since (KEP-5504). They are compared here between versions of one object
/// only, to tell an older one from a newer one that this process wrote; one that is no number is taken as newer.
pub(super) fn version(text: Option<&str>) -> Option<u64> {
    text?.parse().ok()
}

/// Annotations by which OVN-Kubernetes manages a node.
fn runs_ovn(meta: &ObjectMeta) -> bool {
    let keys = meta.annotations.iter().flatten().map(|(key, _)| key);
    keys.into_iter().any(|k| k == "k8s.ovn.org/l3-gateway-config" || k.starts_with("k8s.ovn.org/node-"))
}

/// Reads an object of a kind; for the agent of a node, `own`, only what it needs.
pub(super) fn read(kind: Kind, object: DynamicObject, own: Option<&str>) -> Seen {
    let DynamicObject { mut metadata, data, .. } = object;
    let key = (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default());
    let uid = metadata.uid.clone().unwrap_or_default();
    let version = version(metadata.resource_version.as_deref());
    let generation = metadata.generation.unwrap_or_default();
    let ovn = kind == Kind::Node && runs_ovn(&metadata);
    // Who wrote which field is larger than many an object, and of annotations one counts.
    metadata.managed_fields = None;
    let original = (kind == Kind::EgressAllocation && own.is_none()).then(|| Box::new(metadata.clone()));
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|key, _| key == EGRESS_CAPACITY);
    }
    let spec = (kind == Kind::EgressIp).then(|| data.get("spec").cloned()).flatten();
    let mut object = parse(kind, &metadata, data, ovn, original).map_err(|message| {
        let rest = (kind == Kind::EgressIp).then(|| Box::new(rest(&metadata, spec)));
        Bad { message, rest }
    });
    if let (Ok(object), Some(own)) = (&mut object, own) {
        cut(object, key.1 == own);
    }
    Seen { key, uid, generation, version, object }
}

/// Takes from an object what no agent needs. `is_own`: it has the name of the agent's own node.
fn cut(object: &mut Object, is_own: bool) {
    match object {
        Object::EgressNode(node) if !is_own => keep::of_another_node(node),
        Object::EgressAllocation(allocation, _) => {
            if let Some(checked) = keep::of_an_allocation(allocation) {
                *object = Object::Checked(checked);
            }
        }
        Object::Namespace(namespace) => keep::of_a_namespace(namespace),
        // The leader's business.
        Object::EgressIp(_, report) => *report = None,
        Object::EgressFirewall(_, report) => *report = None,
        Object::Node(..)
        | Object::Pod(_)
        | Object::Service(_)
        | Object::EgressConfig(_)
        | Object::EgressNode(_)
        | Object::Checked(_)
        | Object::Heartbeat(_)
        | Object::Leader(_)
        | Object::Cluster(_) => {}
    }
}

/// What can be read of an EgressIP without its addresses, or else without its spec.
fn rest(metadata: &ObjectMeta, mut spec: Option<Value>) -> EgressIp {
    if let Some(Value::Object(fields)) = &mut spec {
        fields.remove("egressIPs");
    }
    let metadata = serde_json::to_value(metadata).ok().and_then(|m| of(m).ok()).unwrap_or_default();
    EgressIp { metadata, spec: spec.and_then(|s| of(s).ok()).unwrap_or_default() }
}

fn parse(
    kind: Kind,
    metadata: &ObjectMeta,
    data: Value,
    ovn: bool,
    original: Option<Box<ObjectMeta>>,
) -> Result<Object, String> {
    let mut fields = if let Value::Object(fields) = data { fields } else { serde_json::Map::new() };
    fields.insert("metadata".to_owned(), serde_json::to_value(metadata).map_err(|e| e.to_string())?);
    let status =
        matches!(kind, Kind::EgressIp | Kind::EgressFirewall).then(|| fields.remove("status")).flatten();
    let value = Value::Object(fields);
    Ok(match kind {
        Kind::Node => Object::Node(of(value)?, ovn),
        Kind::Namespace => Object::Namespace(of(value)?),
        Kind::Pod => Object::Pod(of(value)?),
        Kind::Service => Object::Service(of(value)?),
        Kind::EgressIp => {
            let object: EgressIp = of(value)?;
            let report = status.and_then(|s| {
                Some(EgressIpReport {
                    api_version: OVN_API.to_owned(),
                    kind: "EgressIP".to_owned(),
                    metadata: Meta { name: object.metadata.name.clone(), ..Meta::default() },
                    // A status that makes no sense is none: the leader writes it again.
                    status: serde_json::from_value(s).ok()?,
                })
            });
            Object::EgressIp(object, report)
        }
        Kind::EgressFirewall => {
            let object: EgressFirewall = of(value)?;
            let report = status.and_then(|s| {
                Some(EgressFirewallReport {
                    api_version: OVN_API.to_owned(),
                    kind: "EgressFirewall".to_owned(),
                    metadata: Meta {
                        name: object.metadata.name.clone(),
                        namespace: object.metadata.namespace.clone(),
                        ..Meta::default()
                    },
                    status: serde_json::from_value(s).ok()?,
                })
            });
            Object::EgressFirewall(object, report)
        }
        Kind::EgressConfig => Object::EgressConfig(of(value)?),
        Kind::EgressNode => Object::EgressNode(of(value)?),
        Kind::EgressAllocation => Object::EgressAllocation(of(value)?, original),
        Kind::Heartbeat => {
            let renewed = value.pointer("/spec/renewTime").and_then(Value::as_str);
            Object::Heartbeat(renewed.unwrap_or_default().to_owned())
        }
        Kind::Leader => Object::Leader(Leader::of(&value)),
        Kind::Cluster => Object::Cluster(cluster(&value)?),
    })
}

fn of<T: DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|e| e.to_string())
}

/// Keys of the ConfigMap.
pub(super) const TUNNEL_PORT: &str = "tunnelPort";
/// See [`TUNNEL_PORT`].
pub(super) const TUNNEL_VNI: &str = "tunnelVNI";

fn cluster(value: &Value) -> Result<Cluster, String> {
    fn number<T: std::str::FromStr>(value: &Value, key: &str) -> Result<T, String> {
        let text = value.get("data").and_then(|d| d.get(key)).and_then(Value::as_str);
        let text = text.ok_or_else(|| format!("data.{key} is missing"))?;
        text.parse().map_err(|_| format!("data.{key}: {text:?} is no such number"))
    }
    Ok(Cluster { tunnel: Tunnel { port: number(value, TUNNEL_PORT)?, vni: number(value, TUNNEL_VNI)? } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn seen(kind: Kind, value: Value) -> Seen {
        read(kind, serde_json::from_value(value).unwrap(), None)
    }

    #[test]
    fn an_object_is_cut_to_what_counts() {
        let s = seen(
            Kind::Node,
            json!({"metadata": {
                "name": "a", "uid": "u", "resourceVersion": "12",
                "annotations": {"k8s.ovn.org/node-subnets": "x", EGRESS_CAPACITY: "[]"},
                "managedFields": [{"manager": "kubelet"}],
            }, "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}], "images": [{}]}}),
        );
        assert_eq!((s.key.1.as_str(), s.uid.as_str(), s.version), ("a", "u", Some(12)));
        let Ok(Object::Node(node, true)) = s.object else { panic!("{s:?}") };
        assert_eq!(node.metadata.annotations.len(), 1);
        assert_eq!(node.status.addresses[0].address, "10.0.0.1");
    }

    #[test]
    fn an_agent_keeps_no_statuses_and_of_allocations_nothing_to_write_them_by() {
        let ip =
            json!({"metadata": {"name": "e"}, "status": {"items": [{"node": "a", "egressIP": "192.0.2.1"}]}});
        let allocation = json!({"metadata": {"name": "192.0.2.1", "uid": "u"},
            "spec": {"egressIP": "192.0.2.1", "leases": [{"node": "b", "nodeUID": "n", "bootID": "x", "since": "y"}]}});
        let read =
            |kind, value: &Value, own| read(kind, serde_json::from_value(value.clone()).unwrap(), own).object;
        assert!(matches!(read(Kind::EgressIp, &ip, Some("a")), Ok(Object::EgressIp(_, None))));
        assert!(matches!(read(Kind::EgressIp, &ip, None), Ok(Object::EgressIp(_, Some(_)))));
        let Ok(Object::Checked((ip, kept))) = read(Kind::EgressAllocation, &allocation, Some("a")) else {
            panic!()
        };
        assert_eq!((ip.to_string().as_str(), kept.uid.as_str()), ("192.0.2.1", "u"));
        assert_eq!((kept.leases[0].node_uid.as_str(), kept.leases[0].boot_id.as_str()), ("n", ""));
        let mut bad = allocation.clone();
        bad["spec"]["egressIP"] = json!("x");
        let Ok(Object::EgressAllocation(kept, None)) = read(Kind::EgressAllocation, &bad, Some("a")) else {
            panic!()
        };
        assert_eq!(kept.spec.egress_ip, "x", "the model says what is wrong with it");
        let Ok(Object::EgressAllocation(whole, Some(_))) = read(Kind::EgressAllocation, &allocation, None)
        else {
            panic!()
        };
        assert_eq!(whole.spec.leases[0].boot_id, "x");
    }

    #[test]
    fn a_label_of_an_egress_node_does_not_make_it_ovn_kubernetes_own() {
        let s = seen(
            Kind::Node,
            json!({"metadata": {"name": "a", "labels": {"k8s.ovn.org/egress-assignable": ""}, "annotations": {"a": "b"}}}),
        );
        assert!(matches!(s.object, Ok(Object::Node(_, false))));
    }

    #[test]
    fn a_bad_object_has_its_name_and_a_reason() {
        let s = seen(Kind::EgressIp, json!({"metadata": {"name": "e"}, "spec": {"egressIPs": "192.0.2.1"}}));
        assert_eq!(s.key.1, "e");
        assert!(s.object.unwrap_err().message.contains("expected a sequence"));
    }

    #[test]
    fn what_a_bad_egress_ip_selects_is_read_all_the_same() {
        let of = |spec: Value| {
            let s = seen(Kind::EgressIp, json!({"metadata": {"name": "e", "uid": "u"}, "spec": spec}));
            *s.object.unwrap_err().rest.unwrap()
        };
        let e = of(json!({"egressIPs": 7, "namespaceSelector": {"matchLabels": {"env": "prod"}}}));
        assert_eq!(e.spec.namespace_selector.unwrap().match_labels["env"], "prod");
        assert_eq!((e.metadata.uid.as_str(), e.spec.egress_ips.len()), ("u", 0));
        assert_eq!(of(json!({"egressIPs": [], "namespaceSelector": 7})).spec, EgressIp::default().spec);
    }

    #[test]
    fn a_status_that_makes_no_sense_does_not_make_the_object_bad() {
        let s = seen(Kind::EgressIp, json!({"metadata": {"name": "e"}, "status": {"items": 7}}));
        assert!(matches!(s.object, Ok(Object::EgressIp(_, None))));
        let s = seen(
            Kind::EgressIp,
            json!({"metadata": {"name": "e"}, "status": {"items": [{"node": "a", "egressIP": "192.0.2.1"}]}}),
        );
        let Ok(Object::EgressIp(_, Some(report))) = s.object else { panic!() };
        assert_eq!(report.status.items[0].node, "a");
    }

    #[test]
    fn a_leader_that_has_slept_is_none_by_its_own_clock() {
        let s = seen(
            Kind::Leader,
            json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "me", "leaseDurationSeconds": 10, "renewTime": "2026-01-01T00:00:00.000000Z"}}),
        );
        let Ok(Object::Leader(leader)) = s.object else { panic!() };
        let at = |time: &str| time.parse().unwrap();
        assert!(leader.is_valid("me", at("2026-01-01T00:00:09Z")));
        assert!(!leader.is_valid("me", at("2026-01-01T00:00:10Z")));
        assert!(!leader.is_valid("other", at("2026-01-01T00:00:01Z")));
        let s = seen(Kind::Leader, json!({"metadata": {"name": "l"}, "spec": {}}));
        let Ok(Object::Leader(leader)) = s.object else { panic!() };
        assert!(leader.holder.is_empty() && !leader.is_valid("", at("2026-01-01T00:00:00Z")));
    }

    #[test]
    fn the_cluster_is_two_numbers() {
        let s = seen(
            Kind::Cluster,
            json!({"metadata": {"name": "c"}, "data": {"tunnelPort": "4795", "tunnelVNI": "77"}}),
        );
        let Ok(Object::Cluster(c)) = s.object else { panic!() };
        assert_eq!((c.tunnel.port, c.tunnel.vni), (4795, 77));
        let s = seen(
            Kind::Cluster,
            json!({"metadata": {"name": "c"}, "data": {"tunnelPort": "70000", "tunnelVNI": "77"}}),
        );
        assert_eq!(s.object.unwrap_err().message, "data.tunnelPort: \"70000\" is no such number");
    }
}

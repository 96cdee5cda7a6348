//! All watches' objects, as the rest of the program sees them.

use std::collections::{BTreeMap, BTreeSet};

use kube::api::ObjectMeta;

use super::kinds::{Bad, Key, Kind, Leader, Object, Seen};
use crate::digest;
use crate::objects::{EgressFirewallReport, EgressIpReport, EgressNodeSpec, EgressNodeStatus, Meta, Objects};

/// The objects, and what is read of them besides.
#[derive(Debug, Default)]
pub(super) struct View {
    /// The objects.
    pub(super) objects: Objects,
    /// Statuses of EgressIPs.
    pub(super) statuses: BTreeMap<String, EgressIpReport>,
    /// Statuses of `EgressFirewall`s by namespace.
    pub(super) firewall_statuses: BTreeMap<String, EgressFirewallReport>,
    /// Allocations that cannot be read and never could.
    pub(super) unreadable: BTreeSet<String>,
    /// EgressIPs whose addresses cannot be read and never could.
    pub(super) partial: BTreeSet<String>,
    /// Statuses of which definitions keep a part only: what was written, and what has come of it. The latter stands for
    /// the former, or the leader would write it for ever.
    cut: BTreeMap<String, (EgressIpReport, Option<EgressIpReport>)>,
    /// The same of `EgressFirewall`s.
    firewall_cut: BTreeMap<String, (EgressFirewallReport, Option<EgressFirewallReport>)>,
    /// Metadata of allocations, whole, for their replacement.
    pub(super) originals: BTreeMap<String, ObjectMeta>,
    /// Nodes that OVN-Kubernetes runs.
    pub(super) ovn_nodes: BTreeSet<String>,
    /// Heartbeats that are there, with the text of their last renewal.
    pub(super) heartbeats: BTreeMap<String, String>,
    /// Who leads.
    pub(super) leader: Option<Leader>,
    /// An agent's own node: of the others it knows what their EgressNodes say.
    own: Option<String>,
    /// What this agent says of its node, whether or not the server has it yet.
    pub(super) said: Option<EgressNodeStatus>,
    /// Objects whose newest version cannot be read.
    pub(super) bad: BTreeMap<(Kind, Key), String>,
}

impl View {
    /// The view of an agent on a node, or of one who watches all Nodes.
    pub(super) fn new(own: Option<&str>) -> Self {
        Self { own: own.map(str::to_owned), ..Self::default() }
    }

    /// The node, if this is the view of its agent.
    pub(super) fn own(&self) -> Option<&str> {
        self.own.as_deref()
    }

    /// Takes up an object; whether that changes anything.
    pub(super) fn put(&mut self, kind: Kind, seen: Seen) -> bool {
        let Seen { key, object, .. } = seen;
        match object {
            Ok(object) => {
                let mended = self.bad.remove(&(kind, key.clone())).is_some();
                if kind == Kind::EgressIp {
                    self.partial.remove(&key.1);
                }
                self.set(key, object) | mended
            }
            Err(Bad { message, rest }) => {
                if let Some(rest) = rest
                    && (self.partial.contains(&key.1) || !self.objects.egress_ips.contains_key(&key.1))
                {
                    self.partial.insert(key.1.clone());
                    self.objects.egress_ips.insert(key.1.clone(), *rest);
                }
                if kind == Kind::EgressAllocation
                    && !self.objects.egress_allocations.contains_key(&key.1)
                    && !self.objects.checked_allocations.contains_key(&key.1)
                {
                    self.unreadable.insert(key.1.clone());
                }
                self.bad.insert((kind, key), message.clone()) != Some(message)
            }
        }
    }

    fn set(&mut self, key: Key, object: Object) -> bool {
        let o = &mut self.objects;
        match object {
            Object::Node(node, ovn) => {
                if ovn {
                    self.ovn_nodes.insert(key.1.clone());
                } else {
                    self.ovn_nodes.remove(&key.1);
                }
                replace(&mut o.nodes, key.1, node, |n| &mut n.metadata)
            }
            Object::Namespace(n) => replace(&mut o.namespaces, key.1, n, |n| &mut n.metadata),
            // A new version of a pod may be another pod's beginning: it always counts.
            Object::Pod(pod) => o.pods.insert(key, pod.clone()) != Some(pod),
            Object::Service(s) => replace(&mut o.services, key, s, |s| &mut s.metadata),
            Object::EgressIp(e, report) => {
                let report = uncut(&mut self.cut, &key.1, report);
                let status = set(&mut self.statuses, &key.1, report);
                replace(&mut o.egress_ips, key.1, e, |e| &mut e.metadata) | status
            }
            Object::EgressFirewall(f, report) => {
                // Only the one named default counts.
                let report = uncut(&mut self.firewall_cut, &key.0, report);
                let status = key.1 == "default" && set(&mut self.firewall_statuses, &key.0, report);
                replace(&mut o.egress_firewalls, key, f, |f| &mut f.metadata) | status
            }
            Object::EgressConfig(c) => replace(&mut o.egress_configs, key.1, *c, |c| &mut c.metadata),
            Object::EgressNode(mut node) => {
                let is_own = self.own.as_ref() == Some(&key.1);
                if is_own && let Some(said) = &self.said {
                    node.status.clone_from(said);
                }
                let mut changed = false;
                if self.own.is_some() && !is_own {
                    changed = set(&mut o.nodes, &key.1, digest::node(&key.1, &node.spec));
                    // The Node has it.
                    node.spec = EgressNodeSpec::default();
                }
                replace(&mut o.egress_nodes, key.1, *node, |n| &mut n.metadata) | changed
            }
            Object::EgressAllocation(a, original) => {
                self.unreadable.remove(&key.1);
                if let Some(original) = original {
                    self.originals.insert(key.1.clone(), *original);
                }
                let checked = o.checked_allocations.remove(&key.1).is_some();
                replace(&mut o.egress_allocations, key.1, a, |a| &mut a.metadata) | checked
            }
            Object::Checked(checked) => {
                self.unreadable.remove(&key.1);
                let other = o.egress_allocations.remove(&key.1).is_some();
                set(&mut o.checked_allocations, &key.1, Some(checked)) | other
            }
            Object::Heartbeat(renewed) => self.heartbeats.insert(key.1, renewed.clone()) != Some(renewed),
            Object::Leader(leader) => self.leader.replace(leader.clone()) != Some(leader),
            Object::Cluster(cluster) => o.cluster.replace(cluster) != Some(cluster),
        }
    }

    /// Forgets an object; whether it was known.
    pub(super) fn remove(&mut self, kind: Kind, key: &Key) -> bool {
        let bad = self.bad.remove(&(kind, key.clone())).is_some();
        let o = &mut self.objects;
        let known = match kind {
            Kind::Node => {
                self.ovn_nodes.remove(&key.1);
                o.nodes.remove(&key.1).is_some()
            }
            Kind::Namespace => o.namespaces.remove(&key.1).is_some(),
            Kind::Pod => o.pods.remove(key).is_some(),
            Kind::Service => o.services.remove(key).is_some(),
            Kind::EgressIp => {
                self.statuses.remove(&key.1);
                self.cut.remove(&key.1);
                self.partial.remove(&key.1);
                o.egress_ips.remove(&key.1).is_some()
            }
            Kind::EgressFirewall => {
                if key.1 == "default" {
                    self.firewall_statuses.remove(&key.0);
                    self.firewall_cut.remove(&key.0);
                }
                o.egress_firewalls.remove(key).is_some()
            }
            Kind::EgressConfig => o.egress_configs.remove(&key.1).is_some(),
            Kind::EgressNode => {
                if self.own.as_ref().is_some_and(|own| *own != key.1) {
                    o.nodes.remove(&key.1);
                }
                o.egress_nodes.remove(&key.1).is_some()
            }
            Kind::EgressAllocation => {
                self.originals.remove(&key.1);
                self.unreadable.remove(&key.1);
                o.checked_allocations.remove(&key.1).is_some() | o.egress_allocations.remove(&key.1).is_some()
            }
            Kind::Heartbeat => self.heartbeats.remove(&key.1).is_some(),
            Kind::Leader => self.leader.take().is_some(),
            Kind::Cluster => o.cluster.take().is_some(),
        };
        known | bad
    }

    /// Notes what was written as an EgressIP's status, once what has come of it is taken up.
    pub(super) fn wrote(&mut self, report: EgressIpReport) {
        let name = report.metadata.name.clone();
        if self.objects.egress_ips.contains_key(&name) && self.statuses.get(&name) != Some(&report) {
            let known = self.statuses.insert(name.clone(), report.clone());
            let come = come_of(self.cut.remove(&name), known);
            self.cut.insert(name, (report, come));
        }
    }

    /// Notes what was written as an EgressFirewall's status.
    pub(super) fn wrote_firewall(&mut self, report: EgressFirewallReport) {
        let namespace = report.metadata.namespace.clone();
        let key = (namespace.clone(), report.metadata.name.clone());
        if self.objects.egress_firewalls.contains_key(&key)
            && self.firewall_statuses.get(&namespace) != Some(&report)
        {
            let known = self.firewall_statuses.insert(namespace.clone(), report.clone());
            let come = come_of(self.firewall_cut.remove(&namespace), known);
            self.firewall_cut.insert(namespace, (report, come));
        }
    }

    /// Notes what this agent says of its node.
    pub(super) fn say(&mut self, status: EgressNodeStatus) {
        if let Some(own) = &self.own {
            let node = self.objects.egress_nodes.entry(own.clone()).or_default();
            node.metadata.name.clone_from(own);
            node.status.clone_from(&status);
            self.said = Some(status);
        }
    }
}

/// Puts an object in place; whether it differs from the one before in more than its version, which changes with every
/// field that is not read here.
fn replace<K: Ord, T: PartialEq>(
    map: &mut BTreeMap<K, T>,
    key: K,
    mut new: T,
    meta: impl Fn(&mut T) -> &mut Meta,
) -> bool {
    let Some(old) = map.get_mut(&key) else {
        map.insert(key, new);
        return true;
    };
    meta(old).resource_version.clone_from(&meta(&mut new).resource_version);
    let differs = *old != new;
    *old = new;
    differs
}

/// What has come of a write, if this was known then: it may stand for something that was cut before.
fn come_of<T: PartialEq>(cut: Option<(T, Option<T>)>, known: Option<T>) -> Option<T> {
    match cut {
        Some((wrote, come)) if known.as_ref() == Some(&wrote) => come,
        _ => known,
    }
}

/// What was written, where what has come of it is what there is still.
fn uncut<T: PartialEq + Clone>(
    cut: &mut BTreeMap<String, (T, Option<T>)>,
    key: &str,
    report: Option<T>,
) -> Option<T> {
    match cut.get(key) {
        Some((wrote, come)) if *come == report => Some(wrote.clone()),
        Some(_) => {
            cut.remove(key);
            report
        }
        None => report,
    }
}

fn set<T: PartialEq>(map: &mut BTreeMap<String, T>, key: &str, value: Option<T>) -> bool {
    match value {
        Some(value) => {
            let differs = map.get(key) != Some(&value);
            map.insert(key.to_owned(), value);
            differs
        }
        None => map.remove(key).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::kube::kinds::read;
    use serde_json::{Value, json};

    fn put(view: &mut View, kind: Kind, value: Value) -> bool {
        let seen = read(kind, serde_json::from_value(value).unwrap(), view.own());
        view.put(kind, seen)
    }

    fn node(uid: &str) -> Value {
        json!({"metadata": {"name": "b", "resourceVersion": "5"},
            "spec": {"nodeUID": uid, "internalIPs": ["10.0.0.2"], "labels": {"x": "y"}}})
    }

    #[test]
    fn an_agent_knows_other_nodes_by_what_the_leader_says_of_them() {
        let mut view = View::new(Some("a"));
        assert!(put(&mut view, Kind::EgressNode, node("u")));
        assert_eq!(view.objects.nodes["b"].status.addresses[0].address, "10.0.0.2");
        assert!(put(&mut view, Kind::EgressNode, node("")));
        assert!(view.objects.nodes.is_empty(), "a node that is gone");
        put(&mut view, Kind::EgressNode, node("u"));
        assert!(view.remove(Kind::EgressNode, &(String::new(), "b".into())));
        assert!(view.objects.nodes.is_empty());
        let mut leader = View::new(None);
        put(&mut leader, Kind::EgressNode, node("u"));
        assert!(leader.objects.nodes.is_empty(), "who watches Nodes believes those only");
    }

    #[test]
    fn what_an_agent_does_not_keep_of_another_node_is_no_news() {
        let mut view = View::new(Some("a"));
        put(&mut view, Kind::EgressNode, node("u"));
        let kept = &view.objects.egress_nodes["b"];
        assert_eq!(
            (&kept.spec, view.objects.nodes["b"].metadata.uid.as_str()),
            (&EgressNodeSpec::default(), "u")
        );
        let mut other = node("u");
        other["spec"]["ranges"] = json!([{"egressIP": "192.0.2.1"}]);
        assert!(!put(&mut view, Kind::EgressNode, other.clone()), "ports granted to it");
        other["status"] = json!({"nodeUID": "u", "addresses": ["10.0.0.2"]});
        assert!(put(&mut view, Kind::EgressNode, other.clone()), "its agent");
        other["status"]["demand"] = json!([{"egressIP": "192.0.2.1"}]);
        other["status"]["firewalls"] = json!([{"namespace": "shop"}]);
        assert!(!put(&mut view, Kind::EgressNode, other.clone()), "what only the leader reads");
        other["spec"]["labels"]["x"] = json!("z");
        assert!(put(&mut view, Kind::EgressNode, other.clone()));
        assert_eq!(view.objects.nodes["b"].metadata.labels["x"], "z");
        let mut own = other;
        own["metadata"]["name"] = json!("a");
        put(&mut view, Kind::EgressNode, own);
        let own = &view.objects.egress_nodes["a"];
        assert_eq!((own.spec.ranges.len(), own.status.demand.len()), (1, 1), "its own it keeps whole");
    }

    #[test]
    fn what_an_agent_says_of_its_node_stays_said() {
        let mut view = View::new(Some("b"));
        view.say(EgressNodeStatus { boot_id: "new".into(), ..EgressNodeStatus::default() });
        let mut late = node("u");
        late["status"] = json!({"bootID": "old"});
        assert!(put(&mut view, Kind::EgressNode, late));
        let own = &view.objects.egress_nodes["b"];
        assert_eq!((own.status.boot_id.as_str(), own.spec.node_uid.as_str()), ("new", "u"));
        assert!(view.objects.nodes.is_empty(), "its own Node it watches");
    }

    #[test]
    fn a_bad_version_keeps_the_last_good_one() {
        let mut view = View::new(None);
        let of = |ips: Value| json!({"metadata": {"name": "e"}, "spec": {"egressIPs": ips, "namespaceSelector": {}}});
        put(&mut view, Kind::EgressIp, of(json!(["192.0.2.1"])));
        assert!(put(&mut view, Kind::EgressIp, of(json!(7))));
        assert!(!put(&mut view, Kind::EgressIp, of(json!(7))), "said once");
        assert_eq!(view.objects.egress_ips["e"].spec.egress_ips, ["192.0.2.1"]);
        assert_eq!(view.bad.len(), 1);
        assert!(put(&mut view, Kind::EgressIp, of(json!(["192.0.2.1"]))));
        assert!(view.bad.is_empty());
    }

    #[test]
    fn a_bad_egress_ip_without_a_good_version_selects_its_pods_all_the_same() {
        let mut view = View::new(None);
        let of = |ips: Value, env: &str| json!({"metadata": {"name": "e"}, "spec": {"egressIPs": ips, "namespaceSelector": {"matchLabels": {"env": env}}}});
        put(&mut view, Kind::EgressIp, of(json!(7), "a"));
        put(&mut view, Kind::EgressIp, of(json!(8), "b"));
        let env = |view: &View| {
            view.objects.egress_ips["e"].spec.namespace_selector.clone().unwrap().match_labels["env"].clone()
        };
        assert_eq!((env(&view).as_str(), view.partial.len()), ("b", 1));
        put(&mut view, Kind::EgressIp, of(json!(["192.0.2.1"]), "c"));
        put(&mut view, Kind::EgressIp, of(json!(9), "d"));
        assert_eq!((env(&view).as_str(), view.partial.len()), ("c", 0));
    }

    #[test]
    fn a_status_that_is_cut_short_is_not_written_again_until_somebody_changes_it() {
        let mut view = View::new(None);
        let of = |version: u64, items: Value| {
            json!({"metadata": {"name": "e", "resourceVersion": version.to_string()},
                "spec": {"egressIPs": ["192.0.2.1"], "namespaceSelector": {}}, "status": {"items": items}})
        };
        let a = json!([{"node": "a", "egressIP": "192.0.2.1"}]);
        put(&mut view, Kind::EgressIp, of(1, json!([])));
        let mut report = view.statuses["e"].clone();
        report.status =
            serde_json::from_value(json!({"items": a, "conditions": [{"type": "Assigned"}]})).unwrap();
        // What the server makes of it, and what the watch says then.
        put(&mut view, Kind::EgressIp, of(2, a.clone()));
        view.wrote(report.clone());
        assert_eq!(view.statuses["e"], report);
        put(&mut view, Kind::EgressIp, of(2, a.clone()));
        assert_eq!(view.statuses["e"], report);
        // A change of what is cut off changes nothing on the server.
        report.status.conditions[0].reason = "Other".into();
        view.wrote(report.clone());
        put(&mut view, Kind::EgressIp, of(2, a));
        assert_eq!(view.statuses["e"], report);
        put(&mut view, Kind::EgressIp, of(3, json!([])));
        assert!(view.statuses["e"].status.items.is_empty(), "somebody else has written");
    }

    #[test]
    fn an_allocation_that_never_could_be_read_is_named() {
        let mut view = View::new(None);
        let of = |owner: Value| json!({"metadata": {"name": "192.0.2.1"}, "spec": {"egressIP": "192.0.2.1", "owner": owner}});
        put(&mut view, Kind::EgressAllocation, of(json!(["a"])));
        assert!(view.unreadable.contains("192.0.2.1"));
        put(&mut view, Kind::EgressAllocation, of(json!("a")));
        assert!(view.unreadable.is_empty());
        put(&mut view, Kind::EgressAllocation, of(json!(["a"])));
        assert!(view.unreadable.is_empty(), "its last good version is there");
    }

    #[test]
    fn a_version_by_itself_is_no_change() {
        let mut view = View::new(None);
        let of = |version: &str| json!({"metadata": {"name": "a", "resourceVersion": version}, "status": {"images": [version]}});
        assert!(put(&mut view, Kind::Node, of("1")));
        assert!(!put(&mut view, Kind::Node, of("2")));
        assert_eq!(view.objects.nodes["a"].metadata.resource_version, "2");
        // A pod's version is what tells an address of an earlier pod from a later one's.
        let pod =
            |version: &str| json!({"metadata": {"name": "p", "namespace": "n", "resourceVersion": version}});
        assert!(put(&mut view, Kind::Pod, pod("1")) && put(&mut view, Kind::Pod, pod("2")));
    }
}

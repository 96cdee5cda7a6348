//! Which addresses the container runtime's word gives this node's pods: pure, so that it can be tried without one.
//!
//! The cache may be stale: a sandbox that died with its node leaves its file, and a runtime that fails to remove a
//! network may too. So it only ever fills in what a Pod's status does not say yet, and never an address that
//! another Pod's status has. What the chained plugin says is of a sandbox that is being made at this moment; it
//! counts more than a status, which is then of the sandbox before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Attachment;
use crate::addresses;
use crate::model::has_network;
use crate::objects::{Objects, Pod};

/// Annotation of a static pod's mirror: the UID that the runtime knows it by (kubelet's `ConfigMirrorAnnotationKey`,
/// `pkg/kubelet/types/pod_update.go`). The mirror has another UID of its own.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// What is known of pods at once, by namespace and name.
pub type Known = BTreeMap<(String, String), KnownPod>;

/// What is known of one pod at once.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KnownPod {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Interfaces at the host's side, of which its own is one; empty if the plugins name none.
    pub interfaces: Vec<String>,
    /// Whether its sandbox is being made: this counts more than its object's status, and than other pods'.
    pub asked: bool,
}

/// The pods of `node` to which the runtime gives addresses: `asked` by the chained plugin, `cached` by libcni.
#[must_use]
pub fn known(objects: &Objects, node: &str, asked: &[Attachment], cached: &[Attachment]) -> Known {
    if asked.is_empty() && cached.is_empty() {
        return Known::new();
    }
    let is_local = |pod: &&Pod| pod.spec.node_name == node && has_network(pod);
    let local = |a: &Attachment| {
        let pod = objects.pods.get(&(a.namespace.clone(), a.name.clone())).filter(is_local)?;
        is_same(a, pod).then_some(pod)
    };
    let mut known = Known::new();
    let mut taken: BTreeSet<IpAddr> = BTreeSet::new();
    let mut take = |a: &Attachment, asked: bool| {
        let key = (a.namespace.clone(), a.name.clone());
        if a.addresses.is_empty()
            || known.contains_key(&key)
            || a.addresses.iter().any(|ip| taken.contains(ip))
        {
            return;
        }
        taken.extend(&a.addresses);
        let (addresses, interfaces) = (a.addresses.clone(), a.interfaces.clone());
        known.insert(key, KnownPod { addresses, interfaces, asked });
    };
    for a in newest_first(asked) {
        if local(a).is_some() {
            take(a, true);
        }
    }
    // An address that a Pod's status has is that pod's, unless the pod is on its way out: then its network may be
    // gone before its object.
    let pods = objects.pods.values().filter(is_local).filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let said: BTreeSet<IpAddr> = pods.flat_map(status_addresses).collect();
    for a in newest_first(cached) {
        let silent = local(a).is_some_and(|pod| status_addresses(pod).next().is_none());
        if silent && !a.addresses.iter().any(|ip| said.contains(ip)) {
            take(a, false);
        }
    }
    known
}

fn newest_first(all: &[Attachment]) -> Vec<&Attachment> {
    let mut all: Vec<_> = all.iter().collect();
    all.sort_by(|a, b| b.written.cmp(&a.written).then_with(|| a.container.cmp(&b.container)));
    all
}

/// Whether a sandbox is of the pod that an object describes, and not of an earlier pod of its name.
#[must_use]
pub fn is_same(a: &Attachment, pod: &Pod) -> bool {
    let meta = &pod.metadata;
    let own = meta.annotations.get(MIRROR).unwrap_or(&meta.uid);
    a.uid.is_empty() || own.is_empty() || *own == a.uid
}

/// The addresses in a Pod's status.
pub fn status_addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> + '_ {
    let texts = pod.status.pod_ips.iter().map(|p| &p.ip).chain([&pod.status.pod_ip]);
    texts.filter_map(|text| addresses::address(text).ok())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn pod(name: &str, ip: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}}}\nspec: {{nodeName: a}}\n\
             status: {{podIP: '{ip}'}}\n"
        )
    }

    fn objects(pods: &[String]) -> Objects {
        let pods = pods.iter().map(|yaml| {
            let pod: Pod = serde_saphyr::from_str(yaml).unwrap();
            ((pod.metadata.namespace.clone(), pod.metadata.name.clone()), pod)
        });
        Objects { pods: pods.collect(), ..Objects::default() }
    }

    fn attachment(name: &str, ip: &str, second: u64) -> Attachment {
        Attachment {
            namespace: "shop".into(),
            name: name.into(),
            uid: format!("u-{name}"),
            container: format!("c-{name}-{second}"),
            addresses: vec![ip.parse().unwrap()],
            interfaces: vec![format!("veth-{second}")],
            written: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
        }
    }

    /// `name=address` of each, `!` behind what is asked.
    fn of(objects: &Objects, asked: &[Attachment], cached: &[Attachment]) -> Vec<String> {
        let known = known(objects, "a", asked, cached);
        let text = |((_, name), k): (&(String, String), &KnownPod)| {
            format!("{name}={}{}", k.addresses[0], if k.asked { "!" } else { "" })
        };
        known.iter().map(text).collect()
    }

    #[test]
    fn the_cache_fills_in_what_a_status_does_not_say() {
        let objects = objects(&[pod("new", ""), pod("old", "10.0.0.1")]);
        let cached = [
            attachment("new", "10.0.0.2", 1),
            attachment("old", "10.0.0.3", 2),
            attachment("none", "10.0.0.4", 3),
        ];
        assert_eq!(of(&objects, &[], &cached), ["new=10.0.0.2"]);
    }

    #[test]
    fn a_file_of_another_pod_of_the_name_or_of_another_node_says_nothing() {
        let objects = objects(&[pod("new", ""), pod("far", "").replace("nodeName: a", "nodeName: b")]);
        let mut earlier = attachment("new", "10.0.0.2", 1);
        earlier.uid = "before".into();
        assert_eq!(of(&objects, &[], &[earlier.clone(), attachment("far", "10.0.0.3", 1)]), [""; 0]);
        earlier.uid = String::new();
        assert_eq!(of(&objects, &[], &[earlier]), ["new=10.0.0.2"], "a runtime that says no UID");
    }

    #[test]
    fn a_static_pod_is_known_by_its_mirrors_annotation() {
        let mirror =
            pod("new", "").replace("uid: u-new", "uid: m, annotations: {kubernetes.io/config.mirror: u-new}");
        assert_eq!(of(&objects(&[mirror]), &[], &[attachment("new", "10.0.0.2", 1)]), ["new=10.0.0.2"]);
    }

    #[test]
    fn the_newest_sandbox_counts() {
        let cached = [attachment("new", "10.0.0.2", 1), attachment("new", "10.0.0.9", 5)];
        assert_eq!(of(&objects(&[pod("new", "")]), &[], &cached), ["new=10.0.0.9"]);
    }

    #[test]
    fn the_cache_takes_no_address_that_is_somebodys() {
        let cached = [attachment("new", "10.0.0.1", 9)];
        let both = |old: String| objects(&[pod("new", ""), old]);
        let old = pod("old", "10.0.0.1");
        assert_eq!(of(&both(old.clone()), &[], &cached), [""; 0]);
        let leaving = old.replace("uid: u-old", "uid: u-old, deletionTimestamp: '2026-01-01T00:00:00Z'");
        assert_eq!(of(&both(leaving), &[], &cached), ["new=10.0.0.1"]);
        assert_eq!(of(&both(old.replace("podIP", "phase: Failed, podIP")), &[], &cached), ["new=10.0.0.1"]);
        // Of two that say nothing, the later file counts.
        let cached = [attachment("new", "10.0.0.1", 9), attachment("old", "10.0.0.1", 8)];
        assert_eq!(of(&both(pod("old", "")), &[], &cached), ["new=10.0.0.1"]);
    }

    #[test]
    fn a_sandbox_that_is_being_made_counts_more_than_a_status() {
        let objects = objects(&[pod("new", "10.0.0.7"), pod("old", "10.0.0.1"), pod("late", "")]);
        let asked = [attachment("new", "10.0.0.1", 9)];
        let cached = [attachment("late", "10.0.0.1", 10)];
        assert_eq!(of(&objects, &asked, &cached), ["new=10.0.0.1!"]);
        assert_eq!(of(&objects, &[attachment("none", "10.0.0.1", 9)], &[]), [""; 0]);
    }
}

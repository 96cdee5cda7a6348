//! A pod that becomes selected keeps no old connection with the node's address: the node's conntrack entries of
//! what it opened towards outside go, once the maps have the pod.
//!
//! From then on the programs drop the pod's packets of such a connection, or give them an egress IP; what still
//! comes back to the node's address finds no translation, so that the node answers it with a reset.
//!
//! The same for connections that a firewall's new version denies: what comes back for them finds no way to the pod.
//!
//! Before that the programs are told who opened the pods' UDP connections: an answer that is under way while the pod is
//! taken up would look like an opening from outside, and the pod's packets like answers to it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use datapath::addr::Ip;
use datapath::conntrack::Ticks;
use datapath::firewall::{is_for, judge};
use datapath::keys::{
    FlowKey, Learnt, LearntKey, Network, NetworkKey, NetworkKind, PodId, Ruleset, RulesetId, Tuple,
};
use datapath::limits::NODE_PORTS;
use datapath::memory::Memory;
use datapath::packet::{SCTP, TCP, UDP};
use datapath::tables::Tables as _;
use tracing::{debug, warn};

use crate::image::{MapImage, Rules};
use crate::nfnetlink::{Request, Socket, attribute, put, put_nested};

/// There in each network namespace when conntrack is loaded. Without it there are no entries, and asking for
/// some would load it.
const LOADED: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

// include/uapi/linux/netfilter.h: the values of AF_INET and AF_INET6.
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
// include/uapi/linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
const CTNETLINK: u16 = 1 << 8;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// `CTA_FILTER_F_CTA_IP_SRC` (`net/netfilter/nf_conntrack_netlink.c`).
const FILTER_SOURCE: u32 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;

type Networks = BTreeMap<NetworkKey, Network>;

/// What the kernel knows besides an image.
pub trait Names: Send {
    /// Notes that the pod opened a connection.
    fn opened_by_pod(&self, key: &FlowKey);
    /// The names of an address.
    fn learnt(&self, key: &LearntKey) -> Option<Learnt>;
    /// Time since boot.
    fn now(&self) -> Ticks;
}

/// What a thread of its own is asked to do: a table of a million entries takes a second to read.
#[derive(Default)]
struct Job {
    networks: Networks,
    /// Pods that became selected.
    selected: BTreeSet<Ip>,
    /// The ids of these pods and the next.
    pods: BTreeMap<Ip, PodId>,
    /// Pods that have come under another version, which it is.
    ruled: BTreeMap<Ip, RulesetId>,
    rulesets: BTreeMap<RulesetId, Arc<Rules>>,
    resolvers: BTreeMap<Ip, u32>,
}

/// Watches which pods become selected, and which versions of firewalls they come under.
pub struct Conntrack {
    /// Selected pods whose old entries are gone, or are being removed.
    selected: BTreeMap<Ip, PodId>,
    /// The same of pods with a firewall, with its version.
    ruled: Ruled,
    names: Option<Box<dyn Names>>,
    jobs: Option<Sender<Job>>,
}

/// Pods with a firewall, and the version that they are under.
pub type Ruled = BTreeMap<Ip, (PodId, RulesetId)>;

impl Conntrack {
    /// Begins with the maps as the agent before this one left them: what is in them is done.
    #[must_use]
    pub fn new(recovered: &MapImage, names: Box<dyn Names>) -> Self {
        let (selected, ruled) = (selected(recovered), ruled(recovered));
        Self { selected, ruled, names: Some(names), jobs: None }
    }

    /// Removes old entries of pods that the image newly selects, and those that it newly denies. Call it after the
    /// image is applied, or new packets would make new ones.
    pub fn update(&mut self, image: &MapImage) {
        let (selected, ruled) = (selected(image), ruled(image));
        let newly_selected = newly(&self.selected, &selected);
        let newly_ruled = newly(&self.ruled, &ruled);
        (self.selected, self.ruled) = (selected, ruled);
        if newly_selected.is_empty() && newly_ruled.is_empty() {
            return;
        }
        let ruled: BTreeMap<_, _> =
            newly_ruled.iter().filter_map(|ip| Some((*ip, self.ruled.get(ip)?.1))).collect();
        let ids: BTreeSet<_> = ruled.values().copied().collect();
        let rulesets = image.rulesets.iter().filter(|(id, _)| ids.contains(id));
        let ours = newly_selected.iter().chain(&newly_ruled);
        let job = Job {
            pods: ours.filter_map(|ip| Some((*ip, image.pods.get(ip)?.id))).collect(),
            networks: image.networks.clone(),
            selected: newly_selected,
            rulesets: rulesets.map(|(id, rules)| (*id, Arc::clone(rules))).collect(),
            ruled,
            resolvers: image.resolvers.clone(),
        };
        if let Some(names) = self.names.take() {
            let (sender, receiver) = channel();
            std::thread::spawn(move || work(&receiver, names.as_ref()));
            self.jobs = Some(sender);
        }
        if let Some(jobs) = &self.jobs {
            // The thread ends with its sender only.
            let _ = jobs.send(job);
        }
    }
}

fn selected(image: &MapImage) -> BTreeMap<Ip, PodId> {
    image.pods.iter().filter(|(_, pod)| pod.policy != 0).map(|(ip, pod)| (*ip, pod.id)).collect()
}

/// The version that each pod with a firewall is under.
#[must_use]
pub fn ruled(image: &MapImage) -> Ruled {
    let of =
        |(ip, pod): (&Ip, &datapath::keys::Pod)| Some((*ip, (pod.id, *image.firewalls.get(&pod.firewall)?)));
    image.pods.iter().filter_map(of).collect()
}

/// An id is never given again: the same address with another id is another pod, or another version.
fn newly<T: PartialEq>(done: &BTreeMap<Ip, T>, now: &BTreeMap<Ip, T>) -> BTreeSet<Ip> {
    now.iter().filter(|(ip, id)| done.get(ip) != Some(id)).map(|(ip, _)| *ip).collect()
}

fn work(jobs: &Receiver<Job>, names: &dyn Names) {
    while let Ok(mut job) = jobs.recv() {
        while let Ok(next) = jobs.try_recv() {
            job.networks = next.networks;
            job.selected.extend(next.selected);
            job.pods.extend(next.pods);
            job.ruled.extend(next.ruled);
            job.rulesets.extend(next.rulesets);
            job.resolvers = next.resolvers;
        }
        if !Path::new(LOADED).exists() {
            continue;
        }
        let judge = Judge::new(&job, names);
        for (family, v4) in [(NFPROTO_IPV4, true), (NFPROTO_IPV6, false)] {
            let pods: BTreeSet<Ip> =
                job.selected.iter().chain(job.ruled.keys()).filter(|ip| ip.is_v4() == v4).copied().collect();
            let is_old = |entry: &[u8]| {
                if let Some(key) = opened(entry, &job.pods) {
                    names.opened_by_pod(&key);
                }
                is_old(entry, &job.selected, &job.networks) || judge.denies(entry)
            };
            match remove(family, &pods, is_old) {
                Ok(0) => {}
                Ok(removed) => debug!("removed {removed} conntrack entries of {} pods", pods.len()),
                Err(error) => warn!(
                    "cannot remove old conntrack entries of pods that became selected, or that are denied what they \
                     had opened: {error}; what answers their old connections still reaches them"
                ),
            }
        }
    }
}

/// Removes entries of connections that these pods opened. How many.
fn remove(family: u8, pods: &BTreeSet<Ip>, is_old: impl Fn(&[u8]) -> bool) -> io::Result<usize> {
    // Of one pod, the kernel looks; of many, looking once is cheaper.
    let body = match pods.len() {
        0 => return Ok(0),
        1 => pods.first().map(filter).unwrap_or_default(),
        _ => Vec::new(),
    };
    let request = |kind, body| Request { kind: CTNETLINK | kind, flags: 0, family, body };
    let mut socket = Socket::open()?;
    let mut old = Vec::new();
    socket.dump(&request(IPCTNL_MSG_CT_GET, body), |entry| {
        if is_old(entry) {
            old.push(entry_key(entry));
        }
    })?;
    let mut removed = 0;
    for key in old {
        match socket.request(&request(IPCTNL_MSG_CT_DELETE, key)) {
            Ok(()) => removed += 1,
            // It ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// Judges connections as the programs judge packets.
struct Judge<'a> {
    tables: Memory,
    ruled: &'a BTreeMap<Ip, RulesetId>,
    names: &'a dyn Names,
}

impl<'a> Judge<'a> {
    fn new(job: &'a Job, names: &'a dyn Names) -> Self {
        let mut tables = Memory {
            networks: job.networks.iter().map(|(key, network)| (*key, network.kind)).collect(),
            resolvers: job.resolvers.clone(),
            ..Memory::new(1, 0)
        };
        tables.now.set(names.now());
        for (id, rules) in &job.rulesets {
            rules.fill(*id, &mut tables);
        }
        Self { tables, ruled: &job.ruled, names }
    }

    /// Whether an entry is a connection that one of the pods opened and that its firewall denies.
    fn denies(&self, entry: &[u8]) -> bool {
        let Some(tuple) = tuple(entry) else { return false };
        let Some(id) = self.ruled.get(&tuple.source) else { return false };
        let network = self.tables.network(&tuple.destination);
        let ports = matches!(tuple.protocol, TCP | UDP | SCTP);
        let own = network == NetworkKind::OwnNode as u32;
        if !is_for(network, &tuple) || own && ports && NODE_PORTS.contains(&tuple.destination_port) {
            return false;
        }
        if let Some(ruleset) = self.tables.ruleset(*id).filter(|r| r.parts & Ruleset::NAMES != 0) {
            let key = LearntKey { firewall: ruleset.firewall, ip: tuple.destination };
            if let Some(learnt) = self.names.learnt(&key) {
                self.tables.learnt.borrow_mut().insert(key, learnt);
            }
        }
        !judge(&self.tables, *id, &tuple).allows()
    }
}

/// A UDP connection that one of the pods opened, as the pod sees it.
fn opened(entry: &[u8], pods: &BTreeMap<Ip, PodId>) -> Option<FlowKey> {
    let original = attribute(entry, CTA_TUPLE_ORIG)?;
    let (addresses, proto) = (attribute(original, CTA_TUPLE_IP)?, attribute(original, CTA_TUPLE_PROTO)?);
    if *attribute(proto, CTA_PROTO_NUM)?.first()? != UDP {
        return None;
    }
    let pod = *pods.get(&source(addresses)?)?;
    let remote = match attribute(addresses, CTA_IP_V4_DST) {
        Some(v4) => Ip::v4(v4.try_into().ok()?),
        None => Ip { octets: attribute(addresses, CTA_IP_V6_DST)?.try_into().ok()? },
    };
    let port = |kind| Some(u16::from_be_bytes(attribute(proto, kind)?.try_into().ok()?));
    let (local_port, remote_port) = (port(CTA_PROTO_SRC_PORT)?, port(CTA_PROTO_DST_PORT)?);
    Some(FlowKey { pod, remote, local_port, remote_port, protocol: UDP, path: 0, pad: 0 })
}

/// A connection as its opener's packets are after the host's DNAT: they go where the answers come from.
fn tuple(entry: &[u8]) -> Option<Tuple> {
    let (original, reply) = (attribute(entry, CTA_TUPLE_ORIG)?, attribute(entry, CTA_TUPLE_REPLY)?);
    let proto = |tuple| attribute(tuple, CTA_TUPLE_PROTO);
    // What has no ports has no such attribute. In network order.
    let port = |tuple| {
        let port = proto(tuple).and_then(|p| attribute(p, CTA_PROTO_SRC_PORT));
        port.and_then(|p| p.try_into().ok()).map_or(0, u16::from_be_bytes)
    };
    Some(Tuple {
        source: source(attribute(original, CTA_TUPLE_IP)?)?,
        destination: source(attribute(reply, CTA_TUPLE_IP)?)?,
        source_port: port(original),
        destination_port: port(reply),
        protocol: *attribute(proto(original)?, CTA_PROTO_NUM)?.first()?,
        pad: [0; 3],
    })
}

/// Has the kernel show entries with this original source only.
fn filter(pod: &Ip) -> Vec<u8> {
    let mut body = Vec::new();
    put_nested(&mut body, CTA_TUPLE_ORIG, |tuple| {
        put_nested(tuple, CTA_TUPLE_IP, |addresses| {
            if pod.is_v4() {
                put(addresses, CTA_IP_V4_SRC, &pod.v4_octets());
            } else {
                put(addresses, CTA_IP_V6_SRC, &pod.octets);
            }
        });
    });
    put_nested(&mut body, CTA_FILTER, |flags| {
        // In host order, other than most of netfilter's numbers (ctnetlink_parse_filter).
        put(flags, CTA_FILTER_ORIG_FLAGS, &FILTER_SOURCE.to_ne_bytes());
        put(flags, CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
    });
    body
}

/// Whether an entry is one of the pods' own connections, and leads outside. Where it leads is who answers: the
/// destination that the pod asked for may be a service, which leads anywhere.
fn is_old(entry: &[u8], pods: &BTreeSet<Ip>, networks: &Networks) -> bool {
    let source = |tuple| source(attribute(attribute(entry, tuple)?, CTA_TUPLE_IP)?);
    let (Some(opener), Some(answerer)) = (source(CTA_TUPLE_ORIG), source(CTA_TUPLE_REPLY)) else {
        return false;
    };
    pods.contains(&opener) && !answerer.stays_on_link() && !networks.keys().any(|n| contains(n, &answerer))
}

/// The source address of a tuple.
fn source(addresses: &[u8]) -> Option<Ip> {
    if let Some(v4) = attribute(addresses, CTA_IP_V4_SRC) {
        return Some(Ip::v4(v4.try_into().ok()?));
    }
    Some(Ip { octets: attribute(addresses, CTA_IP_V6_SRC)?.try_into().ok()? })
}

fn contains(network: &NetworkKey, ip: &Ip) -> bool {
    let differs = u128::from_be_bytes(network.ip.octets) ^ u128::from_be_bytes(ip.octets);
    // A shift by all 128 bits: every address.
    differs.checked_shr(128 - network.prefix_len).is_none_or(|rest| rest == 0)
}

/// What names an entry to the kernel: its tuple, its zone, and the number that no later entry with the same tuple
/// has.
fn entry_key(entry: &[u8]) -> Vec<u8> {
    let mut key = Vec::new();
    if let Some(tuple) = attribute(entry, CTA_TUPLE_ORIG) {
        put_nested(&mut key, CTA_TUPLE_ORIG, |out| out.extend(tuple));
    }
    for kind in [CTA_ZONE, CTA_ID] {
        if let Some(value) = attribute(entry, kind) {
            put(&mut key, kind, value);
        }
    }
    key
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use datapath::keys::{Pod, Winner};
    use datapath::names::word;
    use datapath::rules::port_number;
    use datapath::rules_build::Span;

    use super::*;

    const CTA_IP_V4_DST: u16 = 2;

    fn ip(text: &str) -> Ip {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn networks() -> Networks {
        let net = |prefix_len, text, kind: NetworkKind| {
            (NetworkKey { prefix_len, ip: ip(text) }, Network { kind: kind as u32 })
        };
        [
            net(96 + 16, "10.244.0.0", NetworkKind::Pods),
            net(96 + 12, "10.96.0.0", NetworkKind::Services),
            net(128, "172.18.0.11", NetworkKind::Node),
            net(48, "fd00:1:2::", NetworkKind::Pods),
        ]
        .into()
    }

    /// A conntrack entry by the sources and destinations of its two tuples.
    fn entry(original: (&str, &str), reply: (&str, &str)) -> Vec<u8> {
        let mut out = Vec::new();
        for (kind, (from, to)) in [(CTA_TUPLE_ORIG, original), (CTA_TUPLE_REPLY, reply)] {
            put_nested(&mut out, kind, |tuple| {
                put_nested(tuple, CTA_TUPLE_IP, |addresses| {
                    for (offset, address) in [(0, ip(from)), (1, ip(to))] {
                        if address.is_v4() {
                            put(addresses, CTA_IP_V4_SRC + offset, &address.v4_octets());
                        } else {
                            put(addresses, CTA_IP_V6_SRC + offset, &address.octets);
                        }
                    }
                });
                let port: u16 = if kind == CTA_TUPLE_ORIG { 40_000 } else { 443 };
                put_nested(tuple, CTA_TUPLE_PROTO, |ports| {
                    put(ports, CTA_PROTO_NUM, &[TCP]);
                    put(ports, CTA_PROTO_SRC_PORT, &port.to_be_bytes());
                });
            });
        }
        put(&mut out, CTA_ID, &[0, 0, 0, 9]);
        out
    }

    #[test]
    fn only_what_the_pod_opened_towards_outside_is_old() {
        let pods = [ip("10.244.1.2"), ip("fd00:1:2::5")].into();
        let old = |original, reply| is_old(&entry(original, reply), &pods, &networks());
        let masqueraded = ("203.0.113.10", "172.18.0.11");
        assert!(old(("10.244.1.2", "203.0.113.10"), masqueraded));
        assert!(old(("10.244.1.2", "10.96.0.7"), masqueraded), "a service that leads outside");
        assert!(old(("fd00:1:2::5", "2001:db8::1"), ("2001:db8::1", "fd00:9::1")));
        assert!(!old(("10.244.1.3", "203.0.113.10"), masqueraded), "another pod");
        assert!(!old(("10.244.1.2", "10.244.2.2"), ("10.244.2.2", "10.244.1.2")), "to a pod");
        assert!(!old(("10.244.1.2", "10.96.0.1"), ("10.244.2.2", "10.244.1.2")), "a service");
        assert!(!old(("10.244.1.2", "172.18.0.11"), ("172.18.0.11", "10.244.1.2")), "to a node");
        assert!(!old(("10.244.1.2", "169.254.169.254"), ("169.254.169.254", "172.18.0.11")), "on the link");
        assert!(!old(("203.0.113.10", "10.244.1.2"), ("10.244.1.2", "203.0.113.10")), "came in");
        assert!(
            !old(("203.0.113.10", "172.18.0.11"), ("10.244.1.2", "172.18.0.11")),
            "came in by a node port"
        );
    }

    /// Names of addresses, in place of the kernel's.
    struct Known(BTreeMap<LearntKey, Learnt>);

    impl Names for Known {
        fn opened_by_pod(&self, _key: &FlowKey) {}
        fn learnt(&self, key: &LearntKey) -> Option<Learnt> {
            self.0.get(key).copied()
        }
        fn now(&self) -> Ticks {
            1000
        }
    }

    #[test]
    fn what_a_new_version_denies_is_as_the_programs_judge_it() {
        let deny_443 = Rules {
            ruleset: Ruleset {
                firewall: 4,
                rules: 3,
                parts: Ruleset::ADDRESSES | Ruleset::PORTS | Ruleset::NAMES,
                ..Ruleset::default()
            },
            v4: vec![
                Span { class: 0, last: 0xcb00_7113, winner: Winner::NONE },
                Span { class: 0, last: 0xcb00_7114, winner: Winner::new(0, true).order },
                Span { class: 0, last: u32::MAX, winner: Winner::NONE },
                Span { class: 1, last: u32::MAX, winner: Winner::new(2, false).order },
            ],
            ports: vec![
                Span { class: 0, last: port_number(TCP, 0) - 1, winner: 0 },
                Span { class: 0, last: port_number(TCP, u16::MAX), winner: 1 },
                Span { class: 0, last: u32::MAX, winner: 0 },
            ],
            names: vec![(9, 0, Winner::new(1, true))],
            ..Rules::default()
        };
        let job = Job {
            networks: networks(),
            ruled: [(ip("10.244.1.2"), 7), (ip("fd00:1:2::5"), 7), (ip("10.244.1.4"), 8)].into(),
            rulesets: [(7, Arc::new(deny_443))].into(),
            ..Job::default()
        };
        let mut learnt = Learnt::default();
        learnt.names[0] = word(9, 2000);
        let mut past = Learnt::default();
        past.names[0] = word(9, 999);
        let key = |address| LearntKey { firewall: 4, ip: ip(address) };
        let names = Known([(key("203.0.113.30"), learnt), (key("203.0.113.31"), past)].into());
        let judge = Judge::new(&job, &names);
        let denied = |from, to, answerer| judge.denies(&entry((from, to), (answerer, "172.18.0.11")));
        let denied_direct = |to| denied("10.244.1.2", to, to);
        assert!(denied_direct("203.0.113.10"));
        assert!(denied_direct("169.254.169.254"), "rules are for metadata services");
        assert!(denied_direct("172.18.0.11"), "and for nodes");
        assert!(!denied_direct("203.0.113.20"), "an earlier rule allows it");
        assert!(!denied_direct("203.0.113.30"), "by name");
        assert!(denied_direct("203.0.113.31"), "which it has no more");
        assert!(!denied_direct("10.244.2.2"), "a pod");
        assert!(denied("10.244.1.2", "10.96.0.7", "203.0.113.10"), "a service that leads outside");
        assert!(!denied("10.244.1.2", "203.0.113.10", "10.244.2.2"), "an address that leads inside");
        assert!(!denied("fd00:1:2::5", "2001:db8::1", "2001:db8::1"), "no rule is for IPv6");
        assert!(!denied("10.244.1.3", "203.0.113.10", "203.0.113.10"), "another pod");
        assert!(!denied("203.0.113.10", "10.244.1.2", "10.244.1.2"), "came in");
        assert!(denied("10.244.1.4", "203.0.113.20", "203.0.113.20"), "its rules are not there");
        assert!(!judge.denies(&[]));
    }

    #[test]
    fn pods_come_under_a_version_once() {
        let image = |pods: &[(&str, PodId, u32)], version| MapImage {
            pods: pods
                .iter()
                .map(|(address, id, firewall)| {
                    (ip(address), Pod { id: *id, firewall: *firewall, ..Pod::default() })
                })
                .collect(),
            firewalls: [(1, version), (2, 9)].into(),
            ..MapImage::default()
        };
        let pods = [("10.0.0.1", 1, 1), ("10.0.0.2", 2, 2), ("10.0.0.3", 3, 0)];
        let before = ruled(&image(&pods, 5));
        assert_eq!(before, [(ip("10.0.0.1"), (1, 5)), (ip("10.0.0.2"), (2, 9))].into());
        let after = ruled(&image(&pods, 6));
        assert_eq!(newly(&before, &after), [ip("10.0.0.1")].into());
        let more = ruled(&image(&[pods[0], pods[1], ("10.0.0.3", 3, 1)], 6));
        assert_eq!(newly(&after, &more), [ip("10.0.0.3")].into());
    }

    #[test]
    fn what_is_not_understood_stays() {
        let pods = [ip("10.244.1.2")].into();
        assert!(!is_old(&[], &pods, &networks()));
        let mut only_original = Vec::new();
        put_nested(&mut only_original, CTA_TUPLE_ORIG, |t| {
            put_nested(t, CTA_TUPLE_IP, |a| put(a, CTA_IP_V4_SRC, &[10, 244, 1, 2]));
        });
        assert!(!is_old(&only_original, &pods, &networks()));
    }

    #[test]
    fn an_entry_is_named_by_its_original_tuple_and_number() {
        let entry = entry(("10.244.1.2", "203.0.113.10"), ("203.0.113.10", "172.18.0.11"));
        let key = entry_key(&entry);
        assert_eq!(attribute(&key, CTA_TUPLE_ORIG), attribute(&entry, CTA_TUPLE_ORIG));
        assert_eq!(attribute(&key, CTA_TUPLE_REPLY), None);
        assert_eq!(attribute(&key, CTA_ID), Some(&[0, 0, 0, 9][..]));
        let tuple = attribute(&key, CTA_TUPLE_ORIG).unwrap();
        let addresses = attribute(tuple, CTA_TUPLE_IP).unwrap();
        assert_eq!(attribute(addresses, CTA_IP_V4_DST), Some(&[203, 0, 113, 10][..]));
    }

    #[test]
    fn pods_become_selected_once() {
        let image = |pods: &[(&str, PodId, u32)]| MapImage {
            pods: pods
                .iter()
                .map(|(address, id, policy)| {
                    (ip(address), Pod { id: *id, policy: *policy, ..Pod::default() })
                })
                .collect(),
            ..MapImage::default()
        };
        let before = selected(&image(&[("10.0.0.1", 1, 0), ("10.0.0.2", 2, 7), ("10.0.0.3", 3, 7)]));
        let after = selected(&image(&[
            ("10.0.0.1", 1, 7), // selected now
            ("10.0.0.2", 2, 8), // by another object: had an egress IP before
            ("10.0.0.3", 9, 7), // another pod with the address
            ("10.0.0.4", 4, 7), // not known before
            ("10.0.0.5", 5, 0),
        ]));
        assert_eq!(newly(&before, &after), [ip("10.0.0.1"), ip("10.0.0.3"), ip("10.0.0.4")].into());
        assert_eq!(newly(&after, &after), BTreeSet::new());
    }
}

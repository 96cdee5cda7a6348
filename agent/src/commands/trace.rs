//! `outgate trace`: walks a packet through the decisions that the kernel runs, on the maps that it uses.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use datapath::addr::Ip;
use datapath::conntrack::Ticks;
use datapath::firewall::{is_dns_port, is_for};
use datapath::from_pod::from_pod;
use datapath::keys::{
    FirewallId, InterfaceKind, Learnt, LearntKey, NetworkKind, Pod, RESOLVER_ON_NODE, Tuple,
};
use datapath::limits::{FLOWS, NODE_PORTS};
use datapath::memory::Memory;
use datapath::packet::{self, Kind, Packet, Part};
use datapath::tables::Tables as _;
use datapath::to_uplink::to_uplink;
use datapath::verdict::{DropReason, FromPod, Keep, Snat, ToUplink, Way};
use serde::Serialize;

use crate::bpf::{self, firewall_counts, maps};
use crate::cli::{Protocol, TraceArgs};
use crate::firewall::{Name, show};
use crate::image::MapImage;
use crate::print;

/// A packet's walk, for people and programs.
#[derive(Serialize, Debug, Default)]
#[serde(rename_all = "camelCase")]
struct Walk {
    pod: String,
    source: String,
    destination: String,
    /// What happens at each program, in order.
    steps: Vec<Step>,
    /// `translated`, `untouched` or `dropped`.
    outcome: &'static str,
    #[serde(rename = "egressIP", skip_serializing_if = "Option::is_none")]
    egress_ip: Option<IpAddr>,
    /// Tunnel address of the node that holds the egress IP.
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<IpAddr>,
    /// `local`, or `tunnel` to the owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drop_reason: Option<&'static str>,
    /// What the namespace's firewall says, if it is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    firewall: Option<Decision>,
}

/// What a firewall says.
#[derive(Serialize, Debug, PartialEq, Eq)]
struct Decision {
    namespace: String,
    allowed: bool,
    /// The rule that decides; none: no rule does.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    /// The name by which it does; none: by address.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip)]
    says: String,
}

#[derive(Serialize, Debug)]
struct Step {
    at: &'static str,
    says: String,
}

pub(super) fn run(args: &TraceArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let image = bpf::read_image(&args.bpffs.bpffs)?;
    let wanted = format!("{}/{}", args.pod.namespace, args.pod.name);
    let destination = SocketAddr::new(args.destination.ip, args.destination.port);
    let dir = bpf::pin_dir(&args.bpffs.bpffs);
    let learnt = |key: &LearntKey| firewall_counts::learnt(&dir, key);
    let walk = walk(&image, &wanted, destination, args.protocol, maps::now(), &learnt)?;
    print::print_into(out, args.output, &walk, |out| {
        writeln!(out, "{} ({}) to {}", walk.pod, walk.source, walk.destination)?;
        for step in &walk.steps {
            writeln!(out, "  {:<11} {}", step.at, step.says)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Walks the first packet of a connection. `learnt` reads the names of an address, as of `now`.
fn walk(
    image: &MapImage,
    pod: &str,
    destination: SocketAddr,
    protocol: Protocol,
    now: Ticks,
    learnt: &dyn Fn(&LearntKey) -> Result<Option<Learnt>, bpf::Error>,
) -> anyhow::Result<Walk> {
    // A pod has an id for each of its addresses.
    let ids: BTreeSet<_> =
        image.pod_names.iter().filter(|(_, name)| show::pod(name) == pod).map(|(id, _)| *id).collect();
    anyhow::ensure!(
        !ids.is_empty(),
        "no pod {pod} on this node; `outgate trace` knows the pods of its own node"
    );
    let to = Ip::from(destination.ip());
    let ip = image
        .pods
        .iter()
        .find(|(ip, p)| ids.contains(&p.id) && ip.is_v4() == to.is_v4())
        .map(|(ip, _)| *ip)
        .with_context(|| format!("pod {pod} has no address of the family of {}", destination.ip()))?;
    let packet = first_packet(ip, &destination, protocol);
    let tuple = packet.tuple;
    let mut walk = Walk {
        pod: pod.to_owned(),
        source: IpAddr::from(ip).to_string(),
        destination: match protocol {
            Protocol::Icmp => format!("{} (echo)", destination.ip()),
            Protocol::Tcp => format!("{destination} (TCP)"),
            Protocol::Udp => format!("{destination} (UDP)"),
            Protocol::Sctp => format!("{destination} (SCTP)"),
        },
        ..Walk::default()
    };
    let entry = image.pods[&ip];
    let tables = tables(image, &entry);
    tables.now.set(now);
    let key = LearntKey { firewall: entry.firewall, ip: to };
    if entry.firewall != 0
        && let Some(names) = learnt(&key)?
    {
        tables.learnt.borrow_mut().insert(key, names);
    }
    let namespace = pod.split_once('/').map_or(pod, |(namespace, _)| namespace);
    walk.firewall = decision(&tables, image, namespace, entry.firewall, &tuple);
    let ifindex = entry.ifindex;
    match from_pod(&tables, ifindex, &packet, &Keep) {
        FromPod::NotOurs => walk.untouched("from_pod", "no EgressIP selects the pod"),
        FromPod::Pass => walk.untouched("from_pod", "no EgressIP selects the pod, others on its bridge are"),
        FromPod::Unmarked => walk.untouched("from_pod", &inside(&tables, &to)),
        // A packet is traced at its smallest.
        FromPod::TooBig(_) => walk.dropped("from_pod", DropReason::TooBig),
        FromPod::Drop(reason) => {
            walk.decided();
            walk.dropped("from_pod", reason);
        }
        FromPod::Reject => {
            walk.decided();
            walk.rejected("from_pod");
        }
        FromPod::Translate(snat) => walk.translated("from_pod", image, &snat),
        FromPod::Identify(token, _) => {
            let who = if entry.policy == 0 { "a pod with a firewall" } else { "a selected pod" };
            walk.step("from_pod", format!("a new flow of {who}: a token, and up the host's stack"));
            walk.step("host", "netfilter and routing of the node (not known here: taken for let through)");
            if tables.network(&to) == NetworkKind::OwnNode as u32 {
                let says = inside(&tables, &to);
                walk.decided();
                walk.untouched("host", &says);
                return Ok(walk);
            }
            walk.decided();
            let uplink = |(index, i): (&u32, &datapath::keys::Interface)| {
                (i.kind == InterfaceKind::Uplink as u8).then_some(*index)
            };
            let uplink = image.interfaces.iter().find_map(uplink).unwrap_or(0);
            let ingress = match image.interfaces.get(&ifindex) {
                Some(interface) if interface.bridge != 0 => interface.bridge,
                _ => ifindex,
            };
            match to_uplink(&tables, uplink, ingress, token, &packet, &Keep) {
                ToUplink::NotOurs => walk.untouched("to_uplink", "not a pod's packet"),
                ToUplink::Pass if entry.policy == 0 && tables.network(&to) == 0 => {
                    walk.untouched(
                        "to_uplink",
                        "no EgressIP selects the pod; it leaves by the node's address",
                    );
                }
                ToUplink::Pass if tables.network(&to) == 0 && !to.stays_on_link() => {
                    walk.untouched(
                        "to_uplink",
                        "no node holds the egress IPs, and `unassigned: NodeIP` is set",
                    );
                }
                ToUplink::Pass => walk.untouched("to_uplink", &inside(&tables, &to)),
                ToUplink::Reset => walk.dropped("to_uplink", DropReason::NoFlow),
                ToUplink::Full => walk.dropped("to_uplink", DropReason::FlowTableFull),
                ToUplink::Drop(reason) => walk.dropped("to_uplink", reason),
                ToUplink::Reject => walk.rejected("to_uplink"),
                ToUplink::Translate(snat) => walk.translated("to_uplink", image, &snat),
            }
        }
    }
    Ok(walk)
}

/// The first packet of a connection, at its smallest.
fn first_packet(source: Ip, to: &SocketAddr, protocol: Protocol) -> Packet {
    let destination = Ip::from(to.ip());
    let (kind, number, ports) = match protocol {
        Protocol::Tcp => (Kind::Tcp, packet::TCP, (SOURCE_PORT, to.port())),
        Protocol::Udp => (Kind::Udp, packet::UDP, (SOURCE_PORT, to.port())),
        Protocol::Sctp => (Kind::Sctp, packet::SCTP, (SOURCE_PORT, to.port())),
        Protocol::Icmp => {
            let number = if destination.is_v4() { packet::ICMP } else { packet::ICMPV6 };
            (Kind::EchoRequest, number, (SOURCE_PORT, 0))
        }
    };
    let tuple = Tuple {
        source,
        destination,
        source_port: ports.0,
        destination_port: ports.1,
        protocol: number,
        pad: [0; 3],
    };
    let tcp_flags = if matches!(kind, Kind::Tcp | Kind::Sctp) { packet::SYN } else { 0 };
    Packet {
        tuple,
        len: 60,
        wire_len: 60,
        fragment_id: 0,
        kind,
        tcp_flags,
        ttl: 64,
        part: Part::Whole,
        options: false,
        dont_fragment: true,
        by_router: false,
    }
}

/// Any port from the range that clients use.
const SOURCE_PORT: u16 = 50_000;

impl Walk {
    fn step(&mut self, at: &'static str, says: impl Into<String>) {
        self.steps.push(Step { at, says: says.into() });
    }

    fn untouched(&mut self, at: &'static str, why: &str) {
        self.outcome = "untouched";
        self.step(at, format!("untouched: {why}"));
    }

    fn dropped(&mut self, at: &'static str, reason: DropReason) {
        self.outcome = "dropped";
        self.drop_reason = Some(reason.name());
        self.step(at, format!("dropped, {}: {}", reason.name(), reason.meaning()));
    }

    /// What the firewall says, if it is asked.
    fn decided(&mut self) {
        if let Some(says) = self.firewall.as_ref().map(|decision| decision.says.clone()) {
            self.step("firewall", says);
        }
    }

    /// Denied by the firewall, and answered.
    fn rejected(&mut self, at: &'static str) {
        self.outcome = "dropped";
        let reason = DropReason::FirewallDenied;
        self.drop_reason = Some(reason.name());
        let answered = "answered with RST or an ICMP error";
        self.step(at, format!("dropped and {answered}, {}: {}", reason.name(), reason.meaning()));
    }

    fn translated(&mut self, at: &'static str, image: &MapImage, snat: &Snat) {
        let egress_ip = IpAddr::from(snat.source);
        self.outcome = "translated";
        self.egress_ip = Some(egress_ip);
        let (path, owner, way) = match snat.way {
            Way::Tunnel(node) => {
                let node = IpAddr::from(node);
                ("tunnel", Some(node), format!("through the tunnel to {node}, which holds it"))
            }
            Way::Here | Way::Uplink(_) => {
                let own = image.nodes.get(&image.settings.node).map(|n| IpAddr::from(n.tunnel_ip));
                ("local", own, "out of this node's uplink, as it holds it itself".to_owned())
            }
        };
        (self.path, self.owner) = (Some(path), owner);
        self.step(at, format!("leaves as {egress_ip}, with a port of this node's range, {way}"));
    }
}

/// What a namespace's firewall says of a first packet, by the code that the kernel runs. None: it is not asked.
fn decision(
    tables: &Memory,
    image: &MapImage,
    namespace: &str,
    firewall: FirewallId,
    tuple: &Tuple,
) -> Option<Decision> {
    let network = tables.network(&tuple.destination);
    if firewall == 0 || !is_for(network, tuple) {
        return None;
    }
    let has_ports = matches!(tuple.protocol, packet::TCP | packet::UDP | packet::SCTP);
    if network == NetworkKind::OwnNode as u32 && has_ports && NODE_PORTS.contains(&tuple.destination_port) {
        return None;
    }
    let judgement = tables.judge(tables.ruleset_of(firewall), tuple);
    let name = image.names.iter().find(|(_, id)| judgement.name != 0 && **id == judgement.name);
    let name = name.map(|(key, _)| Name::of_key(key).to_string());
    let rule = show::place(judgement.rule);
    let to_resolver = tables.resolver(&tuple.destination) & RESOLVER_ON_NODE != 0;
    let says = match (&rule, judgement.allows()) {
        (Some(rule), _) => {
            let by = name.as_ref().map(|name| format!(", by the name {name}")).unwrap_or_default();
            format!("EgressFirewall {namespace}/default {rule} ({}){by}", show::action(judgement.rule))
        }
        (None, false) => {
            format!("EgressFirewall {namespace}/default is refused, or not in force on this node yet: denied")
        }
        (None, true) if to_resolver && has_ports && is_dns_port(tuple.destination_port) => {
            "allowed whatever EgressFirewalls say: DNS of a node".to_owned()
        }
        (None, true) => format!("EgressFirewall {namespace}/default has no rule for it: allowed"),
    };
    Some(Decision { namespace: namespace.to_owned(), allowed: judgement.allows(), rule, name, says })
}

/// What an address inside the cluster is.
fn inside(tables: &Memory, to: &Ip) -> String {
    let network = tables.network(to);
    let what = if to.stays_on_link() {
        "stays on the link"
    } else if network == NetworkKind::Pods as u32 {
        "is a pod's"
    } else if network == NetworkKind::Services as u32 {
        "is a service's; what it leads to is decided after the host's DNAT"
    } else if network == NetworkKind::OwnNode as u32 {
        "is this node's own"
    } else {
        "is a node's"
    };
    format!("{to} {what}")
}

/// The policy maps, without any flow: the walk is a first packet's. Of rules only those for the pod: a node may have
/// a hundred thousand.
fn tables(image: &MapImage, pod: &Pod) -> Memory {
    let seed = image.settings.pass_token;
    let mut tables = Memory {
        settings: image.settings,
        pods: image.pods.clone(),
        delivery: image.delivery.clone(),
        interfaces: image.interfaces.clone(),
        networks: image.networks.iter().map(|(key, network)| (*key, network.kind)).collect(),
        policies: image.policies.clone(),
        egress_ips: image.egress_ips.clone(),
        egress_addrs: image.egress_addrs.clone(),
        granules: image.granules.iter().map(|(id, table)| (*id, **table)).collect(),
        leases: image.leases.clone(),
        nodes: image.nodes.clone(),
        firewalls: image.firewalls.clone(),
        names: image.names.clone(),
        resolvers: image.resolvers.clone(),
        ..Memory::new(seed, FLOWS as usize)
    };
    if let Some(id) = image.firewalls.get(&pod.firewall)
        && let Some(rules) = image.rulesets.get(id)
    {
        rules.fill(*id, &mut tables);
    }
    tables
}

#[cfg(test)]
mod tests {
    use datapath::keys::{
        Delivery, EgressIp, GranuleRange, Interface, Lease, Network, NetworkKey, Node, PodName, Policy,
        Ruleset, Settings, Winner,
    };
    use datapath::rules_build::Span;
    use std::sync::Arc;

    use super::*;
    use crate::image::Rules;

    const EGRESS: Ip = Ip::v4([192, 0, 2, 100]);

    /// A node with a selected and an unselected pod; another node holds the address.
    fn image() -> MapImage {
        let mut image =
            MapImage { settings: Settings { node: 1, ..Settings::default() }, ..MapImage::default() };
        for (id, policy, name, last) in [(1, 1, "shop", 1), (2, 0, "try", 2)] {
            let ip = Ip::v4([10, 1, 0, last]);
            image.pods.insert(ip, Pod { id, policy, ifindex: 10 + id, firewall: 0 });
            image.delivery.insert(id, Delivery { ip, ifindex: 10 + id, mode: 1, ..Delivery::default() });
            let mut names = PodName::default();
            names.namespace[..4].copy_from_slice(b"prod");
            names.name[..name.len()].copy_from_slice(name.as_bytes());
            image.pod_names.insert(id, names);
            let kind = InterfaceKind::Pod as u8;
            image.interfaces.insert(10 + id, Interface { kind, ..Interface::default() });
        }
        let kind = InterfaceKind::Uplink as u8;
        image.interfaces.insert(2, Interface { kind, ..Interface::default() });
        for (id, last) in [(1, 11), (2, 12)] {
            image.nodes.insert(id, Node { tunnel_ip: Ip::v4([192, 0, 2, last]) });
        }
        let egress = EgressIp { ip: EGRESS, policy: 1, holder: 2, ..EgressIp::default() };
        image.egress_ips.insert(1, egress);
        image.egress_addrs.insert(EGRESS, 1);
        let mut policy = Policy { len: 1, ..Policy::default() };
        policy.egress[0] = 1;
        image.policies.insert(1, policy);
        image.leases.insert(1, Lease::of(&[GranuleRange { first: 0, count: 4 }]));
        let pods = NetworkKey { prefix_len: 112, ip: Ip::v4([10, 1, 0, 0]) };
        image.networks.insert(pods, Network { kind: NetworkKind::Pods as u32 });
        image
    }

    fn to(image: &MapImage, pod: &str, destination: &str) -> Walk {
        walk_of(image, pod, destination, Protocol::Tcp).unwrap()
    }

    fn walk_of(image: &MapImage, pod: &str, destination: &str, protocol: Protocol) -> anyhow::Result<Walk> {
        walk(image, pod, destination.parse().unwrap(), protocol, 100, &|_| Ok(None))
    }

    #[test]
    fn a_selected_pod_leaves_by_its_egress_ip_and_its_holder() {
        let w = to(&image(), "prod/shop", "203.0.113.9:443");
        assert_eq!((w.outcome, w.egress_ip, w.path), ("translated", Some(EGRESS.into()), Some("tunnel")));
        assert_eq!(w.owner, Some("192.0.2.12".parse().unwrap()));
        assert_eq!(w.steps.iter().map(|s| s.at).collect::<Vec<_>>(), ["from_pod", "host", "to_uplink"]);
        let mut image = image();
        image.egress_ips.get_mut(&1).unwrap().holder = 1;
        image.egress_ips.get_mut(&1).unwrap().uplink = 2;
        assert_eq!(to(&image, "prod/shop", "203.0.113.9:443").path, Some("local"));
    }

    #[test]
    fn what_is_not_translated_is_explained() {
        assert_eq!(to(&image(), "prod/try", "203.0.113.9:443").outcome, "untouched");
        assert_eq!(to(&image(), "prod/shop", "10.1.0.77:80").outcome, "untouched");
        let mut image = image();
        image.leases.clear();
        let w = to(&image, "prod/shop", "203.0.113.9:443");
        assert_eq!((w.outcome, w.drop_reason), ("dropped", Some("NoPortRange")));
        assert!(w.steps[2].says.contains("no port range"), "{}", w.steps[2].says);
        image.egress_ips.get_mut(&1).unwrap().holder = 0;
        assert_eq!(to(&image, "prod/shop", "203.0.113.9:443").drop_reason, Some("NoOwner"));
        image.settings.unassigned = 1;
        assert_eq!(to(&image, "prod/shop", "203.0.113.9:443").outcome, "untouched");
    }

    #[test]
    fn an_ipv6_pod_leaves_by_an_ipv6_egress_ip() {
        let mut image = image();
        let of = |text: &str| Ip::from(text.parse::<IpAddr>().unwrap());
        let (pod, address) = (of("fd00:1::1"), of("2001:db8::100"));
        image.pods.insert(pod, Pod { id: 3, policy: 1, ifindex: 11, firewall: 0 });
        image.delivery.insert(3, Delivery { ip: pod, ifindex: 11, mode: 1, ..Delivery::default() });
        image.pod_names.insert(3, image.pod_names[&1]);
        let egress = EgressIp { ip: address, policy: 1, holder: 2, ..EgressIp::default() };
        image.egress_ips.insert(2, egress);
        image.egress_addrs.insert(address, 2);
        let policy = image.policies.get_mut(&1).unwrap();
        (policy.len, policy.egress[1]) = (2, 2);
        image.leases.insert(2, Lease::of(&[GranuleRange { first: 0, count: 4 }]));
        let w = to(&image, "prod/shop", "[2001:db8:9::9]:443");
        assert_eq!((w.outcome, w.egress_ip), ("translated", Some(address.into())), "{:?}", w.steps);
        assert_eq!((w.source.as_str(), w.destination.as_str()), ("fd00:1::1", "[2001:db8:9::9]:443 (TCP)"));
        let w = walk_of(&image, "prod/shop", "[2001:db8:9::9]:0", Protocol::Icmp).unwrap();
        assert_eq!((w.outcome, w.destination.as_str()), ("translated", "2001:db8:9::9 (echo)"));
        // The pod's other address goes its own way.
        assert_eq!(to(&image, "prod/shop", "203.0.113.9:443").egress_ip, Some(EGRESS.into()));
    }

    #[test]
    fn an_unknown_pod_or_family_is_an_error() {
        let of = |pod: &str, destination: &str| {
            walk_of(&image(), pod, destination, Protocol::Tcp).unwrap_err().to_string()
        };
        assert!(of("prod/nope", "203.0.113.9:80").contains("no pod prod/nope"));
        assert!(of("prod/shop", "[2001:db8::1]:80").contains("family"));
    }

    /// The same node with a firewall of these rules: Allow 198.51.100.0/24; Deny port 25 of it, which never comes
    /// to pass; Allow a name; Deny everything.
    fn image_with_firewall() -> MapImage {
        let mut image = image();
        for pod in image.pods.values_mut() {
            pod.firewall = 4;
        }
        let winner = |index, allows| Winner { order: Winner::new(index, allows).order };
        let rules = Rules {
            ruleset: Ruleset {
                firewall: 4,
                rules: 4,
                parts: Ruleset::ADDRESSES | Ruleset::NAMES,
                ..Ruleset::default()
            },
            v4: vec![
                Span { class: 0, last: 0xc633_63ff, winner: winner(3, false).order },
                Span { class: 0, last: 0xc633_64ff, winner: winner(0, true).order },
                Span { class: 0, last: u32::MAX, winner: winner(3, false).order },
            ],
            names: vec![(9, 0, winner(2, true))],
            ..Rules::default()
        };
        image.firewalls.insert(4, 7);
        image.rulesets.insert(7, Arc::new(rules));
        let name = Name { wildcard: true, name: "example.test".into() };
        image.names.insert(name.key(4), 9);
        image.resolvers.insert(Ip::v4([192, 0, 2, 11]), RESOLVER_ON_NODE);
        let own = NetworkKey { prefix_len: 128, ip: Ip::v4([192, 0, 2, 11]) };
        image.networks.insert(own, Network { kind: NetworkKind::OwnNode as u32 });
        image
    }

    fn says(image: &MapImage, destination: &str) -> String {
        let walk = to(image, "prod/try", destination);
        walk.firewall.map(|decision| decision.says).unwrap_or_default()
    }

    #[test]
    fn the_rule_is_named() {
        let mut image = image_with_firewall();
        assert_eq!(says(&image, "203.0.113.9:443"), "EgressFirewall prod/default spec.egress[3] (Deny)");
        assert_eq!(says(&image, "198.51.100.9:443"), "EgressFirewall prod/default spec.egress[0] (Allow)");
        assert_eq!(says(&image, "192.0.2.11:443"), "EgressFirewall prod/default spec.egress[3] (Deny)");
        assert_eq!(says(&image, "192.0.2.11:53"), "allowed whatever EgressFirewalls say: DNS of a node");
        assert_eq!(says(&image, "192.0.2.11:30080"), "", "a NodePort's pods are judged, not it");
        assert_eq!(says(&image, "10.1.0.77:80"), "", "no rule is for pods");
        image.rulesets.clear();
        assert_eq!(
            says(&image, "203.0.113.9:443"),
            "EgressFirewall prod/default is refused, or not in force on this node yet: denied"
        );
        image.firewalls.insert(4, 0);
        assert_eq!(
            says(&image, "203.0.113.9:443"),
            "EgressFirewall prod/default has no rule for it: allowed"
        );
    }

    #[test]
    fn the_name_is_named_while_its_address_counts() {
        let image = image_with_firewall();
        let learnt = |until: u32| {
            move |key: &LearntKey| {
                assert_eq!((key.firewall, key.ip), (4, Ip::v4([203, 0, 113, 9])));
                let mut learnt = Learnt::default();
                learnt.names[3] = datapath::names::word(9, until);
                Ok(Some(learnt))
            }
        };
        let of = |until| {
            let destination = "203.0.113.9:443".parse().unwrap();
            let walk = walk(&image, "prod/try", destination, Protocol::Tcp, 100, &learnt(until)).unwrap();
            walk.firewall.unwrap()
        };
        let decision = of(200);
        assert_eq!(
            decision.says,
            "EgressFirewall prod/default spec.egress[2] (Allow), by the name *.example.test"
        );
        assert_eq!((decision.allowed, decision.name.as_deref()), (true, Some("*.example.test")));
        let json = serde_json::to_value(&decision).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "namespace": "prod", "allowed": true, "rule": "spec.egress[2]", "name": "*.example.test"
            })
        );
        assert_eq!(of(99).rule.as_deref(), Some("spec.egress[3]"), "it has been forgotten");
    }
}

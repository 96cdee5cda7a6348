//! Packets of pods with a firewall, walked through the decisions of a node in memory.

#![expect(clippy::wildcard_enum_match_arm, reason = "what is not the verdict looked for fails the test")]

use std::vec::Vec;

use crate::addr::Ip;
use crate::conntrack::seconds;
use crate::fragments::{Place, recall};
use crate::keys::{
    DenialKey, FlowKey, FlowPath, LearntKey, NameRuleKey, NetworkKey, NetworkKind, Offload, PodId,
    RESOLVER_ON_NODE, RuleCount, RuleCountKey, Ruleset, Winner,
};
use crate::limits::NAME_GRACE_SECONDS;
use crate::memory::Memory;
use crate::names::word;
use crate::packet::{ACK, Kind, Packet, Part, SYN, TCP, UDP};
use crate::rules_build::Span;
use crate::sweep::sweep;
use crate::tables::Tables as _;
use crate::to_pod::to_pod;
use crate::verdict::{DropReason, FromPod, HostStack, ToUplink};
use crate::walk_tests::{
    A, B, NODE_A, NODE_B, OTHER_IF, OTHER_POD, POD, POD_IF, REMOTE_POD, SERVER, SERVER_2, SERVICE, UPLINK,
    from_pod, node, packet, tcp, to_uplink, translated, udp,
};

/// `OTHER_POD`'s and `POD`'s firewall, and its first version.
const FIREWALL: u32 = 1;
const FIRST: u32 = 1;
const SECOND: u32 = 2;
/// The first rule allows, the second denies.
const ALLOW: u32 = 1;
const DENY: u32 = 2;
const METADATA: Ip = Ip::v4([169, 254, 169, 254]);
const DENIED: FromPod = FromPod::Drop(DropReason::FirewallDenied);
const DENIED_OUT: ToUplink = ToUplink::Drop(DropReason::FirewallDenied);

/// A version that allows `allowed` and denies all else.
fn version(t: &mut Memory, id: u32, allowed: &[Ip]) {
    let parts = Ruleset::ADDRESSES;
    let ruleset = Ruleset { firewall: FIREWALL, parts, rules: 2, ..Ruleset::default() };
    let mut allowed: Vec<_> = allowed.iter().map(|ip| u32::from_be_bytes(ip.v4_octets())).collect();
    allowed.sort_unstable();
    let span = |last, winner| Span { class: 0, last, winner };
    let mut spans: Vec<_> =
        allowed.into_iter().flat_map(|ip| [span(ip - 1, DENY), span(ip, ALLOW)]).collect();
    spans.push(span(u32::MAX, DENY));
    t.put_rules(id, ruleset, (&spans, &[], &[]));
}

/// Both pods have a firewall that allows `SERVER` only; `POD` has an EgressIP, too. `NODE_A` is this node's address.
fn walled() -> Memory {
    let mut t = node(A, B);
    t.networks.insert(NetworkKey { prefix_len: 128, ip: NODE_A }, NetworkKind::OwnNode as u32);
    version(&mut t, FIRST, &[SERVER]);
    t.firewalls.insert(FIREWALL, FIRST);
    for pod in t.pods.values_mut() {
        pod.firewall = FIREWALL;
    }
    for ifindex in [POD_IF, OTHER_IF] {
        t.interfaces.get_mut(&ifindex).unwrap().guarded = crate::keys::Guard::Own as u8;
    }
    t
}

/// The interface of a source.
fn port(sent: &Packet) -> u32 {
    if sent.tuple.source == POD { POD_IF } else { OTHER_IF }
}

/// From the pod, through the host's stack, to the uplink.
fn walk(t: &Memory, sent: &Packet, at_uplink: &Packet) -> ToUplink {
    match from_pod(t, port(sent), sent) {
        FromPod::Identify(token, _) => to_uplink(t, UPLINK, port(sent), token, at_uplink),
        other => panic!("no token for {sent:?}: {other:?}"),
    }
}

/// What becomes of the same packet at both programs.
fn out(t: &Memory, sent: &Packet) -> ToUplink {
    walk(t, sent, sent)
}

fn count(t: &Memory, ruleset: u32, rule: u32) -> (u64, u64) {
    let counts = t.rule_counts.borrow();
    let RuleCount { hits, bytes } = counts.get(&RuleCountKey { ruleset, rule }).copied().unwrap_or_default();
    (hits, bytes)
}

fn denials(t: &Memory, pod: PodId, remote: Ip, remote_port: u16, protocol: u8) -> u32 {
    let key = DenialKey { pod, remote, remote_port, protocol, pad: 0 };
    t.denials.borrow().get(&key).map_or(0, |denial| denial.packets)
}

fn other(to: Ip, flags: u8) -> Packet {
    tcp((OTHER_POD, 40000), (to, 443), flags)
}

fn selected(to: Ip, flags: u8) -> Packet {
    tcp((POD, 40000), (to, 443), flags)
}

#[test]
fn a_pod_without_an_egress_ip_is_judged_at_the_uplink_and_keeps_its_address() {
    let t = walled();
    assert_eq!(out(&t, &other(SERVER, SYN)), ToUplink::Pass);
    assert_eq!(out(&t, &other(SERVER_2, SYN)), DENIED_OUT);
    assert!(t.replies.borrow().is_empty(), "nothing is translated");
    assert_eq!(t.flows.borrow().len(), 1);
    // The rest of the connection passes at once; what the rules denied is denied again.
    assert_eq!(from_pod(&t, OTHER_IF, &other(SERVER, ACK)), FromPod::Pass);
    assert_eq!(to_uplink(&t, UPLINK, OTHER_IF, t.settings.pass_token, &other(SERVER, ACK)), ToUplink::Pass);
    assert_eq!(out(&t, &other(SERVER_2, ACK)), DENIED_OUT);
    assert_eq!(count(&t, FIRST, ALLOW), (0, 0), "its flow lives");
    assert_eq!(count(&t, FIRST, DENY), (2, 120));
    assert_eq!(denials(&t, 2, SERVER_2, 443, TCP), 2);
    // It opens anew: the host's netfilter sees it.
    assert_eq!(out(&t, &other(SERVER, SYN)), ToUplink::Pass);
}

#[test]
fn what_has_no_ports_is_judged_too() {
    let t = walled();
    for kind in
        [Kind::Other, Kind::OtherIcmp, Kind::EchoReply, Kind::EchoRequest, Kind::Sctp, Kind::IcmpError]
    {
        let of = |to| packet(kind, (OTHER_POD, kind as u16), (to, 0), 0);
        assert_eq!(out(&t, &of(SERVER)), ToUplink::Pass, "{kind:?}");
        assert_eq!(out(&t, &of(SERVER_2)), DENIED_OUT, "{kind:?}");
    }
    assert!(
        t.flows.borrow().keys().all(|key| key.protocol != UDP),
        "an error is no part of the flow that it is about"
    );
    // A fragment's beginning that does not tell its ports, which later ones would bring.
    let malformed = packet(Kind::Malformed, (OTHER_POD, 0), (SERVER, 0), 0);
    assert_eq!(out(&t, &malformed), ToUplink::Drop(DropReason::Malformed));
    let at_node = packet(Kind::Malformed, (OTHER_POD, 0), (NODE_A, 0), 0);
    assert_eq!(from_pod(&t, OTHER_IF, &at_node), FromPod::Drop(DropReason::Malformed));
    // Time to live, options and size are the host's stack's.
    let mut whole = other(SERVER, SYN);
    (whole.ttl, whole.options, whole.wire_len) = (1, true, 9000);
    assert!(matches!(from_pod(&t, OTHER_IF, &whole), FromPod::Identify(_, HostStack::Required)));
}

#[test]
fn inside_the_cluster_no_rule_speaks() {
    let t = walled();
    for pod in [POD, OTHER_POD] {
        let to = |ip| udp((pod, 5000), (ip, 8080));
        for inside in [REMOTE_POD, Ip::v4([224, 0, 0, 251]), Ip::v4([255; 4])] {
            assert_eq!(from_pod(&t, port(&to(inside)), &to(inside)), FromPod::Unmarked, "{inside}");
        }
        // A service is judged by where it leads to.
        for (reached, verdict) in [(REMOTE_POD, ToUplink::Pass), (SERVER_2, DENIED_OUT), (NODE_B, DENIED_OUT)]
        {
            assert_eq!(walk(&t, &to(SERVICE), &to(reached)), verdict, "{reached}");
        }
    }
    assert!(t.flows.borrow().is_empty());
}

#[test]
fn nodes_and_link_local_addresses_are_judged() {
    let mut t = walled();
    for pod in [POD, OTHER_POD] {
        for to in [NODE_B, METADATA] {
            assert_eq!(out(&t, &tcp((pod, 40000), (to, 80), SYN)), DENIED_OUT, "{to}");
            assert_eq!(out(&t, &packet(Kind::Other, (pod, 0), (to, 0), 0)), DENIED_OUT, "{to}");
        }
    }
    version(&mut t, FIRST, &[NODE_B, METADATA]);
    for pod in [POD, OTHER_POD] {
        for to in [NODE_B, METADATA] {
            assert_eq!(out(&t, &tcp((pod, 40000), (to, 80), SYN)), ToUplink::Pass, "{to}");
        }
    }
    assert!(t.flows.borrow().values().all(|flow| flow.egress == 0));
    let later = tcp((POD, 40000), (NODE_B, 80), ACK);
    assert_eq!(
        out(&t, &later),
        ToUplink::Pass,
        "a selected pod's goes through the stack, to be looked at again"
    );
    let packets =
        t.flows.borrow().iter().find(|(key, _)| key.pod == 1 && key.remote == NODE_B).unwrap().1.packets;
    assert_eq!(packets, 2, "each counted once");
    // Without a firewall they are as they were.
    t.pods.get_mut(&POD).unwrap().firewall = 0;
    let to_link = udp((POD, 1), (METADATA, 80));
    assert_eq!(from_pod(&t, POD_IF, &to_link), FromPod::Unmarked);
}

#[test]
fn the_pods_own_node_is_judged_where_it_is_still_seen() {
    let mut t = walled();
    let to = |port| other_to(NODE_A, port);
    assert_eq!(from_pod(&t, OTHER_IF, &to(22)), DENIED);
    assert_eq!(denials(&t, 2, NODE_A, 22, TCP), 1);
    assert!(matches!(from_pod(&t, OTHER_IF, &to(30_080)), FromPod::Identify(..)), "it leads to pods");
    // A resolver there is asked whatever the rules say.
    t.resolvers.insert(NODE_A, RESOLVER_ON_NODE);
    assert!(matches!(from_pod(&t, OTHER_IF, &to(53)), FromPod::Identify(..)));
    assert_eq!(from_pod(&t, OTHER_IF, &to(22)), DENIED);
    // Each packet of an allowed connection is counted, the connection once.
    version(&mut t, FIRST, &[NODE_A]);
    for flags in [SYN, ACK, ACK] {
        let packet = tcp((OTHER_POD, 40000), (NODE_A, 22), flags);
        assert!(matches!(from_pod(&t, OTHER_IF, &packet), FromPod::Identify(..)));
    }
    assert_eq!(count(&t, FIRST, ALLOW), (1, 180));
}

fn other_to(ip: Ip, port: u16) -> Packet {
    tcp((OTHER_POD, 40000), (ip, port), SYN)
}

#[test]
fn the_firewall_speaks_before_address_and_port() {
    let mut t = walled();
    assert_eq!(out(&t, &selected(SERVER_2, SYN)), DENIED_OUT);
    assert!(t.flows.borrow().is_empty() && t.replies.borrow().is_empty());
    assert_eq!(out(&t, &selected(SERVER_2, ACK)), DENIED_OUT, "not answered as one of no flow");
    let snat = translated(out(&t, &selected(SERVER, SYN)));
    let flow = *t.flows.borrow().values().next().unwrap();
    assert_eq!((flow.ruleset, flow.rule, flow.name), (FIRST, ALLOW, 0));
    assert_eq!(from_pod(&t, POD_IF, &selected(SERVER, ACK)), FromPod::Translate(snat));
    assert_eq!(count(&t, FIRST, ALLOW), (0, 0));
    // A service that leads outside: the host's path, judged where it leads to.
    let sent = tcp((POD, 40001), (SERVICE, 80), SYN);
    let at = |ip| tcp((NODE_A, 61000), (ip, 443), SYN);
    assert_eq!(walk(&t, &sent, &at(SERVER_2)), DENIED_OUT);
    translated(walk(&t, &sent, &at(SERVER)));
    // The last that is to be denied is the first to be.
    t.settings.reject = 1;
    assert_eq!(out(&t, &selected(SERVER_2, SYN)), ToUplink::Reject);
}

#[test]
fn without_rules_nothing_goes() {
    let mut t = walled();
    t.settings.reject = 1;
    t.rulesets.get_mut(&FIRST).unwrap().parts = Ruleset::REFUSED;
    let not_ready = ToUplink::Drop(DropReason::FirewallNotReady);
    assert_eq!(out(&t, &selected(SERVER, SYN)), not_ready);
    assert_eq!(out(&t, &other(SERVER, SYN)), not_ready, "and nobody is told");
    t.rulesets.clear();
    assert_eq!(out(&t, &other(SERVER, SYN)), not_ready);
    assert_eq!(from_pod(&t, OTHER_IF, &other_to(NODE_A, 22)), FromPod::Drop(DropReason::FirewallNotReady));
    assert_eq!(denials(&t, 2, SERVER, 443, TCP), 2);
    assert!(t.rule_counts.borrow().is_empty(), "no rule has decided that");
}

/// Puts a second version in force that allows `allowed` only.
fn replaced(t: &mut Memory, allowed: &[Ip]) {
    version(t, SECOND, allowed);
    t.firewalls.insert(FIREWALL, SECOND);
}

#[test]
fn a_live_flow_that_a_new_version_allows_goes_on() {
    let mut t = walled();
    let snat = translated(out(&t, &selected(SERVER, SYN)));
    assert_eq!(out(&t, &other(SERVER, SYN)), ToUplink::Pass);
    replaced(&mut t, &[SERVER, SERVER_2]);
    assert_eq!(from_pod(&t, POD_IF, &selected(SERVER, ACK)), FromPod::Translate(snat));
    assert_eq!(from_pod(&t, OTHER_IF, &other(SERVER, ACK)), FromPod::Pass);
    assert!(t.flows.borrow().values().all(|flow| flow.ruleset == SECOND && flow.rule == ALLOW));
    assert_eq!(count(&t, SECOND, ALLOW), (0, 0), "they live");
    let rulesets = core::mem::take(&mut t.rulesets);
    assert_eq!(
        from_pod(&t, POD_IF, &selected(SERVER, ACK)),
        FromPod::Translate(snat),
        "judged once a version"
    );
    t.rulesets = rulesets;
    // The firewall goes: its pods' flows do not.
    t.pods.get_mut(&POD).unwrap().firewall = 0;
    assert_eq!(from_pod(&t, POD_IF, &selected(SERVER, ACK)), FromPod::Translate(snat));
    assert_eq!(out(&t, &selected(SERVER, SYN)), ToUplink::Translate(snat));
}

#[test]
fn a_live_flow_that_a_new_version_denies_ends_with_its_next_packet() {
    for reject in [0, 1] {
        let mut t = walled();
        t.settings.reject = reject;
        translated(out(&t, &selected(SERVER, SYN)));
        assert_eq!(out(&t, &other(SERVER, SYN)), ToUplink::Pass);
        replaced(&mut t, &[SERVER_2]);
        let denied = if reject == 1 { FromPod::Reject } else { DENIED };
        assert_eq!(from_pod(&t, POD_IF, &selected(SERVER, ACK)), denied);
        assert_eq!(from_pod(&t, OTHER_IF, &other(SERVER, ACK)), denied);
        assert!(t.flows.borrow().is_empty() && t.replies.borrow().is_empty());
        assert_eq!(count(&t, FIRST, ALLOW), (2, 240), "the flows' bytes");
        assert_eq!(count(&t, SECOND, DENY), (2, 120));
        let next = if reject == 1 { ToUplink::Reject } else { DENIED_OUT };
        assert_eq!(out(&t, &selected(SERVER, ACK)), next, "a RST by no other way");
    }
}

#[test]
fn flows_on_the_hosts_path_are_judged_again_at_the_uplink() {
    let mut t = walled();
    t.settings.offload = Offload::Never as u8;
    for pod in [POD, OTHER_POD] {
        let at = |flags| tcp((pod, 40000), (SERVER, 443), flags);
        assert!(matches!(out(&t, &at(SYN)), ToUplink::Translate(_) | ToUplink::Pass));
        // Known, and not judged: nothing could be asked.
        let rulesets = core::mem::take(&mut t.rulesets);
        assert!(matches!(out(&t, &at(ACK)), ToUplink::Translate(_) | ToUplink::Pass));
        t.rulesets = rulesets;
    }
    assert!(t.flows.borrow().keys().all(|key| key.path == FlowPath::Host as u8));
    replaced(&mut t, &[SERVER]);
    for pod in [POD, OTHER_POD] {
        let ack = tcp((pod, 40000), (SERVER, 443), ACK);
        assert!(matches!(out(&t, &ack), ToUplink::Translate(_) | ToUplink::Pass));
    }
    assert!(t.flows.borrow().values().all(|flow| flow.ruleset == SECOND));
    version(&mut t, 3, &[]);
    t.firewalls.insert(FIREWALL, 3);
    for pod in [POD, OTHER_POD] {
        assert_eq!(out(&t, &tcp((pod, 40000), (SERVER, 443), ACK)), DENIED_OUT);
    }
    assert!(t.flows.borrow().is_empty() && t.replies.borrow().is_empty());
}

#[test]
fn connections_that_came_in_are_answered() {
    let t = walled();
    for client in [SERVER_2, NODE_A, NODE_B, METADATA] {
        to_pod(&t, &tcp((client, 3333), (OTHER_POD, 80), SYN));
        to_pod(&t, &udp((client, 3333), (OTHER_POD, 80)));
        assert_eq!(from_pod(&t, OTHER_IF, &tcp((OTHER_POD, 80), (client, 3333), SYN | ACK)), FromPod::Pass);
        assert_eq!(from_pod(&t, OTHER_IF, &udp((OTHER_POD, 80), (client, 3333))), FromPod::Pass);
        let error = packet(Kind::IcmpError, (OTHER_POD, 80), (client, 3333), 0);
        assert_eq!(from_pod(&t, OTHER_IF, &error), FromPod::Pass);
    }
    assert_eq!(out(&t, &tcp((OTHER_POD, 80), (SERVER_2, 3333), SYN)), DENIED_OUT, "its own opening");
}

#[test]
fn udp_that_was_let_go_is_judged_again_after_30_s() {
    let mut t = walled();
    let ask = udp((OTHER_POD, 5000), (SERVER, 123));
    assert_eq!(out(&t, &ask), ToUplink::Pass);
    t.now.set(seconds(29));
    assert_eq!(from_pod(&t, OTHER_IF, &ask), FromPod::Pass);
    t.now.set(seconds(31));
    assert_eq!(out(&t, &ask), ToUplink::Pass);
    assert_eq!(count(&t, FIRST, ALLOW), (0, 0), "it was known");
    t.now.set(seconds(31 + 301));
    assert_eq!(out(&t, &ask), ToUplink::Pass);
    assert_eq!(count(&t, FIRST, ALLOW), (1, 180), "forgotten with three packets");
    // Another object's flows are not its own.
    t.pods.get_mut(&OTHER_POD).unwrap().policy = 1;
    assert!(matches!(out(&t, &ask), ToUplink::Translate(_)), "and selected it is translated");
    assert_eq!(t.flows.borrow().values().filter(|flow| flow.egress == 0).count(), 0);
}

#[test]
fn what_was_let_go_to_a_node_is_translated_once_it_is_none() {
    let mut t = walled();
    version(&mut t, FIRST, &[NODE_B]);
    let ack = tcp((POD, 40000), (NODE_B, 443), SYN);
    assert_eq!(out(&t, &ack), ToUplink::Pass);
    t.networks.remove(&NetworkKey { prefix_len: 128, ip: NODE_B });
    let next = tcp((POD, 40000), (NODE_B, 443), ACK);
    assert_eq!(out(&t, &next), ToUplink::Reset, "not with the node's own address");
    translated(out(&t, &ack));
}

#[test]
fn no_room_for_a_flow_stops_no_packet_of_a_firewall_alone() {
    let mut t = walled();
    t.flow_capacity = 0;
    assert_eq!(out(&t, &other(SERVER, SYN)), ToUplink::Pass);
    assert_eq!(out(&t, &other(SERVER, ACK)), ToUplink::Pass, "judged again");
    assert_eq!(count(&t, FIRST, ALLOW), (2, 120), "no flow could tell");
    assert_eq!(out(&t, &selected(SERVER, SYN)), ToUplink::Full);
    assert_eq!(out(&t, &other(SERVER_2, ACK)), DENIED_OUT);
    assert!(t.flows.borrow().is_empty());
}

#[test]
fn a_lost_token_stops_what_a_firewall_is_for() {
    let mut t = walled();
    let lost = ToUplink::Drop(DropReason::TokenLost);
    for to in [SERVER, NODE_B, METADATA] {
        assert_eq!(to_uplink(&t, UPLINK, OTHER_IF, 0, &other(to, SYN)), lost, "{to}");
    }
    assert_eq!(to_uplink(&t, UPLINK, OTHER_IF, 0, &other(REMOTE_POD, SYN)), ToUplink::NotOurs);
    t.interfaces.get_mut(&OTHER_IF).unwrap().guarded = 0;
    assert_eq!(to_uplink(&t, UPLINK, OTHER_IF, 0, &other(SERVER, SYN)), lost, "by its address");
    assert_eq!(from_pod(&t, POD_IF, &other(SERVER, SYN)), FromPod::Drop(DropReason::SpoofedSource));
}

#[test]
fn fragments_go_the_way_of_their_first() {
    let t = walled();
    let parts = |to, id| {
        let first = Packet { part: Part::First, fragment_id: id, ..udp((OTHER_POD, 5000), (to, 123)) };
        let mut later = Packet { part: Part::Later, kind: Kind::Fragment, ..first };
        (later.tuple.source_port, later.tuple.destination_port) = (0, 0);
        (first, later)
    };
    let recalled = |place, packet: &Packet| {
        let mut packet = *packet;
        recall(&t, place, &mut packet);
        packet
    };
    for (to, id, verdict) in [(SERVER, 1, ToUplink::Pass), (SERVER_2, 2, DENIED_OUT)] {
        let (first, later) = parts(to, id);
        assert_eq!(out(&t, &first), verdict);
        assert_eq!(from_pod(&t, OTHER_IF, &recalled(Place::FromPod, &later)), FromPod::Unmarked);
        let behind = recalled(Place::ToUplink, &later);
        assert_eq!(to_uplink(&t, UPLINK, OTHER_IF, 0, &behind), verdict);
    }
    let (first, later) = parts(SERVER, 3);
    assert_eq!(from_pod(&t, OTHER_IF, &first), FromPod::Pass);
    assert_eq!(from_pod(&t, OTHER_IF, &recalled(Place::FromPod, &later)), FromPod::Pass);
    let (_, later) = parts(SERVER, 4);
    assert_eq!(from_pod(&t, OTHER_IF, &later), FromPod::Unmarked);
    assert_eq!(to_uplink(&t, UPLINK, OTHER_IF, 0, &later), ToUplink::Drop(DropReason::Fragment));
}

#[test]
fn questions_stay_where_their_answers_are_read() {
    let mut t = walled();
    t.resolvers.insert(SERVER, crate::keys::RESOLVER);
    let ask = udp((POD, 5000), (SERVER, 53));
    let FromPod::Identify(token, HostStack::Preferred) = from_pod(&t, POD_IF, &ask) else { panic!() };
    translated(to_uplink(&t, UPLINK, POD_IF, token, &ask));
    assert!(t.flows.borrow().keys().all(|key| key.path == FlowPath::Host as u8));
    assert!(matches!(from_pod(&t, POD_IF, &ask), FromPod::Identify(_, HostStack::Preferred)));
    let other_port = udp((POD, 5000), (SERVER, 123));
    assert!(matches!(from_pod(&t, POD_IF, &other_port), FromPod::Identify(_, HostStack::Usual)));
}

fn swept(t: &Memory, key: &FlowKey) -> bool {
    let mut flow = t.flows.borrow()[key];
    let gone = sweep(t, &t.settings, t.now(), false, key, &mut flow);
    if !gone {
        t.flows.borrow_mut().insert(*key, flow);
    }
    gone
}

#[test]
fn a_sweep_judges_flows_of_another_version() {
    let mut t = walled();
    translated(out(&t, &selected(SERVER, SYN)));
    out(&t, &other(SERVER, SYN));
    let keys: std::vec::Vec<FlowKey> = t.flows.borrow().keys().copied().collect();
    assert!(keys.iter().all(|key| !swept(&t, key)));
    replaced(&mut t, &[SERVER]);
    assert!(keys.iter().all(|key| !swept(&t, key)));
    assert!(t.flows.borrow().values().all(|flow| flow.ruleset == SECOND));
    assert_eq!(count(&t, SECOND, ALLOW), (0, 0));
    version(&mut t, 3, &[]);
    t.firewalls.insert(FIREWALL, 3);
    assert!(keys.iter().all(|key| swept(&t, key)));
    assert!(t.flows.borrow().is_empty() && t.replies.borrow().is_empty());
    assert_eq!(count(&t, SECOND, ALLOW), (2, 120), "the flows' bytes");
    // What is not translated goes with the firewall.
    t.firewalls.insert(FIREWALL, FIRST);
    out(&t, &other(SERVER, SYN));
    t.pods.get_mut(&OTHER_POD).unwrap().firewall = 0;
    let key = *t.flows.borrow().keys().next().unwrap();
    assert!(swept(&t, &key));
}

#[test]
fn a_live_flow_keeps_its_name() {
    let mut t = walled();
    version(&mut t, FIRST, &[]);
    t.rulesets.get_mut(&FIRST).unwrap().parts |= Ruleset::NAMES;
    t.name_rules.insert(NameRuleKey { ruleset: FIRST, name: 7, class: 0 }, Winner { order: ALLOW });
    let key = LearntKey { firewall: FIREWALL, ip: SERVER };
    t.credit(&key, 7, seconds(10));
    assert_eq!(out(&t, &other(SERVER, SYN)), ToUplink::Pass);
    let flow = *t.flows.borrow().keys().next().unwrap();
    assert_eq!(t.flows.borrow()[&flow].name, 7);
    let until = |t: &Memory| t.learnt.borrow()[&key].names[0];
    assert!(!swept(&t, &flow));
    assert_eq!(until(&t), word(7, seconds(NAME_GRACE_SECONDS)));
    // It is not made to last shorter.
    t.credit(&key, 7, seconds(5000));
    assert!(!swept(&t, &flow));
    assert_eq!(until(&t), word(7, seconds(5000)));
    t.now.set(seconds(400));
    t.learnt.borrow_mut().clear();
    assert!(swept(&t, &flow), "idle");
    assert!(t.learnt.borrow().is_empty());
}

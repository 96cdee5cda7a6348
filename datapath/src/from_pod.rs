//! A packet leaves a pod (TC ingress of the pod's interface): known flows are translated at once, the first
//! packet of a flow is given a token and goes up the host's stack. So is what the firewall has to judge; flows that it
//! has let go untranslated pass.

use crate::addr::Ip;
use crate::conntrack::{Ticks, expired, has_states, idle_time, older_than, pod_speaks, seconds};
use crate::firewall::{Judgement, ask, ask_again, has_ports};
use crate::fragments::{self, Fate, Place};
use crate::from_tunnel::is_for_a_tunnel;
use crate::keys::{
    EgressId, EgressIp, FlowKey, FlowPath, Guard, IfIndex, NetworkKind, OpenedBy, Opener, Pod, PodId,
    RulesetId, Settings, Token, Tuple,
};
use crate::limits::{NODE_PORTS, WALK_AGAIN_SECONDS};
use crate::names;
use crate::packet::{Kind, Packet, Part, UDP};
use crate::snat::way_out;
use crate::tables::{InsertError, Tables};
use crate::verdict::{Act, DropReason, FromPod, HostStack, Snat, Way};

/// Tries to find an unused token number before the packet is dropped: with a full table of 65,536 tokens one
/// try in 65,536 fails.
const TOKEN_TRIES: u32 = 4;

/// The flow key of a packet as the pod sent it.
#[inline(always)]
#[must_use]
pub const fn flow_key(pod: PodId, tuple: &Tuple, path: FlowPath) -> FlowKey {
    FlowKey {
        pod,
        remote: tuple.destination,
        local_port: tuple.source_port,
        remote_port: tuple.destination_port,
        protocol: tuple.protocol,
        path: path as u8,
        pad: 0,
    }
}

/// Decides on a packet that came in by the pod-facing interface `ifindex`.
#[expect(clippy::too_many_lines, reason = "one question after another, whose answers all that follows needs")]
#[inline(always)]
pub fn from_pod<T: Tables, A: Act<FromPod>>(t: &T, ifindex: IfIndex, packet: &Packet, to: &A) -> A::Done {
    let Some(settings) = t.settings() else { return to.act(FromPod::NotOurs) };
    // No pod speaks to a node's end of the tunnel, whoever it is.
    if is_for_a_tunnel(t, settings, packet) {
        return to.act(FromPod::Drop(DropReason::TunnelForged));
    }
    if names::is_forged(t, ifindex, packet) {
        return to.act(FromPod::Drop(DropReason::SpoofedSource));
    }
    let Some(pod) = t.pod(&packet.tuple.source) else {
        return from_unknown(t, settings, ifindex, &packet.tuple, to);
    };
    let elsewhere = pod.ifindex != ifindex && !is_port_of(t, ifindex, pod.ifindex);
    if !pod.is_ours() {
        // Through a selected pod's interface it is that pod, with another's address.
        if elsewhere && guard(t, ifindex) == Guard::Own as u8 {
            return to.act(FromPod::Drop(DropReason::SpoofedSource));
        }
        return not_selected(t, ifindex, to);
    }
    if elsewhere {
        return to.act(FromPod::Drop(DropReason::SpoofedSource));
    }
    if packet.part == Part::Later {
        match fragments::head(t, Place::FromPod, packet) {
            Some(head) if head.fate == Fate::Flow as u8 => {}
            Some(head) if head.fate == Fate::Pass as u8 => return to.act(FromPod::Pass),
            // Its first went up, or will: the host's stack puts them together, or `to_uplink` knows it.
            _ => return to.act(FromPod::Unmarked),
        }
    }
    let tuple = &packet.tuple;
    let key = flow_key(pod.id, tuple, FlowPath::Offloaded);
    // A pod that only a firewall is for keeps the node's path and address, whatever it sends.
    let translates = pod.policy != 0;
    let untranslatable = if translates { untranslatable(packet) } else { None };
    if translates && packet.kind == Kind::Malformed {
        return to.act(FromPod::Drop(DropReason::Malformed));
    }
    let now = t.now();
    let ruleset = t.ruleset_of(pod.firewall);
    if translates && packet.kind == Kind::IcmpError {
        // The host's stack answers no error with another (RFC 1122, 3.2.2).
        if packet.ttl <= 1 {
            return to.act(FromPod::Drop(DropReason::TtlExpired));
        }
        // The host's stack would have to look at options.
        if !packet.options
            && let Some((egress, source_port)) = flow_of_error(t, settings, now, &pod, ruleset, &key)
        {
            return match egress.map(|egress| (egress, way_out(t, settings, egress, 0))) {
                None => to.act(FromPod::Drop(DropReason::NoFlow)),
                Some((egress, Ok(way))) => {
                    to.act(FromPod::Translate(Snat { source: egress.ip, source_port, way }))
                }
                Some((_, Err(reason))) => to.act(FromPod::Drop(reason)),
            };
        }
    }
    let v6 = !tuple.source.is_v4();
    let too_big =
        translates && (packet.too_big_for(settings.mtu) || (v6 && packet.larger_than(settings.tunnel_max)));
    let in_flows = untranslatable.is_none() && !matches!(packet.kind, Kind::IcmpError | Kind::Malformed);
    if !too_big
        && in_flows
        && let Some((egress, source_port, judged)) =
            offloaded_flow(t, settings, now, &pod, ruleset, &key, packet)
        // A flow to a resolver may be offloaded from before the pod had a firewall.
        && (judged || !translates || !names::by_host(t, pod.firewall, tuple))
    {
        if !judged {
            let judgement = ask_again(t, ruleset, &key, packet);
            if !judgement.allows() {
                return refuse(settings, judgement, to);
            }
        }
        if !translates {
            fragments::remember(t, Place::FromPod, packet, Fate::Pass, None);
            return to.act(FromPod::Pass);
        }
        // An address that left the object makes the flow void, too.
        if let Some(egress) = t.egress_ip(egress).filter(|e| e.policy == pod.policy) {
            match way_out(t, settings, egress, 0) {
                // The host's stack fragments, or says so to the pod.
                Ok(Way::Uplink(_)) if packet.larger_than(egress.uplink_mtu) => {}
                Ok(Way::Tunnel(_)) if packet.larger_than(settings.uplink_mtu) => {}
                Ok(Way::Tunnel(_)) if packet.larger_than(settings.tunnel_max) => {
                    return to.act(FromPod::Drop(DropReason::TooBig));
                }
                Ok(way) => {
                    fragments::remember(t, Place::FromPod, packet, Fate::Flow, None);
                    return to.act(FromPod::Translate(Snat { source: egress.ip, source_port, way }));
                }
                Err(reason) => return to.act(FromPod::Drop(reason)),
            }
        }
    }
    if packet.part == Part::Later {
        return to.act(FromPod::Unmarked);
    }
    let network = t.network(&tuple.destination);
    let on_link = tuple.destination.stays_on_link();
    // The firewall is for some that stay on the link.
    let ruled = pod.firewall != 0 && tuple.destination.can_be_ruled();
    if network == NetworkKind::Pods as u32 || (on_link && !ruled) {
        fragments::remember(t, Place::FromPod, packet, Fate::Up, None);
        return to.act(FromPod::Unmarked);
    }
    // A node's address may stand for a client that netfilter masqueraded, or lead outside by a NodePort.
    if network != NetworkKind::Services as u32 && answers(t, settings, now, &key, packet) {
        fragments::remember(t, Place::FromPod, packet, Fate::Pass, None);
        return to.act(FromPod::Pass);
    }
    let outside = network == 0 && !on_link;
    if let Some(reason) = untranslatable {
        if outside {
            return to.act(FromPod::Drop(reason));
        }
        if !ruled {
            fragments::remember(t, Place::FromPod, packet, Fate::Up, None);
            return to.act(FromPod::Unmarked);
        }
    } else if too_big && outside {
        return to.act(FromPod::TooBig(settings.mtu));
    }
    // It reaches no uplink, unless the host's DNAT leads it to one.
    if ruled && network == NetworkKind::OwnNode as u32 && !is_node_port(tuple) {
        // What it is would be known behind the host's stack only, which puts fragments together.
        if packet.kind == Kind::Malformed {
            return to.act(FromPod::Drop(DropReason::Malformed));
        }
        let judgement = ask(t, ruleset, pod.id, packet, false);
        if !judgement.allows() {
            return refuse(settings, judgement, to);
        }
    }
    let stack = if !translates || on_link {
        HostStack::Required
    } else if names::by_host(t, pod.firewall, tuple) {
        HostStack::Preferred
    } else {
        HostStack::Usual
    };
    fragments::remember(t, Place::FromPod, packet, Fate::Up, None);
    identify(t, &pod, tuple, stack, to)
}

/// Why a selected pod's packet is not translated, if it is of no kind that is.
#[inline(always)]
const fn untranslatable(packet: &Packet) -> Option<DropReason> {
    match packet.kind {
        // Its checksum covers the whole datagram by a sum that needs its length.
        Kind::Sctp if !matches!(packet.part, Part::Whole) => Some(DropReason::Fragment),
        Kind::Tcp | Kind::Udp | Kind::Sctp | Kind::EchoRequest => None,
        Kind::EchoReply => Some(DropReason::NoFlow),
        Kind::IcmpError | Kind::OtherIcmp => Some(DropReason::IcmpType),
        Kind::Fragment | Kind::Other => Some(DropReason::Protocol),
        Kind::Malformed => Some(DropReason::Malformed),
    }
}

/// Whether a node's address and port lead to a service, whose pods no rule is for.
#[inline(always)]
const fn is_node_port(tuple: &Tuple) -> bool {
    let port = tuple.destination_port;
    has_ports(tuple.protocol) && port >= *NODE_PORTS.start() && port <= *NODE_PORTS.end()
}

/// A packet that the firewall denies.
#[inline(always)]
fn refuse<A: Act<FromPod>>(settings: &Settings, judgement: Judgement, to: &A) -> A::Done {
    to.act(if judgement.not_ready() {
        FromPod::Drop(DropReason::FirewallNotReady)
    } else if settings.reject != 0 {
        FromPod::Reject
    } else {
        FromPod::Drop(DropReason::FirewallDenied)
    })
}

/// The translation of the offloaded flow that a packet belongs to, address and port (0: the firewall has let it go as
/// it is), and whether the firewall's present version has judged it; `None` if there is none in force, or if it has to
/// walk the host's stack again.
#[inline(always)]
fn offloaded_flow<T: Tables>(
    t: &T,
    settings: &Settings,
    now: Ticks,
    pod: &Pod,
    ruleset: RulesetId,
    key: &FlowKey,
    packet: &Packet,
) -> Option<(EgressId, u16, bool)> {
    t.flow(key, |flow| {
        // A SYN may open a connection anew: the node's netfilter must see it (invariant 4).
        let opens = has_states(key.protocol) && packet.opens();
        let walks = !has_states(key.protocol) && older_than(now, flow.walked, seconds(WALK_AGAIN_SECONDS));
        // The host's stack answers a packet whose time to live ends here, and looks at options.
        let for_routers = pod.policy != 0 && (packet.ttl <= 1 || packet.options);
        // Only where it comes out is known whether it still stays untranslated.
        let untranslated = pod.policy != 0 && flow.egress == 0;
        if opens
            || walks
            || for_routers
            || untranslated
            || !pod_speaks(settings, now, flow, pod.policy, packet)
        {
            return None;
        }
        Some((flow.egress, flow.egress_port, flow.ruleset == ruleset))
    })?
}

/// The translation of the flow that a pod's ICMP error is about, if that is offloaded and the firewall lets it go;
/// without the address, where that has left the object. The error does not keep it alive (RFC 5508, REQ-10).
#[inline(always)]
fn flow_of_error<'t, T: Tables>(
    t: &'t T,
    settings: &Settings,
    now: Ticks,
    pod: &Pod,
    ruleset: RulesetId,
    key: &FlowKey,
) -> Option<(Option<&'t EgressIp>, u16)> {
    let (id, source_port) = t.flow(key, |flow| {
        let alive = flow.policy == pod.policy
            && flow.egress != 0
            && flow.ruleset == ruleset
            && !expired(settings, now, flow, key.protocol);
        alive.then_some((flow.egress, flow.egress_port))
    })??;
    Some((t.egress_ip(id).filter(|e| e.policy == pod.policy), source_port))
}

/// A packet whose source is no pod that we know.
#[inline(always)]
fn from_unknown<T: Tables, A: Act<FromPod>>(
    t: &T,
    settings: &Settings,
    ifindex: IfIndex,
    tuple: &Tuple,
    to: &A,
) -> A::Done {
    let own_of_selected = guard(t, ifindex) == Guard::Own as u8;
    let network = t.network(&tuple.source);
    if t.egress_id(&tuple.source).is_some()
        || NetworkKind::is_node(network)
        || (own_of_selected && !tuple.destination.stays_on_link())
    {
        return to.act(FromPod::Drop(DropReason::SpoofedSource));
    }
    if settings.hold_unknown != 0
        && network == NetworkKind::Pods as u32
        && !stays_inside(t, &tuple.destination)
    {
        return to.act(FromPod::Drop(DropReason::UnknownPod));
    }
    not_selected(t, ifindex, to)
}

/// A packet that is none of our business: untouched, unless the uplink wants a mark from all of a bridge.
#[inline(always)]
fn not_selected<T: Tables, A: Act<FromPod>>(t: &T, ifindex: IfIndex, to: &A) -> A::Done {
    to.act(if guard(t, ifindex) == Guard::None as u8 { FromPod::NotOurs } else { FromPod::Pass })
}

/// A [`Guard`].
#[inline(always)]
fn guard<T: Tables>(t: &T, ifindex: IfIndex) -> u8 {
    t.interface(ifindex).map_or(Guard::None as u8, |interface| interface.guarded)
}

/// Whether a destination is a pod or a node, or stays on the link. A service address does not tell: the
/// host's DNAT decides.
#[inline(always)]
fn stays_inside<T: Tables>(t: &T, destination: &Ip) -> bool {
    if destination.stays_on_link() {
        return true;
    }
    let network = t.network(destination);
    network == NetworkKind::Pods as u32 || NetworkKind::is_node(network)
}

/// Whether a packet answers a connection that came in. A UDP packet that answers none is noted as the pod's
/// own opening, so that its answers are not taken for openings when they come through the host's stack.
#[inline(always)]
fn answers<T: Tables>(t: &T, settings: &Settings, now: Ticks, key: &FlowKey, packet: &Packet) -> bool {
    if packet.kind != Kind::Udp {
        return !packet.opens() && opened_by_remote(t, settings, now, key);
    }
    let by = match t.opener(key) {
        Some(o) if !older_than(now, o.seen, idle_time(settings, 0, UDP)) => o.by,
        _ => OpenedBy::Pod as u8,
    };
    t.put_opener(key, &Opener { seen: now, by, pad: [0; 3] });
    by == OpenedBy::Remote as u8
}

/// Whether a connection is noted as opened from outside; keeps the note fresh.
#[inline(always)]
fn opened_by_remote<T: Tables>(t: &T, settings: &Settings, now: Ticks, key: &FlowKey) -> bool {
    let established = crate::conntrack::FlowState::Established as u8;
    let Some(opener) = t.opener(key) else { return false };
    if opener.by != OpenedBy::Remote as u8
        || older_than(now, opener.seen, idle_time(settings, established, key.protocol))
    {
        return false;
    }
    if opener.seen != now {
        t.put_opener(key, &Opener { seen: now, ..opener });
    }
    true
}

/// Keeps the packet's tuple under a fresh token.
#[inline(always)]
fn identify<T: Tables, A: Act<FromPod>>(
    t: &T,
    pod: &Pod,
    tuple: &Tuple,
    stack: HostStack,
    to: &A,
) -> A::Done {
    let token = Token { pod: pod.id, policy: pod.policy, firewall: pod.firewall, tuple: *tuple, direct: 0 };
    for _ in 0..TOKEN_TRIES {
        let hash = t.random() | 1; // an skb hash of 0 means "none"
        match t.insert_token(hash, &token) {
            Ok(()) => return to.act(FromPod::Identify(hash, stack)),
            Err(InsertError::Exists) => {}
            Err(InsertError::Full) => break,
        }
    }
    to.act(FromPod::Drop(DropReason::TokenTableFull))
}

#[inline(always)]
fn is_port_of<T: Tables>(t: &T, port: IfIndex, bridge: IfIndex) -> bool {
    bridge != 0 && t.interface(port).is_some_and(|i| i.bridge == bridge)
}

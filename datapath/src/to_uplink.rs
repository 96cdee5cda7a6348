//! A packet is about to leave the node (TC egress of an uplink), after the host's routing, DNAT and
//! masquerade: here new flows are decided, and what should not leave is stopped. The firewall judges here, for only
//! now the destination is what it will be.

use crate::conntrack::{FlowState, pod_speaks};
use crate::firewall::{self, Judgement};
use crate::fragments::{self, Fate, Place};
use crate::from_pod::flow_key;
use crate::from_tunnel::is_for_a_tunnel;
use crate::keys::{
    EgressId, EgressIp, Flow, FlowKey, FlowPath, IfIndex, InterfaceKind, Offload, Reply, ReplyKey, RulesetId,
    Settings, Token, Tuple, Unassigned,
};
use crate::limits::POD_FLOWS;
use crate::names;
use crate::packet::{Kind, Packet, Part, RST};
use crate::ports::claim_port;
use crate::snat::{choose_egress_ip, way_out};
use crate::tables::{InsertError, Tables};
use crate::verdict::{Act, DropReason, Snat, ToUplink, Way};

/// Decides on a packet about to leave by `uplink`, which came into the node by `ingress` (0: the node sends
/// it itself) and carries `hash` as its skb hash.
#[inline(always)]
pub fn to_uplink<T: Tables, A: Act<ToUplink>>(
    t: &T,
    uplink: IfIndex,
    ingress: IfIndex,
    hash: u32,
    packet: &Packet,
    to: &A,
) -> A::Done {
    // The node's own: its host processes, and the outer packets of tunnels, which lose their ingress
    // interface in encapsulation (skb_scrub_packet, net/core/skbuff.c).
    if ingress == 0 {
        return to.act(ToUplink::NotOurs);
    }
    let Some(settings) = t.settings() else { return to.act(ToUplink::NotOurs) };
    let tuple = &packet.tuple;
    if is_for_a_tunnel(t, settings, packet) {
        return to.act(ToUplink::Drop(DropReason::TunnelForged));
    }
    let Some(interface) = t.interface(ingress) else {
        // A pod may speak before its interface is known; by then its address may be masqueraded.
        let held = settings.hold_unknown != 0 && is_outside(t, tuple);
        return to.act(if held { ToUplink::Drop(DropReason::UnknownInterface) } else { ToUplink::NotOurs });
    };
    // Translated already: a program redirected it here, from a pod's interface or out of the tunnel. No pod may
    // send from an egress address (`from_pod`), and none that goes through a bridge has been redirected.
    if t.egress_id(&tuple.source).is_some() {
        let bridge = interface.kind == InterfaceKind::Bridge as u8;
        return to.act(if bridge { ToUplink::Drop(DropReason::SpoofedSource) } else { ToUplink::NotOurs });
    }
    // A token is believed from pods only: other packets chance upon hashes.
    if interface.kind != InterfaceKind::Pod as u8 && interface.kind != InterfaceKind::Bridge as u8 {
        return to.act(ToUplink::NotOurs);
    }
    if hash == settings.pass_token {
        return to.act(ToUplink::Pass);
    }
    let fragment = packet.part == Part::Later;
    let token = match t.take_token(hash) {
        None if fragment => fragments::head(t, Place::ToUplink, packet).map(|head| &head.token),
        token => token,
    };
    if let Some(token) = token {
        fragments::remember(t, Place::ToUplink, packet, Fate::Flow, Some(token));
        return decide(t, settings, uplink, token, packet, to);
    }
    let pod = t.pod(&tuple.source).unwrap_or_default();
    let network = t.network(&tuple.destination);
    let outside = network == 0 && !tuple.destination.stays_on_link();
    // From a pod with a firewall nothing that it is for comes without a token, but fragments whose first was not seen.
    let ruled = pod.firewall != 0 && firewall::is_for(network, tuple);
    if ruled || ((interface.guarded != 0 || pod.is_ours()) && outside) {
        let reason = if fragment { DropReason::Fragment } else { DropReason::TokenLost };
        return to.act(ToUplink::Drop(reason));
    }
    to.act(ToUplink::NotOurs)
}

/// Decides on a packet whose pod and original tuple are known, on its destination after the host's DNAT.
#[inline(always)]
fn decide<T: Tables, A: Act<ToUplink>>(
    t: &T,
    settings: &Settings,
    uplink: IfIndex,
    token: &Token,
    packet: &Packet,
    to: &A,
) -> A::Done {
    let tuple = &packet.tuple;
    let network = t.network(&tuple.destination);
    let outside = network == 0 && !tuple.destination.stays_on_link();
    let translates = outside && token.policy != 0;
    let ruled = token.firewall != 0 && firewall::is_for(network, tuple);
    if !translates && !ruled {
        return to.act(ToUplink::Pass);
    }
    match packet.kind {
        // A fragment does not tell the length that its checksum's correction needs.
        Kind::Sctp if translates && packet.part != Part::Whole => {
            return to.act(ToUplink::Drop(DropReason::Fragment));
        }
        // Without ports it cannot be judged; what its later fragments say of them would not be seen.
        Kind::Malformed => return to.act(ToUplink::Drop(DropReason::Malformed)),
        // A service that leads outside took them here.
        Kind::EchoReply | Kind::IcmpError | Kind::OtherIcmp if translates => {
            return to.act(ToUplink::Drop(DropReason::IcmpType));
        }
        Kind::Fragment | Kind::Other if translates => {
            return to.act(ToUplink::Drop(DropReason::Protocol));
        }
        Kind::Tcp
        | Kind::Udp
        | Kind::Sctp
        | Kind::EchoRequest
        | Kind::EchoReply
        | Kind::IcmpError
        | Kind::OtherIcmp
        | Kind::Fragment
        | Kind::Other => {}
    }
    let undisturbed = tuple.destination == token.tuple.destination
        && tuple.destination_port == token.tuple.destination_port;
    // A resolver's answers are read on the host's path, if there is one.
    let read = translates && ruled && token.direct == 0 && names::by_host(t, token.firewall, tuple);
    let key = if undisturbed && !read && settings.offload != Offload::Never as u8 {
        flow_key(token.pod, &token.tuple, FlowPath::Offloaded)
    } else {
        flow_key(token.pod, tuple, FlowPath::Host)
    };
    // An error is judged by the packet that it is about, and is no part of its flow.
    let kept = packet.kind != Kind::IcmpError;
    let known = if kept { t.known_flow(token, &key, packet, translates) } else { Known::NONE };
    let ruleset = t.ruleset_of(token.firewall);
    let judgement = if known.is_current() || (!known.is_some() && !ruled) {
        Judgement::NONE
    } else {
        firewall::ask(t, ruleset, token.pod, packet, kept)
    };
    if known.is_some() && !known.is_current() {
        t.settle(ruleset, &key, judgement);
    }
    if !judgement.allows() {
        return to.act(if judgement.not_ready() {
            ToUplink::Drop(DropReason::FirewallNotReady)
        } else if settings.reject != 0 {
            ToUplink::Reject
        } else {
            ToUplink::Drop(DropReason::FirewallDenied)
        });
    }
    if !translates {
        if kept && !known.is_some() {
            t.let_go(ruleset, &key, token.policy, packet.len, judgement);
        }
        return to.act(ToUplink::Pass);
    }
    let found = if known.is_some() {
        let egress = t.egress_ip(known.egress()).filter(|egress| egress.policy == token.policy);
        egress.map(|egress| (egress, known.port())).ok_or(New::Refused(DropReason::NoFlow))
    } else {
        first_packet(t, settings, token, &key, packet, (ruleset, judgement))
    };
    let way = match found {
        Ok((egress, port)) => {
            let here = if token.direct != 0 { 0 } else { uplink };
            way_out(t, settings, egress, here).map(|way| (egress, port, way))
        }
        Err(New::Refused(reason)) => Err(reason),
        Err(New::NodeIp) => {
            // It gets no flow that could count it.
            if judgement.by_rule() {
                t.note(ruleset, token.pod, packet, false, judgement.rule);
            }
            return to.act(ToUplink::Pass);
        }
    };
    match way {
        Ok((_, _, Way::Tunnel(_))) if packet.larger_than(settings.tunnel_max) => {
            to.act(ToUplink::Drop(DropReason::TooBig))
        }
        Ok((egress, source_port, way)) => {
            to.act(ToUplink::Translate(Snat { source: egress.ip, source_port, way }))
        }
        Err(DropReason::NoFlow) if packet.kind == Kind::Tcp && packet.part == Part::Whole => {
            to.act(if packet.tcp_flags & RST != 0 {
                ToUplink::Drop(DropReason::NoFlow)
            } else {
                ToUplink::Reset
            })
        }
        Err(DropReason::FlowTableFull) => to.act(ToUplink::Full),
        Err(reason) => to.act(ToUplink::Drop(reason)),
    }
}

/// Why a packet of no known flow is not translated.
enum New {
    /// Nobody holds an address, and the configuration lets it leave with the node's.
    NodeIp,
    /// Dropped.
    Refused(DropReason),
}

impl From<DropReason> for New {
    #[inline(always)]
    fn from(reason: DropReason) -> Self {
        Self::Refused(reason)
    }
}

/// Chooses an address and makes a flow, if the packet may open one.
#[inline(always)]
fn first_packet<'t, T: Tables>(
    t: &'t T,
    settings: &Settings,
    token: &Token,
    key: &FlowKey,
    packet: &Packet,
    judged: (RulesetId, Judgement),
) -> Result<(&'t EgressIp, u16), New> {
    let policy = t.policy(token.policy).ok_or(DropReason::NoOwner)?;
    let choice = choose_egress_ip(t, settings, policy, &token.tuple);
    if choice.best == 0 {
        let node_ip = settings.unassigned == Unassigned::NodeIp as u8;
        return Err(if node_ip { New::NodeIp } else { New::Refused(DropReason::NoOwner) });
    }
    if !packet.opens() {
        return Err(New::Refused(DropReason::NoFlow));
    }
    let mut id = choice.best;
    loop {
        match new_flow(t, settings, token, key, packet, id, judged) {
            // Another address of the object, when this one has no port for us.
            Err(DropReason::NoPortFree | DropReason::NoPortRange)
                if id != choice.second && choice.second != 0 =>
            {
                id = choice.second;
            }
            made => return Ok(made?),
        }
    }
}

/// A flow as [`known_flow`] finds it, in one word: a function of the kernel programs returns nothing larger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known(pub u64);

impl Known {
    /// There is none.
    pub const NONE: Self = Self(0);
    const SOME: u64 = 1 << 48;
    const CURRENT: u64 = 1 << 49;

    #[inline(always)]
    pub(crate) const fn new(egress: EgressId, port: u16, current: bool) -> Self {
        let current = if current { Self::CURRENT } else { 0 };
        Self(egress as u64 | (port as u64) << 32 | Self::SOME | current)
    }

    /// Whether there is one.
    #[inline(always)]
    #[must_use]
    pub const fn is_some(self) -> bool {
        self.0 & Self::SOME != 0
    }

    /// Whether the version of the rules that is in force has let it go.
    #[inline(always)]
    #[must_use]
    pub const fn is_current(self) -> bool {
        self.0 & Self::CURRENT != 0
    }

    /// Its egress address; 0: it is not translated.
    #[inline(always)]
    #[must_use]
    pub const fn egress(self) -> EgressId {
        self.0 as u32
    }

    /// Its port there.
    #[inline(always)]
    #[must_use]
    pub const fn port(self) -> u16 {
        (self.0 >> 32) as u16
    }
}

/// The flow this packet belongs to, if there is one and it is in force. These are flows on the host's path and
/// untranslated ones, and packets of an offloaded flow that were under way when it was made. A dead one is removed, as is a
/// translated one to where nothing is translated any more, and the reverse.
#[inline(always)]
pub fn known_flow<T: Tables>(
    t: &T,
    token: &Token,
    key: &FlowKey,
    packet: &Packet,
    translates: bool,
) -> Known {
    let Some(settings) = t.settings() else { return Known::NONE };
    let now = t.now();
    let found = t.flow(key, |flow| {
        let alive = (flow.egress != 0) == translates && pod_speaks(settings, now, flow, token.policy, packet);
        if alive {
            flow.walked = now;
        }
        (flow.egress, flow.egress_port, flow.ruleset, alive)
    });
    let Some((id, egress_port, ruleset, alive)) = found else { return Known::NONE };
    if alive && (id == 0 || t.egress_ip(id).is_some_and(|egress| egress.policy == token.policy)) {
        return Known::new(id, egress_port, ruleset == t.ruleset_of(token.firewall));
    }
    // Forward entry first: while it is there, its reply entry counts as alive.
    t.remove_flow(key);
    if id != 0 {
        t.remove_reply(&reply_key(id, egress_port, key));
    }
    Known::NONE
}

/// Makes a flow: the reply entry, which claims the port, then the forward entry; undone if that fails.
#[inline(always)]
fn new_flow<'t, T: Tables>(
    t: &'t T,
    settings: &Settings,
    token: &Token,
    key: &FlowKey,
    packet: &Packet,
    egress_id: EgressId,
    (ruleset, judgement): (RulesetId, Judgement),
) -> Result<(&'t EgressIp, u16), DropReason> {
    let egress = t.egress_ip(egress_id).filter(|e| e.policy == token.policy).ok_or(DropReason::NoOwner)?;
    if t.flows_of(token.pod) >= POD_FLOWS {
        return Err(DropReason::PodFlowLimit);
    }
    let now = t.now();
    let offloaded = key.path == FlowPath::Offloaded as u8;
    let reply = Reply {
        pod: token.pod,
        local_port: key.local_port,
        path: key.path,
        pad: 0,
        local: if offloaded { token.tuple.source } else { packet.tuple.source },
    };
    let mut flow = Flow {
        egress: egress_id,
        policy: token.policy,
        egress_port: 0,
        state: FlowState::Opening as u8,
        pad: 0,
        seen: now,
        walked: now,
        ruleset,
        packets: 1,
        bytes: u64::from(packet.len),
        rule: judgement.rule,
        name: judgement.name,
    };
    flow.egress_port = claim_port(t, settings, now, reply_key(egress_id, 0, key), &reply)?;
    match t.insert_flow(key, &flow) {
        Ok(()) => Ok((egress, flow.egress_port)),
        Err(error) => {
            t.remove_reply(&reply_key(egress_id, flow.egress_port, key));
            match error {
                // Another CPU made the same flow meanwhile: its address and port it is.
                InsertError::Exists => {
                    let made = t.flow(key, |made| (made.egress, made.egress_port));
                    let (id, port) = made.ok_or(DropReason::NoFlow)?;
                    let egress = t.egress_ip(id).filter(|e| e.policy == token.policy);
                    egress.map(|egress| (egress, port)).ok_or(DropReason::NoFlow)
                }
                InsertError::Full => Err(DropReason::FlowTableFull),
            }
        }
    }
}

#[inline(always)]
pub(crate) const fn reply_key(egress: EgressId, egress_port: u16, key: &FlowKey) -> ReplyKey {
    ReplyKey {
        egress,
        remote: key.remote,
        egress_port,
        remote_port: key.remote_port,
        protocol: key.protocol,
        pad: [0; 3],
    }
}

/// Whether a packet leaves the cluster. An untranslated service address stays in it.
#[inline(always)]
fn is_outside<T: Tables>(t: &T, tuple: &Tuple) -> bool {
    !tuple.destination.stays_on_link() && t.network(&tuple.destination) == 0
}

//! What is done with a packet: the outcome of each program's decision, and why packets are dropped.

use crate::addr::Ip;
use crate::keys::{Delivery, IfIndex};

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $value:literal,)+) => {
        /// Why a packet was dropped: index of `DROPS`, label of the metric and text of the command line.
        /// Append only: the numbers are kept in pinned maps across upgrades.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum DropReason { $($(#[doc = $doc])+ $name = $value,)+ }

        impl DropReason {
            /// Every reason, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The name, as metrics and the command line show it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// What it means, in a sentence: the text of its documentation.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

drop_reasons! {
    /// A header is missing, short or contradicts itself.
    Malformed = 0,
    /// The pod's interface may not send from this address.
    SpoofedSource = 1,
    /// An address of the cluster's pod networks that the agent has not programmed yet.
    UnknownPod = 2,
    /// A selected pod's packet whose protocol cannot be translated.
    Protocol = 3,
    /// A fragment whose datagram's first fragment was not seen, or of a protocol that cannot be translated so.
    Fragment = 4,
    /// An ICMP message of a selected pod that is neither echo request nor an answer, or one to an egress IP.
    IcmpType = 5,
    /// No node holds any of the pod's egress IPs.
    NoOwner = 6,
    /// This node has no port range of the egress IP.
    NoPortRange = 7,
    /// Every port that was tried is in use towards this destination.
    NoPortFree = 8,
    /// The flow table is full.
    FlowTableFull = 9,
    /// The token table is full of packets that are under way.
    TokenTableFull = 10,
    /// A selected pod's packet reached the uplink without the token that says whose it is.
    TokenLost = 11,
    /// A packet that opens nothing and belongs to no flow. TCP is answered with RST.
    NoFlow = 12,
    /// A packet to an egress IP that answers no flow.
    NoReplyFlow = 13,
    /// A packet to an egress IP's port that no node leases.
    NoRange = 14,
    /// The pod that a reply is for is gone, or not connected yet.
    PodGone = 15,
    /// There is no next hop to the destination.
    NoRoute = 16,
    /// A tunnelled packet from an address that is no node's, or with another VNI.
    UnknownTunnelPeer = 17,
    /// A tunnelled packet that its sender has no right to send.
    TunnelNotAllowed = 18,
    /// A packet to a node's tunnel port that this node forwarded: a pod's forgery.
    TunnelForged = 19,
    /// A tunnelled packet for an egress IP that none of this node's uplinks can carry.
    NotAGateway = 20,
    /// The kernel refused to rewrite or to redirect the packet.
    Rewrite = 21,
    /// The agent has not written the settings yet.
    NotReady = 22,
    /// The packet came into the node by an interface that the agent has not looked at yet: a new pod's.
    UnknownInterface = 23,
    /// A packet past the host's stack whose time to live ends here: a reply, or a pod's ICMP error.
    TtlExpired = 24,
    /// A packet that is larger than its way carries: its sender was told, or it is an error itself.
    TooBig = 25,
    /// The route to the destination leaves by an interface that is no uplink.
    NotAnUplink = 26,
    /// The pod has as many flows as one pod may.
    PodFlowLimit = 27,
    /// A rule of the namespace's EgressFirewall denies it.
    FirewallDenied = 28,
    /// The namespace's EgressFirewall is refused, or not in force on this node yet.
    FirewallNotReady = 29,
    /// A resolver's answer over TCP, dropped once so that its addresses are learnt first; it is sent again.
    AnswerHeld = 30,
}

/// Where a translated packet goes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// On, out of the uplink it is on already.
    Here,
    /// Out of this uplink, by its routes.
    Uplink(IfIndex),
    /// Through the tunnel to the node with this tunnel address.
    Tunnel(Ip),
}

/// A translation of an egress packet: its new source, and its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Snat {
    /// New source address.
    pub source: Ip,
    /// New source port (ICMP: identifier).
    pub source_port: u16,
    /// Where it goes.
    pub way: Way,
}

/// Whether a packet that has a token goes up the host's stack.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostStack {
    /// Unless the stack leads to no uplink, or the configuration says that there is nothing to honour in it.
    Usual = 0,
    /// If it has a way out: the answers come back through it to the pod, and are read there.
    Preferred = 1,
    /// Whatever it does: the packet keeps the node's own path.
    Required = 2,
}

/// Outcome at `from_pod`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FromPod {
    /// Not ours: the next program, untouched.
    NotOurs,
    /// Not to be translated wherever it goes: marked as seen, to the host's stack.
    Pass,
    /// Stays in the cluster: any mark is taken off, to the host's stack. Should netfilter send it outside
    /// all the same, the uplink finds no token and drops it.
    Unmarked,
    /// Of no known flow: this token into the skb's hash, to the host's stack, if that is wanted.
    Identify(u32, HostStack),
    /// Of a known flow.
    Translate(Snat),
    /// Too big for the way out: the pod is told the size that fits, in bytes.
    TooBig(u16),
    /// Denied by the firewall: answered with RST or an ICMP error, and counted as [`DropReason::FirewallDenied`].
    Reject,
    /// Dropped.
    Drop(DropReason),
}

/// Outcome at `to_uplink`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToUplink {
    /// Not ours: the next program, untouched.
    NotOurs,
    /// Ours, not to be translated: the mark is taken off.
    Pass,
    /// Translated.
    Translate(Snat),
    /// A TCP packet of no flow: answered with RST, and counted as [`DropReason::NoFlow`].
    Reset,
    /// A new flow finds the table full: dropped as [`DropReason::FlowTableFull`], unless a sweep makes room.
    Full,
    /// Denied by the firewall: answered with RST or an ICMP error, and counted as [`DropReason::FirewallDenied`].
    Reject,
    /// Dropped.
    Drop(DropReason),
}

/// A translation of a reply: its new destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReverseSnat {
    /// New destination address.
    pub destination: Ip,
    /// New destination port (ICMP: identifier).
    pub destination_port: u16,
}

/// Outcome at `from_uplink` and `from_tunnel`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FromOutside<'t> {
    /// Not ours: the next program, untouched.
    NotOurs,
    /// At the gateway, on its way out: by this uplink.
    Forward(IfIndex),
    /// A reply, to the node that leases its port, through the tunnel.
    Tunnel(Ip),
    /// A reply, to the pod, past the host's stack.
    Deliver(ReverseSnat, &'t Delivery),
    /// A reply that is too big for the tunnel: its sender is told the size that fits, in bytes.
    TooBig(u16),
    /// A reply, to the host's stack, which knows the connection.
    Host(ReverseSnat),
    /// Dropped.
    Drop(DropReason),
}

/// Acts on a verdict where it is reached.
///
/// Verdicts are handed over rather than returned: a returned one is merged over all the places it comes from,
/// LLVM fills in what a variant does not have with undefined registers, and the verifier refuses to see those
/// spilled ("R1 !`read_ok`", LLVM 22, kernel 6.18).
pub trait Act<V> {
    /// What acting gives: a TC action in the kernel, the verdict itself in tests.
    type Done;
    /// Acts.
    fn act(&self, verdict: V) -> Self::Done;
}

/// Keeps the verdict.
pub struct Keep;

impl<V> Act<V> for Keep {
    type Done = V;
    fn act(&self, verdict: V) -> V {
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions() {
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i, "{}", reason.name());
        }
    }
}

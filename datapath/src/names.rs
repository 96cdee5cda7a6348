//! Which addresses stand for which names: learnt from the answers that resolvers give to pods.

use crate::conntrack::{Ticks, older_than, seconds};
use crate::dns::{RECORDS, Read, Reader};
use crate::firewall::is_dns_port;
use crate::keys::{
    Asked, AskedKey, FirewallId, Held, IfIndex, Learnt, LearntKey, NameId, Pod, Ruleset, Tuple,
};
use crate::limits::{ASKED_SECONDS, HELD_SECONDS, NAME_GRACE_SECONDS, NAME_TTL_SECONDS};
use crate::packet::{Kind, Packet, Part};
use crate::tables::Tables;

/// Until when an address stands for a name that it was learnt for with this TTL, in seconds.
#[inline(always)]
#[must_use]
pub const fn until(now: Ticks, ttl: u32) -> Ticks {
    let ttl = if ttl > NAME_TTL_SECONDS { NAME_TTL_SECONDS } else { ttl };
    now.wrapping_add(seconds(ttl + NAME_GRACE_SECONDS))
}

/// A name's word in [`Learnt`].
#[inline(always)]
#[must_use]
pub const fn word(name: NameId, until: Ticks) -> u64 {
    (name as u64) << 32 | until as u64
}

/// Whether an address would live longer with `until` than it does by its word for the name.
#[inline(always)]
#[must_use]
pub const fn lives_longer(word: u64, until: Ticks) -> bool {
    until.wrapping_sub(word as Ticks).cast_signed() > 0
}

/// Where a name goes among those of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// It is there already.
    There(usize),
    /// Nobody's, or of a name that is past its time.
    Free(usize),
    /// Another's, that of all is to be forgotten first.
    Others(usize),
}

/// Chooses.
#[inline(always)]
#[must_use]
pub fn place_of(learnt: &Learnt, name: NameId, now: Ticks) -> Place {
    let mut free = None;
    let (mut oldest, mut least) = (0, u32::MAX);
    let mut i = 0;
    while i < learnt.names.len() {
        let word = learnt.names[i];
        let (held, until) = ((word >> 32) as NameId, word as Ticks);
        if held == name {
            return Place::There(i);
        }
        let left = until.wrapping_sub(now);
        if held == 0 || older_than(now, until, 0) {
            if free.is_none() {
                free = Some(i);
            }
        } else if left < least {
            (oldest, least) = (i, left);
        }
        i += 1;
    }
    match free {
        Some(i) => Place::Free(i),
        None => Place::Others(oldest),
    }
}

/// Whether a pod-facing interface sends in a resolver's name without being it: its answers would be believed.
#[inline(always)]
pub fn is_forged<T: Tables>(t: &T, ifindex: IfIndex, packet: &Packet) -> bool {
    let tuple = &packet.tuple;
    matches!(packet.kind, Kind::Udp | Kind::Tcp)
        && is_dns_port(tuple.source_port)
        && t.resolver(&tuple.source) != 0
        && !t.pod(&tuple.source).is_some_and(|pod| speaks_from(t, ifindex, &pod))
}

/// Whether a pod's packets come in by this interface.
#[inline(always)]
fn speaks_from<T: Tables>(t: &T, ifindex: IfIndex, pod: &Pod) -> bool {
    pod.ifindex == ifindex
        || (pod.ifindex != 0 && t.interface(ifindex).is_some_and(|port| port.bridge == pod.ifindex))
}

/// Whether a connection of a pod with this firewall stays on the host's path all its life: answers of resolvers have
/// to come by `to_pod`.
#[inline(always)]
pub fn by_host<T: Tables>(t: &T, firewall: FirewallId, tuple: &Tuple) -> bool {
    firewall != 0 && is_dns_port(tuple.destination_port) && t.resolver(&tuple.destination) != 0
}

/// Whether a packet of a pod may be a question.
#[inline(always)]
#[must_use]
pub fn may_ask(packet: &Packet) -> bool {
    packet.kind == Kind::Udp && packet.part != Part::Later && is_dns_port(packet.tuple.destination_port)
}

/// Notes a question with this id, if it is one that an answer is to be learnt of.
#[inline(always)]
pub fn asks<T: Tables>(t: &T, ifindex: IfIndex, tuple: &Tuple, id: u16) {
    let Some(pod) = t.pod(&tuple.source) else { return };
    if !by_host(t, pod.firewall, tuple) || !speaks_from(t, ifindex, &pod) {
        return;
    }
    let asked = Asked { resolver: tuple.destination, seen: t.now() };
    t.put_asked(&AskedKey { pod: pod.id, port: tuple.source_port, id }, &asked);
}

/// Whether a packet to a pod may be an answer.
#[inline(always)]
#[must_use]
pub fn may_answer(packet: &Packet) -> bool {
    matches!(packet.kind, Kind::Udp | Kind::Tcp)
        && packet.part != Part::Later
        && is_dns_port(packet.tuple.source_port)
}

/// The pod that a resolver's packet is for, if its firewall has names.
#[inline(always)]
pub fn learns<T: Tables>(t: &T, tuple: &Tuple) -> Option<Pod> {
    let pod = t.pod(&tuple.destination)?;
    if pod.firewall == 0 || t.resolver(&tuple.source) == 0 {
        return None;
    }
    let ruleset = t.ruleset(t.ruleset_of(pod.firewall))?;
    (ruleset.parts & Ruleset::NAMES != 0).then_some(pod)
}

/// What is done with an answer over UDP.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Learning {
    /// It passes as it is: what there was to learn is learnt.
    Pass = 0,
    /// It passes as it is, and nothing is learnt: nobody asked.
    Unasked = 1,
    /// It passes with "truncated" set: the pod asks again, over TCP.
    Truncate = 2,
}

/// Learns from the message in `reader`, which `resolver` sent to a pod's `port`. `whole`: all of it is there.
#[inline(always)]
pub fn learn<T: Tables>(
    t: &T,
    pod: &Pod,
    resolver: &crate::addr::Ip,
    port: u16,
    whole: bool,
    reader: &mut Reader,
) -> Learning {
    let now = t.now();
    match t.asked(&AskedKey { pod: pod.id, port, id: reader.id() }) {
        Some(asked)
            if asked.resolver == *resolver && !older_than(now, asked.seen, seconds(ASKED_SECONDS)) => {}
        _ => return Learning::Unasked,
    }
    match reader.question(t) {
        Read::Other => return Learning::Pass,
        Read::Unclear => return Learning::Truncate,
        Read::Clear => {}
    }
    (reader.exact.firewall, reader.parent.firewall) = (pod.firewall, pod.firewall);
    let names = [t.name(&reader.exact).unwrap_or(0), t.name(&reader.parent).unwrap_or(0)];
    if names == [0; 2] {
        return Learning::Pass;
    }
    if !whole || reader.answers(t) != Read::Clear {
        return Learning::Truncate;
    }
    let firewall = pod.firewall;
    t.repeat(2 * RECORDS as u32, |i| {
        if i >= 2 * reader.count {
            return true;
        }
        let found = &reader.found[(i >> 1) as usize & (RECORDS - 1)];
        let name = if i & 1 == 0 { names[0] } else { names[1] };
        if name != 0 {
            t.credit(&LearntKey { firewall, ip: found.ip }, name, until(now, found.ttl));
        }
        false
    });
    Learning::Pass
}

/// What is done with a segment of an answer over TCP.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holding {
    /// It passes: it was read.
    Pass = 0,
    /// It passes unread: the agent has had its time.
    Late = 1,
    /// It is dropped: the agent has it, or will.
    Drop = 2,
    /// It is given to the agent, and dropped.
    Copy = 3,
}

/// Decides on a segment with `payload` bytes from `seq` on. `connection`: how far its connection was read; `held`: what
/// is known of the segment itself.
#[inline(always)]
#[must_use]
pub fn hold(connection: Option<Held>, held: Option<Held>, now: Ticks, seq: u32, payload: u32) -> Holding {
    if let Some(connection) = connection
        && connection.read.wrapping_sub(seq.wrapping_add(payload)) < READ_BEHIND
    {
        return Holding::Pass;
    }
    let Some(held) = held else { return Holding::Copy };
    if held.read >= payload {
        Holding::Pass
    } else if older_than(now, held.since, seconds(HELD_SECONDS)) {
        Holding::Late
    } else if held.read != 0 {
        // Sent again with more behind it.
        Holding::Copy
    } else {
        Holding::Drop
    }
}

/// How far behind what was read a segment is believed to be of the same connection, in bytes.
const READ_BEHIND: u32 = 1 << 20;

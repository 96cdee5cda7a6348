//! Flow states and idle times: RFC 5382 (TCP), RFC 4787 (UDP), RFC 5508 (ICMP), RFC 7857 (updates).

use crate::keys::{Flow, PolicyId, Settings};
use crate::packet::{ACK, FIN, ICMP, ICMPV6, Packet, RST, SCTP, SYN, TCP};

/// Time since boot in units of 2^24 ns (16.8 ms), in 32 bits: wraps after 834 days, so times are compared by
/// their difference.
pub type Ticks = u32;

/// Nanoseconds since boot to ticks.
#[inline(always)]
#[must_use]
pub const fn ticks(nanoseconds: u64) -> Ticks {
    (nanoseconds >> 24) as u32
}

/// Seconds to ticks.
#[inline(always)]
#[must_use]
pub const fn seconds(seconds: u32) -> Ticks {
    ((seconds as u64 * 1_000_000_000) >> 24) as u32
}

/// Where a flow is in its life.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowState {
    /// The pod has spoken, nobody has answered.
    Opening = 1,
    /// Both have.
    Established = 2,
    /// TCP: the pod sent FIN.
    PodClosed = 3,
    /// TCP: the server sent FIN.
    ServerClosed = 4,
    /// TCP: both sent FIN, or one RST. The port rests.
    Closed = 5,
}

impl FlowState {
    /// From a map's byte; `None`: written by a version that knows more states.
    #[must_use]
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Opening,
            2 => Self::Established,
            3 => Self::PodClosed,
            4 => Self::ServerClosed,
            5 => Self::Closed,
            _ => return None,
        })
    }
}

/// Who sent a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sender {
    /// The pod.
    Pod,
    /// The outside.
    Server,
}

const OPENING: u8 = FlowState::Opening as u8;
const ESTABLISHED: u8 = FlowState::Established as u8;
const POD_CLOSED: u8 = FlowState::PodClosed as u8;
const SERVER_CLOSED: u8 = FlowState::ServerClosed as u8;
const CLOSED: u8 = FlowState::Closed as u8;

/// Whether a protocol's packets say that a connection opens and closes.
#[inline(always)]
#[must_use]
pub const fn has_states(protocol: u8) -> bool {
    matches!(protocol, TCP | SCTP)
}

/// The state after a packet.
///
/// SCTP's chunks come in TCP's words: INIT is SYN, ABORT and SHUTDOWN COMPLETE are RST (RFC 9260, 3.2).
///
/// RST is believed without its sequence number: it only shortens the idle time to the resting time, and data
/// that still flows keeps the flow alive.
#[inline(always)]
#[must_use]
pub const fn next_state(state: u8, sender: Sender, protocol: u8, tcp_flags: u8) -> u8 {
    let server = matches!(sender, Sender::Server);
    if !has_states(protocol) {
        return if server { ESTABLISHED } else { state };
    }
    if tcp_flags & RST != 0 {
        return CLOSED;
    }
    if tcp_flags & SYN != 0 {
        return match (server, tcp_flags & ACK != 0) {
            (false, false) => OPENING,
            (true, true) if state == OPENING => ESTABLISHED,
            _ => state,
        };
    }
    if tcp_flags & FIN != 0 {
        return match (state, server) {
            (POD_CLOSED, true) | (SERVER_CLOSED, false) | (CLOSED, _) => CLOSED,
            (_, true) => SERVER_CLOSED,
            (_, false) => POD_CLOSED,
        };
    }
    state
}

/// How long a flow may be idle, in ticks.
#[inline(always)]
#[must_use]
pub const fn idle_time(settings: &Settings, state: u8, protocol: u8) -> Ticks {
    seconds(match (protocol, state) {
        (TCP | SCTP, ESTABLISHED) => settings.tcp_established,
        (TCP | SCTP, CLOSED) => settings.rest,
        (TCP | SCTP, _) => settings.tcp_transitory,
        (ICMP | ICMPV6, _) => settings.icmp,
        _ => settings.udp,
    })
}

/// Whether something last seen at `seen` is idle for longer than `idle`. Clocks of two CPUs may differ by a
/// tick: a `seen` in the future is not old.
#[inline(always)]
#[must_use]
pub const fn older_than(now: Ticks, seen: Ticks, idle: Ticks) -> bool {
    let age = now.wrapping_sub(seen);
    age.cast_signed() >= 0 && age > idle
}

/// A flow's next packet from the pod, if the flow is in force: it belongs to the pod's present policy and is not
/// past its time. Returns whether it is.
#[inline(always)]
pub fn pod_speaks(
    settings: &Settings,
    now: Ticks,
    flow: &mut Flow,
    policy: PolicyId,
    packet: &Packet,
) -> bool {
    let protocol = packet.tuple.protocol;
    if flow.policy != policy || expired(settings, now, flow, protocol) {
        return false;
    }
    flow.state = next_state(flow.state, Sender::Pod, protocol, packet.tcp_flags);
    flow.seen = now;
    flow.packets = flow.packets.wrapping_add(1);
    flow.bytes = flow.bytes.wrapping_add(u64::from(packet.len));
    true
}

/// Whether a flow is past its time and counts as absent.
#[inline(always)]
#[must_use]
pub const fn expired(settings: &Settings, now: Ticks, flow: &Flow, protocol: u8) -> bool {
    older_than(now, flow.seen, idle_time(settings, flow.state, protocol))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::UDP;

    fn walk(steps: &[(Sender, u8)]) -> Option<FlowState> {
        let state = steps.iter().fold(OPENING, |s, (who, flags)| next_state(s, *who, TCP, *flags));
        FlowState::from_u8(state)
    }

    #[test]
    fn tcp_opens_and_closes() {
        use Sender::{Pod, Server};
        assert_eq!(walk(&[(Pod, SYN)]), Some(FlowState::Opening));
        assert_eq!(walk(&[(Pod, SYN), (Server, SYN | ACK)]), Some(FlowState::Established));
        let open = [(Pod, SYN), (Server, SYN | ACK), (Pod, ACK)];
        let then = |more: &[(Sender, u8)]| walk(&[&open[..], more].concat());
        assert_eq!(then(&[(Pod, FIN | ACK)]), Some(FlowState::PodClosed));
        assert_eq!(then(&[(Server, FIN | ACK)]), Some(FlowState::ServerClosed));
        assert_eq!(then(&[(Pod, FIN | ACK), (Pod, FIN | ACK)]), Some(FlowState::PodClosed), "retransmitted");
        assert_eq!(then(&[(Pod, FIN | ACK), (Server, FIN | ACK)]), Some(FlowState::Closed));
        assert_eq!(then(&[(Server, FIN | ACK), (Pod, FIN | ACK)]), Some(FlowState::Closed));
        assert_eq!(then(&[(Server, RST)]), Some(FlowState::Closed));
        assert_eq!(then(&[(Server, RST), (Pod, ACK)]), Some(FlowState::Closed), "data does not reopen");
        assert_eq!(then(&[(Server, RST), (Pod, SYN)]), Some(FlowState::Opening), "SYN does");
        assert_eq!(then(&[(Server, SYN)]), Some(FlowState::Established), "a stray SYN changes nothing");
    }

    #[test]
    fn udp_is_established_by_an_answer() {
        assert_eq!(next_state(OPENING, Sender::Pod, UDP, 0), OPENING);
        assert_eq!(next_state(OPENING, Sender::Server, UDP, 0), ESTABLISHED);
    }

    #[test]
    fn idle_times_by_state() {
        let s = Settings {
            tcp_established: 7440,
            tcp_transitory: 240,
            udp: 300,
            icmp: 60,
            rest: 65,
            ..Settings::default()
        };
        assert_eq!(idle_time(&s, ESTABLISHED, TCP), seconds(7440));
        assert_eq!(idle_time(&s, OPENING, TCP), seconds(240));
        assert_eq!(idle_time(&s, POD_CLOSED, TCP), seconds(240));
        assert_eq!(idle_time(&s, CLOSED, TCP), seconds(65));
        assert_eq!(idle_time(&s, OPENING, UDP), seconds(300));
        assert_eq!(idle_time(&s, ESTABLISHED, ICMP), seconds(60));
    }

    #[test]
    fn time_is_compared_across_the_wrap() {
        assert!(!older_than(100, 100, 0));
        assert!(older_than(102, 100, 1));
        assert!(older_than(5, u32::MAX - 5, 10));
        assert!(!older_than(4, u32::MAX - 5, 10));
        assert!(!older_than(100, 101, 0), "another CPU's clock runs ahead");
    }
}

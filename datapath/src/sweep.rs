//! Dead flows make room. Nobody depends on it happening soon: a dead flow counts as absent wherever it is met.

use crate::conntrack::{FlowState, Ticks, expired, older_than};
use crate::keys::{Flow, FlowKey, Settings, Swept};
use crate::tables::Tables;
use crate::to_uplink::reply_key;

/// How often its own length a sweep of a full table rests before the next.
const REST_TIMES: u32 = 4;

/// Whether a full table may be swept now. A sweep of 262,144 live flows takes 60 ms and frees nothing: it must not
/// be due again for the packet that has started it, nor for each that follows. So it takes a fifth of a CPU's time
/// at most, and rests for a tick at least.
#[inline(always)]
#[must_use]
pub const fn is_due(swept: &Swept, now: Ticks) -> bool {
    older_than(now, swept.when, swept.took.saturating_mul(REST_TIMES))
}

/// Removes a flow that is past its time, or whose pod, policy or address is gone. Where the table is full,
/// `full`, a closed one goes as well before its port has rested: nothing else is free. Returns whether it went.
#[inline(always)]
pub fn sweep<T: Tables>(
    t: &T,
    settings: &Settings,
    now: Ticks,
    full: bool,
    key: &FlowKey,
    flow: &Flow,
) -> bool {
    let closed = full && flow.state == FlowState::Closed as u8;
    if !closed && !expired(settings, now, flow, key.protocol) && belongs(t, key, flow) {
        return false;
    }
    // Forward entry first: while it is there, its reply entry counts as alive.
    t.remove_flow(key);
    t.remove_reply(&reply_key(flow.egress, flow.egress_port, key));
    true
}

/// Whether a flow's pod is there, is selected by the object that the flow was made for, and its address is that
/// object's.
#[inline(always)]
fn belongs<T: Tables>(t: &T, key: &FlowKey, flow: &Flow) -> bool {
    let Some(delivery) = t.delivery(key.pod) else { return false };
    let Some(pod) = t.pod(&delivery.ip) else { return false };
    pod.id == key.pod
        && pod.policy == flow.policy
        && t.egress_ip(flow.egress).is_some_and(|egress| egress.policy == flow.policy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Ip;
    use crate::conntrack::seconds;
    use crate::keys::{Delivery, EgressIp, Pod, Reply};
    use crate::memory::Memory;
    use crate::packet::{TCP, UDP};

    const KEY: FlowKey = FlowKey {
        pod: 1,
        remote: Ip::v4([203, 0, 113, 10]),
        local_port: 4000,
        remote_port: 80,
        protocol: UDP,
        path: 0,
        pad: 0,
    };

    fn tables() -> Memory {
        let mut t = Memory::new(1, 10);
        let ip = Ip::v4([10, 244, 1, 2]);
        t.settings = Settings { node: 1, udp: 300, rest: 65, ..Settings::default() };
        t.pods.insert(ip, Pod { id: 1, policy: 1, ..Pod::default() });
        t.delivery.insert(1, Delivery { ip, ..Delivery::default() });
        t.egress_ips.insert(1, EgressIp { policy: 1, ..EgressIp::default() });
        t
    }

    fn swept(t: &Memory, key: FlowKey, flow: Flow, full: bool) -> bool {
        let reply = reply_key(flow.egress, flow.egress_port, &key);
        t.insert_flow(&key, &flow).unwrap();
        t.insert_reply(&reply, &Reply::default()).unwrap();
        let swept = sweep(t, &t.settings, t.now(), full, &key, &flow);
        assert_eq!(t.flows.borrow_mut().remove(&key).is_none(), swept);
        assert_eq!(t.replies.borrow_mut().remove(&reply).is_none(), swept);
        swept
    }

    #[test]
    fn what_is_dead() {
        let state = FlowState::Opening as u8;
        let flow = Flow { egress: 1, policy: 1, egress_port: 1024, state, ..Flow::default() };
        assert!(!swept(&tables(), KEY, flow, true));
        let changed = |change: fn(&mut Memory)| {
            let mut t = tables();
            change(&mut t);
            swept(&t, KEY, flow, false)
        };
        assert!(changed(|t| t.delivery.clear()), "the pod is gone");
        assert!(changed(|t| t.pods.clear()), "so is its address");
        assert!(changed(|t| t.pods.values_mut().for_each(|pod| pod.id = 3)), "the address is another's");
        assert!(changed(|t| t.pods.values_mut().for_each(|pod| pod.policy = 2)), "another object selects it");
        assert!(changed(|t| t.egress_ips.clear()), "the egress IP is gone");
        assert!(changed(|t| t.egress_ips.values_mut().for_each(|e| e.policy = 2)), "it is another object's");
        assert!(changed(|t| t.now.set(seconds(302))), "idle for too long");
    }

    #[test]
    fn a_sweep_rests_for_four_times_its_length() {
        let swept = Swept { when: 100, took: 5, ..Swept::default() };
        assert!(!is_due(&swept, 100));
        assert!(!is_due(&swept, 120));
        assert!(is_due(&swept, 121));
        let started_by_the_agent = Swept { when: 100, ..Swept::default() };
        assert!(!is_due(&started_by_the_agent, 100));
        assert!(is_due(&started_by_the_agent, 101));
    }

    #[test]
    fn closed_flows_rest_unless_the_table_is_full() {
        let key = FlowKey { protocol: TCP, ..KEY };
        let flow = Flow { egress: 1, policy: 1, state: FlowState::Closed as u8, ..Flow::default() };
        assert!(!swept(&tables(), key, flow, false));
        assert!(swept(&tables(), key, flow, true));
        let t = tables();
        t.now.set(seconds(67));
        assert!(swept(&t, key, flow, false));
    }
}

//! Dead flows make room. Nobody depends on it happening soon: a dead flow counts as absent wherever it is met.

use crate::conntrack::{FlowState, Ticks, expired, older_than, seconds};
use crate::keys::{FirewallId, Flow, FlowKey, LearntKey, NameId, Pod, Settings, Swept, Tuple};
use crate::limits::{NAME_GRACE_SECONDS, NAMES_PER_ADDRESS};
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

/// Removes a flow that is past its time, whose pod, policy or address is gone, or that the firewall denies by now.
/// Where the table is full, `full`, a closed one goes as well before its port has rested: nothing else is free.
/// Returns whether it went. `flow` is the table's entry: one that is let go by another version of the rules than the
/// one before has it entered.
#[inline(always)]
pub fn sweep<T: Tables>(
    t: &T,
    settings: &Settings,
    now: Ticks,
    full: bool,
    key: &FlowKey,
    flow: &mut Flow,
) -> bool {
    let closed = full && flow.state == FlowState::Closed as u8;
    if !closed
        && !expired(settings, now, flow, key.protocol)
        && let Some(pod) = owner(t, key, flow)
        && may_go_on(t, pod.firewall, key, flow)
    {
        if flow.name != 0 {
            renew(t, now, pod.firewall, key, flow.name);
        }
        return false;
    }
    // Once the entry is gone, its memory may be another's.
    let (translated, reply) = (flow.egress != 0, reply_key(flow.egress, flow.egress_port, key));
    // Forward entry first: while it is there, its reply entry counts as alive.
    t.remove_flow(key);
    if translated {
        t.remove_reply(&reply);
    }
    true
}

/// A flow's pod, if that is there, is selected by the object that the flow was made for, and the flow's address is that
/// object's. What is not translated stands for a firewall's word, and goes with it.
#[inline(always)]
fn owner<T: Tables>(t: &T, key: &FlowKey, flow: &Flow) -> Option<Pod> {
    let delivery = t.delivery(key.pod)?;
    let pod = t.pod(&delivery.ip)?;
    let whole = match flow.egress {
        0 => pod.firewall != 0,
        egress => t.egress_ip(egress).is_some_and(|egress| egress.policy == flow.policy),
    };
    (pod.id == key.pod && pod.policy == flow.policy && whole).then_some(pod)
}

/// Whether the firewall's version in force lets a flow go that another one has let go.
#[inline(always)]
fn may_go_on<T: Tables>(t: &T, firewall: FirewallId, key: &FlowKey, flow: &mut Flow) -> bool {
    let id = t.ruleset_of(firewall);
    if flow.ruleset == id {
        return true;
    }
    let tuple = Tuple {
        destination: key.remote,
        destination_port: key.remote_port,
        protocol: key.protocol,
        ..Tuple::default()
    };
    let judgement = t.judge(id, &tuple);
    if !judgement.allows() {
        return false;
    }
    (flow.ruleset, flow.rule, flow.name) = (id, judgement.rule, judgement.name);
    true
}

/// Lets the address of a live flow stand for its name for a while yet.
#[inline(always)]
fn renew<T: Tables>(t: &T, now: Ticks, firewall: FirewallId, key: &FlowKey, name: NameId) {
    let key = LearntKey { firewall, ip: key.remote };
    let until = now.wrapping_add(seconds(NAME_GRACE_SECONDS));
    let mut lasts = false;
    if let Some(learnt) = t.learnt(&key) {
        t.repeat(NAMES_PER_ADDRESS as u32, |i| {
            let Some(word) = learnt.names.get(i as usize).copied() else { return true };
            lasts = (word >> 32) as NameId == name && !older_than(until, word as Ticks, 0);
            lasts
        });
    }
    if !lasts {
        t.credit(&key, name, until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Ip;
    use crate::keys::{Delivery, EgressIp, Reply};
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
        let swept = sweep(t, &t.settings, t.now(), full, &key, &mut flow.clone());
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

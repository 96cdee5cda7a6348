//! A packet reaches a pod through the host's stack (TC egress of the pod's interface): connections that come
//! in are noted, so that the pod's answers are not taken for egress.

use crate::conntrack::{idle_time, older_than};
use crate::keys::{FlowKey, NetworkKind, OpenedBy, Opener};
use crate::packet::{Kind, Packet, UDP};
use crate::tables::Tables;

/// Notes the connection that a packet opens, if it does. TCP is noted for every pod of ours, so that
/// connections outlive the pod's selection; what a single packet does not tell (UDP, echo) for pods that are ours.
#[inline(always)]
pub fn to_pod<T: Tables>(t: &T, packet: &Packet) {
    let tuple = &packet.tuple;
    if !packet.opens() || !tuple.source.can_be_ruled() {
        return;
    }
    let Some(settings) = t.settings() else { return };
    let Some(pod) = t.pod(&tuple.destination) else { return };
    // Pods and services of the cluster need no note. A node's address does: it may be a client's that
    // netfilter masqueraded, and the answer then leaves for that client.
    let network = t.network(&tuple.source);
    if (!pod.is_ours() && packet.kind != Kind::Tcp) || (network != 0 && !NetworkKind::is_node(network)) {
        return;
    }
    let key = FlowKey {
        pod: pod.id,
        remote: tuple.source,
        local_port: tuple.destination_port,
        remote_port: tuple.source_port,
        protocol: tuple.protocol,
        path: 0,
        pad: 0,
    };
    let now = t.now();
    if packet.kind == Kind::Udp
        && let Some(opener) = t.opener(&key)
        && opener.by == OpenedBy::Pod as u8
        && !older_than(now, opener.seen, idle_time(settings, 0, UDP))
    {
        return; // an answer to the pod
    }
    t.put_opener(&key, &Opener { seen: now, by: OpenedBy::Remote as u8, pad: [0; 3] });
}

//! In which order `INTERFACES` changes.

use std::collections::BTreeMap;

use datapath::keys::{Guard, IfIndex, Interface, InterfaceKind};

/// What is new or has changed, in the order in which it is to be written. A guarded bridge's packets need marks
/// (`datapath/src/to_uplink.rs`), which `from_pod` gives at its guarded ports: so these become guarded before it, and are
/// so until it no longer is. Else the packets of its unselected pods would be lost in between.
pub(super) fn changes(
    old: &BTreeMap<IfIndex, Interface>,
    new: &BTreeMap<IfIndex, Interface>,
) -> Vec<(IfIndex, Interface)> {
    let mut changed: Vec<_> =
        new.iter().filter(|(i, value)| old.get(i) != Some(value)).map(|(i, value)| (*i, *value)).collect();
    changed.sort_by_key(|(_, interface)| match interface.kind == InterfaceKind::Pod as u8 {
        true if interface.guarded != Guard::None as u8 => 0,
        false => 1,
        true => 2,
    });
    changed
}

#[cfg(test)]
mod tests {
    use datapath::addr::Ip;
    use datapath::keys::{Settings, Tuple};
    use datapath::memory::Memory;
    use datapath::packet::{Kind, Packet, Part, UDP};
    use datapath::verdict::{FromPod, Keep, ToUplink};

    use super::*;

    const BRIDGE: IfIndex = 20;
    const PASS: u32 = 99;

    fn image(guard: Guard) -> BTreeMap<IfIndex, Interface> {
        let interface = |kind, bridge| Interface {
            kind: kind as u8,
            guarded: guard as u8,
            bridge,
            ..Interface::default()
        };
        // A bridge may be older or younger than what becomes its port.
        let pods = [10, 30].map(|port| (port, interface(InterfaceKind::Pod, BRIDGE)));
        pods.into_iter().chain([(BRIDGE, interface(InterfaceKind::Bridge, 0))]).collect()
    }

    /// Whether what an unselected pod sends by a port leaves, with the node's address by then.
    fn leaves(interfaces: &BTreeMap<IfIndex, Interface>, port: IfIndex) -> bool {
        let [pod, node, server] = [[10, 1, 0, 1], [192, 0, 2, 1], [203, 0, 113, 1]].map(Ip::v4);
        let mut t = Memory::new(1, 1);
        t.settings = Settings { node: 1, pass_token: PASS, hold_unknown: 1, ..Settings::default() };
        t.pods.insert(pod, datapath::keys::Pod { id: 1, policy: 0, ifindex: BRIDGE, firewall: 0 });
        t.interfaces = interfaces.clone();
        let mut packet = Packet {
            tuple: Tuple {
                source: pod,
                destination: server,
                source_port: 4000,
                destination_port: 53,
                protocol: UDP,
                ..Tuple::default()
            },
            len: 60,
            wire_len: 60,
            fragment_id: 0,
            kind: Kind::Udp,
            part: Part::Whole,
            tcp_flags: 0,
            ttl: 64,
            dont_fragment: false,
            options: false,
            by_router: false,
        };
        let from_pod = datapath::from_pod::from_pod(&t, port, &packet, &Keep);
        assert!(matches!(from_pod, FromPod::Pass | FromPod::NotOurs), "{from_pod:?}");
        let hash = if from_pod == FromPod::Pass { PASS } else { 0 };
        packet.tuple.source = node;
        let fate = datapath::to_uplink::to_uplink(&t, 2, BRIDGE, hash, &packet, &Keep);
        matches!(fate, ToUplink::NotOurs | ToUplink::Pass)
    }

    #[test]
    fn an_unselected_pods_packets_leave_at_every_step() {
        let [free, guarded] = [Guard::None, Guard::Guarded].map(image);
        for (old, new) in [(&free, &guarded), (&guarded, &free)] {
            let changes = changes(old, new);
            assert_eq!(changes.len(), 3);
            let mut now = old.clone();
            for (index, interface) in changes {
                now.insert(index, interface);
                for port in [10, 30] {
                    assert!(leaves(&now, port), "by {port} after {index}: {now:?}");
                }
            }
            assert_eq!(now, *new);
        }
        assert_eq!(changes(&free, &free), []);
    }
}

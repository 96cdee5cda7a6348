//! A process in a pod's cgroup sends (cgroup egress, in the pod's own network namespace): pods that nobody has
//! programmed yet are held, also while no agent runs and nothing watches their interfaces.

use crate::addr::Ip;
use crate::keys::NetworkKind;
use crate::tables::Tables;
use crate::verdict::DropReason;

/// Decides on a packet that a process sends. Only what leaves the cluster is held: before its object is known, a
/// pod may speak to the cluster's own addresses, and to nobody else. A pod on the host's network has the node's
/// address and passes.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn from_cgroup<T: Tables>(t: &T, source: &Ip, destination: &Ip) -> Result<(), DropReason> {
    let Some(settings) = t.settings() else { return Ok(()) };
    let held = settings.hold_unknown != 0
        && t.pod(source).is_none()
        && t.network(source) == NetworkKind::Pods as u32
        && !destination.stays_on_link()
        && t.network(destination) == 0;
    if held { Err(DropReason::UnknownPod) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;
    use crate::keys::{NetworkKey, Pod, Settings};
    use crate::memory::Memory;

    fn ip(s: &str) -> Ip {
        s.parse::<IpAddr>().unwrap().into()
    }

    fn tables() -> Memory {
        let net = |prefix_len, s, kind: NetworkKind| (NetworkKey { prefix_len, ip: ip(s) }, kind as u32);
        let mut t = Memory::new(1, 1);
        t.settings = Settings { node: 1, hold_unknown: 1, ..Settings::default() };
        t.networks = [
            net(96 + 16, "10.244.0.0", NetworkKind::Pods),
            net(96 + 12, "10.96.0.0", NetworkKind::Services),
            net(128, "172.18.0.11", NetworkKind::Node),
            net(128, "10.244.1.1", NetworkKind::Node),
            net(48, "fd00:1:2::", NetworkKind::Pods),
        ]
        .into();
        t.pods = [(ip("10.244.1.2"), Pod { id: 1, ..Pod::default() })].into();
        t
    }

    fn passes(t: &Memory, source: &str, destination: &str) -> bool {
        match from_cgroup(t, &ip(source), &ip(destination)) {
            Ok(()) => true,
            Err(reason) => {
                assert_eq!(reason, DropReason::UnknownPod);
                false
            }
        }
    }

    #[test]
    fn unknown_pods_are_held_towards_outside() {
        let t = tables();
        assert!(!passes(&t, "10.244.1.3", "203.0.113.10"));
        assert!(!passes(&t, "fd00:1:2::3", "2001:db8::1"));
        assert!(passes(&t, "10.244.1.2", "203.0.113.10"), "known, selected or not");
    }

    #[test]
    fn they_may_speak_inside_the_cluster_and_on_the_link() {
        let t = tables();
        for to in ["10.244.2.2", "10.96.0.10", "172.18.0.11", "169.254.20.10", "224.0.0.1"] {
            assert!(passes(&t, "10.244.1.3", to), "{to}");
        }
        for to in ["fd00:1:2::9", "fe80::1", "ff02::1"] {
            assert!(passes(&t, "fd00:1:2::3", to), "{to}");
        }
    }

    #[test]
    fn others_pass() {
        let mut t = tables();
        for from in ["172.18.0.11", "10.244.1.1", "192.0.2.7", "0.0.0.0", "127.0.0.1", "fe80::2"] {
            assert!(passes(&t, from, "203.0.113.10"), "{from}");
        }
        t.settings.hold_unknown = 0;
        assert!(passes(&t, "10.244.1.3", "203.0.113.10"), "the configuration lets unknown pods go");
        t.settings = Settings { hold_unknown: 1, ..Settings::default() };
        assert!(passes(&t, "10.244.1.3", "203.0.113.10"), "nothing is configured yet");
    }
}

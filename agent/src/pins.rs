//! Which interface a pod's address belongs to: the one that it was first seen behind.
//!
//! Addresses are given again, and a pod's object outlives its network. So an address that is seen behind another
//! interface is not taken for the same pod's: while its first interface is there, that stays the pod's, whatever
//! routes and neighbour tables say; once it is gone, the address is held. Then the pod's object has to change
//! before a new interface counts as the pod's: where a CNI plugin gives a new sandbox the old address, the kubelet
//! writes a new status when its containers run. A change from before the interface was seen does not count, since
//! the address may be another pod's meanwhile; behind a bridge, where an interface is seen late, one from after
//! the old one's end does. An object that is going away says nothing of a new interface.

use std::collections::{BTreeMap, BTreeSet};

use datapath::addr::Ip;
use datapath::keys::IfIndex;

use crate::image::MapImage;

/// An interface that no node has: the kernel's indices are positive `int`s. It stands for a pod's interface that
/// was gone already when its agent ended.
pub(crate) const GONE: IfIndex = IfIndex::MAX;

/// [`datapath::keys::Delivery::mode`] of a pod that is held, by which a restarted agent knows it. It has no way
/// back, so no program asks for the mode.
pub(crate) const HELD: u8 = 0;

/// The interfaces of pods, by address and [`crate::ids::identity`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pins(BTreeMap<(Ip, u64), Pin>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Pin {
    interface: IfIndex,
    /// Since its interface is gone: the version that the pod's object had then, or when another was seen first,
    /// and that other one.
    gone: Option<(u64, Option<IfIndex>)>,
}

/// Where a pod's address is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Behind no interface of its own that has been seen.
    Unknown,
    /// Behind this one.
    At(IfIndex),
    /// It was behind this one, which is gone.
    Held(IfIndex),
}

/// What is known of a pod's address now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight {
    /// The interface that it is seen behind.
    pub(crate) interface: Option<IfIndex>,
    /// Whether it is in a bridge's network: its interface is seen once the pod has spoken to the node.
    pub(crate) bridged: bool,
    /// The version of the pod's object: a number that changes with it.
    pub(crate) version: u64,
    /// Whether the pod is going away.
    pub(crate) ends: bool,
}

impl Pins {
    /// What the kernel's maps say.
    pub(crate) fn recover(image: &MapImage) -> Self {
        let pin = |(id, delivery): (&u32, &datapath::keys::Delivery)| {
            let pod = image.pods.get(&delivery.ip).filter(|pod| pod.id == *id);
            let interface = if delivery.mode == HELD { GONE } else { pod.map_or(0, |pod| pod.ifindex) };
            // A bridge is nobody's own.
            let own = interface != 0 && !image.interfaces.get(&interface).is_some_and(is_bridge);
            own.then_some(((delivery.ip, delivery.identity), Pin { interface, gone: None }))
        };
        Self(image.delivery.iter().filter_map(pin).collect())
    }

    /// Where a pod's address is, now that it is seen so. `exists`: whether the node has an interface.
    pub(crate) fn place(
        &mut self,
        ip: Ip,
        identity: u64,
        sight: Sight,
        exists: impl Fn(IfIndex) -> bool,
    ) -> Place {
        let key = (ip, identity);
        if let Some(pin) = self.0.get_mut(&key) {
            if pin.gone.is_none() && exists(pin.interface) {
                return Place::At(pin.interface);
            }
            let now = (sight.version, sight.interface);
            let (version, seen) = pin.gone.get_or_insert(now);
            if !sight.bridged && *seen != sight.interface {
                (*version, *seen) = now;
            }
            let nowhere = !sight.bridged && sight.interface.is_none();
            if *version == sight.version || nowhere || sight.ends {
                return Place::Held(pin.interface);
            }
            self.0.remove(&key);
        }
        let Some(interface) = sight.interface else { return Place::Unknown };
        self.0.insert(key, Pin { interface, gone: None });
        Place::At(interface)
    }

    /// Takes the word of whoever makes the pod's sandbox, at the moment that it is made, for where its address is.
    pub(crate) fn vouch(&mut self, ip: Ip, identity: u64, interface: IfIndex) {
        self.0.insert((ip, identity), Pin { interface, gone: None });
    }

    /// Forgets all pods that the image has not.
    pub(crate) fn forget_others(&mut self, image: &MapImage) {
        let there: BTreeSet<_> = image.delivery.values().map(|d| (d.ip, d.identity)).collect();
        self.0.retain(|key, _| there.contains(key));
    }
}

const fn is_bridge(interface: &datapath::keys::Interface) -> bool {
    interface.kind == datapath::keys::InterfaceKind::Bridge as u8
}

#[cfg(test)]
mod tests {
    use datapath::keys::{Delivery, Interface, InterfaceKind, Pod};

    use super::*;

    const IP: Ip = Ip::v4([10, 1, 0, 1]);

    fn sight(interface: IfIndex, version: u64) -> Sight {
        let interface = Some(interface).filter(|i| *i != 0);
        Sight { interface, version, bridged: false, ends: false }
    }

    fn at(pins: &mut Pins, sight: Sight, there: &[IfIndex]) -> Place {
        pins.place(IP, 7, sight, |i| there.contains(&i))
    }

    #[test]
    fn the_first_interface_stays_while_it_is_there() {
        let mut pins = Pins::default();
        assert_eq!(at(&mut pins, sight(0, 1), &[20]), Place::Unknown);
        assert_eq!(at(&mut pins, sight(10, 1), &[10, 20]), Place::At(10));
        for seen in [0, 11, 10] {
            assert_eq!(at(&mut pins, sight(seen, 2), &[10, 11, 20]), Place::At(10));
        }
        assert_eq!(pins.place(IP, 8, sight(11, 1), |_| true), Place::At(11), "another pod");
    }

    #[test]
    fn another_interface_counts_once_the_object_has_changed() {
        let mut pins = Pins::default();
        assert_eq!(at(&mut pins, sight(10, 1), &[10]), Place::At(10));
        assert_eq!(at(&mut pins, sight(0, 2), &[]), Place::Held(10), "it may have changed before");
        assert_eq!(at(&mut pins, sight(11, 2), &[11]), Place::Held(10));
        assert_eq!(at(&mut pins, sight(11, 2), &[10, 11]), Place::Held(10), "a number that came back");
        let ends = Sight { ends: true, ..sight(11, 3) };
        assert_eq!(at(&mut pins, ends, &[11]), Place::Held(10));
        assert_eq!(at(&mut pins, sight(11, 4), &[11]), Place::At(11));
    }

    #[test]
    fn a_change_from_before_the_new_interface_does_not_count() {
        let mut pins = Pins::default();
        assert_eq!(at(&mut pins, sight(10, 1), &[10]), Place::At(10));
        assert_eq!(at(&mut pins, sight(0, 1), &[]), Place::Held(10));
        assert_eq!(at(&mut pins, sight(0, 2), &[]), Place::Held(10));
        assert_eq!(at(&mut pins, sight(11, 2), &[11]), Place::Held(10));
        assert_eq!(at(&mut pins, sight(12, 3), &[11, 12]), Place::Held(10), "yet another");
        assert_eq!(at(&mut pins, sight(12, 4), &[11, 12]), Place::At(12));
    }

    #[test]
    fn behind_a_bridge_any_change_since_the_old_ones_end_counts() {
        let mut pins = Pins::default();
        let bridged = |interface, version| Sight { bridged: true, ..sight(interface, version) };
        assert_eq!(at(&mut pins, bridged(21, 1), &[20, 21]), Place::At(21));
        assert_eq!(at(&mut pins, bridged(0, 1), &[20]), Place::Held(21));
        assert_eq!(at(&mut pins, bridged(22, 1), &[20, 22]), Place::Held(21));
        assert_eq!(at(&mut pins, bridged(0, 2), &[20, 22]), Place::Unknown);
        assert_eq!(at(&mut pins, bridged(22, 2), &[20, 22]), Place::At(22));
    }

    #[test]
    fn a_new_sandbox_that_is_vouched_for_counts_at_once() {
        let mut pins = Pins::default();
        assert_eq!(at(&mut pins, sight(10, 1), &[10]), Place::At(10));
        assert_eq!(at(&mut pins, sight(11, 1), &[11]), Place::Held(10));
        pins.vouch(IP, 7, 11);
        assert_eq!(at(&mut pins, sight(11, 1), &[11]), Place::At(11));
        assert_eq!(at(&mut pins, sight(12, 2), &[12]), Place::Held(11), "and is one as any other then");
    }

    #[test]
    fn a_restarted_agent_knows_them() {
        let delivery = |ip| Delivery { ip, identity: 7, mode: 2, ..Delivery::default() };
        let image = |ifindex| MapImage {
            pods: [(IP, Pod { id: 1, ifindex, ..Pod::default() })].into(),
            delivery: [(1, delivery(IP))].into(),
            interfaces: [(20, Interface { kind: InterfaceKind::Bridge as u8, ..Interface::default() })]
                .into(),
            ..MapImage::default()
        };
        let mut pins = Pins::recover(&image(10));
        assert_eq!(at(&mut pins, sight(11, 1), &[10, 11]), Place::At(10));
        let mut pins = Pins::recover(&image(10));
        assert_eq!(at(&mut pins, sight(11, 1), &[11]), Place::Held(10));
        for shared in [0, 20] {
            let mut pins = Pins::recover(&image(shared));
            assert_eq!(at(&mut pins, sight(11, 1), &[11, 20]), Place::At(11));
        }
        // The agent was killed while it wrote.
        let mut pins = Pins::recover(&MapImage { pods: BTreeMap::new(), ..image(10) });
        assert_eq!(at(&mut pins, sight(11, 1), &[11]), Place::At(11));
        let mut held = image(10);
        held.delivery.get_mut(&1).unwrap().mode = HELD;
        let mut pins = Pins::recover(&held);
        assert_eq!(at(&mut pins, sight(11, 1), &[11]), Place::Held(GONE));
        assert_eq!(at(&mut pins, sight(11, 2), &[11]), Place::At(11));
        // Gone and back is something new.
        let mut pins = Pins::recover(&image(10));
        pins.forget_others(&MapImage::default());
        assert_eq!(at(&mut pins, sight(11, 1), &[11]), Place::At(11));
    }
}

//! How a new flow's packet to outside begins its way: by the host's stack, unless that leads to no uplink.

use crate::keys::{IfIndex, InterfaceKind, Offload, Settings};
use crate::packet::{Packet, Part};
use crate::tables::Tables;
use crate::verdict::{DropReason, HostStack};

/// What the node's routes say of a destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// It leaves by this interface.
    By(IfIndex),
    /// There is none.
    None,
    /// Anything else, which is the host's stack's to say to the pod: a prohibition, a black hole.
    Host,
}

/// Where a packet that has a token goes from the pod's interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Departure {
    /// Up the host's stack.
    Up,
    /// To `to_uplink` of this uplink at once.
    Direct(IfIndex),
    /// Dropped.
    Drop(DropReason),
}

/// Whether the routes have to be asked: where the host's DNAT decides, they do not tell. Later fragments go, or not, with
/// their first.
#[inline(always)]
pub fn asks<T: Tables>(t: &T, packet: &Packet) -> bool {
    packet.part != Part::Later && t.network(&packet.tuple.destination) == 0
}

/// Decides. A route by an interface that leads to pods or local containers stays on the node; by any other that is
/// no uplink the packet would leave untranslated, or unseen by the firewall. A node without a route out has gateways.
#[inline(always)]
pub fn depart<T: Tables>(
    t: &T,
    settings: &Settings,
    packet: &Packet,
    stack: HostStack,
    route: Route,
) -> Departure {
    // What is in pieces goes by the stack, which may put it together.
    let whole = packet.part == Part::Whole;
    let direct = match route {
        _ if whole && settings.offload == Offload::Always as u8 && stack == HostStack::Usual => true,
        Route::None => whole && stack != HostStack::Required,
        Route::Host => false,
        Route::By(ifindex) => {
            const UPLINK: u8 = InterfaceKind::Uplink as u8;
            const POD: u8 = InterfaceKind::Pod as u8;
            const BRIDGE: u8 = InterfaceKind::Bridge as u8;
            return match t.interface(ifindex).map(|interface| interface.kind) {
                Some(UPLINK | POD | BRIDGE) => Departure::Up,
                _ => Departure::Drop(DropReason::NotAnUplink),
            };
        }
    };
    match direct {
        true if settings.uplink == 0 => Departure::Up,
        // Past the host's stack there is nobody to answer.
        true if packet.ttl <= 1 => Departure::Drop(DropReason::TtlExpired),
        true => Departure::Direct(settings.uplink),
        false => Departure::Up,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Interface;
    use crate::memory::Memory;

    #[test]
    fn the_host_has_its_say_unless_that_leads_to_no_uplink() {
        let mut t = Memory::new(1, 1);
        for kind in [InterfaceKind::Uplink, InterfaceKind::Pod, InterfaceKind::Bridge, InterfaceKind::Other] {
            t.interfaces.insert(kind as u32, Interface { kind: kind as u8, ..Interface::default() });
        }
        let packet = crate::walk_tests::any_packet();
        let auto = Settings { offload: Offload::Auto as u8, uplink: 7, ..Settings::default() };
        let by = |kind: InterfaceKind| depart(&t, &auto, &packet, HostStack::Usual, Route::By(kind as u32));
        assert_eq!(by(InterfaceKind::Uplink), Departure::Up);
        assert_eq!(by(InterfaceKind::Pod), Departure::Up);
        assert_eq!(by(InterfaceKind::Bridge), Departure::Up);
        let not_an_uplink = Departure::Drop(DropReason::NotAnUplink);
        assert_eq!(by(InterfaceKind::Other), not_an_uplink);
        assert_eq!(depart(&t, &auto, &packet, HostStack::Usual, Route::By(99)), not_an_uplink);
        assert_eq!(depart(&t, &auto, &packet, HostStack::Usual, Route::None), Departure::Direct(7));
        assert_eq!(depart(&t, &auto, &packet, HostStack::Usual, Route::Host), Departure::Up);
        let expired = Packet { ttl: 1, ..packet };
        assert_eq!(
            depart(&t, &auto, &expired, HostStack::Usual, Route::None),
            Departure::Drop(DropReason::TtlExpired)
        );
        assert_eq!(
            depart(&t, &auto, &expired, HostStack::Usual, Route::By(InterfaceKind::Uplink as u32)),
            Departure::Up
        );
        let lonely = Settings { uplink: 0, ..auto };
        assert_eq!(depart(&t, &lonely, &packet, HostStack::Usual, Route::None), Departure::Up);
        // A first fragment stays on the host's path, but leaves by no other way than a whole packet.
        let first = Packet { part: Part::First, ..packet };
        assert!(asks(&t, &first) && !asks(&t, &Packet { part: Part::Later, ..packet }));
        assert_eq!(depart(&t, &auto, &first, HostStack::Usual, Route::None), Departure::Up);
        assert_eq!(
            depart(&t, &auto, &first, HostStack::Usual, Route::By(InterfaceKind::Other as u32)),
            Departure::Drop(DropReason::NotAnUplink)
        );
        let always = Settings { offload: Offload::Always as u8, ..auto };
        assert_eq!(
            depart(&t, &always, &packet, HostStack::Usual, Route::By(InterfaceKind::Uplink as u32)),
            Departure::Direct(7)
        );
    }
}

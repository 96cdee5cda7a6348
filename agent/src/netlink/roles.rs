//! What each interface of the node is: an uplink, pod-facing, a bridge that pods may speak through, or none of
//! these.
//!
//! What counts as none is neither guarded nor covered, so nothing that a pod may come in by must. What pods do not
//! come in by must not be guarded without being covered: a bridge's unmarked packets are dropped at the uplinks.

use std::collections::{BTreeMap, BTreeSet};

use datapath::keys::IfIndex;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkLayerType, LinkMessage};

use super::{Address, Selection, is_global, is_kind, link_name, matches};

/// Interfaces by what they are. An uplink that `--uplink` names may be a bridge with pods, too.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Roles {
    pub(super) uplinks: BTreeSet<IfIndex>,
    pub(super) pod_facing: BTreeSet<IfIndex>,
    pub(super) bridges: BTreeSet<IfIndex>,
}

/// Finds them. `by_gateway`: interfaces that routes lead out by.
pub(super) fn roles(
    links: &[LinkMessage],
    selection: &Selection,
    by_gateway: &BTreeSet<IfIndex>,
    addresses: &BTreeMap<IfIndex, Vec<Address>>,
) -> Roles {
    let is_pattern = |link: &LinkMessage| {
        let name = link_name(link);
        !selection.uplinks.iter().any(|uplink| uplink == name)
            && selection.pod_interfaces.iter().any(|pattern| matches(pattern, name))
    };
    // A bridge is not pod-facing, its ports are: `cni*` matches `cni0` all the same.
    let is_named = |link: &LinkMessage| is_pattern(link) && !is_kind(link, &InfoKind::Bridge);
    let with_pods: BTreeSet<IfIndex> =
        links.iter().filter(|link| is_named(link)).map(controller).filter(|bridge| *bridge != 0).collect();
    // The other virtual ports of a bridge with pods are covered too, whatever their names: the uplink wants a
    // mark from all that such a bridge sends out.
    let is_virtual = |link: &LinkMessage| is_kind(link, &InfoKind::Veth) || is_kind(link, &InfoKind::Tun);

    let uplinks: BTreeSet<IfIndex> = links
        .iter()
        .filter(|link| {
            let index = link.header.index;
            let chosen = if selection.uplinks.is_empty() {
                by_gateway.contains(&index) && !with_pods.contains(&index) && !is_kind(link, &InfoKind::Vxlan)
            } else {
                selection.uplinks.iter().any(|uplink| uplink == link_name(link))
            };
            let covered = is_named(link) || (with_pods.contains(&controller(link)) && is_virtual(link));
            chosen && is_ethernet(link) && !covered
        })
        .map(|link| link.header.index)
        .collect();

    // The first pod of a node makes the bridge, so one without a port may be about to get pods. Where something
    // else is a port, such as a NIC, the bridge is part of a network outside the node, whose hosts nobody marks;
    // unless its name says that it is the pods'.
    let is_outward = |bridge: &LinkMessage| {
        let ports = || links.iter().filter(|port| controller(port) == bridge.header.index);
        ports().any(|port| uplinks.contains(&port.header.index))
            || (!is_pattern(bridge)
                && ports().any(|port| !is_virtual(port) && !is_kind(port, &InfoKind::Dummy)))
    };
    let mut bridges = with_pods;
    bridges.extend(
        links
            .iter()
            .filter(|link| {
                is_kind(link, &InfoKind::Bridge) && !uplinks.contains(&link.header.index) && !is_outward(link)
            })
            .map(|link| link.header.index),
    );

    // A pod's interface whose name no pattern knows: one end of a veth of which the other is in another
    // namespace. One that has a network of its own, not the pod's address alone behind it, is a NIC to a node that
    // is a container itself; so is one that other interfaces of the node stand on (macvlan, VLAN).
    let stood_on: BTreeSet<IfIndex> = links.iter().filter_map(lower).collect();
    let is_routed = |link: &LinkMessage| {
        let nets = addresses.get(&link.header.index).map_or(&[][..], Vec::as_slice);
        peer_elsewhere(link)
            && controller(link) == 0
            && !stood_on.contains(&link.header.index)
            && !nets.iter().any(|a| is_global(&a.net.addr()) && a.net.prefix_len() < a.net.max_prefix_len())
    };
    let pod_facing = links
        .iter()
        .filter(|link| {
            !uplinks.contains(&link.header.index)
                && (is_named(link)
                    || (bridges.contains(&controller(link)) && is_virtual(link))
                    || is_routed(link))
        })
        .map(|link| link.header.index)
        .collect();
    Roles { uplinks, pod_facing, bridges }
}

/// The interface that one is a port of; 0 for none.
pub(super) fn controller(link: &LinkMessage) -> IfIndex {
    link.attributes
        .iter()
        .find_map(|a| if let LinkAttribute::Controller(index) = a { Some(*index) } else { None })
        .unwrap_or(0)
}

/// The interface of this namespace that one stands on, or is the other end of.
fn lower(link: &LinkMessage) -> Option<IfIndex> {
    let elsewhere = link.attributes.iter().any(|a| matches!(a, LinkAttribute::LinkNetNsId(_)));
    let lower = |a: &LinkAttribute| if let LinkAttribute::Link(index) = a { Some(*index) } else { None };
    if elsewhere { None } else { link.attributes.iter().find_map(lower) }
}

/// Whether it is a veth whose other end is in another network namespace.
pub(super) fn peer_elsewhere(link: &LinkMessage) -> bool {
    is_kind(link, &InfoKind::Veth)
        && link.attributes.iter().any(|a| matches!(a, LinkAttribute::LinkNetNsId(_)))
}

/// The programs expect Ethernet headers.
fn is_ethernet(link: &LinkMessage) -> bool {
    link.header.link_layer_type == LinkLayerType::Ether
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkInfo;

    use super::*;

    /// An interface: its index, name, kind (`None`: a NIC) and the bridge that it is a port of.
    fn link(index: IfIndex, name: &str, kind: Option<InfoKind>, bridge: IfIndex) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes.push(LinkAttribute::IfName(name.into()));
        if bridge != 0 {
            link.attributes.push(LinkAttribute::Controller(bridge));
        }
        if kind == Some(InfoKind::Veth) {
            link.attributes.push(LinkAttribute::LinkNetNsId(1));
        }
        link.attributes.extend(kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])));
        link
    }

    /// Out of a node whose NIC `eth0` (2) has the default route: uplinks, pod-facing ones, bridges.
    fn of(links: &[LinkMessage], gateway: &[IfIndex], uplinks: &[&str]) -> [Vec<IfIndex>; 3] {
        let selection = Selection {
            uplinks: uplinks.iter().map(|u| (*u).to_owned()).collect(),
            pod_interfaces: ["veth*", "cni*", "tap*"].map(str::to_owned).into(),
        };
        let addresses = [(30, "10.244.1.1/32"), (31, "fe80::1/64"), (32, "172.19.0.3/16")];
        let addresses = addresses
            .map(|(index, net)| (index, vec![Address { net: net.parse().unwrap(), temporary: false }]));
        let mut all = vec![link(2, "eth0", None, 0)];
        all.extend_from_slice(links);
        let gateway = gateway.iter().copied().collect();
        let r = roles(&all, &selection, &gateway, &addresses.into());
        [r.uplinks, r.pod_facing, r.bridges].map(|set| set.into_iter().collect())
    }

    const BRIDGE: Option<InfoKind> = Some(InfoKind::Bridge);
    const VETH: Option<InfoKind> = Some(InfoKind::Veth);
    const TAP: Option<InfoKind> = Some(InfoKind::Tun);

    #[test]
    fn a_bridge_may_have_pods_before_it_has_a_port() {
        for name in ["cni0", "br7"] {
            let bridge = link(20, name, BRIDGE, 0);
            assert_eq!(of(std::slice::from_ref(&bridge), &[2], &[]), [vec![2], vec![], vec![20]]);
            let port = link(21, "veth1", VETH, 20);
            assert_eq!(of(&[bridge, port], &[2], &[]), [vec![2], vec![21], vec![20]]);
        }
    }

    #[test]
    fn all_that_speaks_through_a_guarded_bridge_is_covered() {
        let links = [
            link(20, "virbr0", BRIDGE, 0),
            link(21, "vnet0", TAP, 20),
            link(22, "virbr0-nic", Some(InfoKind::Dummy), 20),
        ];
        assert_eq!(of(&links, &[2], &[]), [vec![2], vec![21], vec![20]]);
        let links = [link(20, "docker0", BRIDGE, 0), link(21, "veth1", VETH, 20), link(22, "x", VETH, 20)];
        assert_eq!(of(&links, &[2], &[]), [vec![2], vec![21, 22], vec![20]]);
    }

    #[test]
    fn what_others_stand_on_is_no_pods() {
        let mut upper = link(40, "eth0.100", Some(InfoKind::Vlan), 0);
        let under = link(41, "under0", VETH, 0);
        assert_eq!(of(&[upper.clone(), under.clone()], &[40], &[]), [vec![40], vec![41], vec![]]);
        upper.attributes.push(LinkAttribute::Link(41));
        assert_eq!(of(&[upper, under], &[40], &[]), [vec![40], vec![], vec![]]);
    }

    #[test]
    fn a_bridge_to_a_network_outside_is_no_pods_bridge() {
        let links = [link(20, "br1", BRIDGE, 0), link(21, "eth1", None, 20), link(22, "vnet0", TAP, 20)];
        assert_eq!(of(&links, &[2], &[]), [vec![2], vec![], vec![]]);
        // Unless pods are there, too, or its name says that they come.
        let links = [link(20, "br1", BRIDGE, 0), link(21, "eth1", None, 20), link(22, "veth1", VETH, 20)];
        assert_eq!(of(&links, &[2], &[]), [vec![2], vec![22], vec![20]]);
        let links = [link(20, "cni0", BRIDGE, 0), link(21, "eth1", None, 20)];
        assert_eq!(of(&links, &[2], &[]), [vec![2], vec![], vec![20]]);
    }

    #[test]
    fn an_uplinks_own_bridge_is_no_pods_bridge() {
        // In a container that is a node, the NIC is a veth.
        let links = [link(20, "br-ex", BRIDGE, 0), link(21, "ext", VETH, 20)];
        assert_eq!(of(&links, &[20], &[]), [vec![20], vec![], vec![]]);
        assert_eq!(of(&links, &[20], &["ext"]), [vec![21], vec![], vec![]]);
        assert_eq!(of(&links, &[20], &["ext", "br-ex"]), [vec![20, 21], vec![], vec![]]);
    }

    #[test]
    fn a_veth_of_any_name_leads_to_a_pod_unless_it_has_a_network() {
        let links = [
            link(30, "eni1", VETH, 0),
            link(31, "eni2", VETH, 0),
            link(32, "ext1", VETH, 0),
            link(33, "wg0", Some(InfoKind::Wireguard), 0),
        ];
        assert_eq!(of(&links, &[2], &[]), [vec![2], vec![30, 31], vec![]]);
        assert_eq!(of(&links, &[2, 31], &[]), [vec![2, 31], vec![30], vec![]]);
        let mut here = link(30, "cilium_host", VETH, 0);
        here.attributes.retain(|a| !matches!(a, LinkAttribute::LinkNetNsId(_)));
        assert_eq!(of(&[here], &[2], &[]), [vec![2], vec![], vec![]]);
    }
}

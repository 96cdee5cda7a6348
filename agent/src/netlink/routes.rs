//! The node's routes, and what they say about its interfaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use datapath::keys::IfIndex;
use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::dump::dump;
use super::{Error, is_link_local};
use crate::facts::Facts;

/// A unicast route, reduced to what matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Route {
    destination: IpNet,
    pub(super) by_gateway: bool,
    pub(super) interfaces: Vec<IfIndex>,
    /// Lower is better.
    priority: u32,
    /// From a router's advertisement.
    advertised: bool,
    /// In the main table.
    main: bool,
}

/// Unicast routes of all tables and both families.
pub(super) async fn list(handle: &Handle) -> Result<Vec<Route>, Error> {
    let queries =
        [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
    let mut found = Vec::new();
    for query in queries {
        let family = query.header.address_family;
        // A kernel without a family answers with all others' routes (`rtnetlink_rcv_msg`).
        let routes = dump(handle, "list routes", RouteNetlinkMessage::GetRoute(query), |entry| match entry {
            RouteNetlinkMessage::NewRoute(message) if message.header.address_family == family => {
                route(&message)
            }
            _ => None,
        });
        found.extend(routes.await?);
    }
    Ok(found)
}

fn route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    // Path MTUs and redirects that the kernel has learnt come as routes of their own, "cloned".
    if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut address = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut by_gateway = false;
    let mut interfaces = Vec::new();
    let mut priority = 0;
    let mut table = u32::from(header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(metric) => priority = *metric,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => address = IpAddr::V4(*ip),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => address = IpAddr::V6(*ip),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => by_gateway = true,
            RouteAttribute::Oif(index) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => {
                by_gateway = true;
                interfaces.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    Some(Route {
        destination: IpNet::new(address, header.destination_prefix_length).ok()?,
        by_gateway,
        interfaces,
        priority,
        advertised: header.protocol == RouteProtocol::Ra,
        main: table == u32::from(RouteHeader::RT_TABLE_MAIN),
    })
}

/// Adds what the routes say to facts that know the interfaces: where pods are, which prefixes are on an
/// uplink's link, and where the default routes lead.
pub(super) fn put_into(routes: &[Route], facts: &mut Facts) {
    for route in routes {
        let [interface] = route.interfaces[..] else { continue };
        // `fe80::/64` is on every interface.
        if route.by_gateway || is_link_local(&route.destination.addr()) {
            continue;
        }
        let single = route.destination.prefix_len() == route.destination.max_prefix_len();
        if single && facts.pod_interfaces.contains_key(&interface) {
            facts.host_routes.insert(route.destination.addr(), interface);
        } else if facts.bridges.contains_key(&interface) {
            facts.bridge_networks.insert(route.destination, interface);
        } else if route.advertised
            && route.destination.prefix_len() > 0
            && let Some(uplink) = facts.uplinks.get_mut(&interface)
        {
            uplink.on_link.push(route.destination);
        }
    }
    for uplink in facts.uplinks.values_mut() {
        uplink.on_link.sort_unstable();
        uplink.on_link.dedup();
    }
    facts.default_v4 = default_uplink(routes, facts, true);
    facts.default_v6 = default_uplink(routes, facts, false);
}

/// The uplink that the main table's best default route of a family leaves by.
fn default_uplink(routes: &[Route], facts: &Facts, v4: bool) -> Option<IfIndex> {
    let is_default =
        |r: &&Route| r.main && r.destination.prefix_len() == 0 && r.destination.addr().is_ipv4() == v4;
    let best = routes.iter().filter(is_default).min_by_key(|r| r.priority)?;
    best.interfaces.iter().copied().find(|index| facts.uplinks.contains_key(index))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::facts::{Bridge, PodInterface, Uplink};

    /// A message as the kernel sends it: `2001:db8::/64 dev 2 proto ra metric 100 table main`.
    fn message(destination: &str, interface: IfIndex, more: &[RouteAttribute]) -> RouteMessage {
        let destination: IpNet = destination.parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.kind = RouteType::Unicast;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.destination_prefix_length = destination.prefix_len();
        let address = match destination.addr() {
            IpAddr::V4(ip) => {
                message.header.address_family = AddressFamily::Inet;
                RouteAddress::Inet(ip)
            }
            IpAddr::V6(ip) => {
                message.header.address_family = AddressFamily::Inet6;
                RouteAddress::Inet6(ip)
            }
        };
        // A default route has none.
        if destination.prefix_len() > 0 {
            message.attributes.push(RouteAttribute::Destination(address));
        }
        message.attributes.push(RouteAttribute::Oif(interface));
        message.attributes.extend_from_slice(more);
        message
    }

    /// Uplinks 2 and 3, pod interface 10, bridge 20.
    fn facts(messages: &[RouteMessage]) -> Facts {
        let uplink = Uplink {
            name: "eth".into(),
            mac: [0; 6],
            networks: Vec::new(),
            on_link: Vec::new(),
            mtu: 1500,
            up: true,
        };
        let pod =
            PodInterface { name: "veth".into(), mac: [0; 6], bridge: 0, peer_elsewhere: true, mtu: 1500 };
        let mut facts = Facts {
            uplinks: BTreeMap::from([(2, uplink.clone()), (3, uplink)]),
            pod_interfaces: BTreeMap::from([(10, pod)]),
            bridges: BTreeMap::from([(20, Bridge::default())]),
            ..Facts::default()
        };
        let routes: Vec<_> = messages.iter().filter_map(route).collect();
        put_into(&routes, &mut facts);
        facts
    }

    fn via(gateway: &str) -> RouteAttribute {
        RouteAttribute::Gateway(match gateway.parse().unwrap() {
            IpAddr::V4(ip) => RouteAddress::Inet(ip),
            IpAddr::V6(ip) => RouteAddress::Inet6(ip),
        })
    }

    #[test]
    fn pods_of_both_families_are_found_by_host_route_and_bridge_network() {
        let mut learnt = message("fd00:1::9/128", 10, &[]);
        learnt.header.flags |= RouteFlags::Cloned;
        let mut local = message("fd00:1::8/128", 10, &[]);
        local.header.kind = RouteType::Local;
        let f = facts(&[
            message("10.1.0.1/32", 10, &[]),
            message("fd00:1::1/128", 10, &[]),
            message("10.1.2.0/24", 20, &[]),
            message("fd00:1:0:2::/64", 20, &[]),
            message("fe80::/64", 10, &[]),
            message("fe80::/64", 20, &[]),
            message("fe80::1/128", 10, &[]),
            message("fd00:1::7/128", 10, &[via("fe80::1")]),
            learnt,
            local,
        ]);
        let hosts: Vec<_> = f.host_routes.iter().map(|(ip, i)| (ip.to_string(), *i)).collect();
        assert_eq!(hosts, [("10.1.0.1".to_owned(), 10), ("fd00:1::1".to_owned(), 10)]);
        let networks: Vec<_> = f.bridge_networks.iter().map(|(n, i)| (n.to_string(), *i)).collect();
        assert_eq!(networks, [("10.1.2.0/24".to_owned(), 20), ("fd00:1:0:2::/64".to_owned(), 20)]);
    }

    #[test]
    fn the_best_default_route_of_each_family_and_of_the_main_table_counts() {
        let metric = RouteAttribute::Priority;
        let mut other = message("0.0.0.0/0", 3, &[via("192.0.2.1")]);
        other.header.table = 100;
        let f = facts(&[
            other,
            message("0.0.0.0/0", 3, &[via("192.0.2.1"), metric(200)]),
            message("0.0.0.0/0", 2, &[via("192.0.2.1"), metric(100)]),
            message("::/0", 3, &[via("fe80::1"), metric(1024)]),
        ]);
        assert_eq!((f.default_v4, f.default_v6), (Some(2), Some(3)));
        assert_eq!(f.default_uplink(&"2001:db8::1".parse().unwrap()), Some(3));
        // It leads to something that is no uplink.
        let f = facts(&[message("::/0", 9, &[via("fe80::1")])]);
        assert_eq!((f.default_v4, f.default_v6), (None, None));
    }

    #[test]
    fn prefixes_that_a_router_advertises_are_on_the_uplinks_link() {
        let advertised = |destination: &str, more: &[RouteAttribute]| {
            let mut message = message(destination, 2, more);
            message.header.protocol = RouteProtocol::Ra;
            message
        };
        let f = facts(&[
            advertised("2001:db8::/64", &[]),
            advertised("::/0", &[via("fe80::1")]),
            advertised("2001:db8:9::/64", &[via("fe80::1")]),
            message("2001:db8:1::/64", 2, &[]),
        ]);
        assert_eq!(f.uplinks[&2].on_link, ["2001:db8::/64".parse::<IpNet>().unwrap()]);
        assert_eq!(f.uplinks[&2].prefix_of(&"2001:db8::5".parse().unwrap()), Some(64));
        assert!(f.uplinks[&3].on_link.is_empty());
    }
}

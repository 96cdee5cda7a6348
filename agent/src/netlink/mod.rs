//! The node's network as netlink tells it, and the tunnel's device.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink's attributes are many, and more with every kernel"
)]

mod dump;
pub mod proxies;
mod roles;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use datapath::keys::IfIndex;
use futures_util::StreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkVxlan, MulticastGroup};
use tokio::sync::watch;
use tracing::{debug, warn};

use self::dump::{connect, dump};
use self::roles::{Roles, controller, peer_elsewhere, roles};
use crate::facts::{Bridge, Facts, Fresh, PodInterface, Proxy, Uplink, fresh};

/// The tunnel's device.
pub const TUNNEL: &str = "outgate0";

/// A burst of netlink events is read as one, this long after its first.
const SETTLE: Duration = Duration::from_millis(5);
/// Netlink drops messages when a socket's buffer is full; so the facts are read again now and then.
const REREAD: Duration = Duration::from_secs(10);
/// After a failure they are read again this soon.
const RETRY: Duration = Duration::from_millis(100);

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(std::io::Error),
    /// A request.
    #[error("netlink: cannot {what}: {source}")]
    Request {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: rtnetlink::Error,
    },
    /// A list that the kernel did not give.
    #[error("netlink: cannot {what}: {source}")]
    Dump {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A list that changed whenever it was read.
    #[error("netlink: cannot {what}: it changes faster than it is read")]
    Torn {
        /// What was tried.
        what: &'static str,
    },
    /// `--uplink` names an interface that is not there.
    #[error("no interface {0} (given by --uplink) on this node")]
    NoUplink(String),
    /// The port of the tunnel is taken.
    #[error(
        "cannot create {TUNNEL} with UDP port {port}: {source}; is the port another VXLAN's? \
             Set `tunnel.port` in EgressConfig"
    )]
    Tunnel {
        /// The port.
        port: u16,
        /// Why not.
        source: rtnetlink::Error,
    },
}

/// Which interfaces are what.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Names of uplinks; empty: every interface with a route by a gateway that is not pod-facing.
    pub uplinks: Vec<String>,
    /// Patterns of pod-facing interfaces' names, `*` for any characters. What `roles` knows by its kind needs none.
    pub pod_interfaces: Vec<String>,
}

/// Reads the facts, and again after every change and when that is asked for. The task ends when the receiver is
/// dropped.
pub async fn watch(selection: Selection) -> Result<(watch::Receiver<Facts>, Fresh), Error> {
    // For notices only: see `dump::connect`.
    let (connection, _, mut events) = rtnetlink::new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Neigh,
    ])
    .map_err(Error::Socket)?;
    tokio::spawn(connection);
    let facts = read(&selection).await?;
    for name in &selection.uplinks {
        if !facts.uplinks.values().any(|uplink| &uplink.name == name) {
            return Err(Error::NoUplink(name.clone()));
        }
    }
    let (sender, receiver) = watch::channel(facts);
    let (fresh, mut requests) = fresh();
    tokio::spawn(async move {
        let mut again = REREAD;
        loop {
            tokio::select! {
                // Where notices were lost, that is an event of its own (netlink-proto's `NetlinkPayload::Overrun`).
                event = events.next() => {
                    if event.is_none() {
                        warn!("netlink closed its socket: changes of interfaces are no longer seen; restart the agent");
                        return;
                    }
                    tokio::time::sleep(SETTLE).await;
                }
                // What it is asked for is there already.
                () = requests.asked() => {}
                () = tokio::time::sleep(again) => {}
                () = sender.closed() => return,
            }
            // What has come meanwhile is covered by the read below.
            while let Some(Some(_)) = futures_util::FutureExt::now_or_never(events.next()) {}
            let served = requests.begin();
            match read(&selection).await {
                Ok(facts) => {
                    again = REREAD;
                    sender.send_if_modified(|held| {
                        let changed = *held != facts;
                        *held = facts;
                        changed
                    });
                    requests.done(served);
                }
                Err(error) => {
                    debug!("reading the node's network again: {error}");
                    again = RETRY;
                }
            }
        }
    });
    Ok((receiver, fresh))
}

/// Makes sure that the tunnel's device exists with this UDP port, and is up.
///
/// One device carries both families: in metadata mode it opens a socket of each, and does with IPv4's alone
/// where the kernel has no IPv6 (`vxlan_sock_add`, `drivers/net/vxlan/vxlan_core.c`). With
/// `net.ipv6.conf.all.disable_ipv6=1` it still opens both (tried on 6.18).
pub async fn ensure_tunnel(port: u16) -> Result<IfIndex, Error> {
    let handle = connect()?;
    if let Some(link) = find(&handle, TUNNEL).await? {
        if vxlan_fits(&link, port) {
            return Ok(link.header.index);
        }
        // The kernel changes neither of an existing device (`vxlan_nl2conf`: "cannot change").
        delete(&handle, link.header.index).await?;
    }
    // Metadata mode: VNI and addresses come with each packet. It learns nothing and resolves nothing. Packets
    // over IPv6 may come without a UDP checksum (RFC 6935): who sends decides, `bpf_skb_set_tunnel_key` has a
    // flag for it; without this the receiver would drop them (`udp6_csum_init`, net/ipv6/ip6_checksum.c).
    let message = LinkMessageBuilder::<LinkVxlan>::new(TUNNEL)
        .collect_metadata(true)
        .learning(false)
        .port(port)
        .udp_zero_csum6_rx(true)
        .up()
        .build();
    handle.link().add(message).execute().await.map_err(|source| Error::Tunnel { port, source })?;
    let link = find(&handle, TUNNEL).await?;
    Ok(link.map_or(0, |link| link.header.index))
}

/// Removes the tunnel's device. Returns whether there was one.
pub async fn remove_tunnel() -> Result<bool, Error> {
    let handle = connect()?;
    let Some(link) = find(&handle, TUNNEL).await? else { return Ok(false) };
    delete(&handle, link.header.index).await?;
    Ok(true)
}

/// Which of these interfaces this network namespace has not at this moment. If the kernel cannot be asked, it has all.
#[must_use]
pub fn gone(interfaces: impl IntoIterator<Item = IfIndex>) -> BTreeSet<IfIndex> {
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    // One look-up each, under RCU; a dump of all interfaces would take RTNL (`netdev_get_name`, net/core/dev.c).
    let Ok(socket) = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None) else {
        return BTreeSet::new();
    };
    let is_gone = |index: &IfIndex| {
        let name = netdevice::index_to_name_inlined(&socket, *index);
        matches!(name, Err(Errno::NODEV | Errno::NXIO))
    };
    interfaces.into_iter().filter(is_gone).collect()
}

async fn delete(handle: &Handle, index: IfIndex) -> Result<(), Error> {
    let what = "delete the tunnel's device";
    handle.link().del(index).execute().await.map_err(|source| Error::Request { what, source })
}

async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, Error> {
    let links = links(handle).await?;
    Ok(links.into_iter().find(|link| link_name(link) == name))
}

async fn links(handle: &Handle) -> Result<Vec<LinkMessage>, Error> {
    let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
    dump(handle, "list interfaces", question, |entry| match entry {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    })
    .await
}

async fn neighbours(
    handle: &Handle,
    what: &'static str,
    family: AddressFamily,
    flags: NeighbourFlags,
) -> Result<Vec<NeighbourMessage>, Error> {
    let mut question = NeighbourMessage::default();
    question.header.family = family;
    question.header.flags = flags;
    dump(handle, what, RouteNetlinkMessage::GetNeighbour(question), |entry| match entry {
        RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
        _ => None,
    })
    .await
}

fn link_name(link: &LinkMessage) -> &str {
    link.attributes
        .iter()
        .find_map(|a| if let LinkAttribute::IfName(name) = a { Some(name.as_str()) } else { None })
        .unwrap_or_default()
}

fn link_infos(link: &LinkMessage) -> &[LinkInfo] {
    link.attributes
        .iter()
        .find_map(|a| if let LinkAttribute::LinkInfo(infos) = a { Some(infos.as_slice()) } else { None })
        .unwrap_or_default()
}

fn is_kind(link: &LinkMessage, kind: &InfoKind) -> bool {
    link_infos(link).iter().any(|info| matches!(info, LinkInfo::Kind(k) if k == kind))
}

/// Whether it is a device as [`ensure_tunnel`] makes them.
fn vxlan_fits(link: &LinkMessage, port: u16) -> bool {
    link_infos(link).iter().any(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => {
            data.contains(&InfoVxlan::Port(port))
                && data.contains(&InfoVxlan::CollectMetadata(true))
                && data.contains(&InfoVxlan::UDPZeroCsumRX(true))
        }
        _ => false,
    })
}

fn mtu_of(link: &LinkMessage) -> u32 {
    link.attributes
        .iter()
        .find_map(|a| if let LinkAttribute::Mtu(mtu) = a { Some(*mtu) } else { None })
        .unwrap_or(0)
}

fn mac_of(link: &LinkMessage) -> [u8; 6] {
    link.attributes
        .iter()
        .find_map(|a| if let LinkAttribute::Address(mac) = a { mac.as_slice().try_into().ok() } else { None })
        .unwrap_or_default()
}

async fn read(selection: &Selection) -> Result<Facts, Error> {
    // A new socket each time: one that failed is not asked again.
    let handle = &connect()?;
    let links = links(handle).await?;
    let addresses = addresses(handle).await?;
    let routes = routes::list(handle).await?;

    let by_gateway: BTreeSet<IfIndex> =
        routes.iter().filter(|r| r.by_gateway).flat_map(|r| r.interfaces.iter().copied()).collect();
    let Roles { uplinks, pod_facing, bridges } = roles(&links, selection, &by_gateway, &addresses);

    let mut facts = Facts::default();
    for link in &links {
        let index = link.header.index;
        if pod_facing.contains(&index) {
            let interface = PodInterface {
                name: link_name(link).to_owned(),
                mac: mac_of(link),
                bridge: Some(controller(link)).filter(|bridge| bridges.contains(bridge)).unwrap_or(0),
                peer_elsewhere: peer_elsewhere(link),
                mtu: mtu_of(link),
            };
            facts.pod_interfaces.insert(index, interface);
        }
        if bridges.contains(&index) {
            facts.bridges.insert(index, Bridge { mac: mac_of(link), mtu: mtu_of(link) });
        }
        if link_name(link) == TUNNEL {
            facts.tunnel_ifindex = index;
        }
        if uplinks.contains(&index) {
            facts.uplinks.insert(index, uplink(link, addresses.get(&index).map_or(&[][..], Vec::as_slice)));
        } else if !pod_facing.contains(&index) && !bridges.contains(&index) {
            facts.others.insert(index);
        }
    }
    routes::put_into(&routes, &mut facts);
    if !bridges.is_empty() {
        facts.bridge_ports = bridge_ports(handle, &bridges, &pod_facing).await?;
    }
    facts.proxies = proxies::list(handle).await?;
    facts.proxies.retain(|(index, _), proxy| *proxy == Proxy::Ours || facts.uplinks.contains_key(index));
    facts.addresses = addresses.into_values().flatten().map(|a| a.net.addr()).filter(is_global).collect();
    facts.addresses.sort_unstable();
    facts.addresses.dedup();
    Ok(facts)
}

fn uplink(link: &LinkMessage, addresses: &[Address]) -> Uplink {
    // Nothing that lasts may hang on a temporary address; its network is a lasting one's, or advertised.
    let lasting = addresses.iter().filter(|a| !a.temporary && is_global(&a.net.addr()));
    Uplink {
        name: link_name(link).to_owned(),
        mac: mac_of(link),
        networks: lasting.map(|a| a.net).collect(),
        on_link: Vec::new(),
        mtu: mtu_of(link),
        up: link.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
    }
}

const fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_multicast(),
    }
}

/// Neither loopback nor link-local.
fn is_global(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
    }
}

/// An address with its network.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Address {
    net: IpNet,
    /// One of IPv6's privacy addresses, which live for a day (RFC 8981).
    temporary: bool,
}

async fn addresses(handle: &Handle) -> Result<BTreeMap<IfIndex, Vec<Address>>, Error> {
    let mut found: BTreeMap<IfIndex, Vec<Address>> = BTreeMap::new();
    let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let messages = dump(handle, "list addresses", question, |entry| match entry {
        RouteNetlinkMessage::NewAddress(address) => Some(address),
        _ => None,
    });
    for message in messages.await? {
        let has = |flag: AddressFlags| {
            message.attributes.iter().any(|a| matches!(a, AddressAttribute::Flags(f) if f.contains(flag)))
        };
        // Another host has it: the kernel does not use it (RFC 4862, 5.4.5).
        if has(AddressFlags::Dadfailed) {
            continue;
        }
        // On point-to-point interfaces `Address` is the peer, `Local` is ours.
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let address = local.or_else(|| {
            message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            })
        });
        if let Some(net) = address.and_then(|ip| IpNet::new(ip, message.header.prefix_len).ok()) {
            // `IFA_F_TEMPORARY` is IPv4's `IFA_F_SECONDARY` (include/uapi/linux/if_addr.h).
            let temporary = net.addr().is_ipv6() && has(AddressFlags::Secondary);
            found.entry(message.header.index).or_default().push(Address { net, temporary });
        }
    }
    for nets in found.values_mut() {
        nets.sort_unstable();
    }
    Ok(found)
}

/// Which port of a bridge leads to an address: the neighbour table gives its hardware address, the bridge's
/// forwarding table the port.
async fn bridge_ports(
    handle: &Handle,
    bridges: &BTreeSet<IfIndex>,
    pod_facing: &BTreeSet<IfIndex>,
) -> Result<BTreeMap<IpAddr, IfIndex>, Error> {
    let mut ports: BTreeMap<(IfIndex, Vec<u8>), IfIndex> = BTreeMap::new();
    let what = "list bridge forwarding entries";
    for entry in neighbours(handle, what, AddressFamily::Bridge, NeighbourFlags::Own).await? {
        let mut mac = None;
        let mut bridge = 0;
        for attribute in &entry.attributes {
            match attribute {
                NeighbourAttribute::LinkLayerAddress(address) => mac = Some(address.clone()),
                NeighbourAttribute::Controller(index) => bridge = *index,
                _ => {}
            }
        }
        if let Some(mac) = mac
            && pod_facing.contains(&entry.header.ifindex)
        {
            ports.insert((bridge, mac), entry.header.ifindex);
        }
    }
    let mut found = BTreeMap::new();
    let what = "list neighbours";
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for entry in neighbours(handle, what, family, NeighbourFlags::empty()).await? {
            if !bridges.contains(&entry.header.ifindex) {
                continue;
            }
            let ip = destination(&entry);
            let mac = entry.attributes.iter().find_map(|a| match a {
                NeighbourAttribute::LinkLayerAddress(address) => Some(address.clone()),
                _ => None,
            });
            if let (Some(ip), Some(mac)) = (ip, mac)
                && !is_link_local(&ip)
                && let Some(port) = ports.get(&(entry.header.ifindex, mac))
            {
                found.insert(ip, *port);
            }
        }
    }
    Ok(found)
}

fn destination(entry: &NeighbourMessage) -> Option<IpAddr> {
    entry.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })
}

/// Whether a name matches a pattern in which `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    let mut rest = rest;
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::{gone, matches};

    #[test]
    fn interfaces_that_are_gone_are_told_from_those_that_are_there() {
        // Every network namespace has its loopback, and as its first.
        assert!(gone([1]).is_empty());
        let never = 0x7fff_ffff;
        assert_eq!(gone([1, never, never - 1]), [never - 1, never].into());
    }

    #[test]
    fn patterns() {
        assert!(matches("veth*", "veth1a2b"));
        assert!(matches("veth*", "veth"));
        assert!(!matches("veth*", "eth0"));
        assert!(matches("eth0", "eth0"));
        assert!(!matches("eth0", "eth01"));
        assert!(matches("*", "anything"));
        assert!(matches("cali*-p*z", "cali12-pod-z"));
        assert!(!matches("cali*-p*z", "cali12-q-z"));
    }
}

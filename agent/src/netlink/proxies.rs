//! IPv6 proxy-neighbour entries: how a node asks its link to let solicitations for egress IPs through to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use datapath::keys::IfIndex;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteProtocol;
use rtnetlink::Handle;

use super::{Error, connect, destination, neighbours};
use crate::facts::Proxy;

/// By this `NDA_PROTOCOL` the agent knows its proxy-neighbour entries again, also after a restart; none of
/// the numbers that include/uapi/linux/rtnetlink.h has a name for. The kernel only keeps it.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(79);

/// All of them, of all interfaces.
pub(super) async fn list(handle: &Handle) -> Result<BTreeMap<(IfIndex, Ipv6Addr), Proxy>, Error> {
    let what = "list proxy neighbours";
    let mut found = BTreeMap::new();
    for entry in neighbours(handle, what, AddressFamily::Inet6, NeighbourFlags::Proxy).await? {
        let ours = entry.attributes.contains(&NeighbourAttribute::Protocol(PROTOCOL));
        if entry.header.flags.contains(NeighbourFlags::Proxy)
            && let Some(IpAddr::V6(ip)) = destination(&entry)
        {
            found.insert((entry.header.ifindex, ip), if ours { Proxy::Ours } else { Proxy::Foreign });
        }
    }
    Ok(found)
}

/// Makes our IPv6 proxy-neighbour entries be these, and leaves others' alone.
///
/// An entry makes the kernel join the address's solicited-node group on the interface (`pndisc_constructor`,
/// net/ipv6/ndisc.c), without which snooping switches and filtering NICs keep the solicitations away. With
/// `proxy_ndp` off the kernel itself answers none. The kernel drops all entries of an interface that goes
/// down (`pneigh_ifdown_and_unlock`, net/core/neighbour.c): `have` is what is there now.
pub async fn set(
    want: &BTreeSet<(IfIndex, Ipv6Addr)>,
    have: &BTreeMap<(IfIndex, Ipv6Addr), Proxy>,
) -> Result<(), Error> {
    let gone = have.iter().filter(|(key, proxy)| **proxy == Proxy::Ours && !want.contains(key));
    let gone: Vec<_> = gone.map(|(key, _)| *key).collect();
    // To add one that another program has would make it ours, and remove it in the end.
    let new: Vec<_> = want.iter().filter(|key| !have.contains_key(key)).copied().collect();
    if gone.is_empty() && new.is_empty() {
        return Ok(());
    }
    let handle = connect()?;
    for (index, ip) in gone {
        remove(&handle, index, ip).await?;
    }
    let what = "add a proxy neighbour";
    for (index, ip) in new {
        let mut request = handle.neighbours().add(index, ip.into()).flags(NeighbourFlags::Proxy);
        request.message_mut().attributes.push(NeighbourAttribute::Protocol(PROTOCOL));
        request.execute().await.map_err(|source| Error::Request { what, source })?;
    }
    Ok(())
}

/// Whether the kernel answers solicitations for proxy neighbours on an interface itself (`ndisc_recv_ns`,
/// net/ipv6/ndisc.c: `proxy_ndp` of the interface or of all; that forwarding is needed too is no reason to
/// rely on it).
#[must_use]
pub fn are_answered(interface: &str) -> bool {
    ["all", interface].iter().any(|name| {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/proxy_ndp");
        // No file: no IPv6, or no such interface.
        std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
    })
}

/// Removes every proxy-neighbour entry that an agent has made. Returns their addresses.
pub async fn remove_all() -> Result<Vec<Ipv6Addr>, Error> {
    let handle = connect()?;
    let mut removed = Vec::new();
    for ((index, ip), proxy) in list(&handle).await? {
        if proxy == Proxy::Ours {
            remove(&handle, index, ip).await?;
            removed.push(ip);
        }
    }
    Ok(removed)
}

async fn remove(handle: &Handle, index: IfIndex, ip: Ipv6Addr) -> Result<(), Error> {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Inet6;
    entry.header.ifindex = index;
    entry.header.state = NeighbourState::Permanent;
    entry.header.flags = NeighbourFlags::Proxy;
    entry.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)));
    let what = "remove a proxy neighbour";
    match handle.neighbours().del(entry).execute().await {
        // It went with its interface meanwhile.
        Err(rtnetlink::Error::NetlinkError(error)) if matches!(-error.raw_code(), ENOENT | ENODEV) => Ok(()),
        done => done.map_err(|source| Error::Request { what, source }),
    }
}

const ENOENT: i32 = 2;
const ENODEV: i32 = 19;

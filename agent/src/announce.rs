//! Announces the egress IPs that this node holds, so that switches and neighbours learn a move at once: ARP
//! announcements (RFC 5227, 3) and unsolicited neighbour advertisements (RFC 4861, 7.2.6), a burst when the
//! address is taken over and one now and then while it is held.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use datapath::addr::Ip;
use datapath::keys::IfIndex;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::facts::Facts;
use crate::image::MapImage;

/// Pauses before the announcements of the burst, which is at 0, 0.1, 0.5, 1, 2 and 4 seconds, and 10 seconds
/// after the first. RFC 5227 asks for two, RFC 4861 for up to three a second apart. The early ones shorten the
/// outage when one is lost; the late ones are for a link that comes up while the address moves: a switch's
/// port may not forward for seconds.
const BURST: [Duration; 7] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(6),
];
/// Pause between announcements while the address is held. A neighbour that missed the whole burst, because a
/// switch's port was blocked for longer (spanning tree: 30 s) or a line was down, would send to the old holder
/// until its own entry ages, which takes some routers four hours. A frame a minute bounds that.
const AGAIN: Duration = Duration::from_mins(1);

/// An egress IP on an uplink with its hardware address.
type Claim = (Ip, IfIndex, [u8; 6]);

/// Keeps track of what this node claims.
#[derive(Default)]
pub struct Announcer {
    claims: BTreeMap<Claim, JoinHandle<()>>,
    /// Kept open: to close one waits for all CPUs to have left it (`packet_release`,
    /// `net/packet/af_packet.c`),
    /// 10 ms and more, for which thousands of addresses that move at once have no time.
    socket: Rc<OnceCell<OwnedFd>>,
}

impl Announcer {
    /// Stops announcing what the image no longer claims. Call it before the image is applied: what this node
    /// gives up must not call in traffic.
    pub fn retract(&mut self, image: &MapImage, facts: &Facts) {
        let claims = claims(image, facts);
        self.claims.retain(|claim, task| {
            let kept = claims.contains(claim);
            if !kept {
                // It runs on this thread, so it is not in the middle of sending.
                task.abort();
            }
            kept
        });
    }

    /// Announces what the image newly claims. Call it after the image is applied: an announcement calls in
    /// traffic.
    pub fn announce(&mut self, image: &MapImage, facts: &Facts) {
        for claim in claims(image, facts) {
            let socket = &self.socket;
            self.claims
                .entry(claim)
                .or_insert_with(|| tokio::task::spawn_local(keep_announcing(claim, Rc::clone(socket))));
        }
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        for task in self.claims.values() {
            task.abort();
        }
    }
}

/// What this node holds on uplinks whose network contains it. Nobody on the link asks for an address that is
/// routed to the node, so that is not announced.
fn claims(image: &MapImage, facts: &Facts) -> BTreeSet<Claim> {
    let node = image.settings.node;
    image
        .egress_ips
        .values()
        .filter(|egress| node != 0 && egress.holder == node)
        .filter_map(|egress| {
            let uplink = facts.uplinks.get(&egress.uplink)?;
            uplink.prefix_of(&egress.ip.into())?;
            Some((egress.ip, egress.uplink, uplink.mac))
        })
        .collect()
}

async fn keep_announcing((ip, ifindex, mac): Claim, socket: Rc<OnceCell<OwnedFd>>) {
    let mut failing = false;
    for pause in BURST.into_iter().chain(std::iter::repeat(AGAIN)) {
        tokio::time::sleep(pause).await;
        match announcements(ip, mac).iter().try_for_each(|frame| send(&socket, ifindex, frame)) {
            Ok(()) => {
                debug!(%ip, ifindex, "announced");
                failing = false;
            }
            // Said once; a link that is down comes back.
            Err(error) if !failing => {
                warn!(
                    "cannot announce egress IP {ip} on interface {ifindex}: {error}; neighbours learn it when they ask"
                );
                failing = true;
            }
            Err(_) => {}
        }
    }
}

/// The frames that announce an address. IPv4: as request and as reply, because implementations differ in which
/// of the two they learn from; RFC 5944, 4.6, allows either.
fn announcements(ip: Ip, mac: [u8; 6]) -> Vec<Vec<u8>> {
    match IpAddr::from(ip) {
        IpAddr::V4(_) => {
            [ARP_REQUEST, ARP_REPLY].map(|operation| arp_announcement(operation, ip, mac)).to_vec()
        }
        IpAddr::V6(ip) => vec![neighbour_advertisement(ip.octets(), mac)],
    }
}

/// RFC 826.
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;

/// A broadcast ARP packet about one's own address, from Ethernet header on.
fn arp_announcement(operation: u8, ip: Ip, mac: [u8; 6]) -> Vec<u8> {
    // A request's target hardware address is not known (RFC 5227); a reply's is the sender's (RFC 5944, 4.6).
    let target = if operation == ARP_REQUEST { [0; 6] } else { mac };
    let mut frame = ethernet([0xff; 6], mac, [0x08, 0x06]);
    // Ethernet, IPv4, their address lengths (RFC 826).
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, operation]);
    frame.extend(mac);
    frame.extend(ip.v4_octets());
    frame.extend(target);
    frame.extend(ip.v4_octets());
    frame
}

/// An unsolicited neighbour advertisement to all nodes, from Ethernet header on (RFC 4861, 4.4 and 7.2.6).
fn neighbour_advertisement(ip: [u8; 16], mac: [u8; 6]) -> Vec<u8> {
    const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    const ICMPV6: u8 = 58;
    /// Not from a router, not solicited, overriding what the receiver has.
    const OVERRIDE: u8 = 0x20;
    /// Receivers refuse another (RFC 4861, 7.1.2): it proves that no router has forwarded the packet.
    const HOP_LIMIT: u8 = 255;
    const TARGET_LINK_LAYER_ADDRESS: u8 = 2;

    // Type, code, checksum, flags and reserved, target, option with its length in units of 8 octets.
    let mut message = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(ip);
    message.extend([TARGET_LINK_LAYER_ADDRESS, 1]);
    message.extend(mac);
    let length = message.len() as u8;
    // RFC 8200, 8.1: the checksum covers the addresses, the length and the next header.
    let pseudo = [&ip[..], &ALL_NODES, &[0, 0, 0, length, 0, 0, 0, ICMPV6]].concat();
    let checksum = internet_checksum(&[&pseudo[..], &message].concat());
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    // IPv6 multicast to Ethernet: RFC 2464, 7.
    let mut frame = ethernet([0x33, 0x33, 0, 0, 0, 1], mac, [0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0, 0, length, ICMPV6, HOP_LIMIT]);
    frame.extend(ip);
    frame.extend(ALL_NODES);
    frame.extend(message);
    frame
}

fn ethernet(destination: [u8; 6], source: [u8; 6], ethertype: [u8; 2]) -> Vec<u8> {
    [&destination[..], &source, &ethertype].concat()
}

/// RFC 1071, of an even number of octets.
fn internet_checksum(octets: &[u8]) -> u16 {
    let words = octets.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A socket that frames can be sent by, on any interface.
#[expect(unsafe_code, reason = "no kept crate offers packet(7) sockets without unsafe at the caller")]
fn packet_socket() -> io::Result<OwnedFd> {
    // Protocol 0: it receives nothing.
    // SAFETY: plain integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a frame out of an interface. It does not wait: what a full queue has no room for is lost.
#[expect(unsafe_code, reason = "no kept crate offers packet(7) sockets without unsafe at the caller")]
fn send(socket: &OnceCell<OwnedFd>, ifindex: IfIndex, frame: &[u8]) -> io::Result<()> {
    let socket = if let Some(socket) = socket.get() {
        socket
    } else {
        let opened = packet_socket()?;
        socket.get_or_init(|| opened)
    };
    // SAFETY: all zeros is a value of this plain struct.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = ifindex.cast_signed();
    // SAFETY: both pointers are valid for the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Uplink;
    use datapath::keys::EgressIp;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    #[test]
    fn an_ipv4_address_is_announced_by_request_and_reply_about_itself() {
        let frames = announcements(Ip::v4([192, 0, 2, 7]), MAC);
        assert_eq!(frames.len(), 2);
        for (frame, (operation, target)) in frames.iter().zip([(1, [0; 6]), (2, MAC)]) {
            assert_eq!(frame.len(), 42);
            assert_eq!(frame[..12], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9]);
            assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
            assert_eq!(frame[22..28], MAC);
            assert_eq!(frame[28..32], [192, 0, 2, 7]);
            assert_eq!(frame[32..38], target);
            assert_eq!(frame[38..42], [192, 0, 2, 7]);
        }
    }

    #[test]
    fn an_ipv6_address_is_announced_by_an_overriding_advertisement_to_all_nodes() {
        let ip: IpAddr = "2001:db8::aa:bbcc".parse().unwrap();
        let frames = announcements(ip.into(), MAC);
        let [frame] = &frames[..] else { panic!() };
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(frame[..14], [0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 0x86, 0xdd]);
        assert_eq!(frame[14..22], [0x60, 0, 0, 0, 0, 32, 58, 255]);
        let octets = Ip::from(ip).octets;
        assert_eq!(frame[22..38], octets, "from the address itself");
        assert_eq!(frame[38..54], [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(frame[54..56], [136, 0]);
        assert_eq!(frame[58..62], [0x20, 0, 0, 0], "override only");
        assert_eq!(frame[62..78], octets);
        assert_eq!(frame[78..], [2, 1, 2, 0, 0, 0, 0, 9]);
        // A checksum over what carries the right one is zero.
        let covered = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], &frame[54..]].concat();
        assert_eq!(internet_checksum(&covered), 0);
    }

    /// Uplinks 2 and 3; addresses held on 2 (both families), routed to 2, held by another node, and on no uplink.
    #[test]
    fn what_is_held_on_the_link_is_claimed_and_nothing_else() {
        let uplink = |networks: &[&str]| Uplink {
            name: "eth".into(),
            mac: MAC,
            networks: networks.iter().map(|n| n.parse().unwrap()).collect(),
            on_link: vec!["2001:db8:2::/64".parse().unwrap()],
            mtu: 1500,
            up: true,
        };
        let facts = Facts {
            uplinks: BTreeMap::from([(2, uplink(&["192.0.2.5/24", "2001:db8::5/64"]))]),
            ..Facts::default()
        };
        let mut image = MapImage::default();
        image.settings.node = 1;
        for (id, ip, uplink, holder) in [
            (1, "192.0.2.100", 2, 1),
            (2, "2001:db8::100", 2, 1),
            (3, "2001:db8:2::100", 2, 1),
            (4, "203.0.113.1", 2, 1),
            (5, "2001:db8:1::1", 2, 1),
            (6, "192.0.2.101", 2, 2),
            (7, "192.0.2.102", 0, 1),
            (8, "192.0.2.103", 2, 0),
        ] {
            let ip = ip.parse::<IpAddr>().unwrap().into();
            image.egress_ips.insert(id, EgressIp { ip, uplink, holder, ..EgressIp::default() });
        }
        let claimed = |image: &MapImage| {
            claims(image, &facts).into_iter().map(|(ip, _, _)| ip.to_string()).collect::<BTreeSet<_>>()
        };
        let expected = ["192.0.2.100", "2001:db8::100", "2001:db8:2::100"].map(str::to_owned);
        assert_eq!(claimed(&image), expected.into());
        // A node that has no id holds nothing, although nobody's holder is 0 too.
        image.settings.node = 0;
        assert_eq!(claimed(&image), BTreeSet::new());
    }
}

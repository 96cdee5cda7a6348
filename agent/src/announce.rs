//! Announces the egress IPs that this node holds, so that switches and neighbours learn a move at once:
//! ARP announcements (RFC 5227, 3), a burst when the address is taken over and once more later.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use datapath::addr::Ip;
use datapath::keys::IfIndex;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::image::MapImage;

/// Pauses before each announcement: RFC 5227 sends two; a link that is just coming up may lose the first.
const PAUSES: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(4)];

/// Keeps track of what this node claims.
#[derive(Default)]
pub struct Announcer {
    claims: BTreeMap<(Ip, IfIndex, [u8; 6]), JoinHandle<()>>,
}

impl Announcer {
    /// Announces what the image newly claims, stops announcing what it no longer does. Call it after the
    /// image is applied: an announcement calls in traffic.
    pub fn update(&mut self, image: &MapImage) {
        let node = image.settings.node;
        let claims: BTreeSet<_> = image
            .egress_ips
            .values()
            .filter(|egress| node != 0 && egress.holder == node && egress.ip.is_v4())
            .filter_map(|egress| {
                let uplink = image.interfaces.get(&egress.uplink)?;
                Some((egress.ip, egress.uplink, uplink.mac))
            })
            .collect();
        self.claims.retain(|claim, task| {
            let kept = claims.contains(claim);
            if !kept {
                task.abort();
            }
            kept
        });
        for claim in claims {
            self.claims.entry(claim).or_insert_with(|| tokio::spawn(burst(claim)));
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

async fn burst((ip, ifindex, mac): (Ip, IfIndex, [u8; 6])) {
    for pause in PAUSES {
        tokio::time::sleep(pause).await;
        match send(ifindex, &arp_announcement(ip, mac)) {
            Ok(()) => debug!(%ip, ifindex, "announced"),
            Err(error) => {
                warn!(
                    "cannot announce egress IP {ip} on interface {ifindex}: {error}; neighbours learn it when they ask"
                );
                return;
            }
        }
    }
}

/// A broadcast ARP request for one's own address, from Ethernet header on.
fn arp_announcement(ip: Ip, mac: [u8; 6]) -> [u8; 42] {
    let mut frame = [0; 42];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // ARP; Ethernet, IPv4, their address lengths; request (RFC 826).
    frame[12..22].copy_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&ip.v4_octets());
    frame[38..42].copy_from_slice(&ip.v4_octets());
    frame
}

/// Sends a frame out of an interface.
#[expect(unsafe_code, reason = "no kept crate offers packet(7) sockets without unsafe at the caller")]
fn send(ifindex: IfIndex, frame: &[u8]) -> io::Result<()> {
    // Protocol 0: a socket to send with, which receives nothing.
    // SAFETY: plain integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
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
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_request_for_ones_own_address() {
        let mac = [2, 0, 0, 0, 0, 9];
        let frame = arp_announcement(Ip::v4([192, 0, 2, 7]), mac);
        assert_eq!(frame[..12], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9]);
        assert_eq!(frame[20..22], [0, 1]);
        assert_eq!(frame[28..32], [192, 0, 2, 7]);
        assert_eq!(frame[32..38], [0; 6]);
        assert_eq!(frame[38..42], [192, 0, 2, 7]);
    }
}

//! Another machine that claims an egress IP that this node holds is reported: with two on one network, neighbours
//! send to either. ARP and neighbour advertisements on the uplinks are listened to.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use datapath::addr::Ip;
use datapath::keys::{IfIndex, InterfaceKind};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::image::MapImage;
use crate::metrics::State;

/// An address that moves is announced by its new holder, who may know before this node: only what is still held
/// this long after is claimed by two.
const GRACE: Duration = Duration::from_secs(1);
/// The same claim is said again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);
/// Who claims every address in turn, or by ever new hardware addresses, is not followed further.
const CLAIMS: usize = 256;

/// `ETH_P_ARP`, `ETH_P_IPV6` (`include/uapi/linux/if_ether.h`).
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const ETHERNET_LEN: usize = 14;
const IPV6_LEN: usize = 40;
const ICMPV6: u8 = 58;
/// RFC 4861, 4.4 and 4.6.1.
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const TARGET_LINK_LAYER_ADDRESS: u8 = 2;

type Mac = [u8; 6];

/// Somebody's word that an address is his.
type Claim = (Ip, IfIndex, Mac);

/// Watches the uplinks.
pub struct Conflicts {
    known: Rc<RefCell<Known>>,
    listeners: BTreeMap<(IfIndex, u16), JoinHandle<()>>,
}

/// What claims are judged by.
struct Known {
    state: Rc<RefCell<State>>,
    /// What this node holds, by address and uplink.
    held: BTreeSet<(Ip, IfIndex)>,
    /// Hardware addresses of this node.
    own: BTreeSet<Mac>,
    /// Claims of others: when they were last said; `None` while one waits for the end of its grace.
    claims: BTreeMap<Claim, Option<Instant>>,
}

impl Conflicts {
    /// Counts into the agent's state.
    #[must_use]
    pub fn new(state: Rc<RefCell<State>>) -> Self {
        let known = Known { state, held: BTreeSet::new(), own: BTreeSet::new(), claims: BTreeMap::new() };
        Self { known: Rc::new(RefCell::new(known)), listeners: BTreeMap::new() }
    }

    /// Listens on the image's uplinks, for what the image holds. Call it in a `LocalSet`.
    pub fn update(&mut self, image: &MapImage) {
        let uplinks: BTreeSet<(IfIndex, u16)> = image
            .interfaces
            .iter()
            .filter(|(_, interface)| interface.kind == InterfaceKind::Uplink as u8)
            .flat_map(|(index, _)| [(*index, ARP), (*index, IPV6)])
            .collect();
        self.listeners.retain(|uplink, task| {
            let kept = uplinks.contains(uplink);
            if !kept {
                task.abort();
            }
            kept
        });
        {
            let mut known = self.known.borrow_mut();
            known.held = held(image);
            known.own = image.interfaces.values().map(|interface| interface.mac).collect();
            let held = known.held.clone();
            known.claims.retain(|(ip, index, _), _| held.contains(&(*ip, *index)));
        }
        for uplink in uplinks {
            let known = &self.known;
            self.listeners
                .entry(uplink)
                .or_insert_with(|| tokio::task::spawn_local(listen(uplink.0, uplink.1, Rc::clone(known))));
        }
    }
}

impl Drop for Conflicts {
    fn drop(&mut self) {
        for task in self.listeners.values() {
            task.abort();
        }
    }
}

fn held(image: &MapImage) -> BTreeSet<(Ip, IfIndex)> {
    let node = image.settings.node;
    let own = image.egress_ips.values().filter(|e| node != 0 && e.holder == node && e.uplink != 0);
    own.map(|egress| (egress.ip, egress.uplink)).collect()
}

/// Reads until the task is aborted.
async fn listen(uplink: IfIndex, protocol: u16, known: Rc<RefCell<Known>>) {
    let failed = |error: io::Error| {
        warn!("cannot listen on interface {uplink} for others who claim egress IPs: {error}");
    };
    let socket = match open(uplink, protocol) {
        Ok(socket) => socket,
        Err(error) => return failed(error),
    };
    // The options of an advertisement are few.
    let mut frame = [0; 256];
    loop {
        let read = match socket.readable().await {
            Ok(mut ready) => ready.try_io(|fd| Ok(rustix::io::read(fd, &mut frame)?)),
            Err(error) => return failed(error),
        };
        let len = match read {
            Ok(Ok(len)) => len,
            // The interface went down; it may come up again.
            Ok(Err(error)) if error.kind() == io::ErrorKind::NetworkDown => continue,
            Ok(Err(error)) => return failed(error),
            Err(_not_ready) => continue,
        };
        if let Some((ip, mac)) = claim(frame.get(..len).unwrap_or_default()) {
            judge(&known, (ip, uplink, mac));
        }
    }
}

/// Whether somebody else claims what this node holds; says so if it is still so after a while.
fn judge(known: &Rc<RefCell<Known>>, claim: Claim) {
    let (ip, uplink, mac) = claim;
    let mut k = known.borrow_mut();
    if !k.held.contains(&(ip, uplink)) || k.own.contains(&mac) {
        return;
    }
    let said = k.claims.get(&claim).copied();
    if said == Some(None) || (said.is_none() && k.claims.len() >= CLAIMS) {
        return;
    }
    k.claims.insert(claim, None);
    drop(k);
    let known = Rc::clone(known);
    tokio::task::spawn_local(async move {
        tokio::time::sleep(GRACE).await;
        let mut k = known.borrow_mut();
        if !k.held.contains(&(ip, uplink)) {
            k.claims.remove(&claim);
            return;
        }
        k.state.borrow_mut().address_conflicts += 1;
        let said = said.flatten().filter(|at| at.elapsed() < SAY_AGAIN);
        if said.is_none() {
            warn!(
                "egress IP {ip}, which this node holds, is claimed by {} on interface {uplink}: two machines \
                 answer for it; take it from the other one, or out of the EgressIP object",
                Colons(mac)
            );
        } else {
            debug!(%ip, uplink, "claimed again");
        }
        k.claims.insert(claim, Some(said.unwrap_or_else(Instant::now)));
    });
}

/// What a frame claims: an address, and the hardware address that it is said to be at.
fn claim(frame: &[u8]) -> Option<(Ip, Mac)> {
    let bytes = |at: usize| frame.get(at..at + 6)?.try_into().ok();
    let payload = frame.get(ETHERNET_LEN..)?;
    match frame.get(12..14)? {
        // Whoever asks or answers says his own addresses; a probe (RFC 5227) has none yet.
        [0x08, 0x06] if payload.starts_with(&[0, 1, 8, 0, 6, 4]) => {
            let sender: [u8; 4] = payload.get(14..18)?.try_into().ok()?;
            (sender != [0; 4]).then_some(())?;
            Some((Ip::v4(sender), bytes(ETHERNET_LEN + 8)?))
        }
        [0x86, 0xdd] => {
            let icmp = payload.get(IPV6_LEN..)?;
            // A hop limit of 255: from this link (RFC 4861, 7.1.2).
            if payload[6] != ICMPV6 || payload[7] != 255 || icmp.get(..2)? != [NEIGHBOUR_ADVERTISEMENT, 0] {
                return None;
            }
            let target = Ip { octets: icmp.get(8..24)?.try_into().ok()? };
            let mac = match icmp.get(24..32) {
                Some([TARGET_LINK_LAYER_ADDRESS, 1, mac @ ..]) => mac.try_into().ok()?,
                _ => bytes(6)?,
            };
            Some((target, mac))
        }
        _ => None,
    }
}

/// A packet socket for one protocol of one interface. It sees what the TC programs let go: of ARP, all but
/// questions for held addresses, which `from_uplink` answers.
#[expect(unsafe_code, reason = "no kept crate offers packet(7) sockets without unsafe at the caller")]
fn open(uplink: IfIndex, protocol: u16) -> io::Result<AsyncFd<OwnedFd>> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // Protocol 0: it receives nothing until it is bound, so nothing from other interfaces.
    // SAFETY: plain integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    check(fd)?;
    // SAFETY: just opened, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if protocol == IPV6 {
        let mut filter = ADVERTISEMENTS;
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the pointer is valid for the length given, and what it refers to for the call.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as u32,
            )
        })?;
    }
    // SAFETY: all zeros is a value of this plain struct.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_protocol = protocol.to_be();
    at.sll_ifindex = uplink.cast_signed();
    // SAFETY: the pointer is valid for the length given.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const at).cast(), size_of::<libc::sockaddr_ll>() as u32)
    })?;
    // SAFETY: an `OwnedFd` stays the same open descriptor until it is dropped.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Lets neighbour advertisements pass and no other packet, which would be copied for nothing.
const ADVERTISEMENTS: [libc::sock_filter; 6] = {
    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const fn step(code: u16, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt: 0, jf, k }
    }
    [
        step(LOAD_BYTE, 0, (ETHERNET_LEN + 6) as u32),
        step(IS, 3, ICMPV6 as u32),
        step(LOAD_BYTE, 0, (ETHERNET_LEN + IPV6_LEN) as u32),
        step(IS, 1, NEIGHBOUR_ADVERTISEMENT as u32),
        step(RETURN, 0, u32::MAX),
        step(RETURN, 0, 0),
    ]
};

/// A hardware address as people write it.
struct Colons(Mac);

impl fmt::Display for Colons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&parts.join(":"))
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const OTHER: Mac = [2, 0, 0, 0, 0, 9];
    const HELD: [u8; 4] = [192, 0, 2, 7];

    fn arp(sender: [u8; 4], operation: u8) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1]);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
        frame.extend(OTHER);
        frame.extend(sender);
        frame.extend([0; 6]);
        frame.extend([192, 0, 2, 1]);
        frame
    }

    fn advertisement(hop_limit: u8, option: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
        frame.extend([0x60, 0, 0, 0, 0, 32, 58, hop_limit]);
        frame.extend([0; 32]);
        frame.extend([136, 0, 0, 0, 0x20, 0, 0, 0]);
        let target: IpAddr = "2001:db8::7".parse().unwrap();
        frame.extend(Ip::from(target).octets);
        frame.extend(option);
        frame
    }

    #[test]
    fn claims_in_arp_and_advertisements() {
        for operation in [1, 2] {
            assert_eq!(claim(&arp(HELD, operation)), Some((Ip::v4(HELD), OTHER)));
        }
        assert_eq!(claim(&arp([0; 4], 1)), None, "a probe");
        let target = Ip::from("2001:db8::7".parse::<IpAddr>().unwrap());
        let with_option = advertisement(255, &[2, 1, 2, 0, 0, 0, 0, 9]);
        assert_eq!(claim(&with_option), Some((target, OTHER)));
        assert_eq!(claim(&advertisement(255, &[])), Some((target, [2, 0, 0, 0, 0, 1])));
        assert_eq!(claim(&advertisement(64, &[])), None, "from elsewhere");
        let mut solicitation = with_option.clone();
        solicitation[ETHERNET_LEN + IPV6_LEN] = 135;
        assert_eq!(claim(&solicitation), None);
    }

    #[test]
    fn short_frames_claim_nothing() {
        for frame in [arp(HELD, 1), advertisement(255, &[])] {
            let needed = if frame[12] == 8 { 32 } else { frame.len() };
            for len in 0..needed {
                assert_eq!(claim(&frame[..len]), None, "{len}");
            }
        }
    }

    /// Claims are judged in paused time; what was counted after each.
    #[tokio::test(start_paused = true)]
    async fn only_lasting_claims_of_others_are_counted() {
        let state = Rc::new(RefCell::new(State::default()));
        let conflicts = Conflicts::new(Rc::clone(&state));
        let held = Ip::v4(HELD);
        let own = [2, 0, 0, 0, 0, 1];
        conflicts.known.borrow_mut().held = [(held, 3)].into();
        conflicts.known.borrow_mut().own = [own].into();
        let count = || state.borrow().address_conflicts;
        let judge = |claim| judge(&conflicts.known, claim);
        tokio::task::LocalSet::new()
            .run_until(async {
                judge((held, 3, own));
                judge((held, 4, OTHER)); // on another network
                judge((Ip::v4([192, 0, 2, 8]), 3, OTHER));
                tokio::time::sleep(GRACE * 2).await;
                assert_eq!(count(), 0);
                // A burst counts once.
                judge((held, 3, OTHER));
                judge((held, 3, OTHER));
                tokio::time::sleep(GRACE * 2).await;
                assert_eq!(count(), 1);
                judge((held, 3, OTHER));
                tokio::time::sleep(GRACE * 2).await;
                assert_eq!(count(), 2);
                // Given away meanwhile: it was the new holder.
                judge((held, 3, OTHER));
                conflicts.known.borrow_mut().held.clear();
                tokio::time::sleep(GRACE * 2).await;
                assert_eq!(count(), 2);
            })
            .await;
    }
}

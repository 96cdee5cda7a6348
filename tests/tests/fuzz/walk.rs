//! Where a packet's headers are, and its checksums: read from the RFCs alone, independently of the programs' parser
//! and of `lab::packet`.

/// Length of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
/// IP protocol numbers.
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP6: u8 = 58;
pub(crate) const SCTP: u8 = 132;

/// Offsets into a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Walk {
    /// IPv6.
    pub(crate) v6: bool,
    /// The IP header.
    pub(crate) ip: usize,
    /// Behind the IP header and IPv6's extension headers.
    pub(crate) l4: usize,
    /// What is there.
    pub(crate) protocol: u8,
    /// The IP packet's own end; Ethernet padding may follow.
    pub(crate) end: usize,
    /// It is a fragment.
    pub(crate) fragment: bool,
    /// It is a fragment other than the first: there is no transport header.
    pub(crate) later: bool,
}

pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Walks a frame's headers. `None`: what a kernel would refuse, and what is not IP.
pub(crate) fn walk(frame: &[u8]) -> Option<Walk> {
    match word(frame, 12)? {
        0x0800 => walk_v4(frame, ETHERNET, frame.len(), false),
        0x86dd => walk_v6(frame, ETHERNET, frame.len(), false),
        _ => None,
    }
}

/// Walks the packet that an ICMP error quotes, which may be cut off at the error's own end.
pub(crate) fn walk_quoted(frame: &[u8], error: &Walk) -> Option<Walk> {
    let at = error.l4 + 8;
    if error.v6 { walk_v6(frame, at, error.end, true) } else { walk_v4(frame, at, error.end, true) }
}

/// RFC 791, 3.1.
fn walk_v4(frame: &[u8], ip: usize, limit: usize, quoted: bool) -> Option<Walk> {
    if ip + 20 > limit {
        return None;
    }
    let header = usize::from(frame[ip] & 15) * 4;
    let total = usize::from(word(frame, ip + 2)?);
    // A total length of 0 is refused like any other that is too short: no packet here is GSO's, where it would be
    // BIG TCP's (`iph_totlen`, include/net/ip.h).
    let end = if quoted { limit } else { ip + total };
    if frame[ip] >> 4 != 4 || header < 20 || end > limit || ip + header > end {
        return None;
    }
    let fragment = word(frame, ip + 6)? & 0x3fff;
    Some(Walk {
        v6: false,
        ip,
        l4: ip + header,
        protocol: frame[ip + 9],
        end,
        fragment: fragment != 0,
        later: fragment & 0x1fff != 0,
    })
}

/// RFC 8200, 3 and 4.
fn walk_v6(frame: &[u8], ip: usize, limit: usize, quoted: bool) -> Option<Walk> {
    if ip + 40 > limit || frame[ip] >> 4 != 6 {
        return None;
    }
    let payload = usize::from(word(frame, ip + 4)?);
    let end = if quoted { limit } else { ip + 40 + payload };
    if end > limit {
        return None;
    }
    let (mut at, mut protocol, mut fragment, mut later) = (ip + 40, frame[ip + 6], false, false);
    loop {
        let len = match protocol {
            // Hop-by-hop, routing, destination options, authentication (RFC 4302, 2.2).
            0 | 43 | 60 => (usize::from(*frame[..end].get(at + 1)?) + 1) * 8,
            51 => (usize::from(*frame[..end].get(at + 1)?) + 2) * 4,
            44 => {
                let bits = word(&frame[..end], at + 2)?;
                fragment |= bits & 0xfff9 != 0;
                later |= bits & 0xfff8 != 0;
                8
            }
            _ => break,
        };
        if at + len > end {
            return None;
        }
        protocol = frame[at];
        at += len;
        if later {
            break;
        }
    }
    Some(Walk { v6: true, ip, l4: at, protocol, end, fragment, later })
}

impl Walk {
    pub(crate) fn source(&self) -> std::ops::Range<usize> {
        if self.v6 { self.ip + 8..self.ip + 24 } else { self.ip + 12..self.ip + 16 }
    }

    pub(crate) fn destination(&self) -> std::ops::Range<usize> {
        if self.v6 { self.ip + 24..self.ip + 40 } else { self.ip + 16..self.ip + 20 }
    }

    /// Where the transport checksum is, and how long; `None` where the packet ends before.
    pub(crate) fn checksum(&self) -> Option<std::ops::Range<usize>> {
        let (at, len) = match self.protocol {
            TCP => (16, 2),
            UDP => (6, 2),
            ICMP | ICMP6 => (2, 2),
            SCTP => (8, 4),
            _ => return None,
        };
        (!self.later && self.l4 + at + len <= self.end).then(|| self.l4 + at..self.l4 + at + len)
    }

    pub(crate) fn is_icmp(&self) -> bool {
        self.protocol == if self.v6 { ICMP6 } else { ICMP }
    }

    /// The sum of what the internet checksum of the transport covers, itself included, modulo 0xffff: 0 is right.
    pub(crate) fn transport_sum(&self, frame: &[u8]) -> u64 {
        let bytes = &frame[self.l4..self.end];
        let mut sum = words(bytes);
        if self.v6 || !self.is_icmp() {
            sum += words(&frame[self.source()]) + words(&frame[self.destination()]);
            sum += u64::from(self.protocol) + bytes.len() as u64;
        }
        sum % 0xffff
    }

    /// The same of an IPv4 header; IPv6 has none.
    pub(crate) fn header_sum(&self, frame: &[u8]) -> u64 {
        if self.v6 {
            return 0;
        }
        let header = usize::from(frame[self.ip] & 15) * 4;
        words(&frame[self.ip..self.ip + header]) % 0xffff
    }

    /// The MSS option of a SYN (RFC 9293, 3.2): where its value stands.
    pub(crate) fn mss(&self, frame: &[u8]) -> Option<usize> {
        if self.protocol != TCP || self.later || self.l4 + 20 > self.end || frame[self.l4 + 13] & 2 == 0 {
            return None;
        }
        let end = self.l4 + usize::from(frame[self.l4 + 12] >> 4) * 4;
        let mut at = self.l4 + 20;
        while at + 4 <= end.min(self.end) {
            match (frame[at], frame[at + 1]) {
                (0, _) => return None,
                (1, _) => at += 1,
                (2, 4) => return Some(at + 2),
                (_, len @ 2..) => at += usize::from(len),
                _ => return None,
            }
        }
        None
    }
}

fn words(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
}

/// SCTP's checksum as the field has it (RFC 9260, appendix A), over a packet whose field is taken as zero.
pub(crate) fn sctp_checksum(packet: &[u8]) -> [u8; 4] {
    let mut register = u32::MAX;
    for (at, byte) in packet.iter().enumerate() {
        register ^= if (8..12).contains(&at) { 0 } else { u32::from(*byte) };
        for _ in 0..8 {
            register = register >> 1 ^ if register & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    (!register).to_le_bytes()
}

/// Writes the checksums that a frame should have, as far as its headers tell where. A fragment's transport checksum
/// covers what is not here, and is left.
pub(crate) fn fix_sums(frame: &mut [u8]) {
    let Some(walk) = walk(frame) else { return };
    if !walk.v6 {
        frame[walk.ip + 10..walk.ip + 12].fill(0);
        let sum = 0xffff - walk.header_sum(frame);
        frame[walk.ip + 10..walk.ip + 12].copy_from_slice(&(sum as u16).to_be_bytes());
    }
    let Some(field) = walk.checksum().filter(|_| !walk.fragment) else { return };
    if walk.protocol == SCTP {
        let sum = sctp_checksum(&frame[walk.l4..walk.end]);
        frame[field].copy_from_slice(&sum);
        return;
    }
    frame[field.clone()].fill(0);
    let sum = 0xffff - walk.transport_sum(frame); // never 0, which would say "none" in UDP
    frame[field].copy_from_slice(&(sum as u16).to_be_bytes());
}

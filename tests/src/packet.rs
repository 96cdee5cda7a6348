//! Packets as bytes: a builder, a decoder, a checksum verifier and a translator.
//!
//! Written from the RFCs and not from `ebpf/`, which it is the oracle of: checksums are summed in full here,
//! never corrected.

use datapath::addr::Ip;
use datapath::keys::Tuple;
use datapath::packet::{ICMP, Kind, Packet, Part, SYN, TCP, UDP};

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
const IPV4: usize = 20;
const TYPE_IPV4: [u8; 2] = [8, 0];
const TYPE_ARP: [u8; 2] = [8, 6];

/// An address and a port, or an ICMP identifier.
pub type End = ([u8; 4], u16);

/// What an IPv4 packet carries.
#[derive(Clone, Debug)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source and destination port.
        ports: (u16, u16),
        /// Flags.
        flags: u8,
        /// Options, padded with zeros to a multiple of four.
        options: Vec<u8>,
        /// Data.
        payload: Vec<u8>,
    },
    /// UDP.
    Udp {
        /// Source and destination port.
        ports: (u16, u16),
        /// Whether it has a checksum.
        checksum: bool,
        /// Data.
        payload: Vec<u8>,
    },
    /// ICMP.
    Icmp {
        /// Type: 8 is an echo request, 0 a reply.
        kind: u8,
        /// The identifier, where the type has one.
        identifier: u16,
        /// Data.
        payload: Vec<u8>,
    },
    /// Anything, as it is.
    Raw {
        /// IP protocol.
        protocol: u8,
        /// Everything after the IP header.
        bytes: Vec<u8>,
    },
}

/// An IPv4 packet in an Ethernet frame.
#[derive(Clone, Debug)]
pub struct Built {
    /// Link-layer destination and source.
    pub macs: [[u8; 6]; 2],
    /// Source address.
    pub source: [u8; 4],
    /// Destination address.
    pub destination: [u8; 4],
    /// Time to live.
    pub ttl: u8,
    /// Fragment flags and offset.
    pub fragment: u16,
    /// IP options; a multiple of four.
    pub options: Vec<u8>,
    /// What it carries.
    pub transport: Transport,
    /// Bytes after the IP packet, as Ethernet pads short frames.
    pub padding: usize,
}

/// A TCP packet.
pub fn tcp(from: End, to: End, flags: u8) -> Built {
    let transport = Transport::Tcp { ports: (from.1, to.1), flags, options: vec![], payload: vec![] };
    Built::new(from.0, to.0, transport)
}

/// A UDP packet with some data.
pub fn udp(from: End, to: End) -> Built {
    let transport = Transport::Udp { ports: (from.1, to.1), checksum: true, payload: b"question".to_vec() };
    Built::new(from.0, to.0, transport)
}

/// An ICMP packet of a type: 8 is an echo request, 0 a reply.
pub fn icmp(from: [u8; 4], to: [u8; 4], kind: u8, identifier: u16) -> Built {
    Built::new(from, to, Transport::Icmp { kind, identifier, payload: b"abcdefgh".to_vec() })
}

/// A packet of any protocol.
pub fn raw(from: [u8; 4], to: [u8; 4], protocol: u8, bytes: &[u8]) -> Built {
    Built::new(from, to, Transport::Raw { protocol, bytes: bytes.to_vec() })
}

/// An ARP packet: `operation` 1 asks, 2 answers.
pub fn arp(operation: u8, sender: ([u8; 6], [u8; 4]), target: ([u8; 6], [u8; 4])) -> Vec<u8> {
    let link_destination = if operation == 1 { [0xff; 6] } else { target.0 };
    let fixed = [0, 1, 8, 0, 6, 4, 0, operation];
    [&link_destination[..], &sender.0, &TYPE_ARP, &fixed, &sender.0, &sender.1, &target.0, &target.1].concat()
}

impl Built {
    fn new(source: [u8; 4], destination: [u8; 4], transport: Transport) -> Self {
        let macs = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
        Self { macs, source, destination, ttl: 64, fragment: 0, options: vec![], transport, padding: 0 }
    }

    /// With these TCP options.
    #[must_use]
    pub fn tcp_options(mut self, bytes: &[u8]) -> Self {
        if let Transport::Tcp { options, .. } = &mut self.transport {
            *options = bytes.to_vec();
            options.resize(bytes.len().next_multiple_of(4), 0);
        }
        self
    }

    /// With this data.
    #[must_use]
    pub fn payload(mut self, data: &[u8]) -> Self {
        match &mut self.transport {
            Transport::Tcp { payload, .. }
            | Transport::Udp { payload, .. }
            | Transport::Icmp { payload, .. } => {
                *payload = data.to_vec();
            }
            Transport::Raw { bytes, .. } => *bytes = data.to_vec(),
        }
        self
    }

    /// Without a UDP checksum.
    #[must_use]
    pub fn no_checksum(mut self) -> Self {
        if let Transport::Udp { checksum, .. } = &mut self.transport {
            *checksum = false;
        }
        self
    }

    /// With these IP options.
    #[must_use]
    pub fn ip_options(mut self, bytes: &[u8]) -> Self {
        self.options = bytes.to_vec();
        self
    }

    /// One router hop later.
    #[must_use]
    pub const fn hop(mut self) -> Self {
        self.ttl -= 1;
        self
    }

    /// As a fragment.
    #[must_use]
    pub const fn fragment(mut self, flags_and_offset: u16) -> Self {
        self.fragment = flags_and_offset;
        self
    }

    /// The frame, with right checksums.
    #[must_use]
    pub fn frame(&self) -> Vec<u8> {
        let (protocol, transport) = self.transport_bytes();
        let header_len = IPV4 + self.options.len();
        let total = header_len + transport.len();
        let mut ip = vec![0x40 | (header_len / 4) as u8, 0];
        ip.extend((total as u16).to_be_bytes());
        ip.extend([0x12, 0x34]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, protocol, 0, 0]);
        ip.extend(self.source);
        ip.extend(self.destination);
        ip.extend(&self.options);
        let checksum = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        let [to, from] = self.macs;
        let mut frame = [&to[..], &from, &TYPE_IPV4, &ip, &transport].concat();
        frame.resize(frame.len() + self.padding, 0xa5);
        frame
    }

    fn transport_bytes(&self) -> (u8, Vec<u8>) {
        let ports = |(from, to): (u16, u16)| [from.to_be_bytes(), to.to_be_bytes()].concat();
        let (protocol, mut bytes, checksum_at, pseudo) = match &self.transport {
            Transport::Tcp { ports: p, flags, options, payload } => {
                let mut bytes = ports(*p);
                bytes.extend([1, 2, 3, 4, 5, 6, 7, 8]);
                bytes.extend([(((20 + options.len()) / 4) << 4) as u8, *flags, 0xff, 0xff, 0, 0, 0, 0]);
                bytes.extend(options);
                bytes.extend(payload);
                (TCP, bytes, Some(16), true)
            }
            Transport::Udp { ports: p, checksum, payload } => {
                let mut bytes = ports(*p);
                bytes.extend((8 + payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(payload);
                (UDP, bytes, checksum.then_some(6), true)
            }
            Transport::Icmp { kind, identifier, payload } => {
                let mut bytes = vec![*kind, 0, 0, 0];
                bytes.extend(identifier.to_be_bytes());
                bytes.extend([0, 7]);
                bytes.extend(payload);
                (ICMP, bytes, Some(2), false)
            }
            Transport::Raw { protocol, bytes } => (*protocol, bytes.clone(), None, false),
        };
        if let Some(at) = checksum_at {
            let covered = if pseudo { self.pseudo_sum(protocol, bytes.len()) } else { 0 };
            let mut checksum = !fold(covered + sum(&bytes));
            if protocol == UDP && checksum == 0 {
                checksum = 0xffff; // 0 says "none" (RFC 768)
            }
            bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        (protocol, bytes)
    }

    fn pseudo_sum(&self, protocol: u8, len: usize) -> u64 {
        sum(&self.source) + sum(&self.destination) + u64::from(protocol) + len as u64
    }
}

/// Sum of 16-bit words (RFC 1071), not folded.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|w| u64::from(w[0]) << 8 | w.get(1).map_or(0, |low| u64::from(*low))).sum()
}

/// A sum folded to 16 bits.
const fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Where the parts of an IPv4 frame are.
#[derive(Clone, Copy, Debug)]
pub struct Decoded<'a> {
    frame: &'a [u8],
    /// Offset of the transport header.
    pub l4: usize,
    /// IP protocol.
    pub protocol: u8,
    /// End of the IP packet.
    pub end: usize,
}

impl<'a> Decoded<'a> {
    /// Decodes a frame; `None`: not IPv4, or a header that a host refuses (RFC 1122, 3.2.1; RFC 791, 3.1).
    #[must_use]
    pub fn of(frame: &'a [u8]) -> Option<Self> {
        if frame.get(12..14)? != TYPE_IPV4 {
            return None;
        }
        let ip = frame.get(ETHERNET..ETHERNET + IPV4)?;
        let header_len = usize::from(ip[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        let on_wire = frame.len() - ETHERNET;
        // A total length of 0: BIG TCP's (include/net/ip.h, iph_totlen).
        let len = if total == 0 { on_wire } else { total };
        if ip[0] >> 4 != 4 || header_len < IPV4 || len < header_len && total != 0 || len > on_wire {
            return None;
        }
        Some(Self { frame, l4: ETHERNET + header_len, protocol: ip[9], end: ETHERNET + len })
    }

    fn word(&self, at: usize) -> Option<u16> {
        Some(u16::from_be_bytes([*self.frame.get(at)?, *self.frame.get(at + 1)?]))
    }

    fn address(&self, at: usize) -> [u8; 4] {
        let a = &self.frame[ETHERNET + at..];
        [a[0], a[1], a[2], a[3]]
    }

    /// Source address.
    #[must_use]
    pub fn source(&self) -> [u8; 4] {
        self.address(12)
    }

    /// Destination address.
    #[must_use]
    pub fn destination(&self) -> [u8; 4] {
        self.address(16)
    }

    fn is_fragment(&self) -> bool {
        self.word(ETHERNET + 6).is_some_and(|word| word & 0x3fff != 0)
    }

    /// What `ebpf`'s parser should make of the frame. Transport headers count as there if their fixed parts are
    /// in the IP packet: 20 bytes of TCP, 8 of UDP and ICMP. Whether an ICMP error by a router, about a packet to
    /// somebody else, is believed depends on where it is met.
    #[must_use]
    pub fn packet(&self, routers: bool) -> Packet {
        let mut tuple = Tuple {
            source: Ip::v4(self.source()),
            destination: Ip::v4(self.destination()),
            protocol: self.protocol,
            ..Tuple::default()
        };
        let fragment = self.word(ETHERNET + 6).unwrap_or(0);
        let part = match (fragment & 0x1fff, fragment & 0x2000) {
            (0, 0) => Part::Whole,
            (0, _) => Part::First,
            _ => Part::Later,
        };
        let identification = u32::from(self.word(ETHERNET + 4).unwrap_or(0)) | u32::from(self.protocol) << 16;
        let fragment_id = if part == Part::Whole { 0 } else { identification };
        let (mut tcp_flags, mut by_router) = (0, false);
        let transport = self.frame.get(self.l4..self.end).unwrap_or_default();
        let kind = match self.protocol {
            _ if part == Part::Later => Kind::Fragment,
            TCP if transport.len() < 20 => Kind::Malformed,
            UDP | ICMP if transport.len() < 8 => Kind::Malformed,
            TCP | UDP => {
                tuple.source_port = u16::from_be_bytes([transport[0], transport[1]]);
                tuple.destination_port = u16::from_be_bytes([transport[2], transport[3]]);
                if self.protocol == TCP {
                    tcp_flags = transport[13];
                    Kind::Tcp
                } else {
                    Kind::Udp
                }
            }
            ICMP => {
                let identifier = u16::from_be_bytes([transport[4], transport[5]]);
                match transport[0] {
                    8 => {
                        tuple.source_port = identifier;
                        Kind::EchoRequest
                    }
                    0 => {
                        tuple.destination_port = identifier;
                        Kind::EchoReply
                    }
                    3 | 11 | 12 if part == Part::Whole => match self.quoted() {
                        Some(quoted) if routers || quoted.source == tuple.source => {
                            by_router = quoted.source != tuple.source;
                            tuple = quoted;
                            Kind::IcmpError
                        }
                        _ => Kind::OtherIcmp,
                    },
                    _ => Kind::OtherIcmp,
                }
            }
            _ => Kind::Other,
        };
        Packet {
            tuple,
            len: (self.end - ETHERNET) as u32,
            wire_len: (self.end - ETHERNET) as u32,
            fragment_id,
            part,
            dont_fragment: fragment & 0x4000 != 0,
            kind,
            tcp_flags,
            ttl: self.frame[ETHERNET + 8],
            by_router,
        }
    }

    /// The packet that an ICMP error quotes, as a frame whose Ethernet header is the 14 bytes before it.
    fn quote(&self) -> Option<Decoded<'a>> {
        let frame = self.frame.get(self.l4 + 8 - ETHERNET..self.end)?;
        let ip = frame.get(ETHERNET..ETHERNET + IPV4)?;
        let l4 = ETHERNET + usize::from(ip[0] & 15) * 4;
        let first = u16::from_be_bytes([ip[6], ip[7]]) << 3 == 0; // without the flags
        let complete = ip[0] >> 4 == 4 && l4 >= ETHERNET + IPV4 && frame.len() >= l4 + 8;
        (first && complete).then_some(Decoded { frame, l4, protocol: ip[9], end: frame.len() })
    }

    /// What an ICMP error is about: the tuple of the packet that it quotes, reversed. `None`: it does not tell,
    /// or its receiver did not send that packet.
    fn quoted(&self) -> Option<Tuple> {
        let quote = self.quote().filter(|quote| quote.source() == self.destination())?;
        let word = |at| quote.word(quote.l4 + at).unwrap_or(0);
        let (from, to) = match (quote.protocol, quote.frame[quote.l4]) {
            (TCP | UDP, _) => (word(0), word(2)),
            (ICMP, 8) => (word(4), 0),
            (ICMP, 0) => (0, word(4)),
            _ => return None,
        };
        Some(Tuple {
            source: Ip::v4(quote.destination()),
            destination: Ip::v4(quote.source()),
            source_port: to,
            destination_port: from,
            protocol: quote.protocol,
            pad: [0; 3],
        })
    }

    /// Where the transport checksum is, if this packet's protocol has one that a translator must keep right.
    fn checksum_at(&self) -> Option<usize> {
        match self.protocol {
            TCP => Some(self.l4 + 16),
            UDP => Some(self.l4 + 6),
            ICMP => Some(self.l4 + 2),
            _ => None,
        }
    }

    /// The folded sum over what the transport checksum covers, the checksum included: 0xffff if it is right.
    fn transport_sum(&self) -> u16 {
        let bytes = &self.frame[self.l4..self.end];
        let pseudo = if self.protocol == ICMP {
            0
        } else {
            sum(&self.source()) + sum(&self.destination()) + u64::from(self.protocol) + bytes.len() as u64
        };
        fold(pseudo + sum(bytes))
    }

    fn header_sum(&self) -> u16 {
        fold(sum(&self.frame[ETHERNET..self.l4]))
    }
}

/// Says what is wrong with an IPv4 frame's checksums.
pub fn verify_checksums(frame: &[u8]) -> Result<(), String> {
    let packet = Decoded::of(frame).ok_or("not an IPv4 frame")?;
    if packet.header_sum() != 0xffff {
        return Err(format!("the IP header sums up to {:#06x}", packet.header_sum()));
    }
    let Some(at) = packet.checksum_at().filter(|_| !packet.is_fragment()) else { return Ok(()) };
    let checksum = packet.word(at).ok_or("no room for a transport checksum")?;
    if packet.protocol == UDP && checksum == 0 {
        return Ok(());
    }
    if packet.transport_sum() != 0xffff
        || (packet.protocol != ICMP && checksum == 0xffff && packet.protocol == TCP)
    {
        return Err(format!(
            "checksum {checksum:#06x}, the transport sums up to {:#06x}",
            packet.transport_sum()
        ));
    }
    Ok(())
}

/// Which end of a packet a translation sets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// SNAT.
    Source,
    /// Reverse SNAT.
    Destination,
}

/// Translates a frame: sets address and port (ICMP: identifier), lowers the MSS of a SYN to `mss` (0: leaves
/// it), and sums the checksums up anew. A checksum that was wrong stays wrong by as much. In an ICMP error the
/// quoted packet is translated at its other end. `None`: the packet has not the parts that would have to be
/// changed.
#[must_use]
pub fn translate(frame: &[u8], side: Side, to: End, mss: u16) -> Option<Vec<u8>> {
    let packet = Decoded::of(frame)?;
    let mut out = frame.to_vec();
    // Routers' errors come from outside only.
    let kind = packet.packet(side == Side::Destination).kind;
    if matches!(kind, Kind::OtherIcmp | Kind::Fragment | Kind::Other | Kind::Malformed) {
        return None;
    }
    if kind == Kind::IcmpError {
        let (quoted, sum) = (packet.l4 + 8 - ETHERNET, packet.transport_sum());
        let other = if side == Side::Source { Side::Destination } else { Side::Source };
        set_end(&mut out[quoted..], packet.quote()?, other, to, true)?;
        set_address(&mut out, packet, side, to.0);
        resum(&mut out, packet, packet.l4 + 2, sum, |d| d.transport_sum());
        return Some(out);
    }
    let before = packet.transport_sum();
    set_end(&mut out, packet, side, to, false)?;
    if packet.protocol == TCP && frame[packet.l4 + 13] & SYN != 0 && mss != 0 {
        lower_mss(&mut out, packet.l4, packet.end, mss);
        resum(&mut out, packet, packet.l4 + 16, before, |d| d.transport_sum());
    }
    Some(out)
}

/// Sets one end of a packet, which `packet` describes as it was. The checksum of a quoted TCP packet is not
/// among the bytes that are sure to be there, and is left.
fn set_end(
    out: &mut [u8],
    packet: Decoded<'_>,
    side: Side,
    (address, port): End,
    quoted: bool,
) -> Option<()> {
    let sum = packet.transport_sum();
    set_address(out, packet, side, address);
    let port_at = packet.l4
        + match (packet.protocol, side) {
            (ICMP, _) => 4,
            (_, Side::Source) => 0,
            (_, Side::Destination) => 2,
        };
    out[port_at..port_at + 2].copy_from_slice(&port.to_be_bytes());
    if quoted && packet.protocol == TCP {
        return Some(());
    }
    let at = packet.checksum_at()?;
    let checksum = packet.word(at)?;
    if packet.protocol != UDP || checksum != 0 {
        resum(out, packet, at, sum, |d| d.transport_sum());
    }
    if packet.protocol == UDP && checksum != 0 && out[at..at + 2] == [0, 0] {
        out[at..at + 2].fill(0xff); // 0 says "none"
    }
    Some(())
}

fn set_address(out: &mut [u8], packet: Decoded<'_>, side: Side, address: [u8; 4]) {
    let at = ETHERNET + if side == Side::Source { 12 } else { 16 };
    out[at..at + 4].copy_from_slice(&address);
    resum(out, packet, ETHERNET + 10, packet.header_sum(), |d| d.header_sum());
}

/// Takes one from the time to live.
pub fn hop(frame: &mut [u8]) {
    let before = frame.to_vec();
    let Some(packet) = Decoded::of(&before) else { return };
    frame[ETHERNET + 8] = frame[ETHERNET + 8].wrapping_sub(1);
    resum(frame, packet, ETHERNET + 10, packet.header_sum(), |d| d.header_sum());
}

/// Sets a checksum so that the sum over what it covers is what it was.
fn resum(out: &mut [u8], before: Decoded<'_>, at: usize, wanted: u16, total: impl Fn(Decoded<'_>) -> u16) {
    out[at..at + 2].fill(0);
    let rest = total(Decoded { frame: out, ..before });
    let checksum = fold(u64::from(wanted) + u64::from(!rest));
    let checksum = if checksum == 0xffff { 0 } else { checksum }; // the zero that RFC 1624 gives
    out[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

/// Lowers the MSS option (RFC 9293, 3.2), if there is one. Options that run past the packet's end are left.
fn lower_mss(frame: &mut [u8], l4: usize, end: usize, mss: u16) {
    let options_end = l4 + usize::from(frame[l4 + 12] >> 4) * 4;
    let mut at = l4 + 20;
    while options_end <= end && at + 4 <= options_end {
        let option = &frame[at..at + 4];
        match (option[0], option[1]) {
            (0, _) | (_, 0) => break,
            (1, _) => at += 1,
            (2, 4) => {
                if u16::from_be_bytes([option[2], option[3]]) > mss {
                    frame[at + 2..at + 4].copy_from_slice(&mss.to_be_bytes());
                }
                break;
            }
            (_, 1) => break,
            (_, len) => at += usize::from(len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; 4] = [10, 0, 0, 1];
    const B: [u8; 4] = [192, 0, 2, 7];

    /// The example header of RFC 1071's errata-free use in many texts: its checksum is b861.
    #[test]
    fn a_known_header_sums_up() {
        let header =
            [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        assert_eq!(!fold(sum(&header)), 0xb861);
    }

    #[test]
    fn built_packets_verify_and_damaged_ones_do_not() {
        let built = [
            tcp((A, 1), (B, 2), SYN).payload(b"odd"),
            udp((A, 1), (B, 2)),
            icmp(A, B, 8, 3),
            raw(A, B, 47, b"x"),
        ];
        for packet in built {
            let mut frame = packet.frame();
            verify_checksums(&frame).unwrap();
            frame[ETHERNET + 15] ^= 1;
            verify_checksums(&frame).unwrap_err();
        }
        verify_checksums(&udp((A, 1), (B, 2)).no_checksum().frame()).unwrap();
    }

    #[test]
    fn a_translation_keeps_right_checksums_right_and_wrong_ones_wrong() {
        for packet in
            [tcp((A, 1), (B, 2), SYN).tcp_options(&[1, 2, 4, 5, 180]), udp((A, 1), (B, 2)), icmp(A, B, 8, 1)]
        {
            let frame = packet.frame();
            let out = translate(&frame, Side::Source, (B, 4242), 1000).unwrap();
            verify_checksums(&out).unwrap();
            assert_eq!(Decoded::of(&out).unwrap().packet(true).tuple.source_port, 4242);
            let mut wrong = frame.clone();
            *wrong.last_mut().unwrap() ^= 0x11;
            let out = translate(&wrong, Side::Source, (B, 4242), 1000).unwrap();
            verify_checksums(&out).unwrap_err();
        }
    }

    #[test]
    fn what_is_no_ipv4_is_not_decoded() {
        let good = udp((A, 1), (B, 2)).frame();
        let with = |at: usize, value: u8| {
            let mut frame = good.clone();
            frame[at] = value;
            frame
        };
        assert!(Decoded::of(&good).is_some());
        for (at, value) in [(12, 0x86), (14, 0x65), (14, 0x44), (17, 0xff), (17, 19)] {
            assert!(Decoded::of(&with(at, value)).is_none(), "{at}: {value:#x}");
        }
        assert!(Decoded::of(&good[..30]).is_none());
    }
}

//! Packets as bytes: a builder, a decoder, a checksum verifier and a translator, for IPv4 and IPv6.
//!
//! Written from the RFCs and not from `ebpf/`, which it is the oracle of: checksums are summed in full here,
//! never corrected.

use std::net::Ipv6Addr;

use datapath::addr::Ip;
use datapath::keys::Tuple;
use datapath::packet::{ACK, ICMP, ICMPV6, Kind, Packet, Part, RST, SCTP, SYN, TCP, UDP};

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
const IPV4: usize = 20;
/// Length of an IPv6 header without extensions.
const IPV6: usize = 40;
const TYPE_IPV4: [u8; 2] = [8, 0];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const TYPE_ARP: [u8; 2] = [8, 6];

/// Extension headers of IPv6 (RFC 8200, 4): hop-by-hop options.
pub const HOP_BY_HOP: u8 = 0;
/// Routing.
pub const ROUTING: u8 = 43;
/// Fragment.
pub const FRAGMENT: u8 = 44;
/// Destination options.
pub const DESTINATION_OPTIONS: u8 = 60;
/// Extension headers that the programs look behind.
const MAX_EXTENSIONS: usize = 4;

/// SCTP chunks (RFC 9260, 3.2): DATA.
pub const DATA: u8 = 0;
/// INIT.
pub const INIT: u8 = 1;
/// INIT ACK.
pub const INIT_ACK: u8 = 2;
/// ABORT.
pub const ABORT: u8 = 6;
/// SHUTDOWN COMPLETE.
pub const SHUTDOWN_COMPLETE: u8 = 14;

/// An address and a port, or an ICMP identifier.
pub type End = (Ip, u16);

/// What an address can be written as.
pub trait Address {
    /// The address.
    fn ip(self) -> Ip;
}

impl Address for Ip {
    fn ip(self) -> Ip {
        self
    }
}

impl Address for [u8; 4] {
    fn ip(self) -> Ip {
        Ip::v4(self)
    }
}

impl Address for &str {
    fn ip(self) -> Ip {
        self.parse::<Ipv6Addr>().expect("an IPv6 address").into()
    }
}

/// An IPv6 address by its first four words and its last.
#[must_use]
pub const fn v6(words: [u16; 5]) -> Ip {
    let mut octets = [0; 16];
    let mut at = 0;
    while at < words.len() {
        let place = if at == 4 { 14 } else { 2 * at };
        [octets[place], octets[place + 1]] = words[at].to_be_bytes();
        at += 1;
    }
    Ip { octets }
}

/// A packet of a protocol whose checksum, at `at`, covers the pseudo-header, too; it is made right.
#[must_use]
pub fn summed(from: impl Address, to: impl Address, protocol: u8, bytes: &[u8], at: usize) -> Built {
    let (from, to, mut bytes) = (from.ip(), to.ip(), bytes.to_vec());
    bytes[at..at + 2].fill(0);
    let checksum = !fold(pseudo_sum(&from, &to, protocol, bytes.len()) + sum(&bytes));
    bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    raw(from, to, protocol, &bytes)
}

/// What an IP packet carries.
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
    /// SCTP, one chunk.
    Sctp {
        /// Source and destination port.
        ports: (u16, u16),
        /// The chunk's type.
        chunk: u8,
        /// The chunk's value.
        payload: Vec<u8>,
    },
    /// ICMP of the packet's family.
    Icmp {
        /// Type: 8 is an echo request, 0 a reply; 128 and 129 over IPv6.
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

/// An IP packet in an Ethernet frame.
#[derive(Clone, Debug)]
pub struct Built {
    /// Link-layer destination and source.
    pub macs: [[u8; 6]; 2],
    /// Source address.
    pub source: Ip,
    /// Destination address.
    pub destination: Ip,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Identification: 16 bits of IPv4; 32 of IPv6, where it is fragmented.
    pub id: u32,
    /// IPv4: fragment flags and offset.
    pub fragment: u16,
    /// IPv4: options; a multiple of four.
    pub options: Vec<u8>,
    /// IPv6: extension headers, each by its number and what follows its first byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// What it carries.
    pub transport: Transport,
    /// Bytes after the IP packet, as Ethernet pads short frames.
    pub padding: usize,
}

/// A TCP packet.
pub fn tcp(from: (impl Address, u16), to: (impl Address, u16), flags: u8) -> Built {
    let transport = Transport::Tcp { ports: (from.1, to.1), flags, options: vec![], payload: vec![] };
    Built::new(from.0, to.0, transport)
}

/// A UDP packet with some data.
pub fn udp(from: (impl Address, u16), to: (impl Address, u16)) -> Built {
    let transport = Transport::Udp { ports: (from.1, to.1), checksum: true, payload: b"question".to_vec() };
    Built::new(from.0, to.0, transport)
}

/// An SCTP packet with one chunk.
pub fn sctp(from: (impl Address, u16), to: (impl Address, u16), chunk: u8) -> Built {
    let transport = Transport::Sctp { ports: (from.1, to.1), chunk, payload: b"parameters".to_vec() };
    Built::new(from.0, to.0, transport)
}

/// An ICMP packet of a type: 8 is an echo request, 0 a reply; 128 and 129 over IPv6.
pub fn icmp(from: impl Address, to: impl Address, kind: u8, identifier: u16) -> Built {
    Built::new(from, to, Transport::Icmp { kind, identifier, payload: b"abcdefgh".to_vec() })
}

/// An echo request, or a reply.
pub fn echo(from: impl Address, to: impl Address, request: bool, identifier: u16) -> Built {
    let from = from.ip();
    let kind = match (from.is_v4(), request) {
        (true, true) => 8,
        (true, false) => 0,
        (false, true) => 128,
        (false, false) => 129,
    };
    icmp(from, to, kind, identifier)
}

/// A packet of any protocol.
pub fn raw(from: impl Address, to: impl Address, protocol: u8, bytes: &[u8]) -> Built {
    Built::new(from, to, Transport::Raw { protocol, bytes: bytes.to_vec() })
}

/// An ARP packet: `operation` 1 asks, 2 answers.
pub fn arp(operation: u8, sender: ([u8; 6], [u8; 4]), target: ([u8; 6], [u8; 4])) -> Vec<u8> {
    let link_destination = if operation == 1 { [0xff; 6] } else { target.0 };
    let fixed = [0, 1, 8, 0, 6, 4, 0, operation];
    [&link_destination[..], &sender.0, &TYPE_ARP, &fixed, &sender.0, &sender.1, &target.0, &target.1].concat()
}

impl Built {
    fn new(source: impl Address, destination: impl Address, transport: Transport) -> Self {
        Self {
            macs: [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]],
            source: source.ip(),
            destination: destination.ip(),
            ttl: 64,
            id: 0x1234,
            fragment: 0,
            options: vec![],
            extensions: vec![],
            transport,
            padding: 0,
        }
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
            | Transport::Sctp { payload, .. }
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

    /// With these IPv4 options.
    #[must_use]
    pub fn ip_options(mut self, bytes: &[u8]) -> Self {
        self.options = bytes.to_vec();
        self
    }

    /// With an IPv6 extension header behind those it has: its number, and what follows its first byte.
    #[must_use]
    pub fn extension(mut self, kind: u8, behind_first_byte: &[u8]) -> Self {
        self.extensions.push((kind, behind_first_byte.to_vec()));
        self
    }

    /// One router hop later.
    #[must_use]
    pub const fn hop(mut self) -> Self {
        self.ttl -= 1;
        self
    }

    /// As an IPv4 fragment: its flags and offset; what it carries is what it was to carry whole.
    #[must_use]
    pub const fn fragment(mut self, flags_and_offset: u16) -> Self {
        self.fragment = flags_and_offset;
        self
    }

    /// The frame, with right checksums.
    #[must_use]
    pub fn frame(&self) -> Vec<u8> {
        let (protocol, transport) = self.transport_bytes();
        self.frame_of(protocol, &transport, None)
    }

    /// The frames of the datagram's fragments, cut at these offsets behind the IP header and its extensions;
    /// each a multiple of 8 (RFC 791, 3.2; RFC 8200, 4.5).
    #[must_use]
    pub fn fragments(&self, cuts: &[usize]) -> Vec<Vec<u8>> {
        let (protocol, transport) = self.transport_bytes();
        let ends = cuts.iter().copied().chain([transport.len()]);
        let begins = [0].into_iter().chain(cuts.iter().copied());
        begins
            .zip(ends)
            .map(|(begin, end)| {
                assert_eq!(begin % 8, 0, "fragments begin at multiples of 8");
                let more = u16::from(end < transport.len());
                let place = (begin as u16, more);
                self.frame_of(protocol, &transport[begin..end], Some(place))
            })
            .collect()
    }

    /// `place`: offset in bytes, and whether more fragments follow.
    fn frame_of(&self, protocol: u8, transport: &[u8], place: Option<(u16, u16)>) -> Vec<u8> {
        let v4 = self.source.is_v4();
        let ip = if v4 {
            self.v4_header(protocol, transport.len(), place)
        } else {
            self.v6_header(protocol, transport.len(), place)
        };
        let [to, from] = self.macs;
        let ethertype = if v4 { TYPE_IPV4 } else { TYPE_IPV6 };
        let mut frame = [&to[..], &from, &ethertype, &ip, transport].concat();
        frame.resize(frame.len() + self.padding, 0xa5);
        frame
    }

    fn v4_header(&self, protocol: u8, len: usize, place: Option<(u16, u16)>) -> Vec<u8> {
        let header_len = IPV4 + self.options.len();
        let mut ip = vec![0x40 | (header_len / 4) as u8, 0];
        ip.extend(((header_len + len) as u16).to_be_bytes());
        ip.extend((self.id as u16).to_be_bytes());
        let fragment = place.map_or(self.fragment, |(offset, more)| (more << 13) | (offset / 8));
        ip.extend(fragment.to_be_bytes());
        ip.extend([self.ttl, protocol, 0, 0]);
        ip.extend(self.source.v4_octets());
        ip.extend(self.destination.v4_octets());
        ip.extend(&self.options);
        let checksum = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        ip
    }

    fn v6_header(&self, protocol: u8, len: usize, place: Option<(u16, u16)>) -> Vec<u8> {
        let mut extensions = self.extensions.clone();
        if let Some((offset, more)) = place {
            let offset = (offset | more).to_be_bytes();
            extensions.push((FRAGMENT, [&[0][..], &offset, &self.id.to_be_bytes()].concat()));
        }
        let kinds: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).chain([protocol]).collect();
        let mut chain = vec![];
        for ((_, bytes), next) in extensions.iter().zip(&kinds[1..]) {
            chain.push(*next);
            chain.extend(bytes);
        }
        let mut ip = vec![0x60, 0xb, 0xad, 0xca]; // with a flow label, which nobody is to touch
        ip.extend(((chain.len() + len) as u16).to_be_bytes());
        ip.extend([kinds[0], self.ttl]);
        ip.extend(self.source.octets);
        ip.extend(self.destination.octets);
        ip.extend(chain);
        ip
    }

    fn transport_bytes(&self) -> (u8, Vec<u8>) {
        let v4 = self.source.is_v4();
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
            Transport::Sctp { ports: p, chunk, payload } => {
                let mut bytes = ports(*p);
                bytes.extend([0xca, 0xfe, 0xba, 0xbe, 0, 0, 0, 0, *chunk, 0]);
                bytes.extend((4 + payload.len() as u16).to_be_bytes());
                bytes.extend(payload);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                let checksum = crc32c(&bytes).to_le_bytes();
                bytes[8..12].copy_from_slice(&checksum);
                (SCTP, bytes, None, false)
            }
            Transport::Icmp { kind, identifier, payload } => {
                let mut bytes = vec![*kind, 0, 0, 0];
                bytes.extend(identifier.to_be_bytes());
                bytes.extend([0, 7]);
                bytes.extend(payload);
                (if v4 { ICMP } else { ICMPV6 }, bytes, Some(2), !v4)
            }
            Transport::Raw { protocol, bytes } => (*protocol, bytes.clone(), None, false),
        };
        if let Some(at) = checksum_at {
            let covered =
                if pseudo { pseudo_sum(&self.source, &self.destination, protocol, bytes.len()) } else { 0 };
            let mut checksum = !fold(covered + sum(&bytes));
            if protocol == UDP && checksum == 0 {
                checksum = 0xffff; // 0 says "none" (RFC 768)
            }
            bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        (protocol, bytes)
    }
}

/// Sum of 16-bit words (RFC 1071), not folded.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|w| u64::from(w[0]) << 8 | w.get(1).map_or(0, |low| u64::from(*low))).sum()
}

/// Sum of the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1). The same fields for both families.
fn pseudo_sum(source: &Ip, destination: &Ip, protocol: u8, len: usize) -> u64 {
    let address = |ip: &Ip| if ip.is_v4() { sum(&ip.v4_octets()) } else { sum(&ip.octets) };
    address(source) + address(destination) + u64::from(protocol) + len as u64
}

/// A sum folded to 16 bits.
const fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum of an SCTP packet, its field taken as zero, bit by bit (RFC 9260, appendix A). It stands in the
/// packet least significant byte first.
fn crc32c(packet: &[u8]) -> u32 {
    let mut register = u32::MAX;
    for (at, byte) in packet.iter().enumerate() {
        register ^= if (8..12).contains(&at) { 0 } else { u32::from(*byte) };
        for _ in 0..8 {
            register = if register & 1 == 1 { register >> 1 ^ 0x82f6_3b78 } else { register >> 1 };
        }
    }
    !register
}

/// Where the parts of an IP frame are.
#[derive(Clone, Copy, Debug)]
pub struct Decoded<'a> {
    frame: &'a [u8],
    v4: bool,
    options: bool,
    part: Part,
    fragment_id: u32,
    /// Offset of the transport header.
    pub l4: usize,
    /// IP protocol.
    pub protocol: u8,
    /// End of the IP packet.
    pub end: usize,
}

impl<'a> Decoded<'a> {
    /// Decodes a frame; `None`: not IP, or a header that a host refuses (RFC 1122, 3.2.1; RFC 791, 3.1; RFC
    /// 8200, 3).
    #[must_use]
    pub fn of(frame: &'a [u8]) -> Option<Self> {
        match frame.get(12..14)? {
            [8, 0] => Self::of_v4(frame),
            [0x86, 0xdd] => Self::of_v6(frame),
            _ => None,
        }
    }

    fn of_v4(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..ETHERNET + IPV4)?;
        let header_len = usize::from(ip[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        let on_wire = frame.len() - ETHERNET;
        // A total length of 0 is BIG TCP's (include/net/ip.h, iph_totlen), which no frame here is.
        if ip[0] >> 4 != 4 || header_len < IPV4 || total < header_len || total > on_wire {
            return None;
        }
        let fragment = u16::from_be_bytes([ip[6], ip[7]]);
        let part = part(fragment & 0x1fff, fragment & 0x2000);
        // The protocol is part of what names a datagram (RFC 791, 3.2).
        let id = u32::from(u16::from_be_bytes([ip[4], ip[5]])) | u32::from(ip[9]) << 16;
        let fragment_id = if part == Part::Whole { 0 } else { id };
        let (l4, end) = (ETHERNET + header_len, ETHERNET + total);
        Some(Self {
            frame,
            v4: true,
            options: header_len > IPV4,
            part,
            fragment_id,
            l4,
            protocol: ip[9],
            end,
        })
    }

    fn of_v6(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..ETHERNET + IPV6)?;
        let payload = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
        let end = ETHERNET + IPV6 + payload;
        if ip[0] >> 4 != 6 || end > frame.len() {
            return None;
        }
        let l4 = ETHERNET + IPV6;
        let mut packet = Self {
            frame,
            v4: false,
            options: false,
            part: Part::Whole,
            fragment_id: 0,
            l4,
            protocol: ip[6],
            end,
        };
        if !packet.is_mapped() {
            packet.walk();
        }
        Some(packet)
    }

    /// Goes behind the extension headers (RFC 8200, 4.1), as far as they are looked behind. Behind the header
    /// of a later fragment there is none.
    fn walk(&mut self) {
        for _ in 0..MAX_EXTENSIONS {
            let within = &self.frame[..self.end];
            let Some(header) = within.get(self.l4..self.l4 + 8) else { return };
            match self.protocol {
                _ if self.part == Part::Later => return,
                FRAGMENT if self.part != Part::Whole => return,
                FRAGMENT => {
                    let fragment = u16::from_be_bytes([header[2], header[3]]);
                    self.part = part(fragment & 0xfff8, fragment & 1);
                    if self.part != Part::Whole {
                        self.fragment_id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                    }
                    self.l4 += 8;
                }
                ROUTING if header[3] > 0 => return,
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    self.options |= self.protocol != DESTINATION_OPTIONS;
                    self.l4 += 8 + 8 * usize::from(header[1]);
                }
                _ => return,
            }
            self.protocol = header[0];
        }
    }

    /// An IPv6 packet with an IPv4-mapped address, which no packet may carry (RFC 4291, 2.5.5.2).
    fn is_mapped(&self) -> bool {
        !self.v4 && (self.source().is_v4() || self.destination().is_v4())
    }

    fn word(&self, at: usize) -> Option<u16> {
        Some(u16::from_be_bytes([*self.frame.get(at)?, *self.frame.get(at + 1)?]))
    }

    fn address(&self, second: bool) -> Ip {
        let at = address_at(self.v4, second);
        if self.v4 {
            let a = &self.frame[at..];
            return Ip::v4([a[0], a[1], a[2], a[3]]);
        }
        let mut octets = [0; 16];
        octets.copy_from_slice(&self.frame[at..at + 16]);
        Ip { octets }
    }

    /// Source address.
    #[must_use]
    pub fn source(&self) -> Ip {
        self.address(false)
    }

    /// Destination address.
    #[must_use]
    pub fn destination(&self) -> Ip {
        self.address(true)
    }

    /// Whether it carries ICMP of its own family.
    const fn is_icmp(&self) -> bool {
        self.protocol == if self.v4 { ICMP } else { ICMPV6 }
    }

    /// What `ebpf`'s parser should make of the frame. Transport headers count as there if their fixed parts are
    /// in the IP packet: 20 bytes of TCP, 8 of UDP and ICMP, 12 of SCTP and 4 of its first chunk. Whether an
    /// ICMP error by a router, about a packet to somebody else, is believed depends on where it is met.
    #[must_use]
    pub fn packet(&self, routers: bool) -> Packet {
        let mut tuple = Tuple {
            source: self.source(),
            destination: self.destination(),
            protocol: self.protocol,
            ..Tuple::default()
        };
        let (mut tcp_flags, mut by_router) = (0, false);
        let transport = self.frame.get(self.l4..self.end).unwrap_or_default();
        let has_ports = matches!(self.protocol, TCP | UDP | SCTP);
        if has_ports && transport.len() >= 8 && self.part != Part::Later && !self.is_mapped() {
            tuple.source_port = u16::from_be_bytes([transport[0], transport[1]]);
            tuple.destination_port = u16::from_be_bytes([transport[2], transport[3]]);
        }
        let kind = match self.protocol {
            _ if self.is_mapped() => Kind::Malformed,
            _ if self.part == Part::Later => Kind::Fragment,
            TCP if transport.len() < 20 => Kind::Malformed,
            SCTP if transport.len() < 16 => Kind::Malformed,
            UDP if transport.len() < 8 => Kind::Malformed,
            _ if self.is_icmp() && transport.len() < 8 => Kind::Malformed,
            TCP => {
                tcp_flags = transport[13];
                Kind::Tcp
            }
            UDP => Kind::Udp,
            SCTP => {
                tcp_flags = match transport[12] {
                    INIT => SYN,
                    INIT_ACK => SYN | ACK,
                    ABORT | SHUTDOWN_COMPLETE => RST,
                    _ => ACK,
                };
                Kind::Sctp
            }
            _ if self.is_icmp() => {
                let identifier = u16::from_be_bytes([transport[4], transport[5]]);
                match (self.v4, transport[0]) {
                    (true, 8) | (false, 128) => {
                        tuple.source_port = identifier;
                        Kind::EchoRequest
                    }
                    (true, 0) | (false, 129) => {
                        tuple.destination_port = identifier;
                        Kind::EchoReply
                    }
                    (true, 3 | 11 | 12) | (false, 1..=4) if self.part == Part::Whole => match self.quoted() {
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
        let len = (self.end - ETHERNET) as u32;
        Packet {
            tuple,
            len,
            wire_len: len,
            fragment_id: self.fragment_id,
            part: self.part,
            options: self.options,
            // Routers do not fragment IPv6 (RFC 8200, 5).
            dont_fragment: !self.v4 || self.word(ETHERNET + 6).is_some_and(|word| word & 0x4000 != 0),
            kind,
            tcp_flags,
            ttl: self.frame[ETHERNET + if self.v4 { 8 } else { 7 }],
            by_router,
        }
    }

    /// Whether it asks for a neighbour (RFC 4861, 4.3).
    #[must_use]
    pub fn is_solicitation(&self) -> bool {
        let whole_header = self.l4 + 8 <= self.end && self.part != Part::Later && !self.is_mapped();
        !self.v4 && self.is_icmp() && whole_header && self.frame[self.l4] == 135
    }

    /// Length of the IP packets on the wire that this one is cut into, `gso` bytes of data each: of the largest.
    #[must_use]
    pub fn wire_len(&self, gso: u32) -> u32 {
        let header = match self.packet(false).kind {
            Kind::Tcp => u32::from(self.frame[self.l4 + 12] >> 4) * 4,
            Kind::Udp => 8,
            Kind::Sctp => 12,
            Kind::EchoRequest
            | Kind::EchoReply
            | Kind::IcmpError
            | Kind::OtherIcmp
            | Kind::Fragment
            | Kind::Other
            | Kind::Malformed => return (self.end - ETHERNET) as u32,
        };
        (self.l4 - ETHERNET) as u32 + header + gso
    }

    /// The packet that an ICMP error quotes, as a frame whose Ethernet header is the 14 bytes before it. IPv6:
    /// what is quoted with extension headers cannot be told.
    fn quote(&self) -> Option<Decoded<'a>> {
        let frame = self.frame.get(self.l4 + 8 - ETHERNET..self.end)?;
        let ip = frame.get(ETHERNET..ETHERNET + if self.v4 { IPV4 } else { IPV6 })?;
        let (l4, protocol, sound) = if self.v4 {
            let l4 = ETHERNET + usize::from(ip[0] & 15) * 4;
            let first = u16::from_be_bytes([ip[6], ip[7]]) << 3 == 0; // without the flags
            (l4, ip[9], ip[0] >> 4 == 4 && first && l4 >= ETHERNET + IPV4)
        } else {
            (ETHERNET + IPV6, ip[6], ip[0] >> 4 == 6)
        };
        let end = frame.len();
        (sound && end >= l4 + 8).then_some(Decoded { frame, l4, protocol, end, ..*self })
    }

    /// What an ICMP error is about: the tuple of the packet that it quotes, reversed. `None`: it does not tell,
    /// or its receiver did not send that packet.
    fn quoted(&self) -> Option<Tuple> {
        let quote = self.quote().filter(|quote| quote.source() == self.destination())?;
        let word = |at| quote.word(quote.l4 + at).unwrap_or(0);
        let (from, to) = match (quote.protocol, quote.frame[quote.l4], self.v4) {
            (TCP | UDP | SCTP, ..) => (word(0), word(2)),
            (ICMP, 8, true) | (ICMPV6, 128, false) => (word(4), 0),
            (ICMP, 0, true) | (ICMPV6, 129, false) => (0, word(4)),
            _ => return None,
        };
        Some(Tuple {
            source: quote.destination(),
            destination: quote.source(),
            source_port: to,
            destination_port: from,
            protocol: quote.protocol,
            pad: [0; 3],
        })
    }

    /// Where the transport checksum is, if this packet's protocol has one of sums that a translator must keep
    /// right.
    fn checksum_at(&self) -> Option<usize> {
        match self.protocol {
            TCP => Some(self.l4 + 16),
            UDP => Some(self.l4 + 6),
            _ if self.is_icmp() => Some(self.l4 + 2),
            _ => None,
        }
    }

    /// The folded sum over what the transport checksum covers, the checksum included: 0xffff if it is right.
    fn transport_sum(&self) -> u16 {
        let bytes = &self.frame[self.l4..self.end];
        let pseudo = if self.protocol == ICMP {
            0
        } else {
            pseudo_sum(&self.source(), &self.destination(), self.protocol, bytes.len())
        };
        fold(pseudo + sum(bytes))
    }

    /// The IPv4 header's.
    fn header_sum(&self) -> u16 {
        fold(sum(&self.frame[ETHERNET..ETHERNET + usize::from(self.frame[ETHERNET] & 15) * 4]))
    }
}

/// Which part of a datagram a packet is, by its fragment offset and "more fragments".
const fn part(offset: u16, more: u16) -> Part {
    match (offset, more) {
        (0, 0) => Part::Whole,
        (0, _) => Part::First,
        _ => Part::Later,
    }
}

/// Offset of the source address, or of the destination's.
const fn address_at(v4: bool, second: bool) -> usize {
    ETHERNET
        + match (v4, second) {
            (true, false) => 12,
            (true, true) => 16,
            (false, false) => 8,
            (false, true) => 24,
        }
}

/// Says what is wrong with an IP frame's checksums. Those of fragments are not looked at.
pub fn verify_checksums(frame: &[u8]) -> Result<(), String> {
    let packet = Decoded::of(frame).ok_or("not an IP frame")?;
    if packet.v4 && packet.header_sum() != 0xffff {
        return Err(format!("the IP header sums up to {:#06x}", packet.header_sum()));
    }
    if packet.part != Part::Whole {
        return Ok(());
    }
    if packet.protocol == SCTP {
        let bytes = &frame[packet.l4..packet.end];
        let right = bytes.get(8..12) == Some(&crc32c(bytes).to_le_bytes());
        return if right { Ok(()) } else { Err("the SCTP checksum is wrong".into()) };
    }
    let Some(at) = packet.checksum_at() else { return Ok(()) };
    let checksum = packet.word(at).ok_or("no room for a transport checksum")?;
    if packet.protocol == UDP && checksum == 0 {
        return Ok(());
    }
    if packet.transport_sum() != 0xffff || (checksum == 0xffff && packet.protocol == TCP) {
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
/// quoted packet is translated at its other end. Of a later fragment only the address is set: ports and checksum
/// are in the first. `None`: the packet has not the parts that would have to be changed.
#[must_use]
pub fn translate(frame: &[u8], side: Side, to: (impl Address, u16), mss: u16) -> Option<Vec<u8>> {
    let packet = Decoded::of(frame)?;
    let to = (to.0.ip(), to.1);
    let mut out = frame.to_vec();
    // Routers' errors come from outside only.
    let kind = packet.packet(side == Side::Destination).kind;
    if kind == Kind::Fragment {
        set_address(&mut out, packet, side, &to.0);
        return Some(out);
    }
    if matches!(kind, Kind::OtherIcmp | Kind::Other | Kind::Malformed) {
        return None;
    }
    if kind == Kind::IcmpError {
        let (quoted, sum) = (packet.l4 + 8 - ETHERNET, packet.transport_sum());
        let other = if side == Side::Source { Side::Destination } else { Side::Source };
        set_end(&mut out[quoted..packet.end], packet.quote()?, other, &to, true)?;
        set_address(&mut out, packet, side, &to.0);
        resum(&mut out, packet, packet.l4 + 2, sum, |d| d.transport_sum());
        return Some(out);
    }
    let before = packet.transport_sum();
    set_end(&mut out, packet, side, &to, false)?;
    if packet.protocol == TCP && frame[packet.l4 + 13] & SYN != 0 && mss != 0 {
        lower_mss(&mut out, packet.l4, packet.end, mss);
        resum(&mut out, packet, packet.l4 + 16, before, |d| d.transport_sum());
    }
    Some(out)
}

/// Sets one end of a packet, which `packet` describes as it was. The checksums of quoted TCP and SCTP packets are
/// not among the bytes that are sure to be there, and are left.
fn set_end(out: &mut [u8], packet: Decoded<'_>, side: Side, to: &End, quoted: bool) -> Option<()> {
    let sum = packet.transport_sum();
    set_address(out, packet, side, &to.0);
    let port_at = packet.l4
        + match side {
            _ if packet.is_icmp() => 4,
            Side::Source => 0,
            Side::Destination => 2,
        };
    out[port_at..port_at + 2].copy_from_slice(&to.1.to_be_bytes());
    if quoted && matches!(packet.protocol, TCP | SCTP) {
        return Some(());
    }
    if packet.protocol == SCTP {
        let bytes = &mut out[packet.l4..packet.end];
        let difference = crc32c(&packet.frame[packet.l4..packet.end]) ^ crc32c(bytes);
        let stands = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        bytes[8..12].copy_from_slice(&(stands ^ difference).to_le_bytes());
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

fn set_address(out: &mut [u8], packet: Decoded<'_>, side: Side, address: &Ip) {
    let at = address_at(packet.v4, side == Side::Destination);
    if packet.v4 {
        out[at..at + 4].copy_from_slice(&address.v4_octets());
        resum(out, packet, ETHERNET + 10, packet.header_sum(), |d| d.header_sum());
    } else {
        out[at..at + 16].copy_from_slice(&address.octets);
    }
}

/// Takes one from the time to live, or from the hop limit.
pub fn hop(frame: &mut [u8]) {
    let before = frame.to_vec();
    let Some(packet) = Decoded::of(&before) else { return };
    let at = ETHERNET + if packet.v4 { 8 } else { 7 };
    frame[at] = frame[at].wrapping_sub(1);
    if packet.v4 {
        resum(frame, packet, ETHERNET + 10, packet.header_sum(), |d| d.header_sum());
    }
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

    /// RFC 3720, B.4: 32 bytes of zeros. And the checksum field does not count.
    #[test]
    fn a_known_crc() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        let mut bytes = [0; 32];
        bytes[8..12].fill(0xff);
        assert_eq!(crc32c(&bytes), 0x8a91_36aa);
    }

    fn one_of_each() -> Vec<Built> {
        let mut built = vec![raw(A, B, 47, b"x")];
        for (a, b) in [(A.ip(), B.ip()), ("2001:db8::1".ip(), "2001:db8:1::7".ip())] {
            built.push(tcp((a, 1), (b, 2), SYN).tcp_options(&[1, 2, 4, 5, 180]).payload(b"odd"));
            built.push(udp((a, 1), (b, 2)));
            built.push(sctp((a, 1), (b, 2), INIT));
            built.push(echo(a, b, true, 1));
        }
        built.push(udp(("::1", 1), ("::2", 2)).extension(HOP_BY_HOP, &[0, 1, 4, 0, 0, 0, 0]));
        built
    }

    #[test]
    fn built_packets_verify_and_damaged_ones_do_not() {
        for packet in one_of_each() {
            let frame = packet.frame();
            verify_checksums(&frame).unwrap();
            // A byte of the source address, but to SCTP over IPv6, which has no checksum of addresses.
            let mut damaged = frame.clone();
            damaged[if packet.source.is_v4() { ETHERNET + 15 } else { ETHERNET + 23 }] ^= 1;
            let covered = packet.source.is_v4() || !matches!(packet.transport, Transport::Sctp { .. });
            assert_eq!(verify_checksums(&damaged).is_err(), covered, "{packet:?}");
            // The last byte of data.
            let mut damaged = frame;
            *damaged.last_mut().unwrap() ^= 1;
            let covered = !matches!(packet.transport, Transport::Raw { .. });
            assert_eq!(verify_checksums(&damaged).is_err(), covered, "{packet:?}");
        }
        verify_checksums(&udp((A, 1), (B, 2)).no_checksum().frame()).unwrap();
    }

    #[test]
    fn a_translation_keeps_right_checksums_right_and_wrong_ones_wrong() {
        for packet in one_of_each().split_off(1) {
            let to = if packet.source.is_v4() { B.ip() } else { "2001:db8:2::9".ip() };
            let frame = packet.frame();
            let out = translate(&frame, Side::Source, (to, 4242), 1000).unwrap();
            verify_checksums(&out).unwrap();
            let found = Decoded::of(&out).unwrap().packet(true).tuple;
            assert_eq!((found.source, found.source_port), (to, 4242));
            let mut wrong = frame.clone();
            *wrong.last_mut().unwrap() ^= 0x11;
            let out = translate(&wrong, Side::Source, (to, 4242), 1000).unwrap();
            verify_checksums(&out).unwrap_err();
        }
    }

    #[test]
    fn fragments_are_put_together_again() {
        for packet in one_of_each().split_off(1) {
            let whole = packet.frame();
            let parts = packet.fragments(&[8, 16]);
            let decoded: Vec<_> = parts.iter().map(|frame| Decoded::of(frame).unwrap()).collect();
            let kinds = decoded.iter().map(|d| d.packet(true).part).collect::<Vec<_>>();
            let later = vec![Part::Later; parts.len() - 1];
            assert_eq!(kinds, [vec![Part::First], later].concat());
            assert!(decoded.iter().all(|d| d.fragment_id & 0xffff == 0x1234));
            let data: Vec<u8> = decoded.iter().flat_map(|d| d.frame[d.l4..d.end].to_vec()).collect();
            assert_eq!(data, whole[Decoded::of(&whole).unwrap().l4..]);
        }
    }

    #[test]
    fn what_an_ipv6_packet_is() {
        let packet = udp(("2001:db8::1", 1), ("2001:db8::2", 2));
        let kind = |packet: &Built| Decoded::of(&packet.frame()).unwrap().packet(true).kind;
        let padded = [0, 1, 4, 0, 0, 0, 0];
        let with = |n: usize| (0..n).fold(packet.clone(), |p, _| p.extension(DESTINATION_OPTIONS, &padded));
        assert_eq!(kind(&with(4)), Kind::Udp);
        assert_eq!(kind(&with(5)), Kind::Other);
        assert_eq!(kind(&packet.clone().extension(ROUTING, &[0, 4, 0, 0, 0, 0, 0])), Kind::Udp);
        assert_eq!(kind(&packet.clone().extension(ROUTING, &[0, 4, 1, 0, 0, 0, 0])), Kind::Other);
        assert_eq!(kind(&packet.clone().extension(HOP_BY_HOP, &[9, 1, 4, 0, 0, 0, 0])), Kind::Malformed);
        let mut mapped = packet.frame();
        mapped[22..38].copy_from_slice(&Ip::v4(A).octets);
        assert_eq!(Decoded::of(&mapped).unwrap().packet(true).kind, Kind::Malformed);
        assert!(Decoded::of(&packet.frame()[..60]).is_none());
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

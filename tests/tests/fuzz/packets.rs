//! Packets: sound ones of both families, and what may be wrong with them.

use datapath::addr::Ip;

use crate::rng::Rng;
use crate::walk::{ETHERNET, ICMP, ICMP6, SCTP, TCP, UDP, fix_sums, walk, word};

/// An address and a port, or an ICMP identifier.
pub(crate) type End = (Ip, u16);

/// A packet of a protocol between two ends, its checksums sound. `asks`: sent by who opens connections.
pub(crate) fn packet(rng: &mut Rng, protocol: u8, from: End, to: End, asks: bool) -> Vec<u8> {
    let payload = match rng.below(50) {
        0 => vec![7; rng.below(1440)],
        // About what fits.
        1 => vec![7; 1380 + rng.below(80)],
        _ => rng.bytes(24),
    };
    let transport = match protocol {
        TCP => tcp(rng, from.1, to.1, asks, &payload),
        UDP => {
            let len = (8 + payload.len() as u16).to_be_bytes();
            [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &len, &[0, 0], &payload].concat()
        }
        SCTP => {
            let len = (4 + payload.len() as u16).to_be_bytes();
            // DATA, INIT, INIT ACK, ABORT, SHUTDOWN COMPLETE (RFC 9260, 3.2).
            let kind = if rng.percent(60) { u8::from(asks) } else { rng.pick(&[0, 2, 6, 14]) };
            let chunk = [kind, 3, len[0], len[1]];
            [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &[1, 2, 3, 4, 0, 0, 0, 0], &chunk, &payload]
                .concat()
        }
        ICMP | ICMP6 => {
            let kind = match (protocol, asks) {
                (ICMP, true) => 8,
                (ICMP, false) => 0,
                (_, true) => 128,
                (_, false) => 129,
            };
            let identifier = if asks { from.1 } else { to.1 };
            [&[kind, 0, 0, 0][..], &identifier.to_be_bytes(), &[0, 1], &payload].concat()
        }
        _ => payload,
    };
    let mut frame = in_ip(rng, protocol, from.0, to.0, &transport);
    fix_sums(&mut frame);
    if protocol == UDP && rng.percent(10) {
        let field = walk(&frame).and_then(|walk| walk.checksum());
        frame[field.expect("it is sound")].fill(0);
    }
    frame
}

fn tcp(rng: &mut Rng, from: u16, to: u16, asks: bool, payload: &[u8]) -> Vec<u8> {
    let flags = if rng.percent(25) { 2 } else { rng.pick(&[0x12, 0x10, 0x10, 0x18, 0x11, 0x04]) };
    let flags = if asks || flags != 2 { flags } else { 0x12 };
    let mut options = vec![];
    if flags & 2 != 0 || rng.percent(10) {
        for _ in 0..rng.below(4) {
            match rng.below(6) {
                0 => options.push(1),
                1 => options.extend([3, 3, 7]),
                2 => options.extend([8, 10, 0, 0, 0, 1, 0, 0, 0, 0]),
                3 => options.extend(rng.bytes(4)),
                _ => options.extend([2, 4, rng.next() as u8, rng.next() as u8]),
            }
        }
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 0);
    }
    let offset = (5 + options.len() as u8 / 4) << 4;
    let fixed = [0, 0, 0, 1, 0, 0, 0, 2, offset, flags, 0xff, 0xff, 0, 0, 0, 0];
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &fixed, &options, payload].concat()
}

/// An IP packet in a frame. Its ends must be of one family.
fn in_ip(rng: &mut Rng, protocol: u8, from: Ip, to: Ip, transport: &[u8]) -> Vec<u8> {
    let group = u8::from(rng.percent(2));
    let macs = [2 | group, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let hops = rng.pick(&[64, 64, 64, 64, 64, 255, 2, 1, 0]);
    if from.is_v4() {
        let len = (20 + transport.len() as u16).to_be_bytes();
        let dont_fragment = if rng.percent(80) { 0x40 } else { 0 };
        let head = [0x45, 0, len[0], len[1], 0, 7, dont_fragment, 0, hops, protocol, 0, 0];
        [&macs[..], &[8, 0], &head, &from.v4_octets(), &to.v4_octets(), transport].concat()
    } else {
        let len = (transport.len() as u16).to_be_bytes();
        let head = [0x60, 0, 0, 0, len[0], len[1], protocol, hops];
        [&macs[..], &[0x86, 0xdd], &head, &from.octets, &to.octets, transport].concat()
    }
}

/// An ICMP error from one address to another about a packet, of which it quotes some bytes.
pub(crate) fn error_about(rng: &mut Rng, from: Ip, to: Ip, about: &[u8]) -> Vec<u8> {
    let quote = &about[ETHERNET..];
    let quoted = rng.pick(&[8, 20, 28, 32, 48, 60, 80, 1000]).min(quote.len());
    let (protocol, kind) =
        if from.is_v4() { (ICMP, rng.pick(&[3, 3, 11, 12, 5])) } else { (ICMP6, rng.pick(&[1, 2, 3, 4])) };
    let mtu = [0, 0, 5, 0x78];
    let mut message = [&[kind, rng.below(5) as u8, 0, 0][..], &mtu, &quote[..quoted]].concat();
    if rng.percent(15) {
        let at = 8 + rng.below(message.len() - 8);
        message[at] ^= 1 << rng.below(8);
    }
    let mut frame = in_ip(rng, protocol, from, to, &message);
    fix_sums(&mut frame);
    frame
}

/// A neighbour solicitation (RFC 4861, 4.3).
pub(crate) fn solicitation(rng: &mut Rng, from: Ip, target: Ip) -> Vec<u8> {
    // An asker without an address tries the target out for himself, and gives no link-layer address (4.3).
    let nobody = rng.percent(20);
    let from = if nobody { Ip::UNSPECIFIED } else { from };
    let own = [1, 1, 2, 9, 9, 9, 9, rng.next() as u8];
    let options = if nobody || rng.percent(20) { &[][..] } else { &own };
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets, options].concat();
    let mut group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0];
    group[13..].copy_from_slice(&target.octets[13..]);
    let to = if rng.percent(50) { target } else { Ip { octets: group } };
    let mut frame = in_ip(rng, ICMP6, from, to, &message);
    frame[ETHERNET + 7] = 255;
    fix_sums(&mut frame);
    frame
}

/// Bytes of no meaning behind an Ethernet header that may say anything.
pub(crate) fn garbage(rng: &mut Rng) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(rng.pick(&[[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0], [0x88, 0xa8], [0x88, 0x47], [0, 42]]));
    if rng.percent(60) {
        frame.push(rng.pick(&[0x45, 0x46, 0x4f, 0x60, 0x6f, 0x00]));
    }
    let len = if rng.percent(5) { 1400 } else { 90 };
    frame.extend((0..rng.below(len)).map(|_| rng.next() as u8));
    frame
}

/// Breaks a packet in one way.
pub(crate) fn mutate(rng: &mut Rng, frame: &mut Vec<u8>) {
    let Some(w) = walk(frame) else { return flip(rng, frame) };
    let l4 = w.l4.min(frame.len() - 1);
    match rng.below(14) {
        0 | 1 => flip(rng, frame),
        // A byte of the headers becomes a telling one.
        2 => {
            let at = ETHERNET + rng.below((frame.len() - ETHERNET).min(80));
            frame[at] = rng.pick(&[0, 1, 4, 5, 6, 7, 0x0f, 0x10, 0x40, 0x7f, 0x80, 0xf0, 0xff]);
        }
        // Cut off, with and without the length that says so.
        3 | 4 => {
            let keep = ETHERNET + rng.below(frame.len() - ETHERNET + 1);
            frame.truncate(keep);
            if rng.percent(60) {
                set_length(frame, w.v6, (keep - ETHERNET) as u16);
            }
        }
        // Lengths that lie.
        5 => {
            let len = match rng.below(4) {
                0 => rng.next() as u16,
                1 => rng.below(60) as u16,
                _ => (frame.len() - ETHERNET) as u16 + rng.below(9) as u16 - 4,
            };
            set_length(frame, w.v6, len);
        }
        // Header lengths that lie.
        6 if !w.v6 => frame[ETHERNET] = rng.pick(&[4, 6]) << 4 | rng.below(16) as u8,
        6 | 7 => extension(rng, frame, w.v6),
        // Fragments: tiny ones, ones that overlap the header, last ones.
        8 | 9 => fragment(rng, frame, w.v6),
        // TCP's data offset and options.
        10 if w.protocol == TCP && l4 + 20 < frame.len() => {
            frame[l4 + 12] = rng.next() as u8;
            let at = l4 + 13 + rng.below(frame.len() - l4 - 13);
            frame[at] = rng.next() as u8;
            frame[l4 + 13] |= 2;
        }
        // UDP's length, TCP's ports, an ICMP type.
        10 | 11 => {
            let at = l4 + rng.below(8.min(frame.len() - l4));
            frame[at] = rng.next() as u8;
        }
        // A VLAN's tag in the packet, or another type altogether.
        12 => {
            let tag = [rng.pick(&[0x81, 0x88]), rng.pick(&[0, 0xa8]), 0, 5];
            frame.splice(12..12, tag);
        }
        // Ethernet's padding.
        _ => frame.extend(rng.bytes(20)),
    }
}

fn flip(rng: &mut Rng, frame: &mut [u8]) {
    for _ in 0..=rng.below(4) {
        let at = 12 + rng.below(frame.len() - 12);
        frame[at] ^= 1 << rng.below(8);
    }
}

/// Sets the length of what follows the Ethernet header.
fn set_length(frame: &mut [u8], v6: bool, len: u16) {
    let (at, len) = if v6 { (ETHERNET + 4, len.wrapping_sub(40)) } else { (ETHERNET + 2, len) };
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&len.to_be_bytes());
    }
}

/// Sets it to what is there.
fn fit_length(frame: &mut [u8], v6: bool) {
    let len = (frame.len() - ETHERNET) as u16;
    set_length(frame, v6, len);
}

/// Inserts IPv4 options, or one to many extension headers, mostly with right lengths.
fn extension(rng: &mut Rng, frame: &mut Vec<u8>, v6: bool) {
    if !v6 {
        let options = rng.pick(&[
            &[1, 1, 1, 0][..],
            &[148, 4, 0, 0],
            &[131, 7, 4, 10, 0, 0, 1, 0],
            &[7, 39, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0x82, 0xff, 1, 1],
        ]);
        frame.splice(ETHERNET + 20..ETHERNET + 20, options.iter().copied());
        frame[ETHERNET] = 0x40 | (5 + options.len() as u8 / 4);
        fit_length(frame, v6);
        return;
    }
    for _ in 0..rng.pick(&[1, 1, 1, 2, 3, 9]) {
        let kind = rng.pick(&[0, 43, 60, 60, 44, 51, 59, 135]);
        let next = frame[ETHERNET + 6];
        let header = match kind {
            51 => [next, 0, 0, 0, 0, 0, 0, 0],
            44 => [next, 0, 0, rng.pick(&[0, 1, 8, 9]), 0, 0, 0, 1],
            _ => [next, if rng.percent(5) { 200 } else { 0 }, 1, 4, 0, 0, 0, 0],
        };
        frame[ETHERNET + 6] = kind;
        frame.splice(ETHERNET + 40..ETHERNET + 40, header);
    }
    fit_length(frame, v6);
}

fn fragment(rng: &mut Rng, frame: &mut Vec<u8>, v6: bool) {
    let more = u16::from(rng.percent(60));
    let offset = rng.pick(&[0, 0, 0, 1, 2, 3, 185, 8191]); // in eights; 1 lies over the transport header
    if v6 {
        let next = frame[ETHERNET + 6];
        let bits = (offset << 3 | more).to_be_bytes();
        frame[ETHERNET + 6] = 44;
        frame.splice(ETHERNET + 40..ETHERNET + 40, [next, 0, bits[0], bits[1], 0, 0, 0, 9]);
    } else {
        let bits = (more << 13 | offset).to_be_bytes();
        frame[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&bits);
    }
    if rng.percent(30) {
        let least = ETHERNET + if v6 { 48 } else { 20 };
        frame.truncate(least + rng.below(17)); // tiny
    }
    fit_length(frame, v6);
}

/// Whether it is of IPv6, by its Ethernet type.
pub(crate) fn is_v6(frame: &[u8]) -> bool {
    word(frame, 12) == Some(0x86dd)
}

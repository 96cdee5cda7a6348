//! Answers that the programs make themselves: each is built here a second time, from the packet that it answers and
//! the RFCs alone, and must be the same to the byte.

use datapath::addr::Ip;
use lab::kernel::{Program, Verdict};

use crate::check::address_of;
use crate::walk::{ETHERNET, ICMP, ICMP6, TCP, Walk, fix_sums, walk, word};
use crate::world::{self, MTU, NODES, ROUTER6, mac_of};

/// Flags of TCP (RFC 9293, 3.1).
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
/// Longest ICMP errors: 576 bytes (RFC 1812, 4.3.2.3), and 1,280 (RFC 4443, 2.4).
const LONGEST: [usize; 2] = [576, 1280];

/// Whether a packet became an answer to itself, and if so whether the right one; `None`: it is none.
pub(crate) fn answered(
    program: Program,
    verdict: Verdict,
    ifindex: u32,
    before: &[u8],
    after: &[u8],
) -> Option<Result<&'static str, String>> {
    let (what, right) = if word(before, 12) == Some(0x0806) {
        ("ARP answered", arp(program, before, mac_of(ifindex)))
    } else {
        let (asked, answer) = (walk(before)?, walk(after)?);
        match program {
            Program::FromUplink if is_message(before, &asked, 135) && is_message(after, &answer, 136) => {
                ("ND answered", advertisement(before, &asked, mac_of(ifindex)))
            }
            // A translation's source is an egress IP, its destination what it was.
            Program::FromPod if [NODES[0], ROUTER6].contains(&address_of(after, answer.source())) => {
                ("told too big", too_big(before, &asked))
            }
            Program::ToUplink if after.get(answer.destination()) == before.get(asked.source()) => {
                // To the host's stack, which it comes in by; past it, back to whom it came from.
                let stack = after.get(..6) == Some(&mac_of(ifindex)[..]);
                let back = before.get(6..12).and_then(|mac| mac.try_into().ok()).unwrap_or_default();
                ("reset", reset(before, &asked, if stack { mac_of(ifindex) } else { back }))
            }
            Program::FromPod
            | Program::ToPod
            | Program::ToUplink
            | Program::FromUplink
            | Program::FromTunnel => return None,
        }
    };
    Some(match right {
        Ok(right) if verdict == Verdict::Redirect && right == after => Ok(what),
        Ok(right) => Err(format!("{what}, {verdict:?}, and not with {right:02x?}")),
        Err(reason) => Err(format!("{what}, but {reason}")),
    })
}

fn is_message(frame: &[u8], w: &Walk, kind: u8) -> bool {
    w.protocol == ICMP6 && w.v6 && frame.get(w.l4) == Some(&kind)
}

/// RFC 826. Ethernet's padding stays what it was.
fn arp(program: Program, before: &[u8], mac: [u8; 6]) -> Result<Vec<u8>, &'static str> {
    let asks = [0, 1, 8, 0, 6, 4, 0, 1];
    if program != Program::FromUplink || before.len() < 42 || before[14..22] != asks {
        return Err("that is no question");
    }
    let (asker, target) = (&before[22..32], &before[38..42]);
    if !world::is_egress(address_of(before, 38..42)) {
        return Err("that is no egress IP");
    }
    let answers = [0, 1, 8, 0, 6, 4, 0, 2];
    Ok([&asker[..6], &mac, &before[12..14], &answers, &mac, target, asker, &before[42..]].concat())
}

/// RFC 4861, 7.2.4.
fn advertisement(before: &[u8], w: &Walk, mac: [u8; 6]) -> Result<Vec<u8>, &'static str> {
    let target = before.get(w.l4 + 8..w.l4 + 24).ok_or("the question is cut off")?;
    if !world::is_egress(address_of(target, 0..16)) {
        return Err("that is no egress IP");
    }
    if before[w.ip + 7] != 255 || w.transport_sum(before) != 0 {
        return Err("a router or a wire has touched the question");
    }
    // From `::`: somebody tries the address out for himself, and all nodes are told.
    let nobody = before[w.source()] == [0; 16];
    let all = Ip { octets: [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] }.octets;
    let to = if nobody { &all[..] } else { &before[w.source()] };
    let to_mac = if nobody { &[0x33, 0x33, 0, 0, 0, 1][..] } else { &before[6..12] };
    let flags = if nobody { 0x20 } else { 0x60 };
    let message = [&[136, 0, 0, 0, flags, 0, 0, 0], target, &[2, 1], &mac].concat();
    Ok(v6([to_mac, &mac], ICMP6, 255, [target, to], &message))
}

/// A segment of no connection is answered as the host would that it was sent to (RFC 9293, 3.5.2).
fn reset(before: &[u8], w: &Walk, mac: [u8; 6]) -> Result<Vec<u8>, &'static str> {
    let segment = &before[w.l4..w.end];
    if w.protocol != TCP || w.fragment || segment.len() < 20 {
        return Err("that is no TCP segment");
    }
    if segment[13] & RST != 0 || before[0] & 1 != 0 {
        return Err("an RST, or what was sent to a group, has no answer");
    }
    let (zero, flags) = ([0; 4], segment[13]);
    let (seq, ack, flags) = if flags & ACK != 0 {
        (segment[8..12].try_into().unwrap_or(zero), zero, RST)
    } else {
        let data = segment.len().saturating_sub(usize::from(segment[12] >> 4) * 4) as u32;
        let taken = data + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let seq = u32::from_be_bytes(segment[4..8].try_into().unwrap_or(zero));
        (zero, seq.wrapping_add(taken).to_be_bytes(), RST | ACK)
    };
    let ports = [&segment[2..4], &segment[..2]].concat();
    let answer = [&ports[..], &seq, &ack, &[0x50, flags, 0, 0, 0, 0, 0, 0]].concat();
    let (macs, ends) = ([&mac[..], &before[..6]], [&before[w.destination()], &before[w.source()]]);
    Ok(if w.v6 { v6(macs, TCP, 64, ends, &answer) } else { v4(macs, 0, TCP, ends, &answer) })
}

/// RFC 792 and RFC 1191; RFC 4443, 3.2.
fn too_big(before: &[u8], w: &Walk) -> Result<Vec<u8>, &'static str> {
    let len = w.end - ETHERNET;
    if len <= usize::from(MTU) || w.fragment || (!w.v6 && before[w.ip + 6] & 0x40 == 0) {
        return Err("it was not too big, or could have been fragmented");
    }
    if before[0] & 1 != 0 {
        return Err("what was sent to a group has no answer");
    }
    // Whole words of it, which is a choice.
    let header = if w.v6 { 40 } else { 20 };
    let quoted = len.min(LONGEST[usize::from(w.v6)] - header - 8) & !3;
    let [high, low] = MTU.to_be_bytes();
    let head = if w.v6 { [2, 0, 0, 0, 0, 0, high, low] } else { [3, 4, 0, 0, 0, 0, high, low] };
    let message = [&head, &before[ETHERNET..ETHERNET + quoted]].concat();
    let (macs, to) = ([&before[6..12], &before[..6]], &before[w.source()]);
    Ok(if w.v6 {
        v6(macs, ICMP6, 64, [&ROUTER6.octets, to], &message)
    } else {
        v4(macs, 0xc0, ICMP, [&NODES[0].v4_octets(), to], &message)
    })
}

/// An IPv4 packet that may not be fragmented.
fn v4(macs: [&[u8]; 2], class: u8, protocol: u8, ends: [&[u8]; 2], transport: &[u8]) -> Vec<u8> {
    let [high, low] = (20 + transport.len() as u16).to_be_bytes();
    let head = [8, 0, 0x45, class, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    sound([&macs.concat(), &head[..], &ends.concat(), transport].concat())
}

fn v6(macs: [&[u8]; 2], protocol: u8, hops: u8, ends: [&[u8]; 2], transport: &[u8]) -> Vec<u8> {
    let [high, low] = (transport.len() as u16).to_be_bytes();
    let head = [0x86, 0xdd, 0x60, 0, 0, 0, high, low, protocol, hops];
    sound([&macs.concat(), &head[..], &ends.concat(), transport].concat())
}

/// Of the two forms of a checksum of nothing, who sums up anew writes 0.
fn sound(mut frame: Vec<u8>) -> Vec<u8> {
    fix_sums(&mut frame);
    let w = walk(&frame).expect("it is built right");
    for field in [(!w.v6).then_some(ETHERNET + 10..ETHERNET + 12), w.checksum()].into_iter().flatten() {
        if frame[field.clone()] == [0xff, 0xff] {
            frame[field].fill(0);
        }
    }
    frame
}

//! What holds of a packet whatever was decided on it: seen from its bytes before and after alone.

use std::ops::Range;

use datapath::addr::Ip;
use lab::kernel::{Program, Verdict};

use crate::answers::answered;
use crate::walk::{ETHERNET, SCTP, TCP, UDP, Walk, sctp_checksum, walk, walk_quoted, word};
use crate::world;

/// Checks a run and names what became of the packet.
pub(crate) fn check(
    program: Program,
    verdict: Verdict,
    ifindex: u32,
    before: &[u8],
    after: &[u8],
) -> Result<&'static str, String> {
    if verdict == Verdict::Drop {
        return Ok("dropped");
    }
    if before == after {
        return untouched(program, verdict, before);
    }
    if program == Program::ToPod {
        return Err("to_pod changes nothing".into());
    }
    if let Some(outcome) = answered(program, verdict, ifindex, before, after) {
        return outcome;
    }
    if program == Program::FromPod && verdict == Verdict::Redirect && departs(before, after) {
        return Ok("to the uplink at once");
    }
    let may_change = match program {
        Program::FromPod | Program::FromTunnel => verdict == Verdict::Redirect,
        Program::ToUplink | Program::FromUplink | Program::ToPod => true,
    };
    if !may_change {
        return Err(format!("changed, and {verdict:?}"));
    }
    translated(program, verdict, before, after)?;
    Ok(match (program, verdict) {
        (Program::FromPod | Program::ToUplink, Verdict::Next) => "translated, on",
        (Program::FromPod | Program::ToUplink, _) => "translated, redirected",
        (_, Verdict::Next) => "a reply, up",
        _ => "a reply, redirected",
    })
}

/// Whether a selected pod's packet to outside was taken one hop on, past the host's stack, and not translated yet:
/// `to_uplink` does that.
fn departs(before: &[u8], after: &[u8]) -> bool {
    let Some(w) = walk(before).filter(|w| walk(after) == Some(*w)) else { return false };
    let hops = w.ip + if w.v6 { 7 } else { 8 };
    let mut wanted = before.to_vec();
    wanted[hops] = before[hops].wrapping_sub(1);
    if !w.v6 {
        wanted[w.ip + 10..w.ip + 12].copy_from_slice(&after[w.ip + 10..w.ip + 12]);
    }
    before[hops] > 1
        && wanted == after
        && w.header_sum(before) == w.header_sum(after)
        && world::is_selected(address_of(before, w.source()))
        && !world::is_inside(address_of(before, w.destination()))
}

/// A packet that is as it was may be steered by egress addresses only.
fn untouched(program: Program, verdict: Verdict, frame: &[u8]) -> Result<&'static str, String> {
    if verdict == Verdict::Next {
        return Ok("next");
    }
    let walk = walk(frame).ok_or("redirected, and no sound IP")?;
    let address = match program {
        Program::FromUplink => walk.destination(),
        Program::FromTunnel => walk.source(),
        Program::FromPod | Program::ToUplink | Program::ToPod => {
            return Err("redirected with the source it had".into());
        }
    };
    if world::is_egress(address_of(frame, address)) {
        Ok("steered")
    } else {
        Err("steered, and no egress IP's".into())
    }
}

pub(crate) fn address_of(frame: &[u8], range: Range<usize>) -> Ip {
    let bytes = &frame[range];
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ip::v4(v4);
    }
    Ip { octets: bytes.try_into().expect("an IPv6 address has 16 bytes") }
}

/// A translation: which bytes it may change, and what must still hold of them.
fn translated(program: Program, verdict: Verdict, before: &[u8], after: &[u8]) -> Result<(), String> {
    let w = walk(before).ok_or("changed, and its headers contradict themselves")?;
    if before.len() != after.len() {
        return Err(format!("{} bytes became {}", before.len(), after.len()));
    }
    if walk(after) != Some(w) {
        return Err("its headers are elsewhere now".into());
    }
    let outward = matches!(program, Program::FromPod | Program::ToUplink);
    let mut allowed = vec![if outward { w.source() } else { w.destination() }];
    if w.v6 {
        allowed.push(w.ip + 7..w.ip + 8);
    } else {
        allowed.extend([w.ip + 8..w.ip + 9, w.ip + 10..w.ip + 12]);
    }
    if program == Program::FromTunnel {
        allowed.push(0..6); // goes into the host's stack by another interface
    }
    transport_bytes(before, &w, outward, &mut allowed)?;
    if let Some(at) = (0..before.len())
        .find(|at| before[*at] != after[*at] && !allowed.iter().any(|range| range.contains(at)))
    {
        return Err(format!("byte {at} changed, which is none of a translator's; {w:?}"));
    }
    let hops = w.ip + if w.v6 { 7 } else { 8 };
    if after[hops] != before[hops] && (before[hops] < 2 || after[hops] != before[hops] - 1) {
        return Err(format!("time to live {} became {}", before[hops], after[hops]));
    }
    let up =
        if program == Program::FromUplink { verdict == Verdict::Next } else { before[..6] != after[..6] };
    addresses(after, &w, outward, up)?;
    sums(before, after, &w)?;
    if let Some(at) = w.mss(before)
        && word(after, at) > word(before, at)
    {
        return Err("the MSS was raised".into());
    }
    Ok(())
}

/// `up`: into the host's stack, which may have masqueraded the packet that is answered as anything.
fn addresses(after: &[u8], w: &Walk, outward: bool, up: bool) -> Result<(), String> {
    let address = address_of(after, if outward { w.source() } else { w.destination() });
    let right = match (outward, up) {
        (true, _) => world::is_egress(address),
        (false, true) => !world::is_egress(address),
        (false, false) => world::is_selected(address),
    };
    if right { Ok(()) } else { Err(format!("translated to {address:?}")) }
}

/// The transport's bytes that a translation may change.
fn transport_bytes(
    frame: &[u8],
    w: &Walk,
    outward: bool,
    allowed: &mut Vec<Range<usize>>,
) -> Result<(), String> {
    if w.later {
        return Ok(());
    }
    let field =
        w.checksum().ok_or_else(|| format!("translated, without a whole header of {}", w.protocol))?;
    allowed.push(field);
    let port = |w: &Walk, source: bool| w.l4 + if source { 0 } else { 2 };
    if !w.is_icmp() {
        let at = port(w, outward);
        allowed.push(at..at + 2);
        allowed.extend(w.mss(frame).map(|at| at..at + 2));
        return Ok(());
    }
    match (w.v6, frame[w.l4]) {
        (false, 0 | 8) | (true, 128 | 129) => {
            allowed.push(w.l4 + 4..w.l4 + 6);
            return Ok(());
        }
        (false, 3 | 11 | 12) | (true, 1..=4) => {}
        (_, kind) => return Err(format!("ICMP type {kind} was translated")),
    }
    let quoted = walk_quoted(frame, w).ok_or("an error whose quote cannot be read was translated")?;
    // It travelled the other way.
    allowed.push(if outward { quoted.destination() } else { quoted.source() });
    if !quoted.v6 {
        allowed.push(quoted.ip + 10..quoted.ip + 12);
    }
    allowed.extend(quoted.checksum());
    let at = if quoted.is_icmp() { quoted.l4 + 4 } else { port(&quoted, !outward) };
    if quoted.later || at + 2 > w.end {
        return Err("an error was translated that does not quote a port".into());
    }
    allowed.push(at..at + 2);
    Ok(())
}

/// Every sum is what it was: what was sound still is, and what was broken is not made to look sound.
fn sums(before: &[u8], after: &[u8], w: &Walk) -> Result<(), String> {
    let same = |what: &str, was: u64, is: u64| {
        if was == is {
            return Ok(());
        }
        Err(format!("the sum over {what} was {was:#06x} and is {is:#06x}; 0 is right"))
    };
    same("the IP header", w.header_sum(before), w.header_sum(after))?;
    if let Some(field) = w.checksum() {
        transport(before, after, w, field, "the transport")?;
    }
    let kind = before.get(w.l4).copied().unwrap_or(0);
    let is_error = if w.v6 { matches!(kind, 1..=4) } else { matches!(kind, 3 | 11 | 12) };
    if w.later || !w.is_icmp() || !is_error {
        return Ok(());
    }
    let Some(quoted) = walk_quoted(before, w) else { return Ok(()) };
    same("the quoted IP header", quoted.header_sum(before), quoted.header_sum(after))?;
    match quoted.checksum() {
        // TCP's and SCTP's are behind the eight bytes that are sure to be quoted, and need not follow.
        Some(field) if quoted.protocol != TCP && quoted.protocol != SCTP => {
            transport(before, after, &quoted, field, "the quoted transport")
        }
        _ => Ok(()),
    }
}

fn transport(before: &[u8], after: &[u8], w: &Walk, field: Range<usize>, what: &str) -> Result<(), String> {
    if w.protocol == SCTP {
        let sound = |frame: &[u8]| sctp_checksum(&frame[w.l4..w.end]) == frame[field.clone()];
        if w.fragment || sound(before) == sound(after) {
            return Ok(());
        }
        return Err(format!("{what}: CRC32c sound: {}, then {}", sound(before), sound(after)));
    }
    let none = |frame: &[u8]| w.protocol == UDP && frame[field.clone()] == [0, 0];
    if none(before) != none(after) {
        return Err(format!("{what}: a checksum came or went"));
    }
    let (was, is) = (w.transport_sum(before), w.transport_sum(after));
    if was != is && !none(before) {
        return Err(format!("the sum over {what} was {was:#06x} and is {is:#06x}; 0 is right"));
    }
    Ok(())
}

/// Whether a packet leaves by the uplink with a selected pod's own address, and a kernel would have forwarded it.
pub(crate) fn leaks(program: Program, verdict: Verdict, after: &[u8]) -> bool {
    let Some(w) = walk(after).filter(|_| program == Program::ToUplink && verdict == Verdict::Next) else {
        return false;
    };
    // What a kernel forwards has a sound header, and what it cannot parse behind it does not matter.
    w.header_sum(after) == 0
        && after.len() > ETHERNET
        && world::is_selected(address_of(after, w.source()))
        && world::is_outside(address_of(after, w.destination()))
}

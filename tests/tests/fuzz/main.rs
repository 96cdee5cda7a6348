//! Malformed and random packets through the loaded programs, with real flows in the maps: whatever is decided, no
//! packet comes out translated wrongly.
//!
//! The check knows input and output bytes only, reads headers by code of its own ([`walk`]), and does not ask what
//! should have been decided: that is `parity.rs`'s work.
//!
//! `OUTGATE_FUZZ_CASES` says how many packets; the full run is 1,000,000. `OUTGATE_FUZZ_SEED` says where the
//! generator starts: with it the same packets come again (the ports and tokens that the kernel draws do not).

mod answers;
mod check;
mod packets;
mod rng;
mod walk;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use datapath::addr::Ip;
use datapath::keys::{Flow, FlowKey, Offload, Token, Tuple};
use datapath::verdict::DropReason;
use lab::kernel::interfaces::{OTHER_POD, POD, PORT, SECOND_UPLINK, TUNNEL, UPLINK};
use lab::kernel::{self, Input, Kernel, Program, State, enter_node_network, route_ipv6};
use lab::packet::arp;

use crate::packets::{End, error_about, garbage, is_v6, mutate, packet, solicitation};
use crate::rng::Rng;
use crate::walk::{ICMP, ICMP6, SCTP, TCP, UDP, fix_sums, walk};
use crate::world::{BRIDGE, EGRESS, INSIDE, NODES, OUTSIDE, PASS, PODS, PREFIX6, VNI, of_family, port_of};

/// Cases between two fillings of the tables.
const BATCH: u64 = 5000;
/// Flows in them.
const FLOWS: usize = 96;
/// Room for new ones beside them.
const CAPACITY: u32 = 8192;
/// Bytes that a test run wants at least: Ethernet's header and the IP header that the type says
/// (`bpf_prog_test_run_skb`, `net/bpf/test_run.c`).
const LEAST: [usize; 2] = [34, 54];

/// What must have come about, or the run shows nothing; of IPv4 and of IPv6.
const WANTED: [&str; 23] = [
    "FromPod: next",
    "FromPod: to the uplink at once",
    "FromPod: translated, redirected",
    "FromPod SCTP: translated, redirected",
    "FromPod later fragment: translated, redirected",
    "FromPod: told too big",
    "ToUplink: translated, on",
    "ToUplink: translated, redirected",
    "ToUplink SCTP: translated, on",
    "ToUplink later fragment: translated, on",
    "ToUplink: reset",
    "FromUplink: steered",
    "FromUplink SCTP: steered",
    "FromUplink later fragment: steered",
    "FromUplink: a reply, redirected",
    "FromUplink SCTP: a reply, redirected",
    "FromUplink later fragment: a reply, redirected",
    "FromUplink: a reply, up",
    "FromTunnel: steered",
    "FromTunnel SCTP: steered",
    "FromTunnel: a reply, redirected",
    "FromTunnel SCTP: a reply, redirected",
    "FromTunnel later fragment: a reply, redirected",
];
/// What comes about in one family only.
const WANTED_ONCE: [&str; 2] = ["FromUplink ARP: ARP answered", "FromUplink v6: ND answered"];
/// Why packets must have been dropped.
const WANTED_DROPS: [DropReason; 11] = [
    DropReason::Malformed,
    DropReason::SpoofedSource,
    DropReason::Fragment,
    DropReason::NoFlow,
    DropReason::NoReplyFlow,
    DropReason::NoRange,
    DropReason::TunnelNotAllowed,
    DropReason::TtlExpired,
    DropReason::TooBig,
    DropReason::TokenLost,
    DropReason::Protocol,
];

/// How often each outcome came about.
type Met = BTreeMap<String, u64>;

fn environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// A program, and a packet before it.
struct Case {
    program: Program,
    input: Input,
    token: Option<Token>,
}

#[test]
fn nothing_is_translated_wrongly() {
    let cases = environment("OUTGATE_FUZZ_CASES").unwrap_or(1_000_000);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    let seed = environment("OUTGATE_FUZZ_SEED").unwrap_or(u64::from(clock.subsec_nanos()));
    println!("OUTGATE_FUZZ_SEED={seed} OUTGATE_FUZZ_CASES={cases}");
    let begin = Instant::now();
    let (next, total) = (AtomicU64::new(0), Mutex::new(Met::new()));
    let threads = thread::available_parallelism().map_or(1, |n| n.get().min(2));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let met = work(seed, cases, &next);
                let mut total = total.lock().expect("no thread has panicked with it");
                for (outcome, count) in met {
                    *total.entry(outcome).or_default() += count;
                }
            });
        }
    });
    let met = total.into_inner().expect("no thread has panicked with it");
    for (outcome, count) in &met {
        println!("{count:>9} {outcome}");
    }
    let ran: u64 = met.iter().filter(|(outcome, _)| !outcome.starts_with("drop: ")).map(|(_, n)| n).sum();
    println!("{ran} packets, {:.1} s with {threads} threads, seed {seed}", begin.elapsed().as_secs_f32());
    assert_eq!(ran, cases);
    // What is answered in its sender's place has gone no further either.
    let lost = [": dropped", ": told too big", ": reset"];
    let counted: u64 = met.iter().filter(|(o, _)| o.starts_with("drop: ")).map(|(_, n)| n).sum();
    let lost: u64 = met.iter().filter(|(o, _)| lost.iter().any(|l| o.ends_with(l))).map(|(_, n)| n).sum();
    assert_eq!(lost, counted, "every drop is counted under one reason");
    if cases >= 200_000 {
        let both = |outcome: &&str| {
            ["v4", "v6"].map(|family| {
                let (program, rest) = outcome.split_at(outcome.find([' ', ':']).expect("a program's name"));
                format!("{program} {family}{rest}")
            })
        };
        let once = WANTED_ONCE.map(str::to_owned);
        let reasons = WANTED_DROPS.map(|reason| format!("drop: {}", reason.name()));
        let wanted = WANTED.iter().flat_map(both).chain(once).chain(reasons);
        let missing: Vec<_> = wanted.filter(|outcome| !met.contains_key(outcome)).collect();
        assert!(missing.is_empty(), "no packet met {missing:#?}");
    }
}

/// Takes batches until there are none left.
fn work(seed: u64, cases: u64, next: &AtomicU64) -> Met {
    enter_node_network();
    route_ipv6(PREFIX6);
    let mut kernel = Kernel::load(CAPACITY);
    let mut t = world::policy_tables(CAPACITY as usize);
    kernel.write(&t);
    let mut met = Met::new();
    let mut counts = BTreeMap::new();
    let mut after = Vec::new();
    loop {
        let batch = next.fetch_add(1, Ordering::Relaxed);
        if batch * BATCH >= cases {
            break;
        }
        let mut rng = Rng(seed.wrapping_add(batch.wrapping_mul(0x1234_5678_9abc_def1)));
        // With and without the host's say about a flow's first packet.
        t.settings.offload = rng.pick(&[Offload::Auto, Offload::Always]) as u8;
        kernel.write_policy(&t);
        let flows = world::fill(&mut rng, &t, FLOWS, kernel::now());
        kernel.write_state(&State::of(&t));
        for number in batch * BATCH..cases.min((batch + 1) * BATCH) {
            let case = case(&mut rng, &flows);
            if let Some(token) = &case.token {
                kernel.put_token(case.input.hash, token);
            }
            let outcome = run(&mut kernel, &case, &mut after).unwrap_or_else(|problem| {
                panic!(
                    "{problem}\n{:?} on {:02x?}\ngave {after:02x?}\ncase {number} of OUTGATE_FUZZ_SEED={seed}",
                    case.program, case.input,
                )
            });
            let family = match case.input.frame.get(12..14) {
                Some([8, 0]) => "v4",
                Some([0x86, 0xdd]) => "v6",
                Some([8, 6]) => "ARP",
                _ => "other",
            };
            let kind = match walk(&case.input.frame) {
                Some(walk) if walk.later => " later fragment",
                Some(walk) if walk.protocol == SCTP => " SCTP",
                _ => "",
            };
            *counts.entry((case.program as u8, family, kind, outcome)).or_insert(0_u64) += 1;
        }
    }
    for ((program, family, kind, outcome), count) in counts {
        let program = Program::ALL[usize::from(program)];
        met.insert(format!("{program:?} {family}{kind}: {outcome}"), count);
    }
    for (reason, count) in DropReason::ALL.iter().zip(kernel.drops()) {
        if count.packets > 0 {
            met.insert(format!("drop: {}", reason.name()), count.packets);
        }
    }
    met
}

fn run(kernel: &mut Kernel, case: &Case, after: &mut Vec<u8>) -> Result<&'static str, String> {
    let before = &case.input.frame;
    let verdict = match kernel.try_run(case.program, &case.input, after) {
        Ok(verdict) => verdict,
        Err(_) if before.len() < LEAST[usize::from(is_v6(before))] => return Ok("refused by the kernel"),
        Err(error) => return Err(format!("the run failed: {error:?}")),
    };
    let marked = case.input.hash == PASS;
    if !marked && case.input.ingress != 0 && check::leaks(case.program, verdict, after) {
        return Err("a selected pod's packet leaves with the pod's address".into());
    }
    check::check(case.program, verdict, case.input.ifindex, before, after)
}

fn case(rng: &mut Rng, flows: &[(FlowKey, Flow)]) -> Case {
    let program = rng.pick(&[
        Program::FromPod,
        Program::FromPod,
        Program::FromPod,
        Program::ToUplink,
        Program::ToUplink,
        Program::FromUplink,
        Program::FromUplink,
        Program::FromTunnel,
        Program::FromTunnel,
        Program::ToPod,
    ]);
    let flow = rng.pick(flows);
    let known = rng.percent(70);
    let mut input = Input { mark: 7, ..Input::default() };
    let mut token = None;
    let frame = match program {
        Program::FromPod | Program::ToPod => {
            input.ifindex = rng.pick(&[POD, OTHER_POD, PORT]);
            if known { outward_of(rng, &mut input, &flow.0) } else { outward(rng, &mut input) }
        }
        Program::ToUplink => at_uplink(rng, &mut input, &mut token, known.then_some(&flow.0)),
        Program::FromUplink => {
            input.ifindex = rng.pick(&[UPLINK, UPLINK, SECOND_UPLINK]);
            match (rng.below(12), known) {
                (0, _) => question(rng),
                (_, true) => inward_of(rng, flow),
                _ => inward(rng),
            }
        }
        Program::FromTunnel => {
            input.ifindex = TUNNEL;
            input.tunnel = Some((rng.pick(&[NODES[1], NODES[1], NODES[1], NODES[0]]), VNI));
            match (rng.below(3), known) {
                (0, _) => steered_out(rng),
                (_, true) => inward_of(rng, flow),
                _ => inward(rng),
            }
        }
    };
    input.frame = if rng.percent(3) { garbage(rng) } else { frame };
    let times = rng.pick(&[0, 1, 1, 2, 3]);
    for _ in 0..times {
        if input.frame.len() > 20 {
            mutate(rng, &mut input.frame);
        }
    }
    // With sound checksums as often as not: what is odd must be seen as such by its structure.
    if times > 0 && rng.percent(70) {
        fix_sums(&mut input.frame);
    }
    if input.frame.len() < 15 {
        input.frame.resize(15, 0);
    }
    Case { program, input, token }
}

/// The ends of a flow at the pod.
fn ends(key: &FlowKey) -> (End, End) {
    ((PODS[key.pod as usize - 1].0, key.local_port), (key.remote, key.remote_port))
}

/// A packet that a flow's pod sends.
fn outward_of(rng: &mut Rng, input: &mut Input, key: &FlowKey) -> Vec<u8> {
    input.ifindex = PODS[key.pod as usize - 1].2;
    let (pod, remote) = ends(key);
    if rng.percent(12) {
        let about = packet(rng, key.protocol, remote, pod, false);
        return error_about(rng, pod.0, remote.0, &about);
    }
    packet(rng, key.protocol, pod, remote, true)
}

/// A packet that any pod sends to anybody.
fn outward(rng: &mut Rng, input: &mut Input) -> Vec<u8> {
    let (mut from, _, ifindex, _) = rng.pick(&PODS);
    input.ifindex = ifindex;
    let v6 = !from.is_v4();
    if rng.percent(5) {
        from = of_family(rng, &EGRESS, v6);
    }
    let to = if rng.percent(70) { of_family(rng, &OUTSIDE, v6) } else { of_family(rng, &INSIDE, v6) };
    let (from, to) = ((from, rng.next() as u16), (to, rng.pick(&[80, 53, 4795])));
    let asks = rng.percent(80);
    let protocol = any_protocol(rng, v6);
    packet(rng, protocol, from, to, asks)
}

fn any_protocol(rng: &mut Rng, v6: bool) -> u8 {
    rng.pick(&[TCP, TCP, UDP, UDP, if v6 { ICMP6 } else { ICMP }, SCTP, 47, 0])
}

/// A packet at an uplink with a token: as its pod sent it, masqueraded, or with another destination.
fn at_uplink(
    rng: &mut Rng,
    input: &mut Input,
    token: &mut Option<Token>,
    known: Option<&FlowKey>,
) -> Vec<u8> {
    input.ifindex = rng.pick(&[UPLINK, SECOND_UPLINK]);
    let (pod, (from, to), protocol) = if let Some(key) = known {
        (key.pod, ends(key), key.protocol)
    } else {
        let pod = rng.pick(&[1, 3, 4, 6]);
        let from = PODS[pod as usize - 1].0;
        let to = of_family(rng, &OUTSIDE, !from.is_v4());
        let protocol = any_protocol(rng, !from.is_v4());
        let echo = matches!(protocol, ICMP | ICMP6);
        (pod, ((from, rng.next() as u16), (to, if echo { 0 } else { 80 })), protocol)
    };
    input.ingress = match PODS[pod as usize - 1].3 {
        BRIDGE => BRIDGE,
        ifindex => ifindex,
    };
    let tuple = Tuple {
        source: from.0,
        destination: to.0,
        source_port: from.1,
        destination_port: to.1,
        protocol,
        pad: [0; 3],
    };
    match rng.below(20) {
        0 => input.hash = rng.next() as u32 | 1,
        1 => input.hash = PASS,
        _ => {
            input.hash = rng.next() as u32 | 1;
            *token = Some(Token { pod, policy: 1, firewall: 0, tuple, direct: u32::from(rng.percent(20)) });
        }
    }
    let masqueraded = from.0.is_v4() && rng.percent(50);
    let from = if masqueraded { (NODES[0], 61000) } else { from };
    let to = if rng.percent(15) { (of_family(rng, &OUTSIDE, !to.0.is_v4()), 443) } else { to };
    let asks = rng.percent(90);
    packet(rng, protocol, from, to, asks)
}

/// A packet that answers a flow, or an error about one of its packets.
fn inward_of(rng: &mut Rng, (key, flow): (FlowKey, Flow)) -> Vec<u8> {
    let (egress, remote) = ((EGRESS[flow.egress as usize - 1], flow.egress_port), ends(&key).1);
    if rng.percent(15) {
        let about = packet(rng, key.protocol, egress, remote, true);
        let router = of_family(rng, &OUTSIDE, !remote.0.is_v4());
        let from = if rng.percent(50) { remote.0 } else { router };
        return error_about(rng, from, egress.0, &about);
    }
    packet(rng, key.protocol, remote, egress, false)
}

/// A packet to an egress IP, or to the node.
fn inward(rng: &mut Rng) -> Vec<u8> {
    let v6 = rng.percent(40);
    let to: Ip = if v6 || rng.percent(85) { of_family(rng, &EGRESS, v6) } else { NODES[0] };
    let own = rng.percent(50);
    let port = if rng.percent(10) { rng.next() as u16 } else { port_of(rng, own) };
    let from = (of_family(rng, &OUTSIDE, v6), 80);
    let (protocol, asks) = (any_protocol(rng, v6), rng.percent(30));
    packet(rng, protocol, from, (to, port), asks)
}

/// What another node sends to this one as a gateway.
fn steered_out(rng: &mut Rng) -> Vec<u8> {
    let v6 = rng.percent(40);
    let own = rng.percent(10);
    let from = (of_family(rng, &EGRESS, v6), port_of(rng, own));
    let to = (of_family(rng, &OUTSIDE, v6), 80);
    if rng.percent(10) {
        let about = packet(rng, UDP, to, from, false);
        return error_about(rng, from.0, to.0, &about);
    }
    let protocol = any_protocol(rng, v6);
    packet(rng, protocol, from, to, true)
}

/// Who has an egress IP? By ARP or neighbour discovery.
fn question(rng: &mut Rng) -> Vec<u8> {
    if rng.percent(40) {
        let target = of_family(rng, &EGRESS, true);
        let from = of_family(rng, &OUTSIDE, true);
        return solicitation(rng, from, target);
    }
    let target = if rng.percent(85) { of_family(rng, &EGRESS, false) } else { NODES[1] };
    let mut frame =
        arp(1, ([2, 9, 9, 9, 9, rng.next() as u8], [172, 18, 0, 1]), ([0; 6], target.v4_octets()));
    if rng.percent(30) {
        frame.resize(60, 0);
    }
    if rng.percent(30) {
        let at = 14 + rng.below(28);
        frame[at] = rng.next() as u8;
    }
    frame
}

//! Compiled rules, judged as the kernel programs judge, beside a scan of the rules as they are written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use datapath::firewall::Judgement;
use datapath::keys::{LearntKey, Tuple};
use datapath::memory::Memory;
use datapath::packet::{ICMP, ICMPV6, SCTP, TCP, UDP};
use datapath::tables::Tables;
use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::super::{Ports, naive};
use super::*;

const FIREWALL: u32 = 7;
const VERSION: u32 = 3;
/// GRE, for all protocols that nobody has heard of.
const GRE: u8 = 47;

fn net(s: &str) -> Destination {
    Destination::Network(s.parse().unwrap())
}

fn name(n: usize) -> Name {
    Name { wildcard: n.is_multiple_of(2), name: format!("{n}.example.com") }
}

fn port(protocol: u8, first: u16, last: u16) -> Ports {
    Ports { protocol, first, last }
}

fn allow(to: Destination, ports: &[Ports]) -> Rule {
    Rule { allows: true, to, ports: ports.to_vec() }
}

fn deny(to: Destination, ports: &[Ports]) -> Rule {
    Rule { allows: false, to, ports: ports.to_vec() }
}

/// 10.0.0.0 and on.
fn host(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + n).into()
}

fn to_host(n: u32) -> Destination {
    Destination::Network(host(n).into())
}

/// Rules compiled, what addresses names have, and the tables that say the same.
struct World {
    rules: Vec<Rule>,
    known: BTreeMap<Name, BTreeSet<IpAddr>>,
    ids: BTreeMap<Name, NameId>,
    compiled: Rules,
    memory: Memory,
}

fn compiled(rules: &[Rule], ids: &mut BTreeMap<Name, NameId>) -> Result<Rules, TooMuch> {
    compile(rules, &mut |name| {
        let next = ids.len() as NameId + 1;
        *ids.entry(name.clone()).or_insert(next)
    })
}

impl World {
    fn new(rules: Vec<Rule>, known: BTreeMap<Name, BTreeSet<IpAddr>>) -> Self {
        let mut ids = BTreeMap::new();
        let mut compiled = compiled(&rules, &mut ids).unwrap();
        compiled.ruleset.firewall = FIREWALL;
        let mut memory = Memory::new(1, 0);
        compiled.fill(VERSION, &mut memory);
        for (name, ips) in &known {
            for ip in ips {
                if let Some(id) = ids.get(name) {
                    memory.credit(&LearntKey { firewall: FIREWALL, ip: (*ip).into() }, *id, 1);
                }
            }
        }
        Self { rules, known, ids, compiled, memory }
    }

    fn of(rules: Vec<Rule>) -> Self {
        Self::new(rules, BTreeMap::new())
    }

    fn judge(&self, ip: IpAddr, protocol: u8, port: u16) -> Judgement {
        let tuple =
            Tuple { destination: ip.into(), destination_port: port, source_port: 5, protocol, ..Tuple::default() };
        self.memory.judge(VERSION, &tuple)
    }

    /// What the scan of the rules says, in the judgement's words.
    fn expected(&self, ip: IpAddr, protocol: u8, port: u16) -> Judgement {
        let known = |name: &Name, ip| self.known.get(name).is_some_and(|ips| ips.contains(&ip));
        naive::decide(&self.rules, ip, protocol, port, known).map_or(Judgement::NONE, |index| {
            let rule = &self.rules[index];
            let name = match &rule.to {
                Destination::Name(name) => self.ids[name],
                Destination::Network(_) | Destination::Nodes(_) => 0,
            };
            Judgement { rule: Winner::new(index as u32, rule.allows).order, name }
        })
    }

    #[track_caller]
    fn agrees(&self, ip: IpAddr, protocol: u8, port: u16) {
        assert_eq!(self.judge(ip, protocol, port), self.expected(ip, protocol, port), "{ip} {protocol} {port}");
    }

    /// Classes in use, class 0 left out.
    fn classes(&self) -> usize {
        self.compiled.rules.iter().map(|(class, ..)| class).filter(|class| **class != 0).collect::<BTreeSet<_>>().len()
    }

    fn lines(&self) -> usize {
        self.compiled.rules.len()
    }
}

/// What holds of all compiled rules, whatever they say.
fn well_formed(rules: &Rules) -> Result<(), TestCaseError> {
    prop_assert!(rules.rules.is_sorted_by(|a, b| (a.0, a.1) < (b.0, b.1)), "sorted, each once");
    prop_assert!(rules.names.is_sorted_by(|a, b| (a.0, a.1) < (b.0, b.1)), "sorted, each once");
    // Each line says something else than the network around it in its class.
    for class in rules.rules.chunk_by(|a, b| a.0 == b.0) {
        let mut around: Vec<(IpNet, Winner)> = Vec::new();
        for (_, net, winner) in class {
            while around.pop_if(|(outer, _)| !outer.contains(net)).is_some() {}
            prop_assert!(around.last().is_none_or(|(_, outer)| winner < outer), "a line too many: {}", net);
            around.push((*net, *winner));
        }
    }
    let highest = rules.rules.iter().map(|(class, ..)| *class).chain(rules.names.iter().map(|n| n.1)).max();
    let pages = rules.ports.iter().flat_map(|(_, table)| table.page);
    let uniform = pages.clone().filter(|p| p & 0x8000 != 0).map(|p| p & 0x7fff);
    let classes: BTreeSet<u16> = uniform.chain(rules.pages.iter().flat_map(|page| page.class)).collect();
    prop_assert_eq!(classes.last().copied().unwrap_or(0), highest.unwrap_or(0), "every class is some port's");
    let mut used: Vec<u16> = pages.filter(|p| p & 0x8000 == 0).collect();
    used.sort_unstable();
    used.dedup();
    prop_assert_eq!(used, (0..rules.pages.len() as u16).collect::<Vec<_>>(), "every page is some port's");
    Ok(())
}

/// Addresses close together, so that prefixes of any length contain one another often.
fn address() -> impl Strategy<Value = IpAddr> {
    let octet = || prop::sample::select(vec![0u8, 1, 2, 127, 128, 254, 255]);
    let v4 = [octet(), octet(), octet()].prop_map(|[b, c, d]| Ipv4Addr::new(10, b, c, d).into());
    let v6 = (octet(), octet(), prop::sample::select(vec![0u16, 0x2001, 0xffff])).prop_map(|(g, h, a)| {
        Ipv6Addr::new(a, 0xdb8, u16::from(g) << 8, 0, 0, 0xffff, 0x0a00, u16::from(h)).into()
    });
    // What no packet's destination is: IPv4's have their own family.
    let mapped = octet().prop_map(|d| Ipv4Addr::new(10, 0, 0, d).to_ipv6_mapped().into());
    prop_oneof![8 => v4, 6 => v6, 1 => mapped]
}

fn network() -> impl Strategy<Value = IpNet> {
    (address(), any::<prop::sample::Index>(), any::<bool>()).prop_map(|(ip, index, random)| {
        let max = if ip.is_ipv4() { 32 } else { 128 };
        let usual: &[u8] =
            if max == 32 { &[0, 1, 8, 9, 16, 17, 24, 30, 31, 32] } else { &[0, 1, 16, 48, 96, 120, 127, 128] };
        let len = if random { index.index(max + 1) as u8 } else { usual[index.index(usual.len())] };
        IpNet::new(ip, len).unwrap().trunc()
    })
}

/// Ports at the edges of pages and of everything.
fn port_number() -> impl Strategy<Value = u16> {
    prop_oneof![
        3 => prop::sample::select(vec![0u16, 1, 62, 63, 64, 65, 127, 128, 443, 1023, 1024, 32767, 32768, 65534, 65535]),
        1 => any::<u16>(),
    ]
}

fn ports() -> impl Strategy<Value = Ports> {
    (prop::sample::select(vec![TCP, UDP, SCTP]), port_number(), port_number(), 0..4u8).prop_map(
        |(protocol, a, b, kind)| match kind {
            0 => port(protocol, 0, 65535),
            1 => port(protocol, a.min(b), a.max(b)),
            _ => port(protocol, a, a),
        },
    )
}

/// `names`: how many there are.
fn rule(names: usize, most_ports: usize) -> impl Strategy<Value = Rule> {
    let to = prop_oneof![
        10 => network().prop_map(Destination::Network),
        3 => (0..names).prop_map(|n| Destination::Name(name(n))),
        2 => vec(address(), 0..6).prop_map(Destination::Nodes),
    ];
    let ports = prop_oneof![2 => Just(Vec::new()), 3 => vec(ports(), 1..=most_ports)];
    (any::<bool>(), to, ports).prop_map(|(allows, to, ports)| Rule { allows, to, ports })
}

/// What addresses names have.
fn known(names: usize) -> impl Strategy<Value = BTreeMap<Name, BTreeSet<IpAddr>>> {
    // As the programs hold them: the kernel learns no other.
    let known = address().prop_map(|ip| ip.to_canonical());
    vec(prop::collection::btree_set(known, 0..6), names)
        .prop_map(|all| all.into_iter().enumerate().map(|(n, ips)| (name(n), ips)).collect())
}

/// An address at a destination's edge or beyond it, by a random number.
fn near(to: &Destination, known: &BTreeMap<Name, BTreeSet<IpAddr>>, random: u32) -> IpAddr {
    let (first, last) = match to {
        Destination::Network(net) => (net.network(), net.broadcast()),
        Destination::Name(name) => {
            let ips = known.get(name).filter(|ips| !ips.is_empty());
            let ip = ips.map_or(host(0), |ips| *ips.iter().nth(random as usize / 8 % ips.len()).unwrap());
            (ip, ip)
        }
        Destination::Nodes(ips) => {
            let ip = ips.get(random as usize / 8 % ips.len().max(1)).copied().unwrap_or(host(0));
            (ip, ip)
        }
    };
    let step = |ip: IpAddr, by: i8| match ip {
        IpAddr::V4(ip) => IpAddr::from(Ipv4Addr::from_bits(ip.to_bits().wrapping_add_signed(by.into()))),
        IpAddr::V6(ip) => IpAddr::from(Ipv6Addr::from_bits(ip.to_bits().wrapping_add_signed(by.into()))),
    };
    let ip = match random % 8 {
        0..3 => first,
        3..5 => last,
        5 => step(first, -1),
        6 => step(last, 1),
        _ => step(first, 1),
    };
    // As the programs hold it.
    ip.to_canonical()
}

/// A protocol and port at the edge of a rule's ports or beyond.
fn near_ports(ports: &[Ports], random: u32) -> (u8, u16) {
    let Some(ports) = ports.get(random as usize / 64 % ports.len().max(1)) else {
        return ([TCP, UDP, SCTP, ICMP, ICMPV6, GRE][random as usize % 6], (random >> 8) as u16);
    };
    let port = match random % 8 {
        0..2 => ports.first,
        2..4 => ports.last,
        4 => ports.first.wrapping_sub(1),
        5 => ports.last.wrapping_add(1),
        6 => ports.first.midpoint(ports.last),
        _ => (random >> 16) as u16,
    };
    let protocol =
        if random / 8 % 8 == 0 { [TCP, UDP, SCTP, ICMP][random as usize / 64 % 4] } else { ports.protocol };
    (protocol, port)
}

/// Compares many packets near the rules' edges. Says how many met a rule.
fn compare(world: &World, packets: usize, seed: u32) -> Result<usize, TestCaseError> {
    well_formed(&world.compiled)?;
    world.memory.seed.set(seed.max(1));
    let random = || world.memory.random();
    let mut met = 0;
    for _ in 0..packets {
        let pick = |random: u32| &world.rules[random as usize % world.rules.len()];
        let (a, b) = (pick(random()), pick(random()));
        let ip = near(&a.to, &world.known, random());
        let (protocol, port) = near_ports(if random() % 2 == 0 { &a.ports } else { &b.ports }, random());
        let expected = world.expected(ip, protocol, port);
        prop_assert_eq!(world.judge(ip, protocol, port), expected, "{} protocol {} port {}", ip, protocol, port);
        met += usize::from(expected != Judgement::NONE);
    }
    Ok(met)
}

fn from_env(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().unwrap())
}

/// Runs cases of generated rules and packets; both counts and the seed can be had from the environment.
fn generated(sizes: std::ops::RangeInclusive<usize>, most_ports: usize, cases: u64, packets: usize) {
    const NAMES: usize = 8;
    let cases = from_env("OUTGATE_FIREWALL_CASES", cases);
    let seed = from_env("OUTGATE_FIREWALL_SEED", 1);
    println!("OUTGATE_FIREWALL_CASES={cases} OUTGATE_FIREWALL_SEED={seed}, {sizes:?} rules, {packets} packets each");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: cases as u32, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let met = std::cell::Cell::new(0);
    let refused = std::cell::Cell::new(0);
    let strategy = (vec(rule(NAMES, most_ports), sizes), known(NAMES), any::<u32>());
    let outcome = runner.run(&strategy, |(rules, known, seed)| {
        match compiled(&rules, &mut BTreeMap::new()) {
            Ok(_) => met.set(met.get() + compare(&World::new(rules, known), packets, seed)?),
            Err(_) => refused.set(refused.get() + 1),
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    println!("{} packets met a rule, {} rule sets were refused", met.get(), refused.get());
    assert_eq!(refused.get(), 0, "the shapes are chosen so that they compile");
    assert!(met.get() * 4 > cases as usize * packets, "too few packets met a rule to show anything");
}

#[test]
fn few_rules_say_what_a_scan_of_them_says() {
    generated(1..=12, 3, 2000, 40);
}

#[test]
fn many_rules_say_what_a_scan_of_them_says() {
    generated(100..=400, 2, 20, 400);
}

//! Compiled rules, judged as the kernel programs judge, beside a scan of the rules as they are written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use datapath::firewall::Judgement;
use datapath::keys::{LearntKey, Tuple};
use datapath::memory::Memory;
use datapath::packet::{ICMP, ICMPV6, SCTP, TCP, UDP};
use datapath::rules_build::{Address, Span};
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
        let tuple = Tuple {
            destination: ip.into(),
            destination_port: port,
            source_port: 5,
            protocol,
            ..Tuple::default()
        };
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
        assert_eq!(
            self.judge(ip, protocol, port),
            self.expected(ip, protocol, port),
            "{ip} {protocol} {port}"
        );
    }

    /// Classes in use, class 0 left out.
    fn classes(&self) -> usize {
        let classes: BTreeSet<_> = classes(&self.compiled).collect();
        classes.len() - usize::from(classes.contains(&0))
    }

    /// Stretches of addresses that a rule decides.
    fn ruled(&self) -> usize {
        self.compiled.winners().count() - self.compiled.names.len()
    }
}

/// The class of each span.
fn classes(rules: &Rules) -> impl Iterator<Item = u16> + '_ {
    rules.v4.iter().map(|span| span.class).chain(rules.v6.iter().map(|span| span.class))
}

/// What holds of the spans of a family, whatever they say: each differs from the one before, and all of a class together
/// are all addresses.
fn spans_well_formed<A: Address + std::fmt::Debug>(spans: &[Span<A>]) -> Result<(), TestCaseError> {
    prop_assert!(spans.is_sorted_by(|a, b| (a.class, a.last) < (b.class, b.last)), "sorted, each once");
    for class in spans.chunk_by(|a, b| a.class == b.class) {
        prop_assert!(
            class.windows(2).all(|two| two[0].winner != two[1].winner),
            "a span too many: {:?}",
            class
        );
        prop_assert!(class[class.len() - 1].last == A::HIGHEST, "{:?}", class);
        prop_assert!(class.iter().any(|span| span.winner != Winner::NONE), "for nothing: {:?}", class);
    }
    Ok(())
}

/// What holds of all compiled rules, whatever they say.
fn well_formed(rules: &Rules) -> Result<(), TestCaseError> {
    spans_well_formed(&rules.v4)?;
    spans_well_formed(&rules.v6)?;
    prop_assert!(rules.names.is_sorted_by(|a, b| (a.0, a.1) < (b.0, b.1)), "sorted, each once");
    let highest = classes(rules).chain(rules.names.iter().map(|n| n.1)).max();
    if let Some(last) = rules.ports.last() {
        prop_assert!(rules.ports.is_sorted_by(|a, b| a.last < b.last) && last.last == u32::MAX);
        prop_assert!(rules.ports.windows(2).all(|two| two[0].winner != two[1].winner), "a span too many");
    }
    let classes: BTreeSet<u16> = rules.ports.iter().map(|span| span.winner as u16).collect();
    prop_assert_eq!(classes.last().copied().unwrap_or(0), highest.unwrap_or(0), "every class is some port's");
    prop_assert_eq!(rules.ports.is_empty(), classes.len() < 2, "and some port has one");
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
        let usual: &[u8] = if max == 32 {
            &[0, 1, 8, 9, 16, 17, 24, 30, 31, 32]
        } else {
            &[0, 1, 16, 48, 96, 120, 127, 128]
        };
        let len = if random { index.index(max + 1) as u8 } else { usual[index.index(usual.len())] };
        IpNet::new(ip, len).unwrap().trunc()
    })
}

/// Small networks among 65,536 addresses of each family: none decides for most others.
fn small_network() -> impl Strategy<Value = IpNet> {
    (any::<u16>(), 0..8u8, any::<bool>()).prop_map(|(n, shorter, v4)| {
        let (ip, len) = if v4 {
            (host(n.into()), 32)
        } else {
            (Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(n)).into(), 128)
        };
        IpNet::new(ip, len - shorter).unwrap().trunc()
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
fn rule(
    names: usize,
    networks: impl Strategy<Value = IpNet> + 'static,
    ports: impl Strategy<Value = Vec<Ports>> + 'static,
) -> impl Strategy<Value = Rule> {
    let to = prop_oneof![
        10 => networks.prop_map(Destination::Network),
        3 => (0..names).prop_map(|n| Destination::Name(name(n))),
        2 => vec(address(), 0..6).prop_map(Destination::Nodes),
    ];
    let ports = prop_oneof![2 => Just(Vec::new()), 3 => ports];
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
    let protocol = if (random / 8).is_multiple_of(8) {
        [TCP, UDP, SCTP, ICMP][random as usize / 64 % 4]
    } else {
        ports.protocol
    };
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
        prop_assert_eq!(
            world.judge(ip, protocol, port),
            expected,
            "{} protocol {} port {}",
            ip,
            protocol,
            port
        );
        met += usize::from(expected != Judgement::NONE);
    }
    Ok(met)
}

fn from_env(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().unwrap())
}

/// So many cases; both their number and the seed can be had from the environment.
fn runner(cases: u64) -> TestRunner {
    let cases = from_env("OUTGATE_FIREWALL_CASES", cases);
    let seed = from_env("OUTGATE_FIREWALL_SEED", 1);
    println!("OUTGATE_FIREWALL_CASES={cases} OUTGATE_FIREWALL_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: cases as u32, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// Runs cases of generated rules and packets.
fn generated(
    sizes: std::ops::RangeInclusive<usize>,
    networks: impl Strategy<Value = IpNet> + 'static,
    ports: impl Strategy<Value = Vec<Ports>> + 'static,
    cases: u64,
    packets: usize,
) {
    const NAMES: usize = 8;
    println!("{sizes:?} rules, {packets} packets each");
    let mut runner = runner(cases);
    let cases = runner.config().cases;
    let met = std::cell::Cell::new(0);
    let refused = std::cell::Cell::new(0);
    let strategy = (vec(rule(NAMES, networks, ports), sizes), known(NAMES), any::<u32>());
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
    generated(1..=12, network(), vec(ports(), 1..=3), 500, 40);
}

#[test]
fn many_rules_say_what_a_scan_of_them_says() {
    generated(100..=400, small_network(), vec(ports(), 1..=2), 20, 400);
}

#[test]
fn eight_thousand_rules_say_what_a_scan_of_them_says() {
    // Few lists of ports, for each part of overlapping ranges needs all rules of both.
    let lists = [
        vec![port(TCP, 443, 443)],
        vec![port(TCP, 80, 80), port(TCP, 443, 443), port(UDP, 443, 443)],
        vec![port(TCP, 0, 65535), port(UDP, 0, 65535)],
        vec![port(TCP, 1024, 65535)],
        vec![port(SCTP, 64, 127)],
    ];
    generated(8000..=8000, small_network(), prop::sample::select(lists.to_vec()), 4, 400);
}

#[test]
fn the_same_rules_are_compiled_the_same() {
    let rules = vec(rule(8, network(), vec(ports(), 1..=3)), 1..40);
    let mut runner = runner(100);
    let outcome = runner.run(&rules, |rules| {
        let once = compiled(&rules, &mut BTreeMap::new());
        prop_assert_eq!(&once, &compiled(&rules.clone(), &mut BTreeMap::new()));
        // Another rule with the same destination: what it denies may not pass for what was allowed.
        let mut other = rules;
        other[0].allows = !other[0].allows;
        let other = compiled(&other, &mut BTreeMap::new()).unwrap();
        let matters =
            once.clone().is_ok_and(|r| (&r.v4, &r.v6, &r.names) != (&other.v4, &other.v6, &other.names));
        prop_assert_eq!(matters, once.unwrap().ruleset.content != other.ruleset.content);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn the_content_of_a_version_stays_its_own_in_later_agents() {
    let rules = [
        allow(net("192.0.2.0/24"), &[port(TCP, 443, 443)]),
        allow(net("2001:db8::/32"), &[]),
        allow(Destination::Name(name(1)), &[]),
        deny(net("0.0.0.0/0"), &[]),
    ];
    let world = World::of(rules.to_vec());
    assert_eq!(
        world.compiled.ruleset.content, 0xa886_1fa9_ed06_664c,
        "or every restart of a new agent replaces every version"
    );
    assert_eq!(world.compiled.ruleset.rules, 4);
}

#[test]
fn openshifts_example_does_what_it_says_and_reversed_denies_all() {
    let mut rules = vec![
        allow(net("1.2.3.0/24"), &[]),
        allow(Destination::Name(name(1)), &[]),
        deny(net("0.0.0.0/0"), &[]),
    ];
    let known = BTreeMap::from([(name(1), BTreeSet::from([host(9)]))]);
    let world = World::new(rules.clone(), known.clone());
    let in_cidr = "1.2.3.4".parse().unwrap();
    for protocol in [TCP, UDP, ICMP] {
        assert_eq!(
            world.judge(in_cidr, protocol, 80),
            Judgement { rule: Winner::new(0, true).order, name: 0 }
        );
        assert_eq!(
            world.judge(host(9), protocol, 80),
            Judgement { rule: Winner::new(1, true).order, name: 1 }
        );
        assert_eq!(
            world.judge(host(8), protocol, 80),
            Judgement { rule: Winner::new(2, false).order, name: 0 }
        );
    }
    rules.reverse();
    let world = World::new(rules, known);
    for ip in [in_cidr, host(9), host(8)] {
        assert_eq!(world.judge(ip, TCP, 80), Judgement { rule: Winner::new(0, false).order, name: 0 });
    }
    assert_eq!(world.judge("2001:db8::1".parse().unwrap(), TCP, 80), Judgement::NONE, "0.0.0.0/0 is no IPv6");
}

#[test]
fn no_rules_need_nothing() {
    for rules in [
        vec![],
        vec![deny(Destination::Nodes(vec![]), &[]), deny(Destination::Nodes(vec![]), &[port(TCP, 1, 9)])],
    ] {
        let count = rules.len() as u32;
        let compiled = World::of(rules).compiled;
        assert_eq!((compiled.ruleset.parts, compiled.ruleset.rules), (0, count));
        assert!(
            compiled.v4.is_empty()
                && compiled.v6.is_empty()
                && compiled.ports.is_empty()
                && compiled.names.is_empty()
        );
    }
}

#[test]
fn what_can_never_win_takes_no_room() {
    let world = World::of(vec![
        deny(net("10.0.0.0/8"), &[]),
        allow(net("10.1.0.0/16"), &[]),
        allow(net("10.1.0.0/16"), &[port(TCP, 80, 80)]),
        allow(Destination::Nodes(vec![host(1), host(2)]), &[port(UDP, 1, 9)]),
    ]);
    assert_eq!((world.ruled(), world.classes(), world.compiled.ruleset.parts), (1, 0, Ruleset::ADDRESSES));

    // Both families are denied, so names are; but not with one family alone.
    let mut rules =
        vec![deny(net("0.0.0.0/0"), &[]), deny(net("::/0"), &[]), allow(Destination::Name(name(1)), &[])];
    rules.push(allow(Destination::Name(name(2)), &[port(TCP, 1, 1)]));
    assert_eq!(World::of(rules.clone()).compiled.ruleset.parts, Ruleset::ADDRESSES);
    rules.remove(0);
    let all = Ruleset::ADDRESSES | Ruleset::NAMES | Ruleset::PORTS;
    assert_eq!(World::of(rules).compiled.ruleset.parts, all);

    // The same rules for different ports and protocols: one class.
    let world = World::of(vec![
        deny(net("10.0.0.0/8"), &[port(TCP, 80, 80), port(UDP, 443, 443)]),
        allow(net("10.1.0.0/16"), &[port(TCP, 80, 80)]),
        allow(net("10.1.0.0/16"), &[port(UDP, 443, 443)]),
    ]);
    assert_eq!((world.ruled(), world.classes()), (1, 1), "the first of them decides alone");
}

#[test]
fn a_thousand_rules_with_ports_before_seven_thousand_hosts() {
    let ports = (0..1000).map(|n| deny(net("0.0.0.0/0"), &[port(TCP, 1000 + n, 1000 + n)]));
    // Without ports, and with all of a protocol, which would need each host again in each of 1,001 classes, if the
    // rules before did not win there.
    for hosts in [vec![], vec![port(TCP, 0, 65535)]] {
        let hosts = (0..7000).map(|n| allow(to_host(n * 3), &hosts));
        let world = World::of(ports.clone().chain(hosts).collect());
        assert_eq!(world.ruled(), 8000);
        for n in [0, 3, 9000, 20_997, 20_998] {
            for port in [999, 1000, 1500, 1999, 2000] {
                world.agrees(host(n), TCP, port);
                world.agrees(host(n), UDP, port);
            }
        }
    }
}

#[test]
fn eight_thousand_ports_and_as_many_nested_ranges() {
    let single = |n: u16| allow(to_host(n.into()), &[port(TCP, n * 5, n * 5)]);
    let world = World::of((0..8000).map(single).collect());
    assert_eq!((world.ruled(), world.classes()), (8000, 8000));
    for n in [0, 1, 2, 3999, 7999] {
        for port in [n * 5, n * 5 + 1] {
            world.agrees(host(n.into()), TCP, port);
            world.agrees(host(u32::from(n) + 1), TCP, port);
            world.agrees(host(n.into()), UDP, port);
        }
    }

    // The widest first: the others never win. The widest last: each wins at its edges, at one place.
    let nested = |n: u16| allow(net("10.0.0.0/8"), &[port(UDP, n, u16::MAX - n)]);
    let world = World::of((0..8000).map(nested).collect());
    assert_eq!((world.ruled(), world.classes()), (1, 1));
    let world = World::of((0..8000).rev().map(nested).collect());
    assert_eq!((world.ruled(), world.classes()), (8000, 8000));
    for n in [0, 1, 4000, 7998, 7999, 8000, 32_000, 65_535] {
        world.agrees(host(5), UDP, n);
    }
}

/// How long it takes, for shapes of 8,000 rules: `cargo test --release -p outgate -- --ignored --nocapture how_long`.
#[test]
#[ignore = "prints figures"]
fn how_long_it_takes() {
    let random = {
        let memory = Memory::new(1, 0);
        move || memory.random()
    };
    let mixed = || {
        let net = IpNet::new(host(random() & 0xff_ffff), 18 + (random() % 15) as u8).unwrap().trunc();
        Destination::Network(net)
    };
    let v6 = || {
        let ip = Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(random()) << 64);
        Destination::Network(IpNet::new(ip.into(), 44 + (random() % 85) as u8).unwrap().trunc())
    };
    let web = [port(TCP, 80, 80), port(TCP, 443, 443)];
    let nodes: Vec<IpAddr> = (0..5000).map(host).collect();
    let n16 = |n: u32| n as u16;
    let each = |rule: &dyn Fn(u32) -> Rule| (0..8000).map(rule).collect::<Vec<_>>();
    let shapes = [
        ("hosts", each(&|n| allow(to_host(n), &[]))),
        ("mixed prefixes", each(&|_| allow(mixed(), &[]))),
        ("mixed prefixes, IPv6", each(&|_| allow(v6(), &[]))),
        ("mixed prefixes, two ports each", each(&|_| allow(mixed(), &web))),
        (
            "mixed prefixes, one of 20 ports",
            each(&|n| allow(mixed(), &[port(TCP, n16(n % 20), n16(n % 20))])),
        ),
        (
            "hosts, 20 ports each",
            each(&|n| allow(to_host(n), &(0..20).map(|p| port(TCP, 7 * p, 7 * p)).collect::<Vec<_>>())),
        ),
        (
            "1,000 ports before 7,000 hosts",
            each(&|n| match n {
                0..1000 => deny(net("0.0.0.0/0"), &[port(TCP, n16(n), n16(n))]),
                _ => allow(to_host(n), &[]),
            }),
        ),
        (
            "the same, hosts with all of TCP",
            each(&|n| match n {
                0..1000 => deny(net("0.0.0.0/0"), &[port(TCP, n16(n), n16(n))]),
                _ => allow(to_host(n), &[port(TCP, 0, 65535)]),
            }),
        ),
        ("8,000 hosts with a port each", each(&|n| allow(to_host(n), &[port(TCP, n16(n * 8), n16(n * 8))]))),
        (
            "8,000 nested ranges",
            each(&|n| allow(net("10.0.0.0/8"), &[port(TCP, n16(8000 - n), n16(57_000 + n))])),
        ),
        (
            "nested ranges, refused",
            each(&|n| allow(to_host(n), &[port(TCP, n16(8000 - n), n16(57_000 + n))])),
        ),
        ("names", each(&|n| allow(Destination::Name(name(n as usize % 1024)), &[]))),
        (
            "200 rules for 5,000 nodes",
            (0..200).map(|_| allow(Destination::Nodes(nodes.clone()), &web)).collect(),
        ),
        (
            "53 rules for 5,000 nodes, refused",
            (0..53).map(|_| allow(Destination::Nodes(nodes.clone()), &web)).collect(),
        ),
        ("32,767 classes", pairs(32_767)),
    ];
    println!(
        "{:<40} {:>9} {:>8} {:>8} {:>6} {:>6}",
        "shape", "best, ms", "spans", "classes", "ports", "blocks"
    );
    for (shape, rules) in shapes {
        let mut ids = BTreeMap::new();
        let mut best = f64::MAX;
        let mut outcome = None;
        for _ in 0..20 {
            let start = std::time::Instant::now();
            outcome = Some(std::hint::black_box(compiled(&rules, &mut ids)));
            best = best.min(start.elapsed().as_secs_f64() * 1e3);
        }
        match outcome.unwrap() {
            Ok(rules) => {
                let classes = classes(&rules).max().unwrap_or(0);
                println!(
                    "{shape:<40} {best:>9.3} {:>8} {classes:>8} {:>6} {:>6}",
                    rules.v4.len() + rules.v6.len(),
                    rules.ports.len(),
                    rules.blocks
                );
            }
            Err(error) => println!("{shape:<40} {best:>9.3} {error}"),
        }
    }
}

#[test]
fn chains_hosts_and_one_prefix_again_and_again() {
    // 129 prefixes around one address, the shortest first and last.
    let around = |len| Destination::Network(IpNet::new("2001:db8::1".parse().unwrap(), len).unwrap().trunc());
    assert_eq!(World::of((0..=128).map(|len| deny(around(len), &[])).collect()).ruled(), 1);
    let world = World::of((0..=128).rev().map(|len| deny(around(len), &[])).collect());
    assert_eq!(world.ruled(), 129);
    for ip in ["2001:db8::1", "2001:db8::", "2001:db8::3", "2001::", "8000::", "::"] {
        world.agrees(ip.parse().unwrap(), TCP, 1);
    }

    let world = World::of((0..8000).map(|_| deny(net("10.0.0.0/24"), &[port(TCP, 1, 9)])).collect());
    assert_eq!(world.ruled(), 1);
    let world = World::of((0..8000).map(|n| allow(to_host(n), &[])).collect());
    assert_eq!(world.ruled(), 8000);
    world.agrees(host(7999), GRE, 0);
    world.agrees(host(8000), GRE, 0);
}

#[test]
fn what_is_too_much_is_refused_with_a_reason() {
    let refusal = |rules: &[Rule]| compiled(rules, &mut BTreeMap::new()).unwrap_err().to_string();
    let mut all = String::new();

    let nodes: Vec<IpAddr> = (0..10_000).map(host).collect();
    let select: Vec<Rule> = (0..27).map(|_| deny(Destination::Nodes(nodes.clone()), &[])).collect();
    writeln!(all, "{}", refusal(&select)).unwrap();
    assert_eq!(World::of(select[..26].to_vec()).ruled(), 1, "side by side");

    // Each of 20 ports in all of 7,000 ranges.
    let ranges = |ports: u16| -> Vec<Rule> {
        let hosts = (0..7000).map(|n| allow(to_host(n), &[port(TCP, 1, 65535)]));
        (0..ports).map(|n| deny(to_host(8000), &[port(TCP, 5 * n + 5, 5 * n + 5)])).chain(hosts).collect()
    };
    writeln!(all, "{}", refusal(&ranges(20))).unwrap();
    assert_eq!(World::of(ranges(17)).ruled(), 18 * 7000 + 17);
    writeln!(all, "{}", refusal(&ranges(1000))).unwrap();

    let names = |ports: u16| -> Vec<Rule> {
        let names = (0..1000).map(|n| allow(Destination::Name(name(n)), &[port(TCP, 1, 65535)]));
        (0..ports).map(|n| deny(to_host(0), &[port(TCP, 5 * n + 5, 5 * n + 5)])).chain(names).collect()
    };
    writeln!(all, "{}", refusal(&names(32))).unwrap();
    assert_eq!(World::of(names(31)).compiled.names.len(), 32_000);

    writeln!(all, "{}", refusal(&pairs(32_768))).unwrap();
    assert_eq!(World::of(pairs(32_767)).classes(), 32_767);

    assert_eq!(
        all,
        "\
its rules have 270000 destinations, each address of a selected node counted for each rule, of which 262144 are possible: \
let fewer rules select nodes, or join rules that select the same ones
its rules need 147020 table entries of 131072: ranges of ports that overlap in part need the rules of both again for each \
part, so give such rules the same ranges, or leave their ports out
its rules need more than 2097152 steps to be compiled: ranges of ports that overlap in part need the rules of both again \
for each part, so give such rules the same ranges, or leave their ports out
its rules for names need 33000 table entries of 32768: ranges of ports that overlap in part need the rules of both again \
for each part, so give such rules the same ranges, or leave their ports out
the ports of its rules fall into 32768 classes, one for all ports that have the same rules, of which 32767 are possible: \
use fewer different ranges, or split the namespace
"
    );
}

/// Rules for two hosts, so that at each of so many ports another pair of them wins.
fn pairs(ports: u16) -> Vec<Rule> {
    const EACH: u16 = 182;
    let rule = |host, matches: &dyn Fn(u16) -> bool| {
        let ports: Vec<Ports> = (0..ports).filter(|n| matches(*n)).map(|n| port(TCP, n, n)).collect();
        deny(to_host(host), &ports)
    };
    let first = (0..=ports / EACH).map(|i| rule(0, &|n| n / EACH == i));
    first
        .chain((0..EACH).map(|i| rule(2, &|n| n % EACH == i)))
        .filter(|rule| !rule.ports.is_empty())
        .collect()
}

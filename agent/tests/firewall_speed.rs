//! How long it takes until changed rules are in force, from objects that are read to the word in the kernel. Needs
//! root: `cargo test --release -p outgate --test firewall_speed -- --ignored --nocapture`.
#![expect(clippy::unwrap_used, reason = "a test, whose helpers clippy does not take for one")]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use outgate::bpf::{self, Datapath};
use outgate::compile::compile;
use outgate::facts::Facts;
use outgate::firewall::{Destination, Firewall, Ports, Rule};
use outgate::ids::Ids;
use outgate::model::{Desired, Pod};

/// Pins that go with the test.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = bpf::cleanup(&self.0);
    }
}

/// Rules as people write them: mostly networks of both families, each tenth with ports.
fn rules(seed: u32) -> Vec<Rule> {
    let rule = |i: u32| {
        let net: IpNet = match i % 4 {
            3 => Ipv6Net::new(Ipv6Addr::from((0x2001_0db8 << 96) + (u128::from(seed + i) << 48)), 96)
                .unwrap()
                .into(),
            n => Ipv4Net::new(Ipv4Addr::from(0x0b00_0000 + ((seed + i) << 8)), 24 + 2 * n as u8)
                .unwrap()
                .into(),
        };
        let ports = match i % 10 {
            0 => vec![Ports { protocol: 6, first: 443, last: 443 }],
            5 => vec![Ports { protocol: 17, first: 5000 + (i % 100) as u16, last: 5100 }],
            _ => Vec::new(),
        };
        Rule { allows: i.is_multiple_of(3), to: Destination::Network(net), ports }
    };
    (0..8000).map(rule).collect()
}

/// The worst that a lab test uses: each eighth rule has a range of UDP ports of 125 that lie in one another, so that the
/// rules with ports are compiled again for each.
fn overlapping_ranges(seed: u32) -> Vec<Rule> {
    let rule = |i: u32| {
        let net = Ipv4Net::from(Ipv4Addr::from(0xc613_0000 + (i >> 8 << 8 | (i + seed) & 255)));
        let first = 9000 + (i % 500 + seed % 50) as u16;
        let ports =
            if i.is_multiple_of(8) { vec![Ports { protocol: 17, first, last: 9999 }] } else { vec![] };
        Rule { allows: (i + seed).is_multiple_of(2), to: Destination::Network(net.into()), ports }
    };
    let everything = IpNet::from(Ipv4Net::default());
    let last = Rule { allows: false, to: Destination::Network(everything), ports: vec![] };
    (0..7999).map(rule).chain([last]).collect()
}

#[test]
#[ignore = "needs root, and is a measurement"]
fn how_long_a_change_of_8000_rules_takes() {
    let pins = Pins(PathBuf::from(format!("/sys/fs/bpf/outgate-speed-{}", std::process::id())));
    let mut datapath = Datapath::open(&pins.0).unwrap();
    let facts = Facts::default();
    let mut ids = Ids::recover(datapath.recovered());
    let mut desired = Desired::default();
    let pod = Pod { version: 1, addresses: vec![Ipv4Addr::new(10, 0, 0, 1).into()], ..Pod::default() };
    desired.pods.insert(("prod".into(), "client".into()), pod);
    let mut put = |what: &str, rules: Vec<Rule>| {
        let firewall =
            Firewall { uid: "u".into(), version: 1, rules: Ok(Arc::new(rules)), notes: Vec::new() };
        desired.firewalls.insert("prod".into(), firewall);
        let start = Instant::now();
        let compiled = compile(&desired, &facts, &mut ids);
        let compiling = start.elapsed();
        assert_eq!(compiled.firewalls["prod"].error, None);
        datapath.apply(&compiled.image, &facts).unwrap();
        let both = start.elapsed();
        let spans = compiled.image.rulesets.values().map(|r| r.v4.len() + r.v6.len()).sum::<usize>();
        println!("{what}: compiled in {compiling:?}, in force after {both:?} ({spans} spans)");
        std::thread::sleep(Duration::from_millis(1100)); // until what was in force before may go
        let start = Instant::now();
        datapath.retire().unwrap();
        println!("{what}: the version before is removed in {:?}", start.elapsed());
    };
    put("8,000 rules", rules(0));
    put("8,000 others", rules(100_000));
    for n in 0..3 {
        let mut changed = rules(100_000);
        changed[4000 + n].allows ^= true;
        put("one of 8,000 changed", changed);
    }
    put("8,000 with overlapping ranges", overlapping_ranges(0));
    put("8,000 others with overlapping ranges", overlapping_ranges(1));
    for n in 0..3 {
        let mut changed = overlapping_ranges(1);
        changed[4000 + n].allows ^= true;
        put("one of 8,000 with overlapping ranges changed", changed);
    }
}

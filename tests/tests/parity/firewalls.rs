//! Random firewalls: rules as their compiler puts them into the maps, in two versions, names learnt, resolvers.

use std::net::IpAddr;

use datapath::addr::Ip;
use datapath::conntrack::seconds;
use datapath::keys::{
    FirewallId, Flow, FlowKey, LearntKey, NameId, RESOLVER, RESOLVER_ON_NODE, RuleCountKey, Ruleset,
    RulesetId, Tuple, Winner,
};
use datapath::memory::Memory;
use datapath::names::word;
use datapath::packet::{SCTP, TCP, UDP};
use datapath::tables::Tables as _;
use ipnet::IpNet;
use lab::kernel::State;
use outgate::firewall::compile::compile;
use outgate::firewall::{Destination, Name, Ports, Rule};

use super::{Family, Rng, V4, V6, either};

/// Places of firewalls.
const PLACES: FirewallId = 5;
/// The place of the one that is always there, with rules.
const SURE: FirewallId = 1;
/// Names of each.
const NAMES: NameId = 4;

/// The version of a firewall that is in force, if any is, and the one before.
const fn versions(place: FirewallId) -> [RulesetId; 2] {
    [10 * place + 1, 10 * place]
}

/// The firewall of a pod; 0: none.
pub(crate) fn place(rng: &mut Rng) -> FirewallId {
    if rng.percent(40) { 0 } else { SURE + rng.below(PLACES as usize) as u32 }
}

/// Fills the tables.
pub(crate) fn fill(rng: &mut Rng, t: &mut Memory) {
    for place in SURE..=PLACES {
        for id in versions(place) {
            let mut compiled = if place != SURE && rng.percent(10) {
                let ruleset = Ruleset { parts: Ruleset::REFUSED, ..Ruleset::default() };
                outgate::image::Rules { ruleset, ..Default::default() }
            } else {
                let rules = rules(rng);
                compile(&rules, &mut |name| id_of(place, name)).expect("they are few")
            };
            compiled.ruleset.firewall = place;
            compiled.fill(id, t);
        }
        if place == SURE || rng.percent(90) {
            t.firewalls.insert(place, versions(place)[0]);
        }
        // Not there yet, or no more.
        for id in versions(place) {
            if place != SURE && rng.percent(6) {
                t.rulesets.remove(&id);
            }
        }
    }
    learnt(rng, t);
    for (ip, flags, chance) in resolvers(&V4).into_iter().chain(resolvers(&V6)) {
        if rng.percent(chance) {
            t.resolvers.insert(ip, flags);
        }
    }
}

/// Who may be a resolver: flags, and how likely, in percent.
const fn resolvers(family: &Family) -> [(Ip, u32, usize); 8] {
    const ON_NODE: u32 = RESOLVER | RESOLVER_ON_NODE;
    [
        (family.nodes[0], ON_NODE, 60),
        (family.nodes[1], ON_NODE, 40),
        (family.inside[5], ON_NODE, 40),
        (family.inside[2], RESOLVER, 60),
        (family.outside[5], RESOLVER, 60),
        (family.outside[3], RESOLVER, 30),
        (family.pods[3].0, RESOLVER, 30),
        (family.strangers[0], RESOLVER, 30),
    ]
}

/// One who may be a resolver.
pub(crate) fn resolver(rng: &mut Rng, family: &Family) -> Ip {
    rng.pick(&resolvers(family)).0
}

/// Addresses have names, some of them of late; several may share an address.
fn learnt(rng: &mut Rng, t: &Memory) {
    let now = t.now.get();
    for place in SURE..=PLACES {
        for family in [&V4, &V6] {
            for ip in family.outside.into_iter().chain([family.inside[5], family.nodes[1]]) {
                if !rng.percent(60) {
                    continue;
                }
                let key = LearntKey { firewall: place, ip };
                let mut learnt = t.learnt.borrow_mut();
                let names = &mut learnt.entry(key).or_default().names;
                let some = rng.pick(&[1, 1, 2, 3, 16]);
                for slot in names.iter_mut().take(some) {
                    let until = if rng.percent(70) {
                        now.wrapping_add(seconds(rng.pick(&[60, 3600])))
                    } else {
                        now.wrapping_sub(seconds(rng.pick(&[5, 300])))
                    };
                    // One that no rule is for, too, and places that are free.
                    let name = rng.below(NAMES as usize + 2) as u32;
                    let name = if name == 0 { 0 } else { 10 * place + name };
                    *slot = word(name, until);
                }
            }
        }
    }
}

fn id_of(place: FirewallId, name: &Name) -> NameId {
    let nth = name.name.strip_prefix('n').and_then(|text| text.parse::<u32>().ok());
    10 * place + nth.expect("a name of these")
}

fn rules(rng: &mut Rng) -> Vec<Rule> {
    let with_ports = rng.pick(&[0, 30, 60]);
    let with_names = rng.pick(&[0, 30, 50]);
    let mut rules: Vec<_> = (0..rng.below(9))
        .map(|_| Rule {
            allows: rng.percent(50),
            to: destination(rng, with_names),
            ports: if rng.percent(with_ports) { ports(rng) } else { vec![] },
        })
        .collect();
    if rng.percent(40) {
        let family = either(rng);
        let to = Destination::Network(network(&family.outside[0], 0));
        rules.push(Rule { allows: rng.percent(30), to, ports: vec![] });
    }
    rules
}

fn destination(rng: &mut Rng, with_names: usize) -> Destination {
    if rng.percent(with_names) {
        let name = format!("n{}", 1 + rng.below(NAMES as usize));
        return Destination::Name(Name { wildcard: false, name });
    }
    let family = either(rng);
    if rng.percent(10) {
        let mut nodes: Vec<IpAddr> = family.nodes.iter().map(|ip| IpAddr::from(*ip)).collect();
        nodes.truncate(rng.below(4));
        nodes.sort_unstable();
        return Destination::Nodes(nodes);
    }
    if rng.percent(4) {
        return Destination::Network("::ffff:0:0/96".parse().expect("a network"));
    }
    let ip = match rng.below(8) {
        0 => rng.pick(&family.nodes),
        1 => family.inside[5],
        _ => rng.pick(&family.outside),
    };
    let len = if ip.is_v4() {
        rng.pick(&[0, 1, 8, 16, 24, 31, 32, 32])
    } else {
        rng.pick(&[0, 1, 16, 32, 48, 64, 127, 128, 128])
    };
    Destination::Network(network(&ip, len))
}

fn network(ip: &Ip, len: u8) -> IpNet {
    IpNet::new(IpAddr::from(*ip), len).expect("a length of its family").trunc()
}

fn ports(rng: &mut Rng) -> Vec<Ports> {
    (0..=rng.below(2))
        .map(|_| {
            let (first, last) = rng.pick(&[
                (80, 80),
                (53, 53),
                (5353, 5353),
                (40000, 40001),
                (40001, 40063),
                (64, 127),
                (1, 1023),
                (79, 40000),
                (30000, 32767),
                (0, 65535),
            ]);
            Ports { protocol: rng.pick(&[TCP, TCP, UDP, SCTP]), first, last }
        })
        .collect()
}

/// What a flow says of its firewall: judged by the version in force, by the one before, or before there was one.
pub(crate) fn judge(rng: &mut Rng, t: &Memory, source: &Ip, key: &FlowKey, flow: &mut Flow) {
    let pod = t.pods.get(source).copied().unwrap_or_default();
    if pod.firewall == 0 {
        return;
    }
    let [present, before] = versions(pod.firewall);
    flow.ruleset = rng.pick(&[present, present, present, before, before, 0]);
    let tuple = Tuple {
        source: *source,
        destination: key.remote,
        source_port: key.local_port,
        destination_port: key.remote_port,
        protocol: key.protocol,
        pad: [0; 3],
    };
    let judged = t.judge(flow.ruleset, &tuple);
    let allowed = if judged.allows() { judged.rule } else { rng.pick(&[Winner::NONE, 1, 5]) };
    (flow.rule, flow.name) = (allowed, if judged.allows() { judged.name } else { 0 });
}

/// Where a flow that is not translated leads.
pub(crate) fn untranslated_remote(rng: &mut Rng, family: &Family, everywhere: bool) -> Ip {
    let near = [family.nodes[0], family.nodes[1], family.inside[5]];
    if everywhere && rng.percent(60) { rng.pick(&family.outside) } else { rng.pick(&near) }
}

/// What some case must have done to the maps.
pub(crate) const EVENTS: [&str; 15] = [
    "FromPod: a flow is judged again: it goes on",
    "FromPod: a flow is judged again: removed",
    "FromPod: an untranslated flow is judged again: it goes on",
    "FromPod: an untranslated flow is judged again: removed",
    "FromPod: a denial of a rule",
    "FromPod: a denial of no rule",
    "FromPod: a denial where there is no flow",
    "FromPod: a question is noted",
    "ToUplink: a flow is judged again: it goes on",
    "ToUplink: a flow is judged again: removed",
    "ToUplink: an untranslated flow is made",
    "ToUplink: a flow is made by a rule",
    "ToUplink: a flow is made by a name",
    "ToUplink: a removed flow's bytes are counted",
    "ToUplink: a denial again",
];

/// What a packet has done to the maps.
pub(crate) fn events(before: &State, after: &State) -> Vec<&'static str> {
    let mut events = vec![];
    for (key, flow) in &after.flows {
        match before.flows.get(key) {
            Some(old) if old.ruleset != flow.ruleset => events.push(match flow.egress {
                0 => "an untranslated flow is judged again: it goes on",
                _ => "a flow is judged again: it goes on",
            }),
            Some(_) => {}
            None => {
                if flow.egress == 0 {
                    events.push("an untranslated flow is made");
                }
                if flow.name != 0 {
                    events.push("a flow is made by a name");
                } else if flow.ruleset != 0 && flow.rule < Winner::NOT_READY {
                    events.push("a flow is made by a rule");
                }
            }
        }
    }
    let denied = after.denials.iter().find(|(key, denial)| before.denials.get(key) != Some(denial));
    for (_, flow) in before.flows.iter().filter(|(key, _)| !after.flows.contains_key(key)) {
        match (denied, flow.egress) {
            (Some(_), 0) => events.push("an untranslated flow is judged again: removed"),
            (Some(_), _) => events.push("a flow is judged again: removed"),
            (None, _) => {}
        }
        let count = RuleCountKey { ruleset: flow.ruleset, rule: flow.rule };
        let bytes = |state: &State| state.rule_counts.get(&count).map_or(0, |count| count.bytes);
        if bytes(after) - bytes(before) >= flow.bytes {
            events.push("a removed flow's bytes are counted");
        }
    }
    if let Some((_, denial)) = denied {
        events.push(match denial.rule {
            Winner::NOT_READY => "a denial of no rule",
            _ => "a denial of a rule",
        });
        if before.flows.len() == after.flows.len() {
            events.push("a denial where there is no flow");
        }
        if denial.packets > 1 {
            events.push("a denial again");
        }
    }
    if before.asked != after.asked {
        events.push("a question is noted");
    }
    events
}

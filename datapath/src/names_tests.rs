//! What stays on the host's path so that it is learnt from, and what is learnt of it, in memory.

use crate::addr::Ip;
use crate::conntrack::seconds;
use crate::departure::{Departure, Route, depart};
use crate::dns::Reader;
use crate::dns_build::{A, Message, QUESTION, labels, name};
use crate::from_pod::flow_key;
use crate::keys::{Asked, AskedKey, FlowPath, Held, NameKey, Offload, Pod, RESOLVER, Ruleset, Settings};
use crate::limits::HELD_SECONDS;
use crate::memory::Memory;
use crate::names::{Holding, Learning, asks, hold, learn};
use crate::packet::{Kind, Packet};
use crate::verdict::{FromPod, HostStack, ToUplink};
use crate::walk_tests::{POD, POD_IF, SERVER, UPLINK, from_pod, node, packet, to_uplink};

const RESOLVER_OUTSIDE: Ip = SERVER;
const FIREWALL: u32 = 1;

fn with_resolver() -> Memory {
    let mut t = node(1, 1);
    t.pods.insert(POD, Pod { firewall: FIREWALL, ..t.pods[&POD] });
    t.resolvers.insert(RESOLVER_OUTSIDE, RESOLVER);
    t.firewalls.insert(FIREWALL, 1);
    t.rulesets.insert(1, Ruleset { firewall: FIREWALL, ..Ruleset::default() });
    t
}

fn question() -> Packet {
    packet(Kind::Udp, (POD, 40000), (RESOLVER_OUTSIDE, 53), 0)
}

/// Walks up and out; the path of the flow that is made.
fn path(t: &Memory, packet: &Packet) -> u8 {
    let FromPod::Identify(token, _) = from_pod(t, POD_IF, packet) else { panic!("it is not identified") };
    let ToUplink::Translate(_) = to_uplink(t, UPLINK, POD_IF, token, packet) else {
        panic!("it is not let out")
    };
    let flows = t.flows.borrow();
    assert_eq!(flows.len(), 1);
    flows.keys().next().unwrap().path
}

#[test]
fn answers_of_a_resolver_outside_come_by_the_hosts_path() {
    assert_eq!(path(&with_resolver(), &question()), FlowPath::Host as u8);
    // Nothing to learn, no resolver, no question.
    let mut t = with_resolver();
    t.pods.insert(POD, Pod { firewall: 0, ..t.pods[&POD] });
    assert_eq!(path(&t, &question()), FlowPath::Offloaded as u8);
    let mut t = with_resolver();
    t.resolvers.clear();
    assert_eq!(path(&t, &question()), FlowPath::Offloaded as u8);
    let other = packet(Kind::Udp, (POD, 40000), (RESOLVER_OUTSIDE, 54), 0);
    assert_eq!(path(&with_resolver(), &other), FlowPath::Offloaded as u8);
}

#[test]
fn a_flow_that_was_offloaded_before_the_pod_had_a_firewall_is_no_longer() {
    let mut t = with_resolver();
    let firewalled = t.pods[&POD];
    t.pods.insert(POD, Pod { firewall: 0, ..firewalled });
    assert_eq!(path(&t, &question()), FlowPath::Offloaded as u8);
    assert!(matches!(from_pod(&t, POD_IF, &question()), FromPod::Translate(_)));
    t.pods.insert(POD, firewalled);
    let FromPod::Identify(token, _) = from_pod(&t, POD_IF, &question()) else { panic!("it stays offloaded") };
    let _ = to_uplink(&t, UPLINK, POD_IF, token, &question());
    assert!(t.flows.borrow().contains_key(&flow_key(firewalled.id, &question().tuple, FlowPath::Host)));
}

#[test]
fn a_question_does_not_depart_past_the_hosts_stack() {
    let t = with_resolver();
    let always = Settings { offload: Offload::Always as u8, uplink: UPLINK, ..t.settings };
    assert_eq!(depart(&t, &always, &question(), HostStack::Preferred, Route::By(UPLINK)), Departure::Up);
    let other = packet(Kind::Udp, (POD, 40000), (RESOLVER_OUTSIDE, 54), 0);
    assert_eq!(depart(&t, &always, &other, HostStack::Usual, Route::By(UPLINK)), Departure::Direct(UPLINK));
}

#[test]
fn an_answer_is_learnt_for_the_firewall_of_who_asked() {
    let mut t = with_resolver();
    let mut wire = [0; 256];
    wire[..labels("db.example.com").len()].copy_from_slice(&labels("db.example.com"));
    t.names.insert(NameKey { firewall: FIREWALL, wildcard: 0, name: wire }, 9);
    let pod = t.pods[&POD];
    let message = Message::new(7, "DB.example.com", A).address(&QUESTION, 5, SERVER);
    let says = |t: &Memory, message: &Message, whole: bool| {
        learn(t, &pod, &RESOLVER_OUTSIDE, 40000, whole, &mut Reader::of(&message.bytes))
    };
    assert_eq!(says(&t, &message, true), Learning::Unasked);
    asks(&t, POD_IF, &question().tuple, 7);
    let key = AskedKey { pod: pod.id, port: 40000, id: 7 };
    assert_eq!(t.asked.borrow()[&key], Asked { resolver: RESOLVER_OUTSIDE, seen: 0 });
    assert_eq!(says(&t, &message, false), Learning::Truncate);
    let poisoned = message.clone().address(&name("example.org"), 5, SERVER);
    assert_eq!(says(&t, &poisoned, true), Learning::Truncate);
    assert!(t.learnt.borrow().is_empty());
    assert_eq!(says(&t, &message, true), Learning::Pass);
    let learnt = t.learnt.borrow();
    let (key, learnt) = learnt.iter().next().unwrap();
    assert_eq!((key.firewall, key.ip), (FIREWALL, SERVER));
    assert_eq!(learnt.names[0], 9 << 32 | u64::from(seconds(65)));
}

#[test]
fn a_segment_is_held_until_it_is_read_or_old() {
    let held = |since, read| Some(Held { since, read });
    let old = seconds(HELD_SECONDS) + 1;
    assert_eq!(hold(None, None, 0, 100, 50), Holding::Copy);
    assert_eq!(hold(None, held(0, 0), 1, 100, 50), Holding::Drop);
    assert_eq!(hold(None, held(0, 50), 1, 100, 50), Holding::Pass);
    assert_eq!(hold(None, held(0, 49), 1, 100, 50), Holding::Copy);
    assert_eq!(hold(None, held(0, 0), old, 100, 50), Holding::Late);
    assert_eq!(hold(None, held(0, 49), old, 100, 50), Holding::Late);
    // By what was read of the connection.
    assert_eq!(hold(held(0, 150), None, 0, 100, 50), Holding::Pass);
    assert_eq!(hold(held(0, 149), None, 0, 100, 50), Holding::Copy);
    assert_eq!(hold(held(0, 10), None, 0, u32::MAX - 10, 20), Holding::Pass, "across the wrap");
    assert_eq!(hold(held(0, 150), None, 0, 100_u32.wrapping_sub(2 << 20), 50), Holding::Copy, "long ago");
}

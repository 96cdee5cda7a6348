//! The flow table when it is full, with no agent to look after it: closed connections make room, live ones stay, and
//! one pod does not take it all. Everything here is done by the programs in the kernel.

use datapath::addr::Ip;
use datapath::conntrack::{FlowState, Ticks, seconds};
use datapath::keys::{
    Delivery, DeliveryMode, EgressIp, Flow, FlowKey, GranuleRange, GranuleTable, Interface, InterfaceKind,
    Lease, NetworkKey, NetworkKind, Node as NodeEntry, Pod, PodId, Policy, Reply, ReplyKey, Settings, Token,
    Tuple,
};
use datapath::limits::{FIRST_PORT, FLOWS, GRANULE_PORTS, POD_FLOWS};
use datapath::memory::Memory;
use datapath::packet::{ACK, FIN, RST, SYN, TCP};
use datapath::sweep::is_due;
use datapath::tables::Tables as _;
use datapath::verdict::DropReason;
use lab::kernel::{
    self, Input, Kernel, Program, State, Verdict, enter_node_network,
    interfaces::{OTHER_POD, POD, TUNNEL, UPLINK},
};
use lab::packet::tcp;

/// Room for flows.
const CAPACITY: u32 = 1024;
/// Destinations. Those of a full table are few enough towards each for one granule of ports.
const SERVERS: u32 = 64;
const GRANULES: u16 = 1;
/// Addresses of the pods, both selected, by id less one; the interface of each.
const PODS: [([u8; 4], u32); 2] = [([10, 244, 1, 10], POD), ([10, 244, 1, 11], OTHER_POD)];
const EGRESS: [u8; 4] = [172, 18, 0, 100];
const NODE: [u8; 4] = [172, 18, 0, 11];
const REST: u32 = 65;

fn tables() -> Memory {
    let mut t = Memory::new(1, CAPACITY as usize);
    t.settings = Settings {
        node: 1,
        tunnel_port: 4795,
        tunnel_vni: 4711,
        tunnel_ifindex: TUNNEL,
        mtu: 1450,
        pass_token: 0xfeed_f00d,
        hold_unknown: 1,
        spread: 1,
        tcp_established: 7440,
        tcp_transitory: 240,
        rest: REST,
        ..Settings::default()
    };
    for (id, (ip, ifindex)) in (1..).zip(PODS) {
        let ip = Ip::v4(ip);
        t.pods.insert(ip, Pod { id, policy: 1, ifindex, firewall: 0 });
        let mode = DeliveryMode::Peer as u8;
        t.delivery.insert(id, Delivery { ip, ifindex, mode, ..Delivery::default() });
        let interface = Interface { kind: InterfaceKind::Pod as u8, guarded: 1, ..Interface::default() };
        t.interfaces.insert(ifindex, interface);
    }
    let uplink = Interface { kind: InterfaceKind::Uplink as u8, mac: [2; 6], ..Interface::default() };
    t.interfaces.insert(UPLINK, uplink);
    for (ip, len, kind) in [([10, 244, 0, 0], 16, NetworkKind::Pods), (NODE, 32, NetworkKind::Node)] {
        t.networks.insert(NetworkKey { prefix_len: 96 + len, ip: Ip::v4(ip) }, kind as u32);
    }
    t.nodes.insert(1, NodeEntry { tunnel_ip: Ip::v4(NODE) });
    let ip = Ip::v4(EGRESS);
    t.egress_addrs.insert(ip, 1);
    t.egress_ips.insert(1, EgressIp { ip, policy: 1, uplink: UPLINK, holder: 1, ..EgressIp::default() });
    let mut granules = GranuleTable::default();
    granules.node[..usize::from(GRANULES)].fill(1);
    t.granules.insert(1, granules);
    t.leases.insert(1, Lease::of(&[GranuleRange { first: 0, count: GRANULES }]));
    let mut policy = Policy { len: 1, ..Policy::default() };
    policy.egress[0] = 1;
    t.policies.insert(1, policy);
    t
}

/// A connection of a pod, told by a number.
#[derive(Clone, Copy)]
struct Connection {
    pod: PodId,
    local: ([u8; 4], u16),
    server: ([u8; 4], u16),
}

impl Connection {
    fn new(pod: PodId, nth: u32) -> Self {
        let (ip, _) = PODS[pod as usize - 1];
        let port = 10_000 + (nth / SERVERS) as u16;
        Self { pod, local: (ip, port), server: ([203, 0, 113, (nth % SERVERS) as u8], 80) }
    }

    fn key(&self) -> FlowKey {
        FlowKey {
            pod: self.pod,
            remote: Ip::v4(self.server.0),
            local_port: self.local.1,
            remote_port: self.server.1,
            protocol: TCP,
            ..FlowKey::default()
        }
    }
}

/// What a new connection met.
#[derive(PartialEq, Eq, Debug)]
enum Opened {
    /// A flow with this egress port.
    Port(u16),
    Dropped(DropReason),
}

struct Node {
    kernel: Kernel,
}

impl Node {
    fn new(t: &Memory) -> Self {
        Self::with_room_for(CAPACITY, t)
    }

    fn with_room_for(flows: u32, t: &Memory) -> Self {
        enter_node_network();
        let mut kernel = Kernel::load(flows);
        kernel.install_make_room();
        kernel.write(t);
        Self { kernel }
    }

    /// Runs a program that drops nothing here.
    fn pass(&mut self, program: Program, input: &Input, wanted: Verdict) -> Vec<u8> {
        let (verdict, output) = self.kernel.run(program, input);
        assert_eq!(verdict, wanted, "{program:?} on {input:?}; {:?}", self.kernel.drops());
        output.frame
    }

    /// A connection's first packet, from the pod to where it leaves: after a sweep it comes to the uplink twice.
    fn open(&mut self, c: Connection) -> Opened {
        let (_, ifindex) = PODS[c.pod as usize - 1];
        let frame = tcp(c.local, c.server, SYN).frame();
        let mut input = Input { frame, ifindex, ..Input::default() };
        let (observed, _) = self.kernel.observe(Program::FromPod, &input);
        assert_ne!(observed.hash, 0, "it has been identified");
        (input.ifindex, input.ingress, input.hash) = (UPLINK, ifindex, observed.hash);
        self.leave(&input)
    }

    fn leave(&mut self, input: &Input) -> Opened {
        let before = self.kernel.drops();
        let (mut verdict, mut output) = self.kernel.run(Program::ToUplink, input);
        // A table of live connections may be swept again where the next tick has begun.
        for _ in 0..3 {
            if verdict == Verdict::Redirect {
                assert_eq!(output.frame, input.frame, "nothing is translated yet");
                (verdict, output) = self.kernel.run(Program::ToUplink, input);
            }
        }
        match verdict {
            Verdict::Next => {
                let frame = output.frame;
                assert_eq!(frame[26..30], EGRESS, "translated");
                Opened::Port(u16::from_be_bytes([frame[34], frame[35]]))
            }
            Verdict::Drop => {
                let after = self.kernel.drops();
                let mut changed = DropReason::ALL
                    .iter()
                    .copied()
                    .filter(|reason| after[*reason as usize].packets == before[*reason as usize].packets + 1);
                let reason = changed.next().expect("every drop is counted");
                assert_eq!(changed.next(), None, "under one reason");
                Opened::Dropped(reason)
            }
            Verdict::Redirect => panic!("swept again and again for one packet"),
        }
    }

    /// A connection's next packets: the answer, and the pod's word that it has it.
    fn establish(&mut self, c: Connection, egress_port: u16) {
        self.server_sends(c, egress_port, SYN | ACK);
        self.pod_sends(c, ACK);
    }

    fn pod_sends(&mut self, c: Connection, flags: u8) {
        let (_, ifindex) = PODS[c.pod as usize - 1];
        let input = Input { frame: tcp(c.local, c.server, flags).frame(), ifindex, ..Input::default() };
        let frame = self.pass(Program::FromPod, &input, Verdict::Redirect);
        assert_eq!(frame[26..30], EGRESS, "translated");
    }

    fn server_sends(&mut self, c: Connection, egress_port: u16, flags: u8) {
        let frame = tcp(c.server, (EGRESS, egress_port), flags).frame();
        let input = Input { frame, ifindex: UPLINK, ..Input::default() };
        let frame = self.pass(Program::FromUplink, &input, Verdict::Redirect);
        assert_eq!((&frame[30..34], &frame[36..38]), (&c.local.0[..], &c.local.1.to_be_bytes()[..]));
    }

    /// Waits until a full table may be swept again, after a tick of 17 ms at least: a real table is not filled
    /// within that, this small one may be.
    fn wait_until_due(&self) {
        while !is_due(&self.kernel.swept(), kernel::now()) {
            std::hint::spin_loop();
        }
    }

    /// Fills the table with established connections of the first pod.
    fn fill(&mut self, connections: u32) {
        for nth in 0..connections {
            let c = Connection::new(1, nth);
            let Opened::Port(port) = self.open(c) else { panic!("there is room for connection {nth}") };
            self.establish(c, port);
        }
    }

    /// Whether every flow has its reply entry and is counted.
    fn assert_consistent(&self) -> State {
        let state = self.kernel.state();
        assert_eq!(state.flows.len(), state.replies.len(), "a flow has two entries");
        let counts = self.kernel.pod_flows();
        for pod in 1..=PODS.len() as PodId {
            let flows = state.flows.keys().filter(|key| key.pod == pod).count() as u64;
            assert_eq!(counts.get(&pod).copied().unwrap_or(0), flows, "flows of pod {pod}");
        }
        state
    }
}

/// Ten times the table's size in connections, one after another, all within the time that ports rest.
#[test]
fn closed_connections_make_room_while_no_agent_runs() {
    let mut node = Node::new(&tables());
    let mut sweeps = vec![];
    for nth in 0..10 * CAPACITY {
        node.wait_until_due();
        let c = Connection::new(1, nth);
        let port = match node.open(c) {
            Opened::Port(port) => port,
            Opened::Dropped(reason) => panic!("connection {nth} was dropped: {reason:?}"),
        };
        node.establish(c, port);
        match nth % 4 {
            0 => node.server_sends(c, port, RST),
            1 => node.pod_sends(c, RST | ACK),
            2 => {
                node.pod_sends(c, FIN | ACK);
                node.server_sends(c, port, FIN | ACK);
            }
            _ => {
                node.server_sends(c, port, FIN | ACK);
                node.pod_sends(c, FIN | ACK);
            }
        }
        let swept = node.kernel.swept();
        if sweeps.last() != Some(&swept) && swept.when != 0 {
            assert_eq!((swept.removed, swept.left), (CAPACITY, 0), "all were closed");
            sweeps.push(swept);
        }
    }
    assert_eq!(sweeps.len(), 9, "one for each time that the table was full: {sweeps:?}");
    let state = node.assert_consistent();
    assert_eq!(state.flows.len(), CAPACITY as usize);
    assert!(state.flows.values().all(|flow| flow.state == FlowState::Closed as u8));
    assert!(state.replies.keys().all(|key| key.egress_port < FIRST_PORT + GRANULES * GRANULE_PORTS));
    assert_eq!(node.kernel.drops().iter().map(|count| count.packets).sum::<u64>(), 0, "nothing was lost");
}

#[test]
fn live_connections_survive_the_sweep_with_their_counters() {
    let mut node = Node::new(&tables());
    node.fill(CAPACITY);
    let mut live = node.assert_consistent().flows;
    // Every third is closed, and one has been silent for too long.
    let silent = Connection::new(1, 1).key();
    let mut closed = 0;
    for nth in (0..CAPACITY).step_by(3) {
        let c = Connection::new(1, nth);
        node.pod_sends(c, RST);
        live.remove(&c.key());
        closed += 1;
    }
    let mut state = node.kernel.state();
    let old = state.flows.get_mut(&silent).expect("it is there");
    old.seen = old.seen.wrapping_sub(seconds(7441));
    live.remove(&silent);
    node.kernel.write_state(&state);

    let c = Connection::new(1, CAPACITY);
    let Opened::Port(_) = node.open(c) else { panic!("the closed ones make room") };
    let swept = node.kernel.swept();
    assert_eq!((swept.removed, swept.left), (closed + 1, CAPACITY - closed - 1));
    let mut flows = node.assert_consistent().flows;
    assert!(flows.remove(&c.key()).is_some());
    assert_eq!(flows, live, "to the byte");
    let counters = |flow: &Flow| (flow.packets, flow.state);
    assert_eq!(counters(&flows[&Connection::new(1, 2).key()]), (2, FlowState::Established as u8));
}

#[test]
fn a_table_of_live_connections_drops_new_ones_and_is_swept_once_a_tick() {
    let mut node = Node::new(&tables());
    node.fill(CAPACITY);
    let live = node.assert_consistent().flows;
    // What is done within one tick; again where it took longer.
    for attempt in 0.. {
        assert!(attempt < 100, "no ten packets within 17 ms");
        node.wait_until_due();
        let (before, full) = (kernel::now(), DropReason::FlowTableFull);
        let counted = node.kernel.drops()[full as usize].packets;
        let mut sweeps = 0;
        for nth in 0..10 {
            let input = node.identified(Connection::new(1, CAPACITY + nth));
            let (mut verdict, _) = node.kernel.run(Program::ToUplink, &input);
            if verdict == Verdict::Redirect {
                sweeps += 1;
                (verdict, _) = node.kernel.run(Program::ToUplink, &input);
            }
            if verdict != Verdict::Drop {
                break; // the next tick has begun
            }
        }
        if kernel::now() == before {
            assert_eq!(sweeps, 1, "the first packet's");
            assert_eq!(node.kernel.drops()[full as usize].packets, counted + 10, "each is counted");
            assert_eq!(node.kernel.swept().left, CAPACITY);
            break;
        }
    }
    assert_eq!(node.assert_consistent().flows, live, "none was lost");
    // The flows that are there go on.
    node.pod_sends(Connection::new(1, 7), ACK);
}

/// A sweep of a table of real size takes longer than a tick: the packet that started it must not find it due again.
#[test]
fn a_full_table_of_real_size_is_swept_once_for_a_packet() {
    let mut node = Node::with_room_for(FLOWS, &tables());
    let seen = kernel::now();
    for nth in 0..FLOWS {
        let [_, a, b, c] = nth.to_be_bytes();
        let c = Connection { pod: 1, local: (PODS[0].0, 10_000), server: ([20, a, b, c], 80) };
        let (reply_key, flow, reply) = entries(c, FIRST_PORT, FlowState::Established, seen);
        node.kernel.put_flow((&c.key(), &flow), (&reply_key, &reply));
    }
    let input = node.identified(Connection::new(1, 0));
    let (verdict, _) = node.kernel.run(Program::ToUplink, &input);
    assert_eq!(verdict, Verdict::Redirect, "it comes again after the sweep");
    let swept = node.kernel.swept();
    assert_eq!((swept.removed, swept.left), (0, FLOWS));
    assert_eq!(node.leave(&input), Opened::Dropped(DropReason::FlowTableFull));
    assert_eq!(node.kernel.swept(), swept, "not once more");
}

#[test]
fn one_pod_does_not_take_it_all() {
    let mut node = Node::new(&tables());
    node.kernel.set_pod_flows(1, u64::from(POD_FLOWS) - 1);
    assert!(matches!(node.open(Connection::new(1, 0)), Opened::Port(_)), "its last one");
    assert_eq!(node.open(Connection::new(1, 1)), Opened::Dropped(DropReason::PodFlowLimit));
    assert!(matches!(node.open(Connection::new(2, 1)), Opened::Port(_)), "another pod's");
    assert_eq!(node.kernel.pod_flows(), [(1, u64::from(POD_FLOWS)), (2, 1)].into());
    // The connections that it has go on.
    node.pod_sends(Connection::new(1, 0), ACK);
    // One that has ended makes room for one.
    let mut state = node.kernel.state();
    let flow = state.flows.get_mut(&Connection::new(1, 0).key()).expect("it is there");
    flow.seen = flow.seen.wrapping_sub(seconds(7441));
    node.kernel.write_state(&state);
    node.kernel.set_pod_flows(1, u64::from(POD_FLOWS));
    assert_eq!(node.open(Connection::new(1, 2)), Opened::Dropped(DropReason::PodFlowLimit));
    node.kernel.sweep();
    let swept = node.kernel.swept();
    assert_eq!((swept.removed, swept.left), (1, 1));
    assert_eq!(node.kernel.pod_flows()[&1], u64::from(POD_FLOWS) - 1);
    assert!(matches!(node.open(Connection::new(1, 3)), Opened::Port(_)));
}

/// Each way that a flow goes: swept, void when its pod's next packet comes, its port taken over, refused for want of
/// room.
#[test]
fn counts_follow_the_flows() {
    let mut t = tables();
    let mut node = Node::new(&t);
    node.fill(SERVERS * 2);
    assert_eq!(node.assert_consistent().flows.len(), SERVERS as usize * 2);

    // The pod is selected by another object now: its flow is void.
    let moved = Connection::new(1, 0);
    t.pods.get_mut(&Ip::v4(moved.local.0)).expect("it is there").policy = 2;
    node.kernel.write_policy(&t);
    assert_eq!(node.open(moved), Opened::Dropped(DropReason::NoOwner), "there is no such object");
    assert_eq!(node.assert_consistent().flows.len(), SERVERS as usize * 2 - 1);
    node.kernel.sweep();
    assert_eq!(node.assert_consistent().flows.len(), 0, "all are void");
    t.pods.get_mut(&Ip::v4(moved.local.0)).expect("it is there").policy = 1;
    node.kernel.write_policy(&t);

    // Every port towards one server is taken by a flow that is past its time.
    for nth in 0..u32::from(GRANULE_PORTS) {
        dead(&t, Connection::new(1, nth * SERVERS), FIRST_PORT + nth as u16);
    }
    node.kernel.write_state(&State::of(&t));
    assert!(matches!(node.open(Connection::new(2, 0)), Opened::Port(_)), "it takes a port over");
    assert_eq!(node.assert_consistent().flows.len(), usize::from(GRANULE_PORTS));

    // No room: a flow that is not made is not counted.
    node.kernel.write_state(&State::default());
    node.fill(CAPACITY);
    node.wait_until_due();
    assert_eq!(node.open(Connection::new(2, 0)), Opened::Dropped(DropReason::FlowTableFull));
    node.assert_consistent();
}

/// Adds a flow that has been silent for too long.
fn dead(t: &Memory, c: Connection, egress_port: u16) {
    let seen = kernel::now().wrapping_sub(seconds(REST + 1));
    let (reply_key, flow, reply) = entries(c, egress_port, FlowState::Closed, seen);
    t.insert_flow(&c.key(), &flow).expect("room for it");
    t.insert_reply(&reply_key, &reply).expect("room for it");
}

/// A connection's entries, its key aside.
fn entries(c: Connection, egress_port: u16, state: FlowState, seen: Ticks) -> (ReplyKey, Flow, Reply) {
    let reply_key = ReplyKey {
        egress: 1,
        remote: c.key().remote,
        egress_port,
        remote_port: c.server.1,
        protocol: TCP,
        pad: [0; 3],
    };
    let state = state as u8;
    let flow = Flow { egress: 1, policy: 1, egress_port, state, seen, walked: seen, ..Flow::default() };
    let local = Ip::v4(c.local.0);
    (reply_key, flow, Reply { pod: c.pod, local_port: c.local.1, path: 0, pad: 0, local })
}

impl Node {
    /// A connection's first packet at the uplink, its token in place.
    fn identified(&mut self, c: Connection) -> Input {
        let tuple = Tuple {
            source: Ip::v4(c.local.0),
            destination: Ip::v4(c.server.0),
            source_port: c.local.1,
            destination_port: c.server.1,
            protocol: TCP,
            pad: [0; 3],
        };
        let hash = 0x4000_0000 | u32::from(c.local.1);
        self.kernel.put_token(hash, &Token { pod: c.pod, policy: 1, firewall: 0, tuple, direct: 0 });
        let (_, ingress) = PODS[c.pod as usize - 1];
        Input {
            frame: tcp(c.local, c.server, SYN).frame(),
            ifindex: UPLINK,
            ingress,
            hash,
            ..Input::default()
        }
    }
}

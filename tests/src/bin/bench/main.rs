//! What the programs cost, in time and in memory: `cargo xtask bench` builds and runs this.
#![expect(clippy::print_stdout, reason = "a program whose answer is its output")]

mod firewall;
mod shapes;

use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use datapath::addr::Ip;
use datapath::conntrack::{FlowState, Ticks, seconds};
use datapath::keys::{
    Delivery, DeliveryMode, EgressIp, Flow, FlowKey, GranuleRange, GranuleTable, Interface, InterfaceKind,
    Lease, NetworkKey, NetworkKind, Node, Pod, Policy, Reply, ReplyKey, Settings, Token, Tuple,
};
use datapath::limits;
use datapath::memory::Memory;
use datapath::packet::{ACK, SYN, TCP};
use datapath::ports::nth_port;
use lab::kernel::interfaces::{POD as POD_IF, TUNNEL, UPLINK};
use lab::kernel::{self, Input, Kernel, Program, enter_node_network, route_ipv6};
use lab::packet::tcp;

const POD: [u8; 4] = [10, 244, 1, 10];
const POD6: Ip = v6(0x244, 0x10);
const NODES: [[u8; 4]; 2] = [[172, 18, 0, 11], [172, 18, 0, 12]];
const EGRESS: [u8; 4] = [172, 18, 0, 100];
const EGRESS6: Ip = v6(0x18, 0x100);
/// The destination that ports run out towards.
const SERVER: [u8; 4] = [203, 0, 113, 5];
const LOCAL_PORT: u16 = 40000;
/// A node's first share in a cluster of three: 16,128 ports.
const LEASE: GranuleRange = GranuleRange { first: 0, count: 252 };
/// `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
/// What both directions of a flow may take of the maps together.
const BYTES_PER_FLOW: f64 = 256.0;
/// An IPv6 address of a network, by its last two groups.
const fn v6(network: u16, last: u32) -> Ip {
    Ip { octets: ((0xfd00 << 16 | network as u128) << 96 | last as u128).to_be_bytes() }
}

/// Room for the million flows: the kernel rounds a map's buckets up to a power of two, 16 bytes each.
const MILLION: u32 = 1 << 20;

#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    about = "Time and memory of the programs, run on packets by the kernel"
)]
struct Arguments {
    /// Ten times as many runs
    #[arg(long)]
    long: bool,
    /// One group of figures only
    #[arg(long, value_enum)]
    only: Option<Group>,
    /// Where the choice among flows starts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Sizes of the programs
    Programs,
    /// An offloaded flow's packet, with 1 and with 200,000 flows in the table
    Packet,
    /// A flow's first packet, with more and more ports taken
    New,
    /// Bytes of map memory per flow
    Memory,
    /// The sweep of a full table, of live flows and of dead ones
    Sweep,
    /// 1,000,000 flows held
    Held,
    /// Packets with more and more firewall rules, compiling them, and nftables beside
    Firewall,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Group {
    const fn name(self) -> &'static str {
        match self {
            Self::Programs => "programs",
            Self::Packet => "packet",
            Self::New => "new",
            Self::Memory => "memory",
            Self::Sweep => "sweep",
            Self::Held => "held",
            Self::Firewall => "firewall",
        }
    }
}

/// One line of the answer.
struct Figure {
    group: Group,
    what: String,
    value: String,
    /// What the value is relative to, or how it spreads.
    note: String,
}

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % u64::from(n)) as u32
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    enter_node_network();
    let mut figures = vec![];
    let wanted = |group| arguments.only.is_none_or(|only| only == group);
    let mut rng = Rng(arguments.seed);
    let pairs = if arguments.long { 200_000 } else { 20_000 };
    if [Group::Programs, Group::Packet, Group::New, Group::Memory, Group::Sweep].into_iter().any(wanted) {
        let mut bench = Bench::load(limits::FLOWS, Family::V4);
        if wanted(Group::Programs) {
            bench.programs(&mut figures);
        }
        if wanted(Group::New) {
            bench.new_flows(&mut figures, pairs / 20)?;
        }
        if wanted(Group::Packet) {
            for flows in [1, 200_000] {
                bench.fill(flows);
                bench.packets(&mut figures, &mut rng, pairs)?;
            }
        }
        if wanted(Group::Memory) {
            bench.memory(&mut figures, Group::Memory)?;
        }
        if wanted(Group::Sweep) {
            bench.sweeps(&mut figures, if arguments.long { 50 } else { 5 })?;
        }
    }
    if wanted(Group::Packet) || wanted(Group::Firewall) {
        route_ipv6("fd00::/16");
    }
    if wanted(Group::Packet) {
        let mut bench = Bench::load(limits::FLOWS, Family::V6);
        for flows in [1, 200_000] {
            bench.fill(flows);
            bench.packets(&mut figures, &mut rng, pairs)?;
        }
    }
    if wanted(Group::Held) {
        let mut bench = Bench::load(MILLION, Family::V4);
        bench.fill(1_000_000);
        bench.memory(&mut figures, Group::Held)?;
        bench.packets(&mut figures, &mut rng, pairs)?;
    }
    if wanted(Group::Firewall) {
        let runs = pairs / 10;
        firewall::compiling(&mut figures, if arguments.long { 200 } else { 20 })?;
        Bench::load(limits::FLOWS, Family::V4).firewalls(&mut figures, &mut rng, runs)?;
        firewall::nft(&mut figures, &mut rng, runs)?;
    }
    print(&arguments, &figures);
    Ok(())
}

/// The loaded programs and the flows in their maps.
struct Bench {
    kernel: Kernel,
    _baseline: aya::Ebpf,
    family: Family,
    flows: u32,
    frame: Vec<u8>,
}

impl Bench {
    fn load(capacity: u32, family: Family) -> Self {
        let mut kernel = Kernel::load_to_count(capacity, limits::RULE_COUNTS);
        let baseline = kernel.load_baseline();
        kernel.write(&tables(1));
        Self { kernel, _baseline: baseline, family, flows: 0, frame: vec![] }
    }

    /// Makes flows, each to a server of its own, until there are so many.
    fn fill(&mut self, flows: u32) {
        let now = kernel::now();
        for nth in self.flows..flows {
            let (key, reply_key) = keys(self.family, nth);
            self.put(&key, &reply_key, now);
        }
        self.flows = flows;
    }

    fn put(&mut self, key: &FlowKey, reply_key: &ReplyKey, seen: Ticks) {
        let flow = Flow {
            egress: reply_key.egress,
            policy: 1,
            egress_port: reply_key.egress_port,
            state: FlowState::Established as u8,
            seen,
            walked: seen,
            packets: 1,
            bytes: 40,
            ..Flow::default()
        };
        let local = if self.family == Family::V4 { Ip::v4(POD) } else { POD6 };
        let reply = Reply { pod: key.pod, local_port: key.local_port, path: 0, pad: 0, local };
        self.kernel.put_flow((key, &flow), (reply_key, &reply));
    }

    /// Interleaved pairs: the program to compare with on the first packet, and ours on the second.
    fn compare(
        &mut self,
        pairs: u32,
        program: Program,
        mut inputs: impl FnMut() -> (Input, Input),
    ) -> Result<(Duration, Duration, f64)> {
        let (mut base, mut ours, mut ratios) = (vec![], vec![], vec![]);
        for _ in 0..pairs {
            let (plain, input) = inputs();
            let (done, before) = self.kernel.timed(None, &plain, &mut self.frame);
            ensure!(done == REDIRECT, "the baseline gave back {done}");
            let (done, after) = self.kernel.timed(Some(program), &input, &mut self.frame);
            ensure!(done == REDIRECT, "{program:?} gave back {done}: the flow is not offloaded");
            ensure!(self.frame != input.frame, "{program:?} has not translated");
            ratios.push(after.as_secs_f64() / before.as_secs_f64().max(1e-9));
            base.push(before);
            ours.push(after);
        }
        ratios.sort_by(f64::total_cmp);
        Ok((median(&mut base), median(&mut ours), ratios[ratios.len() / 2]))
    }

    /// (a), (b): an offloaded flow's packets, of flows chosen at random. IPv6 is compared with IPv4 parsed and
    /// redirected.
    fn packets(&mut self, figures: &mut Vec<Figure>, rng: &mut Rng, pairs: u32) -> Result<()> {
        let (flows, family) = (self.flows, self.family);
        let group = if flows > 200_000 { Group::Held } else { Group::Packet };
        for (what, program, holder) in [
            ("from_pod to the uplink", Program::FromPod, 1),
            ("from_pod to the tunnel", Program::FromPod, 2),
            ("from_uplink to the pod", Program::FromUplink, 1),
        ] {
            self.kernel.write_policy(&tables(holder));
            let (base, ours, ratio) = self.compare(pairs, program, || {
                let nth = rng.below(flows);
                let input = |family| {
                    let frame = frame(family, program, nth);
                    let ifindex = if program == Program::FromPod { POD_IF } else { UPLINK };
                    Input { frame, ifindex, ..Input::default() }
                };
                (input(Family::V4), input(family))
            })?;
            let (name, plural) =
                (if family == Family::V4 { "IPv4" } else { "IPv6" }, if flows == 1 { "" } else { "s" });
            figures.push(Figure {
                group,
                what: format!("{name} {what}, {flows} flow{plural}"),
                value: format!("{} ns", ours.as_nanos()),
                note: format!(
                    "{ratio:.2} x and {} ns more than IPv4 parsed and redirected ({} ns); {pairs} pairs",
                    ours.saturating_sub(base).as_nanos(),
                    base.as_nanos()
                ),
            });
        }
        self.kernel.write_policy(&tables(1));
        Ok(())
    }

    /// The sweep of the whole table: of live flows, none of which goes, and of dead ones, all of which go.
    fn sweeps(&mut self, figures: &mut Vec<Figure>, runs: u32) -> Result<()> {
        for (what, age, live) in [("live", 0, limits::FLOWS), ("dead", seconds(7441), 0)] {
            let mut times = vec![];
            for _ in 0..runs {
                self.flows = 0;
                let seen = kernel::now().wrapping_sub(age);
                for nth in 0..limits::FLOWS {
                    let (key, reply_key) = keys(self.family, nth);
                    self.put(&key, &reply_key, seen);
                }
                times.push(self.kernel.sweep());
                let swept = self.kernel.swept();
                let right = (swept.removed, swept.left) == (limits::FLOWS - live, live);
                ensure!(right, "{} flows were removed and {} left", swept.removed, swept.left);
            }
            let longest = times.iter().max().copied().unwrap_or_default();
            figures.push(Figure {
                group: Group::Sweep,
                what: format!("sweep of {} {what} flows", limits::FLOWS),
                value: format!("{:.1} ms", median(&mut times).as_secs_f64() * 1e3),
                note: format!("the longest {:.1} ms; {runs} runs", longest.as_secs_f64() * 1e3),
            });
        }
        Ok(())
    }

    fn programs(&mut self, figures: &mut Vec<Figure>) {
        for program in Program::ALL {
            let sizes = self.kernel.sizes(program);
            figures.push(Figure {
                group: Group::Programs,
                what: format!("{program:?}"),
                value: format!("{} instructions", sizes.instructions),
                note: format!(
                    "{} bytes of machine code; the verifier walked {}",
                    sizes.machine_code, sizes.verified
                ),
            });
        }
    }

    /// (c): map memory, in use or not.
    #[expect(clippy::cast_precision_loss, reason = "bytes of maps are far below 2^52")]
    fn memory(&mut self, figures: &mut Vec<Figure>, group: Group) -> Result<()> {
        let maps = self.kernel.flow_memory();
        let each = maps.map(|map| map.bytes as f64 / map.capacity as f64);
        let sum = each[0] + each[1];
        figures.push(Figure {
            group,
            what: format!("maps with room for {} flows", maps[0].capacity),
            value: format!("{sum:.2} bytes per flow"),
            note: format!(
                "FLOWS {:.2} + REPLIES {:.2}, {} MiB, {} flows in them; at most {BYTES_PER_FLOW}",
                each[0],
                each[1],
                (maps[0].bytes + maps[1].bytes) >> 20,
                self.kernel.flow_count()
            ),
        });
        // To the whole byte: a map's fixed part, a few KiB, is spread over its flows here.
        ensure!(sum.round() <= BYTES_PER_FLOW, "a flow takes {sum:.2} bytes, more than {BYTES_PER_FLOW}");
        Ok(())
    }

    /// (e): first packets towards one destination, of whose ports more and more are taken.
    fn new_flows(&mut self, figures: &mut Vec<Figure>, runs: u32) -> Result<()> {
        let lease = Lease::of(&[LEASE]);
        let ports = u32::from(LEASE.count) * u32::from(limits::GRANULE_PORTS);
        let taken = |nth: u32| {
            let egress_port = nth_port(&lease, nth).expect("it is in the lease");
            // Local ports that no measured packet has.
            ends(SERVER, 1 + nth as u16, egress_port)
        };
        let mut filled = 0;
        for (what, until, full) in [
            ("nearly empty", ports / 100, None),
            ("half full", ports / 2, None),
            ("full, remembered as such", ports, Some(false)),
            ("full, searched", ports, Some(true)),
        ] {
            let now = kernel::now();
            for nth in filled..until {
                let (key, reply_key) = taken(nth * 7919 % ports); // 7919 is prime: each port once, spread
                self.put(&key, &reply_key, now);
            }
            filled = until;
            let runs = if full == Some(true) { runs.min(200) } else { runs };
            let (mut first, mut second, mut sums) = (vec![], vec![], vec![]);
            for nth in 0..runs {
                if full == Some(true) {
                    self.kernel.forget_full();
                }
                let (out, up) = self.first_packet(40_000 + (nth % 20_000) as u16, full.is_some())?;
                if full == Some(false) && nth == 0 {
                    continue; // the one that searched
                }
                sums.push(out + up);
                first.push(out);
                second.push(up);
            }
            let [out, up, sum] = [&mut first, &mut second, &mut sums].map(|times| median(times).as_nanos());
            figures.push(Figure {
                group: Group::New,
                what: format!("first packet, {ports} ports {what}"),
                value: format!("{sum} ns"),
                note: format!("from_pod {out} + to_uplink {up}; {} runs", sums.len()),
            });
        }
        // Out again: what follows counts its own flows.
        for nth in 0..filled {
            self.kernel.take_flow(&taken(nth).0);
        }
        Ok(())
    }

    /// Both programs on a flow's first packet; the flow that it makes is taken out again.
    fn first_packet(&mut self, port: u16, full: bool) -> Result<(Duration, Duration)> {
        let (from, to) = ((POD, port), (SERVER, 80));
        let mut input = Input { frame: tcp(from, to, SYN).frame(), ifindex: POD_IF, ..Input::default() };
        let (done, out) = self.kernel.timed(Some(Program::FromPod), &input, &mut self.frame);
        ensure!(done == -1, "from_pod gave back {done} for a first packet");
        // A test run does not hand the token on: the same under a number of ours.
        let number = 0x4000_0000 | u32::from(port);
        let tuple = tuple_of((Ip::v4(POD), port), (Ip::v4(SERVER), 80));
        self.kernel.put_token(number, &Token { pod: 1, policy: 1, firewall: 0, tuple, direct: 0 });
        (input.ifindex, input.ingress, input.hash) = (UPLINK, POD_IF, number);
        let (done, up) = self.kernel.timed(Some(Program::ToUplink), &input, &mut self.frame);
        ensure!((done == SHOT) == full, "to_uplink gave back {done}, full: {full}");
        let made = self.kernel.take_flow(&ends(SERVER, port, 0).0);
        ensure!(made.is_none() == full, "a flow was made: {}, full: {full}", made.is_some());
        Ok((out, up))
    }
}

fn tuple_of(from: (Ip, u16), to: (Ip, u16)) -> Tuple {
    Tuple {
        source: from.0,
        destination: to.0,
        source_port: from.1,
        destination_port: to.1,
        protocol: TCP,
        pad: [0; 3],
    }
}

/// Keys of the nth flow: a server each.
fn keys(family: Family, nth: u32) -> (FlowKey, ReplyKey) {
    let [_, a, b, c] = nth.to_be_bytes();
    let egress_port = limits::FIRST_PORT + (nth % 4096) as u16;
    let (mut key, mut reply) = ends([20, a, b, c], LOCAL_PORT, egress_port);
    if family == Family::V6 {
        (key.pod, reply.egress) = (2, 2);
        key.remote = v6(0x20, nth);
        reply.remote = key.remote;
    }
    (key, reply)
}

/// A packet of the nth flow, before a program.
fn frame(family: Family, program: Program, nth: u32) -> Vec<u8> {
    let (key, reply) = keys(family, nth);
    let outward = program == Program::FromPod;
    if family == Family::V4 {
        let server = (key.remote.v4_octets(), key.remote_port);
        let packet = if outward {
            tcp((POD, key.local_port), server, ACK)
        } else {
            tcp(server, (EGRESS, reply.egress_port), ACK)
        };
        return packet.payload(&[7; 64]).frame();
    }
    let (from, to, ports) = if outward {
        (POD6, key.remote, [key.local_port, key.remote_port])
    } else {
        (key.remote, EGRESS6, [key.remote_port, reply.egress_port])
    };
    let ports = ports.map(u16::to_be_bytes);
    // Its checksum is right or wrong: it is corrected all the same.
    let segment =
        [&ports.concat(), &[0, 0, 0, 1, 0, 0, 0, 2, 0x50, ACK, 0xff, 0xff, 0, 0, 0, 0][..], &[7; 64]];
    let head = [0x86, 0xdd, 0x60, 0, 0, 0, 0, 84, TCP, 64];
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], &head, &from.octets, &to.octets, &segment.concat()].concat()
}

fn ends(remote: [u8; 4], local_port: u16, egress_port: u16) -> (FlowKey, ReplyKey) {
    let remote = Ip::v4(remote);
    let key = FlowKey { pod: 1, remote, local_port, remote_port: 80, protocol: TCP, ..FlowKey::default() };
    let reply =
        ReplyKey { egress: 1, remote, egress_port, remote_port: 80, protocol: TCP, ..ReplyKey::default() };
    (key, reply)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// One selected pod and one egress IP of each family, which this node (1) or another (2) holds.
fn tables(holder: u16) -> Memory {
    let mut t = Memory::new(1, 0);
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
        udp: 300,
        icmp: 60,
        rest: 65,
        ..Settings::default()
    };
    for (id, ip) in [(1, Ip::v4(POD)), (2, POD6)] {
        t.pods.insert(ip, Pod { id, policy: 1, ifindex: POD_IF, firewall: 0 });
        let mode = DeliveryMode::Peer as u8;
        t.delivery.insert(id, Delivery { ip, ifindex: POD_IF, mode, ..Delivery::default() });
    }
    for (ifindex, kind, guarded) in [(POD_IF, InterfaceKind::Pod, 1), (UPLINK, InterfaceKind::Uplink, 0)] {
        t.interfaces.insert(ifindex, Interface { kind: kind as u8, guarded, mac: [2; 6], bridge: 0 });
    }
    for (ip, len, kind) in [
        ([10, 244, 0, 0], 16, NetworkKind::Pods),
        ([10, 96, 0, 0], 16, NetworkKind::Services),
        (NODES[0], 32, NetworkKind::Node),
        (NODES[1], 32, NetworkKind::Node),
    ] {
        t.networks.insert(NetworkKey { prefix_len: 96 + len, ip: Ip::v4(ip) }, kind as u32);
    }
    for (id, ip) in (1..).zip(NODES) {
        t.nodes.insert(id, Node { tunnel_ip: Ip::v4(ip) });
    }
    let mut policy = Policy { len: 2, ..Policy::default() };
    for (id, ip) in [(1, Ip::v4(EGRESS)), (2, EGRESS6)] {
        t.egress_addrs.insert(ip, id);
        t.egress_ips.insert(id, EgressIp { ip, policy: 1, uplink: UPLINK, holder, ..EgressIp::default() });
        let mut table = GranuleTable::default();
        table.node[..usize::from(LEASE.count)].fill(1);
        t.granules.insert(id, table);
        t.leases.insert(id, Lease::of(&[LEASE]));
        policy.egress[id as usize - 1] = id;
    }
    t.policies.insert(1, policy);
    t
}

fn print(arguments: &Arguments, figures: &[Figure]) {
    let command = |figure: &Figure| {
        let long = if arguments.long { " --long" } else { "" };
        format!("cargo xtask bench --only {} --seed {}{long}", figure.group.name(), arguments.seed)
    };
    if arguments.output == Format::Json {
        let lines: Vec<_> = figures
            .iter()
            .map(|figure| {
                serde_json::json!({
                    "group": figure.group.name(),
                    "what": figure.what,
                    "value": figure.value,
                    "note": figure.note,
                    "command": command(figure),
                })
            })
            .collect();
        println!("{:#}", serde_json::json!({ "seed": arguments.seed, "figures": lines }));
        return;
    }
    let widths = [
        figures.iter().map(|f| f.what.len()).max().unwrap_or(0),
        figures.iter().map(|f| f.value.len()).max().unwrap_or(0),
        figures.iter().map(|f| f.note.len()).max().unwrap_or(0),
    ];
    for figure in figures {
        println!(
            "{:<w0$}  {:>w1$}  {:<w2$}  {}",
            figure.what,
            figure.value,
            figure.note,
            command(figure),
            w0 = widths[0],
            w1 = widths[1],
            w2 = widths[2]
        );
    }
    println!("\nseed {}; times are medians, ratios are medians of interleaved pairs", arguments.seed);
}

//! The programs in this kernel, without a node around them: `BPF_PROG_TEST_RUN` on built packets, with maps
//! that belong to the test alone.
//!
//! A test run starts with an skb that has neither hash nor tunnel metadata, and shows neither afterwards. So
//! a small program of ours ([`harness`]) stands before the one under test: it sets them and makes a tail
//! call; run a second time on the same skb, it reads them. What a run shows is therefore either the verdict
//! ([`Kernel::run`]) or these ([`Kernel::observe`]); bytes, mark and maps are seen both ways.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, ProgramArray};
use aya::programs::{CgroupSkb, ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use datapath::addr::Ip;
use datapath::conntrack::{Ticks, ticks};
use datapath::keys::{
    self, Asked, AskedKey, Delivery, Denial, DenialKey, DropCount, EgressIp, Flow, FlowKey, FragmentHead,
    FragmentKey, GranuleTable, Interface, Lease, Network, Node, Opener, Pod, Policy, Reply, ReplyKey,
    RuleCount, RuleCountKey, Settings, Token,
};
use datapath::memory::Memory;
use datapath::verdict::DropReason;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustix::time::{ClockId, clock_gettime};

mod bench;
mod firewall;
mod names;
mod routes;
mod table;
pub use bench::{Memory as MapMemory, Sizes};
pub use routes::route_ipv6;

/// A type of `datapath` as it is copied to and from the kernel.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Plain<T>(T);

// SAFETY: `keys::MapData` promises plain bytes without unnamed padding, of which every pattern is a value.
#[expect(unsafe_code, reason = "aya's marker for types that may be copied to and from the kernel")]
unsafe impl<T: keys::MapData> aya::Pod for Plain<T> {}

/// A program under test. Its number is its place in the harness's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    /// TC ingress of a pod-facing interface.
    FromPod,
    /// TC egress of a pod-facing interface.
    ToPod,
    /// TC egress of an uplink.
    ToUplink,
    /// TC ingress of an uplink.
    FromUplink,
    /// TC ingress of the tunnel's device.
    FromTunnel,
}

impl Program {
    /// Every program, by number.
    pub const ALL: [Self; 5] =
        [Self::FromPod, Self::ToPod, Self::ToUplink, Self::FromUplink, Self::FromTunnel];

    const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::ToUplink => "to_uplink",
            Self::FromUplink => "from_uplink",
            Self::FromTunnel => "from_tunnel",
        }
    }
}

/// What a program gave back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// To the next program, or on.
    Next,
    /// Dropped.
    Drop,
    /// Redirected; a test run does not follow it.
    Redirect,
}

impl Verdict {
    fn of(program: Program, value: i32) -> Self {
        match value {
            -1 => Self::Next,
            2 => Self::Drop,
            7 => Self::Redirect,
            other => panic!("{} gave back {other}", program.name()),
        }
    }
}

/// What the tunnel's device is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tunnel {
    /// The outer packet's source.
    pub source: Ip,
    /// The outer packet's destination.
    pub destination: Ip,
    /// VNI.
    pub vni: u32,
}

/// A packet before a program.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// The frame.
    pub frame: Vec<u8>,
    /// Where the program is attached; an interface of this namespace.
    pub ifindex: u32,
    /// Where the packet came into the node; any number.
    pub ingress: u32,
    /// Mark.
    pub mark: u32,
    /// Hash; 0: none.
    pub hash: u32,
    /// Who sent it through the tunnel, and its VNI.
    pub tunnel: Option<(Ip, u32)>,
    /// Length of the segments that it is on the wire, without headers; 0: it is one packet.
    pub gso: u32,
}

/// A packet after a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    /// The frame.
    pub frame: Vec<u8>,
    /// Mark.
    pub mark: u32,
}

/// What only the skb itself shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Observed {
    /// Hash; 0: none.
    pub hash: u32,
    /// What the tunnel's device would use.
    pub tunnel: Option<Tunnel>,
}

/// The maps that programs write.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct State {
    /// `FLOWS`.
    pub flows: BTreeMap<FlowKey, Flow>,
    /// `REPLIES`.
    pub replies: BTreeMap<ReplyKey, Reply>,
    /// `FULL`.
    pub full: BTreeMap<ReplyKey, u32>,
    /// `OPENERS`.
    pub openers: BTreeMap<FlowKey, Opener>,
    /// `FRAGMENTS`.
    pub fragments: BTreeMap<FragmentKey, FragmentHead>,
    /// `TOKENS`.
    pub tokens: BTreeMap<u32, Token>,
    /// `ASKED`.
    pub asked: BTreeMap<AskedKey, Asked>,
    /// `RULE_COUNTS`.
    pub rule_counts: BTreeMap<RuleCountKey, RuleCount>,
    /// `DENIALS`.
    pub denials: BTreeMap<DenialKey, Denial>,
}

/// A hash map of known types.
struct Table<K, V> {
    map: HashMap<MapData, Plain<K>, Plain<V>>,
}

impl<K: keys::MapData + Ord, V: keys::MapData> Table<K, V> {
    fn new(ebpf: &mut Ebpf, name: &str) -> Self {
        Self { map: HashMap::try_from(take(ebpf, name)).expect(name) }
    }

    fn read(&self) -> BTreeMap<K, V> {
        self.map.iter().map(|entry| entry.map(|(k, v)| (k.0, v.0)).expect("a map is read")).collect()
    }

    fn set(&mut self, wanted: &BTreeMap<K, V>) {
        for key in self.read().keys().filter(|key| !wanted.contains_key(key)) {
            self.map.remove(&Plain(*key)).expect("an entry is removed");
        }
        for (key, value) in wanted {
            self.map.insert(Plain(*key), Plain(*value), 0).expect("an entry is written");
        }
    }
}

fn take(ebpf: &mut Ebpf, name: &str) -> Map {
    ebpf.take_map(name).unwrap_or_else(|| panic!("no map {name} in the object"))
}

/// The loaded programs and their maps.
pub struct Kernel {
    harness: Ebpf,
    names: names::Names,
    tunnel: Array<MapData, [u8; harness::REQUEST_LEN]>,
    settings: Array<MapData, Plain<Settings>>,
    networks: LpmTrie<MapData, Plain<Ip>, Plain<Network>>,
    pods: Table<Ip, Pod>,
    delivery: Table<u32, Delivery>,
    policies: Table<u32, Policy>,
    egress_ips: Table<u32, EgressIp>,
    egress_addrs: Table<Ip, u32>,
    granules: Table<u32, GranuleTable>,
    leases: Table<u32, Lease>,
    nodes: Table<u32, Node>,
    node_addrs: Table<Ip, u32>,
    interfaces: Table<u32, Interface>,
    flows: Table<FlowKey, Flow>,
    replies: Table<ReplyKey, Reply>,
    full: Table<ReplyKey, u32>,
    openers: Table<FlowKey, Opener>,
    fragments: Table<FragmentKey, FragmentHead>,
    tokens: Table<u32, Token>,
    rule_counts: Table<RuleCountKey, RuleCount>,
    denials: Table<DenialKey, Denial>,
    drops: PerCpuArray<MapData, Plain<DropCount>>,
    // Last: the harness's table does not keep programs alive once its last handle is gone.
    programs: (ProgramArray<MapData>, Ebpf),
}

/// Entries of the maps under test that programs write: small, because reading a map looks at each of its buckets.
const ENTRIES: u32 = 1024;
/// These maps, but the flows' own.
const WRITTEN: [&str; 6] = ["DENIALS", "FRAGMENTS", "FULL", "OPENERS", "POD_FLOWS", "TOKENS"];

impl Kernel {
    /// Loads the object that `OUTGATE_BPF_OBJECT` names, else `target/bpf/outgate.o`, with room for
    /// `flow_capacity` flows.
    #[must_use]
    pub fn load(flow_capacity: u32) -> Self {
        Self::load_to_count(flow_capacity, ENTRIES)
    }

    /// As [`Kernel::load`], with room to count what so many rules decide.
    #[must_use]
    pub fn load_to_count(flow_capacity: u32, rules: u32) -> Self {
        let path = object_path();
        let object = std::fs::read(&path)
            .unwrap_or_else(|error| panic!("{}: {error}; run `cargo xtask build`", path.display()));
        let mut loader = EbpfLoader::new();
        for name in ["FLOWS", "REPLIES"] {
            loader.map_max_entries(name, flow_capacity);
        }
        for name in WRITTEN.into_iter().chain(names::LRU) {
            loader.map_max_entries(name, ENTRIES);
        }
        loader.map_max_entries("RULE_COUNTS", rules);
        let mut ebpf = loader.load(&object).expect("the object loads");
        let mut harness = Ebpf::load(&harness::object()).expect("the harness loads");
        let mut table =
            ProgramArray::try_from(take(&mut harness, harness::TABLE)).expect("a table of programs");
        for (number, program) in Program::ALL.into_iter().enumerate() {
            let classifier = classifier(&mut ebpf, program.name());
            classifier.load().unwrap_or_else(|error| panic!("{}: {error}", program.name()));
            let fd = classifier.fd().expect("it is loaded");
            table.set(number as u32, fd, 0).expect("the harness may call it");
        }
        classifier(&mut harness, harness::NAME).load().expect("the harness is verified");
        guard(&mut ebpf).load().expect("from_cgroup");
        let names = names::Names::new(&mut ebpf);
        let e = &mut ebpf;
        let tunnel = Array::try_from(take(&mut harness, harness::REQUEST)).expect("the tunnel's key");
        Self {
            harness,
            names,
            tunnel,
            settings: Array::try_from(take(e, "SETTINGS")).expect("SETTINGS"),
            networks: LpmTrie::try_from(take(e, "NETWORKS")).expect("NETWORKS"),
            pods: Table::new(e, "PODS"),
            delivery: Table::new(e, "DELIVERY"),
            policies: Table::new(e, "POLICIES"),
            egress_ips: Table::new(e, "EGRESS_IPS"),
            egress_addrs: Table::new(e, "EGRESS_ADDRS"),
            granules: Table::new(e, "GRANULES"),
            leases: Table::new(e, "LEASES"),
            nodes: Table::new(e, "NODES"),
            node_addrs: Table::new(e, "NODE_ADDRS"),
            interfaces: Table::new(e, "INTERFACES"),
            flows: Table::new(e, "FLOWS"),
            replies: Table::new(e, "REPLIES"),
            full: Table::new(e, "FULL"),
            openers: Table::new(e, "OPENERS"),
            fragments: Table::new(e, "FRAGMENTS"),
            tokens: Table::new(e, "TOKENS"),
            rule_counts: Table::new(e, "RULE_COUNTS"),
            denials: Table::new(e, "DENIALS"),
            drops: PerCpuArray::try_from(take(e, "DROPS")).expect("DROPS"),
            programs: (table, ebpf),
        }
    }

    /// Makes the maps equal to tables in memory, flows included.
    pub fn write(&mut self, tables: &Memory) {
        self.write_policy(tables);
        self.write_state(&State::of(tables));
    }

    /// Makes the maps that only the agent writes equal to tables in memory.
    pub fn write_policy(&mut self, tables: &Memory) {
        self.settings.set(0, Plain(tables.settings), 0).expect("SETTINGS");
        let old: Vec<_> = self.networks.iter().map(|entry| entry.expect("NETWORKS").0).collect();
        for key in old {
            self.networks.remove(&key).expect("NETWORKS");
        }
        for (key, kind) in &tables.networks {
            let key = Key::new(key.prefix_len, Plain(key.ip));
            self.networks.insert(&key, Plain(Network { kind: *kind }), 0).expect("NETWORKS");
        }
        self.pods.set(&tables.pods);
        self.delivery.set(&tables.delivery);
        self.policies.set(&tables.policies);
        self.egress_ips.set(&tables.egress_ips);
        self.egress_addrs.set(&tables.egress_addrs);
        self.granules.set(&tables.granules);
        self.leases.set(&tables.leases);
        self.nodes.set(&tables.nodes.iter().map(|(id, node)| (u32::from(*id), *node)).collect());
        self.node_addrs
            .set(&tables.nodes.iter().map(|(id, node)| (node.tunnel_ip, u32::from(*id))).collect());
        self.interfaces.set(&tables.interfaces);
    }

    /// Makes the maps that programs write equal to this.
    pub fn write_state(&mut self, state: &State) {
        self.flows.set(&state.flows);
        self.count_pod_flows(&state.flows);
        self.replies.set(&state.replies);
        self.full.set(&state.full);
        self.openers.set(&state.openers);
        self.fragments.set(&state.fragments);
        self.tokens.set(&state.tokens);
        self.set_asked(&state.asked);
        self.rule_counts.set(&state.rule_counts);
        self.denials.set(&state.denials);
    }

    /// Reads the maps that programs write.
    #[must_use]
    pub fn state(&self) -> State {
        State {
            flows: self.flows.read(),
            replies: self.replies.read(),
            full: self.full.read(),
            openers: self.openers.read(),
            fragments: self.fragments.read(),
            tokens: self.tokens.read(),
            asked: self.asked(),
            rule_counts: self.rule_counts.read(),
            denials: self.denials.read(),
        }
    }

    /// Reads the drop counters, by reason, summed over CPUs.
    #[must_use]
    pub fn drops(&self) -> Vec<DropCount> {
        let of = |reason: &DropReason| {
            let counts = self.drops.get(&(*reason as u32), 0).expect("DROPS");
            counts.iter().fold(DropCount::default(), |sum, one| DropCount {
                packets: sum.packets + one.0.packets,
                bytes: sum.bytes + one.0.bytes,
            })
        };
        DropReason::ALL.iter().map(of).collect()
    }

    /// Runs the guard of the pods' cgroup on a packet, from its Ethernet header on. Whether it passes; if not,
    /// the sender sees no error.
    #[must_use]
    pub fn passes_guard(&mut self, frame: &[u8]) -> bool {
        let options = TestRunOptions { data_in: Some(frame), repeat: 1, ..TestRunOptions::default() };
        let result = guard(&mut self.programs.1).test_run(options).expect("a test run");
        // __cgroup_bpf_run_filter_skb, kernel/bpf/cgroup.c: 1 keeps, 2 drops as a full queue does.
        match result.return_value {
            1 => true,
            2 => false,
            other => panic!("from_cgroup gave back {other}"),
        }
    }

    /// Runs a program on a packet; shows its verdict.
    #[must_use]
    pub fn run(&mut self, program: Program, input: &Input) -> (Verdict, Output) {
        let (verdict, output, _) = self.test_run(program, input, 1);
        (Verdict::of(program, verdict), output)
    }

    /// Runs a program on a packet; shows what only the skb itself does.
    #[must_use]
    pub fn observe(&mut self, program: Program, input: &Input) -> (Observed, Output) {
        let (_, output, hash) = self.test_run(program, input, 2);
        let key = self.tunnel.get(&0, 0).expect("the tunnel's key");
        let tunnel = harness::tunnel_of(&key).filter(|tunnel| tunnel.destination != Ip::UNSPECIFIED);
        (Observed { hash, tunnel }, output)
    }

    /// Runs a program on a packet, whatever the kernel says to it; the packet afterwards is put into `frame`, which
    /// keeps its memory. For tests that count their runs by the million.
    ///
    /// # Errors
    /// The kernel's own: it takes no frame without room for an IPv4 header.
    pub fn try_run(
        &mut self,
        program: Program,
        input: &Input,
        frame: &mut Vec<u8>,
    ) -> Result<Verdict, ProgramError> {
        let (verdict, ..) = self.try_test_run(program as u32, input, 1, frame)?;
        Ok(Verdict::of(program, verdict))
    }

    /// Puts one token under its number.
    pub fn put_token(&mut self, number: u32, token: &Token) {
        self.tokens.map.insert(Plain(number), Plain(*token), 0).expect("a token is written");
    }

    /// Runs a program on a packet of which the device has taken a sum, `CHECKSUM_COMPLETE`. Says whether the sum
    /// that goes with the packet is right afterwards.
    #[must_use]
    pub fn keeps_the_sum(&mut self, program: Program, input: &Input) -> bool {
        let context = self.prepare(program as u32, input);
        let fd = classifier(&mut self.harness, harness::NAME).fd().expect("it is loaded").as_fd();
        match test_run::with_sum(fd, &input.frame, &context) {
            Ok(()) => true,
            // `bpf_prog_test_run_skb` (net/bpf/test_run.c).
            Err(error) if error.raw_os_error() == Some(libc::EBADMSG) => false,
            Err(error) => panic!("test run of {} on {input:?}: {error}", program.name()),
        }
    }

    /// Sets what the harness reads, and gives its context. `number`: the program's place in the harness's table.
    fn prepare(&mut self, number: u32, input: &Input) -> [u8; context::LEN] {
        let key =
            input.tunnel.map_or([0; harness::REQUEST_LEN], |(sender, vni)| harness::sent_by(&sender, vni));
        self.tunnel.set(0, key, 0).expect("the tunnel's key");
        let mut context = [0; context::LEN];
        context::put(&mut context, context::MARK, input.mark);
        context::put(&mut context, context::INGRESS, input.ingress);
        context::put(&mut context, context::IFINDEX, input.ifindex);
        context::put(&mut context, context::GSO_SIZE, input.gso);
        for (i, word) in [0, input.hash, number].into_iter().enumerate() {
            context::put(&mut context, context::CB + 4 * i, word);
        }
        context
    }

    /// Gives the verdict, what is left, and the hash where there is a second turn.
    fn test_run(&mut self, program: Program, input: &Input, repeat: u32) -> (i32, Output, u32) {
        let mut frame = vec![];
        let (verdict, mark, hash, _) = self
            .try_test_run(program as u32, input, repeat, &mut frame)
            .unwrap_or_else(|error| panic!("test run of {} on {input:?}: {error:?}", program.name()));
        (verdict, Output { frame, mark }, hash)
    }

    fn try_test_run(
        &mut self,
        number: u32,
        input: &Input,
        repeat: u32,
        frame: &mut Vec<u8>,
    ) -> Result<(i32, u32, u32, Duration), ProgramError> {
        let context = self.prepare(number, input);
        let mut context_out = [0; context::LEN];
        frame.resize(input.frame.len() + 256, 0);
        let result = classifier(&mut self.harness, harness::NAME).test_run(TestRunOptions {
            data_in: Some(&input.frame),
            data_out: Some(frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut context_out),
            repeat,
            ..TestRunOptions::default()
        })?;
        frame.truncate(result.data_size_out as usize);
        let hash = context::get(&context_out, context::CB + 4);
        let mark = context::get(&context_out, context::MARK);
        Ok((result.return_value.cast_signed(), mark, hash, result.duration))
    }
}

impl State {
    /// The same of tables in memory.
    #[must_use]
    pub fn of(tables: &Memory) -> Self {
        Self {
            flows: tables.flows.borrow().clone(),
            replies: tables.replies.borrow().clone(),
            full: tables.full.borrow().clone(),
            openers: tables.openers.borrow().clone(),
            fragments: tables.fragments.borrow().clone(),
            tokens: tables.tokens.borrow().clone(),
            asked: tables.asked.borrow().clone(),
            rule_counts: tables.rule_counts.borrow().clone(),
            denials: tables.denials.borrow().clone(),
        }
    }
}

fn guard(ebpf: &mut Ebpf) -> &mut CgroupSkb {
    let program = ebpf.program_mut("from_cgroup").expect("the object has from_cgroup");
    program.try_into().expect("a cgroup program")
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    let program = ebpf.program_mut(name).unwrap_or_else(|| panic!("no program {name} in the object"));
    program.try_into().expect("a classifier")
}

/// The eBPF object under test.
#[must_use]
pub fn object_path() -> PathBuf {
    std::env::var_os("OUTGATE_BPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/outgate.o"),
        PathBuf::from,
    )
}

/// Time since boot, as the programs count it.
#[must_use]
pub fn now() -> Ticks {
    let time = clock_gettime(ClockId::Boottime);
    ticks((time.tv_sec * 1_000_000_000 + time.tv_nsec).cast_unsigned())
}

/// The interfaces of [`enter_node_network`], by index.
pub mod interfaces {
    /// 172.18.0.11/24, default route by 172.18.0.1; `2001:db8:18::11/64`, by `2001:db8:18::1`.
    pub const UPLINK: u32 = 2;
    /// 192.0.2.11/24, and 198.51.100.0/24 by 192.0.2.1; no default route. `2001:db8:19::11/64`, and
    /// `2001:db8:51::/64` by `2001:db8:19::1`.
    pub const SECOND_UPLINK: u32 = 3;
    /// Stands for the tunnel's device.
    pub const TUNNEL: u32 = 4;
    /// Pod-facing.
    pub const POD: u32 = 10;
    /// Pod-facing.
    pub const OTHER_POD: u32 = 11;
    /// Pod-facing, to be a bridge's port.
    pub const PORT: u32 = 12;
}

/// Moves the calling thread into a network namespace with a node's [`interfaces`] and routes.
pub fn enter_node_network() {
    use interfaces::{OTHER_POD, POD, PORT, SECOND_UPLINK, TUNNEL, UPLINK};
    let mut script = String::new();
    for index in [UPLINK, SECOND_UPLINK, TUNNEL, POD, OTHER_POD, PORT] {
        let peer = 100 + index;
        let _ =
            writeln!(script, "ip link add if{index} index {index} type veth peer name if{peer} index {peer}");
        let _ = writeln!(script, "ip link set if{index} up; ip link set if{peer} up");
    }
    let _ = write!(
        script,
        "sysctl -qw net.ipv4.ip_forward=1
         ip addr add 172.18.0.11/24 dev if{UPLINK}
         ip route add default via 172.18.0.1
         ip addr add 192.0.2.11/24 dev if{SECOND_UPLINK}
         ip route add 198.51.100.0/24 via 192.0.2.1
         sysctl -qw net.ipv6.conf.all.forwarding=1
         ip addr add 2001:db8:18::11/64 dev if{UPLINK} nodad
         ip route add default via 2001:db8:18::1
         ip addr add 2001:db8:19::11/64 dev if{SECOND_UPLINK} nodad
         ip route add 2001:db8:51::/64 via 2001:db8:19::1"
    );
    enter_private_network(&script);
}

/// Moves the calling thread into a network namespace of its own, which `script` (of `sh`) has filled. Nothing
/// is left of it when the thread ends.
fn enter_private_network(script: &str) {
    let script = format!("set -e\n{script}\necho ready\nread -r end");
    let mut child = Command::new("unshare")
        .args(["--net", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare (util-linux) runs; it needs root");
    let mut line = String::new();
    let output = child.stdout.take().expect("it is piped");
    BufReader::new(output).read_line(&mut line).expect("the script says that it is ready");
    assert_eq!(line, "ready\n", "the script failed: {script}");
    let namespace = File::open(format!("/proc/{}/ns/net", child.id())).expect("the namespace's file");
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .expect("setns; needs root");
    drop(child.stdin.take());
    let _ = child.wait(); // "read" meets the end of its input: its failure is its end
}

/// `struct __sk_buff` (include/uapi/linux/bpf.h). A test run refuses all but these fields.
mod context {
    pub(super) const LEN: usize = 192;
    pub(super) const MARK: usize = 8;
    pub(super) const INGRESS: usize = 36;
    pub(super) const IFINDEX: usize = 40;
    pub(super) const CB: usize = 48;
    pub(super) const GSO_SIZE: usize = 176;
    /// Not settable; read by the harness.
    pub(super) const HASH: usize = 68;

    pub(super) fn put(context: &mut [u8; LEN], at: usize, word: u32) {
        context[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }

    pub(super) fn get(context: &[u8; LEN], at: usize) -> u32 {
        let b = &context[at..at + 4];
        u32::from_ne_bytes([b[0], b[1], b[2], b[3]])
    }
}

/// The system call, where aya has no word for what is wanted.
mod test_run {
    use std::io;
    use std::os::fd::{AsRawFd as _, BorrowedFd};

    /// `BPF_PROG_TEST_RUN` and `BPF_F_TEST_SKB_CHECKSUM_COMPLETE` (include/uapi/linux/bpf.h; Linux 6.11).
    const COMMAND: libc::c_long = 10;
    const CHECKSUM_COMPLETE: u32 = 1 << 2;

    /// `struct { ... } test` of `union bpf_attr`.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        program: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        ctx_size_in: u32,
        ctx_size_out: u32,
        ctx_in: u64,
        ctx_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        pad: u32,
    }

    /// Runs a program once.
    pub(super) fn with_sum(program: BorrowedFd<'_>, frame: &[u8], context: &[u8]) -> io::Result<()> {
        let mut attributes = Attributes {
            program: program.as_raw_fd().cast_unsigned(),
            data_size_in: frame.len() as u32,
            data_in: frame.as_ptr() as u64,
            repeat: 1,
            ctx_size_in: context.len() as u32,
            ctx_in: context.as_ptr() as u64,
            flags: CHECKSUM_COMPLETE,
            ..Attributes::default()
        };
        let size = size_of::<Attributes>();
        // SAFETY: the kernel reads and writes `attributes` at its size, reads frame and context at theirs, and
        // is given nowhere else to write.
        #[expect(unsafe_code, reason = "aya offers no flags for test runs of TC programs")]
        let done = unsafe { libc::syscall(libc::SYS_bpf, COMMAND, &raw mut attributes, size) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// The program before the program, assembled here: `cb[0]` says whether it has run, `cb[1]` is the hash, `cb[2]`
/// the number of the program to call. The second time it puts the hash into `cb[1]`. What the tunnel is told, and
/// tells, stands in a map of one entry.
mod harness {
    use datapath::addr::Ip;
    use object::write::{Object, Relocation, Symbol, SymbolSection};
    use object::{
        Architecture, BinaryFormat, Endianness, RelocationFlags, SectionKind, SymbolFlags, SymbolKind,
        SymbolScope,
    };

    use super::{Program, Tunnel, context};

    pub(super) const NAME: &str = "harness";
    pub(super) const TABLE: &str = "PROGRAMS";
    pub(super) const REQUEST: &str = "REQUEST";

    /// Helpers (include/uapi/linux/bpf.h, `___BPF_FUNC_MAPPER`).
    const MAP_LOOKUP: i32 = 1;
    const TAIL_CALL: i32 = 12;
    const GET_TUNNEL_KEY: i32 = 20;
    const SET_TUNNEL_KEY: i32 = 21;
    const SET_HASH: i32 = 48;
    /// `BPF_F_TUNINFO_IPV6`.
    const IPV6: i32 = 1;
    /// `enum bpf_map_type` in the same file.
    const BPF_MAP_TYPE_ARRAY: u32 = 2;
    const BPF_MAP_TYPE_PROG_ARRAY: u32 = 3;
    /// `R_BPF_64_64`: the address of a map.
    const RELOCATION_MAP: u32 = 1;

    /// The map's entry: `struct bpf_tunnel_key`, then flags for the helper, then whether there is a key.
    pub(super) const REQUEST_LEN: usize = KEY_LEN as usize + 8;
    const KEY_LEN: i32 = 44;
    const KEY_REMOTE: usize = 4;
    const KEY_LOCAL: usize = 28;
    const FLAGS: usize = 44;
    const PRESENT: usize = 48;
    const CB: i16 = offset(context::CB);

    /// The entry for a packet that this node sent: what was sent from here looks as if it had come from there,
    /// for the helpers swap the ends.
    pub(super) fn sent_by(sender: &Ip, vni: u32) -> [u8; REQUEST_LEN] {
        let mut key = [0; REQUEST_LEN];
        let mut put = |at: usize, word: u32| key[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        put(0, vni);
        put(PRESENT, 1);
        if sender.is_v4() {
            put(KEY_LOCAL, u32::from_be_bytes(sender.v4_octets())); // in host order
        } else {
            put(FLAGS, IPV6.cast_unsigned());
            key[KEY_LOCAL..KEY_LOCAL + 16].copy_from_slice(&sender.octets);
        }
        key
    }

    /// What the tunnel was told.
    pub(super) fn tunnel_of(key: &[u8; REQUEST_LEN]) -> Option<Tunnel> {
        let word = |at: usize| u32::from_ne_bytes([key[at], key[at + 1], key[at + 2], key[at + 3]]);
        let ip = |at: usize| {
            if word(FLAGS) == 0 {
                let word = word(at);
                return if word == 0 { Ip::UNSPECIFIED } else { Ip::v4(word.to_be_bytes()) };
            }
            let mut octets = [0; 16];
            octets.copy_from_slice(&key[at..at + 16]);
            Ip { octets }
        };
        let tunnel = Tunnel { source: ip(KEY_REMOTE), destination: ip(KEY_LOCAL), vni: word(0) };
        (word(PRESENT) != 0).then_some(tunnel)
    }

    /// An offset as instructions have it.
    const fn offset(value: usize) -> i16 {
        (value as u16).cast_signed()
    }

    /// One instruction (RFC 9669, 3).
    const fn insn(code: u8, destination: u8, source: u8, offset: i16, value: i32) -> [u8; 8] {
        let (o, v) = (offset.to_le_bytes(), value.to_le_bytes());
        [code, source << 4 | destination, o[0], o[1], v[0], v[1], v[2], v[3]]
    }
    const fn set(r: u8, value: i32) -> [u8; 8] {
        insn(0xb7, r, 0, 0, value)
    }
    const fn copy(to: u8, from: u8) -> [u8; 8] {
        insn(0xbf, to, from, 0, 0)
    }
    const fn add(r: u8, value: i32) -> [u8; 8] {
        insn(0x07, r, 0, 0, value)
    }
    const fn load(to: u8, base: u8, offset: i16) -> [u8; 8] {
        insn(0x61, to, base, offset, 0)
    }
    const fn store(base: u8, offset: i16, from: u8) -> [u8; 8] {
        insn(0x63, base, from, offset, 0)
    }
    /// Skips `count` instructions if a register has a value.
    const fn skip_if(r: u8, value: i32, count: usize) -> [u8; 8] {
        insn(0x15, r, 0, offset(count), value)
    }
    const fn call(helper: i32) -> [u8; 8] {
        insn(0x85, 0, 0, 0, helper)
    }
    const EXIT: [u8; 8] = insn(0x95, 0, 0, 0, 0);
    /// Two instructions that the loader completes: the address of a map into a register.
    const fn map(r: u8) -> [[u8; 8]; 2] {
        [insn(0x18, r, 0, 0, 0), [0; 8]]
    }

    /// Calls a helper with (skb, the key in the map, its length, flags in register 4).
    fn key_call(helper: i32) -> Vec<[u8; 8]> {
        vec![copy(1, 6), copy(2, 9), set(3, KEY_LEN), call(helper)]
    }

    /// The instructions, and which ones load the addresses of the table of programs and of the key's map.
    /// Register 6 is the context, 9 the map's entry.
    fn program() -> (Vec<[u8; 8]>, [usize; 2]) {
        let (flags, present) = (offset(FLAGS), offset(PRESENT));
        let mut all = vec![copy(6, 1), set(1, 0), store(10, -4, 1), copy(2, 10), add(2, -4)];
        let key_map = all.len();
        all.extend(map(1));
        // The verifier wants to see that there is an entry.
        all.extend([call(MAP_LOOKUP), insn(0x55, 0, 0, 2, 0), set(0, -2), EXIT, copy(9, 0)]);

        let mut set_tunnel = vec![load(4, 9, flags)];
        set_tunnel.extend(key_call(SET_TUNNEL_KEY));
        let set_hash = [copy(1, 6), call(SET_HASH)];
        let mut run = vec![set(7, 1), store(6, CB, 7), load(2, 6, CB + 4), skip_if(2, 0, set_hash.len())];
        run.extend(set_hash);
        run.extend([load(8, 9, present), skip_if(8, 0, set_tunnel.len())]);
        run.extend(set_tunnel);
        run.extend([load(3, 6, CB + 8), copy(1, 6)]);
        let table = run.len();
        run.extend(map(2));
        run.extend([call(TAIL_CALL), set(0, -2), EXIT]);

        all.extend([load(7, 6, CB), skip_if(7, 1, run.len())]);
        let table = all.len() + table;
        all.extend(run);
        all.extend([load(2, 6, offset(context::HASH)), store(6, CB + 4, 2)]);
        // It refuses to give one family's address as the other's.
        let done = [set(1, 1), store(9, present, 1), set(0, 0), EXIT];
        for family in [0, IPV6] {
            all.extend([set(4, family), store(9, flags, 4)]);
            all.extend(key_call(GET_TUNNEL_KEY));
            all.push(insn(0x55, 0, 0, offset(done.len()), 0));
            all.extend(done);
        }
        all.extend([set(1, 0), store(9, present, 1), set(0, 0), EXIT]);
        (all, [table, key_map])
    }

    /// An object file as compilers write them.
    pub(super) fn object() -> Vec<u8> {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        let section = |object: &mut Object<'_>, name: &str, kind, bytes: &[u8]| {
            let id = object.add_section(vec![], name.into(), kind);
            object.set_section_data(id, bytes.to_vec(), 8);
            id
        };
        let symbol = |object: &mut Object<'_>, id, name: &str, kind, (value, size): (usize, usize)| {
            object.add_symbol(Symbol {
                name: name.into(),
                value: value as u64,
                size: size as u64,
                kind,
                scope: SymbolScope::Linkage,
                weak: false,
                section: SymbolSection::Section(id),
                flags: SymbolFlags::None,
            })
        };
        let (code, loads) = program();
        let code = code.as_flattened();
        // `struct bpf_map_def`: type, sizes of key and value, entries, flags. One place is for a benchmark's own.
        let maps = [
            [BPF_MAP_TYPE_PROG_ARRAY, 4, 4, Program::ALL.len() as u32 + 1, 0],
            [BPF_MAP_TYPE_ARRAY, 4, REQUEST_LEN as u32, 1, 0],
        ];
        let maps: Vec<u8> = maps.as_flattened().iter().flat_map(|word| word.to_le_bytes()).collect();
        let license = b"Dual MIT/GPL\0";
        let id = section(&mut object, "license", SectionKind::Data, license);
        symbol(&mut object, id, "LICENSE", SymbolKind::Data, (0, license.len()));
        let id = section(&mut object, "maps", SectionKind::Data, &maps);
        let maps = [(TABLE, 0), (REQUEST, 20)]
            .map(|(name, at)| symbol(&mut object, id, name, SymbolKind::Data, (at, 20)));
        let id = section(&mut object, "classifier", SectionKind::Text, code);
        symbol(&mut object, id, NAME, SymbolKind::Text, (0, code.len()));
        for (symbol, load) in maps.into_iter().zip(loads) {
            let relocation = Relocation {
                offset: 8 * load as u64,
                symbol,
                addend: 0,
                flags: RelocationFlags::Elf { r_type: RELOCATION_MAP },
            };
            object.add_relocation(id, relocation).expect("a relocation");
        }
        object.write().expect("an object file")
    }
}

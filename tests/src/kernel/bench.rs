//! What benchmarks need of the loaded programs: times, sizes, a program to compare with, many flows at once.

use std::time::Duration;

use aya::Ebpf;
use datapath::keys::{Flow, FlowKey, Reply, ReplyKey};
use object::write::{Object, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

use super::{Input, Kernel, Plain, Program, classifier};

/// Place of [`baseline`] in the harness's table.
const BASELINE: u32 = Program::ALL.len() as u32;

/// How large a loaded program is.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// BPF instructions after verification.
    pub instructions: u32,
    /// Bytes of machine code.
    pub machine_code: u32,
    /// Instructions that the verifier walked.
    pub verified: u32,
}

/// A map's memory as the kernel accounts for it.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Entries that fit.
    pub capacity: u64,
    /// Bytes, whether entries are in use or not.
    pub bytes: u64,
}

impl Kernel {
    /// Loads the program to compare with. What is given back keeps it loaded.
    #[must_use]
    pub fn load_baseline(&mut self) -> Ebpf {
        let mut ebpf = Ebpf::load(&baseline()).expect("the baseline loads");
        let program = classifier(&mut ebpf, "baseline");
        program.load().expect("the baseline is verified");
        let fd = program.fd().expect("it is loaded");
        self.programs.0.set(BASELINE, fd, 0).expect("the harness may call it");
        ebpf
    }

    /// Runs a program, or the one to compare with, once; gives the TC action and how long it took. The harness's
    /// few instructions and the kernel's reading of its clock are in the time of both.
    pub fn timed(&mut self, program: Option<Program>, input: &Input, frame: &mut Vec<u8>) -> (i32, Duration) {
        let number = program.map_or(BASELINE, |program| program as u32);
        let (action, _, _, time) = self
            .try_test_run(number, input, 1, frame)
            .unwrap_or_else(|error| panic!("test run of {program:?}: {error:?}"));
        (action, time)
    }

    /// How large a program is.
    #[must_use]
    pub fn sizes(&mut self, program: Program) -> Sizes {
        let info = classifier(&mut self.programs.1, program.name()).info().expect("the kernel tells");
        Sizes {
            instructions: info.size_translated().unwrap_or(0) / 8,
            machine_code: info.size_jitted(),
            verified: info.verified_instruction_count().unwrap_or(0),
        }
    }

    /// Adds a flow's two entries.
    pub fn put_flow(&mut self, (key, flow): (&FlowKey, &Flow), (reply_key, reply): (&ReplyKey, &Reply)) {
        self.replies.map.insert(Plain(*reply_key), Plain(*reply), 0).expect("room for a reply entry");
        self.flows.map.insert(Plain(*key), Plain(*flow), 0).expect("room for a flow");
    }

    /// Removes a flow's two entries; gives the flow, if there was one.
    pub fn take_flow(&mut self, key: &FlowKey) -> Option<Flow> {
        let flow = self.flows.map.get(&Plain(*key), 0).ok()?.0;
        let reply = ReplyKey {
            egress: flow.egress,
            remote: key.remote,
            egress_port: flow.egress_port,
            remote_port: key.remote_port,
            protocol: key.protocol,
            pad: [0; 3],
        };
        self.flows.map.remove(&Plain(*key)).expect("it is there");
        self.replies.map.remove(&Plain(reply)).expect("its reply entry is there");
        Some(flow)
    }

    /// Counts the flows, one look at each.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.map.keys().flatten().count()
    }

    /// Forgets which destinations are full.
    pub fn forget_full(&mut self) {
        let keys: Vec<_> = self.full.read().into_keys().collect();
        for key in keys {
            self.full.map.remove(&Plain(key)).expect("it is there");
        }
    }

    /// The memory of `FLOWS` and of `REPLIES`, from /proc/self/fdinfo (`bpf_map_show_fdinfo`,
    /// kernel/bpf/syscall.c). Told apart by their sizes; there must be one kernel loaded only.
    #[must_use]
    pub fn flow_memory(&self) -> [Memory; 2] {
        let of = |key: usize, value: usize| {
            let found = std::fs::read_dir("/proc/self/fdinfo")
                .expect("/proc is mounted")
                .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok())
                .find_map(|text| {
                    let field = |name: &str| -> Option<u64> {
                        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
                    };
                    // `BPF_MAP_TYPE_HASH` is 1.
                    let is = field("map_type:")? == 1
                        && field("key_size:")? == key as u64
                        && field("value_size:")? == value as u64;
                    is.then_some(Memory { capacity: field("max_entries:")?, bytes: field("memlock:")? })
                });
            found.expect("the map is open in this process")
        };
        [of(size_of::<FlowKey>(), size_of::<Flow>()), of(size_of::<ReplyKey>(), size_of::<Reply>())]
    }
}

/// A program that parses Ethernet, IPv4 and TCP's ports by the helper that ours use, and redirects to interface 2:
/// what any program that forwards must do.
fn baseline() -> Vec<u8> {
    const SKB_LOAD_BYTES: i32 = 26;
    const REDIRECT: i32 = 23;
    let insn = |code: u8, to: u8, from: u8, offset: i16, value: i32| {
        let (o, v) = (offset.to_le_bytes(), value.to_le_bytes());
        [code, from << 4 | to, o[0], o[1], v[0], v[1], v[2], v[3]]
    };
    let code = [
        insn(0xbf, 6, 1, 0, 0),   // r6 = skb
        insn(0xb7, 2, 0, 0, 14),  // the IP header is behind Ethernet's
        insn(0xbf, 3, 10, 0, 0),  // to the stack
        insn(0x07, 3, 0, 0, -24), //
        insn(0xb7, 4, 0, 0, 20),  //
        insn(0x85, 0, 0, 0, SKB_LOAD_BYTES),
        insn(0x55, 0, 0, 17, 0),   // if it failed: out
        insn(0x71, 2, 10, -15, 0), // protocol
        insn(0x55, 2, 0, 15, 6),   // not TCP: out
        insn(0x71, 2, 10, -24, 0), // header length
        insn(0x57, 2, 0, 0, 15),   //
        insn(0x67, 2, 0, 0, 2),    //
        insn(0x07, 2, 0, 0, 14),   //
        insn(0xbf, 1, 6, 0, 0),    //
        insn(0xbf, 3, 10, 0, 0),   //
        insn(0x07, 3, 0, 0, -48),  //
        insn(0xb7, 4, 0, 0, 20),   //
        insn(0x85, 0, 0, 0, SKB_LOAD_BYTES),
        insn(0x55, 0, 0, 5, 0),    // if it failed: out
        insn(0x69, 3, 10, -46, 0), // destination port
        insn(0xb7, 1, 0, 0, 2),    // interface
        insn(0xb7, 2, 0, 0, 0),    //
        insn(0x85, 0, 0, 0, REDIRECT),
        insn(0x95, 0, 0, 0, 0),
        insn(0xb7, 0, 0, 0, -1), // out: next
        insn(0x95, 0, 0, 0, 0),
    ];
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    for (section, name, kind, bytes) in [
        ("license", "LICENSE", SectionKind::Data, &b"Dual MIT/GPL\0"[..]),
        ("classifier", "baseline", SectionKind::Text, code.as_flattened()),
    ] {
        let id = object.add_section(vec![], section.into(), kind);
        object.set_section_data(id, bytes.to_vec(), 8);
        let text = kind == SectionKind::Text;
        object.add_symbol(Symbol {
            name: name.into(),
            value: 0,
            size: bytes.len() as u64,
            kind: if text { SymbolKind::Text } else { SymbolKind::Data },
            scope: SymbolScope::Linkage,
            weak: false,
            section: SymbolSection::Section(id),
            flags: SymbolFlags::None,
        });
    }
    object.write().expect("an object file")
}

//! The flow table when it is full: the program that makes room, the sweep, and the counts of pods' flows.

use std::collections::BTreeMap;
use std::time::Duration;

use aya::maps::{Array, HashMap, ProgramArray};
use aya::programs::{TestRun as _, TestRunOptions};
use datapath::keys::{Flow, FlowKey, PodId, Swept};

use super::{Kernel, Plain, classifier};

/// Place of `make_room` in `PROGRAMS` (`ebpf/src/sweep.rs`).
const MAKE_ROOM: u32 = 0;

impl Kernel {
    /// Puts the program in its place that `to_uplink` goes on with where the table is full, as the agent does.
    pub fn install_make_room(&mut self) {
        let ebpf = &mut self.programs.1;
        let program = classifier(ebpf, "make_room");
        program.load().expect("make_room is verified");
        let fd = program.fd().and_then(|fd| fd.try_clone().map_err(Into::into)).expect("it is loaded");
        let table = ebpf.map_mut("PROGRAMS").expect("the object has PROGRAMS");
        let mut table = ProgramArray::try_from(table).expect("a table of programs");
        table.set(MAKE_ROOM, &fd, 0).expect("to_uplink may call it");
    }

    /// Runs the sweep that the agent starts now and then. How long it took.
    pub fn sweep(&mut self) -> Duration {
        let program = classifier(&mut self.programs.1, "sweep");
        if program.fd().is_err() {
            program.load().expect("sweep is verified");
        }
        let frame = [0; 64]; // it looks at no packet
        let options = TestRunOptions { data_in: Some(&frame), repeat: 1, ..TestRunOptions::default() };
        program.test_run(options).expect("a test run").duration
    }

    /// What the last sweep did, started by whomever.
    #[must_use]
    pub fn swept(&self) -> Swept {
        let map = self.programs.1.map("SWEPT").expect("the object has SWEPT");
        let map: Array<_, Plain<Swept>> = Array::try_from(map).expect("SWEPT");
        map.get(&0, 0).expect("it has one entry").0
    }

    /// The counts of pods' flows.
    #[must_use]
    pub fn pod_flows(&self) -> BTreeMap<PodId, u64> {
        let map = self.programs.1.map("POD_FLOWS").expect("the object has POD_FLOWS");
        let map: HashMap<_, u32, u64> = HashMap::try_from(map).expect("POD_FLOWS");
        map.iter().collect::<Result<_, _>>().expect("a map is read")
    }

    /// Sets the count of a pod's flows, whatever it has.
    pub fn set_pod_flows(&mut self, pod: PodId, count: u64) {
        let map = self.programs.1.map_mut("POD_FLOWS").expect("the object has POD_FLOWS");
        let mut map: HashMap<_, u32, u64> = HashMap::try_from(map).expect("POD_FLOWS");
        map.insert(pod, count, 0).expect("a count is written");
    }

    /// Sets the counts to what there is: flows that were not made by a program have not been counted.
    pub(super) fn count_pod_flows(&mut self, flows: &BTreeMap<FlowKey, Flow>) {
        let mut counts: BTreeMap<PodId, u64> = self.pod_flows().into_keys().map(|pod| (pod, 0)).collect();
        for key in flows.keys() {
            *counts.entry(key.pod).or_default() += 1;
        }
        for (pod, count) in counts {
            self.set_pod_flows(pod, count);
        }
    }
}

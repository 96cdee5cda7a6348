//! Starts the sweep of the flow table, which is a program of the kernel's (`ebpf/src/sweep.rs`).

use std::path::Path;

use aya::Ebpf;
use aya::maps::ProgramArray;
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use datapath::keys::Swept;

use super::{Error, maps};

/// The program that the agent runs.
const SWEEP: &str = "sweep";
/// The program that packets go on with which find the table full, and its place in `PROGRAMS`.
const MAKE_ROOM: &str = "make_room";
const PLACE: u32 = 0;
/// What a run is given to run on: it looks at no packet.
const FRAME: [u8; 64] = [0; 64];

/// Loads both programs, and puts the second where it is looked for: pinned, the table outlives the agent.
pub(super) fn load(ebpf: &mut Ebpf, dir: &Path) -> Result<(), Error> {
    program(ebpf, SWEEP)?.load().map_err(|error| refused(SWEEP, &error))?;
    let make_room = program(ebpf, MAKE_ROOM)?;
    make_room.load().map_err(|error| refused(MAKE_ROOM, &error))?;
    let fd = make_room.fd().map_err(|error| refused(MAKE_ROOM, &error))?;
    let name = "PROGRAMS";
    ProgramArray::try_from(maps::open(dir, name)?)
        .and_then(|mut table| table.set(PLACE, fd, 0))
        .map_err(|source| Error::Map { name, source })
}

/// Removes flows that are past their time or whose pod, policy or address is gone. A full table of 262,144 takes
/// some tens of milliseconds.
pub(super) fn run(ebpf: &mut Ebpf, dir: &Path) -> Result<Swept, Error> {
    let options = TestRunOptions { data_in: Some(&FRAME), repeat: 1, ..TestRunOptions::default() };
    program(ebpf, SWEEP)?.test_run(options).map_err(|error| refused(SWEEP, &error))?;
    maps::swept(dir)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, Error> {
    let found =
        ebpf.program_mut(name).ok_or_else(|| Error::Program { name, reason: "not in the object".into() })?;
    found.try_into().map_err(|error: ProgramError| refused(name, &error))
}

fn refused(name: &'static str, error: &ProgramError) -> Error {
    Error::Program { name, reason: super::object::one_line(error) }
}

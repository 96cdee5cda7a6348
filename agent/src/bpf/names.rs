//! What the agent does for names in the kernel: reads the segments that `to_pod` has held, runs the program `credit`,
//! marks what is read, and looks at what is learnt.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::{ProgramError, SchedClassifier};
use datapath::conntrack::Ticks;
use datapath::keys::{Credit, Held, HeldKey, Learnt, LearntKey, NameEvent, Segment};
use datapath::limits::CREDITS;
use tokio::io::unix::AsyncFd;

use super::maps::{self, Plain};
use super::{Error, batch, object};
use crate::names::Door;
use crate::names::learnt::Events;

/// The program that enters addresses.
const CREDIT: &str = "credit";
/// What stands before what it is told: an Ethernet header of zeros, which `BPF_PROG_TEST_RUN` takes off.
const ETHERNET_LEN: usize = 14;
/// Segments that are read in one go, so that others get their turn.
const BATCH: usize = 256;

/// `enum bpf_cmd` (include/uapi/linux/bpf.h).
const PROG_TEST_RUN: libc::c_long = 10;

/// `test` of `union bpf_attr` (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
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

/// The kernel side of names.
pub struct Names {
    credit: OwnedFd,
    segments: AsyncFd<RingBuf<MapData>>,
    held: HashMap<MapData, Plain<HeldKey>, Plain<Held>>,
    learnt: MapData,
    events: PerCpuArray<MapData, u64>,
}

impl Names {
    /// Loads the program `credit`, and opens the pinned maps. Within a tokio runtime.
    pub(super) fn open(ebpf: &mut Ebpf, dir: &Path) -> Result<Self, Error> {
        let of = |name| move |source| Error::Map { name, source };
        let refused = |error: &ProgramError| Error::Program { name: CREDIT, reason: object::one_line(error) };
        let program = ebpf
            .program_mut(CREDIT)
            .ok_or_else(|| Error::Program { name: CREDIT, reason: "not in the object".into() })?;
        let program: &mut SchedClassifier = program.try_into().map_err(|error| refused(&error))?;
        if program.fd().is_err() {
            program.load().map_err(|error| refused(&error))?;
        }
        let credit = program.fd().map_err(|error| refused(&error))?;
        let failed = |what: &'static str| {
            move |source: io::Error| Error::Pin { what, path: "SEGMENTS".into(), source }
        };
        let credit = credit.as_fd().try_clone_to_owned().map_err(failed("read"))?;
        let segments = RingBuf::try_from(maps::open(dir, "SEGMENTS")?).map_err(of("SEGMENTS"))?;
        let Map::LruHashMap(learnt) = maps::open(dir, "LEARNT")? else {
            return Err(of("LEARNT")(MapError::InvalidMapType { map_type: 0 }));
        };
        // SAFETY: the ring owns its descriptor and keeps it open; it is handed over whole.
        #[expect(unsafe_code, reason = "`AsyncFd` asks for the promise")]
        let segments = unsafe { AsyncFd::register(segments) };
        Ok(Self {
            credit,
            segments: segments.map_err(|error| failed("wait for")(error.into()))?,
            held: HashMap::try_from(maps::open(dir, "HELD")?).map_err(of("HELD"))?,
            learnt,
            events: PerCpuArray::try_from(maps::open(dir, "NAME_EVENTS")?).map_err(of("NAME_EVENTS"))?,
        })
    }
}

impl Door for Names {
    async fn segments(&mut self) -> io::Result<Vec<(Segment, Vec<u8>)>> {
        let mut ready = self.segments.readable_mut().await?;
        let mut found = Vec::new();
        while found.len() < BATCH {
            let Some(record) = ready.get_inner_mut().next() else {
                ready.clear_ready();
                break;
            };
            found.extend(segment(&record));
        }
        Ok(found)
    }

    fn credit(&self, credits: &[Credit]) -> io::Result<()> {
        for chunk in credits.chunks(CREDITS) {
            let mut data = vec![0; ETHERNET_LEN];
            for credit in chunk {
                data.extend_from_slice(bytes_of(credit));
            }
            let mut run = TestRun {
                prog_fd: self.credit.as_raw_fd().cast_unsigned(),
                data_size_in: data.len() as u32,
                data_in: data.as_ptr() as u64,
                repeat: 1,
                ..TestRun::default()
            };
            // SAFETY: `run` is laid out as the kernel has it, and what it points to outlives the call. The kernel takes
            // what is missing behind it for zeros.
            #[expect(unsafe_code, reason = "aya runs a program of its own objects only")]
            let done =
                unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, &raw mut run, size_of::<TestRun>()) };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
            if run.retval as usize != chunk.len() {
                let message = format!("program credit took {} of {} entries", run.retval, chunk.len());
                return Err(io::Error::other(message));
            }
        }
        Ok(())
    }

    fn mark_read(&mut self, held: &HeldKey, bytes: u32) -> io::Result<()> {
        const EXIST: u64 = 2; // BPF_EXIST
        if held.seq == HeldKey::CONNECTION {
            return Ok(()); // that is another entry; it passes late
        }
        let known = match self.held.get(&Plain(*held), 0) {
            Ok(known) => known.0,
            Err(MapError::KeyNotFound) => return Ok(()), // others needed the room: it is held anew
            Err(error) => return Err(io::Error::other(error)),
        };
        match self.held.insert(Plain(*held), Plain(Held { read: bytes, ..known }), EXIST) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(io::Error::other),
        }
    }

    fn mark_read_to(&mut self, held: &HeldKey, seq: u32) -> io::Result<()> {
        let key = HeldKey { seq: HeldKey::CONNECTION, ..*held };
        self.held.insert(Plain(key), Plain(Held { since: 0, read: seq }), 0).map_err(io::Error::other)
    }

    fn learnt(&self) -> io::Result<Vec<(LearntKey, Learnt)>> {
        let mut found = Vec::new();
        batch::each(self.learnt.fd().as_fd(), |key, learnt| found.push((*key, *learnt)))?;
        Ok(found)
    }

    fn events(&self) -> io::Result<Events> {
        let sum = |event: NameEvent| -> io::Result<u64> {
            Ok(self.events.get(&(event as u32), 0).map_err(io::Error::other)?.iter().sum())
        };
        NameEvent::ALL.iter().map(|(event, _)| Ok((*event, sum(*event)?))).collect()
    }

    fn now(&self) -> Ticks {
        maps::now()
    }
}

/// A record of `SEGMENTS`; `None`: it is not what this version writes.
fn segment(record: &[u8]) -> Option<(Segment, Vec<u8>)> {
    let (head, rest) = record.split_at_checked(size_of::<Segment>())?;
    // SAFETY: there are that many bytes, of which `keys::MapData` promises that every pattern is a value.
    #[expect(unsafe_code, reason = "copies a type that may be copied from the kernel")]
    let segment = unsafe { head.as_ptr().cast::<Segment>().read_unaligned() };
    Some((segment, rest.get(..segment.len as usize)?.to_vec()))
}

fn bytes_of(credit: &Credit) -> &[u8] {
    // SAFETY: `keys::MapData` promises plain bytes without padding that is not named.
    #[expect(unsafe_code, reason = "views a type that may be copied to the kernel")]
    unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(credit).cast(), size_of::<Credit>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records() {
        let head = Segment { payload: 9, offset: 4, len: 5, ..Segment::default() };
        let mut record = vec![0; size_of::<Segment>()];
        let at = size_of::<HeldKey>() + 4 + 16;
        for (i, word) in [9_u32, 4, 5].into_iter().enumerate() {
            record[at + 4 * i..at + 4 * i + 4].copy_from_slice(&word.to_ne_bytes());
        }
        record.extend(b"hello, and the ring's rounding");
        assert_eq!(segment(&record), Some((head, b"hello".to_vec())));
        assert_eq!(segment(&record[..size_of::<Segment>() + 4]), None);
        assert_eq!(segment(&record[..10]), None);
    }
}

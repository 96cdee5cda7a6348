//! Many entries of a map with one system call, which aya has no word for.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use datapath::keys::MapData;

// enum bpf_cmd (include/uapi/linux/bpf.h)
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_MAP_DELETE_BATCH: libc::c_int = 27;

/// Entries that are looked at with one call, to begin with.
const AT_ONCE: usize = 4096;

/// `bpf_attr.batch` (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Puts entries, as many as there are keys. After an error some of them may be there.
pub(super) fn put<K: MapData, V: MapData>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> io::Result<()> {
    assert_eq!(keys.len(), values.len(), "a value for each key");
    call(BPF_MAP_UPDATE_BATCH, map, keys, values.as_ptr().addr() as u64).map_err(|(error, _)| error)
}

/// Removes entries; those that are not there are passed over.
pub(super) fn remove<K: MapData>(map: BorrowedFd<'_>, mut keys: &[K]) -> io::Result<()> {
    while !keys.is_empty() {
        match call(BPF_MAP_DELETE_BATCH, map, keys, 0) {
            Ok(()) => break,
            // It stops at the first key that is not there (generic_map_delete_batch, kernel/bpf/syscall.c).
            Err((error, done)) if error.raw_os_error() == Some(libc::ENOENT) && done < keys.len() => {
                keys = &keys[done + 1..];
            }
            Err((error, _)) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the call. An error says how many entries were done before.
fn call<K>(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    keys: &[K],
    values: u64,
) -> Result<(), (io::Error, usize)> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut batch = Batch {
        keys: keys.as_ptr().addr() as u64,
        values,
        count: keys.len() as u32,
        map: map.as_raw_fd().cast_unsigned(),
        ..Batch::default()
    };
    // SAFETY: `keys` and `values` point to `count` plain elements, which the kernel only reads; their sizes are those
    // that `maps::check_pinned` has found the map to have.
    #[expect(unsafe_code, reason = "see above")]
    let result = unsafe { bpf(command, &mut batch) };
    result.map_err(|error| (error, batch.count as usize))
}

/// Looks at every entry of a hash map: one that is there all the time is seen once, whatever comes and goes meanwhile. It
/// does not count as use of an LRU map's entries (the kernel copies whole buckets: kernel/bpf/hashtab.c).
pub(super) fn each<K: MapData, V: MapData>(
    map: BorrowedFd<'_>,
    mut look: impl FnMut(&K, &V),
) -> io::Result<()> {
    let (mut keys, mut values): (Vec<K>, Vec<V>) = (Vec::new(), Vec::new());
    let mut room = AT_ONCE;
    // Where the next call goes on, a bucket's number: the kernel writes 4 bytes of it (`__htab_map_lookup_and_delete_batch`).
    let mut place = 0_u32;
    let mut begun = false;
    loop {
        keys.clear();
        values.clear();
        keys.reserve(room);
        values.reserve(room);
        let to = &raw mut place;
        let mut batch = Batch {
            from: if begun { to.expose_provenance() as u64 } else { 0 },
            to: to.expose_provenance() as u64,
            keys: keys.as_mut_ptr().expose_provenance() as u64,
            values: values.as_mut_ptr().expose_provenance() as u64,
            count: room as u32,
            map: map.as_raw_fd().cast_unsigned(),
            ..Batch::default()
        };
        // SAFETY: there is room for `count` elements, of the sizes that `maps::check_pinned` has found the map to have.
        #[expect(unsafe_code, reason = "see above")]
        let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut batch) };
        let more = match result {
            Ok(()) => true,
            // The end; with the last entries.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
            // A bucket has more entries than there is room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = (batch.count as usize).min(room);
        // SAFETY: the kernel has written so many, and every pattern of bytes is a value of these types.
        #[expect(unsafe_code, reason = "the kernel has filled them")]
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        for (key, value) in keys.iter().zip(&values) {
            look(key, value);
        }
        if !more {
            return Ok(());
        }
        begun = true;
    }
}

/// The system call.
///
/// # Safety
/// What `batch` points to is as `command` wants it, and outlives the call.
#[expect(unsafe_code, reason = "see above")]
unsafe fn bpf(command: libc::c_int, batch: &mut Batch) -> io::Result<()> {
    // SAFETY: `batch` is laid out as the kernel has it; the rest is the caller's word.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(batch), size_of::<Batch>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

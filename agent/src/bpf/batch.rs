//! Many entries of a map with one system call, which aya has no word for: 8,000 calls cost more than what they do.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use datapath::keys::MapData;

// enum bpf_cmd (include/uapi/linux/bpf.h)
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_MAP_DELETE_BATCH: libc::c_int = 27;

/// `bpf_attr.batch` (include/uapi/linux/bpf.h).
#[repr(C)]
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
        from: 0,
        to: 0,
        keys: keys.as_ptr().addr() as u64,
        values,
        count: keys.len() as u32,
        map: map.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: `batch` is laid out as the kernel has it and outlives the call. `keys` and `values` point to `count`
    // plain elements, which the kernel only reads; their sizes are those that `maps::check_pinned` has found the map
    // to have.
    #[expect(unsafe_code, reason = "a system call that aya has no word for")]
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut batch, size_of::<Batch>()) };
    if result == 0 { Ok(()) } else { Err((io::Error::last_os_error(), batch.count as usize)) }
}

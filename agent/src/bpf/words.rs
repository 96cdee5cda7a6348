//! The words of `FIREWALLS`, written where the programs read them: one aligned store each, so that whoever reads
//! sees the old or the new. An update by system call copies bytes, and promises no such thing.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// An element: the kernel rounds them up to eight bytes (`array_map_alloc`, kernel/bpf/arraymap.c).
#[repr(C, align(8))]
struct Slot {
    word: AtomicU32,
}

/// An array of words with `BPF_F_MMAPABLE`, in this process' memory.
pub(super) struct Words {
    first: NonNull<Slot>,
    len: usize,
}

impl Words {
    /// Maps an array of `len` words.
    pub(super) fn map(array: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses. It refuses one that is longer than the array
        // (array_map_mmap, kernel/bpf/arraymap.c).
        #[expect(unsafe_code, reason = "the kernel's array is written in place")]
        let start =
            unsafe { mmap(std::ptr::null_mut(), len * size_of::<Slot>(), protection, flags, array, 0)? };
        let first = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { first, len })
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<u32> {
        self.slots().iter().map(|slot| slot.word.load(Ordering::Acquire)).collect()
    }

    /// One of them; 0 if there is none.
    pub(super) fn get(&self, index: u32) -> u32 {
        self.slots().get(index as usize).map_or(0, |slot| slot.word.load(Ordering::Acquire))
    }

    /// Sets one. All that was written to other maps before is there for whoever reads it.
    pub(super) fn set(&self, index: u32, word: u32) {
        if let Some(slot) = self.slots().get(index as usize) {
            slot.word.store(word, Ordering::Release);
        }
    }

    fn slots(&self) -> &[Slot] {
        // SAFETY: `len` slots are mapped, page-aligned, until this is dropped; every pattern of bytes is a slot, and
        // they are only reached as atomics.
        #[expect(unsafe_code, reason = "the mapping is an array of slots")]
        unsafe {
            std::slice::from_raw_parts(self.first.as_ptr(), self.len)
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing borrows it any more.
        #[expect(unsafe_code, reason = "gives back what `map` took")]
        let unmapped = unsafe { munmap(self.first.as_ptr().cast(), self.len * size_of::<Slot>()) };
        // It fails for addresses that are not mapped only; the process loses nothing by one that stays.
        let _ = unmapped;
    }
}

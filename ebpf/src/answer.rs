//! What the makers of answers share: the packet at hand becomes another one, and goes back where it came from.
//!
//! An answer is put together in memory of this CPU, not on the stack, of which the programs have none to spare.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_store_bytes,
};
use datapath::limits;

use crate::ctx::{Refused, Skb};
use crate::maps::ANSWER;
use crate::packet::{ETHERNET_LEN, IPV4_LEN as V4, IPV6_LEN as V6};

/// Where the Ethernet header is in the memory, so that the IP header after it is aligned.
const ETHERNET: usize = 2;
/// Where the IP header is.
const IP: usize = ETHERNET + ETHERNET_LEN;
/// What one `bpf_csum_diff` sums at most before Linux 6.13 (`struct bpf_scratchpad`, net/core/filter.c).
const SUM_STEP: u32 = 512;
/// Time to live of answers, as hosts send (RFC 1700).
const TTL: u8 = 64;
/// What an answered packet is brought to at least on the way, so that its transport header is within it.
const LEAST_ROOM: u32 = 320;

/// The memory.
pub type Memory = [u8; limits::ANSWER];

/// An answer to the packet at hand.
pub struct Answer {
    memory: &'static mut Memory,
}

impl Answer {
    /// Takes this CPU's memory and the packet's Ethernet header, turned round.
    #[inline(always)]
    pub fn to(skb: &Skb) -> Result<Self, Refused> {
        let memory = ANSWER.get_ptr_mut(0).ok_or(Refused)?;
        // SAFETY: the entry is this CPU's own, programs of one CPU do not interrupt each other at TC, and none
        // makes two answers.
        let answer = Self { memory: unsafe { &mut *memory } };
        let head = skb.load::<[u8; ETHERNET_LEN]>(0)?;
        answer.memory[ETHERNET..ETHERNET + 6].copy_from_slice(&head[6..12]);
        answer.memory[ETHERNET + 6..ETHERNET + 12].copy_from_slice(&head[..6]);
        answer.memory[ETHERNET + 12..IP].copy_from_slice(&head[12..]);
        Ok(answer)
    }

    /// Whether the packet was sent to one link-layer address, not to a group: to a group there is no answer
    /// (RFC 1122, 3.2.2).
    #[inline(always)]
    pub fn was_unicast(&self) -> bool {
        self.memory[ETHERNET + 6] & 1 == 0
    }

    /// Sets link-layer destination and source.
    #[inline(always)]
    pub fn set_macs(&mut self, destination: &[u8; 6], source: &[u8; 6]) {
        self.memory[ETHERNET..ETHERNET + 6].copy_from_slice(destination);
        self.memory[ETHERNET + 6..ETHERNET + 12].copy_from_slice(source);
    }

    /// The link-layer destination.
    #[inline(always)]
    pub fn asker_mac(&self) -> [u8; 6] {
        let m = &self.memory[ETHERNET..];
        [m[0], m[1], m[2], m[3], m[4], m[5]]
    }

    /// Copies bytes out of the answer; `at` counts from the IP header.
    #[inline(always)]
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.memory[IP + at..IP + at + N]);
        bytes
    }

    /// Copies bytes into the answer; `at` counts from the IP header.
    #[inline(always)]
    pub fn set<const N: usize>(&mut self, at: usize, bytes: &[u8; N]) {
        self.memory[IP + at..IP + at + N].copy_from_slice(bytes);
    }

    /// Copies within the answer, offsets counted from the IP header. The two may not overlap.
    #[inline(always)]
    pub fn copy<const N: usize>(&mut self, from: usize, to: usize) {
        let bytes = self.get::<N>(from);
        self.set(to, &bytes);
    }

    /// Copies `len` bytes of the packet's IP part into the answer at `at`, rounded down to whole words, which is
    /// what can be summed. Gives what was copied; refuses less than `LEAST` and more than `MOST`.
    #[inline(always)]
    pub fn quote<const LEAST: u32, const MOST: u32>(
        &mut self,
        skb: &Skb,
        at: usize,
        len: u32,
    ) -> Result<u32, Refused> {
        // The box keeps LLVM from replacing the comparisons, from which the verifier learns the bounds.
        let len = core::hint::black_box(len & !3);
        if len < LEAST || len > MOST {
            return Err(Refused);
        }
        // SAFETY: the verifier checks that `len` bytes from there on are the map entry's.
        let done = unsafe {
            let to = self.memory.as_mut_ptr().add(IP + at);
            bpf_skb_load_bytes(skb.as_ptr(), ETHERNET_LEN as u32, to.cast(), len)
        };
        if done == 0 { Ok(len) } else { Err(Refused) }
    }

    /// An IPv4 header without options for `total` bytes in all; the addresses are set already. Not to be
    /// fragmented, so its identification means nothing (RFC 6864, 4.1).
    #[inline(always)]
    pub fn set_v4_header(&mut self, class: u8, total: u32, protocol: u8) {
        let [high, low] = (total as u16).to_be_bytes();
        self.set(0, &[0x45, class, high, low, 0, 0, 0x40, 0, TTL, protocol, 0, 0]);
        let checksum = checksum(self.sum(0, V4 as u32, 0));
        self.set(10, &checksum);
    }

    /// An IPv6 header for `payload` bytes after it; the addresses are set already.
    #[inline(always)]
    pub fn set_v6_header(&mut self, payload: u32, next_header: u8, hop_limit: u8) {
        let [high, low] = (payload as u16).to_be_bytes();
        self.set(0, &[0x60, 0, 0, 0, high, low, next_header, hop_limit]);
    }

    /// The sum of `len` bytes from `at` on, counted from the IP header; `len` is a multiple of 4, at most three
    /// steps.
    #[inline(always)]
    fn sum(&self, at: usize, len: u32, seed: u32) -> u32 {
        let mut sum = seed;
        let mut left = len;
        let mut from = IP + at;
        for _ in 0..3 {
            let step = if left > SUM_STEP { SUM_STEP } else { left };
            // SAFETY: the verifier checks that the bytes are the map entry's.
            sum = unsafe {
                let from = self.memory.as_ptr().add(from).cast_mut();
                bpf_csum_diff(core::ptr::null_mut(), 0, from.cast(), step, sum) as u32
            };
            left -= step;
            from += SUM_STEP as usize;
        }
        sum
    }

    /// The checksum of `len` bytes behind an IPv4 header.
    #[inline(always)]
    pub fn checksum_v4(&self, len: u32) -> [u8; 2] {
        checksum(self.sum(V4, len, 0))
    }

    /// The checksum of `len` bytes of TCP behind an IPv4 header, with the pseudo-header (RFC 9293, 3.1). The
    /// addresses end the header, so they are summed in one go.
    #[inline(always)]
    pub fn pseudo_checksum_v4(&self, protocol: u8, len: u32) -> [u8; 2] {
        checksum(self.sum(V4 - 8, len + 8, pseudo(protocol, len)))
    }

    /// The same behind an IPv6 header (RFC 8200, 8.1).
    #[inline(always)]
    pub fn pseudo_checksum_v6(&self, protocol: u8, len: u32) -> [u8; 2] {
        checksum(self.sum(V6 - 32, len + 32, pseudo(protocol, len)))
    }

    /// Puts the answer, `len` bytes of IP, in the packet's place. If this fails the packet is spoilt.
    ///
    /// A local pod's packet is `CHECKSUM_PARTIAL`: a device without checksum offload would sum it up from where
    /// its transport header was, and write the result into the middle of the answer. No helper says "no more"
    /// but one that takes bytes away in front: once the place to sum from is cut off, the kernel forgets about
    /// it (`__skb_postpull_rcsum`, include/linux/skbuff.h, by `bpf_skb_generic_pop`, net/core/filter.c). So all
    /// but 40 bytes, the least it leaves of IPv6, are cut off behind the Ethernet header and given back. Before
    /// that `bpf_skb_change_tail` has made the packet linear, and no GSO one.
    #[inline(always)]
    pub fn replace(&self, skb: &Skb, len: u32) -> Result<(), Refused> {
        let room = if len > LEAST_ROOM { len } else { LEAST_ROOM };
        let raw: *mut __sk_buff = skb.as_ptr().cast();
        let all = ETHERNET_LEN as u32 + len;
        let mac = BPF_ADJ_ROOM_MAC;
        // SAFETY: the context is valid; the verifier checks that the bytes stored are the map entry's.
        unsafe {
            if bpf_skb_change_tail(raw, ETHERNET_LEN as u32 + room, 0) != 0
                || bpf_skb_adjust_room(raw, V6 as i32 - room as i32, mac, 0) != 0
                || bpf_skb_adjust_room(raw, len as i32 - V6 as i32, mac, 0) != 0
            {
                return Err(Refused);
            }
            let bytes = self.memory.as_ptr().add(ETHERNET);
            // A sum over the whole packet that the hardware made is kept right.
            match bpf_skb_store_bytes(raw, 0, bytes.cast(), all, u64::from(BPF_F_RECOMPUTE_CSUM)) {
                0 => Ok(()),
                _ => Err(Refused),
            }
        }
    }
}

/// Sends the packet back out of the interface that it came by: to a pod, its interface's program stands at the
/// host's end; to a bridge's port, the bridge finds it.
#[inline(always)]
pub fn send_back(skb: &Skb) -> i32 {
    skb.clear_hash();
    skb.clear_mark();
    // SAFETY: plain integers.
    unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
}

/// What the rest of a pseudo-header adds to a sum.
#[inline(always)]
const fn pseudo(protocol: u8, len: u32) -> u32 {
    (protocol as u16).to_be() as u32 + (len as u16).to_be() as u32
}

/// A checksum of a sum of words as they lie in memory (RFC 1071).
#[inline(always)]
const fn checksum(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

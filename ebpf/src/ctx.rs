//! A safe view of the skb: the only place that touches `__sk_buff` and its helpers.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX,
    bpf_fib_lookup, bpf_redir_neigh, bpf_tunnel_key,
};
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_set_hash, bpf_set_hash_invalid, bpf_skb_change_type, bpf_skb_get_tunnel_key,
    bpf_skb_load_bytes, bpf_skb_set_tunnel_key,
};
use aya_ebpf::programs::TcContext;
use datapath::addr::Ip;

use crate::maps;

/// `PACKET_HOST` (include/uapi/linux/if_packet.h): for this host.
const PACKET_HOST: u32 = 0;
/// TTL of outer packets: any path within a cluster's network.
const TUNNEL_TTL: u8 = 64;

/// The kernel refused.
pub struct Refused;

/// A packet under way.
pub struct Skb {
    tc: TcContext,
}

impl Skb {
    #[inline(always)]
    pub const fn new(tc: TcContext) -> Self {
        Self { tc }
    }

    #[inline(always)]
    const fn raw(&self) -> *mut __sk_buff {
        self.tc.skb.skb
    }

    #[inline(always)]
    pub const fn context(&self) -> &TcContext {
        &self.tc
    }

    #[inline(always)]
    pub fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.tc.as_ptr()
    }

    /// Length from the link-layer header on, in bytes.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.tc.len()
    }

    /// The interface that the program is attached to.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for as long as the program runs; the verifier checks the offset.
        unsafe { (*self.raw()).ifindex }
    }

    /// The interface that the packet came into this node by; 0: the node sends it itself.
    #[inline(always)]
    pub fn ingress_ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw()).ingress_ifindex }
    }

    /// `skb->protocol`, in network order as the kernel holds it: right with an offloaded VLAN tag too.
    #[inline(always)]
    pub fn protocol(&self) -> u16 {
        // SAFETY: as above.
        unsafe { (*self.raw()).protocol as u16 }
    }

    /// `skb->hash` as it stands; 0: none.
    #[inline(always)]
    pub fn hash(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw()).hash }
    }

    /// Sets the hash. It survives forwarding, NAT, defragmentation and masquerade (tried on 6.18).
    #[inline(always)]
    pub fn set_hash(&self, hash: u32) {
        // SAFETY: the context is valid.
        unsafe { bpf_set_hash(self.raw(), hash) };
    }

    /// Takes the hash off; the kernel computes its own when it wants one.
    #[inline(always)]
    pub fn clear_hash(&self) {
        // SAFETY: the context is valid.
        unsafe { bpf_set_hash_invalid(self.raw()) };
    }

    /// Clears the mark: rules for the inner packet are not for what carries it.
    #[inline(always)]
    pub fn clear_mark(&self) {
        self.tc.set_mark(0);
    }

    /// Says that the packet is for this host, whatever its link-layer destination.
    #[inline(always)]
    pub fn set_type_host(&self) {
        // SAFETY: the context is valid.
        unsafe { bpf_skb_change_type(self.raw(), PACKET_HOST) };
    }

    /// Copies bytes out.
    #[inline(always)]
    pub fn load<T: Bytes>(&self, offset: usize) -> Result<T, Refused> {
        self.tc.load(offset).map_err(|_| Refused)
    }

    /// Copies bytes out to where they are wanted.
    #[inline(always)]
    pub fn load_into<const N: usize>(&self, offset: usize, to: &mut [u8; N]) -> Result<(), Refused> {
        // SAFETY: the helper writes `N` bytes, or zeros where it fails.
        let done =
            unsafe { bpf_skb_load_bytes(self.raw().cast(), offset as u32, to.as_mut_ptr().cast(), N as u32) };
        if done == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Copies `len` bytes out, from 1 to `N`.
    #[inline(always)]
    pub fn load_some<const N: usize>(
        &self,
        offset: usize,
        to: &mut [u8; N],
        len: usize,
    ) -> Result<(), Refused> {
        // The verifier has to see both bounds, though a caller may have seen to them.
        let len = core::hint::black_box(len);
        if len == 0 || len > N {
            return Err(Refused);
        }
        // SAFETY: the helper writes `len` bytes, or zeros where it fails.
        let done = unsafe {
            bpf_skb_load_bytes(self.raw().cast(), offset as u32, to.as_mut_ptr().cast(), len as u32)
        };
        if done == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Copies bytes in, without touching checksums.
    #[inline(always)]
    pub fn store<T: Bytes>(&self, offset: usize, value: &T) -> Result<(), Refused> {
        self.tc.store(offset, value, 0).map_err(|_| Refused)
    }

    /// Copies bytes in that no checksum of the packet balances: the sum that the kernel keeps of the whole packet
    /// (`CHECKSUM_COMPLETE`) follows them.
    #[inline(always)]
    pub fn store_summed<T: Bytes>(&self, offset: usize, value: &T) -> Result<(), Refused> {
        self.tc.store(offset, value, u64::from(BPF_F_RECOMPUTE_CSUM)).map_err(|_| Refused)
    }

    /// Corrects the IPv4 header's checksum at `offset` for changed words, by their [`difference`].
    #[inline(always)]
    pub fn fix_ip_checksum(&self, offset: usize, difference: u32) -> Result<(), Refused> {
        self.tc.l3_csum_replace(offset, 0, u64::from(difference), 0).map_err(|_| Refused)
    }

    /// The same for a changed 16-bit word (RFC 1624). Words as in memory.
    #[inline(always)]
    pub fn fix_ip_checksum_word(&self, offset: usize, from: u32, to: u32) -> Result<(), Refused> {
        self.tc.l3_csum_replace(offset, u64::from(from), u64::from(to), 2).map_err(|_| Refused)
    }

    /// Corrects a transport checksum at `offset`; `flags` as of `bpf_l4_csum_replace`.
    #[inline(always)]
    pub fn fix_l4_checksum(&self, offset: usize, from: u32, to: u32, flags: u64) -> Result<(), Refused> {
        self.tc.l4_csum_replace(offset, u64::from(from), u64::from(to), flags).map_err(|_| Refused)
    }

    /// Corrects a transport checksum at `offset` for changed words that it covers, by their [`difference`].
    #[inline(always)]
    pub fn fix_l4_checksum_by(&self, offset: usize, difference: u32, flags: u64) -> Result<(), Refused> {
        self.tc.l4_csum_replace(offset, 0, u64::from(difference), flags).map_err(|_| Refused)
    }

    /// Corrects a transport checksum at `offset` for a changed address of the pseudo-header (RFC 9293, 3.1; RFC
    /// 8200, 8.1), by its [`difference`].
    ///
    /// With `CHECKSUM_COMPLETE` the kernel keeps a sum of the whole packet. Over IPv4 the header's own checksum
    /// balances the address and the transport checksum is left to account for; over IPv6 the two balance each
    /// other, which `BPF_F_IPV6` says (6.16 and stable kernels of then; others refuse the flag, and err there).
    #[inline(always)]
    pub fn fix_pseudo_header(
        &self,
        offset: usize,
        difference: u32,
        v6: bool,
        flags: u64,
    ) -> Result<(), Refused> {
        let flags = flags | u64::from(BPF_F_PSEUDO_HDR);
        let fix = |flags| self.tc.l4_csum_replace(offset, 0, u64::from(difference), flags);
        if v6 && fix(flags | BPF_F_IPV6).is_ok() {
            return Ok(());
        }
        fix(flags).map_err(|_| Refused)
    }

    /// Length of a GSO packet's segments without their headers, in bytes; 0: not one.
    #[inline(always)]
    pub fn gso_size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.raw()).gso_size }
    }

    /// Who sent a packet through the tunnel, and its VNI.
    #[inline(always)]
    pub fn tunnel_sender(&self) -> Result<(Ip, u32), Refused> {
        let key = &mut request()?.tunnel;
        let mut ask = |flags: u32| {
            let size = size_of::<bpf_tunnel_key>() as u32;
            // SAFETY: the helper writes at most the size it is given.
            unsafe { bpf_skb_get_tunnel_key(self.raw(), &raw mut *key, size, u64::from(flags)) }
        };
        // It refuses to give one family's address as the other's.
        if ask(0) == 0 {
            // SAFETY: the helper wrote the IPv4 member, in host order.
            let remote = unsafe { key.__bindgen_anon_1.remote_ipv4 };
            return Ok((Ip::v4(remote.to_be_bytes()), key.tunnel_id));
        }
        if ask(BPF_F_TUNINFO_IPV6) != 0 {
            return Err(Refused);
        }
        // SAFETY: the helper wrote the IPv6 member, in network order.
        let remote = unsafe { key.__bindgen_anon_1.remote_ipv6 };
        Ok((from_words(remote), key.tunnel_id))
    }

    /// Says where the tunnel's device sends this packet to, and from which of this node's addresses.
    #[inline(always)]
    pub fn set_tunnel(&self, local: &Ip, remote: &Ip, vni: u32) -> Result<(), Refused> {
        let key = &mut request()?.tunnel;
        // SAFETY: all zeros is a value of this plain struct.
        unsafe { core::ptr::write_bytes(&raw mut *key, 0, 1) };
        key.tunnel_id = vni;
        key.tunnel_ttl = TUNNEL_TTL;
        // No outer UDP checksum, as is usual (RFC 7348, 5; for IPv6 RFC 6935): the inner one covers the payload.
        let mut flags = BPF_F_ZERO_CSUM_TX;
        if remote.is_v4() {
            key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(remote.v4_octets());
            key.__bindgen_anon_3.local_ipv4 = u32::from_be_bytes(local.v4_octets());
        } else {
            key.__bindgen_anon_1.remote_ipv6 = words(remote);
            key.__bindgen_anon_3.local_ipv6 = words(local);
            flags |= BPF_F_TUNINFO_IPV6;
        }
        let size = size_of::<bpf_tunnel_key>() as u32;
        // SAFETY: the helper reads the struct at its full size.
        let done = unsafe { bpf_skb_set_tunnel_key(self.raw(), &raw mut *key, size, u64::from(flags)) };
        if done == 0 { Ok(()) } else { Err(Refused) }
    }
}

/// What helpers are asked with, where it is large: the stack's 512 bytes are needed elsewhere.
#[repr(C)]
pub struct Request {
    /// Of `bpf_fib_lookup`.
    pub fib: bpf_fib_lookup,
    /// Of `bpf_redirect_neigh`.
    pub next_hop: bpf_redir_neigh,
    /// Of `bpf_skb_set_tunnel_key` and `bpf_skb_get_tunnel_key`.
    tunnel: bpf_tunnel_key,
}

/// This CPU's own [`Request`], as it was left.
#[inline(always)]
pub fn request() -> Result<&'static mut Request, Refused> {
    let request = maps::REQUEST.get_ptr_mut(0).ok_or(Refused)?;
    // SAFETY: programs of one CPU do not interrupt each other at TC, and a program takes one part at a time.
    Ok(unsafe { &mut *request })
}

/// `BPF_F_IPV6` of `bpf_l4_csum_replace` (include/uapi/linux/bpf.h), newer than aya's bindings.
const BPF_F_IPV6: u64 = 1 << 7;

/// What a changed address does to a one's complement sum, as the checksum helpers take it. The zeros before an
/// IPv4 address cancel out.
#[inline(always)]
pub fn difference(from: &Ip, to: &Ip) -> u32 {
    let (from, to) =
        (from.octets.as_ptr().cast::<u32>().cast_mut(), to.octets.as_ptr().cast::<u32>().cast_mut());
    // SAFETY: the helper reads sixteen bytes of each, and no alignment is asked of them.
    unsafe { bpf_csum_diff(from, 16, to, 16, 0) as u32 }
}

/// An address as words in memory order.
#[inline(always)]
pub const fn words(ip: &Ip) -> [u32; 4] {
    // SAFETY: sixteen bytes, aligned to words.
    unsafe { core::mem::transmute::<Ip, [u32; 4]>(*ip) }
}

/// The address of these words.
#[inline(always)]
pub const fn from_words(words: [u32; 4]) -> Ip {
    // SAFETY: as above; every pattern is an address.
    unsafe { core::mem::transmute::<[u32; 4], Ip>(words) }
}

/// Arrays of bytes: what may be copied out of and into packets.
pub trait Bytes: Copy {}
impl<const N: usize> Bytes for [u8; N] {}

//! A safe view of the skb: the only place that touches `__sk_buff` and its helpers.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{__sk_buff, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key};
use aya_ebpf::helpers::generated::{
    bpf_set_hash, bpf_set_hash_invalid, bpf_skb_change_type, bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key,
};
use aya_ebpf::programs::TcContext;
use datapath::addr::Ip;

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

    /// Copies bytes in, without touching checksums.
    #[inline(always)]
    pub fn store<T: Bytes>(&self, offset: usize, value: &T) -> Result<(), Refused> {
        self.tc.store(offset, value, 0).map_err(|_| Refused)
    }

    /// Corrects the IPv4 header's checksum at `offset` for a changed word (RFC 1624). Words as in memory.
    #[inline(always)]
    pub fn fix_ip_checksum(&self, offset: usize, from: u32, to: u32) -> Result<(), Refused> {
        self.tc.l3_csum_replace(offset, u64::from(from), u64::from(to), 4).map_err(|_| Refused)
    }

    /// The same for a changed 16-bit word.
    #[inline(always)]
    pub fn fix_ip_checksum_word(&self, offset: usize, from: u32, to: u32) -> Result<(), Refused> {
        self.tc.l3_csum_replace(offset, u64::from(from), u64::from(to), 2).map_err(|_| Refused)
    }

    /// Corrects a transport checksum at `offset`; `flags` as of `bpf_l4_csum_replace`.
    #[inline(always)]
    pub fn fix_l4_checksum(&self, offset: usize, from: u32, to: u32, flags: u64) -> Result<(), Refused> {
        self.tc.l4_csum_replace(offset, u64::from(from), u64::from(to), flags).map_err(|_| Refused)
    }

    /// Who sent a packet through the tunnel, and its VNI.
    #[inline(always)]
    pub fn tunnel_sender(&self) -> Result<(Ip, u32), Refused> {
        // SAFETY: all zeros is a value of this plain struct.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        // SAFETY: the helper writes at most the size it is given.
        let done = unsafe {
            bpf_skb_get_tunnel_key(self.raw(), &raw mut key, size_of::<bpf_tunnel_key>() as u32, 0)
        };
        if done != 0 {
            return Err(Refused);
        }
        // SAFETY: the helper wrote the IPv4 member (host order) as IPv6 was not asked for.
        let remote = unsafe { key.__bindgen_anon_1.remote_ipv4 };
        Ok((Ip::v4(remote.to_be_bytes()), key.tunnel_id))
    }

    /// Says where the tunnel's device sends this packet to, and from which of this node's addresses.
    #[inline(always)]
    pub fn set_tunnel(&self, local: &Ip, remote: &Ip, vni: u32) -> Result<(), Refused> {
        // SAFETY: all zeros is a value of this plain struct.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        key.tunnel_id = vni;
        key.tunnel_ttl = TUNNEL_TTL;
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(remote.v4_octets());
        key.__bindgen_anon_3.local_ipv4 = u32::from_be_bytes(local.v4_octets());
        // No outer UDP checksum over IPv4, as is usual (RFC 7348, 5): the inner one covers the payload.
        // SAFETY: the helper reads the struct at its full size.
        let done = unsafe {
            bpf_skb_set_tunnel_key(
                self.raw(),
                &raw mut key,
                size_of::<bpf_tunnel_key>() as u32,
                u64::from(BPF_F_ZERO_CSUM_TX),
            )
        };
        if done == 0 { Ok(()) } else { Err(Refused) }
    }
}

/// Arrays of bytes: what may be copied out of and into packets.
pub trait Bytes: Copy {}
impl<const N: usize> Bytes for [u8; N] {}

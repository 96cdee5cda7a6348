//! Outgate's decisions: which packets are egress, which address and port they leave with, where replies go.
//!
//! Everything here is a pure function over [`tables::Tables`]. The kernel programs implement that trait with
//! BPF maps, the tests with `BTreeMap`s; both run this same code. No dependencies, no I/O, no clock.
//!
//! The modules follow a packet: [`from_pod`], [`to_uplink`], ([`from_tunnel`] at the gateway,)
//! [`from_uplink`], and [`to_pod`] for connections that come in.

#![no_std]
#![expect(
    clippy::inline_always,
    reason = "the kernel programs are one function each: 512 bytes of stack in all"
)]

#[cfg(any(test, feature = "memory"))]
extern crate std;

pub mod addr;
pub mod conntrack;
pub mod crc32c;
pub mod departure;
pub mod dns;
#[cfg(any(test, feature = "memory"))]
pub mod dns_build;
pub mod firewall;
pub mod fragments;
pub mod from_pod;
pub mod from_tunnel;
pub mod from_uplink;
pub mod guard;
pub mod keys;
pub mod limits;
#[cfg(any(test, feature = "memory"))]
pub mod memory;
pub mod names;
pub mod packet;
pub mod ports;
pub mod rules;
#[cfg(any(test, feature = "memory"))]
pub mod rules_build;
pub mod snat;
pub mod sweep;
pub mod tables;
pub mod to_pod;
pub mod to_uplink;
pub mod verdict;

#[cfg(test)]
mod dns_tests;
#[cfg(test)]
mod firewall_tests;
#[cfg(test)]
mod names_tests;
#[cfg(test)]
mod rules_tests;
#[cfg(test)]
mod walk_tests;

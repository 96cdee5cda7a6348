//! Outgate's decisions: which packets are egress, which address and port they leave with, where replies go.
//!
//! Everything here is a pure function over [`tables::Tables`]. The kernel programs implement that trait with
//! BPF maps, the tests with `BTreeMap`s; both run this same code. No dependencies, no I/O, no clock.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod keys;
pub mod limits;

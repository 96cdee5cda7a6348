//! Outgate's agent, in the order that a change travels: objects are watched, modelled, compiled to a map
//! image, applied to the kernel, and reported.

pub mod objects;
pub mod watch;

pub mod model;
pub mod selector;

pub mod assign;
pub mod lease;

pub mod compile;
pub mod ids;

pub mod facts;
pub mod image;

pub mod announce;
pub mod bpf;
pub mod netlink;

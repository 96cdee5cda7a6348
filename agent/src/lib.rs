//! Outgate's agent, in the order that a change travels: objects are watched, modelled, compiled to a map
//! image, applied to the kernel, and reported.

pub mod crd;
pub mod objects;
pub mod text;

mod hashed;
pub mod watch;

pub mod cni;

pub mod addresses;
pub mod firewall;
pub mod model;
pub mod selector;

pub mod assign;
pub mod digest;
pub mod keep;
pub mod leader;
pub mod leadership;
pub mod lease;
pub mod status;

pub mod compile;
pub mod ids;
pub mod pins;

pub mod facts;
pub mod image;

pub mod agent;
pub mod announce;
pub mod bpf;
pub mod conflict;
pub mod conntrack;
pub mod controller;
pub mod metrics;
pub mod names;
pub mod netlink;
mod nfnetlink;
pub mod notrack;
pub mod ports;
pub mod told;

pub mod cli;
pub mod commands;
pub mod convert;
pub mod print;

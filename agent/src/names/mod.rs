//! Names of egress firewalls: the agent's part of learning which addresses they stand for. The kernel programs read
//! answers over UDP by themselves (`ebpf/src/to_pod.rs`).

pub mod answer;
pub mod client;
pub mod learnt;
pub mod lookups;
pub mod resolv_conf;
pub mod resolvers;
pub mod stream;
pub mod wire;

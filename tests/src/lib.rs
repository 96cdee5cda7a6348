//! The lab: nodes, pods and outside hosts as network namespaces on this machine.
//!
//! A [`Lab`] is a value. Making one makes the namespaces, dropping it removes them, and if its process dies
//! in any other way (a signal, an abort) a small reaper process removes them instead. Several labs run side
//! by side with the same addresses, because nothing of a lab is in the machine's own namespace.
//!
//! ```text
//!   pods            nodes               underlay             router                 outside
//!  10.244.1.x ── node-a .11 ─┐
//!  10.244.2.x ── node-b .12 ─┼─ 172.18.0.0/24 ─┬─ .1 router .1 ── 203.0.113.0/24 ─┬─ web   .10
//!  10.244.3.x ── node-c .13 ─┘                 └─ .250 neighbour                  └─ other .20
//! ```
//!
//! With [`LabSpec::dual_stack`] all have IPv6 too: pods `fd00:10:244:1::/64` and on, nodes `2001:db8:172:18::11`
//! and on with the router at `::1`, outside `2001:db8:203::/64` with the same last digits. [`LabSpec`] has other uplinks, a
//! second network, other MTUs and a wire that snoops multicast.
//!
//! Every lab looks at its end for packets with bad checksums in any of its namespaces, and for pods' addresses at
//! outside hosts: either fails the test ([`Lab::tolerate`]).
//!
//! What a node has is what a cluster gives it: pods made by the real CNI plugins, which masquerade; routes to
//! the other nodes' pods; service rules as kube-proxy writes them; strict reverse-path filters.
//!
//! Functions panic when a command fails, with the command line that shows the failure again: tests keep the
//! backtrace that way, and there is nothing to be recovered in a half-made lab.

pub mod agent;
pub mod cgroup;
pub mod cni;
mod command;
pub mod dns;
pub mod family;
pub mod firewall;
pub mod hostile;
pub mod kernel;
pub mod kube;
pub mod lab;
pub mod lookups;
pub mod netns;
pub mod objects;
pub mod packet;
pub mod reach;
pub mod record;
pub mod scene;
pub mod servers;
pub mod service;
pub mod traffic;

pub use agent::Agent;
pub use cgroup::Cgroup;
pub use cni::{Cni, Pod, PodSpec};
pub use command::{Output, Process, eventually, eventually_ok};
pub use family::{Family, endpoint};
pub use kube::KubeApi;
pub use lab::{Host, Lab, LabSpec, Node, Uplink};
pub use netns::Netns;
pub use record::Recorder;
pub use scene::Scene;

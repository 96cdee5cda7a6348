//! IPv6 routes of a node's network, for tests whose IPv6 packets leave by an uplink.

use std::process::Command;

use super::interfaces::{SECOND_UPLINK, UPLINK};

/// Lets the calling thread's network (`enter_node_network`) route a prefix on the link, by either uplink.
pub fn route_ipv6(prefix: &str) {
    // bpf_ipv6_fib_lookup (net/core/filter.c) refuses where forwarding is off.
    let script = format!(
        "sysctl -qw net.ipv6.conf.all.forwarding=1
         ip -6 route replace {prefix} dev if{UPLINK} metric 64
         ip -6 route replace {prefix} dev if{SECOND_UPLINK} metric 65"
    );
    let status = Command::new("sh").args(["-ec", &script]).status().expect("sh runs");
    assert!(status.success(), "the script failed: {script}");
}

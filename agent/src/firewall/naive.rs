//! What rules mean, said the plainest way: the oracle that the compiled rules are compared with.

use std::net::IpAddr;

use datapath::packet::{SCTP, TCP, UDP};

use super::{Destination, Name, Rule};

/// The index of the first rule that matches; `None`: none does, and what none matches is allowed.
///
/// `port` is the destination's; of protocols without ports it is not looked at. `known` says whether an address is known
/// for a name.
pub fn decide(
    rules: &[Rule],
    destination: IpAddr,
    protocol: u8,
    port: u16,
    known: impl Fn(&Name, IpAddr) -> bool,
) -> Option<usize> {
    let has_ports = matches!(protocol, TCP | UDP | SCTP);
    rules.iter().position(|rule| {
        let address_matches = match &rule.to {
            Destination::Network(net) => net.contains(&destination),
            Destination::Name(name) => known(name, destination),
            Destination::Nodes(ips) => ips.contains(&destination),
        };
        let ports_match = rule.ports.is_empty()
            || has_ports
                && rule.ports.iter().any(|p| p.protocol == protocol && (p.first..=p.last).contains(&port));
        address_matches && ports_match
    })
}

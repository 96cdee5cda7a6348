//! Egress firewalls: rules as they are written, checked, and compiled to what the programs look up.

pub mod compile;
pub mod naive;
mod places;
mod ports;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use compile::TooMuch;

/// One EgressFirewall object that counts: the one named `default` of its namespace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Firewall {
    /// UID, if it has one.
    pub uid: String,
    /// A number that changes with the object.
    pub version: u64,
    /// Its rules, or why the whole object is refused: the version in force then stays; where there is none,
    /// everything to outside is denied.
    pub rules: Result<Arc<Vec<Rule>>, String>,
    /// What is in force but not as its author may think: a selector without a match.
    pub notes: Vec<String>,
}

/// One rule, checked. Its place in the list is its index in the object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Whether it allows.
    pub allows: bool,
    /// What it is for.
    pub to: Destination,
    /// Protocols and ports; empty: all of every protocol.
    pub ports: Vec<Ports>,
}

/// What a rule is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Destination {
    /// A network, host bits cleared.
    Network(IpNet),
    /// The addresses of a name.
    Name(Name),
    /// The addresses of the nodes that a selector matches now, ascending; may be none.
    Nodes(Vec<IpAddr>),
}

/// Some ports of a protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ports {
    /// IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
    /// The first; 0 to 65,535 is the whole protocol.
    pub first: u16,
    /// The last.
    pub last: u16,
}

/// A DNS name of a rule, in lower case, without the trailing dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Name {
    /// Whether it stands for all names of one label more (`*.example.com`).
    pub wildcard: bool,
    /// The name, without `*.`.
    pub name: String,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.wildcard {
            f.write_str("*.")?;
        }
        f.write_str(&self.name)
    }
}

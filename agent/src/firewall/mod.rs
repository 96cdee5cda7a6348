//! Egress firewalls: rules as they are written, checked, and compiled to what the programs look up.

pub mod audit;
pub mod check;
pub mod compile;
pub mod naive;
mod places;
mod ports;
pub mod show;
mod spans;
mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use compile::TooMuch;

use crate::objects::AppliedFirewall;

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

impl Rule {
    /// The name that it is for.
    #[must_use]
    pub const fn name(&self) -> Option<&Name> {
        match &self.to {
            Destination::Name(name) => Some(name),
            Destination::Network(_) | Destination::Nodes(_) => None,
        }
    }
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

/// What has come of one namespace's firewall in this node's kernel.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FirewallState {
    /// [`Firewall::uid`] of the object that was last taken up.
    pub uid: String,
    /// [`Firewall::version`] of it.
    pub version: u64,
    /// Why it is not in force; none: it is.
    pub error: Option<String>,
    /// With an error: whether the version before is in force still. If not, all that rules could be for is denied.
    pub kept: bool,
}

/// What a node says about its firewalls, for its EgressNode.
#[must_use]
pub fn report(states: &BTreeMap<String, FirewallState>) -> Vec<AppliedFirewall> {
    let of = |(namespace, state): (&String, &FirewallState)| AppliedFirewall {
        namespace: namespace.clone(),
        uid: state.uid.clone(),
        version: version_text(state.version),
        message: state.error.clone().unwrap_or_default(),
        kept: state.kept,
    };
    states.iter().map(of).collect()
}

/// What a node has said about its firewalls: [`report`], the other way round.
#[must_use]
pub fn reported(firewalls: &[AppliedFirewall]) -> BTreeMap<String, FirewallState> {
    let of = |f: &AppliedFirewall| {
        let state = FirewallState {
            uid: f.uid.clone(),
            version: u64::from_str_radix(&f.version, 16).unwrap_or(0),
            error: Some(f.message.clone()).filter(|message| !message.is_empty()),
            kept: f.kept,
        };
        (f.namespace.clone(), state)
    };
    firewalls.iter().map(of).collect()
}

/// [`Firewall::version`] as objects have it: text, for not every reader of JSON has 64-bit numbers.
#[must_use]
pub fn version_text(version: u64) -> String {
    format!("{version:016x}")
}

//! Where objects come from and where Outgate's own go: one trait, so that nothing else knows whether it is
//! a directory or the Kubernetes API.

pub mod dir;
pub mod kube;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;

use crate::objects::{
    Cluster, EgressAllocation, EgressFirewallReport, EgressIpReport, EgressNode, EgressNodeSpec, ObjectName,
    Objects,
};

/// Something that is wrong with one file or object, while the rest works on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Problem {
    /// The file or object.
    pub about: String,
    /// What is wrong, what becomes of it, and what probably caused it.
    pub message: String,
}

impl Problem {
    /// A problem of `about`.
    pub fn new(about: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self { about: about.to_string(), message: message.to_string() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.about, self.message)
    }
}

/// One of Outgate's own objects, to be written.
#[expect(clippy::large_enum_variant, reason = "few live at once, and not for long")]
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Write {
    /// This node's EgressNode, its status only.
    EgressNode(EgressNode),
    /// Leader: what a node, by name, is told, in the spec of its EgressNode.
    NodeSpec(String, EgressNodeSpec),
    /// Leader: the EgressNode, by name, of a node that is gone.
    RemoveEgressNode(String),
    /// Leader: an allocation.
    Allocation(EgressAllocation),
    /// Leader: an allocation, by name, whose address is in no object any more.
    RemoveAllocation(String),
    /// Leader: an EgressIP's status.
    Status(EgressIpReport),
    /// Leader: the status, by name, of an EgressIP that is gone.
    RemoveStatus(String),
    /// Leader: the status of a namespace's EgressFirewall.
    FirewallStatus(EgressFirewallReport),
    /// Leader: the status, by namespace, of an EgressFirewall that is gone.
    RemoveFirewallStatus(String),
    /// Leader: what all nodes agree on.
    Cluster(Cluster),
    /// Something that people who look at an object should read. A directory has no place for it but the log.
    Event(Event),
}

/// Something that happened to an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Event {
    /// The object.
    pub about: ObjectName,
    /// One word for programs, as in conditions.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// Whether somebody should do something about it.
    pub warning: bool,
}

/// A source of objects.
pub trait Source {
    /// What can go wrong.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Waits until something has changed, and makes the other methods say so. Cancelling it loses nothing.
    fn changed(&mut self) -> impl Future<Output = Result<(), Self::Error>>;

    /// The whole set, as of the last [`changed`](Self::changed) and of the writes since.
    fn objects(&self) -> &Objects;

    /// EgressIP statuses, as last written by any leader.
    fn statuses(&self) -> &BTreeMap<String, EgressIpReport>;

    /// EgressFirewall statuses by namespace, as last written by any leader.
    fn firewall_statuses(&self) -> &BTreeMap<String, EgressFirewallReport>;

    /// Whether the agent of an egress node was heard of lately, as far as the source can know.
    fn is_alive(&self, _node: &str) -> bool {
        true
    }

    /// Names of allocations that exist and cannot be read: nobody may write over them.
    fn unreadable_allocations(&self) -> &BTreeSet<String>;

    /// Where an object stands, by what [`crate::objects::ObjectName`] prints: for people who look for it.
    fn place(&self, object: &str) -> Option<&str>;

    /// Whether all objects are known. If not, one that is missing need not be gone.
    fn complete(&self) -> bool;

    /// What is wrong with the source itself.
    fn problems(&self) -> &BTreeSet<Problem>;

    /// Why what is known is out of date, or soon will be, and not only because the source is away for a while.
    fn stale(&self) -> Option<&Problem> {
        None
    }

    /// Whether this process leads; asks for it if nobody does.
    fn lead(&mut self) -> Result<bool, Self::Error>;

    /// Whether a write has failed only because what it was planned from has changed meanwhile: what is there now has been
    /// read again.
    fn is_conflict(_error: &Self::Error) -> bool {
        false
    }

    /// Writes one object, whole, if it differs from what is there.
    fn write(&mut self, write: Write) -> impl Future<Output = Result<(), Self::Error>>;
}

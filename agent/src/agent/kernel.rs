//! The kernel side, as the run loop needs it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::keys::{EgressId, IfIndex};

use crate::facts::Facts;
use crate::image::MapImage;
use crate::ports::Use;
use crate::watch::Problem;

/// The kernel side, as the run loop needs it.
pub trait Kernel {
    /// What can go wrong.
    type Error: std::error::Error;

    /// What the maps held at the start.
    fn recovered(&self) -> &MapImage;

    /// Which of these interfaces the node has not at this moment.
    fn gone(&self, interfaces: impl Iterator<Item = IfIndex>) -> BTreeSet<IfIndex>;

    /// Makes the tunnel's device be there, with this UDP port.
    fn ensure_tunnel(&mut self, port: u16) -> impl Future<Output = Result<(), String>>;

    /// Makes maps and attachments be as the image and the facts say. An error says that the maps are not;
    /// a text, that they are, and that some interface could not be attached to.
    fn apply(&mut self, image: &MapImage, facts: &Facts) -> Result<Option<String>, Self::Error>;

    /// Makes what is around this node fit the image, after it is applied: what the node asks its link to let
    /// through to it. An error is a text, and is tried again.
    fn settle(&mut self, image: &MapImage, facts: &Facts) -> impl Future<Output = Result<(), String>>;

    /// Learns the names of an image that is in force: from these resolvers of pods, and these nameservers of the node.
    fn learn(&mut self, _image: &MapImage, _resolvers: &BTreeSet<IpAddr>, _nameservers: &[IpAddr]) {}

    /// Whether what names say may have changed since this was last asked.
    fn has_news(&mut self) -> bool {
        false
    }

    /// What names say: those that do not exist, or cannot be looked up.
    fn problems(&self) -> BTreeSet<Problem> {
        BTreeSet::new()
    }

    /// Removes what firewalls had in force before, once nobody can be using it any more. Called at every tick.
    fn retire(&mut self) -> Result<(), Self::Error>;

    /// Removes dead flows; how many were removed, and how many are left.
    fn sweep(&mut self) -> Result<(usize, usize), Self::Error>;

    /// How the ports of each address are used by this node's flows.
    fn ports_used(&mut self) -> Result<BTreeMap<EgressId, Use>, Self::Error> {
        Ok(BTreeMap::new())
    }

    /// Addresses of which a flow has found no port in the last second. Called at every tick.
    fn exhausted(&mut self) -> Result<BTreeSet<EgressId>, Self::Error> {
        Ok(BTreeSet::new())
    }
}

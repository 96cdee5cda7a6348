//! Pods known at once: their addresses from where the container runtime has them first, seconds before the API's
//! status does. Either from libcni's result cache on the node ([`cache`]), or from a chained CNI plugin that waits
//! until the pod is programmed ([`plugin`], [`door`]).

pub mod attachment;
pub mod cache;
pub mod door;
pub mod known;
pub mod plugin;
mod programmed;
pub mod removal;

pub use attachment::Attachment;
pub use cache::Cache;
pub use door::Door;
pub(crate) use programmed::programmed;

use crate::objects::Objects;
use crate::watch::Problem;
use known::{Known, known};

/// Both ways by which pods are known at once; the default has neither.
#[derive(Debug, Default)]
pub struct Runtime {
    /// libcni's cache.
    pub cache: Option<Cache>,
    /// Where the chained plugin asks.
    pub door: Option<Door>,
}

impl Runtime {
    /// Waits until one of them knows something new. Cancelling it loses nothing.
    pub async fn changed(&mut self) {
        let Self { cache, door } = self;
        let cache = async {
            match cache {
                Some(cache) => cache.changed().await,
                None => std::future::pending().await,
            }
        };
        let door = async {
            match door {
                Some(door) => door.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = cache => {}
            () = door => {}
        }
    }

    /// What they say of a node's pods.
    #[must_use]
    pub fn known(&self, objects: &Objects, node: &str) -> Known {
        let asked = self.door.as_ref().map(Door::attachments).unwrap_or_default();
        let cached = self.cache.iter().flat_map(Cache::attachments);
        known(objects, node, &asked, &cached.cloned().collect::<Vec<_>>())
    }

    /// What is wrong with them.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.cache.iter().flat_map(Cache::problems)
    }
}

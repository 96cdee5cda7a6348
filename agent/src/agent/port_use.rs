//! How the node's flows use its ports: the sweep of dead ones, and what follows for the ports that the node has.

use std::collections::BTreeMap;
use std::net::IpAddr;

use datapath::addr::Ip;
use datapath::keys::EgressId;
use datapath::limits::GRANULE_PORTS;
use tracing::{info, warn};

use super::{Agent, Kernel};
use crate::ports::Use;
use crate::watch::Source;

impl<S: Source, K: Kernel> Agent<S, K> {
    /// Asks for more ports where a flow has found none. Whether there is news.
    pub(super) fn look_for_exhaustion(&mut self) -> bool {
        match self.kernel.exhausted() {
            Ok(none) if none.is_empty() => false,
            Ok(some) => {
                let use_of = some.into_iter().map(|id| (id, Use::default())).collect();
                self.ask_for_more(&use_of, true)
            }
            Err(error) => {
                warn!("cannot see whether flows have found no port: {error}");
                false
            }
        }
    }

    fn ask_for_more(&mut self, use_of: &BTreeMap<EgressId, Use>, exhausted: bool) -> bool {
        let Some((image, _)) = &self.applied else { return false };
        let addresses: Vec<_> = use_of
            .iter()
            .filter_map(|(id, how)| Some((IpAddr::from(image.egress_ips.get(id)?.ip), *how)))
            .collect();
        let mut news = false;
        for (ip, how) in addresses {
            if self.ports.used(&ip, how, exhausted) {
                info!("egress IP {ip}: this node asks for more ports");
                news = true;
            }
        }
        news
    }

    /// Looks how ports are used: asks for more, and gives back what pods have not needed for a while. `left` is how many
    /// flows there are after a sweep, none if that has failed. Whether there is news.
    pub(super) fn look_at_ports(&mut self, left: Option<usize>) -> bool {
        let Some(left) = left else { return false };
        let Some((image, _)) = &self.applied else { return false };
        // So few flows are half of no lease: nothing has to be counted.
        let smallest = image.leases.values().map(|l| l.granules * u32::from(GRANULE_PORTS)).min();
        let busy = smallest.is_some_and(|ports| left >= ports as usize / 2);
        let mut news = false;
        let draining = self.ports.draining(self.now());
        if busy || !draining.is_empty() {
            let used = match self.kernel.ports_used() {
                Ok(used) => used,
                Err(error) => {
                    warn!("cannot see how ports are used: {error}");
                    return false;
                }
            };
            // An address that is not in the maps has no flow: the sweep has just removed them.
            let flows = |ip: &IpAddr| {
                let id = image.egress_addrs.get(&Ip::from(*ip));
                id.and_then(|id| used.get(id)).is_some_and(|u| u.flows > 0)
            };
            let drained: Vec<_> = draining.into_iter().filter(|ip| !flows(ip)).collect();
            for ip in drained {
                info!("egress IP {ip}: this node gives its ports back");
                self.ports.drained(&ip);
                news = true;
            }
            news |= self.ask_for_more(&used, false);
        }
        news | self.ports.stop_idle(self.now(), self.idle)
    }

    /// Returns how many flows are left.
    pub(super) fn sweep(&mut self) -> Option<usize> {
        match self.kernel.sweep() {
            Ok((removed, left)) => {
                let mut state = self.state.borrow_mut();
                state.flows_swept += removed as u64;
                state.flows = left;
                Some(left)
            }
            Err(error) => {
                warn!("cannot look for dead flows: {error}");
                None
            }
        }
    }
}

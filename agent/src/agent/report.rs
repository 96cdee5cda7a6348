//! What has changed goes to the log, once, and to the metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::limits::GRANULE_PORTS;
use tracing::info;

use super::{Agent, Kernel};
use crate::compile::Compiled;
use crate::firewall::audit;
use crate::model::Desired;
use crate::watch::Source;

/// What was last said in the log, so that it is said once.
#[derive(Default)]
pub(super) struct Said {
    /// Which EgressIP serves which pod.
    pub(super) pods: BTreeMap<(String, String), Option<String>>,
    /// Addresses that this node holds.
    held: BTreeSet<IpAddr>,
}

impl<S: Source, K: Kernel> Agent<S, K> {
    /// Says in log and metrics what has changed.
    pub(super) fn report(&mut self, desired: &Desired, compiled: &Compiled) {
        let problems: BTreeSet<_> = self
            .source
            .problems()
            .iter()
            .chain(&desired.problems)
            .chain(&compiled.problems)
            .chain(&self.kernel.problems())
            .chain(self.runtime.problems())
            .chain(&self.failures)
            .chain(&self.notes)
            .chain(self.leadership.error())
            .cloned()
            .collect();
        self.told.tell(&self.source, problems);
        let pods: BTreeMap<_, _> =
            desired.pods.iter().map(|(name, pod)| (name.clone(), pod.egress_ip.clone())).collect();
        for ((namespace, name), egress_ip) in &pods {
            match (self.said.pods.get(&(namespace.clone(), name.clone())), egress_ip) {
                (old, Some(e)) if old != Some(egress_ip) => {
                    info!("pod {namespace}/{name} leaves by EgressIP {e}");
                }
                (Some(Some(e)), None) => {
                    info!("pod {namespace}/{name} is not selected by EgressIP {e} any more");
                }
                _ => {}
            }
        }
        for ((namespace, name), egress_ip) in &self.said.pods {
            if egress_ip.is_some() && !pods.contains_key(&(namespace.clone(), name.clone())) {
                info!("pod {namespace}/{name} is gone");
            }
        }
        let held: BTreeSet<_> = desired
            .addresses()
            .into_keys()
            .filter(|ip| {
                desired.allocations.get(ip).is_some_and(|a| a.owner.as_ref() == Some(&self.identity.node))
            })
            .collect();
        for ip in held.difference(&self.said.held) {
            info!("this node holds egress IP {ip}");
        }
        for ip in self.said.held.difference(&held) {
            info!("this node holds egress IP {ip} no more");
        }
        let image = &compiled.image;
        let mut state = self.state.borrow_mut();
        state.problems = self.told.problems().len();
        state.egress_ips_held = held.len();
        state.pods = pods.len();
        state.pods_selected = pods.values().flatten().count();
        state.nodes = image.nodes.len();
        state.rules = audit::rules_in_force(image, desired, &self.firewalls);
        state.ports_leased =
            image.leases.values().map(|l| u64::from(l.granules) * u64::from(GRANULE_PORTS)).sum();
        self.said = Said { pods, held };
    }
}

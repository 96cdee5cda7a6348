//! Removes dead flows, beside the agent's own work: a full table takes longer to read than a change may wait.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use datapath::addr::Ip;
use datapath::conntrack;
use datapath::keys::{Delivery, EgressId, EgressIp, Flow, FlowKey, Pod, PodId, Reply, ReplyKey, Settings};

use super::Error;
use super::maps::{Table, now};

/// What a sweep did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Swept {
    /// Flows removed.
    pub removed: usize,
    /// Flows left.
    pub left: usize,
}

/// Sweeps, one at a time, in a thread of its own.
pub(super) struct Sweeper {
    dir: PathBuf,
    running: Option<JoinHandle<Result<Swept, Error>>>,
    left: usize,
}

impl Sweeper {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), running: None, left: 0 }
    }

    /// Says what the last sweep did, if it has ended since, and starts the next.
    pub(super) fn sweep(&mut self, settings: Settings) -> Result<Swept, Error> {
        let mut swept = Swept { removed: 0, left: self.left };
        if let Some(running) = self.running.take_if(|running| running.is_finished()) {
            // A panic is the thread's own; the next sweep is as good as this one.
            swept = running.join().unwrap_or(Ok(swept))?;
            self.left = swept.left;
        }
        if self.running.is_none() {
            let dir = self.dir.clone();
            self.running = Some(std::thread::spawn(move || sweep(&dir, &settings)));
        }
        Ok(swept)
    }
}

/// Flows that look dead by what the maps held at the start are looked at again, with their pod and address,
/// right before they are removed: meanwhile the agent may have written, and packets may have come. What is
/// left is some microseconds at the end of an idle time of minutes.
fn sweep(dir: &Path, settings: &Settings) -> Result<Swept, Error> {
    let mut flows: Table<FlowKey, Flow> = Table::open(dir, "FLOWS")?;
    let mut replies: Table<ReplyKey, Reply> = Table::open(dir, "REPLIES")?;
    let pods: Table<Ip, Pod> = Table::open(dir, "PODS")?;
    let delivery: Table<PodId, Delivery> = Table::open(dir, "DELIVERY")?;
    let egress_ips: Table<EgressId, EgressIp> = Table::open(dir, "EGRESS_IPS")?;
    let all = flows.read()?;
    // Policy after the flows: a flow is made by policy that is there, so it is not younger than what is read.
    let (pods_read, delivery_read, egress_read) = (pods.read()?, delivery.read()?, egress_ips.read()?);
    let looks_dead = |key: &FlowKey, flow: &Flow| {
        let pod = delivery_read.get(&key.pod).and_then(|d| pods_read.get(&d.ip));
        is_dead(settings, key, flow, pod, egress_read.contains_key(&flow.egress))
    };
    let is_dead_now = |key: &FlowKey, flow: &Flow| -> Result<bool, Error> {
        let pod = match delivery.get(&key.pod)? {
            Some(delivery) => pods.get(&delivery.ip)?,
            None => None,
        };
        Ok(is_dead(settings, key, flow, pod.as_ref(), egress_ips.get(&flow.egress)?.is_some()))
    };
    let mut swept = Swept { removed: 0, left: all.len() };
    for key in all.iter().filter(|(key, flow)| looks_dead(key, flow)).map(|(key, _)| key) {
        let Some(flow) = flows.get(key)? else { continue };
        if !is_dead_now(key, &flow)? {
            continue;
        }
        flows.remove(key)?;
        replies.remove(&ReplyKey {
            egress: flow.egress,
            remote: key.remote,
            egress_port: flow.egress_port,
            remote_port: key.remote_port,
            protocol: key.protocol,
            pad: [0; 3],
        })?;
        swept.removed += 1;
        swept.left -= 1;
    }
    Ok(swept)
}

/// Whether a flow is past its time, or its pod, policy or address is gone.
fn is_dead(settings: &Settings, key: &FlowKey, flow: &Flow, pod: Option<&Pod>, address: bool) -> bool {
    let selected = pod.is_some_and(|pod| pod.id == key.pod && pod.policy == flow.policy);
    !selected || !address || conntrack::expired(settings, now(), flow, key.protocol)
}

#[cfg(test)]
mod tests {
    use datapath::conntrack::{FlowState, seconds};
    use datapath::packet::UDP;

    use super::*;

    #[test]
    fn what_is_dead() {
        let settings = Settings { udp: 300, ..Settings::default() };
        let pod = Pod { id: 1, policy: 1, ..Pod::default() };
        let key = FlowKey { pod: 1, protocol: UDP, ..FlowKey::default() };
        let flow =
            Flow { egress: 1, policy: 1, state: FlowState::Opening as u8, seen: now(), ..Flow::default() };
        let dead = |flow: &Flow, pod: Option<&Pod>, address| is_dead(&settings, &key, flow, pod, address);
        assert!(!dead(&flow, Some(&pod), true));
        assert!(dead(&flow, None, true), "the pod is gone");
        assert!(dead(&flow, Some(&pod), false), "the address is gone");
        assert!(dead(&Flow { policy: 2, ..flow }, Some(&pod), true), "another object selects the pod");
        assert!(dead(&flow, Some(&Pod { id: 3, ..pod }), true), "the pod's address is another's");
        assert!(dead(&Flow { seen: now().wrapping_sub(seconds(302)), ..flow }, Some(&pod), true));
    }
}

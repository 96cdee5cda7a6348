//! The leader's work by itself: in a cluster it is done by a controller, which has no kernel to look after.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::agent::random;
use crate::leader::{Surroundings, plan};
use crate::metrics;
use crate::model::{self, Desired};
use crate::objects::Objects;
use crate::status::rfc3339;
use crate::watch::{Problem, Source, Write};

/// How often leadership is looked at, and failed work tried again.
const TICK: Duration = Duration::from_millis(500);
/// After a failed write, try again not before.
const RETRY: Duration = Duration::from_secs(1);
/// A write that fails and took longer than this has met a server that is away: the others would wait as long.
const PATIENCE: Duration = Duration::from_secs(1);

/// A controller at work.
pub struct Controller<S> {
    source: S,
    state: Rc<RefCell<metrics::State>>,
    leading: bool,
    retry_at: Option<Instant>,
    lead_error: Option<Problem>,
    failures: BTreeSet<Problem>,
    said: BTreeSet<Problem>,
}

impl<S: Source> Controller<S> {
    /// A controller that has done nothing yet, of a source whose objects are known.
    pub fn new(source: S, state: Rc<RefCell<metrics::State>>) -> Self {
        Self {
            source,
            state,
            leading: false,
            retry_at: None,
            lead_error: None,
            failures: BTreeSet::new(),
            said: BTreeSet::new(),
        }
    }

    /// Works until it is cancelled.
    pub async fn run(&mut self) -> Result<(), S::Error> {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.state.borrow_mut().not_ready = None;
        info!("ready");
        loop {
            let work = tokio::select! {
                changed = self.source.changed() => { changed?; true }
                _ = tick.tick() => self.retry_at.is_some_and(|at| at <= Instant::now()),
            };
            let news = self.lead();
            if work || news {
                self.reconcile().await;
            }
        }
    }

    /// The source, to take leave of it.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// Looks whether it leads. Whether there is news.
    fn lead(&mut self) -> bool {
        let (leads, error) = match self.source.lead() {
            Ok(leads) => (leads, None),
            Err(error) => (false, Some(Problem::new("leadership", error))),
        };
        let news = leads != self.leading || error != self.lead_error;
        match (self.leading, leads) {
            (false, true) => info!("this controller leads: it assigns egress IPs and leases their ports"),
            (true, false) => info!("this controller leads no more"),
            _ => {}
        }
        self.lead_error = error;
        self.leading = leads;
        self.state.borrow_mut().leading = leads;
        news
    }

    async fn reconcile(&mut self) {
        self.failures.clear();
        self.retry_at = None;
        let mut desired = model::desired(self.source.objects(), "");
        if self.leading && lead(&mut self.source, &desired, &mut self.failures).await {
            desired = model::desired(self.source.objects(), "");
            // What was written may lead to more, also where no watch brings it back.
            self.retry_at = Some(Instant::now());
        }
        if !self.failures.is_empty() {
            self.retry_at = Some(Instant::now() + RETRY);
        }
        self.report(&desired);
    }

    fn report(&mut self, desired: &Desired) {
        let problems: BTreeSet<_> = self
            .source
            .problems()
            .iter()
            .chain(&desired.problems)
            .chain(&self.failures)
            .chain(&self.lead_error)
            .cloned()
            .collect();
        for problem in problems.difference(&self.said) {
            warn!("{problem}");
        }
        for problem in self.said.difference(&problems) {
            if !problems.iter().any(|p| p.about == problem.about) {
                info!("{}: mended", problem.about);
            }
        }
        let mut state = self.state.borrow_mut();
        state.problems = problems.len();
        state.nodes = desired.nodes.values().filter(|n| n.agent.is_some()).count();
        self.said = problems;
    }
}

/// Does the leader's work once. Whether anything was written.
pub async fn lead<S: Source>(source: &mut S, desired: &Desired, failures: &mut BTreeSet<Problem>) -> bool {
    let now = rfc3339(SystemTime::now());
    let plan = {
        let source = &*source;
        let around = Surroundings {
            objects: source.objects(),
            statuses: source.statuses(),
            firewall_statuses: source.firewall_statuses(),
            unreadable: source.unreadable_allocations(),
            complete: source.complete(),
            now: &now,
            reachable: &|node| source.is_alive(node),
        };
        plan(desired, &around, &mut random)
    };
    let mut writes = plan.writes;
    if source.complete() {
        writes.extend(gone(source.objects()).into_iter().map(Write::RemoveEgressNode));
    }
    for line in plan.log {
        info!("{line}");
    }
    let mut written = false;
    for write in writes {
        let begun = Instant::now();
        match source.write(write).await {
            Ok(()) => written = true,
            Err(error) => {
                failures.insert(Problem::new("the leader's objects", error));
                if begun.elapsed() > PATIENCE {
                    break;
                }
            }
        }
    }
    written
}

/// EgressNodes of nodes that are gone and have no part in any allocation.
fn gone(objects: &Objects) -> Vec<String> {
    let used: BTreeSet<_> = objects
        .egress_allocations
        .values()
        .flat_map(|a| {
            let leases = a.spec.leases.iter().map(|l| &l.node);
            leases.chain(&a.spec.standbys).chain([&a.spec.owner])
        })
        .collect();
    let gone =
        objects.egress_nodes.keys().filter(|name| !objects.nodes.contains_key(*name) && !used.contains(name));
    gone.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::objects;

    const CLUSTER: &str = "kind: Node
metadata: {name: a, uid: ua, labels: {x: y}}
---
kind: EgressNode
metadata: {name: a}
spec: {ranges: [{egressIP: 192.0.2.1, uid: u, generation: 1, ranges: [{first: 0, count: 1}]}]}
---
kind: EgressNode
metadata: {name: b}
spec: {nodeUID: ub}
---
kind: EgressNode
metadata: {name: c}
spec: {nodeUID: uc}
---
kind: EgressAllocation
metadata: {name: 192.0.2.1}
spec: {egressIP: 192.0.2.1, owner: a, leases: [{node: b, ranges: [{first: 0, count: 1}]}]}";

    #[test]
    fn an_egress_node_stays_while_its_node_has_ports() {
        let mut o = objects(CLUSTER);
        assert_eq!(gone(&o), ["c"]);
        o.egress_allocations.clear();
        assert_eq!(gone(&o), ["b", "c"]);
    }
}

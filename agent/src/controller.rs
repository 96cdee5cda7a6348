//! The leader's work by itself: in a cluster it is done by a controller, which has no kernel to look after.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use crate::agent::random;
use crate::leader::{Surroundings, plan};
use crate::metrics;
use crate::model::{self, Desired};
use crate::status::{self, rfc3339};
use crate::watch::{Problem, Source, Write};

/// How often leadership is looked at, and failed work tried again.
const TICK: Duration = Duration::from_millis(500);
/// After a failed write, try again not before.
const RETRY: Duration = Duration::from_secs(1);
/// After so long of writing, what has come in meanwhile is looked at before the rest is planned again.
const ROUND: Duration = Duration::from_secs(3);
/// A write that fails and took longer than this has met a server that is away: the others would wait as long.
const PATIENCE: Duration = Duration::from_secs(1);

/// A controller at work.
pub struct Controller<S> {
    source: S,
    state: Rc<RefCell<metrics::State>>,
    leading: bool,
    retry_at: Option<Instant>,
    /// When time alone makes work for the leader, in seconds since 1970.
    plan_at: Option<u64>,
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
            plan_at: None,
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
                _ = tick.tick() => self.retry_at.is_some_and(|at| at <= Instant::now()) || self.is_plan_due(),
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

    /// Whether time has made work for the leader.
    fn is_plan_due(&self) -> bool {
        self.leading && self.plan_at.is_some_and(|at| status::seconds_of(SystemTime::now()) >= at)
    }

    async fn reconcile(&mut self) {
        self.failures.clear();
        self.retry_at = None;
        let mut desired = model::desired(self.source.objects(), "");
        if self.leading {
            let led = lead(&mut self.source, &desired, &mut self.failures).await;
            self.plan_at = led.again;
            if led.written {
                desired = model::desired(self.source.objects(), "");
                // What was written may lead to more, also where no watch brings it back.
                self.retry_at = Some(Instant::now());
            }
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

/// What came of the leader's work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Led {
    /// Whether anything is different now.
    pub written: bool,
    /// When time alone makes work, in seconds since 1970.
    pub again: Option<u64>,
}

/// Does the leader's work once.
pub async fn lead<S: Source>(source: &mut S, desired: &Desired, failures: &mut BTreeSet<Problem>) -> Led {
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
    let (writes, again) = (plan.writes, plan.again);
    for line in plan.log {
        info!("{line}");
    }
    let mut written = false;
    let round = Instant::now();
    for write in writes {
        if round.elapsed() > ROUND {
            break;
        }
        let begun = Instant::now();
        // Ports and who is told of them were decided together; what is said of objects was not.
        let decides = matches!(
            write,
            Write::Cluster(_) | Write::Allocation(_) | Write::RemoveAllocation(_) | Write::NodeSpec(..)
        );
        match source.write(write).await {
            Ok(()) => written = true,
            Err(error) if S::is_conflict(&error) => {
                debug!("{error}");
                written = true;
                if decides {
                    break;
                }
            }
            Err(error) => {
                failures.insert(Problem::new("the leader's objects", error));
                if decides || begun.elapsed() > PATIENCE {
                    break;
                }
            }
        }
    }
    Led { written, again }
}

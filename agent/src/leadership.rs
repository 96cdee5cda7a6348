//! Who leads, and the leader's work: an agent whose objects are in a directory does it beside its own, in a cluster a
//! controller does nothing else.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::{debug, info};

use crate::agent::random;
use crate::leader::{Surroundings, plan};
use crate::metrics;
use crate::model::Desired;
use crate::status::{rfc3339, seconds_of};
use crate::watch::{Problem, Source, Write};

/// After so long of writing, what has come in meanwhile is looked at before the rest is planned again.
const ROUND: Duration = Duration::from_secs(3);
/// A write that fails and took longer than this has met a server that is away: the others would wait as long.
const PATIENCE: Duration = Duration::from_secs(1);

/// A process that may be the leader.
pub struct Leadership {
    /// What it is, for the log.
    who: &'static str,
    state: Rc<RefCell<metrics::State>>,
    leads: bool,
    /// When time alone makes work, in seconds since 1970.
    again: Option<u64>,
    /// Why nobody can be asked to lead.
    error: Option<Problem>,
}

impl Leadership {
    /// That of a process which has not asked yet: an `agent` or a `controller`.
    #[must_use]
    pub const fn new(who: &'static str, state: Rc<RefCell<metrics::State>>) -> Self {
        Self { who, state, leads: false, again: None, error: None }
    }

    /// Asks for the first time. Where that fails, nothing has begun yet: who could not lead should not start.
    pub fn begin<S: Source>(&mut self, source: &mut S) -> Result<(), S::Error> {
        let leads = source.lead()?;
        self.set(leads);
        Ok(())
    }

    /// Asks to lead, or whether it still does. Whether there is news. What worked at the start and fails later
    /// ends no process: it goes on with what it has.
    pub fn look<S: Source>(&mut self, source: &mut S) -> bool {
        let (leads, error) = match source.lead() {
            Ok(leads) => (leads, None),
            Err(error) => (false, Some(Problem::new("leadership", error))),
        };
        let news = leads != self.leads || error != self.error;
        self.error = error;
        self.set(leads);
        news
    }

    fn set(&mut self, leads: bool) {
        match (self.leads, leads) {
            (false, true) => info!("this {} leads: it assigns egress IPs and leases their ports", self.who),
            (true, false) => info!("this {} leads no more", self.who),
            _ => {}
        }
        self.leads = leads;
        self.state.borrow_mut().leading = leads;
    }

    /// Whether time has made work for the leader.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.leads && self.again.is_some_and(|at| seconds_of(SystemTime::now()) >= at)
    }

    /// Why nobody can be asked to lead.
    #[must_use]
    pub const fn error(&self) -> Option<&Problem> {
        self.error.as_ref()
    }

    /// Does the leader's work once, if this is the leader. Whether anything is different now.
    pub async fn work<S: Source>(
        &mut self,
        source: &mut S,
        desired: &Desired,
        failures: &mut BTreeSet<Problem>,
    ) -> bool {
        if !self.leads {
            return false;
        }
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
        self.again = plan.again;
        for line in plan.log {
            info!("{line}");
        }
        let mut written = false;
        let round = Instant::now();
        for write in plan.writes {
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
        written
    }
}

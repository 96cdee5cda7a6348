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
/// Nodes write beside the leader, so a write may find its object changed. So many rounds in a row that come to nothing for
/// that are no chance any more.
const CONFLICTS: u32 = 10;

/// A process that may be the leader.
pub struct Leadership {
    /// What it is, for the log.
    who: &'static str,
    state: Rc<RefCell<metrics::State>>,
    leads: bool,
    /// When time alone makes work, in seconds since 1970.
    again: Option<u64>,
    /// How many rounds in a row have come to nothing but a conflict.
    conflicts: u32,
    /// Why nobody can be asked to lead.
    error: Option<Problem>,
}

impl Leadership {
    /// That of a process which has not asked yet: an `agent` or a `controller`.
    #[must_use]
    pub const fn new(who: &'static str, state: Rc<RefCell<metrics::State>>) -> Self {
        Self { who, state, leads: false, again: None, conflicts: 0, error: None }
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
        let (mut written, mut conflict) = (false, None);
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
                    conflict = Some(error);
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
        self.conflicts = if conflict.is_some() && !written { self.conflicts + 1 } else { 0 };
        if let Some(error) = &conflict
            && self.conflicts > CONFLICTS
        {
            failures.insert(Problem::new("the leader's objects", error));
        }
        // A conflict has brought what is there instead.
        written || conflict.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::{env, fs, io, process};

    use super::*;
    use crate::model;
    use crate::objects::{EgressFirewallReport, EgressIpReport, Objects};
    use crate::watch::dir::DirSource;

    /// A directory in which somebody else always writes first.
    struct Contended(DirSource, bool);

    impl Source for Contended {
        type Error = io::Error;

        async fn changed(&mut self) -> Result<(), io::Error> {
            std::future::pending().await
        }
        fn objects(&self) -> &Objects {
            self.0.objects()
        }
        fn statuses(&self) -> &BTreeMap<String, EgressIpReport> {
            self.0.statuses()
        }
        fn firewall_statuses(&self) -> &BTreeMap<String, EgressFirewallReport> {
            self.0.firewall_statuses()
        }
        fn unreadable_allocations(&self) -> &BTreeSet<String> {
            self.0.unreadable_allocations()
        }
        fn place(&self, object: &str) -> Option<&str> {
            self.0.place(object)
        }
        fn complete(&self) -> bool {
            self.0.complete()
        }
        fn problems(&self) -> &BTreeSet<Problem> {
            self.0.problems()
        }
        fn lead(&mut self) -> Result<bool, io::Error> {
            Ok(true)
        }
        fn is_conflict(error: &io::Error) -> bool {
            error.kind() == io::ErrorKind::ResourceBusy
        }
        async fn write(&mut self, _: Write) -> Result<(), io::Error> {
            if self.1 { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
        }
    }

    #[tokio::test]
    async fn a_conflict_is_planned_for_again_and_told_of_when_it_lasts() {
        let dir = env::temp_dir().join(format!("outgate-leadership-{}", process::id()));
        fs::create_dir_all(&dir).unwrap();
        let node = "apiVersion: v1\nkind: Node\nmetadata: {name: a, uid: ua}\n";
        fs::write(dir.join("node.yaml"), node).unwrap();
        let mut source = Contended(DirSource::open(&dir).unwrap(), true);
        let mut leadership = Leadership::new("agent", Rc::default());
        let desired = model::desired(source.objects(), "");
        let mut failures = BTreeSet::new();
        assert!(!leadership.work(&mut source, &desired, &mut failures).await, "it does not lead");
        assert!(leadership.look(&mut source) && !leadership.look(&mut source));
        for lasting in [true, false] {
            for _ in 0..CONFLICTS {
                assert!(leadership.work(&mut source, &desired, &mut failures).await);
                assert_eq!(failures, BTreeSet::new());
            }
            // One that works in between: they are counted anew.
            source.1 = lasting;
            assert!(leadership.work(&mut source, &desired, &mut failures).await);
            assert_eq!(!failures.is_empty(), lasting, "{failures:?}");
            source.1 = false;
            failures.clear();
            assert!(leadership.work(&mut source, &desired, &mut failures).await);
            source.1 = true;
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}

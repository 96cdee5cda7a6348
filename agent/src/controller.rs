//! The leader's work by itself: in a cluster it is done by a controller, which has no kernel to look after.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::info;

use crate::leadership::Leadership;
use crate::metrics;
use crate::model::{self, Desired};
use crate::told::Told;
use crate::watch::{Problem, Source};

/// How often leadership is looked at, and failed work tried again.
const TICK: Duration = Duration::from_millis(500);
/// After a failed write, try again not before.
const RETRY: Duration = Duration::from_secs(1);

/// A controller at work.
pub struct Controller<S> {
    source: S,
    state: Rc<RefCell<metrics::State>>,
    leadership: Leadership,
    retry_at: Option<Instant>,
    failures: BTreeSet<Problem>,
    told: Told,
}

impl<S: Source> Controller<S> {
    /// A controller that has done nothing yet, of a source whose objects are known, and what the log was told of it.
    pub fn new(source: S, state: Rc<RefCell<metrics::State>>, told: Told) -> Self {
        Self {
            source,
            leadership: Leadership::new("controller", Rc::clone(&state)),
            state,
            retry_at: None,
            failures: BTreeSet::new(),
            told,
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
                _ = tick.tick() => self.retry_at.is_some_and(|at| at <= Instant::now()) || self.leadership.is_due(),
            };
            let news = self.leadership.look(&mut self.source);
            if work || news {
                self.reconcile().await;
            }
        }
    }

    /// The source, to take leave of it.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    async fn reconcile(&mut self) {
        self.failures.clear();
        self.retry_at = None;
        let mut desired = model::desired(self.source.objects(), "");
        if self.leadership.work(&mut self.source, &desired, &mut self.failures).await {
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
            .chain(self.leadership.error())
            .cloned()
            .collect();
        self.told.tell(&self.source, problems);
        let mut state = self.state.borrow_mut();
        state.not_ready = self.source.stale().map(ToString::to_string);
        state.problems = self.told.problems().len();
        state.nodes = desired.nodes.values().filter(|n| n.agent.is_some()).count();
    }
}

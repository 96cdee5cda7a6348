//! What is wrong goes to the log once: when it is new, and when it is mended.

use std::collections::BTreeSet;

use tracing::{info, warn};

use crate::watch::{Problem, Source};

/// The problems that the log was told of and that last.
#[derive(Clone, Default, Debug)]
pub struct Told(BTreeSet<Problem>);

impl Told {
    /// Tells of what is wrong now and was not, with the place where the object stands, and of what is mended.
    pub fn tell(&mut self, source: &impl Source, problems: BTreeSet<Problem>) {
        for problem in problems.difference(&self.0) {
            if let Some(place) = source.place(&problem.about) {
                warn!("{place}: {problem}");
            } else {
                warn!("{problem}");
            }
        }
        for problem in self.0.difference(&problems) {
            if !problems.iter().any(|p| p.about == problem.about) {
                info!("{}: mended", problem.about);
            }
        }
        self.0 = problems;
    }

    /// What is wrong, as last told.
    #[must_use]
    pub const fn problems(&self) -> &BTreeSet<Problem> {
        &self.0
    }
}

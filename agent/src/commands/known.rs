//! The wait for a cluster's objects.

use std::cell::RefCell;
use std::rc::Rc;

use crate::metrics;
use crate::told::Told;
use crate::watch::Source as _;
use crate::watch::kube::{Error, KubeSource};

/// Waits until every object is known, and says meanwhile, in the log and to who asks whether this is ready, what is
/// missing. Half of the objects would let out the pods that the other half selects.
pub(super) async fn wait_for(
    source: &mut KubeSource,
    state: &Rc<RefCell<metrics::State>>,
    told: &mut Told,
) -> Result<(), Error> {
    let waiting = "waiting for the API server's objects";
    state.borrow_mut().not_ready = Some(waiting.to_owned());
    source
        .ready(|source| {
            told.tell(source, source.problems().clone());
            let all: Vec<_> = source.problems().iter().map(ToString::to_string).collect();
            let mut state = state.borrow_mut();
            state.problems = all.len();
            state.not_ready = Some(if all.is_empty() {
                waiting.to_owned()
            } else {
                format!("{waiting}: {}", all.join("; "))
            });
        })
        .await
}

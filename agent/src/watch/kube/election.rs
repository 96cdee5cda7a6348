//! Who of several controllers leads: the holder of a Lease.
//!
//! The Lease only says who should work: a leader may pause between looking and writing. So what must not be written twice
//! is written with the version it was planned from.

use std::time::Duration;

use kube::Client;
use kube_lease_manager::{LeaseManagerBuilder, LeaseParams};
use tokio::sync::{Notify, mpsc, watch};

use std::sync::Arc;

use super::Note;
use super::client::chain;
use super::follow::jitter;
use crate::watch::Problem;

/// The Lease.
pub(super) const LEASE: &str = "outgate-controller";
/// Who does not renew it for so long has lost it, in seconds.
const DURATION: u64 = 10;
/// It is renewed so long before, in seconds.
const GRACE: u64 = 5;
const RETRY: Duration = Duration::from_secs(1);

/// Takes part in the election until it is told to stop, and gives the Lease back then. `look` wakes one that waits for
/// another's Lease to run out: it may have been given back.
pub(super) async fn stand(
    client: Client,
    namespace: String,
    identity: String,
    leads: watch::Sender<bool>,
    look: Arc<Notify>,
    mut stop: watch::Receiver<bool>,
    notes: mpsc::UnboundedSender<Note>,
) {
    let say = |error: Option<&(dyn std::error::Error + 'static)>| {
        let problem = error.map(|error| {
            let text = format!("Lease {namespace}/{LEASE} cannot be read or renewed: {}", chain(error));
            Problem::new("leadership", text)
        });
        // Nobody listens any more: the stop comes.
        let _ = notes.send(Note { about: "leadership", problem, away: false });
    };
    while !*stop.borrow() {
        let built = LeaseManagerBuilder::new(client.clone(), LEASE)
            .with_namespace(&namespace)
            .with_parameters(LeaseParams::new(&identity, DURATION, GRACE))
            .build();
        let manager = tokio::select! {
            built = built => built,
            _ = stop.changed() => break,
        };
        let error = match manager {
            Err(error) => Some(error),
            Ok(manager) => loop {
                let leading = *leads.borrow();
                tokio::select! {
                    _ = stop.changed() => {
                        leads.send_replace(false);
                        if leading && let Err(error) = manager.release().await {
                            tracing::warn!("Lease {namespace}/{LEASE} is not given back, it runs out by itself: {error}");
                        }
                        return;
                    }
                    changed = manager.changed() => match changed {
                        Ok(now) => {
                            say(None);
                            leads.send_replace(now);
                        }
                        Err(error) => break Some(error),
                    },
                    () = look.notified(), if !leading => break None,
                }
            },
        };
        if let Some(error) = error {
            leads.send_replace(false);
            say(Some(&error));
            tokio::select! {
                () = tokio::time::sleep(jitter(RETRY)) => {}
                _ = stop.changed() => {}
            }
        }
    }
}

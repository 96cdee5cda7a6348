//! `outgate controller`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::WrongUsage;
use crate::cli::{ControllerArgs, SourceArg};
use crate::controller::Controller;
use crate::metrics::{self, Counters};
use crate::watch::kube::{KubeSource, Role};

pub(super) fn run(args: ControllerArgs) -> anyhow::Result<()> {
    if let SourceArg::Dir(path) = &args.source.source {
        let message = format!(
            "in a directory the agents do the leader's work themselves, one of them at a time; run outgate agent --source dir:{}",
            path.display()
        );
        return Err(WrongUsage(message).into());
    }
    super::log(&args.log)?;
    super::block_on(controller(args))
}

async fn controller(args: ControllerArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let s = &args.source;
    let mut source = KubeSource::open(Role::Controller, s.kubeconfig.as_deref(), &s.namespace).await?;
    let state = Rc::new(RefCell::new(metrics::State::default()));
    let waiting = "waiting for the API server's objects";
    state.borrow_mut().not_ready = Some(waiting.to_owned());
    if let Some(address) = args.metrics {
        let listener = metrics::listen(address).await.map_err(anyhow::Error::msg)?;
        tokio::task::spawn_local(metrics::serve(
            listener,
            Rc::clone(&state),
            Rc::new(|| Ok(Counters::default())),
        ));
    }
    info!("outgate {} controller, objects from {}", env!("CARGO_PKG_VERSION"), source.describe());
    let mut told = BTreeSet::new();
    let ready = source.ready(|problems| {
        for problem in problems.difference(&told) {
            warn!("{problem}");
        }
        let all: Vec<_> = problems.iter().map(ToString::to_string).collect();
        state.borrow_mut().not_ready =
            Some(if all.is_empty() { waiting.to_owned() } else { format!("{waiting}: {}", all.join("; ")) });
        told.clone_from(problems);
    });
    let ready = tokio::select! {
        ready = ready => Some(ready),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
    };
    let Some(ready) = ready else {
        source.resign().await;
        return Ok(());
    };
    ready?;
    if !args.adopt.adopt
        && let Err(error) = source.refuse_ovn()
    {
        source.resign().await;
        return Err(error.into());
    }
    let mut controller = Controller::new(source, state);
    let ended = tokio::select! {
        ended = controller.run() => ended,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    controller.source().resign().await;
    info!("the controller ends");
    Ok(ended?)
}

//! `outgate controller`.

use std::cell::RefCell;
use std::rc::Rc;

use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use super::WrongUsage;
use super::known::wait_for;
use crate::cli::{ControllerArgs, SourceArg};
use crate::controller::Controller;
use crate::metrics::{self, Counters};
use crate::told::Told;
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
    let state = Rc::new(RefCell::new(metrics::State::starting()));
    if let Some(address) = args.metrics {
        let listener = metrics::listen(address).await.map_err(anyhow::Error::msg)?;
        tokio::task::spawn_local(metrics::serve(
            listener,
            Rc::clone(&state),
            Rc::new(|| Ok(Counters::default())),
        ));
    }
    info!("outgate {} controller, objects from {}", env!("CARGO_PKG_VERSION"), source.describe());
    let mut told = Told::default();
    let ready = tokio::select! {
        ready = wait_for(&mut source, &state, &mut told) => Some(ready),
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
    let mut controller = Controller::new(source, state, told);
    let ended = tokio::select! {
        ended = controller.run() => ended,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    controller.source().resign().await;
    info!("the controller ends");
    Ok(ended?)
}

//! `outgate cleanup`.

use std::io::Write;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::CleanupArgs;
use crate::{bpf, netlink, notrack};

pub(super) fn run(args: &CleanupArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let removed = bpf::cleanup(&args.bpffs.bpffs)?;
    for path in &removed {
        writeln!(out, "removed {}", path.display())?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let device = runtime.block_on(netlink::remove_tunnel())?;
    if device {
        writeln!(out, "removed device {}", netlink::TUNNEL)?;
    }
    let proxies = runtime.block_on(netlink::proxies::remove_all())?;
    for ip in &proxies {
        writeln!(out, "removed proxy neighbour {ip}")?;
    }
    let table =
        notrack::remove().with_context(|| format!("cannot remove the nftables table {}", notrack::TABLE))?;
    if table {
        writeln!(out, "removed table inet {}", notrack::TABLE)?;
    }
    if removed.is_empty() && !device && proxies.is_empty() && !table {
        writeln!(out, "nothing to remove")?;
    }
    if args.stay {
        out.flush()?;
        runtime.block_on(told_to_end())?;
    }
    Ok(())
}

/// Waits for the signals that end a container or a command.
async fn told_to_end() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

//! `outgate cleanup`.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::CleanupArgs;
use crate::cni::removal::{self, Plugin};
use crate::{bpf, netlink, notrack};

/// While it stays, how often it looks whether a plugin is needed no more.
const LOOK: Duration = Duration::from_secs(5);

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
    let socket = removal::socket(&args.cni_socket)?;
    for path in &socket {
        writeln!(out, "removed {}", path.display())?;
    }
    let plugins = remove_plugins(args, out, true)?;
    let nothing = removed.is_empty() && !device && proxies.is_empty() && !table && socket.is_empty();
    if nothing && plugins == Plugins::Absent {
        writeln!(out, "nothing to remove")?;
    }
    if args.stay {
        out.flush()?;
        runtime.block_on(stay(args, out, plugins == Plugins::Left))?;
    }
    Ok(())
}

/// What has become of the plugins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Plugins {
    Absent,
    Removed,
    /// At least one is needed.
    Left,
}

/// Removes the chained CNI plugin wherever it is no longer needed.
fn remove_plugins(args: &CleanupArgs, out: &mut impl Write, say_left: bool) -> anyhow::Result<Plugins> {
    let mut all = Plugins::Absent;
    for bin in &args.cni_bin {
        let this = match removal::plugin(bin, &args.cni_conf, &args.cni_results)? {
            Plugin::Absent => Plugins::Absent,
            Plugin::Removed(path) => {
                writeln!(out, "removed {}", path.display())?;
                Plugins::Removed
            }
            Plugin::Used { plugin, sandboxes } => {
                if say_left {
                    let then =
                        if args.stay { "it goes with them" } else { "run this again when they are gone" };
                    writeln!(
                        out,
                        "left {}: sandboxes of {sandboxes} pods were made with it and may need it to end; {then}",
                        plugin.display()
                    )?;
                }
                Plugins::Left
            }
            Plugin::Configured { plugin, by } => bail!(
                "{} stays: {} names it, and without it no pod starts or ends there; take it out of that file, then run this \
                 again (all else is removed)",
                plugin.display(),
                by.display()
            ),
        };
        all = all.max(this);
    }
    Ok(all)
}

/// Stays until told to end; plugins that were left go when they are needed no more.
async fn stay(args: &CleanupArgs, out: &mut impl Write, mut left: bool) -> anyhow::Result<()> {
    let ended = told_to_end();
    tokio::pin!(ended);
    loop {
        tokio::select! {
            told = &mut ended => return Ok(told?),
            () = tokio::time::sleep(LOOK), if left => {
                left = remove_plugins(args, out, false)? == Plugins::Left;
                out.flush()?;
            }
        }
    }
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

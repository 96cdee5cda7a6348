//! `outgate cni`: the chained CNI plugin, and how it gets to where runtimes look for it.

use std::fs;
use std::io::{Write, stdin};
use std::path::Path;

use anyhow::Context as _;

use crate::cli::CniArgs;
use crate::cni::plugin::{self, Environment, NAME};

pub(super) fn run(args: &CniArgs, out: &mut impl Write) -> anyhow::Result<()> {
    if let Some(dir) = &args.install {
        return install(dir, out);
    }
    let ran = plugin::run(&Environment::of_process(), stdin().lock(), out, &args.cni_socket);
    if let Err(failure) = &ran {
        // The runtime reads this one; standard error is for its log.
        writeln!(out, "{}", failure.json())?;
    }
    Ok(ran?)
}

/// Written beside and renamed: a runtime finds the old program or the new one, and one that runs is left alone.
fn install(dir: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    let (to, beside) = (dir.join(NAME), dir.join(format!(".{NAME}.{}", std::process::id())));
    let copied = std::env::current_exe().and_then(|own| fs::copy(own, &beside));
    let placed = copied.and_then(|_| fs::rename(&beside, &to));
    if placed.is_err() {
        // Nothing half-made stays among the plugins; that it was never made is no second failure.
        let _ = fs::remove_file(&beside);
    }
    placed
        .with_context(|| format!("cannot install {}; is the directory there and writable?", to.display()))?;
    Ok(writeln!(out, "{} installed", to.display())?)
}

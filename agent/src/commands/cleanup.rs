//! `outgate cleanup`.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use anyhow::Context as _;

use crate::cli::CleanupArgs;
use crate::netlink;

pub(super) fn run(args: &CleanupArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let bpffs = &args.bpffs.bpffs;
    let removed = remove_pins(bpffs).with_context(|| format!("cannot remove the pins under {}", bpffs.display()))?;
    for version in &removed {
        writeln!(out, "removed programs, links and maps under {}", bpffs.join(version).display())?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let device = runtime.block_on(netlink::remove_tunnel())?;
    if device {
        writeln!(out, "removed device {}", netlink::TUNNEL)?;
    }
    if removed.is_empty() && !device {
        writeln!(out, "nothing to remove")?;
    }
    Ok(())
}

/// Removes the pins of every version: a link or map without pin and holder is gone.
fn remove_pins(bpffs: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(bpffs) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut removed = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Only what an agent has made: `v1`, `v2` and so on.
        if name.strip_prefix('v').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            // Links first: no program may run on maps that are on their way out.
            match fs::remove_dir_all(entry.path().join("links")) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            fs::remove_dir_all(entry.path())?;
            removed.push(name);
        }
    }
    // The directory too, unless it is a mount point or something else is in it.
    let _ = fs::remove_dir(bpffs);
    removed.sort();
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_versions_are_removed() {
        let dir = std::env::temp_dir().join(format!("outgate-cleanup-{}", std::process::id()));
        fs::create_dir_all(dir.join("v1/maps")).unwrap();
        fs::create_dir_all(dir.join("v12/links")).unwrap();
        fs::create_dir_all(dir.join("vault")).unwrap();
        fs::write(dir.join("v1/maps/PODS"), "").unwrap();
        assert_eq!(remove_pins(&dir).unwrap(), ["v1", "v12"]);
        assert!(dir.join("vault").exists());
        fs::remove_dir(dir.join("vault")).unwrap();
        assert!(remove_pins(&dir).unwrap().is_empty());
        assert!(!dir.exists());
        assert!(remove_pins(&dir).unwrap().is_empty(), "twice is no failure");
    }
}

//! `outgate crds`: prints the custom resource definitions, for `cargo xtask codegen`.

use std::io::Write;

use crate::crd;

pub(super) fn run(out: &mut impl Write) -> anyhow::Result<()> {
    Ok(out.write_all(crd::yaml()?.as_bytes())?)
}

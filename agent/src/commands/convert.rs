//! `outgate convert`.

use std::fs;
use std::io::{self, Read as _, Write};
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::cli::ConvertArgs;
use crate::convert::{Input, convert};

pub(super) fn run(args: &ConvertArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let inputs = args.files.iter().map(|path| read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let converted = convert(&inputs);
    converted.write(out)?;
    out.flush()?;
    let mut notes = io::stderr().lock();
    for message in &converted.messages {
        writeln!(notes, "{message}")?;
    }
    match converted.failures() {
        0 => Ok(()),
        1 => bail!("one thing could not be converted: see above"),
        failures => bail!("{failures} things could not be converted: see above"),
    }
}

fn read(path: &Path) -> anyhow::Result<Input> {
    let name = path.display().to_string();
    if name == "-" {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(Input { name: "standard input".to_owned(), text });
    }
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    Ok(Input { name, text })
}

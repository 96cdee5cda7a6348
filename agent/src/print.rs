//! Output for people and programs.

use std::fmt::Write as _;
use std::io::{self, Write};

use serde::Serialize;

use crate::cli::Output;

/// Columns with a header, each as wide as its widest cell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    #[must_use]
    pub fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(|h| (*h).to_owned()).collect()] }
    }

    /// Adds a row; an empty cell is shown as `-`.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into_iter().map(|c| if c.is_empty() { "-".to_owned() } else { c }).collect());
    }

    /// Prints it.
    pub fn print_into(&self, out: &mut impl Write) -> io::Result<()> {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            self.rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a String does not fail.
                let _ = write!(line, "{cell:width$}   ");
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Prints a value as JSON or YAML, or lets `table` print it.
pub fn print_into<T: Serialize, W: Write>(
    out: &mut W,
    output: Output,
    value: &T,
    table: impl FnOnce(&mut W) -> io::Result<()>,
) -> anyhow::Result<()> {
    match output {
        Output::Table => table(out)?,
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(value)?)?,
        Output::Yaml => write!(out, "{}", serde_saphyr::to_string(value)?)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let mut table = Table::new(&["A", "LONGER", "C"]);
        table.row(["wide cell".into(), "é".into(), String::new()]);
        let mut out = Vec::new();
        table.print_into(&mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "A           LONGER   C\nwide cell   é        -\n");
    }
}

//! The `outgate` command.

fn main() {}

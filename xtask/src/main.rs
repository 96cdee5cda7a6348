//! Outgate's build, setup, demo and tests.

fn main() {}

//! Finds the eBPF object that `cargo xtask build` made.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=OUTGATE_BPF_OBJECT");
    let object = std::env::var_os("OUTGATE_BPF_OBJECT")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/outgate.o"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    if object.exists() {
        println!("cargo::rustc-env=OUTGATE_BPF_OBJECT={}", object.display());
    } else {
        println!(
            "cargo::error=no eBPF object at {}: run `cargo xtask build`, which makes it first",
            object.display()
        );
    }
}

//! The compiler and linker for the BPF target.
//!
//! The target has no prebuilt `core`, so its source is needed, and a compiler that takes it (`-Z build-std`).
//! Two are looked for, in this order: rustup's nightly with the `rust-src` component, and Debian's `rustc-web`
//! with `rust-web-src`. `bpf-linker` reads the compiler's LLVM bitcode, so its LLVM must not be older.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{machine, process};

/// The oldest compiler that the programs are known to build with.
const OLDEST_RUSTC: (u32, u32) = (1, 95);
/// The version that `setup` installs; an older one found on the machine is not used.
pub(crate) const BPF_LINKER: &str = "0.13.0";
const OLDEST_BPF_LINKER: (u32, u32) = (0, 13);

/// A compiler with the source of `core`.
#[derive(Debug, Clone)]
pub(crate) struct Rustc {
    /// Its executable, not rustup's proxy.
    pub(crate) path: PathBuf,
    /// `1.96.0`.
    pub(crate) version: String,
    /// Its LLVM's major version.
    pub(crate) llvm: u32,
}

/// What the eBPF build needs.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) rustc: Rustc,
    pub(crate) linker: PathBuf,
}

/// Finds both, or says what to do.
pub(crate) fn find() -> Result<Toolchain> {
    let Some(rustc) = find_rustc() else {
        bail!("no compiler with the source of `core` for the BPF target; run `cargo xtask setup`");
    };
    let Some(linker) = find_linker(rustc.llvm)? else {
        bail!("no bpf-linker for LLVM {} or newer; run `cargo xtask setup`", rustc.llvm);
    };
    Ok(Toolchain { rustc, linker })
}

/// The first compiler that can build `core`.
pub(crate) fn find_rustc() -> Option<Rustc> {
    let nightly = machine::find_program("rustup").and_then(|rustup| {
        let path = process::capture(Command::new(rustup).args(["which", "--toolchain", "nightly", "rustc"]));
        path.ok().map(|path| PathBuf::from(path.trim()))
    });
    nightly.into_iter().chain([PathBuf::from("/usr/bin/rustc")]).find_map(|path| inspect_rustc(&path))
}

/// Whether a compiler of this version (or a package of it) will do.
pub(crate) fn is_new_enough(version: &str) -> bool {
    parse_version(version).is_some_and(|version| version >= OLDEST_RUSTC)
}

fn inspect_rustc(path: &Path) -> Option<Rustc> {
    let verbose = process::capture(Command::new(path).arg("-vV")).ok()?;
    let (version, llvm) = parse_rustc_version(&verbose)?;
    if !is_new_enough(&version) {
        return None;
    }
    let sysroot = process::capture(Command::new(path).args(["--print", "sysroot"])).ok()?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
    core.exists().then(|| Rustc { path: path.to_owned(), version, llvm })
}

/// A `bpf-linker` that is new enough: on the path, in cargo's own directory, or `setup`'s.
pub(crate) fn find_linker(llvm: u32) -> Result<Option<PathBuf>> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let candidates = [machine::tools_dir()?.join("bin/bpf-linker")]
        .into_iter()
        .chain(machine::find_program("bpf-linker"))
        .chain(cargo_home.map(|home| home.join("bin/bpf-linker")));
    Ok(candidates.into_iter().find(|path| machine::is_executable(path) && linker_fits(path, llvm)))
}

fn linker_fits(path: &Path, llvm: u32) -> bool {
    let Ok(version) = process::capture(Command::new(path).arg("--version")) else { return false };
    let new_enough = version
        .split_whitespace()
        .nth(1)
        .and_then(parse_version)
        .is_some_and(|version| version >= OLDEST_BPF_LINKER);
    // Without a shared LLVM it carries its own, which in released builds follows the newest compiler.
    let linked = process::capture(Command::new("ldd").arg(path)).unwrap_or_default();
    new_enough && parse_linked_llvm(&linked).is_none_or(|own| own >= llvm)
}

/// `(release, LLVM major)` out of `rustc -vV`.
fn parse_rustc_version(verbose: &str) -> Option<(String, u32)> {
    let field = |name| verbose.lines().find_map(|line: &str| line.strip_prefix(name)).map(str::trim);
    let llvm = field("LLVM version:")?.split('.').next()?.parse().ok()?;
    Some((field("release:")?.to_owned(), llvm))
}

/// `(major, minor)` out of `1.97.0-nightly`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// LLVM's major version out of `ldd`'s output, where it is a shared library.
fn parse_linked_llvm(ldd: &str) -> Option<u32> {
    let name = ldd.split_whitespace().find_map(|word| word.strip_prefix("libLLVM"))?;
    let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    digits.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_compilers_version() {
        let verbose = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\n\
                       release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(parse_rustc_version(verbose), Some(("1.97.0-nightly".to_owned(), 22)));
        assert_eq!(parse_version("1.97.0-nightly"), Some((1, 97)));
        assert_eq!(parse_rustc_version("garbage"), None);
        assert!(is_new_enough("1.96.0+dfsg1-1~deb12u2"));
        assert!(!is_new_enough("1.85.0+dfsg3-1~deb12u3"));
    }

    #[test]
    fn reads_the_linkers_llvm() {
        let shared = "\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x00007f)\n";
        assert_eq!(parse_linked_llvm(shared), Some(22));
        assert_eq!(parse_linked_llvm("\tlibLLVM-21.so => /usr/lib/libLLVM-21.so (0x0)\n"), Some(21));
        assert_eq!(parse_linked_llvm("\tlibc.so.6 => /lib/libc.so.6 (0x0)\n"), None);
    }
}

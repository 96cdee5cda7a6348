//! House rules that neither the compiler nor clippy can check.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{machine, process, ui};

/// Where `unsafe` may stand (this file speaks of it only).
const UNSAFE_ALLOWED: [&str; 8] = [
    "ebpf/",
    "agent/src/bpf",
    "agent/src/announce.rs",
    "agent/src/conflict.rs",
    "datapath/src/keys.rs",
    "tests/src/kernel.rs",
    "tests/src/bin/scale/counting.rs",
    "xtask/src/tidy.rs",
];
/// Text files that the rules read; others (pictures, generated locks) are not ours to format.
const TEXT: [&str; 10] = ["rs", "toml", "md", "sh", "yaml", "yml", "json", "txt", "conf", "run"];

/// Reads every file that git knows or would add.
pub(crate) fn run() -> Result<()> {
    let mut git = Command::new("git");
    // The checkout may belong to another user than root, who runs the tests.
    git.current_dir(machine::root()).args(["-c", "safe.directory=*"]);
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let listing = process::capture(&mut git).context("tidy reads the list of files from git")?;
    let mut problems = Vec::new();
    for path in listing.split('\0').filter(|path| is_text(path)) {
        let file = machine::root().join(path);
        if !file.exists() {
            continue; // deleted, not yet committed
        }
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {path}"))?;
        problems.extend(check_file(path, &text));
    }
    for problem in &problems {
        ui::note("tidy", problem);
    }
    if !problems.is_empty() {
        bail!("tidy found {} problem(s)", problems.len());
    }
    Ok(())
}

fn is_text(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    name != "Cargo.lock" && name.rsplit('.').next().is_some_and(|ending| TEXT.contains(&ending))
}

/// Everything wrong with one file, as `path:line: what`.
fn check_file(path: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let forbidden = forbidden_words();
    for (index, line) in text.lines().enumerate() {
        let mut report = |what: &str| problems.push(format!("{path}:{}: {what}", index + 1));
        if line.ends_with([' ', '\t']) {
            report("trailing white space");
        }
        for (word, why) in &forbidden {
            if line.contains(word.as_str()) {
                report(&format!("`{word}`: {why}"));
            }
        }
        if is_rust(path) && !UNSAFE_ALLOWED.iter().any(|place| path.starts_with(place)) && uses_unsafe(line) {
            report("unsafe code belongs in the places that xtask/src/tidy.rs lists");
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        problems.push(format!("{path}: no newline at the end"));
    }
    if is_rust(path) && !path.contains("/fixtures/") && !text.starts_with("//!") {
        problems.push(format!("{path}:1: a file begins with `//!` and says what it is for"));
    }
    if path == "datapath/Cargo.toml" && has_dependencies(text) {
        problems.push(format!("{path}: datapath has no dependencies but optional ones"));
    }
    problems
}

/// Put together here so that this file does not hold them.
fn forbidden_words() -> Vec<(String, &'static str)> {
    let outside = [["..", "/shared"].concat(), ["/work", "/"].concat()];
    let registries = [
        ["crates", ".io"],
        ["static.rust", "-lang.org"],
        ["deb.debian", ".org"],
        ["archive.ubuntu", ".com"],
        ["pypi", ".org"],
        ["registry.npmjs", ".org"],
        ["proxy.golang", ".org"],
    ];
    let outside = outside.into_iter().map(|word| (word, "nothing outside this repository is referred to"));
    let registries =
        registries.iter().map(|parts| (parts.concat(), "hosts of registries are each machine's own"));
    outside.chain(registries).collect()
}

fn is_rust(path: &str) -> bool {
    path.rsplit('.').next() == Some("rs")
}

/// Whether a line of Rust opens unsafe code. Comments, attributes and strings about it do not count.
fn uses_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or(line).trim_start();
    ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait", "unsafe("].iter().any(
        |opening| {
            code.match_indices(opening)
                .any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '"'))
        },
    )
}

/// Whether a manifest has a dependency that is always there.
fn has_dependencies(manifest: &str) -> bool {
    let mut inside = false;
    manifest.lines().map(str::trim).any(|line| {
        if line.starts_with('[') {
            inside = line == "[dependencies]" || line.starts_with("[dependencies.");
            return line.starts_with("[dependencies.");
        }
        inside && line.contains('=') && !line.starts_with('#') && !line.contains("optional = true")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_file_has_no_problems() {
        assert_eq!(check_file("agent/src/x.rs", "//! What.\n\nfn f() {}\n"), Vec::<String>::new());
    }

    #[test]
    fn each_rule_names_its_line() {
        let text = "fn f() { \n    unsafe { g() }\n}\n";
        let problems = check_file("agent/src/x.rs", text);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].starts_with("agent/src/x.rs:1: trailing"), "{problems:?}");
        assert!(problems[1].starts_with("agent/src/x.rs:2: unsafe"), "{problems:?}");
        assert!(check_file("README.md", "see crates.").len() == 1, "no newline");
        assert_eq!(check_file("README.md", &format!("at {}.{}\n", "crates", "io")).len(), 1);
    }

    #[test]
    fn unsafe_has_its_places_and_its_mentions() {
        assert_eq!(check_file("ebpf/src/ctx.rs", "//! C.\nunsafe fn f() {}\n"), Vec::<String>::new());
        assert!(!uses_unsafe("// unsafe { }"));
        assert!(!uses_unsafe("#![deny(unsafe_op_in_unsafe_fn)]"));
        assert!(!uses_unsafe("[\"unsafe {\"]"));
        assert!(uses_unsafe("let x = unsafe { y() };"));
        assert!(uses_unsafe("#[unsafe(no_mangle)]"));
    }

    #[test]
    fn datapath_may_have_optional_dependencies_only() {
        assert!(!has_dependencies(
            "[dependencies]\naya = { version = \"1\", optional = true }\n[lints]\na = 1\n"
        ));
        assert!(!has_dependencies("[dev-dependencies]\nproptest = \"1\"\n"));
        assert!(has_dependencies("[dependencies]\nlibc = \"1\"\n"));
        assert!(has_dependencies("[dependencies.libc]\nversion = \"1\"\n"));
    }
}

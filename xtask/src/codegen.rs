//! `codegen`: the files that are made from code, which are the CRDs in `deploy/crds`. The agent prints them (`outgate
//! crds`), from the same types that it reads objects with.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{build, machine, process, setup, ui};

/// Where the definitions are, from the repository's root.
const DIRECTORY: &str = "deploy/crds";
/// What to do when they differ.
const REMEDY: &str = "run `cargo xtask codegen` and commit deploy/crds";

/// `cargo xtask codegen`.
pub(crate) fn run() -> Result<()> {
    setup::ensure_build()?;
    build::ebpf()?; // the agent's build reads the object
    let directory = directory();
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let files = files(&definitions()?)?;
    for name in present()?.keys().filter(|name| !files.contains_key(*name)) {
        let path = directory.join(name);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    for (name, text) in &files {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    ui::note("codegen", &format!("{} files in {DIRECTORY}", files.len()));
    Ok(())
}

/// Whether the files are what the code says, on a checkout whose eBPF object is built.
pub(crate) fn check() -> Result<()> {
    match difference(&files(&definitions()?)?, &present()?) {
        Some(name) => bail!("{DIRECTORY}/{name} is not what the code says: {REMEDY}"),
        None => Ok(()),
    }
}

/// All definitions, one after another.
fn definitions() -> Result<String> {
    process::capture(
        process::cargo()
            .args(["run", "--quiet", "--package", "outgate", "--", "crds"])
            .env(build::OBJECT_VARIABLE, machine::bpf_object()?),
    )
    .context("the agent does not print its CRDs")
}

fn directory() -> PathBuf {
    machine::root().join(DIRECTORY)
}

/// The YAML files that are there, by name.
fn present() -> Result<BTreeMap<String, String>> {
    let directory = directory();
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "yaml")
            && let Some(name) = path.file_name().and_then(|n| n.to_str())
        {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.insert(name.to_owned(), text);
        }
    }
    Ok(files)
}

/// The files by name: one a definition, called `GROUP_PLURAL.yaml`, and the kustomization that lists them.
fn files(definitions: &str) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for document in definitions.split("---\n").filter(|d| !d.trim().is_empty()) {
        // The CRD's own name is PLURAL.GROUP.
        let (plural, group) = document
            .lines()
            .find_map(|line| line.strip_prefix("  name: ")?.split_once('.'))
            .context("a definition has no name")?;
        files.insert(format!("{group}_{plural}.yaml"), document.to_owned());
    }
    ensure!(!files.is_empty(), "the agent prints no CRDs");
    let head = "# Made by `cargo xtask codegen`.\n\
         # Apart from the rest, so that removing Outgate does not remove users' objects: they go with their definitions.\n\
         apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n";
    let resources: Vec<_> = files.keys().map(|name| format!("- {name}\n")).collect();
    files.insert("kustomization.yaml".to_owned(), format!("{head}{}", resources.concat()));
    Ok(files)
}

/// The first file that differs, is missing or is too much.
fn difference<'a>(
    wanted: &'a BTreeMap<String, String>,
    present: &'a BTreeMap<String, String>,
) -> Option<&'a String> {
    wanted.keys().chain(present.keys()).find(|name| wanted.get(*name) != present.get(*name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_definition_is_a_file_and_the_kustomization_lists_it() {
        let printed = "---\n# Head.\nmetadata:\n  name: as.x.dev\nspec: {}\n---\n# Head.\nmetadata:\n  name: bs.y.dev\n";
        let files = files(printed).unwrap();
        assert_eq!(
            files.keys().collect::<Vec<_>>(),
            ["kustomization.yaml", "x.dev_as.yaml", "y.dev_bs.yaml"]
        );
        assert_eq!(files["x.dev_as.yaml"], "# Head.\nmetadata:\n  name: as.x.dev\nspec: {}\n");
        assert!(files["kustomization.yaml"].ends_with("resources:\n- x.dev_as.yaml\n- y.dev_bs.yaml\n"));
        assert!(super::files("").is_err() && super::files("---\nkind: X\n").is_err());
    }

    #[test]
    fn what_differs_is_named() {
        let of = |files: &[(&str, &str)]| -> BTreeMap<String, String> {
            files.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect()
        };
        let wanted = of(&[("a", "1"), ("b", "2")]);
        assert_eq!(difference(&wanted, &wanted), None);
        for (present, name) in [
            (of(&[("a", "1")]), "b"),
            (of(&[("a", "1"), ("b", "3")]), "b"),
            (of(&[("a", "1"), ("b", "2"), ("c", "")]), "c"),
        ] {
            assert_eq!(difference(&wanted, &present).map(String::as_str), Some(name));
        }
    }
}

//! `setup`: finds or installs what a build and the tests need.
//!
//! It looks for programs and files, not for packages, so it is content with whatever put them there. What is
//! missing is installed with apt-get where that exists; elsewhere, or without root, it is listed. On a machine
//! that has everything it reads a few files and changes nothing.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{kube, machine, process, toolchain, ui};

/// One thing that must be on the machine, and who brings it.
struct Need {
    /// A program's name, or a file's absolute path.
    what: &'static str,
    /// Debian's and Ubuntu's package, the first that the distribution has.
    packages: &'static [&'static str],
    /// What for, shown when it cannot be installed.
    reason: &'static str,
}

const fn need(what: &'static str, packages: &'static [&'static str], reason: &'static str) -> Need {
    Need { what, packages, reason }
}

const NEEDS: &[Need] = &[
    need("cc", &["gcc"], "linking host programs"),
    need("git", &["git"], "lint's list of files"),
    need("ip", &["iproute2"], "the lab's namespaces and links"),
    need("sysctl", &["procps"], "the lab's kernel settings"),
    need("nsenter", &["util-linux"], "entering the lab's namespaces"),
    need("iptables", &["iptables"], "the CNI plugins' masquerade"),
    need("nft", &["nftables"], "netfilter as hosts have it"),
    need("/usr/lib/cni/bridge", &["containernetworking-plugins"], "pods' interfaces"),
    need("/usr/lib/cni/ptp", &["containernetworking-plugins"], "pods' interfaces"),
    need("/usr/lib/cni/host-local", &["containernetworking-plugins"], "pods' addresses"),
    need("bpftool", &["bpftool", "linux-tools-generic"], "looking at programs and maps"),
    need("nginx", &["nginx-light", "nginx"], "web servers outside"),
    need("iperf3", &["iperf3"], "bulk traffic"),
    need("dig", &["bind9-dnsutils"], "DNS questions"),
    need("dnsmasq", &["dnsmasq-base"], "DNS answers"),
    need("conntrack", &["conntrack"], "looking at the host's connections"),
    need("tcpdump", &["tcpdump"], "captures"),
    need("ping", &["iputils-ping"], "ICMP echo"),
    need("curl", &["curl"], "web clients"),
    need("ethtool", &["ethtool"], "links' offloads"),
    need("nc", &["netcat-openbsd"], "plain TCP and UDP"),
    need("jq", &["jq"], "reading JSON output"),
    need("python3", &["python3-minimal"], "packets as no kernel makes them"),
    need("arping", &["arping"], "ARP questions"),
    need("kubectl", &["kubernetes-client"], "the user's hand at the Kubernetes API"),
    need("openssl", &["openssl"], "the test API server's keys and certificates"),
];

/// For `image` only.
const IMAGE_NEEDS: &[Need] = &[
    need("buildah", &["buildah"], "container images"),
    need("strip", &["binutils"], "taking debug information out of the image's program"),
];

/// Debian's way to a compiler with the source of `core`.
const RUSTC_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
/// Services that come with the packages above, start on installation, and that nothing here wants.
const UNWANTED_SERVICES: [&str; 1] = ["nginx"];
const BPFFS: &str = "/sys/fs/bpf";
/// Built in or loaded on demand on most kernels; asked for so that the lab does not fail on the others.
const MODULES: [&str; 3] = ["vxlan", "veth", "bridge"];

/// Whether each found thing gets its line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Report {
    Everything,
    Changes,
}

/// `cargo xtask setup`.
pub(crate) fn run() -> Result<()> {
    setup(Report::Everything, &[test_tools, rust_components, bpf_toolchain, kube_server, kernel])
}

/// The same for `test`: silent about what is there.
pub(crate) fn ensure_tests() -> Result<()> {
    setup(Report::Changes, &[test_tools, rust_components, bpf_toolchain, kube_server, kernel])
}

/// The same for `demo` and `bench`, which need no Kubernetes.
pub(crate) fn ensure() -> Result<()> {
    setup(Report::Changes, &[test_tools, rust_components, bpf_toolchain, kernel])
}

/// Only what a build needs, for what is done without root.
pub(crate) fn ensure_build() -> Result<()> {
    setup(Report::Changes, &[rust_components, bpf_toolchain])
}

/// What a build and the image need.
pub(crate) fn ensure_image() -> Result<()> {
    setup(Report::Changes, &[rust_components, bpf_toolchain, image_tools])
}

/// One part of the setup; gives whether it changed the machine.
type Part = fn(Report, &mut Apt) -> Result<bool>;

/// Does every part, also after one has failed, so that all that is missing is told at once.
fn setup(report: Report, parts: &[Part]) -> Result<()> {
    let begun = Instant::now();
    let mut apt = Apt::new();
    let (mut changed, mut failed) = (false, false);
    for part in parts {
        match part(report, &mut apt) {
            Ok(this) => changed |= this,
            Err(error) => {
                ui::error(&error);
                failed = true;
            }
        }
    }
    if failed {
        bail!("setup is not complete: see above, then run `cargo xtask setup`");
    }
    let outcome = if changed { "done" } else { "nothing to do" };
    ui::note("setup", &format!("{outcome} ({})", ui::seconds(begun.elapsed())));
    Ok(())
}

fn ok(report: Report, what: &str) {
    if report == Report::Everything {
        ui::note("ok", what);
    }
}

/// What the tests run.
fn test_tools(report: Report, apt: &mut Apt) -> Result<bool> {
    programs(NEEDS, report, apt)
}

/// What `image` runs.
fn image_tools(report: Report, apt: &mut Apt) -> Result<bool> {
    programs(IMAGE_NEEDS, report, apt)
}

/// Programs that a package brings. All that is missing is installed in one go.
fn programs(needs: &'static [Need], report: Report, apt: &mut Apt) -> Result<bool> {
    let mut missing = Vec::new();
    for need in needs {
        match find(need.what) {
            Some(path) => ok(report, &format!("{} {}", name(need.what), path.display())),
            None => missing.push(need),
        }
    }
    if missing.is_empty() {
        return Ok(false);
    }
    let list = || {
        let lines = missing
            .iter()
            .map(|need| format!("\n  {} (Debian package {}): {}", need.what, need.packages[0], need.reason));
        lines.collect::<String>()
    };
    if let Err(why) = Apt::usable() {
        bail!("{why}; install these:{}", list());
    }
    let mut packages = Vec::new();
    for need in &missing {
        let Some(package) = apt.first_known(need.packages)? else {
            bail!(
                "apt knows no package {} for {}; install it by hand",
                need.packages.join(" or "),
                need.what
            );
        };
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    apt.install(&packages)?;
    if let Some(need) = missing.iter().find(|need| find(need.what).is_none()) {
        bail!("{} is still missing after installing {}", need.what, packages.join(" "));
    }
    Ok(true)
}

/// What lint needs of the host's Rust.
fn rust_components(report: Report, _: &mut Apt) -> Result<bool> {
    let mut changed = false;
    for (command, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let look = || process::capture(process::cargo().args([command, "--version"]));
        if look().is_err() {
            let Some(rustup) = machine::find_program("rustup") else {
                bail!("`cargo {command}` does not work: install Rust's component {component}");
            };
            let step = ui::Step::begin("install", component);
            process::run(Command::new(rustup).args(["component", "add", component]))?;
            step.done(component);
            changed = true;
        }
        ok(report, look()?.trim());
    }
    Ok(changed)
}

/// A compiler that can build `core` for the BPF target, and a linker that fits it.
fn bpf_toolchain(report: Report, apt: &mut Apt) -> Result<bool> {
    let mut changed = false;
    let rustc = if let Some(rustc) = toolchain::find_rustc() {
        rustc
    } else {
        install_rustc(apt)?;
        changed = true;
        toolchain::find_rustc().context("installed a compiler for the BPF target, and still find none")?
    };
    ok(report, &format!("rustc for BPF {} (LLVM {}) {}", rustc.version, rustc.llvm, rustc.path.display()));
    let linker = if let Some(linker) = toolchain::find_linker(rustc.llvm)? {
        linker
    } else {
        install_linker(apt, rustc.llvm)?;
        changed = true;
        toolchain::find_linker(rustc.llvm)?.context("installed bpf-linker, and still find none that fits")?
    };
    ok(report, &format!("bpf-linker {}", linker.display()));
    Ok(changed)
}

/// Debian's compiler where apt has one that is new enough, else rustup's nightly with its source component.
fn install_rustc(apt: &mut Apt) -> Result<()> {
    let by_hand = "install rustup's nightly with its source \
                   (`rustup toolchain install nightly --component rust-src`)";
    let apt_problem = match Apt::usable() {
        Ok(()) => {
            apt.update()?;
            match candidate(RUSTC_PACKAGES[0]) {
                Some(version) if toolchain::is_new_enough(&version) => return apt.install(&RUSTC_PACKAGES),
                Some(version) => format!("apt's {} is {version}, too old", RUSTC_PACKAGES[0]),
                None => format!("apt knows no {}", RUSTC_PACKAGES[0]),
            }
        }
        Err(why) => why,
    };
    let Some(rustup) = machine::find_program("rustup") else {
        bail!("no compiler with the source of `core` ({apt_problem}; no rustup); {by_hand}");
    };
    let step = ui::Step::begin("install", "rustup's nightly with rust-src");
    let args = ["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"];
    process::run(Command::new(rustup).args(args))
        .with_context(|| format!("no compiler with the source of `core` ({apt_problem}); {by_hand}"))?;
    step.done("rustup's nightly with rust-src");
    Ok(())
}

/// `bpf-linker` from source, against the distribution's LLVM, into [`machine::tools_dir`].
fn install_linker(apt: &mut Apt, llvm: u32) -> Result<()> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    let by_hand = format!(
        "install bpf-linker {} or newer, built with LLVM {llvm} or newer, on the PATH (its project releases ready \
         programs)",
        toolchain::BPF_LINKER
    );
    if !prefix.join("include/llvm-c/Core.h").exists() {
        let package = format!("llvm-{llvm}-dev");
        if let Err(why) = Apt::usable() {
            bail!("no bpf-linker, and no LLVM {llvm} to build it with: {why}; {by_hand}");
        }
        if apt.first_known(&[package.as_str()])?.is_none() {
            bail!("no bpf-linker, and apt knows no {package} to build it with; {by_hand}");
        }
        apt.install(&[&package, "g++"])?;
    }
    let step = ui::Step::begin("install", &format!("bpf-linker {} (about a minute)", toolchain::BPF_LINKER));
    let library = prefix.join("lib");
    let mut cargo = process::cargo();
    cargo
        .args(["install", "bpf-linker", "--locked", "--version", toolchain::BPF_LINKER])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
        .arg("--root")
        .arg(machine::tools_dir()?)
        .env("LLVM_PREFIX", &prefix)
        .env("LIBRARY_PATH", &library)
        .env("LD_LIBRARY_PATH", &library)
        .env("CARGO_TARGET_DIR", machine::tools_dir()?.join("build"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    process::run_showing(&mut cargo, |line| line.trim_start().starts_with("Compiling"))
        .with_context(|| format!("cannot build bpf-linker; {by_hand}"))?;
    // Some hundred megabytes that are never read again.
    let _ = fs::remove_dir_all(machine::tools_dir()?.join("build"));
    step.done(&format!("bpf-linker {}", toolchain::BPF_LINKER));
    Ok(())
}

/// The real API server that tests start.
fn kube_server(report: Report, apt: &mut Apt) -> Result<bool> {
    let show = |programs: &[PathBuf]| {
        for program in programs {
            let name = program.file_name().unwrap_or_default();
            ok(report, &format!("{} {}", name.display(), program.display()));
        }
    };
    if let Some(programs) = kube::find()? {
        show(&programs);
        return Ok(false);
    }
    if let Err(why) = Apt::usable() {
        return Err(kube::cannot_build(&why));
    }
    if machine::find_program("dpkg-source").is_none() {
        apt.install(&["dpkg-dev"])?;
    }
    kube::build()?;
    show(&kube::find()?.context("built kube-apiserver, and still find none")?);
    Ok(true)
}

/// What must be mounted or loaded in the running kernel.
fn kernel(report: Report, _: &mut Apt) -> Result<bool> {
    if machine::is_root() {
        for module in MODULES {
            // Fails where it is built in or modules cannot be loaded; then the lab says what is really missing.
            let _ = Command::new("modprobe").arg("-q").arg(module).output();
        }
    }
    if machine::is_mounted(BPFFS, "bpf") {
        ok(report, &format!("bpffs {BPFFS}"));
        return Ok(false);
    }
    if !machine::is_root() {
        // Building and the first rung of tests do without; the rungs that need it need root anyway.
        ui::note("missing", &format!("bpffs at {BPFFS}: run `mount -t bpf bpf {BPFFS}` as root"));
        return Ok(false);
    }
    process::run(Command::new("mount").args(["-t", "bpf", "bpf", BPFFS]))
        .with_context(|| format!("the kernel's BPF file system cannot be mounted at {BPFFS}"))?;
    ui::note("mount", &format!("bpffs {BPFFS}"));
    Ok(true)
}

fn find(what: &str) -> Option<PathBuf> {
    if what.starts_with('/') {
        let path = PathBuf::from(what);
        return machine::is_executable(&path).then_some(path);
    }
    machine::find_program(what)
}

fn name(what: &str) -> &str {
    what.rsplit('/').next().unwrap_or(what)
}

/// apt-get, asked for the distribution's lists once and only when something is to be installed.
struct Apt {
    updated: bool,
}

impl Apt {
    fn new() -> Self {
        Self { updated: false }
    }

    /// Whether packages can be installed here by this process; if not, why.
    fn usable() -> Result<(), String> {
        if machine::find_program("apt-get").is_none() {
            return Err("setup installs with apt-get only, which this machine has not".to_owned());
        }
        if !machine::is_root() {
            return Err("installing packages needs root".to_owned());
        }
        Ok(())
    }

    /// The first of the packages that can be installed.
    fn first_known<'a>(&mut self, packages: &[&'a str]) -> Result<Option<&'a str>> {
        self.update()?;
        Ok(packages.iter().find(|package| candidate(package).is_some()).copied())
    }

    /// A fresh container has no lists, an old one has versions that the mirror has dropped.
    fn update(&mut self) -> Result<()> {
        if !self.updated {
            let step = ui::Step::begin("install", "reading the distribution's package lists");
            process::run_showing(apt_get().arg("update"), |line| line.starts_with("Get:"))?;
            self.updated = true;
            step.done("package lists");
        }
        Ok(())
    }

    fn install(&mut self, packages: &[&str]) -> Result<()> {
        self.update()?;
        let step = ui::Step::begin("install", &packages.join(" "));
        let _quiet = ServiceGuard::new()?;
        process::run_showing(
            apt_get().args(["-y", "--no-install-recommends", "install"]).args(packages),
            |line| ["Get:", "Need to get", "Setting up"].iter().any(|start| line.starts_with(start)),
        )?;
        step.done(&packages.join(" "));
        Ok(())
    }
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.args(["-q", "-o", "Dpkg::Use-Pty=0"]).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command
}

/// The version of a package that apt would install.
fn candidate(package: &str) -> Option<String> {
    let policy = process::capture(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C"));
    parse_candidate(&policy.ok()?)
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"))?.trim();
    (version != "(none)").then(|| version.to_owned())
}

/// While it lives, packages that are installed start no services; afterwards none is left enabled.
///
/// Debian's way to say so is a program `policy-rc.d`; one that is there already is left in force.
struct ServiceGuard {
    policy: Option<&'static Path>,
    /// Services that were not on the machine before.
    absent: Vec<&'static str>,
}

impl ServiceGuard {
    fn new() -> Result<Self> {
        let absent = UNWANTED_SERVICES.into_iter().filter(|service| !is_service(service)).collect();
        let policy = Path::new("/usr/sbin/policy-rc.d");
        let ours = "#!/bin/sh\n# Outgate's setup: install packages without starting services.\nexit 101\n";
        // An interrupted setup leaves ours behind: taken over, and removed at the end of this one.
        if policy.exists() && !fs::read_to_string(policy).is_ok_and(|text| text == ours) {
            return Ok(Self { policy: None, absent });
        }
        fs::write(policy, ours)
            .and_then(|()| fs::set_permissions(policy, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot write {}", policy.display()))?;
        Ok(Self { policy: Some(policy), absent })
    }
}

impl Drop for ServiceGuard {
    fn drop(&mut self) {
        if let Some(policy) = self.policy
            && let Err(error) = fs::remove_file(policy)
        {
            ui::note("setup", &format!("cannot remove {}: {error}; remove it by hand", policy.display()));
        }
        for service in self.absent.iter().filter(|service| is_service(service)) {
            // Without this it would start with the machine's next boot.
            let _ = Command::new("update-rc.d").args([service, "disable"]).output();
            if Path::new("/run/systemd/system").exists() {
                let _ = Command::new("systemctl").args(["disable", "--now", service]).output();
            }
        }
    }
}

fn is_service(name: &str) -> bool {
    Path::new("/etc/init.d").join(name).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_apts_answer() {
        let known = "jq:\n  Installed: (none)\n  Candidate: 1.6-2.1\n  Version table:\n";
        assert_eq!(parse_candidate(known).as_deref(), Some("1.6-2.1"));
        assert_eq!(parse_candidate("jq:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }

    #[test]
    fn every_need_names_a_package_and_a_reason() {
        for need in NEEDS.iter().chain(IMAGE_NEEDS) {
            assert!(!need.packages.is_empty() && !need.reason.is_empty(), "{}", need.what);
        }
    }
}

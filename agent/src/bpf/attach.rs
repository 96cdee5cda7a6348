//! Attaches programs to interfaces by tcx links, pinned as `<program>@<ifindex>`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use datapath::keys::IfIndex;
use tracing::debug;

use super::Error;
use crate::facts::Facts;

/// A program and the hook it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Program {
    FromPod,
    ToPod,
    FromUplink,
    ToUplink,
    FromTunnel,
}

impl Program {
    const ALL: [Self; 5] = [Self::FromPod, Self::ToPod, Self::FromUplink, Self::ToUplink, Self::FromTunnel];

    const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::FromUplink => "from_uplink",
            Self::ToUplink => "to_uplink",
            Self::FromTunnel => "from_tunnel",
        }
    }

    const fn hook(self) -> TcAttachType {
        match self {
            Self::FromPod | Self::FromUplink | Self::FromTunnel => TcAttachType::Ingress,
            Self::ToPod | Self::ToUplink => TcAttachType::Egress,
        }
    }

    fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|program| program.name() == name)
    }
}

type Attachment = (Program, IfIndex);

/// The loaded programs and where they are attached.
pub(super) struct Programs {
    ebpf: Ebpf,
    dir: PathBuf,
    attached: BTreeSet<Attachment>,
}

impl Programs {
    /// Loads the programs and puts them into the pinned links of an earlier agent. Links whose interface is
    /// gone are unpinned.
    pub(super) fn new(mut ebpf: Ebpf, dir: &Path) -> Result<Self, Error> {
        for program in Program::ALL {
            classifier(&mut ebpf, program)?.load().map_err(|error| program_error(program, &error))?;
        }
        let mut programs = Self { ebpf, dir: dir.join("links"), attached: BTreeSet::new() };
        for (attachment, path) in pinned_links(&programs.dir)? {
            if programs.replace(attachment, &path)? {
                programs.attached.insert(attachment);
            } else {
                unpin(&path)?;
            }
        }
        Ok(programs)
    }

    /// The loaded object, for a program that is attached to no interface.
    pub(super) const fn object(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Attaches to what the facts ask for, detaches from what they no longer do.
    pub(super) fn attach(&mut self, facts: &Facts) -> Result<(), Error> {
        let wanted = wanted(facts);
        let gone: Vec<_> = self.attached.iter().filter(|a| !wanted.contains_key(a)).copied().collect();
        for attachment in gone {
            unpin(&self.pin(attachment))?;
            self.attached.remove(&attachment);
        }
        let mut first_error = None;
        for (attachment, interface) in wanted {
            if self.attached.contains(&attachment) {
                continue;
            }
            match self.attach_one(attachment, &interface) {
                Ok(()) => {
                    self.attached.insert(attachment);
                }
                // It went away meanwhile; netlink will say so.
                Err(Error::Attach { source, .. }) if is_no_device(&source) => {
                    debug!(interface, "gone before a program could be attached");
                }
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn attach_one(&mut self, attachment: Attachment, interface: &str) -> Result<(), Error> {
        let (program, _) = attachment;
        let path = self.pin(attachment);
        let failed = |source| Error::Attach { program: program.name(), interface: interface.into(), source };
        let classifier = classifier(&mut self.ebpf, program)?;
        // First in line: what a CNI's own program redirects, we would never see.
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = classifier.attach_with_options(interface, program.hook(), options).map_err(failed)?;
        let link = classifier.take_link(id).map_err(failed)?;
        let link = FdLink::try_from(link).map_err(|error| failed(link_error(error)))?;
        link.pin(&path).map_err(|error| Error::Pin {
            what: "pin a link at",
            path,
            source: std::io::Error::other(error),
        })?;
        Ok(())
    }

    /// Puts the loaded program into a pinned link. Returns false where the link's interface is gone.
    fn replace(&mut self, (program, _): Attachment, path: &Path) -> Result<bool, Error> {
        let failed = |error: ProgramError| program_error(program, &error);
        let pinned = PinnedLink::from_pin(path).map_err(|error| failed(link_error(error)))?;
        let link =
            SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(|error| failed(link_error(error)))?;
        let classifier = classifier(&mut self.ebpf, program)?;
        match classifier.attach_to_link(link) {
            Ok(id) => {
                // The pin keeps it; ours is only a handle.
                drop(classifier.take_link(id));
                Ok(true)
            }
            Err(error) if is_no_device(&error) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    fn pin(&self, (program, ifindex): Attachment) -> PathBuf {
        self.dir.join(format!("{}@{ifindex}", program.name()))
    }
}

/// Which programs belong where, with the interface's name.
fn wanted(facts: &Facts) -> BTreeMap<Attachment, String> {
    let pods = facts.pod_interfaces.iter().flat_map(|(index, i)| {
        [Program::FromPod, Program::ToPod].map(|program| ((program, *index), i.name.clone()))
    });
    let uplinks = facts.uplinks.iter().flat_map(|(index, i)| {
        [Program::FromUplink, Program::ToUplink].map(|program| ((program, *index), i.name.clone()))
    });
    let tunnel = (facts.tunnel_ifindex != 0)
        .then(|| ((Program::FromTunnel, facts.tunnel_ifindex), crate::netlink::TUNNEL.to_owned()));
    pods.chain(uplinks).chain(tunnel).collect()
}

/// The links pinned in a directory.
fn pinned_links(dir: &Path) -> Result<Vec<(Attachment, PathBuf)>, Error> {
    let failed = |source| Error::Pin { what: "read", path: dir.to_path_buf(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some((program, ifindex)) = name.split_once('@')
            && let (Some(program), Ok(ifindex)) = (Program::by_name(program), ifindex.parse())
        {
            found.push(((program, ifindex), path));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes a pin, and with it the link.
pub(super) fn unpin(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => {
            Err(Error::Pin { what: "remove", path: path.to_path_buf(), source })
        }
        _ => Ok(()),
    }
}

fn classifier(ebpf: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier, Error> {
    let name = program.name();
    let found =
        ebpf.program_mut(name).ok_or_else(|| Error::Program { name, reason: "not in the object".into() })?;
    found.try_into().map_err(|error: ProgramError| program_error(program, &error))
}

fn program_error(program: Program, error: &ProgramError) -> Error {
    Error::Program { name: program.name(), reason: super::object::one_line(error) }
}

/// Whether an error says that the interface, or a link's interface, is gone.
#[expect(clippy::wildcard_enum_match_arm, reason = "aya's errors are many")]
fn is_no_device(error: &ProgramError) -> bool {
    const ENODEV: i32 = 19;
    const ENOLINK: i32 = 67;
    let io = match error {
        ProgramError::SyscallError(error) => Some(&error.io_error),
        ProgramError::TcError(aya::programs::tc::TcError::IoError(error)) => Some(error),
        _ => None,
    };
    io.is_some_and(|e| matches!(e.raw_os_error(), Some(ENODEV | ENOLINK)))
}

fn link_error(error: LinkError) -> ProgramError {
    match error {
        LinkError::SyscallError(error) => ProgramError::SyscallError(error),
        LinkError::InvalidLink => ProgramError::IOError(std::io::Error::other("not a tcx link")),
        error @ LinkError::UnknownLinkType(_) => ProgramError::IOError(std::io::Error::other(error)),
    }
}

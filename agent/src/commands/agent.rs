//! `outgate agent`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::Context as _;
use datapath::addr::Ip;
use datapath::keys::{EgressId, IfIndex, PodId};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::known::wait_for;
use crate::agent::{Agent, Identity, Kernel, random};
use crate::announce::Announcer;
use crate::bpf::{self, Datapath};
use crate::cli::{AgentArgs, SourceArg};
use crate::compile::proxies;
use crate::conflict::Conflicts;
use crate::conntrack::{self, Conntrack};
use crate::facts::Facts;
use crate::firewall::audit;
use crate::image::MapImage;
use crate::names::Names;
use crate::names::resolv_conf::ResolvConf;
use crate::netlink;
use crate::notrack::Notrack;
use crate::ports::Use;
use crate::told::Told;
use crate::watch::Problem;
use crate::watch::dir::DirSource;
use crate::watch::kube::{KubeSource, Role};
use crate::{cni, metrics};

pub(super) fn run(args: AgentArgs) -> anyhow::Result<()> {
    super::log(&args.log)?;
    super::block_on(agent(args))
}

/// Nothing is logged before all that can fail at the start has not: a failure is one line.
async fn agent(args: AgentArgs) -> anyhow::Result<()> {
    // The signals first, so that one that comes early is not lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Datapath::check_host(&args.bpffs.bpffs)?;
    let mut source = open(&args).await?;
    let state = Rc::new(RefCell::new(metrics::State::starting()));
    let mut told = Told::default();
    tokio::select! {
        looked = look(&mut source, &args, &state, &mut told) => looked?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    let mut datapath = Datapath::open(&args.bpffs.bpffs)?;
    let names_door = datapath.names()?;
    let cgroup = args.pod_cgroup.clone().or_else(bpf::guard::find);
    let guarded = cgroup.as_ref().map_or(Ok(()), |cgroup| datapath.guard(cgroup));
    if args.pod_cgroup.is_some() {
        guarded.as_ref().map_err(|error| anyhow::Error::msg(error.to_string()))?;
    }
    let selection =
        netlink::Selection { uplinks: args.uplinks.clone(), pod_interfaces: args.pod_interfaces.clone() };
    let (facts, fresh) = netlink::watch(selection).await?;
    if let Some(address) = args.metrics {
        serve_metrics(address, &bpf::pin_dir(&args.bpffs.bpffs), &state).await?;
    }
    tokio::task::spawn_local(audit::run(bpf::pin_dir(&args.bpffs.bpffs), Rc::clone(&state)));
    let asked = args.cni_socket.as_deref().unwrap_or(Path::new(cni::door::SOCKET));
    let door = cni::Door::open(asked, fresh);
    if args.cni_socket.is_some() {
        door.as_ref().map_err(|error| anyhow::Error::msg(error.to_string()))?;
    }
    info!(
        "outgate {} on node {}, objects from {}",
        env!("CARGO_PKG_VERSION"),
        args.node,
        match (&source, &args.source.source) {
            (Opened::Kube(source), _) => source.describe(),
            (Opened::Dir(_), SourceArg::Dir(path)) => path.display().to_string(),
            (Opened::Dir(_), SourceArg::Kube) => String::new(),
        }
    );
    match (&cgroup, guarded) {
        (Some(cgroup), Ok(())) => info!("pods not known yet are held in cgroup {}", cgroup.display()),
        (None, _) => info!("no kubepods cgroup is seen here; --pod-cgroup can name one"),
        (_, Err(error)) => warn!("{error}; pods that start while no agent runs are held at the uplinks only"),
    }
    if let Err(error) = &door {
        warn!("{error}; a chained outgate-cni refuses pods until it can be served");
    }
    let runtime = cni::Runtime { cache: Some(cni::Cache::open(&args.cni_results)), door: door.ok() };
    let conflicts = Conflicts::new(Rc::clone(&state));
    let names = bpf::maps::LearntNames::open(&bpf::pin_dir(&args.bpffs.bpffs))?;
    let conntrack = Conntrack::new(datapath.recovered(), Box::new(names));
    let ruled = conntrack::ruled(datapath.recovered());
    let resolv_conf = ResolvConf::open(&args.resolv_conf);
    // What is in force is learnt from the first moment on, not from the first change.
    let lookups = Names::start(names_door, random());
    lookups.update(datapath.recovered(), &BTreeSet::new(), resolv_conf.nameservers());
    let kernel = NodeKernel {
        dir: bpf::pin_dir(&args.bpffs.bpffs),
        datapath,
        announcer: Announcer::default(),
        conntrack,
        ruled,
        notrack: Notrack::default(),
        conflicts,
        lookups,
    };
    let identity = Identity { node: args.node, boot_id: boot_id()? };
    let work = async {
        match source {
            Opened::Dir(source) => Agent::new(identity, *source, kernel, facts, resolv_conf, state)
                .with_runtime(runtime)
                .run()
                .await
                .map_err(anyhow::Error::from),
            Opened::Kube(mut source) => {
                wait_for(&mut source, &state, &mut told).await?;
                if !args.adopt.adopt {
                    source.refuse_ovn()?;
                }
                Agent::new(identity, *source, kernel, facts, resolv_conf, state)
                    .with_runtime(runtime)
                    .with_told(told)
                    .run()
                    .await
                    .map_err(anyhow::Error::from)
            }
        }
    };
    let ended = tokio::select! {
        ended = work => ended,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    if ended.is_ok() {
        info!("the agent ends; programs and maps stay, traffic goes on");
    }
    ended
}

async fn serve_metrics(
    address: SocketAddr,
    dir: &Path,
    state: &Rc<RefCell<metrics::State>>,
) -> anyhow::Result<()> {
    let listener = metrics::listen(address).await.map_err(anyhow::Error::msg)?;
    let dir = dir.to_owned();
    let firewalls = bpf::firewall_counts::Reader::new(&dir);
    let read = move || {
        Ok(metrics::Counters {
            drops: bpf::maps::drops(&dir)?,
            firewalls: firewalls.read()?,
            names: bpf::firewall_counts::name_events(&dir)?,
        })
    };
    let read = Rc::new(move || read().map_err(|e: bpf::Error| e.to_string()));
    tokio::task::spawn_local(metrics::serve(listener, Rc::clone(state), read));
    Ok(())
}

/// A source that is open.
enum Opened {
    Dir(Box<DirSource>),
    Kube(Box<KubeSource>),
}

async fn open(args: &AgentArgs) -> anyhow::Result<Opened> {
    let s = &args.source;
    Ok(match &s.source {
        SourceArg::Dir(path) => Opened::Dir(Box::new(DirSource::open(path)?)),
        SourceArg::Kube => {
            let role = Role::Agent { node: args.node.clone() };
            Opened::Kube(Box::new(KubeSource::open(role, s.kubeconfig.as_deref(), &s.namespace).await?))
        }
    })
}

/// Looks whether the cluster is another's, where nothing of outgate is in the kernel yet: nothing may come to be then.
async fn look(
    source: &mut Opened,
    args: &AgentArgs,
    state: &Rc<RefCell<metrics::State>>,
    told: &mut Told,
) -> anyhow::Result<()> {
    let Opened::Kube(source) = source else { return Ok(()) };
    if args.adopt.adopt || bpf::pin_dir(&args.bpffs.bpffs).exists() {
        return Ok(());
    }
    wait_for(source, state, told).await?;
    Ok(source.refuse_ovn()?)
}

fn boot_id() -> anyhow::Result<String> {
    let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// The kernel of this node.
struct NodeKernel {
    /// Where the maps are pinned.
    dir: PathBuf,
    datapath: Datapath,
    announcer: Announcer,
    conntrack: Conntrack,
    /// The version of its firewall that each pod is under.
    ruled: conntrack::Ruled,
    notrack: Notrack,
    conflicts: Conflicts,
    lookups: Names,
}

impl Kernel for NodeKernel {
    type Error = bpf::Error;

    fn recovered(&self) -> &MapImage {
        self.datapath.recovered()
    }

    fn gone(&self, interfaces: impl Iterator<Item = IfIndex>) -> BTreeSet<IfIndex> {
        netlink::gone(interfaces)
    }

    async fn ensure_tunnel(&mut self, port: u16) -> Result<(), String> {
        netlink::ensure_tunnel(port).await.map_err(|e| e.to_string())?;
        self.notrack.set(port);
        Ok(())
    }

    fn apply(&mut self, image: &MapImage, facts: &Facts) -> Result<Option<String>, bpf::Error> {
        let known: BTreeSet<PodId> = self.datapath.recovered().pods.values().map(|pod| pod.id).collect();
        self.announcer.retract(image, facts);
        let unattached = match self.datapath.apply(image, facts) {
            Ok(()) => None,
            Err(error) if matches!(error, bpf::Error::Map { .. } | bpf::Error::MapFull { .. }) => {
                return Err(error);
            }
            // Maps are written even if an interface cannot be attached to.
            Err(error) => Some(error.to_string()),
        };
        // What is denied now ends now, and not with its next packet. Pods that are new have no flows.
        let ruled = conntrack::ruled(image);
        let other = |(ip, now): (&Ip, &(PodId, _))| known.contains(&now.0) && self.ruled.get(ip) != Some(now);
        if ruled.iter().any(other)
            && let Err(error) = self.datapath.sweep()
        {
            warn!(
                "cannot end flows that firewalls deny now: {error}; their packets are dropped all the same"
            );
        }
        self.ruled = ruled;
        self.conntrack.update(image);
        self.announcer.announce(image, facts);
        self.conflicts.update(image);
        Ok(unattached)
    }

    fn learn(&mut self, image: &MapImage, resolvers: &BTreeSet<IpAddr>, nameservers: &[IpAddr]) {
        self.lookups.update(image, resolvers, nameservers);
    }

    fn has_news(&mut self) -> bool {
        self.lookups.take_news()
    }

    fn problems(&self) -> BTreeSet<Problem> {
        self.lookups.problems()
    }

    async fn settle(&mut self, image: &MapImage, facts: &Facts) -> Result<(), String> {
        let wanted = proxies(image, facts, netlink::proxies::are_answered);
        netlink::proxies::set(&wanted, &facts.proxies).await.map_err(|e| e.to_string())
    }

    fn retire(&mut self) -> Result<(), bpf::Error> {
        self.datapath.retire()
    }

    fn sweep(&mut self) -> Result<(usize, usize), bpf::Error> {
        self.notrack.keep();
        let swept = self.datapath.sweep()?;
        Ok((swept.removed as usize, swept.left as usize))
    }

    fn ports_used(&mut self) -> Result<BTreeMap<EgressId, Use>, bpf::Error> {
        bpf::ports::used(&self.dir)
    }

    fn exhausted(&mut self) -> Result<BTreeSet<EgressId>, bpf::Error> {
        bpf::ports::exhausted(&self.dir)
    }
}

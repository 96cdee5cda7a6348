//! Desired state and the node's facts to the content of every policy map. A pure function: it reads neither
//! clock nor kernel, so the same input gives the same image.
//!
//! Only what this node needs is in it: its own pods, the EgressIP objects that they use or whose addresses it
//! may hold, and all nodes and networks of the cluster. What exceeds a map's capacity is left out and named,
//! in a way that drops packets rather than lets them out.

mod firewalls;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use datapath::addr::Ip;
use datapath::keys::{
    Delivery, DeliveryMode, EgressIp, FirewallId, GranuleRange, GranuleTable, Guard, IfIndex, Interface,
    InterfaceKind, Lease, Network, NetworkKey, NetworkKind, Node, NodeId, Pod, PodName, Policy, PolicyId,
    Settings,
};
use datapath::limits;
use ipnet::IpNet;

use crate::facts::{Facts, PodInterface};
use crate::firewall::FirewallState;
use crate::ids::{Ids, identity};
use crate::image::MapImage;
use crate::model::{self, Desired};
use crate::names::resolvers::resolvers;
use crate::pins::{HELD, Place, Sight};
use crate::watch::Problem;

/// A map image, and what goes with it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Compiled {
    /// The image.
    pub image: MapImage,
    /// Allocations whose whole port table is in it, for the node's EgressNode to confirm once it is applied:
    /// address to the allocation's UID and generation.
    pub loaded: BTreeMap<IpAddr, (String, u64)>,
    /// What it makes of the firewalls of namespaces that have pods on this node, by namespace.
    pub firewalls: BTreeMap<String, FirewallState>,
    /// Whether a firewall found no room that there may be once what stands now is gone: to be compiled again.
    pub waits: bool,
    /// What is left out of it, and why.
    pub problems: BTreeSet<Problem>,
}

/// Compiles a node's map image.
#[must_use]
pub fn compile(desired: &Desired, facts: &Facts, ids: &mut Ids) -> Compiled {
    let mut c = Compiler {
        desired,
        facts,
        ids,
        out: Compiled::default(),
        node_ids: BTreeMap::new(),
        policies: BTreeMap::new(),
        firewalls: BTreeMap::new(),
    };
    c.nodes();
    c.networks();
    c.resolvers();
    c.egress_ips();
    c.firewalls();
    c.pods();
    c.check_pod_networks();
    c.interfaces();
    c.settings();
    c.ids.forget_others(&c.out.image);
    c.out
}

/// The uplink whose network contains an address: the longest prefix, then the lowest index. If none does and
/// routers send the address to the nodes, the uplink of the default route of its family.
#[must_use]
pub fn uplink_for(config: &model::Config, facts: &Facts, ip: &IpAddr) -> Option<IfIndex> {
    facts
        .uplinks
        .iter()
        .filter_map(|(index, uplink)| Some((uplink.prefix_of(ip)?, *index)))
        .max_by_key(|(prefix, index)| (*prefix, std::cmp::Reverse(*index)))
        .map(|(_, index)| index)
        .or_else(|| facts.default_uplink(ip).filter(|_| config.is_routed(ip)))
}

/// The IPv6 proxy-neighbour entries that an image wants: each egress address that this node holds or may come
/// to hold, on the uplink whose network contains it, so that the solicitations for it arrive from the first
/// moment on. Where the node answers for proxy neighbours itself (`answering`: `proxy_ndp` is on), only those
/// that it holds, or it would answer for other nodes'.
#[must_use]
pub fn proxies(
    image: &MapImage,
    facts: &Facts,
    answering: impl Fn(&str) -> bool,
) -> BTreeSet<(IfIndex, Ipv6Addr)> {
    let node = image.settings.node;
    image
        .egress_ips
        .values()
        .filter_map(|egress| {
            let IpAddr::V6(ip) = IpAddr::from(egress.ip) else { return None };
            let uplink = facts.uplinks.get(&egress.uplink)?;
            uplink.prefix_of(&ip.into())?;
            let held = node != 0 && egress.holder == node;
            (held || !answering(&uplink.name)).then_some((egress.uplink, ip))
        })
        .collect()
}

struct Compiler<'a> {
    desired: &'a Desired,
    facts: &'a Facts,
    ids: &'a mut Ids,
    out: Compiled,
    /// Nodes that are in `NODES`, by name.
    node_ids: BTreeMap<String, NodeId>,
    /// EgressIP objects that are in `POLICIES`, by name.
    policies: BTreeMap<String, PolicyId>,
    /// Places of firewalls, by namespace; none: there was no room for one.
    firewalls: BTreeMap<String, Option<FirewallId>>,
}

impl Compiler<'_> {
    fn problem(&mut self, about: impl std::fmt::Display, message: impl std::fmt::Display) {
        self.out.problems.insert(Problem::new(about, message));
    }

    /// `NODES` and `NODE_ADDRS`: every node whose agent says where its tunnel ends, in the family that all use.
    /// Packets are taken from a node's address of the other family too: while the family changes, some nodes
    /// send by the old one still.
    fn nodes(&mut self) {
        let desired = self.desired;
        let v6 = desired.tunnel_over_v6();
        let mut by_address: BTreeMap<Ip, &String> = BTreeMap::new();
        let mut nodes = Vec::new();
        // This node first: without itself it can do nothing.
        let own = desired.nodes.get_key_value(&desired.node);
        let others = desired.nodes.iter().filter(|(name, _)| **name != desired.node);
        for (name, node) in own.into_iter().chain(others) {
            let Some(agent) = node.agent.as_ref().filter(|a| !a.tunnel_addresses.is_empty()) else {
                continue;
            };
            let Some(address) = agent.tunnel_address(v6) else {
                let (has, all) = if v6 { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
                self.problem(
                    format_args!("Node {name}"),
                    format_args!("its tunnel address is {has} only, the nodes' tunnel runs over {all}; it gets no tunnel"),
                );
                continue;
            };
            if nodes.len() >= capacity(limits::NODES) {
                self.problem(format_args!("Node {name}"), over("NODES", limits::NODES));
                continue;
            }
            if let Some(first) = by_address.get(&address.into()) {
                let message =
                    format!("its tunnel address {address} is also node {first}'s; it gets no tunnel");
                self.problem(format_args!("Node {name}"), message);
                continue;
            }
            by_address.insert(address.into(), name);
            nodes.push((name, Ip::from(address), agent.tunnel_address(!v6).map(Ip::from)));
        }
        // Second addresses after all first ones: they must not take a place, nor an address, from those.
        let mut room = capacity(limits::NODES) - nodes.len();
        for (name, _, second) in &mut nodes {
            *second = second.filter(|ip| room > 0 && !by_address.contains_key(ip));
            if let Some(ip) = second {
                by_address.insert(*ip, name);
                room -= 1;
            }
        }
        let addresses: Vec<Vec<Ip>> =
            nodes.iter().map(|(_, first, second)| [*first].into_iter().chain(*second).collect()).collect();
        let ids = self.ids.nodes(&addresses);
        for (((name, tunnel_ip, _), addresses), id) in nodes.into_iter().zip(addresses).zip(ids) {
            if let Some(id) = id {
                self.out.image.nodes.insert(id, Node { tunnel_ip });
                self.out.image.node_addrs.extend(addresses.into_iter().map(|ip| (ip, id)));
                self.node_ids.insert(name.clone(), id);
            }
        }
    }

    /// `NETWORKS`.
    fn networks(&mut self) {
        let config = &self.desired.config;
        let nodes = self.desired.nodes.values();
        let pods = config.cluster_networks.iter().chain(nodes.clone().flat_map(|n| &n.pod_networks));
        // An egress IP is never taken for a node, or its answers would be. The model refuses such addresses;
        // this is the second lock.
        let egress = self.desired.addresses();
        let outside = |a: &IpAddr| !egress.contains_key(a);
        let addresses = nodes.flat_map(model::Node::addresses).filter(outside).map(IpNet::from);
        // What is on one of its interfaces; an address that the Node has elsewhere is reached by an uplink.
        let own = self.facts.addresses.iter().copied().filter(outside).map(IpNet::from);
        let all: Vec<_> = pods
            .copied()
            .map(|n| (n, NetworkKind::Pods))
            .chain(config.service_networks.iter().copied().map(|n| (n, NetworkKind::Services)))
            .chain(addresses.map(|n| (n, NetworkKind::Node)))
            .chain(own.map(|n| (n, NetworkKind::OwnNode)))
            .collect();
        for (network, kind) in all {
            let networks = &mut self.out.image.networks;
            let key = network_key(&network);
            if networks.len() >= capacity(limits::NETWORKS) && !networks.contains_key(&key) {
                self.problem(format_args!("network {network}"), over("NETWORKS", limits::NETWORKS));
            } else {
                networks.insert(key, Network { kind: kind as u32 });
            }
        }
    }

    /// `RESOLVERS`.
    fn resolvers(&mut self) {
        let (resolvers, left_out) = resolvers(self.desired, self.facts, &self.facts.nameservers);
        self.out.image.resolvers = resolvers;
        if left_out > 0 {
            let message = over("RESOLVERS", limits::RESOLVERS);
            self.problem(format_args!("{left_out} addresses of resolvers and nodes"), message);
        }
    }

    /// `POLICIES`, `EGRESS_IPS`, `EGRESS_ADDRS`, `GRANULES` and `LEASES`.
    fn egress_ips(&mut self) {
        let used: BTreeSet<_> = self.desired.pods.values().filter_map(|p| p.egress_ip.as_ref()).collect();
        let node = self.desired.nodes.get(&self.desired.node);
        let assignable = node.is_some_and(|n| n.assignable);
        for e in self.desired.by_age() {
            let uplinks: Vec<_> = e
                .addresses
                .iter()
                .map(|ip| {
                    let holds =
                        self.allocation(ip).is_some_and(|a| a.owner.as_ref() == Some(&self.desired.node));
                    uplink_for(&self.desired.config, self.facts, ip)
                        .filter(|_| assignable || holds)
                        .unwrap_or(0)
                })
                .collect();
            let is_used = used.contains(&e.name);
            if !is_used && uplinks.iter().all(|u| *u == 0) {
                continue;
            }
            let image = &self.out.image;
            let refused = if image.policies.len() >= capacity(limits::POLICIES) {
                Some(over("POLICIES", limits::POLICIES))
            } else if image.egress_ips.len() + e.addresses.len() > capacity(limits::EGRESS_IPS) {
                Some(over("EGRESS_IPS", limits::EGRESS_IPS))
            } else {
                None
            };
            if let Some(message) = refused {
                self.problem(format_args!("EgressIP {}", e.name), message);
                continue;
            }
            let identity = identity(&[&e.name, &e.uid]);
            let id = self.ids.policy(identity);
            let mut policy = Policy { identity, ..Policy::default() };
            for (ip, uplink) in e.addresses.iter().zip(uplinks) {
                let egress = self.egress_ip(id, *ip, uplink, is_used);
                // The model lets no object have more addresses.
                if let Some(slot) = policy.egress.get_mut(policy.len as usize) {
                    *slot = egress;
                    policy.len += 1;
                }
            }
            self.out.image.policies.insert(id, policy);
            self.policies.insert(e.name.clone(), id);
        }
    }

    fn egress_ip(&mut self, policy: PolicyId, ip: IpAddr, uplink: IfIndex, used: bool) -> u32 {
        let key = Ip::from(ip);
        let id = self.ids.egress(policy, key);
        let desired = self.desired;
        let own = &desired.node;
        let gateway = uplink != 0;
        // Whoever has the port table goes by the allocation: claiming an address by anything older than that would be
        // wrong. Others know it only by what they are granted.
        let known = desired.allocations.get(&ip);
        let allocation = known.filter(|a| gateway || a.owner.as_ref() == Some(own));
        let grant = desired.grant(&ip);
        let owner = match (allocation, grant) {
            (Some(a), _) => a.owner.as_ref(),
            (None, Some(g)) => g.owner.as_ref().filter(|owner| *owner != own),
            (None, None) => None,
        };
        let holder = owner.and_then(|n| self.node_ids.get(n)).copied().unwrap_or(0);
        let uplink_mtu = self.facts.uplinks.get(&uplink).map_or(0, |u| clamp(u.mtu));
        self.out
            .image
            .egress_ips
            .insert(id, EgressIp { ip: key, policy, uplink, holder, uplink_mtu, pad: 0 });
        self.out.image.egress_addrs.insert(key, id);
        let mut table = GranuleTable::default();
        if let Some(a) = known.filter(|_| gateway) {
            for lease in &a.leases {
                let node = self.lessee(lease);
                for range in &lease.ranges {
                    fill(&mut table, *range, |_| node);
                }
            }
            let generation = self.complete_up_to(a);
            self.out.loaded.insert(ip, (a.uid.clone(), generation));
        }
        // Of the address as it was given up, and taken again since, nothing is granted any more.
        let grant = grant.filter(|g| allocation.is_none_or(|a| a.uid == g.uid));
        if used && let Some(grant) = grant {
            let lease = self.own_lease(&ip, grant, owner, &table);
            if lease.granules > 0 {
                self.out.image.leases.insert(id, lease);
            }
            // Replies to what goes by ports that are not taken any more have to be known as this node's, and an
            // allocation that is older than the grant may lack some.
            let node = self.node_ids.get(own).copied().unwrap_or(0);
            for granted in &grant.ranges {
                fill(&mut table, granted.range, |before| if before == 0 { node } else { before });
            }
        }
        if gateway || used {
            self.out.image.granules.insert(id, Arc::new(table));
        }
        id
    }

    fn allocation(&self, ip: &IpAddr) -> Option<&model::Allocation> {
        self.desired.allocations.get(ip).map(|a| &**a)
    }

    /// The id of the node that a lease is for; 0 if that very node is not there any more, or not known yet.
    fn lessee(&self, lease: &model::Lease) -> NodeId {
        match self.node_ids.get(lease.node.as_str()) {
            Some(id) if self.knows(lease) => *id,
            _ => 0,
        }
    }

    /// Whether the agent of the very node that a lease is for is known.
    fn knows(&self, lease: &model::Lease) -> bool {
        let agent = self.desired.nodes.get(lease.node.as_str()).and_then(|n| n.agent.as_ref());
        agent.is_some_and(|a| a.node_uid == lease.node_uid)
    }

    /// The generation of an allocation up to which its leases are in this node's table. Objects are read apart: a
    /// lease may be known before the node that it is for, and until both are, nobody may be told that it is loaded.
    /// The leases of a node that is gone wait for the leader to end them.
    fn complete_up_to(&self, a: &model::Allocation) -> u64 {
        let unknown = a.leases.iter().filter(|l| !self.knows(l)).map(|l| l.generation).min();
        unknown.map_or(a.generation, |generation| generation.saturating_sub(1))
    }

    /// The ports that this node may take now: those granted, which whom the leader named has. Where this node sends by
    /// another, because it knows the allocation and is ahead of or behind the leader's word, those that the other is known
    /// to have; if by itself, those of its own table. If nobody holds the address, nothing leaves anyway, and `NoOwner`
    /// is the reason to be seen.
    fn own_lease(
        &self,
        ip: &IpAddr,
        grant: &model::Grant,
        owner: Option<&String>,
        table: &GranuleTable,
    ) -> Lease {
        let own = &self.desired.node;
        let node = self.node_ids.get(own).copied().unwrap_or(0);
        let loaded = owner
            .and_then(|o| self.desired.nodes.get(o)?.agent.as_ref()?.loaded.get(ip))
            .filter(|(uid, _)| *uid == grant.uid)
            .map(|(_, generation)| *generation);
        let mut granules: Vec<_> = grant
            .ranges
            .iter()
            .filter(|r| !r.stopped)
            .filter(|r| match owner {
                None => true,
                Some(o) if o == own || grant.owner.as_ref() == Some(o) => true,
                Some(_) => loaded.is_some_and(|generation| generation >= r.generation),
            })
            .flat_map(|r| r.range.first..r.range.first + r.range.count)
            .filter(|g| owner != Some(own) || (node != 0 && table.node[usize::from(*g)] == node))
            .map(|first| GranuleRange { first, count: 1 })
            .collect();
        granules.sort_unstable();
        Lease::of(&granules)
    }

    /// `PODS`, `DELIVERY` and `POD_NAMES`.
    fn pods(&mut self) {
        // Those first that are our business, should there be too many.
        let mut pods: Vec<_> = self.desired.pods.iter().collect();
        pods.sort_by_key(|((n, _), p)| (p.egress_ip.is_none(), !self.firewalls.contains_key(n)));
        for ((namespace, name), pod) in pods {
            let Some(firewall) = self.firewalls.get(namespace).map_or(Some(0), |place| *place) else {
                self.problem(
                    format_args!("Pod {namespace}/{name}"),
                    "held: its namespace's EgressFirewall is not in force on this node",
                );
                continue;
            };
            let mut policy = 0;
            if let Some(e) = &pod.egress_ip {
                let Some(id) = self.policies.get(e) else {
                    // There was no room for the object: its pods are held, as unknown ones are.
                    self.problem(
                        format_args!("Pod {namespace}/{name}"),
                        format_args!("held: its EgressIP {e} is not in force on this node"),
                    );
                    continue;
                };
                policy = *id;
            }
            let identity = identity(&[namespace, name, &pod.uid]);
            for ip in &pod.addresses {
                if self.out.image.pods.len() >= capacity(limits::PODS) {
                    self.problem(format_args!("Pod {namespace}/{name}"), over("PODS", limits::PODS));
                    break;
                }
                let key = Ip::from(*ip);
                let named = self.named(pod);
                let seen = self.seen_behind(ip).or(named);
                if self.is_elses(pod, seen) {
                    continue;
                }
                let id = self.ids.pod(key, identity);
                if let Some(interface) = named.filter(|_| pod.asked) {
                    self.ids.pins.vouch(key, identity, interface);
                }
                let bridged = !self.facts.host_routes.contains_key(ip)
                    && longest(&self.facts.bridge_networks, ip).is_some();
                let sight = Sight { interface: seen, bridged, version: pod.version, ends: pod.ends };
                let facts = self.facts;
                let place = self.ids.pins.place(key, identity, sight, |index| facts.has(index));
                let (ifindex, mode, device) = match place {
                    Place::Held(first) => (first, HELD, 0),
                    Place::Unknown | Place::At(_) => {
                        let (ifindex, mode, device) = self.interface_of(ip, place);
                        (ifindex, mode as u8, device)
                    }
                };
                if let (Place::Held(_), Some(interface)) =
                    (place, seen.and_then(|i| facts.pod_interfaces.get(&i)))
                {
                    self.problem(
                        format_args!("Pod {namespace}/{name}"),
                        format_args!(
                            "held: its interface is gone, and {ip} is another's now: {}. If that is this pod's, restart \
                             the pod or change its object, by an annotation",
                            interface.name
                        ),
                    );
                }
                let mtu = self.mtu_of(ifindex);
                let image = &mut self.out.image;
                // A pod of ours that is held stays with the interface that it had: whatever comes by another is
                // taken for spoofed. Others' packets are not looked at so closely: they become unknown again.
                let entry = Pod { id, policy, ifindex, firewall };
                if entry.is_ours() || !matches!(place, Place::Held(_)) {
                    image.pods.insert(key, entry);
                }
                // Also while its interface is not known, for the identity in it.
                image.delivery.insert(id, Delivery { ip: key, ifindex: device, mode, pad: 0, mtu, identity });
                image.pod_names.insert(id, pod_name(namespace, name));
            }
        }
    }

    /// Pods outside all known pod networks: a selected pod that talks to one would be taken to talk to outside.
    fn check_pod_networks(&mut self) {
        let config = &self.desired.config;
        let networks: Vec<_> = config
            .cluster_networks
            .iter()
            .chain(self.desired.nodes.values().flat_map(|n| &n.pod_networks))
            .collect();
        let outside = self.desired.pods.iter().find_map(|(name, pod)| {
            let ip = pod.addresses.iter().find(|ip| !networks.iter().any(|n| n.contains(*ip)))?;
            Some((name, *ip))
        });
        // One example will do: it is one mistake.
        if let Some(((namespace, name), ip)) = outside {
            self.problem(
                "EgressConfig default",
                format_args!(
                    "pod {namespace}/{name} has address {ip}, which is in no known pod network, so traffic of selected \
                     pods to such pods is taken for traffic to outside; set spec.clusterCIDRs, or podCIDRs of the Nodes"
                ),
            );
        }
    }

    /// The interface of its own that a pod's address is seen behind: by the host's route, or as the port of a
    /// bridge.
    fn seen_behind(&self, ip: &IpAddr) -> Option<IfIndex> {
        let f = self.facts;
        let port = || f.bridge_ports.get(ip).filter(|port| f.pod_interfaces.contains_key(port));
        f.host_routes.get(ip).or_else(port).copied()
    }

    /// The interface that the container runtime names as the pod's own.
    fn named(&self, pod: &model::Pod) -> Option<IfIndex> {
        let named = |i: &PodInterface| pod.interfaces.contains(&i.name);
        self.facts.pod_interfaces.iter().find(|(_, i)| named(i)).map(|(index, _)| *index)
    }

    /// Whether the address is seen behind a pod's interface, and not one that the container runtime names: then it
    /// is another pod's by now, and what the runtime wrote is old, or the interface has not been seen yet.
    fn is_elses(&self, pod: &model::Pod, seen: Option<IfIndex>) -> bool {
        let interface = seen.and_then(|index| self.facts.pod_interfaces.get(&index));
        interface.is_some_and(|i| !pod.interfaces.is_empty() && !pod.interfaces.contains(&i.name))
    }

    /// The interface that a pod's packets come in by, and how and by which device to reach it. Zeros while the
    /// CNI has not made it yet.
    fn interface_of(&self, ip: &IpAddr, place: Place) -> (IfIndex, DeliveryMode, IfIndex) {
        let f = self.facts;
        let bridge = longest(&f.bridge_networks, ip);
        let Place::At(own) = place else {
            let bridge = bridge.unwrap_or(0);
            return (bridge, DeliveryMode::Neighbour, bridge);
        };
        match f.pod_interfaces.get(&own) {
            Some(interface) if interface.peer_elsewhere => (own, DeliveryMode::Peer, own),
            // Never to a bridge's port by address: the port has none, the bridge has.
            Some(interface) if interface.bridge != 0 => {
                (own, DeliveryMode::Neighbour, bridge.unwrap_or(interface.bridge))
            }
            _ => (own, DeliveryMode::Neighbour, own),
        }
    }

    /// The MTU of the interface that a pod's packets come in by; 0 while it is not known.
    fn mtu_of(&self, ifindex: IfIndex) -> u16 {
        let pod = self.facts.pod_interfaces.get(&ifindex).map(|i| i.mtu);
        clamp(pod.or(self.facts.bridges.get(&ifindex).map(|b| b.mtu)).unwrap_or(0))
    }

    /// `INTERFACES`.
    fn interfaces(&mut self) {
        let f = self.facts;
        // Interfaces and bridges that pods of ours speak through.
        let mut guarded: BTreeSet<IfIndex> = BTreeSet::new();
        let mut own: BTreeSet<IfIndex> = BTreeSet::new();
        for (ip, pod) in self.out.image.pods.iter().filter(|(_, p)| p.is_ours()) {
            guarded.insert(pod.ifindex);
            own.insert(pod.ifindex);
            let ip = IpAddr::from(*ip);
            if !f.host_routes.contains_key(&ip) {
                guarded.extend(longest(&f.bridge_networks, &ip));
            }
        }
        let bridges: BTreeSet<_> = guarded
            .iter()
            .filter_map(|i| f.pod_interfaces.get(i))
            .map(|i| i.bridge)
            .filter(|b| *b != 0)
            .collect();
        guarded.extend(bridges);
        // A port that comes new to a bridge speaks with the bridge's index before it is known itself.
        if self.desired.config.hold_unknown {
            guarded.extend(f.bridges.keys());
        }
        let pods = f.pod_interfaces.iter().map(|(index, i)| {
            let guard = match guarded.contains(index) || guarded.contains(&i.bridge) {
                _ if own.contains(index) => Guard::Own,
                true => Guard::Guarded,
                false => Guard::None,
            };
            (*index, interface(InterfaceKind::Pod, guard, i.mac, i.bridge))
        });
        let bridges = f.bridges.iter().map(|(index, b)| {
            let guard = if guarded.contains(index) { Guard::Guarded } else { Guard::None };
            (*index, interface(InterfaceKind::Bridge, guard, b.mac, 0))
        });
        let uplinks = f
            .uplinks
            .iter()
            .map(|(index, u)| (*index, interface(InterfaceKind::Uplink, Guard::None, u.mac, 0)));
        let others =
            f.others.iter().map(|index| (*index, interface(InterfaceKind::Other, Guard::None, [0; 6], 0)));
        // Uplinks and bridges first: there are few, and without them nothing works.
        for (index, value) in uplinks.chain(bridges).chain(pods).chain(others).collect::<Vec<_>>() {
            if self.out.image.interfaces.len() >= capacity(limits::INTERFACES) {
                self.problem(format_args!("interface {index}"), over("INTERFACES", limits::INTERFACES));
            } else {
                self.out.image.interfaces.entry(index).or_insert(value);
            }
        }
    }

    /// The uplink of a default route, else any: where packets are decided that skip the host's stack.
    fn some_uplink(&self) -> IfIndex {
        let f = self.facts;
        let default = [f.default_v4, f.default_v6].into_iter().flatten().find(|i| f.uplinks.contains_key(i));
        default.or(f.uplinks.keys().next().copied()).unwrap_or(0)
    }

    /// This node's address of a family: the one that the Node object names if it is there, else one of the
    /// uplink of the default route, else of any uplink; unspecified if there is none.
    fn router_address(&self, v6: bool) -> Ip {
        let f = self.facts;
        let node = self.desired.nodes.get(&self.desired.node);
        let internal = node.into_iter().flat_map(|n| &n.internal_addresses);
        let default = if v6 { f.default_v6 } else { f.default_v4 };
        let first = default.and_then(|index| f.uplinks.get(&index));
        let uplinks = first.into_iter().chain(f.uplinks.values()).flat_map(|u| &u.networks).map(IpNet::addr);
        let egress = &self.out.image.egress_addrs;
        internal
            .copied()
            .filter(|ip| f.addresses.contains(ip))
            .chain(uplinks)
            .find(|ip| ip.is_ipv6() == v6 && !egress.contains_key(&Ip::from(*ip)))
            .map_or(Ip::UNSPECIFIED, Ip::from)
    }

    /// `SETTINGS`.
    fn settings(&mut self) {
        let config = &self.desired.config;
        let t = &config.timeouts;
        let tunnel = self.desired.tunnel.unwrap_or_default();
        let next = self.ids.next();
        self.out.image.settings = Settings {
            node: self.node_ids.get(&self.desired.node).copied().unwrap_or(0),
            tunnel_port: tunnel.port,
            tunnel_vni: tunnel.vni,
            tunnel_ifindex: self.facts.tunnel_ifindex,
            mtu: flow_mtu(self.desired, self.facts),
            uplink_mtu: clamp(self.facts.uplinks.values().map(|u| u.mtu).min().unwrap_or(0)),
            offload: config.offload as u8,
            uplink: self.some_uplink(),
            tunnel_max: tunnel_max(self.desired, self.facts),
            unassigned: config.unassigned as u8,
            spread: config.spread as u8,
            hold_unknown: u8::from(config.hold_unknown),
            tcp_established: t.tcp_established,
            tcp_transitory: t.tcp_transitory,
            udp: t.udp,
            icmp: t.icmp,
            rest: t.rest,
            next_pod: next.pod,
            next_policy: next.policy,
            next_egress: next.egress,
            next_ruleset: next.ruleset,
            next_name: next.name,
            reject: u8::from(config.reject),
            router_v4: self.router_address(false),
            router_v6: self.router_address(true),
            // The pass token is apply's: it lives as long as the maps do.
            ..Settings::default()
        };
    }
}

/// What the tunnel takes of a packet beside the outer IP header: Ethernet, VXLAN and UDP headers (RFC 7348, 5).
const TUNNEL_OVERHEAD: u32 = 14 + 8 + 8;

/// The largest packet that an egress flow carries whole out of any uplink; 0 without one. A node alone has
/// nobody to tunnel to.
fn flow_mtu(desired: &Desired, facts: &Facts) -> u16 {
    let outer = if desired.tunnel_over_v6() { 40 } else { 20 };
    let overhead = if desired.nodes.len() > 1 { TUNNEL_OVERHEAD + outer } else { 0 };
    let mtu = facts.uplinks.values().map(|u| u.mtu).min().unwrap_or(0);
    clamp(mtu.saturating_sub(overhead))
}

/// The largest packet that the tunnel takes; 0: any.
fn tunnel_max(desired: &Desired, facts: &Facts) -> u16 {
    if desired.tunnel_over_v6() && desired.nodes.len() > 1 { flow_mtu(desired, facts) } else { 0 }
}

/// Loopback's MTU is 65,536; no IP packet is longer than 65,535 bytes.
fn clamp(mtu: u32) -> u16 {
    u16::try_from(mtu).unwrap_or(u16::MAX)
}

fn capacity(limit: u32) -> usize {
    limit as usize
}

fn over(map: &str, limit: u32) -> String {
    format!("not in force on this node: map {map} is full with {limit} entries")
}

fn interface(kind: InterfaceKind, guard: Guard, mac: [u8; 6], bridge: IfIndex) -> Interface {
    Interface { kind: kind as u8, guarded: guard as u8, mac, bridge }
}

fn fill(table: &mut GranuleTable, range: GranuleRange, with: impl Fn(NodeId) -> NodeId) {
    for node in &mut table.node[usize::from(range.first)..][..usize::from(range.count)] {
        *node = with(*node);
    }
}

fn longest(networks: &BTreeMap<IpNet, IfIndex>, ip: &IpAddr) -> Option<IfIndex> {
    networks
        .iter()
        .filter(|(n, _)| n.contains(ip))
        .max_by_key(|(n, _)| n.prefix_len())
        .map(|(_, index)| *index)
}

fn network_key(network: &IpNet) -> NetworkKey {
    let prefix_len = u32::from(network.prefix_len()) + if network.addr().is_ipv4() { 96 } else { 0 };
    NetworkKey { prefix_len, ip: network.network().into() }
}

fn pod_name(namespace: &str, name: &str) -> PodName {
    fn put(to: &mut [u8], text: &str) {
        // Longer names than RFC 1123 allows do not get this far.
        for (to, byte) in to.iter_mut().zip(text.bytes()) {
            *to = byte;
        }
    }
    let mut out = PodName::default();
    put(&mut out.namespace, namespace);
    put(&mut out.name, name);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{Bridge, PodInterface, Uplink};
    use crate::model::tests::objects;
    use datapath::keys::{GranuleRange, PodId};

    /// Node a: uplink 2 (192.0.2.0/24), veth 10 by a host route, bridge 20 with ports 21 and 22.
    fn facts() -> Facts {
        let pod = |bridge, peer_elsewhere| PodInterface {
            name: "veth".into(),
            mac: [2; 6],
            bridge,
            peer_elsewhere,
            mtu: 1400,
        };
        Facts {
            uplinks: BTreeMap::from([(
                2,
                Uplink {
                    name: "eth0".into(),
                    mac: [1; 6],
                    networks: vec!["192.0.2.5/24".parse().unwrap()],
                    on_link: Vec::new(),
                    mtu: 1500,
                    up: true,
                },
            )]),
            pod_interfaces: BTreeMap::from([(10, pod(0, true)), (21, pod(20, true)), (22, pod(20, false))]),
            bridges: BTreeMap::from([(20, Bridge { mac: [3; 6], mtu: 1300 })]),
            others: std::collections::BTreeSet::from([1, 9]),
            host_routes: BTreeMap::from([("10.1.0.1".parse().unwrap(), 10)]),
            bridge_networks: BTreeMap::from([("10.1.2.0/24".parse().unwrap(), 20)]),
            bridge_ports: BTreeMap::from([
                ("10.1.2.21".parse().unwrap(), 21),
                ("10.1.2.22".parse().unwrap(), 22),
            ]),
            addresses: vec!["192.0.2.5".parse().unwrap()],
            default_v4: Some(2),
            default_v6: None,
            proxies: BTreeMap::new(),
            nameservers: Vec::new(),
            tunnel_ifindex: 9,
        }
    }

    const CLUSTER: &str = "kind: Node
metadata: {name: a, uid: ua, labels: {k8s.ovn.org/egress-assignable: ''}}
spec: {podCIDR: 10.1.0.0/16}
status: {addresses: [{type: InternalIP, address: 192.0.2.5}, {type: Hostname, address: a}]}
---
kind: EgressNode
metadata: {name: a}
spec: {nodeUID: ua, ranges: [{egressIP: 192.0.2.100, uid: x, generation: 5, owner: b, ranges: [{first: 0, count: 10, generation: 3}, {first: 20, count: 10, generation: 5}]}]}
status: {nodeUID: ua, tunnelAddress: 192.0.2.5, addresses: [192.0.2.5]}
---
kind: EgressNode
metadata: {name: b}
status: {nodeUID: ub, tunnelAddress: 192.0.2.6, addresses: [192.0.2.6, 10.2.0.1], loaded: []}
---
kind: Namespace
metadata: {name: shop, labels: {env: prod}}
---
kind: Namespace
metadata: {name: dev}
---
kind: EgressIP
metadata: {name: e, uid: ue}
spec: {egressIPs: [192.0.2.100, 192.0.2.101], namespaceSelector: {matchLabels: {env: prod}}}
---
kind: EgressAllocation
metadata: {name: 192.0.2.100, uid: x, generation: 5}
spec:
  egressIP: 192.0.2.100
  owner: b
  leases:
  - {node: a, nodeUID: ua, generation: 3, ranges: [{first: 0, count: 10}]}
  - {node: a, nodeUID: ua, generation: 5, ranges: [{first: 20, count: 10}]}
  - {node: b, nodeUID: older, generation: 1, ranges: [{first: 30, count: 10}]}
  - {node: b, nodeUID: ub, generation: 4, ranges: [{first: 40, count: 10}]}";

    fn pod(namespace: &str, name: &str, ip: &str) -> String {
        format!(
            "---
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, uid: u{name}}}
spec: {{nodeName: a}}
status: {{podIP: {ip}}}"
        )
    }

    fn cluster(more: &[String]) -> String {
        let pods = [
            pod("shop", "routed", "10.1.0.1"),
            pod("shop", "bridged", "10.1.2.21"),
            pod("dev", "other", "10.1.2.22"),
        ];
        [CLUSTER.to_owned()]
            .into_iter()
            .chain(pods)
            .chain(more.iter().cloned())
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn with(yaml: &str, facts: &Facts, ids: &mut Ids) -> Compiled {
        compile(&crate::model::desired(&objects(yaml), "a"), facts, ids)
    }

    fn of(yaml: &str) -> Compiled {
        let c = with(yaml, &facts(), &mut Ids::default());
        assert_eq!(c.problems, BTreeSet::new());
        c
    }

    fn ip(s: &str) -> Ip {
        s.parse::<IpAddr>().unwrap().into()
    }

    fn egress(c: &Compiled, s: &str) -> u32 {
        c.image.egress_addrs[&ip(s)]
    }

    #[test]
    fn pods_are_all_there_with_their_policy_and_their_way_back() {
        let image = of(&cluster(&[pod("shop", "new", "10.1.9.1")])).image;
        assert_eq!(image.pods.len(), 4);
        let policy = *image.policies.keys().next().unwrap();
        let get = |s: &str| {
            let p = image.pods[&ip(s)];
            let d = image.delivery[&p.id];
            (p.policy, p.ifindex, d.mode, d.ifindex)
        };
        assert_eq!(get("10.1.0.1"), (policy, 10, DeliveryMode::Peer as u8, 10));
        assert_eq!(get("10.1.2.21"), (policy, 21, DeliveryMode::Peer as u8, 21));
        assert_eq!(get("10.1.2.22"), (0, 22, DeliveryMode::Neighbour as u8, 20), "not the port");
        assert_eq!(get("10.1.9.1"), (policy, 0, DeliveryMode::Neighbour as u8, 0), "not known yet");
        let name = image.pod_names[&image.pods[&ip("10.1.0.1")].id];
        assert!(name.namespace.starts_with(b"shop\0") && name.name.starts_with(b"routed\0"));
    }

    #[test]
    fn a_pod_whose_port_the_bridge_has_not_learnt_speaks_through_the_bridge() {
        let image = of(&cluster(&[pod("shop", "quiet", "10.1.2.23")])).image;
        let p = image.pods[&ip("10.1.2.23")];
        let d = image.delivery[&p.id];
        assert_eq!((p.ifindex, d.mode, d.ifindex), (20, DeliveryMode::Neighbour as u8, 20));
    }

    #[test]
    fn interfaces_of_selected_pods_are_guarded_with_their_bridge_and_its_ports() {
        let guarded =
            |c: &Compiled| c.image.interfaces.iter().map(|(n, i)| (*n, i.guarded)).collect::<Vec<_>>();
        let c = of(&cluster(&[]));
        assert_eq!(guarded(&c), [(1, 0), (2, 0), (9, 0), (10, 2), (20, 1), (21, 2), (22, 1)]);
        let uplink = c.image.interfaces[&2];
        assert_eq!((uplink.kind, uplink.mac), (InterfaceKind::Uplink as u8, [1; 6]));
        assert_eq!(c.image.interfaces[&21].bridge, 20);
        let c = of(&format!("{CLUSTER}\n{}\n{}", pod("shop", "p", "10.1.0.1"), pod("dev", "q", "10.1.2.21")));
        assert_eq!(
            guarded(&c),
            [(1, 0), (2, 0), (9, 0), (10, 2), (20, 1), (21, 1), (22, 1)],
            "a bridge's next port"
        );
        let allow = format!(
            "{CLUSTER}\n{}\n---\nkind: EgressConfig\nmetadata: {{name: default}}\nspec: {{unknownPods: Allow}}",
            pod("shop", "p", "10.1.0.1")
        );
        assert_eq!(guarded(&of(&allow)), [(1, 0), (2, 0), (9, 0), (10, 2), (20, 0), (21, 0), (22, 0)]);
    }

    #[test]
    fn networks_are_pods_services_and_nodes() {
        let c = of(&cluster(&["---
kind: EgressConfig
metadata: {name: default}
spec: {clusterCIDRs: [10.0.0.0/8, 'fd00::/48'], serviceCIDRs: [10.96.0.0/12]}"
            .to_owned()]));
        let kind =
            |network: &str| c.image.networks.get(&network_key(&network.parse().unwrap())).map(|n| n.kind);
        assert_eq!(kind("10.0.0.0/8"), Some(NetworkKind::Pods as u32));
        assert_eq!(kind("fd00::/48"), Some(NetworkKind::Pods as u32));
        assert_eq!(kind("10.1.0.0/16"), Some(NetworkKind::Pods as u32));
        assert_eq!(kind("10.96.0.0/12"), Some(NetworkKind::Services as u32));
        for node in ["192.0.2.6/32", "10.2.0.1/32"] {
            assert_eq!(kind(node), Some(NetworkKind::Node as u32), "{node}");
        }
        assert_eq!(kind("192.0.2.5/32"), Some(NetworkKind::OwnNode as u32));
        assert_eq!(kind("192.0.2.100/32"), None);
        assert_eq!(network_key(&"10.0.0.0/8".parse().unwrap()).prefix_len, 104);
    }

    #[test]
    fn an_egress_ip_is_never_a_node_even_if_it_is_on_this_one() {
        let mut f = facts();
        f.addresses.push("192.0.2.100".parse().unwrap());
        let c = with(&cluster(&[]), &f, &mut Ids::default());
        assert!(!c.image.networks.contains_key(&network_key(&"192.0.2.100/32".parse().unwrap())));
    }

    #[test]
    fn holder_uplink_and_the_whole_port_table_at_a_gateway() {
        let c = of(&cluster(&[]));
        let image = &c.image;
        let e = image.egress_ips[&egress(&c, "192.0.2.100")];
        assert_eq!((e.uplink, image.nodes[&e.holder].tunnel_ip), (2, ip("192.0.2.6")));
        assert_eq!(image.egress_ips[&egress(&c, "192.0.2.101")].holder, 0);
        let (a, b) = (image.node_addrs[&ip("192.0.2.5")], image.node_addrs[&ip("192.0.2.6")]);
        assert_eq!(image.settings.node, a);
        let table = &image.granules[&egress(&c, "192.0.2.100")].node;
        for (granule, node) in [(0, a), (9, a), (10, 0), (29, a), (30, 0), (39, 0), (40, b), (50, 0)] {
            assert_eq!(table[granule], node, "granule {granule}; 30-39 are of a node that is gone");
        }
        let loaded = |c: &Compiled| c.loaded[&"192.0.2.100".parse::<IpAddr>().unwrap()].clone();
        assert_eq!(loaded(&c), ("x".to_owned(), 0), "that of a node that is not known is not in the table");
        let known =
            cluster(&[]).replace("generation: 1, ranges: [{first: 30", "generation: 4, ranges: [{first: 30");
        assert_eq!(loaded(&of(&known)), ("x".to_owned(), 3), "up to the first such");
        assert_eq!(loaded(&of(&known.replace("nodeUID: older", "nodeUID: ub"))), ("x".to_owned(), 5));
    }

    #[test]
    fn a_node_that_only_sends_has_no_uplink_and_only_its_own_ports() {
        let yaml = cluster(&[]).replace(", labels: {k8s.ovn.org/egress-assignable: ''}", "");
        let c = of(&yaml);
        let e = c.image.egress_ips[&egress(&c, "192.0.2.100")];
        assert_eq!(e.uplink, 0);
        let table = &c.image.granules[&egress(&c, "192.0.2.100")].node;
        let own = c.image.settings.node;
        assert_eq!([table[0], table[9], table[20], table[40]], [own, own, own, 0]);
        assert!(c.loaded.is_empty(), "it confirms nothing");
        // The holder carries on although it is no candidate any more.
        let c = of(&yaml.replace("owner: b", "owner: a"));
        assert_eq!(c.image.egress_ips[&egress(&c, "192.0.2.100")].uplink, 2);
    }

    #[test]
    fn ports_are_those_granted_as_far_as_the_node_that_they_leave_by_has_them() {
        let lease = |change: &dyn Fn(String) -> String| {
            let c = of(&change(cluster(&[])));
            c.image.leases.get(&egress(&c, "192.0.2.100")).copied()
        };
        let (first, second) = (GranuleRange { first: 0, count: 10 }, GranuleRange { first: 20, count: 10 });
        let both = Some(Lease::of(&[first, second]));
        assert_eq!(lease(&|y| y), both, "the leader says that the holder has them");
        let unlabelled = |y: String| y.replace(", labels: {k8s.ovn.org/egress-assignable: ''}", "");
        assert_eq!(lease(&unlabelled), both, "also to a node that has no table");
        // The allocation names another holder than the leader has told this node.
        let moved = |y: String, owner: &str| y.replace("\n  owner: b", &format!("\n  owner: {owner}"));
        assert_eq!(lease(&|y| moved(y, "''")), both, "nobody to send by");
        assert_eq!(lease(&|y| moved(y, "a")), both, "loaded with the same change");
        let less = |y: String| {
            moved(y, "a").replace("generation: 5, ranges: [{first: 20", "generation: 5, ranges: [{first: 90")
        };
        assert_eq!(lease(&less), Some(Lease::of(&[first])), "not in its own table");
        let behind = |loaded: &str| {
            lease(&|y| {
                y.replace("owner: b, ranges", "owner: c, ranges")
                    .replace("loaded: []", &format!("loaded: [{loaded}]"))
            })
        };
        let confirmed = |generation: u64, uid: &str| {
            format!("{{egressIP: 192.0.2.100, uid: {uid}, generation: {generation}}}")
        };
        assert_eq!(behind(""), None, "nothing confirmed");
        assert_eq!(behind(&confirmed(2, "x")), None);
        assert_eq!(behind(&confirmed(4, "x")), Some(Lease::of(&[first])));
        assert_eq!(behind(&confirmed(5, "x")), both);
        assert_eq!(behind(&confirmed(5, "y")), None, "an earlier allocation of the address");
        assert_eq!(
            lease(&|y| y.replace("uid: x, generation: 5, owner", "uid: y, generation: 5, owner")),
            None
        );
    }

    #[test]
    fn a_source_sends_by_whom_the_leader_names_and_claims_nothing_by_it() {
        let unlabelled = cluster(&[]).replace(", labels: {k8s.ovn.org/egress-assignable: ''}", "");
        let holder = |yaml: &str| {
            let c = of(yaml);
            let holder = c.image.egress_ips[&egress(&c, "192.0.2.100")].holder;
            c.image.nodes.get(&holder).map(|n| n.tunnel_ip)
        };
        let (a, b) = (Some(ip("192.0.2.5")), Some(ip("192.0.2.6")));
        assert_eq!(holder(&unlabelled), b);
        let elsewhere = unlabelled.replace("\n  owner: b", "\n  owner: c");
        assert_eq!(holder(&elsewhere), b, "until it is told of another");
        let told_itself = elsewhere.replace("owner: b, ranges", "owner: a, ranges");
        assert_eq!(holder(&told_itself), None, "the allocation decides on that");
        assert_eq!(holder(&unlabelled.replace("\n  owner: b", "\n  owner: a")), a);
    }

    #[test]
    fn ports_that_are_given_back_are_not_taken_and_still_known() {
        let mut desired = crate::model::desired(&objects(&cluster(&[])), "a");
        let grants = desired.grants.as_mut().unwrap();
        grants.get_mut(&"192.0.2.100".parse::<IpAddr>().unwrap()).unwrap().ranges[0].stopped = true;
        let c = compile(&desired, &facts(), &mut Ids::default());
        let id = egress(&c, "192.0.2.100");
        assert_eq!(c.image.leases[&id], Lease::of(&[GranuleRange { first: 20, count: 10 }]));
        assert_eq!(c.image.granules[&id].node[0], c.image.settings.node);
    }

    #[test]
    fn a_node_made_anew_has_no_right_to_the_old_ones_ports() {
        let c = of(&cluster(&[])
            .replace("owner: b", "owner: a")
            .replace("uid: ua, labels", "uid: new, labels")
            .replace("nodeUID: ua, tunnel", "nodeUID: new, tunnel"));
        assert!(c.image.leases.is_empty());
        assert!(c.image.granules.values().all(|t| t.node[..30].iter().all(|n| *n == 0)));
    }

    #[test]
    fn only_what_the_node_needs() {
        let other = "---
kind: EgressIP
metadata: {name: far}
spec: {egressIPs: [203.0.113.1], namespaceSelector: {matchLabels: {env: none}}}";
        assert_eq!(of(&cluster(&[other.to_owned()])).image.policies.len(), 1);
        let near = other.replace("203.0.113.1", "192.0.2.200");
        assert_eq!(of(&cluster(&[near])).image.policies.len(), 2, "it may come to hold it");
    }

    #[test]
    fn ids_stay_and_are_not_inherited() {
        let mut ids = Ids::default();
        let f = facts();
        let first = with(&cluster(&[]), &f, &mut ids);
        assert_eq!(with(&cluster(&[]), &f, &mut ids), first);
        let mut recovered = Ids::recover(&first.image);
        assert_eq!(with(&cluster(&[]), &f, &mut recovered).image.pods, first.image.pods);
        // Another pod at the address, unselected.
        let reused = cluster(&[]).replace("name: routed, namespace: shop", "name: reused, namespace: dev");
        let second = with(&reused, &f, &mut ids);
        let id = |c: &Compiled| c.image.pods[&ip("10.1.0.1")].id;
        assert!(id(&second) > id(&first));
        // The address moves to another object.
        let moved = cluster(&[]).replace("metadata: {name: e, uid: ue}", "metadata: {name: f, uid: uf}");
        let third = with(&moved, &f, &mut ids);
        assert!(egress(&third, "192.0.2.100") > egress(&second, "192.0.2.101"));
        assert!(third.image.policies.keys().next() > second.image.policies.keys().next());
        // And back: something new again.
        assert!(id(&with(&cluster(&[]), &f, &mut ids)) > id(&second));
    }

    #[test]
    fn an_address_on_a_new_interface_is_held_until_its_object_changes() {
        let yaml = cluster(&[pod("dev", "free", "10.1.0.9")]);
        let moved = |from: u32, to: u32| {
            let mut f = facts();
            let interface = f.pod_interfaces[&10].clone();
            f.pod_interfaces.insert(12, interface.clone());
            f.pod_interfaces.insert(11, interface);
            f.pod_interfaces.remove(&from);
            f.host_routes.insert("10.1.0.9".parse().unwrap(), to);
            f.host_routes.insert("10.1.0.1".parse().unwrap(), to);
            f
        };
        let (selected, free) = (ip("10.1.0.1"), ip("10.1.0.9"));
        let mut ids = Ids::default();
        let first = with(&yaml, &moved(12, 11), &mut ids).image;
        assert_eq!((first.pods[&selected].ifindex, first.pods[&free].ifindex), (11, 11));
        let id = first.pods[&free].id;
        let mut restarted = Ids::recover(&first);
        for ids in [&mut ids, &mut restarted] {
            // It is there still: no route makes the address another's.
            assert_eq!(with(&yaml, &moved(0, 12), ids).image.pods[&free].ifindex, 11);
            let c = with(&yaml, &moved(11, 12), ids);
            assert!(!c.image.pods.contains_key(&free), "unknown again");
            assert_eq!(c.image.pods[&selected].ifindex, 11, "what comes by 12 is spoofed");
            for pod in [selected, free].map(|ip| first.pods[&ip].id) {
                assert_eq!((c.image.delivery[&pod].ifindex, c.image.delivery[&pod].mode), (0, HELD));
            }
            for about in ["Pod dev/free", "Pod shop/routed"] {
                assert!(c.problems.iter().any(|p| p.about == about && p.message.starts_with("held")));
            }
            *ids = Ids::recover(&c.image);
            assert!(
                !with(&yaml, &moved(11, 12), ids).image.pods.contains_key(&free),
                "a restart is no change"
            );
            let changed = yaml.replace("name: free,", "name: free, annotations: {restarted: now},");
            let c = with(&changed, &moved(11, 12), ids);
            assert_eq!((c.image.pods[&free].ifindex, c.image.pods[&free].id), (12, id));
            assert_eq!(c.image.delivery[&id].ifindex, 12);
            assert_eq!(c.image.pods[&selected].ifindex, crate::pins::GONE, "not its object");
        }
    }

    /// The image with what the container runtime says of the interfaces of `shop/bridged`.
    fn named(yaml: &str, interfaces: &[&str], asked: bool, facts: &Facts, ids: &mut Ids) -> MapImage {
        let mut desired = crate::model::desired(&objects(yaml), "a");
        let pod = desired.pods.get_mut(&("shop".to_owned(), "bridged".to_owned())).unwrap();
        pod.interfaces = interfaces.iter().map(|name| (*name).to_owned()).collect();
        pod.asked = asked;
        compile(&desired, facts, ids).image
    }

    #[test]
    fn the_interface_that_the_runtime_names_is_the_pods() {
        let mut facts = facts();
        for (index, interface) in &mut facts.pod_interfaces {
            interface.name = format!("veth{index}");
        }
        let (yaml, address) = (cluster(&[]), ip("10.1.2.21"));
        let mut silent = facts.clone();
        silent.bridge_ports.clear();
        let place = |interfaces: &[&str], facts: &Facts| {
            let image = named(&yaml, interfaces, false, facts, &mut Ids::default());
            image.pods.get(&address).map(|pod| pod.ifindex)
        };
        assert_eq!(place(&[], &silent), Some(20), "the bridge, until it has spoken");
        assert_eq!(place(&["cni0", "veth21"], &silent), Some(21), "though it has not spoken");
        assert_eq!(place(&["cni0", "veth21"], &facts), Some(21));
        assert_eq!(place(&["cni0", "veth22"], &facts), None, "it is seen behind another");
        assert_eq!(place(&["cni0", "veth99"], &facts), None, "the same, and its own is not there yet");
        assert_eq!(place(&["cni0", "veth99"], &silent), Some(20));
    }

    #[test]
    fn a_new_sandbox_counts_at_once_if_it_is_asked_for() {
        let mut before = facts();
        for (index, interface) in &mut before.pod_interfaces {
            interface.name = format!("veth{index}");
        }
        let (yaml, address) = (cluster(&[]), ip("10.1.2.21"));
        let mut after = before.clone();
        after.pod_interfaces.remove(&21);
        after.bridge_ports = BTreeMap::from([("10.1.2.21".parse().unwrap(), 22)]);
        for (asked, ifindex) in [(false, 21), (true, 22)] {
            let mut ids = Ids::default();
            assert_eq!(named(&yaml, &[], false, &before, &mut ids).pods[&address].ifindex, 21);
            assert_eq!(named(&yaml, &["veth22"], asked, &after, &mut ids).pods[&address].ifindex, ifindex);
        }
    }

    #[test]
    fn a_relabelled_pod_keeps_its_id_and_changes_its_policy() {
        let mut ids = Ids::default();
        let before = with(&cluster(&[]), &facts(), &mut ids).image;
        let after =
            with(&cluster(&[]).replace("env: prod}}\n---", "env: test}}\n---"), &facts(), &mut ids).image;
        let (b, a) = (before.pods[&ip("10.1.0.1")], after.pods[&ip("10.1.0.1")]);
        assert_eq!((b.id, a.policy), (a.id, 0));
        assert!(b.policy != 0);
    }

    #[test]
    fn a_refused_object_leaves_its_pods_without_an_egress_ip() {
        let yaml = cluster(&[]).replace("[192.0.2.100, 192.0.2.101]", "[192.0.2.100, nonsense]");
        let image = of(&yaml).image;
        let policy = image.pods[&ip("10.1.0.1")].policy;
        assert!(policy != 0);
        assert_eq!(image.policies[&policy].len, 0);
        assert!(image.egress_ips.is_empty());
    }

    #[test]
    fn settings_are_those_of_the_config() {
        let mut desired = crate::model::desired(
            &objects(
                "kind: EgressConfig
metadata: {name: default}
spec: {unassigned: NodeIP, spread: Connection, unknownPods: Allow, offload: Never, timeouts: {udpSeconds: 7}}",
            ),
            "a",
        );
        desired.tunnel = Some(crate::objects::Tunnel { port: 4795, vni: 99 });
        let mut ids = Ids::default();
        let s = compile(&desired, &facts(), &mut ids).image.settings;
        assert_eq!((s.unassigned, s.spread, s.hold_unknown, s.offload), (1, 2, 0, 2));
        assert_eq!((s.tunnel_port, s.tunnel_vni, s.tunnel_ifindex), (4795, 99, 9));
        assert_eq!((s.tcp_established, s.tcp_transitory, s.udp, s.icmp, s.rest), (7440, 240, 7, 60, 65));
        let s = of(&cluster(&[])).image.settings;
        assert_eq!((s.unassigned, s.spread, s.hold_unknown, s.offload), (0, 1, 1, 1));
    }

    #[test]
    fn a_pod_outside_the_pod_networks_is_said_once() {
        let yaml = cluster(&[pod("dev", "far", "172.16.0.1"), pod("dev", "farther", "172.16.0.2")]);
        let c = with(&yaml, &facts(), &mut Ids::default());
        assert_eq!(c.problems.len(), 1);
        let said = c.problems.first().unwrap().to_string();
        assert!(
            said.contains("pod dev/far has address 172.16.0.1, which is in no known pod network"),
            "{said}"
        );
    }

    #[test]
    fn the_longest_uplink_network_carries_an_address() {
        let mut f = facts();
        let mut other = f.uplinks[&2].clone();
        other.networks = vec!["192.0.2.129/25".parse().unwrap()];
        f.uplinks.insert(3, other);
        let config = model::Config::default();
        let of = |s: &str| uplink_for(&config, &f, &s.parse().unwrap());
        assert_eq!((of("192.0.2.200"), of("192.0.2.100"), of("198.51.100.1")), (Some(3), Some(2), None));
    }

    /// Node a with both families: uplink 2 (the networks of both, and default routes), uplink 3 with a second
    /// network of each and no route out, pods by host route, bridge and neighbour entries of both.
    fn dual_facts() -> Facts {
        let mut f = facts();
        let all = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<IpNet>>();
        f.uplinks.get_mut(&2).unwrap().networks = all(&["192.0.2.5/24", "2001:db8::5/64"]);
        let second = Uplink {
            name: "eth1".into(),
            networks: all(&["198.51.100.5/24", "2001:db8:1::5/128"]),
            on_link: all(&["2001:db8:1::/64"]),
            mtu: 1400,
            ..f.uplinks[&2].clone()
        };
        f.uplinks.insert(3, second);
        f.default_v6 = Some(2);
        f.host_routes.insert("fd00:1::1".parse().unwrap(), 10);
        f.bridge_networks.insert("fd00:1:0:2::/64".parse().unwrap(), 20);
        f.bridge_ports.insert("fd00:1:0:2::21".parse().unwrap(), 21);
        f.bridge_ports.insert("fd00:1:0:2::22".parse().unwrap(), 22);
        f.addresses.extend(["2001:db8::5".parse::<IpAddr>().unwrap()]);
        f
    }

    const DUAL: &str = "---
kind: EgressConfig
metadata: {name: default}
spec: {clusterCIDRs: [10.1.0.0/16, 'fd00:1::/48'], serviceCIDRs: [10.96.0.0/12, 'fd00:96::/112'], routedCIDRs: [203.0.113.0/24, '2001:db8:ff::/64']}
---
kind: EgressIP
metadata: {name: six, uid: us, creationTimestamp: '2026-01-01T00:00:00Z'}
spec: {egressIPs: ['2001:db8::100', '2001:db8:1::100', '2001:db8:ff::100', '2001:db8:2::100', 198.51.100.100, 203.0.113.100], namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}}
---
kind: EgressAllocation
metadata: {name: 2001-0db8-0000-0000-0000-0000-0000-0100, uid: y, generation: 1}
spec: {egressIP: '2001:db8::100', owner: a, leases: [{node: a, nodeUID: ua, generation: 1, ranges: [{first: 0, count: 10}]}]}";

    fn dual_cluster() -> String {
        let pod = |name: &str, v4: &str, v6: &str| {
            let both = format!("{{podIPs: [{{ip: {v4}}}, {{ip: '{v6}'}}]}}");
            pod("shop", name, v4).replace(&format!("{{podIP: {v4}}}"), &both)
        };
        let pods = [
            pod("routed", "10.1.0.1", "fd00:1::1"),
            pod("bridged", "10.1.2.21", "fd00:1:0:2::21"),
            pod("macvlan", "10.1.2.22", "fd00:1:0:2::22"),
            pod("quiet", "10.1.2.23", "fd00:1:0:2::23"),
            pod("new", "10.1.9.1", "fd00:1:0:9::1"),
        ];
        let cluster = CLUSTER
            .replace("nodeUID: ua, ranges: [", "nodeUID: ua, ranges: [{egressIP: '2001:db8::100', uid: y, generation: 1, owner: a, ranges: [{first: 0, count: 10, generation: 1}]}, ")
            .replace("{type: Hostname", "{type: InternalIP, address: '2001:db8::5'}, {type: Hostname")
            .replace("tunnelAddress: 192.0.2.5, ", "tunnelAddresses: [192.0.2.5, '2001:db8::5'], ")
            .replace("tunnelAddress: 192.0.2.6, ", "tunnelAddresses: [192.0.2.6, '2001:db8::6'], ");
        format!("{cluster}\n{}\n{DUAL}", pods.join("\n"))
    }

    #[test]
    fn both_families_of_a_pod_have_the_same_way_back() {
        let c = with(&dual_cluster(), &dual_facts(), &mut Ids::default());
        assert_eq!(c.problems, BTreeSet::new());
        assert_eq!(c.image.pods.len(), 10);
        for (v4, v6, ways) in [
            ("10.1.0.1", "fd00:1::1", (10, DeliveryMode::Peer, 10, 1400)),
            ("10.1.2.21", "fd00:1:0:2::21", (21, DeliveryMode::Peer, 21, 1400)),
            ("10.1.2.22", "fd00:1:0:2::22", (22, DeliveryMode::Neighbour, 20, 1400)),
            ("10.1.2.23", "fd00:1:0:2::23", (20, DeliveryMode::Neighbour, 20, 1300)),
            ("10.1.9.1", "fd00:1:0:9::1", (0, DeliveryMode::Neighbour, 0, 0)),
        ] {
            for address in [v4, v6] {
                let p = c.image.pods[&ip(address)];
                let d = c.image.delivery[&p.id];
                assert!(p.policy != 0);
                assert_eq!(d.ip, ip(address));
                let (ifindex, mode, device, mtu) = ways;
                let got = (p.ifindex, d.mode, d.ifindex, d.mtu);
                assert_eq!(got, (ifindex, mode as u8, device, mtu), "{address}");
            }
            assert_ne!(c.image.pods[&ip(v4)].id, c.image.pods[&ip(v6)].id);
        }
    }

    #[test]
    fn egress_ips_of_both_families_have_their_uplink() {
        let c = with(&dual_cluster(), &dual_facts(), &mut Ids::default());
        let uplink = |address: &str| {
            let e = c.image.egress_ips[&egress(&c, address)];
            (e.uplink, e.uplink_mtu)
        };
        assert_eq!(uplink("2001:db8::100"), (2, 1500));
        assert_eq!(
            uplink("2001:db8:1::100"),
            (3, 1400),
            "on the link by the router's word, without a route out"
        );
        assert_eq!(uplink("198.51.100.100"), (3, 1400));
        assert_eq!(uplink("2001:db8:ff::100"), (2, 1500), "routed to the node: by its default route");
        assert_eq!(uplink("203.0.113.100"), (2, 1500));
        assert_eq!(uplink("2001:db8:2::100"), (0, 0));
        let e = egress(&c, "2001:db8::100");
        assert_eq!(c.image.egress_ips[&e].holder, c.image.settings.node);
        assert_eq!(c.image.leases[&e], Lease::of(&[GranuleRange { first: 0, count: 10 }]));
        assert_eq!(c.image.granules[&e].node[9], c.image.settings.node);
        assert!(c.loaded.contains_key(&"2001:db8::100".parse::<IpAddr>().unwrap()));
        // A default route of the other family is none.
        let f = Facts { default_v6: None, ..dual_facts() };
        let c = with(&dual_cluster(), &f, &mut Ids::default());
        assert_eq!(c.image.egress_ips[&egress(&c, "2001:db8:ff::100")].uplink, 0);
    }

    #[test]
    fn solicitations_are_let_through_for_what_a_node_holds_or_may_hold_on_its_link() {
        let f = dual_facts();
        let image = with(&dual_cluster(), &f, &mut Ids::default()).image;
        let all = |answering: bool| {
            proxies(&image, &f, |_| answering)
                .into_iter()
                .map(|(i, ip)| (i, ip.to_string()))
                .collect::<Vec<_>>()
        };
        let held = (2, "2001:db8::100".to_owned());
        let may_hold = (3, "2001:db8:1::100".to_owned());
        assert_eq!(all(false), [held.clone(), may_hold], "not the routed one");
        assert_eq!(all(true), [held], "the kernel would answer for another node's");
        let unlabelled = dual_cluster().replace(", labels: {k8s.ovn.org/egress-assignable: ''}", "");
        let image = with(&unlabelled, &f, &mut Ids::default()).image;
        let wanted = proxies(&image, &f, |_| false);
        assert_eq!(wanted, BTreeSet::from([(2, "2001:db8::100".parse().unwrap())]), "held still");
    }

    #[test]
    fn nodes_are_reached_over_the_family_that_all_have_and_known_by_both() {
        let yaml = dual_cluster();
        let tunnel = |c: &Compiled, address: &str| {
            c.image
                .node_addrs
                .get(&ip(address))
                .map(|id| IpAddr::from(c.image.nodes[id].tunnel_ip).to_string())
        };
        let mut ids = Ids::default();
        let both = with(&yaml, &dual_facts(), &mut ids);
        for address in ["192.0.2.6", "2001:db8::6"] {
            assert_eq!(tunnel(&both, address).as_deref(), Some("192.0.2.6"));
        }
        assert_eq!(
            both.image.settings.mtu, 1350,
            "the smaller uplink's 1400 less IPv4, UDP, VXLAN and Ethernet"
        );
        // A node that has only IPv6 comes.
        let third = "---
kind: Node
metadata: {name: c, uid: uc}
---
kind: EgressNode
metadata: {name: c}
status: {nodeUID: uc, tunnelAddresses: ['2001:db8::7']}
---
kind: Node
metadata: {name: b, uid: ub}";
        let yaml = format!("{yaml}\n{third}");
        let six = with(&yaml, &dual_facts(), &mut ids);
        assert_eq!(six.problems, BTreeSet::new());
        for (address, at) in [
            ("192.0.2.5", "2001:db8::5"),
            ("192.0.2.6", "2001:db8::6"),
            ("2001:db8::6", "2001:db8::6"),
            ("2001:db8::7", "2001:db8::7"),
        ] {
            assert_eq!(tunnel(&six, address).as_deref(), Some(at));
        }
        assert_eq!(six.image.settings.mtu, 1330);
        assert_eq!(six.image.settings.node, both.image.settings.node, "nodes keep their ids");
        // Without an address in common, those that have not what most have are named.
        let lonely = yaml.replace("tunnelAddresses: [192.0.2.6, '2001:db8::6']", "tunnelAddress: 192.0.2.6");
        let c = with(&lonely, &dual_facts(), &mut Ids::default());
        assert!(
            c.problems.iter().any(|p| p.about == "Node c" && p.message.contains("is IPv6 only")),
            "{:?}",
            c.problems
        );
        assert_eq!(tunnel(&c, "2001:db8::7"), None);
        assert_eq!(tunnel(&c, "192.0.2.6").as_deref(), Some("192.0.2.6"));
    }

    #[test]
    fn sizes_and_router_addresses() {
        let s = with(&dual_cluster(), &dual_facts(), &mut Ids::default()).image.settings;
        assert_eq!((s.router_v4, s.router_v6), (ip("192.0.2.5"), ip("2001:db8::5")));
        // The Node names none that is there: an uplink's, the default route's first.
        let unnamed = dual_cluster().replace("InternalIP", "Hostname");
        let mut f = dual_facts();
        f.default_v4 = Some(3);
        let s = with(&unnamed, &f, &mut Ids::default()).image.settings;
        assert_eq!((s.router_v4, s.router_v6), (ip("198.51.100.5"), ip("2001:db8::5")));
        assert_eq!(of(&cluster(&[])).image.settings.router_v6, Ip::UNSPECIFIED);
        assert_eq!(of(&cluster(&[])).image.settings.mtu, 1450);
        // Alone, a node has no tunnel to fit into.
        let alone = "kind: Node
metadata: {name: a}
---
kind: EgressNode
metadata: {name: a}
status: {tunnelAddress: 192.0.2.5}";
        assert_eq!(of(alone).image.settings.mtu, 1500);
        assert_eq!(with(alone, &dual_facts(), &mut Ids::default()).image.settings.mtu, 1400);
        let mut f = facts();
        f.uplinks.get_mut(&2).unwrap().mtu = 65_536;
        assert_eq!(with(alone, &f, &mut Ids::default()).image.settings.mtu, 65_535);
        f.uplinks.clear();
        assert_eq!(with(alone, &f, &mut Ids::default()).image.settings.mtu, 0);
    }

    #[test]
    fn two_nodes_with_one_tunnel_address_are_told_apart() {
        let yaml = cluster(&[]).replace("tunnelAddress: 192.0.2.6", "tunnelAddress: 192.0.2.5");
        let c = with(&yaml, &facts(), &mut Ids::default());
        assert_eq!(c.image.nodes.len(), 1);
        assert!(c.problems.iter().any(|p| p.about == "Node b" && p.message.contains("also node a's")));
        assert_eq!(c.image.egress_ips[&egress(&c, "192.0.2.100")].holder, 0);
    }

    #[test]
    fn what_does_not_fit_is_named_and_selected_pods_come_first() {
        let mut desired = crate::model::desired(&objects(&cluster(&[])), "a");
        let template = desired.pods[&("dev".to_owned(), "other".to_owned())].clone();
        for n in 0..limits::PODS {
            let mut p = template.clone();
            p.addresses = vec![IpAddr::from(std::net::Ipv4Addr::from(0x0a01_8000 + n))];
            desired.pods.insert(("dev".to_owned(), format!("p{n}")), p);
        }
        let c = compile(&desired, &facts(), &mut Ids::default());
        assert_eq!(c.image.pods.len(), capacity(limits::PODS));
        assert_eq!(c.problems.len(), 3);
        assert!(c.problems.iter().all(|p| p.message.contains("map PODS is full")));
        let selected: Vec<PodId> = c.image.pods.values().filter(|p| p.policy != 0).map(|p| p.id).collect();
        assert_eq!(selected.len(), 2);
    }
}

//! The leader's choice of a node for every egress IP: a pure function, so that any leader decides the same.
//!
//! **Stable**: an address stays where it is while it may be there. Nothing is moved to even out, and a node
//! that comes back gets what nobody holds. **Even**: an address that needs a node gets the one that holds the
//! fewest; if it had one, the first of its standbys, whose kernel has its port table. **At most one** address of an object on a node per family, so that the death of a node takes one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{Capacity, Desired, NodeAgent};

/// A node, as the assignment sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Candidate {
    /// Whether it is labelled for egress IPs.
    pub assignable: bool,
    /// Whether its kubelet says it is ready.
    pub ready: bool,
    /// Whether other nodes reach it.
    pub reachable: bool,
    /// Networks of addresses that it can hold: those of its uplinks, and those that are routed to the nodes;
    /// none while no agent runs there.
    pub networks: Vec<IpNet>,
    /// How many addresses it may hold.
    pub capacity: Capacity,
}

impl Candidate {
    pub(crate) fn healthy(&self) -> bool {
        self.assignable && self.ready && self.reachable
    }

    pub(crate) fn has_network_of(&self, ip: &IpAddr) -> bool {
        self.networks.iter().any(|n| n.contains(ip))
    }
}

/// An object's addresses; requests are served in the order they are given, oldest first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Request {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// Nodes that are ready to take an address over, best first.
    pub standbys: BTreeMap<IpAddr, Vec<String>>,
}

/// Why no node holds an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, thiserror::Error)]
pub enum Unassigned {
    /// No node is labelled.
    #[error("no node has the label k8s.ovn.org/egress-assignable")]
    NoNode,
    /// Labelled nodes are not ready, or not reached.
    #[error("no node with the label k8s.ovn.org/egress-assignable is ready and reachable")]
    NotReady,
    /// No healthy node has an uplink in the address's network.
    #[error(
        "no ready egress node has an uplink whose network contains it, or, if spec.routedCIDRs of the EgressConfig does, a default route of its family; is the agent running there, and is the address right?"
    )]
    NoUplink,
    /// All that could are full.
    #[error("every ready egress node with an uplink for it is at its capacity")]
    NoCapacity,
    /// All that could hold another address of the same object.
    #[error("every ready egress node with an uplink for it holds another address of the same object already")]
    NodeTaken,
}

impl Unassigned {
    /// One word for programs.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::NoNode => "NoEgressNode",
            Self::NotReady => "NoReadyNode",
            Self::NoUplink => "NoUplink",
            Self::NoCapacity => "NoCapacity",
            Self::NodeTaken => "NodeTaken",
        }
    }
}

/// Who holds what.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Assignment {
    /// The holder of each address that has one.
    pub owners: BTreeMap<IpAddr, String>,
    /// Why each of the others has none.
    pub unassigned: BTreeMap<IpAddr, Unassigned>,
}

/// Requests and candidates as the objects have them. `reachable` says whether a node is.
#[must_use]
pub fn inputs(
    desired: &Desired,
    reachable: impl Fn(&str) -> bool,
) -> (Vec<Request>, BTreeMap<String, Candidate>) {
    let v6 = desired.tunnel_over_v6();
    let requests = desired
        .by_age()
        .into_iter()
        .map(|e| Request { addresses: e.addresses.clone(), standbys: BTreeMap::new() })
        .collect();
    let candidates = desired
        .nodes
        .iter()
        .filter(|(_, n)| n.exists)
        .map(|(name, n)| {
            let candidate = Candidate {
                assignable: n.assignable,
                ready: n.ready,
                reachable: reachable(name),
                // Without a tunnel address nobody can send it anything.
                networks: n
                    .agent
                    .iter()
                    .filter(|a| a.tunnel_address(v6).is_some())
                    .flat_map(|a| a.networks.iter().copied().chain(routed(desired, a)))
                    .collect(),
                capacity: n.capacity,
            };
            (name.clone(), candidate)
        })
        .collect();
    (requests, candidates)
}

/// Networks of addresses that routers send to the nodes, as far as this node has a way back for them.
fn routed<'a>(desired: &'a Desired, agent: &'a NodeAgent) -> impl Iterator<Item = IpNet> + 'a {
    let routed = desired.config.routed_networks.iter().copied();
    routed.filter(|n| agent.default_routes[usize::from(n.addr().is_ipv6())])
}

/// Assigns every requested address to a node, or says why not.
#[must_use]
pub fn assign(
    requests: &[Request],
    candidates: &BTreeMap<String, Candidate>,
    current: &BTreeMap<IpAddr, String>,
) -> Assignment {
    let assignable = candidates.iter().filter(|(_, c)| c.assignable).collect();
    let mut state = State { assignable, held: BTreeMap::new(), owners: BTreeMap::new() };
    // First what stays, of all objects: a newcomer must not take its place.
    let mut homeless: Vec<(&Request, Vec<IpAddr>)> = Vec::new();
    for request in requests {
        let mut taken = BTreeSet::new();
        let mut rest = Vec::new();
        for ip in &request.addresses {
            match current.get(ip).and_then(|n| candidates.get_key_value(n)) {
                Some((node, candidate))
                    if state.may_hold(node, candidate, ip)
                        && !taken.contains(&(node.as_str(), ip.is_ipv6())) =>
                {
                    taken.insert((node.as_str(), ip.is_ipv6()));
                    state.give(*ip, node);
                }
                _ => rest.push(*ip),
            }
        }
        if !rest.is_empty() {
            homeless.push((request, rest));
        }
    }
    let mut unassigned = BTreeMap::new();
    for (request, rest) in homeless {
        for family in [false, true] {
            let rest: Vec<_> = rest.iter().filter(|ip| ip.is_ipv6() == family).copied().collect();
            let mut matching = Matching { placed: BTreeMap::new() };
            let siblings: BTreeSet<String> = request
                .addresses
                .iter()
                .filter(|ip| ip.is_ipv6() == family)
                .filter_map(|ip| state.owners.get(ip).cloned())
                .collect();
            for ip in &rest {
                matching.place(&state, request, &siblings, *ip, &mut BTreeSet::new());
            }
            let placed = matching.placed;
            for (node, ip) in &placed {
                state.give(*ip, node);
            }
            for ip in rest.iter().filter(|ip| !placed.values().any(|p| p == *ip)) {
                unassigned.insert(*ip, state.why_not(ip));
            }
        }
    }
    Assignment { owners: state.owners, unassigned }
}

struct State<'a> {
    /// Of a large cluster's nodes these are few, and every address looks at all of them.
    assignable: Vec<(&'a String, &'a Candidate)>,
    /// IPv4 and IPv6 addresses that each node has been given.
    held: BTreeMap<String, [u32; 2]>,
    owners: BTreeMap<IpAddr, String>,
}

impl State<'_> {
    fn give(&mut self, ip: IpAddr, node: &str) {
        self.held.entry(node.to_owned()).or_default()[usize::from(ip.is_ipv6())] += 1;
        self.owners.insert(ip, node.to_owned());
    }

    fn held(&self, node: &str) -> [u32; 2] {
        self.held.get(node).copied().unwrap_or_default()
    }

    fn has_room(&self, node: &str, capacity: &Capacity, ip: &IpAddr) -> bool {
        let [v4, v6] = self.held(node);
        let (held, most) = if ip.is_ipv6() { (v6, capacity.ipv6) } else { (v4, capacity.ipv4) };
        most.is_none_or(|most| held < most) && capacity.ip.is_none_or(|most| v4 + v6 < most)
    }

    fn may_hold(&self, node: &str, candidate: &Candidate, ip: &IpAddr) -> bool {
        candidate.healthy() && candidate.has_network_of(ip) && self.has_room(node, &candidate.capacity, ip)
    }

    fn why_not(&self, ip: &IpAddr) -> Unassigned {
        let assignable = &self.assignable;
        if assignable.is_empty() {
            Unassigned::NoNode
        } else if !assignable.iter().any(|(_, c)| c.healthy()) {
            Unassigned::NotReady
        } else if !assignable.iter().any(|(_, c)| c.healthy() && c.has_network_of(ip)) {
            Unassigned::NoUplink
        } else if !assignable.iter().any(|(n, c)| self.may_hold(n, c, ip)) {
            Unassigned::NoCapacity
        } else {
            Unassigned::NodeTaken
        }
    }
}

/// One object's new addresses of one family, each on a node of its own.
struct Matching {
    placed: BTreeMap<String, IpAddr>,
}

impl Matching {
    /// Finds a node for an address, if need be by moving another *new* address of the object (an augmenting
    /// path, as in Kuhn's algorithm): first come, first served would leave an address that fits one node
    /// only without it.
    fn place(
        &mut self,
        state: &State<'_>,
        request: &Request,
        siblings: &BTreeSet<String>,
        ip: IpAddr,
        seen: &mut BTreeSet<String>,
    ) -> bool {
        let mut nodes: Vec<_> = state
            .assignable
            .iter()
            .filter(|(node, c)| !siblings.contains(*node) && state.may_hold(node, c, &ip))
            .map(|(node, _)| *node)
            .collect();
        // Free nodes first, standbys first among them, then the least burdened; the name decides between equals.
        let standbys = request.standbys.get(&ip).map(Vec::as_slice).unwrap_or_default();
        nodes.sort_by_key(|node| {
            let place = standbys.iter().position(|s| s == *node).unwrap_or(standbys.len());
            (self.placed.contains_key(*node), place, state.held(node).iter().sum::<u32>(), *node)
        });
        for node in nodes {
            if !seen.insert(node.clone()) {
                continue;
            }
            let free = match self.placed.get(node).copied() {
                None => true,
                Some(other) => self.place(state, request, siblings, other, seen),
            };
            if free {
                self.placed.insert(node.clone(), ip);
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, n])
    }

    fn ip6(n: u8) -> IpAddr {
        IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()])
    }

    fn candidate() -> Candidate {
        Candidate {
            assignable: true,
            ready: true,
            reachable: true,
            networks: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()],
            capacity: Capacity::default(),
        }
    }

    fn candidates(names: &[&str]) -> BTreeMap<String, Candidate> {
        names.iter().map(|n| ((*n).to_owned(), candidate())).collect()
    }

    fn request(addresses: &[u8]) -> Request {
        Request { addresses: addresses.iter().map(|n| ip(*n)).collect(), ..Request::default() }
    }

    fn first(requests: &[Request], candidates: &BTreeMap<String, Candidate>) -> Assignment {
        assign(requests, candidates, &BTreeMap::new())
    }

    #[test]
    fn one_address_of_an_object_a_node_and_the_surplus_says_why() {
        let a = first(&[request(&[1, 2, 3])], &candidates(&["a", "b"]));
        assert_eq!(a.owners.values().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(a.unassigned, BTreeMap::from([(ip(3), Unassigned::NodeTaken)]));
    }

    #[test]
    fn families_may_share_a_node() {
        let requests =
            [Request { addresses: vec![ip(1), "2001:db8::1".parse().unwrap()], ..Request::default() }];
        let a = first(&requests, &candidates(&["a"]));
        assert_eq!(a.owners.len(), 2);
    }

    #[test]
    fn what_makes_a_node_eligible() {
        let of = |change: fn(&mut Candidate)| {
            let mut c = candidates(&["a"]);
            c.values_mut().for_each(change);
            first(&[request(&[1])], &c).unassigned[&ip(1)]
        };
        assert_eq!(of(|c| c.assignable = false), Unassigned::NoNode);
        assert_eq!(of(|c| c.ready = false), Unassigned::NotReady);
        assert_eq!(of(|c| c.reachable = false), Unassigned::NotReady);
        assert_eq!(of(|c| c.networks.clear()), Unassigned::NoUplink);
        assert_eq!(of(|c| c.capacity.ip = Some(0)), Unassigned::NoCapacity);
        assert_eq!(of(|c| c.capacity.ipv4 = Some(0)), Unassigned::NoCapacity);
    }

    #[test]
    fn an_address_that_fits_one_node_only_gets_it() {
        let mut c = candidates(&["a", "b"]);
        c.get_mut("a").unwrap().networks.push("198.51.100.0/24".parse().unwrap());
        let far: IpAddr = "198.51.100.1".parse().unwrap();
        let a = first(&[Request { addresses: vec![ip(1), far], ..Request::default() }], &c);
        assert_eq!(a.owners, BTreeMap::from([(ip(1), "b".to_owned()), (far, "a".to_owned())]));
    }

    #[test]
    fn a_returning_node_gets_what_nobody_holds_and_no_more() {
        let requests = [request(&[1, 2]), request(&[3])];
        let alone = first(&requests, &candidates(&["a"]));
        assert_eq!(alone.owners.len(), 2);
        let both = assign(&requests, &candidates(&["a", "b"]), &alone.owners);
        assert_eq!(both.owners[&ip(1)], "a");
        assert_eq!(both.owners[&ip(2)], "b");
        assert_eq!(both.owners[&ip(3)], "a", "nothing moves to even out");
    }

    #[test]
    fn a_standby_takes_over_and_nothing_moves_to_one() {
        let mut request = request(&[1]);
        request.standbys.insert(ip(1), vec!["c".into(), "b".into()]);
        let requests = [request];
        let held: BTreeMap<_, _> = [(ip(1), "a".to_owned())].into();
        let owner = |names: &[&str]| assign(&requests, &candidates(names), &held).owners[&ip(1)].clone();
        assert_eq!(owner(&["a", "b", "c", "d"]), "a");
        assert_eq!(owner(&["b", "c", "d"]), "c");
        assert_eq!(owner(&["b", "d"]), "b");
        assert_eq!(owner(&["d", "e"]), "d", "who is not ready is better than nobody");
        let mut c = candidates(&["b", "c"]);
        c.get_mut("c").unwrap().ready = false;
        assert_eq!(assign(&requests, &c, &held).owners[&ip(1)], "b");
    }

    #[test]
    fn a_dead_nodes_addresses_spread_over_the_others() {
        let requests: Vec<_> = (1..=9).map(|n| request(&[n])).collect();
        let before = first(&requests, &candidates(&["a", "b", "c"]));
        let after = assign(&requests, &candidates(&["a", "b"]), &before.owners);
        for (ip, node) in &before.owners {
            assert!(node == "c" || &after.owners[ip] == node);
        }
        let count = |n: &str| after.owners.values().filter(|o| *o == n).count();
        assert!(count("a").abs_diff(count("b")) <= 1);
    }

    /// Up to 12 objects of up to 4 addresses, up to 6 nodes in any state.
    fn worlds() -> impl Strategy<Value = (Vec<Request>, BTreeMap<String, Candidate>, BTreeMap<IpAddr, String>)>
    {
        let node = (any::<[bool; 3]>(), proptest::option::of(0_u32..6), any::<bool>());
        let nodes = proptest::collection::vec(node, 0..6).prop_map(|nodes| {
            let mut all = BTreeMap::new();
            for (i, (flags, room, second)) in nodes.into_iter().enumerate() {
                let mut c = candidate();
                // Mostly healthy.
                c.assignable = flags[0] || flags[1];
                c.ready = flags[1] || flags[2];
                c.capacity.ipv4 = room;
                c.capacity.ipv6 = room.map(|room| room / 2);
                c.networks = vec!["192.0.2.0/25".parse().unwrap()];
                if second {
                    c.networks.push("192.0.2.128/25".parse().unwrap());
                    c.networks.push("2001:db8::/64".parse().unwrap());
                }
                all.insert(format!("n{i}"), c);
            }
            all
        });
        let sizes = proptest::collection::vec(1_usize..5, 0..12).prop_map(|sizes| {
            let mut next = 0_u8;
            let mut address = || {
                next += 1;
                // All networks in turn.
                match next % 3 {
                    0 => ip6(next),
                    _ => ip(next.wrapping_mul(67)),
                }
            };
            sizes
                .into_iter()
                .map(|n| Request { addresses: (0..n).map(|_| address()).collect(), ..Request::default() })
                .collect::<Vec<_>>()
        });
        let current = proptest::collection::btree_map(
            prop_oneof![(0_u8..255).prop_map(ip), (0_u8..48).prop_map(ip6)],
            (0..7).prop_map(|n| format!("n{n}")),
            0..40,
        );
        (sizes, nodes, current)
    }

    proptest! {
        #[test]
        fn always_valid_complete_and_stable((requests, nodes, current) in worlds()) {
            let a = assign(&requests, &nodes, &current);
            let mut load: BTreeMap<(&str, bool), u32> = BTreeMap::new();
            let most = |node: &str, six: bool| if six { nodes[node].capacity.ipv6 } else { nodes[node].capacity.ipv4 };
            for request in &requests {
                let mut seen = BTreeSet::new();
                for ip in &request.addresses {
                    // Every address has a node or a reason, never both.
                    prop_assert_ne!(a.owners.contains_key(ip), a.unassigned.contains_key(ip));
                    if let Some(node) = a.owners.get(ip) {
                        prop_assert!(nodes[node].healthy() && nodes[node].has_network_of(ip));
                        prop_assert!(seen.insert((node, ip.is_ipv6())), "two of an object and family on {}", node);
                        *load.entry((node, ip.is_ipv6())).or_default() += 1;
                    }
                }
            }
            for ((node, six), n) in &load {
                prop_assert!(most(node, *six).is_none_or(|most| *n <= most));
            }
            // Nothing that may stay moves, and doing it again changes nothing.
            let again = assign(&requests, &nodes, &a.owners);
            prop_assert_eq!(&again.owners, &a.owners);
            // An unassigned address has no node left that could take it.
            for request in &requests {
                let held = request.addresses.iter().filter_map(|ip| Some((a.owners.get(ip)?, ip.is_ipv6())));
                let mine: BTreeSet<_> = held.collect();
                for ip in request.addresses.iter().filter(|ip| a.unassigned.contains_key(ip)) {
                    for (name, c) in &nodes {
                        let six = ip.is_ipv6();
                        let has = load.get(&(name.as_str(), six)).copied().unwrap_or(0);
                        let room = most(name, six).is_none_or(|most| has < most);
                        let could = c.healthy() && c.has_network_of(ip) && room && !mine.contains(&(name, six));
                        prop_assert!(!could, "{} could hold {}", name, ip);
                    }
                }
            }
        }

        #[test]
        fn equal_nodes_get_equal_shares(objects in 1_usize..40, nodes in 1_usize..8) {
            let requests: Vec<_> = (0..objects).map(|n| request(&[u8::try_from(n + 1).unwrap()])).collect();
            let names: Vec<_> = (0..nodes).map(|n| format!("n{n}")).collect();
            let c = candidates(&names.iter().map(String::as_str).collect::<Vec<_>>());
            let a = first(&requests, &c);
            let counts: Vec<_> =
                names.iter().map(|n| a.owners.values().filter(|o| *o == n).count()).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{:?}", counts);
        }

        #[test]
        fn only_what_must_move_moves((requests, mut nodes, current) in worlds(), gone in 0_usize..6) {
            let before = assign(&requests, &nodes, &current);
            let gone = format!("n{gone}");
            nodes.remove(&gone);
            let after = assign(&requests, &nodes, &before.owners);
            for (ip, node) in before.owners.iter().filter(|(_, n)| **n != gone) {
                prop_assert_eq!(after.owners.get(ip), Some(node));
            }
        }
    }
}

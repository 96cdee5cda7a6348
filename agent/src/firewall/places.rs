//! Where rules are for: every network, node and name of an object once, in an order in which a look-up table can be
//! made by going through it.

use std::net::IpAddr;

use datapath::keys::{NameId, Winner};
use ipnet::IpNet;

use super::{Destination, Name, Rule};

/// A destination. Sorted, a network stands before all that it contains, and what it contains follows at once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Place {
    /// IPv4, IPv6, names.
    kind: Kind,
    /// The network's first bits, from the top; or the name's id.
    bits: u128,
    /// How many of them count.
    len: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    V4,
    V6,
    Name,
}

/// A destination as the tables have it: the first and the last address of a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    V4(u32, u32),
    V6(u128, u128),
    Name(NameId),
}

impl Place {
    fn network(net: IpNet) -> Self {
        match net {
            IpNet::V4(net) => Self {
                kind: Kind::V4,
                bits: u128::from(net.network().to_bits()) << 96,
                len: net.prefix_len(),
            },
            IpNet::V6(net) => Self { kind: Kind::V6, bits: net.network().to_bits(), len: net.prefix_len() },
        }
    }

    fn host(ip: IpAddr) -> Self {
        Self::network(ip.into())
    }

    fn name(id: NameId) -> Self {
        Self { kind: Kind::Name, bits: id.into(), len: 128 }
    }

    /// Whether an address or name of `other` is always one of this.
    fn contains(&self, other: &Self) -> bool {
        let differ = (self.bits ^ other.bits).checked_shr(128 - u32::from(self.len)).unwrap_or(0);
        self.kind == other.kind && self.len <= other.len && differ == 0
    }

    /// Whether it is all of a family.
    fn is_everything(&self) -> bool {
        self.len == 0
    }

    pub(super) fn is_name(&self) -> bool {
        self.kind == Kind::Name
    }

    pub(super) fn target(&self) -> Target {
        let last = self.bits | u128::MAX.checked_shr(self.len.into()).unwrap_or(0);
        match self.kind {
            Kind::V4 => Target::V4((self.bits >> 96) as u32, (last >> 96) as u32),
            Kind::V6 => Target::V6(self.bits, last),
            Kind::Name => Target::Name(self.bits as NameId),
        }
    }
}

/// One line of a table: a place, and the index of the rule that wins there.
pub(super) type Line = (u32, u32);
/// A network that is gone through: where it ends, and what wins in it.
type Around = (u32, u32);

/// The places of an object's rules.
pub(super) struct Places {
    /// Sorted, each once.
    pub(super) list: Vec<Place>,
    /// By place: one past the last that it contains.
    pub(super) ends: Vec<u32>,
    /// Each destination of each rule: the rule's index and the place, sorted, each once.
    pub(super) uses: Vec<(u32, u32)>,
}

impl Places {
    /// Collects them. Every name of the rules is asked for its id, in their order.
    pub(super) fn of(rules: &[Rule], name_id: &mut dyn FnMut(&Name) -> NameId) -> Self {
        let mut found = Vec::with_capacity(rules.len());
        for (rule, index) in rules.iter().zip(0u32..) {
            match &rule.to {
                Destination::Network(net) => found.push((Place::network(*net), index)),
                Destination::Name(name) => found.push((Place::name(name_id(name)), index)),
                Destination::Nodes(ips) => found.extend(ips.iter().map(|ip| (Place::host(*ip), index))),
            }
        }
        found.sort_unstable();
        found.dedup();
        let mut places: Vec<Place> = Vec::with_capacity(found.len());
        let mut uses = Vec::with_capacity(found.len());
        for (place, rule) in found {
            if places.last() != Some(&place) {
                places.push(place);
            }
            uses.push((rule, places.len() as u32 - 1));
        }
        uses.sort_unstable();
        Self { ends: ends(&places), list: places, uses }
    }

    /// The table of rules that have the lowest index `own` at each place ([`Winner::NONE`]: there is none), and for each
    /// place the lowest index of all that contain it.
    ///
    /// What wins already in the network around it needs no line. Nor does a name, where both families are decided as
    /// a whole by something lower: each of its addresses is of one of them.
    pub(super) fn table(&self, own: &[u32]) -> (Vec<Line>, Vec<u32>) {
        let mut table = Vec::new();
        let mut lowest = Vec::with_capacity(own.len());
        let mut around: Vec<Around> = Vec::new();
        let (mut all, mut families) = (0, 0);
        for ((place, own), n) in self.list.iter().zip(own).zip(0u32..) {
            while around.pop_if(|(end, _)| *end <= n).is_some() {}
            let outer = match around.last() {
                Some((_, winner)) => *winner,
                None if place.is_name() && families == 2 => all,
                None => Winner::NONE,
            };
            if *own < outer {
                table.push((n, *own));
                around.push((self.ends[n as usize], *own));
            }
            lowest.push(outer.min(*own));
            if place.is_everything() {
                all = all.max(outer.min(*own));
                families += 1;
            }
        }
        (table, lowest)
    }
}

/// One past the last place that each contains.
fn ends(places: &[Place]) -> Vec<u32> {
    let mut ends = vec![places.len() as u32; places.len()];
    let mut around: Vec<usize> = Vec::new();
    for (n, place) in places.iter().enumerate() {
        while let Some(outer) = around.pop_if(|outer| !places[*outer].contains(place)) {
            ends[outer] = n as u32;
        }
        around.push(n);
    }
    ends
}

/// The lowest index at each place while ports are gone through, so that a table costs what it has lines, not places: a
/// tree of minima.
pub(super) struct Lowest {
    /// The minimum of `2n` and `2n + 1` at `n`; the places from `half` on.
    tree: Vec<u32>,
    half: usize,
}

impl Lowest {
    /// No rule anywhere.
    pub(super) fn new(places: usize) -> Self {
        let half = places.next_power_of_two();
        Self { tree: vec![Winner::NONE; 2 * half], half }
    }

    pub(super) fn set(&mut self, place: u32, lowest: u32) {
        let mut i = self.half + place as usize;
        self.tree[i] = lowest;
        while i > 1 {
            i /= 2;
            let both = self.tree[2 * i].min(self.tree[2 * i + 1]);
            if self.tree[i] == both {
                return;
            }
            self.tree[i] = both;
        }
    }

    /// The first place in a range that has something below a bound.
    fn next(&self, from: u32, end: u32, bound: u32) -> Option<u32> {
        if from >= end {
            return None;
        }
        let mut i = self.half + from as usize;
        while self.tree[i] >= bound {
            // To the next subtree on the right: up, while this is the right one of two.
            i = (i >> i.trailing_ones()) + 1;
            if i == 1 {
                return None;
            }
        }
        while i < self.half {
            i *= 2;
            if self.tree[i] >= bound {
                i += 1;
            }
        }
        Some((i - self.half) as u32).filter(|place| *place < end)
    }

    /// The table of what is there now, without lines that say what the network around them says.
    pub(super) fn table(&self, ends: &[u32]) -> Vec<Line> {
        let mut table = Vec::new();
        let mut around: Vec<Around> = Vec::new();
        let mut from = 0;
        loop {
            let (end, bound) = around.last().copied().unwrap_or((ends.len() as u32, Winner::NONE));
            if let Some(place) = self.next(from, end, bound) {
                let winner = self.tree[self.half + place as usize];
                table.push((place, winner));
                around.push((ends[place as usize], winner));
                from = place + 1;
            } else if around.pop().is_some() {
                from = end;
            } else {
                return table;
            }
        }
    }
}

//! The audit log: one line for each new denial, at a bounded rate. The programs keep what they have denied in a
//! table by pod and destination; what is new is the difference between two looks at it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use datapath::conntrack::{older_than, seconds};
use datapath::keys::{Denial, DenialKey, PodId, PodName, RulesetId};
use datapath::verdict::DropReason;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, info};

use super::{FirewallState, Rule, show};
use crate::bpf::{firewall_counts, maps};
use crate::image::MapImage;
use crate::metrics::State;
use crate::model::Desired;

/// Of the log's lines: `--log info,outgate::audit=off` is without them.
pub const TARGET: &str = "outgate::audit";
/// How often the table is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Lines a second, in the long run.
const RATE: u64 = 20;
/// Lines at once.
const BURST: u64 = 100;
/// A denial that has not been repeated for so long is new when it is, in seconds.
const QUIET: u32 = 60;

/// What has come to a denial since the last look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct News {
    /// Who, and what.
    pub key: DenialKey,
    /// As it is now.
    pub denial: Denial,
    /// Packets since the last look.
    pub packets: u32,
    /// Whether it is new: not seen before, by another rule than before, or again after a minute without.
    pub new: bool,
}

/// The differences between two looks, of which each tells what the table holds.
#[must_use]
pub fn news(before: &BTreeMap<DenialKey, Denial>, now: &BTreeMap<DenialKey, Denial>) -> Vec<News> {
    let of = |(key, denial): (&DenialKey, &Denial)| {
        let all = News { key: *key, denial: *denial, packets: denial.packets, new: true };
        // One that left the table and came back counts anew.
        let Some(old) = before.get(key).filter(|old| old.first == denial.first) else { return Some(all) };
        let packets = denial.packets.wrapping_sub(old.packets);
        let other = (old.ruleset, old.rule) != (denial.ruleset, denial.rule);
        let quiet = older_than(denial.last, old.last, seconds(QUIET));
        (packets != 0).then_some(News { packets, new: other || quiet, ..all })
    };
    now.iter().filter_map(of).collect()
}

/// What is to be logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Line {
    /// A denial.
    Denied(News),
    /// So many more were left out.
    LeftOut(u64),
}

/// What the log has had, and how much more it may have.
#[derive(Debug)]
pub struct Audit {
    /// As of the last look; none before the first: what was denied before is not told again.
    seen: Option<BTreeMap<DenialKey, Denial>>,
    /// Thousandths of lines that may be written at once.
    room: u64,
    /// When `room` was reckoned, in milliseconds of any clock.
    at: u64,
    left_out: u64,
}

impl Default for Audit {
    fn default() -> Self {
        Self { seen: None, room: BURST * 1000, at: 0, left_out: 0 }
    }
}

impl Audit {
    /// Takes a look. `now` is in milliseconds of a clock that does not go back.
    pub fn look(&mut self, now: u64, denials: BTreeMap<DenialKey, Denial>) -> Vec<Line> {
        let found = self.seen.as_ref().map(|seen| news(seen, &denials)).unwrap_or_default();
        self.seen = Some(denials);
        self.room = (self.room + (now - self.at) * RATE).min(BURST * 1000);
        self.at = now;
        let mut lines = Vec::new();
        // Of what was left out before, first: it is the older.
        if self.left_out > 0 && self.room >= 1000 {
            self.room -= 1000;
            lines.push(Line::LeftOut(std::mem::take(&mut self.left_out)));
        }
        for denied in found.into_iter().filter(|n| n.new) {
            if self.room >= 1000 {
                self.room -= 1000;
                lines.push(Line::Denied(denied));
            } else {
                self.left_out += 1;
            }
        }
        lines
    }

    /// Whether it has something to say without a new look.
    const fn owes(&self) -> bool {
        self.left_out > 0
    }
}

/// The text of a line.
#[must_use]
pub fn text(
    line: &Line,
    pods: &BTreeMap<PodId, PodName>,
    rules: &BTreeMap<RulesetId, Arc<Vec<Rule>>>,
) -> String {
    match line {
        Line::LeftOut(1) => "denied: 1 more that is not listed here".to_owned(),
        Line::LeftOut(n) => format!("denied: {n} more that are not listed here"),
        Line::Denied(News { key, denial, .. }) => {
            let to = show::destination(key);
            let rule = show::decision(denial.rule, rules.get(&denial.ruleset).map(|rules| rules.as_slice()));
            match pods.get(&key.pod) {
                None => format!("denied: a pod that is gone to {to} by {rule}"),
                Some(name) => {
                    let namespace = show::namespace(name);
                    format!(
                        "denied: pod {} to {to} by EgressFirewall {namespace}/default {rule}",
                        show::pod(name)
                    )
                }
            }
        }
    }
}

/// The rules of every version that is in force as its object is now, for their text.
#[must_use]
pub fn rules_in_force(
    image: &MapImage,
    desired: &Desired,
    states: &BTreeMap<String, FirewallState>,
) -> BTreeMap<RulesetId, Arc<Vec<Rule>>> {
    let mut found = BTreeMap::new();
    for ((namespace, _), pod) in &desired.pods {
        let in_force = states.get(namespace).is_some_and(|state| state.error.is_none());
        let rules = desired.firewalls.get(namespace).and_then(|firewall| firewall.rules.as_ref().ok());
        let place = pod.addresses.iter().find_map(|ip| image.pods.get(&(*ip).into())).map(|pod| pod.firewall);
        let ruleset = place.and_then(|place| image.firewalls.get(&place));
        if let (true, Some(rules), Some(ruleset)) = (in_force, rules, ruleset) {
            found.insert(*ruleset, Arc::clone(rules));
        }
    }
    found
}

/// Logs denials until it is cancelled. `dir` as of [`crate::bpf::pin_dir`].
pub async fn run(dir: PathBuf, state: Rc<RefCell<State>>) {
    let mut audit = Audit::default();
    let mut counted = None;
    let start = Instant::now();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // The table is large; whether it can have changed is cheap to see.
        let count = match maps::drops(&dir) {
            Ok(drops) => drops
                .iter()
                .filter(|(why, _)| matches!(why, DropReason::FirewallDenied | DropReason::FirewallNotReady))
                .map(|(_, count)| count.packets)
                .sum::<u64>(),
            Err(error) => {
                debug!("audit: {error}");
                continue;
            }
        };
        if counted == Some(count) && !audit.owes() {
            continue;
        }
        let lines = match firewall_counts::denials(&dir) {
            Ok(denials) => {
                let now = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
                audit.look(now, denials)
            }
            Err(error) => {
                debug!("audit: {error}");
                continue;
            }
        };
        counted = Some(count);
        if lines.is_empty() {
            continue;
        }
        let pods = firewall_counts::pod_names(&dir).unwrap_or_default();
        let state = state.borrow();
        for line in &lines {
            info!(target: TARGET, "{}", text(line, &pods, &state.rules));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use datapath::addr::Ip;
    use datapath::keys::Winner;
    use datapath::packet::TCP;

    fn key(last: u8) -> DenialKey {
        DenialKey {
            pod: 1,
            remote: Ip::v4([203, 0, 113, last]),
            remote_port: 443,
            protocol: TCP,
            ..DenialKey::default()
        }
    }

    fn denial(first: u32, last: u32, packets: u32) -> Denial {
        Denial { first, last, packets, ruleset: 5, rule: Winner::new(2, false).order }
    }

    fn table(entries: &[(u8, Denial)]) -> BTreeMap<DenialKey, Denial> {
        entries.iter().map(|(last, denial)| (key(*last), *denial)).collect()
    }

    #[test]
    fn what_is_new_and_what_goes_on() {
        let before = table(&[(1, denial(10, 20, 3)), (2, denial(10, 20, 3)), (3, denial(10, 20, 3))]);
        let of = |n: u8, denial: Denial| {
            let mut now = before.clone();
            now.insert(key(n), denial);
            let found = news(&before, &now);
            found.iter().map(|n| (n.key.remote, n.packets, n.new)).collect::<Vec<_>>()
        };
        let ip = |last| Ip::v4([203, 0, 113, last]);
        assert_eq!(of(1, denial(10, 20, 3)), []);
        assert_eq!(of(1, denial(10, 30, 5)), [(ip(1), 2, false)]);
        assert_eq!(of(4, denial(30, 30, 1)), [(ip(4), 1, true)]);
        assert_eq!(of(2, denial(30, 31, 2)), [(ip(2), 2, true)], "it had left the table");
        let by_another = Denial { rule: Winner::new(3, false).order, ..denial(10, 30, 4) };
        assert_eq!(of(3, by_another), [(ip(3), 1, true)]);
        assert_eq!(of(3, Denial { ruleset: 6, ..denial(10, 30, 4) }), [(ip(3), 1, true)]);
        let later = 20 + seconds(QUIET);
        assert_eq!(of(1, denial(10, later, 4)), [(ip(1), 1, false)]);
        assert_eq!(of(1, denial(10, later + 1, 4)), [(ip(1), 1, true)], "after a minute without");
        // The clock wraps around.
        let old = BTreeMap::from([(key(1), denial(u32::MAX - 5, u32::MAX, 1))]);
        let now = BTreeMap::from([(key(1), denial(u32::MAX - 5, 4, 2))]);
        assert!(!news(&old, &now)[0].new);
    }

    #[test]
    fn what_was_denied_before_the_first_look_is_not_told() {
        let mut audit = Audit::default();
        assert_eq!(audit.look(0, table(&[(1, denial(1, 1, 1))])), []);
        let lines = audit.look(500, table(&[(1, denial(1, 2, 2)), (2, denial(2, 2, 1))]));
        assert!(matches!(lines.as_slice(), [Line::Denied(n)] if n.key == key(2)), "{lines:?}");
    }

    #[test]
    fn the_rate_is_bounded_and_nothing_goes_untold() {
        let mut audit = Audit::default();
        let mut denials = BTreeMap::new();
        audit.look(0, denials.clone());
        let mut more = |n: u16, audit: &mut Audit, now: u64| {
            let from = denials.len() as u16;
            for port in from..from + n {
                denials.insert(DenialKey { remote_port: port, ..key(1) }, denial(1, 1, 1));
            }
            let lines = audit.look(now, denials.clone());
            let denied = lines.iter().filter(|l| matches!(l, Line::Denied(_))).count() as u64;
            let left = lines.iter().find_map(|l| if let Line::LeftOut(n) = l { Some(*n) } else { None });
            (denied, left)
        };
        assert_eq!(more(250, &mut audit, 500), (BURST, None));
        assert!(audit.owes());
        assert_eq!(more(0, &mut audit, 500), (0, None), "no room for a word");
        assert_eq!(
            more(30, &mut audit, 1000),
            (9, Some(150)),
            "half a second's room, a line of which is spent"
        );
        assert_eq!(more(0, &mut audit, 2000), (0, Some(21)));
        assert!(!audit.owes());
        // It fills up to the burst, not beyond.
        assert_eq!(more(200, &mut audit, 60_000), (BURST, None));
    }

    #[test]
    fn a_line_says_who_where_to_and_by_what() {
        let mut name = PodName::default();
        name.namespace[..4].copy_from_slice(b"prod");
        name.name[..3].copy_from_slice(b"web");
        let pods = BTreeMap::from([(1, name)]);
        let rule = |allows, to: &str| Rule {
            allows,
            to: super::super::Destination::Network(to.parse().unwrap()),
            ports: Vec::new(),
        };
        let rules = Arc::new(vec![rule(true, "10.0.0.0/8"), rule(true, "::/0"), rule(false, "0.0.0.0/0")]);
        let rules = BTreeMap::from([(5, rules)]);
        let line = |denial: Denial| Line::Denied(News { key: key(9), denial, packets: 1, new: true });
        let d = denial(1, 1, 1);
        assert_eq!(
            text(&line(d), &pods, &rules),
            "denied: pod prod/web to 203.0.113.9:443/tcp by EgressFirewall prod/default spec.egress[2] Deny 0.0.0.0/0"
        );
        assert_eq!(
            text(&line(Denial { ruleset: 4, ..d }), &pods, &rules),
            "denied: pod prod/web to 203.0.113.9:443/tcp by EgressFirewall prod/default spec.egress[2] Deny"
        );
        assert_eq!(
            text(&line(Denial { rule: Winner::NOT_READY, ..d }), &pods, &rules),
            "denied: pod prod/web to 203.0.113.9:443/tcp by EgressFirewall prod/default no rules are in force"
        );
        assert_eq!(
            text(&line(d), &BTreeMap::new(), &rules),
            "denied: a pod that is gone to 203.0.113.9:443/tcp by spec.egress[2] Deny 0.0.0.0/0"
        );
        assert_eq!(text(&Line::LeftOut(7), &pods, &rules), "denied: 7 more that are not listed here");
    }
}

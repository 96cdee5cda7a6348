//! When which name is looked up: a pure machine that is told the time. `client` asks.
//!
//! The intervals are those that OVN-Kubernetes' users know: at the answer's TTL, after 5 s if that is 0, after 30 min at
//! the latest; after a failure what is known stays, and is asked for again after 5 s, doubling to 2 min.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use datapath::addr::Ip;
use datapath::keys::{Credit, FirewallId, LearntKey, NameId};
use hickory_proto::rr::RecordType;
use tokio::time::Instant;

use super::wire::Wire;

/// Questions under way at a time.
pub const UNDER_WAY: usize = 32;
/// The least time between two questions: 500 a second, so that a thousand names, or all nodes at once, are no burst.
pub const PACE: Duration = Duration::from_millis(2);
/// For an answer that may be used once.
const ONCE: Duration = Duration::from_secs(5);
/// The longest time between two look-ups of a name, whatever its TTL.
const LONGEST: Duration = Duration::from_mins(30);
/// After the first failure; each further one doubles it.
const RETRY: Duration = Duration::from_secs(5);
/// After many failures.
const LONGEST_RETRY: Duration = Duration::from_mins(2);
/// For "no such address" without a word for how long.
const NO_ADDRESS: Duration = Duration::from_mins(1);
/// All nodes hear of a TTL that a resolver counts down at once: they ask again up to this part of it later, or
/// [`MOST_SPREAD`], each at its own time.
const SPREAD: u32 = 8;
const MOST_SPREAD: Duration = Duration::from_secs(5);

/// Who wants a name's addresses: the firewall, and the name's id there.
pub type Place = (FirewallId, NameId);

/// A question.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Question {
    /// The name.
    pub name: Wire,
    /// Which addresses.
    pub family: Family,
}

/// Kinds of addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The kind of records.
    #[must_use]
    pub const fn kind(self) -> RecordType {
        match self {
            Self::V4 => RecordType::A,
            Self::V6 => RecordType::AAAA,
        }
    }
}

/// What became of a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Addresses, each with its TTL in seconds.
    Found(Vec<(Ip, u32)>),
    /// The name has none of this family; for how many seconds that may be remembered.
    NoAddress(Option<u32>),
    /// There is no such name.
    NoName,
    /// Nobody could say.
    Failed(String),
}

/// All names, and when each is looked up.
#[derive(Debug)]
pub struct Lookups {
    questions: BTreeMap<Question, State>,
    /// Those that wait, by time.
    due: BTreeSet<(Instant, Question)>,
    under_way: usize,
    /// No question before.
    not_before: Option<Instant>,
    /// State of a xorshift generator, never 0.
    seed: u64,
    /// Troubles may be others than when they were last asked for.
    news: bool,
}

#[derive(Debug)]
struct State {
    places: BTreeSet<Place>,
    /// `None`: under way.
    due: Option<Instant>,
    /// Wanted by a new place while it was under way.
    again: bool,
    /// The addresses last found.
    known: Vec<Ip>,
    /// What is wrong.
    trouble: Option<Trouble>,
    /// Look-ups in turn that told nothing.
    failures: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Trouble {
    NoAddress,
    NoName,
    Failed(String),
}

impl Lookups {
    /// Without names. The seed spreads this node's look-ups.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            questions: BTreeMap::new(),
            due: BTreeSet::new(),
            under_way: 0,
            not_before: None,
            seed: seed.max(1),
            news: false,
        }
    }

    /// Sets which names are wanted where. A name that is wanted somewhere new is due at once.
    pub fn set(&mut self, wanted: &BTreeMap<Wire, BTreeSet<Place>>, now: Instant) {
        let due = &mut self.due;
        self.questions.retain(|question, state| {
            let kept = wanted.contains_key(&question.name);
            self.news |= !kept && state.trouble.is_some();
            if let Some(at) = state.due.filter(|_| !kept) {
                due.remove(&(at, question.clone()));
            }
            kept
        });
        for (name, places) in wanted {
            for family in [Family::V4, Family::V6] {
                let question = Question { name: name.clone(), family };
                let state = self.questions.entry(question.clone()).or_insert_with(|| {
                    due.insert((now, question.clone()));
                    State {
                        places: places.clone(),
                        due: Some(now),
                        again: false,
                        known: Vec::new(),
                        trouble: None,
                        failures: 0,
                    }
                });
                let more = !places.is_subset(&state.places);
                state.places.clone_from(places);
                match state.due {
                    None => state.again |= more,
                    Some(at) if more && at > now => {
                        due.remove(&(at, question.clone()));
                        due.insert((now, question));
                        state.due = Some(now);
                    }
                    Some(_) => {}
                }
            }
        }
    }

    /// Makes every name due that was not found: there are others to ask now.
    pub fn ask_anew(&mut self, now: Instant) {
        for (question, state) in &mut self.questions {
            if let Some(at) = state.due.filter(|at| state.trouble.is_some() && *at > now) {
                self.due.remove(&(at, question.clone()));
                self.due.insert((now, question.clone()));
                state.due = Some(now);
            }
        }
    }

    /// The next question, if one may be asked now. [`Lookups::done`] ends it.
    pub fn next(&mut self, now: Instant) -> Option<Question> {
        if self.wake()? > now {
            return None;
        }
        let (_, question) = self.due.pop_first()?;
        if let Some(state) = self.questions.get_mut(&question) {
            state.due = None;
        }
        self.under_way += 1;
        self.not_before = Some(now + PACE);
        Some(question)
    }

    /// When [`Lookups::next`] has a question; `None`: not before one that is under way has ended.
    #[must_use]
    pub fn wake(&self) -> Option<Instant> {
        let (due, _) = self.due.first()?;
        (self.under_way < UNDER_WAY).then(|| self.not_before.map_or(*due, |at| at.max(*due)))
    }

    /// Ends a question, and says what is to be credited.
    pub fn done(&mut self, question: Question, outcome: Outcome, now: Instant) -> Vec<Credit> {
        self.under_way -= 1;
        let spread = self.random();
        // The name may be unwanted by now, or unwanted and wanted again.
        let Some(state) = self.questions.get_mut(&question).filter(|state| state.due.is_none()) else {
            return Vec::new();
        };
        let before = (state.trouble.clone(), state.failures > 1);
        let mut credits = Vec::new();
        let mut credit = |ip: Ip, ttl: u32| {
            credits.extend(state.places.iter().map(|(firewall, name)| Credit {
                key: LearntKey { firewall: *firewall, ip },
                name: *name,
                ttl,
                action: Credit::ENTER,
            }));
        };
        state.failures = match outcome {
            Outcome::Found(_) | Outcome::NoAddress(_) => 0,
            Outcome::NoName | Outcome::Failed(_) => state.failures.saturating_add(1),
        };
        let retry = LONGEST_RETRY.min(RETRY.saturating_mul(1 << state.failures.saturating_sub(1).min(8)));
        let wait = match outcome {
            Outcome::Found(addresses) => {
                state.trouble = None;
                state.known = addresses.iter().map(|(ip, _)| *ip).collect();
                let ttl = addresses.iter().map(|(_, ttl)| *ttl).min().unwrap_or(0);
                for (ip, ttl) in addresses {
                    credit(ip, ttl);
                }
                spread_over(interval(Some(ttl), ONCE), spread)
            }
            Outcome::NoAddress(ttl) => {
                state.trouble = Some(Trouble::NoAddress);
                state.known.clear();
                spread_over(interval(ttl, NO_ADDRESS), spread)
            }
            Outcome::NoName => {
                state.trouble = Some(Trouble::NoName);
                state.known.clear();
                retry
            }
            Outcome::Failed(why) => {
                state.trouble = Some(Trouble::Failed(why));
                // With the grace that every credit has, they last until after the next failure.
                state.known.iter().for_each(|ip| credit(*ip, retry.as_secs() as u32));
                retry
            }
        };
        self.news |= before != (state.trouble.clone(), state.failures > 1);
        let at = if std::mem::take(&mut state.again) { now } else { now + wait };
        state.due = Some(at);
        self.due.insert((at, question));
        credits
    }

    /// Whether [`Lookups::troubles`] may have changed since this was last asked.
    pub const fn take_news(&mut self) -> bool {
        std::mem::replace(&mut self.news, false)
    }

    /// Names that rules are for and that are not found, each with the reason.
    #[must_use]
    pub fn troubles(&self) -> BTreeMap<&Wire, String> {
        let mut by_name: BTreeMap<&Wire, Vec<&State>> = BTreeMap::new();
        for (question, state) in &self.questions {
            by_name.entry(&question.name).or_default().push(state);
        }
        by_name.into_iter().filter_map(|(name, states)| Some((name, trouble(&states)?))).collect()
    }

    /// How many questions are under way.
    #[must_use]
    pub const fn under_way(&self) -> usize {
        self.under_way
    }

    /// How many names there are.
    #[must_use]
    pub fn names(&self) -> usize {
        self.questions.len() / 2
    }

    fn random(&mut self) -> u64 {
        let mut x = self.seed;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.seed = x;
        x
    }
}

/// What is wrong with a name, of its questions for both families. One answer that does not come is nothing yet.
fn trouble(states: &[&State]) -> Option<String> {
    let troubles =
        || states.iter().filter_map(|state| state.trouble.as_ref().map(|trouble| (state, trouble)));
    for (state, trouble) in troubles() {
        if let Trouble::Failed(why) = trouble
            && state.failures > 1
        {
            let kept = if state.known.is_empty() { "" } else { "; the addresses known stay" };
            return Some(format!("cannot be looked up: {why}{kept}"));
        }
    }
    if troubles().count() < states.len() {
        return None; // it has addresses of one family, or has not been looked up
    }
    if troubles().any(|(_, trouble)| *trouble == Trouble::NoName) {
        return Some("the name does not exist: rules for it match nothing".to_owned());
    }
    troubles()
        .all(|(_, trouble)| *trouble == Trouble::NoAddress)
        .then(|| "the name has no address: rules for it match nothing".to_owned())
}

/// How long an answer is good for.
fn interval(ttl: Option<u32>, without: Duration) -> Duration {
    match ttl {
        None => without,
        Some(0) => ONCE,
        Some(ttl) => LONGEST.min(Duration::from_secs(ttl.into())),
    }
}

fn spread_over(wait: Duration, random: u64) -> Duration {
    let most = (wait / SPREAD).min(MOST_SPREAD).as_millis() as u64;
    (wait + Duration::from_millis(random % (most + 1))).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(text: &str) -> Wire {
        Wire::of(&hickory_proto::rr::Name::from_ascii(text).unwrap())
    }

    fn wanted(names: &[(&str, &[Place])]) -> BTreeMap<Wire, BTreeSet<Place>> {
        names.iter().map(|(name, places)| (wire(name), places.iter().copied().collect())).collect()
    }

    fn v4(last: u8) -> Ip {
        Ip::v4([192, 0, 2, last])
    }

    fn found(ttl: u32) -> Outcome {
        Outcome::Found(vec![(v4(1), ttl)])
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Look-ups of one name, of which the AAAA question is answered with a day's "no address" already.
    struct One {
        lookups: Lookups,
        now: Instant,
    }

    impl One {
        fn new() -> Self {
            let mut one = Self { lookups: Lookups::new(1), now: Instant::now() };
            one.lookups.set(&wanted(&[("a.example", &[(1, 7)])]), one.now);
            let v4 = one.lookups.next(one.now).unwrap();
            assert_eq!(v4.family, Family::V4);
            one.now += PACE;
            let v6 = one.lookups.next(one.now).unwrap();
            one.lookups.done(v6, Outcome::NoAddress(Some(86_400)), one.now);
            one
        }

        fn question() -> Question {
            Question { name: wire("a.example"), family: Family::V4 }
        }

        /// Answers the question that is under way, and goes to when it is asked again; how long that was.
        fn answer(&mut self, outcome: Outcome) -> (Duration, Vec<Credit>) {
            let credits = self.lookups.done(Self::question(), outcome, self.now);
            loop {
                let at = self.lookups.wake().unwrap();
                assert_eq!(
                    self.lookups.next(at.checked_sub(Duration::from_millis(1)).unwrap()),
                    None,
                    "too early"
                );
                let question = self.lookups.next(at).unwrap();
                if question == Self::question() {
                    let waited = at - self.now;
                    self.now = at;
                    return (waited, credits);
                }
                self.lookups.done(question, Outcome::NoAddress(Some(86_400)), at);
            }
        }
    }

    #[test]
    fn asked_again_at_the_ttl() {
        let mut one = One::new();
        for (ttl, least, most) in
            [(8, 8000, 9000), (60, 60_000, 65_000), (0, 5000, 5625), (86_400, 1_800_000, 1_800_000)]
        {
            let (waited, credits) = one.answer(found(ttl));
            assert!((least..=most).contains(&waited.as_millis()), "{ttl}: {waited:?}");
            let credit =
                Credit { key: LearntKey { firewall: 1, ip: v4(1) }, name: 7, ttl, action: Credit::ENTER };
            assert_eq!(credits, [credit]);
        }
        // The least of several.
        let (waited, credits) = one.answer(Outcome::Found(vec![(v4(1), 300), (v4(2), 16)]));
        assert!((16_000..=18_000).contains(&waited.as_millis()), "{waited:?}");
        assert_eq!(
            credits.iter().map(|c| (c.key.ip, c.ttl)).collect::<Vec<_>>(),
            [(v4(1), 300), (v4(2), 16)]
        );
    }

    #[test]
    fn failures_keep_what_is_known() {
        let mut one = One::new();
        one.answer(Outcome::Found(vec![(v4(1), 60), (v4(2), 60)]));
        let failed = || Outcome::Failed("timeout".to_owned());
        let mut waits = Vec::new();
        for _ in 0..8 {
            let (waited, credits) = one.answer(failed());
            waits.push(waited.as_secs());
            let kept: Vec<_> = credits.iter().map(|c| (c.key.ip, u64::from(c.ttl))).collect();
            assert_eq!(kept, [(v4(1), waited.as_secs()), (v4(2), waited.as_secs())]);
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 120, 120, 120]);
        let why = one.lookups.troubles()[&wire("a.example")].clone();
        assert_eq!(why, "cannot be looked up: timeout; the addresses known stay");
        // An answer begins anew.
        one.answer(found(8));
        assert!(one.lookups.troubles().is_empty());
        assert_eq!(one.answer(failed()).0, secs(5));
        assert!(one.lookups.troubles().is_empty(), "one lost answer is nothing");
    }

    #[test]
    fn no_such_name_is_a_result() {
        let mut one = One::new();
        one.answer(found(60));
        let (waited, credits) = one.answer(Outcome::NoName);
        assert_eq!((waited, credits), (secs(5), vec![]));
        assert_eq!(one.answer(Outcome::NoName).0, secs(10));
        assert_eq!(
            one.lookups.troubles()[&wire("a.example")],
            "the name does not exist: rules for it match nothing"
        );
        // What was known is not any more.
        assert_eq!(one.answer(Outcome::Failed("timeout".to_owned())).1, []);
        let (waited, _) = one.answer(Outcome::NoAddress(Some(16)));
        assert!((16_000..=18_000).contains(&waited.as_millis()), "{waited:?}");
        assert_eq!(
            one.lookups.troubles()[&wire("a.example")],
            "the name has no address: rules for it match nothing"
        );
        let (waited, _) = one.answer(Outcome::NoAddress(None));
        assert!((60_000..=65_000).contains(&waited.as_millis()), "{waited:?}");
        one.answer(found(60));
        assert!(one.lookups.troubles().is_empty(), "without IPv6 addresses nothing is wrong");
    }

    #[test]
    fn names_come_and_go() {
        let now = Instant::now();
        let mut lookups = Lookups::new(1);
        assert_eq!((lookups.wake(), lookups.next(now)), (None, None));
        lookups.set(&wanted(&[("a.example", &[(1, 7)])]), now);
        let first = lookups.next(now).unwrap();
        // Unwanted while it is under way.
        lookups.set(&wanted(&[("b.example", &[(1, 8)])]), now);
        assert_eq!(lookups.done(first, found(60), now), []);
        assert_eq!((lookups.names(), lookups.under_way()), (1, 0));
        let later = now + PACE;
        let b = lookups.next(later).unwrap();
        assert_eq!(b, Question { name: wire("b.example"), family: Family::V4 });
        // Unwanted and wanted again: the late answer counts for nothing, and it is asked once more.
        lookups.set(&BTreeMap::new(), later);
        lookups.set(&wanted(&[("b.example", &[(2, 9)])]), later);
        assert_eq!(lookups.done(b.clone(), found(60), later), []);
        assert_eq!(lookups.next(later + PACE), Some(b));
    }

    #[test]
    fn a_new_place_does_not_wait_for_the_ttl() {
        let now = Instant::now();
        let mut lookups = Lookups::new(1);
        lookups.set(&wanted(&[("a.example", &[(1, 7)])]), now);
        let question = lookups.next(now).unwrap();
        // While it is under way: its answer is for both, and it is asked again.
        lookups.set(&wanted(&[("a.example", &[(1, 7), (2, 9)])]), now);
        let credits = lookups.done(question.clone(), found(1800), now);
        assert_eq!(credits.iter().map(|c| (c.key.firewall, c.name)).collect::<Vec<_>>(), [(1, 7), (2, 9)]);
        assert_eq!(lookups.next(now + PACE), Some(question.clone()));
        lookups.done(question.clone(), found(1800), now);
        let v6 = lookups.next(now + 2 * PACE).unwrap();
        assert_eq!(v6.family, Family::V6);
        lookups.done(v6, Outcome::NoAddress(Some(1800)), now);
        assert_eq!(lookups.next(now + secs(60)), None);
        // While it waits.
        lookups.set(&wanted(&[("a.example", &[(2, 9), (3, 4)])]), now + secs(60));
        assert_eq!(lookups.next(now + secs(60)), Some(question.clone()));
        lookups.done(question, found(1800), now + secs(60));
        // Fewer places are no reason to ask.
        lookups.next(now + secs(61)).unwrap();
        lookups.set(&wanted(&[("a.example", &[(3, 4)])]), now + secs(61));
        assert_eq!(lookups.next(now + secs(62)), None);
    }

    #[test]
    fn other_servers_are_asked_for_what_was_not_found() {
        let mut one = One::new();
        one.answer(Outcome::NoName);
        one.lookups.done(One::question(), Outcome::NoName, one.now);
        one.lookups.ask_anew(one.now);
        let mut asked = Vec::new();
        for _ in 0..3 {
            one.now += PACE;
            asked.extend(one.lookups.next(one.now).map(|question| question.family));
        }
        assert_eq!(asked, [Family::V4, Family::V6]);
    }

    #[test]
    fn a_thousand_names_are_no_burst() {
        let start = Instant::now();
        let names: Vec<String> = (0..1000).map(|i| format!("n{i}.example")).collect();
        let names: Vec<(&str, &[Place])> = names.iter().map(|name| (name.as_str(), &[(1, 1)][..])).collect();
        let mut lookups = Lookups::new(1);
        lookups.set(&wanted(&names), start);
        let mut under_way = Vec::new();
        while let Some(at) = lookups.wake() {
            under_way.push(lookups.next(at.max(start)).unwrap());
        }
        assert_eq!((under_way.len(), lookups.under_way()), (UNDER_WAY, UNDER_WAY));
        // Each is answered after 10 ms: no two questions are closer than the pace, none is forgotten.
        let (mut now, mut asked, mut last) = (start + secs(1), UNDER_WAY, start + UNDER_WAY as u32 * PACE);
        while asked < 2000 {
            now += Duration::from_millis(10);
            for question in std::mem::take(&mut under_way) {
                lookups.done(question, found(1800), now);
            }
            while let Some(question) = lookups.next(now) {
                assert!(now - last >= PACE);
                (last, asked) = (now, asked + 1);
                under_way.push(question);
                now += Duration::from_millis(1);
            }
            assert!(under_way.len() <= UNDER_WAY);
        }
        assert!(now - start >= 1900 * PACE);
        assert_eq!(lookups.questions.values().filter(|s| s.known.is_empty()).count(), under_way.len());
    }
}

//! Keeps `LEARNT` within its bounds: names with too many addresses lose those to be forgotten first, and what the kernel
//! took out for want of room is reckoned, for an LRU map does not tell.

use std::collections::BTreeMap;

use datapath::addr::Ip;
use datapath::conntrack::{Ticks, older_than};
use datapath::keys::{Credit, FirewallId, Learnt, LearntKey, NameEvent, NameId};
use datapath::limits::NAME_ADDRESSES;

/// Counters of `NAME_EVENTS`, summed over CPUs.
pub type Events = BTreeMap<NameEvent, u64>;

/// An address of a name.
type Word = (FirewallId, NameId, Ip);

/// What was found before, and what became of it.
#[derive(Debug, Default)]
pub struct Ledger {
    /// All words of the last look, sorted, with their times; `None` before the first.
    last: Option<Vec<(Word, Ticks)>>,
    /// Words that had been entered at the last look, and those of them that took another's place.
    entered: (i64, i64),
    /// Words that were forgotten on purpose since then.
    forgotten: usize,
    /// Words that should be there and are not, since the first look. Less than that by those that were entered between
    /// the reading of counters and of words.
    missing: i64,
    numbers: Numbers,
}

/// What is in `LEARNT`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Numbers {
    /// Addresses of names that are not past their time.
    pub addresses: usize,
    /// Addresses taken out because their name had too many.
    pub trimmed: u64,
    /// Addresses that went before their time because the map was full.
    pub evicted: u64,
}

impl Ledger {
    /// Looks at all of `LEARNT`, and says what is to be forgotten. `events` were read before it.
    pub fn look(&mut self, entries: &[(LearntKey, Learnt)], events: &Events, now: Ticks) -> Vec<Credit> {
        let mut words: Vec<(Word, Ticks)> = Vec::with_capacity(entries.len());
        for (key, learnt) in entries {
            let used = learnt.names.iter().filter(|word| **word >> 32 != 0);
            words.extend(used.map(|word| ((key.firewall, (word >> 32) as NameId, key.ip), *word as Ticks)));
        }
        words.sort_unstable();
        self.reckon(&words, events, now);
        let lives = |until: Ticks| !older_than(now, until, 0);
        let mut forget = Vec::new();
        for name in words.chunk_by(|a, b| (a.0.0, a.0.1) == (b.0.0, b.0.1)) {
            let mut alive: Vec<_> = name.iter().filter(|(_, until)| lives(*until)).collect();
            self.numbers.addresses += alive.len();
            let too_many = alive.len().saturating_sub(NAME_ADDRESSES);
            alive.sort_by_key(|(_, until)| until.wrapping_sub(now));
            forget.extend(alive.iter().take(too_many).map(|((firewall, name, ip), _)| Credit {
                key: LearntKey { firewall: *firewall, ip: *ip },
                name: *name,
                ttl: 0,
                action: Credit::FORGET,
            }));
        }
        self.forgotten = forget.len();
        self.numbers.trimmed += forget.len() as u64;
        self.numbers.addresses -= forget.len();
        self.last = Some(words);
        forget
    }

    /// Whether anything can have changed since the last look but by time.
    #[must_use]
    pub fn is_stale(&self, events: &Events) -> bool {
        self.last.is_none() || entered(events) != self.entered
    }

    /// As last looked at.
    #[must_use]
    pub const fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Each word that was there or was entered is there, was displaced, forgotten, gone after its time, or evicted.
    fn reckon(&mut self, words: &[(Word, Ticks)], events: &Events, now: Ticks) {
        let entered = entered(events);
        let new = entered.0 - self.entered.0;
        if let Some(last) = &self.last {
            let is_there = |word: &Word| words.binary_search_by_key(word, |(word, _)| *word).is_ok();
            let over =
                last.iter().filter(|(word, until)| older_than(now, *until, 0) && !is_there(word)).count();
            let there = count(last.len()) + new;
            self.missing += there - count(self.forgotten) - count(over) - count(words.len());
            self.numbers.evicted = self.numbers.evicted.max(u64::try_from(self.missing).unwrap_or(0));
        }
        self.entered = entered;
        self.numbers.addresses = 0;
    }
}

/// A number of words: far fewer than that.
fn count(words: usize) -> i64 {
    i64::try_from(words).unwrap_or(i64::MAX)
}

/// How many words have been entered where there was room, and how many in another's place.
fn entered(events: &Events) -> (i64, i64) {
    let count = |event| events.get(&event).copied().unwrap_or(0).cast_signed();
    (count(NameEvent::Learnt), count(NameEvent::Displaced))
}

#[cfg(test)]
mod tests {
    use datapath::conntrack::seconds;
    use datapath::names::word;

    use super::*;

    /// Near the end of the clock's circle.
    const NOW: Ticks = u32::MAX - 100;

    fn ip(number: usize) -> Ip {
        Ip::v4((0x0a00_0000 + number as u32).to_be_bytes())
    }

    fn after(secs: u32) -> Ticks {
        NOW.wrapping_add(seconds(secs))
    }

    fn entry(firewall: FirewallId, number: usize, names: &[(NameId, Ticks)]) -> (LearntKey, Learnt) {
        let mut learnt = Learnt::default();
        for (slot, (name, until)) in learnt.names.iter_mut().zip(names) {
            *slot = word(*name, *until);
        }
        (LearntKey { firewall, ip: ip(number) }, learnt)
    }

    fn events(learnt: u64, displaced: u64) -> Events {
        [(NameEvent::Learnt, learnt), (NameEvent::Displaced, displaced), (NameEvent::Renewed, 99)].into()
    }

    #[test]
    fn a_name_keeps_its_youngest_addresses() {
        // Not in order, and of a name of the same number elsewhere, and of one past its time.
        let mut entries: Vec<_> = (0..NAME_ADDRESSES + 3)
            .map(|i| entry(1, i, &[(5, after(if i % 500 == 7 { 10 } else { 100 }))]))
            .collect();
        entries.push(entry(2, 0, &[(5, after(1))]));
        entries.push(entry(1, 9999, &[(5, NOW.wrapping_sub(1)), (6, after(1))]));
        let mut ledger = Ledger::default();
        let forget = ledger.look(&entries, &events(0, 0), NOW);
        let forgotten: Vec<_> =
            forget.iter().map(|credit| (credit.key, credit.name, credit.action)).collect();
        let expected =
            [7, 507, 1007].map(|i| (LearntKey { firewall: 1, ip: ip(i) }, 5, Credit::FORGET)).to_vec();
        assert_eq!(forgotten, expected);
        let numbers = Numbers { addresses: NAME_ADDRESSES + 2, trimmed: 3, evicted: 0 };
        assert_eq!(ledger.numbers(), numbers);
        // They are gone then, and are not taken for evicted.
        entries
            .retain(|(key, _)| ![7, 507, 1007].iter().any(|i| *key == LearntKey { firewall: 1, ip: ip(*i) }));
        assert_eq!(ledger.look(&entries, &events(0, 0), NOW), []);
        assert_eq!(ledger.numbers(), numbers);
    }

    #[test]
    fn evictions_are_what_nothing_else_explains() {
        let mut ledger = Ledger::default();
        assert!(ledger.is_stale(&events(1000, 10)));
        let first = [entry(1, 1, &[(5, after(60)), (6, after(60))]), entry(1, 2, &[(5, after(5))])];
        ledger.look(&first, &events(1000, 10), NOW);
        assert!(!ledger.is_stale(&events(1000, 10)));
        assert!(ledger.is_stale(&events(1001, 10)));
        assert!(ledger.is_stale(&events(1000, 11)));
        // One is past its time and gone, one took its place; one displaced another; one is new.
        let second = [
            entry(1, 1, &[(5, after(60)), (7, after(60))]),
            entry(1, 2, &[(8, after(60))]),
            entry(1, 3, &[(5, after(60))]),
        ];
        ledger.look(&second, &events(1002, 11), after(6));
        assert_eq!(ledger.numbers(), Numbers { addresses: 4, trimmed: 0, evicted: 0 });
        // A whole entry goes, and one that was never seen.
        ledger.look(&second[1..], &events(1003, 11), after(6));
        assert_eq!(ledger.numbers(), Numbers { addresses: 2, trimmed: 0, evicted: 3 });
    }

    #[test]
    fn words_that_come_while_it_looks_are_no_evictions() {
        let mut ledger = Ledger::default();
        ledger.look(&[], &events(0, 0), NOW);
        // Entered after the counters were read.
        let two = [entry(1, 1, &[(5, after(60))]), entry(1, 2, &[(5, after(60))])];
        ledger.look(&two, &events(1, 0), NOW);
        ledger.look(&two, &events(2, 0), NOW);
        assert_eq!(ledger.numbers().evicted, 0);
        ledger.look(&two[1..], &events(2, 0), NOW);
        assert_eq!(ledger.numbers().evicted, 1);
    }
}

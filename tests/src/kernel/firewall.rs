//! Firewalls in the kernel's maps, written as the agent's apply step writes them.

use std::collections::BTreeMap;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap};
use datapath::keys::{self, RuleKey, RulePlace, Winner};
use datapath::memory::Memory;

use super::{Kernel, Plain};

impl Kernel {
    /// Writes the versions of firewalls that these tables have, and puts in force what they say is. What else is
    /// there stays.
    pub fn put_firewalls(&mut self, tables: &Memory) {
        self.change_rules(tables, true);
        self.put_in_force(tables, true);
    }

    /// Takes them out again.
    pub fn take_firewalls(&mut self, tables: &Memory) {
        self.put_in_force(tables, false);
        self.change_rules(tables, false);
    }

    fn change_rules(&mut self, tables: &Memory, put: bool) {
        let rules = self.programs.1.map_mut("RULES").expect("the object has RULES");
        let mut rules: LpmTrie<_, Plain<RulePlace>, Plain<Winner>> =
            LpmTrie::try_from(rules).expect("a trie");
        for (RuleKey { prefix_len, place }, winner) in &tables.rules {
            let key = Key::new(*prefix_len, Plain(*place));
            if put { rules.insert(&key, Plain(*winner), 0) } else { rules.remove(&key) }.expect("RULES");
        }
        self.change("NAME_RULES", &tables.name_rules, put);
        self.change("PORT_PAGES", &tables.port_pages, put);
        self.change("PORTS", &tables.ports, put);
        self.change("RULESETS", &tables.rulesets, put);
    }

    fn change<K: keys::MapData, V: keys::MapData>(
        &mut self,
        name: &str,
        entries: &BTreeMap<K, V>,
        put: bool,
    ) {
        let map = self.programs.1.map_mut(name).expect(name);
        let mut map: HashMap<_, Plain<K>, Plain<V>> = HashMap::try_from(map).expect(name);
        for (key, value) in entries {
            if put { map.insert(Plain(*key), Plain(*value), 0) } else { map.remove(&Plain(*key)) }
                .expect(name);
        }
    }

    fn put_in_force(&mut self, tables: &Memory, put: bool) {
        let firewalls = self.programs.1.map_mut("FIREWALLS").expect("the object has FIREWALLS");
        let mut firewalls: Array<_, u32> = Array::try_from(firewalls).expect("an array");
        for (place, id) in &tables.firewalls {
            firewalls.set(*place, if put { *id } else { 0 }, 0).expect("FIREWALLS");
        }
    }
}

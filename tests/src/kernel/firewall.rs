//! Firewalls in the kernel's maps, written as the agent's apply step writes them.

use std::collections::BTreeMap;

use aya::maps::{Array, HashMap};
use datapath::keys::{self, Line};
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
        // What no version has any more is looked at by nobody.
        if put {
            let rules = self.programs.1.map_mut("RULES").expect("the object has RULES");
            let mut rules: Array<_, Plain<Line>> = Array::try_from(rules).expect("an array");
            for (n, line) in (0..).zip(&tables.rules) {
                rules.set(n, Plain(*line), 0).expect("RULES");
            }
        }
        self.change("NAME_RULES", &tables.name_rules, put);
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

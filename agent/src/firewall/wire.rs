//! Names of rules as the programs compare them: as they are on the wire (RFC 1035, 3.1).

use datapath::keys::{FirewallId, NameKey};

use super::Name;

impl Name {
    /// Its key in `NAMES`. A checked name always fits: 253 characters are 254 bytes on the wire.
    #[must_use]
    pub fn key(&self, firewall: FirewallId) -> NameKey {
        let mut name = [0; 256];
        let labels = self.name.split('.').flat_map(|l| [l.len() as u8].into_iter().chain(l.bytes()));
        for (to, byte) in name.iter_mut().zip(labels) {
            *to = byte;
        }
        NameKey { firewall, wildcard: u32::from(self.wildcard), name }
    }

    /// The name of a key.
    #[must_use]
    pub fn of_key(key: &NameKey) -> Self {
        let mut labels = Vec::new();
        let mut rest = &key.name[..];
        while let Some((len, after)) = rest.split_first()
            && *len != 0
            && let Some((label, after)) = after.split_at_checked(usize::from(*len))
        {
            labels.push(String::from_utf8_lossy(label).into_owned());
            rest = after;
        }
        Self { wildcard: key.wildcard != 0, name: labels.join(".") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_on_the_wire_and_back() {
        let name = Name { wildcard: true, name: "example.com".into() };
        let key = name.key(7);
        assert!(key.name.starts_with(b"\x07example\x03com\0"));
        assert_eq!((key.firewall, key.wildcard), (7, 1));
        let longest = [["a"; 63].concat(), ["b"; 63].concat(), ["c"; 63].concat(), ["d"; 61].concat()];
        let longest = Name { wildcard: false, name: longest.join(".") };
        assert_eq!(longest.name.len(), 253);
        for name in [name, longest, Name { wildcard: false, name: "localhost".into() }] {
            assert_eq!(Name::of_key(&name.key(1)), name);
        }
    }
}

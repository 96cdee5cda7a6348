//! Names as they stand in DNS messages and in the keys of `NAMES`.

use std::fmt;

use datapath::keys::{FirewallId, NameKey};
use hickory_proto::rr::Name;

/// A name as on the wire (RFC 1035, 3.1), without the root's length, in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Wire(Box<[u8]>);

impl Wire {
    /// From the key of a name that a firewall has rules for. What a wrong length leads past is left out.
    #[must_use]
    pub fn of_key(key: &NameKey) -> Self {
        let mut end = 0;
        while let Some(length) = key.name.get(end).filter(|length| **length != 0) {
            end += 1 + usize::from(*length);
        }
        Self(key.name[..end.min(key.name.len())].into())
    }

    /// From a message.
    #[must_use]
    pub fn of(name: &Name) -> Self {
        let mut wire = Vec::with_capacity(name.len());
        for label in name {
            // A label has at most 63 octets.
            wire.push(label.len() as u8);
            wire.extend(label.iter().map(u8::to_ascii_lowercase));
        }
        Self(wire.into())
    }

    /// For a message. `None`: it is no name.
    #[must_use]
    pub fn to_name(&self) -> Option<Name> {
        Name::from_labels(self.labels()).ok()
    }

    /// The key of the name in a firewall's names; of all names below it if `wildcard`.
    #[must_use]
    pub fn key(&self, firewall: FirewallId, wildcard: bool) -> NameKey {
        let mut name = [0; 256];
        for (to, from) in name.iter_mut().zip(&self.0) {
            *to = *from;
        }
        NameKey { firewall, wildcard: u32::from(wildcard), name }
    }

    /// The name without its first label; `None`: that is the root, or there is none.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let rest = self.0.get(1 + usize::from(*self.0.first()?)..)?;
        (!rest.is_empty()).then(|| Self(rest.into()))
    }

    fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let (length, after) = rest.split_first()?;
            let (label, next) = after.split_at_checked(usize::from(*length))?;
            rest = next;
            Some(label)
        })
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str(".");
        }
        for (i, label) in self.labels().enumerate() {
            if i > 0 {
                f.write_str(".")?;
            }
            write!(f, "{}", label.escape_ascii())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_its_key() {
        let name = Name::from_ascii("WWW.Example.com.").unwrap();
        let wire = Wire::of(&name);
        assert_eq!(wire.to_string(), "www.example.com");
        let key = wire.key(3, false);
        assert_eq!(&key.name[..17], b"\x03www\x07example\x03com\0");
        assert_eq!((key.firewall, key.wildcard), (3, 0));
        assert_eq!(Wire::of_key(&key), wire);
        assert_eq!(Wire::of(&wire.to_name().unwrap()), wire);
        assert!(wire.to_name().unwrap().is_fqdn());
    }

    #[test]
    fn parents() {
        let wire = Wire::of(&Name::from_ascii("a.example.com").unwrap());
        let parent = wire.parent().unwrap();
        assert_eq!(parent.to_string(), "example.com");
        assert_eq!(parent.key(1, true).wildcard, 1);
        assert_eq!(parent.parent().unwrap().parent(), None);
        assert_eq!(Wire::of(&Name::root()).parent(), None);
    }

    #[test]
    fn labels_are_octets() {
        // A dot or a zero inside a label is neither a border nor an end.
        let name = Name::from_labels([b"a.b\0".as_slice(), b"c"]).unwrap();
        let wire = Wire::of(&name);
        assert_eq!(&wire.key(1, false).name[..8], b"\x04a.b\0\x01c\0");
        assert_eq!(Wire::of_key(&wire.key(1, false)), wire);
        assert_ne!(wire, Wire::of(&Name::from_ascii("a.b.c").unwrap()));
        assert_eq!(wire.parent().unwrap().to_string(), "c");
    }

    #[test]
    fn the_longest_name_fits_its_key() {
        let labels = [vec![b'a'; 63], vec![b'b'; 63], vec![b'c'; 63], vec![b'd'; 61]];
        let wire = Wire::of(&Name::from_labels(labels).unwrap());
        assert_eq!(Wire::of_key(&wire.key(1, false)), wire);
    }
}

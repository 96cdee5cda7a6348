//! Builds answers as resolvers send them, for tests.

use std::vec::Vec;

use crate::addr::Ip;

/// Record types (IANA).
pub const A: u16 = 1;
/// CNAME.
pub const CNAME: u16 = 5;
/// TXT.
pub const TXT: u16 = 16;
/// AAAA.
pub const AAAA: u16 = 28;
/// OPT.
pub const OPT: u16 = 41;

/// A pointer to the question's name (RFC 1035, 4.1.4).
pub const QUESTION: [u8; 2] = [0xc0, 12];

/// A name as on the wire, with its root.
///
/// # Panics
/// If a label has more than 255 bytes.
#[must_use]
pub fn name(text: &str) -> Vec<u8> {
    let mut wire = labels(text);
    wire.push(0);
    wire
}

/// The same without the root.
///
/// # Panics
/// If a label has more than 255 bytes.
#[must_use]
pub fn labels(text: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in text.split('.').filter(|label| !label.is_empty()) {
        wire.push(u8::try_from(label.len()).expect("a label"));
        wire.extend_from_slice(label.as_bytes());
    }
    wire
}

/// A pointer to this place in a message.
#[must_use]
pub const fn pointer(at: usize) -> [u8; 2] {
    (0xc000 | at as u16).to_be_bytes()
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Message {
    /// As on the wire.
    pub bytes: Vec<u8>,
}

impl Message {
    /// To the question for a name's records of a type, without records.
    ///
    /// # Panics
    /// If a label has more than 255 bytes.
    #[must_use]
    pub fn new(id: u16, question: &str, kind: u16) -> Self {
        let mut bytes = Vec::new();
        bytes.extend(id.to_be_bytes());
        bytes.extend([0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0]); // recursion was wanted, and had
        bytes.extend(name(question));
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        Self { bytes }
    }

    /// With a record in the answer section. `owner` as on the wire, pointers as they are.
    ///
    /// # Panics
    /// If the data is longer than 65,535 bytes.
    #[must_use]
    pub fn record(self, owner: &[u8], kind: u16, ttl: u32, data: &[u8]) -> Self {
        self.put(7, owner, kind, ttl, data)
    }

    /// With an address.
    #[must_use]
    pub fn address(self, owner: &[u8], ttl: u32, ip: Ip) -> Self {
        if ip.is_v4() {
            self.record(owner, A, ttl, &ip.v4_octets())
        } else {
            self.record(owner, AAAA, ttl, &ip.octets)
        }
    }

    /// With a CNAME. Gives where its target begins, too.
    #[must_use]
    pub fn alias(self, owner: &[u8], ttl: u32, target: &[u8]) -> (Self, usize) {
        let at = self.bytes.len() + owner.len() + 10;
        (self.record(owner, CNAME, ttl, target), at)
    }

    /// With EDNS, behind the other sections.
    #[must_use]
    pub fn edns(self) -> Self {
        let mut with = self.put(11, &[0], OPT, 0, &[]);
        let class = with.bytes.len() - 8; // which is the size of the largest datagram here: 1,232 bytes
        with.bytes[class..class + 2].copy_from_slice(&1232_u16.to_be_bytes());
        with
    }

    /// `count`: the lower byte of the section's count in the header.
    fn put(mut self, count: usize, owner: &[u8], kind: u16, ttl: u32, data: &[u8]) -> Self {
        self.bytes[count] += 1;
        self.bytes.extend(owner);
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend([0, 1]);
        self.bytes.extend(ttl.to_be_bytes());
        self.bytes.extend(u16::try_from(data.len()).expect("it fits").to_be_bytes());
        self.bytes.extend(data);
        self
    }
}

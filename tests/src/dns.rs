//! DNS messages (RFC 1035), as the lab's own resolver and clients make and read them.
//!
//! Written from the RFC and not from what it tests.

use std::net::IpAddr;

/// An address of a host.
pub const A: u16 = 1;
/// Another name for a name.
pub const CNAME: u16 = 5;
/// An IPv6 address of a host (RFC 3596).
pub const AAAA: u16 = 28;
/// The pseudo-record of EDNS (RFC 6891).
pub const OPT: u16 = 41;

/// The bit that says that an answer is cut short.
const TC: u16 = 0x0200;
/// A recursive resolver's answer without an error to a question that wanted recursion.
const ANSWER: u16 = 0x8180;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Its number.
    pub id: u16,
    /// The name, as it was written, without the last dot.
    pub name: String,
    /// The type that is asked for.
    pub kind: u16,
    /// The bytes that the client takes, if it speaks EDNS.
    pub edns: Option<u16>,
}

impl Question {
    /// Asks for an address.
    #[must_use]
    pub fn new(id: u16, name: &str, kind: u16) -> Self {
        Self { id, name: name.to_owned(), kind, edns: None }
    }

    /// The message.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let extra = u16::from(self.edns.is_some());
        let mut bytes = header(self.id, 0x0100, [1, 0, extra]);
        bytes.extend(wire_name(&self.name));
        bytes.extend([self.kind.to_be_bytes(), [0, 1]].concat());
        bytes.extend(self.edns.into_iter().flat_map(opt));
        bytes
    }

    /// Reads a message.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (name, at) = read_name(bytes, 12)?;
        let more = word(bytes, 10)? > 0 && bytes.get(at + 4) == Some(&0) && word(bytes, at + 5)? == OPT;
        let edns = if more { Some(word(bytes, at + 7)?) } else { None };
        Some(Self { id: word(bytes, 0)?, name, kind: word(bytes, at)?, edns })
    }
}

/// A record of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Whose it is.
    pub owner: String,
    /// How long it is good for, in seconds.
    pub ttl: u32,
    /// What it says.
    pub data: Data,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// An address.
    Address(IpAddr),
    /// Another name.
    Name(String),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether it is cut short.
    pub truncated: bool,
    /// Its records.
    pub records: Vec<Record>,
}

impl Answer {
    /// The addresses in it.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.records.iter().filter_map(|record| match record.data {
            Data::Address(address) => Some(address),
            Data::Name(_) => None,
        })
    }

    /// Whole, with these records.
    #[must_use]
    pub fn of(records: Vec<Record>) -> Self {
        Self { truncated: false, records }
    }

    /// The message that answers a question: names are compressed where they were said before. What has no room in
    /// `limit` bytes is left out, and the message says so.
    #[must_use]
    pub fn to_bytes(&self, question: &Question, limit: usize) -> Vec<u8> {
        let tail: Vec<u8> = question.edns.map(|_| opt(1232)).unwrap_or_default();
        let mut bytes = Question { edns: None, ..question.clone() }.to_bytes();
        // Names that were said, with where.
        let mut said = vec![(question.name.to_ascii_lowercase(), 12_usize)];
        let (mut count, mut truncated) = (0_u16, self.truncated);
        for Record { owner, ttl, data } in &self.records {
            let before = (bytes.len(), said.len());
            let known = said.iter().find(|(name, _)| *name == owner.to_ascii_lowercase()).map(|(_, at)| *at);
            match known.and_then(|at| u16::try_from(at).ok()) {
                Some(at) => bytes.extend((0xc000 | at).to_be_bytes()),
                None => bytes.extend(wire_name(owner)),
            }
            let (kind, content) = match data {
                Data::Address(IpAddr::V4(address)) => (A, address.octets().to_vec()),
                Data::Address(IpAddr::V6(address)) => (AAAA, address.octets().to_vec()),
                Data::Name(name) => (CNAME, wire_name(name)),
            };
            bytes.extend([kind.to_be_bytes(), [0, 1]].concat());
            bytes.extend(ttl.to_be_bytes());
            bytes.extend(u16::try_from(content.len()).expect("short data").to_be_bytes());
            if let Data::Name(name) = data {
                said.push((name.to_ascii_lowercase(), bytes.len()));
            }
            bytes.extend(content);
            if bytes.len() + tail.len() > limit {
                bytes.truncate(before.0);
                truncated = true;
                break;
            }
            count += 1;
        }
        let flags = if truncated { ANSWER | TC } else { ANSWER };
        let counts = [1, count, u16::from(!tail.is_empty())];
        bytes.splice(..12, header(question.id, flags, counts));
        bytes.extend(tail);
        bytes
    }

    /// Reads a message that answers the question with this number.
    #[must_use]
    pub fn parse(bytes: &[u8], id: u16) -> Option<Self> {
        if word(bytes, 0)? != id || word(bytes, 2)? & 0x8000 == 0 {
            return None;
        }
        let mut at = 12;
        for _ in 0..word(bytes, 4)? {
            at = read_name(bytes, at)?.1 + 4;
        }
        let mut records = Vec::new();
        for _ in 0..word(bytes, 6)? {
            let (owner, next) = read_name(bytes, at)?;
            let ttl = u32::from(word(bytes, next + 4)?) << 16 | u32::from(word(bytes, next + 6)?);
            let length = usize::from(word(bytes, next + 8)?);
            let content = bytes.get(next + 10..next + 10 + length)?;
            let data = match word(bytes, next)? {
                A => Some(Data::Address(IpAddr::from(<[u8; 4]>::try_from(content).ok()?))),
                AAAA => Some(Data::Address(IpAddr::from(<[u8; 16]>::try_from(content).ok()?))),
                CNAME => Some(Data::Name(read_name(bytes, next + 10)?.0)),
                _ => None,
            };
            records.extend(data.map(|data| Record { owner, ttl, data }));
            at = next + 10 + length;
        }
        Some(Self { truncated: word(bytes, 2)? & TC != 0, records })
    }
}

fn header(id: u16, flags: u16, [questions, answers, more]: [u16; 3]) -> Vec<u8> {
    [id, flags, questions, answers, 0, more].into_iter().flat_map(u16::to_be_bytes).collect()
}

fn opt(size: u16) -> Vec<u8> {
    [&[0][..], &OPT.to_be_bytes(), &size.to_be_bytes(), &[0; 6]].concat()
}

fn wire_name(name: &str) -> Vec<u8> {
    let labels = name.split('.').filter(|label| !label.is_empty());
    let mut bytes: Vec<u8> = labels
        .flat_map(|label| [&[u8::try_from(label.len()).expect("a label")][..], label.as_bytes()].concat())
        .collect();
    bytes.push(0);
    bytes
}

/// The name at a place, and where the bytes go on behind it.
fn read_name(bytes: &[u8], start: usize) -> Option<(String, usize)> {
    let (mut at, mut end, mut labels) = (start, None, Vec::new());
    // No name has more labels than bytes, and a pointer is followed by a label.
    for _ in 0..256 {
        let length = usize::from(*bytes.get(at)?);
        match length {
            0 => return Some((labels.join("."), end.unwrap_or(at + 1))),
            0xc0.. => {
                end = end.or(Some(at + 2));
                at = usize::from(word(bytes, at)? & 0x3fff);
            }
            _ => {
                labels.push(String::from_utf8_lossy(bytes.get(at + 1..at + 1 + length)?).into_owned());
                at += 1 + length;
            }
        }
    }
    None
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut question = Question::new(7, "WwW.example.com", A);
        question.edns = Some(1232);
        assert_eq!(Question::parse(&question.to_bytes()), Some(question.clone()));
        let record = |owner: &str, data| Record { owner: owner.into(), ttl: 5, data };
        let address = |last: u8| Data::Address(IpAddr::from([203, 0, 113, last]));
        let answer = Answer::of(vec![
            record("WwW.example.com", Data::Name("x.cdn.example".into())),
            record("x.cdn.example", address(1)),
            record("x.cdn.example", Data::Address("2001:db8::1".parse().expect("an address"))),
            record("other.example", address(2)),
        ]);
        let bytes = answer.to_bytes(&question, 512);
        assert_eq!(Answer::parse(&bytes, 7), Some(answer.clone()));
        assert_eq!(Answer::parse(&bytes, 8), None);
        // "x" once in a record's data and else by pointers; whole names of no other record.
        let cut = answer.to_bytes(&question, bytes.len() - 1);
        let cut = Answer::parse(&cut, 7).expect("an answer");
        assert!(cut.truncated);
        assert_eq!(cut.records, answer.records[..3]);
    }
}

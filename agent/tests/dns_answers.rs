//! What the kernel's reader of answers takes from them, beside another reader of names and the rules as they are said:
//! generated answers, some of them damaged.
//!
//! `OUTGATE_DNS_CASES` and `OUTGATE_DNS_SEED` say how many, and which.

use datapath::addr::Ip;
use datapath::dns::{MESSAGE, RECORDS, Read, Reader};
use datapath::dns_build::{A, AAAA, CNAME, Message, TXT, labels, name, pointer};
use datapath::memory::Memory;
use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};

const CASES: u64 = 50_000;
const DNAME: u16 = 39;
const RRSIG: u16 = 46;
/// Another question's types than these are of no interest.
const ANY: u16 = 255;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// The same text in some case.
    fn cased(&mut self, text: &str) -> String {
        text.chars().map(|c| if self.once_in(2) { c.to_ascii_uppercase() } else { c }).collect()
    }
}

/// A name's parent zone, or nothing.
fn parent(text: &str) -> &str {
    text.split_once('.').map_or("", |(_, parent)| parent)
}

const NAMES: [&str; 6] = [
    "db.example.com",
    "example.com",
    "a.cdn.example.net",
    "b.cdn.example.net",
    "com",
    "x.y.z.w.db.example.com",
];

/// An answer being made.
struct Maker {
    message: Message,
    /// Names, and where they begin in it.
    known: Vec<(String, usize)>,
}

impl Maker {
    /// A name's bytes: written out, or compressed in one of the ways that there are.
    fn wire(&mut self, random: &mut Random, text: &str, at: usize) -> Vec<u8> {
        let places = |text: &str| -> Vec<usize> {
            self.known.iter().filter(|(known, _)| known == text).map(|(_, at)| *at).collect()
        };
        let (whole, rest) = (places(text), places(parent(text)));
        let label = random.cased(text.split('.').next().unwrap_or_default());
        let written = match random.below(3) {
            0 if !whole.is_empty() => return pointer(*random.one(&whole)).to_vec(),
            1 if !rest.is_empty() => [&labels(&label)[..], &pointer(*random.one(&rest))].concat(),
            _ => name(&random.cased(text)),
        };
        self.known.push((text.to_owned(), at));
        written
    }
}

/// Makes an answer. Whether all of it is as it should be.
fn make(random: &mut Random) -> (Message, bool) {
    let mut target = *random.one(&NAMES[..4]);
    let kind = *random.one(&[A, AAAA, ANY]);
    let message = Message::new(random.next() as u16, &random.cased(target), kind);
    let mut maker = Maker { message, known: vec![] };
    let mut at = 12;
    let mut rest = target;
    while !rest.is_empty() {
        maker.known.push((rest.to_owned(), at));
        at += 1 + rest.split('.').next().unwrap_or_default().len();
        rest = parent(rest);
    }
    let mut sound = true;
    let many = if random.once_in(40) { 70 } else { 8 };
    for _ in 0..random.below(many) {
        let stray = random.once_in(12);
        let owner = if stray { *random.one(&NAMES) } else { target };
        let at = maker.message.bytes.len();
        let owner_wire = maker.wire(random, owner, at);
        let data_at = at + owner_wire.len() + 10;
        let ttl = *random.one(&[0, 1, 30, 300, 86_400, 0x7fff_ffff, 0x8000_0000, u32::MAX]);
        let mut data: Vec<u8> = (0..16).map(|_| random.next() as u8).collect();
        let kind = *random.one(&[A, A, AAAA, AAAA, CNAME, TXT, RRSIG, DNAME, 65_400]);
        match kind {
            A => data.truncate(4),
            AAAA => {}
            CNAME => {
                let to = *random.one(&NAMES);
                data = maker.wire(random, to, data_at);
                if owner == target {
                    target = to;
                }
            }
            _ => data.truncate(random.below(16)),
        }
        if matches!(kind, A | AAAA | CNAME) && random.once_in(60) {
            data.push(0);
            sound = false;
        }
        sound &= kind != DNAME && (owner == target || !matches!(kind, A | AAAA) || !stray);
        sound &= kind != CNAME || !stray;
        maker.message = maker.message.record(&owner_wire, kind, ttl, &data);
    }
    if random.once_in(2) {
        maker.message = maker.message.edns();
    }
    sound &= usize::from(maker.message.bytes[7]) <= RECORDS && maker.message.bytes.len() <= MESSAGE;
    (maker.message, sound)
}

/// Damages a message.
fn damage(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[at] = random.next() as u8,
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = *random.one(&[0, 1, 12, 63, 64, 0x80, 0xc0, 0xff]),
            _ => bytes.truncate(at.max(1)),
        }
    }
}

/// The addresses that the answer section gives to the name asked, along its own chain in order; records of others are
/// passed over. `None`: it cannot be read, or it is no answer that says anything.
fn reference(bytes: &[u8]) -> Option<Vec<(Ip, u32)>> {
    let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    if word(2)? & 0xfa0f != 0x8000 || word(4)? != 1 {
        return None;
    }
    let read_name = |at: usize| {
        let mut decoder = BinDecoder::new(bytes);
        decoder.read_slice(at).ok()?;
        let name = Name::read(&mut decoder).ok()?;
        Some((name, decoder.index()))
    };
    let (mut target, mut at) = read_name(12)?;
    if word(at + 2)? != 1 {
        return None;
    }
    at += 4;
    let mut least = u32::MAX;
    let mut all = vec![];
    for _ in 0..word(6)? {
        let (owner, end) = read_name(at)?;
        let (kind, class, len) = (word(end)?, word(end + 2)?, usize::from(word(end + 8)?));
        let ttl = u32::from(word(end + 4)?) << 16 | u32::from(word(end + 6)?);
        let ttl = if ttl >> 31 == 1 { 0 } else { ttl };
        let data_at = end + 10;
        let data = bytes.get(data_at..data_at + len)?;
        at = data_at + len;
        if class != 1 || owner != target {
            continue;
        }
        match (kind, len) {
            (A, _) => all.push((Ip::v4(data.try_into().ok()?), ttl.min(least))),
            (AAAA, _) => all.push((Ip { octets: data.try_into().ok()? }, ttl.min(least))),
            (CNAME, _) => {
                let (to, end) = read_name(data_at)?;
                if end != at {
                    return None;
                }
                (target, least) = (to, ttl.min(least));
            }
            _ => {}
        }
    }
    Some(all)
}

#[test]
fn nothing_is_taken_that_the_answer_does_not_give_to_the_name_asked() {
    let (cases, seed) = (number("OUTGATE_DNS_CASES", CASES), number("OUTGATE_DNS_SEED", 0x0dd5_eed5));
    println!("{cases} cases, seed {seed}");
    let t = Memory::new(1, 1);
    let mut random = Random(seed | 1);
    let (mut clear, mut addresses, mut unclear) = (0_u64, 0, 0_u64);
    for case in 0..cases {
        let (message, sound) = make(&mut random);
        let mut bytes = message.bytes;
        let damaged = random.once_in(2);
        if damaged {
            damage(&mut random, &mut bytes);
        }
        bytes.truncate(MESSAGE);
        let mut reader = Reader::of(&bytes);
        let mut read = reader.question(&t);
        let kind = read;
        if read == Read::Clear {
            read = reader.answers(&t);
        }
        let taken: Vec<_> = reader.found.iter().take(reader.count as usize).map(|f| (f.ip, f.ttl)).collect();
        let context = || format!("case {case} of seed {seed}: {bytes:02x?}");
        match read {
            Read::Clear => {
                clear += 1;
                addresses += taken.len();
                assert_eq!(Some(taken), reference(&bytes), "{}", context());
            }
            Read::Unclear => {
                unclear += 1;
                assert!(damaged || !sound, "understood not, though sound: {}", context());
            }
            Read::Other => assert_eq!((damaged, kind), (true, Read::Other), "{}", context()),
        }
    }
    println!("{clear} clear with {addresses} addresses, {unclear} not");
    assert!(clear > cases / 4 && unclear > cases / 8 && addresses as u64 > cases / 4, "the cases say little");
}

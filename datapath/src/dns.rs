//! Reads answers of resolvers (RFC 1035, 4): what was asked, and the addresses that the answer gives to the name asked,
//! along its own chain of CNAMEs and in order. What is not understood to the last record of the answer section is
//! said to be so, and nothing is taken from it.
//!
//! All that changes lies in a [`Reader`], which the kernel programs keep in a map: the verifier then has one state for
//! every turn of a loop. Loops are [`Tables::repeat`]'s, and each has one place.

use crate::addr::Ip;
use crate::keys::NameKey;
use crate::limits::ANSWER_BYTES;
use crate::tables::Tables;

/// Bytes of a message that are read. A power of two: places are masked with it.
pub const MESSAGE: usize = ANSWER_BYTES;
/// Records of an answer section that are read.
pub const RECORDS: usize = 64;
/// Length of a message's header (RFC 1035, 4.1.1).
pub const HEADER: u32 = 12;
/// "Truncated", in the header's third byte.
pub const TRUNCATED: u8 = 0x02;

/// Length of the longest name, with its root (RFC 1035, 2.3.4).
const NAME: u32 = 255;
/// Steps of the comparison of two names: their bytes, and as many pointers as they can have labels, each.
const STEPS: u32 = 512;

/// Header bits (RFC 1035, 4.1.1): answer and opcode; and the response code.
const ANSWER: u8 = 0x80;
const OPCODE: u8 = 0x78;
const RESPONSE_CODE: u8 = 0x0f;

/// Record types (IANA).
const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;
const DNAME: u16 = 39;
const ANY: u16 = 255;
/// The class "internet".
const IN: u16 = 1;

/// What reading gave.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Read {
    /// It is of no interest: no answer, an error, about another type, or said to be truncated already.
    Other = 0,
    /// It is not understood as a whole.
    Unclear = 1,
    /// It is understood.
    Clear = 2,
}

/// An address, and how long it may be used.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Found {
    /// The address.
    pub ip: Ip,
    /// The least of the TTLs on the way to it, in seconds.
    pub ttl: u32,
}

/// A place in a message while a name is read: pointers are followed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// The next byte.
    at: u32,
    /// Bytes left of a label; 0: a length or a pointer is next.
    left: u32,
    /// Where the bytes that it is in began: a pointer leads before them, so that it ends.
    run: u32,
}

impl Cursor {
    #[inline(always)]
    const fn new(at: u32) -> Self {
        Self { at, left: 0, run: at }
    }
}

/// A message, and what was read of it.
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Reader {
    /// The message. Nothing behind `len` is looked at.
    pub message: [u8; MESSAGE],
    /// The name asked.
    pub exact: NameKey,
    /// All names of one label more than the name asked has without its first: the wildcard that it falls under.
    pub parent: NameKey,
    /// Addresses, `count` of them.
    pub found: [Found; RECORDS],
    /// How many of `found` there are.
    pub count: u32,
    /// Bytes of `message`.
    pub len: u32,
    /// What reading the present part gave.
    state: u32,
    /// The next record, or behind the question.
    at: u32,
    /// Records left.
    records: u32,
    /// Where the name begins that records are to be of: the one asked, or the last CNAME's.
    target: u32,
    /// The least TTL up to it.
    ttl: u32,
    /// Where a CNAME's data ends, while its name is read; 0 while a record's own is.
    data_end: u32,
    /// The name that is read.
    name: Cursor,
    /// `target`, which it is compared with.
    other: Cursor,
    /// Where the name ends in its own place; 0: not known yet.
    end: u32,
    /// Its length so far, in bytes.
    length: u32,
    /// 1: it is equal to `target` so far.
    equal: u32,
}

/// In the middle of it.
const READING: u32 = 0;
const DONE: u32 = 1;
const WRONG: u32 = 2;

impl Reader {
    /// Nothing read.
    #[cfg(any(test, feature = "memory"))]
    #[must_use]
    pub fn of(message: &[u8]) -> std::boxed::Box<Self> {
        const EMPTY: NameKey = NameKey { firewall: 0, wildcard: 0, name: [0; 256] };
        let mut reader = std::boxed::Box::new(Self {
            message: [0xee; MESSAGE],
            exact: EMPTY,
            parent: EMPTY,
            found: [Found::default(); RECORDS],
            count: 0,
            len: message.len() as u32,
            state: 0,
            at: 0,
            records: 0,
            target: 0,
            ttl: 0,
            data_end: 0,
            name: Cursor::default(),
            other: Cursor::default(),
            end: 0,
            length: 0,
            equal: 0,
        });
        reader.message[..message.len()].copy_from_slice(message);
        reader
    }

    #[inline(always)]
    fn byte(&self, at: u32) -> u8 {
        self.message[at as usize & (MESSAGE - 1)]
    }

    #[inline(always)]
    fn word(&self, at: u32) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }

    /// Whether `count` bytes from `at` are the message's.
    #[inline(always)]
    fn has(&self, at: u32, count: u32) -> bool {
        at + count <= self.len
    }

    /// The message's id, which is the question's. 0 for a message without a header.
    #[inline(always)]
    #[must_use]
    pub fn id(&self) -> u16 {
        if self.has(0, HEADER) { self.word(0) } else { 0 }
    }

    /// Reads header and question: [`Reader::exact`] and [`Reader::parent`], but for whose they are.
    #[inline(always)]
    pub fn question<T: Tables>(&mut self, t: &T) -> Read {
        if self.len as usize > MESSAGE || !self.has(0, HEADER) {
            return Read::Other; // without a header it answers nobody
        }
        let (first, second) = (self.byte(2), self.byte(3));
        if first & (ANSWER | OPCODE | TRUNCATED) != ANSWER || second & RESPONSE_CODE != 0 {
            return Read::Other;
        }
        if self.word(4) != 1 {
            return Read::Unclear;
        }
        self.records = u32::from(self.word(6));
        self.exact.name = [0; 256];
        self.parent.name = [0; 256];
        (self.exact.wildcard, self.parent.wildcard) = (0, 1);
        (self.state, self.at, self.length) = (READING, 0, 0);
        self.name = Cursor::new(HEADER);
        t.repeat(NAME, |i| self.question_step(i));
        let at = self.at;
        if self.state != DONE || !self.has(at, 4) {
            return Read::Unclear;
        }
        let (kind, class) = (self.word(at), self.word(at + 2));
        if class != IN || !matches!(kind, A | AAAA | ANY) {
            return Read::Other;
        }
        self.at = at + 4;
        Read::Clear
    }

    /// Reads one byte of the question's name, which nothing before it could be compressed to.
    #[inline(always)]
    fn question_step(&mut self, i: u32) -> bool {
        let at = HEADER + i;
        if !self.has(at, 1) {
            self.state = WRONG;
            return true;
        }
        let mut byte = self.byte(at);
        if self.name.left == 0 {
            if byte == 0 {
                (self.state, self.at) = (DONE, at + 1);
                return true;
            }
            if byte > 63 {
                self.state = WRONG;
                return true;
            }
            if i == 0 {
                self.length = u32::from(byte) + 1;
            }
            self.name.left = u32::from(byte);
        } else {
            self.name.left -= 1;
            byte = byte.to_ascii_lowercase();
        }
        self.exact.name[i as usize & 255] = byte;
        if i >= self.length {
            self.parent.name[(i - self.length) as usize & 255] = byte;
        }
        false
    }

    /// Reads the answer section, behind a clear question: [`Reader::found`].
    #[inline(always)]
    pub fn answers<T: Tables>(&mut self, t: &T) -> Read {
        (self.count, self.state) = (0, READING);
        (self.target, self.ttl, self.data_end) = (HEADER, u32::MAX, 0);
        if self.records == 0 {
            return Read::Clear;
        }
        if self.records as usize > RECORDS {
            return Read::Unclear;
        }
        // Each turn reads a name: a record's, or that in a CNAME's data.
        t.repeat(2 * RECORDS as u32, |_| {
            self.name = Cursor::new(self.at);
            self.other = Cursor::new(self.target);
            (self.end, self.length) = (0, 0);
            self.equal = u32::from(self.data_end == 0);
            self.state = READING;
            t.repeat(STEPS, |_| self.name_step());
            if self.state != DONE {
                self.state = WRONG;
                return true;
            }
            self.state = if self.data_end == 0 { self.record() } else { self.alias() };
            self.state != READING
        });
        if self.state == DONE { Read::Clear } else { Read::Unclear }
    }

    /// Reads one byte, or follows one pointer, of the name and of what it is compared with.
    #[inline(always)]
    fn name_step(&mut self) -> bool {
        if !self.has(self.name.at, 1) {
            self.state = WRONG;
            return true;
        }
        let mut byte = self.byte(self.name.at);
        if self.name.left == 0 {
            // The same bytes from here on. A name's own place is known to end only where a pointer was.
            if self.equal == 1 && self.other.left == 0 && self.other.at == self.name.at && self.end != 0 {
                self.state = DONE;
                return true;
            }
            if byte > 63 {
                let to = u32::from(self.word(self.name.at)) & 0x3fff;
                if byte < 0xc0 || !self.has(self.name.at, 2) || to < HEADER || to >= self.name.run {
                    self.state = WRONG;
                    return true;
                }
                if self.end == 0 {
                    self.end = self.name.at + 2;
                }
                self.name = Cursor::new(to);
                return false;
            }
        }
        let mut other = 0;
        if self.equal == 1 {
            // It was read before, so that its pointers are sound.
            other = self.byte(self.other.at);
            if self.other.left == 0 && other > 63 {
                self.other = Cursor::new(u32::from(self.word(self.other.at)) & 0x3fff);
                return false;
            }
        }
        let starts = self.name.left == 0;
        if starts {
            self.name.left = u32::from(byte);
        } else {
            self.name.left -= 1;
            (byte, other) = (byte.to_ascii_lowercase(), other.to_ascii_lowercase());
        }
        if self.equal == 1 {
            let other_starts = self.other.left == 0;
            self.other.left = if other_starts { u32::from(other) } else { self.other.left - 1 };
            self.other.at += 1;
            if starts != other_starts || byte != other {
                self.equal = 0;
            }
        }
        self.name.at += 1;
        self.length += 1;
        if self.length > NAME {
            self.state = WRONG;
            return true;
        }
        if starts && byte == 0 {
            if self.end == 0 {
                self.end = self.name.at;
            }
            self.state = DONE;
            return true;
        }
        false
    }

    /// Reads a record behind its name. Gives the state.
    #[inline(always)]
    fn record(&mut self) -> u32 {
        let at = self.end;
        if !self.has(at, 10) {
            return WRONG;
        }
        let (kind, class) = (self.word(at), self.word(at + 2));
        let ttl = u32::from(self.word(at + 4)) << 16 | u32::from(self.word(at + 6));
        let len = u32::from(self.word(at + 8));
        let data = at + 10;
        if class != IN || !self.has(data, len) {
            return WRONG;
        }
        // The highest bit set: 0 (RFC 2181, 8).
        let ttl = if ttl > i32::MAX.cast_unsigned() { 0 } else { ttl };
        let ttl = if ttl < self.ttl { ttl } else { self.ttl };
        self.at = data + len;
        match kind {
            // What follows another name's record may be meant for another chain, or be out of order.
            A | AAAA | CNAME if self.equal != 1 => return WRONG,
            CNAME => {
                self.ttl = ttl;
                (self.at, self.data_end) = (data, data + len);
                return READING;
            }
            A | AAAA => {
                if len != if kind == A { 4 } else { 16 } {
                    return WRONG;
                }
                let mut ip = Ip::v4([0; 4]);
                let v4 = [self.byte(data), self.byte(data + 1), self.byte(data + 2), self.byte(data + 3)];
                if kind == A {
                    ip = Ip::v4(v4);
                } else {
                    let mut i = 0;
                    while i < 16 {
                        ip.octets[i] = self.byte(data + i as u32);
                        i += 1;
                    }
                }
                self.found[self.count as usize & (RECORDS - 1)] = Found { ip, ttl };
                self.count += 1;
            }
            // The names under its own name are others': the resolver says which by a CNAME, which is not checked here.
            DNAME => return WRONG,
            _ => {}
        }
        self.next_record()
    }

    /// Goes on with the name that a CNAME gives. Gives the state.
    #[inline(always)]
    fn alias(&mut self) -> u32 {
        if self.end != self.data_end {
            return WRONG;
        }
        self.target = self.at;
        self.at = self.data_end;
        self.data_end = 0;
        self.next_record()
    }

    #[inline(always)]
    fn next_record(&mut self) -> u32 {
        self.records -= 1;
        if self.records == 0 { DONE } else { READING }
    }
}

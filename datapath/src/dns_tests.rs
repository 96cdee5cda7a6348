//! Answers as resolvers send them, and as they do not.

use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use crate::addr::Ip;
use crate::dns::{MESSAGE, RECORDS, Read, Reader};
use crate::dns_build::{A, AAAA, CNAME, Message, QUESTION, TXT, labels, name, pointer};
use crate::memory::Memory;

const DNAME: u16 = 39;
const ADDRESS: Ip = Ip::v4([198, 51, 100, 1]);
const OTHER: Ip = Ip::v4([198, 51, 100, 2]);
const V6: Ip = Ip { octets: [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] };

/// What is read of a message's question, and of its answers where that is clear.
fn read(message: &[u8]) -> (Read, Vec<(Ip, u32)>) {
    let t = Memory::new(1, 1);
    let mut reader = Reader::of(message);
    let mut read = reader.question(&t);
    if read == Read::Clear {
        read = reader.answers(&t);
    }
    let found = &reader.found[..if read == Read::Clear { reader.count as usize } else { 0 }];
    (read, found.iter().map(|found| (found.ip, found.ttl)).collect())
}

fn clear(message: &Message) -> Vec<(Ip, u32)> {
    let (read, found) = read(&message.bytes);
    assert_eq!(read, Read::Clear, "{message:02x?}");
    found
}

fn unclear(message: &Message) {
    assert_eq!(read(&message.bytes), (Read::Unclear, vec![]), "{message:02x?}");
}

fn question(text: &str) -> Message {
    Message::new(7, text, A)
}

#[test]
fn addresses_of_the_name_asked() {
    let message = question("db.example.com").address(&QUESTION, 300, ADDRESS).address(&QUESTION, 0, OTHER);
    assert_eq!(clear(&message), [(ADDRESS, 300), (OTHER, 0)]);
    let message = question("db.example.com").address(&QUESTION, 30, V6).edns();
    assert_eq!(clear(&message), [(V6, 30)]);
    // Another resolver does not compress, and answers in its own case.
    let message = question("dB.eXample.Com").address(&name("Db.Example.coM"), 60, ADDRESS);
    assert_eq!(clear(&message), [(ADDRESS, 60)]);
    let message =
        question("db.example.com").address(&[&labels("DB")[..], &pointer(15)].concat(), 60, ADDRESS);
    assert_eq!(clear(&message), [(ADDRESS, 60)]);
}

#[test]
fn the_name_asked_is_in_lower_case_and_so_is_its_wildcard() {
    let t = Memory::new(1, 1);
    let mut reader = Reader::of(&question("Db.eXample.COM").bytes);
    // What an earlier message has left.
    (reader.exact.name, reader.parent.name) = ([9; 256], [9; 256]);
    assert_eq!(reader.question(&t), Read::Clear);
    let padded = |text: &str| {
        let mut padded = [0; 256];
        padded[..labels(text).len()].copy_from_slice(&labels(text));
        padded
    };
    assert_eq!((reader.exact.wildcard, reader.exact.name), (0, padded("db.example.com")));
    assert_eq!((reader.parent.wildcard, reader.parent.name), (1, padded("example.com")));
    assert_eq!(reader.id(), 7);
}

#[test]
fn what_brings_no_addresses() {
    assert_eq!(clear(&question("db.example.com").edns()), []);
    let with = |byte: usize, value: u8| {
        let mut message = question("db.example.com").address(&QUESTION, 300, ADDRESS);
        message.bytes[byte] = value;
        read(&message.bytes)
    };
    let other = (Read::Other, vec![]);
    assert_eq!(with(2, 0x01), other, "a question");
    assert_eq!(with(2, 0x91), other, "another opcode");
    assert_eq!(with(2, 0x83), other, "truncated already");
    assert_eq!(with(3, 0x83), other, "no such name");
    assert_eq!(with(3, 0x82), other, "the resolver has failed");
    assert_eq!(with(29, 15), other, "a mail exchanger was asked for");
    assert_eq!(with(31, 3), other, "another class");
    assert_eq!(with(29, 255).0, Read::Clear, "anything was asked for");
    assert_eq!(with(5, 2), (Read::Unclear, vec![]), "two questions");
    assert_eq!(with(5, 0), (Read::Unclear, vec![]), "no question");
    assert_eq!(with(6, 1), (Read::Unclear, vec![]), "257 answers");
}

#[test]
fn along_the_chain_the_least_ttl_counts() {
    let mut message = question("www.example.com");
    let (mut owner, mut at);
    (message, at) = message.alias(&QUESTION, 600, &name("a0.cdn.example.net"));
    for i in 1..8 {
        owner = pointer(at);
        // Compressed into the data of the CNAME before.
        let target = [&labels(&format!("a{i}"))[..], &pointer(at + 3)].concat();
        (message, at) = message.alias(&owner, 100 - i, &target);
    }
    let message = message.address(&pointer(at), 500, ADDRESS).address(&name("A7.cdn.EXAMPLE.net"), 20, OTHER);
    assert_eq!(clear(&message), [(ADDRESS, 93), (OTHER, 20)]);
}

#[test]
fn other_types_are_skipped() {
    const RRSIG: u16 = 46;
    let message = question("db.example.com")
        .record(&QUESTION, RRSIG, 300, &[0xff; 96])
        .address(&QUESTION, 300, ADDRESS)
        .record(&name("elsewhere.example.net"), TXT, 300, b"\x02hi");
    assert_eq!(clear(&message), [(ADDRESS, 300)]);
}

#[test]
fn a_ttl_with_its_highest_bit_is_none() {
    let message = question("db.example.com").address(&QUESTION, 0x8000_0000, ADDRESS);
    assert_eq!(clear(&message), [(ADDRESS, 0)]);
    let message = question("db.example.com").address(&QUESTION, 0x7fff_ffff, ADDRESS);
    assert_eq!(clear(&message), [(ADDRESS, 0x7fff_ffff)]);
}

#[test]
fn what_is_of_another_name_or_out_of_order_is_not_taken() {
    let poison = name("bank.example.org");
    unclear(&question("db.example.com").address(&poison, 300, ADDRESS));
    unclear(&question("db.example.com").address(&QUESTION, 300, ADDRESS).address(&poison, 300, OTHER));
    unclear(
        &question("db.example.com").record(&poison, CNAME, 300, &QUESTION).address(&QUESTION, 300, ADDRESS),
    );
    // Names that begin or end alike.
    for text in [
        "db.example.co",
        "db.example.comm",
        "b.example.com",
        "xdb.example.com",
        "example.com",
        "d.b.example.com",
    ] {
        unclear(&question("db.example.com").address(&name(text), 300, ADDRESS));
    }
    // The address of the chain's end comes before the chain.
    let message = question("www.example.com").address(&name("cdn.example.net"), 300, ADDRESS);
    unclear(&message.alias(&QUESTION, 300, &name("cdn.example.net")).0);
    // The chain has left the name.
    let (message, _) = question("www.example.com").alias(&QUESTION, 300, &name("cdn.example.net"));
    unclear(&message.address(&QUESTION, 300, ADDRESS));
    let message = question("db.example.com").record(&name("example.com"), DNAME, 300, &name("example.net"));
    unclear(&message);
}

#[test]
fn wrong_data() {
    unclear(&question("db.example.com").record(&QUESTION, A, 300, &[1, 2, 3]));
    unclear(&question("db.example.com").record(&QUESTION, A, 300, &[1, 2, 3, 4, 5]));
    unclear(&question("db.example.com").record(&QUESTION, AAAA, 300, &[1, 2, 3, 4]));
    unclear(&question("db.example.com").record(&QUESTION, CNAME, 300, &[3, b'a']));
    let mut long = name("cdn.example.net");
    long.push(0);
    unclear(&question("db.example.com").record(&QUESTION, CNAME, 300, &long));
    let mut message = question("db.example.com").address(&QUESTION, 300, ADDRESS);
    let class = message.bytes.len() - 11;
    message.bytes[class] = 3;
    unclear(&message);
}

#[test]
fn names_that_are_none() {
    let at = question("db.example.com").bytes.len();
    for owner in [
        &pointer(at)[..], // to itself
        &pointer(at + 2), // forward
        &pointer(0),      // into the header
        &pointer(11),
        &pointer(4000),                              // behind the end
        &[&labels("db")[..], &pointer(at)].concat(), // to its own beginning
        &[0x40, 1, 0],                               // reserved kinds of labels (RFC 6891, 5)
        &[0x80, 1, 0],
        &[&labels(&"a.".repeat(127))[..], &QUESTION].concat(), // 255 bytes, and the question's
    ] {
        unclear(&question("db.example.com").address(owner, 300, ADDRESS));
    }
    // Two that point at each other, in the data of a record that is skipped: all that is followed leads backwards.
    let message =
        question("db.example.com").record(&QUESTION, TXT, 1, &[pointer(at + 14), pointer(at + 12)].concat());
    unclear(&message.address(&pointer(at + 12), 300, ADDRESS));
    unclear(&Message::new(1, &"x".repeat(64), A));
}

#[test]
fn names_as_long_as_they_get() {
    let longest = [&"a".repeat(63)[..], &"b".repeat(63), &"c".repeat(63), &"d".repeat(61)].join(".");
    assert_eq!(name(&longest).len(), 255);
    let message = question(&longest).address(&QUESTION, 1, ADDRESS).address(&name(&longest), 1, OTHER);
    assert_eq!(clear(&message), [(ADDRESS, 1), (OTHER, 1)]);
    unclear(&question(&format!("{longest}d")).address(&QUESTION, 1, ADDRESS));
    // As many labels, and as many pointers, as there can be.
    let labels127: String = "a.".repeat(127);
    let mut message = question(&labels127);
    assert_eq!(name(&labels127).len(), 255);
    let mut at = 12 + 254; // the root
    let mut data = vec![];
    let begins = message.bytes.len() + 12;
    for _ in 0..127 {
        data.extend([1, b'A']);
        data.extend(pointer(at));
        at = begins + data.len() - 4;
    }
    message = message.record(&QUESTION, TXT, 1, &data).address(&pointer(at), 9, ADDRESS);
    assert_eq!(clear(&message), [(ADDRESS, 9)]);
}

#[test]
fn as_many_records_as_are_read() {
    let with = |count: usize| {
        (0..count).fold(question("db.example.com"), |message, i| {
            message.address(&QUESTION, 300, Ip::v4([198, 51, 100, i as u8]))
        })
    };
    let found = clear(&with(RECORDS));
    assert_eq!(found.len(), RECORDS);
    assert!(found.iter().enumerate().all(|(i, (ip, _))| *ip == Ip::v4([198, 51, 100, i as u8])));
    unclear(&with(RECORDS + 1));
}

/// Cut at every byte, with something readable behind: nothing is read behind the end, and nothing at all is taken
/// from what is not whole.
#[test]
fn cut_short() {
    let (message, at) = question("db.example.com").alias(&QUESTION, 300, &name("cdn.example.net"));
    let message = message.address(&pointer(at), 300, ADDRESS).address(&pointer(at), 300, V6);
    assert_eq!(clear(&message).len(), 2);
    let t = Memory::new(1, 1);
    for len in 0..message.bytes.len() {
        let mut reader = Reader::of(&message.bytes);
        reader.len = len as u32;
        let mut read = reader.question(&t);
        if read == Read::Clear {
            read = reader.answers(&t);
        }
        assert_eq!(read, if len < 12 { Read::Other } else { Read::Unclear }, "{len}");
    }
}

#[test]
fn a_message_may_fill_the_reader() {
    let message = question("db.example.com").address(&QUESTION, 300, ADDRESS);
    let fill = MESSAGE - message.bytes.len() - 12;
    let message = message.record(&QUESTION, TXT, 1, &vec![0; fill]);
    assert_eq!(message.bytes.len(), MESSAGE);
    assert_eq!(clear(&message), [(ADDRESS, 300)]);
}

//! What an answer says of the name that was asked for. Only what counts is read: a record of a kind that this version
//! does not know, or that is wrong inside, does not keep the others from being read, as it does not for clients.

use datapath::addr::Ip;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder, DecodeError};

use super::wire::Wire;

/// The most aliases that are followed from one name; resolvers follow fewer.
pub const ALIASES: usize = 16;
/// A message's header (RFC 1035, 4.1.1).
const HEADER: usize = 12;

/// A message, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The question's id.
    pub id: u16,
    /// It was cut short.
    pub truncated: bool,
    /// What became of the question; extended codes by their low bits.
    pub code: ResponseCode,
    /// The name that was asked for.
    pub name: Wire,
    /// What was asked for.
    pub kind: RecordType,
    /// How long "no" may be remembered, in seconds (RFC 2308, 5); `None`: the answer has no SOA record.
    pub no_for: Option<u32>,
    records: Vec<Record>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Record {
    owner: Wire,
    ttl: u32,
    data: Data,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Data {
    Address(Ip),
    Alias(Wire),
}

/// Where a name leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    /// Its addresses, each with the least TTL of the records that lead to it, in seconds.
    pub addresses: Vec<(Ip, u32)>,
    /// The name at the end; the one that was asked for if it is no alias.
    pub end: Wire,
    /// The least TTL of the aliases, in seconds; `u32::MAX` if there are none.
    pub ttl: u32,
}

/// Reads an answer. `None`: it is none, or not to a single question of the internet's class.
#[must_use]
pub fn read(message: &[u8]) -> Option<Answer> {
    try_read(message).ok().flatten()
}

fn try_read(message: &[u8]) -> Result<Option<Answer>, DecodeError> {
    let Some(header) = message.get(..HEADER) else { return Ok(None) };
    let word = |i: usize| u16::from_be_bytes([header[2 * i], header[2 * i + 1]]);
    let (id, flags, questions, answers, authorities) = (word(0), word(1), word(2), word(3), word(4));
    // QR and OPCODE.
    if flags & 0xf800 != 0x8000 || questions != 1 {
        return Ok(None);
    }
    let mut decoder = BinDecoder::new(message);
    decoder.read_slice(HEADER)?;
    let question = Query::read(&mut decoder)?;
    if question.query_class != DNSClass::IN {
        return Ok(None);
    }
    let mut answer = Answer {
        id,
        truncated: flags & 0x0200 != 0,
        code: ResponseCode::from(0, (flags & 0xf) as u8),
        name: Wire::of(&question.name),
        kind: question.query_type,
        no_for: None,
        records: Vec::new(),
    };
    for i in 0..u32::from(answers) + u32::from(authorities) {
        let owner = Name::read(&mut decoder)?;
        let kind = RecordType::from(decoder.read_u16()?.unverified());
        let class = DNSClass::from(decoder.read_u16()?.unverified());
        // One with the highest bit set is 0 (RFC 2181, 8).
        let ttl =
            decoder.read_u32()?.map(|ttl| if ttl > i32::MAX.cast_unsigned() { 0 } else { ttl }).unverified();
        let length = usize::from(decoder.read_u16()?.unverified());
        let at = decoder.index();
        let data = decoder.read_slice(length)?.unverified();
        if class != DNSClass::IN {
            continue;
        }
        // Names in the data may point back into the message.
        let mut inside = BinDecoder::new(&message[..at + length]);
        inside.read_slice(at)?;
        if i >= u32::from(answers) {
            if kind == RecordType::SOA
                && let Ok(minimum) = soa_minimum(&mut inside)
            {
                answer.no_for = Some(ttl.min(minimum));
            }
            continue;
        }
        let data = if kind == RecordType::A {
            <[u8; 4]>::try_from(data).ok().map(|octets| Data::Address(Ip::v4(octets)))
        } else if kind == RecordType::AAAA {
            <[u8; 16]>::try_from(data).ok().map(|octets| Data::Address(Ip { octets }))
        } else if kind == RecordType::CNAME {
            Name::read(&mut inside).ok().map(|name| Data::Alias(Wire::of(&name)))
        } else {
            None
        };
        answer.records.extend(data.map(|data| Record { owner: Wire::of(&owner), ttl, data }));
    }
    Ok(Some(answer))
}

/// `MINIMUM` of a SOA record's data (RFC 1035, 3.3.13).
fn soa_minimum(data: &mut BinDecoder<'_>) -> Result<u32, DecodeError> {
    Name::read(data)?;
    Name::read(data)?;
    data.read_slice(16)?;
    Ok(data.read_u32()?.unverified())
}

impl Answer {
    /// Follows the aliases from the name that was asked for. Records of other names do not count, wherever they stand.
    #[must_use]
    pub fn chain(&self) -> Chain {
        let mut chain = Chain { addresses: Vec::new(), end: self.name.clone(), ttl: u32::MAX };
        for _ in 0..=ALIASES {
            let of_name = |record: &&Record| record.owner == chain.end;
            let mut alias = None;
            let mut found = Vec::new();
            for record in self.records.iter().filter(of_name) {
                match &record.data {
                    Data::Address(ip) => found.push((*ip, record.ttl.min(chain.ttl))),
                    Data::Alias(name) => alias = Some((name.clone(), record.ttl)),
                }
            }
            chain.addresses.append(&mut found);
            let Some((name, ttl)) = alias else { break };
            chain.end = name;
            chain.ttl = chain.ttl.min(ttl);
        }
        chain
    }

    /// Whether it answers this question.
    #[must_use]
    pub fn is_to(&self, id: u16, name: &Wire, kind: RecordType) -> bool {
        self.id == id && self.name == *name && self.kind == kind
    }

    /// Whether addresses in it are the name's.
    #[must_use]
    pub fn has_addresses(&self) -> bool {
        self.code == ResponseCode::NoError
            && matches!(self.kind, RecordType::A | RecordType::AAAA | RecordType::ANY)
    }
}

/// A question, to be sent. `None`: the name is none.
#[must_use]
pub fn question(id: u16, name: &Wire, kind: RecordType, payload: Option<u16>) -> Option<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.to_name()?, kind));
    if let Some(payload) = payload {
        let mut edns = hickory_proto::op::Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
    }
    message.to_vec().ok()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use hickory_proto::rr::RData;
    use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, TXT};

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(format!("{text}.")).unwrap()
    }

    fn wire(text: &str) -> Wire {
        Wire::of(&name(text))
    }

    fn record(owner: &str, ttl: u32, data: RData) -> hickory_proto::rr::Record {
        hickory_proto::rr::Record::from_rdata(name(owner), ttl, data)
    }

    fn a(owner: &str, ttl: u32, last: u8) -> hickory_proto::rr::Record {
        record(owner, ttl, RData::A(A::new(192, 0, 2, last)))
    }

    fn alias(owner: &str, ttl: u32, to: &str) -> hickory_proto::rr::Record {
        record(owner, ttl, RData::CNAME(CNAME(name(to))))
    }

    fn response(asked: &str, records: Vec<hickory_proto::rr::Record>) -> Message {
        let mut message = Message::new(7, MessageType::Response, OpCode::Query);
        message.add_query(Query::query(name(asked), RecordType::A));
        message.add_answers(records);
        message
    }

    fn chain(asked: &str, records: Vec<hickory_proto::rr::Record>) -> Chain {
        read(&response(asked, records).to_vec().unwrap()).unwrap().chain()
    }

    fn v4(last: u8) -> Ip {
        Ip::v4([192, 0, 2, last])
    }

    #[test]
    fn addresses_of_the_name() {
        let aaaa = record("www.example.com", 50, RData::AAAA(AAAA(Ipv6Addr::LOCALHOST)));
        let found =
            chain("WWW.example.COM", vec![a("www.example.com", 300, 1), a("www.Example.com", 20, 2), aaaa]);
        assert_eq!(found.addresses, [(v4(1), 300), (v4(2), 20), (Ipv6Addr::LOCALHOST.into(), 50)]);
        assert_eq!((found.end, found.ttl), (wire("www.example.com"), u32::MAX));
    }

    #[test]
    fn aliases_in_any_order_with_their_least_ttl() {
        let records = vec![
            a("c.example", 300, 1),
            alias("b.example", 30, "c.example"),
            alias("a.example", 60, "b.example"),
        ];
        let found = chain("a.example", records);
        assert_eq!(found.addresses, [(v4(1), 30)]);
        assert_eq!((found.end, found.ttl), (wire("c.example"), 30));
    }

    #[test]
    fn records_of_other_names_do_not_count() {
        let records = vec![
            a("evil.example", 300, 66),
            alias("victim.example", 300, "a.example"),
            a("victim.example", 300, 67),
            alias("a.example", 300, "b.example"),
            a("b.example", 300, 1),
            alias("c.example", 300, "a.example"),
            a("c.example", 300, 68),
        ];
        assert_eq!(chain("a.example", records).addresses, [(v4(1), 300)]);
        // Nor do those of the other sections.
        let mut message = response("a.example", vec![]);
        message.add_authority(a("a.example", 300, 1));
        message.add_additional(a("a.example", 300, 2));
        assert_eq!(read(&message.to_vec().unwrap()).unwrap().chain().addresses, []);
    }

    #[test]
    fn circles_and_long_chains_end() {
        let circle = vec![alias("a.example", 5, "b.example"), alias("b.example", 5, "a.example")];
        assert_eq!(chain("a.example", circle).addresses, []);
        let long = |aliases: usize| {
            let mut records: Vec<_> = (0..aliases)
                .map(|i| alias(&format!("n{i}.example"), 5, &format!("n{}.example", i + 1)))
                .collect();
            records.push(a(&format!("n{aliases}.example"), 5, 1));
            chain("n0.example", records).addresses.len()
        };
        assert_eq!((long(ALIASES), long(ALIASES + 1)), (1, 0));
    }

    #[test]
    fn a_record_that_is_wrong_inside_hides_no_other() {
        // An A record with 3 octets, one of an unknown kind, one of another class, and an alias that points ahead.
        let message = response("a.example", vec![a("a.example", 300, 1)]);
        let mut bytes = message.to_vec().unwrap();
        bytes[7] = 6;
        bytes.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x05\0\x03\x01\x02\x03");
        bytes.extend(b"\xc0\x0c\xff\x01\0\x01\0\0\0\x05\0\x01\x01");
        bytes.extend(b"\xc0\x0c\0\x01\0\x03\0\0\0\x05\0\x04\x01\x02\x03\x04");
        bytes.extend(b"\xc0\x0c\0\x05\0\x01\0\0\0\x05\0\x02\xff\xff");
        bytes.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x05\0\x04\xc0\0\x02\x02");
        assert_eq!(read(&bytes).unwrap().chain().addresses, [(v4(1), 300), (v4(2), 5)]);
        // What is cut off is not an answer.
        assert_eq!(read(&bytes[..bytes.len() - 1]), None);
    }

    #[test]
    fn what_is_no_answer() {
        let good = response("a.example", vec![a("a.example", 300, 1)]);
        assert!(read(&good.to_vec().unwrap()).unwrap().has_addresses());
        let mut query = good.clone();
        query.metadata.message_type = MessageType::Query;
        assert_eq!(read(&query.to_vec().unwrap()), None);
        let mut notify = good.clone();
        notify.metadata.op_code = OpCode::Notify;
        assert_eq!(read(&notify.to_vec().unwrap()), None);
        let mut two = good.clone();
        two.add_query(Query::query(name("b.example"), RecordType::A));
        assert_eq!(read(&two.to_vec().unwrap()), None);
        let mut chaos = good.clone();
        chaos.queries[0].query_class = DNSClass::CH;
        assert_eq!(read(&chaos.to_vec().unwrap()), None);
        let mut failed = good.clone();
        failed.metadata.response_code = ResponseCode::ServFail;
        assert!(!read(&failed.to_vec().unwrap()).unwrap().has_addresses());
        let mut text = good;
        text.queries[0].query_type = RecordType::TXT;
        assert!(!read(&text.to_vec().unwrap()).unwrap().has_addresses());
        for garbage in [&b""[..], &[0; 11], &[0xff; 12], &[0xff; 600]] {
            assert_eq!(read(garbage), None);
        }
    }

    #[test]
    fn how_long_no_lasts() {
        let soa = |ttl, minimum| {
            let data = SOA::new(name("ns.example"), name("root.example"), 1, 3600, 600, 86400, minimum);
            let mut message = response("a.example", vec![]);
            message.metadata.response_code = ResponseCode::NXDomain;
            message.add_authority(record("example", ttl, RData::SOA(data)));
            read(&message.to_vec().unwrap()).unwrap().no_for
        };
        assert_eq!((soa(60, 300), soa(300, 60)), (Some(60), Some(60)));
        assert_eq!(read(&response("a.example", vec![]).to_vec().unwrap()).unwrap().no_for, None);
    }

    #[test]
    fn a_question_is_read_by_the_library() {
        let bytes = question(9, &wire("a.example"), RecordType::AAAA, Some(1232)).unwrap();
        let message = Message::from_vec(&bytes).unwrap();
        assert!(message.metadata.recursion_desired);
        assert_eq!(message.metadata.id, 9);
        assert_eq!(message.queries, [Query::query(name("a.example"), RecordType::AAAA)]);
        assert_eq!(message.edns.unwrap().max_payload(), 1232);
        let mut response = message_to(&bytes);
        response.add_answer(record("a.example", 1, RData::TXT(TXT::new(vec!["x".into()]))));
        let answer = read(&response.to_vec().unwrap()).unwrap();
        assert!(answer.is_to(9, &wire("a.example"), RecordType::AAAA));
        assert!(!answer.is_to(8, &wire("a.example"), RecordType::AAAA));
        assert!(!answer.is_to(9, &wire("b.example"), RecordType::AAAA));
        assert!(!answer.is_to(9, &wire("a.example"), RecordType::A));
    }

    fn message_to(question: &[u8]) -> Message {
        Message::from_vec(question).unwrap().into_response()
    }
}

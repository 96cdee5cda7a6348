//! Asks resolvers for a name's addresses: over UDP, over TCP where the answer is too long for that, one resolver after
//! the other.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::answer::{self, ALIASES, Answer};
use super::lookups::{Outcome, Question};
use super::wire::Wire;

/// How long an answer is waited for. Resolvers that ask others themselves take a second at times.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often all servers are asked in turn before a look-up has failed.
const ROUNDS: usize = 2;
/// What answers over UDP may have, in bytes: no path that is common fragments it (DNS Flag Day 2020; RFC 9715, 3.2).
const PAYLOAD: u16 = 1232;
/// `TC` of a message's flags (RFC 1035, 4.1.1).
const TRUNCATED: u8 = 0x02;

/// Whom to ask.
#[derive(Debug)]
pub struct Client {
    servers: Vec<SocketAddr>,
    /// The place of the one that answered last: it is asked first.
    first: Cell<usize>,
    patience: Duration,
}

/// What one message says.
enum Said {
    Outcome(Outcome),
    /// The name is another's alias, and nothing is said of that: with the least TTL so far.
    Alias(Wire, u32),
}

impl Client {
    /// Asks these in turn, beginning with the first until it does not answer.
    #[must_use]
    pub const fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, first: Cell::new(0), patience: PATIENCE }
    }

    /// Whom it asks.
    #[must_use]
    pub fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// Looks up a name.
    pub async fn look_up(&self, question: &Question) -> Outcome {
        let mut name = question.name.clone();
        let mut least = u32::MAX;
        for _ in 0..ALIASES {
            match self.ask(&name, question.family.kind()).await {
                Ok(Said::Outcome(Outcome::Found(mut addresses))) => {
                    for (_, ttl) in &mut addresses {
                        *ttl = (*ttl).min(least);
                    }
                    return Outcome::Found(addresses);
                }
                Ok(Said::Outcome(outcome)) => return outcome,
                Ok(Said::Alias(next, ttl)) => (name, least) = (next, least.min(ttl)),
                Err(why) => return Outcome::Failed(why),
            }
        }
        Outcome::Failed(format!("more than {ALIASES} aliases"))
    }

    /// Asks every server in turn.
    async fn ask(&self, name: &Wire, kind: RecordType) -> Result<Said, String> {
        let mut why = "there is no resolver to ask".to_owned();
        let first = self.first.get();
        for _ in 0..ROUNDS {
            for place in (0..self.servers.len()).map(|i| (first + i) % self.servers.len()) {
                let server = self.servers[place];
                let said = match self.ask_one(server, name, kind).await {
                    Ok(answer) => said(&answer),
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => Err("no answer".to_owned()),
                    Err(error) => Err(error.to_string()),
                };
                match said {
                    Ok(said) => {
                        self.first.set(place);
                        return Ok(said);
                    }
                    Err(error) => why = format!("{}: {error}", server.ip()),
                }
            }
        }
        Err(why)
    }

    async fn ask_one(&self, server: SocketAddr, name: &Wire, kind: RecordType) -> io::Result<Answer> {
        let answer = match timeout(self.patience, over_udp(server, name, kind, Some(PAYLOAD))).await?? {
            // A server that does not know EDNS (RFC 6891, 7).
            Some(answer) if answer.code == ResponseCode::FormErr => {
                timeout(self.patience, over_udp(server, name, kind, None)).await??
            }
            answer => answer,
        };
        match answer {
            Some(answer) => Ok(answer),
            None => timeout(self.patience, over_tcp(server, name, kind)).await?,
        }
    }
}

/// What an answer says; an error, that another server should be asked.
fn said(answer: &Answer) -> Result<Said, String> {
    if answer.code == ResponseCode::NXDomain {
        return Ok(Said::Outcome(Outcome::NoName));
    }
    if answer.code != ResponseCode::NoError {
        return Err(answer.code.to_str().to_owned());
    }
    let chain = answer.chain();
    Ok(if !chain.addresses.is_empty() {
        Said::Outcome(Outcome::Found(chain.addresses))
    } else if chain.end == answer.name || answer.no_for.is_some() {
        Said::Outcome(Outcome::NoAddress(answer.no_for))
    } else {
        Said::Alias(chain.end, chain.ttl)
    })
}

/// `None`: the answer is cut short. A port of its own for each question, and a random id, so that nobody who does not
/// see it can answer (RFC 5452, 9.2).
async fn over_udp(
    server: SocketAddr,
    name: &Wire,
    kind: RecordType,
    payload: Option<u16>,
) -> io::Result<Option<Answer>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: the kernel takes nobody else's datagrams, and says if nobody listens there.
    socket.connect(server).await?;
    let (id, question) = question(name, kind, payload)?;
    socket.send(&question).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let message = &buffer[..length];
        match answer::read(message) {
            Some(answer) if answer.is_to(id, name, kind) => return Ok(Some(answer).filter(|a| !a.truncated)),
            // Some cut in the middle of a record.
            None if message.get(..2) == Some(&id.to_be_bytes())
                && message.get(2).is_some_and(|flags| flags & TRUNCATED != 0) =>
            {
                return Ok(None);
            }
            _ => {} // another's answer, a late or a forged one
        }
    }
}

async fn over_tcp(server: SocketAddr, name: &Wire, kind: RecordType) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(server).await?;
    let (id, question) = question(name, kind, None)?;
    let mut message = Vec::with_capacity(2 + question.len());
    message.extend(u16::try_from(question.len()).unwrap_or(u16::MAX).to_be_bytes());
    message.extend(question);
    stream.write_all(&message).await?;
    let length = stream.read_u16().await?;
    message.resize(length.into(), 0);
    stream.read_exact(&mut message).await?;
    answer::read(&message)
        .filter(|answer| answer.is_to(id, name, kind))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no answer to the question over TCP"))
}

fn question(name: &Wire, kind: RecordType, payload: Option<u16>) -> io::Result<(u16, Vec<u8>)> {
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    let id = u16::from_be_bytes(id);
    let message = answer::question(id, name, kind, payload)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a name"))?;
    Ok((id, message))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use datapath::addr::Ip;
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA};
    use hickory_proto::rr::{Name, RData, Record};
    use tokio::net::TcpListener;
    use tokio::task::{LocalSet, spawn_local};

    use super::*;
    use crate::names::lookups::Family;

    /// What a server was asked: over TCP or not, with EDNS or not.
    type Asked = Rc<RefCell<Vec<(String, bool, bool)>>>;
    /// Makes answers; the flag is true over TCP. No answer is none.
    type Answers = fn(&Message, bool) -> Vec<Message>;

    struct Server {
        address: SocketAddr,
        asked: Asked,
    }

    /// A DNS server on loopback, over UDP and TCP on the same port.
    async fn serve(answers: Answers) -> Server {
        // A port that is free for one is mostly free for the other.
        let (udp, tcp) = loop {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = tcp.local_addr().unwrap();
        let asked = Asked::default();
        let note = {
            let asked = Rc::clone(&asked);
            move |message: &Message, over_tcp| {
                let name = message.queries[0].name.to_string();
                asked.borrow_mut().push((name, over_tcp, message.edns.is_some()));
            }
        };
        let note_tcp = note.clone();
        spawn_local(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
                let query = Message::from_vec(&buffer[..length]).unwrap();
                note(&query, false);
                for answer in answers(&query, false) {
                    udp.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
                }
            }
        });
        spawn_local(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let mut query = vec![0; stream.read_u16().await.unwrap().into()];
                stream.read_exact(&mut query).await.unwrap();
                let query = Message::from_vec(&query).unwrap();
                note_tcp(&query, true);
                for answer in answers(&query, true) {
                    let bytes = answer.to_vec().unwrap();
                    stream.write_u16(bytes.len() as u16).await.unwrap();
                    // In pieces, as a network may.
                    for piece in bytes.chunks(100) {
                        stream.write_all(piece).await.unwrap();
                        stream.flush().await.unwrap();
                    }
                }
            }
        });
        Server { address, asked }
    }

    fn name(text: &str) -> Name {
        Name::from_ascii(format!("{text}.")).unwrap()
    }

    fn a(owner: &str, ttl: u32, last: u8) -> Record {
        Record::from_rdata(name(owner), ttl, RData::A(A::new(192, 0, 2, last)))
    }

    fn alias(owner: &str, ttl: u32, to: &str) -> Record {
        Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(to))))
    }

    fn soa() -> Record {
        let data = SOA::new(name("ns.example"), name("root.example"), 1, 3600, 600, 86400, 30);
        Record::from_rdata(name("example"), 900, RData::SOA(data))
    }

    fn with(query: &Message, code: ResponseCode, records: Vec<Record>) -> Message {
        let mut message = query.clone().into_response();
        message.metadata.response_code = code;
        message.add_answers(records);
        message
    }

    fn no_error(query: &Message, records: Vec<Record>) -> Vec<Message> {
        vec![with(query, ResponseCode::NoError, records)]
    }

    /// Looks up `www.example` at these servers, and says whom it asked what.
    async fn outcome(patience: Duration, servers: &[Answers], family: Family) -> (Outcome, Vec<Asked>) {
        let tasks = LocalSet::new();
        let work = tasks.run_until(async {
            let mut addresses = Vec::new();
            let mut asked = Vec::new();
            for answers in servers {
                let server = serve(*answers).await;
                addresses.push(server.address);
                asked.push(server.asked);
            }
            let client = Client { patience, ..Client::new(addresses) };
            let outcome = client.look_up(&Question { name: Wire::of(&name("www.example")), family }).await;
            (outcome, asked)
        });
        work.await
    }

    /// Of one server that answers; long enough for any machine.
    async fn one(answers: Answers) -> (Outcome, Vec<(String, bool, bool)>) {
        let (outcome, asked) = outcome(Duration::from_mins(1), &[answers], Family::V4).await;
        let asked = asked[0].borrow().clone();
        (outcome, asked)
    }

    fn udp(name: &str) -> (String, bool, bool) {
        (format!("{name}."), false, true)
    }

    fn found(addresses: &[(u8, u32)]) -> Outcome {
        Outcome::Found(addresses.iter().map(|(last, ttl)| (Ip::v4([192, 0, 2, *last]), *ttl)).collect())
    }

    #[tokio::test]
    async fn addresses_with_their_ttl_along_aliases() {
        let answers: Answers = |query, _| {
            no_error(
                query,
                vec![alias("www.example", 20, "b.example"), a("b.example", 300, 1), a("b.example", 10, 2)],
            )
        };
        assert_eq!(one(answers).await, (found(&[(1, 20), (2, 10)]), vec![udp("www.example")]));
    }

    #[tokio::test]
    async fn an_alias_without_its_address_is_followed() {
        let answers: Answers = |query, _| match query.queries[0].name.to_string().as_str() {
            "www.example." => no_error(query, vec![alias("www.example", 20, "b.example")]),
            _ => no_error(query, vec![alias("b.example", 60, "c.example"), a("c.example", 300, 1)]),
        };
        assert_eq!(one(answers).await, (found(&[(1, 20)]), vec![udp("www.example"), udp("b.example")]));
        // Not for ever.
        let circle: Answers = |query, _| {
            let asked = query.queries[0].name.to_string();
            let (from, to) = if asked == "www.example." {
                ("www.example", "b.example")
            } else {
                ("b.example", "www.example")
            };
            no_error(query, vec![alias(from, 20, to)])
        };
        let (outcome, asked) = one(circle).await;
        assert_eq!((outcome, asked.len()), (Outcome::Failed("more than 16 aliases".to_owned()), ALIASES));
    }

    #[tokio::test]
    async fn ipv6() {
        let answers: Answers = |query, _| {
            let data = RData::AAAA(AAAA(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)));
            if query.queries[0].query_type == RecordType::AAAA {
                no_error(query, vec![Record::from_rdata(name("www.example"), 5, data)])
            } else {
                vec![]
            }
        };
        let (outcome, _) = outcome(Duration::from_mins(1), &[answers], Family::V6).await;
        let ip: Ipv6Addr = "2001:db8::1".parse().unwrap();
        assert_eq!(outcome, Outcome::Found(vec![(ip.into(), 5)]));
    }

    #[tokio::test]
    async fn what_is_cut_short_is_asked_for_over_tcp() {
        let answers: Answers = |query, over_tcp| {
            let records = (0..100).map(|i| a("www.example", 60, i)).collect();
            let mut message = with(query, ResponseCode::NoError, if over_tcp { records } else { vec![] });
            message.metadata.truncation = !over_tcp;
            vec![message]
        };
        let all: Vec<_> = (0..100).map(|i| (i, 60)).collect();
        let (outcome, asked) = one(answers).await;
        assert_eq!(outcome, found(&all));
        assert_eq!(asked, [udp("www.example"), ("www.example.".to_owned(), true, false)]);
    }

    #[tokio::test]
    async fn there_is_no_such_name_or_address() {
        let answers: Answers = |query, _| vec![with(query, ResponseCode::NXDomain, vec![])];
        assert_eq!(one(answers).await, (Outcome::NoName, vec![udp("www.example")]));
        let answers: Answers = |query, _| {
            let mut message = with(query, ResponseCode::NoError, vec![alias("www.example", 5, "b.example")]);
            message.add_authority(soa());
            vec![message]
        };
        assert_eq!(one(answers).await, (Outcome::NoAddress(Some(30)), vec![udp("www.example")]));
        let answers: Answers = |query, _| no_error(query, vec![]);
        assert_eq!(one(answers).await, (Outcome::NoAddress(None), vec![udp("www.example")]));
    }

    #[tokio::test]
    async fn a_server_without_edns() {
        let answers: Answers = |query, _| match query.edns {
            Some(_) => vec![with(query, ResponseCode::FormErr, vec![])],
            None => no_error(query, vec![a("www.example", 60, 1)]),
        };
        let (outcome, asked) = one(answers).await;
        assert_eq!(outcome, found(&[(1, 60)]));
        assert_eq!(asked, [udp("www.example"), ("www.example.".to_owned(), false, false)]);
    }

    #[tokio::test]
    async fn answers_to_other_questions_do_not_count() {
        let answers: Answers = |query, _| {
            let mut other_id = with(query, ResponseCode::NoError, vec![a("www.example", 60, 66)]);
            other_id.metadata.id = query.metadata.id.wrapping_add(1);
            let mut other_name = other_id.clone();
            other_name.metadata.id = query.metadata.id;
            other_name.queries = vec![Query::query(name("b.example"), RecordType::A)];
            let mut other_kind = other_id.clone();
            other_kind.metadata.id = query.metadata.id;
            other_kind.queries[0].query_type = RecordType::AAAA;
            let right = with(query, ResponseCode::NoError, vec![a("www.example", 60, 1)]);
            vec![query.clone(), other_id, other_name, other_kind, right]
        };
        assert_eq!(one(answers).await.0, found(&[(1, 60)]));
    }

    #[tokio::test]
    async fn the_next_server_is_asked_and_then_all_again() {
        let refuses: Answers = |query, _| vec![with(query, ResponseCode::ServFail, vec![])];
        let answers: Answers = |query, _| no_error(query, vec![a("www.example", 60, 1)]);
        let silent: Answers = |_, _| vec![];
        let (found_it, asked) = outcome(Duration::from_mins(1), &[refuses, answers], Family::V4).await;
        assert_eq!(found_it, found(&[(1, 60)]));
        assert_eq!(asked.iter().map(|a| a.borrow().len()).collect::<Vec<_>>(), [1, 1]);

        let short = Duration::from_millis(20);
        let (failed, asked) = outcome(short, &[refuses, silent], Family::V4).await;
        assert_eq!(failed, Outcome::Failed("127.0.0.1: no answer".to_owned()));
        assert_eq!(asked[0].borrow().len(), ROUNDS);
        let (failed, _) = outcome(Duration::from_mins(1), &[refuses], Family::V4).await;
        assert_eq!(failed, Outcome::Failed("127.0.0.1: Server Failure".to_owned()));
        let (failed, _) = outcome(short, &[], Family::V4).await;
        assert_eq!(failed, Outcome::Failed("there is no resolver to ask".to_owned()));
    }

    #[tokio::test]
    async fn who_answered_last_is_asked_first() {
        let tasks = LocalSet::new();
        let work = tasks.run_until(async {
            let refuses = serve(|query, _| vec![with(query, ResponseCode::Refused, vec![])]).await;
            let answers = serve(|query, _| no_error(query, vec![a("www.example", 60, 1)])).await;
            let client = Client::new(vec![refuses.address, answers.address]);
            let question = Question { name: Wire::of(&name("www.example")), family: Family::V4 };
            for _ in 0..3 {
                assert_eq!(client.look_up(&question).await, found(&[(1, 60)]));
            }
            assert_eq!((refuses.asked.borrow().len(), answers.asked.borrow().len()), (1, 3));
        });
        work.await;
    }

    #[tokio::test]
    async fn nobody_listens() {
        // Bound and let go: the kernel says at once that nobody is there.
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let client = Client { patience: Duration::from_mins(1), ..Client::new(vec![server]) };
        let question = Question { name: Wire::of(&name("www.example")), family: Family::V4 };
        let Outcome::Failed(why) = client.look_up(&question).await else { panic!("an answer from nobody") };
        assert!(why.contains("refused"), "{why}");
    }
}

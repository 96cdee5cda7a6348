//! A resolver that does as it is told, and clients that look up and connect at once.
#![expect(clippy::print_stdout, reason = "a program whose answer is its output")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use lab::dns::{A, AAAA, Answer, Data, Question, Record};
use serde_json::json;

#[derive(Parser)]
#[command(about = "A resolver that does as it is told, and clients that look up and connect at once")]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Answer questions over UDP and TCP. Entries are `NAME TTL KIND VALUE…`:
    /// `A address…` (of either family), `CNAME name`, `SPIN address` (two higher with every answer),
    /// `MANY address count`, `STRAY name address` (a record that nobody asked for), `SILENT`. Over TCP answers for
    /// names that begin with `split` come in two segments.
    Serve { address: SocketAddr, entries: Vec<String> },
    /// Ask once; say what came.
    Ask {
        server: SocketAddr,
        name: String,
        #[arg(long)]
        tcp: bool,
        #[arg(long)]
        aaaa: bool,
        #[arg(long)]
        edns: Option<u16>,
        #[arg(long, default_value_t = 4660)]
        id: u16,
        #[arg(long, default_value_t = 0)]
        source_port: u16,
        #[arg(long, default_value_t = 5000)]
        limit_ms: u64,
    },
    /// Look a name up and connect to every address of the answer at once; and, with `--never`, to the address after
    /// each, which must fail.
    Rounds {
        server: SocketAddr,
        name: String,
        #[arg(long)]
        port: u16,
        #[arg(long, default_value_t = 1)]
        count: u32,
        #[arg(long)]
        tcp: bool,
        #[arg(long)]
        aaaa: bool,
        #[arg(long)]
        edns: Option<u16>,
        #[arg(long)]
        never: bool,
        /// For a connection.
        #[arg(long, default_value_t = 2500)]
        limit_ms: u64,
    },
}

fn main() -> io::Result<()> {
    match Arguments::parse().mode {
        Mode::Serve { address, entries } => serve(address, &entries),
        Mode::Ask { server, name, tcp, aaaa, edns, id, source_port, limit_ms } => {
            let question = Question { edns, ..Question::new(id, &name, kind(aaaa)) };
            println!("asking");
            let asked = if tcp {
                ask_tcp(server, &question, Duration::from_millis(limit_ms))
            } else {
                ask_udp(server, &question, source_port, Duration::from_millis(limit_ms))
            };
            match asked {
                Ok(answer) => println!(
                    "{}",
                    json!({ "truncated": answer.truncated, "addresses": answer.addresses().collect::<Vec<_>>() })
                ),
                Err(error) => println!("{}", json!({ "error": error.to_string() })),
            }
            Ok(())
        }
        Mode::Rounds { server, name, port, count, tcp, aaaa, edns, never, limit_ms } => {
            let limit = Duration::from_millis(limit_ms);
            let mut rounds = Rounds::default();
            for round in 0..count {
                let id = (round as u16).wrapping_mul(40_503) ^ 0x5a5a;
                let question = Question { edns, ..Question::new(id, &name, kind(aaaa)) };
                rounds.run(server, &question, tcp, port, never, limit);
            }
            println!(
                "{}",
                json!({
                    "rounds": count, "connected": rounds.connected, "failed": rounds.failed,
                    "wrong": rounds.wrong, "truncated": rounds.truncated, "distinct": rounds.distinct.len(),
                })
            );
            Ok(())
        }
    }
}

fn kind(aaaa: bool) -> u16 {
    if aaaa { AAAA } else { A }
}

#[derive(Default)]
struct Rounds {
    connected: u64,
    /// Look-ups and connections that did not work, by reason.
    failed: BTreeMap<String, u64>,
    /// Addresses that were never answered and could be connected to.
    wrong: Vec<IpAddr>,
    /// Answers that were cut short, and asked for over TCP.
    truncated: u64,
    distinct: BTreeSet<IpAddr>,
}

impl Rounds {
    fn run(
        &mut self,
        server: SocketAddr,
        question: &Question,
        tcp: bool,
        port: u16,
        never: bool,
        limit: Duration,
    ) {
        let asking = Duration::from_secs(5);
        let mut asked =
            if tcp { ask_tcp(server, question, asking) } else { ask_udp(server, question, 0, asking) };
        if asked.as_ref().is_ok_and(|answer| answer.truncated) {
            self.truncated += 1;
            asked = ask_tcp(server, question, asking);
        }
        let mut fail = |what: String| *self.failed.entry(what).or_default() += 1;
        let answer = match asked {
            Ok(answer) => answer,
            Err(error) => return fail(format!("look-up: {error}")),
        };
        let addresses: Vec<_> = answer.addresses().collect();
        if addresses.is_empty() {
            return fail("no address".to_owned());
        }
        for address in addresses {
            let start = Instant::now();
            match TcpStream::connect_timeout(&(address, port).into(), limit) {
                Ok(_) => self.connected += 1,
                Err(error) => {
                    fail(format!("{error}"));
                    println!("{address}: {error} after {:?}", start.elapsed());
                }
            }
            let next = after(address, 1);
            if never && TcpStream::connect_timeout(&(next, port).into(), limit).is_ok() {
                self.wrong.push(next);
            }
            self.distinct.insert(address);
        }
    }
}

fn after(address: IpAddr, step: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() + step).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() + u128::from(step)).into(),
    }
}

fn unspecified(server: SocketAddr) -> IpAddr {
    if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn ask_udp(server: SocketAddr, question: &Question, port: u16, limit: Duration) -> io::Result<Answer> {
    let socket = UdpSocket::bind((unspecified(server), port))?;
    socket.connect(server)?;
    socket.send(&question.to_bytes())?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left))?;
        let length = socket.recv(&mut buffer)?;
        if let Some(answer) = Answer::parse(&buffer[..length], question.id) {
            return Ok(answer);
        }
    }
}

fn ask_tcp(server: SocketAddr, question: &Question, limit: Duration) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, limit)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(&framed(&question.to_bytes()))?;
    let bytes = read_framed(&mut stream)?;
    Answer::parse(&bytes, question.id).ok_or_else(|| io::Error::other("no answer to the question"))
}

/// A message over TCP has its length in front (RFC 1035, 4.2.2).
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a message's length");
    [&length.to_be_bytes()[..], message].concat()
}

fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// What is known of a name.
struct Entry {
    ttl: u32,
    does: Does,
}

enum Does {
    Addresses(Vec<IpAddr>),
    Alias(String),
    Spin(IpAddr, AtomicU32),
    Stray(String, IpAddr),
    Silent,
}

impl Entry {
    fn parse(line: &str) -> (String, Self) {
        let words: Vec<_> = line.split_whitespace().collect();
        let [name, ttl, does, values @ ..] = &words[..] else { panic!("'{line}' is no entry") };
        let address =
            |text: &str| text.parse::<IpAddr>().unwrap_or_else(|_| panic!("'{text}' is no address"));
        let does = match (*does, values) {
            ("A", values) => Does::Addresses(values.iter().map(|text| address(text)).collect()),
            ("CNAME", [target]) => Does::Alias((*target).to_owned()),
            ("SPIN", [first]) => Does::Spin(address(first), AtomicU32::new(0)),
            ("MANY", [first, count]) => {
                let count: u32 = count.parse().expect("a number of addresses");
                Does::Addresses((0..count).map(|n| after(address(first), n)).collect())
            }
            ("STRAY", [name, other]) => Does::Stray((*name).to_owned(), address(other)),
            ("SILENT", []) => Does::Silent,
            _ => panic!("'{line}' is no entry"),
        };
        (name.to_ascii_lowercase(), Self { ttl: ttl.parse().expect("a TTL"), does })
    }
}

type Zone = BTreeMap<String, Entry>;

/// The answer; `None`: nobody says anything.
fn look(zone: &Zone, question: &Question) -> Option<Answer> {
    let mut records = Vec::new();
    let mut owner = question.name.clone();
    while let Some(Entry { ttl, does }) = zone.get(&owner.to_ascii_lowercase()) {
        let ttl = *ttl;
        let mut add = |owner: &str, address: IpAddr| {
            if address.is_ipv4() == (question.kind == A) {
                records.push(Record { owner: owner.to_owned(), ttl, data: Data::Address(address) });
            }
        };
        match does {
            Does::Addresses(addresses) => addresses.iter().for_each(|address| add(&owner, *address)),
            Does::Spin(first, turn) => {
                add(&owner, after(*first, 2 * turn.fetch_add(1, Ordering::Relaxed)));
            }
            Does::Stray(name, address) => add(name, *address),
            Does::Silent => return None,
            Does::Alias(target) => {
                records.push(Record { owner: owner.clone(), ttl, data: Data::Name(target.clone()) });
                owner.clone_from(target);
                continue;
            }
        }
        break;
    }
    Some(Answer::of(records))
}

fn serve(address: SocketAddr, entries: &[String]) -> io::Result<()> {
    let zone: Arc<Zone> = Arc::new(entries.iter().map(|line| Entry::parse(line)).collect());
    let listener = TcpListener::bind(address)?;
    let socket = UdpSocket::bind(address)?;
    println!("ready");
    let shared = Arc::clone(&zone);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let zone = Arc::clone(&shared);
            // A client that goes away ends its own thread only.
            thread::spawn(move || serve_stream(&zone, stream));
        }
    });
    let mut buffer = [0; 2048];
    loop {
        // An ICMP error for an earlier answer is reported here: it concerns that client only.
        let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
        let Some(question) = Question::parse(&buffer[..length]) else { continue };
        let Some(answer) = look(&zone, &question) else { continue };
        let limit = question.edns.map_or(512, usize::from).max(512);
        let _ = socket.send_to(&answer.to_bytes(&question, limit), client);
    }
}

fn serve_stream(zone: &Zone, mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    while let Ok(message) = read_framed(&mut stream) {
        let Some(question) = Question::parse(&message) else { break };
        if let Some(answer) = look(zone, &question) {
            let message = framed(&answer.to_bytes(&question, usize::from(u16::MAX)));
            let split = question.name.to_ascii_lowercase().starts_with("split");
            let (first, second) = message.split_at(if split { message.len() / 2 } else { message.len() });
            stream.write_all(first)?;
            if split {
                // Long enough for the first to be on its way alone.
                thread::sleep(Duration::from_millis(20));
                stream.write_all(second)?;
            }
        }
    }
    Ok(())
}

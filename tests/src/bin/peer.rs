//! The lab's own server and clients, and the reaper of labs.
//!
//! Clients end with one line of JSON: what worked, what failed and why, and whom the server saw.
#![expect(clippy::print_stdout, reason = "a program whose answer is its output")]

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::exit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand, ValueEnum};
use serde_json::json;

#[derive(Parser)]
#[command(about = "The lab's own server and clients, and the reaper of labs")]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Serve TCP and UDP: say whom the server sees, then echo.
    Serve { address: SocketAddr },
    /// Open TCP connections, exchange a line on each.
    Tcp {
        destination: SocketAddr,
        #[arg(long, default_value_t = 1)]
        count: u64,
        /// How many are open at the same time; they are opened together.
        #[arg(long, default_value_t = 1)]
        parallel: u64,
        #[arg(long, default_value_t = 5000)]
        limit_ms: u64,
    },
    /// Exchange UDP datagrams, each from a new socket.
    Udp {
        destination: SocketAddr,
        #[arg(long, default_value_t = 1)]
        count: u64,
        #[arg(long, default_value_t = 5000)]
        limit_ms: u64,
        /// The client's own port instead of a free one.
        #[arg(long, default_value_t = 0)]
        source_port: u16,
        /// Bytes of a datagram; 0 stands for a short one.
        #[arg(long, default_value_t = 0)]
        size: usize,
        /// All of them from one socket.
        #[arg(long)]
        one_flow: bool,
    },
    /// Numbered messages over one connection until standard input ends.
    Stream {
        protocol: Protocol,
        destination: SocketAddr,
        #[arg(long, default_value_t = 10)]
        interval_ms: u64,
    },
    /// New connections, one after the other, until standard input ends.
    Fresh {
        protocol: Protocol,
        destination: SocketAddr,
        #[arg(long, default_value_t = 10)]
        interval_ms: u64,
    },
    /// Try all of `tcp/address:port` and `udp/address:port` at the same time, once; say what came of each.
    Reach {
        targets: Vec<Target>,
        #[arg(long, default_value_t = 300)]
        limit_ms: u64,
    },
    /// UDP datagrams to all destinations in turn, each from a new socket, until standard input ends; say how many to
    /// each.
    Spray {
        destinations: Vec<SocketAddr>,
        /// Between two rounds over all destinations.
        #[arg(long, default_value_t = 2)]
        interval_ms: u64,
    },
    /// Wait for the end of a lab's owner and remove the lab.
    Reap { lab: String },
    /// Remove labs that were kept.
    Remove {
        #[arg(required_unless_present = "all")]
        labs: Vec<String>,
        /// Every one of them on this machine, whoever kept it.
        #[arg(long)]
        all: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
}

#[derive(Clone)]
struct Target {
    tcp: bool,
    address: SocketAddr,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (protocol, address) = text.split_once('/').ok_or("want tcp/… or udp/…")?;
        let tcp = match protocol {
            "tcp" => true,
            "udp" => false,
            _ => return Err("want tcp/… or udp/…".to_owned()),
        };
        Ok(Self { tcp, address: address.parse().map_err(|error| format!("{error}"))? })
    }
}

fn main() -> io::Result<()> {
    match Arguments::parse().mode {
        Mode::Serve { address } => serve(address),
        Mode::Tcp { destination, count, parallel, limit_ms } => {
            tcp(destination, count, parallel, Duration::from_millis(limit_ms));
            Ok(())
        }
        Mode::Udp { destination, count, limit_ms, source_port, size, one_flow } => {
            let limit = Duration::from_millis(limit_ms);
            let mut tally = Tally::default();
            let mut kept = None;
            for number in 0..count {
                let socket = match kept.take() {
                    Some(socket) => Ok(socket),
                    None => udp_socket(destination, source_port, limit),
                };
                tally.add(socket.and_then(|socket| {
                    let result = udp_exchange(&socket, &pattern(size, number));
                    kept = one_flow.then_some(socket);
                    result
                }));
            }
            tally.print();
            Ok(())
        }
        Mode::Stream { protocol, destination, interval_ms } => {
            let interval = Duration::from_millis(interval_ms);
            match protocol {
                Protocol::Tcp => stream_tcp(destination, interval),
                Protocol::Udp => stream_udp(destination, interval),
            }
        }
        Mode::Fresh { protocol, destination, interval_ms } => {
            fresh(protocol, destination, Duration::from_millis(interval_ms));
            Ok(())
        }
        Mode::Reach { targets, limit_ms } => {
            reach(&targets, Duration::from_millis(limit_ms));
            Ok(())
        }
        Mode::Spray { destinations, interval_ms } => spray(&destinations, Duration::from_millis(interval_ms)),
        Mode::Reap { lab } => lab::lab::reap(&lab),
        Mode::Remove { labs, all } => remove(labs, all),
    }
}

/// What a client counts.
#[derive(Default)]
struct Tally {
    ok: u64,
    errors: BTreeMap<String, u64>,
    sources: BTreeMap<String, u64>,
    port: u16,
    longest_gap: Duration,
}

impl Tally {
    /// Counts an exchange; the server says whom it saw as `address port`.
    fn add(&mut self, result: io::Result<String>) {
        match result {
            Ok(seen) => {
                let (source, port) = seen.split_once(' ').unwrap_or((&seen, ""));
                self.ok += 1;
                *self.sources.entry(source.to_owned()).or_default() += 1;
                self.port = port.parse().unwrap_or_default();
            }
            Err(error) => *self.errors.entry(error.to_string()).or_default() += 1,
        }
    }

    fn print(&self) {
        let gap = u64::try_from(self.longest_gap.as_millis()).unwrap_or(u64::MAX);
        let report = json!({
            "ok": self.ok, "errors": self.errors, "sources": self.sources, "port": self.port,
            "longest_gap_ms": gap,
        });
        println!("{report}");
    }
}

fn serve(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let socket = UdpSocket::bind(address)?;
    println!("ready");
    thread::spawn(move || {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        // An ICMP error for an earlier answer is reported here: it concerns that client only.
        loop {
            let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
            // A socket of both families sees IPv4 addresses mapped.
            let mut answer = format!("{} {}\n", client.ip().to_canonical(), client.port()).into_bytes();
            answer.extend(&buffer[..length]);
            let _ = socket.send_to(&answer, client);
        }
    });
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        thread::spawn(move || {
            // A client that goes away ends its own thread only.
            let _ = answer(stream);
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let client = stream.peer_addr()?;
    stream.write_all(format!("{} {}\n", client.ip().to_canonical(), client.port()).as_bytes())?;
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    Ok(())
}

/// Connects and reads whom the server sees.
fn open(destination: SocketAddr, limit: Duration) -> io::Result<(BufReader<TcpStream>, String)> {
    let stream = TcpStream::connect_timeout(&destination, limit)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit))?;
    let mut reader = BufReader::new(stream);
    let source = line(&mut reader)?;
    Ok((reader, source))
}

fn line(reader: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut text = String::new();
    if reader.read_line(&mut text)? == 0 {
        return Err(io::Error::other("closed by the server"));
    }
    Ok(text.trim_end().to_owned())
}

fn exchange(reader: &mut BufReader<TcpStream>) -> io::Result<()> {
    reader.get_mut().write_all(b"hello\n")?;
    let answer = line(reader)?;
    if answer == "hello" { Ok(()) } else { Err(io::Error::other(format!("echoed '{answer}'"))) }
}

fn tcp(destination: SocketAddr, count: u64, parallel: u64, limit: Duration) {
    let tally = Mutex::new(Tally::default());
    let together = Barrier::new(usize::try_from(parallel).expect("a number of threads"));
    thread::scope(|scope| {
        for index in 0..parallel {
            let (tally, together) = (&tally, &together);
            let share = count / parallel + u64::from(index < count % parallel);
            scope.spawn(move || {
                for round in 0..share {
                    let opened = open(destination, limit);
                    if round == 0 {
                        // All first connections are open before any goes on.
                        together.wait();
                    }
                    let result = opened.and_then(|(mut reader, source)| {
                        exchange(&mut reader)?;
                        Ok(source)
                    });
                    tally.lock().unwrap_or_else(PoisonError::into_inner).add(result);
                }
                if share == 0 {
                    together.wait();
                }
            });
        }
    });
    tally.into_inner().unwrap_or_else(PoisonError::into_inner).print();
}

/// The unspecified address of a destination's family.
fn any(destination: SocketAddr) -> IpAddr {
    if destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn udp_socket(destination: SocketAddr, source_port: u16, limit: Duration) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((any(destination), source_port))?;
    socket.connect(destination)?;
    socket.set_read_timeout(Some(limit))?;
    Ok(socket)
}

/// Data in which no part can stand for another: of two fragments in the wrong place, the answer tells.
fn pattern(size: usize, number: u64) -> Vec<u8> {
    if size == 0 {
        return b"hello".to_vec();
    }
    (0..size)
        .map(|at| (at as u64).wrapping_mul(31).wrapping_add(at as u64 >> 8).wrapping_add(number) as u8)
        .collect()
}

fn udp_exchange(socket: &UdpSocket, data: &[u8]) -> io::Result<String> {
    socket.send(data)?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut buffer)?;
    let answer = &buffer[..length];
    let newline = answer.iter().position(|byte| *byte == b'\n');
    match newline.map(|at| (&answer[..at], &answer[at + 1..])) {
        Some((source, echoed)) if echoed == data => Ok(String::from_utf8_lossy(source).into_owned()),
        _ => Err(io::Error::other(format!("answered {length} bytes that are not what was sent"))),
    }
}

/// Tries each target in a thread of its own, so that silence costs the limit once.
fn reach(targets: &[Target], limit: Duration) {
    let outcomes: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> =
            targets.iter().map(|target| scope.spawn(move || outcome(target, limit))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| "panicked".to_owned())).collect()
    });
    println!("{}", json!(outcomes));
}

/// `open`, `silent`, `refused`, `unreachable`, `prohibited`; or the error.
#[expect(clippy::wildcard_enum_match_arm, reason = "any other error shows as it is")]
fn outcome(target: &Target, limit: Duration) -> String {
    let result = if target.tcp {
        open(target.address, limit).and_then(|(mut reader, _)| exchange(&mut reader))
    } else {
        udp_socket(target.address, 0, limit).and_then(|socket| udp_exchange(&socket, b"hello")).map(drop)
    };
    match result {
        Ok(()) => "open".to_owned(),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => "refused".to_owned(),
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
            io::ErrorKind::PermissionDenied => "prohibited".to_owned(),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "silent".to_owned(),
            _ => error.to_string(),
        },
    }
}

fn spray(destinations: &[SocketAddr], interval: Duration) -> io::Result<()> {
    let stop = ended();
    let mut sent = BTreeMap::new();
    println!("running");
    while !stop.load(Ordering::Relaxed) {
        for destination in destinations {
            let socket = UdpSocket::bind((any(*destination), 0))?;
            socket.send_to(b"hello", destination)?;
            *sent.entry(destination.ip().to_string()).or_insert(0_u64) += 1;
        }
        thread::sleep(interval);
    }
    println!("{}", json!(sent));
    Ok(())
}

/// Becomes true when standard input ends.
fn ended() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        set.store(true, Ordering::Relaxed);
    });
    flag
}

/// The longest time a stream may be silent before it is given up.
const SILENCE: Duration = Duration::from_secs(15);

fn stream_tcp(destination: SocketAddr, interval: Duration) -> io::Result<()> {
    let (mut reader, source) = open(destination, Duration::from_secs(5))?;
    println!("running as {source}");
    reader.get_ref().set_read_timeout(Some(SILENCE))?;
    let mut writer = reader.get_ref().try_clone()?;
    let stop = ended();
    let sender = thread::spawn(move || -> io::Result<u64> {
        let mut sent = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            writer.write_all(&sent.to_be_bytes())?;
            sent += 1;
            thread::sleep(interval);
        }
        writer.shutdown(Shutdown::Write)?;
        Ok(sent)
    });
    let mut tally = Tally::default();
    let mut last = Instant::now();
    let mut number = [0; 8];
    for expected in 0_u64.. {
        match reader.read_exact(&mut number) {
            Ok(()) if number == expected.to_be_bytes() => tally.add(Ok(source.clone())),
            Ok(()) => tally.add(Err(io::Error::other("bytes were lost or came twice"))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => {
                tally.add(Err(error));
                break;
            }
        }
        tally.longest_gap = tally.longest_gap.max(last.elapsed());
        last = Instant::now();
    }
    if tally.errors.is_empty() {
        match sender.join() {
            Ok(Ok(sent)) if sent == tally.ok => {}
            Ok(Ok(sent)) => tally.add(Err(io::Error::other(format!("{} of {sent} came back", tally.ok)))),
            Ok(Err(error)) => tally.add(Err(error)),
            Err(_) => tally.add(Err(io::Error::other("the sender panicked"))),
        }
    }
    tally.print();
    Ok(())
}

fn stream_udp(destination: SocketAddr, interval: Duration) -> io::Result<()> {
    let socket = UdpSocket::bind((any(destination), 0))?;
    socket.connect(destination)?;
    // Short, so that the end is noticed; nothing is lost by it.
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let sender_socket = socket.try_clone()?;
    let (stop, sent, done) = (ended(), Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, over) = (Arc::clone(&sent), Arc::clone(&done));
    let sender = thread::spawn(move || -> io::Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let number = count.fetch_add(1, Ordering::Relaxed);
            sender_socket.send(&number.to_be_bytes())?;
            thread::sleep(interval);
        }
        over.store(true, Ordering::Relaxed);
        Ok(())
    });
    let mut tally = Tally::default();
    let mut seen = std::collections::BTreeSet::new();
    let mut first = None;
    let mut last = Instant::now();
    let mut buffer = [0; 2048];
    loop {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let answer = &buffer[..length];
                let Some(at) = answer.iter().position(|byte| *byte == b'\n') else { continue };
                if seen.is_empty() {
                    println!("running");
                }
                if seen.insert(answer[at + 1..].to_vec()) {
                    let now = String::from_utf8_lossy(&answer[..at]).into_owned();
                    let first = first.get_or_insert_with(|| now.clone());
                    if *first == now {
                        tally.add(Ok(now));
                    } else {
                        // Another port is another flow, and another peer to many a server.
                        tally.add(Err(io::Error::other(format!("seen as {now} after {first}"))));
                    }
                    tally.longest_gap = tally.longest_gap.max(last.elapsed());
                    last = Instant::now();
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => tally.add(Err(error)),
        }
        let all = seen.len() as u64 == sent.load(Ordering::Relaxed);
        if done.load(Ordering::Relaxed) && (all || last.elapsed() > Duration::from_secs(1)) {
            break;
        }
    }
    if let Ok(Err(error)) = sender.join() {
        tally.add(Err(error));
    }
    let missing = sent.load(Ordering::Relaxed) - seen.len() as u64;
    for _ in 0..missing {
        tally.add(Err(io::Error::other("no answer")));
    }
    tally.print();
    Ok(())
}

fn fresh(protocol: Protocol, destination: SocketAddr, interval: Duration) {
    let stop = ended();
    let mut tally = Tally::default();
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let limit = Duration::from_secs(2);
        let result = match protocol {
            Protocol::Udp => {
                udp_socket(destination, 0, limit).and_then(|socket| udp_exchange(&socket, b"hello"))
            }
            Protocol::Tcp => open(destination, limit).and_then(|(mut reader, source)| {
                exchange(&mut reader)?;
                Ok(source)
            }),
        };
        tally.add(result);
        if tally.ok == 1 {
            println!("running");
        }
        tally.longest_gap = tally.longest_gap.max(last.elapsed());
        last = Instant::now();
        thread::sleep(interval);
    }
    tally.print();
}

fn remove(mut labs: Vec<String>, all: bool) -> io::Result<()> {
    if all {
        labs = lab::lab::existing().into_iter().filter(|(_, kept)| *kept).map(|(id, _)| id).collect();
    }
    let mut failed = false;
    for id in labs {
        // Names come from a person: only a lab's own name may choose what is removed.
        let known = lab::lab::existing().iter().any(|(name, kept)| *name == id && *kept);
        if !known {
            println!("{id}: no such lab was kept");
            failed = true;
            continue;
        }
        lab::lab::remove(&id)?;
        println!("{id}: removed");
    }
    if failed {
        exit(1);
    }
    Ok(())
}

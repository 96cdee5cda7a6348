//! Much traffic whose every byte is checked, and traffic from before there is a network.
//!
//! What is sent is a function of its place in the stream, so the receiver compares every byte with what it must
//! be: that finds what equal hashes of the whole would, and where it is.
#![expect(clippy::print_stdout, reason = "a program whose answer is its output")]

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand, ValueEnum};
use serde_json::json;

#[derive(Parser)]
#[command(about = "Traffic whose every byte is checked")]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Serve the two below.
    Serve { address: SocketAddr },
    /// Send or receive a stream over TCP.
    Tcp {
        destination: SocketAddr,
        #[arg(long)]
        bytes: u64,
        #[arg(long)]
        direction: Direction,
    },
    /// Have small datagrams echoed, each with its number and data that follow from it.
    Udp {
        destination: SocketAddr,
        #[arg(long)]
        count: u64,
    },
    /// Open connections and hold them until standard input ends.
    Hold {
        protocol: Protocol,
        destination: SocketAddr,
        #[arg(long)]
        count: usize,
        /// How long each may take.
        #[arg(long, default_value_t = 1000)]
        limit_ms: u64,
    },
    /// One datagram after the other, each from a port of its own, until standard input ends.
    Flood { destination: SocketAddr },
    /// Send UDP to a server and TCP SYNs to another port of it, before there is a network and until the server
    /// has answered; half a minute after standard input has ended without an answer, too.
    Spray {
        destination: SocketAddr,
        /// Where the SYNs go: nobody should listen there.
        #[arg(long)]
        syn: u16,
    },
    /// Once standard input ends, send UDP to a server every millisecond until it has answered; says when that was,
    /// by the machine's monotonic clock, in nanoseconds.
    Knock { destination: SocketAddr },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    Up,
    Down,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
}

/// Bytes that are written, read and compared at a time.
const BLOCK: usize = 1 << 18;
/// A prime, so that the pattern never falls in step with segments.
const PATTERN: usize = 1_048_573;
/// Nothing may stay silent for longer.
const SILENCE: Duration = Duration::from_secs(15);

fn main() -> io::Result<()> {
    match Arguments::parse().mode {
        Mode::Serve { address } => serve(address),
        Mode::Tcp { destination, bytes, direction } => tcp(destination, bytes, direction),
        Mode::Udp { destination, count } => udp(destination, count),
        Mode::Hold { protocol, destination, count, limit_ms } => {
            hold(protocol, destination, count, Duration::from_millis(limit_ms))
        }
        Mode::Flood { destination } => flood(destination),
        Mode::Knock { destination } => knock(destination),
        Mode::Spray { destination, syn } => spray(destination, syn),
    }
}

/// The stream of data: a pseudo-random pattern over and over, whose place in the stream decides on each byte.
struct Pattern(Vec<u8>);

impl Pattern {
    fn new() -> Self {
        // xorshift64 (Marsaglia 2003).
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes: Vec<u8> = Vec::with_capacity(PATTERN + BLOCK);
        while bytes.len() < PATTERN {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        bytes.truncate(PATTERN);
        bytes.extend_from_within(..BLOCK);
        Self(bytes)
    }

    /// The `len` bytes at a place of the stream; at most [`BLOCK`].
    fn at(&self, place: u64, len: usize) -> &[u8] {
        let start = usize::try_from(place % PATTERN as u64).expect("less than the pattern");
        &self.0[start..start + len]
    }

    fn send(&self, stream: &mut TcpStream, bytes: u64) -> io::Result<()> {
        let mut place = 0;
        while place < bytes {
            let len = usize::try_from((bytes - place).min(BLOCK as u64)).expect("at most a block");
            stream.write_all(self.at(place, len))?;
            place += len as u64;
        }
        Ok(())
    }

    /// Reads to the stream's end. Gives how many bytes came, and the first place where one was wrong.
    fn receive(&self, stream: &mut TcpStream) -> io::Result<(u64, Option<u64>)> {
        let mut buffer = vec![0; BLOCK];
        let (mut place, mut wrong) = (0, None);
        loop {
            let len = stream.read(&mut buffer)?;
            if len == 0 {
                return Ok((place, wrong));
            }
            let expected = self.at(place, len);
            if wrong.is_none() && buffer[..len] != *expected {
                let at = buffer.iter().zip(expected).position(|(is, should)| is != should);
                wrong = at.map(|at| place + at as u64);
            }
            place += len as u64;
        }
    }
}

/// The data of a datagram: its number, then up to 64 bytes that follow from it.
fn datagram(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let len = 8 + usize::try_from(number % 65).expect("small");
    let mut bytes = number.to_be_bytes().to_vec();
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn serve(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let socket = UdpSocket::bind(address)?;
    println!("ready");
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            // An ICMP error for an earlier answer is reported here: it concerns that client only.
            let Ok((len, client)) = socket.recv_from(&mut buffer) else { continue };
            let _ = socket.send_to(&buffer[..len], client);
        }
    });
    let pattern = Arc::new(Pattern::new());
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let pattern = Arc::clone(&pattern);
        thread::spawn(move || {
            // A client that goes away ends its own thread only; it says so itself.
            let _ = answer(stream, &pattern);
        });
    }
    Ok(())
}

/// First comes the number of bytes that the client wants; 0: it sends itself, and wants to know what came.
fn answer(mut stream: TcpStream, pattern: &Pattern) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    let source = stream.peer_addr()?.ip();
    let mut wanted = [0; 8];
    stream.read_exact(&mut wanted)?;
    match u64::from_be_bytes(wanted) {
        0 => {
            let (bytes, wrong) = pattern.receive(&mut stream)?;
            let report = json!({"bytes": bytes, "wrong": wrong, "source": source.to_string()});
            writeln!(stream, "{report}")
        }
        bytes => {
            pattern.send(&mut stream, bytes)?;
            stream.shutdown(Shutdown::Write)
        }
    }
}

fn tcp(destination: SocketAddr, bytes: u64, direction: Direction) -> io::Result<()> {
    let pattern = Pattern::new();
    let mut stream = TcpStream::connect_timeout(&destination, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(SILENCE))?;
    if direction == Direction::Up {
        stream.write_all(&0_u64.to_be_bytes())?;
        pattern.send(&mut stream, bytes)?;
        stream.shutdown(Shutdown::Write)?;
        let mut report = String::new();
        stream.read_to_string(&mut report)?;
        print!("{report}");
    } else {
        stream.write_all(&bytes.to_be_bytes())?;
        let (bytes, wrong) = pattern.receive(&mut stream)?;
        println!("{}", json!({"bytes": bytes, "wrong": wrong}));
    }
    Ok(())
}

/// How many datagrams may be on their way at once: fewer than any queue holds.
const WINDOW: u64 = 64;

fn udp(destination: SocketAddr, count: u64) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(destination)?;
    // A machine that is busy elsewhere loses nothing by it.
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let (mut sent, mut answered, mut lost, mut wrong) = (0_u64, 0_u64, 0_u64, 0_u64);
    let mut pending = std::collections::BTreeSet::new();
    let mut buffer = [0; 2048];
    while sent < count || !pending.is_empty() {
        while sent < count && (pending.len() as u64) < WINDOW {
            socket.send(&datagram(sent))?;
            pending.insert(sent);
            sent += 1;
        }
        match socket.recv(&mut buffer) {
            Ok(len) => {
                let number = buffer.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
                match number.filter(|number| *number < sent && buffer[..len] == datagram(*number)[..]) {
                    Some(number) if pending.remove(&number) => answered += 1,
                    // Answered late, or twice: not corrupted.
                    Some(_) => {}
                    None => wrong += 1,
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                lost += pending.len() as u64;
                pending.clear();
            }
            Err(error) => return Err(error),
        }
    }
    println!("{}", json!({"sent": sent, "answered": answered, "lost": lost, "wrong": wrong}));
    Ok(())
}

/// Opens connections that the lab's own server answers, and holds those that were.
fn hold(protocol: Protocol, destination: SocketAddr, count: usize, limit: Duration) -> io::Result<()> {
    let open = |results: &mut BTreeMap<String, u64>| -> io::Result<Box<dyn std::any::Any + Send>> {
        let mut buffer = [0; 128];
        let (held, len): (Box<dyn std::any::Any + Send>, usize) = match protocol {
            Protocol::Tcp => {
                let mut stream = TcpStream::connect_timeout(&destination, limit)?;
                stream.set_read_timeout(Some(limit))?;
                let len = stream.read(&mut buffer)?;
                (Box::new(stream), len)
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.connect(destination)?;
                socket.set_read_timeout(Some(limit))?;
                socket.send(b"hold")?;
                let len = socket.recv(&mut buffer)?;
                (Box::new(socket), len)
            }
        };
        let text = String::from_utf8_lossy(&buffer[..len]);
        let source = text.split(' ').next().unwrap_or_default();
        *results.entry(source.to_owned()).or_default() += 1;
        Ok(held)
    };
    // All at once: what has to wait waits for the same time.
    let (held, answers, failed) = thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|_| {
                scope.spawn(|| {
                    let mut answers = BTreeMap::new();
                    let held = open(&mut answers);
                    (held, answers)
                })
            })
            .collect();
        let (mut all, mut sources, mut failed) = (Vec::new(), BTreeMap::<String, u64>::new(), 0_u64);
        for thread in threads {
            let (held, answers) = thread.join().expect("no panic");
            match held {
                Ok(held) => all.push(held),
                Err(_) => failed += 1,
            }
            for (source, count) in answers {
                *sources.entry(source).or_default() += count;
            }
        }
        (all, sources, failed)
    });
    println!("{}", json!({"held": held.len(), "failed": failed, "answers": answers}));
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

fn flood(destination: SocketAddr) -> io::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        told.store(true, Ordering::Relaxed);
    });
    println!("running");
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        sent += u64::from(socket.send_to(b"flood", destination).is_ok());
    }
    println!("{}", json!({"sent": sent}));
    Ok(())
}

/// How long the sender goes on without a pause after its first packet left.
const TIGHT: Duration = Duration::from_millis(30);

fn spray(destination: SocketAddr, syn: u16) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_nonblocking(true)?;
    let closed = SocketAddr::new(destination.ip(), syn);
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        told.store(true, Ordering::Relaxed);
    });
    let syns = Arc::new(AtomicU64::new(0));
    let (counted, over) = (Arc::clone(&syns), Arc::clone(&stop));
    thread::spawn(move || {
        let mut first = None;
        while !over.load(Ordering::Relaxed) {
            // Without a route it fails at once; with one the SYN has left by then.
            let result = TcpStream::connect_timeout(&closed, Duration::from_millis(1));
            if result.err().is_some_and(|error| error.kind() == io::ErrorKind::NetworkUnreachable) {
                thread::yield_now();
                continue;
            }
            counted.fetch_add(1, Ordering::Relaxed);
            pause(*first.get_or_insert_with(Instant::now));
        }
    });
    println!("running");
    let (mut sent, mut answers, mut first) = (0_u64, BTreeMap::<String, u64>::new(), None);
    let mut buffer = [0; 2048];
    let (began, mut given_up) = (Instant::now(), None);
    // Many of these run at once: whoever has been answered makes room.
    while answers.is_empty() || began.elapsed() < TIGHT * 20 {
        if stop.load(Ordering::Relaxed) && given_up.get_or_insert_with(Instant::now).elapsed() > SILENCE * 2 {
            break;
        }
        match socket.send_to(b"early", destination) {
            Ok(_) => {
                sent += 1;
                pause(*first.get_or_insert_with(Instant::now));
            }
            Err(_) => thread::yield_now(),
        }
        while let Ok(len) = socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..len]);
            let source = text.split(' ').next().unwrap_or_default();
            *answers.entry(source.to_owned()).or_default() += 1;
        }
    }
    stop.store(true, Ordering::Relaxed);
    println!("{}", json!({"sent": sent, "syns": syns.load(Ordering::Relaxed), "answers": answers}));
    Ok(())
}

fn knock(destination: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(1)))?;
    println!("running");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    let began = Instant::now();
    let mut buffer = [0; 2048];
    while began.elapsed() < SILENCE * 4 {
        if socket.send_to(b"knock", destination).is_err() {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        if let Ok(len) = socket.recv(&mut buffer) {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            let text = String::from_utf8_lossy(&buffer[..len]);
            let source = text.split(' ').next().unwrap_or_default();
            println!(
                "{}",
                json!({"source": source, "nanoseconds": now.tv_sec * 1_000_000_000 + now.tv_nsec})
            );
            return Ok(());
        }
    }
    Err(io::Error::other("no answer"))
}

/// A tight loop at first, then a few packets a second: many of these run at once.
fn pause(first: Instant) {
    match first.elapsed() {
        passed if passed < TIGHT => {}
        passed if passed < TIGHT * 20 => thread::sleep(Duration::from_millis(5)),
        _ => thread::sleep(Duration::from_millis(100)),
    }
}

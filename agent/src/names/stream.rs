//! Puts resolvers' answers over TCP together from the segments that `to_pod` has dropped once and copied.
//!
//! Only streams are read whose beginning was seen. A pod decides how its resolver cuts a stream, by its MSS and window: if
//! any segment were taken for the beginning of a message, it could have octets of a record of its own zone read as an
//! answer for somebody else's name.

use std::collections::BTreeMap;
use std::time::Duration;

use datapath::addr::Ip;
use datapath::keys::{HeldKey, PodId, Segment};
use datapath::limits;
use datapath::packet::SYN;
use tokio::time::Instant;

/// How far a segment may begin from where the next is expected, in bytes: two of the longest messages.
const AHEAD: i64 = 1 << 17;
/// Bytes of one pod's streams that wait for others. Where it has more, the stream is not read on.
const POD_BYTES: usize = 1 << 18;
/// Streams of one pod. Beyond, the one idle longest is not read on.
const POD_STREAMS: usize = 64;
/// Records of segments that have not come whole, over all pods.
const PARTIAL: usize = 256;
/// After this time the rest of a segment's records does not come: there was no room for them on the way.
const PARTIAL_LIFE: Duration = Duration::from_secs(limits::HELD_SECONDS as u64 + 1);
/// A stream is forgotten after this time without a segment. RFC 7766, 6.2.3, has servers close after some seconds.
const IDLE: Duration = Duration::from_hours(1);
/// Bytes that wait for others are forgotten, with their stream, after this time: resolvers' clients have given up.
const WAITING: Duration = Duration::from_mins(1);
/// A message's header (RFC 1035, 4.1.1).
const HEADER: usize = 12;

/// What has become whole with a record of a segment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Taken {
    /// Messages, in order. What they tell must be in the maps before the segment is marked.
    pub messages: Vec<Vec<u8>>,
    /// The segment to be marked as read, and how many bytes it has.
    pub read: Option<(HeldKey, u32)>,
    /// The sequence number up to which its stream has been read without a gap.
    pub read_to: Option<u32>,
}

/// Counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Messages that were read.
    pub messages: u64,
    /// Segments that passed without being read: their stream's beginning was not seen, or it was given up.
    pub unread: u64,
    /// Streams that were given up: too much of them was missing, or what came was no DNS.
    pub given_up: u64,
}

/// One connection, seen by the pod: pod, resolver, the pod's port, the resolver's.
type Connection = (PodId, Ip, u16, u16);

/// All streams.
#[derive(Debug, Default)]
pub struct Streams {
    by_connection: BTreeMap<Connection, Stream>,
    partial: BTreeMap<HeldKey, Partial>,
    counts: Counts,
}

#[derive(Debug)]
struct Stream {
    /// Sequence number of the first byte of all.
    start: u32,
    /// How many bytes have come without a gap.
    whole: u64,
    /// Those of them that are no whole message yet.
    rest: Vec<u8>,
    /// Bytes behind a gap, by their place in the stream.
    ahead: BTreeMap<u64, Vec<u8>>,
    /// When its last segment came.
    used: Instant,
    /// Since when it has had bytes that wait for others.
    waiting: Option<Instant>,
}

/// A segment whose records have not all come.
#[derive(Debug)]
struct Partial {
    payload: u32,
    bytes: Vec<u8>,
    since: Instant,
}

impl Streams {
    /// Takes a record from `SEGMENTS`.
    pub fn take(&mut self, segment: &Segment, bytes: &[u8], now: Instant) -> Taken {
        let held = segment.held;
        if segment.flags & u32::from(SYN) != 0 {
            self.begin(&held, now);
        }
        if segment.payload == 0 {
            return Taken::default();
        }
        let Some(bytes) = self.put_together(segment, bytes, now) else { return Taken::default() };
        let connection = connection(&held);
        let others = self.bytes_of(held.pod);
        let Some(stream) = self.by_connection.get_mut(&connection) else {
            self.counts.unread += 1;
            return Taken { read: Some((held, segment.payload)), ..Taken::default() };
        };
        stream.used = now;
        let before = stream.bytes();
        let (messages, sound) = stream.put(held.seq, &bytes, now);
        // What a pod has waiting is bounded by its own streams' being given up.
        let mut read_to = Some(stream.expected());
        if !sound || others - before + stream.bytes() > POD_BYTES {
            read_to = None;
            self.by_connection.remove(&connection);
            self.counts.given_up += 1;
        }
        self.counts.messages += messages.len() as u64;
        Taken { messages, read: Some((held, segment.payload)), read_to }
    }

    /// A connection begins. Its first packet may come again; on the same ports a new one may begin.
    fn begin(&mut self, held: &HeldKey, now: Instant) {
        let connection = connection(held);
        if self.by_connection.get(&connection).is_some_and(|stream| stream.start == held.seq) {
            return;
        }
        let of_pod =
            (held.pod, Ip::UNSPECIFIED, 0, 0)..=(held.pod, Ip { octets: [0xff; 16] }, u16::MAX, u16::MAX);
        if self.by_connection.range(of_pod.clone()).count() >= POD_STREAMS
            && let Some((oldest, _)) = self.by_connection.range(of_pod).min_by_key(|(_, stream)| stream.used)
        {
            let oldest = *oldest;
            self.by_connection.remove(&oldest);
            self.counts.given_up += 1;
        }
        let stream = Stream {
            start: held.seq,
            whole: 0,
            rest: Vec::new(),
            ahead: BTreeMap::new(),
            used: now,
            waiting: None,
        };
        self.by_connection.insert(connection, stream);
    }

    /// The whole segment, if this record is its last one.
    fn put_together(&mut self, segment: &Segment, bytes: &[u8], now: Instant) -> Option<Vec<u8>> {
        let whole = segment.payload as usize;
        if segment.offset == 0 {
            self.partial.remove(&segment.held);
            if bytes.len() >= whole {
                return Some(bytes[..whole].to_vec());
            }
            if self.partial.len() >= PARTIAL
                && let Some((oldest, _)) = self.partial.iter().min_by_key(|(_, partial)| partial.since)
            {
                let oldest = *oldest;
                self.partial.remove(&oldest);
            }
            let partial = Partial { payload: segment.payload, bytes: bytes.to_vec(), since: now };
            self.partial.insert(segment.held, partial);
            return None;
        }
        let partial = self.partial.get_mut(&segment.held)?;
        if partial.payload != segment.payload || partial.bytes.len() != segment.offset as usize {
            self.partial.remove(&segment.held);
            return None; // one got lost; the segment comes again, or passes late
        }
        partial.bytes.extend_from_slice(bytes);
        if partial.bytes.len() < whole {
            return None;
        }
        let mut bytes = self.partial.remove(&segment.held)?.bytes;
        bytes.truncate(whole);
        Some(bytes)
    }

    /// Forgets what is past its time, and all of pods that are gone.
    pub fn forget(&mut self, now: Instant, is_there: impl Fn(PodId) -> bool) {
        let since = |then: Instant| now.saturating_duration_since(then);
        let given_up = &mut self.counts.given_up;
        self.by_connection.retain(|connection, stream| {
            let waits_too_long = stream.waiting.is_some_and(|then| since(then) >= WAITING);
            *given_up += u64::from(waits_too_long);
            is_there(connection.0) && since(stream.used) < IDLE && !waits_too_long
        });
        self.partial.retain(|held, partial| is_there(held.pod) && since(partial.since) < PARTIAL_LIFE);
    }

    /// Counts since the start.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    fn bytes_of(&self, pod: PodId) -> usize {
        let of_pod = (pod, Ip::UNSPECIFIED, 0, 0)..=(pod, Ip { octets: [0xff; 16] }, u16::MAX, u16::MAX);
        self.by_connection.range(of_pod).map(|(_, stream)| stream.bytes()).sum()
    }
}

impl Stream {
    fn bytes(&self) -> usize {
        self.rest.len() + self.ahead.values().map(Vec::len).sum::<usize>()
    }

    /// The sequence number of the byte that comes next.
    const fn expected(&self) -> u32 {
        self.start.wrapping_add(self.whole as u32)
    }

    /// Puts a segment where it belongs, and takes out the messages that are whole. False: what came is no DNS, or
    /// cannot be put together any more.
    fn put(&mut self, seq: u32, bytes: &[u8], now: Instant) -> (Vec<Vec<u8>>, bool) {
        // Sequence numbers wrap; places in the stream do not (RFC 9293, 3.4).
        let away = i64::from(seq.wrapping_sub(self.expected()).cast_signed());
        if !(-AHEAD..=AHEAD).contains(&away) {
            return (Vec::new(), false); // another connection's, or too much is missing
        }
        // A probe whether the connection lives stands before its first byte (RFC 9293, 3.8.4).
        let before = away.saturating_add_unsigned(self.whole).min(0).unsigned_abs();
        let bytes = bytes.get(before as usize..).unwrap_or_default();
        let place = self.whole.saturating_add_signed(away);
        let there = self.ahead.entry(place).or_default();
        if there.len() < bytes.len() {
            *there = bytes.to_vec();
        }
        while let Some(entry) = self.ahead.first_entry().filter(|entry| *entry.key() <= self.whole) {
            let known = (self.whole - entry.key()) as usize;
            let bytes = entry.remove();
            if let Some(new) = bytes.get(known..) {
                self.rest.extend_from_slice(new);
                self.whole += new.len() as u64;
            }
        }
        let mut messages = Vec::new();
        let mut read = 0;
        let mut sound = true;
        while let Some((length, rest)) = self.rest[read..].split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length));
            sound = length >= HEADER;
            let Some(message) = rest.get(..length).filter(|_| sound) else { break };
            messages.push(message.to_vec());
            read += 2 + length;
        }
        self.rest.drain(..read);
        self.waiting = match self.waiting {
            _ if self.rest.is_empty() && self.ahead.is_empty() => None,
            Some(since) if messages.is_empty() => Some(since),
            _ => Some(now),
        };
        (messages, sound)
    }
}

const fn connection(held: &HeldKey) -> Connection {
    (held.pod, held.resolver, held.port, held.resolver_port)
}

#[cfg(test)]
mod tests {
    use datapath::limits::SEGMENT_BYTES;

    use super::*;

    const START: u32 = u32::MAX - 10; // so that it wraps
    const POD: PodId = 7;

    /// Streams as one pod sees them.
    struct Lab {
        streams: Streams,
        now: Instant,
    }

    fn held(port: u16, seq: u32) -> HeldKey {
        HeldKey { pod: POD, resolver: Ip::v4([10, 96, 0, 10]), port, resolver_port: 53, seq }
    }

    fn syn(held: HeldKey) -> Segment {
        Segment { held, flags: SYN.into(), ..Segment::default() }
    }

    fn message(length: usize, fill: u8) -> Vec<u8> {
        vec![fill; length]
    }

    /// As on the wire over TCP (RFC 1035, 4.2.2).
    fn framed(messages: &[Vec<u8>]) -> Vec<u8> {
        messages
            .iter()
            .flat_map(|m| (m.len() as u16).to_be_bytes().into_iter().chain(m.iter().copied()))
            .collect()
    }

    impl Lab {
        fn new() -> Self {
            let mut lab = Self { streams: Streams::default(), now: Instant::now() };
            lab.begin(1, START);
            lab
        }

        fn begin(&mut self, port: u16, seq: u32) {
            let taken =
                self.streams.take(&Segment { held: held(port, seq), ..Segment::default() }, &[], self.now);
            assert_eq!(taken, Taken::default());
        }

        /// Bytes `from..to` of a stream as one segment: the messages that are whole with it.
        fn put(&mut self, stream: &[u8], from: usize, to: usize) -> Vec<Vec<u8>> {
            self.put_at(1, START.wrapping_add(from as u32), &stream[from..to])
        }

        fn put_at(&mut self, port: u16, seq: u32, bytes: &[u8]) -> Vec<Vec<u8>> {
            let held = held(port, seq);
            let mut messages = Vec::new();
            let mut offset = 0;
            for piece in bytes.chunks(SEGMENT_BYTES) {
                let (payload, len) = (bytes.len() as u32, piece.len() as u32);
                let segment = Segment { held, payload, offset, len, ..Segment::default() };
                let taken = self.streams.take(&segment, piece, self.now);
                offset += len;
                // It is marked read with its last record, never earlier, and with all its bytes.
                assert_eq!(taken.read, (offset == payload).then_some((held, payload)));
                messages.extend(taken.messages);
            }
            messages
        }
    }

    #[test]
    fn one_message_in_one_segment_and_two_in_one() {
        let (a, b, c) = (message(12, 1), message(40, 2), message(30, 3));
        let stream = framed(&[a.clone(), b.clone(), c.clone()]);
        let mut lab = Lab::new();
        assert_eq!(lab.put(&stream, 0, 14), [a]);
        assert_eq!(lab.put(&stream, 14, stream.len()), [b, c]);
        assert_eq!(lab.streams.counts(), Counts { messages: 3, unread: 0, given_up: 0 });
    }

    #[test]
    fn every_way_to_cut_it_in_three() {
        let messages = [message(12, 1), message(13, 2)];
        let stream = framed(&messages);
        for i in 0..=stream.len() {
            for j in i..=stream.len() {
                let mut lab = Lab::new();
                let mut got = Vec::new();
                for (from, to) in [(0, i), (i, j), (j, stream.len())] {
                    if from < to {
                        got.extend(lab.put(&stream, from, to));
                    }
                }
                assert_eq!(got, messages, "{i} {j}");
            }
        }
    }

    #[test]
    fn in_any_order_and_several_times() {
        let messages = [message(100, 1), message(50, 2)];
        let stream = framed(&messages);
        let mut lab = Lab::new();
        assert!(lab.put(&stream, 120, stream.len()).is_empty());
        assert!(lab.put(&stream, 60, 90).is_empty());
        assert!(lab.put(&stream, 60, 90).is_empty());
        assert!(lab.put(&stream, 0, 10).is_empty());
        assert!(lab.put(&stream, 0, 60).is_empty(), "sent again with more behind it");
        assert_eq!(lab.put(&stream, 80, 125), messages, "the gap is filled by what overlaps both sides");
        assert!(lab.put(&stream, 0, stream.len()).is_empty(), "read already");
        assert_eq!(lab.streams.bytes_of(POD), 0);
    }

    #[test]
    fn what_stands_before_the_first_byte_is_not_read() {
        let stream = framed(&[message(12, 1)]);
        let mut lab = Lab::new();
        assert!(lab.put_at(1, START.wrapping_sub(1), &[0]).is_empty());
        assert_eq!(lab.put_at(1, START.wrapping_sub(1), &[&[0], &stream[..]].concat()).len(), 1);
        assert_eq!(lab.streams.counts(), Counts { messages: 1, unread: 0, given_up: 0 });
    }

    #[test]
    fn a_connection_may_begin_with_data() {
        let stream = framed(&[message(12, 1)]);
        let mut lab = Lab::new();
        let payload = stream.len() as u32;
        let segment = Segment { payload, len: payload, ..syn(held(2, 77)) };
        assert_eq!(lab.streams.take(&segment, &stream, lab.now).messages, [message(12, 1)]);
    }

    #[test]
    fn how_far_a_stream_is_read() {
        let stream = framed(&[message(100, 1)]);
        let mut lab = Lab::new();
        let mut read_to = |from: usize, to: usize| {
            let held = held(1, START.wrapping_add(from as u32));
            let segment = Segment { held, payload: (to - from) as u32, ..Segment::default() };
            let taken = lab.streams.take(&segment, &stream[from..to], lab.now);
            taken.read_to.map(|seq| seq.wrapping_sub(START))
        };
        assert_eq!(read_to(50, 102), Some(0), "behind a gap nothing is read");
        assert_eq!(read_to(0, 20), Some(20));
        assert_eq!(read_to(10, 60), Some(102));
        let unknown = Segment { held: held(9, 0), payload: 14, ..Segment::default() };
        assert_eq!(lab.streams.take(&unknown, &stream[..14], lab.now).read_to, None);
    }

    #[test]
    fn the_longest_message_in_large_segments() {
        let long = message(65_535, 5);
        let stream = framed(&[long.clone(), message(12, 6)]);
        let mut lab = Lab::new();
        assert!(lab.put(&stream, 0, 60_000).is_empty());
        assert_eq!(lab.put(&stream, 60_000, stream.len()), [long, message(12, 6)]);
    }

    #[test]
    fn a_stream_whose_beginning_was_not_seen_is_not_read() {
        // What a pod could have made stand where a segment begins.
        let forged = framed(&[message(12, 66)]);
        let mut lab = Lab::new();
        assert!(lab.put_at(2, 1000, &forged).is_empty());
        assert_eq!(lab.streams.counts(), Counts { messages: 0, unread: 1, given_up: 0 });
        // Nor at a gap: its bytes belong to the message that was begun.
        let stream = [framed(&[message(500, 1)]), forged.clone()].concat();
        let inside = [&stream[..300], &forged, &stream[314..]].concat();
        assert!(lab.put(&inside, 300, 314).is_empty());
        assert_eq!(lab.put(&inside, 0, 300).len(), 0);
        assert_eq!(lab.put(&inside, 314, inside.len()).len(), 2);
    }

    #[test]
    fn a_new_connection_on_the_same_ports() {
        let stream = framed(&[message(12, 1), message(20, 2)]);
        let mut lab = Lab::new();
        assert_eq!(lab.put(&stream, 0, 20).len(), 1);
        lab.begin(1, START);
        assert_eq!(
            lab.put(&stream, 20, stream.len()).len(),
            1,
            "the beginning that is told again changes nothing"
        );
        lab.begin(1, 5);
        assert_eq!(lab.put_at(1, 5, &stream).len(), 2);
        // A segment of the one before is far away, and ends it.
        assert!(lab.put_at(1, START.wrapping_sub(1 << 20), &stream).is_empty());
        assert_eq!(lab.streams.counts().given_up, 1);
    }

    #[test]
    fn what_is_no_dns_is_given_up_and_passes() {
        let mut lab = Lab::new();
        assert!(lab.put(b"\0\x0bHTTP/1.1 200", 0, 14).is_empty());
        assert_eq!(lab.streams.counts(), Counts { messages: 0, unread: 0, given_up: 1 });
        assert!(lab.put(&framed(&[message(12, 1)]), 0, 14).is_empty());
        assert_eq!(lab.streams.counts().unread, 1);
        // What came before it is read.
        lab.begin(1, START);
        let stream = [framed(&[message(12, 1)]), vec![0, 11]].concat();
        assert_eq!(lab.put(&stream, 0, stream.len()).len(), 1);
        assert_eq!(lab.streams.counts().given_up, 2);
    }

    #[test]
    fn a_segment_with_a_missing_record_is_not_marked() {
        let bytes = framed(&[message(9000, 1)]);
        let mut lab = Lab::new();
        let held = held(1, START);
        let mut record = |offset: usize, len: usize| {
            let segment = Segment {
                held,
                payload: bytes.len() as u32,
                offset: offset as u32,
                len: len as u32,
                ..Segment::default()
            };
            lab.streams.take(&segment, &bytes[offset..offset + len], lab.now)
        };
        assert_eq!(record(0, 4096), Taken::default());
        assert_eq!(record(8192, bytes.len() - 8192), Taken::default());
        assert_eq!(record(4096, 4096), Taken::default(), "it was forgotten with the lost record");
        // It comes again, whole.
        record(0, 4096);
        record(4096, 4096);
        let taken = record(8192, bytes.len() - 8192);
        assert_eq!((taken.messages.len(), taken.read), (1, Some((held, bytes.len() as u32))));
    }

    #[test]
    fn memory_is_bounded() {
        let mut lab = Lab::new();
        let stream = framed(&[message(60_000, 1)]);
        // Many streams that never end their message.
        for port in 0..1000 {
            lab.now += Duration::from_millis(1);
            lab.begin(port, 0);
            lab.put_at(port, 0, &stream[..50_000]);
            assert!(lab.streams.bytes_of(POD) <= POD_BYTES);
        }
        assert!(lab.streams.by_connection.len() <= POD_STREAMS);
        // Another pod's are not touched by it, and what comes far ahead is given up.
        let mut lab = Lab::new();
        assert!(lab.put_at(1, START.wrapping_add(AHEAD as u32 + 1), &stream).is_empty());
        assert_eq!(lab.streams.counts().given_up, 1);
        // Records of segments that do not come whole.
        for seq in 0..1000 {
            let segment = Segment { held: held(1, seq), payload: 9000, len: 10, ..Segment::default() };
            lab.streams.take(&segment, &[0; 10], lab.now);
        }
        assert_eq!(lab.streams.partial.len(), PARTIAL);
        lab.streams.forget(lab.now + PARTIAL_LIFE, |_| true);
        assert_eq!(lab.streams.partial.len(), 0);
    }

    #[test]
    fn what_waits_too_long_is_forgotten() {
        let stream = framed(&[message(12, 1), message(12, 2)]);
        let mut lab = Lab::new();
        lab.put(&stream, 0, 20);
        lab.streams.forget(lab.now + WAITING.checked_sub(Duration::from_secs(1)).unwrap(), |_| true);
        assert_eq!(lab.streams.by_connection.len(), 1);
        lab.streams.forget(lab.now + WAITING, |_| true);
        assert_eq!((lab.streams.by_connection.len(), lab.streams.counts().given_up), (0, 1));
        // One with nothing that waits lives longer, but not its pod's end.
        let mut lab = Lab::new();
        lab.put(&stream, 0, stream.len());
        lab.streams.forget(lab.now + WAITING * 2, |_| true);
        assert_eq!(lab.streams.by_connection.len(), 1);
        lab.streams.forget(lab.now + WAITING * 2, |pod| pod != POD);
        assert_eq!(lab.streams.by_connection.len(), 0);
        lab.begin(1, 0);
        lab.streams.forget(lab.now + IDLE, |_| true);
        assert_eq!(lab.streams.by_connection.len(), 0);
    }

    #[test]
    fn a_pod_with_many_streams_loses_its_own_oldest() {
        let mut lab = Lab::new();
        let other = syn(HeldKey { pod: 8, ..held(1, 0) });
        lab.streams.take(&other, &[], lab.now);
        for port in 1..=POD_STREAMS as u16 + 1 {
            lab.now += Duration::from_millis(1);
            lab.begin(port, START);
        }
        assert_eq!(lab.streams.by_connection.len(), POD_STREAMS + 1);
        assert!(lab.streams.by_connection.contains_key(&connection(&other.held)));
        assert!(!lab.streams.by_connection.contains_key(&connection(&held(1, 0))));
    }
}

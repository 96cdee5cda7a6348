//! Netfilter's netlink (nfnetlink): messages, attributes, requests, dumps and batches.
//!
//! Written here because the agent needs two requests of it (`conntrack`, `notrack`), one of which hands back to
//! the kernel the very bytes that it got from it, whatever protocol they are of.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket as NetlinkSocket, SocketAddr};

// include/uapi/linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// Make what is not there yet.
pub(crate) const NLM_F_CREATE: u16 = 0x400;
/// At the end of the list.
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
/// An attribute's type without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const NLA_TYPE_MASK: u16 = 0x3fff;
// include/uapi/linux/netfilter/nfnetlink.h
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;

/// A request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    /// The subsystem in the high byte, its message in the low one.
    pub(crate) kind: u16,
    /// `NLM_F_…` beside those that the way of sending needs.
    pub(crate) flags: u16,
    /// `NFPROTO_…`.
    pub(crate) family: u8,
    /// Encoded attributes.
    pub(crate) body: Vec<u8>,
}

impl Request {
    fn encode(&self, out: &mut Vec<u8>, flags: u16, sequence: u32, resource: u16) {
        out.extend(((HEADER + FAMILY_HEADER + self.body.len()) as u32).to_ne_bytes());
        out.extend(self.kind.to_ne_bytes());
        out.extend((NLM_F_REQUEST | self.flags | flags).to_ne_bytes());
        out.extend(sequence.to_ne_bytes());
        out.extend([0; 4]); // the sender's port id: the kernel knows it
        out.extend([self.family, 0]); // NFNETLINK_V0
        out.extend(resource.to_be_bytes());
        out.extend(&self.body);
    }
}

/// Appends an attribute.
pub(crate) fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend(((4 + value.len()) as u16).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Appends a number in network order, as netfilter's attributes have them.
pub(crate) fn put_u32(out: &mut Vec<u8>, kind: u16, value: u32) {
    put(out, kind, &value.to_be_bytes());
}

/// Appends a string, with the zero that ends it.
pub(crate) fn put_str(out: &mut Vec<u8>, kind: u16, value: &str) {
    put(out, kind, &[value.as_bytes(), &[0]].concat());
}

/// Appends an attribute of attributes.
pub(crate) fn put_nested(out: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    put(out, kind | NLA_F_NESTED, &inner);
}

/// The attributes of a message or of an attribute: types without flags, and values. Ends at what is malformed.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & NLA_TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of an attribute.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A message from the kernel.
#[derive(PartialEq, Eq, Debug)]
enum Message<'a> {
    /// The end of a dump, or of a request: 0, or a negative error number.
    End(i32),
    /// The attributes of an object.
    Object(&'a [u8]),
}

/// The messages of a datagram with their sequence numbers. Ends at what is malformed.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u32, Message<'_>)> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        let payload = bytes.get(HEADER..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        let number = |at: &[u8]| at.get(..4)?.try_into().ok().map(i32::from_ne_bytes);
        let message = match kind {
            NLMSG_ERROR => Message::End(number(payload)?),
            NLMSG_DONE => Message::End(number(payload).unwrap_or(0)),
            _ => Message::Object(payload.get(FAMILY_HEADER..)?),
        };
        Some((sequence, message))
    })
}

/// A socket in the calling thread's network namespace. Its calls block, for as long as the kernel works.
pub(crate) struct Socket {
    socket: NetlinkSocket,
    sequence: u32,
}

impl Socket {
    /// Opens one.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = NetlinkSocket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends one request and waits until it is done.
    pub(crate) fn request(&mut self, request: &Request) -> io::Result<()> {
        let sequence = self.next();
        let mut bytes = Vec::new();
        request.encode(&mut bytes, NLM_F_ACK, sequence, 0);
        self.send(&bytes)?;
        self.receive(sequence, |_| {})
    }

    /// Asks for many objects, and shows the attributes of each.
    pub(crate) fn dump(&mut self, request: &Request, each: impl FnMut(&[u8])) -> io::Result<()> {
        let sequence = self.next();
        let mut bytes = Vec::new();
        request.encode(&mut bytes, NLM_F_DUMP, sequence, 0);
        self.send(&bytes)?;
        self.receive(sequence, each)
    }

    /// Sends requests that are carried out as one, or not at all. `subsystem` is theirs.
    pub(crate) fn batch(&mut self, subsystem: u16, requests: &[Request]) -> io::Result<()> {
        let bracket = |kind| Request { kind, flags: 0, family: 0, body: Vec::new() };
        let mut bytes = Vec::new();
        bracket(NFNL_MSG_BATCH_BEGIN).encode(&mut bytes, 0, self.next(), subsystem);
        let mut last = 0;
        for (at, request) in requests.iter().enumerate() {
            last = self.next();
            // Errors come whether they are asked for or not, and before what follows them
            // (nfnetlink_rcv_batch, net/netfilter/nfnetlink.c): the last request's answer is the end.
            let flags = if at + 1 == requests.len() { NLM_F_ACK } else { 0 };
            request.encode(&mut bytes, flags, last, 0);
        }
        bracket(NFNL_MSG_BATCH_END).encode(&mut bytes, 0, self.next(), subsystem);
        self.send(&bytes)?;
        self.receive(last, |_| {})
    }

    const fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.socket.send(bytes, 0).map(drop)
    }

    /// Reads until the request with this number is done, or one of those with it failed.
    fn receive(&self, last: u32, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        loop {
            let (datagram, _) = match self.socket.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received?,
            };
            for (sequence, message) in messages(&datagram) {
                match message {
                    Message::End(0) if sequence == last => return Ok(()),
                    Message::End(0) => {}
                    Message::End(error) => return Err(io::Error::from_raw_os_error(error.saturating_neg())),
                    Message::Object(body) if sequence == last => each(body),
                    Message::Object(_) => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_nested_and_read_back() {
        let mut bytes = Vec::new();
        put_str(&mut bytes, 1, "ab");
        put_nested(&mut bytes, 2, |inner| put_u32(inner, 7, 1));
        let expected = [7u8, 0, 1, 0, b'a', b'b', 0, 0, 12, 0, 2, 0x80, 8, 0, 7, 0, 0, 0, 0, 1];
        // As a little-endian machine writes lengths and types.
        assert_eq!(bytes, expected.map(u8::to_le));
        let inner = attribute(&bytes, 2).unwrap();
        assert_eq!(attribute(inner, 7), Some(&[0, 0, 0, 1][..]));
        assert_eq!(attribute(&bytes, 1), Some(&b"ab\0"[..]));
        assert_eq!(attribute(&bytes, 3), None);
    }

    #[test]
    fn malformed_attributes_end_the_list() {
        let list = |bytes: &[u8]| attributes(bytes).count();
        assert_eq!(list(&[4, 0, 1, 0, 4, 0, 2, 0]), 2);
        for bad in [&[][..], &[4, 0, 1], &[3, 0, 1, 0], &[0, 0, 0, 0], &[9, 0, 1, 0, 0, 0, 0, 0]] {
            assert_eq!(list(bad), 0, "{bad:?}");
        }
    }

    #[test]
    fn a_request_is_read_as_it_was_written() {
        let mut bytes = Vec::new();
        let request = Request { kind: 0x102, flags: NLM_F_CREATE, family: 2, body: vec![4, 0, 9, 0] };
        request.encode(&mut bytes, NLM_F_ACK, 77, 0);
        assert_eq!(bytes.len(), 24);
        assert_eq!(bytes[6..8], (NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK).to_ne_bytes());
        assert_eq!(messages(&bytes).collect::<Vec<_>>(), [(77, Message::Object(&[4, 0, 9, 0]))]);
    }

    #[test]
    fn ends_and_errors() {
        let message = |kind: u16, payload: &[u8]| {
            let mut bytes = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(payload);
            bytes
        };
        let done = message(NLMSG_DONE, &0i32.to_ne_bytes());
        let error = message(NLMSG_ERROR, &(-2i32).to_ne_bytes());
        let both = [done, error].concat();
        let read: Vec<_> = messages(&both).map(|(_, message)| message).collect();
        assert_eq!(read, [Message::End(0), Message::End(-2)]);
        assert_eq!(messages(&both[..10]).count(), 0);
    }
}

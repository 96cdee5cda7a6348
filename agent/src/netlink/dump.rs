//! Whole answers to questions that netlink answers with lists.

use std::io;

use futures_util::StreamExt as _;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::Handle;

use super::Error;

/// How often a list is asked for before the node's network counts as changing too fast to be read. One that fits
/// into one datagram of 32 KiB is never torn.
const TRIES: u32 = 10;

/// A socket for questions. Notices come by another, that of [`super::watch`]: they bear the sequence number of who
/// caused them (`nlmsg_notify` in `net/netlink/af_netlink.c`), which CNI plugins count from 1, and netlink-proto knows
/// an answer by its sequence number alone.
pub(super) fn connect() -> Result<Handle, Error> {
    let (mut connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    // Only that message says whether a list is whole.
    connection.set_forward_done(true);
    tokio::spawn(connection);
    Ok(handle)
}

/// Asks for a list, and takes what `take` makes of each entry. `handle` is one of [`connect`].
///
/// # Errors
/// An errno, as an answer of its own or at the list's end, or that the list never came whole.
pub(super) async fn dump<T>(
    handle: &Handle,
    what: &'static str,
    question: RouteNetlinkMessage,
    take: impl Fn(RouteNetlinkMessage) -> Option<T>,
) -> Result<Vec<T>, Error> {
    for _ in 0..TRIES {
        if let Some(messages) = ask(handle, what, question.clone()).await? {
            return Ok(messages.into_iter().filter_map(take).collect());
        }
    }
    Err(Error::Torn { what })
}

/// One try; `None` if what is listed has changed meanwhile.
async fn ask(
    handle: &Handle,
    what: &'static str,
    question: RouteNetlinkMessage,
) -> Result<Option<Vec<RouteNetlinkMessage>>, Error> {
    let mut request = NetlinkMessage::from(question);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut handle = handle.clone();
    let answers = handle.request(request).map_err(|source| Error::Request { what, source })?;
    collect(answers).await.map_err(|source| Error::Dump { what, source })
}

async fn collect(
    mut answers: impl futures_util::Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Unpin,
) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
    let mut found = Vec::new();
    let mut torn = false;
    while let Some(message) = answers.next().await {
        // `nl_dump_check_consistent` (include/net/netlink.h): on any message of the list, the last one too.
        torn |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(inner) => found.push(inner),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            // A list that the kernel could not finish ends with the reason (`netlink_dump_done`).
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
            }
            NetlinkPayload::Done(_) => return Ok((!torn).then_some(found)),
            _ => {}
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use netlink_packet_core::{DoneMessage, ErrorMessage, NLM_F_MULTIPART, NetlinkHeader};
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    type Message = NetlinkMessage<RouteNetlinkMessage>;

    fn message(flags: u16, payload: NetlinkPayload<RouteNetlinkMessage>) -> Message {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_MULTIPART | flags;
        NetlinkMessage::new(header, payload)
    }

    fn entry(flags: u16) -> Message {
        message(flags, NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(LinkMessage::default())))
    }

    fn done(flags: u16, code: i32) -> Message {
        let mut done = DoneMessage::default();
        done.code = code;
        message(flags, NetlinkPayload::Done(done))
    }

    /// How many entries are found: `None` for a torn list.
    fn read(messages: Vec<Message>) -> io::Result<Option<usize>> {
        let found = futures_util::FutureExt::now_or_never(collect(stream::iter(messages)));
        found.unwrap().map(|list| list.map(|entries| entries.len()))
    }

    #[test]
    fn only_whole_lists_count() {
        assert_eq!(read(vec![entry(0), entry(0), done(0, 0)]).unwrap(), Some(2));
        assert_eq!(read(vec![done(0, 0)]).unwrap(), Some(0));
        assert_eq!(read(vec![entry(0), entry(NLM_F_DUMP_INTR), entry(0), done(0, 0)]).unwrap(), None);
        assert_eq!(read(vec![entry(0), done(NLM_F_DUMP_INTR, 0)]).unwrap(), None);
        let cut = read(vec![entry(0)]).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn an_errno_is_one_wherever_it_comes() {
        const ENOMEM: i32 = 12;
        assert_eq!(read(vec![entry(0), done(0, -ENOMEM)]).unwrap_err().raw_os_error(), Some(ENOMEM));
        let mut error = ErrorMessage::default();
        error.code = std::num::NonZero::new(-ENOMEM);
        let refused = read(vec![message(0, NetlinkPayload::Error(error))]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(ENOMEM));
    }
}

//! Outer packets of the tunnel skip connection tracking: otherwise each flow and direction costs an entry, as the
//! outer source port is a hash of the inner packet. An nftables table of our own says so, next to all others.
//!
//! Incoming, only what is for the node itself matches: a pod's packet to that port of some host passes by as it
//! would without us, masqueraded where the node does that.

use std::io;

use tracing::{info, warn};

use crate::nfnetlink::{NLM_F_APPEND, NLM_F_CREATE, Request, Socket, put, put_nested, put_str, put_u32};

/// The table's name, as `nft list ruleset` shows it: `table inet outgate`.
pub const TABLE: &str = "outgate";

/// Both families at once (include/uapi/linux/netfilter.h).
const NFPROTO_INET: u8 = 1;
/// `NF_IP_PRI_RAW`: before connection tracking, at -200 (`include/uapi/linux/netfilter_ipv4.h`).
const PRIORITY_RAW: i32 = -300;
/// `NF_INET_PRE_ROUTING` and `NF_INET_LOCAL_OUT`.
const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
const UDP: u8 = 17;

// include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_L4PROTO: u32 = 16;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const NFTA_FIB_DREG: u16 = 1;
const NFTA_FIB_RESULT: u16 = 2;
const NFTA_FIB_FLAGS: u16 = 3;
const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_DADDR: u32 = 2;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
const NFT_CMP_EQ: u32 = 0;
const NFT_REG_1: u32 = 1;
/// include/uapi/linux/rtnetlink.h
const RTN_LOCAL: u32 = 2;
/// Where a UDP header has its destination port.
const UDP_DESTINATION: u32 = 2;

/// Keeps the table as the tunnel's port asks for.
#[derive(Default)]
pub struct Notrack {
    port: Option<u16>,
    /// What was last said of a failure, so that it is said once.
    said: Option<String>,
}

impl Notrack {
    /// Makes the table for this port, in place of one that is there. A failure costs room in the conntrack table,
    /// and no packet: it is only said.
    pub fn set(&mut self, port: u16) {
        self.port = Some(port);
        self.write();
    }

    /// Makes the table again if somebody has removed it, as `nft flush ruleset` does.
    pub fn keep(&mut self) {
        let gone = exists().is_ok_and(|there| !there);
        if self.port.is_some() && self.said.is_none() && gone {
            info!("the nftables table {TABLE} is gone: made again");
            self.write();
        }
    }

    fn write(&mut self) {
        let Some(port) = self.port else { return };
        let failure = write(port).err().map(|error| error.to_string());
        if let Some(error) = &failure
            && self.said != failure
        {
            warn!(
                "cannot make the nftables table {TABLE}: {error}; the tunnel's packets take entries of the \
                 conntrack table (nf_conntrack_max)"
            );
        }
        self.said = failure;
    }
}

/// Removes the table. Whether there was one.
pub fn remove() -> io::Result<bool> {
    let mut socket = Socket::open()?;
    match socket.batch(NFNL_SUBSYS_NFTABLES, &[table(NFT_MSG_DELTABLE, 0)]) {
        Ok(()) => Ok(true),
        Err(error) if is_none(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn exists() -> io::Result<bool> {
    match Socket::open()?.request(&table(NFT_MSG_GETTABLE, 0)) {
        Ok(()) => Ok(true),
        Err(error) if is_none(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// No such table, or a kernel without nftables.
fn is_none(error: &io::Error) -> bool {
    const EINVAL: i32 = 22;
    const EOPNOTSUPP: i32 = 95;
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(EINVAL | EOPNOTSUPP))
}

/// Replaces the table by a new one, in one step: there is no moment without it.
fn write(port: u16) -> io::Result<()> {
    let requests = [
        // To delete it, it has to be there.
        table(NFT_MSG_NEWTABLE, NLM_F_CREATE),
        table(NFT_MSG_DELTABLE, 0),
        table(NFT_MSG_NEWTABLE, NLM_F_CREATE),
        chain("prerouting", PREROUTING),
        chain("output", OUTPUT),
        rule("prerouting", |list| {
            udp_port(list, port);
            to_this_node(list);
        }),
        rule("output", |list| udp_port(list, port)),
    ];
    Socket::open()?.batch(NFNL_SUBSYS_NFTABLES, &requests)
}

const fn request(kind: u16, flags: u16, body: Vec<u8>) -> Request {
    Request { kind: NFNL_SUBSYS_NFTABLES << 8 | kind, flags, family: NFPROTO_INET, body }
}

fn table(kind: u16, flags: u16) -> Request {
    let mut body = Vec::new();
    put_str(&mut body, NFTA_TABLE_NAME, TABLE);
    request(kind, flags, body)
}

fn chain(name: &str, hook: u32) -> Request {
    let mut body = Vec::new();
    put_str(&mut body, NFTA_CHAIN_TABLE, TABLE);
    put_str(&mut body, NFTA_CHAIN_NAME, name);
    put_nested(&mut body, NFTA_CHAIN_HOOK, |out| {
        put_u32(out, NFTA_HOOK_HOOKNUM, hook);
        put_u32(out, NFTA_HOOK_PRIORITY, PRIORITY_RAW.cast_unsigned());
    });
    put_str(&mut body, NFTA_CHAIN_TYPE, "filter");
    request(NFT_MSG_NEWCHAIN, NLM_F_CREATE, body)
}

/// A rule that lets what matches go untracked.
fn rule(chain: &str, matches: impl FnOnce(&mut Vec<u8>)) -> Request {
    let mut body = Vec::new();
    put_str(&mut body, NFTA_RULE_TABLE, TABLE);
    put_str(&mut body, NFTA_RULE_CHAIN, chain);
    put_nested(&mut body, NFTA_RULE_EXPRESSIONS, |list| {
        matches(list);
        expression(list, "notrack", |_| {});
    });
    request(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, body)
}

fn udp_port(list: &mut Vec<u8>, port: u16) {
    expression(list, "meta", |data| {
        put_u32(data, NFTA_META_DREG, NFT_REG_1);
        put_u32(data, NFTA_META_KEY, NFT_META_L4PROTO);
    });
    equals(list, &[UDP]);
    expression(list, "payload", |data| {
        put_u32(data, NFTA_PAYLOAD_DREG, NFT_REG_1);
        put_u32(data, NFTA_PAYLOAD_BASE, NFT_PAYLOAD_TRANSPORT_HEADER);
        put_u32(data, NFTA_PAYLOAD_OFFSET, UDP_DESTINATION);
        put_u32(data, NFTA_PAYLOAD_LEN, 2);
    });
    equals(list, &port.to_be_bytes());
}

/// The destination is an address of this node (`fib daddr type local`).
fn to_this_node(list: &mut Vec<u8>) {
    expression(list, "fib", |data| {
        put_u32(data, NFTA_FIB_DREG, NFT_REG_1);
        put_u32(data, NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE);
        put_u32(data, NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR);
    });
    // The register has it in host order.
    equals(list, &RTN_LOCAL.to_ne_bytes());
}

fn equals(list: &mut Vec<u8>, value: &[u8]) {
    expression(list, "cmp", |data| {
        put_u32(data, NFTA_CMP_SREG, NFT_REG_1);
        put_u32(data, NFTA_CMP_OP, NFT_CMP_EQ);
        put_nested(data, NFTA_CMP_DATA, |out| put(out, NFTA_DATA_VALUE, value));
    });
}

fn expression(list: &mut Vec<u8>, name: &str, fill: impl FnOnce(&mut Vec<u8>)) {
    put_nested(list, NFTA_LIST_ELEM, |out| {
        put_str(out, NFTA_EXPR_NAME, name);
        put_nested(out, NFTA_EXPR_DATA, fill);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nfnetlink::{attribute, attributes};

    /// The names of a rule's expressions, and the values that are compared with.
    fn expressions(rule: &Request) -> (Vec<String>, Vec<Vec<u8>>) {
        let list = attribute(&rule.body, NFTA_RULE_EXPRESSIONS).unwrap();
        let mut names = Vec::new();
        let mut values = Vec::new();
        for (kind, expression) in attributes(list) {
            assert_eq!(kind, NFTA_LIST_ELEM);
            let name = attribute(expression, NFTA_EXPR_NAME).unwrap();
            names.push(String::from_utf8(name[..name.len() - 1].to_vec()).unwrap());
            let data = attribute(expression, NFTA_EXPR_DATA).unwrap();
            if let Some(value) = attribute(data, NFTA_CMP_DATA).filter(|_| names.last().unwrap() == "cmp") {
                values.push(attribute(value, NFTA_DATA_VALUE).unwrap().to_vec());
            }
        }
        (names, values)
    }

    #[test]
    fn rules_match_the_port_and_in_prerouting_the_node_itself() {
        let (names, values) = expressions(&rule("prerouting", |list| {
            udp_port(list, 4795);
            to_this_node(list);
        }));
        assert_eq!(names, ["meta", "cmp", "payload", "cmp", "fib", "cmp", "notrack"]);
        assert_eq!(values, [vec![17], vec![18, 187], RTN_LOCAL.to_ne_bytes().to_vec()]);
    }

    #[test]
    fn a_chain_stands_before_connection_tracking() {
        let request = chain("output", OUTPUT);
        let hook = attribute(&request.body, NFTA_CHAIN_HOOK).unwrap();
        assert_eq!(attribute(hook, NFTA_HOOK_HOOKNUM), Some(&[0, 0, 0, 3][..]));
        assert_eq!(attribute(hook, NFTA_HOOK_PRIORITY), Some(&(-300i32).to_be_bytes()[..]));
    }
}

//! What the agent has learnt is entered by the same code as what the kernel learns: two writers of one entry would
//! undo each other's work.

use datapath::addr::Ip;
use datapath::keys::{Credit, LearntKey};
use datapath::limits::CREDITS;
use datapath::names::until;
use datapath::tables::Tables as _;

use crate::ctx::Skb;
use crate::packet::ETHERNET_LEN;
use crate::tables::Maps;

/// Carries out the credits in a packet. Gives their number.
#[inline(always)]
pub fn run(skb: &Skb) -> i32 {
    let now = Maps.now();
    let mut done = 0;
    Maps.repeat(CREDITS as u32, |i| {
        let at = ETHERNET_LEN + i as usize * size_of::<Credit>();
        let mut ip = Ip::UNSPECIFIED;
        let (Ok(firewall), Ok(()), Ok(rest)) =
            (skb.load::<[u8; 4]>(at), skb.load_into(at + 4, &mut ip.octets), skb.load::<[u8; 12]>(at + 20))
        else {
            return true;
        };
        // As the agent has laid them out: `Credit`.
        let word = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let key = LearntKey { firewall: u32::from_ne_bytes(firewall), ip };
        let (name, ttl, action) = (word(0), word(4), word(8));
        match action {
            _ if name == 0 => return false,
            Credit::ENTER => Maps.credit(&key, name, until(now, ttl)),
            Credit::FORGET => Maps.forget(&key, name),
            _ => return false,
        }
        done += 1;
        false
    });
    done
}

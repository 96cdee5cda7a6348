//! Which addresses stand for which names: learnt from the answers that resolvers give to pods.

use crate::conntrack::{Ticks, older_than, seconds};
use crate::keys::{Learnt, NameId};
use crate::limits::{NAME_GRACE_SECONDS, NAME_TTL_SECONDS};

/// Until when an address stands for a name that it was learnt for with this TTL, in seconds.
#[inline(always)]
#[must_use]
pub const fn until(now: Ticks, ttl: u32) -> Ticks {
    let ttl = if ttl > NAME_TTL_SECONDS { NAME_TTL_SECONDS } else { ttl };
    now.wrapping_add(seconds(ttl + NAME_GRACE_SECONDS))
}

/// A name's word in [`Learnt`].
#[inline(always)]
#[must_use]
pub const fn word(name: NameId, until: Ticks) -> u64 {
    (name as u64) << 32 | until as u64
}

/// Where a name goes among those of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// It is there already.
    There(usize),
    /// Nobody's, or of a name that is past its time.
    Free(usize),
    /// Another's, that of all is to be forgotten first.
    Others(usize),
}

/// Chooses.
#[inline(always)]
#[must_use]
pub fn place_of(learnt: &Learnt, name: NameId, now: Ticks) -> Place {
    let mut free = None;
    let (mut oldest, mut least) = (0, u32::MAX);
    let mut i = 0;
    while i < learnt.names.len() {
        let word = learnt.names[i];
        let (held, until) = ((word >> 32) as NameId, word as Ticks);
        if held == name {
            return Place::There(i);
        }
        let left = until.wrapping_sub(now);
        if held == 0 || older_than(now, until, 0) {
            if free.is_none() {
                free = Some(i);
            }
        } else if left < least {
            (oldest, least) = (i, left);
        }
        i += 1;
    }
    match free {
        Some(i) => Place::Free(i),
        None => Place::Others(oldest),
    }
}

//! SCTP's checksum, corrected for a changed word without reading the packet.
//!
//! RFC 9260, appendix A: `CRC32c` (Castagnoli, reflected) over the whole SCTP packet with the checksum field taken
//! as zero; the register starts as ones and is inverted at the end. Two packets of one length have checksums that
//! differ by the bare CRC of their difference (init and inversion cancel out), and a difference of four bytes
//! followed by zeros is a polynomial times a power of x. So a new port costs two multiplications modulo the CRC's
//! polynomial, however long the packet is.
//!
//! The field in the packet is transmitted least significant byte first (same appendix):
//! `u32::from_le_bytes(field)` is what this module calls a checksum, `checksum.to_le_bytes()` the new field.

/// The polynomial 0x1edc6f41, reflected: bit 31 is the coefficient of x^0, bit 0 that of x^31; x^32 is implied.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// x^0 and x^8 in that form. Every byte that follows multiplies by the latter.
const ONE: u32 = 1 << 31;
const BYTE: u32 = ONE >> 8;

/// What 0 to 255 bytes that follow multiply by, and the four changed ones on their own way through the register.
static BYTES: [u32; 256] = powers(product(product(BYTE, BYTE), product(BYTE, BYTE)), BYTE);
/// What 0 to 255 times 256 bytes multiply by.
static PAGES: [u32; 256] = powers(ONE, product(powers(ONE, BYTE)[255], BYTE));

/// `first`, `first` times `step`, and so on.
const fn powers(first: u32, step: u32) -> [u32; 256] {
    let mut powers = [first; 256];
    let mut k = 1;
    while k < powers.len() {
        powers[k] = product(powers[k - 1], step);
        k += 1;
    }
    powers
}

/// The product of two polynomials modulo the CRC's. Always 32 steps without a branch in them: the verifier walks
/// them once.
#[inline(never)]
const fn product(mut a: u32, mut b: u32) -> u32 {
    let mut sum = 0;
    let mut step = 0;
    while step < 32 {
        // All ones if a has the coefficient that bit 31 stands for.
        sum ^= b & (a >> 31).wrapping_neg();
        a <<= 1;
        // b times x; x^31 becomes x^32, which is the polynomial.
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
        step += 1;
    }
    sum
}

/// The checksum of an SCTP packet in which four bytes have changed from `from` to `to` (as they lie in the
/// packet; not the checksum field itself) and `after` bytes of the SCTP packet follow them, at most 65,535. For
/// the ports, which are the first four, `after` is the packet's length less 4.
///
/// A wrong checksum stays wrong by the same difference.
#[inline(always)]
#[must_use]
pub const fn updated(checksum: u32, from: [u8; 4], to: [u8; 4], after: u32) -> u32 {
    // The first bit of a message is the lowest of its first byte, and the highest power.
    let difference = u32::from_le_bytes(from) ^ u32::from_le_bytes(to);
    let near = product(BYTES[(after & 0xff) as usize], difference);
    checksum ^ product(PAGES[(after >> 8 & 0xff) as usize], near)
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};
    use std::vec::Vec;
    use std::{println, vec};

    use super::*;

    /// `CRC32c` bit by bit, as RFC 9260 describes it.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut register = u32::MAX;
        for byte in bytes {
            register ^= u32::from(*byte);
            for _ in 0..8 {
                register = if register & 1 == 1 { register >> 1 ^ 0x82f6_3b78 } else { register >> 1 };
            }
        }
        !register
    }

    /// RFC 3720, B.4, where the bytes stand as they are transmitted: least significant first.
    #[test]
    fn the_reference_gives_the_vectors_of_rfc_3720() {
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let mut read_pdu = [0; 48];
        for (at, value) in
            [(0, 0x01), (1, 0xc0), (16, 0x14), (22, 0x04), (27, 0x14), (31, 0x18), (32, 0x28), (40, 0x02)]
        {
            read_pdu[at] = value;
        }
        for (bytes, transmitted) in [
            (&[0; 32][..], [0xaa, 0x36, 0x91, 0x8a]),
            (&[0xff; 32], [0x43, 0xab, 0xa8, 0x62]),
            (&ascending, [0x4e, 0x79, 0xdd, 0x46]),
            (&descending, [0x5c, 0xdb, 0x3f, 0x11]),
            (&read_pdu, [0x56, 0x3a, 0x96, 0xd9]),
        ] {
            assert_eq!(crc32c(bytes).to_le_bytes(), transmitted, "{bytes:x?}");
        }
    }

    /// splitmix64.
    fn next(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = *state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn seed() -> u64 {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
        let seed = match std::env::var("OUTGATE_CRC_SEED") {
            Ok(text) => text.parse().expect("OUTGATE_CRC_SEED is a number"),
            Err(_) => u64::from(clock.subsec_nanos()),
        };
        println!("OUTGATE_CRC_SEED={seed}");
        seed
    }

    /// Changes four bytes anywhere in random packets and sums them up anew.
    #[test]
    fn it_agrees_with_a_new_sum_over_the_packet() {
        let mut state = seed();
        let every_power = (0..16).map(|k| (1 << k) + 4);
        let random: Vec<usize> = (0..4000).map(|_| 4 + next(&mut state) as usize % 1600).collect();
        for len in every_power.chain(random).chain([4, 5, 65_535, 65_539]) {
            let mut packet: Vec<u8> = (0..len).map(|_| next(&mut state) as u8).collect();
            let at = if next(&mut state) < 1 << 63 { 0 } else { next(&mut state) as usize % (len - 3) };
            let before = crc32c(&packet);
            let from = [packet[at], packet[at + 1], packet[at + 2], packet[at + 3]];
            let to = (next(&mut state) as u32).to_be_bytes();
            packet[at..at + 4].copy_from_slice(&to);
            let after = (len - at - 4) as u32;
            assert_eq!(updated(before, from, to, after), crc32c(&packet), "{len} bytes, changed at {at}");
            assert_eq!(updated(before, from, from, after), before);
        }
    }

    /// A port of a packet as SCTP sends it: the field is among the bytes that the sum takes as zero.
    #[test]
    fn a_port_of_an_sctp_packet() {
        let header = |port: u16| [&port.to_be_bytes()[..], &[0x13, 0x88, 1, 2, 3, 4, 0, 0, 0, 0]].concat();
        let chunk = [0, 3, 0, 20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, b'd', b'a', b't', b'a'];
        let sum = |port| crc32c(&[&header(port)[..], &chunk].concat());
        let (from, to) = ([0x9c, 0x40, 0x13, 0x88], [0x04, 0x02, 0x13, 0x88]);
        let after = (12 + chunk.len() - 4) as u32;
        assert_eq!(updated(sum(0x9c40), from, to, after), sum(0x0402));
        // Wrong stays wrong by as much.
        let wrong = vec![1_u32, 0x8000_0000, 0xdead_beef];
        for error in wrong {
            assert_eq!(updated(sum(0x9c40) ^ error, from, to, after), sum(0x0402) ^ error);
        }
    }
}

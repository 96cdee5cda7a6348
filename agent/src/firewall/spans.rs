//! Networks that contain one another, each with the rule that wins there, as the stretches of addresses that one rule
//! wins in: what the programs' search trees are made of.

use datapath::keys::Winner;
use datapath::rules_build::{Address, Span, up_to};

/// Addresses that can be counted.
pub(super) trait Number: Address {
    /// The address before; there must be one.
    fn before(self) -> Self;
}

impl Number for u32 {
    fn before(self) -> Self {
        self - 1
    }
}

impl Number for u128 {
    fn before(self) -> Self {
        self - 1
    }
}

/// Makes the spans of one class from its networks.
pub(super) struct Spans<'a, A> {
    class: u16,
    out: &'a mut Vec<Span<A>>,
    /// Spans before this belong to other classes.
    begin: usize,
    /// Networks around the address at hand: their last addresses and winners.
    around: Vec<(A, u32)>,
}

impl<'a, A: Number> Spans<'a, A> {
    /// Adds to `out`.
    pub(super) const fn new(class: u16, out: &'a mut Vec<Span<A>>) -> Self {
        Self { class, begin: out.len(), out, around: Vec::new() }
    }

    /// Takes the next network: by their first addresses, and each before those that it contains.
    pub(super) fn network(&mut self, first: A, last: A, winner: u32) {
        while let Some((end, inner)) = self.around.pop_if(|(end, _)| *end < first) {
            self.up_to(end, inner);
        }
        if first > A::LOWEST {
            let outer = self.around.last().map_or(Winner::NONE, |(_, winner)| *winner);
            self.up_to(first.before(), outer);
        }
        self.around.push((last, winner));
    }

    /// After the last: the rest of all addresses. Without a network there are no spans.
    pub(super) fn end(mut self) {
        let none = self.around.is_empty() && self.out.len() == self.begin;
        while let Some((end, winner)) = self.around.pop() {
            self.up_to(end, winner);
        }
        if !none {
            self.up_to(A::HIGHEST, Winner::NONE);
        }
    }

    /// All that is not decided yet, up to an address.
    fn up_to(&mut self, last: A, winner: u32) {
        up_to(self.out, self.class, last, winner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(networks: &[(u32, u32, u32)]) -> Vec<(u32, u32)> {
        let before = Span { class: 1, last: u32::MAX, winner: 9 };
        let mut out = vec![before];
        let mut spans = Spans::new(2, &mut out);
        for (first, last, winner) in networks {
            spans.network(*first, *last, *winner);
        }
        spans.end();
        assert_eq!(out.remove(0), before, "another class' is left alone");
        assert!(out.iter().all(|span| span.class == 2));
        out.into_iter().map(|span| (span.last, span.winner)).collect()
    }

    #[test]
    fn inner_networks_are_cut_out_of_outer_ones() {
        const END: (u32, u32) = (u32::MAX, Winner::NONE);
        assert_eq!(spans(&[]), []);
        assert_eq!(spans(&[(0, u32::MAX, 4)]), [(u32::MAX, 4)]);
        assert_eq!(spans(&[(8, 15, 4)]), [(7, Winner::NONE), (15, 4), END]);
        assert_eq!(spans(&[(0, 7, 4), (8, 15, 4), (16, 16, 3)]), [(15, 4), (16, 3), END], "side by side");
        let nested = [(0, 15, 7), (0, 3, 6), (0, 0, 5), (3, 3, 4), (8, 15, 3), (12, 15, 2)];
        assert_eq!(spans(&nested), [(0, 5), (2, 6), (3, 4), (7, 7), (11, 3), (15, 2), END]);
        assert_eq!(
            spans(&[(0, u32::MAX, 7), (u32::MAX, u32::MAX, 2)]),
            [(u32::MAX - 1, 7), (u32::MAX, 2)],
            "up to the highest address"
        );
        assert_eq!(spans(&[(1, 1, 2), (3, 3, 2)]).len(), 5, "what lies between is no rule's");
    }
}

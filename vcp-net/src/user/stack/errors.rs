//! How often guests are told that something did not arrive (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f): a row of datagrams is one
//! frame, but can be thousands of them, and each that nobody takes would be answered. What is not told is counted.

use super::super::tcp::Ms;
use crate::switch::work::PortId;

/// Errors that a port is told at once; a traceroute has three packets for each of a few hops on the way.
const BURST: u32 = 32;
/// From then on one in so many milliseconds.
const EACH_MS: Ms = 5;

/// One bucket of tokens for each port, so that none is deaf because of another one's errors.
#[derive(Debug)]
pub(super) struct ErrorRate(Vec<Bucket>);

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: u32,
    at: Ms,
}

impl ErrorRate {
    pub(super) fn new() -> Self {
        Self(vec![Bucket { tokens: BURST, at: 0 }; usize::from(u8::MAX) + 1])
    }

    /// Whether `port` may be told another one now, which is then taken.
    pub(super) fn take(&mut self, port: PortId, now: Ms) -> bool {
        let bucket = &mut self.0[port.index()];
        let more = now.saturating_sub(bucket.at) / EACH_MS;
        bucket.at += more * EACH_MS;
        bucket.tokens = bucket.tokens.saturating_add(more.min(Ms::from(BURST)) as u32).min(BURST);
        if bucket.tokens == 0 {
            return false;
        }
        bucket.tokens -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_so_many_in_a_second_for_each_port() {
        let mut rate = ErrorRate::new();
        let mut many = |port, now| (0..1000).filter(|_| rate.take(PortId(port), now)).count();
        assert_eq!((many(1, 7), many(1, 7), many(2, 7)), (32, 0, 32));
        assert_eq!((many(1, 8), many(1, 10), many(1, 110)), (0, 1, 20));
        assert_eq!(many(1, 1_000_000), 32);
    }
}

//! TCP segments (RFC 9293, 3.1) with the options that matter here: MSS, window scale and timestamps (RFC 7323), SACK
//! (RFC 2018). Numbers, not bytes of payload.

/// Flags.
pub const FIN: u8 = 0x01;
/// See [`FIN`].
pub const SYN: u8 = 0x02;
/// See [`FIN`].
pub const RST: u8 = 0x04;
/// See [`FIN`].
pub const PSH: u8 = 0x08;
/// See [`FIN`].
pub const ACK: u8 = 0x10;

/// Longest header.
pub const HEADER_MAX: usize = 60;
/// Most blocks of a SACK option beside a timestamp.
pub const SACK_MAX: usize = 3;

/// Whether sequence number `a` comes before `b`.
#[inline]
#[must_use]
pub fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// A segment's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Port of the sender.
    pub from: u16,
    /// Port of the receiver.
    pub to: u16,
    /// Sequence number of its first byte.
    pub seq: u32,
    /// What the sender expects next, if [`ACK`] is set.
    pub ack: u32,
    /// Flags.
    pub flags: u8,
    /// The window field, not scaled.
    pub window: u16,
    /// Maximum segment size; 0: not said.
    pub mss: u16,
    /// Window scale.
    pub scale: Option<u8>,
    /// SACK is permitted.
    pub sack_ok: bool,
    /// Timestamp and echo.
    pub time: Option<(u32, u32)>,
    /// SACK blocks; unused ones are empty (0, 0).
    pub sack: [(u32, u32); SACK_MAX],
    /// Bytes of the header with its options.
    pub header_bytes: u8,
}

impl Segment {
    /// From the bytes of a packet behind its IP header; `None` if it is broken.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let fixed: &[u8; 20] = bytes.first_chunk()?;
        let word = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
        let long = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let header = usize::from(fixed[12] >> 4) * 4;
        let mut this = Self {
            from: word(0),
            to: word(2),
            seq: long(4),
            ack: long(8),
            flags: fixed[13] & 0x1f,
            window: word(14),
            header_bytes: header as u8,
            ..Self::default()
        };
        this.options(bytes.get(20..header)?)?;
        Some(this)
    }

    /// Reads options; `None` if their lengths do not add up. Unknown ones are skipped.
    fn options(&mut self, mut bytes: &[u8]) -> Option<()> {
        while let [kind, rest @ ..] = bytes {
            match kind {
                0 => break,
                1 => {
                    bytes = rest;
                    continue;
                }
                _ => {}
            }
            let len = usize::from(*rest.first()?);
            if len < 2 || len > bytes.len() {
                return None;
            }
            let (option, next) = bytes.split_at(len);
            let long =
                |at: usize| u32::from_be_bytes([option[at], option[at + 1], option[at + 2], option[at + 3]]);
            match (kind, len) {
                (2, 4) => self.mss = u16::from_be_bytes([option[2], option[3]]),
                // Larger ones count as 14 (RFC 7323, 2.3).
                (3, 3) => self.scale = Some(option[2].min(14)),
                (4, 2) => self.sack_ok = true,
                (5, _) => {
                    for (at, block) in self.sack.iter_mut().enumerate().take((len - 2) / 8) {
                        *block = (long(2 + 8 * at), long(6 + 8 * at));
                    }
                }
                (8, 10) => self.time = Some((long(2), long(6))),
                _ => {}
            }
            bytes = next;
        }
        Some(())
    }

    /// Writes the header with its options into `to`, the checksum field zero; returns its length.
    pub fn emit(&self, to: &mut [u8; HEADER_MAX]) -> usize {
        *to = [0; HEADER_MAX];
        let mut len = 20;
        let mut add = |bytes: &[u8]| {
            to[len..len + bytes.len()].copy_from_slice(bytes);
            len += bytes.len();
        };
        if self.mss != 0 {
            let [a, b] = self.mss.to_be_bytes();
            add(&[2, 4, a, b]);
        }
        if self.sack_ok {
            add(&[1, 1, 4, 2]);
        }
        if let Some((value, echo)) = self.time {
            add(&[1, 1, 8, 10]);
            add(&value.to_be_bytes());
            add(&echo.to_be_bytes());
        }
        if let Some(scale) = self.scale {
            add(&[1, 3, 3, scale]);
        }
        let blocks = self.sack.iter().filter(|(left, right)| left != right).count();
        if blocks != 0 {
            add(&[1, 1, 5, 2 + 8 * blocks as u8]);
            for (left, right) in self.sack.iter().filter(|(left, right)| left != right) {
                add(&left.to_be_bytes());
                add(&right.to_be_bytes());
            }
        }
        to[0..2].copy_from_slice(&self.from.to_be_bytes());
        to[2..4].copy_from_slice(&self.to.to_be_bytes());
        to[4..8].copy_from_slice(&self.seq.to_be_bytes());
        to[8..12].copy_from_slice(&self.ack.to_be_bytes());
        to[12] = (len as u8 / 4) << 4;
        to[13] = self.flags;
        to[14..16].copy_from_slice(&self.window.to_be_bytes());
        len
    }

    /// Whether all of these flags are set.
    #[inline]
    #[must_use]
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The answer to a segment that belongs to no connection (RFC 9293, 3.10.7.1); `None` if there is none.
    #[must_use]
    pub fn refusal(&self, payload_bytes: u32) -> Option<Self> {
        if self.has(RST) {
            return None;
        }
        let len = payload_bytes + u32::from(self.has(SYN)) + u32::from(self.has(FIN));
        let (seq, ack, flags) =
            if self.has(ACK) { (self.ack, 0, RST) } else { (0, self.seq.wrapping_add(len), RST | ACK) };
        Some(Self { from: self.to, to: self.from, seq, ack, flags, ..Self::default() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_emitted_is_parsed_again(
            ports: (u16, u16), numbers: (u32, u32), flags in 0u8..0x20, window: u16, mss: u16,
            scale in proptest::option::of(0u8..15), sack_ok: bool, time: Option<(u32, u32)>, blocks in 0usize..3,
        ) {
            // A SYN has no blocks, others nothing else but a timestamp: together they would not fit.
            let syn = flags & SYN != 0;
            let mut segment = Segment {
                from: ports.0, to: ports.1, seq: numbers.0, ack: numbers.1, flags, window,
                mss: if syn { mss } else { 0 }, scale: scale.filter(|_| syn), sack_ok: sack_ok && syn, time,
                ..Segment::default()
            };
            for at in 0..blocks * usize::from(!syn) {
                segment.sack[at] = (numbers.0.wrapping_add(at as u32), numbers.1 | 1);
                prop_assume!(segment.sack[at].0 != segment.sack[at].1);
            }
            let mut bytes = [0; HEADER_MAX];
            let len = segment.emit(&mut bytes);
            segment.header_bytes = len as u8;
            prop_assert_eq!(Segment::parse(&bytes[..len]), Some(segment));
            prop_assert_eq!(Segment::parse(&bytes[..len - 1]), None);
        }

        #[test]
        fn arbitrary_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(segment) = Segment::parse(&bytes) {
                prop_assert!((20..=60).contains(&segment.header_bytes) && segment.scale.is_none_or(|it| it <= 14));
            }
        }
    }

    #[test]
    fn a_segment_of_no_connection_is_refused_by_its_numbers() {
        let syn = Segment { from: 1, to: 2, seq: 9, flags: SYN, ..Segment::default() };
        let answer = syn.refusal(0).unwrap();
        assert_eq!((answer.from, answer.seq, answer.ack, answer.flags), (2, 0, 10, RST | ACK));
        let ack = Segment { ack: 77, flags: ACK, ..syn };
        assert_eq!(ack.refusal(5).map(|it| (it.seq, it.flags)), Some((77, RST)));
        assert_eq!(answer.refusal(0), None);
    }
}

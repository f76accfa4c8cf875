//! Where everything lies in a control memory, and how a descriptor is written into its 32 bytes. `docs/msgq.md` is the
//! normative text; this is the same in code. No access happens here.
//!
//! Every shared word is 64 bits wide and only ever accessed at that width: mixing widths on one location is undefined
//! for atomics, and a fixed width makes "loaded once" mean what it says.

/// Version of this layout and of the handshake.
pub const VERSION: u16 = 1;
/// First word of a control memory: `msgq` and the version of the layout.
pub const MAGIC: u64 = u64::from_le_bytes(*b"msgqctl\x01");
/// Bytes of a slot.
pub const SLOT_BYTES: usize = 32;
/// Words of a slot.
pub const SLOT_WORDS: usize = SLOT_BYTES / 8;
/// Bytes that lines are kept apart: two cache lines, because processors fetch lines in pairs.
pub const LINE_BYTES: usize = 128;
/// Slots begin here; everything before fits one page.
pub const SLOTS_OFFSET: usize = 0x1000;
/// Fewest slots of a ring, as a power of two.
pub const LOG2_SLOTS_MIN: u8 = 2;
/// Most slots of a ring, as a power of two: the tag of a slot has to come round far later than the slot.
pub const LOG2_SLOTS_MAX: u8 = 15;
/// Most lanes (rings of different priority) in one direction.
pub const LANES_MAX: u8 = 4;
/// Value of an event word that asks for no kick: no index ever gets there.
pub const PARKED: u64 = u64::MAX;

/// Words of the header, in order.
pub mod header {
    /// [`MAGIC`](super::MAGIC).
    pub const MAGIC: usize = 0;
    /// Layout version.
    pub const VERSION: usize = 1;
    /// Slots of each ring, as a power of two.
    pub const LOG2_SLOTS: usize = 2;
    /// Number of lanes.
    pub const LANES: usize = 3;
    /// Negotiated feature bits.
    pub const FEATURES: usize = 4;
    /// Epoch of the channel.
    pub const EPOCH: usize = 5;
    /// Channel number, low half.
    pub const CHANNEL_LOW: usize = 6;
    /// Channel number, high half.
    pub const CHANNEL_HIGH: usize = 7;
}

/// Word indices of one lane in a control memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// Line H: how many messages of the *peer's* ring of this lane the owner has consumed and released.
    pub head: usize,
    /// Line E, first word: "kick me when you publish the message with this number".
    pub rx_event: usize,
    /// Line E, second word: "kick me when your head gets to this number".
    pub tx_event: usize,
    /// First word of the first slot.
    pub slots: usize,
}

/// Word index of the owner's line S (state and statistics for an observer; the peer never looks).
pub const STATE: usize = 9 * LINE_BYTES / 8;

/// Words of line S, from [`STATE`].
pub mod observed {
    /// 0 nothing yet, 1 running, 2 draining, 3 the peer is gone, 4 the peer broke a rule.
    pub const PHASE: usize = 0;
    /// How often the line was written.
    pub const BEAT: usize = 1;
    /// Own requests without completion.
    pub const IN_FLIGHT: usize = 2;
    /// The peer's requests without completion.
    pub const HELD: usize = 3;
    /// Sixteen counters.
    pub const COUNTERS: usize = 4;
    /// Violations by rule, from rule 1.
    pub const VIOLATIONS: usize = 20;
    /// From sending a request to its completion, where that is measured: the sum in nanoseconds, then by powers of two
    /// ([`Durations`](crate::Durations)).
    pub const LATENCY: usize = VIOLATIONS + 11;
    /// From receiving a request of the peer to completing it, likewise.
    pub const SERVICE: usize = LATENCY + 41;
    /// Words of it.
    pub const WORDS: usize = SERVICE + 41;
}

/// Where lane `lane` of a control memory with rings of `2^log2_slots` slots lies.
#[must_use]
pub const fn lane(lane: u8, log2_slots: u8) -> Lane {
    let first = LINE_BYTES / 8 * (1 + 2 * lane as usize);
    let event = first + LINE_BYTES / 8;
    let slots = SLOTS_OFFSET / 8 + ((lane as usize) << log2_slots) * SLOT_WORDS;
    Lane { head: first, rx_event: event, tx_event: event + 1, slots }
}

/// Bytes of a control memory, a whole number of pages.
#[must_use]
pub const fn control_bytes(lanes: u8, log2_slots: u8) -> usize {
    (SLOTS_OFFSET + ((lanes as usize) << log2_slots) * SLOT_BYTES).next_multiple_of(0x1000)
}

/// Bits of [`Desc::flags`].
pub mod flags {
    /// The two bits that say what the message is.
    pub const KIND: u16 = 0b11;
    /// No answer is expected.
    pub const ONE_WAY: u16 = 0;
    /// A completion is expected.
    pub const REQUEST: u16 = 1;
    /// Answers a request.
    pub const COMPLETION: u16 = 2;
    /// For the queue itself ([`super::CONTROL_RESIZE`]).
    pub const CONTROL: u16 = 3;
    /// The next slot belongs to the same message.
    pub const MORE: u16 = 1 << 2;
    /// The bytes of the message are in the slot, not in a region.
    pub const INLINE: u16 = 1 << 3;
    /// Sent before, in an epoch that ended without an answer.
    pub const REPLAY: u16 = 1 << 4;
    /// All that there are.
    pub const ALL: u16 = KIND | MORE | INLINE | REPLAY;
}

/// Opcode of a control message: from the next message on the ring uses `2^value` slots.
pub const CONTROL_RESIZE: u16 = 1;

/// A slot's content, without its tag: 28 bytes.
///
/// ```text
/// word 0  cookie: 64 bits
/// word 1  value:  64 bits          offset in the region, or 8 inline bytes
/// word 2  region: 16 | opcode: 16 | flags: 16 | generation: 16      (least significant first)
/// word 3  len: 32 | tag: 32                                          the tag publishes the slot
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Chosen by the sender of a request, echoed in its completion. Inline bytes elsewhere.
    pub cookie: u64,
    /// Offset in bytes into the region; 8 inline bytes; the value of a completion.
    pub value: u64,
    /// Region of the sender that the data lies in.
    pub region: u16,
    /// What is asked for; the status in a completion. The queue does not care.
    pub opcode: u16,
    /// See [`flags`].
    pub flags: u16,
    /// Generation of the region.
    pub generation: u16,
    /// Bytes of data.
    pub len: u32,
}

impl Desc {
    /// The four words, with the tag.
    #[inline]
    #[must_use]
    pub const fn to_words(self, tag: u32) -> [u64; SLOT_WORDS] {
        let middle = self.region as u64
            | (self.opcode as u64) << 16
            | (self.flags as u64) << 32
            | (self.generation as u64) << 48;
        [self.cookie, self.value, middle, self.len as u64 | (tag as u64) << 32]
    }

    /// From the four words; the tag is dropped.
    #[inline]
    #[must_use]
    pub const fn from_words(words: [u64; SLOT_WORDS]) -> Self {
        let [cookie, value, middle, last] = words;
        Self {
            cookie,
            value,
            region: middle as u16,
            opcode: (middle >> 16) as u16,
            flags: (middle >> 32) as u16,
            generation: (middle >> 48) as u16,
            len: last as u32,
        }
    }

    /// The kind bits of the flags.
    #[inline]
    #[must_use]
    pub const fn kind(&self) -> u16 {
        self.flags & flags::KIND
    }

    /// Whether a flag is set.
    #[inline]
    #[must_use]
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The tag of the message with this number: its number plus one, so that zeroed memory is an empty ring.
#[inline]
#[must_use]
pub const fn tag(index: u64) -> u32 {
    (index as u32).wrapping_add(1)
}

/// The tag in a slot's last word.
#[inline]
#[must_use]
pub const fn tag_of(last: u64) -> u32 {
    (last >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_apart_and_in_the_first_page() {
        let mut words = vec![0, STATE];
        for number in 0..LANES_MAX {
            let lane = lane(number, 10);
            assert_eq!(lane.rx_event + 1, lane.tx_event);
            words.extend([lane.head, lane.rx_event]);
        }
        words.sort_unstable();
        assert!(words.windows(2).all(|pair| pair[1] - pair[0] >= LINE_BYTES / 8), "{words:?}");
        assert_eq!(words.last(), Some(&STATE));
        const { assert!((STATE + observed::WORDS) * 8 <= SLOTS_OFFSET) };
        assert_eq!(lane(0, 10).slots * 8, SLOTS_OFFSET);
        assert_eq!(lane(1, 10).slots * 8, SLOTS_OFFSET + 1024 * SLOT_BYTES);
        assert_eq!(control_bytes(2, 10), 0x1000 + 2 * 1024 * 32);
        assert_eq!(control_bytes(1, 2), 0x2000);
    }

    #[test]
    fn a_descriptor_survives_its_words() {
        let desc = Desc {
            cookie: 1 << 63 | 5,
            value: u64::MAX - 3,
            region: 7,
            opcode: 0xabcd,
            flags: 0x1f,
            generation: 0xfffe,
            len: u32::MAX,
        };
        let words = desc.to_words(0x1234_5678);
        assert_eq!(Desc::from_words(words), desc);
        assert_eq!(tag_of(words[3]), 0x1234_5678);
        assert_eq!(words[2], 0xfffe_001f_abcd_0007);
    }
}

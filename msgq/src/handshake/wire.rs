//! Messages on the control socket: 64 bytes each, little endian, with at most one descriptor.
//!
//! ```text
//!  0 magic "msgq"   4 type u16   6 zero u16   8.. body (what is not named is zero and not looked at)
//! ```

/// Bytes of a message.
pub const BYTES: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"msgq");

/// Message types.
pub mod kind {
    /// First message of the connecting side.
    pub const HELLO: u16 = 1;
    /// First message of the accepting side.
    pub const WELCOME: u16 = 2;
    /// Control memory; carries its file.
    pub const CONTROL: u16 = 3;
    /// A region; carries its file.
    pub const REGION: u16 = 4;
    /// A region was mapped.
    pub const REGION_ACK: u16 = 5;
    /// A region shall not be referred to any more.
    pub const REGION_GONE: u16 = 6;
    /// A bell; carries the sleeper's end.
    pub const BELL: u16 = 7;
    /// Everything was sent; with everything received, messages may flow.
    pub const START: u16 = 8;
    /// No new requests come; what is in flight ends.
    pub const DRAIN: u16 = 9;
    /// The end, in order.
    pub const BYE: u16 = 10;
}

/// What a side says of itself in HELLO and WELCOME.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version understood; in WELCOME the one chosen.
    pub version_min: u16,
    /// Newest version understood; in WELCOME the one chosen.
    pub version_max: u16,
    /// Slots of each of its rings, as a power of two.
    pub log2_slots: u8,
    /// Lanes it wants; in WELCOME the number chosen.
    pub lanes: u8,
    /// Most slots of one message.
    pub chain_max: u16,
    /// Most requests of its own without completion.
    pub window: u32,
    /// Longest segment in bytes.
    pub segment_max: u32,
    /// Feature bits; in WELCOME those chosen.
    pub features: u64,
    /// First epoch it can use; in WELCOME the one chosen.
    pub epoch: u64,
    /// Channel that it was part of before, or 0; in WELCOME the one chosen.
    pub channel: u128,
    /// It still has the state of that channel, and repeats what was not completed.
    pub resumes: bool,
}

/// A message without its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // As in `kind`.
pub enum Message {
    Hello(Hello),
    Welcome(Hello),
    Control { bytes: u64 },
    Region { number: u16, generation: u16, both_write: bool, bytes: u64 },
    RegionAck { number: u16 },
    RegionGone { number: u16 },
    Bell { event: bool },
    Start,
    Drain,
    Bye { reason: u16 },
}

/// A message that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Another length than 64 bytes.
    #[error("message of {0} bytes")]
    Length(usize),
    /// Does not begin with "msgq".
    #[error("not a msgq message")]
    Magic,
    /// A type that does not exist.
    #[error("unknown message type {0}")]
    Kind(u16),
    /// A value that the field cannot have.
    #[error("field out of range in message type {0}")]
    Field(u16),
}

impl Message {
    /// Its type.
    #[must_use]
    pub fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => kind::HELLO,
            Self::Welcome(_) => kind::WELCOME,
            Self::Control { .. } => kind::CONTROL,
            Self::Region { .. } => kind::REGION,
            Self::RegionAck { .. } => kind::REGION_ACK,
            Self::RegionGone { .. } => kind::REGION_GONE,
            Self::Bell { .. } => kind::BELL,
            Self::Start => kind::START,
            Self::Drain => kind::DRAIN,
            Self::Bye { .. } => kind::BYE,
        }
    }

    /// How many descriptors come with it.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        usize::from(matches!(self, Self::Control { .. } | Self::Region { .. } | Self::Bell { .. }))
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; BYTES] {
        let mut out = [0; BYTES];
        out[..4].copy_from_slice(&MAGIC.to_le_bytes());
        put(&mut out, 4, self.kind().to_le_bytes());
        match *self {
            Self::Hello(hello) | Self::Welcome(hello) => {
                put(&mut out, 8, hello.version_min.to_le_bytes());
                put(&mut out, 10, hello.version_max.to_le_bytes());
                out[12] = hello.log2_slots;
                out[13] = hello.lanes;
                put(&mut out, 14, hello.chain_max.to_le_bytes());
                put(&mut out, 16, hello.window.to_le_bytes());
                put(&mut out, 20, hello.segment_max.to_le_bytes());
                put(&mut out, 24, hello.features.to_le_bytes());
                put(&mut out, 32, hello.epoch.to_le_bytes());
                put(&mut out, 40, hello.channel.to_le_bytes());
                out[56] = hello.resumes.into();
            }
            Self::Control { bytes } => put(&mut out, 8, bytes.to_le_bytes()),
            Self::Region { number, generation, both_write, bytes } => {
                put(&mut out, 8, number.to_le_bytes());
                put(&mut out, 10, generation.to_le_bytes());
                out[12] = both_write.into();
                put(&mut out, 16, bytes.to_le_bytes());
            }
            Self::RegionAck { number } | Self::RegionGone { number } => {
                put(&mut out, 8, number.to_le_bytes());
            }
            Self::Bell { event } => out[8] = event.into(),
            Self::Start | Self::Drain => {}
            Self::Bye { reason } => put(&mut out, 8, reason.to_le_bytes()),
        }
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let bytes: &[u8; BYTES] = bytes.try_into().map_err(|_| WireError::Length(bytes.len()))?;
        if get::<4>(bytes, 0) != MAGIC.to_le_bytes() || get::<2>(bytes, 6) != [0; 2] {
            return Err(WireError::Magic);
        }
        let kind = u16::from_le_bytes(get(bytes, 4));
        let flag = |at: usize| match bytes[at] {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Field(kind)),
        };
        let u16_at = |at| u16::from_le_bytes(get(bytes, at));
        let u64_at = |at| u64::from_le_bytes(get(bytes, at));
        Ok(match kind {
            kind::HELLO | kind::WELCOME => {
                let hello = Hello {
                    version_min: u16_at(8),
                    version_max: u16_at(10),
                    log2_slots: bytes[12],
                    lanes: bytes[13],
                    chain_max: u16_at(14),
                    window: u32::from_le_bytes(get(bytes, 16)),
                    segment_max: u32::from_le_bytes(get(bytes, 20)),
                    features: u64_at(24),
                    epoch: u64_at(32),
                    channel: u128::from_le_bytes(get(bytes, 40)),
                    resumes: flag(56)?,
                };
                if kind == kind::HELLO { Self::Hello(hello) } else { Self::Welcome(hello) }
            }
            kind::CONTROL => Self::Control { bytes: u64_at(8) },
            kind::REGION => Self::Region {
                number: u16_at(8),
                generation: u16_at(10),
                both_write: flag(12)?,
                bytes: u64_at(16),
            },
            kind::REGION_ACK => Self::RegionAck { number: u16_at(8) },
            kind::REGION_GONE => Self::RegionGone { number: u16_at(8) },
            kind::BELL => Self::Bell { event: flag(8)? },
            kind::START => Self::Start,
            kind::DRAIN => Self::Drain,
            kind::BYE => Self::Bye { reason: u16_at(8) },
            other => return Err(WireError::Kind(other)),
        })
    }
}

fn put<const N: usize>(out: &mut [u8; BYTES], at: usize, bytes: [u8; N]) {
    out[at..at + N].copy_from_slice(&bytes);
}

fn get<const N: usize>(bytes: &[u8; BYTES], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("offsets are inside")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_message_survives_its_bytes() {
        let hello = Hello {
            version_min: 1,
            version_max: 2,
            log2_slots: 10,
            lanes: 3,
            chain_max: 9,
            window: 77,
            segment_max: 1 << 20,
            features: 1 << 63,
            epoch: 1 << 40,
            channel: u128::MAX - 4,
            resumes: true,
        };
        for message in [
            Message::Hello(hello),
            Message::Welcome(Hello { resumes: false, ..hello }),
            Message::Control { bytes: 1 << 33 },
            Message::Region { number: 5, generation: 6, both_write: true, bytes: 4096 },
            Message::RegionAck { number: 9 },
            Message::RegionGone { number: 10 },
            Message::Bell { event: true },
            Message::Start,
            Message::Drain,
            Message::Bye { reason: 3 },
        ] {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    proptest! {
        #[test]
        fn bytes_that_are_read_are_written_alike(mut bytes in proptest::collection::vec(any::<u8>(), 0..70), kind in 0u8..12) {
            if bytes.len() >= 8 {
                bytes[..4].copy_from_slice(b"msgq");
                bytes[4..8].copy_from_slice(&[kind, 0, 0, 0]);
            }
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
            }
        }
    }
}

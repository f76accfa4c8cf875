//! PDUs on a byte stream: header, additional header segments, header digest, data segment, padding, data digest
//! (RFC 7143 11.2, 13.1).
//!
//! [`Receiver`] is a state machine without I/O: it says what comes next, and the caller brings it. Header and trailer
//! bytes go through [`Receiver::feed`]; the data segment does not, so that it can be received straight to where
//! it belongs, in pieces of any size. [`write_header`] and [`Trailer`] are the counterpart: header and trailer bytes for a
//! data segment that the caller sends from wherever it lies.
//!
//! ```
//! use iscsi::pdu::framing::{Digests, Limits, Receiver, Step};
//!
//! # fn pdu(bhs: &iscsi::pdu::Bhs, data: &[u8]) {}
//! fn receive(rx: &mut Receiver, mut stream: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
//!     let mut data = Vec::new();
//!     loop {
//!         match rx.step() {
//!             Step::Framing { .. } if stream.is_empty() => return Ok(()), // comes again with more
//!             Step::Framing { .. } => {
//!                 let taken = rx.feed(stream)?;
//!                 stream = &stream[taken..];
//!             }
//!             Step::Header => rx.accept(), // here one looks at rx.header() and chooses where data goes
//!             Step::Data { len_bytes, .. } => {
//!                 let len = stream.len().min(len_bytes as usize);
//!                 if len == 0 {
//!                     return Ok(());
//!                 }
//!                 rx.data(&stream[..len]);
//!                 data.extend_from_slice(&stream[..len]);
//!                 stream = &stream[len..];
//!             }
//!             Step::Done { data_digest_ok } => {
//!                 if data_digest_ok {
//!                     pdu(rx.header(), &data);
//!                 }
//!                 data.clear();
//!                 rx.next_pdu();
//!             }
//!         }
//!     }
//! }
//! # let mut rx = Receiver::new(Limits::default());
//! # receive(&mut rx, &[0; 96]).unwrap();
//! # assert_eq!(rx.step(), Step::Framing { len_bytes: 48 });
//! ```

use thiserror::Error;

use super::ahs::MAX_AHS_BYTES;
use super::{BHS_BYTES, Bhs};
use crate::digest::{Crc32c, DIGEST_BYTES, crc32c};

/// Most bytes of header, additional header segments and header digest.
pub const MAX_HEADER_BYTES: usize = BHS_BYTES + MAX_AHS_BYTES + DIGEST_BYTES;

/// Bytes of header and header digest without additional header segments: enough for all PDUs but commands with long
/// CDBs or two data directions.
pub const PLAIN_HEADER_BYTES: usize = BHS_BYTES + DIGEST_BYTES;

/// Most bytes behind a data segment: padding and data digest.
pub const MAX_TRAILER_BYTES: usize = 3 + DIGEST_BYTES;

/// Padding behind a data segment: to a multiple of four.
#[inline]
#[must_use]
pub const fn padding_bytes(data_len_bytes: u32) -> usize {
    (data_len_bytes.wrapping_neg() & 3) as usize
}

/// Which digests are in use (13.1). Both are off until the login has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Digests {
    /// CRC32C behind the header segments.
    pub header: bool,
    /// CRC32C behind each data segment that is not empty.
    pub data: bool,
}

impl Digests {
    /// Bytes that a PDU takes on the wire.
    #[must_use]
    pub const fn wire_len_bytes(self, bhs: &Bhs) -> usize {
        let header = BHS_BYTES + bhs.ahs_len_bytes() + if self.header { DIGEST_BYTES } else { 0 };
        header + bhs.data_len_bytes() as usize + self.trailer_len_bytes(bhs.data_len_bytes())
    }

    /// Bytes behind a data segment: padding and, unless it is empty, the digest.
    #[inline]
    #[must_use]
    pub const fn trailer_len_bytes(self, data_len_bytes: u32) -> usize {
        let digest = if self.data && data_len_bytes != 0 { DIGEST_BYTES } else { 0 };
        padding_bytes(data_len_bytes) + digest
    }
}

/// What is taken from the peer at most; checked before anything else of the PDU is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Additional header segments in bytes, up to 1020.
    pub ahs_bytes: usize,
    /// Data segment in bytes: the MaxRecvDataSegmentLength that this side declared.
    pub data_bytes: u32,
}

impl Default for Limits {
    /// All additional header segments, and the 8192 bytes of data in force before anything is declared (13.12).
    fn default() -> Self {
        Self { ahs_bytes: MAX_AHS_BYTES, data_bytes: 8192 }
    }
}

/// Why a stream cannot be followed any more. The connection is to be dropped: where the next PDU starts is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// More additional header segments than this side takes.
    #[error("additional header segments of {len_bytes} bytes exceed the limit of {limit_bytes}")]
    AhsTooLong {
        /// TotalAHSLength in bytes.
        len_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// A longer data segment than this side declared to take.
    #[error("data segment of {len_bytes} bytes exceeds the limit of {limit_bytes}")]
    DataTooLong {
        /// DataSegmentLength.
        len_bytes: u32,
        /// The limit.
        limit_bytes: u32,
    },
    /// The header digest is wrong (7.8: nothing in the header can be trusted, lengths included).
    #[error("header digest is {got:08x} on the wire but {computed:08x} over the header")]
    HeaderDigest {
        /// As received.
        got: u32,
        /// As computed.
        computed: u32,
    },
}

/// What a [`Receiver`] needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This many bytes of header or trailer, all at once or in pieces, through [`Receiver::feed`].
    Framing {
        /// Bytes until the next step; after a header with additional segments, more may follow.
        len_bytes: usize,
    },
    /// The header is whole and its digest right: look at [`Receiver::header`] and [`Receiver::ahs`], decide where the
    /// data goes, then call [`Receiver::accept`].
    Header,
    /// Data segment bytes, put where they belong by the caller and told by [`Receiver::data`].
    Data {
        /// Where in the data segment the next byte belongs.
        offset_bytes: u32,
        /// Bytes that are still to come, at least 1.
        len_bytes: u32,
    },
    /// The PDU is whole. Call [`Receiver::next_pdu`] when done with it.
    Done {
        /// False if data digests are in use and this one is wrong: the data must not be used. The header is right.
        data_digest_ok: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head { got: usize, need: usize },
    Header,
    Data { done: u32 },
    Trailer { got: usize },
    Done { data_digest_ok: bool },
    Failed(FrameError),
}

/// The receiving side of a stream of PDUs.
#[derive(Clone, Debug)]
pub struct Receiver {
    limits: Limits,
    digests: Digests,
    state: State,
    bhs: Bhs,
    /// Additional header segments and header digest.
    rest: [u8; MAX_AHS_BYTES + DIGEST_BYTES],
    trailer: [u8; MAX_TRAILER_BYTES],
    crc: Crc32c,
}

impl Receiver {
    /// At the start of a connection, without digests.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            digests: Digests::default(),
            state: State::Head { got: 0, need: BHS_BYTES },
            bhs: Bhs([0; BHS_BYTES]),
            rest: [0; MAX_AHS_BYTES + DIGEST_BYTES],
            trailer: [0; MAX_TRAILER_BYTES],
            crc: Crc32c::new(),
        }
    }

    /// Sets limits and digests for the PDUs that follow; call between two PDUs (after the login).
    pub const fn configure(&mut self, limits: Limits, digests: Digests) {
        debug_assert!(self.is_between_pdus() || matches!(self.state, State::Done { .. }));
        self.limits = limits;
        self.digests = digests;
    }

    /// The digests in use.
    #[inline]
    #[must_use]
    pub const fn digests(&self) -> Digests {
        self.digests
    }

    /// Whether nothing of a next PDU has come: a stream that ends here ends cleanly.
    #[inline]
    #[must_use]
    pub const fn is_between_pdus(&self) -> bool {
        matches!(self.state, State::Head { got: 0, .. })
    }

    /// What is needed next.
    #[inline]
    #[must_use]
    pub fn step(&self) -> Step {
        match self.state {
            State::Head { got, need } => Step::Framing { len_bytes: need - got },
            State::Header => Step::Header,
            State::Data { done } => {
                Step::Data { offset_bytes: done, len_bytes: self.bhs.data_len_bytes() - done }
            }
            State::Trailer { got } => Step::Framing { len_bytes: self.trailer_len_bytes() - got },
            State::Done { data_digest_ok } => Step::Done { data_digest_ok },
            // `feed` gives the error again.
            State::Failed(_) => Step::Framing { len_bytes: 1 },
        }
    }

    /// The header; valid from [`Step::Header`] to [`Receiver::next_pdu`].
    #[inline]
    #[must_use]
    pub const fn header(&self) -> &Bhs {
        &self.bhs
    }

    /// The additional header segments, for [`super::ahs::AhsIter`]; valid like [`header`](Self::header).
    #[inline]
    #[must_use]
    pub fn ahs(&self) -> &[u8] {
        &self.rest[..self.bhs.ahs_len_bytes()]
    }

    /// Bytes behind the data segment of the PDU at hand: for callers that receive data and what follows it in one
    /// go. What follows is fed, in order, after the data was told.
    #[inline]
    #[must_use]
    pub const fn trailer_len_bytes(&self) -> usize {
        self.digests.trailer_len_bytes(self.bhs.data_len_bytes())
    }

    /// Takes header and trailer bytes from the start of `bytes`, and returns how many: at most those of the step at
    /// hand, none in the steps that need something else.
    ///
    /// # Errors
    /// The stream cannot be followed; every later call says so again.
    #[inline]
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, FrameError> {
        match self.state {
            State::Head { got, need } => {
                let take = bytes.len().min(need - got);
                let end = got + take;
                // Up to `BHS_BYTES` into the basic header, the rest behind it: a step never crosses the border.
                if need == BHS_BYTES {
                    self.bhs.0[got..end].copy_from_slice(&bytes[..take]);
                } else {
                    self.rest[got - BHS_BYTES..end - BHS_BYTES].copy_from_slice(&bytes[..take]);
                }
                self.state = State::Head { got: end, need };
                if end == need
                    && let Err(error) = self.head_complete(need)
                {
                    self.state = State::Failed(error);
                    return Err(error);
                }
                Ok(take)
            }
            State::Trailer { got } => {
                let need = self.trailer_len_bytes();
                let take = bytes.len().min(need - got);
                self.trailer[got..got + take].copy_from_slice(&bytes[..take]);
                self.state = State::Trailer { got: got + take };
                if got + take == need {
                    self.trailer_complete();
                }
                Ok(take)
            }
            State::Failed(error) => Err(error),
            State::Header | State::Data { .. } | State::Done { .. } => Ok(0),
        }
    }

    fn head_complete(&mut self, need: usize) -> Result<(), FrameError> {
        let ahs_bytes = self.bhs.ahs_len_bytes();
        if need == BHS_BYTES {
            if ahs_bytes > self.limits.ahs_bytes {
                return Err(FrameError::AhsTooLong {
                    len_bytes: ahs_bytes,
                    limit_bytes: self.limits.ahs_bytes,
                });
            }
            let rest_bytes = ahs_bytes + if self.digests.header { DIGEST_BYTES } else { 0 };
            if rest_bytes != 0 {
                self.state = State::Head { got: BHS_BYTES, need: BHS_BYTES + rest_bytes };
                return Ok(());
            }
        }
        if self.digests.header {
            let computed = if ahs_bytes == 0 {
                crc32c(&self.bhs.0)
            } else {
                let mut crc = Crc32c::new();
                crc.update(&self.bhs.0);
                crc.update(&self.rest[..ahs_bytes]);
                crc.value()
            };
            let mut got = [0; DIGEST_BYTES];
            got.copy_from_slice(&self.rest[ahs_bytes..ahs_bytes + DIGEST_BYTES]);
            let got = u32::from_le_bytes(got);
            if got != computed {
                return Err(FrameError::HeaderDigest { got, computed });
            }
        }
        // After the digest: a length that was garbled on the way is the digest's error, not the peer's.
        let len_bytes = self.bhs.data_len_bytes();
        if len_bytes > self.limits.data_bytes {
            return Err(FrameError::DataTooLong { len_bytes, limit_bytes: self.limits.data_bytes });
        }
        self.state = State::Header;
        Ok(())
    }

    /// Goes on behind the header. Does nothing in other steps than [`Step::Header`].
    #[inline]
    pub fn accept(&mut self) {
        if matches!(self.state, State::Header) {
            if self.bhs.data_len_bytes() == 0 {
                self.state = State::Done { data_digest_ok: true };
            } else {
                if self.digests.data {
                    self.crc = Crc32c::new();
                }
                self.state = State::Data { done: 0 };
            }
        }
    }

    /// Tells data segment bytes that were put in place: the next ones, in order. Bytes beyond the data segment are a
    /// mistake of the caller and are not taken into account.
    #[inline]
    pub fn data(&mut self, bytes: &[u8]) {
        if let State::Data { done } = self.state {
            let left = (self.bhs.data_len_bytes() - done) as usize;
            debug_assert!(bytes.len() <= left);
            let bytes = &bytes[..bytes.len().min(left)];
            if self.digests.data {
                self.crc.update(bytes);
            }
            self.data_advance(done, bytes.len() as u32);
        }
    }

    /// Like [`data`](Self::data) where no data digest is in use: only how many bytes were put in place.
    ///
    /// With a data digest it must not be called; the digest would come out wrong.
    #[inline]
    pub fn data_len(&mut self, len_bytes: u32) {
        debug_assert!(!self.digests.data);
        if let State::Data { done } = self.state {
            let left = self.bhs.data_len_bytes() - done;
            debug_assert!(len_bytes <= left);
            self.data_advance(done, len_bytes.min(left));
        }
    }

    /// Like [`data`](Self::data) for a caller that digests on its own: `len_bytes` were put in place, and `crc` has digested
    /// them behind all that [`digest`](Self::digest) has.
    #[inline]
    pub fn data_digested(&mut self, len_bytes: u32, crc: Crc32c) {
        if let State::Data { done } = self.state {
            let left = self.bhs.data_len_bytes() - done;
            debug_assert!(len_bytes <= left);
            self.crc = crc;
            self.data_advance(done, len_bytes.min(left));
        }
    }

    /// What the data segment's bytes come to so far; means something in [`Step::Data`] and with a data digest only.
    #[inline]
    #[must_use]
    pub const fn digest(&self) -> &Crc32c {
        &self.crc
    }

    #[inline]
    fn data_advance(&mut self, done: u32, len_bytes: u32) {
        let done = done + len_bytes;
        self.state = if done < self.bhs.data_len_bytes() {
            State::Data { done }
        } else if self.trailer_len_bytes() != 0 {
            State::Trailer { got: 0 }
        } else {
            State::Done { data_digest_ok: true }
        };
    }

    fn trailer_complete(&mut self) {
        let mut data_digest_ok = true;
        if self.digests.data {
            let padding = padding_bytes(self.bhs.data_len_bytes());
            // The digest covers the padding, whatever its bytes are.
            self.crc.update(&self.trailer[..padding]);
            data_digest_ok = self.crc.bytes() == self.trailer[padding..padding + DIGEST_BYTES];
        }
        self.state = State::Done { data_digest_ok };
    }

    /// Goes on to the next PDU. Does nothing in other steps than [`Step::Done`].
    #[inline]
    pub fn next_pdu(&mut self) {
        if matches!(self.state, State::Done { .. }) {
            self.state = State::Head { got: 0, need: BHS_BYTES };
        }
    }
}

/// Writes what precedes the data segment - header, additional header segments, header digest - to the start of
/// `out` and returns the bytes taken. TotalAHSLength is set from `ahs`, whose length is a multiple of four.
///
/// `None` if `out` is too small ([`PLAIN_HEADER_BYTES`] or [`MAX_HEADER_BYTES`] is enough) or `ahs` has a length that
/// no header can have.
#[inline]
pub fn write_header(bhs: &Bhs, ahs: &[u8], digests: Digests, out: &mut [u8]) -> Option<usize> {
    let end = BHS_BYTES + ahs.len();
    let total = end + if digests.header { DIGEST_BYTES } else { 0 };
    if !ahs.len().is_multiple_of(4) || ahs.len() > MAX_AHS_BYTES || total > out.len() {
        return None;
    }
    let mut bhs = *bhs;
    bhs.set_ahs_len(ahs.len());
    out[..BHS_BYTES].copy_from_slice(&bhs.0);
    out[BHS_BYTES..end].copy_from_slice(ahs);
    if digests.header {
        let crc = crc32c(&out[..end]).to_le_bytes();
        out[end..total].copy_from_slice(&crc);
    }
    Some(total)
}

/// What follows a data segment: padding and data digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Trailer {
    bytes: [u8; MAX_TRAILER_BYTES],
    len: u8,
}

impl Trailer {
    /// For a data segment of `data_len_bytes`. `crc` has digested it all where data digests are in use; it is ignored
    /// for an empty segment, which has no digest.
    #[inline]
    #[must_use]
    pub fn new(data_len_bytes: u32, crc: Option<Crc32c>) -> Self {
        let mut trailer = Self::default();
        let mut end = padding_bytes(data_len_bytes);
        if let Some(mut crc) = crc
            && data_len_bytes != 0
        {
            crc.update(&trailer.bytes[..end]);
            trailer.bytes[end..end + DIGEST_BYTES].copy_from_slice(&crc.bytes());
            end += DIGEST_BYTES;
        }
        trailer.len = end as u8;
        trailer
    }

    /// The bytes to send.
    #[inline]
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Appends a whole PDU to `out`: for login, text and tests, where data is short and in one piece.
/// DataSegmentLength is set from `data`.
pub fn append_pdu(out: &mut Vec<u8>, bhs: &Bhs, data: &[u8], digests: Digests) {
    let mut bhs = *bhs;
    let len_bytes = data.len() as u32;
    bhs.set_data_len(len_bytes);
    let mut header = [0; PLAIN_HEADER_BYTES];
    // Without additional header segments the buffer is always enough.
    let used = write_header(&bhs, &[], digests, &mut header).unwrap_or(0);
    out.extend_from_slice(&header[..used]);
    out.extend_from_slice(data);
    let crc = digests.data.then(|| {
        let mut crc = Crc32c::new();
        crc.update(data);
        crc
    });
    out.extend_from_slice(Trailer::new(len_bytes, crc).as_bytes());
}

#[cfg(test)]
mod tests;

//! A batch of PDUs on their way out: one gather send for all, headers from one buffer, data from where it lies.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;

use iscsi::digest::Crc32c;
use iscsi::pdu::Bhs;
use iscsi::pdu::framing::{Digests, PLAIN_HEADER_BYTES, Trailer, write_header};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::storage::Extent;

/// Pieces of one send; the kernel takes 1024.
const MAX_PIECES: usize = 256;
/// A batch is full with this much data.
const MAX_BATCH_BYTES: usize = 2 << 20;
/// The same where data is digested: what was read for that is still in the second-level cache when the kernel copies it.
const MAX_DIGESTED_BYTES: usize = 256 << 10;
/// Pieces that one PDU with the smallest data can take, kept free so that a batch never overflows by much.
const PDU_PIECES: usize = 4;

#[derive(Debug)]
enum Piece {
    /// Bytes of `Batch::bytes`.
    Bytes {
        start: usize,
        end: usize,
    },
    Extent(Extent),
}

/// PDUs to be sent. A batch is filled, sent (in one go, or in several if the socket is full), then filled anew.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
    /// Pieces sent whole, and bytes sent of the next.
    sent_pieces: usize,
    sent_bytes: usize,
    data_bytes: usize,
    /// Of these, bytes that were read to digest them.
    digested_bytes: usize,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.pieces.len() + PDU_PIECES > MAX_PIECES
            || self.data_bytes >= MAX_BATCH_BYTES
            || self.digested_bytes >= MAX_DIGESTED_BYTES
    }

    fn push_bytes(&mut self, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        match self.pieces.last_mut() {
            Some(Piece::Bytes { end, .. }) if *end == start => *end = self.bytes.len(),
            _ => self.pieces.push(Piece::Bytes { start, end: self.bytes.len() }),
        }
    }

    /// Adds a PDU with data in private bytes. DataSegmentLength is in the header already.
    pub(super) fn push(&mut self, bhs: &Bhs, data: &[u8], digests: Digests) {
        self.push_header(bhs, digests);
        let crc = (digests.data && !data.is_empty()).then(|| {
            let mut crc = Crc32c::new();
            crc.update(data);
            crc
        });
        if !data.is_empty() {
            self.push_bytes(data);
            self.data_bytes += data.len();
            self.push_trailer(data.len(), crc);
        }
    }

    /// Adds a PDU with data in extents.
    pub(super) fn push_extents(
        &mut self,
        bhs: &Bhs,
        extents: impl Iterator<Item = Extent>,
        digests: Digests,
    ) {
        self.push_header(bhs, digests);
        let mut crc = digests.data.then(Crc32c::new);
        let mut len = 0;
        for extent in extents {
            if let Some(crc) = &mut crc {
                crc.update(extent.as_slice());
            }
            len += extent.len();
            self.pieces.push(Piece::Extent(extent));
        }
        self.data_bytes += len;
        if len > 0 {
            self.digested_bytes += if crc.is_some() { len } else { 0 };
            self.push_trailer(len, crc);
        }
    }

    fn push_header(&mut self, bhs: &Bhs, digests: Digests) {
        let mut header = [0; PLAIN_HEADER_BYTES];
        // There are never additional header segments, so the buffer is always enough.
        let used = write_header(bhs, &[], digests, &mut header).unwrap_or(0);
        self.push_bytes(&header[..used]);
    }

    fn push_trailer(&mut self, data_len: usize, crc: Option<Crc32c>) {
        let trailer = Trailer::new(data_len as u32, crc);
        if !trailer.as_bytes().is_empty() {
            self.push_bytes(trailer.as_bytes());
        }
    }

    /// Sends as much as the socket takes. `true` if all went out and the batch is empty again.
    pub(super) fn send(&mut self, socket: impl AsFd) -> io::Result<bool> {
        while self.sent_pieces < self.pieces.len() {
            let mut slices = [IoSlice::new(&[]); MAX_PIECES];
            let mut used = 0;
            let mut total = 0;
            let mut skip = self.sent_bytes;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces[self.sent_pieces..]) {
                let bytes = match piece {
                    Piece::Bytes { start, end } => &self.bytes[*start..*end],
                    Piece::Extent(extent) => extent.as_slice(),
                };
                *slice = IoSlice::new(&bytes[skip..]);
                total += bytes.len() - skip;
                skip = 0;
                used += 1;
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&socket, &slices[..used], &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) if sent == total => {
                    self.sent_pieces += used;
                    self.sent_bytes = 0;
                }
                Ok(sent) => self.advance(sent),
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.bytes.clear();
        self.pieces.clear();
        (self.sent_pieces, self.sent_bytes, self.data_bytes, self.digested_bytes) = (0, 0, 0, 0);
        Ok(true)
    }

    fn advance(&mut self, mut sent: usize) {
        sent += self.sent_bytes;
        while let Some(piece) = self.pieces.get(self.sent_pieces) {
            let len = match piece {
                Piece::Bytes { start, end } => end - start,
                Piece::Extent(extent) => extent.len(),
            };
            if sent < len {
                break;
            }
            sent -= len;
            self.sent_pieces += 1;
        }
        self.sent_bytes = sent;
    }
}

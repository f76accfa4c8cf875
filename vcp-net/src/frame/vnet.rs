//! The virtio-net header (VIRTIO 1.2, 5.1.6) and what two sides can leave to each other.

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM` and `_DATA_VALID`.
pub const NEEDS_CSUM: u8 = 1;
/// The checksum was checked.
pub const DATA_VALID: u8 = 2;

/// `VIRTIO_NET_HDR_GSO_*`.
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Bytes of the header with `num_buffers`, and where that is.
pub const HEADER_BYTES: usize = 12;
/// Bytes of it without.
pub const SHORT_HEADER_BYTES: usize = 10;
/// Where `num_buffers` is.
pub const NUM_BUFFERS_AT: usize = 10;

/// What kind of segments a frame is to be cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gso {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams (USO).
    Udp,
}

/// The metadata of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// `gso_type` as it stands in the header.
    pub gso_type: u8,
    /// Bytes of all headers; a hint.
    pub hdr_len: u16,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// Where checksumming starts.
    pub csum_start: u16,
    /// Where the checksum is, from there.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// From the first bytes of a chain.
    #[inline]
    #[must_use]
    pub fn parse(bytes: &[u8; SHORT_HEADER_BYTES]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// As bytes, with `num_buffers` 1.
    #[inline]
    #[must_use]
    pub fn emit(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, word) in
            [(2, self.hdr_len), (4, self.gso_size), (6, self.csum_start), (8, self.csum_offset), (10, 1)]
        {
            bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Metadata of a TCP segment of which the receiver is to make several: checksum and segmentation are left to it.
    #[must_use]
    pub fn tcp(v6: bool, l4_at: usize, hdr_len: usize, gso_size: u16) -> Self {
        Self {
            flags: NEEDS_CSUM,
            gso_type: if v6 { GSO_TCPV6 } else { GSO_TCPV4 },
            hdr_len: hdr_len as u16,
            gso_size,
            csum_start: l4_at as u16,
            csum_offset: 16,
        }
    }

    /// Metadata of a row of UDP datagrams.
    #[must_use]
    pub fn udp(l4_at: usize, gso_size: u16) -> Self {
        Self {
            flags: NEEDS_CSUM,
            gso_type: GSO_UDP_L4,
            hdr_len: (l4_at + 8) as u16,
            gso_size,
            csum_start: l4_at as u16,
            csum_offset: 6,
        }
    }

    /// Metadata of a frame that lacks only a checksum.
    #[must_use]
    pub fn partial(l4_at: usize, csum_offset: u16) -> Self {
        Self { flags: NEEDS_CSUM, csum_start: l4_at as u16, csum_offset, ..Self::default() }
    }

    /// Whether nothing was left to do.
    #[inline]
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.flags & NEEDS_CSUM == 0 && self.gso_type == 0
    }

    /// Whether the checksum is missing.
    #[inline]
    #[must_use]
    pub fn needs_csum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }

    /// Whether it is a row of segments.
    #[inline]
    #[must_use]
    pub fn is_gso(&self) -> bool {
        self.gso_type != 0
    }

    /// Whether the sender signalled that it reduced its window: only the first segment may say so (RFC 3168).
    #[must_use]
    pub fn has_ecn(&self) -> bool {
        self.gso_type & GSO_ECN != 0
    }

    /// What it is to be cut into; `None` for a kind that is not known.
    #[must_use]
    pub fn gso(&self) -> Option<Gso> {
        match self.gso_type & !GSO_ECN {
            GSO_TCPV4 => Some(Gso::Tcp4),
            GSO_TCPV6 => Some(Gso::Tcp6),
            GSO_UDP_L4 if !self.has_ecn() => Some(Gso::Udp),
            _ => None,
        }
    }

    /// The same for a frame that begins `by` bytes earlier (later, if negative).
    #[inline]
    #[must_use]
    pub fn shifted(mut self, by: i16) -> Self {
        if self.needs_csum() {
            self.csum_start = self.csum_start.wrapping_add_signed(by);
        }
        if self.hdr_len != 0 {
            self.hdr_len = self.hdr_len.saturating_add_signed(by);
        }
        self
    }
}

/// What a receiver takes unfinished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames without a checksum.
    pub csum: bool,
    /// Rows of TCP segments over IPv4.
    pub tso4: bool,
    /// Over IPv6.
    pub tso6: bool,
    /// With the signal of a reduced window.
    pub ecn: bool,
    /// Rows of UDP datagrams over IPv4.
    pub uso4: bool,
    /// Over IPv6.
    pub uso6: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { csum: true, tso4: true, tso6: true, ecn: true, uso4: true, uso6: true };
    /// None of them.
    pub const NONE: Self =
        Self { csum: false, tso4: false, tso6: false, ecn: false, uso4: false, uso6: false };

    /// Whether a frame with this metadata can go as it is; `v6`: its network layer is IPv6.
    #[inline]
    #[must_use]
    pub fn take(&self, meta: &VnetHeader, v6: bool) -> bool {
        if meta.is_plain() {
            return true;
        }
        if !self.csum {
            return false;
        }
        let kind = match meta.gso() {
            _ if !meta.is_gso() => true,
            Some(Gso::Tcp4) => self.tso4,
            Some(Gso::Tcp6) => self.tso6,
            Some(Gso::Udp) if v6 => self.uso6,
            Some(Gso::Udp) => self.uso4,
            None => false,
        };
        kind && (!meta.has_ecn() || self.ecn)
    }
}

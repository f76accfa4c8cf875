//! What the stack does not pass on, and why; and what it does.

use serde::{Deserialize, Serialize};

/// Counters. Every frame that the stack takes and does nothing with is in one of `drops`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Frames from guests.
    pub frames: u64,
    /// Bytes of TCP that went from guests to sockets.
    pub tcp_out_bytes: u64,
    /// Bytes of TCP that went from sockets to guests.
    pub tcp_in_bytes: u64,
    /// Frames in which they went.
    pub tcp_in_frames: u64,
    /// Of these, frames that were read straight into a guest's memory.
    pub tcp_direct: u64,
    /// Connections that were opened, by the guest and by the host.
    pub tcp_opened: (u64, u64),
    /// Connections that the other side refused, or that could not be made.
    pub tcp_refused: u64,
    /// Connections that ended with a reset, by the guest and by the host.
    pub tcp_resets: (u64, u64),
    /// Segments that were not what is expected: repetitions, out of order, out of the window.
    pub tcp_odd: u64,
    /// Times that something was repeated because nobody answered.
    pub tcp_repeats: u64,
    /// Times that the end of what was sent was repeated to hear what is missing.
    pub tcp_probes: u64,
    /// Bytes that came behind a gap and were kept; and those for which there was no room.
    pub tcp_kept_bytes: u64,
    /// See [`tcp_kept_bytes`](Self::tcp_kept_bytes).
    pub tcp_not_kept_bytes: u64,
    /// Of those that were kept, bytes that went to sockets when the gap was filled.
    pub tcp_filled_bytes: u64,
    /// Acknowledgements that told a guest what is kept of its data, or what came twice.
    pub tcp_sacks: u64,
    /// Times that a socket took less than a guest sent.
    pub tcp_short: u64,
    /// Datagrams to and from the outside.
    pub udp: (u64, u64),
    /// Times that a guest's datagram waited for room in a socket.
    pub udp_send_waits: u64,
    /// Times that a datagram from outside waited for room in a guest's ring: none is lost there, and the socket is not
    /// read meanwhile.
    pub udp_waits: u64,
    /// Datagrams from outside that the host's socket had no room for, because their guest took none, or not as fast.
    pub udp_overflow: u64,
    /// Echo requests that went outside, and answers.
    pub pings: (u64, u64),
    /// Queries answered here, and passed on.
    pub dns: (u64, u64),
    /// Leases given, DHCP and DHCPv6.
    pub leases: (u64, u64),
    /// ICMP errors told to guests.
    pub unreachable: u64,
    /// ICMP errors not told, because there were too many: a port is told 32 at once and 200 in a second.
    pub unreachable_limited: u64,
    /// System calls on sockets.
    pub calls: u64,
    /// Frames not passed on.
    pub drops: Drops,
}

/// See [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Drops {
    /// Not for the stack: another station's, a protocol that it does not speak.
    pub not_ours: u64,
    /// A header that is broken.
    pub malformed: u64,
    /// A wrong checksum.
    pub checksum: u64,
    /// From an address outside of the guests' network.
    pub bad_source: u64,
    /// To an address that no packet goes to from here: multicast, loopback, unspecified, other guests.
    pub bad_target: u64,
    /// A part of a packet: of these, none is put together.
    pub fragment: u64,
    /// No slot was left in the flow table, or the guest has as many as it may.
    pub no_flow: u64,
    /// A socket could not be had.
    pub no_socket: u64,
    /// A segment of a connection that there is not.
    pub no_connection: u64,
    /// An answer for which the guest, or the queue in front of it, had no room.
    pub no_room: u64,
    /// A datagram that the socket did not take.
    pub not_sent: u64,
    /// A datagram from outside that is longer than goes to a guest.
    pub too_long: u64,
    /// For a guest that is not there.
    pub no_guest: u64,
}

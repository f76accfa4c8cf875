//! Free loopback ports for programs that must be told theirs.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::bail;

use crate::Result;

/// Below the kernel's ephemeral range (32768 and up), so that no outgoing connection takes one meanwhile.
const FIRST: u16 = 12_000;
const COUNT: u16 = 20_000;

/// Returns a port on 127.0.0.1 on which nothing listens and which no other caller in this process gets.
pub fn free() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Other test processes start elsewhere.
    let seed = (std::process::id().wrapping_mul(7919) % u32::from(COUNT)) as u16;
    for _ in 0..COUNT {
        let n = NEXT.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = FIRST + (seed + n) % COUNT;
        if TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port on 127.0.0.1 from {FIRST} to {}", FIRST + COUNT)
}

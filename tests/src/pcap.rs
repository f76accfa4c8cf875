//! A recorded connection as a capture file, and tshark's opinion of it: an iSCSI decoder that we did not write.

use std::path::Path;
use std::time::Duration;

use anyhow::bail;

use crate::Result;
use crate::proc::Cmd;
use crate::proxy::{Record, Way};

/// Longest payload of a made-up segment; the IPv4 total length has 16 bits.
const MSS: usize = 32 << 10;
const INITIATOR_PORT: u16 = 50_000;
const TARGET_PORT: u16 = 3260;

/// Makes a pcap file (raw IPv4) of a connection.
pub fn pcap(record: &Record) -> Vec<u8> {
    let mut out = Vec::new();
    // Magic, version 2.4, zone, accuracy, snapshot length, link type 101 (raw IP).
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 0x0004_0000, 101] {
        out.extend(word.to_le_bytes());
    }
    let (mut up, mut down) = (1_u32, 1_u32);
    let mut micros = 0_u32;
    for (way, bytes) in &record.pieces {
        for segment in bytes.chunks(MSS) {
            let (ports, seq, ack) = match way {
                Way::ToTarget => ([INITIATOR_PORT, TARGET_PORT], up, down),
                Way::ToInitiator => ([TARGET_PORT, INITIATOR_PORT], down, up),
            };
            let total = 40 + segment.len();
            micros += 1;
            for word in [micros / 1_000_000, micros % 1_000_000, total as u32, total as u32] {
                out.extend(word.to_le_bytes());
            }
            let last = u8::from(*way == Way::ToInitiator) + 1;
            // IPv4: TTL 64, TCP, no checksum.
            out.extend([0x45, 0]);
            out.extend((total as u16).to_be_bytes());
            out.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, last, 10, 0, 0, 3 - last]);
            // TCP: PSH and ACK, no checksum.
            out.extend(ports[0].to_be_bytes());
            out.extend(ports[1].to_be_bytes());
            out.extend(seq.to_be_bytes());
            out.extend(ack.to_be_bytes());
            out.extend([0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
            out.extend(segment);
            match way {
                Way::ToTarget => up = up.wrapping_add(segment.len() as u32),
                Way::ToInitiator => down = down.wrapping_add(segment.len() as u32),
            }
        }
    }
    out
}

/// What tshark says of a connection.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// The iSCSI opcodes, without the immediate bit, in order.
    pub opcodes: Vec<u8>,
    /// Number of header and data digests, all of them right.
    pub digests: usize,
}

/// Lets tshark decode a connection. Fails if it calls anything malformed or finds a wrong digest.
pub fn decode(record: &Record, dir: &Path) -> Result<Decoded> {
    let file = dir.join("connection.pcap");
    std::fs::write(&file, pcap(record))?;
    let tshark = |args: &[&str]| {
        let cmd = Cmd::new("tshark").arg("-r").arg(&file).args(["-d", "tcp.port==3260,iscsi"]).args(args);
        cmd.output(Duration::from_secs(60))
    };
    let malformed = tshark(&["-Y", "_ws.malformed || iscsi.opcode.invalid"])?;
    if !malformed.trim().is_empty() {
        bail!("tshark finds these packets malformed:\n{malformed}");
    }
    let text = tshark(&["-O", "iscsi"])?;
    let is_digest = |line: &&str| line.starts_with("HeaderDigest: 0x") || line.starts_with("DataDigest: 0x");
    let digests: Vec<&str> = text.lines().map(str::trim).filter(is_digest).collect();
    if let Some(wrong) = digests.iter().find(|line| !line.ends_with("(Good CRC32)")) {
        bail!("tshark finds a wrong digest: {wrong}");
    }
    let opcodes = tshark(&["-Y", "iscsi", "-T", "fields", "-e", "iscsi.opcode"])?;
    let parse = |word: &str| u8::from_str_radix(word.trim().trim_start_matches("0x"), 16).ok();
    let opcodes = opcodes.split([',', '\n']).filter_map(parse).map(|opcode| opcode & 0x3f).collect();
    Ok(Decoded { opcodes, digests: digests.len() })
}

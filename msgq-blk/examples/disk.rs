//! Reads the first block of a disk that a VCP serves, and says what the disk is.
//!
//! ```text
//! vcp-iscsi serve --msgq-path /run/disk0.msgq iscsi://192.0.2.7/iqn.2001-04.com.example:disk/0 &
//! cargo run -p msgq-blk --example disk -- /run/disk0.msgq
//! ```

use std::path::PathBuf;

use msgq_blk::{Disk, Options};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = PathBuf::from(std::env::args().nth(1).ok_or("usage: disk SOCKET")?);
    let mut disk = Disk::open(&path, &Options::default())?;
    let info = *disk.info();
    println!("{} bytes in blocks of {}, read-only: {}", info.bytes(), info.block_bytes, info.read_only);
    let mut block = vec![0; info.block_bytes as usize];
    disk.read_at(0, &mut block)?;
    for (line, bytes) in block.chunks(16).take(8).enumerate() {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        println!("{:08x}  {}", line * 16, hex.join(" "));
    }
    Ok(())
}

//! INQUIRY: standard data and the vital product data pages (SPC-4 6.6, 7.8; SBC-3 6.6).

use iscsi::scsi::{Sense, inquiry::TYPE_DISK, vpd};

use super::{
    CdbBytes, LogicalUnit, MAX_COMPARE_BLOCKS, MAX_TRANSFER_BYTES, MAX_UNMAP_BYTES, MAX_UNMAP_DESCRIPTORS,
    MAX_WRITE_SAME_BYTES, Step, be16, invalid_field,
};
use crate::storage::{CHUNK_BYTES, Extent};

/// T10 VENDOR IDENTIFICATION.
const VENDOR: &[u8; 8] = b"VCP     ";
/// PRODUCT IDENTIFICATION.
const PRODUCT: &[u8; 16] = b"iscsi-target    ";
/// PRODUCT REVISION LEVEL.
const REVISION: &[u8; 4] = b"0001";

/// Standards claimed, as version descriptors (SPC-4 annex D.6): SAM-5, SPC-4, SBC-3, iSCSI.
const VERSION_DESCRIPTORS: [u16; 4] = [0x00A0, 0x0460, 0x04C0, 0x0960];

/// The pages that exist, in the order of their codes.
const PAGES: [u8; 6] = [
    vpd::SUPPORTED_PAGES,
    vpd::UNIT_SERIAL_NUMBER,
    vpd::DEVICE_IDENTIFICATION,
    vpd::BLOCK_LIMITS,
    vpd::BLOCK_CHARACTERISTICS,
    vpd::PROVISIONING,
];

/// Standard INQUIRY data with the given first byte (peripheral qualifier and device type).
pub(crate) fn standard(peripheral: u8, asymmetric: bool) -> [u8; 74] {
    let mut data = [0; 74];
    data[0] = peripheral;
    data[2] = 0x06; // SPC-4
    data[3] = 0x12; // HISUP, response data format 2
    data[4] = (data.len() - 5) as u8;
    if asymmetric {
        data[5] = 0x10; // TPGS: implicit
    }
    data[7] = 0x02; // CMDQUE
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].copy_from_slice(PRODUCT);
    data[32..36].copy_from_slice(REVISION);
    for (field, descriptor) in data[58..].chunks_exact_mut(2).zip(VERSION_DESCRIPTORS) {
        field.copy_from_slice(&descriptor.to_be_bytes());
    }
    data
}

impl LogicalUnit {
    pub(super) fn inquiry(&mut self, cdb: &CdbBytes, reply: &mut Vec<Extent>) -> Result<Step, Sense> {
        let (vital, page) = (cdb[1] & 0x01 != 0, cdb[2]);
        let allocation_bytes = usize::from(be16(cdb, 3));
        if !vital {
            if page != 0 {
                return Err(invalid_field());
            }
            return Ok(self.reply(&standard(TYPE_DISK, self.asymmetric), allocation_bytes, reply));
        }
        let payload = match page {
            vpd::SUPPORTED_PAGES => PAGES.to_vec(),
            vpd::UNIT_SERIAL_NUMBER => self.identity.serial.clone().into_bytes(),
            vpd::DEVICE_IDENTIFICATION => self.device_identification(),
            vpd::BLOCK_LIMITS => self.block_limits(),
            vpd::BLOCK_CHARACTERISTICS => {
                let mut payload = vec![0; 60];
                payload[1] = 1; // MEDIUM ROTATION RATE 0001h: does not rotate
                payload
            }
            // LBPU, LBPWS, LBPWS10, LBPRZ 1; thin; unmapping in any size (no threshold).
            vpd::PROVISIONING => vec![0, 0xE4, 2, 0],
            _ => return Err(invalid_field()),
        };
        let mut data = vec![TYPE_DISK, page];
        data.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        data.extend_from_slice(&payload);
        Ok(self.reply(&data, allocation_bytes, reply))
    }

    /// Two designators of the logical unit, NAA and T10 vendor identification; and of the port that was asked, its relative
    /// identifier and its group, which are the same number here.
    fn device_identification(&self) -> Vec<u8> {
        let mut payload = vec![0x01, 0x03, 0, 8];
        payload.extend_from_slice(&self.identity.naa.to_be_bytes());
        let serial = self.identity.serial.as_bytes();
        payload.extend_from_slice(&[0x02, 0x01, 0, (VENDOR.len() + serial.len()) as u8]);
        payload.extend_from_slice(VENDOR);
        payload.extend_from_slice(serial);
        let [high, low] = self.port_group.to_be_bytes();
        for kind in [0x14, 0x15] {
            // iSCSI, PIV, association target port.
            payload.extend_from_slice(&[0x51, 0x80 | kind, 0, 4, 0, 0, high, low]);
        }
        payload
    }

    fn block_limits(&self) -> Vec<u8> {
        let blocks = |bytes: u64| bytes / u64::from(self.block_bytes);
        let granularity = blocks(u64::from(self.storage.granularity_bytes())).max(1);
        let mut payload = vec![0; 60];
        payload[0] = 0x01; // WSNZ
        payload[1] = MAX_COMPARE_BLOCKS;
        // Transfers are best in multiples of a page.
        payload[2..4].copy_from_slice(&(blocks(4096).max(1) as u16).to_be_bytes());
        let mut put = |at: usize, value: u64| {
            payload[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes());
        };
        put(4, blocks(u64::from(MAX_TRANSFER_BYTES)));
        put(8, blocks(CHUNK_BYTES as u64));
        put(16, blocks(MAX_UNMAP_BYTES));
        put(20, u64::from(MAX_UNMAP_DESCRIPTORS));
        put(24, granularity);
        // UGAVALID: the granularity counts from LBA 0.
        put(28, 1 << 31);
        payload[32..40].copy_from_slice(&blocks(u64::from(MAX_WRITE_SAME_BYTES)).to_be_bytes());
        payload
    }
}

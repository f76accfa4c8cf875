//! [`Found`]: what a probe learned, and the [`Lun`] that the device model makes of it.

use iscsi::scsi::capacity::Capacity;
use iscsi::scsi::inquiry::Inquiry;
use iscsi::scsi::mode::ModeData;
use iscsi::scsi::vpd::{BlockLimits, Designators, Provisioning};

use super::unit::{Access, Identity};
use crate::engine::Lun;

/// Everything that a probe learned.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Found {
    /// Standard INQUIRY data.
    pub inquiry: Inquiry,
    /// Supported VPD pages.
    pub pages: Vec<u8>,
    /// VPD page 80h.
    pub serial: Option<String>,
    /// VPD page 83h: the best designator.
    pub designator: Option<String>,
    /// VPD page 83h, all of it that matters here.
    pub names: Designators,
    /// REPORT TARGET PORT GROUPS: the group of the port that answered.
    pub access: Option<Access>,
    /// VPD page B0h.
    pub limits: Option<BlockLimits>,
    /// VPD page B1h: medium rotation rate.
    pub rotation: Option<u16>,
    /// VPD page B2h.
    pub provisioning: Option<Provisioning>,
    /// READ CAPACITY.
    pub capacity: Capacity,
    /// MODE SENSE.
    pub mode: ModeData,
}

impl Found {
    /// The unit in the terms of the device model. `read_only`: the user asked for that.
    pub fn lun(&self, read_only: bool) -> Lun {
        let limits = self.limits.unwrap_or_default();
        let provisioning = self.provisioning.unwrap_or_default();
        let block_bytes = self.capacity.block_bytes;
        // The expected data transfer length is 32 bits of bytes, and so is a virtio segment; 16 MiB is plenty.
        let cdb_limit = (16 << 20) / block_bytes;
        let max_transfer_blocks = match limits.max_transfer_blocks {
            0 => cdb_limit,
            told => told.min(cdb_limit),
        };
        let read_only = read_only || self.mode.write_protected;
        // SBC-3 4.7.3.4: UNMAP only with LBPU and limits that allow at least one descriptor and block. Where page B0h
        // tells no limits (older units), UNMAP of moderate length is tried.
        let can_unmap = provisioning.unmap
            && !read_only
            && self.limits.is_none_or(|l| l.max_unmap_blocks > 0 && l.max_unmap_descriptors > 0);
        let max_discard_blocks = match (can_unmap, self.limits) {
            (false, _) => 0,
            (true, Some(l)) => l.max_unmap_blocks.min(1 << 22),
            (true, None) => 1 << 16,
        };
        // There is no capability bit for WRITE SAME(16) as such; it is mandatory for thin units and where B0h has a
        // limit for it. Others get it as far as the field's usual default goes, and refusal is told as unsupported.
        let max_same = limits.max_write_same_blocks.min(1 << 22) as u32;
        let max_write_zeroes_blocks = match (read_only, max_same) {
            (true, _) => 0,
            (false, 0) if provisioning.write_same_16 => 1 << 16,
            (false, told) => told,
        };
        Lun {
            blocks: self.capacity.blocks,
            block_bytes,
            physical_exponent: self.capacity.physical_exponent,
            lowest_aligned: self.capacity.lowest_aligned,
            read_only,
            write_cache: self.mode.write_cache.unwrap_or(false),
            fua: self.mode.dpo_fua,
            max_transfer_blocks: max_transfer_blocks.max(1),
            opt_transfer_blocks: limits.optimal_transfer_blocks,
            min_transfer_blocks: u32::from(limits.optimal_granularity_blocks),
            max_discard_blocks,
            discard_granularity: if can_unmap { limits.unmap_granularity_blocks.max(1) } else { 0 },
            discard_alignment: limits.unmap_alignment_blocks.filter(|_| can_unmap).unwrap_or(0),
            max_write_zeroes_blocks,
            write_zeroes_may_unmap: provisioning.write_same_16,
            serial: self.serial.clone().or_else(|| self.designator.clone()).unwrap_or_default(),
            vendor: self.inquiry.vendor.clone(),
            product: self.inquiry.product.clone(),
            revision: self.inquiry.revision.clone(),
        }
    }

    /// Whether this is the same unit as that found before: what identifies it and what a guest cannot see change.
    pub fn is_same_unit(&self, before: &Found) -> bool {
        self.capacity.block_bytes == before.capacity.block_bytes
            && self.serial == before.serial
            && self.designator == before.designator
    }

    /// What tells the unit from others.
    pub fn identity(&self) -> Identity {
        Identity { serial: self.serial.clone(), names: self.names.unit.clone() }
    }
}

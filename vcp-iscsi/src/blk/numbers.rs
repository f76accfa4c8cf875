//! What a disk tells of itself in the metrics, besides what every device does.

use vcp_core::metrics::{Family, Samples, Unit};

use crate::engine::Lun;
use crate::limit::Limiter;

static SIZE: Family = Family::gauge("vcp_disk_size", Unit::Bytes, "Size of the disk");
static READ_ONLY: Family = Family::gauge("vcp_disk_read_only", Unit::None, "1 if all writes are refused");
static SHRUNK: Family =
    Family::counter("vcp_disk_shrunk", Unit::None, "Times the unit became smaller than the guest knew it");
static CHANGES: Family = Family::counter(
    "vcp_disk_changes",
    Unit::None,
    "Times the size or the limits of the unit changed and the guest was told",
);
static LIMIT_IOPS: Family =
    Family::gauge("vcp_disk_limit_iops", Unit::None, "Limit in requests per second; 0 is none");
static LIMIT_BPS: Family =
    Family::gauge("vcp_disk_limit_bps", Unit::None, "Limit in bytes per second; 0 is none");
static LIMITED: Family =
    Family::counter("vcp_disk_limited", Unit::None, "Times no request was taken because a limit was reached");
static LIMITED_TIME: Family = Family::counter(
    "vcp_disk_limited_time",
    Unit::Seconds,
    "Time in which no request was taken because a limit was reached",
);

/// Where the numbers come from.
pub(super) struct Numbers<'a> {
    pub(super) lun: &'a Lun,
    /// Times the unit became smaller.
    pub(super) shrunk: u64,
    /// Times the driver was told of a change.
    pub(super) changes: u64,
    pub(super) limiter: &'a Limiter,
}

impl Numbers<'_> {
    pub(super) fn collect(&self, samples: &mut Samples) {
        let (limits, stats) = (self.limiter.limits(), self.limiter.stats());
        for (family, number) in [
            (&SIZE, self.lun.blocks.saturating_mul(self.lun.block_bytes.into())),
            (&READ_ONLY, self.lun.read_only.into()),
            (&SHRUNK, self.shrunk),
            (&CHANGES, self.changes),
            (&LIMIT_IOPS, limits.iops.map_or(0, |rate| rate.per_second)),
            (&LIMIT_BPS, limits.bps.map_or(0, |rate| rate.per_second)),
            (&LIMITED, stats.closed),
            (&LIMITED_TIME, stats.closed_ns),
        ] {
            samples.add(family, &[], number);
        }
    }
}

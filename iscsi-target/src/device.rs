//! A SCSI target device: its logical units by LUN, and the rules that hold between initiators: unit attentions,
//! reservations, what a LUN that does not exist answers (SPC-4 6.6, 6.33, 6.39; SPC-2 5.5; SAM-5 5.14).

use iscsi::scsi::alua::{AccessState, TargetPortGroup, encode_groups};
use iscsi::scsi::sense::asc;
use iscsi::scsi::{Lun, Sense, SenseKey, Status, opcode as op};

use crate::lu::{self, CdbBytes, LogicalUnit, Step, Transfer, illegal, invalid_field};
use crate::storage::{Extent, Pool};

/// An I_T nexus: one session. Never used twice.
pub type NexusId = u64;

/// Most logical units of a target.
pub const MAX_LUNS: usize = 256;

/// One logical unit and what the initiators share of it.
struct Unit {
    lun: Lun,
    lu: LogicalUnit,
    /// Holder of the RESERVE(6) reservation.
    reserved_by: Option<NexusId>,
}

/// Unit attention conditions of one I_T nexus, one for each logical unit (a newer one replaces an older one).
#[derive(Clone, Debug)]
pub struct Attentions {
    /// Target port group by which the nexus reaches the target.
    group: u16,
    codes: Vec<Option<u16>>,
    pending: usize,
}

impl Default for Attentions {
    fn default() -> Self {
        Self::new(1)
    }
}

impl Attentions {
    /// Of a nexus by a port of this group, to begin with.
    pub fn new(group: u16) -> Self {
        Self { group, codes: Vec::new(), pending: 0 }
    }

    fn set(&mut self, unit: usize, code: u16) {
        if self.codes.len() <= unit {
            self.codes.resize(unit + 1, None);
        }
        if self.codes[unit].replace(code).is_none() {
            self.pending += 1;
        }
    }

    fn take(&mut self, unit: usize) -> Option<u16> {
        if self.pending == 0 {
            return None;
        }
        let code = self.codes.get_mut(unit)?.take();
        self.pending -= usize::from(code.is_some());
        code
    }
}

/// A target with its logical units.
pub struct Device {
    name: String,
    /// Ordered by LUN.
    units: Vec<Unit>,
    /// Target port groups; with one there is nothing asymmetric.
    groups: Vec<TargetPortGroup>,
    pool: Pool,
}

/// A logical unit of a [`Device`], by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitIndex(usize);

impl Device {
    /// A target called `name` without logical units.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), units: Vec::new(), groups: Vec::new(), pool: Pool::new() }
    }

    /// Its iSCSI name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a logical unit; `false` if the LUN is taken or there are [`MAX_LUNS`] already.
    pub fn add(&mut self, lun: Lun, lu: LogicalUnit) -> bool {
        match self.units.binary_search_by_key(&lun.number(), |unit| unit.lun.number()) {
            Err(at) if self.units.len() < MAX_LUNS => {
                self.units.insert(at, Unit { lun, lu, reserved_by: None });
                true
            }
            _ => false,
        }
    }

    /// Number of logical units.
    pub fn unit_count(&self) -> usize {
        self.units.len()
    }

    /// The logical unit that a LUN addresses. A LUN below 256 may come in peripheral or in flat form.
    pub fn find(&self, lun: Lun) -> Option<UnitIndex> {
        let number = lun.number();
        self.units.binary_search_by_key(&number, |unit| unit.lun.number()).ok().map(UnitIndex)
    }

    /// Starts a command for `lun` from `nexus`. The second value names the logical unit, if there is one.
    pub fn start(
        &mut self,
        nexus: NexusId,
        attentions: &mut Attentions,
        lun: Lun,
        cdb: &CdbBytes,
        edtl: u32,
        reply: &mut Vec<Extent>,
    ) -> (Step, Option<UnitIndex>) {
        let index = self.find(lun);
        if cdb[0] == op::REPORT_LUNS {
            return (self.report_luns(cdb, reply), index);
        }
        let Some(UnitIndex(at)) = index else {
            return (self.no_unit(cdb, reply), None);
        };
        if cdb[0] == op::MAINTENANCE_IN && cdb[1] & 0x1F == op::SA_REPORT_TARGET_PORT_GROUPS {
            if let Some(code) = attentions.take(at) {
                return (Step::Failed(attention(code)), index);
            }
            return (self.report_groups(cdb, reply), index);
        }
        let asymmetric = self.groups.len() > 1;
        let unit = &mut self.units[at];
        if cdb[0] == op::REQUEST_SENSE {
            let code = attentions.take(at);
            let sense = code.map_or(Sense::new(SenseKey::NoSense, asc::NONE), attention);
            return (request_sense(&mut self.pool, cdb, &sense, unit.lu.descriptor_sense(), reply), index);
        }
        if cdb[0] != op::INQUIRY
            && let Some(code) = attentions.take(at)
        {
            return (Step::Failed(attention(code)), index);
        }
        if asymmetric
            && let Some(group) = self.groups.iter().find(|group| group.id == attentions.group)
            && !group.state.is_active()
            && !allowed_without_access(cdb)
        {
            return (Step::Failed(no_access(group.state)), index);
        }
        if cdb[0] == op::INQUIRY {
            unit.lu.set_port(attentions.group, asymmetric);
        }
        let conflict = unit.reserved_by.is_some_and(|holder| holder != nexus);
        let step = match cdb[0] {
            op::RESERVE_6 | op::RELEASE_6 if cdb[1] & 0x1F != 0 || cdb[3] != 0 || cdb[4] != 0 => {
                // Third-party and extent reservations are obsolete.
                Step::Failed(invalid_field())
            }
            op::RESERVE_6 if conflict => Step::Done(Status::RESERVATION_CONFLICT),
            op::RESERVE_6 => {
                unit.reserved_by = Some(nexus);
                Step::Done(Status::GOOD)
            }
            // Releasing what another initiator holds does nothing and is no error (SPC-2 7.16).
            op::RELEASE_6 => {
                unit.reserved_by = unit.reserved_by.filter(|&holder| holder != nexus);
                Step::Done(Status::GOOD)
            }
            op::INQUIRY => unit.lu.start(cdb, edtl, reply),
            _ if conflict && !allowed_in_spite_of_reservation(cdb) => {
                Step::Done(Status::RESERVATION_CONFLICT)
            }
            _ => unit.lu.start(cdb, edtl, reply),
        };
        (step, index)
    }

    /// See [`LogicalUnit::place`].
    pub fn place(
        &mut self,
        unit: UnitIndex,
        transfer: &Transfer,
        at: u32,
        data: &[u8],
        staged: &mut Vec<u8>,
    ) -> Result<(), Sense> {
        match self.units.get_mut(unit.0) {
            Some(unit) => unit.lu.place(transfer, at, data, staged),
            None => Err(illegal(asc::LUN_NOT_SUPPORTED)),
        }
    }

    /// See [`LogicalUnit::finish`].
    pub fn finish(
        &mut self,
        unit: UnitIndex,
        cdb: &CdbBytes,
        transfer: &Transfer,
        staged: &[u8],
    ) -> Result<(), Sense> {
        match self.units.get_mut(unit.0) {
            Some(unit) => unit.lu.finish(cdb, transfer, staged),
            None => Err(illegal(asc::LUN_NOT_SUPPORTED)),
        }
    }

    /// Encodes sense data as the logical unit is set to; returns its length.
    pub fn encode_sense(&self, unit: Option<UnitIndex>, sense: &Sense, out: &mut [u8; 32]) -> usize {
        let descriptor =
            unit.and_then(|unit| self.units.get(unit.0)).is_some_and(|unit| unit.lu.descriptor_sense());
        encode_sense(sense, descriptor, out)
    }

    /// LOGICAL UNIT RESET: default mode parameters, reservations gone.
    pub fn reset(&mut self, unit: UnitIndex) {
        if let Some(unit) = self.units.get_mut(unit.0) {
            unit.lu.reset();
            unit.reserved_by = None;
        }
    }

    /// All logical units.
    pub fn all_units(&self) -> impl Iterator<Item = UnitIndex> + use<> {
        (0..self.units.len()).map(UnitIndex)
    }

    /// Tells the initiator of `attentions` that `unit` was reset.
    pub fn note_reset(&self, attentions: &mut Attentions, unit: UnitIndex) {
        attentions.set(unit.0, asc::POWER_ON_OR_RESET);
    }

    /// Tells the initiator of `attentions` that another one ended its commands of `unit`.
    pub fn note_cleared(&self, attentions: &mut Attentions, unit: UnitIndex) {
        attentions.set(unit.0, asc::COMMANDS_CLEARED);
    }

    /// The target port groups and their states.
    pub fn set_groups(&mut self, groups: &[TargetPortGroup]) {
        self.groups = groups.to_vec();
    }

    /// Tells the initiator of `attentions` that access states changed.
    pub fn note_access_change(&self, attentions: &mut Attentions) {
        (0..self.units.len()).for_each(|unit| attentions.set(unit, asc::ALUA_STATE_CHANGED));
    }

    /// REPORT TARGET PORT GROUPS (SPC-4 6.37).
    fn report_groups(&mut self, cdb: &CdbBytes, reply: &mut Vec<Extent>) -> Step {
        // Only the format with a header of a length alone.
        if cdb[1] >> 5 > 1 {
            return Step::Failed(invalid_field());
        }
        let allocation_bytes = u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]) as usize;
        let mut data = encode_groups(&self.groups);
        if cdb[1] >> 5 == 1 {
            // The extended header: its format, and no time given for a transition.
            data.splice(4..4, [0x10, 0, 0, 0]);
            let len = (data.len() - 4) as u32;
            data[..4].copy_from_slice(&len.to_be_bytes());
        }
        data.truncate(allocation_bytes);
        self.pool.copy(&data, reply);
        Step::In { len: data.len() as u32 }
    }

    /// Tells the initiator of `attentions` that another one changed the mode parameters of `unit`.
    pub fn note_mode_change(&self, attentions: &mut Attentions, unit: UnitIndex) {
        attentions.set(unit.0, asc::MODE_PARAMETERS_CHANGED);
    }

    /// A session ended: what it held is free (SPC-2 5.5.1).
    pub fn nexus_lost(&mut self, nexus: NexusId) {
        for unit in &mut self.units {
            unit.reserved_by = unit.reserved_by.filter(|&holder| holder != nexus);
        }
    }

    /// Makes all that was written durable.
    pub fn flush(&mut self) -> std::io::Result<()> {
        self.units.iter_mut().try_for_each(|unit| unit.lu.flush())
    }

    fn report_luns(&mut self, cdb: &CdbBytes, reply: &mut Vec<Extent>) -> Step {
        let allocation_bytes = u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]) as usize;
        // SELECT REPORT: 0 and 2 ask for what there is, 1 for well-known logical units, of which there are none.
        if cdb[2] > 2 || allocation_bytes < 16 {
            return Step::Failed(invalid_field());
        }
        let listed = if cdb[2] == 1 { &[] } else { &self.units[..] };
        let mut data = Vec::with_capacity(8 + 8 * listed.len());
        data.extend_from_slice(&(8 * listed.len() as u32).to_be_bytes());
        data.extend_from_slice(&[0; 4]);
        listed.iter().for_each(|unit| data.extend_from_slice(&unit.lun.0));
        data.truncate(allocation_bytes);
        self.pool.copy(&data, reply);
        Step::In { len: data.len() as u32 }
    }

    /// What a LUN without a logical unit answers (SPC-4 5.10, SAM-5 5.11).
    fn no_unit(&mut self, cdb: &CdbBytes, reply: &mut Vec<Extent>) -> Step {
        const NOT_SUPPORTED: Sense = illegal(asc::LUN_NOT_SUPPORTED);
        match cdb[0] {
            op::INQUIRY if cdb[1] & 0x01 == 0 && cdb[2] == 0 => {
                // Peripheral qualifier 011b, device type 1Fh: no device can be here.
                let data = lu::standard_inquiry(0x7F, false);
                let len = data.len().min(usize::from(u16::from_be_bytes([cdb[3], cdb[4]])));
                self.pool.copy(&data[..len], reply);
                Step::In { len: len as u32 }
            }
            op::REQUEST_SENSE => request_sense(&mut self.pool, cdb, &NOT_SUPPORTED, false, reply),
            _ => Step::Failed(NOT_SUPPORTED),
        }
    }
}

/// UNIT ATTENTION with a code.
fn attention(code: u16) -> Sense {
    Sense::new(SenseKey::UnitAttention, code)
}

/// Commands that a port carries out in every access state (SPC-4 5.15.2.4.4, 5.15.2.4.5).
fn allowed_without_access(cdb: &CdbBytes) -> bool {
    matches!(cdb[0], op::INQUIRY | op::MODE_SENSE_6 | op::MODE_SENSE_10)
        || (cdb[0] == op::MAINTENANCE_IN && cdb[1] & 0x1F == op::SA_REPORT_SUPPORTED_OPCODES)
}

/// What a port answers to the other commands.
fn no_access(state: AccessState) -> Sense {
    let code = match state {
        AccessState::Standby => asc::ALUA_STANDBY,
        AccessState::Transitioning => asc::ALUA_TRANSITION,
        _ => asc::ALUA_UNAVAILABLE,
    };
    Sense::new(SenseKey::NotReady, code)
}

/// SPC-2 table 10: commands that another initiator's reservation does not keep out.
fn allowed_in_spite_of_reservation(cdb: &CdbBytes) -> bool {
    match cdb[0] {
        op::READ_CAPACITY_10 | op::SERVICE_ACTION_IN_16 => true,
        op::PREVENT_ALLOW => cdb[4] & 0x03 == 0,
        _ => false,
    }
}

fn request_sense(
    pool: &mut Pool,
    cdb: &CdbBytes,
    sense: &Sense,
    unit_descriptor: bool,
    reply: &mut Vec<Extent>,
) -> Step {
    let mut data = [0; 32];
    // DESC asks for the descriptor format.
    let len = encode_sense(sense, cdb[1] & 0x01 != 0 || unit_descriptor, &mut data);
    let len = len.min(usize::from(cdb[4]));
    pool.copy(&data[..len], reply);
    Step::In { len: len as u32 }
}

/// Encodes sense data in one of the two formats (SPC-4 4.5); returns its length.
fn encode_sense(sense: &Sense, descriptor: bool, out: &mut [u8; 32]) -> usize {
    out.fill(0);
    if !descriptor {
        let fixed = sense.encode_fixed();
        out[..fixed.len()].copy_from_slice(&fixed);
        return fixed.len();
    }
    out[0] = 0x72;
    out[1] = sense.key as u8;
    out[2..4].copy_from_slice(&sense.code.to_be_bytes());
    match sense.information {
        None => 8,
        Some(information) => {
            out[7] = 12;
            out[9] = 0x0A;
            out[10] = 0x80;
            out[12..20].copy_from_slice(&information.to_be_bytes());
            20
        }
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;

//! The judge of the initiator: what each of its PDUs must be in this session, by RFC 7143. A breach is noted in words
//! with the section; [`BadTarget::judge`](super::BadTarget::judge) fails a test for it.

use iscsi::pdu::{Bhs, Itt, LogoutRequest, NopOut, ScsiCommand, TaskFunction, TaskManagementRequest};
use iscsi::scsi::Lun;
use iscsi::serial::Serial;

use super::send::Conn;

/// What every request carries: the immediate bit, CmdSN, ExpStatSN, and that nothing follows a logout.
pub fn request(conn: &mut Conn, bhs: &Bhs) -> Vec<String> {
    let mut wrong = Vec::new();
    let (cmd_sn, exp_stat_sn) = (word(bhs, 24), word(bhs, 28));
    let name = bhs.opcode().map_or("unknown opcode".into(), |o| format!("{o}"));
    if conn.logged_out {
        wrong.push(format!("{name} after a Logout (11.14)"));
    }
    // Data-Out has no CmdSN.
    if bhs.opcode_bits() != 0x05 {
        if cmd_sn != conn.exp_cmd_sn {
            wrong.push(format!("{name}: CmdSN {} where {} is next (4.2.2.1)", cmd_sn.0, conn.exp_cmd_sn.0));
        }
        if !bhs.immediate() {
            if cmd_sn.is_after(conn.max_told) {
                wrong
                    .push(format!("{name}: CmdSN {} above MaxCmdSN {} (4.2.2.1)", cmd_sn.0, conn.max_told.0));
            }
            conn.exp_cmd_sn = cmd_sn.next();
        }
    }
    wrong.extend(acknowledges(conn, exp_stat_sn, &name));
    wrong
}

fn word(bhs: &Bhs, at: usize) -> Serial {
    Serial(u32::from_be_bytes([bhs.0[at], bhs.0[at + 1], bhs.0[at + 2], bhs.0[at + 3]]))
}

fn acknowledges(conn: &mut Conn, exp_stat_sn: Serial, name: &str) -> Option<String> {
    let told = conn.acknowledged;
    if exp_stat_sn.is_before(told) || exp_stat_sn.is_after(conn.stat_sn) {
        return Some(format!(
            "{name}: ExpStatSN {} not from {} to {} (4.2.2.2)",
            exp_stat_sn.0, told.0, conn.stat_sn.0
        ));
    }
    conn.acknowledged = exp_stat_sn;
    None
}

/// A SCSI Command.
pub fn command(conn: &Conn, c: &ScsiCommand, lun: Lun) -> Vec<String> {
    let mut wrong = Vec::new();
    let Some(n) = &conn.negotiated else { return vec!["a command before full feature phase".into()] };
    let mut say = |what: String| wrong.push(format!("command {:#x}: {what}", c.itt.0));
    if c.itt == Itt::NONE {
        say("the reserved task tag (11.2.1.8)".into());
    }
    if conn.tasks.contains_key(&c.itt.0) || conn.hung.iter().any(|t| t.command.itt == c.itt) {
        say("the tag of a live task (11.2.1.8)".into());
    }
    if conn.tasks.values().any(|t| t.unsolicited.is_some()) {
        say("before the unsolicited data of the command before (4.2.5.2)".into());
    }
    // REPORT LUNS may go to LUN 0, whatever there is.
    if c.lun != lun && c.cdb[0] != iscsi::scsi::opcode::REPORT_LUNS {
        say(format!("LUN {:02x?}, not {:02x?} (11.2.1.7)", c.lun.0, lun.0));
    }
    let immediate = c.data_len_bytes;
    let most = n.first_burst_bytes.min(c.expected_len_bytes);
    if immediate > 0 && (!n.immediate_data || !c.write) {
        say("immediate data without agreement (13.11)".into());
    }
    if immediate > most || immediate > n.max_recv_data_segment_bytes {
        say(format!("{immediate} bytes of immediate data (13.12, 13.14)"));
    }
    if !c.final_bit && (n.initial_r2t || !c.write || immediate >= most) {
        say("F=0, but no unsolicited data may follow (11.3.1)".into());
    }
    if c.write && !n.initial_r2t && c.final_bit && immediate > 0 && immediate < most {
        say(format!("{immediate} of {most} bytes sent, but F=1 (11.3.4)"));
    }
    wrong
}

/// A NOP-Out.
pub fn nop_out(conn: &mut Conn, pdu: &NopOut) -> Vec<String> {
    let mut wrong = Vec::new();
    if pdu.itt == Itt::NONE {
        if !pdu.immediate {
            wrong.push("NOP-Out without tag and not immediate (11.18.1)".into());
        }
        if !pdu.ttt.is_none() {
            match conn.pings.remove(&pdu.ttt.0) {
                None => wrong.push(format!("NOP-Out answers no ping: {:#x} (11.18.2)", pdu.ttt.0)),
                Some(lun) if lun != pdu.lun => {
                    wrong.push("NOP-Out with another LUN than the ping (11.18)".into());
                }
                Some(_) => {}
            }
        }
    } else if !pdu.ttt.is_none() {
        wrong.push("NOP-Out with both tags (11.18)".into());
    }
    wrong
}

/// A Task Management Function Request.
pub fn task_management(conn: &Conn, pdu: &TaskManagementRequest, lun: Lun) -> Vec<String> {
    let mut wrong = Vec::new();
    if !pdu.immediate {
        wrong.push("task management that is not immediate (11.5.1)".into());
    }
    if pdu.lun != lun {
        wrong.push("task management with a wrong LUN (11.5.3)".into());
    }
    let task = conn.tasks.get(&pdu.referenced_itt.0);
    let task = task.or_else(|| conn.hung.iter().find(|t| t.command.itt == pdu.referenced_itt));
    if pdu.function == TaskFunction::AbortTask {
        if pdu.referenced_itt.is_none() {
            wrong.push("ABORT TASK of no task (11.5.4)".into());
        }
        if task.is_some_and(|t| t.command.cmd_sn != pdu.ref_cmd_sn) {
            wrong.push("ABORT TASK with another RefCmdSN than the command's (11.5.5)".into());
        }
    } else if !pdu.referenced_itt.is_none() {
        wrong.push("a function on a task set that names a task (11.5.4)".into());
    }
    wrong
}

/// A Logout Request.
pub fn logout(pdu: &LogoutRequest, cid: u16) -> Vec<String> {
    let close_session = iscsi::pdu::LogoutReason::CloseSession;
    if pdu.reason != close_session && pdu.cid != cid {
        return vec!["Logout of another connection (11.14.3)".into()];
    }
    Vec::new()
}

//! Tests of the session against hand-made PDUs ([`rules`]), against time ([`time`]) and against the target machine of
//! this crate ([`joined`]).

mod export;
mod joined;
mod rules;
mod time;

use std::time::{Duration, Instant};

use super::{Command, Config, Direction, Event, Outcome, Place, Session, SessionError, TxPdu};
use crate::pdu::{
    Bhs, DataIn, DataInStatus, InitiatorPdu, Itt, NopIn, Pdu, R2t, Residual, ScsiCommand, ScsiResponse,
    ScsiResponseCode, TargetSn, Ttt,
};
use crate::scsi::{Cdb, Lun, Sense, Status};
use crate::serial::Serial;

/// Where the counters start: short of the wrap, so that every test of some length crosses it.
const FIRST_CMD_SN: u32 = 0xFFFF_FFF0;
const FIRST_STAT_SN: u32 = 0xFFFF_FFFA;
const WINDOW: u32 = 64;

fn config() -> Config {
    Config {
        slots: 32,
        cmd_sn: Serial(FIRST_CMD_SN),
        exp_stat_sn: Serial(FIRST_STAT_SN),
        max_cmd_sn: Serial(FIRST_CMD_SN).add(WINDOW - 1),
        cid: 0,
        initial_r2t: false,
        immediate_data: true,
        first_burst_bytes: 8192,
        max_burst_bytes: 16384,
        max_send_bytes: 4096,
        max_receive_bytes: 8192,
        max_outstanding_r2t: 2,
        header_digest: false,
        data_digest: false,
        nop_interval: Duration::from_secs(5),
        nop_timeout: Duration::from_secs(5),
        task_management_timeout: Duration::from_secs(5),
        logout_timeout: Duration::from_secs(2),
    }
}

fn read(len_bytes: u32) -> Command {
    Command {
        lun: Lun::from_number(300),
        cdb: Cdb::read(0, len_bytes / 512),
        direction: Direction::Read,
        len_bytes,
        exact: true,
        timeout: Duration::from_secs(30),
    }
}

fn write(len_bytes: u32) -> Command {
    Command { cdb: Cdb::write(0, len_bytes / 512, false), direction: Direction::Write, ..read(len_bytes) }
}

/// A session and the hand that plays the target.
struct Bench {
    session: Session,
    now: Instant,
    stat_sn: Serial,
    exp_cmd_sn: Serial,
    max_cmd_sn: Serial,
}

impl Bench {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: Config) -> Self {
        let now = Instant::now();
        let (stat_sn, cmd_sn, max_cmd_sn) = (config.exp_stat_sn, config.cmd_sn, config.max_cmd_sn);
        Self { session: Session::new(config, now), now, stat_sn, exp_cmd_sn: cmd_sn, max_cmd_sn }
    }

    fn submit(&mut self, slot: u16, command: Command) {
        self.session.submit(slot, command, self.now);
    }

    fn next_tx(&mut self) -> Option<(InitiatorPdu, TxPdu)> {
        let tx = self.session.next_pdu(self.now)?;
        let bhs = Bhs(tx.header()[..48].try_into().unwrap());
        let pdu = InitiatorPdu::decode(&bhs).unwrap();
        if let InitiatorPdu::ScsiCommand(command) = &pdu {
            self.exp_cmd_sn = command.cmd_sn.next();
            self.max_cmd_sn = self.exp_cmd_sn.add(WINDOW - 1);
        }
        Some((pdu, tx))
    }

    /// Everything that is to be sent.
    fn sent(&mut self) -> Vec<(InitiatorPdu, TxPdu)> {
        std::iter::from_fn(|| self.next_tx()).collect()
    }

    /// Submits a command, sends it, and gives it.
    fn start(&mut self, slot: u16, command: Command) -> ScsiCommand {
        self.submit(slot, command);
        match self.next_tx() {
            Some((InitiatorPdu::ScsiCommand(pdu), _)) => pdu,
            other => panic!("{other:?}"),
        }
    }

    fn sn(&mut self) -> TargetSn {
        TargetSn { stat_sn: self.stat_sn.take(), exp_cmd_sn: self.exp_cmd_sn, max_cmd_sn: self.max_cmd_sn }
    }

    /// The session receives a PDU; where its data went.
    fn take(&mut self, bhs: &Bhs, inline: &[u8]) -> Result<Place, SessionError> {
        let place = self.session.header(bhs, self.now)?;
        self.session.end(inline, true)?;
        Ok(place)
    }

    fn data_in(
        &mut self,
        itt: Itt,
        data_sn: u32,
        offset_bytes: u32,
        len_bytes: u32,
        end: End,
    ) -> Result<Place, SessionError> {
        let pdu = self.data_in_pdu(itt, data_sn, offset_bytes, len_bytes, end);
        self.take(&pdu.encode(), &[])
    }

    fn data_in_pdu(&mut self, itt: Itt, data_sn: u32, offset_bytes: u32, len_bytes: u32, end: End) -> DataIn {
        let status = match end {
            End::More | End::Burst => None,
            End::Good(residual) => Some(DataInStatus { status: 0, residual, stat_sn: self.stat_sn.take() }),
        };
        DataIn {
            final_bit: end != End::More,
            ack: false,
            status,
            data_len_bytes: len_bytes,
            lun: Lun::ZERO,
            itt,
            ttt: Ttt::NONE,
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
            data_sn: Serial(data_sn),
            offset_bytes,
        }
    }

    fn response_pdu(&mut self, itt: Itt) -> ScsiResponse {
        ScsiResponse {
            response: ScsiResponseCode::Completed,
            status: 0,
            residual: Residual::None,
            bidi_residual: Residual::None,
            data_len_bytes: 0,
            itt,
            snack_tag: 0,
            sn: self.sn(),
            exp_data_sn: Serial(0),
        }
    }

    fn good(&mut self, itt: Itt) -> Result<Place, SessionError> {
        let pdu = self.response_pdu(itt);
        self.take(&pdu.encode(), &[])
    }

    fn check_condition(&mut self, itt: Itt, sense: Sense) -> Result<Place, SessionError> {
        let mut data = vec![0, Sense::FIXED_BYTES as u8];
        data.extend_from_slice(&sense.encode_fixed());
        let pdu = ScsiResponse { status: 2, data_len_bytes: data.len() as u32, ..self.response_pdu(itt) };
        self.take(&pdu.encode(), &data)
    }

    fn r2t(
        &mut self,
        itt: Itt,
        r2t_sn: u32,
        offset_bytes: u32,
        len_bytes: u32,
    ) -> Result<Place, SessionError> {
        let pdu = R2t {
            lun: Lun::from_number(300),
            itt,
            ttt: Ttt(0x77 + r2t_sn),
            sn: TargetSn { stat_sn: self.stat_sn, exp_cmd_sn: self.exp_cmd_sn, max_cmd_sn: self.max_cmd_sn },
            r2t_sn: Serial(r2t_sn),
            offset_bytes,
            desired_len_bytes: len_bytes,
        };
        self.take(&pdu.encode(), &[])
    }

    fn ping(&mut self, ttt: Ttt, lun: Lun) -> Result<Place, SessionError> {
        let pdu = NopIn {
            data_len_bytes: 0,
            lun,
            itt: Itt::NONE,
            ttt,
            sn: TargetSn { stat_sn: self.stat_sn, exp_cmd_sn: self.exp_cmd_sn, max_cmd_sn: self.max_cmd_sn },
        };
        self.take(&pdu.encode(), &[])
    }

    /// The outcome of the one command that ended.
    fn outcome(&mut self) -> Option<(u16, Outcome)> {
        let event = self.session.next_event()?;
        assert_eq!(self.session.next_event(), None);
        match event {
            Event::Done { slot, outcome } => Some((slot, outcome)),
            other => panic!("{other:?}"),
        }
    }
}

/// What a Data-In ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    More,
    Burst,
    Good(Residual),
}

fn status_good(transferred_bytes: u32) -> Outcome {
    Outcome::Status { status: Status::GOOD, sense: None, transferred_bytes }
}

//! An initiator that logs in to a hostile target.
//!
//! Holds: no panic, an end after a bounded number of PDUs, and no login without the proof that mutual CHAP asks for.
#![no_main]

use iscsi::chap::{Account, Algorithm, Entropy, Secret};
use iscsi::login::initiator::{Auth, Chap, Config, Login, Progress};
use iscsi::login::{LoginPdu, MAX_LOGIN_PDUS};
use iscsi::pdu::{Bhs, Isid, LoginRequest, LoginResponse, Pdu, TargetSn};
use iscsi::serial::Serial;
use libfuzzer_sys::fuzz_target;

fn account(name: &str, secret: &str) -> Account {
    Account::new(name, Secret::new(secret).unwrap()).unwrap()
}

/// A right answer's header with the given flags and status, so that the fuzzer need not guess tags and numbers.
fn header(request: &LoginPdu, stat_sn: u32, flags: u8, status: u8) -> Bhs {
    let request = LoginRequest::decode(&request.header).unwrap();
    let sn = Serial(stat_sn);
    let mut bhs = LoginResponse {
        transit: None,
        continues: false,
        stage: request.stage,
        version_max: 0,
        version_active: 0,
        data_len_bytes: 0,
        isid: request.isid,
        tsih: 1,
        itt: request.itt,
        sn: TargetSn { stat_sn: sn, exp_cmd_sn: request.cmd_sn, max_cmd_sn: request.cmd_sn.add(8) },
        status_class: status >> 6,
        status_detail: status & 0x0F,
    }
    .encode();
    bhs.0[1] ^= flags & !0x0C;
    bhs
}

fuzz_target!(|input: &[u8]| {
    let Some((&mode, mut input)) = input.split_first() else { return };
    let mut config = Config::new("iqn.2026-11.example:me", Isid::random([1, 2, 3], 4));
    config.target_name = (mode & 1 == 0).then(|| "iqn.2026-11.example:disk".to_owned());
    let mutual = mode & 4 != 0;
    if mode & 2 != 0 {
        config.auth = Auth::Chap(Chap {
            account: account("me", "initiator secret"),
            target: mutual.then(|| account("disk", "a secret that the fuzzer cannot know")),
            algorithms: Algorithm::DEFAULT_OFFER.to_vec(),
            entropy: Entropy([7; 33]),
        });
    }
    let (mut login, mut request) = Login::start(config).unwrap();
    for stat_sn in 0.. {
        assert!(stat_sn <= MAX_LOGIN_PDUS);
        let Some((&[flags, status, len], rest)) = input.split_first_chunk::<3>() else { return };
        let (data, rest) = rest.split_at(rest.len().min(usize::from(len)));
        input = rest;
        // Mostly success; else what the byte says.
        let status = if status < 0xF0 { 0 } else { status << 4 };
        match login.receive(&header(&request, stat_sn, flags, status), data) {
            Ok(Progress::Send(next)) => request = next,
            Ok(Progress::Done(_)) => {
                assert!(mode & 2 == 0 || !mutual, "let in by a target that has proved nothing");
                return;
            }
            Ok(Progress::Moved(moved)) => {
                assert!(!moved.addresses.is_empty());
                return;
            }
            Err(_) => return,
        }
    }
});

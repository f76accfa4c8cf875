//! A target that a hostile initiator logs in to.
//!
//! Holds: no panic, an end after a bounded number of PDUs, and nobody gets as far as the look at the sessions without
//! the secret.
#![no_main]

use std::sync::Arc;

use iscsi::chap::{Account, Entropy, Secret};
use iscsi::discovery::TargetAddress;
use iscsi::login::MAX_LOGIN_PDUS;
use iscsi::login::target::{Auth, Chap, Config, Decision, Login, Progress, TargetConfig};
use iscsi::params::Params;
use iscsi::pdu::{Bhs, Isid, Itt, LoginRequest, Pdu, Stage};
use iscsi::serial::Serial;
use libfuzzer_sys::fuzz_target;

fn account(name: &str, secret: &str) -> Account {
    Account::new(name, Secret::new(secret).unwrap()).unwrap()
}

fn config() -> Config {
    let chap = || {
        let accounts = vec![account("me", "a secret that the fuzzer cannot know")];
        Auth::Chap(Chap::new(accounts, Some(account("disk", "target's own secret"))).unwrap())
    };
    let mut closed = TargetConfig::new("iqn.a");
    closed.auth = chap();
    let mut moved = TargetConfig::new("iqn.c");
    moved.moved = Some((false, vec![TargetAddress::parse("h:1,1").unwrap()]));
    Config {
        targets: vec![closed, TargetConfig::new("iqn.b"), moved],
        portal_group_tag: 1,
        discovery_auth: chap(),
        params: Params::default(),
        command_window: 16,
    }
}

/// A right request's header with the given flags, so that the fuzzer need not guess tags and numbers.
fn header(flags: u8) -> Bhs {
    let mut bhs = LoginRequest {
        transit: None,
        continues: false,
        stage: Stage::Security,
        version_max: 0,
        version_min: 0,
        data_len_bytes: 0,
        isid: Isid::random([1, 2, 3], 4),
        tsih: 0,
        itt: Itt(1),
        cid: 0,
        cmd_sn: Serial(1),
        exp_stat_sn: Serial(0),
    }
    .encode();
    bhs.0[1] = flags;
    bhs
}

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let mut login = Login::new(Arc::new(config()), Entropy([7; 33]), Serial(0xFFFF_FFFE));
    for count in 0.. {
        assert!(count <= MAX_LOGIN_PDUS);
        let Some((&[flags, len], rest)) = input.split_first_chunk::<2>() else { return };
        let (data, rest) = rest.split_at(rest.len().min(usize::from(len)));
        input = rest;
        match login.receive(&header(flags), data) {
            Progress::Send(_) => {}
            Progress::Decide(claim) => {
                assert_eq!(claim.target, Some(1), "let in without the secret");
                match login.decide(Decision::Accept { tsih: 3 }) {
                    Progress::Done(_, logged_in) => assert_eq!(logged_in.nexus.tsih, 3),
                    other => panic!("{other:?}"),
                }
                return;
            }
            Progress::Done(..) => panic!("done without a decision"),
            Progress::Failed(_, error) => {
                assert_ne!(error.status().class, 0);
                return;
            }
        }
    }
});

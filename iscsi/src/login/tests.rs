//! Both login machines joined back to back, and each against a peer that breaks the rules.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;

use super::initiator::{self, Progress as InitiatorProgress};
use super::target::{self, Decision, Progress as TargetProgress};
use super::*;
use crate::chap::{Account, Algorithm, Entropy, Secret};
use crate::discovery::TargetAddress;
use crate::params::{DigestPolicy, Params, SessionType, TaskReporting};
use crate::pdu::framing::{Limits, Receiver, Step};
use crate::pdu::{Itt, LoginRequest, LoginResponse, Pdu, Stage};
use crate::text;

const DISK: &str = "iqn.2026-11.example:disk";
const ME: &str = "iqn.2026-11.example:me";

fn account(name: &str, secret: &str) -> Account {
    Account::new(name, Secret::new(secret).unwrap()).unwrap()
}

fn initiator_config() -> initiator::Config {
    let mut config = initiator::Config::new(ME, Isid::random([1, 2, 3], 4));
    config.target_name = Some(DISK.into());
    config.cmd_sn = Serial(0xFFFF_FFFF);
    config
}

fn initiator_chap(mutual: bool) -> initiator::Chap {
    initiator::Chap {
        account: account("me", "initiator secret"),
        target: mutual.then(|| account("disk", "target's own secret")),
        algorithms: Algorithm::DEFAULT_OFFER.to_vec(),
        entropy: Entropy([1; 33]),
    }
}

fn target_config() -> target::Config {
    target::Config {
        targets: vec![
            target::TargetConfig::new("iqn.2026-11.example:other"),
            target::TargetConfig::new(DISK),
        ],
        portal_group_tag: 7,
        discovery_auth: target::Auth::None,
        params: Params::default(),
        command_window: 32,
    }
}

fn target_chap() -> target::Chap {
    let accounts = vec![account("you", "another secret"), account("me", "initiator secret")];
    target::Chap::new(accounts, Some(account("disk", "target's own secret"))).unwrap()
}

fn with_auth(auth: target::Chap) -> target::Config {
    let mut config = target_config();
    config.targets[1].auth = target::Auth::Chap(auth);
    config
}

/// Sends a PDU through the framing, in pieces.
fn through_wire(pdu: &LoginPdu, cuts: &[prop::sample::Index]) -> (Bhs, Vec<u8>) {
    let mut bytes = Vec::new();
    pdu.write(&mut bytes);
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    let mut rx = Receiver::new(Limits::default());
    let mut data = Vec::new();
    for piece in cuts.windows(2) {
        let mut piece = &bytes[piece[0]..piece[1]];
        while !piece.is_empty() || matches!(rx.step(), Step::Header) {
            match rx.step() {
                Step::Framing { .. } => piece = &piece[rx.feed(piece).unwrap()..],
                Step::Header => rx.accept(),
                Step::Data { len_bytes, .. } => {
                    let (now, later) = piece.split_at(piece.len().min(len_bytes as usize));
                    rx.data(now);
                    data.extend_from_slice(now);
                    piece = later;
                }
                Step::Done { .. } => unreachable!("bytes behind the PDU"),
            }
        }
    }
    assert_eq!(rx.step(), Step::Done { data_digest_ok: true });
    (*rx.header(), data)
}

/// Splits a PDU's text over several PDUs with the C bit.
fn split_text(pdu: &LoginPdu, segment_bytes: usize, first_stat_sn: Option<Serial>) -> Vec<LoginPdu> {
    let chunks: Vec<&[u8]> =
        if pdu.data.is_empty() { vec![&[]] } else { pdu.data.chunks(segment_bytes).collect() };
    let last = chunks.len() - 1;
    let split = chunks.into_iter().enumerate().map(|(index, chunk)| {
        let mut header = pdu.header;
        if index != last {
            // T, NSG off; C on.
            header.0[1] = (header.0[1] & 0x0C) | 0x40;
        }
        header.set_data_len(chunk.len() as u32);
        if let Some(first) = first_stat_sn {
            header.0[24..28].copy_from_slice(&first.add(index as u32).0.to_be_bytes());
        }
        LoginPdu { header, data: chunk.to_vec() }
    });
    split.collect()
}

#[derive(Debug)]
struct Outcome {
    initiator: Result<InitiatorProgress, initiator::LoginError>,
    target: Result<Box<target::LoggedIn>, target::LoginError>,
}

/// How texts are cut on the way.
struct Wire {
    cuts: Vec<prop::sample::Index>,
    segment_bytes: usize,
}

fn whole() -> Wire {
    Wire { cuts: Vec::new(), segment_bytes: MAX_LOGIN_DATA_BYTES }
}

/// Logs in, with the text of both sides split over more PDUs than the machines would use.
fn log_in(initiator: initiator::Config, target: target::Config, decision: Decision, wire: &Wire) -> Outcome {
    let mut responder = target::Login::new(Arc::new(target), Entropy([2; 33]), Serial(0xFFFF_FFFE));
    let (mut login, mut request) = initiator::Login::start(initiator).unwrap();
    // Splitting responses shifts StatSN.
    let mut stat_sn = Serial(0xFFFF_FFFE);
    loop {
        let mut parts = split_text(&request, wire.segment_bytes, None);
        let last = parts.pop().unwrap();
        for part in parts {
            let (header, data) = through_wire(&part, &wire.cuts);
            match responder.receive(&header, &data) {
                TargetProgress::Send(empty) => assert!(empty.data.is_empty()),
                other => panic!("answer to an unfinished text: {other:?}"),
            }
        }
        let (header, data) = through_wire(&last, &wire.cuts);
        let mut progress = responder.receive(&header, &data);
        if let TargetProgress::Decide(claim) = &progress {
            assert_eq!(claim.initiator_name, ME);
            progress = responder.decide(decision);
        }
        let (response, end) = match progress {
            TargetProgress::Send(response) => (response, None),
            TargetProgress::Done(response, logged_in) => (response, Some(Ok(logged_in))),
            TargetProgress::Failed(response, error) => (response, Some(Err(error))),
            TargetProgress::Decide(_) => panic!("asked twice"),
        };
        let mut parts = split_text(&response, wire.segment_bytes, Some(stat_sn));
        stat_sn = stat_sn.add(parts.len() as u32);
        let last = parts.pop().unwrap();
        if !matches!(end, Some(Err(_))) {
            for part in parts {
                let (header, data) = through_wire(&part, &wire.cuts);
                match login.receive(&header, &data) {
                    Ok(InitiatorProgress::Send(empty)) => assert!(empty.data.is_empty()),
                    other => return Outcome { initiator: other, target: Err(target::LoginError::Endless) },
                }
            }
        }
        let (header, data) = through_wire(&last, &wire.cuts);
        match (login.receive(&header, &data), end) {
            (Ok(InitiatorProgress::Send(next)), None) => request = next,
            (initiator, Some(target)) => return Outcome { initiator, target },
            (initiator, None) => {
                return Outcome { initiator, target: Err(target::LoginError::Protocol("left alone")) };
            }
        }
    }
}

fn accept() -> Decision {
    Decision::Accept { tsih: 9 }
}

fn expect_success(outcome: Outcome) -> (Box<initiator::LoggedIn>, Box<target::LoggedIn>) {
    match outcome {
        Outcome { initiator: Ok(InitiatorProgress::Done(initiator)), target: Ok(target) } => {
            (initiator, target)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_authentication() {
    let (initiator, target) = expect_success(log_in(initiator_config(), target_config(), accept(), &whole()));
    assert_eq!(initiator.nexus.tsih, 9);
    assert_eq!(initiator.nexus, Nexus { stat_sn: initiator.nexus.stat_sn, ..target.nexus });
    assert_eq!(initiator.nexus.cmd_sn, Serial(0xFFFF_FFFF));
    assert_eq!(initiator.nexus.max_cmd_sn, Serial(30));
    assert_eq!(initiator.portal_group_tag, Some(7));
    assert_eq!(target.claim.target, Some(1));
    assert!(!initiator.negotiated.initial_r2t && initiator.negotiated.immediate_data);
    assert_eq!(initiator.negotiated.max_burst_bytes, 1024 * 1024);
}

#[test]
fn discovery_session() {
    let config = initiator::Config { target_name: None, ..initiator_config() };
    let (initiator, target) = expect_success(log_in(config, target_config(), accept(), &whole()));
    assert_eq!(initiator.negotiated.session_type, SessionType::Discovery);
    assert_eq!(target.claim.target, None);
}

/// Checklist line 40 (RFC 7143 12.1.3).
#[test]
fn chap_one_way_and_mutual_with_every_algorithm() {
    for mutual in [false, true] {
        for algorithm in Algorithm::STRONGEST_FIRST {
            let chap = target::Chap { algorithms: vec![algorithm], ..target_chap() };
            let auth = initiator::Auth::Chap(initiator_chap(mutual));
            let config = initiator::Config { auth, ..initiator_config() };
            let (initiator, target) = expect_success(log_in(config, with_auth(chap), accept(), &whole()));
            assert_eq!(initiator.chap_algorithm, Some(algorithm));
            assert_eq!(target.chap_name.as_deref(), Some("me"));
        }
    }
}

fn refused(outcome: Outcome) -> (LoginStatus, target::LoginError) {
    match outcome {
        Outcome { initiator: Err(initiator::LoginError::Refused(status)), target: Err(error) } => {
            assert_eq!(status, error.status());
            (status, error)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn refusals() {
    let with_chap = |change: &dyn Fn(&mut initiator::Chap)| {
        let mut chap = initiator_chap(true);
        change(&mut chap);
        initiator::Config { auth: initiator::Auth::Chap(chap), ..initiator_config() }
    };
    let run = |initiator, target| refused(log_in(initiator, target, accept(), &whole())).0;

    let wrong_secret = with_chap(&|chap| chap.account = account("me", "not the secret"));
    assert_eq!(run(wrong_secret, with_auth(target_chap())), LoginStatus::AUTHENTICATION_FAILURE);
    let wrong_name = with_chap(&|chap| chap.account = account("nobody", "initiator secret"));
    assert_eq!(run(wrong_name, with_auth(target_chap())), LoginStatus::AUTHENTICATION_FAILURE);
    assert_eq!(run(initiator_config(), with_auth(target_chap())), LoginStatus::AUTHENTICATION_FAILURE);
    let one_way = target::Chap { own: None, ..target_chap() };
    let (status, error) = refused(log_in(with_chap(&|_| ()), with_auth(one_way), accept(), &whole()));
    assert_eq!(status, LoginStatus::AUTHENTICATION_FAILURE);
    assert_eq!(error, target::LoginError::MutualUnsupported);
    // The initiator answers with the target's own secret: a reflected response.
    let reflecting = with_chap(&|chap| {
        chap.account = account("me", "target's own secret");
        chap.target = None;
    });
    let (_, error) = refused(log_in(reflecting, with_auth(target_chap()), accept(), &whole()));
    assert_eq!(error, target::LoginError::Chap(crate::chap::ChapError::ReflectedResponse));

    let no_target = initiator::Config { target_name: Some("iqn.none".into()), ..initiator_config() };
    assert_eq!(run(no_target, target_config()), LoginStatus::NOT_FOUND);
    let mut closed = target_config();
    closed.targets[1].initiators = Some(vec!["iqn.2026-11.example:you".into()]);
    assert_eq!(run(initiator_config(), closed), LoginStatus::AUTHORIZATION_FAILURE);
    let mut digests = target_config();
    digests.params.header_digest = DigestPolicy::Require;
    let mut off = initiator_config();
    off.params.header_digest = DigestPolicy::Off;
    assert_eq!(run(off, digests), LoginStatus::INITIATOR_ERROR);

    let no_session = Decision::Refuse(LoginStatus::NO_SESSION);
    let (status, _) = refused(log_in(initiator_config(), target_config(), no_session, &whole()));
    assert_eq!(status, LoginStatus::NO_SESSION);
    assert_eq!(status.to_string(), "there is no such session to add a connection to (status 020a)");
}

/// Checklist line 40 (RFC 7143 12.1.3, 9.2.1): before full feature phase.
#[test]
fn target_has_to_prove_itself() {
    let mut chap = initiator_chap(true);
    chap.target = Some(account("disk", "what the target should know"));
    let config = initiator::Config { auth: initiator::Auth::Chap(chap), ..initiator_config() };
    let outcome = log_in(config, with_auth(target_chap()), accept(), &whole());
    let error = outcome.initiator.unwrap_err();
    assert_eq!(error, initiator::LoginError::Chap(crate::chap::ChapError::WrongResponse));

    let mut chap = initiator_chap(true);
    chap.target = Some(account("tape", "target's own secret"));
    let config = initiator::Config { auth: initiator::Auth::Chap(chap), ..initiator_config() };
    let error = log_in(config, with_auth(target_chap()), accept(), &whole()).initiator.unwrap_err();
    assert_eq!(error, initiator::LoginError::Chap(crate::chap::ChapError::WrongName("disk".into())));
}

/// Checklist line 40 (RFC 7143 9.2.1).
#[test]
fn challenge_reflected_to_the_target() {
    // Both sides with the same random bytes: the initiator itself sees that its challenge is the target's.
    let mut chap = initiator_chap(true);
    chap.entropy = Entropy([2; 33]);
    let config = initiator::Config { auth: initiator::Auth::Chap(chap), ..initiator_config() };
    let error = log_in(config, with_auth(target_chap()), accept(), &whole()).initiator.unwrap_err();
    assert_eq!(error, initiator::LoginError::Chap(crate::chap::ChapError::ReflectedChallenge));
}

#[test]
fn redirection() {
    let mut config = target_config();
    let address = TargetAddress::parse("[fe80::1]:3261,5").unwrap();
    config.targets[1].moved = Some((true, vec![address.clone()]));
    let outcome = log_in(initiator_config(), config, accept(), &whole());
    let moved = initiator::Moved {
        permanently: true,
        addresses: vec![TargetAddress { portal_group_tag: None, ..address }],
    };
    assert_eq!(outcome.initiator, Ok(InitiatorProgress::Moved(moved)));
}

/// Checklist line 40 (RFC 7143 9.2.1): equal secrets among others.
#[test]
fn configurations_that_cannot_be() {
    let bad = |change: &dyn Fn(&mut initiator::Config)| {
        let mut config = initiator_config();
        change(&mut config);
        initiator::Login::start(config).unwrap_err().to_string()
    };
    assert_eq!(bad(&|c| c.initiator_name = "me".into()), "initiator name `me` is not an iSCSI name");
    assert_eq!(bad(&|c| c.target_name = Some("a\0b".into())), "target name `a\\0b` is not an iSCSI name");
    let chap = |change: &dyn Fn(&mut initiator::Chap)| {
        let mut chap = initiator_chap(true);
        change(&mut chap);
        let config = initiator::Config { auth: initiator::Auth::Chap(chap), ..initiator_config() };
        initiator::Login::start(config).unwrap_err()
    };
    let equal = chap(&|c| c.target = Some(account("disk", "initiator secret")));
    assert_eq!(equal, crate::chap::ChapError::EqualSecrets.into());
    assert_eq!(chap(&|c| c.algorithms.clear()), crate::chap::ChapError::Md5NotOffered.into());
    let accounts = vec![account("me", "same")];
    assert!(target::Chap::new(accounts, Some(account("disk", "same"))).is_err());
}

/// The target's answer to one request made by hand.
fn target_answer(text: &[(&str, &str)], change: impl Fn(&mut LoginRequest)) -> TargetProgress {
    let mut login = target::Login::new(Arc::new(with_auth(target_chap())), Entropy([2; 33]), Serial(1));
    let (request, data) = request(text, change);
    login.receive(&request.encode(), &data)
}

fn request(pairs: &[(&str, &str)], change: impl Fn(&mut LoginRequest)) -> (LoginRequest, Vec<u8>) {
    let mut out = text::Outgoing::new();
    for (key, value) in pairs {
        out.push(key, value);
    }
    let (data, _) = out.next_segment(usize::MAX);
    let mut request = LoginRequest {
        transit: None,
        continues: false,
        stage: Stage::Security,
        version_max: 0,
        version_min: 0,
        data_len_bytes: data.len() as u32,
        isid: Isid::random([1, 2, 3], 4),
        tsih: 0,
        itt: Itt(5),
        cid: 1,
        cmd_sn: Serial(1),
        exp_stat_sn: Serial(0),
    };
    change(&mut request);
    (request, data)
}

#[test]
fn target_refuses_what_breaks_the_rules() {
    let names: &[(&str, &str)] = &[("InitiatorName", ME), ("TargetName", DISK)];
    let status = |progress| match progress {
        TargetProgress::Failed(pdu, error) => {
            let response = LoginResponse::decode(&pdu.header).unwrap();
            assert_eq!(response.itt, Itt(5));
            let status = LoginStatus { class: response.status_class, detail: response.status_detail };
            assert_eq!(status, error.status());
            status
        }
        other => panic!("{other:?}"),
    };
    let more = |pairs: &[(&'static str, &'static str)]| {
        let all: Vec<_> = names.iter().chain(pairs).copied().collect();
        status(target_answer(&all, |_| ()))
    };
    assert_eq!(status(target_answer(&names[1..], |_| ())), LoginStatus::MISSING_PARAMETER);
    assert_eq!(status(target_answer(&names[..1], |_| ())), LoginStatus::MISSING_PARAMETER);
    assert_eq!(status(target_answer(names, |r| r.version_min = 1)), LoginStatus::UNSUPPORTED_VERSION);
    assert_eq!(
        status(target_answer(names, |r| r.stage = Stage::Operational)),
        LoginStatus::AUTHENTICATION_FAILURE
    );
    assert_eq!(
        status(target_answer(names, |r| r.transit = Some(Stage::FullFeature))),
        LoginStatus::AUTHENTICATION_FAILURE
    );
    assert_eq!(more(&[("AuthMethod", "KRB5,SRP")]), LoginStatus::AUTHENTICATION_FAILURE);
    assert_eq!(more(&[("AuthMethod", "CHAP"), ("CHAP_A", "4")]), LoginStatus::AUTHENTICATION_FAILURE);
    assert_eq!(more(&[("CHAP_A", "5")]), LoginStatus::INITIATOR_ERROR);
    assert_eq!(more(&[("CHAP_N", "me"), ("CHAP_R", "0x00")]), LoginStatus::INITIATOR_ERROR);
    assert_eq!(more(&[("InitialR2T", "No")]), LoginStatus::INITIATOR_ERROR);
    assert_eq!(more(&[("SessionType", "Normal"), ("SessionType", "Normal")]), LoginStatus::INITIATOR_ERROR);
    assert_eq!(more(&[("SessionType", "Other")]), LoginStatus::INITIATOR_ERROR);
    assert_eq!(more(&[("TargetAlias", "x")]), LoginStatus::INITIATOR_ERROR);

    let mut login = target::Login::new(Arc::new(target_config()), Entropy([2; 33]), Serial(1));
    let mut nop = Bhs::new(crate::pdu::Opcode::NopOut);
    nop.0[16..20].copy_from_slice(&5u32.to_be_bytes());
    assert_eq!(status(login.receive(&nop, &[])), LoginStatus::INVALID_DURING_LOGIN);
}

#[test]
fn endless_logins_end() {
    // An initiator that only ever sends empty requests.
    let mut login = target::Login::new(Arc::new(with_auth(target_chap())), Entropy([2; 33]), Serial(1));
    let (first, data) = request(&[("InitiatorName", ME), ("TargetName", DISK)], |_| ());
    let mut progress = login.receive(&first.encode(), &data);
    let mut sent = 1;
    while let TargetProgress::Send(_) = progress {
        sent += 1;
        progress = login.receive(&first.encode(), &[]);
    }
    assert!(matches!(progress, TargetProgress::Failed(_, target::LoginError::Endless)));
    assert_eq!(sent, MAX_LOGIN_PDUS + 1);

    // A target that never moves on.
    let (mut login, first) = initiator::Login::start(initiator_config()).unwrap();
    let first = LoginRequest::decode(&first.header).unwrap();
    let mut received = 0;
    let error = loop {
        let response = response_to(&first, Serial(received));
        received += 1;
        match login.receive(&response.encode(), &[]) {
            Ok(InitiatorProgress::Send(_)) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error, initiator::LoginError::Endless);
    assert_eq!(received, MAX_LOGIN_PDUS + 1);
}

fn response_to(request: &LoginRequest, stat_sn: Serial) -> LoginResponse {
    LoginResponse {
        transit: None,
        continues: false,
        stage: request.stage,
        version_max: 0,
        version_active: 0,
        data_len_bytes: 0,
        isid: request.isid,
        tsih: 0,
        itt: request.itt,
        sn: crate::pdu::TargetSn { stat_sn, exp_cmd_sn: request.cmd_sn, max_cmd_sn: request.cmd_sn },
        status_class: 0,
        status_detail: 0,
    }
}

/// Checklist lines 10, 38 and 40 (RFC 7143 6.2, 11.13).
#[test]
fn initiator_refuses_what_breaks_the_rules() {
    let error = |auth: initiator::Auth, data: &[u8], change: &dyn Fn(&mut LoginResponse)| {
        let config = initiator::Config { auth, portal_group_tag: Some(7), ..initiator_config() };
        let (mut login, first) = initiator::Login::start(config).unwrap();
        let mut response = response_to(&LoginRequest::decode(&first.header).unwrap(), Serial(0));
        change(&mut response);
        login.receive(&response.encode(), data).unwrap_err().to_string()
    };
    let none = || initiator::Auth::None;
    let chap = || initiator::Auth::Chap(initiator_chap(false));
    let nothing = |_: &mut LoginResponse| ();
    let on = |response: &mut LoginResponse| response.transit = Some(Stage::Operational);
    for (message, part) in [
        (error(none(), b"", &|r| r.itt = Itt(99)), "task tag"),
        (error(none(), b"", &|r| r.isid = Isid([0; 6])), "ISID"),
        (error(none(), b"", &|r| r.version_active = 1), "version"),
        (error(none(), b"", &|r| r.stage = Stage::Operational), "stage"),
        (error(none(), b"", &|r| r.transit = Some(Stage::FullFeature)), "beyond"),
        (error(chap(), b"", &on), "not asked for"),
        (error(chap(), b"AuthMethod=None\0", &nothing), "AuthMethod=None"),
        (error(chap(), b"AuthMethod=CHAP\0CHAP_A=5\0CHAP_I=1\0CHAP_C=0x00\0", &nothing), "out of turn"),
        (error(none(), b"CHAP_A=5\0", &nothing), "without agreement"),
        (error(none(), b"TargetPortalGroupTag=8\0", &nothing), "portal group 8"),
        (error(none(), b"TargetPortalGroupTag=x\0", &nothing), "16 bits"),
        (error(none(), b"InitialR2T=No\0", &nothing), "operational key"),
        (error(none(), b"Broken", &nothing), "bad text"),
        (error(none(), b"", &|r| r.status_class = 1), "TargetAddress"),
        (error(none(), b"", &|r| (r.status_class, r.status_detail) = (3, 1)), "not operational now"),
        (error(none(), b"", &|r| (r.status_class, r.status_detail) = (2, 99)), "does not define"),
        (error(none(), b"", &|r| (r.status_class, r.status_detail) = (9, 9)), "does not define"),
    ] {
        assert!(message.contains(part), "{message} does not contain {part}");
    }
    // After an error nothing goes on.
    let (mut login, first) = initiator::Login::start(initiator_config()).unwrap();
    let response = response_to(&LoginRequest::decode(&first.header).unwrap(), Serial(0));
    assert!(login.receive(&response.encode(), b"x").is_err());
    assert_eq!(login.receive(&response.encode(), b""), Err(initiator::LoginError::Ended));
}

/// Checklist line 38 (RFC 7143 6.2).
#[test]
fn unknown_keys_are_answered_while_that_is_possible() {
    let (mut login, first) = initiator::Login::start(initiator_config()).unwrap();
    let mut response = response_to(&LoginRequest::decode(&first.header).unwrap(), Serial(0));
    let Ok(InitiatorProgress::Send(next)) = login.receive(&response.encode(), b"X-a.b=1\0") else {
        panic!("an unknown key ends the login")
    };
    assert_eq!(next.data, b"X-a.b=NotUnderstood\0");
    response.sn.stat_sn = Serial(1);
    response.transit = Some(Stage::Operational);
    let Ok(InitiatorProgress::Send(next)) = login.receive(&response.encode(), b"X-c.d=1\0") else {
        panic!("an unknown key in the last response ends the login")
    };
    assert!(next.data.starts_with(b"HeaderDigest="));
}

fn digest_policy() -> impl Strategy<Value = DigestPolicy> {
    prop::sample::select(vec![
        DigestPolicy::Off,
        DigestPolicy::Optional,
        DigestPolicy::Prefer,
        DigestPolicy::Require,
    ])
}

fn params() -> impl Strategy<Value = Params> {
    (
        (
            digest_policy(),
            digest_policy(),
            any::<u32>(),
            any::<u32>(),
            any::<u32>(),
            any::<bool>(),
            any::<bool>(),
        ),
        (any::<u16>(), 0u16..4000, 0u16..4000, any::<bool>(), any::<bool>(), 0u8..4, any::<u16>()),
        prop::sample::select(vec![
            TaskReporting::Rfc3720,
            TaskReporting::ResponseFence,
            TaskReporting::FastAbort,
        ]),
    )
        .prop_map(|(a, b, task_reporting)| Params {
            header_digest: a.0,
            data_digest: a.1,
            max_recv_data_segment_bytes: a.2,
            max_burst_bytes: a.3,
            first_burst_bytes: a.4,
            initial_r2t: a.5,
            immediate_data: a.6,
            max_outstanding_r2t: b.0,
            time2wait_s: b.1,
            time2retain_s: b.2,
            data_pdu_in_order: b.3,
            data_sequence_in_order: b.4,
            error_recovery_level: b.5,
            max_connections: b.6,
            task_reporting,
        })
}

fn incompatible(a: DigestPolicy, b: DigestPolicy) -> bool {
    matches!((a, b), (DigestPolicy::Off, DigestPolicy::Require) | (DigestPolicy::Require, DigestPolicy::Off))
}

proptest! {
    /// Whatever both sides want and however texts and bytes are split: both come to the same result, within what each
    /// wanted; or both know that there is none.
    #[test]
    fn both_sides_agree(
        wants in params(),
        grants in params(),
        discovery in any::<bool>(),
        auth in 0u8..3,
        cuts in vec(any::<prop::sample::Index>(), 0..6),
        segment_bytes in prop_oneof![Just(MAX_LOGIN_DATA_BYTES), 40usize..400],
    ) {
        let mut config = initiator_config();
        config.params = wants.clone();
        let mut target = target_config();
        target.params = grants.clone();
        if auth != 0 {
            config.auth = initiator::Auth::Chap(initiator_chap(auth == 2));
            target.targets[1].auth = target::Auth::Chap(target_chap());
            target.discovery_auth = target::Auth::Chap(target_chap());
        }
        if discovery {
            config.target_name = None;
        }
        let outcome = log_in(config, target, accept(), &Wire { cuts, segment_bytes });
        let requires = incompatible(grants.header_digest, wants.header_digest)
            && grants.header_digest == DigestPolicy::Require
            || incompatible(grants.data_digest, wants.data_digest) && grants.data_digest == DigestPolicy::Require;
        if incompatible(wants.header_digest, grants.header_digest)
            || incompatible(wants.data_digest, grants.data_digest)
        {
            // A target that cannot give what is required says so and has done its part; one that requires refuses.
            prop_assert!(outcome.initiator.is_err());
            prop_assert_eq!(outcome.target.is_ok(), !requires);
            return Ok(());
        }
        let (initiator, target) = expect_success(outcome);
        let (i, t) = (&initiator.negotiated, &target.negotiated);
        prop_assert_eq!(i.max_send_data_segment_bytes, t.max_recv_data_segment_bytes);
        prop_assert_eq!(i.max_recv_data_segment_bytes, t.max_send_data_segment_bytes);
        let mut mirrored = t.clone();
        mirrored.max_send_data_segment_bytes = i.max_send_data_segment_bytes;
        mirrored.max_recv_data_segment_bytes = i.max_recv_data_segment_bytes;
        prop_assert_eq!(i, &mirrored);
        prop_assert!(i.first_burst_bytes <= i.max_burst_bytes);
        prop_assert!((512..=0xFF_FFFF).contains(&i.max_burst_bytes));
        prop_assert!((512..=0xFF_FFFF).contains(&i.max_send_data_segment_bytes));
        if !discovery {
            prop_assert!(i.max_burst_bytes <= wants.max_burst_bytes.max(512));
            prop_assert!(i.max_burst_bytes <= grants.max_burst_bytes.max(512));
            prop_assert_eq!(i.initial_r2t, wants.initial_r2t || grants.initial_r2t);
            prop_assert_eq!(i.immediate_data, wants.immediate_data && grants.immediate_data);
        }
        prop_assert_eq!(initiator.chap_algorithm.is_some(), auth != 0);
        prop_assert_eq!(target.chap_name.is_some(), auth != 0);
    }

    /// No bytes from a peer make a machine panic or go on for ever.
    #[test]
    fn arbitrary_peers(
        pdus in vec((any::<[u8; 48]>(), any::<bool>(), text_like()), 1..10),
    ) {
        let (mut initiator, first) = initiator::Login::start(initiator_config()).unwrap();
        let mut target = target::Login::new(Arc::new(with_auth(target_chap())), Entropy([2; 33]), Serial(1));
        let request = LoginRequest::decode(&first.header).unwrap();
        for (bytes, near, data) in pdus {
            let mut bhs = Bhs(bytes);
            if near {
                // Close to a right one, so that the text is looked at.
                bhs = response_to(&request, Serial(u32::from(bytes[0]) & 1)).encode();
                bhs.0[1] = bytes[1];
            }
            let _ = initiator.receive(&bhs, &data);
            if near {
                bhs = request.encode();
                bhs.0[1] = bytes[1];
            }
            if let TargetProgress::Decide(_) = target.receive(&bhs, &data) {
                let _ = target.decide(accept());
            }
        }
    }
}

/// Texts of keys that mean something, with values that may.
fn text_like() -> impl Strategy<Value = Vec<u8>> {
    let keys = prop::sample::select(vec![
        "AuthMethod",
        "CHAP_A",
        "CHAP_I",
        "CHAP_C",
        "CHAP_N",
        "CHAP_R",
        "InitiatorName",
        "TargetName",
        "SessionType",
        "HeaderDigest",
        "MaxBurstLength",
        "InitialR2T",
        "IFMarker",
        "X-a",
        "TargetAddress",
        "MaxRecvDataSegmentLength",
    ]);
    let values = prop_oneof![
        prop::sample::select(vec![
            "CHAP", "None", "5", "8,7,6,5", "0x00", "0b!!", "me", DISK, "No", "Reject", "1~2"
        ])
        .prop_map(str::to_owned),
        "[^\0]{0,20}",
    ];
    prop_oneof![
        vec((keys, values), 0..6).prop_map(|pairs| {
            pairs.iter().flat_map(|(key, value)| format!("{key}={value}\0").into_bytes()).collect()
        }),
        vec(any::<u8>(), 0..100),
    ]
}

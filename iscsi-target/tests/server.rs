//! The target as seen from its socket: sessions that replace each other, digests, large LUN numbers, peers that
//! misbehave, and what the command line says to bad options.

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use common::{TARGET, Target};
use iscsi::digest::digest_bytes;
use iscsi::login::LoginPdu;
use iscsi::login::initiator::{Config, LoggedIn, Login, Progress};
use iscsi::params::{DigestPolicy, Params};
use iscsi::pdu::framing::{Digests, append_pdu};
use iscsi::pdu::{
    Bhs, DataIn, DataOut, Isid, Itt, Opcode, Pdu, R2t, Reject, RejectReason, ScsiCommand, ScsiResponse,
    TaskAttribute, TaskFunction, TaskManagementRequest, TaskManagementResponse, TaskResponseCode,
};
use iscsi::scsi::{Cdb, Lun, Sense, Status, sense::asc};
use iscsi::serial::Serial;
use rustix::process::{Resource, Rlimit, Signal, prlimit};

/// A session over a blocking socket. Whatever does not come in ten seconds fails the test.
struct Session {
    socket: TcpStream,
    digests: Digests,
    cmd_sn: Serial,
}

fn connect(target: &Target) -> TcpStream {
    let socket = TcpStream::connect(&target.addr).expect("the target listens");
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    socket
}

/// One PDU; `None` at the end of the stream.
fn receive(socket: &mut TcpStream, digests: Digests) -> Option<(Bhs, Vec<u8>)> {
    let mut header = [0; 48];
    match socket.read_exact(&mut header) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return None,
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
        result => result.expect("a PDU in time"),
    }
    let bhs = Bhs(header);
    let mut rest = vec![0; digests.wire_len_bytes(&bhs) - 48];
    socket.read_exact(&mut rest).expect("the rest of a PDU");
    if digests.header {
        assert_eq!(rest[..4], digest_bytes(&header));
        rest.drain(..4);
    }
    let len = bhs.data_len_bytes() as usize;
    if digests.data && len > 0 {
        let padded = len.next_multiple_of(4);
        assert_eq!(rest[padded..], digest_bytes(&rest[..padded]));
    }
    rest.truncate(len);
    Some((bhs, rest))
}

impl Session {
    fn log_in(target: &Target, isid: u8, params: Params) -> Self {
        let mut socket = connect(target);
        let mut config = Config::new("iqn.2026-01.org.vcp:initiator", Isid([0x80, 0, 0, 0, 0, isid]));
        config.target_name = Some(TARGET.into());
        config.params = params;
        let (mut login, first) = Login::start(config).expect("a configuration that can be used");
        let send = |socket: &mut TcpStream, pdu: &LoginPdu| {
            let mut out = Vec::new();
            pdu.write(&mut out);
            socket.write_all(&out).expect("sent");
        };
        send(&mut socket, &first);
        let logged_in: Box<LoggedIn> = loop {
            let (bhs, data) = receive(&mut socket, Digests::default()).expect("a login response");
            match login.receive(&bhs, &data).expect("the login goes well") {
                Progress::Send(pdu) => send(&mut socket, &pdu),
                Progress::Done(logged_in) => break logged_in,
                Progress::Moved(moved) => panic!("{moved:?}"),
            }
        };
        Self { socket, digests: logged_in.negotiated.digests, cmd_sn: logged_in.nexus.cmd_sn }
    }

    fn send(&mut self, bhs: &Bhs, data: &[u8]) {
        let mut out = Vec::new();
        append_pdu(&mut out, bhs, data, self.digests);
        self.socket.write_all(&out).expect("sent");
    }

    fn receive(&mut self) -> Option<(Bhs, Vec<u8>)> {
        receive(&mut self.socket, self.digests)
    }

    fn command(&mut self, itt: u32, lun: Lun, cdb: Cdb, out_len: u32, in_len: u32, immediate: &[u8]) {
        let command = ScsiCommand {
            immediate: false,
            final_bit: true,
            read: in_len > 0,
            write: out_len > 0,
            attribute: TaskAttribute::Simple,
            ahs_len_bytes: 0,
            data_len_bytes: immediate.len() as u32,
            lun,
            itt: Itt(itt),
            expected_len_bytes: out_len.max(in_len),
            cmd_sn: self.cmd_sn.take(),
            exp_stat_sn: Serial(0),
            cdb: cdb.0,
        };
        self.send(&command.encode(), immediate);
    }

    fn read(&mut self, itt: u32, lun: Lun, cdb: Cdb, len: u32) -> Vec<u8> {
        self.command(itt, lun, cdb, 0, len, &[]);
        let mut all = Vec::new();
        loop {
            let (bhs, data) = self.receive().expect("data");
            let pdu = DataIn::decode(&bhs).expect("Data-In");
            assert_eq!(pdu.offset_bytes as usize, all.len());
            all.extend_from_slice(&data);
            if let Some(status) = pdu.status {
                assert_eq!(status.status, Status::GOOD.0);
                return all;
            }
        }
    }
}

fn data_out(itt: u32, r2t: &R2t, data: &[u8]) -> Bhs {
    DataOut {
        final_bit: true,
        data_len_bytes: data.len() as u32,
        lun: r2t.lun,
        itt: Itt(itt),
        ttt: r2t.ttt,
        exp_stat_sn: Serial(0),
        data_sn: Serial(0),
        offset_bytes: r2t.offset_bytes,
    }
    .encode()
}

#[test]
fn a_new_login_ends_the_old_session_before_it_is_answered() {
    let target = Target::start(&["--lun", "mem:8M"]);
    let mut old = Session::log_in(&target, 1, Params::default());
    let mut bystander = Session::log_in(&target, 2, Params::default());
    old.command(1, Lun::ZERO, Cdb::write(0, 8, false), 4096, 0, &[]);
    let (bhs, _) = old.receive().expect("an R2T");
    let r2t = R2t::decode(&bhs).expect("an R2T");
    // The write hangs. The initiator logs in again and writes something else.
    let mut new = Session::log_in(&target, 1, Params::default());
    new.command(1, Lun::ZERO, Cdb::write(0, 8, false), 4096, 0, &[0x22; 4096]);
    let (bhs, _) = new.receive().expect("a response");
    assert_eq!(ScsiResponse::decode(&bhs).expect("a response").status, Status::GOOD.0);
    // What the old session sends now changes nothing; it is closed.
    let late = vec![0x11; 4096];
    let mut out = Vec::new();
    append_pdu(&mut out, &data_out(1, &r2t, &late), &late, old.digests);
    let _ = old.socket.write_all(&out);
    assert!(old.receive().is_none());
    assert_eq!(new.read(2, Lun::ZERO, Cdb::read(0, 8), 4096), [0x22; 4096]);
    // Another ISID is another session.
    assert_eq!(bystander.read(1, Lun::ZERO, Cdb::read(0, 1), 512), [0x22; 512]);
    target.stop(Signal::TERM);
}

#[test]
fn digests_guard_what_is_moved() {
    let target = Target::start(&["--lun", "mem:8M"]);
    let params = Params {
        header_digest: DigestPolicy::Require,
        data_digest: DigestPolicy::Require,
        immediate_data: false,
        ..Params::default()
    };
    let mut session = Session::log_in(&target, 1, params);
    assert_eq!(session.digests, Digests { header: true, data: true });
    let data: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    for spoilt in [false, true] {
        session.command(1, Lun::ZERO, Cdb::write(0, 8, true), 4096, 0, &[]);
        let (bhs, _) = session.receive().expect("an R2T");
        let bhs = data_out(1, &R2t::decode(&bhs).expect("an R2T"), &data);
        let mut out = Vec::new();
        append_pdu(&mut out, &bhs, &data, session.digests);
        if spoilt {
            // On the way, behind the digest's back.
            out[60] ^= 0x01;
        }
        session.socket.write_all(&out).expect("sent");
        if spoilt {
            let (bhs, rejected) = session.receive().expect("a Reject");
            assert_eq!(Reject::decode(&bhs).expect("a Reject").reason, RejectReason::DataDigest);
            assert_eq!(rejected, out[..48]);
            let (bhs, sense) = session.receive().expect("a response");
            assert_eq!(ScsiResponse::decode(&bhs).expect("a response").status, Status::CHECK_CONDITION.0);
            assert_eq!(Sense::parse(&sense[2..]).expect("sense").code, asc::PROTOCOL_SERVICE_CRC);
        } else {
            let (bhs, _) = session.receive().expect("a response");
            assert_eq!(ScsiResponse::decode(&bhs).expect("a response").status, Status::GOOD.0);
        }
    }
    assert_eq!(session.read(3, Lun::ZERO, Cdb::read(0, 8), 4096), data);
    // A header that does not fit its digest ends the connection.
    let mut out = Vec::new();
    append_pdu(&mut out, &Bhs::new(Opcode::NopOut), &[], session.digests);
    out[20] ^= 0x80;
    session.socket.write_all(&out).expect("sent");
    assert!(session.receive().is_none());
}

#[test]
fn large_lun_numbers_are_addressed_flat() {
    let target = Target::start(&["--lun", "mem:8M,lun=300", "--lun", "mem:8M,block-size=4096"]);
    let mut session = Session::log_in(&target, 1, Params::default());
    let luns = session.read(1, Lun::ZERO, Cdb::report_luns(256), 24);
    assert_eq!(luns[8..16], [0x41, 0x2C, 0, 0, 0, 0, 0, 0]);
    assert_eq!(luns[16..24], [0x41, 0x2D, 0, 0, 0, 0, 0, 0]);
    assert_eq!(session.read(2, Lun::from_number(300), Cdb::read(0, 1), 512), [0; 512]);
    assert_eq!(session.read(3, Lun::from_number(301), Cdb::read(0, 1), 4096), [0; 4096]);
    // 01 2C is bus 1, LUN 44: not here.
    session.command(4, Lun([1, 0x2C, 0, 0, 0, 0, 0, 0]), Cdb::read(0, 1), 0, 512, &[]);
    let (_, sense) = session.receive().expect("a response");
    assert_eq!(Sense::parse(&sense[2..]).expect("sense").code, asc::LUN_NOT_SUPPORTED);
}

#[test]
fn an_initiator_that_does_not_read_is_held_back() {
    let target = Target::start(&["--lun", "mem:8M", "--queue-depth", "64"]);
    let mut lazy = Session::log_in(&target, 1, Params::default());
    // Far more than the socket's buffers hold.
    for itt in 0..64 {
        lazy.command(itt, Lun::ZERO, Cdb::read(0, 8192), 0, 4 << 20, &[]);
    }
    let mut other = Session::log_in(&target, 2, Params::default());
    assert_eq!(other.read(1, Lun::ZERO, Cdb::read(0, 1), 512), [0; 512]);
    // When it reads at last, all of it is there.
    let (mut ended, mut bytes) = (0, 0u64);
    while ended < 64 {
        let (bhs, data) = lazy.receive().expect("data");
        bytes += data.len() as u64;
        ended += u32::from(DataIn::decode(&bhs).expect("Data-In").status.is_some());
    }
    assert_eq!(bytes, 64 * (4 << 20));
}

#[test]
fn garbage_ends_only_its_own_connection() {
    let target = Target::start(&["--lun", "mem:8M"]);
    let mut good = Session::log_in(&target, 1, Params::default());
    for garbage in [vec![0xFF; 4096], vec![0; 4096], b"GET / HTTP/1.1\r\n\r\n".repeat(10)] {
        let mut socket = connect(&target);
        let _ = socket.write_all(&garbage);
        // A login response that says no, or nothing, and then the end.
        while receive(&mut socket, Digests::default()).is_some() {}
    }
    let mut bad = Session::log_in(&target, 2, Params::default());
    let mut long = Bhs::new(Opcode::NopOut);
    long.set_data_len(0xFF_FFFF);
    bad.socket.write_all(&long.0).expect("sent");
    assert!(bad.receive().is_none());
    let mut unknown = Session::log_in(&target, 3, Params::default());
    let mut bhs = Bhs([0; 48]);
    bhs.0[0] = 0x5F;
    unknown.send(&bhs, &[]);
    let (bhs, _) = unknown.receive().expect("a Reject");
    assert_eq!(Reject::decode(&bhs).expect("a Reject").reason, RejectReason::Unsupported);
    assert_eq!(good.read(1, Lun::ZERO, Cdb::read(0, 1), 512), [0; 512]);
}

#[test]
fn a_login_that_does_not_begin_is_ended() {
    let target = Target::start(&["--lun", "mem:8M", "--login-timeout-s", "1"]);
    let mut socket = connect(&target);
    // Ten seconds are the limit of `connect`.
    assert!(receive(&mut socket, Digests::default()).is_none());
}

#[test]
fn written_data_is_in_the_file() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(1 << 20).expect("a sparse file");
    let lun = format!("file:{}", file.path().display());
    let target = Target::start(&["--lun", &lun]);
    let mut session = Session::log_in(&target, 1, Params::default());
    session.command(1, Lun::ZERO, Cdb::write(3, 2, false), 1024, 0, &[0xA5; 1024]);
    assert!(session.receive().is_some());
    session.command(2, Lun::ZERO, Cdb::synchronize_cache_10(), 0, 0, &[]);
    let (bhs, _) = session.receive().expect("a response");
    assert_eq!(ScsiResponse::decode(&bhs).expect("a response").status, Status::GOOD.0);
    let content = std::fs::read(file.path()).expect("readable");
    assert_eq!(content[3 * 512..5 * 512], [0xA5; 1024]);
    assert!(content[..3 * 512].iter().chain(&content[5 * 512..]).all(|&byte| byte == 0));
    target.stop(Signal::INT);
}

#[test]
fn bad_options_are_answered_on_one_line() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_iscsi-target"))
            .args(["serve", "--log", "error", "--listen", "127.0.0.1:0"])
            .args(args)
            .output()
            .expect("the program starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for wrong_usage in [
        &["--target", "nonsense", "--lun", "mem:1M"][..],
        &["--target", TARGET, "--lun", "tape:1M"],
        &["--target", TARGET],
        &["--target", TARGET, "--lun", "mem:1M", "--max-burst", "1"],
    ] {
        assert_eq!(run(wrong_usage).0, Some(2), "{wrong_usage:?}");
    }
    for (failure, says) in [
        (&["--target", TARGET, "--lun", "file:/nonexistent/disk"][..], "/nonexistent/disk"),
        (&["--target", TARGET, "--lun", "file:/"], "cannot open"),
        (&["--target", TARGET, "--lun", "mem:1M", "--lun", "mem:1M,lun=0"], "given twice"),
        (&["--target", TARGET, "--lun", "mem:1M", "--cpu", "9999"], "hardware thread 9999"),
        (
            &[
                "--target",
                TARGET,
                "--lun",
                "mem:1M",
                "--chap",
                "a:same-secret-12",
                "--mutual-chap",
                "b:same-secret-12",
            ],
            "CHAP",
        ),
    ] {
        let (code, message) = run(failure);
        assert_eq!(code, Some(1), "{failure:?}: {message}");
        assert!(message.contains(says) && message.trim_end().lines().count() == 1, "{message}");
    }
}

#[test]
fn whose_commands_another_initiator_cleared_is_told() {
    let target = Target::start(&["--lun", "mem:8M"]);
    let mut loser = Session::log_in(&target, 1, Params::default());
    let mut idle = Session::log_in(&target, 2, Params::default());
    let mut clearer = Session::log_in(&target, 3, Params::default());
    loser.command(1, Lun::ZERO, Cdb::write(0, 8, false), 4096, 0, &[]);
    R2t::decode(&loser.receive().expect("an R2T").0).expect("an R2T");
    let request = TaskManagementRequest {
        immediate: true,
        function: TaskFunction::ClearTaskSet,
        lun: Lun::ZERO,
        itt: Itt(9),
        referenced_itt: Itt::NONE,
        cmd_sn: clearer.cmd_sn,
        exp_stat_sn: Serial(0),
        ref_cmd_sn: Serial(0),
        exp_data_sn: Serial(0),
    };
    clearer.send(&request.encode(), &[]);
    let (bhs, _) = clearer.receive().expect("a response");
    let response = TaskManagementResponse::decode(&bhs).expect("a response");
    assert_eq!(response.response, TaskResponseCode::Complete);
    // Its write will never be answered, so it has to hear of it (SAM-5 5.3.1, 5.14).
    loser.command(2, Lun::ZERO, Cdb::test_unit_ready(), 0, 0, &[]);
    let (bhs, data) = loser.receive().expect("a response");
    assert_eq!(ScsiResponse::decode(&bhs).expect("a response").status, Status::CHECK_CONDITION.0);
    assert_eq!(Sense::parse(&data[2..]).expect("sense data").code, asc::COMMANDS_CLEARED);
    // Who had nothing underway, or asked for it, is not.
    assert_eq!(idle.read(1, Lun::ZERO, Cdb::read(0, 1), 512), [0; 512]);
    assert_eq!(clearer.read(1, Lun::ZERO, Cdb::read(0, 1), 512), [0; 512]);
    target.stop(Signal::TERM);
}

#[test]
fn out_of_descriptors_it_rests_and_comes_back() {
    let target = Target::start(&["--lun", "mem:8M"]);
    let limit = Rlimit { current: Some(16), maximum: Some(16) };
    prlimit(Some(target.pid()), Resource::Nofile, limit).expect("a lower limit");
    let flood: Vec<_> = (0..32).map(|_| connect(&target)).collect();
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", target.pid())).expect("a process");
        let fields: Vec<_> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
        fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime")
    };
    // What is measured is the time itself: a hundred ticks a second are a whole hardware thread.
    let before = ticks();
    std::thread::sleep(Duration::from_millis(600));
    assert!(ticks() - before < 5, "it spins");
    drop(flood);
    let mut session = Session::log_in(&target, 1, Params::default());
    assert_eq!(session.read(1, Lun::ZERO, Cdb::read(0, 1), 512), [0; 512]);
    target.stop(Signal::TERM);
}

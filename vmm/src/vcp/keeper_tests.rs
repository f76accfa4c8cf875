//! Keepers of devices whose backends die, stay away, hang, and come back.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::kvm::GuestMemory;
use crate::virtio::VirtioDevice;
use crate::virtio::vhost_user::tests::script::*;
use crate::virtio::vhost_user::tests::{Line, activation_on};
use crate::virtio::vhost_user::{VhostUserDevice, blk};

const DEADLINE: Duration = Duration::from_secs(20);

/// A backend's connection as the test holds it.
struct Served {
    stream: UnixStream,
    log: Log,
}

impl Served {
    fn cut(&self) {
        self.stream.shutdown(Shutdown::Both).unwrap();
    }
}

/// Waits for something to become so.
fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is() {
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Serves whoever connects, and tells of each.
fn listen(path: &Path, script: Script) -> Receiver<Served> {
    let (told, serves) = channel();
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let served = Served { log: script.serve(stream.try_clone().unwrap()), stream };
            if told.send(served).is_err() {
                return;
            }
        }
    });
    serves
}

struct Bed {
    keeper: Option<Keeper>,
    device: VhostUserDevice,
    line: Arc<Line>,
    exit: ExitSignal,
    first: Served,
    _memory: Arc<GuestMemory>,
}

/// A running disk with a backend of this kind, kept with more from `source`.
fn bed(script: &Script, source: Source, recovers: bool, process: Option<VcpProcess>) -> Bed {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let first = Served { log: script.serve(theirs.try_clone().unwrap()), stream: theirs };
    let link = Link::from_stream("disk0", ours, 2).unwrap();
    let mut device = VhostUserDevice::new("disk0", blk::kind(2, false), link, recovers).unwrap();
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let line = Line::new();
    device.activate(activation_on(&memory, line.clone())).unwrap();
    let exit = ExitSignal::new().unwrap();
    let (front, channel) = device.keep();
    let keeper = Keeper::start(front, channel, source, process, exit.clone()).unwrap();
    Bed { keeper: Some(keeper), device, line, exit, first, _memory: memory }
}

impl Bed {
    fn stop(&mut self) -> Option<VcpProcess> {
        let started = Instant::now();
        let process = self.keeper.take().unwrap().stop();
        // Less than any message's time limit: nothing was waited for.
        assert!(started.elapsed() < Duration::from_secs(5));
        process
    }
}

fn started(served: &Served) {
    until("both queues start", || served.log.times(18) == 2);
}

#[test]
fn a_lost_connection_is_made_again_as_often_as_need_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let serves = listen(&path, Script::default());
    let mut bed = bed(&Script::default(), Source::Socket(path), true, None);
    bed.first.cut();
    for _ in 0..4 {
        let served = serves.recv_timeout(DEADLINE).unwrap();
        started(&served);
        assert_eq!((served.log.times(SET_INFLIGHT_FD), served.log.times(GET_INFLIGHT_FD)), (1, 0));
        served.cut();
    }
    let last = serves.recv_timeout(DEADLINE).unwrap();
    started(&last);
    assert_eq!(bed.exit.reason(), None);
    assert!(bed.stop().is_none());
    bed.device.shut_down().unwrap();
    assert_eq!(last.log.times(GET_VRING_BASE), 2);
}

#[test]
fn a_backend_that_stays_away_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut bed = bed(&Script::default(), Source::Socket(path.clone()), true, None);
    bed.first.cut();
    // Several attempts find nothing, one finds a socket that nobody listens on.
    std::thread::sleep(Duration::from_millis(300));
    drop(UnixListener::bind(&path).unwrap());
    std::thread::sleep(Duration::from_millis(100));
    std::fs::remove_file(&path).unwrap();
    let serves = listen(&path, Script::default());
    started(&serves.recv_timeout(DEADLINE).unwrap());
    bed.stop();
}

#[test]
fn the_run_ends_where_the_user_wants_that_or_nothing_else_is_left() {
    let nowhere = || Source::Socket("/nonexistent/socket".into());
    let plain = bed(&Script::default(), nowhere(), false, None);
    plain.first.cut();
    until("the run ends", || plain.exit.reason().is_some());
    let Some(ExitReason::BackendGone { device, reason }) = plain.exit.reason() else { panic!() };
    assert_eq!((&*device, &*reason), ("disk0", "the vhost-user backend closed its connection"));

    // Requests are in flight (an available ring at 3, a used ring at 0) and there is no log of them.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let script = Script { protocol: P_ACK | P_CONFIG | P_MQ, ..Script::default() };
    let _serves = listen(&path, script.clone());
    let busy = bed(&script, Source::Socket(path), true, None);
    vm_memory::Bytes::write_obj(&*busy._memory, 3u16, vm_memory::GuestAddress(0x2002)).unwrap();
    busy.first.cut();
    until("the run ends", || busy.exit.reason().is_some());
    let Some(ExitReason::BackendGone { reason, .. }) = busy.exit.reason() else { panic!() };
    assert!(reason.starts_with("the vhost-user backend ended with requests in flight"), "{reason}");
}

#[test]
fn the_end_of_the_run_waits_for_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    // Accepts, and never says a word.
    let silent = UnixListener::bind(&path).unwrap();
    let mut bed = bed(&Script::default(), Source::Socket(path), true, None);
    bed.first.cut();
    let (mut stream, _) = silent.accept().unwrap();
    let mut header = [0u8; 12];
    std::io::Read::read_exact(&mut stream, &mut header).unwrap();
    bed.stop();
    // Nobody there at all.
    let mut bed = super::tests::bed(&Script::default(), Source::Socket("/nonexistent/s".into()), true, None);
    bed.first.cut();
    std::thread::sleep(Duration::from_millis(200));
    bed.stop();
    bed.device.shut_down().unwrap();
}

#[test]
fn a_change_of_configuration_reaches_the_driver_over_the_backends_channel() {
    let size = Arc::new(std::sync::atomic::AtomicU32::new(1));
    let script = Script::answering({
        let size = size.clone();
        move |request, payload, _| {
            let config = [&size.load(Ordering::SeqCst).to_le_bytes()[..], &[0; 56]].concat();
            (request == GET_CONFIG).then(|| reply(request, &[&payload[..12], &config].concat()))
        }
    });
    let mut bed = bed(&script, Source::Socket("/nonexistent/s".into()), true, None);
    let mut channel = UnixStream::from(bed.first.log.fd(SET_BACKEND_REQ_FD));
    for round in 2..5u32 {
        size.store(round, Ordering::SeqCst);
        channel.write_all(&[2u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
        until("the driver hears of it", || bed.line.changes.load(Ordering::SeqCst) == round - 1);
        let mut data = [0; 4];
        bed.device.read_config(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), round);
    }
    // Rubbish costs the channel, and nothing else.
    channel.write_all(&[0xff; 12]).unwrap();
    drop(channel);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bed.exit.reason(), None);
    bed.stop();
}

/// A program that takes a VCP's options; the socket's path is in `$socket`.
fn program(dir: &Path, then: &str) -> PathBuf {
    let path = dir.join("vcp-iscsi");
    let text = format!("#!/bin/sh\nsocket=$3\nhere={}\n{then}\n", dir.display());
    // Written by another process: see the tests of `process`.
    let mut write = Command::new("sh");
    write.args(["-c", "printf %s \"$1\" > \"$0\" && chmod 755 \"$0\""]).arg(&path).arg(text);
    assert!(write.status().unwrap().success());
    path
}

fn vcp() -> IscsiVcp {
    IscsiVcp {
        device: "disk0".into(),
        url: "iscsi://host/iqn.x:y/0".into(),
        instance: "test".into(),
        read_only: false,
        queues: 2,
        cpu: None,
        paths: crate::vcp::VcpPaths::default(),
    }
}

#[test]
fn a_process_that_dies_or_hangs_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let serves = listen(&dir.path().join("real"), Script::default());
    // The test serves the connections; the process is there to be watched and killed. The second start fails.
    let then = "echo $$ >>$here/pids\nif [ $(wc -l <$here/pids) = 2 ]; then exit 3; fi\n\
                ln -s $here/real $socket; echo ready: x; exec sleep 1000";
    let program = program(dir.path(), then);
    let first = VcpProcess::start(&program, &vcp(), &dir.path().join("unused")).unwrap();
    let first_pid = first.pid();
    let mut bed = bed(&Script::default(), Source::Process(program, Box::new(vcp())), true, Some(first));
    until("the first is there", || dir.path().join("unused").exists());

    // Its connection ends, and it does not: it is killed before another one is started.
    bed.first.cut();
    let second = serves.recv_timeout(DEADLINE).unwrap();
    started(&second);
    assert!(!Path::new(&format!("/proc/{first_pid}")).exists());
    let pids = || -> Vec<u32> {
        let text = std::fs::read_to_string(dir.path().join("pids")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    assert_eq!(pids().len(), 3, "one that failed, and one that did not");
    // No socket is left behind.
    let left = std::env::temp_dir().read_dir().unwrap().flatten();
    let mine = format!("vcp-{}-", std::process::id());
    assert!(!left.map(|e| e.file_name().into_string().unwrap()).any(|name| name.starts_with(&mine) && {
        std::env::temp_dir().join(&name).join("disk0.sock").symlink_metadata().is_ok()
    }));

    // It dies, and its connection with it.
    let pid = rustix::process::Pid::from_raw(pids()[2] as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    second.cut();
    started(&serves.recv_timeout(DEADLINE).unwrap());
    let last = bed.stop().expect("the process that serves now");
    assert_eq!(Some(&last.pid()), pids().last());
    drop(last);
    assert!(!Path::new(&format!("/proc/{}", pids()[3])).exists());
}

#[test]
fn a_crash_loop_is_slowed_down() {
    let dir = tempfile::tempdir().unwrap();
    let program = program(dir.path(), "echo x >>$here/starts; exit 3");
    let mut bed = bed(&Script::default(), Source::Process(program, Box::new(vcp())), true, None);
    bed.first.cut();
    std::thread::sleep(Duration::from_millis(1500));
    bed.stop();
    // After 0, 50, 150, 350, 750 and 1550 ms at the earliest.
    let starts = std::fs::read_to_string(dir.path().join("starts")).unwrap().lines().count();
    assert!((1..=5).contains(&starts), "{starts}");
}

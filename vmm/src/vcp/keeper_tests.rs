//! Keepers of devices whose backends die, stay away, hang, and come back.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::*;
use crate::exit::ExitReason;
use crate::kvm::GuestMemory;
use crate::vcp::process::First;
use crate::virtio::VirtioDevice;
use crate::virtio::vhost_user::link::Link;
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

/// A program that takes a VCP's options. It gives the socket that it listens on to the test, which serves in its place;
/// the process is there to be watched and killed.
fn program(dir: &Path, before: &str) -> PathBuf {
    let path = dir.join("vcp-iscsi");
    let exe = std::env::current_exe().unwrap();
    let text = format!(
        "#!/bin/sh\nhere={here}\n{before}\nVCP_TEST_GIVE=$here/give VCP_TEST_ARGS=\"$*\" exec {exe} --exact \
         vcp::keeper::tests::child --nocapture --test-threads=1\n",
        here = dir.display(),
        exe = exe.display()
    );
    // Written by another process: see the tests of `process`.
    let mut write = Command::new("sh");
    write.args(["-c", "printf %s \"$1\" > \"$0\" && chmod 755 \"$0\""]).arg(&path).arg(text);
    assert!(write.status().unwrap().success());
    path
}

/// Not a test of its own: what [`program`] runs.
#[test]
fn child() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let Some(give) = std::env::var_os("VCP_TEST_GIVE") else { return };
    let args = std::env::var("VCP_TEST_ARGS").unwrap();
    if args.contains("--standby-fd") {
        println!("\nstandby: x");
        let mut go = std::fs::File::open("/proc/self/fd/6").unwrap();
        if std::io::Read::read(&mut go, &mut [0]).unwrap() == 0 {
            return;
        }
    }
    if !args.starts_with("take-over") {
        let to = UnixStream::connect(give).unwrap();
        let this =
            rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())
                .unwrap();
        let listener =
            rustix::process::pidfd_getfd(&this, 3, rustix::process::PidfdGetfdFlags::empty()).unwrap();
        let fds = [listener.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let data = [std::io::IoSlice::new(b"x")];
        sendmsg(&to, &data, &mut ancillary, SendFlags::empty()).unwrap();
    }
    println!("\nready: x");
    std::thread::sleep(Duration::from_secs(1000));
}

/// Serves what the processes of [`program`] are connected to, and tells of each.
fn given(dir: &Path, script: Script) -> Receiver<Served> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (told, serves) = channel();
    let listener = UnixListener::bind(dir.join("give")).unwrap();
    std::thread::spawn(move || {
        for from in listener.incoming() {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let mut data = [std::io::IoSliceMut::new(&mut byte)];
            recvmsg(from.unwrap(), &mut data, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
            let fd = ancillary.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            let socket = UnixListener::from(fd.unwrap());
            let (told, script) = (told.clone(), script.clone());
            std::thread::spawn(move || {
                let (stream, _) = socket.accept().unwrap();
                let served = Served { log: script.serve(stream.try_clone().unwrap()), stream };
                let _ = told.send(served);
            });
        }
    });
    serves
}

fn vcp(standby: bool) -> Box<VcpSpec> {
    let mut vcp = VcpSpec::new("disk0", "iscsi://host/iqn.x:y/0".into(), 2).unwrap();
    // A user of its own could not reach the test's directory.
    vcp.spaces = crate::vcp::spawn::Spaces::NONE;
    vcp.standby = standby;
    vcp.patience = Duration::from_secs(1);
    Box::new(vcp)
}

fn pids(dir: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(dir.join("pids")).unwrap_or_default();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_process_that_dies_or_hangs_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let serves = given(dir.path(), Script::default());
    // The second start fails.
    let program =
        program(dir.path(), "echo $$ >>$here/pids\nif [ $(wc -l <$here/pids) = 2 ]; then exit 3; fi");
    let first = VcpProcess::start(&program, &vcp(false), First::Serve).unwrap();
    let first_pid = first.pid();
    let mut bed = bed(&Script::default(), Source::Process(program, vcp(false)), true, Some(first));
    until("the first is there", || !pids(dir.path()).is_empty());

    // Its connection ends, and it does not: it is killed before another one is started.
    bed.first.cut();
    let second = serves.recv_timeout(DEADLINE).unwrap();
    started(&second);
    assert!(!alive(first_pid));
    assert_eq!(pids(dir.path()).len(), 3, "one that failed, and one that did not");
    let status = || bed.keeper.as_ref().unwrap().status();
    until("it shows", || status().state == "serving" && status().restarts == 1);
    assert_eq!(status().pid, Some(pids(dir.path())[2]));
    assert!(status().last_death.unwrap().contains("exit code 3"));

    // It dies, and its connection with it.
    kill(pids(dir.path())[2]);
    second.cut();
    started(&serves.recv_timeout(DEADLINE).unwrap());
    let last = bed.stop().expect("the process that serves now");
    assert_eq!(Some(&last.pid()), pids(dir.path()).last());
    drop(last);
    assert!(!alive(pids(dir.path())[3]));
}

#[test]
fn one_that_stands_by_takes_the_place_and_ends_with_the_keeper() {
    let dir = tempfile::tempdir().unwrap();
    let serves = given(dir.path(), Script::default());
    let program = program(dir.path(), "echo $$ >>$here/pids");
    let mut bed = bed(&Script::default(), Source::Process(program, vcp(true)), true, None);
    bed.first.cut();
    let served = serves.recv_timeout(DEADLINE).unwrap();
    started(&served);
    until("one stands by", || pids(dir.path()).len() == 2);
    let both = pids(dir.path());
    kill(both[0]);
    served.cut();
    started(&serves.recv_timeout(DEADLINE).unwrap());
    let status = || bed.keeper.as_ref().unwrap().status();
    until("it shows", || status().state == "serving" && status().pid == Some(both[1]));
    // And another one stands by for this one.
    until("one stands by", || pids(dir.path()).len() == 3);
    drop(bed.stop());
    for pid in pids(dir.path()) {
        assert!(!alive(pid), "{pid}");
    }
}

#[test]
fn a_restart_is_answered_when_the_guest_is_served_again() {
    let dir = tempfile::tempdir().unwrap();
    let serves = given(dir.path(), Script::default());
    let program = program(dir.path(), "echo $$ >>$here/pids");
    let mut bed = bed(&Script::default(), Source::Process(program, vcp(false)), true, None);
    let ask = |what: fn(&Keeper, Reply)| {
        let (answer, answered) = channel();
        what(bed.keeper.as_ref().unwrap(), Box::new(move |how| drop(answer.send(how))));
        answered.recv_timeout(DEADLINE).unwrap()
    };
    // There is a connection and no process.
    assert!(ask(Keeper::restart).unwrap_err().contains("try again"));
    bed.first.cut();
    let served = serves.recv_timeout(DEADLINE).unwrap();
    started(&served);
    let status = || bed.keeper.as_ref().unwrap().status();
    until("it serves", || status().state == "serving" && status().pid.is_some());
    // The connection goes with the process.
    let cut = std::thread::spawn({
        let (pid, stream) = (pids(dir.path())[0], served.stream.try_clone().unwrap());
        move || {
            until("it is killed", || !alive(pid));
            stream.shutdown(Shutdown::Both).unwrap();
        }
    });
    ask(Keeper::restart).unwrap();
    cut.join().unwrap();
    assert_eq!(status().restarts, 2);
    // Another process on the same connection.
    let before = status().pid;
    ask(Keeper::upgrade).unwrap();
    assert!(status().pid != before && status().upgrades == 1 && status().restarts == 2);
    bed.stop();
}

#[test]
fn one_that_stands_still_with_work_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let serves = given(dir.path(), Script::default());
    let program = program(dir.path(), "echo $$ >>$here/pids");
    let mut bed = bed(&Script::default(), Source::Process(program, vcp(false)), true, None);
    bed.first.cut();
    started(&serves.recv_timeout(DEADLINE).unwrap());
    let status = || bed.keeper.as_ref().unwrap().status();
    until("it serves", || status().state == "serving");
    // Its pulse never moves, and its rings are empty: nothing is wrong.
    std::thread::sleep(Duration::from_millis(1700));
    assert_eq!((status().stalls, pids(dir.path()).len()), (0, 1));
    vm_memory::Bytes::write_obj(&*bed._memory, 3u16, vm_memory::GuestAddress(0x2002)).unwrap();
    until("it is killed", || status().stalls == 1);
    until("another one is there", || pids(dir.path()).len() == 2);
    assert!(!alive(pids(dir.path())[0]));
    bed.stop();
}

#[test]
fn a_crash_loop_is_slowed_down() {
    let dir = tempfile::tempdir().unwrap();
    let program = program(dir.path(), "echo x >>$here/starts; exit 3");
    let mut bed = bed(&Script::default(), Source::Process(program, vcp(false)), true, None);
    bed.first.cut();
    std::thread::sleep(Duration::from_millis(1500));
    let status = bed.keeper.as_ref().unwrap().status();
    assert_eq!(status.state, "away");
    assert!(status.next_start_ms.is_some() && status.last_death.unwrap().contains("exit code 3"));
    bed.stop();
    // After 0, 50, 150, 350, 750 and 1550 ms at the earliest.
    let starts = std::fs::read_to_string(dir.path().join("starts")).unwrap().lines().count();
    assert!((1..=5).contains(&starts), "{starts}");
}

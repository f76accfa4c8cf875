//! VCPs, and the monitor, as `vcp run` starts them, in the hands of an attacker: what is tried from inside must fail, and
//! the guest, which verifies all it reads, must not notice.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest_images::bare;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vcp_tests::Result;
use vcp_tests::bad_target::BadTarget;
use vcp_tests::guest::Outcome;
use vcp_tests::proc::{Cmd, Stream};
use vcp_tests::proxy::Proxy;
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{procfs, tool};

use crate::inject::{Call, Taken};
use crate::monitor::ring3;
use crate::supervised::Bed;
use crate::support::{COMMAND, helper_vm, vcp};

const STEP: Duration = Duration::from_secs(60);

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

fn number(value: &Value) -> Result<u32> {
    Ok(u32::try_from(value.as_u64().with_context(|| format!("{value} is no number"))?)?)
}

/// The thread of a process that has this name.
fn thread(pid: u32, name: &str) -> Result<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?;
    for task in tasks.flatten() {
        let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if comm.trim_end() == name {
            return task.file_name().to_string_lossy().parse().context("no number");
        }
    }
    anyhow::bail!("process {pid} has no thread {name}")
}

/// The process that connects for a monitor's disk.
fn dialer(monitor: u32) -> Result<u32> {
    let is = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == "vcp-dial")
    };
    procfs::children(monitor)?.into_iter().find(is).context("there is no dialer")
}

/// Calls that must be refused with these errors.
fn refused(taken: &mut Taken, what: &str, number: i64, args: [u64; 6], errors: &[i32]) -> Result<()> {
    let call = taken.call(number, args)?;
    ensure!(matches!(call, Call::Failed(error) if errors.contains(&error)), "{what}: {call:?}");
    Ok(())
}

/// What nobody needs: no new code, no processes, no signals, no sockets of these families.
fn common(taken: &mut Taken, families: &[i32], victim: u32) -> Result<()> {
    const PERM: &[i32] = &[libc::EPERM];
    for family in families {
        let args = [*family as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0];
        refused(taken, &format!("a socket of family {family}"), libc::SYS_socket, args, PERM)?;
    }
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let exec = [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as u64, flags, u64::MAX, 0];
    refused(taken, "executable memory", libc::SYS_mmap, exec, PERM)?;
    refused(taken, "a process", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0], PERM)?;
    refused(taken, "another way to a process", libc::SYS_clone3, [0; 6], &[libc::ENOSYS])?;
    refused(taken, "a signal", libc::SYS_kill, [victim.into(), libc::SIGKILL as u64, 0, 0, 0, 0], PERM)?;
    Ok(())
}

/// Of these the process must die, and be known to.
const DEADLY: [(&str, i64); 4] = [
    ("exec", libc::SYS_execve),
    ("ptrace", libc::SYS_ptrace),
    ("another's memory", libc::SYS_process_vm_readv),
    ("a namespace", libc::SYS_unshare),
];

#[test]
fn vcp_that_was_taken_over_gets_nowhere() -> Result<()> {
    if !ring3()? || !root() {
        return Ok(());
    }
    // Another guest on the same host, whose VCP and memory would be worth having.
    let other = Bed::start("")?;
    let victim = number(&other.backend()?["pid"])?;
    let bed = Bed::start(",standby=off")?;
    let pid = number(&bed.backend()?["pid"])?;
    {
        let mut taken = Taken::over(pid as i32)?;
        common(
            &mut taken,
            &[libc::AF_INET, libc::AF_INET6, libc::AF_UNIX, libc::AF_NETLINK, libc::AF_PACKET],
            victim,
        )?;
        let files = ["/etc/passwd", "/proc/self/environ", "/dev/kvm", &format!("/proc/{victim}/mem"), "/"];
        for file in files {
            let at = taken.put(format!("{file}\0").as_bytes())?;
            let args = [libc::AT_FDCWD as u64, at, libc::O_RDONLY as u64, 0, 0, 0];
            refused(&mut taken, file, libc::SYS_openat, args, &[libc::ENOENT, libc::EACCES])?;
        }
        let at = taken.put(b"/x\0")?;
        let make = [libc::AT_FDCWD as u64, at, (libc::O_CREAT | libc::O_WRONLY) as u64, 0o600, 0, 0];
        refused(&mut taken, "a new file", libc::SYS_openat, make, &[libc::EACCES, libc::EROFS])?;
        // Far beyond the limit, which counts private memory.
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let much = [0, 4 << 30, protection as u64, flags as u64, u64::MAX, 0];
        refused(&mut taken, "4 GiB of memory", libc::SYS_mmap, much, &[libc::ENOMEM])?;
        // The connection to the target leads nowhere else.
        let anywhere = taken.put(&[0; 16])?;
        for fd in 0..64 {
            refused(
                &mut taken,
                "connect anew",
                libc::SYS_connect,
                [fd, anywhere, 16, 0, 0, 0],
                &[libc::EPERM],
            )?;
        }
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let tasks =
        limits.lines().find(|line| line.starts_with("Max processes")).context("no limit of processes")?;
    ensure!(tasks.split_whitespace().nth(2) == Some("64"), "{tasks}");
    for (n, (what, call)) in DEADLY.into_iter().enumerate() {
        let backend =
            bed.until("it serves", |backend| backend["state"] == "serving" && backend["pid"].is_u64())?;
        let mut taken = Taken::over(number(&backend["pid"])? as i32)?;
        let end = taken.call(call, [0; 6])?;
        ensure!(end == Call::Killed(libc::SIGSYS), "{what}: {end:?}");
        drop(taken);
        let backend = bed.until("it is replaced", |backend| backend["restarts"] == n as u64 + 1)?;
        // Its connection may have been missed before its end was.
        let death = backend["last_death"].as_str().unwrap_or_default();
        ensure!(death.contains("signal 31") || death.contains("closed its connection"), "{what}: {death}");
    }
    bed.finish()?;
    other.finish()?;
    Ok(())
}

#[test]
fn dialer_that_was_taken_over_gets_nowhere_and_is_replaced() -> Result<()> {
    if !ring3()? || !root() {
        return Ok(());
    }
    let bed = Bed::start("")?;
    let old = dialer(bed.proc.pid())?;
    {
        let mut taken = Taken::over(old as i32)?;
        common(&mut taken, &[libc::AF_UNIX, libc::AF_PACKET], bed.proc.pid())?;
        let at = taken.put(b"/etc/passwd\0")?;
        let args = [libc::AT_FDCWD as u64, at, 0, 0, 0, 0];
        refused(&mut taken, "a file", libc::SYS_openat, args, &[libc::ENOENT, libc::EACCES])?;
        let end = taken.call(libc::SYS_execve, [0; 6])?;
        ensure!(end == Call::Killed(libc::SIGSYS), "{end:?}");
    }
    // Its VCP cannot connect any more, and gives way to one that can.
    bed.until("both are replaced", |backend| backend["restarts"] == 1 && backend["state"] == "serving")?;
    ensure!(dialer(bed.proc.pid())? != old, "the old dialer is still there");
    bed.finish()?;
    Ok(())
}

#[test]
fn thread_of_the_monitor_that_was_taken_over_gets_nowhere() -> Result<()> {
    if !ring3()? || !root() {
        return Ok(());
    }
    let bed = Bed::start("")?;
    let monitor = bed.proc.pid();
    let vcps = procfs::children(monitor)?;
    for name in ["disk0-keeper", "disk0-attach", "vcp"] {
        let mut taken = Taken::over(thread(monitor, name)?)?;
        let none = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET];
        common(&mut taken, &none, vcps[0]).with_context(|| name.to_owned())?;
        if name == "disk0-attach" {
            let at = taken.put(b"/etc/passwd\0")?;
            let args = [libc::AT_FDCWD as u64, at, 0, 0, 0, 0];
            refused(&mut taken, "a file", libc::SYS_openat, args, &[libc::EPERM])?;
        }
    }
    // What only an attacker does is the end of the monitor, and of all that it has started.
    let mut taken = Taken::over(thread(monitor, "disk0-attach")?)?;
    let end = taken.call(libc::SYS_execve, [0; 6])?;
    ensure!(matches!(end, Call::Killed(_)), "{end:?}");
    drop(taken);
    ensure!(!bed.proc.wait(STEP)?.success(), "it lives");
    let end = Instant::now() + Duration::from_secs(1);
    for pid in vcps {
        while procfs::cmdline(pid).is_ok_and(|line| !line.is_empty()) {
            ensure!(Instant::now() < end, "process {pid} lives a second after its monitor");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

#[test]
fn vcp_without_a_network_comes_back_to_its_target() -> Result<()> {
    if !ring3()? || !root() {
        return Ok(());
    }
    let mut bed = Bed::start("")?;
    let backend = bed.backend()?;
    ensure!(backend["network"] == "portals", "{backend}");
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    let pid = backend["pid"].to_string();
    ensure!(of(&pid)? != of("self")?, "it shares the host's network");
    let routes = std::fs::read_to_string(format!("/proc/{pid}/net/route"))?;
    ensure!(routes.lines().count() <= 1, "there is a way out: {routes}");
    ensure!(of(&dialer(bed.proc.pid())?.to_string())? == of("self")?, "who connects has no network");
    // The connection is lost, a process is lost, one hands over: each connects again, or keeps what it has.
    bed.target.kill()?;
    bed.target.start_again()?;
    bed.moves()?;
    bed.ctl(&["restart-vcp", "disk0", "--upgrade"])?;
    bed.target.kill()?;
    bed.target.start_again()?;
    bed.moves()?;
    bed.ctl(&["restart-vcp", "disk0"])?;
    bed.moves()?;
    let connects = Pid::from_raw(dialer(bed.proc.pid())? as i32).context("no pid")?;
    let restarts = bed.backend()?["restarts"].as_u64().unwrap_or(0);
    kill_process(connects, Signal::KILL)?;
    bed.until("it is replaced", |b| b["restarts"].as_u64() > Some(restarts) && b["state"] == "serving")?;
    bed.moves()?;
    bed.finish()?;
    Ok(())
}

/// One that lives and does nothing would be noticed only when a connection is lost, and then nobody could connect.
#[test]
fn dialer_that_hangs_is_replaced() -> Result<()> {
    if !ring3()? || !root() {
        return Ok(());
    }
    let mut bed = Bed::start(",watchdog=2")?;
    let old = dialer(bed.proc.pid())?;
    kill_process(Pid::from_raw(old as i32).context("no pid")?, Signal::STOP)?;
    let said = "the process that connects for the VCP has not answered for";
    bed.proc.wait_line(Stream::Err, said, STEP)?;
    bed.until("both are replaced", |b| b["restarts"].as_u64() > Some(0) && b["state"] == "serving")?;
    ensure!(dialer(bed.proc.pid())? != old, "the old dialer is still there");
    // What it is there for.
    bed.target.kill()?;
    bed.target.start_again()?;
    bed.moves()?;
    bed.finish()?;
    Ok(())
}

/// Two portals, both reached through the dialer: one is cut off under the guest, which goes on by the other, and the first
/// is used again when it is back.
#[test]
fn several_paths_lead_through_the_dialer() -> Result<()> {
    if !ring3()? || !root() {
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let (first, second) = (Proxy::start(target.portal())?, Proxy::start(target.portal())?);
    let disk = format!(
        "url={},path=iscsi://{},network=portals,cpu=1",
        target.url_at(first.addr(), 0),
        second.addr()
    );
    let bed = Bed::with(target, &disk)?;
    let backend = bed.backend()?;
    ensure!(backend["network"] == "portals", "{backend}");
    first.wait_accepted(1, STEP)?;
    second.wait_accepted(1, STEP)?;
    dialer(bed.proc.pid())?;
    for (dies, stays) in [(&first, &second), (&second, &first)] {
        let accepted = dies.accepted();
        dies.refuse(true);
        dies.cut_now(true);
        bed.moves()?;
        ensure!(stays.open() > 0, "there is no way left");
        dies.refuse(false);
        // It comes back through the dialer, and is used the next time.
        dies.wait_accepted(accepted + 1, STEP)?;
        dies.wait_open(1, STEP)?;
        bed.moves()?;
    }
    let backend = bed.backend()?;
    ensure!(backend["restarts"] == 0, "a path cost a process: {backend}");
    bed.finish()?;
    Ok(())
}

/// Where a target redirects to is reached only if the disk's declaration names it.
#[test]
fn redirection_leads_where_the_declaration_allows() -> Result<()> {
    if !ring3()? || !root() {
        return Ok(());
    }
    let (first, second) = (BadTarget::start("option group 1")?, BadTarget::start("option group 1")?);
    first.script(&format!("login* redirect {}", second.portal()))?;
    let run = |options: &str| {
        vcp(["run", "--cmdline", "job=bench rw=randread secs=1 region=1M", "--kernel"])?
            .arg(bare::build()?)
            .args(["--disk", &format!("url={}{options}", first.url())])
            .run(STEP)
    };
    let out = run("")?;
    ensure!(out.status.code() == Some(1), "{}: {}", out.status, out.stderr);
    let advice = format!("portal={}", second.portal());
    ensure!(out.stderr.contains(&advice) && out.stderr.contains("network=any"), "{}", out.stderr);
    ensure!(second.count("event", "connect")? == 0, "it was connected to");
    for options in [format!(",{advice}"), ",network=any".into(), ",network=host".into()] {
        let out = run(&options)?;
        ensure!(out.status.success(), "{options}: {}: {}{}", out.status, out.stdout, out.stderr);
    }
    Ok(())
}

/// Without root everything works, and what the kernel did not allow is said, a line for each.
#[test]
fn ordinary_user_runs_a_guest() -> Result<()> {
    const NOBODY: u32 = 65534;
    if !ring3()? || !root() {
        return Ok(());
    }
    // In the group of /dev/kvm, as `vcp check` advises.
    let group = std::os::unix::fs::MetadataExt::gid(&std::fs::metadata("/dev/kvm")?);
    if group == 0 {
        tool::note_skip("/dev/kvm has no group of its own here");
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let dir = tempfile::tempdir()?;
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY))?;
    let (api, kernel) = (dir.path().join("api"), dir.path().join("kernel"));
    std::fs::copy(bare::build()?, &kernel)?;
    let groups = format!("--groups={group}");
    let proc = Cmd::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", &groups, "--"])
        .arg(tool::ours("vcp")?)
        .args(["run", "--cmdline", "job=churn secs=3600 region=8M qd=32 timeout=60", "--api-socket"])
        .arg(&api)
        .args(["--disk", &format!("url={}", target.url(0)), "--kernel"])
        .arg(&kernel)
        .env("XDG_RUNTIME_DIR", dir.path())
        .keep_stdin()
        .spawn()?;
    proc.wait_line(Stream::Out, "blocks of", STEP)?;
    let status = vcp(["ctl", "--api-socket"])?.arg(&api).args(["status", "--json"]).output(COMMAND)?;
    let status: Value = serde_json::from_str(&status)?;
    let backend = &status["machine"]["devices"][0]["backend"];
    let missing: Vec<String> =
        backend["not_confined"].as_array().into_iter().flatten().map(ToString::to_string).collect();
    // It is in no group but the user's own, which nobody has delegated.
    ensure!(backend["control_group"].is_null(), "{backend}");
    ensure!(missing.iter().any(|line| line.contains("control group")), "{missing:?}");
    let spaces: Vec<&str> =
        backend["namespaces"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    // All or none: where users may make namespaces, these are the ones.
    let all = spaces == ["user", "mount", "pid", "ipc", "uts", "net"];
    ensure!(all || missing.iter().any(|line| line.contains("own namespaces")), "{spaces:?}: {missing:?}");
    let said = proc.stream(Stream::Err);
    ensure!(said.contains("not confined: VCPs have no control groups"), "{said}");
    ensure!(missing.iter().all(|line| !line.contains("\\n")), "{missing:?}");
    proc.say(b"q")?;
    let status = proc.wait(STEP)?;
    ensure!(status.success() && proc.stream(Stream::Out).contains("churn: ok"), "{status}: {}", proc.tail());
    Ok(())
}

/// A bound that was asked for and cannot be kept is an error, and nothing is started.
#[test]
fn bounds_that_cannot_be_kept_are_refused() -> Result<()> {
    if !ring3()? {
        return Ok(());
    }
    let check: Value = serde_json::from_str(&vcp(["check", "--json"])?.output(STEP)?)?;
    let items = check["items"].as_array().context("no items")?;
    let groups = items.iter().find(|item| item["name"] == "control groups").context("check says nothing")?;
    if groups["status"] == "ok" {
        tool::note_skip("control groups can be made here");
        return Ok(());
    }
    let target = Target::start(Kind::Ours, &Spec::disk(64 << 20))?;
    let out = vcp(["run", "--cmdline", "job=bench rw=randread secs=1 region=1M", "--kernel"])?
        .arg(bare::build()?)
        .args(["--disk", &format!("url={},cpu-max=50", target.url(0))])
        .run(STEP)?;
    crate::support::one_error(&out, 1, &["disk0", "bounds", "control group"])
}

/// What the helper VM does, which has a hierarchy of its own: as a group's only process, among others as root, and
/// killed; each time with bounds that are looked at, and one that is broken.
const HELPER_JOB: &str = r#"
value() { name=$1; shift; echo "@$name=$*"; }
mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup || exit 1
echo "+cpu +memory +pids" >/sys/fs/cgroup/cgroup.subtree_control || exit 1
target=iqn.2026-01.test.vcp:disk
iscsi-target serve --listen 127.0.0.1:3260 --target $target --lun mem:64M >/tmp/target.log 2>&1 &
until grep -q ^ready: /tmp/target.log; do sleep 0.1; done
begin() {
    : >/tmp/out; rm -f /tmp/in; mkfifo /tmp/in
    sh -c "$1" </tmp/in >/tmp/out 2>/tmp/err &
    monitor=$!
    exec 4>/tmp/in
    # An emulated processor on a busy host: what ends the wait is the monitor's end, or the test's own limit.
    left=3000
    until grep -q 'blocks of' /tmp/out && vcp ctl -S /tmp/api status --json >/tmp/status 2>/dev/null; do
        left=$((left - 1)); { [ $left -gt 0 ] && kill -0 $monitor; } || { cat /tmp/out /tmp/err; exit 1; }
        sleep 0.1
    done
}
end() { echo q >&4; exec 4>&-; wait $monitor; value $1 $?; grep -q 'churn: ok' /tmp/out || { cat /tmp/out /tmp/err; exit 1; }; }
cat >/tmp/run.sh <<'X'
set -- url=iscsi://127.0.0.1:3260/iqn.2026-01.test.vcp:disk/0,cpu-max=200,memory-max=256M,pids-max=48,weight=300
exec vcp run --api-socket /tmp/api --kernel /guest/bare --cmdline 'job=churn secs=3600 region=8M qd=32 timeout=60' \
    --memory 64M --disk $1
X
# 1. A group that was delegated: the monitor is alone in it, steps aside, and is back in the end.
mkdir /sys/fs/cgroup/service
begin 'echo $$ >/sys/fs/cgroup/service/cgroup.procs; . /tmp/run.sh'
group=/sys/fs/cgroup/service/vcp-$monitor
value ALONE $(cat $group/disk0/cpu.max) $(cat $group/disk0/cpu.weight) $(cat $group/disk0/memory.max) $(cat $group/disk0/pids.max)
value ASIDE $(cat $group/monitor/cgroup.procs | grep -c "^$monitor$")
value MEMBERS $(wc -l <$group/disk0/cgroup.procs)
grep -o '"control_group":{[^}]*}' /tmp/status | head -n 1
vcp ctl -S /tmp/api status
# A VCP that takes more than it may is stopped, and the guest waits a little longer.
value STOPPED $(sed -n 's/^nr_throttled //p' $group/disk0/cpu.stat)
# What does not fit is refused by the kernel: no more tasks than that in the group.
value REFUSED $(sh -c 'echo $$ >'$group'/disk0/cgroup.procs; n=0; while [ $n -lt 60 ]; do sleep 100 & n=$((n + 1)); done' 2>&1 | grep -c fork)
for pid in $(cat $group/disk0/cgroup.procs); do grep -q sleep /proc/$pid/comm && kill -9 $pid; done
end FIRST
value LEFT1 $(find /sys/fs/cgroup/service -mindepth 1 -type d | wc -l)
# 2. As root among others: at the top. Killed: VCPs end with it, and the next monitor removes what is left.
begin '. /tmp/run.sh'
old=/sys/fs/cgroup/vcp-$monitor
value TOP $(cat $old/disk0/pids.max)
kill -9 $monitor; wait $monitor; exec 4>&-
# Everything is slow here; natively it is within a second (lifecycle.rs).
left=600
until [ -z "$(cat $old/disk0/cgroup.procs)" ] || [ $left = 0 ]; do left=$((left - 1)); sleep 0.1; done
value ORPHANS $(wc -l <$old/disk0/cgroup.procs)
begin '. /tmp/run.sh'
value STALE $(ls -d $old 2>/dev/null | wc -l)
# 3. Memory beyond the bound: the VCP is killed, and another one goes on.
group=/sys/fs/cgroup/vcp-$monitor
sh -c 'echo $$ >'$group'/disk0/cgroup.procs; exec dd if=/dev/zero of=/dev/null bs=400M count=1' 2>/dev/null
value OOM $(sed -n 's/^oom_kill //p' $group/disk0/memory.events)
end SECOND
value LEFT2 $(ls -d /sys/fs/cgroup/vcp-* 2>/dev/null | wc -l)
"#;

#[test]
fn control_groups_bound_vcps_and_are_removed() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64"]) {
        return Ok(());
    }
    let helper =
        helper_vm(&["vcp", "vcp-iscsi", "iscsi-target"])?.program_at(&bare::build()?, "/guest/bare")?;
    let ended = helper.deadline(Duration::from_secs(500)).run(HELPER_JOB)?;
    let done = Outcome { status: ended.status, console: ended.output };
    ensure!(done.status == 0, "the helper VM's job failed:\n{}", done.console);
    let memory = (256u64 << 20) + (64 << 20);
    assert_eq!(done.value("ALONE")?, format!("40000 20000 300 {memory} 48"), "{}", done.console);
    assert_eq!(done.value("TOP")?, "48", "{}", done.console);
    for (name, value) in
        [("ASIDE", 1), ("FIRST", 0), ("LEFT1", 0), ("ORPHANS", 0), ("STALE", 0), ("SECOND", 0), ("LEFT2", 0)]
    {
        assert_eq!(done.number(name)?, value, "{name}:\n{}", done.console);
    }
    for name in ["MEMBERS", "OOM", "REFUSED"] {
        ensure!(done.number(name)? > 0, "{name}:\n{}", done.console);
    }
    ensure!(done.console.contains("reaches: portals"), "{}", done.console);
    Ok(())
}

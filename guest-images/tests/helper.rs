//! Boots the helper VM for real: the exit status and output of a job come back, `/dev/kvm` is there, and a machine that
//! does not end is killed at its deadline.

use std::time::Duration;

use guest_images::Error;
use guest_images::helper::HelperVm;
use guest_images::modules::Kernel;

#[test]
fn job_prints_the_kernel_and_its_status_comes_back() {
    let done = HelperVm::new()
        .memory_mib(1024)
        .program("/usr/bin/env")
        .unwrap()
        .content("/etc/answer", 0o644, "forty-two\n")
        .unwrap()
        .deadline(Duration::from_secs(120))
        .run("uname -r; [ -c /dev/kvm ] && /usr/bin/env cat /etc/answer; exit 7")
        .unwrap();
    assert_eq!(done.status, 7, "{}", done.output);
    assert!(done.output.contains(&Kernel::find().unwrap().version), "{}", done.output);
    assert!(done.output.contains("forty-two"), "{}", done.output);
}

#[test]
fn machine_that_does_not_end_is_killed() {
    let vm = HelperVm::new().memory_mib(512).deadline(Duration::from_secs(2));
    let error = vm.run("while :; do sleep 60; done").unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    assert!(error.to_string().starts_with("the helper VM did not end within 2 s"), "{error}");
}

#[test]
fn console_is_two_way_and_a_dropped_machine_is_gone() {
    let vm = HelperVm::new().memory_mib(512).deadline(Duration::from_secs(120));
    let script = "echo ready to read; read -r line </dev/console; echo got $line; sleep 1000";
    let mut running = vm.start(script).unwrap();
    running.wait_for("ready to read").unwrap();
    running.send("twelve\n").unwrap();
    running.wait_for("got twelve").unwrap();
    let process = format!("/proc/{}", running.pid());
    assert!(std::path::Path::new(&process).exists());
    drop(running);
    assert!(!std::path::Path::new(&process).exists());
}

/// Runs a script that, at its first start (the disk remembers), ends the machine in a way of its own, and then exits
/// with 7.
fn status_of_second_start(first: &str) -> i32 {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let vm = HelperVm::new().memory_mib(512).disk(disk.path()).deadline(Duration::from_secs(120));
    let script = "[ \"$(head -c 1 /dev/vda)\" = x ] && exit 7; printf x >/dev/vda; sync;";
    vm.run(&format!("{script} {first}")).unwrap().status
}

#[test]
fn machine_that_resets_itself_is_started_again() {
    assert_eq!(status_of_second_start("reboot -f; exit 9"), 7);
}

#[test]
fn job_that_asks_for_it_is_started_again() {
    assert_eq!(status_of_second_start("exit 75"), 7);
    assert_eq!(status_of_second_start("exit 9"), 9);
}

#[test]
fn only_a_guest_that_crashed_or_stood_still_is_the_emulations() {
    let ended = |status: u8, console: &str, errors: &str| {
        let files = format!("echo '{console}' >/tmp/console; echo '{errors}' >/tmp/errors;");
        format!("{files} again_if_kvm_failed {status} /tmp/console /tmp/errors; exit 9")
    };
    assert_eq!(status_of_second_start(&ended(1, "", "the guest crashed: triple fault")), 7);
    assert_eq!(status_of_second_start(&ended(0, "half a boot", "")), 7);
    assert_eq!(status_of_second_start(&ended(1, "", "disk0: cannot connect")), 9);
    assert_eq!(status_of_second_start(&ended(0, "VCP-JOB-EXIT=1", "")), 9);
}

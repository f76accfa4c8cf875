//! Boots the Linux guest from its root image under QEMU: the job runs from the image, its status comes back, and the
//! file system is clean afterwards.

use std::time::Duration;

use guest_images::qemu::Qemu;
use guest_images::{linux, rootfs};

fn boot(disk: &std::path::Path, append: &str) -> String {
    let guest = linux::guest().unwrap();
    let drive = format!("file={},if=none,id=root,format=raw,cache=unsafe", disk.display());
    let append = format!("console=ttyS0 panic=-1 quiet {append}");
    let kernel = guest.kernel.display().to_string();
    let initrd = guest.initramfs.display().to_string();
    let args = [
        "-accel",
        "tcg,thread=multi",
        "-M",
        "q35",
        "-m",
        "512",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
        "-device",
        "virtio-blk-pci,drive=root",
        "-drive",
        &drive,
        "-kernel",
        &kernel,
        "-initrd",
        &initrd,
        "-append",
        &append,
    ];
    Qemu::start("the Linux guest", &args, Duration::from_secs(120), false).unwrap().wait().unwrap().output
}

#[test]
fn root_image_boots_writes_and_stays_clean() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("root.ext4");
    let job = "dd if=/dev/urandom of=/root/data bs=1M count=4 2>/dev/null; md5sum /root/data; \
               sleep 1000 >/root/held & mount -o bind /root /mnt; exit 3";
    rootfs::RootFs::new().size_bytes(64 << 20).job(job).unwrap().build_to(&disk).unwrap();

    let console = boot(&disk, "root=/dev/vda");
    assert_eq!(linux::job_status(&console), Some(3), "{console}");
    assert!(console.contains("VCP-ROOT-CLEAN") && !console.contains("VCP-INIT-FAILED"), "{console}");
    assert!(!console.contains("not found"), "a command that busybox does not have: {console}");
    rootfs::check(&disk).unwrap();
    let sum = console.lines().find(|l| l.contains("/root/data")).unwrap().trim().to_owned();

    // What was written is there at the next boot; a job on the command line goes before the one in the image.
    let again = boot(&disk, &format!("root=/dev/vda {}", linux::job_arg("md5sum /root/data")));
    assert_eq!(linux::job_status(&again), Some(0), "{again}");
    assert!(again.contains(&sum), "{again}");
    rootfs::check(&disk).unwrap();
}

#[test]
fn missing_root_device_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("empty");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let console = boot(&disk, "root=/dev/vdz");
    assert_eq!(linux::job_status(&console), Some(linux::INIT_FAILED), "{console}");
    assert!(console.contains("VCP-INIT-FAILED: no root device /dev/vdz after 10 s"), "{console}");
}

#[test]
fn job_on_the_command_line_runs_without_a_root_and_its_failure_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("data");
    std::fs::write(&disk, [b"hello from the disk\n".as_slice(), &[0; 492]].concat()).unwrap();
    let console = boot(&disk, &linux::job_arg("head -n 1 /dev/vda; lsmod | grep -c virtio; false"));
    assert_eq!(linux::job_status(&console), Some(1), "{console}");
    assert!(console.contains("hello from the disk"), "{console}");
}

//! The Debian guest in the helper VM: the disk behind a VCP, and the same LUN by open-iscsi inside the guest.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest_images::helper::HelperVm;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use guest_images::tree::Tree;

use super::{Window, add};
use crate::bench::report::Row;

const VCP: &str = "VCP (vcp-iscsi)";
const INSIDE: &str = "initiator in the guest (open-iscsi)";
const FAST: &str = "Linux guest, 4k randread qd32";
const PACED: &str = "Linux guest, 4k randread 100/s";
/// Who is judged against whom.
pub(super) const PAIRS: [(&str, &str, &str); 2] = [(FAST, VCP, INSIDE), (PACED, VCP, INSIDE)];

const GUEST_JOB: &str = include_str!("guest.sh");
const HELPER_JOB: &str = include_str!("helper.sh");

/// Measures; returns lines for the reader.
pub(super) fn run(bin: &Path, rounds: u32, secs: u32, rows: &mut Vec<Row>) -> Result<Vec<String>> {
    let kernel = Kernel::find()?;
    let mut tree = Tree::new();
    for program in ["/usr/bin/fio", "/usr/sbin/iscsistart"] {
        tree.program(program, Path::new(program))?;
    }
    // Everything takes longer in there: so does a window that says something.
    let secs = secs * 3;
    let job = GUEST_JOB.replace("SECONDS", &secs.to_string());
    let initrd = ["iscsi_tcp", "sd_mod", "crc32c_generic", "crc32c_intel"]
        .into_iter()
        .fold(Initramfs::new(), Initramfs::module)
        .tree(&tree)
        .job(&job)?
        .build(&kernel)?;
    let mut vm = HelperVm::new()
        .deadline(Duration::from_secs(120 + u64::from(rounds) * 2 * (120 + 4 * u64::from(secs))))
        .program_at(&kernel.image, "/bench/vmlinuz")?
        .program_at(&initrd, "/bench/initrd")?;
    for program in ["iscsi-target", "vcp-iscsi", "vcp-net", "vcp"] {
        vm = vm.program_at(&bin.join(program), &format!("/bench/{program}"))?;
    }
    let mut job = HELPER_JOB.to_owned();
    for _ in 0..rounds {
        job.push_str("by_vcp\ninside\n");
    }
    let done = vm.run(&job)?;
    if done.status != 0 {
        let tail: Vec<&str> = done.output.lines().rev().take(30).collect();
        bail!(
            "the job ended with {}: {}",
            done.status,
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    let mut count = 0;
    for line in done.output.lines().filter_map(|line| line.trim_end().strip_prefix("WINDOW ")) {
        let (case, contender, window) = window(line).with_context(|| format!("not as expected: {line}"))?;
        add(rows, case, contender, window);
        count += 1;
    }
    ensure!(
        count == 4 * rounds,
        "{count} of {} windows came out of the helper VM:\n{}",
        4 * rounds,
        done.output
    );
    Ok(vec![format!(
        "Linux: in the emulated helper VM, one vCPU on one CPU, target and VCP (vcp-iscsi; for the initiator inside: vcp-net, tap) on \
         one each; only ratios say anything; {rounds} rounds of {secs} s"
    )])
}

/// A line of the helper VM's job: `WAY|KIND|work alone/s|work/s|IOPS|p99|seconds|ticks of monitor, VCP, target`.
fn window(line: &str) -> Option<(&'static str, &'static str, Window)> {
    let mut fields = line.split('|');
    let contender = match fields.next()? {
        "vcp" => VCP,
        "inside" => INSIDE,
        _ => return None,
    };
    let case = match fields.next()? {
        "fast" => FAST,
        "paced" => PACED,
        _ => return None,
    };
    let numbers: Vec<f64> = fields.map(|field| field.trim().parse().ok()).collect::<Option<_>>()?;
    let [alone, work, iops, p99_us, secs, monitor, vcp, target] = numbers[..] else { return None };
    // Ticks are hundredths of a second.
    let cpu = [monitor, vcp, target].map(|ticks| ticks / 100.0 / secs);
    Some((case, contender, Window { compute: work / alone, iops, p99_us, cpu }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_job_are_understood() {
        let (case, who, window) = window("inside|paced|200|150|100|2500|10|900|50|100").unwrap();
        assert_eq!((case, who), (PACED, INSIDE));
        let expected = Window { compute: 0.75, iops: 100.0, p99_us: 2500.0, cpu: [0.9, 0.05, 0.1] };
        assert_eq!(window, expected);
        assert!(super::window("inside|paced|200|150|100|2500|10|900|50").is_none());
        assert!(super::window("vcp|fast||150|100|2500|10|900|50|1").is_none());
    }
}

//! The target against initiators that we did not write: the tools and the conformance tests of libiscsi.

mod common;

use std::process::Output;

use common::{TARGET, Target, tool};
use rustix::process::Signal;

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a family of `iscsi-test-cu` and returns (tests run, names of tests that failed).
fn conformance(family: &str, urls: &[&str]) -> Option<(u32, Vec<String>)> {
    let args = [&["--dataloss", "--normal", "--test", family][..], urls].concat();
    let log = text(&tool("iscsi-test-cu", &args)?);
    // "   tests    230    230    229      1        0"
    let ran = log
        .lines()
        .filter_map(|line| line.trim().strip_prefix("tests"))
        .filter_map(|numbers| numbers.split_whitespace().nth(1)?.parse().ok())
        .next()
        .unwrap_or_else(|| panic!("{family}: no summary in\n{log}"));
    let failed = log
        .lines()
        .filter_map(|line| line.strip_prefix("Suite ")?.strip_suffix(" had failures:"))
        .map(|name| name.replace(", Test ", "."))
        .collect();
    Some((ran, failed))
}

#[track_caller]
fn expect(family: &str, urls: &[&str], at_least: u32, known: &[&str]) {
    if let Some((ran, failed)) = conformance(family, urls) {
        assert!(ran >= at_least, "{family}: only {ran} tests ran");
        assert_eq!(failed, known, "{family}");
    }
}

#[test]
fn discovery_lists_targets_and_luns() {
    let target = Target::start(&["--lun", "mem:64M", "--lun", "mem:8M,block-size=4096,lun=7"]);
    let Some(output) = tool("iscsi-ls", &["-s", &format!("iscsi://{}", target.addr)]) else { return };
    let listing = text(&output);
    assert!(output.status.success(), "{listing}");
    assert!(listing.contains(&format!("Target:{TARGET} Portal:{},1", target.addr)), "{listing}");
    assert!(listing.contains("Lun:0 ") && listing.contains("Lun:7 "), "{listing}");
    target.stop(Signal::TERM);
}

#[test]
fn inquiry_and_capacity() {
    let target = Target::start(&["--lun", "mem:3T", "--lun", "mem:8M,block-size=4096"]);
    let run = |name: &str, args: &[&str], lun: u32| {
        let url = target.url(lun);
        let output = tool(name, &[args, &[url.as_str()]].concat())?;
        assert!(output.status.success(), "{name} {args:?}: {}", text(&output));
        Some(text(&output))
    };
    let Some(standard) = run("iscsi-inq", &[], 0) else { return };
    assert!(standard.contains("Vendor:VCP") && standard.contains("DIRECT_ACCESS"), "{standard}");
    let page = |page: &str| run("iscsi-inq", &["-e", "1", "-c", page], 0).unwrap_or_default();
    let pages = page("0");
    for code in ["0x00", "0x80", "0x83", "0xb0", "0xb1", "0xb2"] {
        assert!(pages.contains(code), "{pages}");
    }
    assert!(page("128").contains("Unit Serial Number:["));
    assert!(page("131").contains("NAA"));
    assert!(page("176").contains("maximum transfer length:16384"));
    assert!(page("177").contains("Medium Rotation Rate:1"));
    assert!(page("178").contains("lbpu:1"));
    let capacity = run("iscsi-readcapacity16", &[], 0).unwrap_or_default();
    assert!(capacity.contains("Total size:3298534883328"), "{capacity}");
    let capacity = run("iscsi-readcapacity16", &[], 1).unwrap_or_default();
    assert!(capacity.contains("LOGICAL BLOCK LENGTH IN BYTES:4096"), "{capacity}");
    target.stop(Signal::INT);
}

/// Everything, on a LUN whose logical block is its physical block.
#[test]
fn conformance_4096() {
    let target = Target::start(&["--lun", "mem:128M,block-size=4096"]);
    expect("ALL", &[&target.url(0)], 230, &[]);
}

/// CONFORMANCE.md tells why this one test cannot pass where a physical block has several logical ones.
const NEEDS_ONE_BLOCK_PER_PHYSICAL: &str = "GetLBAStatus.UnmapSingle";

#[test]
fn conformance_512_memory() {
    let target = Target::start(&["--lun", "mem:128M"]);
    expect("SCSI", &[&target.url(0)], 215, &[NEEDS_ONE_BLOCK_PER_PHYSICAL]);
    expect("ALL.MultipathIO", &[&target.url(0), &target.url(0)], 4, &[]);
}

#[test]
fn conformance_512_file_without_write_cache() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(128 << 20).expect("a sparse file");
    let lun = format!("file:{},write-cache=off", file.path().display());
    let target = Target::start(&["--lun", &lun]);
    for family in ["ALL.Write10", "ALL.WriteSame16", "ALL.Unmap", "ALL.Verify16", "ALL.CompareAndWrite"] {
        expect(family, &[&target.url(0)], 1, &[]);
    }
}

#[test]
fn conformance_read_only() {
    let target = Target::start(&["--lun", "mem:64M,read-only"]);
    expect("ALL.ReadOnly", &[&target.url(0)], 1, &[]);
}

/// All data asked for by R2T, in small bursts.
#[test]
fn conformance_with_r2t() {
    let options =
        ["--initial-r2t", "yes", "--immediate-data", "no", "--max-burst", "16K", "--first-burst", "4K"];
    let target = Target::start(&[&["--lun", "mem:128M,block-size=4096"][..], &options].concat());
    for family in ["iSCSI", "ALL.Write16", "ALL.WriteVerify16"] {
        expect(family, &[&target.url(0)], 1, &[]);
    }
}

#[test]
fn chap_keeps_strangers_out() {
    let secret = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(secret.path(), "correct horse battery\n").expect("written");
    let path = secret.path().display().to_string();
    let target = Target::start(&["--lun", "mem:8M", "--chap-user", "alice", "--chap-secret-file", &path]);
    let log_in = |user: &str| tool("iscsi-inq", &[&format!("iscsi://{user}{}/{TARGET}/0", target.addr)]);
    let Some(right) = log_in("alice%correct horse battery@") else { return };
    assert!(right.status.success(), "{}", text(&right));
    for stranger in ["", "alice%wrong horse battery@", "bob%correct horse battery@"] {
        let output = log_in(stranger).expect("installed");
        assert!(!output.status.success() && text(&output).contains("uthentication"), "{}", text(&output));
    }
    target.stop(Signal::TERM);
}

//! `vcp-iscsi discover` lists what is there.

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::target::{self, Kind, LunSpec, Spec, Target};

use crate::support::{json, output, strings};

fn lists(kind: Kind) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let spec = Spec::luns([LunSpec::new(64 << 20), LunSpec::new(32 << 20)]);
    let target = Target::start(kind, &spec)?;
    let url = format!("iscsi://{}", target.portal());
    let table = output(&["discover", &url])?;
    ensure!(table.contains(target.iqn()), "no {} in:\n{table}", target.iqn());
    ensure!(table.contains(&target.portal().to_string()), "no {} in:\n{table}", target.portal());
    for lun in target.luns() {
        let number = lun.number.to_string();
        let listed = table.lines().any(|l| l.split_whitespace().any(|w| w == number));
        ensure!(listed, "no LUN {number} in:\n{table}");
    }
    let document = json(&["discover", &url])?;
    ensure!(strings(&document).iter().any(|s| s == target.iqn()), "no {} in {document}", target.iqn());
    let sizes: Vec<u64> = numbers(&document);
    for lun in target.luns() {
        ensure!(sizes.contains(&lun.spec.size_bytes), "no size {} in {document}", lun.spec.size_bytes);
    }
    Ok(())
}

fn numbers(value: &serde_json::Value) -> Vec<u64> {
    match value {
        serde_json::Value::Number(n) => n.as_u64().into_iter().collect(),
        serde_json::Value::Array(a) => a.iter().flat_map(numbers).collect(),
        serde_json::Value::Object(o) => o.values().flat_map(numbers).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn discover_lists_tgtd() -> Result<()> {
    lists(Kind::Tgtd)
}

#[test]
fn discover_lists_istgt() -> Result<()> {
    lists(Kind::Istgt)
}

#[test]
fn discover_lists_our_target() -> Result<()> {
    lists(Kind::Ours)
}

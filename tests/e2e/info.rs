//! `vcp-iscsi info` tells the truth about a LUN.

use anyhow::{Context, ensure};
use serde_json::Value;
use vcp_tests::Result;
use vcp_tests::target::{self, Kind, LunSpec, Spec, Target};

use crate::support::{json, output};

/// The first value under `key`, wherever in the document.
fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(o) => o.get(key).or_else(|| o.values().find_map(|v| find(v, key))),
        Value::Array(a) => a.iter().find_map(|v| find(v, key)),
        _ => None,
    }
}

fn number(document: &Value, key: &str) -> Result<u64> {
    find(document, key).and_then(Value::as_u64).with_context(|| format!("no {key} in {document}"))
}

fn tells(kind: Kind, lun: &LunSpec) -> Result<()> {
    if !target::have(kind) {
        return Ok(());
    }
    let target = Target::start(kind, &Spec::luns([lun.clone()]))?;
    let url = target.url(0);
    let document = json(&["info", &url])?;
    assert_eq!(number(&document, "size_bytes")?, lun.size_bytes, "{document}");
    assert_eq!(number(&document, "block_bytes")?, u64::from(lun.block_bytes), "{document}");
    let text = output(&["info", &url])?;
    ensure!(text.contains(target.iqn()), "no target name in:\n{text}");
    ensure!(text.contains(&lun.block_bytes.to_string()), "no block size in:\n{text}");
    let vendor = match kind {
        Kind::Tgtd => "IET",
        Kind::Istgt => "FreeBSD",
        Kind::Ours => "VCP",
    };
    ensure!(text.contains(vendor), "no vendor {vendor:?} in:\n{text}");
    Ok(())
}

#[test]
fn info_tells_size_and_blocks_of_a_tgtd_lun() -> Result<()> {
    tells(Kind::Tgtd, &LunSpec::new(64 << 20))
}

#[test]
fn info_tells_size_and_blocks_of_an_istgt_lun() -> Result<()> {
    tells(Kind::Istgt, &LunSpec::new(64 << 20))
}

#[test]
fn info_tells_size_and_blocks_of_our_lun() -> Result<()> {
    tells(Kind::Ours, &LunSpec::new(64 << 20))
}

#[test]
fn info_tells_lun_300_with_4096_byte_blocks_and_4_tib() -> Result<()> {
    for kind in [Kind::Tgtd, Kind::Ours] {
        let lun = LunSpec { number: Some(300), block_bytes: 4096, ..LunSpec::new(4 << 40) };
        tells(kind, &lun).with_context(|| kind.to_string())?;
    }
    Ok(())
}

#[test]
fn info_tells_that_a_lun_is_read_only() -> Result<()> {
    let lun = LunSpec { read_only: true, ..LunSpec::new(1 << 20) };
    let target = Target::start(Kind::Ours, &Spec::luns([lun]))?;
    let document = json(&["info", &target.url(0)])?;
    assert_eq!(find(&document, "read_only"), Some(&Value::Bool(true)), "{document}");
    Ok(())
}

//! `iscsi-target serve` of this workspace.

use super::{Config, START};
use crate::Result;
use crate::proc::{Cmd, Proc, Stream};
use crate::tool;

pub(super) fn start(config: &Config<'_>) -> Result<Proc> {
    let mut cmd = Cmd::new(tool::ours("iscsi-target")?)
        .args(["serve", "--listen", &config.portal.to_string(), "--target", config.iqn])
        .args(["--log", "info"]);
    for lun in config.luns {
        let (image, block, number) = (lun.image.display(), lun.spec.block_bytes, lun.number);
        let mut spec = format!("file:{image},block-size={block},lun={number}");
        if !lun.spec.write_cache {
            spec.push_str(",write-cache=off");
        }
        if lun.spec.read_only {
            spec.push_str(",read-only");
        }
        cmd = cmd.args(["--lun", &spec]);
    }
    if let Some(chap) = &config.spec.chap {
        cmd = cmd.args(["--chap", &format!("{}:{}", chap.user, chap.secret)]);
        if let Some((user, secret)) = &chap.mutual {
            cmd = cmd.args(["--mutual-chap", &format!("{user}:{secret}")]);
        }
    }
    let proc = cmd.spawn()?;
    proc.wait_line(Stream::Out, "ready:", START)?;
    Ok(proc)
}

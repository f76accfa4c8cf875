//! `--print-capabilities`: what QEMU's conventions for vhost-user backends want to know (docs/interop/vhost-user.json,
//! `VHostUserBackendCapabilities`).

use serde::Serialize;

/// The document.
#[derive(Debug, Serialize)]
pub struct Capabilities {
    /// Kind of device.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Options of the conventions that apply: `--read-only`. There is no `--blk-file`: a disk is named by its URL.
    pub features: &'static [&'static str],
}

/// Ours.
pub const CAPABILITIES: Capabilities = Capabilities { kind: "block", features: &["read-only"] };

/// As it is printed.
#[must_use]
pub fn text() -> String {
    serde_json::to_string_pretty(&CAPABILITIES).unwrap_or_default()
}

/// Puts the command `serve` where the conventions leave it out: `vcp-iscsi --socket-path=S URL`.
pub fn with_command(args: Vec<std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let is_serve = |arg: &std::ffi::OsString| {
        let arg = arg.to_string_lossy();
        let name = arg.split('=').next().unwrap_or_default();
        ["--socket-path", "--fd"].contains(&name)
    };
    let has_command = args.iter().skip(1).any(|arg| arg == "serve" || arg == "discover" || arg == "info");
    let mut args = args;
    if !has_command && args.iter().skip(1).any(is_serve) {
        args.insert(1, "serve".into());
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_what_the_conventions_ask_for() {
        let value: serde_json::Value = serde_json::from_str(&text()).unwrap();
        assert_eq!(value, serde_json::json!({"type": "block", "features": ["read-only"]}));
    }

    #[test]
    fn the_command_may_be_left_out_where_the_conventions_do() {
        let run = |args: &[&str]| with_command(args.iter().map(Into::into).collect());
        assert_eq!(
            run(&["vcp-iscsi", "--socket-path=/s", "URL"]),
            ["vcp-iscsi", "serve", "--socket-path=/s", "URL"]
        );
        assert_eq!(
            run(&["vcp-iscsi", "--read-only", "--fd", "3"]),
            ["vcp-iscsi", "serve", "--read-only", "--fd", "3"]
        );
        for same in
            [&["vcp-iscsi"][..], &["vcp-iscsi", "info", "--fd"], &["x", "serve", "--fd=3"], &["x", "--help"]]
        {
            assert_eq!(run(same), same);
        }
    }
}

//! Text in the full-feature phase: SendTargets (RFC 7143 4.3, appendix C), everything else is not understood.

use std::net::SocketAddr;

/// Text of one request that is collected over several PDUs, at most.
pub(super) const MAX_REQUEST_BYTES: usize = 8192;
/// The only target portal group.
pub(super) const PORTAL_GROUP: u16 = 1;

/// What a session may ask about.
pub(super) struct Scope<'a> {
    /// Names of all targets.
    pub(super) targets: &'a [&'a str],
    /// The session's own target; none in a discovery session.
    pub(super) own: Option<&'a str>,
    /// Where they are reached.
    pub(super) portal: SocketAddr,
}

/// Answers the keys in `request` (`key=value` pairs, each ended by NUL).
pub(super) fn answer(request: &[u8], scope: &Scope<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    for pair in request.split(|&byte| byte == 0).filter(|pair| !pair.is_empty()) {
        let pair = String::from_utf8_lossy(pair);
        let (key, value) = pair.split_once('=').unwrap_or((&pair, ""));
        if key != "SendTargets" {
            out.extend_from_slice(format!("{key}=NotUnderstood\0").as_bytes());
            continue;
        }
        let wanted = |name: &str| match (value, scope.own) {
            // "All" belongs to discovery sessions; elsewhere a session may only ask about its own target.
            ("All", None) => true,
            ("All", Some(_)) => false,
            ("", own) => own == Some(name),
            (asked, None) => asked == name,
            (asked, Some(own)) => asked == name && own == name,
        };
        if value == "All" && scope.own.is_some() {
            out.extend_from_slice(b"SendTargets=Reject\0");
        }
        for name in scope.targets.iter().filter(|name| wanted(name)) {
            let portal = scope.portal;
            out.extend_from_slice(format!("TargetName={name}\0").as_bytes());
            out.extend_from_slice(format!("TargetAddress={portal},{PORTAL_GROUP}\0").as_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(request: &str, own: Option<&str>) -> String {
        let scope = Scope { targets: &["iqn.a", "iqn.b"], own, portal: "127.0.0.1:3260".parse().unwrap() };
        String::from_utf8(answer(request.as_bytes(), &scope)).unwrap()
    }

    #[test]
    fn send_targets() {
        let a = "TargetName=iqn.a\0TargetAddress=127.0.0.1:3260,1\0";
        let b = "TargetName=iqn.b\0TargetAddress=127.0.0.1:3260,1\0";
        assert_eq!(ask("SendTargets=All\0", None), format!("{a}{b}"));
        assert_eq!(ask("SendTargets=iqn.b\0", None), b);
        assert_eq!(ask("SendTargets=iqn.c\0", None), "");
        assert_eq!(ask("SendTargets=\0", Some("iqn.a")), a);
        assert_eq!(ask("SendTargets=iqn.b\0", Some("iqn.a")), "");
        assert_eq!(ask("SendTargets=All\0", Some("iqn.a")), "SendTargets=Reject\0");
        assert_eq!(ask("X-new=1\0", None), "X-new=NotUnderstood\0");
    }
}

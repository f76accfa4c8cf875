//! `--net switch=NAME`: a free port of a switch that runs already, `vcp-net serve --switch NAME`. It outlives each of its
//! guests, so no monitor starts it; a port is free if its handshake succeeds, for a port serves one front end at a time.

use std::path::Path;

use vcp_core::process::named;

use super::backends::{Backend, net_behind};
use crate::config::NetSpec;
use crate::error::{Error, Result};
use crate::vcp::Source;
use crate::virtio::vhost_user::link::Link;
use crate::virtio::vhost_user::net;

/// The ports that are looked at; a switch has no more.
const PORTS: usize = 128;

/// Connects the network device `name` to the first port of the switch that nobody has.
pub(super) fn join(name: &str, spec: &NetSpec, switch: &str) -> Result<Backend> {
    let Some(dir) = named::switch_dir(switch) else {
        let variable = named::SWITCHES_VARIABLE;
        return Err(Error::Usage(format!(
            "{name}: there is no place where the switch {switch} could be: set XDG_RUNTIME_DIR or {variable}"
        )));
    };
    join_in(name, spec, switch, &dir)
}

fn join_in(name: &str, spec: &NetSpec, switch: &str, dir: &Path) -> Result<Backend> {
    let fail = |reason: String| Error::Vcp { device: name.to_owned(), reason };
    let given = spec.mac_bytes().map_err(Error::Usage)?;
    let mut last = None;
    for port in 0..PORTS {
        let socket = named::port_socket(dir, port);
        if !socket.exists() {
            break;
        }
        let kind =
            net::kind(given.unwrap_or_else(|| port_mac(switch, port)), spec.queues.unwrap_or(1), spec.packed);
        let joined = Link::connect(name, &socket, kind.queue_max_sizes.len() as u16)
            .and_then(|link| net_behind(name, spec, kind, link, Source::Socket(socket.clone()), None));
        match joined {
            Ok(backend) => {
                tracing::info!(device = name, switch, port, "joined the switch");
                return Ok(backend);
            }
            Err(e) => last = Some((port, e)),
        }
    }
    Err(match last {
        None => fail(format!(
            "there is no switch {switch} ({} has no ports): start it with `vcp-net serve --switch {switch}`, or give a socket of \
             another one with socket=PATH",
            dir.display()
        )),
        Some((port, error)) => fail(format!(
            "no port of the switch {switch} is free: it has {} (`vcp-net serve --switch {switch},ports=N` gives it more); the last \
             one said: {}",
            port + 1,
            crate::chain(&error)
        )),
    })
}

/// The address of a port's guest that was given none: another one for each port of a switch, and the same every time.
fn port_mac(switch: &str, port: usize) -> [u8; 6] {
    // FNV-1a, for it is the same in every version of this program.
    let hash =
        switch.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let [a, b, ..] = hash.to_be_bytes();
    [0x52, 0x54, 0x56, a, b, port as u8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_that_is_not_there_is_told_with_how_to_start_it() {
        let dir = tempfile::tempdir().unwrap();
        let spec = NetSpec::parse("switch=lan").unwrap();
        let error = join_in("net0", &spec, "lan", dir.path()).err().unwrap().to_string();
        assert!(error.contains("vcp-net serve --switch lan"), "{error}");
        // A socket on which nobody listens.
        drop(std::os::unix::net::UnixListener::bind(named::port_socket(dir.path(), 0)).unwrap());
        let error = join_in("net0", &spec, "lan", dir.path()).err().unwrap().to_string();
        assert!(error.contains("is free: it has 1") && error.contains("nobody listens"), "{error}");
    }

    #[test]
    fn each_port_has_an_address_of_its_own() {
        assert_ne!(port_mac("lan", 0), port_mac("lan", 1));
        assert_ne!(port_mac("lan", 0), port_mac("wan", 0));
        assert_eq!(port_mac("lan", 0), port_mac("lan", 0));
        assert!(port_mac("lan", 9)[0] & 1 == 0, "a station's");
    }
}

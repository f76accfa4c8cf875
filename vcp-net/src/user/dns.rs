//! DNS (RFC 1035) as far as a forwarder needs it: what is asked, and answers about guests. All else goes to the host's
//! name servers and comes back as it is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::config::UserConfig;
use super::leases::Leases;

/// The port.
pub const PORT: u16 = 53;
/// Types.
const A: u16 = 1;
const PTR: u16 = 12;
const AAAA: u16 = 28;
const ANY: u16 = 255;
/// How long an answer about a guest holds.
const TTL_S: u32 = 5;
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

/// Whether a byte can be part of a name.
#[must_use]
pub fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

/// Appends a name; labels that no name can have are left out.
pub fn push_name(out: &mut Vec<u8>, name: &str) {
    for label in name.split('.').filter(|label| (1..=63).contains(&label.len())) {
        out.push(label.len() as u8);
        out.extend(label.bytes());
    }
    out.push(0);
}

/// A query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Its number.
    pub id: u16,
    /// What is asked for, in lower case, without a dot at its end.
    pub name: String,
    /// Which kind of record.
    pub kind: u16,
    /// Where the question ends in the message.
    end: usize,
}

/// Reads a query; `None` if it is none, or broken.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<Question> {
    let header: &[u8; 12] = bytes.first_chunk()?;
    // A query (opcode 0) with one question.
    if header[2] & 0xf8 != 0 || header[4..6] != [0, 1] {
        return None;
    }
    let (mut at, mut name) = (12, String::new());
    loop {
        let len = usize::from(*bytes.get(at)?);
        let label = bytes.get(at + 1..at + 1 + len)?;
        at += 1 + len;
        if len == 0 {
            break;
        }
        if len > 63 || name.len() + len > 254 {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|&byte| char::from(byte).to_ascii_lowercase()));
    }
    let tail: &[u8; 4] = bytes.get(at..)?.first_chunk()?;
    let kind = u16::from_be_bytes([tail[0], tail[1]]);
    (tail[2..] == [0, 1]).then_some(Question {
        id: u16::from_be_bytes([header[0], header[1]]),
        name,
        kind,
        end: at + 4,
    })
}

/// The address that a name of a reverse lookup stands for.
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(v4) = name.strip_suffix(".in-addr.arpa") {
        let mut parts = v4.split('.').rev();
        let mut octets = [0; 4];
        for octet in &mut octets {
            *octet = parts.next()?.parse().ok()?;
        }
        return parts.next().is_none().then(|| Ipv4Addr::from(octets).into());
    }
    let nibbles = name.strip_suffix(".ip6.arpa")?;
    let (mut address, mut count) = (0u128, 0);
    for nibble in nibbles.split('.').rev() {
        let digit = u8::from_str_radix(nibble, 16).ok().filter(|_| nibble.len() == 1)?;
        (address, count) = (address << 4 | u128::from(digit), count + 1);
        if count > 32 {
            return None;
        }
    }
    (count == 32).then(|| Ipv6Addr::from(address).into())
}

/// The answer that the stack gives itself: about guests and the gateway. `None`: the question is for others.
#[must_use]
pub fn answer(query: &[u8], question: &Question, config: &UserConfig, leases: &Leases) -> Option<Vec<u8>> {
    let mut records: Vec<(u16, Vec<u8>)> = Vec::new();
    let full = |name: &str| format!("{name}.{}", config.domain);
    if let Some(ip) = reverse(&question.name) {
        if !config.is_inside(ip) {
            return None;
        }
        let name = match leases.by_address(config, ip) {
            Some(name) => Some(full(name)),
            None if config.is_gateway(ip) => Some(full("gateway")),
            None => None,
        };
        if let Some(name) = name.filter(|_| matches!(question.kind, PTR | ANY)) {
            let mut data = Vec::new();
            push_name(&mut data, &name);
            records.push((PTR, data));
        }
        let code = if records.is_empty() { NXDOMAIN } else { 0 };
        return Some(respond(query, question, code, &records));
    }
    let inside = question.name.strip_suffix(&config.domain).and_then(|name| name.strip_suffix('.'));
    let name = match inside {
        Some(name) => name,
        // Names without a dot are guests', if there is one; what else they may be, the host's servers know.
        None if !question.name.contains('.') => &question.name,
        None => return None,
    };
    let found = if name == "gateway" {
        Some((Some(config.gateway4), Some(config.gateway6)))
    } else {
        leases.by_name(config, name)
    };
    let Some((v4, v6)) = found else {
        return inside.is_some().then(|| respond(query, question, NXDOMAIN, &[]));
    };
    if let Some(v4) = v4.filter(|_| matches!(question.kind, A | ANY)) {
        records.push((A, v4.octets().into()));
    }
    if let Some(v6) = v6.filter(|_| matches!(question.kind, AAAA | ANY)) {
        records.push((AAAA, v6.octets().into()));
    }
    Some(respond(query, question, 0, &records))
}

/// The answer if there is nobody to ask.
#[must_use]
pub fn failure(query: &[u8], question: &Question) -> Vec<u8> {
    respond(query, question, SERVFAIL, &[])
}

fn respond(query: &[u8], question: &Question, code: u8, records: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut out = query[..question.end].to_vec();
    // A response, with recursion as it was asked for, and to be had.
    out[2] = 0x80 | query[2] & 1 | if code == SERVFAIL { 0 } else { 4 };
    out[3] = 0x80 | code;
    out[6..8].copy_from_slice(&(records.len() as u16).to_be_bytes());
    out[8..12].fill(0);
    for (kind, data) in records {
        // The name of the question.
        out.extend([0xc0, 12]);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1]);
        out.extend(TTL_S.to_be_bytes());
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Mac;
    use crate::user::packet::Link;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut out = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        push_name(&mut out, name);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1]);
        out
    }

    #[test]
    fn guests_are_known_by_name_and_others_are_not_ours() {
        let (config, mut leases) = (UserConfig::default(), Leases::default());
        let at = leases.of(&config, Link { mac: Mac(0x5254_0000_0001), vid: 0 }).unwrap();
        leases.name(at, "web");
        leases.get_mut(at).unwrap().bound4 = true;
        let ask = |name: &str, kind| {
            let query = query(name, kind);
            let question = parse(&query).unwrap();
            answer(&query, &question, &config, &leases)
        };
        let got = ask("Web.internal", A).unwrap();
        assert_eq!(
            (&got[..2], got[3] & 15, got[7], &got[got.len() - 4..]),
            (&[0x12, 0x34][..], 0, 1, &[10, 0, 2, 15][..])
        );
        assert!(ask("web", A).is_some() && ask("example.org", A).is_none() && ask("localhost", A).is_none());
        assert_eq!(ask("nobody.internal", A).unwrap()[3] & 15, NXDOMAIN);
        // It is there, but has no such address.
        let got = ask("web.internal", AAAA).unwrap();
        assert_eq!((got[3] & 15, got[7]), (0, 0));
        let got = ask("15.2.0.10.in-addr.arpa", PTR).unwrap();
        assert!(got.ends_with(b"\x03web\x08internal\0"));
        assert!(ask("8.8.8.8.in-addr.arpa", PTR).is_none());
        assert_eq!(ask("gateway.internal", A).unwrap()[7], 1);
    }

    proptest! {
        #[test]
        fn arbitrary_messages_do_no_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..64), fix: bool) {
            if fix && bytes.len() >= 12 {
                bytes[2..6].copy_from_slice(&[1, 0, 0, 1]);
            }
            if let Some(question) = parse(&bytes) {
                let _ = answer(&bytes, &question, &UserConfig::default(), &Leases::default());
                prop_assert!(failure(&bytes, &question).len() <= bytes.len());
            }
        }
    }
}

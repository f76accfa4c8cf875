//! DHCPv6 (RFC 8415), as a server answers: one address for each guest, name servers, domains.

use super::config::UserConfig;
use super::leases::Leases;
use super::packet::Link;

/// Ports of server and client.
pub const SERVER: u16 = 547;
/// See [`SERVER`].
pub const CLIENT: u16 = 546;
const LIFETIME_S: u32 = 86_400;
/// Longest answer: it goes into one packet of any link (RFC 8200, 5).
const ANSWER_BYTES: usize = 1280 - 40 - 8;
/// Longest identifier of a client (RFC 8415, 11.1).
const DUID_BYTES: usize = 130;
/// Most bytes of the domains in which names are looked for, of which the host may have any number.
const SEARCH_BYTES: usize = 512;
const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION: u8 = 11;

/// Each option: its number and value; `None` where lengths do not add up.
fn options(mut bytes: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let head: &[u8; 4] = bytes.first_chunk()?;
        let (kind, len) =
            (u16::from_be_bytes([head[0], head[1]]), usize::from(u16::from_be_bytes([head[2], head[3]])));
        found.push((kind, bytes.get(4..4 + len)?));
        bytes = &bytes[4 + len..];
    }
    Some(found)
}

fn push(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend(kind.to_be_bytes());
    out.extend((value.len() as u16).to_be_bytes());
    out.extend_from_slice(value);
}

/// The server's own identifier: its link-layer address (RFC 8415, 11.4).
fn duid(config: &UserConfig) -> Vec<u8> {
    let mut duid = vec![0, 3, 0, 1];
    duid.extend(config.mac.bytes());
    duid
}

/// Answers a message of a client; `None`: there is nothing to say.
pub fn answer(
    bytes: &[u8],
    from: Link,
    config: &UserConfig,
    search: &[String],
    leases: &mut Leases,
) -> Option<Vec<u8>> {
    let (&[kind, a, b, c], rest) = bytes.split_first_chunk::<4>()?;
    let options = options(rest)?;
    let get = |wanted: u16| options.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| *value);
    let client = get(1);
    let duid = duid(config);
    let server = get(2);
    let answer = match kind {
        SOLICIT if get(14).is_some() => REPLY,
        SOLICIT => ADVERTISE,
        REQUEST | RENEW | RELEASE | DECLINE if server? == duid => REPLY,
        CONFIRM | REBIND => REPLY,
        INFORMATION if server.is_none_or(|server| server == duid) => REPLY,
        _ => return None,
    };
    if client.is_none() && kind != INFORMATION || client.is_some_and(|client| client.len() > DUID_BYTES) {
        return None;
    }
    let at = leases.of(config, from)?;
    if let Some(name) = get(39).and_then(|it| it.get(1..)).and_then(first_label) {
        leases.name(at, name);
    }
    let address = config.guest6(at);
    let mut out = vec![answer, a, b, c];
    if let Some(client) = client {
        push(&mut out, 1, client);
    }
    push(&mut out, 2, &duid);
    if kind == SOLICIT && answer == REPLY {
        push(&mut out, 14, &[]);
    }
    let mut bound = None;
    let status = |code: u16| code.to_be_bytes();
    match kind {
        RELEASE | DECLINE => {
            push(&mut out, 13, &status(0));
            bound = Some(false);
        }
        CONFIRM => {
            // Whether its addresses are of this link (RFC 8415, 18.3.3).
            let asked = options.iter().filter(|(kind, _)| *kind == 3);
            let inside = asked.filter_map(|(_, ia)| {
                let address = *ia.get(16..)?.first_chunk::<16>()?;
                Some(config.is_inside(std::net::Ipv6Addr::from(address).into()))
            });
            let inside: Vec<bool> = inside.collect();
            if inside.is_empty() {
                return None;
            }
            push(&mut out, 13, &status(if inside.iter().all(|&it| it) { 0 } else { 4 }));
        }
        INFORMATION => {}
        _ => {
            for (kind, ia) in options.iter().filter(|(kind, _)| matches!(kind, 3 | 4 | 25)) {
                let id = ia.get(..4)?;
                let mut value = id.to_vec();
                if *kind == 4 {
                    push(&mut value, 13, &status(2));
                    push(&mut out, 4, &value);
                    continue;
                }
                value.extend((LIFETIME_S / 2).to_be_bytes());
                value.extend((LIFETIME_S / 8 * 7).to_be_bytes());
                if *kind == 25 {
                    push(&mut value, 13, &status(6));
                    push(&mut out, 25, &value);
                    continue;
                }
                let mut entry = address.octets().to_vec();
                entry.extend(LIFETIME_S.to_be_bytes());
                entry.extend(LIFETIME_S.to_be_bytes());
                push(&mut value, 5, &entry);
                push(&mut out, 3, &value);
                bound = (answer == REPLY).then_some(true);
            }
        }
    }
    push(&mut out, 23, &config.dns6().octets());
    let mut names = Vec::new();
    for domain in std::iter::once(&config.domain).chain(search) {
        let len = names.len();
        super::dns::push_name(&mut names, domain);
        if names.len() > SEARCH_BYTES {
            names.truncate(len);
            break;
        }
    }
    push(&mut out, 24, &names);
    // Nobody has that many addresses to ask for.
    if out.len() > ANSWER_BYTES {
        return None;
    }
    if let (Some(bound), Some(lease)) = (bound, leases.get_mut(at)) {
        lease.bound6 = bound;
    }
    Some(out)
}

/// The first label of a name as DNS writes it.
fn first_label(name: &[u8]) -> Option<&str> {
    let (&len, rest) = name.split_first()?;
    std::str::from_utf8(rest.get(..usize::from(len))?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Mac;

    const LINK: Link = Link { mac: Mac(0x5254_0000_0007), vid: 0 };

    fn message(kind: u8, parts: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![kind, 1, 2, 3];
        parts.iter().for_each(|(kind, value)| push(&mut bytes, *kind, value));
        bytes
    }

    #[test]
    fn a_client_is_given_an_address_that_it_can_renew() {
        let (config, mut leases) = (UserConfig::default(), Leases::default());
        let ia: &[u8] = &[0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut ask = |bytes: &[u8]| answer(bytes, LINK, &config, &[], &mut leases);
        let got = ask(&message(SOLICIT, &[(1, b"me"), (3, ia), (39, b"\0\x03web\0")])).unwrap();
        assert_eq!(got[..4], [ADVERTISE, 1, 2, 3]);
        let parts = options(&got[4..]).unwrap();
        let given = parts.iter().find(|(kind, _)| *kind == 3).unwrap().1;
        assert_eq!(given[16..32], config.guest6(0).octets());
        let server = parts.iter().find(|(kind, _)| *kind == 2).unwrap().1.to_vec();
        let got = ask(&message(REQUEST, &[(1, b"me"), (2, &server), (3, ia)])).unwrap();
        assert_eq!(got[0], REPLY);
        assert_eq!(ask(&message(RENEW, &[(1, b"me"), (2, b"other"), (3, ia)])), None);
        assert_eq!(ask(&message(INFORMATION, &[])).unwrap()[0], REPLY);
        assert_eq!(leases.by_name(&config, "web").unwrap().1, Some(config.guest6(0)));
    }

    #[test]
    fn an_answer_fits_into_a_packet_whatever_is_asked_and_searched() {
        let (config, mut leases) = (UserConfig::default(), Leases::default());
        let ia: &[u8] = &[0; 12];
        let many = |count| [&[(1, &b"me"[..])][..], &vec![(3, ia); count]].concat();
        let search: Vec<String> =
            (0..100).map(|at| format!("a-rather-long-domain-{at}.example.org")).collect();
        let mut ask = |parts: &[(u16, &[u8])]| {
            answer(&message(SOLICIT, parts), LINK, &config, &search, &mut leases).map(|got| got.len())
        };
        assert!(ask(&many(8)).is_some_and(|len| len <= ANSWER_BYTES));
        assert_eq!(ask(&many(100)), None);
        assert_eq!(ask(&[(1, &[7; 131]), (3, ia)]), None);
    }

    #[test]
    fn broken_messages_are_not_answered() {
        let (config, mut leases) = (UserConfig::default(), Leases::default());
        let good = message(SOLICIT, &[(1, b"me"), (3, &[0; 12])]);
        for len in (0..good.len()).filter(|len| ![4, 10].contains(len)) {
            assert_eq!(answer(&good[..len], LINK, &config, &[], &mut leases), None, "{len}");
        }
        assert_eq!(answer(&message(SOLICIT, &[]), LINK, &config, &[], &mut leases), None);
    }
}

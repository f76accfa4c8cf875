//! DHCP (RFC 2131, 2132), as a server answers: leases that do not end by themselves.

use std::net::Ipv4Addr;

use super::config::UserConfig;
use super::leases::Leases;
use super::packet::Link;
use crate::frame::Mac;

/// Ports of server and client.
pub const SERVER: u16 = 67;
/// See [`SERVER`].
pub const CLIENT: u16 = 68;
/// How long a lease is said to last.
const LEASE_S: u32 = 86_400;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;

/// An answer, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The message.
    pub bytes: Vec<u8>,
    /// To which address.
    pub to: Ipv4Addr,
    /// To which station.
    pub mac: Mac,
}

/// What matters of a request.
#[derive(Debug, Default)]
struct Request<'a> {
    kind: u8,
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    name: Option<&'a [u8]>,
    /// BOOTP: no options at all.
    bootp: bool,
}

fn options(bytes: &[u8]) -> Option<Request<'_>> {
    let mut request = Request::default();
    let Some(mut rest) = bytes.strip_prefix(&COOKIE) else {
        return Some(Request { bootp: true, ..request });
    };
    loop {
        match rest {
            [] | [255, ..] => break,
            [0, next @ ..] => rest = next,
            [kind, len, next @ ..] => {
                let value = next.get(..usize::from(*len))?;
                rest = &next[usize::from(*len)..];
                let address = || value.first_chunk::<4>().map(|&it| Ipv4Addr::from(it));
                match (kind, value.len()) {
                    (53, 1) => request.kind = value[0],
                    (50, 4) => request.wanted = address(),
                    (54, 4) => request.server = address(),
                    (12, 1..) => request.name = Some(value),
                    // FQDN (RFC 4702): flags, two bytes of no use, name.
                    (81, 4..) if value[0] & 4 == 0 => request.name = request.name.or(Some(&value[3..])),
                    _ => {}
                }
            }
            _ => return None,
        }
    }
    request.bootp = request.kind == 0;
    Some(request)
}

/// Answers a message from `from`. `search`: domains in which names are looked for. `None`: there is nothing to say.
pub fn answer(
    bytes: &[u8],
    from: Link,
    config: &UserConfig,
    search: &[String],
    leases: &mut Leases,
) -> Option<Answer> {
    let fixed: &[u8; 236] = bytes.first_chunk()?;
    // A request from Ethernet.
    if fixed[..3] != [1, 1, 6] {
        return None;
    }
    let request = options(&bytes[236..])?;
    let mac = Mac::new(*fixed[28..].first_chunk()?);
    let link = Link { mac, vid: from.vid };
    if !mac.is_station() {
        return None;
    }
    if request.server.is_some_and(|server| server != config.gateway4) {
        return None;
    }
    let current = Ipv4Addr::from(*fixed[12..].first_chunk::<4>()?);
    if request.kind == RELEASE || request.kind == DECLINE {
        if let Some(at) = leases.of(config, link)
            && let Some(lease) = leases.get_mut(at)
        {
            lease.bound4 = false;
        }
        return None;
    }
    let at = leases.of(config, link)?;
    let address = config.guest4(at)?;
    if let Some(name) = request.name.and_then(|name| std::str::from_utf8(name).ok()) {
        leases.name(at, name.trim_end_matches('\0'));
    }
    let kind = match request.kind {
        _ if request.bootp => 0,
        DISCOVER => OFFER,
        REQUEST => {
            let wanted = request.wanted.unwrap_or(current);
            if wanted == address { ACK } else { NAK }
        }
        INFORM => ACK,
        _ => return None,
    };
    if matches!(kind, ACK | 0)
        && request.kind != INFORM
        && let Some(lease) = leases.get_mut(at)
    {
        lease.bound4 = true;
    }
    let mut out = vec![0; 236];
    out[..4].copy_from_slice(&[2, 1, 6, 0]);
    out[4..8].copy_from_slice(&fixed[4..8]);
    out[10..12].copy_from_slice(&fixed[10..12]);
    if kind != NAK && request.kind != INFORM {
        out[16..20].copy_from_slice(&address.octets());
    }
    if request.kind == INFORM {
        out[12..16].copy_from_slice(&fixed[12..16]);
    }
    out[20..24].copy_from_slice(&config.gateway4.octets());
    out[28..44].copy_from_slice(&fixed[28..44]);
    out.extend(COOKIE);
    let mut option = |kind: u8, value: &[u8]| {
        out.extend([kind, value.len() as u8]);
        out.extend_from_slice(value);
    };
    if kind != 0 {
        option(53, &[kind]);
        option(54, &config.gateway4.octets());
    }
    if kind != NAK {
        if kind != 0 && request.kind != INFORM {
            option(51, &LEASE_S.to_be_bytes());
        }
        option(1, &config.netmask().octets());
        option(3, &config.gateway4.octets());
        option(6, &config.dns4().octets());
        option(15, config.domain.as_bytes());
        if config.mtu != 1500 {
            option(26, &config.mtu.to_be_bytes());
        }
        let mut names = Vec::new();
        for domain in std::iter::once(&config.domain).chain(search) {
            super::dns::push_name(&mut names, domain);
        }
        if !search.is_empty() && names.len() <= 255 {
            option(119, &names);
        }
    }
    out.push(255);
    // What BOOTP clients expect at least.
    out.resize(out.len().max(300), 0);
    // A client that has an address is answered there, others by broadcast if they ask for it, else where they will be.
    let broadcast = fixed[10] & 0x80 != 0 || kind == NAK;
    let (to, mac) = match current {
        _ if broadcast => (Ipv4Addr::BROADCAST, Mac::BROADCAST),
        Ipv4Addr::UNSPECIFIED => (address, mac),
        current => (current, mac),
    };
    Some(Answer { bytes: out, to, mac })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const LINK: Link = Link { mac: Mac(0x5254_0000_0007), vid: 0 };

    /// A message as a client writes it.
    pub(crate) fn message(kind: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 236];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[4..8].copy_from_slice(b"xid!");
        bytes[28..34].copy_from_slice(&LINK.mac.bytes());
        bytes.extend(COOKIE);
        bytes.extend([53, 1, kind]);
        for (kind, value) in options {
            bytes.extend([*kind, value.len() as u8]);
            bytes.extend_from_slice(value);
        }
        bytes.push(255);
        bytes
    }

    fn kind(answer: &Answer) -> u8 {
        options(&answer.bytes[236..]).unwrap().kind
    }

    #[test]
    fn a_client_gets_its_lease_and_no_other() {
        let (config, mut leases) = (UserConfig::default(), Leases::default());
        let mut ask = |bytes: &[u8]| answer(bytes, LINK, &config, &["example.org".into()], &mut leases);
        let offer = ask(&message(DISCOVER, &[(12, b"web")])).unwrap();
        assert_eq!((kind(&offer), offer.to, offer.mac), (OFFER, Ipv4Addr::new(10, 0, 2, 15), LINK.mac));
        assert_eq!((&offer.bytes[4..8], &offer.bytes[16..20]), (&b"xid!"[..], &[10, 0, 2, 15][..]));
        let ack = ask(&message(REQUEST, &[(50, &[10, 0, 2, 15]), (54, &[10, 0, 2, 2])])).unwrap();
        assert_eq!(kind(&ack), ACK);
        let nak = ask(&message(REQUEST, &[(50, &[10, 0, 2, 99])])).unwrap();
        assert_eq!((kind(&nak), nak.to), (NAK, Ipv4Addr::BROADCAST));
        // For another server.
        assert_eq!(ask(&message(REQUEST, &[(50, &[10, 0, 2, 15]), (54, &[10, 0, 2, 9])])), None);
        assert_eq!(leases.by_name(&config, "web").unwrap().0, Some(Ipv4Addr::new(10, 0, 2, 15)));
        assert_eq!(answer(&message(RELEASE, &[]), LINK, &config, &[], &mut leases), None);
        assert_eq!(leases.by_name(&config, "web").unwrap().0, None);
    }

    #[test]
    fn broken_messages_are_not_answered() {
        let (config, mut leases) = (UserConfig::default(), Leases::default());
        let good = message(DISCOVER, &[(12, b"web")]);
        for len in 0..236 {
            assert_eq!(answer(&good[..len], LINK, &config, &[], &mut leases), None);
        }
        let mut bad = good.clone();
        bad[240 + 4] = 200;
        assert_eq!(answer(&bad, LINK, &config, &[], &mut leases), None);
    }
}

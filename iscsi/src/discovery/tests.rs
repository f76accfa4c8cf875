use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::pdu::{Itt, TargetSn};
use crate::serial::Serial;

fn address(text: &str) -> TargetAddress {
    TargetAddress::parse(text).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn addresses() {
    for (text, host, port, tag, shown) in [
        ("10.0.0.1:5003,1", "10.0.0.1", 5003, Some(1), "10.0.0.1:5003,1"),
        (
            "[1080::8:800:200C:417A],65",
            "1080::8:800:200C:417A",
            3260,
            Some(65),
            "[1080::8:800:200C:417A]:3260,65",
        ),
        (
            "[1080::8:800:200C:417A]:5003,1",
            "1080::8:800:200C:417A",
            5003,
            Some(1),
            "[1080::8:800:200C:417A]:5003,1",
        ),
        ("[fe80::1%eth0]", "fe80::1%eth0", 3260, None, "[fe80::1%eth0]:3260"),
        ("::1,0", "::1", 3260, Some(0), "[::1]:3260,0"),
        (
            "computingcenter.example.com,23",
            "computingcenter.example.com",
            3260,
            Some(23),
            "computingcenter.example.com:3260,23",
        ),
    ] {
        let parsed = address(text);
        assert_eq!((&*parsed.host, parsed.port, parsed.portal_group_tag), (host, port, tag), "{text}");
        assert_eq!(parsed.to_string(), shown);
        assert_eq!(address(shown), parsed);
    }
    for bad in
        ["", ":1", "a:0", "a:65536", "a:x", "a,65536", "a,", "[::1", "[x]", "[::1]x", "a b", "a:1:2", "a/b"]
    {
        assert_eq!(TargetAddress::parse(bad), None, "{bad}");
    }
}

#[test]
fn lists() {
    let list = b"TargetName=iqn.a\0TargetAddress=h:1,1\0TargetAddress=[::1]:2,2\0TargetName=iqn.b\0";
    let found = parse_list(list).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].addresses, [address("h:1,1"), address("[::1]:2,2")]);
    assert!(found[1].addresses.is_empty());
    for (bad, part) in [
        (&b"TargetAddress=h:1,1\0"[..], "unexpected key"),
        (b"TargetName=x\0", "not an iSCSI name"),
        (b"TargetName=iqn.a\0TargetAddress=:\0", "not an address"),
        (b"SendTargets=Reject\0", "SendTargets=Reject"),
        (b"TargetName=iqn.a", "bad text"),
    ] {
        let error = parse_list(bad).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

fn request(pdu: &QueryPdu) -> TextRequest {
    TextRequest {
        immediate: false,
        final_bit: pdu.final_bit,
        continues: pdu.continues,
        data_len_bytes: pdu.data.len() as u32,
        lun: pdu.lun,
        itt: Itt(1),
        ttt: pdu.ttt,
        cmd_sn: Serial(1),
        exp_stat_sn: Serial(1),
    }
}

fn response(pdu: &AnswerPdu) -> TextResponse {
    TextResponse {
        final_bit: pdu.final_bit,
        continues: pdu.continues,
        data_len_bytes: pdu.data.len() as u32,
        lun: Lun::ZERO,
        itt: Itt(1),
        ttt: pdu.ttt,
        sn: TargetSn { stat_sn: Serial(1), exp_cmd_sn: Serial(1), max_cmd_sn: Serial(1) },
    }
}

fn exchange(
    wanted: Wanted<'_>,
    targets: &[FoundTarget],
    limit_bytes: u32,
) -> Result<(Vec<FoundTarget>, usize), DiscoveryError> {
    let mut answer = Answer::new();
    let (mut query, mut pdu) = Query::start(wanted);
    let mut pdus = 0;
    loop {
        let reply = answer.receive(&request(&pdu), &pdu.data, limit_bytes, |wanted| match wanted {
            Wanted::All => Some(targets.to_vec()),
            Wanted::Named(name) => {
                Some(targets.iter().filter(|target| target.name == name).cloned().collect())
            }
            Wanted::Current => None,
        })?;
        pdus += 1;
        assert!(reply.data.len() <= limit_bytes as usize);
        match query.receive(&response(&reply), &reply.data)? {
            QueryProgress::Done(found) => return Ok((found, pdus)),
            QueryProgress::Send(next) => pdu = next,
        }
    }
}

proptest! {
    #[test]
    fn any_list_over_any_number_of_pdus(
        names in vec("iqn\\.[a-z0-9.:-]{1,30}", 0..20),
        ports in vec(1u16.., 0..4),
        limit_bytes in 1u32..600,
    ) {
        let addresses: Vec<TargetAddress> = ports.iter().map(|port| address(&format!("h:{port},1"))).collect();
        let targets: Vec<FoundTarget> =
            names.into_iter().map(|name| FoundTarget { name, addresses: addresses.clone() }).collect();
        let (found, pdus) = exchange(Wanted::All, &targets, limit_bytes).unwrap();
        prop_assert_eq!(&found, &targets);
        let mut out = Outgoing::new();
        write_list(&targets, &mut out);
        prop_assert_eq!(pdus, out.len_bytes().div_ceil(limit_bytes as usize).max(1));
    }

    #[test]
    fn arbitrary_lists_never_panic(text in vec(any::<u8>(), 0..300), value in ".{0,60}") {
        let _ = parse_list(&text);
        if let Some(address) = TargetAddress::parse(&value) {
            prop_assert_eq!(TargetAddress::parse(&address.to_string()), Some(address));
        }
    }
}

#[test]
fn one_target_and_refusal() {
    let targets = [FoundTarget { name: "iqn.a".into(), addresses: vec![address("h:1,1")] }];
    assert_eq!(exchange(Wanted::Named("iqn.a"), &targets, 8192).unwrap().0, targets);
    assert!(exchange(Wanted::Named("iqn.b"), &targets, 8192).unwrap().0.is_empty());
    assert_eq!(exchange(Wanted::Current, &targets, 8192), Err(DiscoveryError::Refused("Reject".into())));
}

#[test]
fn exchanges_that_break_the_rules() {
    let mut answer = Answer::new();
    let pdu = QueryPdu { final_bit: true, continues: false, lun: Lun::ZERO, ttt: Ttt(4), data: Vec::new() };
    assert!(answer.receive(&request(&pdu), b"", 512, |_| None).is_err(), "a tag that was not given");

    let (mut query, _) = Query::start(Wanted::All);
    let mut bad = response(&AnswerPdu { final_bit: false, continues: true, ttt: Ttt(1), data: Vec::new() });
    assert!(query.receive(&bad, b"").is_err(), "empty and not final");
    bad.ttt = Ttt::NONE;
    assert!(query.receive(&bad, b"x").is_err(), "not final and no tag");

    // Keys of other kinds get their answers.
    let first = QueryPdu { ttt: Ttt::NONE, ..pdu };
    let reply = answer.receive(&request(&first), b"X-a=1\0MaxBurstLength=512\0", 512, |_| None).unwrap();
    assert_eq!(reply.data, b"X-a=NotUnderstood\0MaxBurstLength=Reject\0");
}

//! Text: pairs, values, lists of targets, addresses and the negotiation of parameters.
#![no_main]

use iscsi::chap::{Algorithm, Challenge};
use iscsi::discovery::{self, TargetAddress};
use iscsi::params::{Negotiation, Params, SessionType};
use iscsi::text::{self, Assembler, Outgoing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&split, bytes)) = input.split_first() else { return };
    // In two segments, and back from its pairs.
    let mut assembler = Assembler::default();
    let (first, second) = bytes.split_at(bytes.len().min(usize::from(split)));
    if assembler.push(first, true).is_err() {
        return;
    }
    let Ok(Some(whole)) = assembler.push(second, false) else { return };
    assert_eq!(whole, bytes);
    let _ = discovery::parse_list(whole);
    let Ok(pairs) = text::parse(whole) else { return };
    let mut again = Outgoing::new();
    for (key, value) in &pairs {
        again.push(key, value);
    }
    let (written, _) = again.next_segment(usize::MAX);
    assert_eq!(text::parse(&written).as_ref(), Ok(&pairs));

    let session = if split & 1 == 0 { SessionType::Normal } else { SessionType::Discovery };
    let mut out = Outgoing::new();
    let mut asked = Negotiation::new(session, Params::default());
    let mut asking = Negotiation::new(session, Params::default());
    asking.offer(&mut out);
    let (mut asked_ok, mut asking_ok) = (true, true);
    for (key, value) in pairs {
        if let Some(number) = text::parse_number(value) {
            assert_eq!(text::parse_number(&number.to_string()), Some(number));
        }
        if let Ok(binary) = text::parse_binary(value, 1024) {
            assert_eq!(text::parse_binary(&text::binary_hex(&binary), 1024), Ok(binary.clone()));
            assert_eq!(text::parse_binary(&text::binary_base64(&binary), 1024), Ok(binary));
        }
        if let Some(address) = TargetAddress::parse(value) {
            assert_eq!(TargetAddress::parse(&address.to_string()), Some(address));
        }
        let _ = Algorithm::choose(value, &Algorithm::STRONGEST_FIRST);
        let _ = Challenge::parse(Some(value), Some(value));
        asked_ok = asked_ok && asked.take(key, value, &mut out).is_ok();
        asking_ok = asking_ok && asking.take(key, value, &mut out).is_ok();
    }
    for side in [asked_ok.then_some(asked), asking_ok.then_some(asking)].into_iter().flatten() {
        if let Ok(result) = side.finish() {
            assert!((512..=0xFF_FFFF).contains(&result.max_send_data_segment_bytes));
            assert!((512..=0xFF_FFFF).contains(&result.max_burst_bytes));
            assert!((512..=result.max_burst_bytes).contains(&result.first_burst_bytes));
            assert!(result.max_outstanding_r2t >= 1 && result.max_connections >= 1);
            assert!(result.max_burst_bytes <= Params::default().max_burst_bytes);
        }
    }
});

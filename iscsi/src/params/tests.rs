use super::*;

fn pairs(out: &mut Outgoing) -> Vec<(String, String)> {
    let (text, continues) = out.next_segment(usize::MAX);
    assert!(!continues);
    text::parse(&text).unwrap().into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// What a side with default wishes answers to one offer.
fn answer(session_type: SessionType, wants: Params, key: &str, value: &str) -> Option<String> {
    let mut out = Outgoing::new();
    Negotiation::new(session_type, wants).take(key, value, &mut out).unwrap();
    pairs(&mut out).pop().map(|(answered, value)| {
        assert_eq!(answered, key);
        value
    })
}

fn answer_default(key: &str, value: &str) -> Option<String> {
    answer(SessionType::Normal, Params::default(), key, value)
}

#[test]
fn table_is_in_key_order() {
    for (index, def) in DEFS.iter().enumerate() {
        assert_eq!(def.key as usize, index, "{}", def.name);
    }
}

/// Checklist line 39 (RFC 7143 chapter 13).
#[test]
fn defaults_when_nothing_is_said() {
    let negotiated = Negotiation::new(SessionType::Normal, Params::default()).finish().unwrap();
    let expected = Negotiated {
        session_type: SessionType::Normal,
        digests: framing::Digests::default(),
        max_recv_data_segment_bytes: 8192,
        max_send_data_segment_bytes: 8192,
        max_burst_bytes: 262_144,
        first_burst_bytes: 65_536,
        initial_r2t: true,
        immediate_data: true,
        max_outstanding_r2t: 1,
        time2wait_s: 2,
        time2retain_s: 20,
        data_pdu_in_order: true,
        data_sequence_in_order: true,
        error_recovery_level: 0,
        max_connections: 1,
        task_reporting: TaskReporting::Rfc3720,
        protocol_level: 1,
    };
    assert_eq!(negotiated, expected);
}

/// Checklist line 39 (RFC 7143 chapter 13): result functions, IFMarker and OFMarker refused (13.25).
#[test]
fn answers() {
    for (key, offer, expected) in [
        ("HeaderDigest", "CRC32C,None", "CRC32C"),
        ("HeaderDigest", "None,CRC32C", "None"),
        ("DataDigest", "Z-new,CRC32C", "CRC32C"),
        ("DataDigest", "Z-new", "Reject"),
        ("MaxConnections", "8", "1"),
        ("InitialR2T", "Yes", "Yes"),
        ("InitialR2T", "No", "No"),
        ("ImmediateData", "No", "No"),
        ("ImmediateData", "maybe", "Reject"),
        ("MaxBurstLength", "16776192", "1048576"),
        ("MaxBurstLength", "0x400", "1024"),
        ("MaxBurstLength", "511", "Reject"),
        ("FirstBurstLength", "1024", "1024"),
        ("DefaultTime2Wait", "0", "2"),
        ("DefaultTime2Wait", "30", "30"),
        ("DefaultTime2Wait", "3601", "Reject"),
        ("DefaultTime2Retain", "20", "0"),
        ("MaxOutstandingR2T", "0", "Reject"),
        ("MaxOutstandingR2T", "4", "4"),
        ("DataPDUInOrder", "No", "Yes"),
        ("ErrorRecoveryLevel", "2", "0"),
        ("TaskReporting", "FastAbort,ResponseFence,RFC3720", "RFC3720"),
        ("TaskReporting", "FastAbort", "Reject"),
        ("iSCSIProtocolLevel", "2", "1"),
        ("IFMarker", "No", "Reject"),
        ("OFMarkInt", "1~65535", "Reject"),
        ("X-com.example.key", "1", "NotUnderstood"),
        ("NewKey", "1", "NotUnderstood"),
    ] {
        assert_eq!(answer_default(key, offer).as_deref(), Some(expected), "{key}={offer}");
    }
    assert_eq!(answer_default("X#NodeArchitecture", "a,b"), None);
    assert_eq!(answer_default("MaxRecvDataSegmentLength", "512"), None);
}

#[test]
fn discovery_sessions_have_fewer_keys() {
    for (key, expected) in
        [("MaxBurstLength", "Irrelevant"), ("ErrorRecoveryLevel", "0"), ("HeaderDigest", "Reject")]
    {
        let answer = answer(SessionType::Discovery, Params::default(), key, "1");
        assert_eq!(answer.as_deref(), Some(expected), "{key}");
    }
    let mut out = Outgoing::new();
    Negotiation::new(SessionType::Discovery, Params::default()).offer(&mut out);
    let keys: Vec<String> = pairs(&mut out).into_iter().map(|(key, _)| key).collect();
    assert_eq!(
        keys,
        [
            "HeaderDigest",
            "DataDigest",
            "DefaultTime2Wait",
            "DefaultTime2Retain",
            "ErrorRecoveryLevel",
            "MaxRecvDataSegmentLength"
        ]
    );
}

/// Offers everything, answers with the given pairs, and leaves the rest unanswered.
fn offer_and_take(wants: Params, answers: &[(&str, &str)]) -> Result<Negotiated, ParamError> {
    let mut side = Negotiation::new(SessionType::Normal, wants);
    let mut out = Outgoing::new();
    side.offer(&mut out);
    let offered = pairs(&mut out);
    for (key, value) in answers {
        side.take(key, value, &mut out)?;
    }
    assert!(out.is_empty(), "answers need no answer");
    // All others as offered, lists by their first value.
    for (key, value) in offered {
        let first = value.split(',').next().unwrap().to_owned();
        if key != MAX_RECV_DATA_SEGMENT_LENGTH && !answers.iter().any(|(answered, _)| *answered == key) {
            side.take(&key, &first, &mut out)?;
        }
    }
    side.finish()
}

#[test]
fn answers_are_checked() {
    let wants = || Params { data_digest: DigestPolicy::Off, time2wait_s: 5, ..Params::default() };
    for (key, answer) in [
        ("MaxBurstLength", "1048577"),
        ("MaxBurstLength", "0"),
        ("MaxBurstLength", "x"),
        ("DefaultTime2Wait", "4"),
        ("DataDigest", "CRC32C"),
        ("DataPDUInOrder", "No"),
        ("ImmediateData", "yes"),
    ] {
        let error = offer_and_take(wants(), &[(key, answer)]).unwrap_err();
        assert!(matches!(error, ParamError::BadAnswer { .. }), "{key}={answer}: {error}");
    }
    let error = offer_and_take(wants(), &[("InitialR2T", NOT_UNDERSTOOD)]).unwrap_err();
    assert_eq!(error, ParamError::NotUnderstood("InitialR2T".into()));
    let error = offer_and_take(wants(), &[("X-none.of.ours", NOT_UNDERSTOOD)]).unwrap_err();
    assert_eq!(error, ParamError::NotUnderstood("X-none.of.ours".into()));
    let error = offer_and_take(wants(), &[("InitialR2T", "No"), ("InitialR2T", "No")]).unwrap_err();
    assert_eq!(error, ParamError::Repeated("InitialR2T".into()));
    let error = offer_and_take(wants(), &[("MaxRecvDataSegmentLength", "100")]).unwrap_err();
    assert!(matches!(error, ParamError::BadValue { .. }));
    let require = Params { header_digest: DigestPolicy::Require, ..wants() };
    let error = offer_and_take(require, &[("HeaderDigest", REJECT)]).unwrap_err();
    assert_eq!(error, ParamError::Refused { key: "HeaderDigest", value: "CRC32C" });
}

#[test]
fn outcome_of_answers() {
    let negotiated = offer_and_take(
        Params { task_reporting: TaskReporting::FastAbort, ..Params::default() },
        &[
            ("MaxRecvDataSegmentLength", "4096"),
            ("MaxBurstLength", "8192"),
            ("FirstBurstLength", "65536"),
            ("InitialR2T", "Yes"),
            ("MaxOutstandingR2T", REJECT),
            ("TaskReporting", NOT_UNDERSTOOD),
        ],
    )
    .unwrap();
    assert_eq!(negotiated.max_send_data_segment_bytes, 4096);
    assert_eq!(negotiated.max_recv_data_segment_bytes, 256 * 1024);
    assert_eq!((negotiated.max_burst_bytes, negotiated.first_burst_bytes), (8192, 8192));
    assert!(negotiated.initial_r2t);
    assert_eq!(negotiated.max_outstanding_r2t, 1);
    assert_eq!(negotiated.task_reporting, TaskReporting::Rfc3720);
}

#[test]
fn unanswered_offers() {
    let mut side = Negotiation::new(SessionType::Normal, Params::default());
    let mut out = Outgoing::new();
    side.offer(&mut out);
    assert_eq!(side.finish(), Err(ParamError::Unanswered("HeaderDigest")));
    // These two need no answer: "No" to an AND and "Yes" to an OR.
    let wants = Params { immediate_data: false, ..Params::default() };
    let mut side = Negotiation::new(SessionType::Normal, wants);
    side.offer(&mut out);
    for (key, value) in pairs(&mut out) {
        if !matches!(&*key, "ImmediateData" | "DataPDUInOrder" | MAX_RECV_DATA_SEGMENT_LENGTH) {
            let _ = side.take(&key, value.split(',').next().unwrap(), &mut out);
        }
    }
    let negotiated = side.finish().unwrap();
    assert!(!negotiated.immediate_data && negotiated.data_pdu_in_order);
}

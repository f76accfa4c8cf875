//! A byte stream through the framing, and every header through the codec.
//!
//! Holds: no panic; what decodes encodes to something that decodes to the same; a stream means the same however it
//! is cut into pieces.
#![no_main]

use iscsi::pdu::ahs::AhsIter;
use iscsi::pdu::framing::{Digests, FrameError, Limits, Receiver, Step};
use iscsi::pdu::{Bhs, InitiatorPdu, TargetPdu};
use libfuzzer_sys::fuzz_target;

type Received = Vec<(Bhs, Vec<u8>, Vec<u8>, bool)>;

fn receive(
    digests: Digests,
    mut stream: &[u8],
    mut piece_bytes: impl FnMut() -> usize,
) -> (Received, Option<FrameError>) {
    let mut rx = Receiver::new(Limits::default());
    rx.configure(Limits { ahs_bytes: 1020, data_bytes: 4096 }, digests);
    let mut out = Vec::new();
    let mut data = Vec::new();
    loop {
        match rx.step() {
            Step::Framing { .. } => {
                let piece = &stream[..stream.len().min(piece_bytes())];
                if piece.is_empty() {
                    return (out, None);
                }
                match rx.feed(piece) {
                    Ok(taken) => stream = &stream[taken..],
                    Err(error) => return (out, Some(error)),
                }
            }
            Step::Header => rx.accept(),
            Step::Data { len_bytes, .. } => {
                let (piece, rest) = stream.split_at(stream.len().min(len_bytes as usize).min(piece_bytes()));
                if piece.is_empty() {
                    return (out, None);
                }
                rx.data(piece);
                data.extend_from_slice(piece);
                stream = rest;
            }
            Step::Done { data_digest_ok } => {
                out.push((*rx.header(), rx.ahs().to_vec(), std::mem::take(&mut data), data_digest_ok));
                rx.next_pdu();
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&[flags, seed], stream)) = input.split_first_chunk::<2>() else { return };
    let digests = Digests { header: flags & 1 != 0, data: flags & 2 != 0 };
    let whole = receive(digests, stream, || usize::MAX);
    let mut state = seed;
    let pieces = receive(digests, stream, || {
        state = state.wrapping_mul(5).wrapping_add(17);
        usize::from(state >> 2) + 1
    });
    assert_eq!(whole, pieces);
    for (bhs, ahs, _, _) in &whole.0 {
        if let Ok(pdu) = InitiatorPdu::decode(bhs) {
            assert_eq!(InitiatorPdu::decode(&pdu.encode()), Ok(pdu));
        }
        if let Ok(pdu) = TargetPdu::decode(bhs) {
            assert_eq!(TargetPdu::decode(&pdu.encode()), Ok(pdu));
        }
        assert!(AhsIter::new(ahs).count() <= ahs.len());
    }
});

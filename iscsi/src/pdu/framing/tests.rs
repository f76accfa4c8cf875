use super::*;
use crate::pdu::Opcode;
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Debug, PartialEq)]
struct Whole {
    bhs: Bhs,
    ahs: Vec<u8>,
    data: Vec<u8>,
}

fn whole() -> impl Strategy<Value = Whole> {
    (any::<[u8; 48]>(), vec(any::<[u8; 4]>(), 0..6), vec(any::<u8>(), 0..70)).prop_map(|(bhs, ahs, data)| {
        let ahs = ahs.concat();
        let mut bhs = Bhs(bhs);
        bhs.set_ahs_len(ahs.len());
        bhs.set_data_len(data.len() as u32);
        Whole { bhs, ahs, data }
    })
}

fn send(pdus: &[Whole], digests: Digests) -> Vec<u8> {
    let mut stream = Vec::new();
    for pdu in pdus {
        let start = stream.len();
        let mut header = [0; MAX_HEADER_BYTES];
        let used = write_header(&pdu.bhs, &pdu.ahs, digests, &mut header).unwrap();
        stream.extend_from_slice(&header[..used]);
        stream.extend_from_slice(&pdu.data);
        let mut crc = Crc32c::new();
        crc.update(&pdu.data);
        stream.extend_from_slice(Trailer::new(pdu.data.len() as u32, digests.data.then_some(crc)).as_bytes());
        assert_eq!(stream.len() - start, digests.wire_len_bytes(&pdu.bhs));
    }
    stream
}

/// Receives a stream that comes in the given pieces; the flag is the data digest's.
fn receive(rx: &mut Receiver, pieces: &[&[u8]]) -> Result<Vec<(Whole, bool)>, FrameError> {
    let mut out = Vec::new();
    let mut data = Vec::new();
    for piece in pieces {
        let mut piece = *piece;
        loop {
            match rx.step() {
                Step::Framing { len_bytes } => {
                    assert_ne!(len_bytes, 0);
                    if piece.is_empty() {
                        break;
                    }
                    let taken = rx.feed(piece)?;
                    assert_ne!(taken, 0);
                    piece = &piece[taken..];
                }
                Step::Header => {
                    assert_eq!(rx.feed(piece), Ok(0));
                    rx.accept();
                }
                Step::Data { offset_bytes, len_bytes } => {
                    assert_eq!(offset_bytes as usize, data.len());
                    let take = piece.len().min(len_bytes as usize);
                    if take == 0 {
                        break;
                    }
                    if rx.digests().data {
                        rx.data(&piece[..take]);
                    } else {
                        rx.data_len(take as u32);
                    }
                    data.extend_from_slice(&piece[..take]);
                    piece = &piece[take..];
                }
                Step::Done { data_digest_ok } => {
                    let pdu =
                        Whole { bhs: *rx.header(), ahs: rx.ahs().to_vec(), data: std::mem::take(&mut data) };
                    out.push((pdu, data_digest_ok));
                    rx.next_pdu();
                }
            }
        }
    }
    Ok(out)
}

fn receiver(digests: Digests, data_bytes: u32) -> Receiver {
    let mut rx = Receiver::new(Limits::default());
    rx.configure(Limits { ahs_bytes: MAX_AHS_BYTES, data_bytes }, digests);
    rx
}

fn digests() -> impl Strategy<Value = Digests> {
    (any::<bool>(), any::<bool>()).prop_map(|(header, data)| Digests { header, data })
}

proptest! {
    #[test]
    fn what_is_sent_arrives_however_it_is_split(pdus in vec(whole(), 0..5), digests in digests(), cuts in vec(any::<prop::sample::Index>(), 0..12)) {
        let stream = send(&pdus, digests);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect();
        let mut rx = receiver(digests, 8192);
        let got = receive(&mut rx, &pieces).unwrap();
        prop_assert!(got.iter().all(|(_, digest_ok)| *digest_ok));
        prop_assert_eq!(got.into_iter().map(|(pdu, _)| pdu).collect::<Vec<_>>(), pdus);
        prop_assert!(rx.is_between_pdus());
    }

    #[test]
    fn one_flipped_bit_never_passes_both_digests(pdu in whole(), bit in any::<prop::sample::Index>()) {
        let digests = Digests { header: true, data: true };
        let mut stream = send(std::slice::from_ref(&pdu), digests);
        let bit = bit.index(stream.len() * 8);
        stream[bit / 8] ^= 1 << (bit % 8);
        // An error, a wrong data digest, or (a garbled TotalAHSLength) more bytes wanted.
        if let Ok(got) = receive(&mut receiver(digests, 8192), &[&stream]) {
            prop_assert!(got.iter().all(|(_, digest_ok)| !digest_ok));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..4000), digests in digests(), limit in 0u32..0x20_0000) {
        let _ = receive(&mut receiver(digests, limit), &[&bytes]);
    }
}

#[test]
fn limits_hold_before_anything_is_accepted() {
    let mut bhs = Bhs::new(Opcode::DataIn);
    bhs.set_data_len(513);
    let mut rx = receiver(Digests::default(), 512);
    let error = FrameError::DataTooLong { len_bytes: 513, limit_bytes: 512 };
    assert_eq!(rx.feed(&bhs.0), Err(error));
    assert_eq!(rx.feed(&[0]), Err(error), "the error stays");
    rx.accept();
    assert_eq!(rx.feed(&[0]), Err(error));

    let mut bhs = Bhs::new(Opcode::ScsiCommand);
    bhs.set_ahs_len(1020);
    let mut rx = receiver(Digests::default(), 512);
    rx.configure(Limits { ahs_bytes: 256, data_bytes: 512 }, Digests::default());
    assert_eq!(rx.feed(&bhs.0), Err(FrameError::AhsTooLong { len_bytes: 1020, limit_bytes: 256 }));
}

#[test]
fn no_digest_for_no_data() {
    let digests = Digests { header: true, data: true };
    assert_eq!(digests.trailer_len_bytes(0), 0);
    assert_eq!(digests.trailer_len_bytes(1), 7);
    assert!(Trailer::new(0, Some(Crc32c::new())).as_bytes().is_empty());
}

//! Cutting PDUs out of a receive buffer. Everything of a PDU is in one piece here, so that the streaming receiver of
//! `iscsi::pdu::framing` and its copies are not needed; rules and errors are the same.

use iscsi::digest::{DIGEST_BYTES, crc32c};
use iscsi::pdu::framing::{Digests, FrameError, Limits};
use iscsi::pdu::{BHS_BYTES, Bhs};

/// A PDU at the start of a buffer.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    pub(super) bhs: Bhs,
    pub(super) data: &'a [u8],
    pub(super) digest_ok: bool,
    /// Bytes that it takes in the buffer.
    pub(super) wire_bytes: usize,
}

/// The PDU at the start of `buffer`; `None` if it is not all there yet.
pub(super) fn cut(buffer: &[u8], digests: Digests, limits: Limits) -> Result<Option<Frame<'_>>, FrameError> {
    let Some((header, rest)) = buffer.split_first_chunk::<BHS_BYTES>() else {
        return Ok(None);
    };
    let bhs = Bhs(*header);
    let ahs_bytes = bhs.ahs_len_bytes();
    if ahs_bytes > limits.ahs_bytes {
        return Err(FrameError::AhsTooLong { len_bytes: ahs_bytes, limit_bytes: limits.ahs_bytes });
    }
    let mut body = rest.get(ahs_bytes..);
    if digests.header {
        let Some((digest, after)) = body.and_then(|body| body.split_first_chunk::<DIGEST_BYTES>()) else {
            return Ok(None);
        };
        let (got, computed) = (u32::from_le_bytes(*digest), crc32c(&buffer[..BHS_BYTES + ahs_bytes]));
        if got != computed {
            return Err(FrameError::HeaderDigest { got, computed });
        }
        body = Some(after);
    }
    let len_bytes = bhs.data_len_bytes();
    if len_bytes > limits.data_bytes {
        return Err(FrameError::DataTooLong { len_bytes, limit_bytes: limits.data_bytes });
    }
    let wire_bytes = digests.wire_len_bytes(&bhs);
    let (Some(body), true) = (body, buffer.len() >= wire_bytes) else {
        return Ok(None);
    };
    let data = &body[..len_bytes as usize];
    let digest_ok = !digests.data || len_bytes == 0 || {
        let padded = data.len().next_multiple_of(4);
        body[padded..padded + DIGEST_BYTES] == crc32c(&body[..padded]).to_le_bytes()
    };
    Ok(Some(Frame { bhs, data, digest_ok, wire_bytes }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use iscsi::pdu::framing::append_pdu;
    use iscsi::pdu::{Itt, NopOut, Pdu, Ttt};
    use proptest::prelude::*;

    fn ping() -> Bhs {
        NopOut {
            immediate: true,
            data_len_bytes: 0,
            lun: Default::default(),
            itt: Itt(1),
            ttt: Ttt::NONE,
            cmd_sn: Default::default(),
            exp_stat_sn: Default::default(),
        }
        .encode()
    }

    proptest! {
        #[test]
        fn whole_or_nothing(data in proptest::collection::vec(any::<u8>(), 0..64), header: bool, digest: bool, flip in any::<prop::sample::Index>()) {
            let digests = Digests { header, data: digest };
            let limits = Limits::default();
            let mut wire = Vec::new();
            append_pdu(&mut wire, &ping(), &data, digests);
            for cut_at in 0..wire.len() {
                prop_assert!(cut(&wire[..cut_at], digests, limits).unwrap().is_none());
            }
            let end = wire.len();
            wire.extend_from_slice(&[0xEE; 7]);
            let frame = cut(&wire, digests, limits).unwrap().unwrap();
            prop_assert!(frame.digest_ok);
            prop_assert_eq!((frame.data, frame.wire_bytes), (&data[..], end));
            // A flipped bit in the data is noticed if digests are in use.
            if digest && !data.is_empty() {
                let at = end - DIGEST_BYTES - 1 - flip.index(data.len());
                wire[at] ^= 1;
                prop_assert!(!cut(&wire, digests, limits).unwrap().unwrap().digest_ok);
            }
        }

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..2048), header: bool, data: bool) {
            let _ = cut(&bytes, Digests { header, data }, Limits::default());
        }
    }
}

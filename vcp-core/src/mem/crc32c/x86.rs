//! The kernels for x86-64.
//!
//! The method is that of Gopal and others, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel,
//! 2009): what was read so far is kept as a few vectors, which are moved on to the data that lies a fixed distance behind
//! them, and added to it, by two carry-less multiplications each. In the end all is moved to one vector of 16 bytes,
//! which leaves the same remainder, and that goes through the `crc32` instruction, whose polynomial is this one.
//!
//! Sources are loaded by `asm!` blocks, which the compiler can neither repeat nor leave out: a load that it may do twice
//! could give two values where another party writes.

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, __m512i, _mm_clmulepi64_si128, _mm_crc32_u8, _mm_crc32_u64, _mm_cvtsi32_si128,
    _mm_cvtsi128_si64, _mm_set_epi64x, _mm_storeu_si128, _mm_unpackhi_epi64, _mm_xor_si128,
    _mm512_broadcast_i32x4, _mm512_clmulepi64_epi128, _mm512_extracti32x4_epi32, _mm512_storeu_si512,
    _mm512_ternarylogic_epi64, _mm512_xor_si512, _mm512_zextsi128_si512,
};

/// The polynomial of CRC32C, 0x1EDC6F41, reflected.
const POLYNOMIAL: u32 = 0x82F6_3B78;
/// Vectors that one round of [`wide`] moves on: as many as hide the latency of the multiplications.
const WIDE_VECTORS: usize = 8;
/// The same for [`narrow`].
const NARROW_VECTORS: usize = 8;
const WIDE_BYTES: usize = 64;
const NARROW_BYTES: usize = 16;

/// Factors for the two halves of 16 bytes.
type Factors = (u64, u64);

/// `x` to the power of `exponent` modulo the polynomial, reflected: bit 31 is the coefficient of 1.
const fn power(exponent: u32) -> u32 {
    let (mut value, mut done) = (1 << 31, 0);
    while done < exponent {
        value = (value >> 1) ^ (POLYNOMIAL * (value & 1));
        done += 1;
    }
    value
}

/// Moves 16 bytes on by `bytes`.
///
/// In reflected order the low half has the higher powers, so the message's half `L` stands for `L x^64`: the factors are
/// x^(64 + d) and x^d for d bits. As 64-bit values, 32-bit remainders are worth x^32 times as much, and the product of two reflected
/// 64-bit values lies one bit too low; so 32 is taken off the exponents, and the remainders are shifted by one.
const fn moving_by(bytes: usize) -> Factors {
    let bits = 8 * bytes as u32;
    ((power(bits + 32) as u64) << 1, (power(bits - 32) as u64) << 1)
}

const WIDE_ROUND: Factors = moving_by(WIDE_VECTORS * WIDE_BYTES);
const WIDE_NEXT: Factors = moving_by(WIDE_BYTES);
const NARROW_ROUND: Factors = moving_by(NARROW_VECTORS * NARROW_BYTES);
const NARROW_NEXT: Factors = moving_by(NARROW_BYTES);

/// Whether this processor (and system) can run [`wide`].
pub(super) fn has_wide() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("vpclmulqdq")
        && has_narrow()
}

/// Whether this processor can run [`narrow`].
pub(super) fn has_narrow() -> bool {
    std::arch::is_x86_feature_detected!("pclmulqdq") && std::arch::is_x86_feature_detected!("sse4.2")
}

/// [`super::copy`] with vectors of 64 bytes.
///
/// # Safety
/// As [`super::copy`], and [`has_wide`].
#[target_feature(enable = "avx512f,vpclmulqdq,pclmulqdq,sse4.2")]
pub(super) unsafe fn wide(src: *const u8, dst: *mut u8, len_bytes: usize, crc: u32) -> u32 {
    const ROUND: usize = WIDE_VECTORS * WIDE_BYTES;
    if len_bytes < ROUND {
        // SAFETY: as promised by the caller; what `wide` needs, `narrow` needs.
        return unsafe { narrow(src, dst, len_bytes, crc) };
    }
    let take = |at: usize| {
        // SAFETY: all calls are for 64 bytes that end within `len_bytes`, for which the caller promised this.
        unsafe {
            let data = load_wide(src.add(at));
            _mm512_storeu_si512(dst.add(at).cast(), data);
            data
        }
    };
    let factors =
        |(low, high): Factors| _mm512_broadcast_i32x4(_mm_set_epi64x(high.cast_signed(), low.cast_signed()));
    let mut sums: [__m512i; WIDE_VECTORS] = std::array::from_fn(|i| take(i * WIDE_BYTES));
    sums[0] = _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(crc.cast_signed())));
    let mut at = ROUND;
    let by = factors(WIDE_ROUND);
    while len_bytes - at >= ROUND {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = add_wide(*sum, by, take(at + i * WIDE_BYTES));
        }
        at += ROUND;
    }
    let by = factors(WIDE_NEXT);
    let [first, others @ ..] = sums;
    let mut sum = others.into_iter().fold(first, |sum, next| add_wide(sum, by, next));
    while len_bytes - at >= WIDE_BYTES {
        sum = add_wide(sum, by, take(at));
        at += WIDE_BYTES;
    }
    let by = _mm_set_epi64x(NARROW_NEXT.1.cast_signed(), NARROW_NEXT.0.cast_signed());
    let mut last = add_narrow(_mm512_extracti32x4_epi32::<0>(sum), by, _mm512_extracti32x4_epi32::<1>(sum));
    last = add_narrow(last, by, _mm512_extracti32x4_epi32::<2>(sum));
    last = add_narrow(last, by, _mm512_extracti32x4_epi32::<3>(sum));
    // SAFETY: `at` is at most `len_bytes`, so this is the rest of what the caller promised.
    unsafe { tail(src.add(at), dst.add(at), len_bytes - at, remainder(last)) }
}

/// [`super::copy`] with vectors of 16 bytes.
///
/// # Safety
/// As [`super::copy`], and [`has_narrow`].
#[target_feature(enable = "pclmulqdq,sse4.2")]
pub(super) unsafe fn narrow(src: *const u8, dst: *mut u8, len_bytes: usize, crc: u32) -> u32 {
    const ROUND: usize = NARROW_VECTORS * NARROW_BYTES;
    if len_bytes < ROUND {
        // SAFETY: as promised by the caller.
        return unsafe { tail(src, dst, len_bytes, crc) };
    }
    let take = |at: usize| {
        // SAFETY: all calls are for 16 bytes that end within `len_bytes`, for which the caller promised this.
        unsafe {
            let data = load_narrow(src.add(at));
            _mm_storeu_si128(dst.add(at).cast(), data);
            data
        }
    };
    let factors = |(low, high): Factors| _mm_set_epi64x(high.cast_signed(), low.cast_signed());
    let mut sums: [__m128i; NARROW_VECTORS] = std::array::from_fn(|i| take(i * NARROW_BYTES));
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(crc.cast_signed()));
    let mut at = ROUND;
    let by = factors(NARROW_ROUND);
    while len_bytes - at >= ROUND {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = add_narrow(*sum, by, take(at + i * NARROW_BYTES));
        }
        at += ROUND;
    }
    let by = factors(NARROW_NEXT);
    let [first, others @ ..] = sums;
    let sum = others.into_iter().fold(first, |sum, next| add_narrow(sum, by, next));
    // SAFETY: `at` is at most `len_bytes`, so this is the rest of what the caller promised.
    unsafe { tail(src.add(at), dst.add(at), len_bytes - at, remainder(sum)) }
}

/// [`super::copy`] for the last few bytes: eight at a time, then one at a time.
///
/// # Safety
/// As [`super::copy`], and [`has_narrow`].
#[target_feature(enable = "sse4.2")]
unsafe fn tail(src: *const u8, dst: *mut u8, len_bytes: usize, crc: u32) -> u32 {
    let mut at = 0;
    let mut long = u64::from(crc);
    while len_bytes - at >= 8 {
        // SAFETY: the eight bytes end within `len_bytes`, for which the caller promised this.
        unsafe {
            let data = load_eight(src.add(at));
            dst.add(at).cast::<u64>().write_unaligned(data);
            long = _mm_crc32_u64(long, data);
        }
        at += 8;
    }
    let mut crc = long as u32;
    while at < len_bytes {
        // SAFETY: the byte is within `len_bytes`, for which the caller promised this; a volatile read happens once.
        unsafe {
            let data = src.add(at).read_volatile();
            dst.add(at).write(data);
            crc = _mm_crc32_u8(crc, data);
        }
        at += 1;
    }
    crc
}

/// Moves `sum` on and adds what is there: three operands in one exclusive or.
#[inline]
#[target_feature(enable = "avx512f,vpclmulqdq")]
fn add_wide(sum: __m512i, by: __m512i, next: __m512i) -> __m512i {
    let low = _mm512_clmulepi64_epi128::<0x00>(sum, by);
    let high = _mm512_clmulepi64_epi128::<0x11>(sum, by);
    _mm512_ternarylogic_epi64::<0x96>(low, high, next)
}

/// The same for 16 bytes.
#[inline]
#[target_feature(enable = "pclmulqdq,sse4.2")]
fn add_narrow(sum: __m128i, by: __m128i, next: __m128i) -> __m128i {
    let low = _mm_clmulepi64_si128::<0x00>(sum, by);
    let high = _mm_clmulepi64_si128::<0x11>(sum, by);
    _mm_xor_si128(_mm_xor_si128(low, high), next)
}

/// The register after 16 bytes that stand for all before.
#[inline]
#[target_feature(enable = "sse4.2")]
fn remainder(sum: __m128i) -> u32 {
    let low = _mm_cvtsi128_si64(sum).cast_unsigned();
    let high = _mm_cvtsi128_si64(_mm_unpackhi_epi64(sum, sum)).cast_unsigned();
    _mm_crc32_u64(_mm_crc32_u64(0, low), high) as u32
}

/// # Safety
/// 64 bytes at `from` are valid for reads; others may write them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_wide(from: *const u8) -> __m512i {
    let data;
    // SAFETY: reads 64 bytes, of any alignment, as the caller promised, and changes nothing but the register it gives.
    unsafe {
        asm!("vmovdqu64 {data}, [{from}]", data = lateout(zmm_reg) data, from = in(reg) from,
            options(nostack, preserves_flags, readonly));
    }
    data
}

/// # Safety
/// 16 bytes at `from` are valid for reads; others may write them.
#[inline]
#[target_feature(enable = "sse4.2")]
unsafe fn load_narrow(from: *const u8) -> __m128i {
    let data;
    // SAFETY: reads 16 bytes, of any alignment, as the caller promised, and changes nothing but the register it gives.
    unsafe {
        asm!("movdqu {data}, [{from}]", data = lateout(xmm_reg) data, from = in(reg) from,
            options(nostack, preserves_flags, readonly));
    }
    data
}

/// # Safety
/// Eight bytes at `from` are valid for reads; others may write them.
#[inline]
unsafe fn load_eight(from: *const u8) -> u64 {
    let data;
    // SAFETY: reads eight bytes, of any alignment, as the caller promised, and changes nothing but the register it gives.
    unsafe {
        asm!("mov {data}, [{from}]", data = lateout(reg) data, from = in(reg) from,
            options(nostack, preserves_flags, readonly));
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As computed by others for this polynomial (the table in Linux' crc32c for three streams, and the Intel paper's way).
    #[test]
    fn factors_are_those_of_the_literature() {
        assert_eq!(power(0), 1 << 31);
        assert_eq!(power(31), 1);
        assert_eq!(power(32), POLYNOMIAL);
        assert_eq!(moving_by(16), (0x0_f20c_0dfe, 0x1_4cd0_0bd6));
    }
}

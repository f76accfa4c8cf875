//! CHAP (RFC 1994) as iSCSI uses it (RFC 7143 12.1.3, 9.2.1): secrets, algorithms, challenges and responses.
//!
//! The order of the exchange is [`crate::login`]'s. Randomness comes from the caller.

use std::fmt;

use md5::Md5;
use sha1::Sha1;
use sha2::Sha256;
use sha3::Sha3_256;
use sha3::digest::Digest;
use subtle::ConstantTimeEq;
use thiserror::Error;

use crate::text;

/// Most bytes of a challenge or response (12.1.3).
pub const MAX_BINARY_BYTES: usize = 1024;
/// Secrets shorter than this (96 bits) are only for encrypted channels (9.2.1).
pub const MIN_STRONG_SECRET_BYTES: usize = 12;
/// Most bytes of a secret or of a name: what every implementation can be expected to take.
pub const MAX_SECRET_BYTES: usize = 255;
/// The longest response of the algorithms here, and the length of the challenges that we send at most.
pub const MAX_RESPONSE_BYTES: usize = 32;

/// Hash algorithms by their number (IANA, "PPP Authentication Algorithms").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Algorithm {
    /// MD5, which everyone has.
    Md5 = 5,
    /// SHA-1.
    Sha1 = 6,
    /// SHA-256.
    Sha256 = 7,
    /// SHA3-256.
    Sha3_256 = 8,
}

impl Algorithm {
    /// All of them, strongest first.
    pub const STRONGEST_FIRST: [Self; 4] = [Self::Sha3_256, Self::Sha256, Self::Sha1, Self::Md5];

    /// What an initiator offers unless told otherwise: strongest first, but SHA-256 last.
    ///
    /// tgt (1.0.85 and later) takes number 7 for SHA-1 and picks it over MD5 where it comes first, so that
    /// every login fails with "wrong secret". All targets known to have SHA-256 also have SHA3-256, and pick that.
    pub const DEFAULT_OFFER: [Self; 4] = [Self::Sha3_256, Self::Sha1, Self::Md5, Self::Sha256];

    /// The algorithm with this number.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        Some(match number {
            5 => Self::Md5,
            6 => Self::Sha1,
            7 => Self::Sha256,
            8 => Self::Sha3_256,
            _ => return None,
        })
    }

    /// Length of its responses.
    #[must_use]
    pub const fn response_bytes(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 | Self::Sha3_256 => 32,
        }
    }

    /// The value of CHAP_A that offers these algorithms, in order.
    #[must_use]
    pub fn list(algorithms: &[Self]) -> String {
        algorithms.iter().map(|&algorithm| (algorithm as u8).to_string()).collect::<Vec<_>>().join(",")
    }

    /// The first algorithm of an offered CHAP_A that is in `allowed`. Numbers that mean nothing here are skipped.
    #[must_use]
    pub fn choose(offered: &str, allowed: &[Self]) -> Option<Self> {
        let known = |number: &str| text::parse_number(number.trim()).and_then(Self::from_number);
        offered.split(',').filter_map(known).find(|algorithm| allowed.contains(algorithm))
    }

    /// The response to a challenge: the hash of identifier, secret and challenge (RFC 1994 4.1).
    #[must_use]
    pub fn response(self, identifier: u8, secret: &Secret, challenge: &[u8]) -> Response {
        fn hash<D: Digest>(identifier: u8, secret: &[u8], challenge: &[u8]) -> Response {
            let mut hash = D::new();
            hash.update([identifier]);
            hash.update(secret);
            hash.update(challenge);
            Response(hash.finalize().to_vec())
        }
        match self {
            Self::Md5 => hash::<Md5>(identifier, &secret.0, challenge),
            Self::Sha1 => hash::<Sha1>(identifier, &secret.0, challenge),
            Self::Sha256 => hash::<Sha256>(identifier, &secret.0, challenge),
            Self::Sha3_256 => hash::<Sha3_256>(identifier, &secret.0, challenge),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Md5 => "MD5",
            Self::Sha1 => "SHA-1",
            Self::Sha256 => "SHA-256",
            Self::Sha3_256 => "SHA3-256",
        })
    }
}

/// Why CHAP cannot go on. No variant holds a secret, a challenge or a response.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChapError {
    /// A secret that is empty or too long.
    #[error("CHAP secret of {len_bytes} bytes, where 1 to {MAX_SECRET_BYTES} are possible")]
    SecretLength {
        /// Its length.
        len_bytes: usize,
    },
    /// A user name that is empty, too long, or not text.
    #[error("CHAP name is empty, longer than {MAX_SECRET_BYTES} bytes or contains a zero byte")]
    BadName,
    /// The secret is the same in both directions, which lets anyone answer with our own responses (9.2.1).
    #[error("the CHAP secrets of initiator and target are the same")]
    EqualSecrets,
    /// The offered list of algorithms does not hold MD5 (12.1.3), or is empty.
    #[error("the CHAP algorithms offered do not include MD5")]
    Md5NotOffered,
    /// The peer chose an algorithm that was not offered.
    #[error("peer chose CHAP algorithm {0}, which was not offered")]
    NotOffered(String),
    /// None of the offered algorithms is supported or allowed.
    #[error("none of the CHAP algorithms {0} is allowed here")]
    NoAlgorithm(String),
    /// A key that the step needs is missing.
    #[error("peer did not send {0}")]
    Missing(&'static str),
    /// A key has a value that cannot be read.
    #[error("{key} cannot be read: {source}")]
    BadBinary {
        /// The key.
        key: &'static str,
        /// What is wrong.
        source: text::BinaryError,
    },
    /// CHAP_I is not a number from 0 to 255.
    #[error("CHAP_I is not a number from 0 to 255")]
    BadIdentifier,
    /// The challenge is one that we sent (9.2.1).
    #[error("peer reflected our CHAP challenge")]
    ReflectedChallenge,
    /// The response is what we would answer ourselves (9.2.1).
    #[error(
        "peer answered the CHAP challenge as we would ourselves: the secrets of both directions are the same"
    )]
    ReflectedResponse,
    /// The name is not the one expected.
    #[error("peer authenticated as `{}`, which is not the expected name", .0.escape_debug())]
    WrongName(String),
    /// The response is wrong: another secret.
    #[error("CHAP response is wrong: the secrets of the two sides differ")]
    WrongResponse,
}

/// A secret. Neither `Debug` nor any error shows it, and comparing takes the same time wherever they differ.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Takes a secret of 1 to 255 bytes.
    ///
    /// # Errors
    /// It is empty or longer.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, ChapError> {
        let bytes = bytes.into();
        match bytes.len() {
            1..=MAX_SECRET_BYTES => Ok(Self(bytes)),
            len_bytes => Err(ChapError::SecretLength { len_bytes }),
        }
    }

    /// Whether it has fewer than 96 bits: to be warned of on channels without encryption (9.2.1).
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.0.len() < MIN_STRONG_SECRET_BYTES
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Keeps the compiler from dropping the write above.
        std::hint::black_box(&self.0);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A response; comparing takes the same time wherever they differ.
#[derive(Clone)]
pub struct Response(Vec<u8>);

impl Response {
    /// The value of CHAP_R.
    #[must_use]
    pub fn to_text(&self) -> String {
        text::binary_hex(&self.0)
    }
}

impl PartialEq for Response {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Response {}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Response(..)")
    }
}

/// A user name with the secret that proves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    name: String,
    secret: Secret,
}

impl Account {
    /// A name of 1 to 255 bytes with its secret.
    ///
    /// # Errors
    /// The name cannot be sent.
    pub fn new(name: impl Into<String>, secret: Secret) -> Result<Self, ChapError> {
        let name = name.into();
        if name.is_empty() || name.len() > MAX_SECRET_BYTES || name.contains('\0') {
            return Err(ChapError::BadName);
        }
        Ok(Self { name, secret })
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The secret.
    #[must_use]
    pub const fn secret(&self) -> &Secret {
        &self.secret
    }
}

/// Random bytes for one login, from the caller's random number generator: an identifier and a challenge.
#[derive(Clone)]
pub struct Entropy(pub [u8; 1 + MAX_RESPONSE_BYTES]);

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entropy(..)")
    }
}

/// A challenge: what CHAP_I and CHAP_C carry.
#[derive(Clone, PartialEq, Eq)]
pub struct Challenge {
    identifier: u8,
    bytes: Vec<u8>,
}

impl Challenge {
    /// A challenge of ours, as long as the responses to it.
    #[must_use]
    pub fn generate(algorithm: Algorithm, entropy: &Entropy) -> Self {
        Self { identifier: entropy.0[0], bytes: entropy.0[1..=algorithm.response_bytes()].to_vec() }
    }

    /// A challenge of the peer's.
    ///
    /// # Errors
    /// A key is missing or cannot be read.
    pub fn parse(identifier: Option<&str>, challenge: Option<&str>) -> Result<Self, ChapError> {
        let identifier = identifier.ok_or(ChapError::Missing("CHAP_I"))?;
        let identifier = text::parse_number_in(identifier, &(0..=255)).ok_or(ChapError::BadIdentifier)?;
        let challenge = challenge.ok_or(ChapError::Missing("CHAP_C"))?;
        let bytes = text::parse_binary(challenge, MAX_BINARY_BYTES)
            .map_err(|source| ChapError::BadBinary { key: "CHAP_C", source })?;
        Ok(Self { identifier: identifier as u8, bytes })
    }

    /// Adds CHAP_I and CHAP_C.
    pub fn write(&self, out: &mut text::Outgoing) {
        out.push_number("CHAP_I", u64::from(self.identifier));
        out.push("CHAP_C", &text::binary_hex(&self.bytes));
    }

    /// Whether both have the same challenge bytes: a reflection if one is the peer's (9.2.1).
    #[must_use]
    pub fn reflects(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }

    /// The answer that someone with this secret gives.
    #[must_use]
    pub fn respond(&self, algorithm: Algorithm, secret: &Secret) -> Response {
        algorithm.response(self.identifier, secret, &self.bytes)
    }

    /// Checks the peer's CHAP_R against the peer's `secret`. `own` is the secret with which this side authenticates
    /// itself, if it does: a response made with that one is a reflection.
    ///
    /// # Errors
    /// The response is wrong or cannot be read.
    pub fn verify(
        &self,
        algorithm: Algorithm,
        secret: &Secret,
        own: Option<&Secret>,
        response: Option<&str>,
    ) -> Result<(), ChapError> {
        let response = response.ok_or(ChapError::Missing("CHAP_R"))?;
        let response = text::parse_binary(response, MAX_BINARY_BYTES)
            .map(Response)
            .map_err(|source| ChapError::BadBinary { key: "CHAP_R", source })?;
        if own.is_some_and(|own| self.respond(algorithm, own) == response) {
            return Err(ChapError::ReflectedResponse);
        }
        if self.respond(algorithm, secret) == response { Ok(()) } else { Err(ChapError::WrongResponse) }
    }
}

impl fmt::Debug for Challenge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Challenge({} bytes)", self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> Secret {
        Secret::new("secretsecret").unwrap()
    }

    /// Computed with an independent implementation (Python's hashlib) over 0x27, "secretsecret", bytes 0 to 15.
    #[test]
    fn vectors() {
        let challenge: Vec<u8> = (0..16).collect();
        for (algorithm, expected) in VECTORS {
            let response = algorithm.response(0x27, &secret(), &challenge);
            assert_eq!(response.to_text(), expected, "{algorithm}");
            assert_eq!(response.0.len(), algorithm.response_bytes());
        }
    }

    const VECTORS: [(Algorithm, &str); 4] = [
        (Algorithm::Md5, "0x486c7f63362ead9836fca954d3eb2cd0"),
        (Algorithm::Sha1, "0x66d1e52d746bea34f95913aee97658a47816c847"),
        (Algorithm::Sha256, "0x1484bb44567f91c3b5ee33b312146e27153e0a695b7548e6deee9ce64216c38c"),
        (Algorithm::Sha3_256, "0x712d0b0c90095773fbbc8cbe2582ee9142d396811652f966579ea1420c48237c"),
    ];

    #[test]
    fn choice_follows_the_offer() {
        let all = &Algorithm::STRONGEST_FIRST;
        assert_eq!(Algorithm::list(all), "8,7,6,5");
        assert_eq!(Algorithm::choose("8,7,6,5", all), Some(Algorithm::Sha3_256));
        assert_eq!(Algorithm::choose("5,8", all), Some(Algorithm::Md5));
        assert_eq!(Algorithm::choose("8,7,6,5", &[Algorithm::Md5]), Some(Algorithm::Md5));
        assert_eq!(Algorithm::choose("4,99,x,,0x7", all), Some(Algorithm::Sha256));
        assert_eq!(Algorithm::choose("4", all), None);
    }

    #[test]
    fn nothing_shows_a_secret() {
        let account = Account::new("alice", secret()).unwrap();
        let challenge = Challenge { identifier: 1, bytes: vec![0xAB; 16] };
        let response = challenge.respond(Algorithm::Md5, &secret());
        let shown = format!("{account:?} {challenge:?} {response:?}");
        assert!(!shown.contains("secretsecret") && !shown.contains(&response.to_text()[2..]), "{shown}");
    }

    #[test]
    fn limits() {
        assert!(Secret::new("").is_err());
        assert!(Secret::new(vec![1; 256]).is_err());
        assert!(Secret::new(vec![1; 11]).unwrap().is_short());
        assert!(!Secret::new(vec![1; 12]).unwrap().is_short());
        assert!(Account::new("", secret()).is_err());
        let long = text::binary_hex(&[1; MAX_BINARY_BYTES + 1]);
        assert!(matches!(Challenge::parse(Some("1"), Some(&long)), Err(ChapError::BadBinary { .. })));
        assert_eq!(Challenge::parse(Some("256"), Some("0x00")), Err(ChapError::BadIdentifier));
        assert_eq!(Challenge::parse(None, Some("0x00")), Err(ChapError::Missing("CHAP_I")));
    }

    #[test]
    fn verification() {
        let other = Secret::new("another secret").unwrap();
        for algorithm in Algorithm::STRONGEST_FIRST {
            let challenge = Challenge::generate(algorithm, &Entropy([7; 33]));
            assert_eq!(challenge.bytes.len(), algorithm.response_bytes());
            let verify = |own, response: &str| challenge.verify(algorithm, &secret(), own, Some(response));
            let right = challenge.respond(algorithm, &secret());
            assert_eq!(verify(Some(&other), &right.to_text()), Ok(()));
            assert_eq!(verify(None, &text::binary_base64(&right.0)), Ok(()));
            let reflected = challenge.respond(algorithm, &other).to_text();
            assert_eq!(verify(Some(&other), &reflected), Err(ChapError::ReflectedResponse));
            assert_eq!(verify(None, &reflected), Err(ChapError::WrongResponse));
            assert_eq!(verify(None, "0x00"), Err(ChapError::WrongResponse));
        }
    }
}

//! How two ranks make sure of each other: both prove that they know the secret of the attempt, without sending it.
//!
//! Client: 16 bytes of greeting, a nonce. Server: a nonce, a proof. Client: rank, world size, port, a proof over them.
//! Server: one byte, 0 for welcome; else the length of a refusal, and its text. A proof is the keyed BLAKE3 digest of
//! both nonces, the side, the identity and what was sent with it. What follows is not encrypted.

use std::io::{self, Read, Write};

/// First bytes of a client.
const GREETING: &[u8; 16] = b"growth-trainer 1";

/// Bytes of a nonce and of a proof.
const DIGEST_BYTES: usize = 32;

/// Longest refusal.
const LONGEST_REFUSAL: usize = 255;

/// What only the ranks of one attempt know.
#[derive(Clone)]
pub struct Secret([u8; DIGEST_BYTES]);

impl Secret {
    /// A new secret, from the operating system.
    ///
    /// # Errors
    /// When the operating system has none.
    pub fn random() -> io::Result<Self> {
        nonce().map(Self)
    }

    /// As 64 hexadecimal digits.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// From 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text.trim()).ok().map(|hash| Self(*hash.as_bytes()))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secret")
    }
}

/// What ranks that belong together have in common: job, stage, attempt, plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity(pub String);

/// What a rank tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Introduction {
    /// Its rank.
    pub rank: u32,
    /// The number of ranks that it expects.
    pub world_size: u32,
    /// The port on which it expects higher ranks.
    pub port: u16,
}

const INTRODUCTION_BYTES: usize = 10;

impl Introduction {
    fn encode(self) -> [u8; INTRODUCTION_BYTES] {
        let mut bytes = [0; INTRODUCTION_BYTES];
        bytes[..4].copy_from_slice(&self.rank.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.world_size.to_le_bytes());
        bytes[8..].copy_from_slice(&self.port.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; INTRODUCTION_BYTES]) -> Self {
        let [r0, r1, r2, r3, w0, w1, w2, w3, p0, p1] = bytes;
        Self {
            rank: u32::from_le_bytes([r0, r1, r2, r3]),
            world_size: u32::from_le_bytes([w0, w1, w2, w3]),
            port: u16::from_le_bytes([p0, p1]),
        }
    }
}

fn nonce() -> io::Result<[u8; DIGEST_BYTES]> {
    let mut bytes = [0; DIGEST_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

fn proof(secret: &Secret, parts: &[&[u8]]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(&secret.0);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()
}

fn read<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn refused(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, text.into())
}

/// The side that connects. An error of kind `PermissionDenied` is final: a rank of this attempt has refused. After others
/// it may try again.
pub fn introduce(
    stream: &mut (impl Read + Write),
    secret: &Secret,
    identity: &Identity,
    me: Introduction,
) -> io::Result<()> {
    let mine = nonce()?;
    let identity = identity.0.as_bytes();
    stream.write_all(&[&GREETING[..], &mine].concat())?;
    let theirs: [u8; DIGEST_BYTES] = read(stream)?;
    let claimed: [u8; DIGEST_BYTES] = read(stream)?;
    // Comparing hashes takes the same time wherever they differ.
    if blake3::Hash::from_bytes(claimed) != proof(secret, &[b"server", &mine, &theirs, identity]) {
        // Perhaps the address still leads to an older attempt: that changes.
        let text = "what answers there is not a rank of this attempt";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let introduction = me.encode();
    let proof = proof(secret, &[b"client", &mine, &theirs, identity, &introduction]);
    stream.write_all(&[&introduction[..], proof.as_bytes()].concat())?;
    let [length] = read(stream)?;
    if length == 0 {
        return Ok(());
    }
    let mut text = vec![0; usize::from(length)];
    stream.read_exact(&mut text)?;
    Err(refused(String::from_utf8_lossy(&text)))
}

/// The side that listens; `judge` refuses ranks that are not expected, with a reason.
pub fn receive(
    stream: &mut (impl Read + Write),
    secret: &Secret,
    identity: &Identity,
    judge: impl FnOnce(Introduction) -> Result<(), String>,
) -> io::Result<Introduction> {
    let greeting: [u8; 16] = read(stream)?;
    if &greeting != GREETING {
        return Err(refused("it is no trainer of this version"));
    }
    let theirs: [u8; DIGEST_BYTES] = read(stream)?;
    let mine = nonce()?;
    let identity = identity.0.as_bytes();
    let own = proof(secret, &[b"server", &theirs, &mine, identity]);
    stream.write_all(&[&mine[..], own.as_bytes()].concat())?;
    let introduction: [u8; INTRODUCTION_BYTES] = read(stream)?;
    let claimed: [u8; DIGEST_BYTES] = read(stream)?;
    if blake3::Hash::from_bytes(claimed)
        != proof(secret, &[b"client", &theirs, &mine, identity, &introduction])
    {
        return Err(refused("it does not know the secret of this attempt"));
    }
    let introduction = Introduction::decode(introduction);
    match judge(introduction) {
        Ok(()) => {
            stream.write_all(&[0])?;
            Ok(introduction)
        }
        Err(reason) => {
            let text = &reason.as_bytes()[..reason.len().min(LONGEST_REFUSAL)];
            // The length is at most 255.
            stream.write_all(&[&[text.len() as u8][..], text].concat())?;
            Err(refused(reason))
        }
    }
}

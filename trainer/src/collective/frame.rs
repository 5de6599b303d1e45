//! What travels between two ranks: frames of at most [`MAX_PAYLOAD_BYTES`], each behind a header that is checked before
//! anything is allocated.
//!
//! A header is 16 bytes, little-endian: magic, kind, 1 where the message goes on in the next frame, two zeros, the number
//! of the operation, the length of the payload in bytes.

use std::io::{self, Read, Write};

/// Largest payload. Longer messages are several frames; a piece of this size stays in a core's cache.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 18;

/// Numbers of a full frame.
pub const MAX_NUMBERS: usize = MAX_PAYLOAD_BYTES / size_of::<f32>();

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// Marks a frame, and the version of this format.
const MAGIC: [u8; 4] = *b"GTR1";

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: the sender is alive.
    Heartbeat,
    /// A piece of gradients, weights or moments.
    Numbers,
    /// A piece of what the training threads tell each other.
    Bytes,
    /// A piece of what the checkpoint threads tell each other.
    Note,
    /// The sender is done; there is no other frame after it.
    Done,
    /// The sender has failed; the payload says why.
    Failed,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Heartbeat, Self::Numbers, Self::Bytes, Self::Note, Self::Done, Self::Failed];

    fn parse(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }
}

/// What is known of a frame before its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is for.
    pub kind: Kind,
    /// Whether the message goes on in the next frame of this kind.
    pub more: bool,
    /// Number of the operation that it belongs to.
    pub operation: u32,
    /// Length of the payload, in bytes.
    pub payload_bytes: usize,
}

/// A header that no trainer of this version writes.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum FrameError {
    /// Something else speaks.
    #[error("a frame begins with {0:02x?} instead of GTR1")]
    Magic([u8; 4]),
    /// An unknown kind, or bytes that must be zero.
    #[error("a frame has the unknown kind {0:02x?}")]
    Kind([u8; 4]),
    /// Too long, or not a whole number of numbers.
    #[error("a frame claims {0} bytes; up to {MAX_PAYLOAD_BYTES} are allowed, four for each number")]
    Length(u32),
}

impl Header {
    /// The bytes before the payload.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let [m0, m1, m2, m3] = MAGIC;
        let [o0, o1, o2, o3] = self.operation.to_le_bytes();
        // A payload is at most MAX_PAYLOAD_BYTES long.
        let [l0, l1, l2, l3] = (self.payload_bytes as u32).to_le_bytes();
        [m0, m1, m2, m3, self.kind as u8, u8::from(self.more), 0, 0, o0, o1, o2, o3, l0, l1, l2, l3]
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// When no trainer writes such a header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let [m0, m1, m2, m3, kind, more, z0, z1, o0, o1, o2, o3, l0, l1, l2, l3] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(FrameError::Magic([m0, m1, m2, m3]));
        }
        let unknown = FrameError::Kind([kind, more, z0, z1]);
        let parsed = Kind::parse(kind).ok_or_else(|| unknown.clone())?;
        if more > 1 || (z0, z1) != (0, 0) {
            return Err(unknown);
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let payload_bytes = length as usize;
        let is_whole = parsed != Kind::Numbers || payload_bytes.is_multiple_of(size_of::<f32>());
        if payload_bytes > MAX_PAYLOAD_BYTES || !is_whole {
            return Err(FrameError::Length(length));
        }
        Ok(Self {
            kind: parsed,
            more: more == 1,
            operation: u32::from_le_bytes([o0, o1, o2, o3]),
            payload_bytes,
        })
    }
}

/// Content of a frame.
#[derive(Debug, Clone, PartialEq)]
pub enum Payload {
    /// Of [`Kind::Numbers`].
    Numbers(Vec<f32>),
    /// Of every other kind.
    Bytes(Vec<u8>),
}

/// A frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// Whether the message goes on.
    pub more: bool,
    /// Number of its operation.
    pub operation: u32,
    /// Its content.
    pub payload: Payload,
}

impl Frame {
    /// A frame of numbers, at most [`MAX_NUMBERS`].
    pub fn numbers(operation: u32, numbers: &[f32]) -> Self {
        Self { kind: Kind::Numbers, more: false, operation, payload: Payload::Numbers(numbers.to_vec()) }
    }

    /// A frame of bytes, at most [`MAX_PAYLOAD_BYTES`].
    pub fn bytes(kind: Kind, operation: u32, more: bool, bytes: &[u8]) -> Self {
        Self { kind, more, operation, payload: Payload::Bytes(bytes.to_vec()) }
    }

    /// The payload as it travels.
    pub fn payload_bytes(&self) -> &[u8] {
        match &self.payload {
            Payload::Numbers(numbers) => bytemuck::cast_slice(numbers),
            Payload::Bytes(bytes) => bytes,
        }
    }

    /// Writes the frame.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, writer: &mut impl Write) -> io::Result<()> {
        let payload = self.payload_bytes();
        let Self { kind, more, operation, .. } = *self;
        writer.write_all(&Header { kind, more, operation, payload_bytes: payload.len() }.encode())?;
        writer.write_all(payload)
    }

    /// Reads a frame; nothing is allocated before its header is found good.
    ///
    /// # Errors
    /// Those of the reader, and [`FrameError`] as [`io::ErrorKind::InvalidData`].
    pub fn read(reader: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        reader.read_exact(&mut header)?;
        let header =
            Header::decode(&header).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let payload = match header.kind {
            Kind::Numbers => {
                let mut numbers = vec![0.0f32; header.payload_bytes / size_of::<f32>()];
                reader.read_exact(bytemuck::cast_slice_mut(&mut numbers))?;
                Payload::Numbers(numbers)
            }
            _ => {
                let mut bytes = vec![0; header.payload_bytes];
                reader.read_exact(&mut bytes)?;
                Payload::Bytes(bytes)
            }
        };
        Ok(Self { kind: header.kind, more: header.more, operation: header.operation, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let numbers =
            prop::collection::vec(any::<f32>().prop_filter("equal to itself", |x| !x.is_nan()), 0..300);
        let bytes = prop::collection::vec(any::<u8>(), 0..300);
        (0..Kind::ALL.len(), any::<bool>(), any::<u32>(), numbers, bytes).prop_map(
            |(kind, more, operation, numbers, bytes)| match Kind::ALL[kind] {
                Kind::Numbers => Frame { more, ..Frame::numbers(operation, &numbers) },
                kind => Frame::bytes(kind, operation, more, &bytes),
            },
        )
    }

    proptest! {
        #[test]
        fn a_frame_is_read_as_it_was_written(frame in frames()) {
            let mut wire = Vec::new();
            frame.write(&mut wire).unwrap();
            prop_assert_eq!(Frame::read(&mut wire.as_slice()).unwrap(), frame);
        }

        /// Whatever a stranger sends: an error or a frame that writes the same bytes, never a panic.
        #[test]
        fn any_bytes_are_an_error_or_a_frame(
            mut wire in prop::collection::vec(any::<u8>(), 0..200), as_ours: bool, kind in 0u8..8, length in 0u32..250,
        ) {
            if as_ours && wire.len() >= HEADER_BYTES {
                wire[..4].copy_from_slice(&MAGIC);
                wire[4..8].copy_from_slice(&[kind, 0, 0, 0]);
                wire[12..16].copy_from_slice(&length.to_le_bytes());
            }
            if let Ok(frame) = Frame::read(&mut wire.as_slice()) {
                let mut again = Vec::new();
                frame.write(&mut again).unwrap();
                prop_assert_eq!(&again[..], &wire[..again.len()]);
            }
        }

        #[test]
        fn a_cut_frame_is_an_error(frame in frames(), cut in 1usize..16) {
            let mut wire = Vec::new();
            frame.write(&mut wire).unwrap();
            wire.truncate(wire.len() - cut);
            prop_assert!(Frame::read(&mut wire.as_slice()).is_err());
        }
    }

    #[test]
    fn a_claimed_length_allocates_nothing() {
        for (kind, length) in [(Kind::Bytes, u32::MAX), (Kind::Numbers, 1 << 30), (Kind::Numbers, 5)] {
            let header = Header { kind, more: false, operation: 0, payload_bytes: length as usize };
            assert_eq!(Header::decode(&header.encode()), Err(FrameError::Length(length)));
        }
    }
}

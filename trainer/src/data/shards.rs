//! Token shards and the index that says what they hold.

use super::Result;
use crate::storage::{ObjectWriter, Storage};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};

/// Changes when the same sources would give other shards.
pub(super) const FORMAT_VERSION: u32 = 1;

/// Tokens of a whole shard.
pub(super) const SHARD_TOKENS: u64 = 32 << 20;

/// Name of the index in the folder of a dataset.
pub(super) const INDEX: &str = "index.json";

/// Name of the tokenizer in the folder of a dataset.
pub(super) const TOKENIZER: &str = "tokenizer.json";

/// What a dataset holds; written when everything else is.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    pub version: u32,
    pub digest: String,
    /// Bytes of a token in the shards: 2 or 4.
    pub token_bytes: usize,
    pub vocab_size: u32,
    pub separator: u32,
    pub separator_token: String,
    /// Digest of tokenizer.json.
    pub tokenizer: String,
    pub train: Vec<Part>,
    pub validation: Part,
}

/// The tokens of one training source, or of the validation text.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// Where the text comes from.
    pub uri: String,
    /// The shards in order.
    pub shards: Vec<Shard>,
    /// Tokens, separators included.
    pub tokens: u64,
    /// Documents.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Documents that hold no text, and files that are not UTF-8.
    pub skipped: u64,
}

/// One object of tokens.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Name in the folder of the dataset.
    pub name: String,
    /// Tokens.
    pub tokens: u64,
    /// Digest of the object.
    pub blake3: String,
}

/// Bytes of a token where ids are below `vocab_size`.
pub(super) fn token_bytes(vocab_size: u32) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Ids as a shard holds them.
pub(super) fn to_bytes(ids: &[u32], token_bytes: usize) -> Vec<u8> {
    match token_bytes {
        2 => ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect(),
        _ => ids.iter().flat_map(|&id| id.to_le_bytes()).collect(),
    }
}

/// Ids from a shard's bytes.
pub(super) fn from_bytes(bytes: &[u8], ids: &mut [u32]) {
    if bytes.len() == ids.len() * 2 {
        let (pairs, _) = bytes.as_chunks();
        ids.iter_mut().zip(pairs).for_each(|(id, &pair)| *id = u16::from_le_bytes(pair).into());
    } else {
        let (quads, _) = bytes.as_chunks();
        ids.iter_mut().zip(quads).for_each(|(id, &quad)| *id = u32::from_le_bytes(quad));
    }
}

/// Writes a stream of tokens as shards, with bounded memory.
pub(super) struct ShardWriter {
    storage: Storage,
    stem: String,
    token_bytes: usize,
    shard_bytes: usize,
    open: Option<OpenShard>,
    part: Part,
}

struct OpenShard {
    writer: ObjectWriter,
    hasher: blake3::Hasher,
    bytes: usize,
}

impl ShardWriter {
    pub fn new(storage: &Storage, stem: String, uri: String, token_bytes: usize, shard_tokens: u64) -> Self {
        let shard_bytes = shard_tokens as usize * token_bytes;
        let part = Part { uri, ..Part::default() };
        Self { storage: storage.clone(), stem, token_bytes, shard_bytes, open: None, part }
    }

    /// What has been written, to count on.
    pub fn part(&mut self) -> &mut Part {
        &mut self.part
    }

    /// Adds whole tokens.
    pub fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.part.tokens += (bytes.len() / self.token_bytes) as u64;
        while !bytes.is_empty() {
            let shard_bytes = self.shard_bytes;
            let shard = self.open_shard()?;
            let (now, later) = bytes.split_at(bytes.len().min(shard_bytes - shard.bytes));
            shard.hasher.update(now);
            shard.bytes += now.len();
            let written = shard.writer.write_all(now);
            let full = shard.bytes == shard_bytes;
            written.map_err(|error| self.write_error(error))?;
            if full {
                self.close()?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// Writes what is left and says what all of it is.
    pub fn finish(mut self) -> Result<Part> {
        self.close()?;
        Ok(self.part)
    }

    fn next_name(&self) -> String {
        format!("{}-{}.bin", self.stem, self.part.shards.len())
    }

    fn open_shard(&mut self) -> Result<&mut OpenShard> {
        let shard = match self.open.take() {
            Some(shard) => shard,
            None => OpenShard {
                writer: self.storage.writer(&self.next_name())?,
                hasher: blake3::Hasher::new(),
                bytes: 0,
            },
        };
        Ok(self.open.insert(shard))
    }

    fn close(&mut self) -> Result<()> {
        let Some(shard) = self.open.take() else { return Ok(()) };
        shard.writer.finish()?;
        self.part.shards.push(Shard {
            name: self.next_name(),
            tokens: (shard.bytes / self.token_bytes) as u64,
            blake3: shard.hasher.finalize().to_hex().to_string(),
        });
        Ok(())
    }

    fn write_error(&self, error: io::Error) -> super::DataError {
        let uri = self.storage.uri_of(&self.next_name());
        super::DataError::File { file: uri, reason: format!("cannot be written: {error}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_bytes_hold_65536_ids() {
        assert_eq!([1, 1 << 16, (1 << 16) + 1, u32::MAX].map(token_bytes), [2, 2, 4, 4]);
    }

    proptest! {
        #[test]
        fn ids_come_back(vocab_size in 1u32.., shares in prop::collection::vec(0.0..1.0f64, 0..50)) {
            let ids: Vec<u32> = shares.iter().map(|share| (f64::from(vocab_size) * share) as u32).collect();
            let bytes = to_bytes(&ids, token_bytes(vocab_size));
            prop_assert_eq!(bytes.len(), ids.len() * token_bytes(vocab_size));
            let mut read = vec![0; ids.len()];
            from_bytes(&bytes, &mut read);
            prop_assert_eq!(read, ids);
        }
    }
}

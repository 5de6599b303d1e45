//! A prepared dataset: its tokenizer and its tokens, read by range.

use super::order::TrainingOrder;
use super::shards::{INDEX, Index, Part, Shard, TOKENIZER, from_bytes};
use super::{DataError, Result};
use crate::storage::{Storage, StorageError};
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;

/// Bytes that a verification reads at a time.
const VERIFY_BYTES: u64 = 8 << 20;

/// How closely a dataset is looked at when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// Every shard has the size that the index says.
    Sizes,
    /// Every shard also has the digest that the index says.
    Content,
}

/// A prepared dataset.
#[derive(Debug)]
pub struct Dataset {
    folder: Storage,
    index: Index,
    tokenizer: Tokenizer,
}

impl Dataset {
    /// The folder of a dataset below a job's storage.
    pub(super) fn folder(storage: &Storage, digest: &str) -> Storage {
        storage.join(&format!("data/{digest}"))
    }

    /// Opens a prepared dataset.
    ///
    /// # Errors
    /// When it is not there, or not as it was written; the message names the object.
    pub fn open(storage: &Storage, digest: &str, verification: Verification) -> Result<Self> {
        let folder = Self::folder(storage, digest);
        let damaged = |name: &str, reason: String| damaged(&folder, name, reason);
        let index: Index = serde_json::from_slice(&folder.get(INDEX)?)
            .map_err(|error| damaged(INDEX, format!("cannot be read: {error}")))?;
        if index.digest != digest {
            return Err(damaged(INDEX, format!("is the index of dataset {}", index.digest)));
        }
        let json = folder.get(TOKENIZER)?;
        if blake3::hash(&json).to_hex().as_str() != index.tokenizer {
            return Err(damaged(TOKENIZER, "is not the tokenizer that the tokens were made with".to_owned()));
        }
        let json = std::str::from_utf8(&json).map_err(|error| damaged(TOKENIZER, error.to_string()))?;
        let tokenizer = Tokenizer::from_json(json, Some(&index.separator_token))?;
        let dataset = Self { folder, index, tokenizer };
        dataset.verify(verification)?;
        Ok(dataset)
    }

    fn verify(&self, verification: Verification) -> Result<()> {
        let shards: Vec<&Shard> = self.parts().flat_map(|part| &part.shards).collect();
        shards.par_iter().try_for_each(|shard| self.verify_shard(shard, verification))
    }

    fn verify_shard(&self, shard: &Shard, verification: Verification) -> Result<()> {
        let damaged = |reason: String| damaged(&self.folder, &shard.name, reason);
        let bytes = shard.tokens * self.index.token_bytes as u64;
        let found = self.folder.head(&shard.name)?.ok_or_else(|| damaged("is missing".to_owned()))?.bytes;
        if found != bytes {
            return Err(damaged(format!("has {found} bytes instead of {bytes}")));
        }
        if verification == Verification::Sizes {
            return Ok(());
        }
        let mut hasher = blake3::Hasher::new();
        for first in (0..bytes).step_by(VERIFY_BYTES as usize) {
            hasher.update(&self.folder.get_range(&shard.name, first..bytes.min(first + VERIFY_BYTES))?);
        }
        if hasher.finalize().to_hex().as_str() != shard.blake3 {
            return Err(damaged("has another content than was written".to_owned()));
        }
        Ok(())
    }

    /// Digest of the sources and settings that it was made from: its name.
    pub fn digest(&self) -> &str {
        &self.index.digest
    }

    /// The tokenizer that its tokens were made with.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The training sources, in the order of `spec.data.train`.
    pub fn training_parts(&self) -> &[Part] {
        &self.index.train
    }

    /// The training sources, then the validation text.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.index.train.iter().chain([&self.index.validation])
    }

    /// Fills `inputs` and the `targets` that follow each of them, both whole sequences, with the samples from
    /// position `first_sample` of the job on.
    ///
    /// # Errors
    /// When the storage does not answer.
    pub fn batch(
        &self,
        order: &TrainingOrder,
        first_sample: u64,
        inputs: &mut [u32],
        targets: &mut [u32],
    ) -> Result<()> {
        let sequence_length = order.sequence_length() as usize;
        let mut tokens = vec![0; sequence_length + 1];
        let rows = inputs.chunks_exact_mut(sequence_length).zip(targets.chunks_exact_mut(sequence_length));
        for (index, (inputs, targets)) in (first_sample..).zip(rows) {
            let sample = order.sample(index);
            let first = sample.sequence * sequence_length as u64;
            self.read(&self.index.train[sample.source], first, &mut tokens)?;
            inputs.copy_from_slice(&tokens[..sequence_length]);
            targets.copy_from_slice(&tokens[1..]);
        }
        Ok(())
    }

    /// Inputs and targets of validation sequences of `sequence_length` tokens, evenly spaced over the text: at least
    /// one, and no more than `max_tokens` hold.
    ///
    /// # Errors
    /// When the validation text is shorter than a sequence, or the storage does not answer.
    pub fn validation_sequences(&self, sequence_length: u32, max_tokens: u64) -> Result<(Vec<u32>, Vec<u32>)> {
        let part = &self.index.validation;
        let length = u64::from(sequence_length);
        let available = part.tokens.saturating_sub(1) / length;
        if available == 0 {
            let reason = format!("{} validation tokens hold no sequence of {length}; add validation text or raise holdOutPercent", part.tokens);
            return Err(super::field_error("spec.data", reason));
        }
        let count = (max_tokens / length).clamp(1, available);
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        let mut tokens = vec![0; sequence_length as usize + 1];
        for index in 0..count {
            self.read(part, index * available / count * length, &mut tokens)?;
            inputs.extend_from_slice(&tokens[..sequence_length as usize]);
            targets.extend_from_slice(&tokens[1..]);
        }
        Ok((inputs, targets))
    }

    /// Reads tokens of a part from position `first` on, across its shards.
    fn read(&self, part: &Part, mut first: u64, mut tokens: &mut [u32]) -> Result<()> {
        let token_bytes = self.index.token_bytes as u64;
        for shard in &part.shards {
            if first >= shard.tokens {
                first -= shard.tokens;
                continue;
            }
            let count = (tokens.len() as u64).min(shard.tokens - first);
            let bytes = self.folder.get_range(&shard.name, first * token_bytes..(first + count) * token_bytes)?;
            let (now, later) = tokens.split_at_mut(count as usize);
            from_bytes(&bytes, now);
            if later.is_empty() {
                return Ok(());
            }
            (tokens, first) = (later, 0);
        }
        Err(damaged(&self.folder, INDEX, "promises more tokens than there are".to_owned()))
    }
}

fn damaged(folder: &Storage, name: &str, reason: String) -> DataError {
    DataError::Damaged { uri: folder.uri_of(name), reason, folder: folder.uri().to_owned() }
}

impl DataError {
    /// Whether the job or its files are at fault, so that trying again cannot help.
    pub fn is_input_error(&self) -> bool {
        match self {
            Self::Field { .. } | Self::File { .. } | Self::Tokenizer(_) => true,
            Self::Storage(error) => matches!(error, StorageError::Address { .. }),
            Self::Damaged { .. } => false,
        }
    }
}

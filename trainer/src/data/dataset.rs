//! A prepared dataset: verified once, then read by range.

use super::order::TrainingOrder;
use super::shards::{self, FORMAT_VERSION, INDEX, Index, Part, Shard, TOKENIZER};
use super::{DataError, Result, field_error};
use crate::storage::{Storage, StorageError, local_path};
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::thread;

/// Bytes hashed at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// Sequences fetched at the same time from storage that is far away.
const FETCHES: usize = 32;

/// How much of a dataset is checked when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// Size and digest of every shard: reads all of them once.
    Content,
    /// Size of every shard: one listing.
    Sizes,
}

/// Tokens to train and to validate on, and their tokenizer. Reads from many threads at once.
#[derive(Debug)]
pub struct Dataset {
    index: Index,
    tokenizer: Tokenizer,
    train: Vec<TokenStream>,
    validation: TokenStream,
}

impl Dataset {
    /// Folder of the dataset with this digest.
    pub(super) fn folder(storage: &Storage, digest: &str) -> Storage {
        storage.join("data").join(digest)
    }

    /// Opens what [`super::prepare`] wrote below `storage`.
    ///
    /// # Errors
    /// When there is no such dataset, or a shard is not as it was written; the message names it.
    pub fn open(storage: &Storage, digest: &str, verification: Verification) -> Result<Self> {
        let folder = Self::folder(storage, digest);
        let index = read_index(&folder, digest)?;
        let tokenizer = read_tokenizer(&folder, &index)?;
        verify_sizes(&folder, &index)?;
        if verification == Verification::Content {
            verify_content(&folder, &index)?;
        }
        let stream = |part: &Part| TokenStream::open(&folder, part, index.token_bytes);
        let train = index.train.iter().map(stream).collect::<Result<_>>()?;
        let validation = stream(&index.validation)?;
        Ok(Self { index, tokenizer, train, validation })
    }

    /// Digest of the sources and settings that the dataset was made of.
    pub fn digest(&self) -> &str {
        &self.index.digest
    }

    /// The tokenizer of the tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Totals of every training source, in the order of the job.
    pub fn train(&self) -> &[Part] {
        &self.index.train
    }

    /// Totals of the validation text.
    pub fn validation(&self) -> &Part {
        &self.index.validation
    }

    /// Fills whole sequences, from the sample number `first_sample` on: `targets` is `inputs` moved by one token.
    ///
    /// # Errors
    /// When a shard cannot be read.
    ///
    /// # Panics
    /// When the slices differ in length, or are not whole sequences.
    pub fn batch(
        &self,
        order: &TrainingOrder,
        first_sample: u64,
        inputs: &mut [u32],
        targets: &mut [u32],
    ) -> Result<()> {
        let samples = order.samples(first_sample, inputs.len() / order.sequence_length());
        let sequences: Vec<_> =
            samples.into_iter().map(|sample| (&self.train[sample.source], sample.sequence)).collect();
        fill(&sequences, order.sequence_length(), inputs, targets)
    }

    /// The training sources, then the validation text.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.index.train.iter().chain([&self.index.validation])
    }

    /// Inputs and targets of the [`Dataset::validation_sequences`] that hold about `max_tokens`.
    ///
    /// # Errors
    /// When the validation text is shorter than one sequence, or a shard cannot be read.
    pub fn validation_tokens(&self, sequence_length: usize, max_tokens: u64) -> Result<(Vec<u32>, Vec<u32>)> {
        let sequences = self.validation_sequences(sequence_length, max_tokens)?;
        let (mut inputs, mut targets) = (vec![0; sequences.len() * sequence_length], Vec::new());
        targets.resize(inputs.len(), 0);
        self.validation_batch(sequence_length, &sequences, &mut inputs, &mut targets)?;
        Ok((inputs, targets))
    }

    /// Numbers of the validation sequences that hold about `max_tokens`, evenly spaced over the validation text.
    ///
    /// # Errors
    /// When the validation text is shorter than one sequence.
    pub fn validation_sequences(&self, sequence_length: usize, max_tokens: u64) -> Result<Vec<u64>> {
        let available = sequences(self.index.validation.tokens, sequence_length);
        if available == 0 {
            return Err(field_error(
                "spec.data",
                format!(
                    "the validation text has {} tokens, fewer than one sequence of {sequence_length} and its target; \
                     give more validation text, or shorten the sequence",
                    self.index.validation.tokens
                ),
            ));
        }
        let wanted = (max_tokens / sequence_length as u64).clamp(1, available);
        let place = |i: u64| (u128::from(i) * u128::from(available) / u128::from(wanted)) as u64;
        Ok((0..wanted).map(place).collect())
    }

    /// Fills the numbered validation sequences, as [`Dataset::batch`] does those to train on.
    ///
    /// # Errors
    /// When a shard cannot be read.
    ///
    /// # Panics
    /// When the slices do not hold as many sequences.
    pub fn validation_batch(
        &self,
        sequence_length: usize,
        sequences: &[u64],
        inputs: &mut [u32],
        targets: &mut [u32],
    ) -> Result<()> {
        let sequences: Vec<_> = sequences.iter().map(|&sequence| (&self.validation, sequence)).collect();
        fill(&sequences, sequence_length, inputs, targets)
    }
}

#[cfg(test)]
impl Dataset {
    pub(super) fn read_train(&self, source: usize, out: &mut [u32]) -> Result<()> {
        self.train[source].read(0, out)
    }

    pub(super) fn read_validation(&self, out: &mut [u32]) -> Result<()> {
        self.validation.read(0, out)
    }
}

/// Sequences in a stream of tokens: each needs one more token, the target of its last input.
pub(super) fn sequences(tokens: u64, sequence_length: usize) -> u64 {
    tokens.saturating_sub(1) / sequence_length as u64
}

fn fill(
    sequences: &[(&TokenStream, u64)],
    sequence_length: usize,
    inputs: &mut [u32],
    targets: &mut [u32],
) -> Result<()> {
    assert_eq!(inputs.len(), sequences.len() * sequence_length, "inputs are whole sequences");
    assert_eq!(inputs.len(), targets.len(), "inputs and targets are of one length");
    let rows = inputs.chunks_mut(sequence_length).zip(targets.chunks_mut(sequence_length));
    let mut work: Vec<Row> = sequences
        .iter()
        .zip(rows)
        .map(|(&(stream, sequence), (inputs, targets))| Row { stream, sequence, inputs, targets })
        .collect();
    // A local read takes microseconds, less than a thread; a remote one takes as long as many go at once.
    if !sequences.iter().any(|(stream, _)| stream.is_remote()) {
        return work.iter_mut().try_for_each(Row::fill);
    }
    let share = work.len().div_ceil(FETCHES).max(1);
    thread::scope(|scope| {
        let threads: Vec<_> = work
            .chunks_mut(share)
            .map(|rows| scope.spawn(move || rows.iter_mut().try_for_each(Row::fill)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// One sequence to read, and where it goes.
struct Row<'a> {
    stream: &'a TokenStream,
    sequence: u64,
    inputs: &'a mut [u32],
    targets: &'a mut [u32],
}

impl Row<'_> {
    fn fill(&mut self) -> Result<()> {
        let sequence_length = self.inputs.len();
        let mut tokens = vec![0; sequence_length + 1];
        self.stream.read(self.sequence * sequence_length as u64, &mut tokens)?;
        self.inputs.copy_from_slice(&tokens[..sequence_length]);
        self.targets.copy_from_slice(&tokens[1..]);
        Ok(())
    }
}

fn damaged(folder: &Storage, name: &str, reason: impl Into<String>) -> DataError {
    DataError::Damaged { uri: folder.uri_of(name), reason: reason.into(), folder: folder.uri().to_owned() }
}

fn read_index(folder: &Storage, digest: &str) -> Result<Index> {
    let bytes = match folder.get(INDEX) {
        Err(StorageError::NotFound { uri }) => {
            let reason = "there is no prepared dataset here; prepare the data first".to_owned();
            return Err(DataError::File { file: uri, reason });
        }
        bytes => bytes?,
    };
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|error| damaged(folder, INDEX, error.to_string()))?;
    if index.version != FORMAT_VERSION {
        let reason = format!("its format is {}, this program reads {FORMAT_VERSION}", index.version);
        return Err(damaged(folder, INDEX, reason));
    }
    if index.digest != digest || ![2, 4].contains(&index.token_bytes) {
        return Err(damaged(folder, INDEX, "it describes another dataset"));
    }
    Ok(index)
}

fn read_tokenizer(folder: &Storage, index: &Index) -> Result<Tokenizer> {
    let json = folder.get(TOKENIZER)?;
    match std::str::from_utf8(&json) {
        Ok(text) if blake3::hash(&json).to_hex().as_str() == index.tokenizer => {
            Ok(Tokenizer::from_json(text, Some(&index.separator_token))?)
        }
        _ => Err(damaged(folder, TOKENIZER, "its content is not what index.json says")),
    }
}

fn all_shards(index: &Index) -> impl Iterator<Item = &Shard> {
    index.train.iter().chain([&index.validation]).flat_map(|part| &part.shards)
}

fn verify_sizes(folder: &Storage, index: &Index) -> Result<()> {
    let entries = folder.list()?;
    for shard in all_shards(index) {
        let expected = shard.tokens * index.token_bytes as u64;
        let found = entries.binary_search_by(|entry| entry.name.as_str().cmp(&shard.name));
        match found.map(|place| entries[place].bytes) {
            Ok(bytes) if bytes == expected => {}
            Ok(bytes) => {
                let reason = format!("it has {bytes} bytes, index.json says {expected}");
                return Err(damaged(folder, &shard.name, reason));
            }
            Err(_) => return Err(damaged(folder, &shard.name, "it is missing")),
        }
    }
    Ok(())
}

fn verify_content(folder: &Storage, index: &Index) -> Result<()> {
    let shards: Vec<&Shard> = all_shards(index).collect();
    shards.into_par_iter().try_for_each(|shard| {
        let digest = digest(folder, &shard.name)?;
        if digest == shard.blake3 {
            return Ok(());
        }
        let reason = format!("its digest is {digest}, index.json says {}", shard.blake3);
        Err(damaged(folder, &shard.name, reason))
    })
}

fn digest(folder: &Storage, name: &str) -> Result<String> {
    let mut reader = folder.reader(name)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
            Ok(count) => drop(hasher.update(&buffer[..count])),
            Err(error) => return Err(damaged(folder, name, format!("it cannot be read: {error}"))),
        }
    }
}

/// The tokens of some shards as one sequence.
#[derive(Debug)]
struct TokenStream {
    storage: Storage,
    token_bytes: usize,
    shards: Vec<OpenShard>,
}

#[derive(Debug)]
struct OpenShard {
    name: String,
    tokens: Range<u64>,
    /// On a local disk: reading it takes no detour.
    file: Option<File>,
}

impl TokenStream {
    fn open(folder: &Storage, part: &Part, token_bytes: usize) -> Result<Self> {
        let mut start = 0;
        let open = |shard: &Shard| {
            let tokens = start..start + shard.tokens;
            start = tokens.end;
            Ok(OpenShard { name: shard.name.clone(), tokens, file: open_local(folder, &shard.name)? })
        };
        let shards = part.shards.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { storage: folder.clone(), token_bytes, shards })
    }

    fn is_remote(&self) -> bool {
        self.shards.iter().any(|shard| shard.file.is_none())
    }

    /// Fills `out` with the tokens from `start` on.
    fn read(&self, mut start: u64, mut out: &mut [u32]) -> Result<()> {
        while !out.is_empty() {
            let shard = self.shards.partition_point(|shard| shard.tokens.end <= start);
            let shard = &self.shards[shard];
            let count = out.len().min((shard.tokens.end - start) as usize);
            let (now, later) = out.split_at_mut(count);
            self.read_shard(shard, start - shard.tokens.start, now)?;
            start += count as u64;
            out = later;
        }
        Ok(())
    }

    fn read_shard(&self, shard: &OpenShard, start: u64, out: &mut [u32]) -> Result<()> {
        let width = self.token_bytes as u64;
        let range = start * width..(start + out.len() as u64) * width;
        match &shard.file {
            Some(file) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                let read = file.read_exact_at(&mut bytes, range.start);
                read.map_err(|error| {
                    damaged(&self.storage, &shard.name, format!("it cannot be read: {error}"))
                })?;
                shards::from_bytes(&bytes, out);
            }
            None => shards::from_bytes(&self.storage.get_range(&shard.name, range)?, out),
        }
        Ok(())
    }
}

fn open_local(folder: &Storage, name: &str) -> Result<Option<File>> {
    if !folder.uri().starts_with("file://") {
        return Ok(None);
    }
    let path = local_path(&folder.uri_of(name))?;
    File::open(path).map(Some).map_err(|error| damaged(folder, name, format!("it cannot be opened: {error}")))
}

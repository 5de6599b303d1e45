//! Turns the sources of a job into token shards, once.

use super::bpe::{self, WordCounts};
use super::documents::{Document, Item, SourceFile, Stop};
use super::files::{self, SourceFiles, SourceIdentity, random_key};
use super::pieces::PieceLimits;
use super::shards::{self, FORMAT_VERSION, INDEX, Index, Part, SHARD_TOKENS, ShardWriter, TOKENIZER};
use super::{DataError, Dataset, Result, Verification, field_error};
use crate::storage::{Entry, Storage, StorageError, StorageOptions};
use crate::tokenizer::{Tokenizer, TokenizerError};
use bytes::Bytes;
use growth_crds::spec::data::{DataSource, DataSpec, TrainTokenizerSpec};
use rayon::prelude::*;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

/// Changes when the same text would give another tokenizer.
const TOKENIZER_TRAINER_VERSION: u32 = 1;

/// Bytes of text that one thread encodes of a batch.
const BATCH_BYTES_PER_THREAD: usize = 1 << 20;

/// Memory of a piece beside its text, so that a batch of very short documents is not many times its text.
const PIECE_BYTES: usize = 64;

/// Batches between the reader and the encoder.
const BATCHES_AHEAD: usize = 2;

/// Files up to this size are fetched ahead, several at a time.
const SMALL_FILE: u64 = 1 << 20;

/// Files that are fetched ahead together.
const FILES_AHEAD: usize = 16;

/// Bytes that a file gives at least to a sample, so that a sample of many files does not read all of them.
const SAMPLE_OF_A_FILE: u64 = 1 << 20;

/// The order of files in a tokenizer's sample does not follow the job's seed: jobs share the dataset.
const SAMPLE_SEED: u64 = 0;

/// What the preparation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Finds the files.
    Listing,
    /// Trains the tokenizer on a sample.
    TrainingTokenizer,
    /// Writes the shards.
    Tokenizing,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Listing => "listing files",
            Self::TrainingTokenizer => "training the tokenizer",
            Self::Tokenizing => "tokenizing",
        })
    }
}

/// How far the preparation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes read, as they are stored.
    pub bytes_done: u64,
    /// Bytes to read in this phase.
    pub bytes_total: u64,
}

/// Sizes that tests make small.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub shard_tokens: u64,
    pub batch_bytes: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        let batch_bytes = BATCH_BYTES_PER_THREAD * rayon::current_num_threads().max(2);
        Self { shard_tokens: SHARD_TOKENS, batch_bytes }
    }
}

/// Prepares the data of a job below `storage`, or opens what was prepared from the same sources before. Killed at
/// any time, it leaves nothing that a later preparation would take for whole.
///
/// # Errors
/// When a source cannot be read or is empty; the message names the field or the file.
pub fn prepare(
    spec: &DataSpec,
    storage: &Storage,
    source_options: &StorageOptions,
    seed: u64,
    progress: &dyn Fn(Progress),
) -> Result<Dataset> {
    prepare_sized(spec, storage, source_options, seed, progress, Sizes::default())
}

pub(super) fn prepare_sized(
    spec: &DataSpec,
    storage: &Storage,
    source_options: &StorageOptions,
    seed: u64,
    progress: &dyn Fn(Progress),
    sizes: Sizes,
) -> Result<Dataset> {
    progress(Progress { phase: Phase::Listing, bytes_done: 0, bytes_total: 0 });
    let sources = Sources::list(spec, source_options, seed)?;
    let digest = sources.digest()?;
    let folder = Dataset::folder(storage, &digest);
    if folder.head(INDEX)?.is_some() {
        return Dataset::open(storage, &digest, Verification::Content);
    }
    let tokenizer = sources.tokenizer(progress, sizes)?;
    folder.put(TOKENIZER, tokenizer.to_json())?;
    let index = sources.write_shards(&folder, &digest, &tokenizer, progress, sizes)?;
    folder.create(INDEX, index_bytes(&index)?)?;
    Dataset::open(storage, &digest, Verification::Sizes)
}

fn index_bytes(index: &Index) -> Result<Vec<u8>> {
    let mut bytes =
        serde_json::to_vec_pretty(index).map_err(|error| field_error(INDEX, error.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Everything that the shards depend on.
struct Sources<'a> {
    spec: &'a DataSpec,
    train: Vec<SourceFiles>,
    validation: Vec<SourceFiles>,
    /// The tokenizer.json that the job names.
    tokenizer_json: Option<String>,
}

/// What the digest of a dataset is made of.
#[derive(Serialize)]
struct Identity<'a> {
    version: u32,
    train: Vec<SourceIdentity<'a>>,
    validation: Vec<SourceIdentity<'a>>,
    hold_out_percent: Option<f64>,
    tokenizer: Option<&'a str>,
    train_tokenizer: Option<(u32, u32, u64)>,
    separator: Option<&'a str>,
}

impl<'a> Sources<'a> {
    fn list(spec: &'a DataSpec, options: &StorageOptions, seed: u64) -> Result<Self> {
        if spec.validation.is_empty() == spec.hold_out_percent.is_none() {
            return Err(field_error("spec.data", "set exactly one of validation and holdOutPercent"));
        }
        let list = |name: &str, sources: &[DataSource]| {
            let sources = sources.iter().enumerate();
            let listed = sources.map(|(i, source)| {
                SourceFiles::list(format!("spec.data.{name}[{i}]"), source, options, seed)
            });
            listed.collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            spec,
            train: list("train", &spec.train)?,
            validation: list("validation", &spec.validation)?,
            tokenizer_json: spec
                .tokenizer
                .uri
                .as_ref()
                .map(|uri| fetch_tokenizer(uri, options))
                .transpose()?,
        })
    }

    fn digest(&self) -> Result<String> {
        let train_tokenizer = self.spec.tokenizer.train.as_ref();
        let identity = Identity {
            version: FORMAT_VERSION,
            train: self.train.iter().map(SourceFiles::identity).collect(),
            validation: self.validation.iter().map(SourceFiles::identity).collect(),
            hold_out_percent: self.spec.hold_out_percent,
            tokenizer: self.tokenizer_json.as_deref(),
            train_tokenizer: train_tokenizer
                .map(|train| (TOKENIZER_TRAINER_VERSION, train.vocab_size, train.sample_bytes.0)),
            separator: self.spec.document_separator.as_deref(),
        };
        let mut hasher = blake3::Hasher::new();
        serde_json::to_writer(&mut hasher, &identity)
            .map_err(|error| field_error("spec.data", error.to_string()))?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn tokenizer(&self, progress: &dyn Fn(Progress), sizes: Sizes) -> Result<Tokenizer> {
        let separator = self.spec.document_separator.as_deref();
        match (&self.tokenizer_json, &self.spec.tokenizer.train) {
            (Some(json), None) => Tokenizer::from_json(json, separator).map_err(|error| match error {
                error @ TokenizerError::Unreadable { .. } => {
                    field_error("spec.data.tokenizer.uri", error.to_string())
                }
                error => error.into(),
            }),
            (None, Some(train)) => {
                let counts = self.count_sample(train, progress, sizes)?;
                Ok(Tokenizer::from_json(&bpe::train(counts, train.vocab_size)?, separator)?)
            }
            _ => Err(field_error("spec.data.tokenizer", "set exactly one of uri and train")),
        }
    }

    /// Counts the words of a sample of the training documents, spread over the sources and their files.
    fn count_sample(
        &self,
        train: &TrainTokenizerSpec,
        progress: &dyn Fn(Progress),
        sizes: Sizes,
    ) -> Result<WordCounts> {
        let wanted = train.sample_bytes.0;
        let total = wanted.min(self.train.iter().map(SourceFiles::bytes).sum());
        let report = |done: u64| {
            progress(Progress {
                phase: Phase::TrainingTokenizer,
                bytes_done: done.min(total),
                bytes_total: total,
            });
        };
        report(0);
        let (mut counts, mut done) = (WordCounts::new(), 0);
        pipeline(
            sizes.batch_bytes,
            |batcher| self.sample(wanted, batcher),
            |batch| {
                done += batch.text_bytes as u64;
                let parts: Vec<WordCounts> = batch
                    .pieces
                    .par_iter()
                    .map(|piece| bpe::count_words(&piece.text))
                    .collect::<std::result::Result<_, _>>()?;
                for (word, count) in parts.into_iter().flatten() {
                    *counts.entry(word).or_default() += count;
                }
                report(done);
                Ok(())
            },
        )?;
        match done {
            0 => Err(field_error(
                "spec.data.train",
                "no text to train the tokenizer on: every document is empty, not UTF-8 or held out; check uri, format and field",
            )),
            _ => Ok(counts),
        }
    }

    /// Equal shares of the sources, whatever their weight, so that a change of weights keeps the tokenizer.
    fn sample(&self, wanted: u64, batcher: &mut Batcher) -> std::result::Result<(), Stop> {
        let mut left = wanted;
        for (index, source) in self.train.iter().enumerate() {
            let share = left / (self.train.len() - index) as u64;
            left -= self.sample_source(source, share, batcher)?.min(left);
        }
        Ok(())
    }

    /// Equal shares of the chosen files, where small ones leave theirs to larger ones. Returns the bytes taken.
    fn sample_source(
        &self,
        source: &SourceFiles,
        wanted: u64,
        batcher: &mut Batcher,
    ) -> std::result::Result<u64, Stop> {
        let files = files_of_sample(&source.files, wanted);
        let mut taken = 0;
        let unread = AtomicU64::new(0);
        for (index, file) in files.iter().enumerate() {
            let share = wanted.saturating_sub(taken) / (files.len() - index) as u64;
            let mut from_file = 0;
            let read = source.file(file, None, &unread).read(&mut |item| {
                let Item::Document(document) = item else { return Ok(()) };
                if document.is_held_out(self.spec.hold_out_percent) {
                    return Ok(());
                }
                for piece in document.pieces(PieceLimits::for_splitting(true)) {
                    if from_file >= share {
                        return Err(Stop::Enough);
                    }
                    let mut text = piece?;
                    let length = text.len() as u64;
                    // A piece may be 1 MiB: whole, it would leave nothing to the sources after this one.
                    text.truncate(text.floor_char_boundary((share - from_file) as usize));
                    from_file += length;
                    batcher.push(Piece { text, ends_document: false, held_out: false })?;
                }
                Ok(())
            });
            match read {
                Err(Stop::Enough) if batcher.is_open => {}
                read => read?,
            }
            taken += from_file.min(share);
        }
        Ok(taken)
    }

    fn write_shards(
        &self,
        folder: &Storage,
        digest: &str,
        tokenizer: &Tokenizer,
        progress: &dyn Fn(Progress),
        sizes: Sizes,
    ) -> Result<Index> {
        let vocab_size = tokenizer.vocab_size();
        let token_bytes = shards::token_bytes(vocab_size);
        let all = || self.train.iter().chain(&self.validation);
        let total = all().map(SourceFiles::bytes).sum();
        let consumed = AtomicU64::new(0);
        let mut output = Output::new(self, folder, token_bytes, sizes.shard_tokens);
        let limits = PieceLimits::for_splitting(tokenizer.splits_at_newlines());
        let separator = shards::to_bytes(&[tokenizer.separator()], token_bytes);
        pipeline(
            sizes.batch_bytes,
            |batcher| {
                all()
                    .enumerate()
                    .try_for_each(|(i, source)| self.read_source(i, source, limits, &consumed, batcher))
            },
            |batch| {
                let encode =
                    |piece: &Piece| Ok(shards::to_bytes(&tokenizer.encode(&piece.text)?, token_bytes));
                let encoded: Vec<Vec<u8>> = batch.pieces.par_iter().map(encode).collect::<Result<_>>()?;
                output.append(&batch, &encoded, &separator)?;
                let bytes_done = consumed.load(Ordering::Relaxed).min(total);
                progress(Progress { phase: Phase::Tokenizing, bytes_done, bytes_total: total });
                Ok(())
            },
        )?;
        let (train, validation) = output.finish(self)?;
        Ok(Index {
            version: FORMAT_VERSION,
            digest: digest.to_owned(),
            token_bytes,
            vocab_size,
            separator: tokenizer.separator(),
            separator_token: tokenizer.separator_token().to_owned(),
            tokenizer: blake3::hash(tokenizer.to_json().as_bytes()).to_hex().to_string(),
            train,
            validation,
        })
    }

    fn read_source(
        &self,
        index: usize,
        source: &SourceFiles,
        limits: PieceLimits,
        consumed: &AtomicU64,
        batcher: &mut Batcher,
    ) -> std::result::Result<(), Stop> {
        batcher.begin_source(index)?;
        let percent = if index < self.train.len() { self.spec.hold_out_percent } else { None };
        let mut done = consumed.load(Ordering::Relaxed);
        for group in groups(&source.files) {
            for (file, content) in group.iter().zip(fetch_ahead(&source.storage, group)?) {
                source.file(file, content, consumed).read(&mut |item| match item {
                    Item::Document(document) => push_document(document, percent, limits, batcher),
                    Item::Skipped => {
                        batcher.batch.skipped += 1;
                        Ok(())
                    }
                })?;
                done += file.bytes;
                consumed.store(done, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

impl SourceFiles {
    pub(super) fn file<'a>(
        &'a self,
        entry: &'a Entry,
        content: Option<Bytes>,
        consumed: &'a AtomicU64,
    ) -> SourceFile<'a> {
        SourceFile {
            storage: &self.storage,
            name: &entry.name,
            bytes: entry.bytes,
            format: self.source.format,
            column: &self.source.field,
            source_field: &self.field,
            content,
            consumed,
        }
    }
}

fn fetch_tokenizer(uri: &str, options: &StorageOptions) -> Result<String> {
    let field = "spec.data.tokenizer.uri";
    let bytes = files::get(uri, options).map_err(|reason| field_error(field, reason))?;
    String::from_utf8(bytes.into()).map_err(|_| field_error(field, format!("{uri} is not UTF-8")))
}

fn push_document(
    document: Document,
    percent: Option<f64>,
    limits: PieceLimits,
    batcher: &mut Batcher,
) -> std::result::Result<(), Stop> {
    let held_out = document.is_held_out(percent);
    let mut pieces = document.pieces(limits).peekable();
    while let Some(text) = pieces.next() {
        batcher.push(Piece { text: text?, ends_document: pieces.peek().is_none(), held_out })?;
    }
    Ok(())
}

/// Files in seeded order until their starts hold the wanted bytes; the smallest first.
fn files_of_sample(files: &[Entry], wanted: u64) -> Vec<&Entry> {
    let mut shuffled: Vec<&Entry> = files.iter().collect();
    shuffled.sort_by_cached_key(|file| random_key(&file.name, SAMPLE_SEED));
    let mut bytes = 0;
    shuffled.retain(|file| {
        let chosen = bytes < wanted;
        bytes += file.bytes.min(SAMPLE_OF_A_FILE);
        chosen
    });
    shuffled.sort_by(|a, b| (a.bytes, &a.name).cmp(&(b.bytes, &b.name)));
    shuffled
}

/// Runs of small files to fetch together; a large file is alone.
fn groups(files: &[Entry]) -> impl Iterator<Item = &[Entry]> {
    files
        .chunk_by(|a, b| a.bytes <= SMALL_FILE && b.bytes <= SMALL_FILE)
        .flat_map(|run| run.chunks(FILES_AHEAD))
}

/// The contents of small files, fetched at the same time; a large file is read as a stream instead.
fn fetch_ahead(storage: &Storage, files: &[Entry]) -> Result<Vec<Option<Bytes>>> {
    let fetch = |file: &Entry| match storage.get(&file.name) {
        Ok(content) if content.len() as u64 == file.bytes => Ok(Some(content)),
        Ok(_) | Err(StorageError::NotFound { .. }) => {
            Err(super::documents::changed(&storage.uri_of(&file.name)))
        }
        Err(error) => Err(error.into()),
    };
    if files.iter().any(|file| file.bytes > SMALL_FILE) {
        return Ok(vec![None; files.len()]);
    }
    thread::scope(|scope| {
        let fetches: Vec<_> = files.iter().map(|file| scope.spawn(move || fetch(file))).collect();
        fetches.into_iter().map(joined).collect()
    })
}

fn joined<T>(handle: thread::ScopedJoinHandle<T>) -> T {
    handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A part of a document.
struct Piece {
    text: String,
    ends_document: bool,
    held_out: bool,
}

/// Pieces of one source that are encoded together.
#[derive(Default)]
struct Batch {
    /// Place of the source among the training sources, then the validation sources.
    source: usize,
    pieces: Vec<Piece>,
    text_bytes: usize,
    skipped: u64,
}

/// Gathers pieces to batches and sends them.
struct Batcher {
    sender: SyncSender<Batch>,
    batch_bytes: usize,
    batch: Batch,
    is_open: bool,
}

impl Batcher {
    fn push(&mut self, piece: Piece) -> std::result::Result<(), Stop> {
        self.batch.text_bytes += piece.text.len();
        self.batch.pieces.push(piece);
        let held = self.batch.text_bytes + self.batch.pieces.len() * PIECE_BYTES;
        if held >= self.batch_bytes { self.send() } else { Ok(()) }
    }

    fn begin_source(&mut self, source: usize) -> std::result::Result<(), Stop> {
        self.send()?;
        self.batch.source = source;
        Ok(())
    }

    fn send(&mut self) -> std::result::Result<(), Stop> {
        let next = Batch { source: self.batch.source, ..Batch::default() };
        // The other side has gone when it failed; its error counts.
        self.sender.send(std::mem::replace(&mut self.batch, next)).map_err(|_| {
            self.is_open = false;
            Stop::Enough
        })
    }
}

/// Reads on a thread of its own while batches are consumed here, in order, a bounded number of them in memory.
fn pipeline(
    batch_bytes: usize,
    produce: impl FnOnce(&mut Batcher) -> std::result::Result<(), Stop> + Send,
    consume: impl FnMut(Batch) -> Result<()>,
) -> Result<()> {
    let (sender, receiver) = sync_channel(BATCHES_AHEAD);
    thread::scope(|scope| {
        let producer = scope.spawn(move || {
            let mut batcher = Batcher { sender, batch_bytes, batch: Batch::default(), is_open: true };
            produce(&mut batcher)?;
            batcher.send()
        });
        receiver.into_iter().try_for_each(consume)?;
        match joined(producer) {
            Err(Stop::Failed(error)) => Err(error),
            Ok(()) | Err(Stop::Enough) => Ok(()),
        }
    })
}

/// The shards being written.
struct Output {
    train: Vec<ShardWriter>,
    /// Documents of each training source that are held out.
    held_out: Vec<u64>,
    validation: ShardWriter,
}

impl Output {
    fn new(sources: &Sources, folder: &Storage, token_bytes: usize, shard_tokens: u64) -> Self {
        let writer = |stem, uri| ShardWriter::new(folder, stem, uri, token_bytes, shard_tokens);
        let train = sources.train.iter().enumerate();
        let validation = match sources.spec.hold_out_percent {
            Some(percent) => format!("{percent}% of the training documents"),
            None => sources.validation.iter().map(|files| &*files.source.uri).collect::<Vec<_>>().join(", "),
        };
        Self {
            train: train.map(|(i, files)| writer(format!("train-{i}"), files.source.uri.clone())).collect(),
            held_out: vec![0; sources.train.len()],
            validation: writer("validation".to_owned(), validation),
        }
    }

    fn append(&mut self, batch: &Batch, encoded: &[Vec<u8>], separator: &[u8]) -> Result<()> {
        self.writer(batch.source, false).part().skipped += batch.skipped;
        for (piece, tokens) in batch.pieces.iter().zip(encoded) {
            let writer = self.writer(batch.source, piece.held_out);
            writer.append(tokens)?;
            writer.part().bytes += piece.text.len() as u64;
            if piece.ends_document {
                writer.append(separator)?;
                writer.part().documents += 1;
                if piece.held_out {
                    self.held_out[batch.source] += 1;
                }
            }
        }
        Ok(())
    }

    fn writer(&mut self, source: usize, held_out: bool) -> &mut ShardWriter {
        match self.train.get_mut(source) {
            Some(writer) if !held_out => writer,
            _ => &mut self.validation,
        }
    }

    fn finish(self, sources: &Sources) -> Result<(Vec<Part>, Part)> {
        let train: Vec<Part> = self.train.into_iter().map(ShardWriter::finish).collect::<Result<_>>()?;
        let validation = self.validation.finish()?;
        for ((part, files), held_out) in train.iter().zip(&sources.train).zip(self.held_out) {
            match held_out {
                _ if part.tokens > 0 => {}
                0 => return Err(no_text(&files.field, part, files.files.len())),
                _ => return Err(all_held_out(&part.uri, held_out)),
            }
        }
        match sources.spec.hold_out_percent {
            Some(percent) if validation.tokens == 0 => Err(field_error(
                "spec.data.holdOutPercent",
                format!(
                    "none of the {} training documents falls into the {percent}%; raise it, or name files in validation",
                    train.iter().map(|part| part.documents).sum::<u64>()
                ),
            )),
            None if validation.tokens == 0 => {
                let files = sources.validation.iter().map(|source| source.files.len()).sum();
                Err(no_text("spec.data.validation", &validation, files))
            }
            _ => Ok((train, validation)),
        }
    }
}

fn all_held_out(uri: &str, documents: u64) -> DataError {
    let reason = format!(
        "it holds out every document of {uri} ({documents}); lower it, add documents, or name files in validation"
    );
    field_error("spec.data.holdOutPercent", reason)
}

fn no_text(field: &str, part: &Part, files: usize) -> DataError {
    let reason = format!(
        "no text in the {files} files of {} ({} empty or not UTF-8 documents skipped); check uri, format and field",
        part.uri, part.skipped
    );
    field_error(field, reason)
}

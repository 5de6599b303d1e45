//! Reads the documents of a file: text, JSON lines or Parquet, plain or compressed, in bounded memory.

use super::pieces::{PieceLimits, Pieces};
use super::{DataError, parquet};
use crate::storage::Storage;
use bytes::{Buf, Bytes};
use growth_crds::spec::data::DataFormat;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};

/// A text up to this length is held in memory; a longer one is read twice: to check it, then to encode it.
const TEXT_IN_MEMORY: usize = 8 << 20;

/// Longest line of JSON: it is held in memory.
const LONGEST_LINE: u64 = 1 << 30;

/// Bytes decompressed at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// Why reading ends before the last document.
#[derive(Debug)]
pub(super) enum Stop {
    /// The reader has what it wants.
    Enough,
    /// Something is wrong.
    Failed(DataError),
}

impl<E: Into<DataError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// What a file holds.
pub(super) enum Item<'a> {
    Document(Document<'a>),
    /// A row without a text, or a file that is not UTF-8.
    Skipped,
}

/// Where the documents go.
pub(super) type Sink<'a> = dyn FnMut(Item<'_>) -> Result<(), Stop> + 'a;

/// One document, not yet cut.
pub(super) struct Document<'a> {
    /// First 8 bytes of the blake3 hash of the text.
    pub hash: u64,
    text: Box<dyn Read + 'a>,
    file: &'a str,
}

impl<'a> Document<'a> {
    fn whole(text: &'a str, file: &'a str) -> Self {
        Self { hash: short_hash(&blake3::hash(text.as_bytes())), text: Box::new(text.as_bytes()), file }
    }

    /// The pieces of the text, in order.
    pub fn pieces(self, limits: PieceLimits) -> impl Iterator<Item = Result<String, DataError>> {
        let file = self.file;
        Pieces::new(self.text, limits).map(move |piece| piece.map_err(|error| unreadable(file, &error)))
    }

    /// Whether the document is one of the `percent` that are held out. Equal texts are on the same side.
    pub fn is_held_out(&self, percent: Option<f64>) -> bool {
        percent.is_some_and(|percent| self.hash as f64 / 2f64.powi(64) < percent / 100.0)
    }
}

fn short_hash(hash: &blake3::Hash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// How the content of a file is packed.
#[derive(Clone, Copy, PartialEq)]
enum Packing {
    Plain,
    Gzip,
    Zstandard,
}

/// One file of a source.
pub(super) struct SourceFile<'a> {
    pub storage: &'a Storage,
    pub name: &'a str,
    /// Size in the listing.
    pub bytes: u64,
    pub format: Option<DataFormat>,
    /// Field or column of the text.
    pub column: &'a str,
    /// Path of the source in the job.
    pub source_field: &'a str,
    /// The content, where it was fetched ahead.
    pub content: Option<Bytes>,
    /// Counts the bytes of the file that were read.
    pub consumed: &'a AtomicU64,
}

impl SourceFile<'_> {
    /// Hands every document over.
    pub fn read(&self, sink: &mut Sink) -> Result<(), Stop> {
        let uri = self.storage.uri_of(self.name);
        match self.format() {
            DataFormat::Text => self.read_text(&uri, sink),
            DataFormat::Jsonl => self.read_lines(&uri, sink),
            DataFormat::Parquet if self.unpacked_name().1 != Packing::Plain => Err(file_error(
                &uri,
                "a compressed Parquet file cannot be read in parts; unpack it, Parquet compresses inside",
            )
            .into()),
            DataFormat::Parquet => parquet::read(self, &uri, sink),
        }
    }

    fn format(&self) -> DataFormat {
        let (name, _) = self.unpacked_name();
        self.format.unwrap_or(match name.rsplit('.').next() {
            Some("jsonl") => DataFormat::Jsonl,
            Some("parquet") => DataFormat::Parquet,
            _ => DataFormat::Text,
        })
    }

    fn unpacked_name(&self) -> (&str, Packing) {
        if let Some(name) = self.name.strip_suffix(".gz") {
            (name, Packing::Gzip)
        } else if let Some(name) = self.name.strip_suffix(".zst") {
            (name, Packing::Zstandard)
        } else {
            (self.name, Packing::Plain)
        }
    }

    /// The unpacked content from its start, counted as consumed.
    fn open(&self, uri: &str) -> Result<Box<dyn Read + '_>, DataError> {
        let inner = self.open_raw(uri)?;
        self.unpack(uri, Counting { inner, consumed: self.consumed })
    }

    fn open_raw(&self, uri: &str) -> Result<Box<dyn Read>, DataError> {
        Ok(match &self.content {
            Some(content) => Box::new(content.clone().reader()),
            None => {
                let reader = self.storage.reader(self.name)?;
                if reader.size_bytes() != self.bytes {
                    return Err(changed(uri));
                }
                Box::new(reader)
            }
        })
    }

    fn unpack<'r>(&self, uri: &str, raw: impl Read + 'r) -> Result<Box<dyn Read + 'r>, DataError> {
        Ok(match self.unpacked_name().1 {
            Packing::Plain => Box::new(raw),
            Packing::Gzip => Box::new(flate2::read::MultiGzDecoder::new(raw)),
            Packing::Zstandard => {
                Box::new(zstd::stream::read::Decoder::new(raw).map_err(|error| unreadable(uri, &error))?)
            }
        })
    }

    fn read_text(&self, uri: &str, sink: &mut Sink) -> Result<(), Stop> {
        // Not counted: a long text is read again.
        let mut reader = self.unpack(uri, self.open_raw(uri)?)?;
        let mut head = Vec::new();
        let limit = TEXT_IN_MEMORY as u64 + 1;
        reader.by_ref().take(limit).read_to_end(&mut head).map_err(|error| unreadable(uri, &error))?;
        if head.len() <= TEXT_IN_MEMORY {
            return match std::str::from_utf8(&head) {
                Ok(text) => hand_over(text, uri, sink),
                Err(_) => sink(Item::Skipped),
            };
        }
        match check_text(head, reader).map_err(|error| unreadable(uri, &error))? {
            Some(hash) => sink(Item::Document(Document { hash, text: self.open(uri)?, file: uri })),
            None => sink(Item::Skipped),
        }
    }

    fn read_lines(&self, uri: &str, sink: &mut Sink) -> Result<(), Stop> {
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, self.open(uri)?);
        let mut line = Vec::new();
        for number in 1u64.. {
            line.clear();
            let at = |reason: String| file_error(&format!("{uri} line {number}"), reason);
            let read = reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line);
            let read = read.map_err(|error| unreadable(uri, &error))?;
            if read == 0 {
                break;
            }
            if read as u64 == LONGEST_LINE && line.last() != Some(&b'\n') {
                return Err(at("longer than 1 GiB; one document is one line".to_owned()).into());
            }
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            match self.text_of_line(line).map_err(at)? {
                Some(text) => hand_over(&text, uri, sink)?,
                None => sink(Item::Skipped)?,
            }
        }
        Ok(())
    }

    fn text_of_line(&self, line: &[u8]) -> Result<Option<String>, String> {
        let line = std::str::from_utf8(line).map_err(|error| {
            format!("not UTF-8 from byte {} on; convert the file", error.valid_up_to() + 1)
        })?;
        let mut names = Vec::new();
        let mut deserializer = serde_json::Deserializer::from_str(line);
        let found = FieldOf { field: self.column, names: &mut names }.deserialize(&mut deserializer);
        match found.and_then(|found| deserializer.end().map(|()| found)) {
            Ok(Some(text)) => Ok(text),
            Ok(None) => Err(missing(self.source_field, "field", self.column, &names)),
            Err(error) => {
                // The parser's own line is always 1; ours is named in front.
                let error = error.to_string().replace(" at line 1 column ", " at column ");
                Err(format!("{error}; every line has to be a JSON object with a text in {:?}", self.column))
            }
        }
    }
}

/// The message for a text that is not where the job says.
pub(super) fn missing(source: &str, kind: &str, name: &str, names: &[String]) -> String {
    format!("no {kind} {name:?}; set {source}.field to one of {}", names.join(", "))
}

/// Hands a document over, unless it is empty.
pub(super) fn hand_over(text: &str, file: &str, sink: &mut Sink) -> Result<(), Stop> {
    if text.is_empty() {
        return sink(Item::Skipped);
    }
    sink(Item::Document(Document::whole(text, file)))
}

pub(super) fn file_error(file: &str, reason: impl Into<String>) -> DataError {
    DataError::File { file: file.to_owned(), reason: reason.into() }
}

/// A file that is not the one that was listed.
pub(super) fn changed(uri: &str) -> DataError {
    file_error(uri, "the file changed while it was read; start again")
}

fn unreadable(uri: &str, error: &io::Error) -> DataError {
    file_error(
        uri,
        format!("cannot be read: {error}; check that the file is whole and is what its name says"),
    )
}

/// The hash of a long text, or `None` when it is not UTF-8.
fn check_text(head: Vec<u8>, mut rest: impl Read) -> io::Result<Option<u64>> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = head;
    loop {
        let valid = match std::str::from_utf8(&buffer) {
            Ok(text) => text.len(),
            Err(error) if error.error_len().is_some() => return Ok(None),
            Err(error) => error.valid_up_to(),
        };
        hasher.update(&buffer[..valid]);
        buffer.drain(..valid);
        if rest.by_ref().take(BUFFER_BYTES as u64).read_to_end(&mut buffer)? == 0 {
            // What remains is half a character.
            return Ok(buffer.is_empty().then(|| short_hash(&hasher.finalize())));
        }
    }
}

/// Counts what is read from it.
struct Counting<'a, R> {
    inner: R,
    consumed: &'a AtomicU64,
}

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.consumed.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Picks one field of an object and skips the others: `None` when it is not there, `Some(None)` when it is null.
struct FieldOf<'a> {
    field: &'a str,
    names: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for FieldOf<'_> {
    type Value = Option<Option<String>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FieldOf<'_> {
    type Value = Option<Option<String>>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == self.field {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
                self.names.push(name);
            }
        }
        Ok(found)
    }
}

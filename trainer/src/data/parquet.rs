//! Reads one column of a Parquet file by ranges.

use super::documents::{Item, Sink, SourceFile, Stop, changed, file_error, hand_over, missing};
use crate::storage::Storage;
use ::parquet::basic::Type as PhysicalType;
use ::parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use ::parquet::data_type::{ByteArray, ByteArrayType};
use ::parquet::errors::{ParquetError, Result as ParquetResult};
use ::parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use ::parquet::schema::types::SchemaDescriptor;
use bytes::Bytes;
use std::io::{self, Read};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes fetched at a time: pages and their headers are read one by one.
const WINDOW_BYTES: u64 = 4 << 20;

/// Rows decoded at a time; small, since a row may be a book.
const ROWS: usize = 32;

/// Hands over every row's text.
pub(super) fn read(file: &SourceFile, uri: &str, sink: &mut Sink) -> Result<(), Stop> {
    let failed =
        |error: ParquetError| Stop::from(file_error(uri, format!("not a readable Parquet file: {error}")));
    let start = file.consumed.load(Ordering::Relaxed);
    let source = Ranges::new(file);
    match source.storage.head(file.name)? {
        Some(entry) if entry.bytes == file.bytes => {}
        _ => return Err(changed(uri).into()),
    }
    let reader = SerializedFileReader::new(source).map_err(failed)?;
    let column = find_column(reader.metadata().file_metadata().schema_descr(), file)
        .map_err(|reason| file_error(uri, reason))?;
    let mut row = 0;
    for index in 0..reader.num_row_groups() {
        let group = reader.get_row_group(index).map_err(failed)?;
        let ColumnReader::ByteArrayColumnReader(texts) = group.get_column_reader(column).map_err(failed)?
        else {
            return Err(file_error(uri, format!("column {:?} holds no text", file.column)).into());
        };
        let present = group.metadata().column(column).column_descr().max_def_level();
        read_texts(texts, present, failed, &mut |value| {
            row += 1;
            hand_over_row(value, row, uri, sink)
        })?;
        let done = (index as u64 + 1) * file.bytes / reader.num_row_groups() as u64;
        file.consumed.store(start + done, Ordering::Relaxed);
    }
    Ok(())
}

fn hand_over_row(value: Option<&ByteArray>, row: u64, uri: &str, sink: &mut Sink) -> Result<(), Stop> {
    let Some(value) = value else { return sink(Item::Skipped) };
    match std::str::from_utf8(value.data()) {
        Ok(text) => hand_over(text, uri, sink),
        Err(_) => {
            Err(file_error(&format!("{uri} row {row}"), "not UTF-8; write the column as strings").into())
        }
    }
}

fn find_column(schema: &SchemaDescriptor, file: &SourceFile) -> Result<usize, String> {
    let is_text = |index: &usize| {
        let column = schema.column(*index);
        column.physical_type() == PhysicalType::BYTE_ARRAY && column.max_rep_level() == 0
    };
    let name = |index: usize| schema.column(index).path().string();
    let named = (0..schema.num_columns()).find(|&index| name(index) == file.column);
    match named {
        Some(index) if is_text(&index) => Ok(index),
        Some(_) => Err(format!(
            "column {:?} holds no text; set {}.field to one that does",
            file.column, file.source_field
        )),
        None => {
            let names: Vec<String> = (0..schema.num_columns()).filter(is_text).map(name).collect();
            Err(missing(file.source_field, "column", file.column, &names))
        }
    }
}

fn read_texts(
    mut column: ColumnReaderImpl<ByteArrayType>,
    present: i16,
    failed: impl Fn(ParquetError) -> Stop,
    each: &mut dyn FnMut(Option<&ByteArray>) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let (mut levels, mut values) = (Vec::new(), Vec::new());
    loop {
        levels.clear();
        values.clear();
        let (rows, _, _) =
            column.read_records(ROWS, Some(&mut levels), None, &mut values).map_err(&failed)?;
        if rows == 0 {
            return Ok(());
        }
        let mut texts = values.iter();
        for row in 0..rows {
            // A level below the highest is a null, of the column or of a group around it.
            let is_null = present > 0 && levels.get(row).is_some_and(|&level| level < present);
            each(if is_null { None } else { texts.next() })?;
        }
    }
}

/// A file as ranges, with one window of it in memory.
struct Ranges {
    storage: Storage,
    name: String,
    bytes: u64,
    window: Arc<Mutex<(u64, Bytes)>>,
}

impl Ranges {
    fn new(file: &SourceFile) -> Self {
        let window = match &file.content {
            Some(content) => (0, content.clone()),
            None => (0, Bytes::new()),
        };
        Self {
            storage: file.storage.clone(),
            name: file.name.to_owned(),
            bytes: file.bytes,
            window: Arc::new(Mutex::new(window)),
        }
    }

    /// `length` bytes from `start`, fewer at the end of the file.
    fn range(&self, start: u64, length: u64) -> io::Result<Bytes> {
        let end = self.bytes.min(start.saturating_add(length));
        if start >= end {
            return Ok(Bytes::new());
        }
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = |window: &(u64, Bytes)| window.0 <= start && end <= window.0 + window.1.len() as u64;
        if !inside(&window) {
            let fetched = self.bytes.min(start + length.max(WINDOW_BYTES));
            *window = (start, self.storage.get_range(&self.name, start..fetched).map_err(io::Error::other)?);
        }
        let offset = (start - window.0) as usize;
        Ok(window.1.slice(offset..offset + (end - start) as usize))
    }
}

impl Length for Ranges {
    fn len(&self) -> u64 {
        self.bytes
    }
}

impl ChunkReader for Ranges {
    type T = RangeReader;

    fn get_read(&self, start: u64) -> ParquetResult<RangeReader> {
        let ranges = Ranges {
            storage: self.storage.clone(),
            name: self.name.clone(),
            bytes: self.bytes,
            window: self.window.clone(),
        };
        Ok(RangeReader { ranges, position: start })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = self.range(start, length as u64)?;
        if bytes.len() < length {
            return Err(ParquetError::EOF(format!(
                "{length} bytes expected at {start}, {} there",
                bytes.len()
            )));
        }
        Ok(bytes)
    }
}

/// Reads on from a place in the file.
struct RangeReader {
    ranges: Ranges,
    position: u64,
}

impl Read for RangeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.ranges.range(self.position, buffer.len() as u64)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.position += bytes.len() as u64;
        Ok(bytes.len())
    }
}

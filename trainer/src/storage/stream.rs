//! Objects read and written piece by piece.

use super::{PARTS_IN_FLIGHT, Result, Storage, runtime};
use bytes::Bytes;
use object_store::{ObjectStoreExt, WriteMultipart};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;
use tokio::task::JoinHandle;

/// Reads an object part by part. While the caller works on one, the next is on its way, unless the caller jumps
/// about.
#[derive(Debug)]
pub struct ObjectReader {
    storage: Storage,
    name: String,
    bytes: u64,
    position: u64,
    part: Bytes,
    ahead: Option<Ahead>,
    /// Where the part after the last one that was read begins.
    follows: u64,
}

/// A part that was asked for before it is needed.
#[derive(Debug)]
struct Ahead {
    start: u64,
    task: JoinHandle<object_store::Result<Bytes>>,
}

impl ObjectReader {
    pub(super) fn new(storage: &Storage, name: &str, bytes: u64) -> Self {
        let (storage, name) = (storage.clone(), name.to_owned());
        Self { storage, name, bytes, position: 0, part: Bytes::new(), ahead: None, follows: 0 }
    }

    /// Size of the object in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.bytes
    }

    /// The part from the position on.
    fn next_part(&mut self) -> Result<Bytes> {
        let range = self.part_from(self.position);
        let is_next = range.start == self.follows;
        let ahead = self.ahead.take().filter(|ahead| ahead.start == range.start);
        self.follows = range.end;
        if is_next && range.end < self.bytes {
            self.ahead = Some(self.ask_for(self.part_from(range.end)));
        }
        let fetched = ahead.and_then(|ahead| runtime().block_on(ahead.task).ok());
        match fetched {
            Some(part) => part.map_err(self.storage.error(&self.name)),
            // Nobody has asked for it, or whoever did was cut off.
            None => self.storage.get_range(&self.name, range),
        }
    }

    fn part_from(&self, start: u64) -> Range<u64> {
        start..self.bytes.min(start + self.storage.part_bytes() as u64)
    }

    fn ask_for(&self, range: Range<u64>) -> Ahead {
        let (store, path, start) =
            (Arc::clone(&self.storage.store), self.storage.path(&self.name), range.start);
        Ahead { start, task: runtime().spawn(async move { store.get_range(&path, range).await }) }
    }
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.part.is_empty() && self.position < self.bytes {
            self.part = self.next_part().map_err(io::Error::other)?;
        }
        let count = buffer.len().min(self.part.len());
        buffer[..count].copy_from_slice(&self.part.split_to(count));
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for ObjectReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.bytes.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.part.clear();
        Ok(self.position)
    }
}

/// Writes an object in parts; dropped before [`ObjectWriter::finish`], it leaves nothing behind.
pub struct ObjectWriter {
    storage: Storage,
    name: String,
    upload: Option<WriteMultipart>,
}

impl ObjectWriter {
    /// Bytes that are best written at a time.
    pub(crate) fn part_bytes(&self) -> usize {
        self.storage.part_bytes()
    }

    pub(super) fn new(storage: &Storage, name: &str) -> Result<Self> {
        let path = storage.path(name);
        let upload = runtime().block_on(storage.store.put_multipart(&path)).map_err(storage.error(name))?;
        let _guard = runtime().enter();
        let upload = WriteMultipart::new_with_chunk_size(upload, storage.part_bytes());
        Ok(Self { storage: storage.clone(), name: name.to_owned(), upload: Some(upload) })
    }

    /// Uploads the rest and makes the object appear.
    ///
    /// # Errors
    /// What the store says, for any of the parts.
    pub fn finish(mut self) -> Result<()> {
        let Some(upload) = self.upload.take() else { return Ok(()) };
        runtime().block_on(upload.finish()).map(drop).map_err(self.storage.error(&self.name))
    }
}

impl Write for ObjectWriter {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let Some(upload) = &mut self.upload else { return Err(io::ErrorKind::BrokenPipe.into()) };
        runtime().block_on(async {
            upload.wait_for_capacity(PARTS_IN_FLIGHT).await?;
            upload.write(buffer);
            Ok(buffer.len())
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            // The object was never finished; a failure to abort leaves parts that the bucket's lifecycle rule removes.
            let _ = runtime().block_on(upload.abort());
        }
    }
}

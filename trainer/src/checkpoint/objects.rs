//! Objects with digests: written, read and verified piece by piece.

use super::error::{CheckpointError, Result};
use crate::storage::{ObjectReader, ObjectWriter, Storage, StorageError};
use bytes::Bytes;
use growth_crds::protocol::{CheckpointManifest, CheckpointObject};
use rayon::prelude::*;
use std::io::{Read, Write};

/// What is wrong with one object of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Address of the object.
    pub uri: String,
    /// What is wrong.
    pub problem: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}: {}", self.uri, self.problem)
    }
}

/// An object beside the state of a committed checkpoint, where its manifest lists it.
///
/// # Errors
/// When the storage does not answer.
pub fn read_record(folder: &Storage, manifest: &CheckpointManifest, name: &str) -> Result<Option<Bytes>> {
    manifest.lists(name).then(|| Ok(folder.get(name)?)).transpose()
}

/// Digest of some bytes as manifests write it.
pub(crate) fn digest_bytes(bytes: &[u8]) -> String {
    digest_text(blake3::hash(bytes))
}

fn digest_text(hash: blake3::Hash) -> String {
    format!("blake3:{hash}")
}

/// The digest over the state objects: BLAKE3 of one line `<hex>  <name>` an object, in the order of the names, which
/// is what `b3sum <names> | b3sum` prints.
pub fn state_digest(objects: &[CheckpointObject]) -> String {
    let mut state: Vec<&CheckpointObject> = objects.iter().filter(|object| object.state).collect();
    state.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hasher = blake3::Hasher::new();
    for object in state {
        let hex = object.digest.strip_prefix("blake3:").unwrap_or(&object.digest);
        hasher.update(format!("{hex}  {}\n", object.name).as_bytes());
    }
    digest_text(hasher.finalize())
}

/// Writes an object while computing its size and digest.
pub(crate) struct HashingWriter {
    uri: String,
    name: String,
    writer: ObjectWriter,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl HashingWriter {
    pub(crate) fn new(folder: &Storage, name: &str) -> Result<Self> {
        let (uri, writer) = (folder.uri_of(name), folder.writer(name)?);
        Ok(Self { uri, name: name.to_owned(), writer, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    pub(crate) fn finish(self, state: bool) -> Result<CheckpointObject> {
        self.writer.finish()?;
        let digest = digest_text(self.hasher.finalize());
        Ok(CheckpointObject { name: self.name, bytes: self.bytes, digest, state })
    }

    /// Appends bytes, in pieces: the upload waits for capacity between two of them, not inside one.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(self.writer.part_bytes()) {
            let error = |source| CheckpointError::Stream { uri: self.uri.clone(), source };
            self.writer.write_all(piece).map_err(error)?;
            self.hasher.update(piece);
            self.bytes += piece.len() as u64;
        }
        Ok(())
    }

    /// Appends numbers.
    pub(crate) fn write_numbers(&mut self, numbers: &[f32]) -> Result<()> {
        self.write(bytemuck::cast_slice(numbers))
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Writes a small object.
pub(crate) fn put_object(
    folder: &Storage,
    name: &str,
    bytes: Bytes,
    state: bool,
) -> Result<CheckpointObject> {
    let object = CheckpointObject {
        name: name.to_owned(),
        bytes: bytes.len() as u64,
        digest: digest_bytes(&bytes),
        state,
    };
    folder.put(name, bytes)?;
    Ok(object)
}

/// Reads an object while computing its digest.
pub(crate) struct HashingReader {
    reader: ObjectReader,
    uri: String,
    hasher: blake3::Hasher,
}

impl HashingReader {
    pub(crate) fn new(folder: &Storage, name: &str) -> Result<Self> {
        Ok(Self { reader: folder.reader(name)?, uri: folder.uri_of(name), hasher: blake3::Hasher::new() })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.reader.size_bytes()
    }

    /// Fills the buffer.
    pub(crate) fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.reader
            .read_exact(buffer)
            .map_err(|source| CheckpointError::Stream { uri: self.uri.clone(), source })?;
        self.hasher.update(buffer);
        Ok(())
    }

    pub(crate) fn digest(&self) -> String {
        digest_text(self.hasher.finalize())
    }
}

/// Size and digest of an object; `done` hears of every piece.
pub(crate) fn digest_object(
    folder: &Storage,
    name: &str,
    done: &(dyn Fn(u64) + Sync),
) -> Result<(u64, String)> {
    let mut reader = HashingReader::new(folder, name)?;
    let mut left = reader.bytes();
    let mut buffer = vec![0; folder.part_bytes().min(left as usize)];
    while left > 0 {
        let piece = buffer.len().min(left as usize);
        reader.read_exact(&mut buffer[..piece])?;
        left -= piece as u64;
        done(piece as u64);
    }
    Ok((reader.bytes(), reader.digest()))
}

/// Reads every object of a checkpoint and compares size and digest; an empty list means that it is good.
///
/// # Errors
/// When the storage does not answer: that says nothing about the checkpoint.
pub fn verify(folder: &Storage, manifest: &CheckpointManifest) -> Result<Vec<Problem>> {
    let mut problems = check_manifest(folder, manifest);
    let objects: Vec<&CheckpointObject> = manifest.objects.iter().collect();
    problems.extend(verify_objects(folder, &objects, &|_| ())?);
    Ok(problems)
}

/// What is wrong with the manifest itself.
pub(super) fn check_manifest(folder: &Storage, manifest: &CheckpointManifest) -> Vec<Problem> {
    let uri = folder.uri_of(growth_crds::protocol::MANIFEST_FILE);
    let expected = state_digest(&manifest.objects);
    if manifest.digest == expected {
        return Vec::new();
    }
    let problem = format!("its state digest is {}, but its objects give {expected}", manifest.digest);
    vec![Problem { uri, problem }]
}

/// [`verify`] for some objects, several at a time.
pub(crate) fn verify_objects(
    folder: &Storage,
    objects: &[&CheckpointObject],
    done: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Problem>> {
    let found: Vec<Option<Problem>> =
        objects.par_iter().map(|object| verify_object(folder, object, done)).collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().collect())
}

fn verify_object(
    folder: &Storage,
    object: &CheckpointObject,
    done: &(dyn Fn(u64) + Sync),
) -> Result<Option<Problem>> {
    let uri = folder.uri_of(&object.name);
    let found = match folder.head(&object.name)? {
        None => {
            return Ok(Some(Problem { uri, problem: "the object is missing".to_owned() }));
        }
        Some(entry) if entry.bytes != object.bytes => (entry.bytes, String::new()),
        Some(_) => match digest_object(folder, &object.name, done) {
            Err(CheckpointError::Storage(StorageError::NotFound { .. })) => {
                return Ok(Some(Problem { uri, problem: "the object is missing".to_owned() }));
            }
            found => found?,
        },
    };
    Ok(object_problem(object, found.0, &found.1).map(|problem| Problem { uri, problem }))
}

/// How an object differs from its entry in the manifest.
pub(crate) fn object_problem(object: &CheckpointObject, bytes: u64, digest: &str) -> Option<String> {
    if bytes != object.bytes {
        return Some(format!("it has {bytes} bytes instead of {}", object.bytes));
    }
    (digest != object.digest).then(|| format!("its digest is {digest} instead of {}", object.digest))
}

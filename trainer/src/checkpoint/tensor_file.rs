//! The safetensors format, read and written tensor by tensor: eight bytes of header length, a JSON header, the data.

use super::error::{CheckpointError, Result};
use crate::storage::Storage;
use bytes::Bytes;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Bytes of data that are computed with at a time.
pub(crate) const PIECE_BYTES: usize = 8 << 20;

/// The longest header that the format allows.
const LONGEST_HEADER: u64 = 100 << 20;

/// Bytes before the header.
const LENGTH_BYTES: u64 = 8;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorSpec {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

impl TensorSpec {
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub(crate) fn bytes(&self) -> u64 {
        4 * self.len() as u64
    }
}

/// Types of numbers that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NumberType {
    F32,
    BF16,
    F16,
}

impl NumberType {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Self::F32),
            "BF16" => Some(Self::BF16),
            "F16" => Some(Self::F16),
            _ => None,
        }
    }

    pub(crate) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Converts little-endian numbers; `bytes` need not be aligned.
    pub(crate) fn decode(self, bytes: &[u8], numbers: &mut [f32]) {
        match self {
            Self::F32 => decode_with(bytes, numbers, f32::from_le_bytes),
            Self::BF16 => decode_with(bytes, numbers, |raw| bf16::from_le_bytes(raw).to_f32()),
            Self::F16 => decode_with(bytes, numbers, |raw| f16::from_le_bytes(raw).to_f32()),
        }
    }
}

fn decode_with<const N: usize>(bytes: &[u8], numbers: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    let (raw, _) = bytes.as_chunks::<N>();
    for (number, &raw) in numbers.iter_mut().zip(raw) {
        *number = convert(raw);
    }
}

/// One tensor of a header; offsets count from the end of the header.
#[derive(Serialize, Deserialize, Debug)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The header of an object that holds `tensors` as f32, in that order, padded so that the data is aligned.
pub(crate) fn header(tensors: &[TensorSpec]) -> Vec<u8> {
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.bytes();
        let name = serde_json::Value::from(tensor.name.as_str());
        let shape = serde_json::Value::from(tensor.shape.clone());
        json += &format!(r#",{name}:{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#);
    }
    json.push('}');
    let padded = json.len().next_multiple_of(8);
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(LENGTH_BYTES as usize + padded, b' ');
    bytes
}

/// Where a tensor lies.
#[derive(Debug, Clone)]
pub(crate) struct TensorPlace {
    pub(crate) object: String,
    pub(crate) number_type: NumberType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Range<u64>,
}

/// The tensors of some objects, by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct TensorIndex {
    places: HashMap<String, TensorPlace>,
}

impl TensorIndex {
    /// Reads the headers of the objects.
    pub(crate) fn read(folder: &Storage, objects: &[String]) -> Result<Self> {
        let mut places = HashMap::new();
        for object in objects {
            for (name, place) in read_header(folder, object)? {
                if places.insert(name.clone(), place).is_some() {
                    let problem = format!("its tensor {name} is in another file too");
                    return Err(CheckpointError::Format { uri: folder.uri_of(object), problem });
                }
            }
        }
        Ok(Self { places })
    }

    pub(crate) fn get(&self, name: &str) -> Option<&TensorPlace> {
        self.places.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &TensorPlace)> {
        self.places.iter()
    }

    /// The place of a tensor that must have that shape.
    pub(crate) fn expect(&self, folder: &Storage, name: &str, shape: &[usize]) -> Result<&TensorPlace> {
        let Some(place) = self.get(name) else {
            return Err(CheckpointError::MissingTensor {
                uri: folder.uri().to_owned(),
                tensor: name.to_owned(),
                expected: shape.to_vec(),
            });
        };
        if place.shape != shape {
            return Err(CheckpointError::WrongShape {
                uri: folder.uri_of(&place.object),
                tensor: name.to_owned(),
                found: place.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        Ok(place)
    }
}

impl TensorPlace {
    /// Some of its numbers, in the order of the data.
    pub(crate) fn part(&self, numbers: Range<usize>) -> Self {
        let width = self.number_type.bytes() as u64;
        let start = self.bytes.start + numbers.start as u64 * width;
        Self {
            bytes: start..start + numbers.len() as u64 * width,
            shape: vec![numbers.len()],
            ..self.clone()
        }
    }

    /// Reads the tensor in pieces, as f32; `buffer` is reused from call to call.
    pub(crate) fn read<E: From<CheckpointError>>(
        &self,
        folder: &Storage,
        buffer: &mut Vec<f32>,
        mut sink: impl FnMut(&[f32]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut start = self.bytes.start;
        while start < self.bytes.end {
            let end = self.bytes.end.min(start + folder.part_bytes() as u64);
            let bytes = folder.get_range(&self.object, start..end).map_err(CheckpointError::from)?;
            start = end;
            // Numbers of a file are mostly those in memory, byte by byte.
            if self.number_type == NumberType::F32
                && let Ok(numbers) = bytemuck::try_cast_slice(&bytes)
            {
                sink(numbers)?;
                continue;
            }
            buffer.resize(bytes.len() / self.number_type.bytes(), 0.0);
            self.number_type.decode(&bytes, buffer);
            sink(buffer)?;
        }
        Ok(())
    }
}

/// Reads and checks the header of one object: its tensors by name, in the order of their data.
pub(crate) fn read_header(folder: &Storage, object: &str) -> Result<Vec<(String, TensorPlace)>> {
    let uri = folder.uri_of(object);
    let format = |problem: String| CheckpointError::Format { uri: uri.clone(), problem };
    let Some(entry) = folder.head(object)? else {
        return Err(crate::storage::StorageError::NotFound { uri }.into());
    };
    if entry.bytes < LENGTH_BYTES {
        return Err(format(format!("it has {} bytes, too few for a safetensors header", entry.bytes)));
    }
    let length = folder.get_range(object, 0..LENGTH_BYTES)?;
    let length = length.as_chunks::<8>().0.first().map_or(0, |raw| u64::from_le_bytes(*raw));
    if length > LONGEST_HEADER.min(entry.bytes - LENGTH_BYTES) {
        return Err(format(format!(
            "its header claims {length} bytes, more than the file has or the format allows"
        )));
    }
    let data = LENGTH_BYTES + length;
    let json = folder.get_range(object, LENGTH_BYTES..data)?;
    parse_header(folder, object, &json, data, entry.bytes)
}

fn parse_header(
    folder: &Storage,
    object: &str,
    json: &Bytes,
    data: u64,
    total: u64,
) -> Result<Vec<(String, TensorPlace)>> {
    let uri = folder.uri_of(object);
    let format = |problem: String| CheckpointError::Format { uri: uri.clone(), problem };
    let mut header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(|error| format(format!("its header is not JSON: {error}")))?;
    header.remove("__metadata__");
    let mut tensors = Vec::with_capacity(header.len());
    for (name, value) in header {
        let entry: HeaderEntry = serde_json::from_value(value)
            .map_err(|error| format(format!("its header is wrong at {name}: {error}")))?;
        tensors.push((name, entry));
    }
    tensors.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut end = 0;
    let mut places = Vec::with_capacity(tensors.len());
    for (name, entry) in tensors {
        let number_type =
            NumberType::parse(&entry.dtype).ok_or_else(|| CheckpointError::UnsupportedType {
                uri: uri.clone(),
                tensor: name.clone(),
                found: entry.dtype.clone(),
            })?;
        let len = entry
            .shape
            .iter()
            .try_fold(number_type.bytes() as u64, |len, &side| len.checked_mul(side as u64));
        let [start, stop] = entry.data_offsets;
        if start != end || len != stop.checked_sub(start) {
            return Err(format(format!("the data of {name} is not where its header says")));
        }
        end = stop;
        let bytes = data.saturating_add(start)..data.saturating_add(stop);
        places
            .push((name, TensorPlace { object: object.to_owned(), number_type, shape: entry.shape, bytes }));
    }
    if data.saturating_add(end) != total {
        let problem = format!("it has {total} bytes, but its header describes {}", data.saturating_add(end));
        return Err(format(problem));
    }
    Ok(places)
}

//! Text to token shards, written once, and token shards to training sequences in an order that is a pure function.

pub(crate) mod bpe;
mod dataset;
mod documents;
mod files;
mod order;
mod parquet;
mod permutation;
mod pieces;
mod prepare;
mod shards;
#[cfg(test)]
mod tests;
mod text;

pub use dataset::{Dataset, Verification};
pub use order::{Sample, TrainingOrder};
pub use prepare::{Phase, Progress, prepare};
pub use shards::{Part, Shard};
pub use text::tokens_of;

use crate::storage::StorageError;
use crate::tokenizer::TokenizerError;

/// What is wrong with the data; the message says where and what to do.
#[derive(thiserror::Error, Debug)]
pub enum DataError {
    /// A field of the job means nothing that can be read.
    #[error("{field}: {reason}")]
    Field {
        /// Path of the field, such as `spec.data.train[0].uri`.
        field: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A file of a source cannot be read as what it should be.
    #[error("{file}: {reason}")]
    File {
        /// Address of the file, with the line or row where there is one.
        file: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A prepared dataset is not as it was written.
    #[error("{uri}: {reason}; delete the folder {folder} to prepare the data again")]
    Damaged {
        /// Address of the object.
        uri: String,
        /// What is wrong.
        reason: String,
        /// Folder of the dataset.
        folder: String,
    },
    /// Storage said no.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
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

/// Result of a data operation.
pub type Result<T> = std::result::Result<T, DataError>;

fn field_error(field: impl Into<String>, reason: impl Into<String>) -> DataError {
    DataError::Field { field: field.into(), reason: reason.into() }
}

//! What can go wrong with a checkpoint.

use crate::collective::CollectiveError;
use crate::storage::StorageError;

/// Result of a checkpoint operation.
pub type Result<T> = std::result::Result<T, CheckpointError>;

/// What can go wrong with a checkpoint. Every message names the object and says what to do.
#[derive(thiserror::Error, Debug)]
pub enum CheckpointError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Reading or writing an object failed half way.
    #[error("{uri}: {source}")]
    Stream {
        /// The object.
        uri: String,
        /// What happened.
        source: std::io::Error,
    },
    /// An object is not what its manifest or its own header says.
    #[error(
        "{uri} is damaged: {problem}; use an older checkpoint, or delete this one to have it written again"
    )]
    Damaged {
        /// The object.
        uri: String,
        /// What is wrong.
        problem: String,
    },
    /// An object is not what its format says.
    #[error("{uri} cannot be read: {problem}; check that the file is complete, or download it again")]
    Format {
        /// The object.
        uri: String,
        /// What is wrong.
        problem: String,
    },
    /// A folder lacks something that a model needs.
    #[error("{uri} holds no {object}; {advice}")]
    Missing {
        /// The folder.
        uri: String,
        /// What is missing.
        object: String,
        /// What to do.
        advice: String,
    },
    /// `config.json` describes a model that this trainer cannot run.
    #[error("{uri}: {field} is {found}, but {expected}")]
    Config {
        /// The file.
        uri: String,
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What is supported, or what to do.
        expected: String,
    },
    /// A tensor that the model needs is not there.
    #[error(
        "{uri}: there is no tensor {tensor} of shape {expected:?}; check that config.json belongs to these weights"
    )]
    MissingTensor {
        /// The folder.
        uri: String,
        /// The tensor.
        tensor: String,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the model.
    #[error(
        "{uri}: {tensor} has the shape {found:?}, but the model needs {expected:?}; check that the model's \
         configuration belongs to these weights"
    )]
    WrongShape {
        /// The object.
        uri: String,
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor that the model does not have.
    #[error(
        "{uri}: {tensor} has no place in the model of config.json; leaving it out would change the model"
    )]
    UnknownTensor {
        /// The object.
        uri: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor's numbers are of a type that cannot be converted.
    #[error("{uri}: {tensor} is stored as {found}; convert the weights to F32, BF16 or F16")]
    UnsupportedType {
        /// The object.
        uri: String,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// The output head differs from the embedding although the configuration ties them.
    #[error(
        "{uri}: lm_head.weight differs from model.embed_tokens.weight although config.json sets \
         tie_word_embeddings; set it to false to train them apart, or remove lm_head.weight"
    )]
    HeadNotTied {
        /// The folder.
        uri: String,
    },
    /// The folder holds a committed checkpoint.
    #[error(
        "{uri} already holds a committed checkpoint, which is never overwritten; use a larger attempt number"
    )]
    AlreadyCommitted {
        /// The folder.
        uri: String,
    },
    /// A newer attempt of the stage writes checkpoints.
    #[error(
        "{uri} was not committed: attempt {newer} of this stage has taken over; this process (attempt {attempt}) \
         must stop"
    )]
    Superseded {
        /// The folder.
        uri: String,
        /// The attempt of this process.
        attempt: u32,
        /// The newer one.
        newer: u32,
    },
    /// The state handed in does not fit the model: a mistake in the calling code.
    #[error("the {buffer} of the training state has {found} elements, but the model's layout has {expected}")]
    WrongLength {
        /// Which vector.
        buffer: &'static str,
        /// Its length.
        found: usize,
        /// Length of the layout.
        expected: usize,
    },
    /// The background thread could not be started, or died.
    #[error(
        "the thread that writes checkpoints {problem}; start the process again, it resumes from {last_good}"
    )]
    Thread {
        /// What happened.
        problem: String,
        /// The newest committed checkpoint.
        last_good: String,
    },
    /// Another rank could not do its part.
    #[error("rank {rank} could not do its part of the checkpoint: {problem}")]
    Rank {
        /// The rank.
        rank: usize,
        /// What it said.
        problem: String,
    },
    /// Another rank is lost.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The last checkpoint of a stage could not be written.
    #[error(
        "the last checkpoint of the stage could not be written: {source}; nothing is lost before {last_good}: fix \
         the storage and start again, training goes on from there"
    )]
    Final {
        /// The newest committed checkpoint.
        last_good: String,
        /// Why.
        source: Box<CheckpointError>,
    },
}

impl CheckpointError {
    /// Whether the bytes themselves are wrong or gone, so that an older checkpoint may help. A store that does not
    /// answer is not damage: falling back would throw finished training away.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Storage(error) => matches!(error, StorageError::NotFound { .. }),
            Self::Damaged { .. } => true,
            _ => false,
        }
    }
}

impl CheckpointError {
    /// Whether the files are at fault, so that trying again cannot help.
    pub fn is_input_error(&self) -> bool {
        matches!(
            self,
            Self::Format { .. }
                | Self::Missing { .. }
                | Self::Config { .. }
                | Self::MissingTensor { .. }
                | Self::WrongShape { .. }
                | Self::UnknownTensor { .. }
                | Self::UnsupportedType { .. }
                | Self::HeadNotTied { .. }
        )
    }
}

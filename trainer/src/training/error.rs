//! Why a stage stops before its last token.

use super::resharding::ReshardError;
use crate::checkpoint::CheckpointError;
use crate::collective::CollectiveError;
use crate::data::DataError;
use crate::storage::StorageError;

/// Why a stage stopped before its last token.
#[derive(thiserror::Error, Debug)]
pub enum TrainError {
    /// Reading or writing checkpoints.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Reading data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The stage grows, but its first checkpoint is not there.
    #[error(
        "stage {stage}: there is no checkpoint to start from; grow stage {from} first (growth-trainer grow, or run)"
    )]
    NotGrown {
        /// The stage.
        stage: String,
        /// The stage that it grows from.
        from: String,
    },
    /// The tokenizer has more tokens than the model has rows.
    #[error(
        "spec.model.vocabSize: the tokenizer has {tokenizer} tokens, but the model only {model}; raise vocabSize"
    )]
    Vocabulary {
        /// Tokens of the tokenizer.
        tokenizer: u32,
        /// Rows of the embedding.
        model: u32,
    },
    /// The start checkpoint has another architecture.
    #[error("spec.stages[0].initFrom: {uri} has {field} {found}, but the stage has {expected}")]
    OtherArchitecture {
        /// The folder.
        uri: String,
        /// The field of `config.json`.
        field: String,
        /// Its value there.
        found: String,
        /// Its value in the plan.
        expected: String,
    },
    /// A checkpoint inside the ramp of a growth is no model to start another training from.
    #[error(
        "spec.stages[0].initFrom: {uri} is a checkpoint inside the ramp of its growth ({file}), which only its own \
         stage can go on with; use one after the ramp"
    )]
    InsideRamp {
        /// The folder.
        uri: String,
        /// The object that says so.
        file: &'static str,
    },
    /// The stage stands inside the ramp of its growth, but its plan has none.
    #[error(
        "stage {stage}: {uri} is a checkpoint inside the ramp of its growth, but the plan has no maskRampTokens; write \
         the plan again, with this version of the program"
    )]
    NoRamp {
        /// The stage.
        stage: String,
        /// The folder.
        uri: String,
    },
    /// Another rank.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A number of ranks that cannot share a step.
    #[error(
        "stage {stage}: {ranks} ranks cannot share the {micro_batches} micro-batches of a step; possible are {possible}"
    )]
    Ranks {
        /// The stage.
        stage: String,
        /// Ranks of the attempt.
        ranks: usize,
        /// Micro-batches of a step.
        micro_batches: u64,
        /// The numbers that can.
        possible: String,
    },
    /// The loss is not a number any more.
    #[error(
        "stage {stage}: the loss is {loss} at step {step}; the last checkpoint is good: lower the learning rate or \
         clip gradients, and start again"
    )]
    Diverged {
        /// The stage.
        stage: String,
        /// The step.
        step: u64,
        /// The loss.
        loss: f64,
    },
}

impl TrainError {
    /// Whether the job or its files are at fault, so that trying again cannot help.
    pub fn is_input_error(&self) -> bool {
        match self {
            Self::Checkpoint(error) => error.is_input_error(),
            Self::Data(error) => error.is_input_error(),
            Self::Vocabulary { .. }
            | Self::OtherArchitecture { .. }
            | Self::InsideRamp { .. }
            | Self::NoRamp { .. }
            | Self::NotGrown { .. }
            | Self::Ranks { .. } => true,
            Self::Storage(_) | Self::Collective(_) | Self::Diverged { .. } => false,
        }
    }

    /// Whether this rank only ends because another one did.
    pub fn is_peer_lost(&self) -> bool {
        match self {
            Self::Collective(error) | Self::Checkpoint(CheckpointError::Collective(error)) => {
                error.is_peer_lost()
            }
            _ => false,
        }
    }
}

impl From<ReshardError> for TrainError {
    fn from(error: ReshardError) -> Self {
        match error {
            ReshardError::Checkpoint(error) => error.into(),
            ReshardError::Collective(error) => error.into(),
        }
    }
}

/// Result of training.
pub type Result<T> = std::result::Result<T, TrainError>;

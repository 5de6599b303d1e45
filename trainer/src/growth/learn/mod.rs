//! LearnDepth and LearnWidth: the matrices that make the target from the source are trained on text, then applied once.
//!
//! Unlike the other operators this holds source, target and gradients in memory. What is computed depends on the source,
//! the plan and the tokens, so a growth step that goes on after it was killed ends in the same bits.

mod data;
mod generator;
mod progress;
mod tables;
mod training;

pub use data::LearnData;
pub use generator::{Generator, LearnedMatrix, Workspace};

use super::{Growth, GrowthError, Meter, transform};
use crate::checkpoint::{CheckpointError, PIECE_BYTES, ShardSet, digest_bytes, put_object};
use crate::data::DataError;
use crate::storage::{Storage, StorageError};
use growth_crds::plan::{LearnPlan, OptimizerStatePolicy, StagePlan};
use growth_crds::protocol::{CheckpointObject, CheckpointOrigin, LEARNED_MATRICES_FILE, LearnRecord};
use progress::ProgressFolder;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::sync::atomic::AtomicBool;
use training::{LearnState, Learner};

/// What can go wrong while matrices are learned.
#[derive(thiserror::Error, Debug)]
pub enum LearnError {
    /// There is nothing to learn on.
    #[error("{operator} learns on text, and there is none; name one with --text, or grow in a job")]
    NoText {
        /// The operator.
        operator: String,
    },
    /// The text does not fill a sequence.
    #[error(
        "the text to learn on has {tokens} tokens, fewer than one sequence and its target, {needed}; give more text"
    )]
    ShortText {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a sequence and one.
        needed: usize,
    },
    /// The tokenizer has more tokens than the model has rows.
    #[error(
        "the text has tokens up to {tokenizer}, but the model only {model}; use the tokenizer of the model"
    )]
    Vocabulary {
        /// Tokens of the tokenizer.
        tokenizer: u32,
        /// Rows of the embedding.
        model: u32,
    },
    /// The loss is not a number any more.
    #[error("the loss is {loss} at step {step} of learning; lower growth.learn.learningRate")]
    Diverged {
        /// The step.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// Moments were to be kept.
    #[error("{operator} mixes weights, and moments of a mixture are not defined; use optimizerState Reset")]
    Moments {
        /// The operator.
        operator: String,
    },
    /// It was asked to stop.
    #[error("learning was stopped after {step} of {steps} steps and can go on")]
    Stopped {
        /// Steps done.
        step: u64,
        /// Steps in all.
        steps: u64,
    },
    /// Progress or matrices cannot be put into a file.
    #[error("{uri}: what was learned cannot be written: {reason}")]
    Progress {
        /// The folder.
        uri: String,
        /// Why.
        reason: String,
    },
    /// Reading data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Reading the source.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl LearnError {
    /// Whether plan, source or text are at fault, so that trying again cannot help.
    pub fn is_input_error(&self) -> bool {
        match self {
            Self::NoText { .. }
            | Self::Moments { .. }
            | Self::ShortText { .. }
            | Self::Vocabulary { .. }
            // The same steps end in the same loss.
            | Self::Diverged { .. } => true,
            Self::Data(error) => error.is_input_error(),
            Self::Checkpoint(error) => error.is_input_error(),
            Self::Stopped { .. } | Self::Progress { .. } | Self::Storage(_) => false,
        }
    }
}

/// Result of learning.
pub type Result<T> = std::result::Result<T, LearnError>;

/// What a growth that learns needs beside its plan.
pub struct Learning<'a> {
    /// The text.
    pub data: LearnData<'a>,
    /// A folder of its own in which progress is stored; `None`: a growth step that is killed begins again.
    pub progress: Option<Storage>,
    /// Set when it shall stop after the current step.
    pub stop: Option<&'a AtomicBool>,
    /// Told of every step.
    pub report: &'a (dyn Fn(LearnProgress) + Sync),
}

impl<'a> Learning<'a> {
    /// Learning on what the stage will train on, with its progress beside the checkpoints.
    pub fn of_stage(
        stage: &StagePlan,
        dataset: &'a crate::data::Dataset,
        storage: &Storage,
        stop: Option<&'a AtomicBool>,
        report: &'a (dyn Fn(LearnProgress) + Sync),
    ) -> Self {
        let weights = stage.data.train.iter().map(|source| source.weight).collect();
        let data = LearnData::Stage { dataset, weights, first_token: stage.first_token };
        let progress = Some(storage.join(&format!("{}/learn/{}", stage.job, stage.stage)));
        Self { data, progress, stop, report }
    }
}

/// How far learning is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearnProgress {
    /// Tokens learned on.
    pub tokens: u64,
    /// Tokens in all.
    pub total: u64,
    /// Mean loss of the last step, in nats.
    pub loss: f64,
}

/// The result.
pub(super) struct Learned {
    /// Weights of the target, in its layout.
    pub(super) parameters: Vec<f32>,
    matrices: Vec<f32>,
    losses: Vec<f64>,
}

impl Learned {
    pub(super) fn record(&self, plan: &LearnPlan) -> LearnRecord {
        LearnRecord { steps: plan.steps, tokens: plan.tokens(), losses: self.losses.clone() }
    }
}

impl Growth<'_> {
    /// What the result depends on beside plan and source.
    pub(super) fn learning_identity(&self) -> Option<Value> {
        let learn = self.plan.learn.as_ref()?;
        let learning = self.learning.filter(|_| learn.steps > 0)?;
        Some(learning.data.identity())
    }

    /// Refuses a growth that cannot learn, before anything is read.
    pub(super) fn check_learning(&self) -> super::Result<()> {
        let Some(learn) = &self.plan.learn else { return Ok(()) };
        let operator = format!("{:?}", self.plan.operator);
        if self.plan.optimizer_state == OptimizerStatePolicy::Keep {
            return Err(LearnError::Moments { operator }.into());
        }
        if learn.steps > 0 && self.learning.is_none() {
            return Err(LearnError::NoText { operator }.into());
        }
        Ok(())
    }

    /// Trains the matrices and makes the target's weights, where the plan says so.
    pub(super) fn learn(&self, origin: &CheckpointOrigin) -> super::Result<Option<Learned>> {
        let Some(plan) = self.plan.learn.as_deref() else { return Ok(None) };
        let source = self.source.read_parameters()?;
        let generator = Generator::new(self.source.config(), self.plan, plan);
        let first = LearnState::first(generator.initial(&self.plan.layers));
        let state = match self.learning.filter(|_| plan.steps > 0) {
            Some(learning) => self.train(plan, &generator, &source, first, (learning, origin))?,
            None => first,
        };
        let mut parameters = vec![0.0; self.layout.total_len()];
        generator.generate(&mut Workspace::default(), &source, &state.matrices, &mut parameters);
        for tensor in self.layout.tensors() {
            transform::add_noise(self.plan, &self.config, &tensor.name, 0, &mut parameters[tensor.range()]);
        }
        Ok(Some(Learned { parameters, matrices: state.matrices, losses: state.losses }))
    }

    fn train(
        &self,
        plan: &LearnPlan,
        generator: &Generator,
        source: &[f32],
        first: LearnState,
        (learning, origin): (&Learning<'_>, &CheckpointOrigin),
    ) -> Result<LearnState> {
        let batches = learning.data.open(plan, &self.config)?;
        let identity = digest_bytes(json!(origin).to_string().as_bytes());
        let folder = learning.progress.clone().map(|folder| ProgressFolder::new(folder, identity));
        let stored = folder.as_ref().map(|folder| folder.load(generator.len())).transpose()?.flatten();
        let mut learner = Learner::new(plan, generator, source, &self.config);
        learner.run(stored.unwrap_or(first), &batches, learning, folder.as_ref())
    }

    /// Writes the weights that were learned.
    pub(super) fn write_learned(
        &self,
        folder: &Storage,
        shards: &ShardSet,
        learned: &Learned,
        meter: &Meter<'_>,
    ) -> super::Result<Vec<CheckpointObject>> {
        shards.write(folder, 0..shards.len(), |_, tensor, writer| {
            let range = self.layout.find(&tensor.name).map(|tensor| tensor.range()).unwrap_or_default();
            for piece in learned.parameters[range].chunks(PIECE_BYTES / 4) {
                meter.add(4 * piece.len() as u64);
                writer.write_numbers(piece)?;
            }
            Ok::<(), GrowthError>(())
        })
    }

    /// Writes the matrices beside the weights: a record, not part of the state.
    pub(super) fn write_matrices(
        &self,
        folder: &Storage,
        learned: &Learned,
    ) -> super::Result<CheckpointObject> {
        let unreadable = |error: safetensors::SafeTensorError| LearnError::Progress {
            uri: folder.uri_of(LEARNED_MATRICES_FILE),
            reason: error.to_string(),
        };
        let mut views = Vec::new();
        if let Some(plan) = self.plan.learn.as_deref() {
            for matrix in Generator::new(self.source.config(), self.plan, plan).matrices() {
                let bytes = bytemuck::cast_slice(&learned.matrices[matrix.range()]);
                let view = TensorView::new(Dtype::F32, vec![matrix.rows, matrix.columns], bytes);
                views.push((matrix.name.clone(), view.map_err(unreadable)?));
            }
        }
        let bytes = safetensors::serialize(views, None).map_err(unreadable)?;
        Ok(put_object(folder, LEARNED_MATRICES_FILE, bytes.into(), false)?)
    }

    /// Deletes the stored progress: the growth step is done.
    pub(super) fn clear_progress(&self) -> super::Result<()> {
        match self.learning.and_then(|learning| learning.progress.as_ref()) {
            Some(folder) if self.plan.learn.is_some() => Ok(ProgressFolder::clear(folder)?),
            _ => Ok(()),
        }
    }
}

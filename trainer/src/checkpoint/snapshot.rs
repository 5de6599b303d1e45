//! Which objects hold which tensors, which rank writes which object, and the copy that it writes from.

use super::error::Result;
use super::objects::HashingWriter;
use super::pace::Pace;
use super::writer::{ShardSet, model_specs, moment_specs};
use super::{Part, StateTensor, TrainingState};
use crate::model::layout::ParameterLayout;
use crate::storage::Storage;
use growth_crds::protocol::CheckpointObject;
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

/// Elements that one task copies.
const COPY_CHUNK: usize = 1 << 18;

/// Weights come in so many objects, where that makes them neither small nor larger than [`super::DEFAULT_SHARD_BYTES`]:
/// ranks and connections then work side by side.
const USUAL_OBJECTS: u64 = 8;

/// An object is not cut below this.
const SMALL_OBJECT_BYTES: u64 = 4 << 20;

/// Largest object of a model with so many bytes of weights. Depends on the model alone, so that a checkpoint is the same
/// whoever wrote it.
pub(crate) fn object_bytes(weights_bytes: u64) -> u64 {
    (weights_bytes / USUAL_OBJECTS).clamp(SMALL_OBJECT_BYTES, super::DEFAULT_SHARD_BYTES)
}

/// The objects with tensors of a checkpoint: weights first, then moments.
#[derive(Debug, Clone)]
pub struct ObjectTable {
    model: ShardSet,
    moments: ShardSet,
}

impl ObjectTable {
    pub(super) fn new(layout: &ParameterLayout, shard_bytes: u64) -> Self {
        Self {
            model: ShardSet::new("model", model_specs(layout), shard_bytes),
            moments: ShardSet::new("optimizer", moment_specs(layout), shard_bytes),
        }
    }

    /// All objects, by number.
    pub fn objects(&self) -> Range<usize> {
        0..self.model.len() + self.moments.len()
    }

    /// The tensors of an object, in order.
    pub fn tensors(&self, object: usize) -> impl Iterator<Item = StateTensor> + use<> {
        let weights = self.model.len();
        let range = match object.checked_sub(weights) {
            None => self.model.range(object),
            Some(object) => self.moments.range(object),
        };
        range.map(move |index| match object < weights {
            true => StateTensor { part: Part::Parameters, tensor: index },
            false => StateTensor {
                part: if index % 2 == 0 { Part::ExpAvg } else { Part::ExpAvgSq },
                tensor: index / 2,
            },
        })
    }

    /// The objects that `rank` of `world_size` writes.
    pub fn of_rank(&self, rank: usize, world_size: usize) -> impl Iterator<Item = usize> + use<> {
        (rank..self.objects().end).step_by(world_size.max(1))
    }

    /// The rank that writes an object.
    pub fn owner(object: usize, world_size: usize) -> usize {
        object % world_size.max(1)
    }

    /// Whether an object holds moments, which a state may not have.
    pub(super) fn holds_moments(&self, object: usize) -> bool {
        object >= self.model.len()
    }

    /// Writes one object.
    pub(super) fn write<'a>(
        &self,
        folder: &Storage,
        object: usize,
        numbers: &dyn Fn(StateTensor) -> &'a [f32],
        pace: &Pace,
    ) -> Result<CheckpointObject> {
        let (shards, shard) = match object.checked_sub(self.model.len()) {
            None => (&self.model, object),
            Some(object) => (&self.moments, object),
        };
        let mut tensors = self.tensors(object);
        shards.write_one(folder, shard, &mut |_, _, writer: &mut HashingWriter| {
            let Some(tensor) = tensors.next() else { return Ok(()) };
            let begin = Instant::now();
            let written = writer.write_numbers(numbers(tensor));
            pace.rest(begin);
            written
        })
    }

    pub(super) fn write_index(&self, folder: &Storage) -> Result<CheckpointObject> {
        self.model.write_index(folder)
    }
}

/// What one rank writes of a state: allocated once, filled for each checkpoint.
#[derive(Debug)]
pub struct Snapshot {
    /// Optimizer steps done in the stage.
    pub step: u64,
    /// Tokens trained in the stage.
    pub tokens: u64,
    /// Steps that the moments have seen.
    pub optimizer_step: u64,
    numbers: Vec<f32>,
    places: HashMap<StateTensor, Range<usize>>,
}

impl Snapshot {
    /// Room for the objects of `rank`.
    pub fn new(table: &ObjectTable, layout: &ParameterLayout, rank: usize, world_size: usize) -> Self {
        let mut places = HashMap::new();
        let mut end = 0;
        for tensor in table.of_rank(rank, world_size).flat_map(|object| table.tensors(object)) {
            let start = end;
            end += layout.tensors()[tensor.tensor].len;
            places.insert(tensor, start..end);
        }
        Self { step: 0, tokens: 0, optimizer_step: 0, numbers: vec![0.0; end], places }
    }

    /// Takes over where training stands.
    pub fn stand_at(&mut self, state: &TrainingState) {
        (self.step, self.tokens, self.optimizer_step) = (state.step, state.tokens, state.optimizer_step);
    }

    /// The copy of a tensor, where this rank writes it.
    pub fn numbers(&self, tensor: StateTensor) -> Option<&[f32]> {
        self.places.get(&tensor).map(|place| &self.numbers[place.clone()])
    }

    /// The copy of a tensor, to be filled.
    pub fn numbers_mut(&mut self, tensor: StateTensor) -> Option<&mut [f32]> {
        self.places.get(&tensor).map(|place| &mut self.numbers[place.clone()])
    }

    /// Copies the whole state of one rank that trains alone.
    pub fn copy_from(&mut self, state: &TrainingState, layout: &ParameterLayout) {
        self.stand_at(state);
        for (tensor, place) in &self.places {
            let from = &tensor.vector_of(state)[layout.tensors()[tensor.tensor].range()];
            copy(&mut self.numbers[place.clone()], from);
        }
    }
}

/// Copies numbers with all threads.
pub fn copy(to: &mut [f32], from: &[f32]) {
    to.par_chunks_mut(COPY_CHUNK)
        .zip(from.par_chunks(COPY_CHUNK))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

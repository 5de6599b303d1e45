//! Between what ranks hold and what checkpoints hold. A checkpoint has whole tensors, whoever wrote it; a rank has all
//! weights and its part of the moments. So before a checkpoint moments go to the rank that writes them, and after loading
//! one they come from the rank that has read them: each byte is written and read once.
//!
//! All ranks walk over the same list of tensors in the same order, so nothing waits for what comes later.

use crate::checkpoint::{
    self, CheckpointError, LoadedPart, ObjectTable, Part, Snapshot, StateTensor, TrainingState, copy,
};
use crate::collective::{Collective, CollectiveError};
use crate::model::layout::ParameterLayout;
use crate::storage::Storage;
use crate::training::shards::Shards;
use growth_crds::protocol::CheckpointManifest;
use serde::{Deserialize, Serialize};

/// What can go wrong on the way.
#[derive(thiserror::Error, Debug)]
pub enum ReshardError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Another rank.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// Fills each rank's snapshot from the state of all.
///
/// # Errors
/// When a rank is lost.
pub fn fill(
    snapshot: &mut Snapshot,
    state: &TrainingState,
    table: &ObjectTable,
    layout: &ParameterLayout,
    shards: &Shards,
    collective: &mut dyn Collective,
) -> Result<(), CollectiveError> {
    let world_size = collective.world_size();
    if world_size == 1 {
        snapshot.copy_from(state, layout);
        return Ok(());
    }
    // A rank that still writes the checkpoint before could not take what the others send.
    collective.barrier()?;
    snapshot.stand_at(state);
    for object in table.objects() {
        let owner = ObjectTable::owner(object, world_size);
        for tensor in table.tensors(object) {
            gather(snapshot, state, tensor, owner, layout, shards, collective)?;
        }
    }
    Ok(())
}

/// Brings one tensor to the rank that writes it.
fn gather(
    snapshot: &mut Snapshot,
    state: &TrainingState,
    tensor: StateTensor,
    owner: usize,
    layout: &ParameterLayout,
    shards: &Shards,
    collective: &mut dyn Collective,
) -> Result<(), CollectiveError> {
    let range = layout.tensors()[tensor.tensor].range();
    let vector = tensor.vector_of(state);
    let rank = collective.rank();
    if owner != rank {
        return match tensor.part {
            Part::Parameters => Ok(()),
            _ => collective.send(owner, &vector[shards.own(&shards.part(&range, rank))]),
        };
    }
    let Some(whole) = snapshot.numbers_mut(tensor) else { return Ok(()) };
    if tensor.part == Part::Parameters {
        copy(whole, &vector[range]);
        return Ok(());
    }
    for from in 0..collective.world_size() {
        let part = shards.part(&range, from);
        let to = &mut whole[part.start - range.start..part.end - range.start];
        match from == rank {
            true => to.copy_from_slice(&vector[shards.own(&part)]),
            false => collective.receive(from, to)?,
        }
    }
    Ok(())
}

/// What each rank tells of the part of a checkpoint that it has read.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Reading {
    Good(Vec<StateTensor>),
    Damaged(String),
}

/// A checkpoint that all ranks have read: the objects of this one, and which tensors each has.
struct Readings {
    state: TrainingState,
    by_rank: Vec<Vec<StateTensor>>,
}

/// The newest good checkpoint of a stage, read by all ranks together; `None` when there is none.
///
/// # Errors
/// When the storage does not answer, the checkpoint is one of another model, or a rank is lost.
pub fn resume(
    storage: &Storage,
    (job, stage): (&str, &str),
    layout: &ParameterLayout,
    shards: &Shards,
    collective: &mut dyn Collective,
    warn: &mut dyn FnMut(String),
) -> Result<Option<(CheckpointManifest, TrainingState)>, ReshardError> {
    if collective.world_size() == 1 {
        return Ok(checkpoint::resume(storage, job, stage, layout, warn)?);
    }
    for manifest in candidates(storage, job, stage, collective, warn)? {
        match read(storage, &manifest, layout, collective, warn)? {
            Some(readings) => {
                let state = spread(readings, layout, shards, collective)?;
                return Ok(Some((manifest, state)));
            }
            None => continue,
        }
    }
    Ok(None)
}

/// Committed checkpoints as rank 0 finds them, newest first.
fn candidates(
    storage: &Storage,
    job: &str,
    stage: &str,
    collective: &mut dyn Collective,
    warn: &mut dyn FnMut(String),
) -> Result<Vec<CheckpointManifest>, ReshardError> {
    let mut manifests = Vec::new();
    if collective.rank() == 0 {
        let found = checkpoint::list(storage, job, stage)?.into_iter().rev();
        manifests.extend(found.filter_map(|found| found.usable(storage, (job, stage), warn)));
    }
    let json = serde_json::to_vec(&manifests).unwrap_or_default();
    let json = collective.broadcast(&json)?;
    serde_json::from_slice(&json).map_err(|error| unreadable(0, &error))
}

/// Reads this rank's objects of a checkpoint, and learns what the others have read. `None`: an object is damaged.
fn read(
    storage: &Storage,
    manifest: &CheckpointManifest,
    layout: &ParameterLayout,
    collective: &mut dyn Collective,
    warn: &mut dyn FnMut(String),
) -> Result<Option<Readings>, ReshardError> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let (state, mine) = match checkpoint::load_part(storage, manifest, layout, rank, world_size) {
        Ok(LoadedPart { state, tensors }) => (state, Reading::Good(tensors)),
        Err(error) if error.is_damage() => (TrainingState::default(), Reading::Damaged(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    let all = collective.exchange(&serde_json::to_vec(&mine).unwrap_or_default())?;
    let mut by_rank = Vec::with_capacity(all.len());
    for (rank, json) in all.iter().enumerate() {
        match serde_json::from_slice(json).map_err(|error| unreadable(rank, &error))? {
            Reading::Good(tensors) => by_rank.push(tensors),
            Reading::Damaged(problem) => warn(format!("skipped a checkpoint: {problem}")),
        }
    }
    if by_rank.len() < world_size {
        return Ok(None);
    }
    LoadedPart::check_complete(storage, manifest, layout, &by_rank.concat())?;
    Ok(Some(Readings { state, by_rank }))
}

/// Gives every rank all weights and its part of the moments.
fn spread(
    Readings { mut state, by_rank }: Readings,
    layout: &ParameterLayout,
    shards: &Shards,
    collective: &mut dyn Collective,
) -> Result<TrainingState, CollectiveError> {
    let mut own = TrainingState {
        exp_avg: vec![0.0; shards.own_len()],
        exp_avg_sq: vec![0.0; shards.own_len()],
        parameters: std::mem::take(&mut state.parameters),
        step: state.step,
        tokens: state.tokens,
        optimizer_step: state.optimizer_step,
    };
    let longest = by_rank.iter().map(Vec::len).max().unwrap_or(0);
    for index in 0..longest {
        for (reader, tensors) in by_rank.iter().enumerate() {
            if let Some(tensor) = tensors.get(index) {
                scatter(&mut own, &state, *tensor, reader, layout, shards, collective)?;
            }
        }
    }
    Ok(own)
}

/// Brings one tensor from the rank that has read it to those that need it. `loaded` has the moments that this rank read.
fn scatter(
    own: &mut TrainingState,
    loaded: &TrainingState,
    tensor: StateTensor,
    reader: usize,
    layout: &ParameterLayout,
    shards: &Shards,
    collective: &mut dyn Collective,
) -> Result<(), CollectiveError> {
    let range = layout.tensors()[tensor.tensor].range();
    let (rank, world_size) = (collective.rank(), collective.world_size());
    if tensor.part == Part::Parameters {
        return match reader == rank {
            true => (0..world_size)
                .filter(|to| *to != rank)
                .try_for_each(|to| collective.send(to, &own.parameters[range.clone()])),
            false => collective.receive(reader, &mut own.parameters[range]),
        };
    }
    let part = shards.part(&range, rank);
    let target = &mut tensor.vector_of_mut(own)[shards.own(&part)];
    if reader != rank {
        return collective.receive(reader, target);
    }
    let whole = tensor.vector_of(loaded);
    target.copy_from_slice(&whole[part]);
    let others = (0..world_size).filter(|to| *to != rank);
    others.into_iter().try_for_each(|to| collective.send(to, &whole[shards.part(&range, to)]))
}

fn unreadable(rank: usize, error: &serde_json::Error) -> ReshardError {
    CollectiveError::Protocol { rank, problem: error.to_string() }.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::checkpoint::testing::{config, location, state, storage};
    use crate::checkpoint::{AsyncCheckpointer, CheckpointWriter, Retention, TokenIds};
    use crate::collective::testing::together;

    /// What rank `rank` of `world_size` holds of a whole state.
    fn part_of(
        whole: &TrainingState,
        layout: &ParameterLayout,
        rank: usize,
        world_size: usize,
    ) -> TrainingState {
        let shards = Shards::new(layout, rank, world_size);
        let own = |vector: &[f32]| -> Vec<f32> {
            let slices = shards.buckets().iter().map(|bucket| &vector[bucket.slices[rank].clone()]);
            slices.collect::<Vec<_>>().concat()
        };
        let (exp_avg, exp_avg_sq) = (own(&whole.exp_avg), own(&whole.exp_avg_sq));
        TrainingState { exp_avg, exp_avg_sq, ..whole.clone() }
    }

    #[test]
    fn what_some_ranks_write_together_any_other_number_reads() {
        let config = growth_crds::plan::ModelConfig { hidden_size: 40, ..config(3, false) };
        let layout = ParameterLayout::new(&config);
        let (_folder, storage) = storage();
        let mut digests = Vec::new();
        for (attempt, world_size) in [(1, 1), (2, 2), (3, 3), (4, 5)] {
            let whole = state(&layout, u64::from(attempt));
            let written = together(world_size, |collective| {
                let rank = collective.rank();
                let mine = part_of(&whole, &layout, rank, world_size);
                let shards = Shards::new(&layout, rank, world_size);
                let place = location(&storage, "small", attempt);
                let mut writer =
                    CheckpointWriter::new(place, config.clone(), TokenIds::default(), Vec::new());
                writer.shard_bytes = 6000;
                let table = writer.table();
                assert!(table.objects().len() > 5 * 2, "every rank has something to write");
                let retention = Retention { keep_last: 1, ..Retention::default() };
                let notes = collective.notes();
                let mut checkpointer = AsyncCheckpointer::start(writer, retention, None, notes).unwrap();
                let submitted = checkpointer.submit(Vec::new(), |snapshot| {
                    fill(snapshot, &mine, &table, &layout, &shards, collective)
                });
                assert!(submitted.unwrap().is_none());
                checkpointer.finish().unwrap().unwrap().manifest
            });
            assert!(written.iter().all(|manifest| *manifest == written[0]));
            for readers in [1, 2, 4] {
                let parts = together(readers, |collective| {
                    let shards = Shards::new(&layout, collective.rank(), readers);
                    let name = ("job", "small");
                    resume(&storage, name, &layout, &shards, collective, &mut |problem| panic!("{problem}"))
                        .unwrap()
                        .unwrap()
                });
                for (rank, (manifest, read)) in parts.into_iter().enumerate() {
                    assert_eq!(manifest, written[0]);
                    assert!(read == part_of(&whole, &layout, rank, readers), "{world_size} to {readers}");
                }
            }
            digests.push((written[0].step, written[0].digest.clone()));
        }
        // The same state has the same digest, whoever wrote it.
        let whole = state(&layout, 4);
        let mut alone =
            CheckpointWriter::new(location(&storage, "alone", 1), config, TokenIds::default(), Vec::new());
        alone.shard_bytes = 6000;
        assert_eq!(digests[3], (4, alone.write(&whole, &[]).unwrap().digest));
    }

    #[test]
    fn ranks_skip_a_checkpoint_that_one_of_them_finds_damaged() {
        let config = config(2, true);
        let layout = ParameterLayout::new(&config);
        let (_folder, storage) = storage();
        for step in [1, 2] {
            let place = location(&storage, "small", 1);
            let writer = CheckpointWriter::new(place, config.clone(), TokenIds::default(), Vec::new());
            writer.write(&state(&layout, step), &[]).unwrap();
        }
        let folder = storage.join("job/checkpoints/small/00000002-1");
        let object = "optimizer-00001-of-00001.safetensors";
        let mut bytes = folder.get(object).unwrap().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        folder.put(object, bytes).unwrap();
        let steps = together(2, |collective| {
            let shards = Shards::new(&layout, collective.rank(), 2);
            let mut warnings = Vec::new();
            let mut warn = |problem| warnings.push(problem);
            let found = resume(&storage, ("job", "small"), &layout, &shards, collective, &mut warn).unwrap();
            (found.unwrap().0.step, warnings.len())
        });
        assert_eq!(steps, [(1, 1), (1, 1)]);
    }
}

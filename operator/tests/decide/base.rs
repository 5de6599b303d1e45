//! A first stage that another job trains.

use super::{World, checkpoint, starts, training};
use growth_crds::GrowthTrainingJob;
use growth_crds::protocol::Outcome;
use growth_crds::status::{Phase, StageState};
use growth_operator::names::Work;
use serde_json::{Value, json};
use std::sync::Arc;

/// A job whose first stage is trained by job `base`, which is not there.
fn waiting() -> World {
    World::new(&[("/spec/stages/0/trainedBy", json!({"job": "base"}))])
}

/// The job that trains it, as far as it has come.
fn base_with(edits: &[(&str, Value)], state: Option<StageState>) -> Arc<GrowthTrainingJob> {
    let mut base = training(edits).job;
    base.metadata.name = Some("base".to_owned());
    if let Some(state) = state {
        base.status.as_mut().unwrap().stages[0].state = state;
    }
    base.into()
}

/// Sees the other job like this: nothing begins, and the status says why.
fn waits(world: &mut World, base: Option<Arc<GrowthTrainingJob>>, why: &str) {
    world.observed.base = base;
    let plan = world.after(5);
    assert_eq!((starts(&plan), world.phase()), (vec![], Phase::Pending));
    assert_eq!(plan.requeue.map(|wait| wait.as_secs()), Some(5));
    let (status, reason, message) = world.condition("Running");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "WaitingForJob"));
    assert_eq!(message, format!("stage small is trained by job base, which {why}"));
}

#[test]
fn it_is_waited_for_and_taken_without_a_trainer() {
    let mut world = waiting();
    waits(&mut world, None, "does not exist");
    waits(&mut world, Some(base_with(&[], None)), "has not completed it yet");
    world.observed.base = Some(base_with(&[], Some(StageState::Complete)));
    assert_eq!(starts(&world.after(5)), [(Work::Data, 1)]);

    // From here on the other job does not matter.
    world.observed.base = None;
    let plan = world.succeed("tiny-data--t1", "data", None, 1, &Outcome::finished(Some(checkpoint(256))));
    assert_eq!(starts(&plan), [(Work::Transform(1), 1)]);
    let stage = &plan.status.stages[0];
    assert_eq!((stage.state, stage.checkpoint.as_ref()), (StageState::Complete, Some(&checkpoint(256))));
    assert_eq!(plan.status.progress.unwrap().percent, Some(20), "its tokens count");
    assert_eq!(world.condition("CheckpointAvailable").1, "Committed");
}

#[test]
fn one_that_failed_is_waited_for_too() {
    let mut failed = Arc::unwrap_or_clone(base_with(&[], Some(StageState::Failed)));
    failed.status.as_mut().unwrap().phase = Some(Phase::Failed);
    waits(&mut waiting(), Some(failed.into()), "has failed");
}

#[test]
fn another_stage_is_refused_until_it_is_the_same() {
    let mut world = waiting();
    let other = base_with(&[("/spec/training/seed", json!(99))], Some(StageState::Complete));
    waits(&mut world, Some(other), "trains another one");
    let (status, reason, message) = world.condition("Accepted");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "InvalidSpec"));
    assert!(
        message.starts_with("spec.stages[0].trainedBy: the first stage of job base differs in training;")
    );
    world.observed.base = Some(base_with(&[], Some(StageState::Complete)));
    assert_eq!(starts(&world.after(5)), [(Work::Data, 1)]);
    assert_eq!(world.condition("Accepted").1, "Valid");
}

#[test]
fn suspended_it_waits_for_nobody() {
    let mut world = waiting();
    world.job.spec.suspend = true;
    world.step();
    assert_eq!(world.phase(), Phase::Suspended);
    world.job.spec.suspend = false;
    waits(&mut world, None, "does not exist");
    assert_eq!(world.condition("Suspended").1, "Resumed");
}

//! Stories that once ended badly, as the simulation told them.

use crate::kubernetes::NodeState;
use crate::tell;
use crate::world::Action::{
    AppendStage, Calm, DeleteJob, DeletePod, HangContainer, KillContainer, Node, Recreate, Resize, Slots,
    Suspend,
};
use crate::world::{Action, Setting};

const ALONE: Setting =
    Setting { operators: 1, large_replicas: 1, least_replicas: 1, max_restarts: 1000, ttl: None };
const GANG: Setting = Setting { large_replicas: 2, ..ALONE };

fn ends_well(setting: &Setting, story: &[Action]) {
    if let Err(error) = tell(setting, story) {
        panic!("{error}");
    }
}

#[test]
fn an_undisturbed_job() {
    ends_well(&ALONE, &[]);
}

/// The pod was evicted before it had a node: nothing was left of it but what the Job says.
#[test]
fn an_eviction_before_the_pod_has_a_node_does_not_count() {
    let story = [
        Action::Reconcile(0),
        Action::Finish(0),
        Calm(3),
        Action::ControlJobs,
        Action::Evict(1_871_783_314_234_568_417),
        Calm(1),
    ];
    ends_well(&ALONE, &story);
}

/// Rank 0 was done, so not all ranks could be ready any more, and the other had no deadline.
#[test]
fn a_rank_that_hangs_after_rank_0_is_done() {
    let story = [
        Resize(1),
        Calm(10),
        AppendStage,
        Calm(9),
        Resize(3),
        Recreate,
        Calm(9),
        Calm(6),
        Recreate,
        Calm(11),
        HangContainer(5_199_960_093_311_679_355),
    ];
    ends_well(&GANG, &story);
}

/// Rank 0 was done before the other was ready.
#[test]
fn a_rank_that_hangs_before_it_is_ready() {
    let story = [
        Calm(4),
        Calm(11),
        KillContainer(0),
        Calm(10),
        HangContainer(721_299_376_032_127_051),
        HangContainer(14_482_928_482_462_169_399),
        DeleteJob(5_901_344_162_203_963_677),
        Action::Reconcile(0),
        Suspend(true),
        Action::Work(2),
        Action::Finish(0),
    ];
    ends_well(&GANG, &story);
}

/// Two of four pods had a node and looked for the others; one was deleted and ended well, and only the Job knew of it.
#[test]
fn a_rank_that_hangs_while_another_is_done_and_gone() {
    let story = [
        Resize(4),
        Slots(0, 1),
        Slots(2, 2),
        Node(1, NodeState::Down),
        Calm(10),
        Calm(5),
        HangContainer(4_290_539_912_770_418_457),
        DeletePod(7_582_249_795_622_557_366),
        Calm(2),
    ];
    ends_well(&GANG, &story);
}

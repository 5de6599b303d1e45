//! The rules about the number of pods of a stage.

use super::{World, deletes, ended, starts};
use growth_crds::protocol::{Outcome, Progress};
use growth_crds::status::Phase;
use growth_operator::decide::decide;
use growth_operator::draft::{Plan, Write};
use growth_operator::names::Work;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

const ELASTIC: &str = "/spec/stages/0/elastic";

/// The data is prepared, and the first stage, of four micro-batches a step, is about to start. It may have 1 to 4 pods.
fn elastic(replicas: i32, edits: &[(&str, Value)]) -> World {
    let mut all = vec![
        ("/spec/training/microBatchTokens", json!(1024)),
        ("/spec/replicas", json!(replicas)),
        (ELASTIC, json!({"minReplicas": 1, "maxReplicas": 4})),
    ];
    all.extend(edits.iter().cloned());
    let mut world = World::new(&all);
    world.step();
    world.succeed("tiny-data--t1", "data", None, 1, &Outcome::finished(None));
    world.observed.jobs.clear();
    world.observed.pods.clear();
    world
}

/// It trains in its first attempt.
fn training(replicas: i32, edits: &[(&str, Value)]) -> World {
    let mut world = elastic(replicas, edits);
    let size = world.job.status.as_ref().unwrap().replicas.unwrap();
    see_gang(&mut world, 1, size, &vec![ready(); usize::try_from(size).unwrap()]);
    world.step();
    assert_eq!(world.phase(), Phase::Training);
    world
}

/// The Job of an attempt at the first stage, and its pods.
fn see_gang(world: &mut World, attempt: i32, size: i32, pods: &[Value]) {
    let name = format!("tiny-small-t{attempt}");
    let job: Job = serde_json::from_value(json!({
        "metadata": {"name": name, "uid": format!("uid-of-{name}")},
        "spec": {"completions": size, "template": {"spec": {"containers": []}}},
        "status": {"startTime": world.now},
    }))
    .unwrap();
    world.observed.jobs = vec![job.into()];
    let pod = |(rank, status): (usize, &Value)| {
        let owner =
            json!({"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": format!("uid-of-{name}")});
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": format!("{name}-{rank}"), "ownerReferences": [owner]},
            "spec": {"nodeName": "n1", "containers": []},
            "status": status,
        }))
        .unwrap();
        pod.into()
    };
    world.observed.pods = pods.iter().enumerate().map(pod).collect();
}

fn fail(world: &mut World) {
    let job = std::sync::Arc::make_mut(&mut world.observed.jobs[0]);
    let failed = json!([{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]);
    job.status.as_mut().unwrap().conditions = serde_json::from_value(failed).unwrap();
}

/// Nothing is left of the attempt.
fn gone(world: &mut World) -> Plan {
    world.observed.jobs.clear();
    world.observed.pods.clear();
    world.step()
}

fn ready() -> Value {
    super::ready()
}

fn starting() -> Value {
    json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]})
}

fn unschedulable(since: Timestamp) -> Value {
    json!({"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient cpu.", "lastTransitionTime": since,
    }]})
}

fn sizes(plan: &Plan) -> Vec<i32> {
    let size = |write: &Write| match write {
        Write::Start(attempt) => Some(attempt.replicas),
        _ => None,
    };
    plan.writes.iter().filter_map(size).collect()
}

fn events(plan: &Plan) -> Vec<&str> {
    plan.events.iter().map(|event| event.reason).collect()
}

fn scale(world: &mut World, replicas: i32) -> Plan {
    world.job.spec.replicas = replicas;
    world.step()
}

/// `status.replicas`, `desiredReplicas` of the stage, `readyReplicas`.
fn replicas(world: &World) -> (i32, i32, i32) {
    let status = world.job.status.as_ref().unwrap();
    (status.replicas.unwrap(), status.stages[0].desired_replicas.unwrap(), status.ready_replicas.unwrap())
}

fn restarts(world: &World) -> Option<i32> {
    world.job.status.as_ref().unwrap().restarts
}

#[test]
fn a_stage_has_the_largest_possible_size_that_is_asked_for() {
    let elastic_of = |least: i32, most: i32| json!({"minReplicas": least, "maxReplicas": most});
    let only = |sizes: Value| json!({"minReplicas": 1, "maxReplicas": 4, "allowedReplicas": sizes});
    let cases = [
        (1, elastic_of(1, 4), 1),
        (2, elastic_of(1, 4), 2),
        // Three pods cannot share four micro-batches evenly.
        (3, elastic_of(1, 4), 2),
        (4096, elastic_of(1, 4096), 4),
        (1, elastic_of(2, 4), 2),
        (4, elastic_of(1, 3), 2),
        (3, only(json!([1, 4])), 1),
        (4, only(json!([4, 1])), 4),
        (1, only(json!([4, 2])), 2),
    ];
    for (asked, elastic, size) in cases {
        let mut world = self::elastic(asked, &[(ELASTIC, elastic.clone())]);
        assert_eq!(sizes(&world.step()), [size], "{asked} of {elastic}");
        assert_eq!(world.job.status.as_ref().unwrap().replicas, Some(size));
    }
    let mut world = self::elastic(3, &[("/spec/training/reproducible", json!(false))]);
    assert_eq!(sizes(&world.step()), [3]);
    let mut world = self::elastic(1, &[(ELASTIC, Value::Null), ("/spec/stages/0/replicas", json!(2))]);
    assert_eq!(sizes(&world.step()), [2]);
}

#[test]
fn a_smaller_size_is_taken_at_once_and_counts_as_no_failure() {
    let mut world = training(4, &[("/spec/failurePolicy/maxRestarts", json!(0))]);
    let plan = scale(&mut world, 2);
    assert_eq!((deletes(&plan), starts(&plan)), (vec!["tiny-small-t1"], vec![]));
    assert_eq!(world.phase(), Phase::Restarting);
    assert_eq!(world.condition("Scaling").1, "ScaleDownRequested");
    assert_eq!(events(&plan), ["AttemptEnded"]);
    assert!(!plan.events[0].is_warning && plan.events[0].note.contains("from 4 to 2"), "{:?}", plan.events);
    assert_eq!(replicas(&world), (4, 2, 0));

    // The pods write a checkpoint; nothing else happens until they have ended.
    assert_eq!(starts(&world.after(60)), []);
    let plan = gone(&mut world);
    assert_eq!((starts(&plan), sizes(&plan)), (vec![(Work::Train(0), 2)], vec![2]));
    assert_eq!(world.condition("Scaling").1, "ScaleSettled");
    see_gang(&mut world, 2, 2, &[ready(), ready()]);
    assert!(world.step().writes.is_empty());
    assert_eq!((world.phase(), replicas(&world)), (Phase::Training, (2, 2, 2)));
    let failure = world.job.status.as_ref().unwrap().stages[0].last_failure.clone();
    assert_eq!((restarts(&world), failure), (None, None));
}

#[test]
fn a_larger_size_is_taken_when_it_was_wanted_for_a_while() {
    for (delay, seconds) in [(None, 300), (Some(20), 20), (Some(0), 0)] {
        let mut edits = vec![];
        if let Some(delay) = delay {
            edits.push(("/spec/stages/0/elastic/scaleUpDelaySeconds", json!(delay)));
        }
        let mut world = training(2, &edits);
        if seconds > 0 {
            let plan = scale(&mut world, 4);
            assert_eq!((deletes(&plan), events(&plan)), (vec![], vec!["ScaleUpRequested"]));
            assert_eq!((world.phase(), replicas(&world)), (Phase::Training, (2, 4, 2)));
            assert_eq!(world.condition("Scaling").1, "ScaleUpRequested");
            let plan = world.after(seconds - 1);
            assert_eq!((deletes(&plan), events(&plan), plan.requeue.unwrap().as_secs()), (vec![], vec![], 1));
        }
        world.job.spec.replicas = 4;
        let plan = world.after(seconds.min(1));
        assert_eq!(deletes(&plan), ["tiny-small-t1"], "{delay:?}");
        assert_eq!(sizes(&gone(&mut world)), [4]);
        assert_eq!((world.condition("Scaling").0.as_str(), restarts(&world)), ("False", None));
    }
}

/// An autoscaler that cannot make up its mind costs no restart.
#[test]
fn a_larger_size_must_be_wanted_all_the_time() {
    let mut world = training(2, &[]);
    for _ in 0..5 {
        scale(&mut world, 4);
        assert_eq!(deletes(&world.after(299)), [] as [&str; 0]);
        // Three pods are as good as two.
        scale(&mut world, 3);
        assert_eq!(world.condition("Scaling").1, "ScaleSettled");
        world.after(1);
    }
    assert_eq!(world.job.status.as_ref().unwrap().execution_attempts, Some(2));
    // Which larger size is wanted does not matter.
    let mut world = training(1, &[]);
    scale(&mut world, 2);
    world.after(200);
    scale(&mut world, 4);
    assert_eq!(deletes(&world.after(100)), ["tiny-small-t1"]);
    assert_eq!(sizes(&gone(&mut world)), [4]);
}

#[test]
fn what_is_wanted_while_the_pods_end_is_what_starts() {
    let mut world = training(4, &[]);
    scale(&mut world, 1);
    assert_eq!(world.condition("Scaling").1, "ScaleDownRequested");
    world.after(3);
    scale(&mut world, 4);
    assert_eq!(sizes(&gone(&mut world)), [4]);
    assert_eq!(world.condition("Scaling").1, "ScaleSettled");
}

/// The clock of the next scale-up must not be that of the scale-down before.
#[test]
fn a_change_of_mind_after_the_start_waits_like_any_other() {
    let mut world = training(4, &[]);
    scale(&mut world, 2);
    world.after(100);
    assert_eq!(sizes(&gone(&mut world)), [2]);
    world.job.spec.replicas = 4;
    see_gang(&mut world, 2, 2, &[ready(), ready()]);
    world.after(250);
    assert_eq!(deletes(&world.after(299)), [] as [&str; 0]);
    assert_eq!(deletes(&world.after(1)), ["tiny-small-t2"]);
}

#[test]
fn an_attempt_that_starts_may_shrink_but_not_grow() {
    let mut world = elastic(4, &[]);
    see_gang(&mut world, 1, 4, &[ready(), starting(), starting(), starting()]);
    world.step();
    assert_eq!(world.phase(), Phase::Starting);
    let plan = scale(&mut world, 1);
    assert_eq!(deletes(&plan), ["tiny-small-t1"]);
    assert_eq!(sizes(&gone(&mut world)), [1]);

    let mut world = elastic(1, &[]);
    see_gang(&mut world, 1, 1, &[starting()]);
    scale(&mut world, 4);
    assert_eq!(deletes(&world.after(1000)), [] as [&str; 0]);
    assert_eq!(world.condition("Scaling").1, "ScaleUpRequested");
    see_gang(&mut world, 1, 1, &[ready()]);
    assert_eq!(deletes(&world.step()), ["tiny-small-t1"]);
}

#[test]
fn a_queue_need_not_admit_more_than_is_wanted() {
    let mut world = elastic(4, &[("/spec/scheduling/queueName", json!("gpus"))]);
    see_gang(&mut world, 1, 4, &[]);
    std::sync::Arc::make_mut(&mut world.observed.jobs[0]).spec.as_mut().unwrap().suspend = Some(true);
    world.step();
    assert_eq!(world.phase(), Phase::Queued);
    assert_eq!(deletes(&scale(&mut world, 2)), ["tiny-small-t1"]);
}

#[test]
fn some_attempts_keep_their_size() {
    // A fixed stage.
    let fixed = [(ELASTIC, Value::Null), ("/spec/stages/0/replicas", json!(2))];
    let mut world = training(2, &fixed);
    assert!(scale(&mut world, 4).writes.is_empty() && scale(&mut world, 1).writes.is_empty());
    assert_eq!(world.condition("Scaling"), Default::default());

    // All tokens are trained; what is left is the last commit.
    let mut world = training(4, &[]);
    world.observed.progress = Some(Progress {
        stage: "small".into(),
        attempt: 1,
        step: 256,
        tokens: 1_048_576,
        total_tokens: 1_048_576,
        tokens_per_second: 1000.0,
        loss: None,
        checkpoint: None,
        updated_at: world.now,
    });
    world.step();
    assert_eq!(world.phase(), Phase::Committing);
    world.observed.progress = None;
    assert!(scale(&mut world, 1).writes.is_empty());

    // One of its pods has ended already.
    let mut world = training(2, &[]);
    see_gang(&mut world, 1, 2, &[ended(0, ""), ready()]);
    assert!(scale(&mut world, 1).writes.is_empty());

    // A suspended job has none.
    let mut world = training(2, &[]);
    scale(&mut world, 4);
    world.job.spec.suspend = true;
    assert_eq!(deletes(&world.step()), ["tiny-small-t1"]);
    gone(&mut world);
    assert_eq!((world.phase(), world.condition("Scaling").1.as_str()), (Phase::Suspended, "Suspended"));
    assert!(scale(&mut world, 1).writes.is_empty() && world.after(1000).writes.is_empty());
    world.job.spec.suspend = false;
    assert_eq!(sizes(&world.step()), [1]);
}

/// Two of four pods have a node.
fn short(world: &mut World, attempt: i32) -> Plan {
    let none = unschedulable(world.now);
    see_gang(world, attempt, 4, &[starting(), none.clone(), starting(), none]);
    world.step()
}

#[test]
fn an_attempt_without_enough_nodes_is_followed_by_a_smaller_one() {
    for (timeout, seconds) in [(None, 60), (Some(5), 5)] {
        let mut edits = vec![("/spec/failurePolicy/maxRestarts", json!(0))];
        if let Some(timeout) = timeout {
            edits.push(("/spec/stages/0/elastic/capacityTimeoutSeconds", json!(timeout)));
        }
        let mut world = elastic(4, &edits);
        let plan = short(&mut world, 1);
        assert_eq!((world.phase(), plan.requeue.unwrap().as_secs()), (Phase::Queued, seconds));
        assert_eq!(deletes(&world.after(i64::try_from(seconds).unwrap() - 1)), [] as [&str; 0]);
        let plan = world.after(1);
        assert_eq!(deletes(&plan), ["tiny-small-t1"]);
        assert_eq!(events(&plan), ["Degraded", "AttemptEnded"]);
        let (status, reason, message) = world.condition("Degraded");
        assert_eq!((status.as_str(), reason.as_str()), ("True", "InsufficientCapacity"));
        assert!(message.contains("2 of 4") && message.contains("3 Insufficient cpu"), "{message}");

        assert_eq!(sizes(&gone(&mut world)), [2]);
        see_gang(&mut world, 2, 2, &[ready(), ready()]);
        world.step();
        assert_eq!((world.phase(), replicas(&world)), (Phase::Training, (2, 4, 2)));
        assert_eq!((world.condition("Degraded").0.as_str(), restarts(&world)), ("True", None));
        assert_ne!(world.condition("Scaling").0, "True");
    }
}

/// A job in whose second attempt two pods train, for the other two had no node.
fn degraded(edits: &[(&str, Value)]) -> World {
    let mut world = elastic(4, edits);
    short(&mut world, 1);
    world.after(60);
    gone(&mut world);
    see_gang(&mut world, 2, 2, &[ready(), ready()]);
    world.after(40);
    world
}

#[test]
fn the_full_size_is_tried_again_and_again_but_not_fast() {
    let mut world = degraded(&[]);
    for attempt in [2, 4, 6] {
        assert_eq!(deletes(&world.after(599)), [] as [&str; 0]);
        assert_eq!(deletes(&world.after(1)), [format!("tiny-small-t{attempt}")]);
        assert_eq!(world.condition("Scaling").1, "ScaleUpRequested");
        assert_eq!(sizes(&gone(&mut world)), [4]);
        // Still nothing.
        short(&mut world, attempt + 1);
        assert_eq!(deletes(&world.after(60)), [format!("tiny-small-t{}", attempt + 1)]);
        assert_eq!(sizes(&gone(&mut world)), [2]);
        see_gang(&mut world, attempt + 2, 2, &[ready(), ready()]);
        world.step();
        assert_eq!(world.condition("Degraded").0, "True");
    }
    assert_eq!(restarts(&world), None);
}

#[test]
fn a_stage_that_has_its_full_size_again_is_degraded_no_longer() {
    let mut world = degraded(&[("/spec/stages/0/elastic/scaleUpDelaySeconds", json!(1000))]);
    assert_eq!(deletes(&world.after(999)), [] as [&str; 0]);
    assert_eq!(deletes(&world.after(1)), ["tiny-small-t2"]);
    assert_eq!(sizes(&gone(&mut world)), [4]);
    see_gang(&mut world, 3, 4, &[starting(), ready(), ready(), ready()]);
    world.step();
    assert_eq!(world.condition("Degraded").0, "True");
    see_gang(&mut world, 3, 4, &vec![ready(); 4]);
    let plan = world.step();
    assert_eq!(world.condition("Degraded").1, "FullSize");
    assert_eq!(events(&plan), ["Running", "FullSize"]);
    assert_eq!(world.job.status.as_ref().unwrap().stages[0].capacity, None);
}

#[test]
fn a_restart_while_nodes_are_missing_has_the_smaller_size() {
    let mut world = degraded(&[]);
    fail(&mut world);
    world.observed.pods.clear();
    world.step();
    assert_eq!(sizes(&world.after(10)), [2]);
    // It was to start anyway, and the last try is long ago.
    let mut world = degraded(&[]);
    world.now += SignedDuration::from_secs(559);
    fail(&mut world);
    world.observed.pods.clear();
    world.step();
    assert_eq!(sizes(&world.after(10)), [4]);
}

#[test]
fn what_is_wanted_may_change_while_nodes_are_missing() {
    // Two are enough.
    let mut world = degraded(&[]);
    assert!(scale(&mut world, 2).writes.is_empty());
    assert_eq!(world.condition("Degraded").1, "FullSize");
    // The user knows of new nodes: the usual delay, not the long one.
    scale(&mut world, 4);
    assert_eq!(deletes(&world.after(300)), ["tiny-small-t2"]);
    assert_eq!(sizes(&gone(&mut world)), [4]);
    // Or even fewer.
    let mut world = degraded(&[]);
    assert_eq!(deletes(&scale(&mut world, 1)), ["tiny-small-t2"]);
    assert_eq!(sizes(&gone(&mut world)), [1]);
    // Whoever resumes a job may have made room.
    let mut world = degraded(&[]);
    world.job.spec.suspend = true;
    world.step();
    gone(&mut world);
    assert_eq!(world.condition("Degraded").1, "Suspended");
    world.job.spec.suspend = false;
    assert_eq!(sizes(&world.step()), [4]);
}

#[test]
fn a_job_that_has_no_node_at_all_waits() {
    let mut world = elastic(4, &[("/spec/runPolicy/startupDeadlineSeconds", json!(500))]);
    let none = unschedulable(world.now);
    see_gang(&mut world, 1, 4, &vec![none; 4]);
    assert!(world.after(499).writes.is_empty());
    assert_eq!(
        (world.phase(), world.condition("PodsScheduled").1.as_str()),
        (Phase::Queued, "Unschedulable")
    );
    assert_eq!(world.condition("Degraded"), Default::default());
    world.after(1);
    assert_eq!(world.condition("Failed").1, "StartupDeadlineExceeded");
    // So does one whose smallest size does not fit, and a fixed stage always.
    let least = json!({"minReplicas": 4, "maxReplicas": 4});
    let fixed = [(ELASTIC, Value::Null), ("/spec/stages/0/replicas", json!(4))];
    for edits in [&[(ELASTIC, least)][..], &fixed] {
        let mut world = elastic(4, edits);
        short(&mut world, 1);
        assert!(world.after(100_000).writes.is_empty());
    }
    // A gate is no lack of nodes.
    let mut world = elastic(4, &[]);
    let mut gated = unschedulable(world.now);
    gated["conditions"][0]["reason"] = json!("SchedulingGated");
    see_gang(&mut world, 1, 4, &[ready(), ready(), ready(), gated]);
    assert!(world.after(100_000).writes.is_empty());
}

/// The operator died between two writes.
#[test]
fn a_resize_goes_on_where_it_was_left() {
    let mut world = training(4, &[]);
    // After the status was stored, before the Job was deleted.
    assert_eq!(deletes(&scale(&mut world, 2)), ["tiny-small-t1"]);
    let plan = world.after(100);
    assert_eq!((deletes(&plan), events(&plan)), (vec!["tiny-small-t1"], vec![]));
    // After the next attempt was stored, before its Job was created: the size is that of now.
    assert_eq!(sizes(&gone(&mut world)), [2]);
    assert_eq!(sizes(&scale(&mut world, 1)), [1]);
    assert_eq!(world.job.status.as_ref().unwrap().execution_attempts, Some(3));
}

/// Another leader, who had read an older spec, was faster: the Job says how many pods there are.
#[test]
fn the_size_of_an_attempt_is_that_of_its_job() {
    let mut world = elastic(4, &[]);
    see_gang(&mut world, 1, 2, &[ready(), ready()]);
    assert!(world.step().writes.is_empty());
    assert_eq!((world.phase(), replicas(&world)), (Phase::Training, (2, 4, 2)));
    assert_eq!(deletes(&world.after(300)), ["tiny-small-t1"]);

    // Both decide the same of the same, whoever is first.
    let mut world = training(4, &[]);
    world.job.spec.replicas = 2;
    let plans = [(); 2].map(|()| decide(&world.job, &world.observed, world.now));
    assert_eq!(plans[0], plans[1]);
}

#[test]
fn the_end_of_a_stage_settles_its_size() {
    let mut world = degraded(&[]);
    let outcome = serde_json::to_string(&Outcome::finished(Some(super::checkpoint(256)))).unwrap();
    see_gang(&mut world, 2, 2, &[ended(0, &outcome), ended(0, &outcome)]);
    let job = std::sync::Arc::make_mut(&mut world.observed.jobs[0]);
    let complete = json!([{"type": "Complete", "status": "True"}]);
    job.status.as_mut().unwrap().conditions = serde_json::from_value(complete).unwrap();
    assert_eq!(starts(&world.step()), [(Work::Transform(1), 1)]);
    assert_eq!(world.condition("Degraded").1, "StageTransition");
}

/// The pods that have lost a peer tell nothing; the one that they have lost may be a moment later.
#[test]
fn the_last_word_of_a_gang_is_waited_for() {
    let lost = || ended(3, "rank 1 is lost");
    let mut world = training(2, &[]);
    see_gang(&mut world, 1, 2, &[lost(), ready()]);
    fail(&mut world);
    let plan = world.step();
    assert!(plan.writes.is_empty());
    assert_eq!((world.phase(), plan.requeue.unwrap().as_secs()), (Phase::Restarting, 5));
    see_gang(&mut world, 1, 2, &[lost(), ended(137, "")]);
    fail(&mut world);
    world.after(1);
    assert_eq!(restarts(&world), Some(1));

    // It is gone: nobody's fault, as far as anybody knows. That may happen again at once, so it is not tried at once.
    let mut world = training(2, &[("/spec/failurePolicy/maxRestarts", json!(0))]);
    see_gang(&mut world, 1, 2, &[lost()]);
    fail(&mut world);
    assert_eq!(starts(&world.step()), []);
    assert_eq!(starts(&world.after(9)), []);
    assert_eq!(starts(&world.after(1)), [(Work::Train(0), 2)]);
    assert_eq!(restarts(&world), None);
}

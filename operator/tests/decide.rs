//! The rules of `decide`, one situation at a time: what was seen, and what follows.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decide/base.rs"]
mod base;
#[path = "../../crds/tests/common/mod.rs"]
mod common;
#[path = "decide/scaling.rs"]
mod scaling;

use common::{edit, example};
use growth_crds::GrowthTrainingJob;
use growth_crds::plan::GrowthOperator;
use growth_crds::plan::growth::GrowthEffect;
use growth_crds::protocol::{Outcome, Progress};
use growth_crds::status::{CheckpointStatus, GrowthStatus, Phase, StageState};
use growth_operator::decide::{decide, job_to_ask};
use growth_operator::draft::{Plan, Write};
use growth_operator::names::Work;
use growth_operator::observed::Observed;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// A job, what there is of its children, and a clock. Each `step` decides and stores the status, as the operator does.
struct World {
    job: GrowthTrainingJob,
    observed: Observed,
    now: Timestamp,
}

impl World {
    fn new(edits: &[(&str, Value)]) -> Self {
        let mut object = example();
        edit(&mut object, "/metadata/uid", &json!("u"));
        edit(&mut object, "/metadata/generation", &json!(1));
        edit(&mut object, "/metadata/namespace", &json!("n"));
        edits.iter().for_each(|(path, value)| edit(&mut object, path, value));
        let job = serde_json::from_value(object).unwrap();
        World { job, observed: Observed::default(), now: "2026-01-01T00:00:00Z".parse().unwrap() }
    }

    fn step(&mut self) -> Plan {
        let plan = decide(&self.job, &self.observed, self.now);
        self.job.status = Some(plan.status.clone());
        // Decided again on what it has made of itself, nothing in the status changes.
        let again = decide(&self.job, &self.observed, self.now);
        assert_eq!(again.status, plan.status, "a second decision changes the status");
        plan
    }

    fn after(&mut self, seconds: i64) -> Plan {
        self.now += SignedDuration::from_secs(seconds);
        self.step()
    }

    fn see_job(&mut self, name: &str, conditions: &[&str]) {
        let conditions: Vec<_> = conditions
            .iter()
            .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": null}))
            .collect();
        let job: Job = serde_json::from_value(json!({
            "metadata": {"name": name, "uid": format!("uid-of-{name}")},
            "status": {"conditions": conditions, "startTime": self.now},
        }))
        .unwrap();
        self.observed.jobs.retain(|known| known.metadata.name != job.metadata.name);
        self.observed.jobs.push(job.into());
    }

    fn see_pod(&mut self, work: &str, stage: Option<&str>, attempt: i32, status: Value) -> &mut Pod {
        let mut labels = json!({"growth.dev/work": work, "growth.dev/attempt": attempt.to_string()});
        if let Some(stage) = stage {
            labels["growth.dev/stage"] = json!(stage);
        }
        let name = format!("{work}-{attempt}");
        let job = match (work, stage) {
            ("train", Some(stage)) => format!("tiny-{stage}-t{attempt}"),
            (_, Some(stage)) => format!("tiny-{stage}-grow--t{attempt}"),
            _ => format!("tiny-data--t{attempt}"),
        };
        let owner =
            json!({"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": format!("uid-of-{job}")});
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
            "spec": {"nodeName": "n1", "containers": []},
            "status": status,
        }))
        .unwrap();
        self.observed.pods.retain(|known| known.metadata.name != pod.metadata.name);
        self.observed.pods.push(pod.into());
        std::sync::Arc::get_mut(self.observed.pods.last_mut().unwrap()).unwrap()
    }

    /// A Job that has done its work, and the last word of its pod.
    fn succeed(
        &mut self,
        name: &str,
        work: &str,
        stage: Option<&str>,
        attempt: i32,
        outcome: &Outcome,
    ) -> Plan {
        self.see_job(name, &["Complete"]);
        self.see_pod(work, stage, attempt, ended(0, &serde_json::to_string(outcome).unwrap()));
        self.step()
    }

    fn phase(&self) -> Phase {
        self.job.status.as_ref().unwrap().phase.unwrap()
    }

    fn condition(&self, kind: &str) -> (String, String, String) {
        let conditions = &self.job.status.as_ref().unwrap().conditions;
        let found = conditions.iter().find(|condition| condition.type_ == kind);
        found.map(|c| (c.status.clone(), c.reason.clone(), c.message.clone())).unwrap_or_default()
    }
}

fn ended(code: i32, message: &str) -> Value {
    json!({
        "phase": if code == 0 { "Succeeded" } else { "Failed" },
        "containerStatuses": [{
            "name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "reason": "Error", "message": message}},
        }],
    })
}

fn ready() -> Value {
    json!({"phase": "Running", "conditions": [
        {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"},
    ]})
}

fn checkpoint(step: i64) -> CheckpointStatus {
    CheckpointStatus {
        uri: format!("s3://b/{step}"),
        step,
        tokens: step * 4096,
        digest: "d".into(),
        committed_at: None,
    }
}

fn stacked() -> GrowthStatus {
    GrowthStatus {
        operator: GrowthOperator::Stack,
        connection_rate: "2/3".into(),
        expected_effect: GrowthEffect::Spike,
        max_logit_difference: Some("3.10e0".into()),
        loss_before: Some("4.1312".into()),
        loss_after: Some("4.2131".into()),
    }
}

/// A trainer of another make, or of an older version, says nothing of it.
#[test]
fn a_growth_step_without_a_record_is_done_all_the_same() {
    let mut world = training(&[]);
    world.succeed("tiny-small-t1", "train", Some("small"), 1, &Outcome::finished(Some(checkpoint(256))));
    let outcome = Outcome::finished(Some(checkpoint(0)));
    let plan = world.succeed("tiny-large-grow--t1", "transform", Some("large"), 1, &outcome);
    assert_eq!(starts(&plan), [(Work::Train(1), 1)]);
    assert_eq!(plan.status.stages[1].growth, None);
    let grown = plan.events.iter().find(|event| event.reason == "StageGrown").unwrap();
    assert_eq!(grown.note, "stage large has its first checkpoint");
}

fn starts(plan: &Plan) -> Vec<(Work, i32)> {
    let start = |write: &Write| match write {
        Write::Start(attempt) => Some((attempt.work, attempt.number)),
        _ => None,
    };
    plan.writes.iter().filter_map(start).collect()
}

fn deletes(plan: &Plan) -> Vec<&str> {
    let mut names = Vec::new();
    for write in &plan.writes {
        if let Write::DeleteJob { job_name } = write {
            names.push(job_name.as_str());
        }
    }
    names
}

/// A world in which the first stage trains.
fn training(edits: &[(&str, Value)]) -> World {
    let mut world = World::new(edits);
    world.step();
    world.succeed("tiny-data--t1", "data", None, 1, &Outcome::finished(None));
    world.see_job("tiny-small-t1", &[]);
    world.see_pod("train", Some("small"), 1, ready());
    world.step();
    assert_eq!(world.phase(), Phase::Training);
    world
}

#[test]
fn the_main_path() {
    let mut world = World::new(&[]);
    assert_eq!(starts(&world.step()), [(Work::Data, 1)]);
    assert_eq!(world.phase(), Phase::Preparing);

    let plan = world.succeed("tiny-data--t1", "data", None, 1, &Outcome::finished(None));
    assert_eq!(starts(&plan), [(Work::Train(0), 1)]);
    assert_eq!(world.phase(), Phase::Starting);

    let plan =
        world.succeed("tiny-small-t1", "train", Some("small"), 1, &Outcome::finished(Some(checkpoint(256))));
    assert_eq!(starts(&plan), [(Work::Transform(1), 1)]);
    let status = world.job.status.clone().unwrap();
    assert_eq!(status.stages[0].state, StageState::Complete);
    assert_eq!(status.stages[0].checkpoint.as_ref().unwrap().step, 256);
    assert_eq!(status.progress.unwrap().percent, Some(20));

    let plan = world.succeed(
        "tiny-large-grow--t1",
        "transform",
        Some("large"),
        1,
        &Outcome { growth: Some(stacked()), ..Outcome::finished(Some(checkpoint(0))) },
    );
    assert_eq!(starts(&plan), [(Work::Train(1), 1)]);
    let grown = plan.events.iter().find(|event| event.reason == "StageGrown").unwrap();
    assert_eq!(
        grown.note,
        "stage large has its first checkpoint: Stack, connection rate 2/3, the loss jumps at first, loss 4.1312 -> \
         4.2131, largest difference of two logits 3.10e0"
    );
    assert_eq!(plan.status.stages[1].growth, Some(stacked()));
    assert_eq!(plan.status.stages[0].growth, None);

    let plan =
        world.succeed("tiny-large-t1", "train", Some("large"), 1, &Outcome::finished(Some(checkpoint(1024))));
    assert_eq!(starts(&plan), []);
    assert_eq!(world.phase(), Phase::Complete);
    assert_eq!(world.condition("Complete").0, "True");
    assert_eq!(plan.status.stages[1].growth, Some(stacked()), "it stays");
    let plan = world.after(1_000_000);
    assert!(plan.writes.is_empty() && plan.events.is_empty(), "something happens after the end: {plan:?}");
}

#[test]
fn progress_is_shown_and_a_silent_attempt_is_restarted() {
    let mut world = training(&[]);
    let progress = |tokens, at| Progress {
        stage: "small".into(),
        attempt: 1,
        step: 1,
        tokens,
        total_tokens: 1_048_576,
        tokens_per_second: 1000.0,
        loss: Some(2.5),
        checkpoint: Some(checkpoint(1)),
        updated_at: at,
    };
    world.now += SignedDuration::from_secs(1);
    world.observed.progress = Some(progress(524_288, world.now));
    world.step();
    let shown = world.job.status.as_ref().unwrap().progress.clone().unwrap();
    assert_eq!((shown.percent, shown.loss.as_deref()), (Some(10), Some("2.500")));
    // The rest of the small stage at 1000 tokens/s, and a large stage that is four times as long and costs more a token.
    assert!(shown.eta_seconds.unwrap() > 524 + 4 * 1049, "{shown:?}");
    assert_eq!(world.condition("CheckpointAvailable").0, "True");

    // Its own write makes the next reconcile: asked again at once, it would write for ever.
    let asked = |world: &World, seconds| {
        let later = world.now + SignedDuration::from_secs(seconds);
        job_to_ask(&world.job, later).map(str::to_owned)
    };
    assert_eq!((asked(&world, 9), asked(&world, 10).as_deref()), (None, Some("tiny-small-t1")));

    world.observed.progress = None;
    world.after(1800);
    assert_eq!(world.phase(), Phase::Training);
    let plan = world.after(1);
    assert_eq!(deletes(&plan), ["tiny-small-t1"]);
    assert_eq!(world.condition("Progressing").1, "Stalled");
    assert_eq!(world.job.status.as_ref().unwrap().restarts, Some(1));
}

#[test]
fn a_failure_counts_waits_and_ends_the_job_when_there_are_too_many() {
    let mut world = training(&[("/spec/failurePolicy/maxRestarts", json!(1))]);
    world.see_job("tiny-small-t1", &["Failed"]);
    world.see_pod("train", Some("small"), 1, ended(1, "boom"));
    let plan = world.step();
    assert_eq!((starts(&plan), world.phase()), (vec![], Phase::Restarting));
    assert_eq!(plan.requeue.unwrap().as_secs(), 10);
    assert_eq!(starts(&world.after(10)), [(Work::Train(0), 2)]);
    let failure = world.job.status.as_ref().unwrap().stages[0].last_failure.clone().unwrap();
    assert_eq!((failure.exit_code, failure.node.as_deref()), (Some(1), Some("n1")));

    world.see_job("tiny-small-t2", &["Failed"]);
    world.see_pod("train", Some("small"), 2, ended(1, "boom"));
    let plan = world.step();
    assert!(plan.writes.is_empty());
    assert_eq!(world.phase(), Phase::Failed);
    assert_eq!(world.condition("Failed").1, "MaxRestartsExceeded");
}

#[test]
fn a_disruption_is_free_and_restarts_at_once() {
    let mut world = training(&[("/spec/failurePolicy/maxRestarts", json!(0))]);
    world.see_job("tiny-small-t1", &["Failed"]);
    let mut status = ended(143, "");
    status["conditions"] =
        json!([{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]);
    world.see_pod("train", Some("small"), 1, status);
    assert_eq!(starts(&world.step()), [(Work::Train(0), 2)]);
    assert_eq!(world.job.status.as_ref().unwrap().restarts, None);
}

#[test]
fn bad_input_is_not_tried_again() {
    let mut world = training(&[]);
    world.see_job("tiny-small-t1", &["Failed"]);
    let said = serde_json::to_string(&Outcome::failed("spec.data.train[0].uri: nothing matches")).unwrap();
    world.see_pod("train", Some("small"), 1, ended(2, &said));
    assert!(world.step().writes.is_empty());
    let (_, reason, message) = world.condition("Failed");
    assert_eq!(reason, "InvalidInput");
    assert!(message.contains("nothing matches"), "{message}");
}

/// No kubelet confirms that the pod is gone, so the Job neither fails nor ends: the next attempt goes ahead.
#[test]
fn a_pod_on_a_lost_node_is_not_waited_for() {
    let mut world = training(&[]);
    let mut status = ready();
    status["conditions"][1]["status"] = json!("False");
    status["conditions"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}));
    let deadline = world.now + SignedDuration::from_secs(120);
    let pod = world.see_pod("train", Some("small"), 1, status);
    pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(deadline));
    let plan = world.step();
    assert_eq!((deletes(&plan), starts(&plan)), (vec!["tiny-small-t1"], vec![]));
    world.observed.jobs.clear();
    // Within its grace period it may still be writing its last checkpoint.
    assert_eq!(starts(&world.after(100)), []);
    assert_eq!(starts(&world.after(31)), [(Work::Train(0), 2)]);
}

/// Kubernetes marks the pods of a node that does not answer as not ready; their containers it cannot speak for.
#[test]
fn a_pod_whose_node_does_not_answer_is_given_up_long_before_kubernetes_evicts_it() {
    let mut world = training(&[("/spec/failurePolicy/maxRestarts", json!(0))]);
    let since = world.now;
    let status = json!({"phase": "Running", "conditions": [
        {"type": "PodScheduled", "status": "True"}, {"type": "ContainersReady", "status": "True"},
        {"type": "Ready", "status": "False", "lastTransitionTime": since},
    ]});
    world.see_pod("train", Some("small"), 1, status);
    let plan = world.after(19);
    assert_eq!((deletes(&plan), plan.requeue.unwrap().as_secs()), (vec![], 1));
    let plan = world.after(1);
    // Its Job will stay, for nobody confirms that its pod is gone.
    assert_eq!((deletes(&plan), starts(&plan)), (vec!["tiny-small-t1"], vec![(Work::Train(0), 2)]));
    let status = world.job.status.as_ref().unwrap();
    assert_eq!(status.stages[0].last_failure.as_ref().unwrap().reason, "NodeUnreachable");
    assert_eq!(status.restarts, None);
}

/// Else each look at the suspended job would count the failure again.
#[test]
fn a_failure_of_a_suspended_job_counts_once() {
    let mut world = training(&[]);
    world.job.spec.suspend = true;
    world.see_job("tiny-small-t1", &["Failed"]);
    world.see_pod("train", Some("small"), 1, ended(1, "boom"));
    for _ in 0..3 {
        world.after(5);
    }
    assert_eq!(world.phase(), Phase::Suspended);
    assert_eq!(world.job.status.as_ref().unwrap().restarts, Some(1));
    world.job.spec.suspend = false;
    assert_eq!(starts(&world.step()), [(Work::Train(0), 2)]);
}

#[test]
fn the_deadline_counts_only_time_at_work() {
    let mut world = training(&[("/spec/runPolicy/activeDeadlineSeconds", json!(100))]);
    world.after(60);
    world.job.spec.suspend = true;
    world.step();
    world.observed.jobs.clear();
    world.observed.pods.clear();
    world.after(10_000);
    assert_eq!(world.phase(), Phase::Suspended);
    assert_eq!(world.job.status.as_ref().unwrap().active_seconds, Some(60));
    world.job.spec.suspend = false;
    world.step();
    world.see_job("tiny-small-t2", &[]);
    world.see_pod("train", Some("small"), 2, ready());
    world.step();
    world.after(39);
    assert_eq!(world.phase(), Phase::Training);
    world.after(1);
    assert_eq!(world.condition("Failed").1, "DeadlineExceeded");
}

#[test]
fn a_queue_that_holds_the_attempt_is_named_and_stops_the_clocks() {
    let mut world = World::new(&[
        ("/spec/scheduling/queueName", json!("gpus")),
        ("/spec/runPolicy/startupDeadlineSeconds", json!(60)),
    ]);
    world.step();
    world.see_job("tiny-data--t1", &[]);
    let held = |world: &mut World, value: bool| {
        let job = std::sync::Arc::make_mut(&mut world.observed.jobs[0]);
        job.spec.get_or_insert_default().suspend = Some(value);
    };
    held(&mut world, true);
    world.after(10_000);
    assert_eq!(world.phase(), Phase::Queued);
    let (_, reason, message) = world.condition("PodsScheduled");
    assert_eq!(reason, "WaitingForQuota");
    assert!(message.contains("gpus"), "{message}");

    held(&mut world, false);
    world.see_pod(
        "data",
        None,
        1,
        json!({"phase": "Running", "conditions": [
            {"type": "PodScheduled", "status": "True"},
        ]}),
    );
    world.step();
    held(&mut world, true);
    world.after(7);
    assert_eq!(world.condition("PodsScheduled").1, "QuotaEvicted");
    assert_eq!(world.job.status.as_ref().unwrap().active_seconds, Some(7));
}

/// Found by the simulation: the leader was done, so not all could be ready any more, and a rank that hung had no deadline.
#[test]
fn a_rank_that_hangs_while_another_is_done_stalls_the_attempt() {
    let mut world = training(&[]);
    world.job.status.as_mut().unwrap().replicas = Some(2);
    world.see_pod("train", Some("small"), 1, json!({"phase": "Succeeded"}));
    world.step();
    let plan = world.after(1801);
    assert_eq!(deletes(&plan), ["tiny-small-t1"]);
    assert_eq!(world.condition("Progressing").1, "Stalled");
}

/// Found by the simulation: the pod that was done was deleted before the other was ready; only the Job knew of it.
#[test]
fn a_pod_that_is_done_and_gone_is_not_waited_for() {
    let mut world = World::new(&[]);
    world.step();
    world.succeed("tiny-data--t1", "data", None, 1, &Outcome::finished(None));
    world.see_job("tiny-small-t1", &[]);
    let job = std::sync::Arc::make_mut(world.observed.jobs.last_mut().unwrap());
    job.spec.get_or_insert_default().completions = Some(2);
    job.status.as_mut().unwrap().succeeded = Some(1);
    world.see_pod("train", Some("small"), 1, ready());
    world.step();
    assert_eq!(world.phase(), Phase::Training);
    world.after(1801);
    assert_eq!(world.condition("Progressing").1, "Stalled");
}

/// One attempt back may be read by people; older ones are not kept.
#[test]
fn jobs_of_old_attempts_go() {
    let mut world = training(&[]);
    for attempt in 1..=2 {
        let name = format!("tiny-small-t{attempt}");
        world.see_job(&name, &["Failed"]);
        for job in &mut world.observed.jobs {
            let labels = json!({
                "growth.dev/job": "tiny", "growth.dev/work": "train", "growth.dev/stage": "small",
                "growth.dev/attempt": attempt.to_string(), "app.kubernetes.io/managed-by": "growth-operator",
            });
            if job.metadata.name.as_deref() == Some(&name) {
                let job = std::sync::Arc::make_mut(job);
                job.metadata.labels = serde_json::from_value(labels).unwrap();
            }
        }
        world.see_pod("train", Some("small"), attempt, ended(1, "boom"));
        let plan = world.step();
        assert!(deletes(&plan).is_empty());
        let plan = world.after(300);
        let old: &[&str] = if attempt == 1 { &[] } else { &["tiny-small-t1"] };
        assert_eq!((deletes(&plan), starts(&plan)), (old.to_vec(), vec![(Work::Train(0), attempt + 1)]));
    }
}

#[test]
fn suspend_ends_the_pods_and_resume_goes_on_with_the_next_attempt() {
    let mut world = training(&[]);
    world.job.spec.suspend = true;
    let plan = world.step();
    assert_eq!((deletes(&plan), world.phase()), (vec!["tiny-small-t1"], Phase::Suspending));
    world.observed.jobs.clear();
    world.step();
    assert_eq!(world.phase(), Phase::Suspending);
    world.observed.pods.clear();
    world.step();
    assert_eq!(world.phase(), Phase::Suspended);
    assert_eq!(world.condition("Suspended").0, "True");

    world.job.spec.suspend = false;
    assert_eq!(starts(&world.step()), [(Work::Train(0), 2)]);
    assert_eq!(world.condition("Suspended").1, "Resumed");
    assert_eq!(world.job.status.as_ref().unwrap().restarts, None);
}

#[test]
fn a_job_that_is_suspended_from_the_start_holds_nothing() {
    let mut world = World::new(&[("/spec/suspend", json!(true))]);
    assert!(world.step().writes.is_empty());
    assert_eq!(world.phase(), Phase::Suspended);
}

#[test]
fn a_job_deleted_by_hand_is_the_end_of_its_attempt() {
    let mut world = training(&[]);
    world.observed.jobs.clear();
    // Its pods are still ending.
    assert_eq!(starts(&world.step()), []);
    world.observed.pods.clear();
    assert_eq!(starts(&world.step()), [(Work::Train(0), 2)]);
}

/// The operator died after it stored the status and before it created the Job.
#[test]
fn a_lost_creation_is_repeated() {
    let mut world = World::new(&[]);
    world.step();
    assert_eq!(starts(&world.after(60)), [(Work::Data, 1)]);
}

/// The operator died after it stored the next attempt and before it ended the Job of the last one.
#[test]
fn a_lost_deletion_is_repeated() {
    let mut world = training(&[]);
    world.observed.progress = None;
    assert_eq!(deletes(&world.after(1801)), ["tiny-small-t1"]);
    assert_eq!(deletes(&world.after(60)), ["tiny-small-t1"]);
    world.observed.jobs.clear();
    world.observed.pods.clear();
    assert_eq!(starts(&world.step()), [(Work::Train(0), 2)]);
}

/// A leader that had lost its lease in the middle of a write made a Job that was over for the one that followed it.
#[test]
fn what_another_leader_has_left_is_ended() {
    let mut world = training(&[]);
    world.see_job("tiny-small-t0", &[]);
    assert_eq!(deletes(&world.step()), ["tiny-small-t0"]);
    assert_eq!(world.phase(), Phase::Training);
}

#[test]
fn an_outcome_that_nobody_has_read_is_asked_for_again() {
    let mut world = training(&[]);
    world.see_job("tiny-small-t1", &["Complete"]);
    world.observed.pods.clear();
    assert_eq!(starts(&world.step()), [(Work::Train(0), 2)]);
}

#[test]
fn a_job_that_began_elsewhere_goes_on_with_higher_attempts() {
    let mut world = World::new(&[]);
    world.step();
    let outcome = Outcome { attempts: [("small".to_owned(), 7)].into(), ..Outcome::finished(None) };
    let plan = world.succeed("tiny-data--t1", "data", None, 1, &outcome);
    assert_eq!(starts(&plan), [(Work::Train(0), 8)]);
}

#[test]
fn deadlines_and_time_to_live() {
    let mut world = training(&[
        ("/spec/runPolicy/activeDeadlineSeconds", json!(100)),
        ("/spec/runPolicy/ttlSecondsAfterFinished", json!(50)),
    ]);
    world.after(99);
    assert_eq!(world.phase(), Phase::Training);
    let plan = world.after(1);
    assert_eq!(
        (deletes(&plan), world.condition("Failed").1.as_str()),
        (vec!["tiny-small-t1"], "DeadlineExceeded")
    );
    assert!(!world.after(49).writes.contains(&Write::DeleteSelf));
    assert!(world.after(1).writes.contains(&Write::DeleteSelf));
}

#[test]
fn an_unschedulable_pod_is_explained_and_has_a_deadline() {
    let mut world = World::new(&[("/spec/runPolicy/startupDeadlineSeconds", json!(60))]);
    world.step();
    world.see_job("tiny-data--t1", &[]);
    let why =
        json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"});
    world.see_pod("data", None, 1, json!({"phase": "Pending", "conditions": [why]}));
    world.step();
    let (status, reason, message) = world.condition("PodsScheduled");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "Unschedulable"));
    assert!(message.contains("0/2 nodes"), "{message}");
    let plan = world.after(60);
    assert_eq!(deletes(&plan), ["tiny-data--t1"]);
    assert!(world.condition("Failed").2.contains("0/2 nodes"));
}

#[test]
fn an_image_that_cannot_be_pulled_is_named() {
    let mut world = World::new(&[]);
    world.step();
    world.see_job("tiny-data--t1", &[]);
    let waiting =
        json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image \"x:1\""}});
    world.see_pod(
        "data",
        None,
        1,
        json!({
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "status": "True"}],
            "containerStatuses": [{
                "name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": waiting,
            }],
        }),
    );
    world.step();
    let (_, reason, message) = world.condition("Running");
    assert_eq!(reason, "ImagePullFailed");
    assert!(message.contains("x:1"), "{message}");
}

/// What the API server refuses is tried again and again; the status must not swing between two opinions.
#[test]
fn a_refusal_stays_until_the_job_is_taken_or_changed() {
    let mut world = World::new(&[]);
    world.step();
    let refuse = |world: &mut World| {
        let status = world.job.status.as_mut().unwrap();
        let accepted = status.conditions.iter_mut().find(|condition| condition.type_ == "Accepted").unwrap();
        (accepted.status, accepted.reason) = ("False".into(), "InvalidTemplate".into());
    };
    refuse(&mut world);
    assert_eq!(starts(&world.after(5)), [(Work::Data, 1)]);
    assert_eq!(world.condition("Accepted").1, "InvalidTemplate");
    world.job.metadata.generation = Some(2);
    world.step();
    assert_eq!(world.condition("Accepted").1, "Valid");
    refuse(&mut world);
    world.see_job("tiny-data--t1", &[]);
    world.step();
    assert_eq!(world.condition("Accepted").1, "Valid");
}

#[test]
fn foreign_and_impossible_jobs_are_left_alone() {
    let mut world = World::new(&[("/spec/managedBy", json!("example.com/other"))]);
    let plan = world.step();
    assert!(plan.writes.is_empty() && plan.status.conditions.is_empty());

    // A batch that is no whole number of sequences passes CEL and cannot be carried out.
    let mut world = World::new(&[("/spec/training/globalBatchTokens", json!(4097))]);
    assert!(world.step().writes.is_empty());
    assert_eq!(world.condition("Accepted").1, "InvalidSpec");
}

/// What nobody sets must not be promised.
#[test]
fn every_reason_is_used() {
    let sources = [
        include_str!("../src/decide.rs"),
        include_str!("../src/decide/base.rs"),
        include_str!("../src/decide/running.rs"),
        include_str!("../src/decide/scaling.rs"),
        include_str!("../src/draft.rs"),
        include_str!("../src/apply.rs"),
    ];
    for reason in growth_crds::conditions::Reason::ALL {
        let name = format!("Reason::{reason}");
        let is_used = |source: &str| {
            source
                .match_indices(&name)
                .any(|(at, _)| !source[at + name.len()..].starts_with(|next: char| next.is_alphanumeric()))
        };
        assert!(sources.iter().any(|source| is_used(source)), "{name} is never set");
    }
}

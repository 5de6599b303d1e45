//! From (job, what was seen, the time) to what is to be done. No I/O, no clock, no memory: a restarted operator decides
//! the same.
//!
//! A job's work is a list: prepare the data, then for each stage grow it (unless it is the first) and train it. The
//! first piece that is not done is the current one. Each attempt at it has a number, is recorded in the status **before**
//! its Job exists, and is over when its Job ends, is deleted, or has lost a pod; then the next number follows.

mod base;
mod running;
mod scaling;

pub use running::{PROGRESS_SECONDS, job_to_ask};

use crate::children::Attempt;
use crate::draft::{Draft, Plan, Write};
use crate::failure::{Failure, PEER_LOST, Verdict, back_off_seconds, judge, lost};
use crate::names::{LABEL_ATTEMPT, Work, labels};
use crate::observed::{Observed, is_finished, job_is, outcome};
use growth_crds::conditions::{ConditionType, Reason};
use growth_crds::plan::JobPlan;
use growth_crds::protocol::{Outcome, OutcomeResult};
use growth_crds::status::{CheckpointStatus, Phase, StageState};
use growth_crds::{GrowthTrainingJob, resolve};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use running::{record_progress, run};
use scaling::next_size;

/// Value of `managedBy` that means this operator; absent means so, too.
pub const CONTROLLER_NAME: &str = "growth.dev/growth-operator";

/// Decides.
pub fn decide(job: &GrowthTrainingJob, observed: &Observed, now: Timestamp) -> Plan {
    let mut draft = Draft::new(job, now);
    if job.metadata.deletion_timestamp.is_some() || is_managed_elsewhere(job) {
        // The garbage collector, or somebody else, does the rest.
        return Plan { status: draft.status, writes: Vec::new(), events: Vec::new(), requeue: None };
    }
    if draft.is_true(ConditionType::Complete) || draft.is_true(ConditionType::Failed) {
        clean_up(&mut draft, observed);
        return draft.finish();
    }
    let plan = match resolve(&job.name_any(), &job.spec) {
        Ok(plan) => plan,
        Err(errors) => {
            draft.set(ConditionType::Accepted, Reason::InvalidSpec, errors.to_string());
            draft.phase(Phase::Pending);
            return draft.finish();
        }
    };
    if !is_refused(&draft) {
        accept(&mut draft);
    }
    match current_work(&draft) {
        None => draft.complete(),
        Some(work) if active_deadline_is_over(&mut draft, work) => clean_up(&mut draft, observed),
        Some(work) => advance(&mut draft, observed, &plan, work),
    }
    draft.finish()
}

/// The API server did not take what this generation of the job describes. It is tried again, and until it is taken the
/// condition stays as it is.
fn is_refused(draft: &Draft<'_>) -> bool {
    draft.condition(ConditionType::Accepted).is_some_and(|condition| {
        condition.reason == Reason::InvalidTemplate.as_str()
            && condition.observed_generation == draft.job.metadata.generation
    })
}

fn accept(draft: &mut Draft<'_>) {
    draft.set(ConditionType::Accepted, Reason::Valid, "the job can be carried out");
}

fn is_managed_elsewhere(job: &GrowthTrainingJob) -> bool {
    job.spec.managed_by.as_deref().is_some_and(|name| !name.is_empty() && name != CONTROLLER_NAME)
}

/// After the end: no pods, and no object once its time to live is over.
fn clean_up(draft: &mut Draft<'_>, observed: &Observed) {
    stop_all(draft, observed);
    let Some(ttl) = draft.job.spec.run_policy.ttl_seconds_after_finished else { return };
    let Some(end) = &draft.status.completion_time else { return };
    match end.0.as_second() + ttl - draft.now.as_second() {
        left if left > 0 => draft.requeue_after(left),
        _ => draft.writes.push(Write::DeleteSelf),
    }
}

fn active_deadline_is_over(draft: &mut Draft<'_>, work: Work) -> bool {
    let Some(limit) = draft.job.spec.run_policy.active_deadline_seconds else { return false };
    let left = limit - draft.active_seconds(work);
    let runs = draft.attempt(work).is_some_and(|attempt| attempt.ready_time.is_some());
    if left > 0 {
        if runs {
            draft.requeue_after(left);
        }
        return false;
    }
    draft.stop_clock(work);
    let message = format!("not complete after {limit} s of work (spec.runPolicy.activeDeadlineSeconds)");
    draft.fail(Reason::DeadlineExceeded, message);
    true
}

/// The first piece of work that is not done.
fn current_work(draft: &Draft<'_>) -> Option<Work> {
    let is_done = |work| draft.attempt(work).is_some_and(|attempt| attempt.completion_time.is_some());
    if !is_done(Work::Data) {
        return Some(Work::Data);
    }
    draft.job.spec.stages.iter().enumerate().find_map(|(index, stage)| {
        let is_complete =
            draft.status.stages.get(index).is_some_and(|stage| stage.state == StageState::Complete);
        match () {
            () if is_complete => None,
            () if stage.growth.is_some() && !is_done(Work::Transform(index)) => Some(Work::Transform(index)),
            () => Some(Work::Train(index)),
        }
    })
}

fn advance(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, work: Work) {
    let suspended = draft.job.spec.suspend;
    let Some(attempt) = draft.attempt(work).cloned() else {
        if suspended {
            return suspend(draft, observed, work);
        }
        if work == Work::Data && base::is_awaited(draft, observed, plan) {
            return;
        }
        let number = first_number(draft, work);
        draft.begin(work, number, None);
        return start(draft, observed, plan, work);
    };
    match (observed.job(&attempt.job_name), attempt.job_uid) {
        (None, _) if suspended => suspend(draft, observed, work),
        (None, None) => start(draft, observed, plan, work),
        (None, Some(_)) => {
            let failure = match draft.is_true(ConditionType::Suspended) {
                true => Failure::planned("Suspended", "the job was suspended", draft.now),
                false => {
                    let message = format!("Job {} was deleted", attempt.job_name);
                    Failure::free("JobDeleted", &message, draft.now)
                }
            };
            restart(draft, observed, plan, work, failure);
        }
        (Some(job), _) => follow(draft, observed, plan, work, job),
    }
}

/// One more than the storage knows, which the data step has reported.
fn first_number(draft: &Draft<'_>, work: Work) -> i32 {
    let known =
        work.stage().and_then(|index| draft.status.stages.get(index)).and_then(|stage| stage.known_attempts);
    match work {
        Work::Train(_) => known.unwrap_or(0) + 1,
        Work::Data | Work::Transform(_) => 1,
    }
}

/// Creates the Job of the recorded attempt, when the attempts before it are over and its back-off is, too.
fn start(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, work: Work) {
    let Some(attempt) = draft.attempt(work).cloned() else { return };
    stop(draft, observed, |name| name != attempt.job_name);
    let others_live = observed.is_live(draft.now);
    let wait = attempt.not_before.map_or(0, |time| time.0.as_second() - draft.now.as_second());
    if others_live || wait > 0 {
        return wait_to_start(draft, attempt.number, others_live, wait);
    }
    forget_old_attempts(draft, observed, work, attempt.number);
    let replicas = next_size(draft, plan, work);
    let stage = work.stage().and_then(|index| plan.stages.get(index)).cloned().map(Box::new);
    draft.writes.push(Write::Start(Attempt { work, number: attempt.number, replicas, plan: stage }));
    draft.status.replicas = Some(replicas);
    draft.resume();
    if draft.condition(ConditionType::CheckpointAvailable).is_none() && matches!(work, Work::Train(_)) {
        draft.set(ConditionType::CheckpointAvailable, Reason::NoCheckpointYet, "none has been written yet");
    }
    draft.set(ConditionType::Running, Reason::PodsStarting, format!("starting {}", attempt.job_name));
    draft.phase(phase_of_start(work));
}

fn wait_to_start(draft: &mut Draft<'_>, number: i32, others_live: bool, wait: i64) {
    let is_told =
        draft.condition(ConditionType::Running).is_some_and(|c| c.reason == Reason::Restarting.as_str());
    if !is_told {
        draft.set(ConditionType::Running, Reason::Restarting, format!("attempt {number} is to start"));
    }
    if others_live {
        let message = format!("attempt {number} waits for the pods before it to end");
        draft.set(ConditionType::PodsScheduled, Reason::WaitingForPodsTermination, message);
    }
    draft.phase(Phase::Restarting);
    // Pods that are beyond reach become so by time alone.
    draft.requeue_after(if others_live { 5 } else { wait });
}

/// The attempt before is kept, for its logs; those before that one are not.
fn forget_old_attempts(draft: &mut Draft<'_>, observed: &Observed, work: Work, number: i32) {
    let mut same_work = labels(draft.job, work, number);
    same_work.remove(LABEL_ATTEMPT);
    let is_old = |job: &Job| {
        let attempt = job.labels().get(LABEL_ATTEMPT).and_then(|attempt| attempt.parse::<i32>().ok());
        attempt.is_some_and(|attempt| attempt + 1 < number)
            && same_work.iter().all(|(key, value)| job.labels().get(key) == Some(value))
            && job.metadata.deletion_timestamp.is_none()
    };
    let old = observed.jobs.iter().filter(|job| is_finished(job) && is_old(job));
    let writes = old.map(|job| Write::DeleteJob { job_name: job.name_any() });
    draft.writes.extend(writes);
}

fn phase_of_start(work: Work) -> Phase {
    match work {
        Work::Data => Phase::Preparing,
        Work::Transform(_) => Phase::Transforming,
        Work::Train(_) => Phase::Starting,
    }
}

fn suspend(draft: &mut Draft<'_>, observed: &Observed, work: Work) {
    draft.stop_clock(work);
    stop_all(draft, observed);
    if observed.is_live(draft.now) {
        draft.phase(Phase::Suspending);
        draft.set(ConditionType::Running, Reason::Suspended, "the pods write a checkpoint and end");
        draft.requeue_after(5);
        return;
    }
    let was_suspended = draft.is_true(ConditionType::Suspended);
    draft.set(ConditionType::Suspended, Reason::Suspended, "spec.suspend is true; no pods are held");
    draft.set(ConditionType::Running, Reason::Suspended, "spec.suspend is true");
    draft.phase(Phase::Suspended);
    draft.no_replicas();
    draft.settle_size(Reason::Suspended, "the job is suspended");
    if let Some(stage) = work.stage().and_then(|index| draft.status.stages.get_mut(index)) {
        // Whoever resumes the job may have made room.
        stage.capacity = None;
    }
    if !was_suspended {
        draft.event(false, "Suspended", "no pods are held; the last checkpoint stays".to_owned(), None);
    }
}

/// Ends every Job that is not at its end: the current attempt's, and any that an operator who died in between has left.
fn stop_all(draft: &mut Draft<'_>, observed: &Observed) {
    stop(draft, observed, |_| true);
}

fn stop(draft: &mut Draft<'_>, observed: &Observed, which: impl Fn(&str) -> bool) {
    let running =
        observed.jobs.iter().filter(|job| !is_finished(job) && job.metadata.deletion_timestamp.is_none());
    for job_name in running.map(|job| job.name_any()).filter(|name| which(name)) {
        let delete = Write::DeleteJob { job_name };
        if !draft.writes.contains(&delete) {
            draft.writes.push(delete);
        }
    }
}

/// The Job of the attempt is there: what does it say?
fn follow(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, work: Work, job: &Job) {
    accept(draft);
    let now = Time(draft.now);
    if let Some(attempt) = draft.attempt_mut(work) {
        attempt.job_uid = job.uid();
        attempt.start_time.get_or_insert(now);
    }
    // A leader that lost its lease in the middle of a write may have left another.
    stop(draft, observed, |name| name != job.name_any());
    let pods = observed.pods_of(job);
    if job_is(job, "Complete") || job_is(job, "SuccessCriteriaMet") {
        return ended(draft, observed, plan, work, outcome(&pods));
    }
    if job_is(job, "Failed") || job_is(job, "FailureTarget") {
        return match judge(job, &pods, &draft.job.spec.failure_policy, draft.now) {
            Some(failure) => restart(draft, observed, plan, work, failure),
            None => wait_for_the_last_word(draft, work),
        };
    }
    if draft.job.spec.suspend {
        return suspend(draft, observed, work);
    }
    if job.metadata.deletion_timestamp.is_some() {
        let failure = Failure::free("JobDeleted", "its Job is being deleted", draft.now);
        return restart(draft, observed, plan, work, failure);
    }
    // The Job may never fail: no kubelet confirms that the pod is gone.
    if let Some(failure) = lost(&pods, draft.now) {
        return restart(draft, observed, plan, work, failure);
    }
    run(draft, observed, plan, work, job, &pods);
}

/// All that have ended have lost another pod, and that one has not told its end yet.
fn wait_for_the_last_word(draft: &mut Draft<'_>, work: Work) {
    draft.stop_clock(work);
    draft.set(ConditionType::Running, Reason::Restarting, "the pod that the others have lost is yet to end");
    draft.phase(Phase::Restarting);
    draft.requeue_after(5);
}

/// All pods of the attempt ended well.
fn ended(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, work: Work, outcome: Option<Outcome>) {
    let finished = match outcome {
        Some(outcome) if outcome.result == OutcomeResult::Finished => outcome,
        Some(Outcome { checkpoint, .. }) => {
            keep_checkpoint(draft, work, checkpoint);
            let failure =
                Failure::planned("Stopped", "it was asked to stop and wrote a checkpoint", draft.now);
            return restart(draft, observed, plan, work, failure);
        }
        // Its pods are gone and with them their last word. The next attempt finds the work done and says so.
        None => {
            let failure =
                Failure::free("OutcomeLost", "its pods were deleted before they were read", draft.now);
            return restart(draft, observed, plan, work, failure);
        }
    };
    let now = Time(draft.now);
    draft.stop_clock(work);
    let name = draft.attempt(work).map(|attempt| attempt.job_name.clone());
    if let Some(attempt) = draft.attempt_mut(work) {
        attempt.completion_time = Some(now.clone());
    }
    match work {
        Work::Data => {
            for (index, stage) in draft.job.spec.stages.iter().enumerate() {
                if let Some(known) = finished.attempts.get(&stage.name).filter(|known| **known > 0) {
                    draft.stage_mut(index).known_attempts = Some(*known);
                }
            }
            draft.event(false, "DataPrepared", "the data is prepared".to_owned(), name.clone());
            if let Some(checkpoint) = finished.checkpoint {
                complete_stage(draft, plan, 0, Some(checkpoint), name);
            }
        }
        Work::Transform(index) => {
            let stage = draft.job.spec.stages[index].name.clone();
            keep_checkpoint(draft, work, finished.checkpoint);
            let mut note = format!("stage {stage} has its first checkpoint");
            if let Some(growth) = &finished.growth {
                note = format!("{note}: {growth}");
            }
            draft.stage_mut(index).growth = finished.growth;
            draft.event(false, "StageGrown", note, name);
        }
        Work::Train(index) => {
            complete_stage(draft, plan, index, finished.checkpoint, name);
        }
    }
    draft.set(ConditionType::Running, Reason::StageTransition, "the next step follows");
    match current_work(draft) {
        None => draft.complete(),
        Some(next) => advance(draft, observed, plan, next),
    }
}

/// A stage has trained all its tokens; or another job has, for this one.
fn complete_stage(
    draft: &mut Draft<'_>,
    plan: &JobPlan,
    index: usize,
    checkpoint: Option<CheckpointStatus>,
    by: Option<String>,
) {
    let tokens = plan.stages.get(index).map_or(0, |stage| stage.tokens);
    keep_checkpoint(draft, Work::Train(index), checkpoint);
    let now = Time(draft.now);
    let stage = draft.stage_mut(index);
    stage.state = StageState::Complete;
    stage.completion_time = Some(now);
    let stage = stage.name.clone();
    record_progress(draft, plan, index, tokens, None);
    draft.settle_size(Reason::StageTransition, &format!("stage {stage} is complete"));
    draft.event(false, "StageComplete", format!("stage {stage} is complete"), by);
}

fn keep_checkpoint(draft: &mut Draft<'_>, work: Work, checkpoint: Option<CheckpointStatus>) {
    let (Some(index), Some(checkpoint)) = (work.stage(), checkpoint) else { return };
    let message = format!("step {} at {}", checkpoint.step, checkpoint.uri);
    let stage = draft.stage_mut(index);
    if stage.checkpoint.as_ref() == Some(&checkpoint) {
        return;
    }
    stage.checkpoint = Some(checkpoint);
    draft.set(ConditionType::CheckpointAvailable, Reason::Committed, message);
}

/// Another attempt follows, or the job fails.
fn restart(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, work: Work, failure: Failure) {
    let Some(attempt) = draft.attempt(work).cloned() else { return };
    draft.stop_clock(work);
    stop_all(draft, observed);
    let text = failure.status.message.clone().unwrap_or_else(|| failure.status.reason.clone());
    let is_planned = failure.verdict == Verdict::Planned;
    let is_peer_lost = failure.status.reason == PEER_LOST;
    let note = format!("attempt {} ended: {}: {text}", attempt.number, failure.status.reason);
    draft.event(!is_planned, "AttemptEnded", note, Some(attempt.job_name.clone()));
    if let Some(index) = work.stage() {
        let stage = draft.stage_mut(index);
        stage.ready_replicas = Some(0);
        if !is_planned {
            stage.last_failure = Some(failure.status);
        }
    }
    let not_before = match failure.verdict {
        // Nobody can tell whose fault it was, so it may happen again at once.
        Verdict::Free if is_peer_lost => Some(after(draft, back_off_seconds(1))),
        Verdict::Planned | Verdict::Free => None,
        Verdict::BadInput => return draft.fail(Reason::InvalidInput, text),
        Verdict::Rule(name) => {
            let message = format!("rule {name} of spec.failurePolicy: {text}");
            return draft.fail(Reason::FailurePolicyRule, message);
        }
        Verdict::Counted => match count_restart(draft) {
            Ok(restarts) => Some(after(draft, back_off_seconds(restarts))),
            Err(limit) => {
                let reason = match work {
                    Work::Transform(_) => Reason::TransformFailed,
                    _ => Reason::MaxRestartsExceeded,
                };
                let message =
                    format!("more than {limit} restarts (spec.failurePolicy.maxRestarts); the last: {text}");
                return draft.fail(reason, message);
            }
        },
    };
    // Recorded even when the job is suspended: else this failure would be met, and counted, again.
    draft.begin(work, attempt.number + 1, not_before);
    if draft.job.spec.suspend {
        return suspend(draft, observed, work);
    }
    let message = format!("attempt {} follows: {text}", attempt.number + 1);
    draft.set(ConditionType::Running, Reason::Restarting, message);
    draft.phase(Phase::Restarting);
    start(draft, observed, plan, work);
}

fn after(draft: &Draft<'_>, seconds: i64) -> Timestamp {
    draft.now + jiff::SignedDuration::from_secs(seconds)
}

/// Counts a restart in the window. Errors: the limit, when it is exceeded.
fn count_restart(draft: &mut Draft<'_>) -> Result<i32, i32> {
    let policy = &draft.job.spec.failure_policy;
    let now = draft.now;
    let status = &mut draft.status;
    let window_is_over = match (policy.window_seconds, &status.restart_window_start) {
        (Some(window), Some(start)) => now.as_second() - start.0.as_second() > window,
        _ => false,
    };
    if window_is_over {
        (status.restarts_in_window, status.restart_window_start) = (None, None);
    }
    let counted = status.restarts_in_window.unwrap_or(0) + 1;
    if counted > policy.max_restarts {
        return Err(policy.max_restarts);
    }
    status.restart_window_start.get_or_insert(Time(now));
    status.restarts_in_window = Some(counted);
    status.restarts = Some(status.restarts.unwrap_or(0) + 1);
    Ok(counted)
}

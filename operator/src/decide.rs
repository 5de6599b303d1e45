//! From (job, what was seen, the time) to what is to be done. No I/O, no clock, no memory: a restarted operator decides
//! the same.
//!
//! A job's work is a list: prepare the data, then for each stage grow it (unless it is the first) and train it. The
//! first piece that is not done is the current one. Each attempt at it has a number, is recorded in the status **before**
//! its Job exists, and is over when its Job ends, is deleted, or has lost a pod; then the next number follows.

use crate::draft::{Draft, Plan, Write};
use crate::failure::{Failure, Verdict, back_off_seconds, judge};
use crate::names::Work;
use crate::observed::{Observed, condition, is_out_of_reach, is_true, job_is, outcome, trainer_status};
use growth_crds::conditions::{ConditionType, Reason};
use growth_crds::plan::JobPlan;
use growth_crds::protocol::{Outcome, OutcomeResult, Progress};
use growth_crds::status::{CheckpointStatus, Phase, ProgressStatus, StageState};
use growth_crds::{GrowthTrainingJob, resolve};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

/// Value of `managedBy` that means this operator; absent means so, too.
pub const CONTROLLER_NAME: &str = "growth.dev/growth-operator";

/// How often a running attempt is asked for its progress.
pub const PROGRESS_SECONDS: i64 = 10;

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
    if active_deadline_is_over(&mut draft) {
        clean_up(&mut draft, observed);
        return draft.finish();
    }
    match current_work(&draft) {
        None => draft.complete(),
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

fn active_deadline_is_over(draft: &mut Draft<'_>) -> bool {
    let (Some(limit), Some(start)) =
        (draft.job.spec.run_policy.active_deadline_seconds, &draft.status.start_time)
    else {
        return false;
    };
    let left = start.0.as_second() + limit - draft.now.as_second();
    if left > 0 {
        draft.requeue_after(left);
        return false;
    }
    let message = format!("not complete {limit} s after its start (spec.runPolicy.activeDeadlineSeconds)");
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
    let Some(attempt) = draft.attempt(work).cloned() else {
        if draft.job.spec.suspend {
            return suspend(draft, observed);
        }
        let number = first_number(draft, work);
        draft.begin(work, number, None);
        return start(draft, observed, work);
    };
    match (observed.job(&attempt.job_name), attempt.job_uid) {
        (None, _) if draft.job.spec.suspend => suspend(draft, observed),
        (None, None) => start(draft, observed, work),
        (None, Some(_)) => {
            let message = format!("Job {} was deleted", attempt.job_name);
            let failure = Failure::free("JobDeleted", &message, draft.now);
            restart(draft, observed, work, failure);
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

fn replicas(job: &GrowthTrainingJob, work: Work) -> i32 {
    let Work::Train(index) = work else { return 1 };
    let stage = &job.spec.stages[index];
    match (&stage.elastic, stage.replicas) {
        (Some(elastic), _) => {
            let wanted = job.spec.replicas.clamp(elastic.min_replicas, elastic.max_replicas);
            let allowed = elastic.allowed_replicas.iter().flatten().copied();
            allowed.filter(|size| *size <= wanted).max().unwrap_or(wanted)
        }
        (None, fixed) => fixed.unwrap_or(1),
    }
}

/// Creates the Job of the recorded attempt, when the pods of the attempt before are gone and its back-off is over.
fn start(draft: &mut Draft<'_>, observed: &Observed, work: Work) {
    let Some(attempt) = draft.attempt(work).cloned() else { return };
    stop(draft, observed, |name| name != attempt.job_name);
    let wait = attempt.not_before.map_or(0, |time| time.0.as_second() - draft.now.as_second());
    if !draft.writes.is_empty() || observed.has_live_pods(draft.now) || wait > 0 {
        let is_told =
            draft.condition(ConditionType::Running).is_some_and(|c| c.reason == Reason::Restarting.as_str());
        if !is_told {
            let message = format!("attempt {} waits for the pods before it to end", attempt.number);
            draft.set(ConditionType::Running, Reason::Restarting, message);
        }
        draft.phase(Phase::Restarting);
        draft.requeue_after(if wait > 0 { wait } else { 5 });
        return;
    }
    let replicas = replicas(draft.job, work);
    draft.writes.push(Write::Start { work, attempt: attempt.number, replicas });
    draft.status.replicas = Some(replicas);
    if let Some(index) = work.stage() {
        draft.stage_mut(index).desired_replicas = Some(replicas);
    }
    if draft.condition(ConditionType::Suspended).is_some() {
        draft.set(ConditionType::Suspended, Reason::Resumed, "the job is no longer suspended");
    }
    draft.set(ConditionType::Running, Reason::PodsStarting, format!("starting {}", attempt.job_name));
    draft.phase(phase_of_start(work));
    // If the Job is not seen by then, its creation was lost.
    draft.requeue_after(10);
}

fn phase_of_start(work: Work) -> Phase {
    match work {
        Work::Data => Phase::Preparing,
        Work::Transform(_) => Phase::Transforming,
        Work::Train(_) => Phase::Starting,
    }
}

fn suspend(draft: &mut Draft<'_>, observed: &Observed) {
    stop_all(draft, observed);
    if observed.has_live_pods(draft.now) || !draft.writes.is_empty() {
        draft.phase(Phase::Suspending);
        draft.set(ConditionType::Running, Reason::Suspended, "the pods write a checkpoint and end");
        draft.requeue_after(5);
        return;
    }
    let was_suspended = draft.is_true(ConditionType::Suspended);
    draft.set(ConditionType::Suspended, Reason::Suspended, "spec.suspend is true; no pods are held");
    draft.set(ConditionType::Running, Reason::Suspended, "spec.suspend is true");
    draft.phase(Phase::Suspended);
    draft.status.ready_replicas = Some(0);
    draft.status.replicas = Some(0);
    if !was_suspended {
        draft.event(false, "Suspended", "no pods are held; the last checkpoint stays".to_owned(), None);
    }
}

fn is_finished(job: &Job) -> bool {
    job_is(job, "Complete") || job_is(job, "Failed")
}

/// Ends every Job that is not at its end: the current attempt's, and any that an operator who died in between has left.
fn stop_all(draft: &mut Draft<'_>, observed: &Observed) {
    stop(draft, observed, |_| true);
}

fn stop(draft: &mut Draft<'_>, observed: &Observed, which: impl Fn(&str) -> bool) {
    let running =
        observed.jobs.iter().filter(|job| !is_finished(job) && job.metadata.deletion_timestamp.is_none());
    let names: Vec<String> = running.map(|job| job.name_any()).filter(|name| which(name)).collect();
    for job_name in names {
        let stop = Write::Stop { job_name };
        if !draft.writes.contains(&stop) {
            draft.writes.push(stop);
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
    let number = draft.attempt(work).map_or(0, |attempt| attempt.number);
    let pods = observed.pods_of(draft.job, work, number);
    if job_is(job, "Complete") || job_is(job, "SuccessCriteriaMet") {
        return ended(draft, observed, plan, work, outcome(&pods));
    }
    if job_is(job, "Failed") || job_is(job, "FailureTarget") {
        let failure = judge(&pods, &draft.job.spec.failure_policy, draft.now);
        return restart(draft, observed, work, failure);
    }
    if draft.job.spec.suspend {
        return suspend(draft, observed);
    }
    if job.metadata.deletion_timestamp.is_some() {
        let failure = Failure::free("JobDeleted", "its Job is being deleted", draft.now);
        return restart(draft, observed, work, failure);
    }
    let lost = pods.iter().any(|pod| is_true(pod, "DisruptionTarget") || is_out_of_reach(pod, draft.now));
    if lost {
        // The Job may never fail: no kubelet confirms that the pod is gone.
        let failure = judge(&pods, &draft.job.spec.failure_policy, draft.now);
        let failure = Failure { verdict: Verdict::Free, ..failure };
        return restart(draft, observed, work, failure);
    }
    run(draft, observed, plan, work, &pods);
}

/// All pods of the attempt ended well.
fn ended(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, work: Work, outcome: Option<Outcome>) {
    let finished = match outcome {
        Some(outcome) if outcome.result == OutcomeResult::Finished => outcome,
        Some(Outcome { checkpoint, .. }) => {
            keep_checkpoint(draft, work, checkpoint);
            let failure = Failure::free("Stopped", "it was asked to stop and wrote a checkpoint", draft.now);
            return restart(draft, observed, work, failure);
        }
        // Its pods are gone and with them their last word. The next attempt finds the work done and says so.
        None => {
            let failure =
                Failure::free("OutcomeLost", "its pods were deleted before they were read", draft.now);
            return restart(draft, observed, work, failure);
        }
    };
    let now = Time(draft.now);
    let name = draft.attempt(work).map(|attempt| attempt.job_name.clone());
    if let Some(attempt) = draft.attempt_mut(work) {
        attempt.completion_time = Some(now.clone());
    }
    match work {
        Work::Data => {
            for (index, stage) in draft.job.spec.stages.iter().enumerate() {
                if let Some(known) = finished.attempts.get(&stage.name) {
                    draft.stage_mut(index).known_attempts = Some(*known);
                }
            }
            draft.event(false, "DataPrepared", "the data is prepared".to_owned(), name);
        }
        Work::Transform(index) => {
            let stage = draft.job.spec.stages[index].name.clone();
            keep_checkpoint(draft, work, finished.checkpoint);
            draft.event(false, "StageGrown", format!("stage {stage} has its first checkpoint"), name);
        }
        Work::Train(index) => {
            let tokens = plan.stages.get(index).map_or(0, |stage| stage.tokens);
            keep_checkpoint(draft, work, finished.checkpoint);
            let stage = draft.stage_mut(index);
            stage.state = StageState::Complete;
            stage.completion_time = Some(now);
            let stage = stage.name.clone();
            record_progress(draft, plan, index, tokens, None);
            draft.event(false, "StageComplete", format!("stage {stage} is complete"), name);
        }
    }
    draft.set(ConditionType::Running, Reason::StageTransition, "the next step follows");
    match current_work(draft) {
        None => draft.complete(),
        Some(next) => advance(draft, observed, plan, next),
    }
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
fn restart(draft: &mut Draft<'_>, observed: &Observed, work: Work, failure: Failure) {
    let Some(attempt) = draft.attempt(work).cloned() else { return };
    stop_all(draft, observed);
    let text = failure.status.message.clone().unwrap_or_else(|| failure.status.reason.clone());
    let is_planned =
        failure.verdict == Verdict::Free && ["Stopped", "Suspended"].contains(&&*failure.status.reason);
    let note = format!("attempt {} ended: {}: {text}", attempt.number, failure.status.reason);
    draft.event(!is_planned, "AttemptEnded", note, Some(attempt.job_name.clone()));
    if let Some(index) = work.stage() {
        draft.stage_mut(index).last_failure = Some(failure.status.clone());
        draft.stage_mut(index).ready_replicas = Some(0);
    }
    let not_before = match &failure.verdict {
        Verdict::Free => None,
        Verdict::BadInput => return draft.fail(Reason::InvalidInput, text),
        Verdict::Rule(name) => {
            let message = format!("rule {name} of spec.failurePolicy: {text}");
            return draft.fail(Reason::FailurePolicyRule, message);
        }
        Verdict::Counted => match count_restart(draft) {
            Ok(restarts) => Some(draft.now + jiff::SignedDuration::from_secs(back_off_seconds(restarts))),
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
    if draft.job.spec.suspend {
        return suspend(draft, observed);
    }
    draft.begin(work, attempt.number + 1, not_before);
    draft.set(
        ConditionType::Running,
        Reason::Restarting,
        format!("attempt {} follows: {text}", attempt.number + 1),
    );
    draft.phase(Phase::Restarting);
    start(draft, observed, work);
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

/// The attempt goes on: tell how it does, and watch its deadlines.
fn run(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, work: Work, pods: &[&Pod]) {
    let desired = replicas_of(draft, work);
    let ready = i32::try_from(pods.iter().filter(|pod| is_at_work(pod, work)).count()).unwrap_or(i32::MAX);
    if let Some(index) = work.stage() {
        draft.stage_mut(index).ready_replicas = Some(ready);
    }
    draft.status.ready_replicas = Some(ready);
    let scheduled = tell_scheduling(draft, pods, desired);
    let now = Time(draft.now);
    if ready < desired {
        draft.phase(if scheduled || work == Work::Data { phase_of_start(work) } else { Phase::Queued });
        tell_starting(draft, pods);
        return watch_startup_deadline(draft, observed, work);
    }
    if let Some(attempt) = draft.attempt_mut(work)
        && attempt.ready_time.is_none()
    {
        attempt.ready_time = Some(now);
        let name = attempt.job_name.clone();
        draft.event(false, "Running", "all pods are ready".to_owned(), Some(name));
    }
    match work {
        Work::Data => {
            draft.set(ConditionType::Running, Reason::TransformRunning, "the data is being prepared");
            draft.phase(Phase::Preparing);
        }
        Work::Transform(_) => {
            draft.set(ConditionType::Running, Reason::TransformRunning, "the model is being grown");
            draft.phase(Phase::Transforming);
        }
        Work::Train(index) => train(draft, observed, plan, index),
    }
}

fn replicas_of(draft: &Draft<'_>, work: Work) -> i32 {
    let stage = work.stage().and_then(|index| draft.status.stages.get(index));
    match work {
        Work::Train(_) => stage.and_then(|stage| stage.desired_replicas).unwrap_or(1),
        Work::Data | Work::Transform(_) => 1,
    }
}

/// Trainers say that they are ready; the others just run.
fn is_at_work(pod: &Pod, work: Work) -> bool {
    match work {
        Work::Train(_) => is_true(pod, "Ready"),
        Work::Data | Work::Transform(_) => crate::observed::phase(pod) == "Running",
    }
}

fn tell_scheduling(draft: &mut Draft<'_>, pods: &[&Pod], desired: i32) -> bool {
    let unscheduled = pods.iter().find_map(|pod| {
        let (status, reason, message) = condition(pod, "PodScheduled")?;
        (status == "False").then(|| format!("pod {}: {reason}: {message}", pod.name_any()))
    });
    if let Some(message) = unscheduled {
        draft.set(ConditionType::PodsScheduled, Reason::Unschedulable, message);
        return false;
    }
    let scheduled = pods.iter().filter(|pod| is_true(pod, "PodScheduled")).count();
    if i32::try_from(scheduled).unwrap_or(i32::MAX) < desired {
        let message = format!("{scheduled} of {desired} pods have a node");
        draft.set(ConditionType::PodsScheduled, Reason::WaitingForNodes, message);
        return false;
    }
    draft.set(
        ConditionType::PodsScheduled,
        Reason::AllPodsScheduled,
        format!("{desired} of {desired} pods have a node"),
    );
    true
}

/// What keeps a pod from starting, in the kubelet's words.
fn tell_starting(draft: &mut Draft<'_>, pods: &[&Pod]) {
    let waiting = pods.iter().find_map(|pod| {
        let waiting = trainer_status(pod)?.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref()?;
        let message = waiting.message.as_deref().unwrap_or_default();
        (reason != "ContainerCreating" && reason != "PodInitializing")
            .then(|| (reason.to_owned(), format!("pod {}: {reason}: {message}", pod.name_any())))
    });
    match waiting {
        Some((reason, message)) if reason.contains("Image") => {
            draft.set(ConditionType::Running, Reason::ImagePullFailed, message);
        }
        Some((_, message)) => draft.set(ConditionType::Running, Reason::PodsStarting, message),
        None => draft.set(ConditionType::Running, Reason::PodsStarting, "pods are starting"),
    }
}

fn watch_startup_deadline(draft: &mut Draft<'_>, observed: &Observed, work: Work) {
    let Some(limit) = draft.job.spec.run_policy.startup_deadline_seconds else { return };
    let Some(attempt) = draft.attempt(work).filter(|attempt| attempt.ready_time.is_none()) else { return };
    let Some(start) = &attempt.start_time else { return };
    let left = start.0.as_second() + limit - draft.now.as_second();
    if left > 0 {
        return draft.requeue_after(left);
    }
    let why = [ConditionType::PodsScheduled, ConditionType::Running]
        .iter()
        .filter_map(|kind| draft.condition(*kind))
        .find(|condition| condition.status == "False")
        .map_or(String::new(), |condition| condition.message.clone());
    let message = format!("not ready within {limit} s (spec.runPolicy.startupDeadlineSeconds): {why}");
    stop_all(draft, observed);
    draft.fail(Reason::StartupDeadlineExceeded, message);
}

fn train(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, index: usize) {
    let work = Work::Train(index);
    let attempt = draft.attempt(work).cloned().unwrap_or_default();
    draft.set(ConditionType::Running, Reason::TrainersReady, "all trainers are ready");
    draft.phase(Phase::Training);
    draft.requeue_after(PROGRESS_SECONDS);
    let stage = &draft.job.spec.stages[index].name;
    let report =
        observed.progress.as_ref().filter(|said| &said.stage == stage && said.attempt == attempt.number);
    if let Some(report) = report {
        keep_checkpoint(draft, work, report.checkpoint.clone());
        record_progress(draft, plan, index, report.tokens, Some(report));
    }
    let limit = draft.job.spec.run_policy.progress_deadline_seconds;
    let last_step = report.map(|report| report.updated_at).or(last_update(draft, &attempt));
    let since = last_step.max(attempt.ready_time.map(|time| time.0));
    let silent = since.map_or(0, |time| draft.now.as_second() - time.as_second());
    if silent > limit {
        let message = format!("no step for {silent} s (spec.runPolicy.progressDeadlineSeconds is {limit})");
        draft.set(ConditionType::Progressing, Reason::Stalled, message.clone());
        let failure = Failure::counted("Stalled", &message, draft.now);
        return restart(draft, observed, work, failure);
    }
    match report {
        Some(_) => draft.set(ConditionType::Progressing, Reason::StepsAdvancing, "steps advance"),
        None if draft.condition(ConditionType::Progressing).is_none() => {
            draft.set(ConditionType::Progressing, Reason::NotReported, "the trainer has not reported yet");
        }
        None => {}
    }
}

/// When this attempt was last heard of.
fn last_update(draft: &Draft<'_>, attempt: &growth_crds::status::AttemptStatus) -> Option<Timestamp> {
    let updated = draft.status.progress.as_ref()?.last_updated.as_ref()?.0;
    (Some(updated) > attempt.start_time.as_ref().map(|time| time.0)).then_some(updated)
}

/// Progress of the whole job, from the tokens of the stage at `index`.
fn record_progress(
    draft: &mut Draft<'_>,
    plan: &JobPlan,
    index: usize,
    tokens: u64,
    report: Option<&Progress>,
) {
    let before: u64 = plan.stages.iter().take(index).map(|stage| stage.tokens).sum();
    let total: u64 = plan.stages.iter().map(|stage| stage.tokens).sum();
    let done = before + tokens;
    let speed = report.map(|report| report.tokens_per_second).filter(|speed| *speed > 0.0);
    let eta = speed.and_then(|speed| eta_seconds(plan, index, tokens, speed));
    let old = draft.status.progress.clone().unwrap_or_default();
    let whole = |value: f64| Some(value.round() as i64);
    draft.status.progress = Some(ProgressStatus {
        percent: i32::try_from(done.saturating_mul(100) / total.max(1)).ok(),
        tokens: i64::try_from(done).ok(),
        tokens_per_second: speed.and_then(whole).or(old.tokens_per_second),
        loss: report.and_then(|report| report.loss).map(|loss| format!("{loss:.3}")).or(old.loss),
        eta_seconds: eta.and_then(whole).or(old.eta_seconds),
        last_updated: Some(Time(report.map_or(draft.now, |report| report.updated_at))),
    });
}

/// Seconds to the end of the job when arithmetic goes on as fast as now: a token of a grown stage costs more.
fn eta_seconds(plan: &JobPlan, index: usize, tokens: u64, tokens_per_second: f64) -> Option<f64> {
    let stage = plan.stages.get(index)?;
    let flops = |stage: &growth_crds::StagePlan| stage.flops.exact;
    let share = tokens as f64 / stage.tokens.max(1) as f64;
    let left = flops(stage) * (1.0 - share) + plan.stages.iter().skip(index + 1).map(flops).sum::<f64>();
    let speed = tokens_per_second * flops(stage) / stage.tokens.max(1) as f64;
    (speed > 0.0).then(|| left / speed)
}

/// The Job whose rank 0 should be asked for progress.
pub fn job_to_ask(job: &GrowthTrainingJob) -> Option<&str> {
    let status = job.status.as_ref()?;
    if status.phase != Some(Phase::Training) {
        return None;
    }
    let stage = status.stages.iter().find(|stage| stage.state == StageState::Training)?;
    Some(&stage.attempt.as_ref()?.job_name)
}

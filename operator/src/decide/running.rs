//! An attempt runs: what is told of it, and its deadlines.

use super::scaling::{Gang, resize};
use super::{keep_checkpoint, phase_of_start, restart, stop_all};
use crate::draft::Draft;
use crate::failure::Failure;
use crate::names::Work;
use crate::observed::{
    Observed, UNREACHABLE_SECONDS, condition, is_true, phase, size, trainer_status, unreachable_since,
};
use growth_crds::conditions::{ConditionType, Reason};
use growth_crds::plan::{JobPlan, StagePlan};
use growth_crds::protocol::Progress;
use growth_crds::status::{AttemptStatus, Phase, ProgressStatus, StageState};
use growth_crds::{GrowthTrainingJob, GrowthTrainingJobStatus};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

/// How often a running attempt is asked for its progress.
pub const PROGRESS_SECONDS: i64 = 10;

/// The attempt goes on: tell how it does, and watch its deadlines.
pub(super) fn run(
    draft: &mut Draft<'_>,
    observed: &Observed,
    plan: &JobPlan,
    work: Work,
    job: &Job,
    pods: &[&Pod],
) {
    let desired = size(job).or(draft.status.replicas).unwrap_or(1);
    draft.status.replicas = Some(desired);
    let count = |holds: &dyn Fn(&Pod) -> bool| {
        i32::try_from(pods.iter().filter(|pod| holds(pod)).count()).unwrap_or(i32::MAX)
    };
    let ready = count(&|pod| is_at_work(pod, work));
    // A rank may be done before another is ready, and its pod deleted.
    let done = job.status.as_ref().and_then(|status| status.succeeded).unwrap_or(0);
    let started = ready + done.max(count(&|pod| phase(pod) == "Succeeded"));
    if let Some(index) = work.stage() {
        draft.stage_mut(index).ready_replicas = Some(ready);
    }
    draft.status.ready_replicas = Some(ready);
    let was_ready = draft.attempt(work).is_some_and(|attempt| attempt.ready_time.is_some());
    let is_held = job.spec.as_ref().is_some_and(|spec| spec.suspend == Some(true));
    let is_starting = is_held || (started < desired && !was_ready);
    if let Work::Train(index) = work
        && is_starting
        && let Some(failure) = resize(draft, plan, &Gang { index, size: desired, pods, is_ready: false })
    {
        return restart(draft, observed, plan, work, failure);
    }
    if is_held {
        return wait_for_quota(draft, work);
    }
    if let Some(since) = pods.iter().filter_map(|pod| unreachable_since(pod)).min() {
        draft.requeue_after(since.as_second() + UNREACHABLE_SECONDS - draft.now.as_second());
    }
    let scheduled = tell_scheduling(draft, pods, desired);
    let now = Time(draft.now);
    if is_starting {
        draft.phase(if scheduled || work == Work::Data { phase_of_start(work) } else { Phase::Queued });
        tell_starting(draft, pods);
        return watch_startup_deadline(draft, observed, job);
    }
    if let Some(attempt) = draft.attempt_mut(work)
        && !was_ready
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
        Work::Train(index) => {
            train(draft, observed, plan, &Gang { index, size: desired, pods, is_ready: true });
        }
    }
}

/// Only a queue suspends the Job of an attempt: it has not admitted it, or has taken the quota back.
fn wait_for_quota(draft: &mut Draft<'_>, work: Work) {
    let had_pods = draft.attempt(work).is_some_and(|attempt| attempt.ready_time.is_some());
    draft.stop_clock(work);
    let queue = draft.job.spec.scheduling.queue_name.clone().unwrap_or_default();
    let was_evicted = draft
        .condition(ConditionType::PodsScheduled)
        .is_some_and(|condition| condition.reason == Reason::QuotaEvicted.as_str());
    let (reason, message) = match had_pods || was_evicted {
        true => (Reason::QuotaEvicted, format!("queue {queue} took the quota back")),
        false => (Reason::WaitingForQuota, format!("queue {queue} has not admitted the attempt yet")),
    };
    draft.set(ConditionType::PodsScheduled, reason, message);
    draft.set(ConditionType::Running, Reason::PodsStarting, "waits for the queue");
    draft.phase(Phase::Queued);
}

/// Trainers say that they are ready; the others just run.
fn is_at_work(pod: &Pod, work: Work) -> bool {
    match work {
        Work::Train(_) => is_true(pod, "Ready"),
        Work::Data | Work::Transform(_) => phase(pod) == "Running",
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

/// Its clock is that of the Job, which stands still while a queue holds it.
fn watch_startup_deadline(draft: &mut Draft<'_>, observed: &Observed, job: &Job) {
    let Some(limit) = draft.job.spec.run_policy.startup_deadline_seconds else { return };
    let Some(start) = job.status.as_ref().and_then(|status| status.start_time.as_ref()) else { return };
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

fn train(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan, gang: &Gang<'_>) {
    let index = gang.index;
    let work = Work::Train(index);
    let attempt = draft.attempt(work).cloned().unwrap_or_default();
    draft.set(ConditionType::Running, Reason::TrainersReady, "all trainers are ready");
    draft.requeue_after(PROGRESS_SECONDS);
    let stage = &draft.job.spec.stages[index].name;
    let report =
        observed.progress.as_ref().filter(|said| &said.stage == stage && said.attempt == attempt.number);
    let has_all_tokens = match report {
        Some(report) => report.tokens >= report.total_tokens,
        None => draft.status.phase == Some(Phase::Committing),
    };
    draft.phase(if has_all_tokens { Phase::Committing } else { Phase::Training });
    if let Some(report) = report {
        keep_checkpoint(draft, work, report.checkpoint.clone());
        record_progress(draft, plan, index, report.tokens, Some(report));
    }
    let limit = draft.job.spec.run_policy.progress_deadline_seconds;
    let last_step = report.map(|report| report.updated_at).or(last_update(&draft.status, &attempt));
    let since = last_step.max(attempt.ready_time.map(|time| time.0));
    let silent = since.map_or(0, |time| draft.now.as_second() - time.as_second());
    if silent > limit {
        let message = format!("no step for {silent} s (spec.runPolicy.progressDeadlineSeconds is {limit})");
        draft.set(ConditionType::Progressing, Reason::Stalled, message.clone());
        let failure = Failure::counted("Stalled", &message, draft.now);
        return restart(draft, observed, plan, work, failure);
    }
    match report {
        Some(_) => draft.set(ConditionType::Progressing, Reason::StepsAdvancing, "steps advance"),
        None if draft.condition(ConditionType::Progressing).is_none() => {
            draft.set(ConditionType::Progressing, Reason::NotReported, "the trainer has not reported yet");
        }
        None => {}
    }
    if !has_all_tokens && let Some(failure) = resize(draft, plan, gang) {
        restart(draft, observed, plan, work, failure);
    }
}

/// When this attempt was last heard of.
fn last_update(status: &GrowthTrainingJobStatus, attempt: &AttemptStatus) -> Option<Timestamp> {
    let updated = status.progress.as_ref()?.last_updated.as_ref()?.0;
    (Some(updated) > attempt.start_time.as_ref().map(|time| time.0)).then_some(updated)
}

/// Progress of the whole job, from the tokens of the stage at `index`.
pub(super) fn record_progress(
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
    let flops = |stage: &StagePlan| stage.flops.exact;
    let share = tokens as f64 / stage.tokens.max(1) as f64;
    let left = flops(stage) * (1.0 - share) + plan.stages.iter().skip(index + 1).map(flops).sum::<f64>();
    let speed = tokens_per_second * flops(stage) / stage.tokens.max(1) as f64;
    (speed > 0.0).then(|| left / speed)
}

/// The Job whose rank 0 should be asked for progress: not before [`PROGRESS_SECONDS`] are over, for what is stored makes
/// the next reconcile, and would be stored anew each time.
pub fn job_to_ask(job: &GrowthTrainingJob, now: Timestamp) -> Option<&str> {
    let status = job.status.as_ref()?;
    if !matches!(status.phase, Some(Phase::Training | Phase::Committing)) {
        return None;
    }
    let stage = status.stages.iter().find(|stage| stage.state == StageState::Training)?;
    let attempt = stage.attempt.as_ref()?;
    let heard = last_update(status, attempt).map_or(0, |heard| heard.as_second());
    (now.as_second() - heard >= PROGRESS_SECONDS).then_some(&attempt.job_name)
}

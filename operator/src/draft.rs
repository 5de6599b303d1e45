//! The status as it will be, and the side effects that follow it. Every change of the status goes through here, so that
//! conditions keep their rules: never removed, a transition time only when the status changes, terminal ones final.

use growth_crds::conditions::{ConditionType, Reason};
use growth_crds::status::{AttemptStatus, Phase, StageState, StageStatus};
use growth_crds::{GrowthTrainingJob, GrowthTrainingJobStatus};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use std::time::Duration;

use crate::children::Attempt;
use crate::names::{Work, attempt_name, trainer_selector};

/// What is to be done: the status first, then the writes in order, then the events.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The status to store, when it differs from the one that was read.
    pub status: GrowthTrainingJobStatus,
    /// Side effects. Any prefix of them may be all that happens; each may be repeated.
    pub writes: Vec<Write>,
    /// For people.
    pub events: Vec<Event>,
    /// When to look again although nothing was seen to change.
    pub requeue: Option<Duration>,
}

/// A side effect.
#[derive(Debug, Clone, PartialEq)]
pub enum Write {
    /// Create the Job of an attempt.
    Start(Attempt),
    /// Delete the Job of an attempt with its pods, which get SIGTERM and their grace period.
    DeleteJob {
        /// Its name.
        job_name: String,
    },
    /// Delete the GrowthTrainingJob itself: its time to live is over.
    DeleteSelf,
}

/// Something that people should see in `kubectl describe`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Whether something went wrong.
    pub is_warning: bool,
    /// One word.
    pub reason: &'static str,
    /// One sentence.
    pub note: String,
    /// Name of the Job that it is about, if any.
    pub about: Option<String>,
}

/// A [`Plan`] in the making.
pub struct Draft<'a> {
    /// The job as it was read.
    pub job: &'a GrowthTrainingJob,
    /// The time.
    pub now: Timestamp,
    /// The status as it will be.
    pub status: GrowthTrainingJobStatus,
    /// See [`Plan::writes`].
    pub writes: Vec<Write>,
    events: Vec<Event>,
    requeue_seconds: Option<i64>,
}

impl<'a> Draft<'a> {
    /// Nothing to do so far.
    pub fn new(job: &'a GrowthTrainingJob, now: Timestamp) -> Self {
        let status = job.status.clone().unwrap_or_default();
        Self { job, now, status, writes: Vec::new(), events: Vec::new(), requeue_seconds: None }
    }

    /// The finished plan.
    pub fn finish(mut self) -> Plan {
        self.status.observed_generation = self.job.metadata.generation;
        self.status.selector = Some(trainer_selector(self.job));
        let requeue = self.requeue_seconds.map(|seconds| Duration::from_secs(seconds.max(1).unsigned_abs()));
        Plan { status: self.status, writes: self.writes, events: self.events, requeue }
    }

    /// Looks again after at most `seconds`.
    pub fn requeue_after(&mut self, seconds: i64) {
        self.requeue_seconds = Some(self.requeue_seconds.map_or(seconds, |before| before.min(seconds)));
    }

    /// Tells people.
    pub fn event(&mut self, is_warning: bool, reason: &'static str, note: String, about: Option<String>) {
        self.events.push(Event { is_warning, reason, note, about });
    }

    /// Whether a condition holds.
    pub fn is_true(&self, kind: ConditionType) -> bool {
        self.condition(kind).is_some_and(|condition| condition.status == "True")
    }

    /// A condition, if it was ever set.
    pub fn condition(&self, kind: ConditionType) -> Option<&Condition> {
        self.status.conditions.iter().find(|condition| condition.type_ == kind.as_str())
    }

    /// Sets a condition to True when the reason is one of its true ones, else to False, or to Unknown where nothing was
    /// heard.
    pub fn set(&mut self, kind: ConditionType, reason: Reason, message: impl Into<String>) {
        let status = match reason {
            Reason::NotReported => "Unknown",
            _ if kind.true_reasons().contains(&reason) => "True",
            _ => "False",
        };
        // What is stored counts: a condition may be set to one thing and back while this is decided.
        let mut stored = self.job.status.iter().flat_map(|status| &status.conditions);
        let before = stored.find(|before| before.type_ == kind.as_str() && before.status == status);
        let since = before.map_or(Time(self.now), |before| before.last_transition_time.clone());
        let condition = Condition {
            type_: kind.as_str().to_owned(),
            status: status.to_owned(),
            reason: reason.as_str().to_owned(),
            message: message.into(),
            last_transition_time: since,
            observed_generation: self.job.metadata.generation,
        };
        match self.status.conditions.iter_mut().find(|known| known.type_ == condition.type_) {
            // Only the generation differs: not worth a write.
            Some(known) if same(known, &condition) => {}
            Some(known) => *known = condition,
            None => self.status.conditions.push(condition),
        }
    }

    /// It is suspended no longer, if it ever was.
    pub fn resume(&mut self) {
        if self.condition(ConditionType::Suspended).is_some() {
            self.set(ConditionType::Suspended, Reason::Resumed, "the job is no longer suspended");
        }
    }

    /// Sets the summary.
    pub fn phase(&mut self, phase: Phase) {
        self.status.phase = Some(phase);
    }

    /// What is known of the attempts at a piece of work.
    pub fn attempt(&self, work: Work) -> Option<&AttemptStatus> {
        match work {
            Work::Data => self.status.data.as_ref(),
            Work::Transform(index) => self.status.stages.get(index)?.transform.as_ref(),
            Work::Train(index) => self.status.stages.get(index)?.attempt.as_ref(),
        }
    }

    /// Where the attempt at a piece of work is recorded.
    pub fn attempt_mut(&mut self, work: Work) -> &mut Option<AttemptStatus> {
        match work {
            Work::Data => &mut self.status.data,
            Work::Transform(index) => &mut self.stage_mut(index).transform,
            Work::Train(index) => &mut self.stage_mut(index).attempt,
        }
    }

    /// The record of a stage, begun if it was not.
    pub fn stage_mut(&mut self, index: usize) -> &mut StageStatus {
        while self.status.stages.len() <= index {
            let name = self.job.spec.stages[self.status.stages.len()].name.clone();
            self.status.stages.push(StageStatus { name, ..StageStatus::default() });
        }
        &mut self.status.stages[index]
    }

    /// Records a new attempt. Its Job is started once that is stored.
    pub fn begin(&mut self, work: Work, number: i32, not_before: Option<Timestamp>) {
        let job_name = attempt_name(self.job, work, number);
        let not_before = not_before.map(Time);
        *self.attempt_mut(work) =
            Some(AttemptStatus { number, job_name, not_before, ..AttemptStatus::default() });
        self.status.execution_attempts = Some(self.status.execution_attempts.unwrap_or(0) + 1);
        self.status.start_time.get_or_insert(Time(self.now));
        self.status.ready_replicas = Some(0);
        let Some(index) = work.stage() else { return };
        let now = Time(self.now);
        let stage = self.stage_mut(index);
        stage.start_time.get_or_insert(now);
        stage.state = match work {
            Work::Transform(_) => StageState::Transforming,
            _ => StageState::Training,
        };
        self.status.current_stage = Some(self.job.spec.stages[index].name.clone());
    }

    /// Adds the time that the attempt was at work to that of the job. It is ready no longer.
    pub fn stop_clock(&mut self, work: Work) {
        let now = self.now;
        let Some(attempt) = self.attempt_mut(work) else { return };
        let Some(ready) = attempt.ready_time.take() else { return };
        let seconds = (now.as_second() - ready.0.as_second()).max(0);
        self.status.active_seconds = Some(self.status.active_seconds.unwrap_or(0) + seconds);
    }

    /// Seconds that pods were at work, those of the attempt that runs included.
    pub fn active_seconds(&self, work: Work) -> i64 {
        let since = self.attempt(work).and_then(|attempt| attempt.ready_time.as_ref());
        let running = since.map_or(0, |since| (self.now.as_second() - since.0.as_second()).max(0));
        self.status.active_seconds.unwrap_or(0) + running
    }

    /// No size is wanted any more, nor is one missed.
    pub fn settle_size(&mut self, reason: Reason, message: &str) {
        for kind in [ConditionType::Scaling, ConditionType::Degraded] {
            if self.is_true(kind) {
                self.set(kind, reason, message);
            }
        }
    }

    fn end(&mut self, phase: Phase, message: &str) {
        self.set(ConditionType::Running, Reason::Finished, message);
        self.settle_size(Reason::Finished, message);
        self.phase(phase);
        self.status.completion_time.get_or_insert(Time(self.now));
        self.no_replicas();
    }

    /// No pods are held.
    pub fn no_replicas(&mut self) {
        (self.status.replicas, self.status.ready_replicas) = (Some(0), Some(0));
    }

    /// Ends the job without success, for good.
    pub fn fail(&mut self, reason: Reason, message: String) {
        self.set(ConditionType::Failed, reason, message.clone());
        self.end(Phase::Failed, "the job has failed");
        if let Some(stage) =
            self.status.stages.iter_mut().rev().find(|stage| stage.state != StageState::Complete)
        {
            stage.state = StageState::Failed;
        }
        self.event(true, "Failed", format!("{reason}: {message}"), None);
    }

    /// Ends the job with success, for good.
    pub fn complete(&mut self) {
        let message = "all stages are complete";
        self.set(ConditionType::Complete, Reason::AllStagesCompleted, message);
        self.end(Phase::Complete, message);
        if let Some(progress) = &mut self.status.progress {
            (progress.percent, progress.eta_seconds) = (Some(100), Some(0));
        }
        self.event(false, "Complete", message.to_owned(), None);
    }
}

fn same(one: &Condition, other: &Condition) -> bool {
    (&one.status, &one.reason, &one.message) == (&other.status, &other.reason, &other.message)
}

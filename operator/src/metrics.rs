//! What `/metrics` shows. Labels come from fixed sets: no names of jobs, no text of errors.

use crate::apply::ApplyError;
use crate::controller::ReconcileError;
use crate::failure::PEER_LOST;
use growth_crds::GrowthTrainingJob;
use growth_crds::conditions::ConditionType;
use growth_crds::status::{AttemptStatus, GrowthTrainingJobStatus, Phase, StageState, StageStatus};
use jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Of what `/metrics` answers with.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper ends of the histogram's buckets: from a look at the cache to a trainer that does not answer and more.
const SECONDS: [f64; 11] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 2.5, 5.0, 30.0];

/// All phases: one that no job is in is shown as 0.
const PHASES: [Phase; 12] = [
    Phase::Pending,
    Phase::Preparing,
    Phase::Transforming,
    Phase::Queued,
    Phase::Starting,
    Phase::Training,
    Phase::Committing,
    Phase::Restarting,
    Phase::Suspending,
    Phase::Suspended,
    Phase::Complete,
    Phase::Failed,
];

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum WatchKind {
    /// The jobs.
    GrowthTrainingJob,
    /// Their Jobs.
    Job,
    /// Their pods.
    Pod,
}

impl WatchKind {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::GrowthTrainingJob, Self::Job, Self::Pod];
}

impl fmt::Display for WatchKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// Why a reconcile failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Category {
    /// The object had changed meanwhile: usual, and tried again at once.
    Conflict,
    /// The API server does not take an object.
    Refused,
    /// An object of that name belongs to somebody else.
    NameTaken,
    /// The operator may not.
    Forbidden,
    /// The API server has too much to do, or an error of its own.
    ServerError,
    /// Any other answer.
    OtherAnswer,
    /// No answer.
    Unreachable,
    /// An object cannot be written as JSON.
    Json,
    /// It took too long and was ended.
    Timeout,
}

impl Category {
    const ALL: [Self; 9] = [
        Self::Conflict,
        Self::Refused,
        Self::NameTaken,
        Self::Forbidden,
        Self::ServerError,
        Self::OtherAnswer,
        Self::Unreachable,
        Self::Json,
        Self::Timeout,
    ];
}

/// The category of an error.
pub fn category(error: &ReconcileError) -> Category {
    match error {
        ReconcileError::Timeout => Category::Timeout,
        ReconcileError::Apply(ApplyError::Conflict(_)) => Category::Conflict,
        ReconcileError::Apply(ApplyError::Refused { .. }) => Category::Refused,
        ReconcileError::Apply(ApplyError::NameTaken { .. }) => Category::NameTaken,
        ReconcileError::Apply(ApplyError::Json(_)) => Category::Json,
        ReconcileError::Apply(ApplyError::Kube(kube::Error::Api(status))) => match status.code {
            401 | 403 => Category::Forbidden,
            429 | 500.. => Category::ServerError,
            _ => Category::OtherAnswer,
        },
        ReconcileError::Apply(ApplyError::Kube(_)) => Category::Unreachable,
    }
}

/// What has become of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Transition {
    /// It has begun, with its growth step or with training.
    Began,
    /// Its growth step is done.
    Grown,
    /// It has its last checkpoint.
    Complete,
    /// It ended without finishing.
    Failed,
}

impl Transition {
    const ALL: [Self; 4] = [Self::Began, Self::Grown, Self::Complete, Self::Failed];
}

/// Why an attempt was followed by another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Cause {
    /// A pod was preempted, evicted or drained, or its node was lost.
    Disruption,
    /// It was asked to stop and wrote a checkpoint.
    Stopped,
    /// Another number of pods was wanted, or there were nodes for fewer.
    Resized,
    /// The job was suspended and goes on.
    Resumed,
    /// Its Job was deleted.
    JobDeleted,
    /// Nobody has read what its pods said, or they are gone.
    PodsLost,
    /// No step for too long.
    Stalled,
    /// The kernel ended a pod for want of memory.
    OutOfMemory,
    /// Its trainer failed, or anything else.
    Error,
}

impl Cause {
    const ALL: [Self; 9] = [
        Self::Disruption,
        Self::Stopped,
        Self::Resized,
        Self::Resumed,
        Self::JobDeleted,
        Self::PodsLost,
        Self::Stalled,
        Self::OutOfMemory,
        Self::Error,
    ];
}

/// The cause behind the reason of a stage's last failure.
fn cause_of(reason: &str) -> Cause {
    match reason {
        "PreemptionByScheduler"
        | "DeletionByTaintManager"
        | "EvictionByEvictionAPI"
        | "DeletionByPodGC"
        | "TerminationByKubelet"
        | "Evicted"
        | "Preempting"
        | "NodeLost"
        | "NodeShutdown"
        | "Terminated"
        | "DisruptionTarget"
        | "NodeUnreachable" => Cause::Disruption,
        "JobDeleted" => Cause::JobDeleted,
        "OutcomeLost" | "PodsLost" | PEER_LOST => Cause::PodsLost,
        "Stalled" => Cause::Stalled,
        "OOMKilled" => Cause::OutOfMemory,
        _ => Cause::Error,
    }
}

/// What a stored status tells that the one before it did not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Of stages.
    pub transitions: Vec<Transition>,
    /// Attempts that followed another one.
    pub restarts: Vec<Cause>,
}

impl Changes {
    /// From one stored status to the next.
    pub fn between(old: &GrowthTrainingJobStatus, new: &GrowthTrainingJobStatus) -> Self {
        let mut changes = Self::default();
        let was_suspended = old.phase == Some(Phase::Suspended);
        let is_scaling = new.conditions.iter().any(|condition| {
            condition.type_ == ConditionType::Scaling.as_str() && condition.status == "True"
        });
        let unknown = StageStatus::default();
        for (index, stage) in new.stages.iter().enumerate() {
            let before = old.stages.get(index).unwrap_or(&unknown);
            changes.transitions.extend(transitions(before, stage));
            let is_restarted = is_followed(&before.attempt, &stage.attempt)
                || is_followed(&before.transform, &stage.transform);
            if is_restarted {
                changes.restarts.push(match &stage.last_failure {
                    _ if was_suspended => Cause::Resumed,
                    Some(failure) if before.last_failure.as_ref() != Some(failure) => {
                        cause_of(&failure.reason)
                    }
                    _ if is_scaling || before.capacity != stage.capacity => Cause::Resized,
                    // It was asked to, and that is no failure.
                    _ => Cause::Stopped,
                });
            }
        }
        if is_followed(&old.data, &new.data) {
            // The data has no record of failures; what counts has failed.
            let is_counted = new.restarts > old.restarts;
            changes.restarts.push(match is_counted {
                true => Cause::Error,
                false if was_suspended => Cause::Resumed,
                false => Cause::Disruption,
            });
        }
        changes
    }
}

fn transitions(old: &StageStatus, new: &StageStatus) -> impl Iterator<Item = Transition> {
    let is_grown = |stage: &StageStatus| {
        stage.transform.as_ref().is_some_and(|attempt| attempt.completion_time.is_some())
    };
    let state = match (old.state, new.state) {
        (old, new) if old == new => None,
        (_, StageState::Complete) => Some(Transition::Complete),
        (_, StageState::Failed) => Some(Transition::Failed),
        (StageState::Pending, StageState::Transforming | StageState::Training) => Some(Transition::Began),
        _ => None,
    };
    let grown = (is_grown(new) && !is_grown(old)).then_some(Transition::Grown);
    grown.into_iter().chain(state)
}

fn is_followed(old: &Option<AttemptStatus>, new: &Option<AttemptStatus>) -> bool {
    matches!((old, new), (Some(old), Some(new)) if new.number > old.number)
}

/// The most seconds of training that the loss of one pod would cost now: since the last checkpoint, or since the attempt
/// began to train where that was later. None: nothing trains.
pub fn checkpoint_age<'a>(
    jobs: impl IntoIterator<Item = &'a GrowthTrainingJob>,
    now: Timestamp,
) -> Option<f64> {
    let ages = jobs.into_iter().filter_map(|job| {
        let status = job.status.as_ref().filter(|status| status.phase == Some(Phase::Training))?;
        let stage = status.stages.iter().find(|stage| stage.state == StageState::Training)?;
        let begun = stage.attempt.as_ref().and_then(|attempt| attempt.ready_time.as_ref());
        let saved = stage.checkpoint.as_ref().and_then(|checkpoint| checkpoint.committed_at.as_ref());
        let since = begun.max(saved)?;
        Some((now.as_second() - since.0.as_second()).max(0) as f64)
    });
    ages.reduce(f64::max)
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: WatchKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCategory {
    category: Category,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfResult {
    result: Transition,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCause {
    cause: Cause,
}

/// The counters, and what is computed when somebody looks.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    runs: Counter,
    failures: Family<OfCategory, Counter>,
    durations: Histogram,
    watch_events: Family<OfKind, Gauge>,
    watch_errors: Family<OfKind, Counter>,
    leader: Gauge,
    transitions: Family<OfResult, Counter>,
    restarts: Family<OfCause, Counter>,
    training_jobs: Arc<OnceLock<Store<GrowthTrainingJob>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            runs: Counter::default(),
            failures: Family::default(),
            durations: Histogram::new(SECONDS),
            watch_events: Family::default(),
            watch_errors: Family::default(),
            leader: Gauge::default(),
            transitions: Family::default(),
            restarts: Family::default(),
            training_jobs: Arc::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let Self { registry, .. } = self;
        registry.register("growth_operator_reconcile_runs", "Reconciles that have ended", self.runs.clone());
        registry.register(
            "growth_operator_reconcile_failures",
            "Reconciles that have failed, by the kind of error",
            self.failures.clone(),
        );
        registry.register_with_unit(
            "growth_operator_reconcile_duration",
            "How long reconciles take, calls of the API server and of trainers included",
            Unit::Seconds,
            self.durations.clone(),
        );
        registry.register_with_unit(
            "growth_operator_watch_last_event_timestamp",
            "When a watch last told something; where nothing happens, that may be long ago",
            Unit::Seconds,
            self.watch_events.clone(),
        );
        registry.register(
            "growth_operator_watch_errors",
            "Interruptions of a watch, and tries to resume it that failed",
            self.watch_errors.clone(),
        );
        registry.register(
            "growth_operator_leader",
            "1: this process acts. 0: it stands by",
            self.leader.clone(),
        );
        registry.register(
            "growth_stage_transitions",
            "Stages that this process has seen begin, be grown, complete or fail",
            self.transitions.clone(),
        );
        registry.register(
            "growth_restarts",
            "Attempts that this process has seen follow another one, by what ended that",
            self.restarts.clone(),
        );
        registry.register_collector(Box::new(Jobs(self.training_jobs.clone())));
        registry.register_collector(Box::new(Process));
        self.begin_at_zero();
    }

    /// A counter that appears with its first event has no rate then.
    fn begin_at_zero(&self) {
        for kind in WatchKind::ALL {
            self.watch_errors.get_or_create(&OfKind { kind }).inc_by(0);
        }
        for category in Category::ALL {
            self.failures.get_or_create(&OfCategory { category }).inc_by(0);
        }
        for result in Transition::ALL {
            self.transitions.get_or_create(&OfResult { result }).inc_by(0);
        }
        for cause in Cause::ALL {
            self.restarts.get_or_create(&OfCause { cause }).inc_by(0);
        }
    }

    /// The process leads from now on, and this is what it sees.
    pub fn leads(&self, training_jobs: Store<GrowthTrainingJob>) {
        self.leader.set(1);
        // It can lead only once.
        let _ = self.training_jobs.set(training_jobs);
    }

    /// Takes note of a reconcile that has ended.
    pub fn reconciled(&self, took: Duration, error: Option<&ReconcileError>) {
        self.runs.inc();
        self.durations.observe(took.as_secs_f64());
        if let Some(error) = error {
            self.failures.get_or_create(&OfCategory { category: category(error) }).inc();
        }
    }

    /// Takes note of what a watch says.
    pub fn saw<K>(&self, kind: WatchKind, event: &watcher::Result<watcher::Event<K>>) {
        match event {
            Err(_) => {
                self.watch_errors.get_or_create(&OfKind { kind }).inc();
            }
            Ok(watcher::Event::Init) => {}
            Ok(_) => {
                self.watch_events.get_or_create(&OfKind { kind }).set(Timestamp::now().as_second());
            }
        }
    }

    /// Counts what has happened to a job, before `store` takes notice of it.
    pub fn job_changed(
        &self,
        store: &Store<GrowthTrainingJob>,
        event: &watcher::Result<watcher::Event<GrowthTrainingJob>>,
    ) {
        let Ok(watcher::Event::Apply(job) | watcher::Event::InitApply(job)) = event else { return };
        let Some(before) = store.get(&ObjectRef::from_obj(job)).filter(|before| before.uid() == job.uid())
        else {
            return;
        };
        let (Some(old), Some(new)) = (&before.status, &job.status) else { return };
        let Changes { transitions, restarts } = Changes::between(old, new);
        for result in transitions {
            self.transitions.get_or_create(&OfResult { result }).inc();
        }
        for cause in restarts {
            self.restarts.get_or_create(&OfCause { cause }).inc();
        }
    }

    /// All of it, as OpenMetrics.
    ///
    /// # Errors
    /// When a metric cannot be written.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// What the jobs say, when somebody looks.
#[derive(Debug)]
struct Jobs(Arc<OnceLock<Store<GrowthTrainingJob>>>);

impl Collector for Jobs {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Some(store) = self.0.get() else { return Ok(()) };
        let jobs = store.state();
        let help = "Jobs, by phase";
        let mut family = encoder.encode_descriptor("growth_jobs", help, None, MetricType::Gauge)?;
        for phase in PHASES {
            let is_in = |job: &&Arc<GrowthTrainingJob>| phase_of(job) == phase;
            let count = jobs.iter().filter(is_in).count() as i64;
            let labels = [("phase", format!("{phase:?}"))];
            ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
        }
        let Some(age) = checkpoint_age(jobs.iter().map(AsRef::as_ref), Timestamp::now()) else {
            return Ok(());
        };
        let help = "Most seconds that a job has trained since its last checkpoint";
        let (name, unit) = ("growth_checkpoint_age", Some(&Unit::Seconds));
        let metric = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        ConstGauge::new(age).encode(metric)
    }
}

fn phase_of(job: &GrowthTrainingJob) -> Phase {
    job.status.as_ref().and_then(|status| status.phase).unwrap_or_default()
}

/// What the kernel says of this process, when somebody looks.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let status = procfs::process::Process::myself().and_then(|process| process.status());
        let Some(kibibytes) = status.ok().and_then(|status| status.vmrss) else { return Ok(()) };
        let (name, help) = ("process_resident_memory", "Memory that the process holds");
        let metric = encoder.encode_descriptor(name, help, Some(&Unit::Bytes), MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(kibibytes * 1024).unwrap_or(i64::MAX)).encode(metric)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kube::CustomResourceExt;
    use kube::core::Status;
    use serde_json::{Value, json};

    fn status(value: Value) -> GrowthTrainingJobStatus {
        serde_json::from_value(value).unwrap()
    }

    fn changes(old: Value, new: Value) -> Changes {
        Changes::between(&status(old), &status(new))
    }

    fn attempt(number: i32) -> Value {
        json!({"number": number, "jobName": format!("j-{number}")})
    }

    fn training(number: i32, reason: &str) -> Value {
        let failure = json!({"reason": reason});
        json!({"stages": [{
            "name": "s", "state": "Training", "attempt": attempt(number), "lastFailure": failure,
        }]})
    }

    #[test]
    fn a_stage_is_counted_when_it_changes() {
        let stage = |state: &str, grown: bool| {
            let mut transform = attempt(1);
            if grown {
                transform["completionTime"] = json!("2026-01-01T00:00:00Z");
            }
            json!({"stages": [{"name": "s", "state": state, "transform": transform}]})
        };
        let cases = [
            (json!({}), stage("Transforming", false), vec![Transition::Began]),
            (stage("Transforming", false), stage("Transforming", false), vec![]),
            (stage("Transforming", false), stage("Training", true), vec![Transition::Grown]),
            (stage("Training", true), stage("Complete", true), vec![Transition::Complete]),
            (stage("Training", true), stage("Failed", true), vec![Transition::Failed]),
            (stage("Complete", true), stage("Complete", true), vec![]),
        ];
        for (old, new, expected) in cases {
            assert_eq!(changes(old.clone(), new.clone()).transitions, expected, "{old} -> {new}");
        }
    }

    #[test]
    fn a_restart_is_counted_once_with_its_cause() {
        let cases = [
            ("OOMKilled", Cause::OutOfMemory),
            ("EvictionByEvictionAPI", Cause::Disruption),
            ("Evicted", Cause::Disruption),
            ("Stalled", Cause::Stalled),
            ("JobDeleted", Cause::JobDeleted),
            ("OutcomeLost", Cause::PodsLost),
            ("PeerLost", Cause::PodsLost),
            ("NodeUnreachable", Cause::Disruption),
            ("SomethingNew", Cause::Error),
        ];
        for (reason, cause) in cases {
            assert_eq!(changes(training(1, "Before"), training(2, reason)).restarts, [cause], "{reason}");
            assert_eq!(changes(training(2, reason), training(2, reason)).restarts, [], "{reason}");
        }
        // Nothing has failed since.
        assert_eq!(changes(training(1, "Error"), training(2, "Error")).restarts, [Cause::Stopped]);
        assert_eq!(changes(json!({}), training(3, "Error")).restarts, [], "the first attempt follows none");
        let mut scaling = training(2, "Error");
        scaling["conditions"] = json!([{
            "type": "Scaling", "status": "True", "reason": "ScaleUpRequested", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]);
        assert_eq!(changes(training(1, "Error"), scaling).restarts, [Cause::Resized]);
        let mut with_fewer = training(2, "Error");
        with_fewer["stages"][0]["capacity"] =
            json!({"replicas": 2, "desiredReplicas": 4, "time": "2026-01-01T00:00:00Z"});
        assert_eq!(changes(training(1, "Error"), with_fewer).restarts, [Cause::Resized]);
        let mut suspended = training(1, "");
        suspended["phase"] = json!("Suspended");
        assert_eq!(changes(suspended, training(2, "JobDeleted")).restarts, [Cause::Resumed]);
    }

    #[test]
    fn the_datas_restarts_are_counted_too() {
        let data = |number: i32, restarts: i32, phase: &str| json!({"data": attempt(number), "restarts": restarts, "phase": phase});
        let old = || data(1, 0, "Preparing");
        assert_eq!(changes(old(), data(2, 1, "Restarting")).restarts, [Cause::Error]);
        assert_eq!(changes(old(), data(2, 0, "Restarting")).restarts, [Cause::Disruption]);
        assert_eq!(changes(data(1, 0, "Suspended"), data(2, 0, "Preparing")).restarts, [Cause::Resumed]);
        assert_eq!(changes(old(), old()).restarts, []);
    }

    pub(crate) fn job(status: Value) -> GrowthTrainingJob {
        serde_json::from_value(json!({
            "apiVersion": "growth.dev/v1alpha1", "kind": "GrowthTrainingJob",
            "metadata": {"name": "j", "namespace": "n", "uid": "u"},
            "spec": {
                "model": {"hiddenSize": 64, "intermediateSize": 176, "numAttentionHeads": 4},
                "data": {
                    "train": [{"uri": "s3://b/*.txt"}],
                    "validation": [{"uri": "s3://b/v.txt"}],
                    "tokenizer": {"train": {"vocabSize": 512}},
                },
                "storage": {"uri": "s3://b/runs"},
                "training": {"sequenceLength": 64, "globalBatchTokens": 512},
                "stages": [{"name": "s", "model": {"numHiddenLayers": 2}, "tokens": 512}],
            },
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn the_oldest_checkpoint_counts_from_when_its_attempt_began() {
        let trains = |phase: &str, begun: &str, saved: Option<&str>| {
            let mut stage = json!({"name": "s", "state": "Training", "attempt": attempt(1)});
            stage["attempt"]["readyTime"] = json!(begun);
            if let Some(saved) = saved {
                stage["checkpoint"] =
                    json!({"uri": "", "step": 1, "tokens": 1, "digest": "", "committedAt": saved});
            }
            job(json!({"phase": phase, "stages": [stage]}))
        };
        let age = |jobs: &[GrowthTrainingJob]| checkpoint_age(jobs, "2026-01-01T01:00:00Z".parse().unwrap());
        assert_eq!(age(&[]), None);
        let (noon, late) = ("2026-01-01T00:00:00Z", "2026-01-01T00:50:00Z");
        assert_eq!(age(&[trains("Queued", noon, None)]), None);
        assert_eq!(age(&[trains("Training", noon, None)]), Some(3600.0));
        assert_eq!(age(&[trains("Training", noon, Some(late))]), Some(600.0));
        assert_eq!(age(&[trains("Training", late, Some(noon))]), Some(600.0), "it was suspended meanwhile");
        let two = [trains("Training", noon, Some(late)), trains("Training", noon, None)];
        assert_eq!(age(&two), Some(3600.0));
    }

    #[test]
    fn errors_have_categories() {
        let answer = |code: u16| {
            let status = Status { code, ..Status::default() };
            category(&ReconcileError::Apply(ApplyError::Kube(kube::Error::Api(status.boxed()))))
        };
        let codes = [401, 403, 404, 429, 500, 503].map(answer);
        let (no, busy) = (Category::Forbidden, Category::ServerError);
        assert_eq!(codes, [no, no, Category::OtherAnswer, busy, busy, busy]);
        assert_eq!(category(&ReconcileError::Timeout), Category::Timeout);
        let conflict = ReconcileError::Apply(ApplyError::Conflict("j".into()));
        assert_eq!(category(&conflict), Category::Conflict);
        let unreachable = kube::Error::Service("connection refused".into());
        let unreachable = ReconcileError::Apply(ApplyError::Kube(unreachable));
        assert_eq!(category(&unreachable), Category::Unreachable);
    }

    #[test]
    fn the_text_has_every_metric_with_help() {
        let metrics = Metrics::default();
        let (store, mut writer) = kube::runtime::reflector::store();
        let event = |status: Value| watcher::Event::Apply(job(status));
        let (old, new) = (event(training(1, "")), event(training(2, "OOMKilled")));
        metrics.leads(store.clone());
        for event in [old, new] {
            metrics.saw(WatchKind::GrowthTrainingJob, &Ok(event.clone()));
            metrics.job_changed(&store, &Ok(event.clone()));
            writer.apply_watcher_event(&event);
        }
        metrics.saw(WatchKind::Pod, &Err::<watcher::Event<()>, _>(watcher::Error::NoResourceVersion));
        metrics.reconciled(Duration::from_millis(3), Some(&ReconcileError::Timeout));
        let text = metrics.text().unwrap();
        for line in [
            "growth_operator_reconcile_runs_total 1",
            "growth_operator_reconcile_failures_total{category=\"Timeout\"} 1",
            "growth_operator_reconcile_duration_seconds_bucket{le=\"0.005\"} 1",
            "growth_operator_watch_errors_total{kind=\"Pod\"} 1",
            "growth_operator_watch_errors_total{kind=\"Job\"} 0",
            "growth_operator_leader 1",
            "growth_restarts_total{cause=\"OutOfMemory\"} 1",
            "growth_restarts_total{cause=\"Stalled\"} 0",
            "growth_stage_transitions_total{result=\"Complete\"} 0",
            "growth_jobs{phase=\"Pending\"} 1",
            "growth_jobs{phase=\"Failed\"} 0",
        ] {
            assert!(text.lines().any(|known| known == line), "no {line} in\n{text}");
        }
        for name in
            ["growth_operator_watch_last_event_timestamp_seconds{kind=", "process_resident_memory_bytes "]
        {
            assert!(text.lines().any(|known| known.starts_with(name)), "no {name} in\n{text}");
        }
        let count = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!((count("# TYPE"), count("# HELP")), (10, 10), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_phase_is_shown() {
        let crd = serde_json::to_value(GrowthTrainingJob::crd()).unwrap();
        let path = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties/phase/enum";
        let mut known: Vec<&str> =
            crd.pointer(path).unwrap().as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let mut shown = PHASES.map(|phase| format!("{phase:?}"));
        known.sort_unstable();
        shown.sort_unstable();
        assert_eq!(shown.to_vec(), known);
    }
}

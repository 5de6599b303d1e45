//! Watches jobs and their children, and runs observe -> decide -> apply for each job that something happened to.

use crate::apply::{ApplyError, Writer};
use crate::cache::{ChildCache, owner_of};
use crate::decide::job_to_ask;
use crate::health::{Health, LONGEST_PAUSE};
use crate::metrics::{Metrics, WatchKind};
use crate::names::MANAGER;
use crate::observed::Observed;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, future, stream};
use growth_crds::GrowthTrainingJob;
use growth_crds::protocol::{Progress, contract};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::runtime::controller::{Action, Config as ControllerConfig, ReconcileRequest};
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{WatchStreamExt, applier, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Jobs reconciled at a time.
const CONCURRENCY: u16 = 16;
/// Events that come together make one reconcile: also what the last one has written, so that it is seen as done and not
/// tried again.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// Objects that come in one answer when all are listed: what is held twice for a moment.
const PAGE: u32 = 50;
/// For rank 0 to answer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(2);
/// A reconcile that hangs is ended, and counts as failed. Any part of it may be repeated.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(30);
/// After the first error of a job; doubled for each that follows.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// At most.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// After a conflict.
const CONFLICT_WAIT: Duration = Duration::from_millis(300);

/// Why a reconcile failed.
#[derive(thiserror::Error, Debug)]
pub enum ReconcileError {
    /// The plan was not carried out to its end.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Nor was it clear whether it would be.
    #[error("no end after {} s", RECONCILE_TIMEOUT.as_secs())]
    Timeout,
}

/// How the program tells what it does.
#[derive(Clone)]
pub struct Telemetry {
    /// For probes.
    pub health: Arc<Health>,
    /// For Prometheus.
    pub metrics: Arc<Metrics>,
}

/// What reconciling needs.
pub struct Context {
    writer: Writer,
    training_jobs: Store<GrowthTrainingJob>,
    jobs: Arc<ChildCache<Job>>,
    pods: Arc<ChildCache<Pod>>,
    http: reqwest::Client,
    metrics: Arc<Metrics>,
    waits: Arc<Waits>,
}

/// How long each job that fails waits. One that does not is not in it.
#[derive(Default)]
struct Waits(Mutex<HashMap<ObjectRef<GrowthTrainingJob>, ExponentialBackoff>>);

impl Waits {
    /// After one more error.
    fn next(&self, job: ObjectRef<GrowthTrainingJob>) -> Duration {
        let mut waits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let back_off = ExponentialBuilder::default()
            .with_min_delay(FIRST_WAIT)
            .with_max_delay(LONGEST_WAIT)
            .with_factor(2.0)
            .without_max_times();
        waits.entry(job).or_insert_with(|| back_off.build()).next().unwrap_or(LONGEST_WAIT)
    }

    /// It succeeded, or is gone.
    fn forget(&self, job: &ObjectRef<GrowthTrainingJob>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(job);
    }
}

/// An API of one namespace, or of all.
fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Of each watch its own: one that fails does not hold up the others. Half of [`LONGEST_PAUSE`], and up to as much again
/// by jitter.
fn watch_back_off() -> watcher::ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(LONGEST_PAUSE / 2)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
        .into()
}

/// Drops what is never read: the API server's bookkeeping is half of an object.
fn prune<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
    object.meta_mut().annotations = None;
}

fn prune_job(job: &mut Job) {
    prune(job);
    // A queue suspends it; what runs has as many pods as it says.
    let spec = job.spec.take().unwrap_or_default();
    job.spec = Some(JobSpec { suspend: spec.suspend, completions: spec.completions, ..JobSpec::default() });
}

fn prune_pod(pod: &mut Pod) {
    prune(pod);
    let node_name = pod.spec.take().and_then(|spec| spec.node_name);
    pod.spec = Some(PodSpec { node_name, ..PodSpec::default() });
}

/// Watches children of one kind into a cache; yields the jobs that they belong to.
fn children<K>(
    api: Api<K>,
    kind: WatchKind,
    prune: fn(&mut K),
    telemetry: Telemetry,
) -> (Arc<ChildCache<K>>, impl Stream<Item = Result<ReconcileRequest<GrowthTrainingJob>, watcher::Error>>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned + Send + Sync + 'static,
{
    let children = Arc::new(ChildCache::default());
    let known = children.clone();
    let config =
        watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={MANAGER}")).page_size(PAGE);
    let touched = watcher(api, config)
        .modify(prune)
        .inspect(move |event| {
            telemetry.saw(kind, event);
            if let Ok(event) = event {
                known.apply(event);
            }
        })
        .backoff(watch_back_off())
        .touched_objects()
        .try_filter_map(|child| future::ready(Ok(owner_of(&child).map(ReconcileRequest::from))));
    (children, touched)
}

/// Watches the jobs into a store; yields them.
fn training_jobs(
    api: Api<GrowthTrainingJob>,
    telemetry: Telemetry,
    waits: Arc<Waits>,
) -> (Store<GrowthTrainingJob>, impl Stream<Item = Result<ReconcileRequest<GrowthTrainingJob>, watcher::Error>>)
{
    let (reader, writer) = store();
    let before = reader.clone();
    let watched =
        watcher(api, watcher::Config::default().page_size(PAGE)).modify(prune).inspect(move |event| {
            telemetry.saw(WatchKind::GrowthTrainingJob, event);
            telemetry.metrics.job_changed(&before, event);
            if let Ok(watcher::Event::Delete(job)) = event {
                waits.forget(&ObjectRef::from_obj(job));
            }
        });
    let touched = reflector(writer, watched)
        .backoff(watch_back_off())
        .touched_objects()
        .map_ok(|job| ReconcileRequest::from(ObjectRef::from_obj(&job)));
    (reader, touched)
}

impl Telemetry {
    fn saw<K>(&self, kind: WatchKind, event: &watcher::Result<watcher::Event<K>>) {
        self.health.saw(kind, event);
        self.metrics.saw(kind, event);
        if let Err(error) = event {
            tracing::warn!(%error, %kind, "watch interrupted");
        }
    }
}

/// The controller: a future that runs until `shutdown` is ready and the reconciles that run then have ended, and the
/// store of jobs that it fills.
///
/// # Errors
/// When no HTTP client can be made.
pub fn controller(
    writer: Writer,
    namespace: Option<&str>,
    telemetry: Telemetry,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(Store<GrowthTrainingJob>, impl Future<Output = ()>), reqwest::Error> {
    let client = writer.client.clone();
    let metrics = telemetry.metrics.clone();
    let waits = Arc::new(Waits::default());
    let (jobs, job_triggers) =
        children(api(&client, namespace), WatchKind::Job, prune_job, telemetry.clone());
    let (pods, pod_triggers) =
        children(api(&client, namespace), WatchKind::Pod, prune_pod, telemetry.clone());
    let (training_jobs, own) = training_jobs(api(&client, namespace), telemetry, waits.clone());

    let reader = training_jobs.clone();
    let http = reqwest::Client::builder().timeout(PROGRESS_TIMEOUT).build()?;
    let context =
        Arc::new(Context { writer, training_jobs: reader.clone(), jobs, pods, http, metrics, waits });
    let triggers = stream::select_all([own.boxed(), job_triggers.boxed(), pod_triggers.boxed()])
        .take_until(shutdown)
        // A watch goes on after its back-off; its error must not end the others.
        .filter_map(|trigger| future::ready(trigger.ok()))
        .map(Ok::<_, std::convert::Infallible>);
    let config = ControllerConfig::default().concurrency(CONCURRENCY).debounce(DEBOUNCE);
    let run = applier(
        |job, context| reconcile(job, context).boxed(),
        on_error,
        context,
        training_jobs,
        triggers,
        config,
    )
    .for_each(|done| {
        if let Err(error) = done {
            tracing::debug!(%error, "reconcile");
        }
        future::ready(())
    });
    Ok((reader, run))
}

async fn reconcile(job: Arc<GrowthTrainingJob>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    // Else a new operator would take every Job for deleted.
    context.jobs.wait_until_known().await;
    context.pods.wait_until_known().await;
    let started = Instant::now();
    let ended = tokio::time::timeout(RECONCILE_TIMEOUT, reconcile_once(&job, &context)).await;
    let result = ended.unwrap_or(Err(ReconcileError::Timeout));
    context.metrics.reconciled(started.elapsed(), result.as_ref().err());
    if result.is_ok() {
        context.waits.forget(&ObjectRef::from_obj(&job));
    }
    result
}

async fn reconcile_once(job: &GrowthTrainingJob, context: &Context) -> Result<Action, ReconcileError> {
    let observed = observe(job, context).await;
    let requeue = context.writer.reconcile(job, &observed, Timestamp::now()).await?;
    Ok(requeue.map_or_else(Action::await_change, Action::requeue))
}

fn on_error(job: Arc<GrowthTrainingJob>, error: &ReconcileError, context: Arc<Context>) -> Action {
    if let ReconcileError::Apply(ApplyError::Conflict(_)) = error {
        return Action::requeue(CONFLICT_WAIT);
    }
    let wait = context.waits.next(ObjectRef::from_obj(&job));
    tracing::warn!(
        %error,
        job = job.name_any(),
        namespace = job.namespace(),
        next_try_seconds = wait.as_secs(),
        "reconcile failed"
    );
    Action::requeue(wait)
}

/// What is known of this job's children, and what its trainer says.
async fn observe(job: &GrowthTrainingJob, context: &Context) -> Observed {
    let mut observed = Observed::of(job, context.jobs.of(job), context.pods.of(job));
    observed.progress = ask_for_progress(job, &observed.pods, context).await;
    observed.base = base_of(job, &context.training_jobs);
    observed
}

/// The job that trains the first stage of this one, if that is so and it is known.
fn base_of(job: &GrowthTrainingJob, known: &Store<GrowthTrainingJob>) -> Option<Arc<GrowthTrainingJob>> {
    let base = job.spec.stages.first()?.trained_by.as_ref()?;
    known.get(&ObjectRef::new(&base.job).within(&job.namespace()?))
}

async fn ask_for_progress(job: &GrowthTrainingJob, pods: &[Arc<Pod>], context: &Context) -> Option<Progress> {
    let name = job_to_ask(job, Timestamp::now())?;
    let leader = pods.iter().find(|pod| {
        let labels = pod.labels();
        labels.get("batch.kubernetes.io/job-name").is_some_and(|label| label == name)
            && labels.get("batch.kubernetes.io/job-completion-index").is_some_and(|index| index == "0")
    })?;
    let address = leader.status.as_ref()?.pod_ip.as_ref()?;
    let url = format!("http://{address}:{}/progress", contract::PROGRESS_PORT);
    let answer = context.http.get(&url).send().await.and_then(reqwest::Response::error_for_status);
    match answer {
        Ok(answer) => {
            answer.json().await.inspect_err(|error| tracing::debug!(%error, %url, "strange progress")).ok()
        }
        Err(error) => {
            tracing::debug!(%error, %url, "no progress");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_goes_on_failing_waits_longer_and_the_others_do_not() {
        let job = |name: &str| ObjectRef::<GrowthTrainingJob>::new(name).within("n");
        let waits = Waits::default();
        let seconds: Vec<u64> = (0..7).map(|_| waits.next(job("bad")).as_secs()).collect();
        assert_eq!(seconds, [5, 10, 20, 40, 80, 120, 120]);
        assert_eq!(waits.next(job("other")).as_secs(), 5);
        waits.forget(&job("bad"));
        assert_eq!(waits.next(job("bad")).as_secs(), 5);
    }

    #[test]
    fn a_watch_pauses_at_most_as_long_as_its_health_expects() {
        let longest = watch_back_off().take(100).max();
        assert!(
            longest.is_some_and(|pause| pause <= LONGEST_PAUSE && pause > LONGEST_PAUSE / 2),
            "{longest:?}"
        );
    }
}

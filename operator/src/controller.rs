//! Watches jobs and their children, and runs observe -> decide -> apply for each job that something happened to.

use crate::apply::{ApplyError, Writer};
use crate::decide::job_to_ask;
use crate::names::{LABEL_JOB, MANAGER};
use crate::observed::Observed;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, future, stream};
use growth_crds::GrowthTrainingJob;
use growth_crds::protocol::{Progress, contract};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::{Action, Config as ControllerConfig, ReconcileRequest};
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{WatchStreamExt, applier, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

/// Jobs reconciled at a time.
const CONCURRENCY: u16 = 16;
/// Events that come together make one reconcile.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// For rank 0 to answer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(2);
/// After an error; doubled for each that follows is left to the API server's own flow control.
const ERROR_WAIT: Duration = Duration::from_secs(5);
/// After a conflict.
const CONFLICT_WAIT: Duration = Duration::from_millis(300);

/// What reconciling needs.
pub struct Context {
    writer: Writer,
    jobs: Store<Job>,
    pods: Store<Pod>,
    http: reqwest::Client,
}

/// Stores that are filled by the watches.
pub struct Stores {
    /// The jobs.
    pub training_jobs: Store<GrowthTrainingJob>,
    /// Their Jobs.
    pub jobs: Store<Job>,
    /// Their pods.
    pub pods: Store<Pod>,
}

impl Stores {
    /// Waits until all have been listed once.
    pub async fn ready(&self) -> bool {
        let all = future::join3(
            self.training_jobs.wait_until_ready(),
            self.jobs.wait_until_ready(),
            self.pods.wait_until_ready(),
        );
        matches!(all.await, (Ok(()), Ok(()), Ok(())))
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

/// What a child belongs to, by its label. The uid is checked when it is observed.
fn owner_of<K: Resource>(child: &K) -> Option<ObjectRef<GrowthTrainingJob>> {
    let name = child.labels().get(LABEL_JOB)?;
    Some(ObjectRef::new(name).within(&child.namespace()?))
}

/// Watches children of one kind into a store; yields the jobs that they belong to.
fn children<K>(
    api: Api<K>,
) -> (Store<K>, impl Stream<Item = Result<ReconcileRequest<GrowthTrainingJob>, watcher::Error>>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + serde::de::DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = store();
    let config =
        watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={MANAGER}")).page_size(100);
    let touched = reflector(writer, watcher(api, config).modify(|child| child.managed_fields_mut().clear()))
        .default_backoff()
        .touched_objects()
        .try_filter_map(|child| future::ready(Ok(owner_of(&child).map(ReconcileRequest::from))));
    (reader, touched)
}

/// The controller: a future that runs until `shutdown` is ready, and the stores it fills.
pub fn controller(
    writer: Writer,
    namespace: Option<&str>,
    shutdown: impl Future<Output = ()> + Send + Sync + 'static,
) -> Result<(Stores, impl Future<Output = ()>), reqwest::Error> {
    let client = writer.client.clone();
    let (training_jobs, job_writer) = store();
    let own = reflector(
        job_writer,
        watcher(api::<GrowthTrainingJob>(&client, namespace), watcher::Config::default().page_size(100))
            .modify(|job| job.managed_fields_mut().clear()),
    )
    .default_backoff()
    .touched_objects()
    .map_ok(|job| ReconcileRequest::from(ObjectRef::from_obj(&job)));
    let (jobs, job_triggers) = children(api::<Job>(&client, namespace));
    let (pods, pod_triggers) = children(api::<Pod>(&client, namespace));

    let stores = Stores { training_jobs: training_jobs.clone(), jobs: jobs.clone(), pods: pods.clone() };
    let http = reqwest::Client::builder().timeout(PROGRESS_TIMEOUT).build()?;
    let context = Arc::new(Context { writer, jobs, pods, http });
    let triggers = stream::select_all([own.boxed(), job_triggers.boxed(), pod_triggers.boxed()])
        .take_until(shutdown)
        .inspect_err(|error| tracing::warn!(%error, "watch interrupted"))
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
    Ok((stores, run))
}

async fn reconcile(job: Arc<GrowthTrainingJob>, context: Arc<Context>) -> Result<Action, ApplyError> {
    let observed = observe(&job, &context).await;
    let requeue = context.writer.reconcile(&job, &observed, Timestamp::now()).await?;
    Ok(requeue.map_or_else(Action::await_change, Action::requeue))
}

fn on_error(job: Arc<GrowthTrainingJob>, error: &ApplyError, _: Arc<Context>) -> Action {
    match error {
        ApplyError::Conflict(_) => Action::requeue(CONFLICT_WAIT),
        error => {
            tracing::warn!(%error, job = job.name_any(), namespace = job.namespace(), "reconcile failed");
            Action::requeue(ERROR_WAIT)
        }
    }
}

/// What the stores hold of this job's children, and what its trainer says.
async fn observe(job: &GrowthTrainingJob, context: &Context) -> Observed {
    let mut observed = Observed::of(job, context.jobs.state(), context.pods.state());
    observed.progress = ask_for_progress(job, &observed.pods, context).await;
    observed
}

async fn ask_for_progress(job: &GrowthTrainingJob, pods: &[Arc<Pod>], context: &Context) -> Option<Progress> {
    let name = job_to_ask(job)?;
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

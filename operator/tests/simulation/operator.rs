//! An operator of the simulation: the real `decide` and the real writer, behind a client whose every call waits until the
//! world lets it through. Its caches hear of changes only when the world delivers them.

use crate::api_server::{Change, Kind};
use bytes::Bytes;
use futures::FutureExt;
use growth_crds::GrowthTrainingJob;
use growth_operator::apply::{ApplyError, Writer};
use growth_operator::children::PodDefaults;
use growth_operator::observed::Observed;
use http::{Method, Request, Response};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, ResourceExt};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;

/// The answer to a call; an error is a broken connection.
pub type CallResult = Result<Response<Body>, std::io::Error>;

/// A call that waits at the gate.
pub struct Call {
    pub method: Method,
    pub path: String,
    pub body: Bytes,
    pub answer: oneshot::Sender<CallResult>,
}

/// What a reflector holds.
pub struct Cache<K> {
    pub objects: BTreeMap<String, Arc<K>>,
    seen: usize,
}

impl<K: kube::Resource<DynamicType = ()>> Cache<K> {
    /// As after a list.
    fn of(kind: &Kind<K>) -> Self {
        Cache { objects: kind.objects.clone(), seen: kind.changes.len() }
    }

    /// The next change, if any; and whether there was one.
    pub fn deliver(&mut self, kind: &Kind<K>) -> bool {
        let Some(change) = kind.changes.get(self.seen) else { return false };
        self.seen += 1;
        self.take(change);
        true
    }

    /// The last change once more.
    pub fn deliver_again(&mut self, kind: &Kind<K>) {
        if let Some(change) = self.seen.checked_sub(1).and_then(|last| kind.changes.get(last)) {
            self.take(change);
        }
    }

    fn take(&mut self, change: &Change<K>) {
        match change {
            Change::Applied(object) => drop(self.objects.insert(object.name_any(), object.clone())),
            Change::Deleted(name) => drop(self.objects.remove(name)),
        }
    }
}

type Reconcile = Pin<Box<dyn Future<Output = Result<Option<Duration>, ApplyError>> + Send>>;

pub struct Operator {
    writer: Arc<Writer>,
    gate: Arc<Mutex<Option<Call>>>,
    pub own: Cache<GrowthTrainingJob>,
    pub jobs: Cache<Job>,
    pub pods: Cache<Pod>,
    running: Option<Reconcile>,
    /// When it looks again although nothing was seen to change.
    pub due: Option<i64>,
    /// Something was seen to change since the last look.
    pub is_told: bool,
}

impl Operator {
    /// Starts with fresh lists.
    pub fn new(own: &Kind<GrowthTrainingJob>, jobs: &Kind<Job>, pods: &Kind<Pod>) -> Self {
        let gate = Arc::new(Mutex::new(None));
        let at_gate = gate.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let gate: Arc<Mutex<Option<Call>>> = at_gate.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await.map_err(std::io::Error::other)?;
                let (answer, answered) = oneshot::channel();
                let path = parts.uri.path().to_owned();
                *gate.lock().unwrap() = Some(Call { method: parts.method, path, body, answer });
                answered.await.unwrap_or_else(|_| Err(std::io::Error::other("the operator died")))
            }
        });
        let client = Client::new(service, "n");
        let reporter = Reporter { controller: "growth-operator".to_owned(), instance: None };
        let writer = Writer {
            client: client.clone(),
            recorder: Recorder::new(client, reporter),
            defaults: PodDefaults { image: "growth-trainer:1".to_owned(), image_pull_policy: None },
        };
        Operator {
            writer: Arc::new(writer),
            gate,
            own: Cache::of(own),
            jobs: Cache::of(jobs),
            pods: Cache::of(pods),
            running: None,
            due: None,
            is_told: true,
        }
    }

    pub fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// Begins a reconcile of `job` with what the caches hold.
    pub fn begin(&mut self, job: Arc<GrowthTrainingJob>, observed: Observed, now: Timestamp) {
        self.is_told = false;
        let writer = self.writer.clone();
        self.running = Some(Box::pin(async move { writer.reconcile(&job, &observed, now).await }));
    }

    /// A call that was taken too early waits again.
    pub fn put_back(&mut self, call: Call) {
        *self.gate.lock().unwrap() = Some(call);
    }

    /// Runs until a call waits at the gate, which is returned, or until the reconcile is over.
    pub async fn advance(&mut self, now: i64) -> Option<Call> {
        loop {
            let running = self.running.as_mut()?;
            if let Some(done) = running.now_or_never() {
                self.running = None;
                self.due = match done {
                    Ok(requeue) => requeue.map(|wait| now + i64::try_from(wait.as_secs()).unwrap()),
                    Err(ApplyError::Conflict(_)) => Some(now + 1),
                    Err(_) => Some(now + 5),
                };
                return None;
            }
            if let Some(call) = self.gate.lock().unwrap().take() {
                return Some(call);
            }
            tokio::task::yield_now().await;
        }
    }
}

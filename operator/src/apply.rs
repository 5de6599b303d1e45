//! Carries a plan out: the status first, then the writes, then the events. Everything may fail, be repeated, or be the
//! last thing before a crash.

use crate::children::{Attempt, Children, PodDefaults, children};
use crate::decide::decide;
use crate::draft::{Event, Plan, Write};
use crate::names::MANAGER;
use crate::observed::Observed;
use growth_crds::GrowthTrainingJob;
use growth_crds::conditions::{ConditionType, Reason};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ObjectReference, Service};
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::time::Duration;

/// Why a plan was not carried out to its end.
#[derive(thiserror::Error, Debug)]
pub enum ApplyError {
    /// Somebody was faster, or the cache is behind: decide again on what is stored now.
    #[error("{0} has changed meanwhile")]
    Conflict(String),
    /// The API server does not take an object.
    #[error("{object} is refused: {message}")]
    Refused {
        /// Kind and name.
        object: String,
        /// In the API server's words.
        message: String,
    },
    /// An object of that name belongs to another job.
    #[error("{object} exists and belongs to another owner; delete it, or name the job differently")]
    NameTaken {
        /// Kind and name.
        object: String,
    },
    /// Any other answer, or none.
    #[error(transparent)]
    Kube(#[from] kube::Error),
    /// An object cannot be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// What writes need.
pub struct Writer {
    /// The API server.
    pub client: Client,
    /// Publishes events.
    pub recorder: Recorder,
    /// For the pods it makes.
    pub defaults: PodDefaults,
}

impl Writer {
    /// Decides, carries the plan out, and keeps what the API server refuses in the status. Returns when to look again
    /// although nothing was seen to change.
    ///
    /// # Errors
    /// See [`Writer::apply`].
    pub async fn reconcile(
        &self,
        job: &GrowthTrainingJob,
        observed: &Observed,
        now: Timestamp,
    ) -> Result<Option<Duration>, ApplyError> {
        let plan = decide(job, observed, now);
        match self.apply(job, &plan).await {
            Ok(()) => Ok(plan.requeue),
            Err(refusal @ (ApplyError::Refused { .. } | ApplyError::NameTaken { .. })) => {
                self.report_refusal(job, &refusal, now).await?;
                Err(refusal)
            }
            Err(error) => Err(error),
        }
    }

    /// Carries the plan out.
    ///
    /// # Errors
    /// The first failure; what was done before it stays, and deciding again goes on from there.
    pub async fn apply(&self, job: &GrowthTrainingJob, plan: &Plan) -> Result<(), ApplyError> {
        self.store_status(job, plan).await?;
        for write in &plan.writes {
            match write {
                Write::Start(attempt) => self.start(job, attempt).await?,
                Write::DeleteJob { job_name } => self.delete_job(job, job_name).await?,
                Write::DeleteSelf => self.delete_self(job).await?,
            }
        }
        for event in &plan.events {
            self.publish(job, event).await;
        }
        Ok(())
    }

    /// One call, and none when nothing has changed. It fails when the object was changed since it was read.
    async fn store_status(&self, job: &GrowthTrainingJob, plan: &Plan) -> Result<(), ApplyError> {
        if job.status.as_ref() == Some(&plan.status) {
            return Ok(());
        }
        let changed = GrowthTrainingJob { status: Some(plan.status.clone()), ..job.clone() };
        match self.api::<GrowthTrainingJob>(job).replace_status(&job.name_any(), &post(), &changed).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Err(ApplyError::Conflict(job.name_any())),
            Err(error) => Err(error.into()),
        }
    }

    async fn start(&self, job: &GrowthTrainingJob, attempt: &Attempt) -> Result<(), ApplyError> {
        let Children { job: pods, service } = children(job, attempt, &self.defaults)?;
        // Pods look each other up as soon as they are there.
        if let Some(service) = service {
            self.create::<Service>(job, service).await?;
        }
        self.create::<Job>(job, pods).await
    }

    /// A repeated create finds its own object.
    async fn create<K>(&self, job: &GrowthTrainingJob, object: K) -> Result<(), ApplyError>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
        K: Clone + Debug + Serialize + DeserializeOwned,
    {
        let api = self.api::<K>(job);
        let shown = || format!("{} {}", K::kind(&()), object.name_any());
        match api.create(&post(), &object).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let is_ours = |found: &K| {
                    found.owner_references().iter().any(|owner| Some(&owner.uid) == job.uid().as_ref())
                };
                match api.get_opt(&object.name_any()).await? {
                    Some(found) if !is_ours(&found) => Err(ApplyError::NameTaken { object: shown() }),
                    _ => Ok(()),
                }
            }
            Err(kube::Error::Api(status)) if [400, 403, 422].contains(&status.code) => {
                Err(ApplyError::Refused { object: shown(), message: status.message })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// In the foreground: a Job that is gone has no pods any more.
    async fn delete_job(&self, job: &GrowthTrainingJob, name: &str) -> Result<(), ApplyError> {
        match self.api::<Job>(job).delete(name, &DeleteParams::foreground()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn delete_self(&self, job: &GrowthTrainingJob) -> Result<(), ApplyError> {
        // Another object of the same name has another uid.
        let preconditions = Preconditions { uid: job.uid(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
        match self.api::<GrowthTrainingJob>(job).delete(&job.name_any(), &parameters).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Says in the status what the API server refused, so that `kubectl describe` shows it.
    ///
    /// # Errors
    /// When the status cannot be stored.
    async fn report_refusal(
        &self,
        job: &GrowthTrainingJob,
        refusal: &ApplyError,
        now: Timestamp,
    ) -> Result<(), ApplyError> {
        let Some(stored) = self.api::<GrowthTrainingJob>(job).get_opt(&job.name_any()).await? else {
            return Ok(());
        };
        let mut draft = crate::draft::Draft::new(&stored, now);
        draft.set(ConditionType::Accepted, Reason::InvalidTemplate, refusal.to_string());
        let plan = draft.finish();
        if stored.status.as_ref() == Some(&plan.status) {
            // It was told already.
            return Ok(());
        }
        self.store_status(&stored, &plan).await?;
        let note = refusal.to_string();
        self.publish(&stored, &Event { is_warning: true, reason: "Refused", note, about: None }).await;
        Ok(())
    }

    /// An event that is lost costs a line in `describe`, no more.
    async fn publish(&self, job: &GrowthTrainingJob, event: &Event) {
        let secondary = event.about.as_ref().map(|name| ObjectReference {
            api_version: Some("batch/v1".to_owned()),
            kind: Some("Job".to_owned()),
            name: Some(name.clone()),
            namespace: job.namespace(),
            ..ObjectReference::default()
        });
        let published = KubeEvent {
            type_: if event.is_warning { EventType::Warning } else { EventType::Normal },
            reason: event.reason.to_owned(),
            note: Some(event.note.clone()),
            action: event.reason.to_owned(),
            secondary,
        };
        if let Err(error) = self.recorder.publish(&published, &job.object_ref(&())).await {
            tracing::warn!(%error, job = job.name_any(), reason = event.reason, "event not published");
        }
    }

    fn api<K>(&self, job: &GrowthTrainingJob) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &job.namespace().unwrap_or_default())
    }
}

fn post() -> PostParams {
    PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() }
}

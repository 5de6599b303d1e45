//! The API server of the simulation: it keeps objects by name, counts resource versions, remembers every change for the
//! watches, answers the operator's real client, and looks at each write for a broken promise.

use bytes::Bytes;
use growth_crds::GrowthTrainingJob;
use growth_crds::plan::ranks::elastic_sizes;
use growth_crds::status::{Phase, StageState, StageStatus};
use growth_operator::observed::size;
use http::{Method, Response};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::world::timestamp;

/// What a watch tells.
#[derive(Clone)]
pub enum Change<K> {
    Applied(Arc<K>),
    Deleted(String),
}

/// All objects of one kind.
pub struct Kind<K> {
    pub objects: BTreeMap<String, Arc<K>>,
    pub changes: Vec<Change<K>>,
}

impl<K> Default for Kind<K> {
    fn default() -> Self {
        Kind { objects: BTreeMap::new(), changes: Vec::new() }
    }
}

impl<K: Resource<DynamicType = ()> + Clone + PartialEq> Kind<K> {
    fn put(&mut self, mut object: K, revision: &mut u64) -> Arc<K> {
        *revision += 1;
        object.meta_mut().resource_version = Some(revision.to_string());
        let object = Arc::new(object);
        self.objects.insert(object.name_any(), object.clone());
        self.changes.push(Change::Applied(object.clone()));
        object
    }

    fn remove(&mut self, name: &str) {
        if self.objects.remove(name).is_some() {
            self.changes.push(Change::Deleted(name.to_owned()));
        }
    }
}

#[derive(Default)]
pub struct ApiServer {
    pub training_jobs: Kind<GrowthTrainingJob>,
    pub jobs: Kind<Job>,
    pub pods: Kind<Pod>,
    pub services: Kind<Service>,
    /// Jobs that the operator was allowed to meet without warning: somebody deleted them by hand.
    pub deleted_by_hand: BTreeSet<String>,
    /// Promises that were broken.
    pub broken: Vec<String>,
    /// Writes that changed something.
    pub writes: u64,
    pub now: i64,
    revision: u64,
    uids: u64,
}

/// The object as JSON; or a status code and why not.
type Answer = Result<Vec<u8>, (u16, String)>;

fn json_of<T: serde::Serialize>(object: &T) -> Answer {
    serde_json::to_vec(object).map_err(|error| (500, error.to_string()))
}

fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, (u16, String)> {
    serde_json::from_slice(body).map_err(|error| (400, error.to_string()))
}

pub fn response(answer: Answer) -> Response<kube::client::Body> {
    let (code, body) = match answer {
        Ok(object) => (200, object),
        Err((code, message)) => {
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": message, "reason": "Simulated", "code": code,
            });
            (code, status.to_string().into_bytes())
        }
    };
    Response::builder().status(code).body(body.into()).unwrap()
}

fn success() -> Answer {
    json_of(&json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}))
}

impl ApiServer {
    fn new_uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    /// A call of the operator.
    pub fn answer(&mut self, method: &Method, path: &str, body: &Bytes) -> Answer {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match (method.as_str(), &parts[..]) {
            ("PUT", ["apis", _, _, "namespaces", _, "growthtrainingjobs", name, "status"]) => {
                self.replace_status(name, read(body)?)
            }
            ("GET", [.., "growthtrainingjobs", name]) => self.get(&self.training_jobs, name),
            ("DELETE", [.., "growthtrainingjobs", name]) => self.delete_training_job(name),
            ("POST", [.., "jobs"]) => self.create_job(read(body)?),
            ("GET", [.., "jobs", name]) => self.get(&self.jobs, name),
            ("DELETE", [.., "jobs", name]) => self.delete_job(name),
            ("POST", [.., "services"]) => self.create_service(read(body)?),
            ("GET", [.., "services", name]) => self.get(&self.services, name),
            ("POST" | "PATCH", [.., "events"]) | ("PATCH", [.., "events", _]) => Ok(body.to_vec()),
            _ => {
                self.broken.push(format!("a call that was never expected: {method} {path}"));
                Err((404, path.to_owned()))
            }
        }
    }

    fn get<K: serde::Serialize>(&self, kind: &Kind<K>, name: &str) -> Answer {
        kind.objects.get(name).map_or(Err((404, name.to_owned())), |object| json_of(object.as_ref()))
    }

    fn replace_status(&mut self, name: &str, new: GrowthTrainingJob) -> Answer {
        let Some(stored) = self.training_jobs.objects.get(name).cloned() else {
            return Err((404, name.to_owned()));
        };
        if new.metadata.resource_version != stored.metadata.resource_version
            || new.metadata.uid != stored.metadata.uid
        {
            return Err((409, "the object has been modified".to_owned()));
        }
        self.check_status(&stored, &new);
        let changed = GrowthTrainingJob { status: new.status, ..(*stored).clone() };
        self.writes += 1;
        json_of(self.training_jobs.put(changed, &mut self.revision).as_ref())
    }

    /// What must hold between a status and the one that follows it.
    fn check_status(&mut self, old: &GrowthTrainingJob, new: &GrowthTrainingJob) {
        let mut broken = Vec::new();
        let (before, after) =
            (old.status.clone().unwrap_or_default(), new.status.clone().unwrap_or_default());
        if old.status == new.status {
            broken.push("a write although nothing has changed".to_owned());
        }
        let is_true = |status: &growth_crds::GrowthTrainingJobStatus, kind: &str| {
            status.conditions.iter().any(|one| one.type_ == kind && one.status == "True")
        };
        for kind in ["Complete", "Failed"] {
            if is_true(&before, kind) && (!is_true(&after, kind) || after.phase != before.phase) {
                broken.push(format!("{kind} was final"));
            }
        }
        if is_true(&after, "Complete") && is_true(&after, "Failed") {
            broken.push("Complete and Failed exclude each other".to_owned());
        }
        if (after.phase == Some(Phase::Complete)) != is_true(&after, "Complete") {
            broken.push("phase and condition Complete disagree".to_owned());
        }
        for condition in &before.conditions {
            match after.conditions.iter().find(|one| one.type_ == condition.type_) {
                None => broken.push(format!("condition {} was removed", condition.type_)),
                Some(now) if now.status == condition.status => {
                    if now.last_transition_time != condition.last_transition_time {
                        broken.push(format!("{}: a transition time without a transition", now.type_));
                    }
                }
                Some(_) => {}
            }
        }
        if after.restarts < before.restarts || after.execution_attempts < before.execution_attempts {
            broken.push("a counter went back".to_owned());
        }
        if after.active_seconds < before.active_seconds {
            broken.push("the clock of the deadline went back".to_owned());
        }
        for (old, new) in before.stages.iter().zip(&after.stages) {
            let step = |stage: &StageStatus| stage.checkpoint.as_ref().map_or(0, |one| one.step);
            if step(new) < step(old) {
                broken.push(format!("stage {} has lost a checkpoint", old.name));
            }
            if old.state == StageState::Complete && new.state != StageState::Complete {
                broken.push(format!("stage {} was complete", old.name));
            }
            for (old, new) in [(&old.attempt, &new.attempt), (&old.transform, &new.transform)] {
                let number = |attempt: &Option<growth_crds::status::AttemptStatus>| {
                    attempt.as_ref().map_or(0, |attempt| attempt.number)
                };
                if number(new) < number(old) {
                    broken.push("the number of an attempt went back".to_owned());
                }
                if number(new) > number(old) + 1 && number(old) > 0 {
                    broken.push("an attempt was left out".to_owned());
                }
            }
        }
        self.broken.append(&mut broken);
    }

    fn delete_training_job(&mut self, name: &str) -> Answer {
        self.writes += 1;
        self.training_jobs.remove(name);
        success()
    }

    fn create_job(&mut self, mut job: Job) -> Answer {
        let name = job.name_any();
        if self.jobs.objects.contains_key(&name) {
            return Err((409, format!("jobs \"{name}\" already exists")));
        }
        self.check_new_job(&job);
        job.metadata.uid = Some(self.new_uid());
        // Nobody here reads what containers are made of.
        if let Some(spec) = &mut job.spec {
            spec.template.spec = None;
            spec.template.metadata.get_or_insert_default().annotations = None;
        }
        self.writes += 1;
        json_of(self.jobs.put(job, &mut self.revision).as_ref())
    }

    /// The status comes first: a Job that nobody would know of after a crash must not be.
    fn check_new_job(&mut self, job: &Job) {
        let name = job.name_any();
        let Some(owner) = job.owner_references().first() else {
            return self.broken.push(format!("Job {name} has no owner"));
        };
        let Some(stored) =
            self.training_jobs.objects.values().find(|one| one.uid().as_ref() == Some(&owner.uid))
        else {
            // Its owner was deleted meanwhile; the garbage collector takes it.
            return;
        };
        let stage =
            job.labels().get("growth.dev/stage").filter(|_| job.labels()["growth.dev/work"] == "train");
        let stage = stage.and_then(|name| stored.spec.stages.iter().find(|stage| &stage.name == name));
        let elastic = stage.and_then(|stage| stage.elastic.as_ref());
        let sizes = elastic.map_or(vec![1], |elastic| elastic_sizes(elastic, 4, true));
        if !size(job).is_some_and(|size| sizes.contains(&size)) {
            self.broken.push(format!("Job {name} has {:?} pods, which may be {sizes:?}", size(job)));
        }
        let status = stored.status.clone().unwrap_or_default();
        let stages = status
            .stages
            .iter()
            .flat_map(|stage| [&stage.attempt, &stage.transform])
            .filter_map(Option::as_ref);
        let newest = |attempt: &growth_crds::status::AttemptStatus| attempt.job_name == name;
        let is_recorded = stages.chain(status.data.as_ref()).any(newest);
        // A second leader may come late with an attempt that the first one has seen through already.
        let was_recorded = name
            .rsplit_once("-t")
            .and_then(|(_, number)| number.parse::<i32>().ok())
            .is_some_and(|number| status.execution_attempts.is_some_and(|attempts| number <= attempts));
        if !is_recorded && !was_recorded {
            self.broken.push(format!("Job {name} was created before its attempt was recorded"));
        }
    }

    /// Propagation is foreground: it goes when its pods are gone.
    fn delete_job(&mut self, name: &str) -> Answer {
        let Some(job) = self.jobs.objects.get(name).cloned() else { return Err((404, name.to_owned())) };
        if job.metadata.deletion_timestamp.is_none() {
            self.writes += 1;
            let now = self.now;
            self.update_job(name, |job| job.metadata.deletion_timestamp = Some(Time(timestamp(now))));
        }
        success()
    }

    fn create_service(&mut self, mut service: Service) -> Answer {
        let name = service.name_any();
        if self.services.objects.contains_key(&name) {
            return Err((409, format!("services \"{name}\" already exists")));
        }
        service.metadata.uid = Some(self.new_uid());
        self.writes += 1;
        json_of(self.services.put(service, &mut self.revision).as_ref())
    }

    // What users and Kubernetes itself do.

    pub fn create_training_job(&mut self, mut job: GrowthTrainingJob) {
        job.metadata.uid = Some(self.new_uid());
        job.metadata.generation = Some(1);
        self.training_jobs.put(job, &mut self.revision);
    }

    /// `kubectl delete`; returns what it was.
    pub fn remove_training_job(&mut self, name: &str) -> Option<Arc<GrowthTrainingJob>> {
        let job = self.training_jobs.objects.get(name).cloned();
        self.training_jobs.remove(name);
        job
    }

    pub fn update_training_job(&mut self, name: &str, change: impl FnOnce(&mut GrowthTrainingJob)) {
        let Some(job) = self.training_jobs.objects.get(name) else { return };
        let mut changed = (**job).clone();
        change(&mut changed);
        if changed != **job {
            changed.metadata.generation = changed.metadata.generation.map(|generation| generation + 1);
            self.training_jobs.put(changed, &mut self.revision);
        }
    }

    pub fn update_job(&mut self, name: &str, change: impl FnOnce(&mut Job)) {
        let Some(job) = self.jobs.objects.get(name) else { return };
        let mut changed = (**job).clone();
        change(&mut changed);
        if changed != **job {
            self.jobs.put(changed, &mut self.revision);
        }
    }

    pub fn remove_job(&mut self, name: &str) {
        self.jobs.remove(name);
    }

    pub fn remove_service(&mut self, name: &str) {
        self.services.remove(name);
    }

    pub fn create_pod(&mut self, metadata: ObjectMeta) -> String {
        let uid = self.new_uid();
        let name = format!("{}-{uid}", metadata.name.clone().unwrap_or_default());
        let metadata = ObjectMeta { uid: Some(uid), name: Some(name.clone()), ..metadata };
        let status = Some(serde_json::from_value(json!({"phase": "Pending"})).unwrap());
        self.pods.put(Pod { metadata, spec: None, status }, &mut self.revision);
        name
    }

    pub fn update_pod(&mut self, name: &str, change: impl FnOnce(&mut Pod)) {
        let Some(pod) = self.pods.objects.get(name) else { return };
        let mut changed = (**pod).clone();
        change(&mut changed);
        if changed != **pod {
            self.pods.put(changed, &mut self.revision);
        }
    }

    pub fn remove_pod(&mut self, name: &str) {
        self.pods.remove(name);
    }
}

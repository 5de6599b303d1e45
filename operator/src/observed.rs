//! What was seen of a job's children, and what can be read from it.

use crate::children::TRAINER_CONTAINER;
use crate::names::LABEL_JOB;
use growth_crds::GrowthTrainingJob;
use growth_crds::protocol::{Outcome, Progress};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::{Resource, ResourceExt};
use std::sync::Arc;

/// A pod whose deletion is overdue by this much will not be confirmed dead: its node is out of reach. The checkpoint
/// fence makes going on without it safe.
const OVERDUE_SECONDS: i64 = 10;

/// A node that has not answered for so long, after Kubernetes has noticed it, is given up.
pub const UNREACHABLE_SECONDS: i64 = 20;

/// Children of one job that carry its uid as owner, what rank 0 says, and the job that trains the first stage.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Jobs of all attempts.
    pub jobs: Vec<Arc<Job>>,
    /// Pods of all attempts.
    pub pods: Vec<Arc<Pod>>,
    /// Answer of rank 0 of the running attempt, if it was asked and answered.
    pub progress: Option<Progress>,
    /// The job that `spec.stages[0].trainedBy` names, if it is there.
    pub base: Option<Arc<GrowthTrainingJob>>,
}

impl Observed {
    /// Children that carry this object's uid; one of the same name that was deleted before has another. Pods of a Job that
    /// is gone still count; those of a Job that is not this object's do not.
    pub fn of(
        job: &GrowthTrainingJob,
        jobs: impl IntoIterator<Item = Arc<Job>>,
        pods: impl IntoIterator<Item = Arc<Pod>>,
    ) -> Self {
        let Some(uid) = job.uid() else { return Self::default() };
        let (jobs, foreign): (Vec<_>, Vec<_>) = jobs
            .into_iter()
            .filter(|child| is_labelled(job, child.as_ref()))
            .partition(|child| child.owner_references().iter().any(|owner| owner.uid == uid));
        let is_foreign = |pod: &Pod| foreign.iter().any(|job| owns(job, pod));
        let pods =
            pods.into_iter().filter(|pod| is_labelled(job, pod.as_ref()) && !is_foreign(pod)).collect();
        Self { jobs, pods, progress: None, base: None }
    }

    /// The Job of this name.
    pub fn job(&self, name: &str) -> Option<&Job> {
        self.jobs.iter().map(AsRef::as_ref).find(|job| job.name_any() == name)
    }

    /// Pods of a Job.
    pub fn pods_of(&self, job: &Job) -> Vec<&Pod> {
        self.pods.iter().map(AsRef::as_ref).filter(|pod| owns(job, pod)).collect()
    }

    /// Whether anything of the job still runs: a pod that can be expected to end, or a Job.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.pods.iter().any(|pod| is_live(pod, now))
            || self.jobs.iter().any(|job| self.is_live_job(job, now))
    }

    /// A Job that is being deleted stays until its pods are gone, but for those beyond reach.
    fn is_live_job(&self, job: &Job, now: Timestamp) -> bool {
        let pods = self.pods_of(job);
        !is_finished(job) && (pods.is_empty() || pods.iter().any(|pod| is_live(pod, now)))
    }
}

/// At its end, whatever that was: no pod of it runs.
pub fn is_finished(job: &Job) -> bool {
    job_is(job, "Complete") || job_is(job, "Failed")
}

fn is_labelled<K: Resource>(job: &GrowthTrainingJob, child: &K) -> bool {
    child.labels().get(LABEL_JOB) == Some(&job.name_any()) && child.namespace() == job.namespace()
}

fn owns(job: &Job, pod: &Pod) -> bool {
    pod.owner_references().iter().any(|owner| job.uid().as_ref() == Some(&owner.uid))
}

/// Neither ended nor beyond reach.
fn is_live(pod: &Pod, now: Timestamp) -> bool {
    !has_ended(pod) && !is_out_of_reach(pod, now)
}

/// Whether all its containers have ended.
pub fn has_ended(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Its deletion is overdue, or its node has not answered for a while.
pub fn is_out_of_reach(pod: &Pod, now: Timestamp) -> bool {
    let deadline = pod.metadata.deletion_timestamp.as_ref();
    // `deletionTimestamp` is when the grace period ends.
    let is_overdue = deadline.is_some_and(|time| now.as_second() - time.0.as_second() > OVERDUE_SECONDS);
    let silence = unreachable_since(pod).map_or(0, |since| now.as_second() - since.as_second());
    is_overdue || silence >= UNREACHABLE_SECONDS
}

/// When its node stopped answering. Kubernetes then marks the pod as not ready, and nobody is there to say the same of
/// its containers; a kubelet always says both. (Looking at the node would need rights on nodes.)
pub fn unreachable_since(pod: &Pod) -> Option<Timestamp> {
    if !is_true(pod, "ContainersReady") || has_ended(pod) {
        return None;
    }
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready =
        conditions.iter().find(|condition| condition.type_ == "Ready" && condition.status == "False")?;
    ready.last_transition_time.as_ref().map(|time| time.0)
}

/// `Pending`, `Running`, ...
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Status and message of a pod's condition.
pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| condition.type_ == kind)?;
    let text = |value: &'a Option<String>| value.as_deref().unwrap_or_default();
    Some((&found.status, text(&found.reason), text(&found.message)))
}

/// Whether a condition of the pod is true.
pub fn is_true(pod: &Pod, kind: &str) -> bool {
    condition(pod, kind).is_some_and(|(status, _, _)| status == "True")
}

/// How many pods the Job has.
pub fn size(job: &Job) -> Option<i32> {
    job.spec.as_ref()?.completions
}

/// Whether a condition of the Job is true.
pub fn job_is(job: &Job, kind: &str) -> bool {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|one| one.type_ == kind && one.status == "True"))
}

/// The status of the container that trains.
pub fn trainer_status(pod: &Pod) -> Option<&ContainerStatus> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == TRAINER_CONTAINER)
}

/// Exit code, reason and termination message of the container that trains, once it has ended.
pub fn termination(pod: &Pod) -> Option<(i32, &str, &str)> {
    let ended = trainer_status(pod)?.state.as_ref()?.terminated.as_ref()?;
    Some((
        ended.exit_code,
        ended.reason.as_deref().unwrap_or_default(),
        ended.message.as_deref().unwrap_or_default(),
    ))
}

/// The last word of the attempt: that of any of its pods, for all ranks say the same.
pub fn outcome(pods: &[&Pod]) -> Option<Outcome> {
    pods.iter().find_map(|pod| Outcome::parse(termination(pod)?.2))
}

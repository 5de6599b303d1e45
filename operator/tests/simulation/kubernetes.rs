//! The rest of the cluster: Job controller, garbage collector, scheduler, nodes with their kubelets, the trainers that run
//! there, and the bucket. Each does one thing at a time, when it is told to.

use crate::api_server::ApiServer;
use crate::world::timestamp;
use growth_crds::protocol::{Outcome, Progress, contract};
use growth_crds::status::CheckpointStatus;
use growth_operator::observed::{has_ended, is_finished, is_true, job_is, phase, size};
use k8s_openapi::api::batch::v1::JobCondition;
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// Steps of every stage.
pub const STEPS: u64 = 5;
/// From SIGTERM to SIGKILL.
const GRACE_SECONDS: i64 = 30;
/// Until Kubernetes notices that a node does not answer, and until it evicts the pods there.
const NOTICE_SECONDS: i64 = 20;
const EVICT_SECONDS: i64 = 300;

pub const NODES: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    Up,
    /// Power is off.
    Down,
    /// Its pods run on and reach the bucket; the API server does not hear of it.
    Partitioned,
}

#[derive(Clone, Copy)]
struct Node {
    state: NodeState,
    since: i64,
    /// Pods that it has room for.
    slots: usize,
}

/// More than anybody asks for.
pub const PLENTY: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    Data,
    Grow(usize),
    Train(usize),
}

/// The container of a pod.
#[derive(Debug, Clone)]
pub struct Process {
    pub node: usize,
    pub job_uid: String,
    task: Task,
    attempt: i32,
    rank: i32,
    /// Ranks of its gang.
    size: usize,
    step: u64,
    stepped_at: i64,
    started_at: i64,
    asked_to_stop: bool,
    hangs: bool,
    /// Exit code and termination message.
    pub exit: Option<(i32, String)>,
}

impl Process {
    /// Only training has a deadline between two steps.
    pub fn hang(&mut self) {
        self.hangs = matches!(self.task, Task::Train(_));
    }
}

/// Commits of one stage in order: attempt and step.
#[derive(Debug, Default, Clone)]
pub struct StageFolder {
    pub commits: Vec<(i32, u64)>,
}

impl StageFolder {
    fn newest(&self) -> Option<u64> {
        self.commits.iter().map(|(_, step)| *step).max()
    }

    pub fn is_complete(&self) -> bool {
        self.newest() == Some(STEPS)
    }

    /// The fence: not once a newer attempt has written past step 0.
    fn commit(&mut self, attempt: i32, step: u64) -> bool {
        let is_fenced = self.commits.iter().any(|(other, step)| *other > attempt && *step > 0);
        if !is_fenced {
            self.commits.push((attempt, step));
        }
        !is_fenced
    }
}

/// What became of a Job's pods.
#[derive(Default, Clone)]
struct Count {
    succeeded: BTreeSet<String>,
    /// Why the first one failed, as the Job's condition says it.
    failure: Option<&'static str>,
}

#[derive(Default)]
pub struct Bucket {
    pub has_data: bool,
    pub stages: BTreeMap<usize, StageFolder>,
}

pub struct Kubernetes {
    nodes: [Node; NODES],
    pub processes: BTreeMap<String, Process>,
    pub bucket: Bucket,
    /// How containers ended, by the Job's uid: rank, exit code, message. Their peers notice by their connections.
    ends: BTreeMap<String, Vec<(i32, i32, String)>>,
    /// What the Job controller has counted of pods that may be gone by now, by the Job's uid.
    counted: BTreeMap<String, Count>,
    /// Containers that ended badly, and not because a peer had: what may count as a restart, at most.
    pub bad_ends: i32,
    /// The second stage makes no last step.
    pub is_held: bool,
    next_node: usize,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Kubernetes {
            nodes: [Node { state: NodeState::Up, since: 0, slots: PLENTY }; NODES],
            processes: BTreeMap::new(),
            bucket: Bucket::default(),
            ends: BTreeMap::new(),
            counted: BTreeMap::new(),
            bad_ends: 0,
            is_held: false,
            next_node: 0,
        }
    }
}

fn node_of(pod: &Pod) -> Option<usize> {
    pod.spec.as_ref()?.node_name.as_ref()?.strip_prefix('n')?.parse().ok()
}

fn set_condition(pod: &mut Pod, kind: &str, status: &str, reason: &str, now: i64) {
    let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
    let time = Some(Time(timestamp(now)));
    match conditions.iter_mut().find(|one| one.type_ == kind) {
        Some(known) if known.status == status => {}
        Some(known) => {
            (known.status, known.last_transition_time) = (status.to_owned(), time);
        }
        None => conditions.push(PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
            last_transition_time: time,
            ..PodCondition::default()
        }),
    }
}

pub fn delete_pod(api: &mut ApiServer, name: &str) {
    let now = api.now;
    let is_bound = api.pods.objects.get(name).is_some_and(|pod| node_of(pod).is_some());
    if !is_bound {
        // No kubelet has seen it.
        api.update_pod(name, |pod| {
            pod.status.get_or_insert_default().phase = Some("Failed".to_owned());
            pod.metadata.deletion_timestamp.get_or_insert(Time(timestamp(now)));
        });
        return;
    }
    api.update_pod(name, |pod| {
        pod.metadata.deletion_timestamp.get_or_insert(Time(timestamp(now + GRACE_SECONDS)));
        pod.metadata.deletion_grace_period_seconds = Some(GRACE_SECONDS);
    });
}

impl Kubernetes {
    pub fn set_node(&mut self, api: &ApiServer, node: usize, state: NodeState) {
        if state == NodeState::Down {
            // What ran there is gone, and nobody says so.
            let names = self.processes.iter().filter(|(_, process)| process.node == node);
            let names: Vec<String> = names.map(|(name, _)| name.clone()).collect();
            names.iter().for_each(|name| self.end(name, 137, ""));
        }
        self.nodes[node] = Node { state, since: api.now, ..self.nodes[node] };
    }

    /// Others take or give back what a node has. What runs there runs on.
    pub fn set_slots(&mut self, node: usize, slots: usize) {
        self.nodes[node].slots = slots;
    }

    fn has_room(&self, api: &ApiServer, node: usize) -> bool {
        let pods = api.pods.objects.values();
        let held = pods.filter(|pod| node_of(pod) == Some(node) && !has_ended(pod)).count();
        self.is_up(node) && held < self.nodes[node].slots
    }

    pub fn is_up(&self, node: usize) -> bool {
        self.nodes[node].state == NodeState::Up
    }

    /// Whether the node of a container has been up since that began.
    pub fn answered_all_along(&self, process: &Process) -> bool {
        let node = self.nodes[process.node];
        node.state == NodeState::Up && (node.since < process.started_at || node.since == 0)
    }

    // ---- Job controller and garbage collector

    pub fn control_jobs(&mut self, api: &mut ApiServer) {
        self.collect_garbage(api);
        let names: Vec<String> = api.jobs.objects.keys().cloned().collect();
        for name in names {
            self.control_job(api, &name);
        }
        self.remove_ended_pods(api);
    }

    fn collect_garbage(&mut self, api: &mut ApiServer) {
        let owners: BTreeSet<String> =
            api.training_jobs.objects.values().filter_map(|job| job.uid()).collect();
        let is_orphan = |object: &ObjectMeta| {
            let mut references = object.owner_references.iter().flatten();
            references.any(|owner| owner.kind == "GrowthTrainingJob" && !owners.contains(&owner.uid))
        };
        let jobs: Vec<String> = api
            .jobs
            .objects
            .values()
            .filter(|job| is_orphan(&job.metadata))
            .map(|job| job.name_any())
            .collect();
        jobs.iter().for_each(|name| api.remove_job(name));
        let services: Vec<String> = api
            .services
            .objects
            .values()
            .filter(|service| is_orphan(&service.metadata))
            .map(|service| service.name_any())
            .collect();
        services.iter().for_each(|name| api.remove_service(name));
        let uids: BTreeSet<String> = api.jobs.objects.values().filter_map(|job| job.uid()).collect();
        let pods: Vec<String> = api
            .pods
            .objects
            .values()
            .filter(|pod| pod.owner_references().iter().all(|owner| !uids.contains(&owner.uid)))
            .map(|pod| pod.name_any())
            .collect();
        pods.iter().for_each(|name| delete_pod(api, name));
    }

    fn control_job(&mut self, api: &mut ApiServer, name: &str) {
        let Some(job) = api.jobs.objects.get(name).cloned() else { return };
        let uid = job.uid().unwrap();
        let pods: Vec<_> = api
            .pods
            .objects
            .values()
            .filter(|pod| pod.owner_references().iter().any(|owner| owner.uid == uid))
            .cloned()
            .collect();
        let now = api.now;
        if job.status.is_none() {
            api.update_job(name, |job| {
                job.status.get_or_insert_default().start_time = Some(Time(timestamp(now)));
            });
        }
        for pod in pods.iter().filter(|pod| has_ended(pod)) {
            let index = pod.labels()["batch.kubernetes.io/job-completion-index"].clone();
            let count = self.counted.entry(uid.clone()).or_default();
            if phase(pod) == "Succeeded" {
                count.succeeded.insert(index);
                continue;
            }
            let is_disrupted = is_true(pod, "DisruptionTarget");
            count.failure.get_or_insert(if is_disrupted {
                "PodFailurePolicy"
            } else {
                "BackoffLimitExceeded"
            });
        }
        if job.metadata.deletion_timestamp.is_some() {
            pods.iter().for_each(|pod| delete_pod(api, &pod.name_any()));
            if pods.is_empty() {
                api.remove_job(name);
            }
            return;
        }
        if is_finished(&job) {
            return;
        }
        let replicas = job.spec.as_ref().and_then(|spec| spec.completions).unwrap_or(1);
        let Count { succeeded, failure } = self.counted.entry(uid.clone()).or_default().clone();
        let done = i32::try_from(succeeded.len()).unwrap();
        api.update_job(name, |job| job.status.get_or_insert_default().succeeded = Some(done));
        if let Some(reason) = failure {
            add_condition(api, name, "FailureTarget", reason);
            let alive: Vec<_> = pods.iter().filter(|pod| !has_ended(pod)).collect();
            alive.iter().for_each(|pod| delete_pod(api, &pod.name_any()));
            if alive.is_empty() {
                add_condition(api, name, "Failed", reason);
            }
            return;
        }
        if done == replicas {
            add_condition(api, name, "SuccessCriteriaMet", "CompletionsReached");
            add_condition(api, name, "Complete", "CompletionsReached");
            return;
        }
        for index in 0..replicas {
            let index = index.to_string();
            let has_pod =
                pods.iter().any(|pod| pod.labels()["batch.kubernetes.io/job-completion-index"] == index);
            if has_pod || succeeded.contains(&index) {
                continue;
            }
            let template = job.spec.as_ref().unwrap().template.metadata.clone().unwrap_or_default();
            let mut labels = template.labels.unwrap_or_default();
            labels.insert("batch.kubernetes.io/job-completion-index".to_owned(), index.clone());
            labels.insert("batch.kubernetes.io/job-name".to_owned(), name.to_owned());
            api.create_pod(ObjectMeta {
                name: Some(format!("{name}-{index}")),
                namespace: job.namespace(),
                labels: Some(labels),
                owner_references: job.controller_owner_ref(&()).map(|owner| vec![owner]),
                ..ObjectMeta::default()
            });
        }
    }

    /// Once the Job controller has counted it, a pod that was deleted and has ended goes.
    fn remove_ended_pods(&mut self, api: &mut ApiServer) {
        let uids: BTreeSet<String> = api.jobs.objects.values().filter_map(|job| job.uid()).collect();
        let is_counted = |pod: &Pod| {
            let owner = pod.owner_references().first().map(|owner| owner.uid.clone()).unwrap_or_default();
            !uids.contains(&owner) || self.counted.contains_key(&owner)
        };
        let gone: Vec<String> = api
            .pods
            .objects
            .values()
            .filter(|pod| pod.metadata.deletion_timestamp.is_some() && has_ended(pod) && is_counted(pod))
            .map(|pod| pod.name_any())
            .collect();
        gone.iter().for_each(|name| api.remove_pod(name));
    }

    // ---- Scheduler and node controller

    pub fn schedule(&mut self, api: &mut ApiServer) {
        let now = api.now;
        let waiting: Vec<String> = api
            .pods
            .objects
            .values()
            .filter(|pod| node_of(pod).is_none() && !has_ended(pod))
            .map(|pod| pod.name_any())
            .collect();
        for name in waiting {
            let node = (0..NODES)
                .map(|offset| (self.next_node + offset) % NODES)
                .find(|node| self.has_room(api, *node));
            self.next_node += 1;
            api.update_pod(&name, |pod| match node {
                Some(node) => {
                    let node_name = Some(format!("n{node}"));
                    pod.spec = Some(PodSpec { node_name, ..PodSpec::default() });
                    set_condition(pod, "PodScheduled", "True", "", now);
                }
                None => set_condition(pod, "PodScheduled", "False", "Unschedulable", now),
            });
        }
    }

    pub fn watch_nodes(&mut self, api: &mut ApiServer) {
        let now = api.now;
        for (index, node) in self.nodes.iter().enumerate() {
            let silence = if node.state == NodeState::Up { 0 } else { now - node.since };
            if silence < NOTICE_SECONDS {
                continue;
            }
            let pods: Vec<String> = api
                .pods
                .objects
                .values()
                .filter(|pod| node_of(pod) == Some(index) && !has_ended(pod))
                .map(|pod| pod.name_any())
                .collect();
            for name in pods {
                api.update_pod(&name, |pod| {
                    set_condition(pod, "Ready", "False", "", now);
                    if silence >= EVICT_SECONDS {
                        set_condition(pod, "DisruptionTarget", "True", "DeletionByTaintManager", now);
                    }
                });
                if silence >= EVICT_SECONDS {
                    delete_pod(api, &name);
                }
            }
        }
    }

    // ---- Kubelets

    pub fn kubelet(&mut self, api: &mut ApiServer, node: usize) {
        if !self.is_up(node) {
            return;
        }
        let now = api.now;
        let pods: Vec<_> =
            api.pods.objects.values().filter(|pod| node_of(pod) == Some(node)).cloned().collect();
        for pod in pods.iter().filter(|pod| !has_ended(pod)) {
            let name = pod.name_any();
            let overdue =
                pod.metadata.deletion_timestamp.as_ref().is_some_and(|time| timestamp(now) >= time.0);
            if overdue {
                self.end(&name, 137, "");
            }
            match self.processes.get_mut(&name) {
                None if phase(pod) == "Running" || pod.metadata.deletion_timestamp.is_some() => {
                    self.report_end(api, &name, 137, "");
                }
                None => {
                    let process = self.new_process(api, pod, node);
                    self.processes.insert(name.clone(), process);
                    api.update_pod(&name, |pod| {
                        pod.status.get_or_insert_default().phase = Some("Running".to_owned());
                        set_condition(pod, "Ready", "True", "", now);
                        set_condition(pod, "ContainersReady", "True", "", now);
                    });
                }
                Some(process) => {
                    process.asked_to_stop |= pod.metadata.deletion_timestamp.is_some();
                    match process.exit.clone() {
                        Some((code, message)) => self.report_end(api, &name, code, &message),
                        // After a partition.
                        None => api.update_pod(&name, |pod| set_condition(pod, "Ready", "True", "", now)),
                    }
                }
            }
        }
        // Containers whose pods are gone.
        self.processes.retain(|name, process| process.node != node || api.pods.objects.contains_key(name));
    }

    fn report_end(&mut self, api: &mut ApiServer, name: &str, code: i32, message: &str) {
        let now = api.now;
        if code != 0 && code != i32::from(contract::EXIT_PEER_LOST) {
            self.bad_ends += 1;
        }
        let state = json!({"terminated": {
            "exitCode": code, "message": message, "reason": if code == 0 { "Completed" } else { "Error" },
            "finishedAt": Time(timestamp(now)),
        }});
        let statuses = serde_json::from_value(json!([{
            "name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
        }]))
        .unwrap();
        api.update_pod(name, |pod| {
            let status = pod.status.get_or_insert_default();
            status.phase = Some(if code == 0 { "Succeeded" } else { "Failed" }.to_owned());
            status.container_statuses = Some(statuses);
            set_condition(pod, "Ready", "False", "", now);
            set_condition(pod, "ContainersReady", "False", "", now);
        });
        self.processes.remove(name);
    }

    fn new_process(&self, api: &mut ApiServer, pod: &Pod, node: usize) -> Process {
        let labels = pod.labels();
        let stages = ["small", "large", "huge"];
        let stage = labels
            .get("growth.dev/stage")
            .map_or(0, |name| stages.iter().position(|known| known == name).unwrap());
        let task = match labels["growth.dev/work"].as_str() {
            "data" => Task::Data,
            "transform" => Task::Grow(stage),
            _ => Task::Train(stage),
        };
        if task != Task::Data && !self.bucket.has_data {
            api.broken.push(format!("{task:?} without data"));
        }
        let folder = |index: usize| self.bucket.stages.get(&index).cloned().unwrap_or_default();
        match task {
            Task::Grow(stage) if !folder(stage - 1).is_complete() => {
                api.broken.push(format!("stage {stage} grows from a stage that is not complete"));
            }
            Task::Train(stage) if stage > 0 && folder(stage).newest().is_none() => {
                api.broken.push(format!("stage {stage} trains before it has grown"));
            }
            _ => {}
        }
        let step = match task {
            Task::Train(stage) => folder(stage).newest().unwrap_or(0),
            _ => 0,
        };
        let job_uid = pod.owner_references()[0].uid.clone();
        let job = api.jobs.objects.values().find(|job| job.uid().as_ref() == Some(&job_uid));
        let size = job.and_then(|job| size(job)).unwrap_or(1);
        Process {
            node,
            job_uid,
            size: usize::try_from(size).unwrap(),
            task,
            attempt: labels["growth.dev/attempt"].parse().unwrap(),
            rank: labels["batch.kubernetes.io/job-completion-index"].parse().unwrap(),
            step,
            stepped_at: api.now,
            started_at: api.now,
            asked_to_stop: false,
            hangs: false,
            exit: None,
        }
    }

    // ---- Trainers

    /// Every container of a node that has power works for a moment.
    pub fn work(&mut self, api: &ApiServer, node: usize) {
        if self.nodes[node].state == NodeState::Down {
            return;
        }
        let names: Vec<String> = self
            .processes
            .iter()
            .filter(|(_, process)| process.node == node && process.exit.is_none() && !process.hangs)
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            let process = self.processes[&name].clone();
            let exit = match process.task {
                Task::Data => {
                    self.bucket.has_data = true;
                    let attempts = self.known_attempts();
                    Some((0, Outcome { attempts, ..Outcome::finished(None) }))
                }
                Task::Grow(stage) => {
                    self.bucket.stages.entry(stage).or_default().commits.push((process.attempt, 0));
                    Some((0, Outcome::finished(Some(checkpoint(stage, 0)))))
                }
                Task::Train(stage) => self.train(api.now, &name, &process, stage),
            };
            if let Some((code, outcome)) = exit {
                self.end(&name, code, &serde_json::to_string(&outcome).unwrap());
            }
        }
    }

    /// A container ends, unless it has.
    pub fn end(&mut self, name: &str, code: i32, message: &str) {
        let Some(process) = self.processes.get_mut(name).filter(|process| process.exit.is_none()) else {
            return;
        };
        process.exit = Some((code, message.to_owned()));
        self.ends.entry(process.job_uid.clone()).or_default().push((process.rank, code, message.to_owned()));
    }

    fn known_attempts(&self) -> BTreeMap<String, i32> {
        let names = ["small", "large", "huge"];
        let newest = |folder: &StageFolder| folder.commits.iter().map(|(attempt, _)| *attempt).max();
        let stages = self.bucket.stages.iter();
        stages.filter_map(|(index, folder)| Some((names[*index].to_owned(), newest(folder)?))).collect()
    }

    fn train(&mut self, now: i64, name: &str, process: &Process, stage: usize) -> Option<(i32, Outcome)> {
        let gang = self.processes.values().filter(|other| other.job_uid == process.job_uid);
        let ended = self.ends.get(&process.job_uid).into_iter().flatten();
        if ended.clone().any(|(_, code, _)| *code != 0) {
            return Some((i32::from(contract::EXIT_PEER_LOST), Outcome::failed("a peer is lost")));
        }
        let of_leader = ended.clone().find(|(rank, ..)| *rank == 0);
        if let Some((_, _, message)) = of_leader {
            return Some((0, Outcome::parse(message)?));
        }
        let ranks: BTreeSet<i32> =
            gang.clone().map(|peer| peer.rank).chain(ended.map(|(rank, ..)| *rank)).collect();
        // Only one that was asked to stop ends before rank 0 does.
        let stops = gang.clone().any(|peer| peer.asked_to_stop) || self.ends.contains_key(&process.job_uid);
        if ranks.len() < process.size {
            // They still look for each other.
            return stops.then(|| (0, Outcome::stopped(checkpoint(stage, process.step))));
        }
        if process.rank > 0 {
            return None;
        }
        let last = if self.is_held && stage == 1 { STEPS - 1 } else { STEPS };
        let step = if stops { process.step } else { (process.step + 1).min(last).max(process.step) };
        let is_new = step > process.step;
        let me = self.processes.get_mut(name).unwrap();
        (me.step, me.stepped_at) = (step, now);
        let is_last = step == STEPS;
        if !(stops || is_last || (is_new && step.is_multiple_of(2))) {
            return None;
        }
        if !self.bucket.stages.entry(stage).or_default().commit(process.attempt, step) {
            return Some((1, Outcome::failed("a newer attempt writes checkpoints")));
        }
        match () {
            () if is_last => Some((0, Outcome::finished(Some(checkpoint(stage, step))))),
            () if stops => Some((0, Outcome::stopped(checkpoint(stage, step)))),
            () => None,
        }
    }

    /// What rank 0 of a Job says, if its node can be reached.
    pub fn progress(&self, job_uid: &str, now: i64) -> Option<Progress> {
        let leader = self.processes.values().find(|process| {
            process.job_uid == job_uid
                && process.rank == 0
                && process.exit.is_none()
                && self.is_up(process.node)
        })?;
        let Task::Train(stage) = leader.task else { return None };
        assert!(leader.stepped_at <= now);
        Some(Progress {
            stage: ["small", "large", "huge"][stage].to_owned(),
            attempt: leader.attempt,
            step: leader.step,
            tokens: leader.step * 4096,
            total_tokens: STEPS * 4096,
            tokens_per_second: 1000.0,
            loss: Some(2.0),
            checkpoint: None,
            updated_at: timestamp(leader.stepped_at),
        })
    }
}

fn checkpoint(stage: usize, step: u64) -> CheckpointStatus {
    CheckpointStatus {
        uri: format!("file:///runs/{stage}/{step}"),
        step: i64::try_from(step).unwrap(),
        tokens: i64::try_from(step * 4096).unwrap(),
        digest: format!("{stage}-{step}"),
        committed_at: None,
    }
}

fn add_condition(api: &mut ApiServer, name: &str, kind: &str, reason: &str) {
    let now = api.now;
    api.update_job(name, |job| {
        if !job_is(job, kind) {
            job.status.get_or_insert_default().conditions.get_or_insert_default().push(JobCondition {
                type_: kind.to_owned(),
                status: "True".to_owned(),
                reason: Some(reason.to_owned()),
                last_transition_time: Some(Time(timestamp(now))),
                ..JobCondition::default()
            });
        }
    });
}

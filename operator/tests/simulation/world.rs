//! The world that the operator lives in, the things that can happen in it, and what must hold at every step and in the end.

use crate::api_server::{ApiServer, response};
use crate::kubernetes::{Kubernetes, NODES, NodeState, PLENTY, delete_pod};
use crate::operator::{Call, Operator};
use growth_crds::GrowthTrainingJob;
use growth_crds::conditions::Reason;
use growth_crds::status::{Phase, StageState};
use growth_operator::decide::job_to_ask;
use growth_operator::observed::Observed;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::json;
use std::sync::Arc;

/// The one job of the world.
pub const NAME: &str = "tiny";

/// Seconds since 2026.
pub fn timestamp(now: i64) -> Timestamp {
    Timestamp::from_second(1_767_225_600 + now).unwrap()
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Answered,
    /// The API server says 409, 429, 500 or 503 and does nothing.
    Refused(u16),
    /// It never arrives.
    Lost,
    /// It is carried out, and the answer never arrives.
    AnswerLost,
}

#[derive(Debug, Clone, Copy)]
pub enum Watched {
    TrainingJobs,
    Jobs,
    Pods,
}

/// Something that happens. Indices are taken modulo what there is.
#[derive(Debug, Clone)]
pub enum Action {
    /// An operator begins to reconcile, unless it is at it.
    Reconcile(usize),
    /// The call that an operator waits for.
    Call(usize, Fate),
    /// An operator's reconcile runs to its end.
    Finish(usize),
    /// An operator dies and is started again.
    Crash(usize),
    /// A watch of an operator tells its next changes.
    Deliver(usize, Watched, u8),
    /// ... or the last one again.
    DeliverAgain(usize, Watched),
    ControlJobs,
    Schedule,
    WatchNodes,
    Kubelet(usize),
    Work(usize),
    Tick(u16),
    Node(usize, NodeState),
    /// A node has room for so many pods.
    Slots(usize, usize),
    /// A container ends badly: out of memory, a bug.
    KillContainer(usize),
    /// A container stops working.
    HangContainer(usize),
    /// A pod is evicted through the API.
    Evict(usize),
    /// `kubectl delete pod`.
    DeletePod(usize),
    /// `kubectl delete job`.
    DeleteJob(usize),
    Suspend(bool),
    Resize(u8),
    AppendStage,
    /// `kubectl delete gtj` and `kubectl apply` again.
    Recreate,
    /// All is well for a while.
    Calm(u8),
}

/// How a world begins.
#[derive(Debug, Clone)]
pub struct Setting {
    pub operators: usize,
    /// Of the large stage: one is a fixed size, more are elastic.
    pub large_replicas: i32,
    /// Fewest pods of an elastic one.
    pub least_replicas: i32,
    pub max_restarts: i32,
    pub ttl: Option<i64>,
}

pub fn settings(operators: usize) -> impl Strategy<Value = Setting> {
    let ttl = prop_oneof![3 => Just(None), 1 => Just(Some(5_i64))];
    let large = prop_oneof![1 => Just(1), 1 => Just(2), 2 => Just(4)];
    (large, 1..3_i32, prop_oneof![4 => Just(1000), 1 => Just(2)], ttl).prop_map(
        move |(large_replicas, least_replicas, max_restarts, ttl)| Setting {
            operators,
            large_replicas,
            least_replicas,
            max_restarts,
            ttl,
        },
    )
}

pub fn actions(operators: usize) -> impl Strategy<Value = Action> {
    let who = move || 0..operators;
    let watched =
        || prop_oneof![Just(Watched::TrainingJobs), Just(Watched::Jobs), Just(Watched::Pods)].boxed();
    let fate = prop_oneof![
        6 => Just(Fate::Answered),
        1 => prop_oneof![Just(409), Just(429), Just(500), Just(503)].prop_map(Fate::Refused),
        1 => Just(Fate::Lost),
        1 => Just(Fate::AnswerLost),
    ];
    let node = prop_oneof![
        2 => Just(NodeState::Up), 1 => Just(NodeState::Down), 1 => Just(NodeState::Partitioned),
    ];
    prop_oneof![
        12 => who().prop_map(Action::Reconcile),
        12 => (who(), fate).prop_map(|(who, fate)| Action::Call(who, fate)),
        8 => who().prop_map(Action::Finish),
        2 => who().prop_map(Action::Crash),
        12 => (who(), watched(), 1..6_u8).prop_map(|(who, what, count)| Action::Deliver(who, what, count)),
        1 => (who(), watched()).prop_map(|(who, what)| Action::DeliverAgain(who, what)),
        5 => Just(Action::ControlJobs),
        3 => Just(Action::Schedule),
        2 => Just(Action::WatchNodes),
        5 => (0..NODES).prop_map(Action::Kubelet),
        5 => (0..NODES).prop_map(Action::Work),
        5 => (1..40_u16).prop_map(Action::Tick),
        1 => (300..2000_u16).prop_map(Action::Tick),
        2 => (0..NODES, node).prop_map(|(node, state)| Action::Node(node, state)),
        3 => (0..NODES, 0..4_usize).prop_map(|(node, slots)| Action::Slots(node, slots)),
        2 => any::<usize>().prop_map(Action::KillContainer),
        1 => any::<usize>().prop_map(Action::HangContainer),
        1 => any::<usize>().prop_map(Action::Evict),
        1 => any::<usize>().prop_map(Action::DeletePod),
        1 => any::<usize>().prop_map(Action::DeleteJob),
        2 => any::<bool>().prop_map(Action::Suspend),
        3 => (1..6_u8).prop_map(Action::Resize),
        1 => Just(Action::AppendStage),
        1 => Just(Action::Recreate),
        6 => (1..12_u8).prop_map(Action::Calm),
    ]
}

fn manifest(setting: &Setting) -> GrowthTrainingJob {
    let mut object = crate::common::example();
    crate::common::edit(&mut object, "/metadata/namespace", &json!("n"));
    let large = match setting.large_replicas {
        1 => json!({"name": "large", "growth": {"operator": "Stack", "factor": 4}, "tokens": 4_194_304}),
        _ => json!({
            "name": "large", "growth": {"operator": "Stack", "factor": 4}, "tokens": 4_194_304,
            "elastic": {
                "minReplicas": setting.least_replicas, "maxReplicas": 4, "scaleUpDelaySeconds": 30,
            },
        }),
    };
    // Four micro-batches.
    crate::common::edit(&mut object, "/spec/training/microBatchTokens", &json!(1024));
    crate::common::edit(&mut object, "/spec/stages/1", &large);
    crate::common::edit(&mut object, "/spec/replicas", &json!(setting.large_replicas));
    crate::common::edit(&mut object, "/spec/failurePolicy/maxRestarts", &json!(setting.max_restarts));
    if let Some(ttl) = setting.ttl {
        crate::common::edit(&mut object, "/spec/runPolicy/ttlSecondsAfterFinished", &json!(ttl));
    }
    serde_json::from_value(object).unwrap()
}

pub struct World {
    setting: Setting,
    api: ApiServer,
    kubernetes: Kubernetes,
    operators: Vec<Operator>,
    /// Containers that stopped working, and pods deleted by hand: each may count as a restart.
    mishaps: i32,
    stages: usize,
    /// Its children were deleted in the background then: the operator may not have seen all of them.
    is_recreated: bool,
    /// Reconciles begun.
    pub reconciles: u64,
}

impl World {
    pub fn new(setting: &Setting) -> Self {
        let mut api = ApiServer::default();
        api.create_training_job(manifest(setting));
        let mut world = World {
            setting: setting.clone(),
            api,
            kubernetes: Kubernetes::default(),
            operators: Vec::new(),
            mishaps: 0,
            stages: 2,
            is_recreated: false,
            reconciles: 0,
        };
        world.operators = (0..setting.operators).map(|_| world.new_operator()).collect();
        world
    }

    pub fn writes(&self) -> u64 {
        self.api.writes
    }

    fn new_operator(&self) -> Operator {
        Operator::new(&self.api.training_jobs, &self.api.jobs, &self.api.pods)
    }

    fn job(&self) -> Option<&Arc<GrowthTrainingJob>> {
        self.api.training_jobs.objects.get(NAME)
    }

    fn phase(&self) -> Option<Phase> {
        self.job()?.status.as_ref()?.phase
    }

    /// Carries an action out, then looks whether a promise was broken.
    pub async fn act(&mut self, action: &Action) -> Result<(), TestCaseError> {
        match action {
            Action::Reconcile(who) => self.begin(*who),
            Action::Call(who, fate) => self.call(*who, *fate).await,
            Action::Finish(who) => self.finish(*who).await,
            Action::Crash(who) => self.operators[*who] = self.new_operator(),
            Action::Deliver(who, what, count) => {
                for _ in 0..*count {
                    self.deliver(*who, *what);
                }
            }
            Action::DeliverAgain(who, what) => self.deliver_again(*who, *what),
            Action::ControlJobs => self.kubernetes.control_jobs(&mut self.api),
            Action::Schedule => self.kubernetes.schedule(&mut self.api),
            Action::WatchNodes => self.kubernetes.watch_nodes(&mut self.api),
            Action::Kubelet(node) => self.kubernetes.kubelet(&mut self.api, *node),
            Action::Work(node) => self.kubernetes.work(&self.api, *node),
            Action::Tick(seconds) => self.api.now += i64::from(*seconds),
            Action::Node(node, state) => self.kubernetes.set_node(&self.api, *node, *state),
            Action::Slots(node, slots) => self.kubernetes.set_slots(*node, *slots),
            Action::KillContainer(which) => {
                if let Some(name) = self.container(*which) {
                    self.kubernetes.end(&name, 137, "");
                }
            }
            Action::HangContainer(which) => {
                if let Some(process) =
                    self.container(*which).and_then(|name| self.kubernetes.processes.get_mut(&name))
                {
                    self.mishaps += 1;
                    process.hang();
                }
            }
            Action::Evict(which) => self.delete_pod(*which, true),
            Action::DeletePod(which) => self.delete_pod(*which, false),
            Action::DeleteJob(which) => self.delete_job(*which),
            Action::Suspend(value) => {
                self.api.update_training_job(NAME, |job| job.spec.suspend = *value);
            }
            Action::Resize(replicas) => {
                self.api.update_training_job(NAME, |job| job.spec.replicas = i32::from(*replicas));
            }
            Action::AppendStage => self.append_stage(),
            Action::Recreate => self.recreate(),
            Action::Calm(rounds) => {
                for _ in 0..*rounds {
                    self.round(3).await?;
                }
            }
        }
        self.check()
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        if let Some(status) = self.job().and_then(|job| job.status.clone()) {
            let counted = status.restarts.unwrap_or(0);
            // A container that hangs counts once; a bad end counts once at most.
            let most = self.kubernetes.bad_ends + self.mishaps + self.silent_ends();
            if counted > most {
                self.api.broken.push(format!("{counted} restarts count, {most} containers ended badly"));
            }
            if status.phase == Some(Phase::Complete) {
                let complete =
                    |index| self.kubernetes.bucket.stages.get(&index).is_some_and(|one| one.is_complete());
                if !(0..status.stages.len()).all(complete) {
                    self.api.broken.push("Complete, but a stage has no last checkpoint".to_owned());
                }
            }
        }
        match self.api.broken.first() {
            Some(broken) => Err(TestCaseError::fail(broken.clone())),
            None => Ok(()),
        }
    }

    /// Attempts that made no step for so long that they counted as stalled.
    fn silent_ends(&self) -> i32 {
        i32::try_from(self.api.now / 1800).unwrap()
    }

    // ---- The operator

    fn begin(&mut self, who: usize) {
        let operator = &mut self.operators[who];
        let Some(job) = operator.own.objects.get(NAME).cloned() else { return };
        if operator.is_busy() {
            return;
        }
        let jobs = operator.jobs.objects.values().cloned();
        let mut observed = Observed::of(&job, jobs, operator.pods.objects.values().cloned());
        let asked = job_to_ask(&job, timestamp(self.api.now)).and_then(|name| observed.job(name)?.uid());
        observed.progress = asked.and_then(|uid| self.kubernetes.progress(&uid, self.api.now));
        operator.begin(job, observed, timestamp(self.api.now));
        self.reconciles += 1;
    }

    async fn call(&mut self, who: usize, fate: Fate) {
        if let Some(call) = self.operators[who].advance(self.api.now).await {
            self.settle(call, fate);
            // Up to the next call, so that dying here is dying between two calls.
            if let Some(next) = self.operators[who].advance(self.api.now).await {
                self.operators[who].put_back(next);
            }
        }
    }

    fn settle(&mut self, call: Call, fate: Fate) {
        let broken = || Err(std::io::Error::other("connection reset"));
        let result = match fate {
            Fate::Refused(code) => Ok(response(Err((code, "simulated".to_owned())))),
            Fate::Lost => broken(),
            Fate::Answered => {
                self.look_for_rivals(&call);
                Ok(response(self.api.answer(&call.method, &call.path, &call.body)))
            }
            Fate::AnswerLost => {
                drop(self.api.answer(&call.method, &call.path, &call.body));
                broken()
            }
        };
        // Nobody may be there any more to hear it.
        drop(call.answer.send(result));
    }

    /// When an attempt starts, no other may be at work where the operator could know of it: not one on a node that did not
    /// answer for a while, nor one whose Job somebody deleted by hand, nor what a second leader does at the same time.
    fn look_for_rivals(&mut self, call: &Call) {
        if self.operators.len() > 1 || call.method != http::Method::POST || !call.path.ends_with("/jobs") {
            return;
        }
        let new: k8s_openapi::api::batch::v1::Job = serde_json::from_slice(&call.body).unwrap();
        if self.api.jobs.objects.contains_key(&new.name_any()) {
            return;
        }
        let rival = self.kubernetes.processes.iter().find(|(name, process)| {
            let pod = self.api.pods.objects.get(*name);
            let is_overdue = pod.is_none_or(|pod| {
                let deadline = pod.metadata.deletion_timestamp.as_ref();
                deadline.is_some_and(|deadline| deadline.0 < timestamp(self.api.now))
            });
            let job = pod.and_then(|pod| pod.labels().get("batch.kubernetes.io/job-name"));
            let was_orphaned = job.is_none_or(|job| self.api.deleted_by_hand.contains(job));
            process.exit.is_none()
                && !is_overdue
                && !was_orphaned
                && !self.is_recreated
                && self.kubernetes.answered_all_along(process)
        });
        if let Some((name, _)) = rival {
            self.api.broken.push(format!("an attempt starts while {name} is at work"));
        }
    }

    async fn finish(&mut self, who: usize) {
        while let Some(call) = self.operators[who].advance(self.api.now).await {
            self.settle(call, Fate::Answered);
        }
    }

    fn deliver(&mut self, who: usize, what: Watched) -> bool {
        let operator = &mut self.operators[who];
        let is_new = match what {
            Watched::TrainingJobs => operator.own.deliver(&self.api.training_jobs),
            Watched::Jobs => operator.jobs.deliver(&self.api.jobs),
            Watched::Pods => operator.pods.deliver(&self.api.pods),
        };
        operator.is_told |= is_new;
        is_new
    }

    fn deliver_again(&mut self, who: usize, what: Watched) {
        let operator = &mut self.operators[who];
        match what {
            Watched::TrainingJobs => operator.own.deliver_again(&self.api.training_jobs),
            Watched::Jobs => operator.jobs.deliver_again(&self.api.jobs),
            Watched::Pods => operator.pods.deliver_again(&self.api.pods),
        }
        operator.is_told = true;
    }

    // ---- Users and misfortunes

    fn container(&self, which: usize) -> Option<String> {
        let count = self.kubernetes.processes.len();
        self.kubernetes.processes.keys().nth(which % count.max(1)).cloned()
    }

    fn delete_pod(&mut self, which: usize, is_eviction: bool) {
        let names: Vec<String> = self.api.pods.objects.keys().cloned().collect();
        if names.is_empty() {
            return;
        }
        let name = &names[which % names.len()];
        if is_eviction {
            let now = Some(Time(timestamp(self.api.now)));
            self.api.update_pod(name, |pod| {
                let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
                let disruption = json!({
                    "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                    "lastTransitionTime": now,
                });
                if conditions.iter().all(|one| one.type_ != "DisruptionTarget") {
                    conditions.push(serde_json::from_value(disruption).unwrap());
                }
            });
        }
        if !is_eviction {
            self.mishaps += 1;
        }
        delete_pod(&mut self.api, name);
    }

    fn delete_job(&mut self, which: usize) {
        let names: Vec<String> = self.api.jobs.objects.keys().cloned().collect();
        if !names.is_empty() {
            let name = &names[which % names.len()];
            self.api.deleted_by_hand.insert(name.clone());
            self.api.remove_job(name);
        }
    }

    fn append_stage(&mut self) {
        if self.stages == 2 {
            self.stages = 3;
            let stage =
                json!({"name": "huge", "growth": {"operator": "Stack", "factor": 2}, "tokens": 4_194_304});
            self.api.update_training_job(NAME, |job| {
                job.spec.stages.push(serde_json::from_value(stage).unwrap());
            });
        }
    }

    fn recreate(&mut self) {
        let Some(old) = self.api.remove_training_job(NAME) else { return };
        self.is_recreated = true;
        let spec = GrowthTrainingJob::new(NAME, old.spec.clone());
        let metadata = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
            namespace: old.metadata.namespace.clone(),
            ..spec.metadata
        };
        self.api.create_training_job(GrowthTrainingJob { metadata, ..spec });
    }

    // ---- Calm

    /// Everybody does their duty once. Returns whether anything happened.
    async fn round(&mut self, seconds: i64) -> Result<(), TestCaseError> {
        self.kubernetes.control_jobs(&mut self.api);
        self.kubernetes.watch_nodes(&mut self.api);
        self.kubernetes.schedule(&mut self.api);
        for node in 0..NODES {
            self.kubernetes.kubelet(&mut self.api, node);
            self.kubernetes.work(&self.api, node);
        }
        for who in 0..self.operators.len() {
            self.finish(who).await;
            for what in [Watched::Pods, Watched::Jobs, Watched::TrainingJobs] {
                while self.deliver(who, what) {}
            }
            let operator = &self.operators[who];
            if operator.is_told || operator.due.is_some_and(|due| due <= self.api.now) {
                self.operators[who].due = None;
                self.begin(who);
                self.finish(who).await;
            }
            self.check()?;
        }
        self.api.now += seconds;
        Ok(())
    }

    /// The large stage has as many pods as are asked for.
    fn has_wanted_size(&self) -> bool {
        let Some(job) = self.job() else { return false };
        let Some(status) = &job.status else { return false };
        let is_training = status.phase == Some(Phase::Training)
            && status.stages.get(1).is_some_and(|stage| stage.state == StageState::Training);
        let asked = job.spec.replicas.max(self.setting.least_replicas);
        let wanted = [4, 2, 1].into_iter().find(|size| *size <= asked);
        is_training && status.replicas == wanted && status.ready_replicas == wanted
    }

    /// Misfortunes end, and time goes on: the large stage must have the size that is wanted, the job must come to its end,
    /// and then be at rest.
    pub async fn come_to_an_end(&mut self) -> Result<(), TestCaseError> {
        self.kubernetes.is_held = self.setting.large_replicas > 1;
        for node in 0..NODES {
            self.kubernetes.set_slots(node, PLENTY);
            if !self.kubernetes.is_up(node) {
                self.kubernetes.set_node(&self.api, node, NodeState::Up);
            }
        }
        self.api.update_training_job(NAME, |job| job.spec.suspend = false);
        for round in 0.. {
            match self.phase() {
                None if round > 0 => return Ok(()), // its time to live was over
                Some(Phase::Complete | Phase::Failed) => break,
                _ => {}
            }
            prop_assert!(
                round < 3000,
                "not at an end after {round} rounds: {:#?}",
                self.job().map(|job| &job.status)
            );
            self.kubernetes.is_held &= !self.has_wanted_size();
            self.round(if round < 100 { 3 } else { 20 }).await?;
        }
        let status = self.job().unwrap().status.clone().unwrap();
        if status.phase == Some(Phase::Failed) {
            let reason = status.conditions.iter().find(|one| one.type_ == "Failed").unwrap().reason.clone();
            let is_deserved = [Reason::MaxRestartsExceeded, Reason::TransformFailed]
                .iter()
                .any(|one| one.as_str() == reason)
                && self.kubernetes.bad_ends + self.mishaps + self.silent_ends() > self.setting.max_restarts;
            prop_assert!(is_deserved, "failed for no reason: {status:#?}");
        }
        self.be_at_rest().await
    }

    async fn be_at_rest(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..20 {
            self.round(3).await?;
        }
        let Some(job) = self.job() else {
            prop_assert!(self.setting.ttl.is_some(), "the job is gone");
            return Ok(());
        };
        prop_assert!(
            self.setting.ttl.is_none(),
            "its time to live is over, and it is there: {:#?}",
            job.status
        );
        let running: Vec<String> = self.kubernetes.processes.keys().cloned().collect();
        prop_assert!(running.is_empty(), "after the end there still run {running:?}");
        let writes = self.api.writes;
        // A new operator has nothing to add, either.
        for who in 0..self.operators.len() {
            self.operators[who] = self.new_operator();
        }
        for _ in 0..3 {
            self.round(1000).await?;
        }
        prop_assert_eq!(writes, self.api.writes, "something is written after the end");
        Ok(())
    }
}

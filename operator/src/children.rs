//! The objects of one attempt: an Indexed Job and, when several pods train, a headless Service with their addresses.
//! The plan travels as an annotation of the pods, which the kubelet shows them as a file: one object less to create, to
//! lose and to clean up. Pure: the same input gives the same objects.

use crate::names::{ANNOTATION_PLAN, Work, attempt_name, labels, service_name, trainer_labels};
use growth_crds::protocol::contract;
use growth_crds::spec::stage::StageTemplate;
use growth_crds::{GrowthTrainingJob, StagePlan};
use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, DownwardAPIVolumeFile, DownwardAPIVolumeSource,
    EmptyDirVolumeSource, EnvFromSource, EnvVar, HTTPGetAction, ObjectFieldSelector, PodSecurityContext,
    PodSpec, PodTemplateSpec, Probe, SeccompProfile, SecretEnvSource, SecurityContext, Service, ServicePort,
    ServiceSpec, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};
use std::collections::BTreeMap;

/// Name of the container that trains. A template that has one of this name describes it; else one is added.
pub const TRAINER_CONTAINER: &str = "trainer";

/// Names of the ports of trainers.
const PROGRESS: &str = "progress";
const RENDEZVOUS: &str = "rendezvous";

/// Where the container's outcome goes: the kubelet copies it into the pod's status.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// Time for the current step and a last checkpoint after SIGTERM, unless the template says otherwise.
const DEFAULT_GRACE_SECONDS: i64 = 120;

/// Numeric user without a name, as in our image.
const USER_ID: i64 = 65532;

/// What the operator was told about the pods that it makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDefaults {
    /// Image of trainer, data and transform pods where the template names none.
    pub image: String,
    /// Its pull policy.
    pub image_pull_policy: Option<String>,
}

/// One attempt, as it is to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// At what.
    pub work: Work,
    /// Its number, from 1.
    pub number: i32,
    /// Its pods.
    pub replicas: i32,
    /// The resolved stage; none for data preparation, which reads the whole job.
    pub plan: Option<Box<StagePlan>>,
}

/// What an attempt consists of.
#[derive(Debug, Clone, PartialEq)]
pub struct Children {
    /// Its pods.
    pub job: Job,
    /// Addresses of the ranks, where there are several. It is the same for all attempts.
    pub service: Option<Service>,
}

/// What the pods of an attempt depend on.
#[derive(Clone, Copy)]
struct Builder<'a> {
    job: &'a GrowthTrainingJob,
    attempt: &'a Attempt,
    name: &'a str,
    defaults: &'a PodDefaults,
}

/// The objects of an attempt.
///
/// # Errors
/// When the job or its plan cannot be written as JSON, which no job that was read can cause.
pub fn children(
    job: &GrowthTrainingJob,
    attempt: &Attempt,
    defaults: &PodDefaults,
) -> Result<Children, serde_json::Error> {
    let name = attempt_name(job, attempt.work, attempt.number);
    let of = Builder { job, attempt, name: &name, defaults };
    let metadata = owned(job, name.clone(), labels(job, attempt.work, attempt.number));
    let has_ranks = matches!(attempt.work, Work::Train(_)) && attempt.replicas > 1;
    Ok(Children {
        job: Job { metadata: with_queue(metadata, job), spec: Some(job_spec(&of)?), status: None },
        service: has_ranks.then(|| service(job)),
    })
}

fn owned(job: &GrowthTrainingJob, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: job.namespace(),
        labels: Some(labels),
        owner_references: job.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

/// Under Kueue each attempt is admitted by itself.
fn with_queue(mut metadata: ObjectMeta, job: &GrowthTrainingJob) -> ObjectMeta {
    if let Some(queue) = &job.spec.scheduling.queue_name {
        let labels = metadata.labels.get_or_insert_default();
        labels.insert("kueue.x-k8s.io/queue-name".to_owned(), queue.clone());
    }
    metadata
}

/// Name and content of the file that tells the pods what to do.
fn plan_file(of: &Builder<'_>) -> Result<(&'static str, String), serde_json::Error> {
    Ok(match &of.attempt.plan {
        Some(stage) => (contract::PLAN_FILE, serde_json::to_string(stage)?),
        None => (contract::JOB_FILE, serde_json::to_string(&manifest_of(of.job))?),
    })
}

/// The job as its author wrote it: no status, no bookkeeping of the API server.
fn manifest_of(job: &GrowthTrainingJob) -> GrowthTrainingJob {
    GrowthTrainingJob { status: None, ..GrowthTrainingJob::new(&job.name_any(), job.spec.clone()) }
}

fn service(job: &GrowthTrainingJob) -> Service {
    let selector = trainer_labels(job);
    let port = |name: &str, port: u16| ServicePort {
        name: Some(name.to_owned()),
        port: i32::from(port),
        ..ServicePort::default()
    };
    let ports = vec![port(PROGRESS, contract::PROGRESS_PORT), port(RENDEZVOUS, contract::RENDEZVOUS_PORT)];
    Service {
        metadata: owned(job, service_name(job), selector.clone()),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            selector: Some(selector),
            // Ranks look for each other before they are ready.
            publish_not_ready_addresses: Some(true),
            ports: Some(ports),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn job_spec(of: &Builder<'_>) -> Result<JobSpec, serde_json::Error> {
    let replicas = of.attempt.replicas;
    let disruption = PodFailurePolicyRule {
        action: "FailJob".to_owned(),
        on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
            type_: "DisruptionTarget".to_owned(),
            status: Some("True".to_owned()),
        }]),
        on_exit_codes: None,
    };
    Ok(JobSpec {
        completion_mode: Some("Indexed".to_owned()),
        completions: Some(replicas),
        parallelism: Some(replicas),
        // The gang restarts as a whole, as a new attempt.
        backoff_limit: Some(0),
        pod_failure_policy: Some(PodFailurePolicy { rules: vec![disruption] }),
        pod_replacement_policy: Some("Failed".to_owned()),
        template: pod_template(of)?,
        ..JobSpec::default()
    })
}

fn pod_template(of: &Builder<'_>) -> Result<PodTemplateSpec, serde_json::Error> {
    let Builder { job, attempt: &Attempt { work, number, .. }, .. } = *of;
    let (file, plan) = plan_file(of)?;
    let mut template = job.spec.template.clone().unwrap_or_default();
    let metadata = template.metadata.get_or_insert_default();
    metadata.labels.get_or_insert_default().extend(labels(job, work, number));
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_PLAN.to_owned(), plan);
    if matches!(work, Work::Train(_)) {
        annotations.insert("karpenter.sh/do-not-disrupt".to_owned(), "true".to_owned());
        annotations.insert("cluster-autoscaler.kubernetes.io/safe-to-evict".to_owned(), "false".to_owned());
    }
    let spec = template.spec.get_or_insert_default();
    match work {
        Work::Train(_) => {
            let stage = work.stage_of(job).and_then(|stage| stage.template.as_ref());
            place_on_stage_pool(spec, stage);
        }
        // They need no GPU, so they must not occupy a node that has some.
        Work::Data | Work::Transform(_) => leave_gpu_pool(spec),
    }
    harden(spec);
    spec.priority_class_name =
        job.spec.scheduling.priority_class_name.clone().or(spec.priority_class_name.take());
    if matches!(work, Work::Train(_)) {
        spec.subdomain = Some(service_name(job));
    }
    spec.volumes.get_or_insert_default().extend([
        plan_volume(file),
        Volume {
            name: "growth-tmp".to_owned(),
            empty_dir: Some(EmptyDirVolumeSource::default()),
            ..Volume::default()
        },
    ]);
    complete_container(trainer_container(spec), of);
    Ok(template)
}

fn plan_volume(file: &str) -> Volume {
    let item = DownwardAPIVolumeFile {
        path: file.to_owned(),
        field_ref: Some(ObjectFieldSelector {
            field_path: format!("metadata.annotations['{ANNOTATION_PLAN}']"),
            api_version: None,
        }),
        ..DownwardAPIVolumeFile::default()
    };
    Volume {
        name: "growth-plan".to_owned(),
        downward_api: Some(DownwardAPIVolumeSource {
            items: Some(vec![item]),
            ..DownwardAPIVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// The stage's resources, node labels and tolerations over those of the base.
fn place_on_stage_pool(spec: &mut PodSpec, stage: Option<&StageTemplate>) {
    let Some(stage) = stage else { return };
    if !stage.node_selector.is_empty() {
        spec.node_selector.get_or_insert_default().extend(stage.node_selector.clone());
    }
    if !stage.tolerations.is_empty() {
        spec.tolerations.get_or_insert_default().extend(stage.tolerations.clone());
    }
    if let Some(resources) = &stage.resources {
        trainer_container(spec).resources = Some(resources.clone());
    }
}

fn leave_gpu_pool(spec: &mut PodSpec) {
    (spec.node_selector, spec.affinity, spec.tolerations) = (None, None, None);
    let Some(resources) = &mut trainer_container(spec).resources else { return };
    for list in [&mut resources.limits, &mut resources.requests].into_iter().flatten() {
        // An extended resource has a domain; cpu, memory and the like have none.
        list.retain(|name, _| !name.contains('/'));
    }
}

/// The restricted Pod Security profile, where the template says nothing else.
fn harden(spec: &mut PodSpec) {
    spec.restart_policy = Some("Never".to_owned());
    spec.automount_service_account_token = Some(spec.automount_service_account_token.unwrap_or(false));
    spec.enable_service_links = Some(false);
    spec.termination_grace_period_seconds.get_or_insert(DEFAULT_GRACE_SECONDS);
    let security = spec.security_context.get_or_insert_with(PodSecurityContext::default);
    security.run_as_non_root.get_or_insert(true);
    security.run_as_user.get_or_insert(USER_ID);
    security.run_as_group.get_or_insert(USER_ID);
    security.fs_group.get_or_insert(USER_ID);
    security.seccomp_profile.get_or_insert_with(|| SeccompProfile {
        type_: "RuntimeDefault".to_owned(),
        localhost_profile: None,
    });
}

fn trainer_container(spec: &mut PodSpec) -> &mut Container {
    let index = spec.containers.iter().position(|container| container.name == TRAINER_CONTAINER);
    let index = index.unwrap_or_else(|| {
        spec.containers.push(Container { name: TRAINER_CONTAINER.to_owned(), ..Container::default() });
        spec.containers.len() - 1
    });
    &mut spec.containers[index]
}

fn complete_container(container: &mut Container, of: &Builder<'_>) {
    let Builder { job, attempt: &Attempt { work, number, replicas, .. }, name, defaults } = *of;
    container.image.get_or_insert_with(|| defaults.image.clone());
    if container.image_pull_policy.is_none() {
        container.image_pull_policy.clone_from(&defaults.image_pull_policy);
    }
    if container.args.is_none() {
        container.args = Some(arguments(work));
    }
    let mut environment = vec![
        variable(contract::ENV_ATTEMPT, &number.to_string()),
        variable(contract::ENV_OUTCOME_FILE, TERMINATION_LOG),
    ];
    if matches!(work, Work::Train(_)) {
        environment.extend([
            variable(contract::ENV_LISTEN, &format!("0.0.0.0:{}", contract::PROGRESS_PORT)),
            variable(contract::ENV_REPLICAS, &replicas.to_string()),
            variable(contract::ENV_LEADER, &format!("{name}-0.{}", service_name(job))),
        ]);
        let port = |name: &str, port: u16| ContainerPort {
            name: Some(name.to_owned()),
            container_port: i32::from(port),
            ..ContainerPort::default()
        };
        let ports = container.ports.get_or_insert_default();
        ports.push(port(PROGRESS, contract::PROGRESS_PORT));
        if replicas > 1 {
            ports.push(port(RENDEZVOUS, contract::RENDEZVOUS_PORT));
        }
        container.readiness_probe.get_or_insert_with(|| Probe {
            http_get: Some(HTTPGetAction {
                path: Some("/healthz".to_owned()),
                port: IntOrString::String(PROGRESS.to_owned()),
                ..HTTPGetAction::default()
            }),
            period_seconds: Some(2),
            ..Probe::default()
        });
    }
    // What the operator says comes last and wins.
    container.env.get_or_insert_default().extend(environment);
    if let Some(secret) = &job.spec.storage.credentials_secret_ref {
        container.env_from.get_or_insert_default().push(EnvFromSource {
            secret_ref: Some(SecretEnvSource { name: secret.name.clone(), optional: None }),
            ..EnvFromSource::default()
        });
    }
    container.termination_message_path = Some(TERMINATION_LOG.to_owned());
    container.termination_message_policy = Some("FallbackToLogsOnError".to_owned());
    container.volume_mounts.get_or_insert_default().extend([
        VolumeMount {
            name: "growth-plan".to_owned(),
            mount_path: contract::PLAN_FOLDER.to_owned(),
            read_only: Some(true),
            ..VolumeMount::default()
        },
        VolumeMount {
            name: "growth-tmp".to_owned(),
            mount_path: "/tmp".to_owned(),
            ..VolumeMount::default()
        },
    ]);
    let security = container.security_context.get_or_insert_with(SecurityContext::default);
    security.allow_privilege_escalation.get_or_insert(false);
    security.read_only_root_filesystem.get_or_insert(true);
    security
        .capabilities
        .get_or_insert_with(|| Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None });
}

fn arguments(work: Work) -> Vec<String> {
    let plan = format!("{}/{}", contract::PLAN_FOLDER, contract::PLAN_FILE);
    let job = format!("{}/{}", contract::PLAN_FOLDER, contract::JOB_FILE);
    let words = match work {
        Work::Data => vec!["data", "prepare", &job],
        Work::Transform(_) => vec!["grow", "--plan", &plan],
        Work::Train(_) => vec!["train", &plan],
    };
    words.into_iter().map(String::from).collect()
}

fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use growth_crds::resolve;
    use serde_json::{Value, json};

    fn built(work: Work) -> (Children, Value) {
        built_with(work, 2)
    }

    fn built_with(work: Work, replicas: i32) -> (Children, Value) {
        let job: GrowthTrainingJob = serde_json::from_value(json!({
            "apiVersion": "growth.dev/v1alpha1",
            "kind": "GrowthTrainingJob",
            "metadata": {"name": "tiny", "namespace": "n", "uid": "u"},
            "spec": {
                "model": {"hiddenSize": 64, "intermediateSize": 176, "numAttentionHeads": 4},
                "data": {
                    "train": [{"uri": "s3://b/*.txt"}],
                    "validation": [{"uri": "s3://b/v.txt"}],
                    "tokenizer": {"train": {"vocabSize": 2048}},
                },
                "storage": {"uri": "s3://b/runs", "credentialsSecretRef": {"name": "keys"}},
                "training": {"sequenceLength": 256, "globalBatchTokens": 4096},
                "scheduling": {"queueName": "gpus"},
                "template": {"spec": {
                    "nodeSelector": {"zone": "a"},
                    "containers": [{"name": "trainer", "resources": {"limits": {"nvidia.com/gpu": "1", "memory": "1Gi"}}}],
                }},
                "stages": [
                    {"name": "small", "model": {"numHiddenLayers": 2}, "tokens": 1_048_576},
                    {
                        "name": "large", "growth": {"operator": "Stack", "factor": 4}, "tokens": 4_194_304,
                        "template": {
                            "nodeSelector": {"pool": "large"},
                            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                            "resources": {"limits": {"nvidia.com/gpu": "8"}},
                        },
                    },
                ],
            },
        }))
        .unwrap();
        let plan = resolve("tiny", &job.spec).unwrap();
        let defaults = PodDefaults { image: "growth-trainer:1".to_owned(), image_pull_policy: None };
        let stage = work.stage().map(|index| Box::new(plan.stages[index].clone()));
        let attempt = Attempt { work, number: 3, replicas, plan: stage };
        let children = children(&job, &attempt, &defaults).unwrap();
        let pod = serde_json::to_value(&children.job).unwrap()["spec"]["template"].clone();
        (children, pod)
    }

    #[test]
    fn a_stage_runs_on_its_own_pool() {
        let (children, pod) = built(Work::Train(1));
        assert_eq!(pod["spec"]["nodeSelector"], json!({"zone": "a", "pool": "large"}));
        assert_eq!(pod["spec"]["tolerations"][0]["key"], "nvidia.com/gpu");
        assert_eq!(pod["spec"]["containers"][0]["resources"], json!({"limits": {"nvidia.com/gpu": "8"}}));
        assert_eq!(pod["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"], "true");
        let job = serde_json::to_value(&children.job).unwrap();
        assert_eq!(job["metadata"]["name"], "tiny-large-t3");
        assert_eq!(job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "gpus");
        assert_eq!((&job["spec"]["completions"], &job["spec"]["backoffLimit"]), (&json!(2), &json!(0)));
        let service = serde_json::to_value(children.service.unwrap()).unwrap();
        assert_eq!(service["spec"]["clusterIP"], "None");
        assert_eq!(service["metadata"]["name"], pod["spec"]["subdomain"]);
        let selected = service["spec"]["selector"].as_object().unwrap();
        assert!(selected.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value), "{selected:?}");
    }

    #[test]
    fn ranks_find_each_other_where_there_are_several() {
        let (children, pod) = built(Work::Train(1));
        let container = &pod["spec"]["containers"][0];
        assert_eq!(
            container["ports"][1],
            json!({"name": "rendezvous", "containerPort": contract::RENDEZVOUS_PORT})
        );
        let leader = json!({"name": "GROWTH_LEADER", "value": "tiny-large-t3-0.tiny-trainers"});
        assert!(container["env"].as_array().unwrap().contains(&leader), "{container}");
        let service = serde_json::to_value(children.service.unwrap()).unwrap();
        let ports = service["spec"]["ports"].as_array().unwrap();
        assert!(
            ports.contains(&json!({"name": "rendezvous", "port": contract::RENDEZVOUS_PORT})),
            "{ports:?}"
        );

        let (children, pod) = built_with(Work::Train(1), 1);
        assert_eq!(pod["spec"]["containers"][0]["ports"].as_array().unwrap().len(), 1);
        assert!(children.service.is_none());
    }

    #[test]
    fn work_without_a_gpu_keeps_off_gpu_nodes() {
        for work in [Work::Data, Work::Transform(1)] {
            let (children, pod) = built(work);
            assert_eq!(
                (&pod["spec"]["nodeSelector"], &pod["spec"]["tolerations"]),
                (&Value::Null, &Value::Null)
            );
            assert_eq!(pod["spec"]["containers"][0]["resources"]["limits"], json!({"memory": "1Gi"}));
            assert!(children.service.is_none());
        }
    }

    #[test]
    fn the_plan_the_attempt_and_the_credentials_reach_the_container() {
        let (_, pod) = built(Work::Train(0));
        let plan =
            |pod: &Value| pod["metadata"]["annotations"]["growth.dev/plan"].as_str().unwrap().to_owned();
        assert_eq!(serde_json::from_str::<StagePlan>(&plan(&pod)).unwrap().stage, "small");
        let volume = &pod["spec"]["volumes"][0]["downwardAPI"]["items"][0];
        assert_eq!(volume["path"], "plan.json");
        assert_eq!(volume["fieldRef"]["fieldPath"], "metadata.annotations['growth.dev/plan']");
        let container = &pod["spec"]["containers"][0];
        assert_eq!(container["args"], json!(["train", "/etc/growth/plan.json"]));
        assert_eq!(container["envFrom"][0]["secretRef"]["name"], "keys");
        let environment = container["env"].as_array().unwrap();
        assert!(environment.contains(&json!({"name": "GROWTH_ATTEMPT", "value": "3"})), "{environment:?}");
        let (_, data) = built(Work::Data);
        let manifest: GrowthTrainingJob = serde_json::from_str(&plan(&data)).unwrap();
        assert!(manifest.status.is_none() && manifest.metadata.uid.is_none());
    }

    #[test]
    fn pods_keep_the_restricted_profile() {
        let (_, pod) = built(Work::Train(0));
        assert_eq!(pod["spec"]["automountServiceAccountToken"], json!(false));
        assert_eq!(pod["spec"]["securityContext"]["runAsNonRoot"], json!(true));
        assert_eq!(pod["spec"]["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let security = &pod["spec"]["containers"][0]["securityContext"];
        assert_eq!(security["readOnlyRootFilesystem"], json!(true));
        assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
    }
}

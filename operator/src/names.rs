//! Names and labels of everything that a job owns. They are functions of the job, the work and the attempt, so that a
//! create is the same create when it is repeated.

use growth_crds::GrowthTrainingJob;
use growth_crds::spec::stage::StageSpec;
use kube::ResourceExt;
use std::collections::BTreeMap;

/// Value of `app.kubernetes.io/managed-by`, and the field manager of every write.
pub const MANAGER: &str = "growth-operator";
/// Label with the job's name.
pub const LABEL_JOB: &str = "growth.dev/job";
/// Label with the kind of work: `data`, `transform`, `train`.
pub const LABEL_WORK: &str = "growth.dev/work";
/// Label with the stage.
pub const LABEL_STAGE: &str = "growth.dev/stage";
/// Label with the number of the attempt.
pub const LABEL_ATTEMPT: &str = "growth.dev/attempt";

/// Annotation of the pods with the plan of their attempt, or the whole job.
pub const ANNOTATION_PLAN: &str = "growth.dev/plan";

/// One piece of a job's work; each attempt at it is one Job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    /// Text becomes tokens.
    Data,
    /// The first checkpoint of the stage at this index grows from the stage before.
    Transform(usize),
    /// The stage at this index trains.
    Train(usize),
}

impl Work {
    /// The label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Transform(_) => "transform",
            Self::Train(_) => "train",
        }
    }

    /// Its stage in the job's spec.
    pub fn stage_of(self, job: &GrowthTrainingJob) -> Option<&StageSpec> {
        job.spec.stages.get(self.stage()?)
    }

    /// Index of its stage.
    pub fn stage(self) -> Option<usize> {
        match self {
            Self::Data => None,
            Self::Transform(index) | Self::Train(index) => Some(index),
        }
    }
}

/// Name of the Job of an attempt: at most 57 characters, so that `<name>-<index>` is a host name.
pub fn attempt_name(job: &GrowthTrainingJob, work: Work, attempt: i32) -> String {
    let name = job.name_any();
    let stage = work.stage_of(job).map_or("", |stage| &stage.name);
    match work {
        // No stage can be called so: a dash follows no letter here.
        Work::Data => format!("{name}-data--t{attempt}"),
        Work::Transform(_) => format!("{name}-{stage}-grow--t{attempt}"),
        Work::Train(_) => format!("{name}-{stage}-t{attempt}"),
    }
}

/// Labels of everything that belongs to an attempt.
pub fn labels(job: &GrowthTrainingJob, work: Work, attempt: i32) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        ("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned()),
        (LABEL_JOB.to_owned(), job.name_any()),
        (LABEL_WORK.to_owned(), work.label().to_owned()),
        (LABEL_ATTEMPT.to_owned(), attempt.to_string()),
    ]);
    if let Some(stage) = work.stage_of(job) {
        labels.insert(LABEL_STAGE.to_owned(), stage.name.clone());
    }
    labels
}

/// Labels that the trainer pods of a job have in common.
pub fn trainer_labels(job: &GrowthTrainingJob) -> BTreeMap<String, String> {
    BTreeMap::from([
        (LABEL_JOB.to_owned(), job.name_any()),
        (LABEL_WORK.to_owned(), Work::Train(0).label().to_owned()),
    ])
}

/// Selector of the trainer pods of a job, for /scale.
pub fn trainer_selector(job: &GrowthTrainingJob) -> String {
    let terms: Vec<String> =
        trainer_labels(job).iter().map(|(key, value)| format!("{key}={value}")).collect();
    terms.join(",")
}

/// Service with the addresses of the trainer pods of a job. A stage's pods have their attempt's name in theirs.
pub fn service_name(job: &GrowthTrainingJob) -> String {
    format!("{}-trainers", job.name_any())
}

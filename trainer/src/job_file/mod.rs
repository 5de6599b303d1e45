//! Reads a job file and checks it as an API server would, without one: the CRD's schema, its CEL rules, then the
//! plan. Every problem comes with its field path and its line and column.

mod position;
mod schema;

use growth_crds::admission::admission_errors;
use growth_crds::plan::{self, JobPlan};
use growth_crds::{GrowthTrainingJob, crd};
use serde_json::Value;
use std::fmt;
use std::path::Path;

pub(crate) use position::Positions;
pub(crate) use schema::check_fields;

/// A job that passed every check that needs no network.
#[derive(Debug)]
pub struct LoadedJob {
    /// The object.
    pub job: GrowthTrainingJob,
    /// What it resolves to.
    pub plan: JobPlan,
}

/// One thing that is wrong with a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field: `spec.stages[1].growth.factor`; empty for the whole file.
    pub field: String,
    /// What is wrong and what to do.
    pub message: String,
    /// Line and column, from 1.
    pub position: Option<(usize, usize)>,
}

/// A job file that cannot be used.
#[derive(thiserror::Error, Debug)]
pub struct JobFileError {
    /// The file.
    pub file: String,
    /// Everything that was found, at least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for JobFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let line_break = if index == 0 { "" } else { "\n" };
            write!(f, "{line_break}{}", self.file)?;
            if let Some((line, column)) = problem.position {
                write!(f, ":{line}:{column}")?;
            }
            let separator = if problem.field.is_empty() { "" } else { ": " };
            write!(f, "{separator}{}: {}", problem.field, problem.message)?;
        }
        Ok(())
    }
}

/// Reads and checks the job in `path`.
///
/// # Errors
/// All problems of the first check that finds any.
pub fn load(path: &Path) -> Result<LoadedJob, JobFileError> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot be read ({error}); name a GrowthTrainingJob manifest");
        JobFileError { file: file.clone(), problems: vec![Problem::of_file(message)] }
    })?;
    parse(&text).map_err(|problems| JobFileError { file, problems })
}

/// Checks the job in `text`.
fn parse(text: &str) -> Result<LoadedJob, Vec<Problem>> {
    let positions = Positions::of(text).map_err(|problem| vec![problem])?;
    let place = |problems: Vec<Problem>| problems.into_iter().map(|p| positions.place(p)).collect::<Vec<_>>();
    let job = admit(text).map_err(place)?;
    resolve_job(job).map_err(place)
}

/// Checks a job that a program has put together, as [`load`] checks one that was written.
///
/// # Errors
/// All problems of the first check that finds any, without positions.
pub(crate) fn check_job(job: GrowthTrainingJob) -> Result<LoadedJob, Vec<Problem>> {
    let problems = check_values(&job, None)?;
    if problems.is_empty() { resolve_job(job) } else { Err(problems) }
}

/// The plan of a job.
///
/// # Errors
/// What the plan finds, without positions.
pub(crate) fn resolve_job(job: GrowthTrainingJob) -> Result<LoadedJob, Vec<Problem>> {
    let name = job.metadata.name.as_deref().unwrap_or_default();
    match plan::resolve(name, &job.spec) {
        Ok(plan) => Ok(LoadedJob { job, plan }),
        Err(errors) => {
            Err(errors.into_iter().map(|error| Problem::of_field(error.field, error.message)).collect())
        }
    }
}

/// The schema and the CEL rules of the CRD.
fn admit(text: &str) -> Result<GrowthTrainingJob, Vec<Problem>> {
    let value: Value =
        serde_saphyr::from_str(text).map_err(|error| vec![Problem::of_file(error.to_string())])?;
    let schema = crd::schema().map_err(|error| vec![Problem::of_file(error.to_string())])?;
    let problems = schema::check(&value, &schema);
    if !problems.is_empty() {
        return Err(problems);
    }
    let job: GrowthTrainingJob = serde_path_to_error::deserialize(&value)
        .map_err(|error| vec![Problem::of_field(error.path().to_string(), error.inner().to_string())])?;
    let problems = check_values(&job, None)?;
    if problems.is_empty() { Ok(job) } else { Err(problems) }
}

/// Ranges, lengths, words and CEL rules; with `stored`, also what may change while a job runs.
fn check_values(
    job: &GrowthTrainingJob,
    stored: Option<&GrowthTrainingJob>,
) -> Result<Vec<Problem>, Vec<Problem>> {
    let errors = admission_errors(job, stored).map_err(|error| vec![Problem::of_file(error.to_string())])?;
    Ok(errors.into_iter().map(|error| Problem::of_field(error.field, error.message)).collect())
}

/// Checks a changed job against the one that is stored: what may change while it runs, the transition rules say.
///
/// # Errors
/// One problem for each rule that refuses the change.
pub fn check_update(job: &GrowthTrainingJob, stored: &GrowthTrainingJob) -> Result<(), Vec<Problem>> {
    let problems = check_values(job, Some(stored))?;
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

impl Problem {
    pub(crate) fn of_file(message: String) -> Self {
        Self { field: String::new(), message, position: None }
    }

    pub(crate) fn of_field(field: String, message: String) -> Self {
        Self { field, message, position: None }
    }
}

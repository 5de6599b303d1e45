//! A first stage that another job has trained.

use super::{JobError, JobRecord, Result, agree_on_dataset, finished, pinned_dataset};
use crate::checkpoint::{self, CheckpointLocation};
use crate::progress::Reporter;
use crate::storage::Storage;
use growth_crds::plan::{JobPlan, StagePlan};
use growth_crds::protocol::CheckpointManifest;
use growth_crds::resolve;

/// Takes over what another job has trained for this one, where `spec.stages[0].trainedBy` names one: its dataset, and a
/// copy of the last checkpoint of its first stage, which is returned. Taken once.
///
/// # Errors
/// When the other job has not finished that stage, has trained another one, or the storage fails.
pub fn take_base(
    plan: &JobPlan,
    storage: &Storage,
    reporter: &Reporter,
) -> Result<Option<CheckpointManifest>> {
    let Some(stage) = plan.stages.first() else { return Ok(None) };
    let Some(base) = &stage.trained_by else { return Ok(None) };
    if let Some(taken) = finished(storage, stage, reporter)? {
        return Ok(Some(taken));
    }
    check_record(stage, base, storage)?;
    let there = StagePlan { job: base.clone(), ..stage.clone() };
    let (Some(source), Some(dataset)) =
        (finished(storage, &there, reporter)?, pinned_dataset(storage, base)?)
    else {
        let (stage, storage) = (stage.stage.clone(), storage.uri().to_owned());
        return Err(JobError::NotTrained { job: base.clone(), stage, storage });
    };
    // Both must read the same tokens, and a sample of the sources depends on the seed.
    agree_on_dataset(storage, &stage.job, &dataset, |own| {
        format!("it trains on dataset {own}, but job {base} on {dataset}")
    })?;
    reporter.note(&format!("stage {} is that of job {base}, step {}", stage.stage, source.step));
    let (storage, job, stage) = (storage.clone(), stage.job.clone(), stage.stage.clone());
    let attempt = checkpoint::next_attempt(&storage, &job, &stage)?;
    Ok(Some(checkpoint::adopt(&source, &CheckpointLocation { storage, job, stage, attempt })?))
}

/// A job that ran without a cluster has left its object. Of others the operator knows it.
fn check_record(stage: &StagePlan, base: &str, storage: &Storage) -> Result<()> {
    let Some(record) = JobRecord::read(storage, base)? else { return Ok(()) };
    let trained = resolve(base, &record.spec)
        .map_err(|errors| JobError::Record { uri: storage.uri_of(base), reason: errors.to_string() })?;
    match trained.stages.first().and_then(|trained| stage.mismatch(trained)) {
        Some(mismatch) => Err(JobError::OtherStage(mismatch)),
        None => Ok(()),
    }
}

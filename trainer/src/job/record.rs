//! What a job remembers beside its checkpoints: its object, and which prepared dataset it trains on.

use super::{JobError, Result};
use crate::job_file::{Problem, check_update};
use crate::storage::{Storage, StorageError};
use growth_crds::spec::GrowthTrainingJob;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The object as it last ran here: `<storage>/<job>/job.json`.
#[derive(Debug)]
pub struct JobRecord;

#[derive(Serialize, Deserialize)]
struct DatasetPin {
    digest: String,
}

fn job_record(job: &str) -> String {
    format!("{job}/job.json")
}

fn dataset_pin(job: &str) -> String {
    format!("{job}/dataset.json")
}

impl JobRecord {
    /// Refuses what may not change against the stored object, as the API server would, then stores the new one.
    ///
    /// # Errors
    /// [`JobError::Changed`] naming the fields, or what the storage says.
    pub fn check_and_store(storage: &Storage, job: &GrowthTrainingJob) -> Result<()> {
        let name = job_record(job.metadata.name.as_deref().unwrap_or_default());
        if let Some(stored) = read::<GrowthTrainingJob>(storage, &name)? {
            check_update(job, &stored)
                .map_err(|problems| JobError::Changed { uri: storage.uri_of(&name), problems })?;
        }
        let text = serde_json::to_vec_pretty(job).map_err(|error| unreadable(storage, &name, &error))?;
        Ok(storage.put(&name, text)?)
    }

    /// The stored object.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(storage: &Storage, job: &str) -> Result<Option<GrowthTrainingJob>> {
        read(storage, &job_record(job))
    }
}

/// Digest of the dataset that the job trains on, if that is decided.
///
/// # Errors
/// When the storage does not answer.
pub fn pinned_dataset(storage: &Storage, job: &str) -> Result<Option<String>> {
    Ok(read::<DatasetPin>(storage, &dataset_pin(job))?.map(|pin| pin.digest))
}

/// Decides which dataset the job trains on, once.
///
/// # Errors
/// When it is decided already, or the storage does not answer.
pub fn pin_dataset(storage: &Storage, job: &str, digest: &str) -> Result<()> {
    let name = dataset_pin(job);
    let pin = DatasetPin { digest: digest.to_owned() };
    let text = serde_json::to_vec_pretty(&pin).map_err(|error| unreadable(storage, &name, &error))?;
    Ok(storage.create(&name, text)?)
}

/// Makes the job train on this dataset, or finds that it does.
///
/// # Errors
/// [`JobError::Changed`] with `conflict` of the digest of another one that it trains on, or what the storage says.
pub fn agree_on_dataset(
    storage: &Storage,
    job: &str,
    digest: &str,
    conflict: impl FnOnce(&str) -> String,
) -> Result<()> {
    match pinned_dataset(storage, job)? {
        None => pin_dataset(storage, job, digest),
        Some(own) if own == digest => Ok(()),
        Some(own) => {
            let problems = vec![Problem::of_field("spec.data".to_owned(), conflict(&own))];
            Err(JobError::Changed { uri: storage.uri_of(job), problems })
        }
    }
}

fn read<T: DeserializeOwned>(storage: &Storage, name: &str) -> Result<Option<T>> {
    let bytes = match storage.get(name) {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| unreadable(storage, name, &error))
}

fn unreadable(storage: &Storage, name: &str, error: &serde_json::Error) -> JobError {
    JobError::Record { uri: storage.uri_of(name), reason: error.to_string() }
}

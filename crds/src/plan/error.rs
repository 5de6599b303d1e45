//! What is wrong with a job, field by field.

use std::fmt;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanError {
    /// Path of the field: `spec.stages[1].growth.factor`.
    pub field: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for PlanError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.field, self.message)
    }
}

/// Everything that is wrong, as far as one pass can tell; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanErrors(Vec<PlanError>);

impl PlanErrors {
    /// One error.
    pub(super) fn of(field: &str, message: &str) -> Self {
        Self(vec![PlanError { field: field.to_owned(), message: message.to_owned() }])
    }

    /// The errors, in the order of the stages.
    pub fn as_slice(&self) -> &[PlanError] {
        &self.0
    }
}

impl IntoIterator for PlanErrors {
    type Item = PlanError;
    type IntoIter = std::vec::IntoIter<PlanError>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl fmt::Display for PlanErrors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                formatter.write_str("\n")?;
            }
            error.fmt(formatter)?;
        }
        Ok(())
    }
}

impl std::error::Error for PlanErrors {}

/// Collects errors and notes while a job is resolved.
#[derive(Debug, Default)]
pub(super) struct Findings {
    errors: Vec<PlanError>,
    /// What a person should know although it is no error.
    pub notes: Vec<String>,
}

impl Findings {
    pub fn error(&mut self, field: impl Into<String>, message: impl Into<String>) {
        let error = PlanError { field: field.into(), message: message.into() };
        // Stages share the job's settings; one mistake there is reported once.
        if !self.errors.contains(&error) {
            self.errors.push(error);
        }
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// The notes, or the errors if there are any.
    pub fn finish(self) -> Result<Vec<String>, PlanErrors> {
        if self.errors.is_empty() { Ok(self.notes) } else { Err(PlanErrors(self.errors)) }
    }
}

//! Files in this repository that are generated from the types.

use crate::conditions::conditions_page;
use crate::crd::crd_yaml;
use crate::reference::job_format;
use std::path::Path;

/// The example at the end of the job format's page.
const EXAMPLE: &str = "examples/llama-1b-s3.yaml";

/// A generated file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratedFile {
    /// Path from the root of the repository.
    pub path: &'static str,
    /// What it should hold.
    pub content: String,
}

/// All generated files of the repository at `root`.
///
/// # Errors
/// When the example cannot be read, or the definition cannot be built.
pub fn files(root: &Path) -> Result<Vec<GeneratedFile>, Box<dyn std::error::Error>> {
    let example = std::fs::read_to_string(root.join(EXAMPLE))?;
    Ok(vec![
        GeneratedFile { path: "crds/growthtrainingjobs.yaml", content: crd_yaml()? },
        GeneratedFile { path: "docs/conditions.md", content: conditions_page() },
        GeneratedFile { path: "docs/job-format.md", content: job_format(&example)? },
    ])
}

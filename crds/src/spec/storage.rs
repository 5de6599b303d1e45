//! Where checkpoints and prepared data live.

use super::schema::without_descriptions;
use k8s_openapi::api::core::v1::LocalObjectReference;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// A prefix in object storage.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.uri.startsWith('s3://') || !(has(self.endpoint) || has(self.region))")
        .message("endpoint and region belong to s3:// storage; remove them or use an s3:// uri"),
    validation = Rule::new("!has(self.credentialsSecretRef) || self.credentialsSecretRef.name != ''")
        .message("credentialsSecretRef.name is empty; name the Secret or remove credentialsSecretRef"),
)]
pub struct StorageSpec {
    /// Prefix below which the job keeps its data and checkpoints: s3://, gs://, az:// or file://.
    #[schemars(length(max = 1024), regex(pattern = r"^(s3|gs|az|file)://.+$"))]
    pub uri: String,
    /// Endpoint of an S3-compatible server.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024), regex(pattern = r"^https?://.+$"))]
    pub endpoint: Option<String>,
    /// Region of the bucket.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub region: Option<String>,
    /// Secret in the job's namespace, by name, whose keys become environment variables of the trainer pods
    /// (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...). The operator never reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "without_descriptions::<Option<LocalObjectReference>>")]
    pub credentials_secret_ref: Option<LocalObjectReference>,
}

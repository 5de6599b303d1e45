//! What the integration tests stand on: a real Kubernetes started by one command ([`cluster`]), the container images
//! of this project ([`images`]), an S3 server that fails on command ([`s3_proxy`]), and helpers that wait on watches
//! and explain a failure ([`testing`]). `docs/testing.md` is the manual.

pub mod cluster;
pub mod images;
pub mod s3_proxy;
pub mod testing;

use std::path::PathBuf;

/// The root of the workspace that this crate was built from.
pub fn workspace() -> PathBuf {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    tests.parent().map_or(tests.clone(), PathBuf::from)
}

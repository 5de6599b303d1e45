//! What operator and trainer exchange: the checkpoint manifest, progress, outcome.

mod manifest;

pub use manifest::*;

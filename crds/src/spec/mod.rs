//! The desired state: what a user writes.

pub mod data;
pub mod factor;
mod job;
pub mod model;
pub mod policy;
pub(crate) mod schema;
pub mod stage;
pub mod storage;
pub mod training;

pub use job::*;

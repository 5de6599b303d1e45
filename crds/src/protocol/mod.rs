//! What operator and trainer exchange: the contract of a trainer container, the checkpoint manifest, progress, outcome.

pub mod contract;
mod growth;
mod manifest;
mod outcome;
mod progress;

pub use growth::*;
pub use manifest::*;
pub use outcome::*;
pub use progress::*;

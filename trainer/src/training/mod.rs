//! Training a stage: the optimizer step, the learning rate, the loop.

pub mod board;
pub mod history;
pub mod schedule;
pub mod stage;
pub mod step;

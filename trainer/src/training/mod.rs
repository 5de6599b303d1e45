//! Training a stage: the optimizer step, the learning rate, the loop.

pub mod after_growth;
pub mod attempt;
pub mod board;
mod error;
pub mod history;
pub mod ramp;
pub mod resharding;
pub mod schedule;
pub mod shards;
pub mod stage;
mod start;
pub mod step;

#[cfg(test)]
mod after_growth_tests;
#[cfg(test)]
mod tests;

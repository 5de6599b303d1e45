//! Training a stage: the optimizer step, the learning rate, the loop.

pub mod after_growth;
pub mod attempt;
pub mod board;
pub mod history;
pub mod ramp;
pub mod resharding;
pub mod schedule;
pub mod shards;
pub mod stage;
pub mod step;

#[cfg(test)]
mod after_growth_tests;
#[cfg(test)]
mod tests;

//! Pure resolution of a job into concrete stage plans: no I/O, no clock.

pub mod architecture;
mod error;
pub mod flops;
pub mod growth;
mod growth_depth;
pub mod growth_learn;
pub mod growth_map;
pub mod growth_mask;
pub mod growth_training;
pub mod growth_width;
pub mod guideline;
pub mod memory;
pub mod parameters;
pub mod ranks;
mod resolve;
mod schedule;
mod trained_by;
mod training;
pub mod types;

pub use error::{PlanError, PlanErrors};
pub use growth::{CheckpointGrowth, resolve_checkpoint_growth};
pub use growth_learn::{LearnPlan, LearnedWidth};
pub use growth_training::{Freeze, FreezePlan, GrowthTrainingPlan, NewParametersPlan, ScheduleAcrossGrowth};
pub use resolve::resolve;
pub use types::*;

//! The `GrowthTrainingJob` API (`growth.dev/v1alpha1`), the pure resolution of a job into stage plans, and the
//! types that operator and trainer exchange.

#[cfg(feature = "cel")]
pub mod admission;
pub mod conditions;
pub mod crd;
pub mod generated;
pub mod plan;
pub mod protocol;
pub mod quantity;
pub mod reference;
pub mod spec;
pub mod status;

pub use plan::{JobPlan, PlanErrors, StagePlan, resolve};
pub use spec::{GrowthTrainingJob, GrowthTrainingJobSpec};
pub use status::GrowthTrainingJobStatus;

//! Several ways to grow and training from scratch, at equal FLOPs and with several seeds: from one small spec to jobs
//! (`jobs`), to their results (`run`, `results`, `measures`), to tables and plots.

mod jobs;
mod measures;
mod plots;
mod results;
mod run;
mod spec;
mod table;

pub use jobs::{Comparison, Recipe, Run, SCRATCH};
pub use measures::{Estimate, flops_at, speedup};
pub use plots::{bars_svg, curves_svg};
pub use results::{ComparisonReport, RecipeReport, RunReport, StageCurve, report};
pub use run::run;
pub use spec::{BaseSpec, ComparisonSpec, GrowthStepSpec, LoadedSpec, RecipeSpec, ScratchSpec};
pub use table::{budget_table, markdown, result_table};

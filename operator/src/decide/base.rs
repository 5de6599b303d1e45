//! A first stage that another job trains: nothing begins before that has completed it.

use crate::draft::Draft;
use crate::observed::Observed;
use growth_crds::conditions::{ConditionType, Reason};
use growth_crds::plan::{JobPlan, StagePlan};
use growth_crds::status::{Phase, StageState};
use growth_crds::{GrowthTrainingJob, resolve};
use kube::ResourceExt;

/// How often the other job is looked at, which costs no call.
const LOOK_SECONDS: i64 = 5;

/// Whether the first stage is still to be trained by another job; what is missing is told.
pub(super) fn is_awaited(draft: &mut Draft<'_>, observed: &Observed, plan: &JobPlan) -> bool {
    let Some(first) = plan.stages.first() else { return false };
    let Some(job) = &first.trained_by else { return false };
    let missing = match observed.base.as_deref() {
        None => "does not exist",
        Some(base) => match mismatch(first, base) {
            Some(message) => {
                draft.set(ConditionType::Accepted, Reason::InvalidSpec, message);
                "trains another one"
            }
            None if has_completed(base, &first.stage) => return false,
            None if has_failed(base) => "has failed",
            None => "has not completed it yet",
        },
    };
    let message = format!("stage {} is trained by job {job}, which {missing}", first.stage);
    draft.resume();
    draft.set(ConditionType::Running, Reason::WaitingForJob, message);
    draft.phase(Phase::Pending);
    draft.requeue_after(LOOK_SECONDS);
    true
}

fn has_completed(base: &GrowthTrainingJob, stage: &str) -> bool {
    let stages = base.status.iter().flat_map(|status| &status.stages);
    stages.into_iter().any(|known| known.name == stage && known.state == StageState::Complete)
}

fn has_failed(base: &GrowthTrainingJob) -> bool {
    base.status.as_ref().is_some_and(|status| status.phase == Some(Phase::Failed))
}

fn mismatch(stage: &StagePlan, base: &GrowthTrainingJob) -> Option<String> {
    let trained = resolve(&base.name_any(), &base.spec).ok()?;
    stage.mismatch(trained.stages.first()?)
}

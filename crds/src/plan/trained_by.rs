//! Whether the stage of another job can take the place of one.

use super::StagePlan;

impl StagePlan {
    /// Why this stage cannot be what another job has trained as `trained`: it would not end in the same bits. How often it
    /// is measured, when it writes checkpoints and on how many replicas it runs does not matter.
    pub fn mismatch(&self, trained: &Self) -> Option<String> {
        let place = |plan: &Self| (plan.storage.uri.clone(), plan.storage.endpoint.clone());
        let fields = [
            ("name", self.stage == trained.stage),
            ("storage", place(self) == place(trained)),
            ("data", self.data == trained.data),
            ("model", self.model == trained.model && self.start == trained.start),
            ("tokens", self.tokens == trained.tokens),
            ("training", self.training == trained.training),
        ];
        let different: Vec<_> =
            fields.into_iter().filter(|(_, same)| !same).map(|(field, _)| field).collect();
        if different.is_empty() {
            return None;
        }
        Some(format!(
            "spec.stages[0].trainedBy: the first stage of job {} differs in {}; make them equal, or remove trainedBy",
            trained.job,
            different.join(", ")
        ))
    }
}

//! What the storage knows of a comparison.

use super::jobs::{Comparison, Recipe, Run};
use super::measures::{Estimate, speedup};
use crate::job::{self, Result};
use crate::report::{CurvePoint, StageReport};
use crate::storage::Storage;
use serde::Serialize;

/// The paper's figure 3: our operators by its names, in its order.
const PAPER_NAMES: [(&str, &str); 8] = [
    ("Stack", "direct-D"),
    ("ZeroDepth", "zero-D"),
    ("RandomDepth", "random-D"),
    ("LearnDepth", "learn-D"),
    ("DirectWidth", "direct-W"),
    ("ZeroWidth", "zero-W"),
    ("RandomWidth", "random-W"),
    ("LearnWidth", "learn-W"),
];

/// A whole comparison, as far as it has come.
#[derive(Serialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
pub struct ComparisonReport {
    /// Its name.
    pub name: String,
    /// FLOPs of a run from scratch, exact count.
    pub budget_flops: f64,
    /// Tokens of a run from scratch.
    pub scratch_tokens: u64,
    /// The seeds.
    pub seeds: Vec<i64>,
    /// Scratch, then the recipes in the order of the paper's figure 3, then others.
    pub recipes: Vec<RecipeReport>,
}

/// One recipe, over all seeds that have finished.
#[derive(Serialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
pub struct RecipeReport {
    /// Its name.
    pub name: String,
    /// The operator of its last growth; absent for scratch.
    pub operator: Option<String>,
    /// What the paper's figure 3 calls that operator.
    pub paper_name: Option<&'static str>,
    /// Parameters of the first stage.
    pub base_parameters: u64,
    /// Parameters of the target.
    pub parameters: u64,
    /// FLOPs of a run, exact count, all stages.
    pub flops: f64,
    /// Share of all stages before the last.
    pub base_flops_share: f64,
    /// Tokens of all stages.
    pub tokens: u64,
    /// Tokens of the last stage.
    pub last_stage_tokens: u64,
    /// Last validation loss, in nats.
    pub final_loss: Option<Estimate>,
    /// Last validation loss less that of scratch with the same seed.
    pub difference: Option<Estimate>,
    /// Against scratch with the same seed; 0.5 is 50 %.
    pub speedup: Option<Estimate>,
    /// Validation loss right before the last growth.
    pub loss_before_growth: Option<Estimate>,
    /// Validation loss right after the last growth.
    pub loss_after_growth: Option<Estimate>,
    /// Largest difference of two logits at the last growth, over all seeds.
    pub max_logit_difference: Option<f64>,
    /// One run a seed.
    pub runs: Vec<RunReport>,
}

/// One recipe with one seed.
#[derive(Serialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
pub struct RunReport {
    /// The seed.
    pub seed: i64,
    /// Name of the job.
    pub job: String,
    /// Whether all its tokens are trained; what follows is absent before.
    pub finished: bool,
    /// Last validation loss.
    pub final_loss: Option<f64>,
    /// Less that of scratch with the same seed.
    pub difference: Option<f64>,
    /// Against scratch with the same seed.
    pub speedup: Option<f64>,
    /// Validation loss right before the last growth.
    pub loss_before_growth: Option<f64>,
    /// Validation loss right after the last growth.
    pub loss_after_growth: Option<f64>,
    /// Largest difference of two logits at the last growth.
    pub max_logit_difference: Option<f64>,
    /// Seconds spent in steps.
    pub training_seconds: f64,
    /// Validation loss along the way, stage by stage.
    pub curves: Vec<StageCurve>,
    /// Folder of the latest checkpoint.
    pub checkpoint: Option<String>,
}

/// Validation loss of one stage.
#[derive(Serialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StageCurve {
    /// The stage.
    pub stage: String,
    /// FLOPs of the whole run up to here, and the loss.
    pub points: Vec<CurvePoint>,
}

impl RunReport {
    /// The curve of the target itself, which is what speedups are taken from.
    pub fn target_curve(&self) -> &[CurvePoint] {
        self.curves.last().map_or(&[], |curve| &curve.points)
    }
}

/// Reads the results of every run.
///
/// # Errors
/// When the storage does not answer.
pub fn report(comparison: &Comparison, storage: &Storage) -> Result<ComparisonReport> {
    let mut recipes: Vec<RecipeReport> = Vec::new();
    for recipe in &comparison.recipes {
        let runs = recipe.runs.iter().map(|run| run_report(run, storage)).collect::<Result<Vec<_>>>()?;
        let report = recipe_report(recipe, runs, recipes.first());
        recipes.push(report);
    }
    recipes.sort_by_key(order);
    Ok(ComparisonReport {
        name: comparison.spec.name.clone(),
        budget_flops: comparison.budget_flops,
        scratch_tokens: comparison.scratch_tokens,
        seeds: comparison.spec.seeds.clone(),
        recipes,
    })
}

fn paper_place(operator: Option<&str>) -> Option<usize> {
    PAPER_NAMES.iter().position(|(name, _)| Some(*name) == operator)
}

fn order(recipe: &RecipeReport) -> usize {
    match recipe.operator.as_deref() {
        None => 0,
        operator => 1 + paper_place(operator).unwrap_or(PAPER_NAMES.len()),
    }
}

fn run_report(run: &Run, storage: &Storage) -> Result<RunReport> {
    let plan = &run.job.plan;
    let stages = job::report(plan, storage)?;
    let last = stages.last();
    let finished = last.is_some_and(|stage| stage.tokens >= stage.target_tokens);
    let before = stages.len().checked_sub(2).and_then(|before| stages.get(before));
    let growth = last.and_then(|stage| stage.growth.as_ref()?.record.measured.as_ref());
    let grown = |value: fn(&StageReport) -> Option<f64>, stage: Option<&StageReport>| {
        stage.filter(|_| stages.len() > 1).and_then(value)
    };
    Ok(RunReport {
        seed: run.seed,
        job: plan.job.clone(),
        finished,
        final_loss: last.filter(|_| finished).and_then(|stage| stage.validation_loss_after),
        difference: None,
        speedup: None,
        loss_before_growth: grown(|stage| stage.validation_loss_after, before),
        loss_after_growth: grown(|stage| stage.validation_loss_before, last),
        max_logit_difference: growth.and_then(|measured| measured.max_logit_difference),
        training_seconds: stages.iter().map(|stage| stage.training_seconds).sum(),
        checkpoint: last.and_then(|stage| stage.checkpoint.clone()),
        curves: stages
            .into_iter()
            .map(|stage| StageCurve { stage: stage.stage, points: stage.curve })
            .collect(),
    })
}

fn recipe_report(recipe: &Recipe, mut runs: Vec<RunReport>, scratch: Option<&RecipeReport>) -> RecipeReport {
    for run in &mut runs {
        let other = scratch.and_then(|scratch| scratch.runs.iter().find(|other| other.seed == run.seed));
        let Some(other) = other.filter(|other| run.finished && other.finished) else { continue };
        run.difference = run.final_loss.zip(other.final_loss).map(|(loss, scratch)| loss - scratch);
        run.speedup = speedup(other.target_curve(), run.target_curve());
    }
    let estimate = |value: fn(&RunReport) -> Option<f64>| {
        let values: Vec<f64> = runs.iter().filter(|run| run.finished).filter_map(value).collect();
        Estimate::of(&values)
    };
    let stages = recipe.plan().map_or(&[][..], |plan| &plan.stages);
    let (first, last) = (stages.first(), stages.last());
    let place = paper_place(recipe.operator.as_deref());
    RecipeReport {
        name: recipe.name.clone(),
        operator: recipe.operator.clone(),
        paper_name: place.map(|place| PAPER_NAMES[place].1),
        base_parameters: first.map_or(0, |stage| stage.parameters.total),
        parameters: last.map_or(0, |stage| stage.parameters.total),
        flops: recipe.flops(),
        base_flops_share: recipe.base_share(),
        tokens: stages.iter().map(|stage| stage.tokens).sum(),
        last_stage_tokens: last.map_or(0, |stage| stage.tokens),
        final_loss: estimate(|run| run.final_loss),
        difference: estimate(|run| run.difference),
        speedup: estimate(|run| run.speedup),
        loss_before_growth: estimate(|run| run.loss_before_growth),
        loss_after_growth: estimate(|run| run.loss_after_growth),
        max_logit_difference: runs.iter().filter_map(|run| run.max_logit_difference).reduce(f64::max),
        runs,
    }
}

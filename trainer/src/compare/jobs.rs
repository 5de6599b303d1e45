//! A spec becomes jobs: every recipe with every seed is an ordinary job whose last stage trains what the budget leaves.

use super::spec::{ComparisonSpec, LoadedSpec, RecipeSpec};
use crate::job_file::{JobFileError, LoadedJob, Problem, check_job, resolve_job};
use growth_crds::GrowthTrainingJob;
use growth_crds::plan::{JobPlan, ModelConfig, StagePlan};
use growth_crds::spec::stage::TrainedBySpec;
use serde_json::{Value, json};

/// Name of the row of the run from scratch.
pub const SCRATCH: &str = "scratch";

/// Longest name of a job.
const MAX_JOB_NAME: usize = 32;

/// Tokens that a per-token cost is taken at: more than any warm-up.
const MANY_TOKENS: u64 = 1 << 50;

/// Hexadecimal digits that tell bases apart.
const BASE_DIGITS: usize = 6;

/// A whole comparison, ready to run.
#[derive(Debug)]
pub struct Comparison {
    /// What was written.
    pub spec: ComparisonSpec,
    /// FLOPs of the run from scratch, exact count: the budget of all others.
    pub budget_flops: f64,
    /// Tokens of the run from scratch.
    pub scratch_tokens: u64,
    /// Scratch first, then the recipes in the order of the spec.
    pub recipes: Vec<Recipe>,
    /// Jobs of one stage that several runs begin with.
    pub bases: Vec<LoadedJob>,
}

/// One way to reach the target.
#[derive(Debug)]
pub struct Recipe {
    /// Its name.
    pub name: String,
    /// The growth operator of its last growth, as it is spelt in a job; `None` is scratch.
    pub operator: Option<String>,
    /// One run a seed.
    pub runs: Vec<Run>,
}

/// One recipe with one seed.
#[derive(Debug)]
pub struct Run {
    /// The seed.
    pub seed: i64,
    /// The job. Its first stage is trained by one of the comparison's bases, if it has several stages.
    pub job: LoadedJob,
}

/// FLOPs of a stage and of what is learned before it.
pub fn flops_of(stage: &StagePlan) -> f64 {
    stage.learning_flops() + stage.flops.exact
}

impl Recipe {
    /// The plan of one of its runs; they differ in nothing but the seed.
    pub fn plan(&self) -> Option<&JobPlan> {
        self.runs.first().map(|run| &run.job.plan)
    }

    /// FLOPs of a run, exact count.
    pub fn flops(&self) -> f64 {
        self.plan().map_or(0.0, |plan| plan.stages.iter().map(flops_of).sum())
    }

    /// Share of all that comes before the last stage in the FLOPs of a run.
    pub fn base_share(&self) -> f64 {
        let last = self.plan().and_then(|plan| plan.stages.last()).map_or(0.0, |stage| stage.flops.exact);
        1.0 - last / self.flops()
    }
}

impl Comparison {
    /// All jobs of a spec.
    ///
    /// # Errors
    /// Everything that is wrong with them, at its place in the spec.
    pub fn new(loaded: &LoadedSpec) -> Result<Self, JobFileError> {
        Self::of(&loaded.spec).map_err(|problems| loaded.error(problems))
    }

    /// Every job in an order in which it can run: bases, then all recipes seed by seed.
    pub fn jobs(&self) -> impl Iterator<Item = &LoadedJob> {
        let of_seed = |seed: usize| self.recipes.iter().filter_map(move |recipe| recipe.runs.get(seed));
        let runs = (0..self.spec.seeds.len()).flat_map(of_seed);
        self.bases.iter().chain(runs.map(|run| &run.job))
    }

    fn of(spec: &ComparisonSpec) -> Result<Self, Vec<Problem>> {
        let scratch_tokens = scratch_tokens(spec)?;
        let mut comparison = Self {
            spec: spec.clone(),
            budget_flops: 0.0,
            scratch_tokens,
            recipes: Vec::new(),
            bases: Vec::new(),
        };
        let scratch = comparison.recipe(None, &[])?;
        (comparison.budget_flops, comparison.scratch_tokens) = (scratch.flops(), tokens_of(&scratch));
        comparison.recipes.push(scratch);
        let mut problems = Vec::new();
        for (index, recipe) in spec.recipes.iter().enumerate() {
            match comparison.grown_recipe(index, recipe) {
                Ok(recipe) => comparison.recipes.push(recipe),
                Err(found) => problems.extend(found),
            }
        }
        if problems.is_empty() { Ok(comparison) } else { Err(problems) }
    }

    fn grown_recipe(&mut self, index: usize, recipe: &RecipeSpec) -> Result<Recipe, Vec<Problem>> {
        let stages = self.stages_within_budget(index, recipe)?;
        let recipe = self.recipe(Some((index, recipe)), &stages)?;
        let target = self.recipes.first().and_then(Recipe::plan).and_then(|plan| plan.stages.last());
        let reached = recipe.plan().and_then(|plan| plan.stages.last());
        if let Some((target, reached)) = target.zip(reached) {
            check_target(&target.model, &reached.model, index)?;
        }
        Ok(recipe)
    }

    /// The stages of a recipe, of which the last trains what the others leave of the budget, in whole steps.
    fn stages_within_budget(&self, index: usize, recipe: &RecipeSpec) -> Result<Vec<Value>, Vec<Problem>> {
        let mut stages = stages_of(recipe, MANY_TOKENS);
        let seed = self.spec.seeds.first().copied().unwrap_or_default();
        let job = job_of(&self.spec, &self.spec.name, seed, &stages)?;
        let place = |field: &str| place(field, Some((index, recipe)));
        let plan = resolve_job(job).map_err(|problems| moved(problems, place))?.plan;
        let Some((last, before)) = plan.stages.split_last() else { return Ok(stages) };
        let spent = before.iter().map(flops_of).sum::<f64>() + last.learning_flops();
        let step = last.training.global_batch_tokens;
        let per_step = last.flops.exact / last.steps as f64;
        let steps = ((self.budget_flops - spent) / per_step).round();
        if steps < 1.0 {
            let message = format!(
                "what comes before the last stage takes {spent:.2e} FLOPs of a budget of {:.2e}; train it on fewer \
                 tokens, or raise the budget",
                self.budget_flops
            );
            return Err(vec![Problem::of_field(format!("recipes[{index}].base.tokens"), message)]);
        }
        if let Some(stage) = stages.last_mut() {
            stage["tokens"] = json!(steps as u64 * step);
        }
        Ok(stages)
    }

    /// One run a seed, and the bases that they need.
    fn recipe(
        &mut self,
        recipe: Option<(usize, &RecipeSpec)>,
        stages: &[Value],
    ) -> Result<Recipe, Vec<Problem>> {
        let name = recipe.map_or(SCRATCH, |(_, recipe)| &recipe.name).to_owned();
        let scratch =
            [json!({"name": SCRATCH, "tokens": self.scratch_tokens, "training": self.spec.scratch.training})];
        let stages = if recipe.is_none() { &scratch } else { stages };
        let place = |field: &str| place(field, recipe);
        let mut runs = Vec::new();
        for seed in self.spec.seeds.clone() {
            let job = job_of(&self.spec, &self.job_name(&name, seed, recipe)?, seed, stages)?;
            // Runs differ in the seed only, and rules cost more than a plan.
            let check = if runs.is_empty() { check_job } else { resolve_job };
            let mut job = check(job).map_err(|problems| moved(problems, place))?;
            if stages.len() > 1 {
                job = self.with_base(job, seed, &stages[0])?;
            }
            runs.push(Run { seed, job });
        }
        let operator = stages.last().and_then(|stage| stage.pointer("/growth/operator"));
        Ok(Recipe { name, operator: operator.and_then(Value::as_str).map(str::to_owned), runs })
    }

    fn job_name(
        &self,
        recipe: &str,
        seed: i64,
        place: Option<(usize, &RecipeSpec)>,
    ) -> Result<String, Vec<Problem>> {
        let name = format!("{}-{recipe}-s{seed}", self.spec.name);
        if name.len() <= MAX_JOB_NAME {
            return Ok(name);
        }
        let field = place.map_or("name".to_owned(), |(index, _)| format!("recipes[{index}].name"));
        let message = format!(
            "its job {name} has {} characters; shorten name or the name of the recipe, {MAX_JOB_NAME} are possible",
            name.len()
        );
        Err(vec![Problem::of_field(field, message)])
    }

    /// `job`, whose first stage is trained by one job for all that have an equal one.
    fn with_base(&mut self, job: LoadedJob, seed: i64, stage: &Value) -> Result<LoadedJob, Vec<Problem>> {
        let Some(plan) = job.plan.stages.first() else { return Ok(job) };
        let mut key = json!({
            "model": plan.model, "start": plan.start, "training": plan.training, "tokens": plan.tokens,
        });
        key["training"]["seed"] = Value::Null;
        let digest = blake3::hash(key.to_string().as_bytes()).to_hex();
        let name = self.job_name(&format!("base-{}", &digest[..BASE_DIGITS]), seed, None)?;
        if self.bases.iter().all(|base| base.plan.job != name) {
            let base = resolve_job(job_of(&self.spec, &name, seed, std::slice::from_ref(stage))?)?;
            // In a job of its own it has another schedule when that goes on after the growth.
            if base.plan.stages.first().is_none_or(|alone| plan.mismatch(alone).is_some()) {
                return Ok(job);
            }
            self.bases.push(base);
        }
        let mut job = job.job;
        if let Some(first) = job.spec.stages.first_mut() {
            first.trained_by = Some(TrainedBySpec { job: name });
        }
        resolve_job(job)
    }
}

fn tokens_of(scratch: &Recipe) -> u64 {
    scratch.plan().and_then(|plan| plan.stages.last()).map_or(0, |stage| stage.tokens)
}

/// Tokens of the run from scratch that the budget pays.
fn scratch_tokens(spec: &ComparisonSpec) -> Result<u64, Vec<Problem>> {
    let Some(flops) = spec.flops else { return Ok(spec.scratch_tokens.map_or(0, |tokens| tokens.0)) };
    let stage = json!({"name": SCRATCH, "tokens": MANY_TOKENS, "training": spec.scratch.training});
    let job = job_of(spec, &spec.name, 0, &[stage])?;
    let plan = resolve_job(job).map_err(|problems| moved(problems, |field| place(field, None)))?.plan;
    let Some(stage) = plan.stages.first() else { return Ok(0) };
    let steps = (flops / (stage.flops.exact / stage.steps as f64)).round().max(1.0);
    Ok(steps as u64 * stage.training.global_batch_tokens)
}

/// The stages of a recipe as a job writes them; the last one trains so many tokens.
fn stages_of(recipe: &RecipeSpec, last_tokens: u64) -> Vec<Value> {
    let base = &recipe.base;
    let mut stages =
        vec![json!({"name": "base", "model": base.model, "tokens": base.tokens, "training": base.training})];
    let steps = recipe.steps();
    let last = steps.len();
    for (number, step) in (1..).zip(steps) {
        let name = if number == last { "grown".to_owned() } else { format!("grown{number}") };
        let tokens = step.tokens.map_or(last_tokens, |tokens| tokens.0);
        stages.push(json!({
            "name": name, "model": step.model, "growth": step.growth, "tokens": tokens, "training": step.training,
        }));
    }
    stages
}

/// A job of the comparison.
fn job_of(
    spec: &ComparisonSpec,
    name: &str,
    seed: i64,
    stages: &[Value],
) -> Result<GrowthTrainingJob, Vec<Problem>> {
    let mut training = json!(spec.training);
    training["seed"] = json!(seed);
    let mut job = json!({
        "apiVersion": "growth.dev/v1alpha1",
        "kind": "GrowthTrainingJob",
        "metadata": {"name": name},
        "spec": {
            "model": spec.model, "data": spec.data, "storage": spec.storage, "training": training,
            "evaluation": spec.evaluation, "checkpoint": spec.checkpoint, "stages": stages,
        },
    });
    remove_nulls(&mut job);
    serde_json::from_value(job).map_err(|error| vec![Problem::of_file(error.to_string())])
}

fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(remove_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

fn moved(problems: Vec<Problem>, place: impl Fn(&str) -> String) -> Vec<Problem> {
    let moved = problems.into_iter().map(|problem| Problem { field: place(&problem.field), ..problem });
    moved.collect()
}

/// Where the spec says what `field` of a job of that recipe says.
fn place(field: &str, recipe: Option<(usize, &RecipeSpec)>) -> String {
    let field = field.strip_prefix("spec.").unwrap_or(field);
    match field {
        "metadata.name" => return "name".to_owned(),
        "spec" => return String::new(),
        _ => {}
    }
    let Some((stage, rest)) = field.strip_prefix("stages[").and_then(|field| field.split_once(']')) else {
        return field.to_owned();
    };
    match (recipe, stage.parse::<usize>()) {
        (None, _) if rest.starts_with(".training") => format!("scratch{rest}"),
        (None, _) if rest == ".tokens" => "scratchTokens".to_owned(),
        (None, _) => rest.trim_start_matches('.').to_owned(),
        (Some((index, _)), Ok(0)) => format!("recipes[{index}].base{rest}"),
        (Some((index, recipe)), Ok(stage)) if recipe.growth.is_none() => {
            format!("recipes[{index}].growths[{}]{rest}", stage - 1)
        }
        (Some((index, _)), _) => format!("recipes[{index}]{rest}"),
    }
}

/// At equal FLOPs only equal models can be compared. The eps of the norms may differ: ZeroWidth changes it.
fn check_target(target: &ModelConfig, reached: &ModelConfig, recipe: usize) -> Result<(), Vec<Problem>> {
    let (target, reached) = (json!(target), json!(reached));
    let mut problems = Vec::new();
    for (field, wanted) in target.as_object().into_iter().flatten() {
        if field != "rms_norm_eps" && reached[field] != *wanted {
            let message = format!(
                "it ends with {field} {}, but model has {wanted}; change its growth or its base",
                reached[field]
            );
            problems.push(Problem::of_field(format!("recipes[{recipe}]"), message));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPEC: &str = "\
kind: GrowthComparison
name: small
model: {numHiddenLayers: 8, hiddenSize: 64, intermediateSize: 160, numAttentionHeads: 4}
data:
  train: [{uri: \"file://./text\"}]
  holdOutPercent: 5
  tokenizer: {train: {vocabSize: 512}}
storage: {uri: \"file://./runs\"}
training: {sequenceLength: 64, globalBatchTokens: 1024}
scratchTokens: SCRATCH
seeds: [1, 2]
recipes:
- name: depth
  base: {model: {numHiddenLayers: 2}, tokens: BASE}
  growth: {operator: Stack, factor: 4}
- name: width
  base: {model: {hiddenSize: 32, intermediateSize: 80, numAttentionHeads: 2}, tokens: BASE}
  growth: {operator: DirectWidth, factor: 2}
  training: {globalBatchTokens: 2048}
- name: gradual
  base: {model: {numHiddenLayers: 2}, tokens: BASE}
  growths:
  - {growth: {operator: Stack, factor: 2}, tokens: BASE}
  - {growth: {operator: Stack, factor: 2}}
";

    fn comparison(scratch: u64, base: u64) -> Result<Comparison, Vec<Problem>> {
        let text = SPEC.replace("SCRATCH", &scratch.to_string()).replace("BASE", &base.to_string());
        Comparison::of(&LoadedSpec::parse("spec.yaml", &text)?.spec)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        #[test]
        fn all_runs_take_the_same_flops(steps in 400u64..40_000, base_steps in 1u64..200) {
            let comparison = comparison(1024 * steps, 1024 * base_steps).unwrap();
            for recipe in &comparison.recipes {
                let plan = recipe.plan().unwrap();
                let last = plan.stages.last().unwrap();
                let step = last.flops.exact / last.steps as f64;
                let difference = (recipe.flops() - comparison.budget_flops).abs();
                prop_assert!(difference <= step * 0.500_001, "{}: {difference} of a step of {step}", recipe.name);
                prop_assert_eq!(last.tokens, last.steps * last.training.global_batch_tokens);
            }
        }
    }

    #[test]
    fn learning_is_paid_for_out_of_the_budget() {
        let learned =
            SPEC.replace("operator: Stack, factor: 4", "operator: LearnDepth, factor: 4, learn: {steps: 50}");
        let text = learned.replace("SCRATCH", "1024000").replace("BASE", "102400");
        let learned = Comparison::of(&LoadedSpec::parse("spec.yaml", &text).unwrap().spec).unwrap();
        let stacked = comparison(1_024_000, 102_400).unwrap();
        let last = |comparison: &Comparison| {
            let plan =
                comparison.recipes.iter().find(|recipe| recipe.name == "depth").unwrap().plan().unwrap();
            plan.stages.last().unwrap().clone()
        };
        // A step of learning takes as much as one of training.
        assert_eq!(last(&learned).steps, last(&stacked).steps - 50);
        assert!(last(&learned).learning_flops() > 0.0 && last(&stacked).learning_flops() == 0.0);
    }

    #[test]
    fn equal_bases_are_one_job_a_seed() {
        let comparison = comparison(1_024_000, 102_400).unwrap();
        let names: Vec<&str> = comparison.bases.iter().map(|base| &*base.plan.job).collect();
        assert_eq!(names.len(), 4, "the deep recipes share theirs: {names:?}");
        let of = |recipe: usize, seed: usize| {
            comparison.recipes[recipe].runs[seed].job.plan.stages[0].trained_by.clone()
        };
        assert_eq!(of(0, 0), None);
        assert_eq!((of(1, 0), of(1, 1)), (of(3, 0), of(3, 1)));
        assert_ne!(of(1, 0), of(2, 0));
        for run in comparison.recipes.iter().flat_map(|recipe| &recipe.runs) {
            let first = &run.job.plan.stages[0];
            let Some(name) = &first.trained_by else { continue };
            let base = comparison.bases.iter().find(|base| base.plan.job == *name).unwrap();
            assert_eq!(first.mismatch(&base.plan.stages[0]), None, "a base is the first stage of its runs");
            assert_eq!(first.training.seed, u64::try_from(run.seed).unwrap());
        }
    }

    #[test]
    fn a_base_whose_schedule_goes_on_after_the_growth_is_trained_by_its_job() {
        let text = SPEC
            .replace(
                "growth: {operator: Stack, factor: 4}",
                "growth: {operator: Stack, factor: 4, schedule: Continue}",
            )
            .replace("SCRATCH", "1024000")
            .replace("BASE", "102400");
        let comparison = Comparison::of(&LoadedSpec::parse("spec.yaml", &text).unwrap().spec).unwrap();
        let first = |recipe: usize| &comparison.recipes[recipe].plan().unwrap().stages[0];
        assert_eq!(comparison.recipes[1].name, "depth");
        assert_eq!(first(1).trained_by, None);
        assert!(first(2).trained_by.is_some());
    }

    #[test]
    fn a_budget_in_flops_is_the_one_in_tokens() {
        let tokens = comparison(1_024_000, 102_400).unwrap();
        let text = SPEC
            .replace("scratchTokens: SCRATCH", &format!("flops: {:e}", tokens.budget_flops * 1.0001))
            .replace("BASE", "102400");
        let flops = Comparison::of(&LoadedSpec::parse("spec.yaml", &text).unwrap().spec).unwrap();
        assert_eq!((flops.scratch_tokens, flops.budget_flops), (1_024_000, tokens.budget_flops));
    }

    #[test]
    fn fields_of_jobs_are_found_in_the_spec() {
        let spec = LoadedSpec::parse("spec.yaml", &SPEC.replace("SCRATCH", "1M").replace("BASE", "1K"))
            .unwrap()
            .spec;
        let place_in = |field: &str, recipe: usize| place(field, Some((recipe, &spec.recipes[recipe])));
        assert_eq!(place_in("spec.stages[0].model.hiddenSize", 1), "recipes[1].base.model.hiddenSize");
        assert_eq!(place_in("spec.stages[1].growth.factor", 1), "recipes[1].growth.factor");
        assert_eq!(place_in("spec.stages[1].tokens", 2), "recipes[2].growths[0].tokens");
        assert_eq!(place_in("spec.stages[2].growth.factor", 2), "recipes[2].growths[1].growth.factor");
        assert_eq!(place_in("spec.training.globalBatchTokens", 0), "training.globalBatchTokens");
        assert_eq!(place("spec.stages[0].training.schedule", None), "scratch.training.schedule");
        assert_eq!(place("spec.stages[0].model", None), "model");
        assert_eq!(place("metadata.name", None), "name");
        assert_eq!(place("spec", None), "");
    }

    #[test]
    fn the_examples_are_comparisons() {
        for name in ["books", "smoke"] {
            let file = format!("{}/../examples/compare/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
            let comparison =
                LoadedSpec::load(file.as_ref()).and_then(|loaded| Comparison::new(&loaded)).unwrap();
            assert_eq!(comparison.spec.name, name);
        }
    }
}

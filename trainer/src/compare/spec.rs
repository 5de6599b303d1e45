//! What a user writes: one small file for many jobs.

use crate::job_file::{JobFileError, Positions, Problem, check_fields};
use growth_crds::crd;
use growth_crds::quantity::TokenCount;
use growth_crds::spec::data::DataSpec;
use growth_crds::spec::model::ModelSpec;
use growth_crds::spec::policy::{CheckpointSpec, EvaluationSpec};
use growth_crds::spec::stage::{GrowthSpec, StageTrainingSpec};
use growth_crds::spec::storage::StorageSpec;
use growth_crds::spec::training::TrainingSpec;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// Several ways to train one model at equal FLOPs, each with several seeds.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ComparisonSpec {
    /// `GrowthComparison`.
    pub kind: String,
    /// Begins the names of all jobs.
    pub name: String,
    /// The target: the architecture that is trained from scratch, and that every recipe ends with.
    pub model: ModelSpec,
    /// As in a job.
    pub data: DataSpec,
    /// As in a job.
    pub storage: StorageSpec,
    /// As in a job, without a seed.
    pub training: TrainingSpec,
    /// As in a job.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// As in a job.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// The budget: FLOPs of each run, exact count, the base included. Exactly one of it and `scratch_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops: Option<f64>,
    /// The budget: what training the target from scratch on so many tokens takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch_tokens: Option<TokenCount>,
    /// Every recipe runs once with each of them.
    pub seeds: Vec<i64>,
    /// How the target is trained from scratch, where it differs.
    #[serde(default)]
    pub scratch: ScratchSpec,
    /// The ways to grow.
    pub recipes: Vec<RecipeSpec>,
}

/// The run from scratch.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ScratchSpec {
    /// As in a stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<StageTrainingSpec>,
}

/// One way to reach the target: a base that grows once, or several times.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RecipeSpec {
    /// Name of the row, and part of the names of its jobs.
    pub name: String,
    /// What is trained first. Recipes with equal bases share one training of it for each seed.
    pub base: BaseSpec,
    /// How the base becomes the target. Exactly one of it and `growths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthSpec>,
    /// Sizes that the growth changes, where it has no factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSpec>,
    /// How the grown model is trained, where it differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<StageTrainingSpec>,
    /// Several growths, one after another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub growths: Vec<GrowthStepSpec>,
}

/// The first stage of a recipe.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct BaseSpec {
    /// Where it differs from the target.
    pub model: ModelSpec,
    /// Tokens it trains.
    pub tokens: TokenCount,
    /// How it is trained, where it differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<StageTrainingSpec>,
}

/// One of several growths, and the training after it.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GrowthStepSpec {
    /// How the model grows.
    pub growth: GrowthSpec,
    /// Sizes that the growth changes, where it has no factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSpec>,
    /// Tokens it trains; the last one trains what the budget leaves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<TokenCount>,
    /// How it is trained, where it differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<StageTrainingSpec>,
}

impl RecipeSpec {
    /// Its growths in order, at least one in a checked spec.
    pub fn steps(&self) -> Vec<GrowthStepSpec> {
        match &self.growth {
            None => self.growths.clone(),
            Some(growth) => vec![GrowthStepSpec {
                growth: growth.clone(),
                model: self.model.clone(),
                tokens: None,
                training: self.training.clone(),
            }],
        }
    }
}

/// A spec, and where its fields stand.
#[derive(Debug)]
pub struct LoadedSpec {
    /// Name of the file.
    pub file: String,
    /// What it says.
    pub spec: ComparisonSpec,
    positions: Positions,
}

impl LoadedSpec {
    /// Reads the spec in `path` and checks its fields; what they mean together, the jobs will tell.
    ///
    /// # Errors
    /// Every unknown, missing or mistyped field, with its place.
    pub fn load(path: &Path) -> Result<Self, JobFileError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            let message = format!("cannot be read ({error}); name a GrowthComparison file");
            JobFileError { file: file.clone(), problems: vec![Problem::of_file(message)] }
        })?;
        Self::parse(&file, &text).map_err(|problems| JobFileError { file, problems })
    }

    /// Reads the spec in `text`.
    ///
    /// # Errors
    /// As [`LoadedSpec::load`].
    pub fn parse(file: &str, text: &str) -> Result<Self, Vec<Problem>> {
        let positions = Positions::of(text).map_err(|problem| vec![problem])?;
        match read(text) {
            Ok(spec) => Ok(Self { file: file.to_owned(), spec, positions }),
            Err(problems) => Err(problems.into_iter().map(|problem| positions.place(problem)).collect()),
        }
    }

    /// Gives problems their places in the file.
    pub fn error(&self, problems: Vec<Problem>) -> JobFileError {
        let mut placed: Vec<Problem> = Vec::new();
        for problem in problems.into_iter().map(|problem| self.positions.place(problem)) {
            // All runs share most fields; one mistake there is reported once.
            if !placed.contains(&problem) {
                placed.push(problem);
            }
        }
        JobFileError { file: self.file.clone(), problems: placed }
    }
}

fn read(text: &str) -> Result<ComparisonSpec, Vec<Problem>> {
    let file_problem = |error: String| vec![Problem::of_file(error)];
    let value: Value = serde_saphyr::from_str(text).map_err(|error| file_problem(error.to_string()))?;
    if value.get("kind").and_then(Value::as_str) != Some("GrowthComparison") {
        let message = "must be GrowthComparison; `growth-trainer run` takes a GrowthTrainingJob";
        return Err(vec![Problem::of_field("kind".to_owned(), message.to_owned())]);
    }
    let problems = check_fields(&value, &schema().map_err(|error| file_problem(error.to_string()))?);
    if !problems.is_empty() {
        return Err(problems);
    }
    let spec: ComparisonSpec = serde_path_to_error::deserialize(&value)
        .map_err(|error| vec![Problem::of_field(error.path().to_string(), error.inner().to_string())])?;
    let problems = check(&spec);
    if problems.is_empty() { Ok(spec) } else { Err(problems) }
}

/// Fields and types, made of the job's own where they are the job's own.
fn schema() -> Result<Value, serde_json::Error> {
    let job = crd::schema()?;
    let of_job = |path: &str| job.pointer(&format!("/properties/spec/properties/{path}")).cloned();
    let of_stage = |name: &str| of_job(&format!("stages/items/properties/{name}"));
    let (model, growth, training) = (of_job("model"), of_stage("growth"), of_stage("training"));
    let tokens = of_job("training/properties/globalBatchTokens");
    let mut shared_training = of_job("training").unwrap_or_default();
    if let Some(fields) = shared_training.get_mut("properties").and_then(Value::as_object_mut) {
        fields.remove("seed");
    }
    let object = |required: &[&str], properties: Value| json!({"type": "object", "required": required, "properties": properties});
    let text = json!({"type": "string"});
    let base = object(&["model", "tokens"], json!({"model": model, "tokens": tokens, "training": training}));
    let step = object(
        &["growth"],
        json!({"growth": growth, "model": model, "tokens": tokens, "training": training}),
    );
    let recipe = object(
        &["name", "base"],
        json!({
            "name": text, "base": base, "growth": growth, "model": model, "training": training,
            "growths": {"type": "array", "items": step},
        }),
    );
    Ok(object(
        &["name", "model", "data", "storage", "training", "seeds", "recipes"],
        json!({
            "kind": text,
            "name": text,
            "model": model,
            "data": of_job("data"),
            "storage": of_job("storage"),
            "training": shared_training,
            "evaluation": of_job("evaluation"),
            "checkpoint": of_job("checkpoint"),
            "flops": {"type": "number"},
            "scratchTokens": tokens,
            "seeds": {"type": "array", "items": {"type": "integer"}},
            "scratch": object(&[], json!({"training": training})),
            "recipes": {"type": "array", "items": recipe},
        }),
    ))
}

/// What no job could tell.
fn check(spec: &ComparisonSpec) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut refuse =
        |field: String, message: &str| problems.push(Problem::of_field(field, message.to_owned()));
    if spec.flops.is_some() == spec.scratch_tokens.is_some() {
        refuse("scratchTokens".to_owned(), "set exactly one of scratchTokens and flops");
    }
    if spec.flops.is_some_and(|flops| !(flops.is_finite() && flops > 0.0)) {
        refuse("flops".to_owned(), "no budget; write a number of FLOPs above 0, such as 1e14");
    }
    if spec.seeds.is_empty() {
        refuse("seeds".to_owned(), "write at least one seed; three give a standard error: [1, 2, 3]");
    }
    for (index, seed) in spec.seeds.iter().enumerate() {
        let field = format!("seeds[{index}]");
        if *seed < 0 {
            refuse(field, "is negative; use 0 or more");
        } else if spec.seeds[..index].contains(seed) {
            refuse(field, "stands here twice; a seed repeated is a run repeated");
        }
    }
    for (index, recipe) in spec.recipes.iter().enumerate() {
        check_recipe(recipe, &format!("recipes[{index}]"), &mut refuse);
        if spec.recipes[..index].iter().any(|other| other.name == recipe.name) {
            refuse(format!("recipes[{index}].name"), "another recipe is called so too; rename one of them");
        }
    }
    problems
}

fn check_recipe(recipe: &RecipeSpec, field: &str, refuse: &mut impl FnMut(String, &str)) {
    if recipe.name == "scratch" || recipe.name == "base" || recipe.name.starts_with("base-") {
        refuse(format!("{field}.name"), "scratch and base are names of their own; choose another one");
    }
    if recipe.growth.is_some() != recipe.growths.is_empty() {
        refuse(format!("{field}.growth"), "set exactly one of growth and growths");
        return;
    }
    if recipe.growth.is_none() && (recipe.model.is_some() || recipe.training.is_some()) {
        refuse(field.to_owned(), "with growths, model and training stand in each of them; move them there");
    }
    for (index, step) in recipe.growths.iter().enumerate() {
        let (place, last) = (format!("{field}.growths[{index}].tokens"), index + 1 == recipe.growths.len());
        match (last, step.tokens) {
            (true, Some(_)) => refuse(place, "the last one trains what the budget leaves; remove tokens"),
            (false, None) => refuse(place, "is required: only the last one trains what the budget leaves"),
            _ => {}
        }
    }
}

//! `growth-trainer grow`

use super::{End, Options, print_json, train::read_plan};
use anyhow::{Context, bail};
use growth_crds::plan::{GrowthOperator, GrowthPlan, OptimizerStatePolicy, StageStart, growth_map};
use growth_crds::protocol::{Outcome, checkpoint_status};
use growth_trainer::checkpoint::{self, HuggingFaceFolder};
use growth_trainer::growth::{self, GrownCheckpoint, GrowthTarget};
use growth_trainer::job;
use growth_trainer::progress::{Reporter, Unit};
use growth_trainer::storage::{Storage, StorageOptions};
use std::path::PathBuf;

/// Grows a checkpoint into the first one of a larger model, tensor by tensor.
///
/// Either from one folder into another, any Hugging Face LLaMA among them:
///
///     growth-trainer grow --from DIR --operator Stack --factor 4 --to DIR2
///
/// or as the plan file of the grown stage says, from the last checkpoint of the stage before (what a transform pod
/// runs):
///
///     growth-trainer grow --plan large.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// Plan file of the grown stage
    #[arg(long, conflicts_with_all = ["from", "to", "operator", "factor", "layers", "pattern"])]
    plan: Option<PathBuf>,
    /// Folder of the source checkpoint
    #[arg(long, required_unless_present = "plan", requires = "to")]
    from: Option<String>,
    /// Folder of the grown checkpoint
    #[arg(long, requires = "from")]
    to: Option<String>,
    /// Growth operator
    #[arg(long, default_value = "Stack", value_parser = ["Stack", "LayerMap"])]
    operator: String,
    /// Stack: how often the source's layers are repeated
    #[arg(long, conflicts_with_all = ["layers", "pattern"])]
    factor: Option<u32>,
    /// LayerMap: source layer of every target layer, from 0: 0,1,2,1,2
    #[arg(long, value_delimiter = ',', conflicts_with = "pattern")]
    layers: Option<Vec<u32>>,
    /// LayerMap in the paper's notation, from 1: 12-3456*5-56
    #[arg(long)]
    pattern: Option<String>,
    /// Keep the optimizer's moments, grown as the weights are, instead of starting them at zero
    #[arg(long)]
    keep_optimizer_state: bool,
}

/// Grows and prints where the result is.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let mut reporter = options.reporter();
    let grown = match &arguments.plan {
        Some(plan) => grow_stage(plan, &mut reporter)?,
        None => grow_folder(arguments, &mut reporter)?,
    };
    drop(reporter);
    options.report(&Outcome::finished(Some(checkpoint_status(&grown.manifest, &grown.uri))))?;
    if options.json {
        print_json(&grown.manifest)?;
    } else {
        let made = if grown.reused { "was there already" } else { "written" };
        println!("{} ({made}), state {}", grown.uri, grown.manifest.digest);
    }
    Ok(End::Done)
}

fn grow_folder(arguments: &Arguments, reporter: &mut Reporter) -> anyhow::Result<GrownCheckpoint> {
    let (Some(from), Some(to)) = (&arguments.from, &arguments.to) else {
        bail!("give --from and --to, or --plan")
    };
    let source = Storage::open(from, &StorageOptions::default())?;
    let layers = HuggingFaceFolder::open(&source)?.config().num_hidden_layers;
    let plan = GrowthPlan {
        from_stage: "source".to_owned(),
        operator: if arguments.operator == "Stack" {
            GrowthOperator::Stack
        } else {
            GrowthOperator::LayerMap
        },
        layers: layer_map(arguments, layers)?,
        optimizer_state: match arguments.keep_optimizer_state {
            true => OptimizerStatePolicy::Keep,
            false => OptimizerStatePolicy::Reset,
        },
    };
    let target = GrowthTarget::Folder {
        folder: Storage::open(to, &StorageOptions::default())?,
        job: "grow".to_owned(),
        stage: "grown".to_owned(),
    };
    reporter.begin("growth", Unit::Bytes, 0, 0);
    Ok(growth::grow(&source, None, &plan, &target, &[], &mut |done, total| {
        reporter.advance(done, total, String::new());
    })?)
}

fn layer_map(arguments: &Arguments, source_layers: u32) -> anyhow::Result<Vec<u32>> {
    if let Some(layers) = &arguments.layers {
        return Ok(layers.clone());
    }
    if let Some(pattern) = &arguments.pattern {
        return growth_map::parse_pattern(pattern).with_context(|| format!("--pattern {pattern}"));
    }
    let factor = arguments.factor.context("give --factor, --layers or --pattern")?;
    Ok(growth_map::stack(source_layers, factor))
}

fn grow_stage(path: &std::path::Path, reporter: &mut Reporter) -> anyhow::Result<GrownCheckpoint> {
    let plan = read_plan(path)?;
    let StageStart::Growth(growth) = &plan.start else {
        bail!("{}: stage {} does not grow; train it", path.display(), plan.stage)
    };
    let storage = job::open_storage(&plan.storage)?;
    let mut warn = |text: String| eprintln!("warning: {text}");
    let source =
        checkpoint::latest_valid(&storage, &plan.job, &growth.from_stage, &mut warn)?.with_context(|| {
            format!("stage {} has no checkpoint to grow from; train it first", growth.from_stage)
        })?;
    Ok(job::grow_checkpoint(&storage, &source, None, &plan, growth, reporter)?)
}

//! `growth-trainer grow`

use super::{End, Options, end_at_sigterm, eval::absolute, print_json, stop_flag, train::read_plan};
use anyhow::{Context, bail};
use growth_crds::plan::{
    CheckpointGrowth, Freeze, GrowthOperator, GrowthPlan, Initializer, LayerOrder, OptimizerStatePolicy,
    ScheduleAcrossGrowth, StageStart, WidthSplit, resolve_checkpoint_growth,
};
use growth_crds::protocol::{
    GrowthMeasurement, GrowthRecord, GrowthSample, LearnRecord, Outcome, checkpoint_status,
};
use growth_crds::spec::data::DataSource;
use growth_crds::spec::factor::GrowthFactor;
use growth_crds::spec::model::ModelSpec;
use growth_crds::spec::stage::{
    DEFAULT_LEARN_STEPS, DepthGrowthSpec, DirectWidthSpec, GrowthSpec, LayerMapSpec, LearnSpec, LlamaProSpec,
    MiddleBlockSpec, SolarSpec, ZeroDepthSpec,
};
use growth_trainer::checkpoint::{self, HuggingFaceFolder};
use growth_trainer::data;
use growth_trainer::growth::{
    self, DEFAULT_MEASURED_TOKENS, GrownCheckpoint, GrowthData, GrowthTarget, LearnData, Learning, Measure,
};
use growth_trainer::job::{self, GrowthReporter, GrowthStep};
use growth_trainer::progress::{Reporter, count};
use growth_trainer::storage::{Storage, StorageOptions};
use growth_trainer::tokenizer::Tokenizer;
use serde::de::DeserializeOwned;
use serde_json::json;
use std::path::PathBuf;

/// What `--help` says after the options.
const HELP: &str = "\
Either from one folder into another, any Hugging Face LLaMA among them:

    growth-trainer grow --from DIR --operator Stack --factor 4 --to DIR2
    growth-trainer grow --from DIR --operator LayerMap --pattern 12-3456*5-56 --to DIR2
    growth-trainer grow --from DIR --operator DirectWidth --factor 2 --to DIR2
    growth-trainer grow --from DIR --operator ZeroWidth --hidden-size 512 --to DIR2
    growth-trainer grow --from DIR --operator RandomDepth --num-hidden-layers 9 --to DIR2

or as the plan file of the grown stage says, from the last checkpoint of the stage before
(what a transform pod runs):

    growth-trainer grow --plan large.json

Depth: Stack repeats the model, Interleave every layer, LayerMap takes any list or a preset,
ZeroDepth adds layers that do nothing at first, RandomDepth new ones behind a mask. Width:
DirectWidth copies channels, ZeroWidth adds channels that are zero at first, RandomWidth new
ones behind masks; --depth-operator grows the depth in the same step. Masks rise while the
stage of a job trains; a folder grown by hand has masks of 0, which eval and generate apply.
LearnDepth and LearnWidth learn on --text how to mix weights.
Afterwards both models run on the same tokens and are compared. docs/growth.md describes
every operator.";

/// Grows a checkpoint into the first one of a larger model, tensor by tensor.
#[derive(clap::Args)]
#[command(after_long_help = HELP)]
pub struct Arguments {
    /// Plan file of the grown stage
    #[arg(long, conflicts_with_all = ["from", "to", "operator", "factor", "map", "width", "learn", "depth_operator"])]
    plan: Option<PathBuf>,
    /// Folder of the source checkpoint
    #[arg(long, required_unless_present = "plan", requires = "to")]
    from: Option<String>,
    /// Folder of the grown checkpoint
    #[arg(long, requires = "from")]
    to: Option<String>,
    /// Growth operator
    #[arg(long, default_value = "Stack", value_parser = ["Stack", "Interleave", "LayerMap", "ZeroDepth", "DirectWidth", "ZeroWidth", "RandomDepth", "RandomWidth", "LearnDepth", "LearnWidth"])]
    operator: String,
    /// How often the layers are repeated, or how many times as wide the model becomes; auto: the paper's guideline
    #[arg(long, conflicts_with = "map")]
    factor: Option<GrowthFactor>,
    #[command(flatten)]
    map: MapArguments,
    /// LayerMap of LLaMA Pro: copies after each group
    #[arg(long, requires = "llama_pro")]
    copies: Option<u32>,
    /// LayerMap: whether further copies of a layer begin with outputs of zero
    #[arg(long)]
    zero_output: Option<bool>,
    #[command(flatten)]
    width: WidthArguments,
    /// Layers of the target, instead of a factor
    #[arg(long)]
    num_hidden_layers: Option<u32>,
    /// ZeroDepth: where the new layers lie
    #[arg(long, value_parser = ["Interleaved", "Stacked"])]
    order: Option<String>,
    /// With an operator of the width: one of the depth for the same step
    #[arg(long, value_parser = ["Stack", "Interleave", "LayerMap", "ZeroDepth", "LearnDepth"])]
    depth_operator: Option<String>,
    /// How often the depth's operator repeats the layers, or auto
    #[arg(long, requires = "depth_operator")]
    depth_factor: Option<GrowthFactor>,
    #[command(flatten)]
    learn: LearnArguments,
    /// Share of noise mixed into all matrices at the end
    #[arg(long)]
    noise: Option<f64>,
    /// Seed of random weights and noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Keep the optimizer's moments (those of copied layers and old weights) instead of starting all at zero
    #[arg(long)]
    keep_optimizer_state: bool,
    /// Tokens on which source and target are compared; 0 for none
    #[arg(long, default_value_t = DEFAULT_MEASURED_TOKENS)]
    measure_tokens: usize,
    /// Text for the comparison, a file or a pattern; what follows is learned on. Default: held-out text of the job, or
    /// random tokens
    #[arg(long, requires = "from")]
    text: Option<String>,
}

/// LearnDepth and LearnWidth.
#[derive(clap::Args)]
#[group(id = "learn", multiple = true)]
struct LearnArguments {
    /// LearnDepth, LearnWidth: steps that the matrices are trained for [default: 100]
    #[arg(long, value_name = "STEPS")]
    learn_steps: Option<u32>,
    /// LearnDepth, LearnWidth: their learning rate [default: 3e-4]
    #[arg(long, value_name = "RATE")]
    learn_rate: Option<f64>,
}

impl LearnArguments {
    fn spec(&self) -> Option<LearnSpec> {
        let given = self.learn_steps.is_some() || self.learn_rate.is_some();
        let steps = self.learn_steps.unwrap_or(DEFAULT_LEARN_STEPS);
        given.then_some(LearnSpec { steps, learning_rate: self.learn_rate })
    }
}

/// LayerMap: one of them.
#[derive(clap::Args)]
#[group(id = "map", multiple = false)]
struct MapArguments {
    /// LayerMap: source layer of every target layer, from 0: 0,1,2,1,2
    #[arg(long, value_delimiter = ',')]
    layers: Option<Vec<u32>>,
    /// LayerMap in the paper's notation, from 1: 12-3456*5-56
    #[arg(long)]
    pattern: Option<String>,
    /// LayerMap of SOLAR: layers that each of the two copies of the model lacks
    #[arg(long, value_name = "LAYERS")]
    solar: Option<u32>,
    /// LayerMap of MIDAS: layers of the middle block, which is repeated
    #[arg(long, value_name = "LAYERS")]
    midas: Option<u32>,
    /// LayerMap of LIDAS: layers repeated in the middle
    #[arg(long, value_name = "LAYERS")]
    lidas: Option<u32>,
    /// LayerMap of LLaMA Pro: groups, each of which gets copies of its last layers that do nothing at first
    #[arg(long, value_name = "GROUPS")]
    llama_pro: Option<u32>,
}

/// Operators of the width.
#[derive(clap::Args)]
#[group(id = "width", multiple = true)]
struct WidthArguments {
    /// Width of the residual stream of the target
    #[arg(long)]
    hidden_size: Option<u32>,
    /// Width inside the MLP of the target
    #[arg(long)]
    intermediate_size: Option<u32>,
    /// Query heads of the target
    #[arg(long)]
    num_attention_heads: Option<u32>,
    /// Key and value heads of the target. Default: as many query heads to each as in the source
    #[arg(long)]
    num_key_value_heads: Option<u32>,
    /// DirectWidth: how a weight is divided among the copies of the channel that it reads
    #[arg(long, value_parser = ["Even", "Uneven", "Noisy"])]
    split: Option<String>,
    /// ZeroWidth, RandomDepth, RandomWidth: distribution of the new weights
    #[arg(long, value_parser = ["HuggingFace", "Paper"])]
    initializer: Option<String>,
    /// ZeroWidth, RandomWidth: term inside the root of the target's norms. Default: smaller as the model is wider
    #[arg(long)]
    rms_norm_eps: Option<f64>,
}

/// Grows and prints where the result is and what changed.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let mut reporter = options.reporter();
    let grown = match &arguments.plan {
        Some(plan) => grow_stage(plan, &mut reporter)?,
        None => Some(grow_folder(arguments, &mut reporter)?),
    };
    drop(reporter);
    let Some(grown) = grown else {
        eprintln!("stopped; the same command goes on from here");
        return Ok(End::Stopped);
    };
    let checkpoint = checkpoint_status(&grown.manifest, &grown.uri);
    options.report(&Outcome::grown(checkpoint, grown.record.as_ref()))?;
    if options.json {
        let mut answer = json!(grown.manifest);
        answer["growth"] = json!(grown.record);
        print_json(&answer)?;
        return Ok(End::Done);
    }
    if let Some(record) = &grown.record {
        println!("{}", describe(record));
    }
    let made = if grown.reused { "was there already" } else { "written" };
    println!("{} ({made}), state {}", grown.uri, grown.manifest.digest);
    Ok(End::Done)
}

/// What a growth step did, for people.
fn describe(record: &GrowthRecord) -> String {
    let (kept, pairs) = (record.connection_rate.kept, record.connection_rate.pairs);
    let mut lines = vec![
        format!(
            "{:?}: {} layers, {} -> {} parameters",
            record.operator,
            record.layers.len() + record.new_layers as usize,
            count(record.source_parameters as f64),
            count(record.target_parameters as f64)
        ),
        format!("  connection rate  {kept} of {pairs} pairs of neighbours"),
        format!("  expected         {}: {}", record.expected, record.reason),
        format!(
            "  tensors          {} in new layers, {} wider, {} zero",
            record.new_tensors.len(),
            record.widened_tensors.len(),
            record.zero_tensors.len()
        ),
    ];
    if let Some(LearnRecord { steps, tokens, losses }) = &record.learned {
        let ends = losses.first().zip(losses.last());
        let losses = ends.map(|(first, last)| format!(", loss {first:.4} -> {last:.4}")).unwrap_or_default();
        lines.push(format!("  learned          {steps} steps, {} tokens{losses}", count(*tokens as f64)));
    }
    lines.extend(record.measured.as_ref().map(describe_measurement));
    lines.join("\n")
}

fn describe_measurement(measured: &GrowthMeasurement) -> String {
    let number = |value: Option<f64>| value.map_or("not finite".to_owned(), |value| format!("{value:.4}"));
    let difference = measured.max_logit_difference;
    let difference = difference.map_or("not finite".to_owned(), |value| format!("{value:.2e}"));
    let sample = match measured.sample {
        GrowthSample::HeldOut => "held-out tokens",
        GrowthSample::Random => "random tokens",
    };
    format!(
        "  measured         loss {} -> {}, largest difference of two logits {difference}, over {} {sample}",
        number(measured.loss_before),
        number(measured.loss_after),
        measured.tokens,
    )
}

fn grow_folder(arguments: &Arguments, reporter: &mut Reporter) -> anyhow::Result<GrownCheckpoint> {
    let (Some(from), Some(to)) = (&arguments.from, &arguments.to) else {
        bail!("give --from and --to, or --plan")
    };
    let source = Storage::open(from, &StorageOptions::default())?;
    let folder = HuggingFaceFolder::open(&source)?;
    let (plan, notes) = resolve(arguments, &folder)?;
    notes.iter().for_each(|note| reporter.note(&format!("note: {note}")));
    let target = GrowthTarget::Folder {
        folder: Storage::open(to, &StorageOptions::default())?,
        job: "grow".to_owned(),
        stage: "grown".to_owned(),
    };
    let learned_tokens = plan.learn.as_ref().map_or(0, |learn| learn.tokens().saturating_add(1));
    let mut text = text(arguments, &folder, usize::try_from(learned_tokens)?)?;
    // What is learned on says nothing about what was learned.
    let measured = arguments.measure_tokens.saturating_add(1);
    let rest = text.as_mut().map(|ids| ids.split_off(measured.min(ids.len())));
    let shown = GrowthReporter::new(reporter, String::new());
    let report = |progress| shown.learned(progress);
    let learning = rest.filter(|_| plan.learn.is_some()).map(|ids| Learning {
        data: LearnData::Text(ids),
        progress: None,
        stop: None,
        report: &report,
    });
    let measure = Measure { tokens: arguments.measure_tokens, text, held_out: None };
    let data = GrowthData { measure, learning };
    let mut progress = |done, total| shown.bytes(done, total);
    Ok(growth::grow_with(&source, None, &plan, &target, &[], &data, &mut progress)?)
}

/// The arguments as a stage of a job, resolved as one.
fn resolve(arguments: &Arguments, folder: &HuggingFaceFolder) -> anyhow::Result<(GrowthPlan, Vec<String>)> {
    let width = &arguments.width;
    let model = ModelSpec {
        num_hidden_layers: arguments.num_hidden_layers,
        hidden_size: width.hidden_size,
        intermediate_size: width.intermediate_size,
        num_attention_heads: width.num_attention_heads,
        num_key_value_heads: width.num_key_value_heads,
        rms_norm_eps: width.rms_norm_eps,
        initializer: word::<Initializer>(width.initializer.as_deref())?,
        ..ModelSpec::default()
    };
    let depth = word::<GrowthOperator>(arguments.depth_operator.as_deref())?;
    let growth = GrowthSpec {
        operator: word(Some(&arguments.operator))?.context("--operator is missing")?,
        factor: arguments.factor,
        layer_map: layer_map(arguments),
        zero_depth: word::<LayerOrder>(arguments.order.as_deref())?.map(|order| ZeroDepthSpec { order }),
        direct_width: word::<WidthSplit>(width.split.as_deref())?.map(|split| DirectWidthSpec { split }),
        random_depth: None,
        random_width: None,
        learn: arguments.learn.spec(),
        depth: depth.map(|operator| DepthGrowthSpec { operator, factor: arguments.depth_factor }),
        noise: arguments.noise,
        optimizer_state: match arguments.keep_optimizer_state {
            true => OptimizerStatePolicy::Keep,
            false => OptimizerStatePolicy::Reset,
        },
        // How a stage trains afterwards is nothing that a checkpoint holds.
        freeze: Freeze::default(),
        freeze_tokens: None,
        schedule: ScheduleAcrossGrowth::default(),
        rewarm_tokens: None,
        new_parameters: None,
    };
    let growth =
        CheckpointGrowth { growth: &growth, model: &model, source: folder.config(), seed: arguments.seed };
    Ok(resolve_checkpoint_growth(growth)?)
}

/// A word of the API, which clap has checked.
fn word<T: DeserializeOwned>(word: Option<&str>) -> anyhow::Result<Option<T>> {
    Ok(word.map(|word| serde_json::from_value(json!(word))).transpose()?)
}

fn layer_map(arguments: &Arguments) -> Option<LayerMapSpec> {
    let map = &arguments.map;
    let spec = LayerMapSpec {
        layers: map.layers.clone(),
        pattern: map.pattern.clone(),
        solar: map.solar.map(|drop_layers| SolarSpec { drop_layers }),
        midas: map.midas.map(|block_layers| MiddleBlockSpec { block_layers }),
        lidas: map.lidas.map(|block_layers| MiddleBlockSpec { block_layers }),
        llama_pro: map.llama_pro.map(|groups| LlamaProSpec { groups, copies: arguments.copies }),
        zero_output: arguments.zero_output,
    };
    (spec != LayerMapSpec::default()).then_some(spec)
}

/// Tokens of the text to measure on, and so many more.
fn text(arguments: &Arguments, folder: &HuggingFaceFolder, more: usize) -> anyhow::Result<Option<Vec<u32>>> {
    let Some(text) = &arguments.text else { return Ok(None) };
    let tokenizer = folder.tokenizer()?.context("--text: the source has no tokenizer.json")?;
    let tokenizer = Tokenizer::from_json(std::str::from_utf8(&tokenizer)?, None)?;
    let source = DataSource {
        uri: absolute(text),
        weight: 1.0,
        format: None,
        field: "text".to_owned(),
        max_bytes: None,
    };
    let tokens = arguments.measure_tokens.saturating_add(1).saturating_add(more);
    Ok(Some(data::tokens_of("--text", &source, &tokenizer, tokens)?))
}

/// Grows as the plan of a stage says; nothing when it was asked to stop while it learned.
fn grow_stage(path: &std::path::Path, reporter: &mut Reporter) -> anyhow::Result<Option<GrownCheckpoint>> {
    let plan = read_plan(path)?;
    let StageStart::Growth(growth) = &plan.start else {
        bail!("{}: stage {} does not grow; train it", path.display(), plan.stage)
    };
    let stop = match &growth.learn {
        Some(_) => Some(stop_flag()?),
        None => {
            // What is copied again is the same.
            end_at_sigterm()?;
            None
        }
    };
    let storage = job::open_storage(&plan.storage)?;
    let mut warn = |text: String| eprintln!("warning: {text}");
    let source =
        checkpoint::latest_valid(&storage, &plan.job, &growth.from_stage, &mut warn)?.with_context(|| {
            format!("stage {} has no checkpoint to grow from; train it first", growth.from_stage)
        })?;
    let dataset = match &growth.learn {
        // It learns on the data of the job, which must be there; for the others it is only measured on.
        Some(_) => Some(job::prepare_data_of_stage(&plan, &storage, reporter)?),
        None => job::held_out(&storage, &plan.job),
    };
    let (stage, dataset) = (&plan, dataset.as_ref());
    let step = GrowthStep { source: &source, expected: None, stage, growth, dataset, stop: stop.as_deref() };
    match job::grow_checkpoint(&storage, &step, reporter) {
        Err(error) if error.is_stopped() => Ok(None),
        grown => Ok(Some(grown?)),
    }
}

//! `growth-trainer plan`

use super::{End, Options, load_job, print_json};
use anyhow::{Context, ensure};
use growth_crds::plan::guideline::{self, Guide};
use growth_crds::plan::{FreezePlan, GrowthPlan, JobPlan, StagePlan, StageStart, TrainingPlan, WidthMap};
use growth_crds::quantity::TokenCount;
use growth_trainer::progress::{self, bytes, count};
use std::path::PathBuf;

/// Resolves a job into its stages and shows what each will do and cost: parameters, tokens, FLOPs, memory. Reads
/// nothing but the manifest.
#[derive(clap::Args)]
pub struct Arguments {
    /// Manifest of the job
    #[arg(required_unless_present = "guide")]
    job: Option<PathBuf>,
    /// Show what the paper's guidelines say of a target instead: when to grow, by how much, what the base is and costs,
    /// and which speedup was measured. For --params and --tokens, or for the last stage of a job
    #[arg(long, conflicts_with_all = ["stage", "output"])]
    guide: bool,
    /// Parameters of the target, those of embedding and head not counted: 1.1B
    #[arg(long, requires = "guide", requires = "tokens", conflicts_with = "job", value_name = "COUNT")]
    params: Option<TokenCount>,
    /// Tokens of the target: 100B
    #[arg(long, requires = "params", value_name = "COUNT")]
    tokens: Option<TokenCount>,
    /// Write the plan of this stage as a plan file, for `growth-trainer train`
    #[arg(long, requires = "output")]
    stage: Option<String>,
    /// Where the plan file goes
    #[arg(long, short, requires = "stage")]
    output: Option<PathBuf>,
}

/// Shows the plan, or writes a stage's plan file.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    if let (Some(params), Some(tokens)) = (arguments.params, arguments.tokens) {
        return show_guide(params.0 as f64, tokens.0 as f64, options);
    }
    let job = arguments.job.as_ref().context("give a job, or --guide with --params and --tokens")?;
    let loaded = load_job(job)?;
    if arguments.guide {
        let last = loaded.plan.stages.last().context("the job has no stages")?;
        return show_guide(last.parameters.non_embedding as f64, last.tokens as f64, options);
    }
    if let (Some(stage), Some(output)) = (&arguments.stage, &arguments.output) {
        let plan = find_stage(&loaded.plan, stage)?;
        let text = serde_json::to_vec_pretty(plan)?;
        std::fs::write(output, text).with_context(|| format!("cannot write {}", output.display()))?;
        return Ok(End::Done);
    }
    if options.json {
        print_json(&loaded.plan)?;
        return Ok(End::Done);
    }
    println!("{}", table(&loaded.plan));
    for stage in &loaded.plan.stages {
        println!("\n{}", describe(stage));
    }
    for note in &loaded.plan.notes {
        println!("\nnote: {note}");
    }
    Ok(End::Done)
}

fn show_guide(parameters: f64, tokens: f64, options: &Options) -> anyhow::Result<End> {
    ensure!(parameters >= 1.0 && tokens >= 1.0, "--params and --tokens must be above 0");
    let guide = guideline::guide(parameters, tokens);
    if options.json {
        print_json(&guide)?;
    } else {
        println!("{}", describe_guide(&guide));
    }
    Ok(End::Done)
}

fn describe_guide(guide: &Guide) -> String {
    let mut lines = vec![
        format!(
            "target      {} parameters, {} tokens, {:.2e} FLOP (6 N D)",
            count(guide.parameters),
            count(guide.tokens),
            guide.flops
        ),
        format!(
            "base        {} parameters (factor {}), {} tokens, {:.2e} FLOP",
            count(guide.base_parameters),
            guide.factor,
            count(guide.base_tokens),
            guide.base_flops
        ),
        format!(
            "            costs as much as {} tokens of the target: {:.2} % of its budget",
            count(guide.base_equivalent_tokens),
            100.0 * guide.base_flops / guide.flops
        ),
        format!("both        {:.2e} FLOP", guide.total_flops),
    ];
    if let Some(speedup) = &guide.speedup {
        lines.push(format!(
            "speedup     {:.1} % more FLOP from scratch for the same training loss: measured in the paper (one seed) with {} parameters where scratch took {} tokens",
            100.0 * speedup.value,
            count(speedup.parameters),
            count(speedup.tokens)
        ));
    }
    lines.extend(guide.warnings.iter().map(|warning| format!("warning: {warning}")));
    lines.join("\n")
}

/// The stage of that name.
pub fn find_stage<'a>(plan: &'a JobPlan, name: &str) -> anyhow::Result<&'a StagePlan> {
    let names: Vec<&str> = plan.stages.iter().map(|stage| stage.stage.as_str()).collect();
    let found = plan.stages.iter().find(|stage| stage.stage == name);
    found.with_context(|| format!("--stage {name}: the job has no such stage; it has {}", names.join(", ")))
}

fn table(plan: &JobPlan) -> String {
    let titles =
        ["STAGE", "LAYERS", "PARAMETERS", "NON-EMBEDDING", "TOKENS", "STEPS", "6ND FLOPS", "FLOPS", "MEMORY"];
    let rows = plan.stages.iter().map(|stage| {
        [
            stage.stage.clone(),
            stage.model.num_hidden_layers.to_string(),
            count(stage.parameters.total as f64),
            count(stage.parameters.non_embedding as f64),
            count(stage.tokens as f64),
            stage.steps.to_string(),
            format!("{:.2e}", stage.flops.six_nd),
            format!("{:.2e}", stage.flops.exact),
            bytes(stage.memory.total_bytes),
        ]
    });
    progress::table(titles, 1, rows)
}

fn describe_growth(growth: &GrowthPlan) -> String {
    let mut text =
        format!("{:?} of {}: source layers {:?}", growth.operator, growth.from_stage, growth.layers);
    if let Some(new) = growth.new_layers {
        text += &format!(" and {} new ones above them", new.count);
    }
    if !growth.zero_output.is_empty() {
        text += &format!(", with outputs of zero in {:?}", growth.zero_output);
    }
    let learned = growth.learn.as_ref().and_then(|learn| learn.width.as_ref());
    let widths = growth
        .width
        .as_ref()
        .map(|width| (&width.hidden, &width.heads, &width.key_value_heads, &width.intermediate));
    let learned =
        learned.map(|width| (&width.hidden, &width.heads, &width.key_value_heads, &width.intermediate));
    if let Some((hidden, heads, key_value_heads, intermediate)) = widths.or(learned) {
        let change = |map: &WidthMap| format!("{} -> {}", map.source, map.target());
        text += &format!(
            ", hidden {}, heads {} ({} kv), intermediate {}",
            change(hidden),
            change(heads),
            change(key_value_heads),
            change(intermediate)
        );
    }
    if let Some(learn) = &growth.learn {
        let rate = learn.adam_w.learning_rate;
        text += &format!(", learned in {} steps of {} tokens at {rate}", learn.steps, learn.batch_tokens);
    }
    if let Some(noise) = &growth.noise {
        text += &format!(", noise {}", noise.share);
    }
    format!("{text}, optimizer state {:?}", growth.optimizer_state)
}

/// What is special about the training after a growth, one line each.
fn describe_after_growth(training: &TrainingPlan) -> String {
    let special = &training.after_growth;
    let mut text = String::new();
    if special.schedule_start_tokens > 0 || special.rewarm_tokens > 0 {
        text += &format!("  schedule      goes on from token {}", special.schedule_start_tokens);
        if special.rewarm_tokens > 0 {
            text += &format!(", warmed up again over {}", special.rewarm_tokens);
        }
        text += "\n";
    }
    if let Some(FreezePlan { layers, head, tokens }) = &special.freeze {
        let head = if *head { ", final norm and head" } else { "" };
        text +=
            &format!("  trains        layers {layers:?}{head} until token {tokens}, the rest is frozen\n");
    }
    if let Some(new) = &special.new_parameters {
        let (ratio, ramp) = (new.learning_rate_ratio, new.ramp_tokens);
        text += &format!("  new weights   {ratio} times the learning rate, over {ramp} tokens\n");
    }
    text
}

fn describe(stage: &StagePlan) -> String {
    let start = match &stage.start {
        StageStart::Random { initializer } => format!("random weights ({initializer:?})"),
        StageStart::Checkpoint { uri } => format!("weights of {uri}"),
        StageStart::Growth(growth) => describe_growth(growth),
    };
    let ramp = stage.mask_ramp_tokens.map_or(String::new(), |tokens| {
        let buffer = bytes(stage.memory.masked_weights_bytes);
        format!("\n  masks         rise over the first {tokens} tokens, with masked weights of {buffer}")
    });
    let (model, training, memory) = (&stage.model, &stage.training, &stage.memory);
    format!(
        "{}\n  starts from   {start}\n  model         hidden {}, {} heads ({} kv) of {}, intermediate {}, vocabulary \
         {}\n  batch         {} tokens in micro-batches of {}, sequences of {}\n  data          from token {}\n{}  \
         memory        weights {}, gradients {}, moments {}, activations {}, checkpoint copy {}, between ranks {}{ramp}",
        stage.stage,
        model.hidden_size,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        model.intermediate_size,
        model.vocab_size,
        training.global_batch_tokens,
        training.micro_batch_tokens,
        training.sequence_length,
        stage.first_token,
        describe_after_growth(training),
        bytes(memory.weights_bytes),
        bytes(memory.gradients_bytes),
        bytes(memory.optimizer_bytes),
        bytes(memory.activations_bytes),
        bytes(memory.snapshot_bytes),
        bytes(memory.communication_bytes),
    )
}

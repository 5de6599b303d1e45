//! `growth-trainer plan`

use super::{End, Options, load_job, print_json};
use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use growth_crds::plan::{JobPlan, StagePlan, StageStart};
use growth_trainer::progress::{bytes, count};
use std::path::PathBuf;

/// Resolves a job into its stages and shows what each will do and cost: parameters, tokens, FLOPs, memory. Reads
/// nothing but the manifest.
#[derive(clap::Args)]
pub struct Arguments {
    /// Manifest of the job
    job: PathBuf,
    /// Write the plan of this stage as a plan file, for `growth-trainer train`
    #[arg(long, requires = "output")]
    stage: Option<String>,
    /// Where the plan file goes
    #[arg(long, short, requires = "stage")]
    output: Option<PathBuf>,
}

/// Shows the plan, or writes a stage's plan file.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let loaded = load_job(&arguments.job)?;
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

/// The stage of that name.
pub fn find_stage<'a>(plan: &'a JobPlan, name: &str) -> anyhow::Result<&'a StagePlan> {
    let names: Vec<&str> = plan.stages.iter().map(|stage| stage.stage.as_str()).collect();
    let found = plan.stages.iter().find(|stage| stage.stage == name);
    found.with_context(|| format!("--stage {name}: the job has no such stage; it has {}", names.join(", ")))
}

fn table(plan: &JobPlan) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "STAGE",
        "LAYERS",
        "PARAMETERS",
        "NON-EMBEDDING",
        "TOKENS",
        "STEPS",
        "6ND FLOPS",
        "FLOPS",
        "MEMORY",
    ]);
    for stage in &plan.stages {
        table.add_row([
            stage.stage.clone(),
            stage.model.num_hidden_layers.to_string(),
            count(stage.parameters.total as f64),
            count(stage.parameters.non_embedding as f64),
            count(stage.tokens as f64),
            stage.steps.to_string(),
            format!("{:.2e}", stage.flops.six_nd),
            format!("{:.2e}", stage.flops.exact),
            bytes(stage.memory.total_bytes),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn describe(stage: &StagePlan) -> String {
    let start = match &stage.start {
        StageStart::Random { initializer } => format!("random weights ({initializer:?})"),
        StageStart::Checkpoint { uri } => format!("weights of {uri}"),
        StageStart::Growth(growth) => format!(
            "{:?} of {}: source layers {:?}, optimizer state {:?}",
            growth.operator, growth.from_stage, growth.layers, growth.optimizer_state
        ),
    };
    let (model, training, memory) = (&stage.model, &stage.training, &stage.memory);
    format!(
        "{}\n  starts from   {start}\n  model         hidden {}, {} heads ({} kv) of {}, intermediate {}, vocabulary \
         {}\n  batch         {} tokens in micro-batches of {}, sequences of {}\n  data          from token {}\n  \
         memory        weights {}, gradients {}, moments {}, activations {}, checkpoint copy {}",
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
        bytes(memory.weights_bytes),
        bytes(memory.gradients_bytes),
        bytes(memory.optimizer_bytes),
        bytes(memory.activations_bytes),
        bytes(memory.snapshot_bytes),
    )
}

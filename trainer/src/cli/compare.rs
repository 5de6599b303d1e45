//! `growth-trainer compare`

use super::{End, Options, print_json, stop_flag};
use anyhow::Context;
use growth_trainer::compare::{self, Comparison, ComparisonReport, LoadedSpec};
use growth_trainer::job::{self, JobEnd};
use growth_trainer::storage::Storage;
use std::path::{Path, PathBuf};

/// What `--help` says after the options.
const HELP: &str = "\
A spec has the parts that all jobs share, as a job writes them, and the recipes:

    kind: GrowthComparison
    name: small                  # begins the names of all jobs
    model: {numHiddenLayers: 8, hiddenSize: 128, intermediateSize: 344, numAttentionHeads: 4}
    data: {...}                  # as spec.data of a job; so are storage, training,
    storage: {uri: \"file://./runs\"}                             # evaluation, checkpoint
    training: {sequenceLength: 256, globalBatchTokens: 4096}    # no seed here
    scratchTokens: 4M            # the budget: what scratch takes on so many tokens; or flops: 1e14
    seeds: [1, 2, 3]
    recipes:
    - name: stack4
      base: {model: {numHiddenLayers: 2}, tokens: 800K}
      growth: {operator: Stack, factor: 4}

model is the target: it is trained from scratch, and every recipe must end with it. A recipe
trains its base, grows it, and spends on the target what the base left of the budget; FLOPs are
equal to half a step. base.training, training of a recipe and scratch.training say what is
trained differently, as the training of a stage does. With growths instead of growth, a list of
{growth, model, tokens, training}, a recipe grows several times.

Every recipe with every seed is an ordinary job, NAME-RECIPE-sSEED; equal bases are trained
once for each seed, in a job NAME-base-DIGEST-sSEED, which the others name in trainedBy. The same
command goes on where it was stopped, and trains nothing twice.

On a cluster: --write-jobs writes the jobs as manifests, which can be applied in any order: each
waits for its base; with --report the results are read from their storage.";

/// Trains a model from scratch and by several growth recipes, at equal FLOPs and with several seeds, and compares them.
#[derive(clap::Args)]
#[command(after_long_help = HELP)]
pub struct Arguments {
    /// The comparison
    spec: PathBuf,
    /// Jobs that run at a time; they share the threads, and the bits do not depend on it
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Show what each recipe trains and how near it comes to the budget, and run nothing
    #[arg(long)]
    dry_run: bool,
    /// Write the jobs as manifests into this folder, and run nothing
    #[arg(long, value_name = "DIR", conflicts_with = "dry_run")]
    write_jobs: Option<PathBuf>,
    /// Report what is in the storage, and run nothing
    #[arg(long, conflicts_with_all = ["dry_run", "write_jobs"])]
    report: bool,
    /// Write table, data and plots into this folder too
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs a comparison and shows what came of it.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let comparison = Comparison::new(&LoadedSpec::load(&arguments.spec)?)?;
    if arguments.dry_run {
        println!("{}", compare::budget_table(&comparison));
        return Ok(End::Done);
    }
    if let Some(folder) = &arguments.write_jobs {
        return write_jobs(&comparison, folder);
    }
    if !arguments.report {
        let stop = stop_flag()?;
        let mut reporter = options.reporter();
        let end = compare::run(&comparison, arguments.jobs, &stop, &mut reporter)?;
        drop(reporter);
        if end == JobEnd::Stopped {
            eprintln!("stopped; the same command goes on from the last checkpoints");
            return Ok(End::Stopped);
        }
        if end == JobEnd::AlreadyFinished {
            eprintln!("{} is finished already; nothing to do", comparison.spec.name);
        }
    }
    show(&comparison, arguments.out.as_deref(), options)?;
    Ok(End::Done)
}

fn write_jobs(comparison: &Comparison, folder: &Path) -> anyhow::Result<End> {
    let place = || format!("cannot write into {}", folder.display());
    std::fs::create_dir_all(folder).with_context(place)?;
    for job in comparison.jobs() {
        let file = folder.join(format!("{}.yaml", job.plan.job));
        std::fs::write(&file, serde_saphyr::to_string(&job.job)?).with_context(place)?;
        println!("{}", file.display());
    }
    Ok(End::Done)
}

/// Prints the results, and writes them into the storage and where else they are wanted.
fn show(comparison: &Comparison, out: Option<&Path>, options: &Options) -> anyhow::Result<()> {
    let storage = job::open_storage(&comparison.spec.storage)?;
    let report = compare::report(comparison, &storage)?;
    let files = files(&report)?;
    let folder = storage.join(&report.name);
    for (name, content) in &files {
        folder.put(name, content.clone())?;
    }
    if let Some(out) = out {
        write_out(out, &files)?;
    }
    if options.json {
        return print_json(&report);
    }
    println!("\n{}\n", compare::result_table(&report));
    print_addresses(&files, &folder);
    Ok(())
}

/// The results as files, by name.
fn files(report: &ComparisonReport) -> anyhow::Result<Vec<(&'static str, String)>> {
    let plots = [
        ("loss-vs-flops.svg", "validation loss against FLOPs", compare::curves_svg(report)),
        ("final-loss.svg", "final validation loss", compare::bars_svg(report)),
    ];
    let shown: Vec<(&str, &str)> =
        plots.iter().filter(|(_, _, svg)| svg.is_some()).map(|(name, title, _)| (*title, *name)).collect();
    let mut files = vec![
        ("comparison.md", compare::markdown(report, &shown)),
        ("comparison.json", serde_json::to_string_pretty(report)? + "\n"),
    ];
    files.extend(plots.into_iter().filter_map(|(name, _, svg)| Some((name, svg?))));
    Ok(files)
}

fn write_out(folder: &Path, files: &[(&str, String)]) -> anyhow::Result<()> {
    let place = || format!("cannot write into {}", folder.display());
    std::fs::create_dir_all(folder).with_context(place)?;
    for (name, content) in files {
        std::fs::write(folder.join(name), content).with_context(place)?;
    }
    Ok(())
}

fn print_addresses(files: &[(&str, String)], folder: &Storage) {
    for (name, _) in files {
        println!("{:<18} {}", name, folder.uri_of(name));
    }
}

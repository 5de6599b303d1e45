//! Arguments, exit codes, and one file for each command.

mod checkpoint;
mod compare;
mod data;
mod eval;
mod generate;
mod grow;
mod init;
mod plan;
mod report;
mod run;
mod train;

use anyhow::Context;
use clap::{Parser, Subcommand};
use growth_crds::plan::PlanErrors;
use growth_crds::protocol::{Outcome, contract};
use growth_trainer::checkpoint::CheckpointError;
use growth_trainer::collective::CollectiveError;
use growth_trainer::data::DataError;
use growth_trainer::growth::GrowthError;
use growth_trainer::job::JobError;
use growth_trainer::job_file::{JobFileError, LoadedJob};
use growth_trainer::progress::Reporter;
use growth_trainer::training::stage::TrainError;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Exit code of a job that was asked to stop and can go on.
const EXIT_STOPPED: u8 = 130;
/// What a shell says of a program that SIGTERM has ended.
const EXIT_TERMINATED: i32 = 128 + SIGTERM;
/// Exit code of input that cannot work, found before any work.
const EXIT_BAD_INPUT: u8 = contract::EXIT_BAD_INPUT;
/// Exit code of a rank that ends because another one did.
const EXIT_PEER_LOST: u8 = contract::EXIT_PEER_LOST;
/// Exit code of everything else that went wrong.
const EXIT_FAILED: u8 = contract::EXIT_FAILED;

/// Trains a small language model, grows it, and goes on training the large one.
///
/// A job is one file, the GrowthTrainingJob that the operator takes too:
///
///     growth-trainer run examples/laptop.yaml
///
/// It needs no cluster, no GPU and no download. Stop it when you like: the same
/// command goes on where it stopped, and ends in the same bits.
#[derive(Parser)]
#[command(name = "growth-trainer", version, verbatim_doc_comment)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(clap::Args, Clone)]
pub struct Options {
    /// Threads to compute with; results do not depend on it. Default: one a core
    #[arg(long, global = true, env = "GROWTH_THREADS")]
    threads: Option<usize>,
    /// Answer in JSON on standard output, and show no progress
    #[arg(long, global = true)]
    json: bool,
    /// Show no progress
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Write how the work ended here, as JSON: a pod's termination message
    #[arg(long, global = true, env = contract::ENV_OUTCOME_FILE, value_name = "FILE")]
    outcome_file: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole job on this machine, or go on with it
    Run(run::Arguments),
    /// Show what a job will do and what it costs; check it for errors
    Plan(plan::Arguments),
    /// Prepare the data of a job, or look at it
    #[command(subcommand)]
    Data(data::Command),
    /// Write the random first weights of a stage as a Hugging Face folder
    Init(init::Arguments),
    /// Train one stage from a plan file: what a trainer pod runs
    Train(train::Arguments),
    /// Grow a checkpoint into the first one of a larger model
    Grow(Box<grow::Arguments>),
    /// Measure loss and perplexity of a checkpoint on a text
    Eval(eval::Arguments),
    /// Let a checkpoint write
    Generate(generate::Arguments),
    /// Train a model by several growth recipes and from scratch at equal FLOPs, and compare them
    Compare(compare::Arguments),
    /// Make the table and the plots of a job again from its storage
    Report(report::Arguments),
    /// List or verify checkpoints
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
}

/// What a command ended with.
pub enum End {
    /// It did what it was asked to.
    Done,
    /// It was stopped and can go on.
    Stopped,
    /// It found something wrong and has said so.
    Failed,
}

/// Parses the arguments, runs the command, and turns its end into an exit code.
pub fn main() -> ExitCode {
    let Arguments { options, command } = Arguments::parse();
    match start(&options).and_then(|()| command.run(&options)) {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::Stopped) => ExitCode::from(EXIT_STOPPED),
        Ok(End::Failed) => ExitCode::from(EXIT_FAILED),
        Err(error) => {
            eprintln!("error: {}", message(&error));
            if let Err(second) = options.report(&Outcome::failed(&message(&error))) {
                eprintln!("error: {second:#}");
            }
            ExitCode::from(exit_code(&error))
        }
    }
}

impl Command {
    fn run(self, options: &Options) -> anyhow::Result<End> {
        match self {
            Self::Run(arguments) => run::run(&arguments, options),
            Self::Plan(arguments) => plan::run(&arguments, options),
            Self::Data(command) => data::run(&command, options),
            Self::Init(arguments) => init::run(&arguments, options),
            Self::Train(arguments) => train::run(&arguments, options),
            Self::Grow(arguments) => grow::run(&arguments, options),
            Self::Eval(arguments) => eval::run(&arguments, options),
            Self::Generate(arguments) => generate::run(&arguments, options),
            Self::Compare(arguments) => compare::run(&arguments, options),
            Self::Report(arguments) => report::run(&arguments, options),
            Self::Checkpoint(command) => checkpoint::run(&command, options),
        }
    }
}

fn start(options: &Options) -> anyhow::Result<()> {
    // The first provider wins; there is no other in this program.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut pool = rayon::ThreadPoolBuilder::new().thread_name(|index| format!("compute-{index}"));
    if let Some(threads) = options.threads {
        pool = pool.num_threads(threads);
    }
    pool.build_global().context("cannot start the compute threads")
}

impl Options {
    /// Leaves the last word where a controller finds it.
    fn report(&self, outcome: &Outcome) -> anyhow::Result<()> {
        let Some(file) = &self.outcome_file else { return Ok(()) };
        std::fs::write(file, serde_json::to_vec(outcome)?)
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// Progress for people, unless they asked for none.
    fn reporter(&self) -> Reporter {
        if self.json || self.quiet { Reporter::quiet() } else { Reporter::for_people() }
    }
}

/// Reads and checks a job file.
fn load_job(path: &Path) -> Result<LoadedJob, JobFileError> {
    growth_trainer::job_file::load(path)
}

/// A flag that the first SIGINT or SIGTERM sets; the second ends the process at once.
fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let second = i32::from(EXIT_STOPPED);
        signal_hook::flag::register_conditional_shutdown(signal, second, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// Lets the first SIGTERM end the process. The kernel does not do it for the first process of a container, which would go
/// on until the grace period of its pod is over.
fn end_at_sigterm() -> anyhow::Result<()> {
    let always = Arc::new(AtomicBool::new(true));
    signal_hook::flag::register_conditional_shutdown(SIGTERM, EXIT_TERMINATED, always)?;
    Ok(())
}

/// The error and its causes in one text, without repeating a cause that its parent already prints.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// What a person can mend in the input is [`EXIT_BAD_INPUT`]: a controller then knows that a retry cannot help.
fn exit_code(error: &anyhow::Error) -> u8 {
    let bad_input = error.chain().any(|cause| {
        cause.is::<JobFileError>()
            || cause.is::<PlanErrors>()
            || cause.downcast_ref().is_some_and(JobError::is_input_error)
            || cause.downcast_ref().is_some_and(TrainError::is_input_error)
            || cause.downcast_ref().is_some_and(GrowthError::is_input_error)
            || cause.downcast_ref().is_some_and(CheckpointError::is_input_error)
            || cause.downcast_ref().is_some_and(DataError::is_input_error)
    });
    let peer_lost = error.chain().any(|cause| {
        cause.downcast_ref().is_some_and(JobError::is_peer_lost)
            || cause.downcast_ref().is_some_and(TrainError::is_peer_lost)
            || cause.downcast_ref().is_some_and(CollectiveError::is_peer_lost)
    });
    match (bad_input, peer_lost) {
        (true, _) => EXIT_BAD_INPUT,
        (false, true) => EXIT_PEER_LOST,
        (false, false) => EXIT_FAILED,
    }
}

/// Prints an answer as JSON.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

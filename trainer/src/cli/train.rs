//! `growth-trainer train`

use super::{End, Options, print_json, stop_flag};
use anyhow::{Context, ensure};
use growth_crds::plan::StagePlan;
use growth_crds::protocol::{Outcome, contract};
use growth_trainer::collective::{Alone, Collective, Secret};
use growth_trainer::job::gang::{self, Membership};
use growth_trainer::storage::Storage;
use growth_trainer::training::board::ProgressBoard;
use growth_trainer::training::stage::{self, StageEnd, StageInputs};
use growth_trainer::{job, server};
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Trains one stage from a plan file (`growth-trainer plan job.yaml --stage NAME -o plan.json`), from its newest
/// checkpoint to its last token. This is what a trainer pod runs. SIGTERM finishes the current step, writes a
/// checkpoint and ends with exit code 0.
///
/// Several ranks train together when each is told their number, its own rank and where rank 0 is. They meet there when
/// all run, trust each other by a secret that rank 0 puts into the job's storage, and end with exit code 3 within ten
/// seconds when one of them is lost.
#[derive(clap::Args)]
pub struct Arguments {
    /// Plan file of the stage; - is standard input
    plan: PathBuf,
    /// Number of this attempt, from 1: it must not commit once a higher one has. Default: one more than the storage has
    /// seen
    #[arg(long, env = contract::ENV_ATTEMPT, value_parser = clap::value_parser!(u32).range(1..))]
    attempt: Option<u32>,
    /// Ranks that train this stage together
    #[arg(long, env = contract::ENV_REPLICAS, default_value_t = 1)]
    replicas: u32,
    /// This one's rank, from 0
    #[arg(long, env = contract::ENV_RANK, default_value_t = 0)]
    rank: u32,
    /// Where rank 0 is: a name or address, with a port other than 29500 if so
    #[arg(long, env = contract::ENV_LEADER, value_name = "HOST[:PORT]")]
    leader: Option<String>,
    /// What the ranks prove to each other that they know: 64 hexadecimal digits. Default: through the job's storage
    #[arg(long, env = gang::ENV_SECRET, hide_env_values = true, hide = true)]
    secret: Option<String>,
    /// The process that has started this rank, and without which it ends
    #[arg(long, env = gang::ENV_PARENT, hide = true)]
    parent: Option<u32>,
    /// Serve /progress (JSON), /metrics (Prometheus) and /healthz here, for example 0.0.0.0:8080
    #[arg(long, env = contract::ENV_LISTEN, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
}

/// Trains the stage and prints the manifest of its last checkpoint.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let began = Instant::now();
    let plan = read_plan(&arguments.plan)?;
    let stop = stop_flag()?;
    let storage = job::open_storage(&plan.storage)?;
    let mut reporter = options.reporter();
    let board = Arc::new(ProgressBoard::default());
    // A pod that waits for others is not ready: nobody asks it, and the operator knows that the stage has not begun.
    let mut collective = arguments.join(&plan, &storage, &stop, options)?;
    if let Some(address) = arguments.listen {
        server::start(address, board.clone()).with_context(|| format!("--listen {address}"))?;
    }
    let dataset = job::prepare_data_of_stage(&plan, &storage, &mut reporter)?;
    let attempt = arguments.attempt;
    let inputs = StageInputs {
        plan: &plan,
        storage: &storage,
        dataset: &dataset,
        stop: &stop,
        attempt,
        began,
        board: &board,
    };
    let end = stage::train(&inputs, collective.as_mut(), &mut reporter)?;
    drop(reporter);
    let (manifest, outcome) = match end {
        StageEnd::Finished(manifest) => {
            let status = stage::status_of(&storage, &manifest);
            (manifest, Outcome::finished(Some(status)))
        }
        StageEnd::Stopped(manifest) => {
            let status = stage::status_of(&storage, &manifest);
            (manifest, Outcome::stopped(status))
        }
    };
    options.report(&outcome)?;
    if options.json {
        print_json(&manifest)?;
    } else {
        let folder = growth_trainer::checkpoint::checkpoint_folder(&storage, &manifest);
        println!("step {} of {}: {}", manifest.step, plan.steps, folder.uri());
    }
    Ok(End::Done)
}

impl Arguments {
    /// Meets the other ranks, if there are any.
    fn join(
        &self,
        plan: &StagePlan,
        storage: &Storage,
        stop: &AtomicBool,
        options: &Options,
    ) -> anyhow::Result<Box<dyn Collective>> {
        if self.replicas == 1 {
            return Ok(Box::new(Alone));
        }
        ensure!(self.rank < self.replicas, "--rank {} of {}: ranks count from 0", self.rank, self.replicas);
        let attempt = self.attempt.context("several ranks need --attempt, so that they know each other")?;
        let leader = self.leader.as_deref().context("several ranks need --leader, where rank 0 is")?;
        let secret = self.secret.as_deref().map(|text| {
            Secret::from_hex(text)
                .with_context(|| format!("{} is not 64 hexadecimal digits", gang::ENV_SECRET))
        });
        let membership = Membership {
            rank: self.rank as usize,
            world_size: self.replicas as usize,
            attempt,
            leader: gang::with_port(leader),
            secret: secret.transpose()?,
            parent: self.parent,
        };
        let mesh = gang::join(plan, storage, &membership, stop)?;
        let options = options.clone();
        gang::exit_when_lost(&mesh, move |error| {
            // Nobody is left to tell that this failed, too.
            let _ = options.report(&Outcome::failed(&error.to_string()));
        });
        Ok(Box::new(mesh))
    }
}

/// Reads a plan file.
pub fn read_plan(path: &Path) -> anyhow::Result<StagePlan> {
    let text = match path == Path::new("-") {
        true => {
            let mut text = Vec::new();
            std::io::stdin().read_to_end(&mut text).map(|_| text)
        }
        false => std::fs::read(path),
    };
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is not a plan file; write one with growth-trainer plan JOB --stage NAME -o FILE",
            path.display()
        )
    })
}

//! How the ranks of a stage come together: pods through the job's storage, processes of one machine through their parent.

use super::{JobError, Result};
use crate::checkpoint::digest_bytes;
use crate::collective::{CollectiveError, GRACE, Group, Identity, Mesh, Secret, meet, pauses};
use crate::model::layout::ParameterLayout;
use crate::progress::Reporter;
use crate::storage::{Storage, StorageError};
use crate::training::shards::Shards;
use crate::training::stage::{self, StageEnd, StageInputs, TrainError};
use growth_crds::plan::StagePlan;
use growth_crds::protocol::contract;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Variable with the secret of ranks that one process has started.
pub const ENV_SECRET: &str = "GROWTH_SECRET";

/// Variable with the number of the process that has started a rank.
pub const ENV_PARENT: &str = "GROWTH_PARENT";

/// How long ranks wait for each other: nodes may have to be bought for some of them. Whoever has started them knows
/// better when to give up.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// Longest time between two looks for the secret; each is a request to the storage.
const PAUSE: Duration = Duration::from_secs(1);

/// Time for the processes to end after the stage has.
const FAREWELL: Duration = Duration::from_secs(15);

/// A rank and where to find the others.
#[derive(Debug, Clone)]
pub struct Membership {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// The attempt.
    pub attempt: u32,
    /// `host:port` of rank 0.
    pub leader: String,
    /// What only these ranks know; none: it is in the storage.
    pub secret: Option<Secret>,
    /// The process that has started this one, if a rank did: without it nobody comes any more.
    pub parent: Option<u32>,
}

impl Membership {
    fn is_orphan(&self) -> bool {
        #[cfg(unix)]
        return self.parent.is_some_and(|parent| parent != std::os::unix::process::parent_id());
        #[cfg(not(unix))]
        return false;
    }
}

/// The address of rank 0, with the usual port where it names none.
pub fn with_port(leader: &str) -> String {
    let has_port = leader.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port { leader.to_owned() } else { format!("{leader}:{}", contract::RENDEZVOUS_PORT) }
}

/// Meets the other ranks of an attempt.
///
/// # Errors
/// When they do not come, or the attempt has another rank 0.
pub fn join(plan: &StagePlan, storage: &Storage, member: &Membership, stop: &AtomicBool) -> Result<Mesh> {
    let give_up = || match stop.load(Ordering::Relaxed) {
        true => Some("stopped".to_owned()),
        false => member.is_orphan().then(|| "the process that started this one has ended".to_owned()),
    };
    let pigeonhole = Pigeonhole::new(plan, storage, member.attempt);
    let secret = match &member.secret {
        Some(secret) => secret.clone(),
        None if member.rank == 0 => pigeonhole.put()?,
        None => pigeonhole.get(&give_up)?,
    };
    let mesh = connect(plan, member, secret, None, &give_up)?;
    if member.secret.is_none() && member.rank == 0 {
        pigeonhole.clear();
    }
    Ok(mesh)
}

fn connect(
    plan: &StagePlan,
    member: &Membership,
    secret: Secret,
    listener: Option<TcpListener>,
    give_up: &dyn Fn() -> Option<String>,
) -> Result<Mesh> {
    let Membership { rank, world_size, attempt, ref leader, .. } = *member;
    let shards = Shards::new(&ParameterLayout::new(&plan.model), rank, world_size);
    let digest = digest_bytes(&serde_json::to_vec(plan).unwrap_or_default());
    let group = Group {
        rank,
        world_size,
        leader: leader.clone(),
        identity: Identity(format!("{}/{}/{attempt}/{digest}", plan.job, plan.stage)),
        secret,
        patience: PATIENCE,
        part_bytes: shards.largest_len() * size_of::<f32>(),
    };
    let warn = |text: String| eprintln!("warning: {text}");
    meet(&group, listener, &warn, give_up).map_err(|error| TrainError::Collective(error).into())
}

/// Where rank 0 leaves the secret for the others: whoever can write the job's checkpoints may join it.
struct Pigeonhole {
    folder: Storage,
    name: String,
}

impl Pigeonhole {
    fn new(plan: &StagePlan, storage: &Storage, attempt: u32) -> Self {
        let folder = storage.join(&format!("{}/rendezvous", plan.job));
        Self { folder, name: format!("{}-{attempt}", plan.stage) }
    }

    fn put(&self) -> Result<Secret> {
        let secret = Secret::random().map_err(|error| failed(error.to_string()))?;
        match self.folder.create(&self.name, secret.to_hex()) {
            Ok(()) => Ok(secret),
            Err(StorageError::AlreadyExists { uri }) => Err(failed(format!(
                "{uri} shows that this attempt has a rank 0 already; start another one with a higher --attempt"
            ))),
            Err(error) => Err(error.into()),
        }
    }

    fn get(&self, give_up: &dyn Fn() -> Option<String>) -> Result<Secret> {
        let deadline = Instant::now() + PATIENCE;
        let mut rests = pauses(PAUSE);
        loop {
            match self.folder.get(&self.name) {
                Ok(bytes) => {
                    let secret = std::str::from_utf8(&bytes).ok().and_then(Secret::from_hex);
                    return secret.ok_or_else(|| failed(format!("{} holds no secret", self.uri())));
                }
                Err(StorageError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(reason) = give_up() {
                return Err(failed(format!("{reason} while waiting for rank 0")));
            }
            if Instant::now() > deadline {
                let waited = PATIENCE.as_secs();
                return Err(failed(format!("waited {waited} s for rank 0 to write {}", self.uri())));
            }
            std::thread::sleep(rests.next().unwrap_or(PAUSE));
        }
    }

    /// It is of no use any more, and of little harm where this fails.
    fn clear(&self) {
        if let Err(error) = self.folder.delete(&self.name) {
            eprintln!("warning: {error}");
        }
    }

    fn uri(&self) -> String {
        self.folder.uri_of(&self.name)
    }
}

fn failed(problem: String) -> JobError {
    TrainError::Collective(CollectiveError::Rendezvous { problem }).into()
}

/// Ends this process when a rank is lost and the computation, which notices when it next waits for a rank, does not end by
/// itself soon after. `last_word` comes before that.
pub fn exit_when_lost(mesh: &Mesh, last_word: impl FnOnce(&CollectiveError) + Send + 'static) {
    let loss = mesh.loss();
    std::thread::spawn(move || {
        let error = loss.wait();
        std::thread::sleep(GRACE);
        eprintln!("error: {error}");
        last_word(&error);
        std::process::exit(i32::from(contract::EXIT_PEER_LOST));
    });
}

/// Trains a stage in `ranks` processes of this machine, of which this one is rank 0. They share its threads.
///
/// # Errors
/// Those of [`stage::train`], and when a process cannot be started or ends early.
pub fn train_in_processes(
    inputs: &StageInputs<'_>,
    ranks: usize,
    reporter: &mut Reporter,
) -> Result<StageEnd> {
    let StageInputs { plan, attempt, stop, .. } = *inputs;
    stage::check_ranks(plan, ranks)?;
    let threads = (rayon::current_num_threads() / ranks).max(1);
    let problem = |problem: String| JobError::Ranks { stage: plan.stage.clone(), ranks, problem };
    let io = |error: std::io::Error| problem(error.to_string());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io)?;
    let member = Membership {
        rank: 0,
        world_size: ranks,
        attempt: attempt.unwrap_or(1),
        leader: listener.local_addr().map_err(io)?.to_string(),
        secret: None,
        parent: None,
    };
    let secret = Secret::random().map_err(io)?;
    // What the others read is what this one uses.
    let json = serde_json::to_vec(plan).map_err(|error| problem(error.to_string()))?;
    let plan: StagePlan = serde_json::from_slice(&json).map_err(|error| problem(error.to_string()))?;
    let processes = Processes::start(&json, &member, &secret, threads).map_err(io)?;
    let give_up = || match stop.load(Ordering::Relaxed) {
        true => Some("stopped".to_owned()),
        false => processes.ended(),
    };
    let mut mesh = connect(&plan, &member, secret, Some(listener), &give_up)?;
    exit_when_lost(&mesh, |_| ());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| problem(error.to_string()))?;
    let inputs = StageInputs { plan: &plan, ..*inputs };
    let end = pool.install(|| stage::train(&inputs, &mut mesh, reporter))?;
    processes.wait();
    Ok(end)
}

/// The other ranks, as processes; they end with this value.
struct Processes(Mutex<Vec<Child>>);

impl Processes {
    fn start(plan: &[u8], of: &Membership, secret: &Secret, threads: usize) -> std::io::Result<Self> {
        let program = std::env::current_exe()?;
        let this = Self(Mutex::default());
        for rank in 1..of.world_size {
            let mut child = Command::new(&program)
                .args(["train", "-", "--quiet", "--leader", &of.leader])
                .args(["--rank", &rank.to_string(), "--replicas", &of.world_size.to_string()])
                .args(["--attempt", &of.attempt.to_string(), "--threads", &threads.to_string()])
                .env(ENV_SECRET, secret.to_hex())
                .env(ENV_PARENT, std::process::id().to_string())
                .env_remove(contract::ENV_LISTEN)
                .env_remove(contract::ENV_OUTCOME_FILE)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()?;
            let input = child.stdin.take();
            this.children().push(child);
            if let Some(mut input) = input {
                input.write_all(plan)?;
            }
        }
        Ok(this)
    }

    fn children(&self) -> std::sync::MutexGuard<'_, Vec<Child>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Which process has ended, if one has.
    fn ended(&self) -> Option<String> {
        let mut children = self.children();
        children.iter_mut().enumerate().find_map(|(index, child)| {
            let status = child.try_wait().ok().flatten()?;
            Some(format!("rank {} has ended ({status})", index + 1))
        })
    }

    /// Waits until all have ended, for a while.
    fn wait(&self) {
        let deadline = Instant::now() + FAREWELL;
        let all_ended = || self.children().iter_mut().all(|child| !matches!(child.try_wait(), Ok(None)));
        while !all_ended() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in self.children().iter_mut() {
            // One that has ended already is only to be reaped.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

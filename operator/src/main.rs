//! The operator's program.

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use growth_operator::apply::Writer;
use growth_operator::children::PodDefaults;
use growth_operator::controller;
use growth_operator::controller::Telemetry;
use growth_operator::health::{self, Health};
use growth_operator::leader::{self, Election, Leadership, Lost};
use growth_operator::names::MANAGER;
use http::{HeaderValue, header};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// For reconciles that run when the process is told to end. What they leave undone the next operator does.
const DRAIN: Duration = Duration::from_secs(3);
/// Nothing of the API server's is awaited for longer. A watch that is well has something to say or ends before.
const ANSWER_WAIT: Duration = Duration::from_secs(300);

/// Runs GrowthTrainingJobs on Kubernetes.
#[derive(Parser)]
#[command(name = "growth-operator", version)]
struct Arguments {
    /// Only the jobs of this namespace [default: all namespaces]
    #[arg(long, env = "GROWTH_NAMESPACE")]
    namespace: Option<String>,
    /// Image of the pods that it makes, where a job's template names none
    #[arg(long, env = "GROWTH_TRAINER_IMAGE", default_value = concat!("growth-trainer:", env!("CARGO_PKG_VERSION")))]
    trainer_image: String,
    /// Pull policy of that image [default: Kubernetes' own]
    #[arg(long, env = "GROWTH_TRAINER_IMAGE_PULL_POLICY")]
    trainer_image_pull_policy: Option<String>,
    /// Namespace of the Lease by which one of several operators leads [default: no Lease, this one always acts]
    #[arg(long, env = "GROWTH_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of that Lease
    #[arg(long, env = "GROWTH_LEASE_NAME", default_value = MANAGER)]
    lease_name: String,
    /// Address of /livez, /readyz and /metrics
    #[arg(long, env = "GROWTH_LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// How logs are written
    #[arg(long, env = "GROWTH_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// What is logged: a level, or targets with levels
    #[arg(long, env = "GROWTH_LOG", default_value = "info")]
    log: String,
    /// Seconds after which a watch that only fails makes /livez fail; tests do not wait for two minutes
    #[arg(long, hide = true, default_value_t = health::DEAD_AFTER.as_secs())]
    dead_watch_seconds: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

// Two threads do: all the work is waiting. By default there would be one for each core of the node.
#[tokio::main(worker_threads = 2)]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // The first provider wins; there is no other in this program.
    let _ = rustls::crypto::ring::default_provider().install_default();
    start_logs(&arguments)?;
    let telemetry = Telemetry {
        health: Arc::new(Health::new(Duration::from_secs(arguments.dead_watch_seconds))),
        metrics: Arc::default(),
    };
    let served = health::serve(arguments.listen, telemetry.health.clone(), telemetry.metrics.clone());
    let listen = arguments.listen;
    tokio::select! {
        ended = work(arguments, telemetry) => ended,
        served = served => served.with_context(|| format!("--listen {listen}")),
    }
}

/// Leads when its turn comes, and reconciles until it is told to end.
async fn work(arguments: Arguments, telemetry: Telemetry) -> Result<()> {
    let stop = stop_signal();
    let config = Config::infer().await.context("cannot find a Kubernetes API server")?;
    let config = configured(config);
    let client = Client::try_from(config.clone())?;
    let version = client.apiserver_version().await.context("the API server does not answer")?;
    tracing::info!(
        kubernetes = version.git_version,
        image = arguments.trainer_image,
        "growth-operator starts"
    );

    let leadership = match &arguments.lease_namespace {
        None => None,
        Some(namespace) => {
            let identity = leader::identity();
            let election = Election::new(client.clone(), config, namespace, &arguments.lease_name, identity)?;
            tokio::select! {
                won = election.win() => {
                    Some(won.with_context(|| format!("Lease {namespace}/{}", arguments.lease_name))?)
                }
                () = stop.cancelled() => return Ok(()),
            }
        }
    };
    tokio::select! {
        ended = reconcile(arguments, client, telemetry, stop) => ended?,
        lost = lost(leadership.as_ref()) => return Err(lost.into()),
    }
    if let Some(leadership) = leadership {
        leadership.release().await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// Who calls, how long it waits, and that failures are told: the callers here have pauses of their own, and a call that
/// is repeated in silence looks like one that hangs.
fn configured(mut config: Config) -> Config {
    let agent = HeaderValue::from_static(concat!("growth-operator/", env!("CARGO_PKG_VERSION")));
    config.connect_timeout = Some(health::CONNECT_WAIT);
    config.read_timeout = Some(ANSWER_WAIT);
    config.reset_reader_on_write = true;
    config.default_retry = false;
    config.headers = vec![(header::USER_AGENT, agent)];
    config
}

async fn reconcile(
    arguments: Arguments,
    client: Client,
    telemetry: Telemetry,
    stop: CancellationToken,
) -> Result<()> {
    let reporter = Reporter { controller: MANAGER.to_owned(), instance: std::env::var("POD_NAME").ok() };
    let writer = Writer {
        client: client.clone(),
        recorder: Recorder::new(client, reporter),
        defaults: PodDefaults {
            image: arguments.trainer_image,
            image_pull_policy: arguments.trainer_image_pull_policy,
        },
    };
    let Telemetry { health, metrics } = telemetry.clone();
    let shutdown = stop.clone().cancelled_owned();
    let (jobs, run) = controller::controller(writer, arguments.namespace.as_deref(), telemetry, shutdown)?;
    metrics.leads(jobs);
    health.leads();
    tokio::select! {
        () = run => match stop.is_cancelled() {
            true => Ok(()),
            false => bail!("the watches have ended"),
        },
        () = async { stop.cancelled().await; tokio::time::sleep(DRAIN).await } => {
            tracing::warn!("ends while jobs are reconciled; the next operator goes on from there");
            Ok(())
        }
    }
}

/// Never ready without a Lease.
async fn lost(leadership: Option<&Leadership>) -> Lost {
    match leadership {
        Some(leadership) => leadership.lost().await,
        None => std::future::pending().await,
    }
}

/// Cancelled by SIGTERM or Ctrl-C.
fn stop_signal() -> CancellationToken {
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        shutdown().await;
        tracing::info!("told to end");
        told.cancel();
    });
    stop
}

/// SIGTERM or Ctrl-C.
async fn shutdown() {
    let interrupt = tokio::signal::ctrl_c();
    match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt => {}
            }
        }
        Err(_) => drop(interrupt.await),
    }
}

fn start_logs(arguments: &Arguments) -> Result<()> {
    let filter = EnvFilter::try_new(&arguments.log).with_context(|| format!("--log {}", arguments.log))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}

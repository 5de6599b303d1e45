//! The operator's program.

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use growth_operator::apply::Writer;
use growth_operator::children::PodDefaults;
use growth_operator::names::MANAGER;
use growth_operator::{controller, health};
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use std::net::SocketAddr;
use tracing_subscriber::EnvFilter;

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
    /// Address of /livez and /readyz
    #[arg(long, env = "GROWTH_LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// How logs are written
    #[arg(long, env = "GROWTH_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// What is logged: a level, or targets with levels
    #[arg(long, env = "GROWTH_LOG", default_value = "info")]
    log: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // The first provider wins; there is no other in this program.
    let _ = rustls::crypto::ring::default_provider().install_default();
    start_logs(&arguments)?;
    let client = Client::try_default().await.context("cannot find a Kubernetes API server")?;
    let version = client.apiserver_version().await.context("the API server does not answer")?;
    tracing::info!(
        kubernetes = version.git_version,
        image = arguments.trainer_image,
        "growth-operator starts"
    );

    let reporter = Reporter { controller: MANAGER.to_owned(), instance: std::env::var("POD_NAME").ok() };
    let writer = Writer {
        client: client.clone(),
        recorder: Recorder::new(client, reporter),
        defaults: PodDefaults {
            image: arguments.trainer_image,
            image_pull_policy: arguments.trainer_image_pull_policy,
        },
    };
    let (stores, run) = controller::controller(writer, arguments.namespace.as_deref(), shutdown())?;
    tokio::select! {
        () = run => {
            tracing::info!("stopped");
            Ok(())
        }
        served = health::serve(arguments.listen, stores) => {
            served.with_context(|| format!("--listen {}", arguments.listen))
        }
    }
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

//! What rank 0 of a training pod serves: `/progress` for the operator, `/metrics` for Prometheus, `/healthz` for probes.

use crate::training::attempt::Activity;
use crate::training::board::ProgressBoard;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use growth_crds::protocol::Progress;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

/// Serves `board` on a thread of its own until the process ends. Returns the address, whose port the system has chosen
/// when `address` says 0.
///
/// # Errors
/// When the address cannot be listened on.
pub fn start(address: SocketAddr, board: Arc<ProgressBoard>) -> io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("server".to_owned()).spawn(move || {
        runtime.block_on(async {
            let served = match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => axum::serve(listener, routes(board)).await,
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                eprintln!("warning: progress is no longer served: {error}");
            }
        });
    })?;
    Ok(bound)
}

fn routes(board: Arc<ProgressBoard>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/progress", get(progress))
        .route("/metrics", get(metrics))
        .with_state(board)
}

async fn progress(State(board): State<Arc<ProgressBoard>>) -> Response {
    match board.read() {
        Some(progress) => Json(progress).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the stage has not begun\n").into_response(),
    }
}

async fn metrics(State(board): State<Arc<ProgressBoard>>) -> Response {
    let text = board.read().map(|progress| exposition(&progress, &board.activity())).unwrap_or_default();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// The text format of Prometheus, version 0.0.4.
fn exposition(progress: &Progress, activity: &Activity) -> String {
    let mut text = String::new();
    let labels = format!("stage=\"{}\",attempt=\"{}\"", progress.stage, progress.attempt);
    let mut gauge = |name: &str, help: &str, value: f64| {
        let name = format!("growth_trainer_{name}");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{{{labels}}} {value}");
    };
    gauge("step", "Optimizer steps done in the stage.", progress.step as f64);
    gauge("tokens", "Tokens trained in the stage.", progress.tokens as f64);
    gauge("tokens_per_second", "Speed over the last steps.", progress.tokens_per_second);
    if let Some(loss) = progress.loss {
        gauge("loss", "Training loss of the last step in nats a token.", loss);
    }
    if let Some(checkpoint) = &progress.checkpoint {
        gauge("checkpoint_step", "Step of the last committed checkpoint.", checkpoint.step as f64);
    }
    let name = "growth_trainer_seconds_total";
    let help = "What the time of this attempt was spent on.";
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
    for (part, seconds) in activity.parts() {
        let _ = writeln!(text, "{name}{{{labels},activity=\"{part}\"}} {seconds:.3}");
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use jiff::Timestamp;
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::Duration;

    fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn serves_what_the_board_says() {
        let board = Arc::new(ProgressBoard::default());
        let address = start("127.0.0.1:0".parse().unwrap(), board.clone()).unwrap();
        assert!(get(address, "/healthz").ends_with("ok\n"));
        assert!(get(address, "/progress").contains("503"));

        board.begin(Progress {
            stage: "small".into(),
            attempt: 2,
            step: 0,
            tokens: 0,
            total_tokens: 1000,
            tokens_per_second: 0.0,
            loss: None,
            checkpoint: None,
            updated_at: Timestamp::UNIX_EPOCH,
        });
        board.step(1, 100, 2.5, 100, Duration::from_millis(500));
        let answer = get(address, "/progress");
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        let progress: Progress = serde_json::from_str(body).unwrap();
        assert_eq!((progress.step, progress.tokens, progress.loss), (1, 100, Some(2.5)));
        assert!((progress.tokens_per_second - 200.0).abs() < 1e-6);
        let metrics = get(address, "/metrics");
        board.spent(Activity { waiting: 1.5, ..Activity::default() });
        let seconds =
            "growth_trainer_seconds_total{stage=\"small\",attempt=\"2\",activity=\"waiting\"} 1.500\n";
        assert!(get(address, "/metrics").contains(seconds));
        assert!(metrics.contains("growth_trainer_tokens{stage=\"small\",attempt=\"2\"} 100\n"), "{metrics}");
    }
}

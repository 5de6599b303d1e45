//! `/livez`, `/readyz` and `/metrics`.

use crate::metrics::{Metrics, WatchKind};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use kube::runtime::watcher;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A watch that has had nothing but errors for longer is dead: a new process may do better.
pub const DEAD_AFTER: Duration = Duration::from_secs(120);

/// Longest pause between two tries of a watch, jitter included: see `controller::watch_back_off`.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(16);

/// To connect to the API server.
pub const CONNECT_WAIT: Duration = Duration::from_secs(5);

/// No error for so long after the last one: the watch is up again. That it is cannot be seen otherwise, as bookmarks are
/// not passed on and a cluster may be idle.
const QUIET: Duration = Duration::from_secs(25);

const _: () = assert!(QUIET.as_secs() > LONGEST_PAUSE.as_secs() + CONNECT_WAIT.as_secs());

/// What is known of one watch.
#[derive(Debug, Default)]
pub struct Watch {
    failing: Option<Failing>,
    has_listed: bool,
}

#[derive(Debug)]
struct Failing {
    since: Instant,
    last: Instant,
    error: String,
}

impl Watch {
    /// It failed, and will be tried again.
    pub fn failed(&mut self, now: Instant, error: String) {
        let since = self.still_failing(now).map_or(now, |failing| failing.since);
        self.failing = Some(Failing { since, last: now, error });
    }

    /// It has told something.
    pub fn told(&mut self) {
        self.failing = None;
    }

    /// For how long it has failed without a break, and its last error, if that is longer than `limit`.
    pub fn dead(&self, now: Instant, limit: Duration) -> Option<(Duration, &str)> {
        let failing = self.still_failing(now)?;
        let long = now - failing.since;
        (long > limit).then_some((long, &failing.error))
    }

    fn still_failing(&self, now: Instant) -> Option<&Failing> {
        self.failing.as_ref().filter(|failing| now - failing.last <= QUIET)
    }
}

/// How the process is.
#[derive(Debug)]
pub struct Health {
    leads: AtomicBool,
    watches: [Mutex<Watch>; WatchKind::ALL.len()],
    dead_after: Duration,
}

impl Health {
    /// Of a process that stands by. Watches are dead after `dead_after`.
    pub fn new(dead_after: Duration) -> Self {
        Self { leads: AtomicBool::new(false), watches: Default::default(), dead_after }
    }

    /// Takes note of what a watch says.
    pub fn saw<K>(&self, kind: WatchKind, event: &watcher::Result<watcher::Event<K>>) {
        let mut watch = self.watch(kind);
        match event {
            Err(error) => watch.failed(Instant::now(), error.to_string()),
            // It is about to list; that may fail.
            Ok(watcher::Event::Init) => {}
            Ok(event) => {
                watch.told();
                watch.has_listed |= matches!(event, watcher::Event::InitDone);
            }
        }
    }

    fn watch(&self, kind: WatchKind) -> MutexGuard<'_, Watch> {
        self.watches[kind as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process leads from now on; it is ready once the watches have listed their objects.
    pub fn leads(&self) {
        self.leads.store(true, Ordering::Relaxed);
    }

    fn alive(&self) -> (StatusCode, String) {
        let now = Instant::now();
        let dead = WatchKind::ALL.iter().find_map(|kind| {
            self.watch(*kind).dead(now, self.dead_after).map(|(long, error)| {
                format!("the watch of {kind}s has failed for {} s: {error}\n", long.as_secs())
            })
        });
        match dead {
            Some(sentence) => (StatusCode::SERVICE_UNAVAILABLE, sentence),
            None => (StatusCode::OK, "ok\n".to_owned()),
        }
    }

    /// Who stands by is ready too, so that rollouts go on.
    fn ready(&self) -> (StatusCode, &'static str) {
        if !self.leads.load(Ordering::Relaxed) {
            return (StatusCode::OK, "stands by: another operator leads\n");
        }
        match WatchKind::ALL.iter().all(|kind| self.watch(*kind).has_listed) {
            true => (StatusCode::OK, "ok\n"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "the watches have not listed yet\n"),
        }
    }
}

/// Serves until the process ends.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(address: SocketAddr, health: Arc<Health>, metrics: Arc<Metrics>) -> std::io::Result<()> {
    let probes = Router::new()
        .route("/livez", get(async |State(health): State<Arc<Health>>| health.alive()))
        .route("/readyz", get(async |State(health): State<Arc<Health>>| health.ready()))
        .with_state(health);
    let scrapes = Router::new().route("/metrics", get(scrape)).with_state(metrics);
    axum::serve(tokio::net::TcpListener::bind(address).await?, probes.merge(scrapes)).await
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    match metrics.text() {
        Ok(text) => Ok(([(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text)),
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = DEAD_AFTER;

    /// A watch that failed at these seconds, and whether it is dead at that one.
    fn is_dead(failures: &[u64], at: u64) -> bool {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut watch = Watch::default();
        failures.iter().for_each(|second| watch.failed(after(*second), "gone".into()));
        watch.dead(after(at), LIMIT).is_some()
    }

    #[test]
    fn a_watch_is_dead_when_it_fails_for_longer_than_the_limit_without_a_break() {
        let every_ten: Vec<u64> = (0..=13).map(|try_| try_ * 10).collect();
        assert!(!is_dead(&[], 1000), "idle from the start");
        assert!(!is_dead(&every_ten[..13], 120));
        assert!(is_dead(&every_ten, 131));
        assert!(!is_dead(&[0], 121), "failed once, and silent since: it is up again and nothing happens");
        assert!(!is_dead(&every_ten, 130 + 26), "failed for long, and silent since");
        assert!(!is_dead(&[0, 10, 20, 100, 110, 120, 130], 131), "a break: the first failures do not count");
    }

    #[test]
    fn what_it_tells_ends_the_failures() {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut watch = Watch::default();
        watch.failed(start, "gone".into());
        watch.failed(after(20), "gone".into());
        watch.told();
        watch.failed(after(40), "refused".into());
        assert_eq!(watch.dead(after(60), Duration::from_secs(30)), None);
        watch.failed(after(60), "refused".into());
        assert_eq!(
            watch.dead(after(80), Duration::from_secs(30)),
            Some((Duration::from_secs(40), "refused"))
        );
    }

    #[test]
    fn probes_tell_what_a_process_does() {
        let health = Health::new(Duration::ZERO);
        assert_eq!(health.ready(), (StatusCode::OK, "stands by: another operator leads\n"));
        health.leads();
        for kind in WatchKind::ALL {
            assert_eq!(health.ready().0, StatusCode::SERVICE_UNAVAILABLE);
            health.saw(kind, &Ok(watcher::Event::<()>::InitDone));
        }
        assert_eq!(health.ready(), (StatusCode::OK, "ok\n"));

        assert_eq!(health.alive().0, StatusCode::OK);
        let failure = || Err::<watcher::Event<()>, _>(watcher::Error::NoResourceVersion);
        health.saw(WatchKind::Pod, &failure());
        // Each listing begins with one of these, also the one that fails next.
        health.saw(WatchKind::Pod, &Ok(watcher::Event::<()>::Init));
        health.saw(WatchKind::Pod, &failure());
        let (status, sentence) = health.alive();
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(sentence.starts_with("the watch of Pods has failed for 0 s: no metadata"), "{sentence}");
        health.saw(WatchKind::Pod, &Ok(watcher::Event::<()>::InitDone));
        assert_eq!(health.alive().0, StatusCode::OK);
    }
}

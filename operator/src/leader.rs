//! Which of several operators acts: the one that holds a Lease.
//!
//! | | |
//! |---|---|
//! | renewing | every 7 s, two calls: 17 a minute |
//! | standing by | one watch, and one read in those 7 s: 9 a minute |
//! | the leader was killed | its lease ends 12 s after it was renewed; whoever notices waits 0.1 to 1 s and takes it |
//! | the leader has stopped | it gives the lease back, the watch tells: at once |
//! | the leader cannot renew | it ends itself before the lease does, 3 s after the first try |

use crate::names::MANAGER;
use futures::{Stream, StreamExt, future};
use k8s_openapi::api::coordination::v1::Lease;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Config};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder, LeaseManagerError, LeaseParams};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// A lease that was not renewed for so long is free. Together with the second that others wait it stays below 15 s.
const DURATION_SECONDS: u64 = 12;
/// It is renewed so long before its end.
const GRACE_SECONDS: u64 = 5;
/// For an answer to one of the lease's calls: one that hangs must not outlast the lease.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// To connect for them.
const CONNECT_WAIT: Duration = Duration::from_secs(1);
/// Renewing is given up once it has failed for so long. First failure after [`ANSWER_WAIT`], two more tries: over
/// before [`GRACE_SECONDS`] are.
const GIVE_UP: Duration = Duration::from_secs(2);
/// Between tries to renew.
const RENEW_PAUSE: Duration = Duration::from_millis(300);
/// Between tries of who stands by, when the API server does not answer.
const STANDBY_PAUSE: Duration = Duration::from_secs(2);
/// To give the lease back, at the end.
const RELEASE_WAIT: Duration = Duration::from_secs(1);

/// Why a leader is one no longer.
#[derive(thiserror::Error, Debug)]
pub enum Lost {
    /// Its lease has another holder.
    #[error("somebody else holds the lease")]
    Taken,
    /// The API server was not told in time that it still leads.
    #[error("the lease could not be renewed: {0}")]
    NotRenewed(#[source] LeaseManagerError),
}

/// One Lease, and who this is.
pub struct Election {
    calls: Client,
    watched: Api<Lease>,
    namespace: String,
    name: String,
    identity: String,
}

/// The right to act, until it is lost or given back.
pub struct Leadership {
    lease: LeaseManager,
}

impl Election {
    /// Of the operators that name the same Lease. `client` watches it; renewing has a client of its own.
    ///
    /// # Errors
    /// When a client cannot be made of the configuration.
    pub fn new(
        client: Client,
        mut config: Config,
        namespace: &str,
        name: &str,
        identity: String,
    ) -> Result<Self, kube::Error> {
        config.connect_timeout = Some(CONNECT_WAIT);
        config.read_timeout = Some(ANSWER_WAIT);
        Ok(Self {
            calls: Client::try_from(config)?,
            watched: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            identity,
        })
    }

    /// Waits until this process leads, through any failure of the API server.
    ///
    /// # Errors
    /// When the Lease can be neither read nor created at the start.
    pub async fn win(&self) -> Result<Leadership, LeaseManagerError> {
        let mut lease = self.join().await?;
        tracing::info!(lease = self.name, identity = self.identity, "stands by");
        let mut releases = std::pin::pin!(self.releases());
        loop {
            tokio::select! {
                biased;
                changed = lease.changed() => match changed {
                    Ok(true) => break,
                    Ok(false) => continue,
                    Err(error) => {
                        tracing::warn!(%error, lease = self.name, "the lease cannot be read");
                        sleep(STANDBY_PAUSE).await;
                    }
                },
                // The manager would sleep until the old end of the lease. A new one reads it anew.
                Some(()) = releases.next() => {
                    match self.join().await {
                        Ok(fresh) => lease = fresh,
                        Err(error) => tracing::warn!(%error, lease = self.name, "the lease cannot be read"),
                    }
                }
            }
        }
        tracing::info!(lease = self.name, identity = self.identity, "leads");
        Ok(Leadership { lease })
    }

    async fn join(&self) -> Result<LeaseManager, LeaseManagerError> {
        LeaseManagerBuilder::new(self.calls.clone(), &self.name)
            .with_namespace(&self.namespace)
            .with_parameters(LeaseParams::new(&self.identity, DURATION_SECONDS, GRACE_SECONDS))
            .build()
            .await
    }

    /// Each time that the lease is seen without a holder: at first sight too, since it may have been given back between
    /// the manager's read and the start of the watch.
    fn releases(&self) -> impl Stream<Item = ()> {
        let is_held = |lease: &Lease| lease.spec.as_ref().is_some_and(|spec| spec.holder_identity.is_some());
        watcher::watch_object(self.watched.clone(), &self.name).default_backoff().filter_map(move |seen| {
            future::ready(seen.ok().filter(|lease| !lease.as_ref().is_some_and(is_held)).map(drop))
        })
    }
}

impl Leadership {
    /// Renews the lease, until that does not work any more.
    pub async fn lost(&self) -> Lost {
        let mut failing: Option<(Instant, Instant)> = None;
        loop {
            match self.lease.changed().await {
                Ok(true) => {}
                Ok(false) => return Lost::Taken,
                Err(error) => {
                    let now = Instant::now();
                    // What works is not told: a pause is how it is noticed.
                    let is_new = |last: Instant| now - last > GIVE_UP + ANSWER_WAIT;
                    let since = failing.filter(|(_, last)| !is_new(*last)).map_or(now, |(since, _)| since);
                    failing = Some((since, now));
                    if now - since >= GIVE_UP {
                        return Lost::NotRenewed(error);
                    }
                    tracing::warn!(%error, "the lease is not renewed yet");
                    sleep(RENEW_PAUSE).await;
                }
            }
        }
    }

    /// Gives the lease back, so that another operator leads at once.
    pub async fn release(self) {
        match timeout(RELEASE_WAIT, self.lease.release()).await {
            Ok(Ok(())) => tracing::info!("the lease is given back"),
            Ok(Err(error)) => tracing::warn!(%error, "the lease is not given back; it ends by itself"),
            Err(_) => tracing::warn!("the lease is not given back in time; it ends by itself"),
        }
    }
}

/// Who this process is among the operators: its pod, or its machine and number.
pub fn identity() -> String {
    std::env::var("POD_NAME").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| {
        let host = hostname::get().unwrap_or_else(|_| MANAGER.into());
        format!("{}-{}", host.to_string_lossy(), std::process::id())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Method, Request, Response};
    use jiff::Timestamp;
    use kube::client::Body;
    use serde_json::{Value, json};
    use std::sync::Mutex;

    /// A Lease whose holder gives it back after it was read by name and before it is listed for the watch.
    struct GivenBackInBetween(Mutex<Value>);

    impl GivenBackInBetween {
        fn new() -> Self {
            Self(Mutex::new(json!({
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": "lease", "namespace": "n", "resourceVersion": "1"},
                "spec": {"holderIdentity": "other", "renewTime": Timestamp::now().to_string(), "leaseDurationSeconds": 600},
            })))
        }

        async fn answer(&self, request: Request<Body>) -> Result<Response<Body>, std::io::Error> {
            let (call, body) = request.into_parts();
            let query = call.uri.query().unwrap_or_default();
            if query.contains("watch=true") {
                return future::pending().await;
            }
            let change = body.collect_bytes().await.map_err(std::io::Error::other)?;
            let mut lease = self.0.lock().unwrap();
            let answer = match call.method {
                Method::GET if call.uri.path().ends_with("/lease") => lease.clone(),
                Method::GET => {
                    lease["spec"] = json!({"leaseTransitions": 1});
                    let metadata = json!({"resourceVersion": "2"});
                    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "LeaseList", "metadata": metadata, "items": [*lease]})
                }
                Method::PATCH => {
                    let change: Value = serde_json::from_slice(&change)?;
                    for (field, value) in change["spec"].as_object().into_iter().flatten() {
                        lease["spec"][field] = value.clone();
                    }
                    lease.clone()
                }
                other => panic!("{other} {}", call.uri),
            };
            Ok(Response::new(answer.to_string().into_bytes().into()))
        }
    }

    #[tokio::test]
    async fn a_lease_given_back_before_the_watch_begins_is_taken_at_once() {
        let server: &'static GivenBackInBetween = Box::leak(Box::new(GivenBackInBetween::new()));
        let client = Client::new(tower::service_fn(|request| server.answer(request)), "n");
        let election = Election {
            calls: client.clone(),
            watched: Api::namespaced(client, "n"),
            namespace: "n".to_owned(),
            name: "lease".to_owned(),
            identity: "one".to_owned(),
        };
        let won = timeout(Duration::from_secs(10), election.win()).await;
        won.expect("it waited for the old end of the lease").unwrap();
        assert_eq!(server.0.lock().unwrap()["spec"]["holderIdentity"], "one");
    }
}

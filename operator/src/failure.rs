//! Why an attempt ended, and what follows from it.

use crate::observed::{condition, is_out_of_reach, is_true, termination};
use growth_crds::protocol::{Outcome, contract};
use growth_crds::spec::policy::{FailureAction, FailurePolicy, FailureRule};
use growth_crds::status::FailureStatus;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

/// First wait after a failure that counts.
const FIRST_BACK_OFF_SECONDS: i64 = 10;
/// Longest wait.
const LAST_BACK_OFF_SECONDS: i64 = 300;

/// What ended an attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// What happens next.
    pub verdict: Verdict,
    /// For the status: one word, one sentence, where.
    pub status: FailureStatus,
}

/// What follows from a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// A new attempt, at once, at no cost, and nothing went wrong.
    Planned,
    /// A new attempt, at once, at no cost: nobody's fault.
    Free,
    /// A new attempt that counts towards maxRestarts.
    Counted,
    /// The job fails: its input is at fault.
    BadInput,
    /// The job fails: the rule of this name says so.
    Rule(String),
}

impl Failure {
    /// As it was meant to be.
    pub fn planned(reason: &str, message: &str, now: Timestamp) -> Self {
        Self { verdict: Verdict::Planned, status: status(reason, message, now) }
    }

    /// Nobody's fault.
    pub fn free(reason: &str, message: &str, now: Timestamp) -> Self {
        Self { verdict: Verdict::Free, status: status(reason, message, now) }
    }

    /// The attempt's fault.
    pub fn counted(reason: &str, message: &str, now: Timestamp) -> Self {
        Self { verdict: Verdict::Counted, status: status(reason, message, now) }
    }
}

fn status(reason: &str, message: &str, now: Timestamp) -> FailureStatus {
    FailureStatus {
        reason: reason.to_owned(),
        message: (!message.is_empty()).then(|| message.to_owned()),
        time: Some(Time(now)),
        ..FailureStatus::default()
    }
}

/// Judges a failed attempt by its pods. A disruption of any pod explains the end of the others; else the pod that ended
/// first is the one to blame. The Job remembers a disruption even when the pod is gone.
pub fn judge(job: &Job, pods: &[&Pod], policy: &FailurePolicy, now: Timestamp) -> Failure {
    if let Some(failure) = lost(pods, now) {
        return failure;
    }
    if let Some(message) = disruption_of(job) {
        return Failure::free("DisruptionTarget", message, now);
    }
    let ended =
        |pod: &&&Pod| termination(pod).is_some_and(|(code, _, _)| code != 0) || reason_of(pod).is_some();
    let Some(pod) = pods.iter().filter(ended).min_by_key(|pod| ended_at(pod)) else {
        return Failure::counted(
            "PodsLost",
            "the attempt failed and none of its pods is left to tell why",
            now,
        );
    };
    let (code, reason, message) = termination(pod).unwrap_or_default();
    let reason = reason_of(pod).unwrap_or(reason);
    let outcome = Outcome::parse(message);
    let said = outcome.and_then(|outcome| outcome.message).unwrap_or_else(|| message.trim().to_owned());
    let rule = policy.rules.iter().find(|rule| rule_matches(rule, code, reason));
    let verdict = match rule {
        Some(FailureRule { action: FailureAction::FailJob, name, .. }) => Verdict::Rule(name.clone()),
        Some(FailureRule { action: FailureAction::RestartStage, .. }) => Verdict::Counted,
        Some(FailureRule { action: FailureAction::RestartStageAndIgnoreMaxRestarts, .. }) => Verdict::Free,
        // The kubelet evicts for its node's sake.
        None if reason == "Evicted" => Verdict::Free,
        None if code == i32::from(contract::EXIT_BAD_INPUT) => Verdict::BadInput,
        None => Verdict::Counted,
    };
    let reason = if reason.is_empty() { "Error" } else { reason };
    located(Failure { verdict, status: status(reason, &said, now) }, pod, Some(code))
}

/// An attempt that has lost a pod to a disruption, or to a node that does not answer, is over: its gang is.
pub fn lost(pods: &[&Pod], now: Timestamp) -> Option<Failure> {
    if let Some(pod) = pods.iter().find(|pod| is_true(pod, "DisruptionTarget")) {
        let (_, reason, message) = condition(pod, "DisruptionTarget").unwrap_or_default();
        return Some(located(Failure::free(reason, message, now), pod, None));
    }
    let pod = pods.iter().find(|pod| is_out_of_reach(pod, now))?;
    Some(located(Failure::free("NodeUnreachable", "its node does not answer", now), pod, None))
}

/// The one rule of the Job's pod failure policy is about disruptions.
fn disruption_of(job: &Job) -> Option<&str> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    let matched =
        conditions.iter().find(|condition| condition.reason.as_deref() == Some("PodFailurePolicy"))?;
    Some(matched.message.as_deref().unwrap_or_default())
}

fn rule_matches(rule: &FailureRule, code: i32, reason: &str) -> bool {
    let by_code = rule.on_exit_codes.as_ref().is_some_and(|codes| codes.contains(&code));
    by_code || rule.on_reasons.as_ref().is_some_and(|reasons| reasons.iter().any(|one| one == reason))
}

/// A reason of the whole pod, such as Evicted.
fn reason_of(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.reason.as_deref()
}

fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let ended = crate::observed::trainer_status(pod)?.state.as_ref()?.terminated.as_ref()?;
    ended.finished_at.as_ref().map(|time| time.0)
}

fn located(mut failure: Failure, pod: &Pod, code: Option<i32>) -> Failure {
    failure.status.node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    failure.status.exit_code = code;
    let message = failure.status.message.take().unwrap_or_default();
    failure.status.message =
        Some(format!("pod {}: {message}", pod.name_any()).trim_end_matches(": ").to_owned());
    failure
}

/// Seconds to wait before the attempt that follows the `restarts`-th counted failure.
pub fn back_off_seconds(restarts: i32) -> i64 {
    let doublings = u32::try_from(restarts.saturating_sub(1)).unwrap_or(0).min(16);
    (FIRST_BACK_OFF_SECONDS << doublings).min(LAST_BACK_OFF_SECONDS)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn pod(name: &str, status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name}, "spec": {"nodeName": "n1", "containers": []}, "status": status,
        }))
        .unwrap()
    }

    fn ended(code: i32, reason: &str, message: &str, second: u32) -> Value {
        let state = json!({"terminated": {
            "exitCode": code, "reason": reason, "message": message,
            "finishedAt": format!("2026-01-01T00:00:{second:02}Z"),
        }});
        json!({"containerStatuses": [{
            "name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
        }]})
    }

    fn judged(pods: &[Pod], policy: &FailurePolicy) -> Failure {
        judge(&Job::default(), &pods.iter().collect::<Vec<_>>(), policy, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn the_job_remembers_a_disruption_whose_pod_is_gone() {
        let job = |reason: &str| -> Job {
            let condition = json!({"type": "Failed", "status": "True", "reason": reason, "message": "pod p"});
            serde_json::from_value(json!({"metadata": {}, "status": {"conditions": [condition]}})).unwrap()
        };
        let policy = FailurePolicy::default();
        let verdict = |reason| judge(&job(reason), &[], &policy, Timestamp::UNIX_EPOCH).verdict;
        assert_eq!(verdict("PodFailurePolicy"), Verdict::Free);
        assert_eq!(verdict("BackoffLimitExceeded"), Verdict::Counted);
    }

    #[test]
    fn causes_are_told_apart() {
        let policy = FailurePolicy::default();
        let disrupted = json!({"conditions": [{
            "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained",
        }]});
        let cases = [
            (vec![ended(1, "Error", "boom", 1)], Verdict::Counted, "Error"),
            (vec![ended(137, "OOMKilled", "", 1)], Verdict::Counted, "OOMKilled"),
            (vec![ended(2, "Error", "spec.data: no", 1)], Verdict::BadInput, "Error"),
            (vec![json!({"reason": "Evicted"})], Verdict::Free, "Evicted"),
            // The rank that was disrupted explains those that lost their peer.
            (vec![ended(1, "Error", "peer lost", 1), disrupted], Verdict::Free, "EvictionByEvictionAPI"),
            // The first to end is to blame.
            (vec![ended(143, "Error", "", 9), ended(137, "OOMKilled", "", 3)], Verdict::Counted, "OOMKilled"),
            (vec![], Verdict::Counted, "PodsLost"),
        ];
        for (statuses, verdict, reason) in cases {
            let pods: Vec<Pod> = statuses.iter().map(|status| pod("p", status.clone())).collect();
            let failure = judged(&pods, &policy);
            assert_eq!((failure.verdict, failure.status.reason.as_str()), (verdict, reason), "{statuses:?}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rules = json!([
            {"name": "oom", "action": "FailJob", "onReasons": ["OOMKilled"]},
            {"name": "flaky", "action": "RestartStageAndIgnoreMaxRestarts", "onExitCodes": [42]},
            {"name": "input", "action": "RestartStage", "onExitCodes": [2]},
        ]);
        let policy: FailurePolicy = serde_json::from_value(json!({"rules": rules})).unwrap();
        let verdict = |code, reason| judged(&[pod("p", ended(code, reason, "", 1))], &policy).verdict;
        assert_eq!(verdict(137, "OOMKilled"), Verdict::Rule("oom".into()));
        assert_eq!(verdict(42, "Error"), Verdict::Free);
        assert_eq!(verdict(2, "Error"), Verdict::Counted);
        assert_eq!(verdict(1, "Error"), Verdict::Counted);
    }

    #[test]
    fn the_trainers_own_words_are_kept() {
        let message = serde_json::to_string(&Outcome::failed("spec.model: too wide")).unwrap();
        let failure = judged(&[pod("p-0", ended(2, "Error", &message, 1))], &FailurePolicy::default());
        assert_eq!(failure.status.message.as_deref(), Some("pod p-0: spec.model: too wide"));
        assert_eq!((failure.status.node.as_deref(), failure.status.exit_code), (Some("n1"), Some(2)));
    }

    #[test]
    fn the_wait_doubles_and_has_an_end() {
        assert_eq!([1, 2, 3, 6, 1000].map(back_off_seconds), [10, 20, 40, 300, 300]);
    }
}

//! Why an attempt ended, and what follows from it.

use crate::observed::{condition, has_ended, is_out_of_reach, is_true, size, termination, trainer_status};
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

/// Reason of a failure that only says that another pod has ended.
pub const PEER_LOST: &str = "PeerLost";

/// Exit codes of what SIGTERM or SIGKILL has ended.
const KILLED: [i32; 2] = [143, 137];

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
/// first for a reason of its own is the one to blame. The Job remembers a disruption even when the pod is gone.
///
/// None: all that have ended were the victims of one that has not told its end yet.
pub fn judge(job: &Job, pods: &[&Pod], policy: &FailurePolicy, now: Timestamp) -> Option<Failure> {
    if let Some(failure) = lost(pods, now) {
        return Some(failure);
    }
    if let Some(message) = disruption_of(job) {
        return Some(Failure::free("DisruptionTarget", message, now));
    }
    let is_failed =
        |pod: &&Pod| termination(pod).is_some_and(|(code, _, _)| code != 0) || reason_of(pod).is_some();
    let mut failed: Vec<&Pod> = pods.iter().copied().filter(is_failed).collect();
    failed.sort_by_key(|pod| ended_at(pod));
    if let Some(pod) = failed.iter().find(|pod| !is_victim(pod, &failed)) {
        return Some(blame(pod, policy, now));
    }
    if !pods.iter().all(|pod| has_ended(pod)) {
        return None;
    }
    let Some(first) = failed.first() else {
        let message = "the attempt failed and none of its pods is left to tell why";
        return Some(Failure::counted("PodsLost", message, now));
    };
    let all = size(job).and_then(|size| usize::try_from(size).ok()).unwrap_or(pods.len());
    if pods.len() < all {
        let failure = Failure::free(PEER_LOST, "it lost a pod that is gone", now);
        return Some(located(failure, first, None));
    }
    Some(blame(first, policy, now))
}

/// Its end says only that another pod had ended, or that the Job was being ended for that reason.
fn is_victim(pod: &Pod, failed: &[&Pod]) -> bool {
    let Some((code, reason, _)) = termination(pod) else { return false };
    if code == i32::from(contract::EXIT_PEER_LOST) {
        return true;
    }
    let others = failed.iter().filter(|other| other.metadata.name != pod.metadata.name);
    let first = others.filter_map(|other| ended_at(other)).min();
    let was_told = match (deleted_at(pod), first) {
        (Some(deleted), Some(first)) => deleted >= first,
        _ => false,
    };
    was_told && KILLED.contains(&code) && reason != "OOMKilled"
}

/// When somebody asked it to end; its metadata say when the time that it was given is over.
fn deleted_at(pod: &Pod) -> Option<Timestamp> {
    let end = pod.metadata.deletion_timestamp.as_ref()?.0;
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    Some(end - jiff::SignedDuration::from_secs(grace))
}

fn blame(pod: &Pod, policy: &FailurePolicy, now: Timestamp) -> Failure {
    let (code, reason, message) = termination(pod).unwrap_or_default();
    let reason = match reason_of(pod) {
        Some(reason) => reason,
        None if code == i32::from(contract::EXIT_PEER_LOST) => PEER_LOST,
        None => reason,
    };
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
    let pod = pods.iter().find(|pod| !has_ended(pod) && is_out_of_reach(pod, now))?;
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
    let ended = trainer_status(pod)?.state.as_ref()?.terminated.as_ref()?;
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
        judge(&Job::default(), &pods.iter().collect::<Vec<_>>(), policy, Timestamp::UNIX_EPOCH).unwrap()
    }

    #[test]
    fn the_job_remembers_a_disruption_whose_pod_is_gone() {
        let job = |reason: &str| -> Job {
            let condition = json!({"type": "Failed", "status": "True", "reason": reason, "message": "pod p"});
            serde_json::from_value(json!({"metadata": {}, "status": {"conditions": [condition]}})).unwrap()
        };
        let policy = FailurePolicy::default();
        let verdict = |reason| judge(&job(reason), &[], &policy, Timestamp::UNIX_EPOCH).unwrap().verdict;
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
            let pods = gang(statuses.clone());
            let failure = judged(&pods, &policy);
            assert_eq!((failure.verdict, failure.status.reason.as_str()), (verdict, reason), "{statuses:?}");
        }
    }

    /// Pods of an attempt, by rank.
    fn gang(statuses: Vec<Value>) -> Vec<Pod> {
        let named = |(rank, mut status): (usize, Value)| {
            let has_ended = status["containerStatuses"].is_array();
            if has_ended {
                status["phase"] = json!("Failed");
            }
            pod(&format!("p-{rank}"), status)
        };
        statuses.into_iter().enumerate().map(named).collect()
    }

    fn deleted(mut pod: Pod, second: u32, grace: i64) -> Pod {
        let at: Timestamp = format!("2026-01-01T00:00:{second:02}Z").parse().unwrap();
        pod.metadata.deletion_timestamp = Some(Time(at + jiff::SignedDuration::from_secs(grace)));
        pod.metadata.deletion_grace_period_seconds = Some(grace);
        pod
    }

    fn of_four(pods: &[Pod]) -> Option<Failure> {
        let job: Job = serde_json::from_value(json!({"metadata": {}, "spec": {
            "completions": 4, "template": {"spec": {"containers": []}},
        }}))
        .unwrap();
        let policy = FailurePolicy::default();
        judge(&job, &pods.iter().collect::<Vec<_>>(), &policy, "2026-01-01T00:01:00Z".parse().unwrap())
    }

    fn verdict(pods: &[Pod]) -> (Verdict, String) {
        let failure = of_four(pods).unwrap();
        (failure.verdict, failure.status.reason)
    }

    #[test]
    fn a_pod_that_lost_a_peer_is_not_to_blame() {
        let lost = |second| ended(3, "Error", "rank 2 is lost", second);
        // The kubelet of the one to blame was slower than theirs.
        let pods = gang(vec![lost(1), lost(2), ended(137, "OOMKilled", "", 3), lost(2)]);
        assert_eq!(verdict(&pods), (Verdict::Counted, "OOMKilled".into()));
        let pods = gang(vec![lost(1), lost(2), ended(2, "Error", "bad shard", 9), lost(2)]);
        assert_eq!(verdict(&pods), (Verdict::BadInput, "Error".into()));
    }

    #[test]
    fn nobody_is_to_blame_until_all_have_told_their_end() {
        let lost = |second| ended(3, "Error", "rank 2 is lost", second);
        let pods = gang(vec![lost(1), lost(2), json!({"phase": "Running"}), lost(2)]);
        assert_eq!(of_four(&pods), None);
        // It will not tell any more.
        let pods = gang(vec![lost(1), lost(2), lost(2)]);
        assert_eq!(verdict(&pods), (Verdict::Free, PEER_LOST.into()));
        // Its node does not answer, or its deletion is overdue.
        let pods = gang(vec![lost(1), lost(2), json!({"phase": "Running"}), lost(2)]);
        let mut pods: Vec<Pod> = pods;
        pods[2] = deleted(pods[2].clone(), 0, 30);
        assert_eq!(verdict(&pods), (Verdict::Free, "NodeUnreachable".into()));
        // All are there, and all blame another: something is wrong between them.
        let pods = gang(vec![lost(1), lost(2), lost(3), lost(2)]);
        assert_eq!(verdict(&pods), (Verdict::Counted, PEER_LOST.into()));
    }

    /// The Job controller ends what is left of a gang.
    #[test]
    fn a_pod_that_was_ended_for_the_failure_of_another_is_not_to_blame() {
        let lost = |second| ended(3, "Error", "rank 2 is lost", second);
        for code in KILLED {
            // Rank 1 is deleted at second 3, after the first failure, and its clock is behind.
            let mut pods =
                gang(vec![ended(1, "Error", "boom", 2), ended(code, "Error", "", 2), lost(3), lost(3)]);
            pods[1] = deleted(pods[1].clone(), 3, 30);
            let failure = of_four(&pods).unwrap();
            assert_eq!(failure.status.message.as_deref(), Some("pod p-0: boom"));

            // None is left who could have been the first.
            let mut pods = gang(vec![lost(2), ended(code, "Error", "", 9), lost(3), lost(3)]);
            pods[1] = deleted(pods[1].clone(), 3, 30);
            assert_eq!(verdict(&pods), (Verdict::Counted, PEER_LOST.into()));

            // Deleted by hand: that was the first end of all.
            let mut pods = gang(vec![lost(9), ended(code, "Error", "", 8), lost(9), lost(9)]);
            pods[1] = deleted(pods[1].clone(), 3, 30);
            assert_eq!(verdict(&pods), (Verdict::Counted, "Error".into()));
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

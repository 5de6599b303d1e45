//! How many pods a stage trains on: what is wanted, what there are nodes for, and when an attempt ends so that the next one
//! has another size.
//!
//! The size of an attempt is fixed; its Job says it. What must outlast an attempt is in the status: condition `Scaling`
//! tells since when a larger size is wanted, the stage's `capacity` what there was room for, and when.

use crate::draft::Draft;
use crate::failure::Failure;
use crate::names::Work;
use crate::observed::{has_ended, is_true, unreachable_since};
use growth_crds::GrowthTrainingJob;
use growth_crds::conditions::{ConditionType, Reason};
use growth_crds::plan::JobPlan;
use growth_crds::plan::ranks::{largest_size, stage_sizes, wanted_size};
use growth_crds::spec::stage::ElasticSpec;
use growth_crds::status::CapacityStatus;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use std::cmp::Ordering;

/// Where the stage does not say otherwise.
const SCALE_UP_DELAY_SECONDS: i32 = 300;
/// Where the stage does not say otherwise.
const CAPACITY_TIMEOUT_SECONDS: i32 = 60;
/// A size for which there were no nodes costs the pods a restart each time it is tried.
const LEAST_RETRY_SECONDS: i32 = 600;

/// Sizes that a stage may have, smallest first.
fn sizes(job: &GrowthTrainingJob, plan: &JobPlan, index: usize) -> Vec<i32> {
    plan.stages.get(index).map_or_else(Vec::new, |plan| stage_sizes(&job.spec.stages[index], &plan.training))
}

/// The size that a stage should have.
fn wanted_of(job: &GrowthTrainingJob, plan: &JobPlan, index: usize) -> i32 {
    wanted_size(&sizes(job, plan, index), job.spec.replicas)
}

/// What there was room for, if what was wanted then is wanted now.
fn shortage_of<'d>(draft: &'d Draft<'_>, index: usize, wanted: i32) -> Option<&'d CapacityStatus> {
    let capacity = draft.status.stages.get(index)?.capacity.as_ref()?;
    (capacity.desired_replicas == wanted).then_some(capacity)
}

fn scale_up_delay(elastic: &ElasticSpec) -> i64 {
    i64::from(elastic.scale_up_delay_seconds.unwrap_or(SCALE_UP_DELAY_SECONDS))
}

fn retry_delay(elastic: &ElasticSpec) -> i64 {
    scale_up_delay(elastic).max(i64::from(LEAST_RETRY_SECONDS))
}

/// The size of the attempt that is about to start.
pub(super) fn next_size(draft: &mut Draft<'_>, plan: &JobPlan, work: Work) -> i32 {
    let Work::Train(index) = work else { return 1 };
    let wanted = wanted_of(draft.job, plan, index);
    let size = room(draft, plan, index, wanted).unwrap_or(wanted);
    draft.stage_mut(index).desired_replicas = Some(wanted);
    settle(draft, format!("the next attempt has {size} replicas"));
    size
}

/// The largest size for which there were nodes, when that was not long ago.
fn room(draft: &Draft<'_>, plan: &JobPlan, index: usize, wanted: i32) -> Option<i32> {
    let elastic = draft.job.spec.stages[index].elastic.as_ref()?;
    let capacity = shortage_of(draft, index, wanted)?;
    let is_old = draft.now.as_second() >= capacity.time.0.as_second() + retry_delay(elastic);
    let room = largest_size(&sizes(draft.job, plan, index), capacity.replicas)?;
    (!is_old).then_some(room)
}

fn settle(draft: &mut Draft<'_>, message: String) {
    if draft.is_true(ConditionType::Scaling) {
        draft.set(ConditionType::Scaling, Reason::ScaleSettled, message);
    }
}

/// An attempt at an elastic stage, as far as its size is concerned.
pub(super) struct Gang<'a> {
    /// Its stage.
    pub index: usize,
    /// Pods that its Job has.
    pub size: i32,
    /// Pods that were seen.
    pub pods: &'a [&'a Pod],
    /// All were ready.
    pub is_ready: bool,
}

/// Why the attempt should end so that the next one has another size, if it should.
pub(super) fn resize(draft: &mut Draft<'_>, plan: &JobPlan, gang: &Gang<'_>) -> Option<Failure> {
    let Gang { index, size, pods, is_ready } = *gang;
    let wanted = wanted_of(draft.job, plan, index);
    draft.stage_mut(index).desired_replicas = Some(wanted);
    let elastic = draft.job.spec.stages[index].elastic.as_ref()?;
    if pods.iter().any(|pod| has_ended(pod)) {
        // It ends anyway.
        return None;
    }
    if wanted < size {
        return Some(shrink(draft, size, wanted));
    }
    if !is_ready && let Some(failure) = go_on_with_fewer(draft, plan, gang, elastic, wanted) {
        return Some(failure);
    }
    match wanted.cmp(&size) {
        Ordering::Greater => grow(draft, gang, elastic, wanted),
        _ => {
            settle(draft, format!("{size} replicas are wanted"));
            if is_ready {
                has_full_size(draft, index, size);
            }
            None
        }
    }
}

fn resized(draft: &Draft<'_>, size: i32, wanted: i32) -> Failure {
    Failure::planned("Resized", &format!("from {size} to {wanted} replicas"), draft.now)
}

fn shrink(draft: &mut Draft<'_>, size: i32, wanted: i32) -> Failure {
    let message = format!("from {size} to {wanted} replicas");
    draft.set(ConditionType::Scaling, Reason::ScaleDownRequested, message);
    resized(draft, size, wanted)
}

/// A larger size is wanted: not at once, for a restart costs something and what is wanted may change again.
fn grow(draft: &mut Draft<'_>, gang: &Gang<'_>, elastic: &ElasticSpec, wanted: i32) -> Option<Failure> {
    let Gang { index, size, is_ready, .. } = *gang;
    let shortage = shortage_of(draft, index, wanted).map(|capacity| capacity.time.0);
    let due = match shortage {
        Some(time) => {
            settle(draft, format!("there were no nodes for {wanted} replicas"));
            let ready = draft.attempt(Work::Train(index)).and_then(|attempt| attempt.ready_time.as_ref());
            let since = ready.map_or(time, |ready| ready.0.max(time));
            since.as_second() + retry_delay(elastic)
        }
        None => since_wanted(draft, size, wanted, scale_up_delay(elastic)) + scale_up_delay(elastic),
    };
    let left = due - draft.now.as_second();
    if left > 0 {
        draft.requeue_after(left);
    }
    if left > 0 || !is_ready {
        return None;
    }
    let message = format!("from {size} to {wanted} replicas");
    draft.set(ConditionType::Scaling, Reason::ScaleUpRequested, message);
    Some(resized(draft, size, wanted))
}

/// Since when a larger size than there is has been wanted.
fn since_wanted(draft: &mut Draft<'_>, size: i32, wanted: i32, delay: i64) -> i64 {
    let message = format!("from {size} to {wanted} replicas, {delay} s after more than {size} are wanted");
    if !draft.is_true(ConditionType::Scaling) {
        draft.event(false, "ScaleUpRequested", message.clone(), None);
    }
    draft.set(ConditionType::Scaling, Reason::ScaleUpRequested, message);
    let since = draft.condition(ConditionType::Scaling).map(|condition| condition.last_transition_time.0);
    since.unwrap_or(draft.now).as_second()
}

/// The wanted size runs.
fn has_full_size(draft: &mut Draft<'_>, index: usize, size: i32) {
    draft.stage_mut(index).capacity = None;
    if draft.is_true(ConditionType::Degraded) {
        let message = format!("all {size} replicas train");
        draft.set(ConditionType::Degraded, Reason::FullSize, message.clone());
        draft.event(false, "FullSize", message, None);
    }
}

/// Some pods have had no node for too long. The next attempt has as many as had one, if a stage may be so small.
fn go_on_with_fewer(
    draft: &mut Draft<'_>,
    plan: &JobPlan,
    gang: &Gang<'_>,
    elastic: &ElasticSpec,
    wanted: i32,
) -> Option<Failure> {
    let (since, why) = unscheduled(gang.pods)?;
    let has_node = |pod: &&&Pod| is_true(pod, "PodScheduled") && unreachable_since(pod).is_none();
    let placed = i32::try_from(gang.pods.iter().filter(has_node).count()).unwrap_or(i32::MAX);
    let room = largest_size(&sizes(draft.job, plan, gang.index), placed.min(gang.size - 1))?;
    let timeout = i64::from(elastic.capacity_timeout_seconds.unwrap_or(CAPACITY_TIMEOUT_SECONDS));
    let left = since.as_second() + timeout - draft.now.as_second();
    if left > 0 {
        draft.requeue_after(left);
        return None;
    }
    draft.stage_mut(gang.index).capacity =
        Some(CapacityStatus { replicas: placed, desired_replicas: wanted, time: Time(draft.now) });
    let message = format!("goes on with {room} of {wanted} replicas: {why}");
    draft.set(ConditionType::Degraded, Reason::InsufficientCapacity, message.clone());
    draft.event(true, "Degraded", message, None);
    let message = format!("{placed} of {} pods have a node: {why}", gang.size);
    Some(Failure::planned("InsufficientCapacity", &message, draft.now))
}

/// Since when the scheduler has found no node for one of the pods, and its words.
fn unscheduled(pods: &[&Pod]) -> Option<(Timestamp, String)> {
    // A pod that a gate holds back has another reason.
    let is_refused = |one: &&PodCondition| {
        one.type_ == "PodScheduled" && one.status == "False" && one.reason.as_deref() == Some("Unschedulable")
    };
    let refused = pods.iter().filter_map(|pod| {
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let found = conditions.iter().find(is_refused)?;
        let words = found.message.as_deref().unwrap_or_default();
        Some((found.last_transition_time.as_ref()?.0, format!("pod {}: {words}", pod.name_any())))
    });
    refused.min()
}

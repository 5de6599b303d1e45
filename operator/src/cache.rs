//! What is known of the children of each job. A reflector's store would have to be searched from end to end for every
//! reconcile; here a job finds its own.

use crate::names::LABEL_JOB;
use growth_crds::GrowthTrainingJob;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use tokio::sync::SetOnce;

/// ChildCache by name, of each job.
type Families<K> = HashMap<ObjectRef<GrowthTrainingJob>, BTreeMap<String, Arc<K>>>;

/// ChildCache of one kind, kept by the events of a watch.
#[derive(Debug)]
pub struct ChildCache<K> {
    known: RwLock<Families<K>>,
    /// What a listing that is not complete yet has brought.
    listed: RwLock<Families<K>>,
    is_known: SetOnce<()>,
}

impl<K> Default for ChildCache<K> {
    fn default() -> Self {
        Self { known: RwLock::default(), listed: RwLock::default(), is_known: SetOnce::new() }
    }
}

/// What a child belongs to, by its label. The uid is checked when it is observed.
pub fn owner_of<K: Resource>(child: &K) -> Option<ObjectRef<GrowthTrainingJob>> {
    let name = child.labels().get(LABEL_JOB)?;
    Some(ObjectRef::new(name).within(&child.namespace()?))
}

impl<K: Resource + Clone> ChildCache<K> {
    /// Takes note of an event.
    pub fn apply(&self, event: &Event<K>) {
        match event {
            Event::Apply(child) => insert(&mut write(&self.known), child),
            Event::Delete(child) => remove(&mut write(&self.known), child),
            Event::Init => *write(&self.listed) = Families::default(),
            Event::InitApply(child) => insert(&mut write(&self.listed), child),
            // What was not listed is gone.
            Event::InitDone => {
                *write(&self.known) = std::mem::take(&mut *write(&self.listed));
                // Again after the watch was interrupted.
                let _ = self.is_known.set(());
            }
        }
    }

    /// Waits until all were listed once. Before, a child that is not known may well be there.
    pub async fn wait_until_known(&self) {
        self.is_known.wait().await;
    }

    /// The children of a job.
    pub fn of(&self, job: &GrowthTrainingJob) -> Vec<Arc<K>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&ObjectRef::from_obj(job)).into_iter().flat_map(BTreeMap::values).cloned().collect()
    }
}

fn write<K>(families: &RwLock<Families<K>>) -> RwLockWriteGuard<'_, Families<K>> {
    families.write().unwrap_or_else(PoisonError::into_inner)
}

fn insert<K: Resource + Clone>(families: &mut Families<K>, child: &K) {
    if let Some(owner) = owner_of(child) {
        families.entry(owner).or_default().insert(child.name_any(), Arc::new(child.clone()));
    }
}

fn remove<K: Resource>(families: &mut Families<K>, child: &K) {
    let Some(owner) = owner_of(child) else { return };
    let Some(family) = families.get_mut(&owner) else { return };
    family.remove(&child.name_any());
    if family.is_empty() {
        families.remove(&owner);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures::FutureExt;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    fn pod(namespace: &str, job: &str, name: &str) -> Pod {
        let labels = json!({LABEL_JOB: job});
        let metadata = json!({"namespace": namespace, "name": name, "labels": labels});
        serde_json::from_value(json!({"metadata": metadata})).unwrap()
    }

    fn names(children: &ChildCache<Pod>, namespace: &str, job: &str) -> Vec<String> {
        let mut object = crate::metrics::tests::job(json!({}));
        (object.metadata.namespace, object.metadata.name) = (Some(namespace.into()), Some(job.into()));
        children.of(&object).iter().map(|pod| pod.name_any()).collect()
    }

    #[test]
    fn a_job_finds_its_own_children() {
        let children = ChildCache::default();
        for (namespace, job, name) in [("n", "a", "p"), ("n", "a", "q"), ("n", "b", "r"), ("m", "a", "s")] {
            children.apply(&Event::Apply(pod(namespace, job, name)));
        }
        children.apply(&Event::Apply(Pod::default()));
        assert_eq!(names(&children, "n", "a"), ["p", "q"]);
        assert_eq!(names(&children, "m", "a"), ["s"]);
        children.apply(&Event::Delete(pod("n", "a", "p")));
        children.apply(&Event::Delete(pod("n", "b", "r")));
        assert_eq!(names(&children, "n", "a"), ["q"]);
        assert_eq!(children.known.read().unwrap().len(), 2, "a job without children takes no room");
    }

    #[test]
    fn a_listing_replaces_what_was_known_once_it_is_complete() {
        let children = ChildCache::default();
        children.apply(&Event::Apply(pod("n", "a", "old")));
        children.apply(&Event::Init);
        children.apply(&Event::InitApply(pod("n", "a", "lost")));
        // It failed, and begins again.
        children.apply(&Event::Init);
        children.apply(&Event::InitApply(pod("n", "a", "new")));
        assert_eq!(names(&children, "n", "a"), ["old"]);
        assert_eq!(children.wait_until_known().now_or_never(), None);
        children.apply(&Event::InitDone);
        assert_eq!(names(&children, "n", "a"), ["new"]);
        assert_eq!(children.wait_until_known().now_or_never(), Some(()));
        assert!(children.listed.read().unwrap().is_empty());
    }
}

//! The chart on a control plane of its own: manifests, rights, the life of the CRD, and the commands of the manual. No
//! pod runs, since there is no node.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use growth_crds::{GrowthTrainingJob, resolve};
use growth_tests::cluster::command::output;
use growth_tests::cluster::{Cluster, wait_for};
use growth_tests::testing::within;
use growth_tests::workspace;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::runtime::wait::conditions;
use kube::{Api, Client};
use serde_json::{Value, json};

use super::{NAMESPACE, SNAPSHOTS, chart, is_kind, render};

const CRD: &str = "growthtrainingjobs.growth.dev";
/// Properties of a part of the schema that a version before this one might have lacked.
const POLICY: &str =
    "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/runPolicy/properties";
const FIELD: &str = "activeDeadlineSeconds";
const OPERATOR: &str = "system:serviceaccount:growth-system:growth-operator";
/// What the manual's commands need that is not here: a registry, a bucket, nodes.
const LEFT_OUT: &str = r#"
docker() { :; }
aws() { :; }
cargo() { :; }
kubectl() {
    case " $* " in
    *" rollout status "* | *" --watch "* | *" logs "* | *" wait gtj/"*) ;;
    *) command kubectl "$@" ;;
    esac
}
"#;

struct Bench<'a> {
    cluster: &'a Cluster,
    client: Client,
    /// What the commands write, beside links to what they read.
    folder: tempfile::TempDir,
}

pub async fn check(cluster: &Cluster) -> Result<()> {
    let folder = tempfile::tempdir()?;
    for read in ["charts", "crds", "docs", "examples"] {
        symlink(workspace().join(read), folder.path().join(read))?;
    }
    let bench = Bench { cluster, client: cluster.client().await?, folder };
    bench.kubectl("create namespace growth-system")?;
    bench.kubectl("label namespace growth-system pod-security.kubernetes.io/enforce=restricted")?;

    bench.its_manifests_are_accepted()?;
    bench.an_upgrade_replaces_the_crd_and_an_uninstall_leaves_it().await?;
    bench.a_crd_of_kubectl_is_taken_over().await?;
    bench.the_manual_is_right().await
}

impl Bench<'_> {
    fn kubectl(&self, line: &str) -> Result<String> {
        output(self.cluster.kubectl().current_dir(self.folder.path()).args(line.split(' ')))
    }

    fn helm(&self, line: &str) -> Result<String> {
        output(self.cluster.helm().current_dir(self.folder.path()).args(line.split(' ')))
    }

    fn its_manifests_are_accepted(&self) -> Result<()> {
        for snapshot in SNAPSHOTS {
            // Those of the Prometheus Operator are not known here.
            let mut objects = snapshot.objects()?;
            objects.retain(|object| !object["apiVersion"].as_str().unwrap().starts_with("monitoring"));
            let count = objects.len();
            let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
            std::fs::write(self.folder.path().join("rendered.json"), list.to_string())?;
            let said = self.kubectl("apply --dry-run=server --validate=strict --filename rendered.json")?;
            ensure!(said.lines().count() == count, "{}: {said}", snapshot.name);
        }
        Ok(())
    }

    async fn an_upgrade_replaces_the_crd_and_an_uninstall_leaves_it(&self) -> Result<()> {
        let old = self.older_chart()?;
        let old = old.to_str().context("a path")?;
        self.helm(&format!("install growth-operator {old} --namespace {NAMESPACE}"))?;
        ensure!(!self.crd_is_new().await?, "the older chart has the newer CRD");
        self.established().await?;
        self.kubectl("apply --filename examples/laptop.yaml")?;

        self.helm(&format!("upgrade growth-operator charts/growth-operator --namespace {NAMESPACE}"))?;
        ensure!(self.crd_is_new().await?, "the upgrade left the CRD as it was");
        self.pods_are_admitted().await?;
        self.rights_are_those_it_needs().await?;

        self.helm(&format!("uninstall growth-operator --namespace {NAMESPACE}"))?;
        ensure!(self.crd_is_new().await?, "the CRD is gone");
        self.kubectl("get gtj laptop").context("the job is gone")?;
        let again = format!("install growth-operator charts/growth-operator --namespace {NAMESPACE}");
        self.helm(&again).context("what it left must not be in its way")?;
        self.remove_all()
    }

    async fn a_crd_of_kubectl_is_taken_over(&self) -> Result<()> {
        std::fs::write(self.folder.path().join("old.yaml"), older_crd()?)?;
        self.kubectl("apply --filename old.yaml")?;
        self.established().await?;
        let refused = self.follow("The operator").expect_err("taken over without being asked");
        ensure!(format!("{refused:#}").contains("invalid ownership metadata"), "{refused:#}");

        // What the manual says then.
        let commands = blocks("Upgrade", "sh")?;
        self.shell(&commands[1], &[])?;
        ensure!(self.crd_is_new().await?, "it has the release's labels and the older schema");
        self.remove_all()
    }

    async fn the_manual_is_right(&self) -> Result<()> {
        self.follow("Images")?;
        self.follow("The operator")?;
        let image = "get deployment growth-operator --output jsonpath={..image} --namespace growth-system";
        ensure!(self.kubectl(image)? == "registry.example.com/growth/growth-operator:0.1.0");
        self.kubectl("create rolebinding ben --clusterrole=edit --user=ben --namespace default")?;
        self.may("ben", "default", "create", "growth.dev", "growthtrainingjobs").await?;

        self.follow("A first job")?;
        let text = self.kubectl("get gtj first --namespace training --output json")?;
        let job: GrowthTrainingJob = serde_json::from_str(&text)?;
        ensure!(resolve("first", &job.spec).is_ok(), "a trainer would refuse it");
        self.follow("Upgrade")?;

        for (section, objects) in [("High availability", 1), ("Monitoring", 4)] {
            let values = self.folder.path().join("section.yaml");
            std::fs::write(&values, &blocks(section, "yaml")?[0])?;
            let more = super::objects(&render(
                "growth-operator",
                &["--values", values.to_str().context("a path")?],
            )?)?;
            let known = super::objects(&render("growth-operator", &[])?)?;
            ensure!(more.len() == known.len() + objects, "{section}: {more:#?}");
        }

        self.follow("Uninstall")?;
        self.follow_in_one_namespace().await
    }

    /// Only what the manual's own manifest allows, and the role `admin`.
    async fn follow_in_one_namespace(&self) -> Result<()> {
        self.kubectl("create namespace team")?;
        self.kubectl("create rolebinding anna --clusterrole=admin --user=anna --namespace team")?;
        let commands = blocks("In one namespace", "sh")?;
        let [by_administrator, by_team] = commands.as_slice() else { bail!("two blocks: {commands:#?}") };
        self.shell(by_administrator, &[])?;
        self.may("anna", "team", "update", "growth.dev", "growthtrainingjobs/status").await?;
        self.shell(by_team, &[("HELM_KUBEASUSER", "anna")])?;
        let account = "system:serviceaccount:team:growth-operator";
        self.may(account, "team", "list", "growth.dev", "growthtrainingjobs").await?;
        let elsewhere = self.is_allowed(account, "default", "list", "growth.dev", "growthtrainingjobs");
        ensure!(!elsewhere.await?, "it sees other namespaces");
        Ok(())
    }

    /// The commands of a section of the manual, as they stand there.
    fn follow(&self, section: &str) -> Result<()> {
        let commands = blocks(section, "sh")?;
        ensure!(!commands.is_empty(), "no commands in {section}");
        self.shell(&commands.concat(), &[])
    }

    fn shell(&self, commands: &str, environment: &[(&str, &str)]) -> Result<()> {
        let kubectl = self.cluster.kubectl();
        let programs = Path::new(kubectl.get_program()).parent().context("no folder")?.to_path_buf();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::iter::once(programs).chain(std::env::split_paths(&path)))?;
        let variables = blocks("What is needed", "sh")?.concat();
        let mut bash = Command::new("bash");
        bash.args(["-euo", "pipefail", "-c", &format!("{LEFT_OUT}{variables}{commands}")]);
        bash.current_dir(self.folder.path()).env("PATH", path).env("KUBECONFIG", self.cluster.kubeconfig());
        output(bash.envs(environment.iter().copied())).map(drop)
    }

    /// A chart like this one, with a CRD of earlier days.
    fn older_chart(&self) -> Result<PathBuf> {
        let copy = self.folder.path().join("older-chart");
        output(Command::new("cp").args(["--recursive", "--dereference"]).arg(chart()).arg(&copy))?;
        std::fs::write(copy.join("files/growthtrainingjobs.yaml"), older_crd()?)?;
        Ok(copy)
    }

    async fn crd(&self) -> Result<Value> {
        let api: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        Ok(serde_json::to_value(api.get(CRD).await?)?)
    }

    async fn crd_is_new(&self) -> Result<bool> {
        let crd = self.crd().await?;
        Ok(crd.pointer(POLICY).context("the schema has changed")?.get(FIELD).is_some())
    }

    async fn established(&self) -> Result<()> {
        let api: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        wait_for(api, CRD, "the CRD", conditions::is_crd_established()).await
    }

    /// Its namespace enforces the restricted profile.
    async fn pods_are_admitted(&self) -> Result<()> {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        let has_pod = |deployment: Option<&Deployment>| {
            let status = deployment.and_then(|deployment| deployment.status.as_ref());
            status.and_then(|status| status.replicas).is_some_and(|replicas| replicas > 0)
        };
        wait_for(api, "growth-operator", "a pod of the operator", has_pod).await
    }

    async fn rights_are_those_it_needs(&self) -> Result<()> {
        self.may(OPERATOR, NAMESPACE, "patch", "coordination.k8s.io", "leases").await?;
        self.may(OPERATOR, "default", "create", "batch", "jobs").await?;
        self.may(OPERATOR, "default", "update", "growth.dev", "growthtrainingjobs/status").await?;
        let refused = [
            ("default", "get", "coordination.k8s.io", "leases"),
            (NAMESPACE, "get", "", "secrets"),
            ("default", "list", "", "secrets"),
            ("", "list", "", "nodes"),
            ("default", "create", "", "pods"),
            ("default", "create", "growth.dev", "growthtrainingjobs"),
        ];
        for (namespace, verb, group, resource) in refused {
            let allowed = self.is_allowed(OPERATOR, namespace, verb, group, resource).await?;
            ensure!(!allowed, "the operator may {verb} {resource} in {namespace:?}");
        }
        Ok(())
    }

    async fn is_allowed(
        &self,
        user: &str,
        namespace: &str,
        verb: &str,
        group: &str,
        resource: &str,
    ) -> Result<bool> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let attributes = ResourceAttributes {
            namespace: Some(namespace.to_owned()),
            verb: Some(verb.to_owned()),
            group: Some(group.to_owned()),
            resource: Some(resource.to_owned()),
            subresource: Some(subresource.to_owned()),
            ..ResourceAttributes::default()
        };
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.to_owned()),
                resource_attributes: Some(attributes),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = api.create(&Default::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }

    /// Asked until it is so: the API server sees new roles a moment later, and tells nobody when.
    async fn may(&self, user: &str, namespace: &str, verb: &str, group: &str, resource: &str) -> Result<()> {
        let what = format!("{user} may {verb} {resource} in {namespace}");
        within(Duration::from_secs(20), &what, async || {
            Ok(self.is_allowed(user, namespace, verb, group, resource).await?.then_some(()))
        })
        .await
    }

    /// For the next test: no release, no CRD, no jobs.
    fn remove_all(&self) -> Result<()> {
        self.helm(&format!("uninstall growth-operator --namespace {NAMESPACE}"))?;
        self.kubectl(&format!("delete crd {CRD}")).map(drop)
    }
}

/// The CRD as if a field had not been invented yet.
fn older_crd() -> Result<String> {
    let text = std::fs::read_to_string(workspace().join("crds/growthtrainingjobs.yaml"))?;
    let mut crd: Value = serde_saphyr::from_str(&text)?;
    ensure!(is_kind(&crd, "CustomResourceDefinition"), "{crd}");
    let fields = crd.pointer_mut(POLICY).and_then(Value::as_object_mut).context("the schema has changed")?;
    fields.remove(FIELD).with_context(|| format!("no {FIELD} any more; take another field"))?;
    Ok(serde_saphyr::to_string(&crd)?)
}

/// The code blocks in a language of a section of the manual.
fn blocks(section: &str, language: &str) -> Result<Vec<String>> {
    let manual = std::fs::read_to_string(workspace().join("docs/install.md"))?;
    let (_, rest) = manual.split_once(&format!("\n## {section}\n")).with_context(|| section.to_owned())?;
    let body = rest.split("\n## ").next().unwrap_or_default();
    let fence = format!("```{language}\n");
    let blocks = body.split(&fence).skip(1);
    Ok(blocks.map(|block| block.split("```").next().unwrap_or_default().to_owned()).collect())
}

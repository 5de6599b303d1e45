//! The Helm chart: what it renders, which values it refuses, and how a real API server takes it.
//!
//! `GROWTH_UPDATE_SNAPSHOTS=1` writes the snapshots in `chart/` anew.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "chart/api_server.rs"]
mod api_server;

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};
use futures::FutureExt;
use growth_crds::protocol::contract;
use growth_tests::cluster::command::output;
use growth_tests::cluster::layout::Layout;
use growth_tests::cluster::{Cluster, Options};
use growth_tests::workspace;
use serde_json::{Value, json};

const NAMESPACE: &str = "growth-system";

/// What can be asked of the operator at `/metrics`.
const METRICS: [&str; 10] = [
    "growth_operator_reconcile_runs_total",
    "growth_operator_reconcile_failures_total",
    "growth_operator_reconcile_duration_seconds_bucket",
    "growth_operator_watch_last_event_timestamp_seconds",
    "growth_operator_watch_errors_total",
    "growth_operator_leader",
    "growth_jobs",
    "growth_stage_transitions_total",
    "growth_restarts_total",
    "growth_checkpoint_age_seconds",
];

/// A release that has a snapshot: the values in `<name>.values.yaml` give the manifests in `<name>.yaml`.
struct Snapshot {
    name: &'static str,
    release: &'static str,
}

const SNAPSHOTS: [Snapshot; 3] = [
    Snapshot { name: "defaults", release: "growth-operator" },
    Snapshot { name: "namespaced", release: "team" },
    Snapshot { name: "everything", release: "growth-operator" },
];

impl Snapshot {
    fn file(&self) -> PathBuf {
        workspace().join(format!("tests/integration/chart/{}.yaml", self.name))
    }

    fn values(&self) -> PathBuf {
        self.file().with_extension("values.yaml")
    }

    fn rendered(&self) -> Result<String> {
        render(self.release, &["--values", self.values().to_str().unwrap()])
    }

    fn objects(&self) -> Result<Vec<Value>> {
        objects(&self.rendered()?)
    }
}

fn chart() -> PathBuf {
    workspace().join("charts/growth-operator")
}

/// The one that is built for the clusters of the tests, or else the machine's own.
fn helm() -> Command {
    let layout = Layout::new(&Cluster::default_root(), "chart").unwrap();
    let built = layout.program("helm");
    Command::new(if built.exists() { built } else { "helm".into() })
}

fn render(release: &str, arguments: &[&str]) -> Result<String> {
    output(helm().args(["template", release, "--namespace", NAMESPACE]).args(arguments).arg(chart()))
}

fn objects(manifests: &str) -> Result<Vec<Value>> {
    Ok(serde_saphyr::from_multiple(manifests)?)
}

fn is_kind(object: &Value, kind: &str) -> bool {
    object["kind"] == kind
}

fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| is_kind(object, kind))
}

fn one<'a>(objects: &'a [Value], kind: &'a str) -> &'a Value {
    let found: Vec<&Value> = of_kind(objects, kind).collect();
    assert_eq!(found.len(), 1, "{kind}: {found:#?}");
    found[0]
}

/// Whether all members of `selector` are in `labels`.
fn selects(selector: &Value, labels: &Value) -> bool {
    let selector = selector.as_object().unwrap();
    !selector.is_empty() && selector.iter().all(|(key, value)| labels[key] == *value)
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().map(|text| text.as_str().unwrap()).collect()
}

/// The manifests without the CRD, which is generated, and tested by itself.
fn without_crd(manifests: &str) -> String {
    let documents = manifests.split("---\n").filter(|document| !document.contains("\nkind: CustomResource"));
    documents.collect::<Vec<_>>().join("---\n")
}

fn difference(snapshot: &Path, rendered: &str) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let now = folder.path().join("rendered");
    std::fs::write(&now, rendered)?;
    let compared = Command::new("diff").arg("--unified").arg(snapshot).arg(&now).output()?;
    Ok(String::from_utf8_lossy(&compared.stdout).into_owned())
}

#[test]
fn the_manifests_are_those_of_the_snapshots() -> Result<()> {
    for snapshot in SNAPSHOTS {
        let (file, rendered) = (snapshot.file(), without_crd(&snapshot.rendered()?));
        if std::env::var_os("GROWTH_UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&file, &rendered)?;
        }
        if std::fs::read_to_string(&file).unwrap_or_default() != rendered {
            bail!(
                "the chart renders something else than {}:\n{}\nIf that is meant, GROWTH_UPDATE_SNAPSHOTS=1 writes it.",
                file.display(),
                difference(&file, &rendered)?
            );
        }
    }
    Ok(())
}

#[test]
fn lint_finds_nothing() -> Result<()> {
    for snapshot in SNAPSHOTS {
        output(helm().args(["lint", "--strict", "--values"]).arg(snapshot.values()).arg(chart()))?;
    }
    Ok(())
}

#[test]
fn a_value_that_cannot_be_meant_is_refused_by_name() {
    let cases = [
        // what is set, and what the message must name
        ("replica=2", "'replica' not allowed"),
        ("replicas=two", "'/replicas': got string, want integer"),
        ("replicas=0", "'/replicas': minimum: got 0, want 1"),
        ("image.tagg=1.0", "'/image': additional properties 'tagg' not allowed"),
        ("image.tag=1", "'/image/tag': got number, want string"),
        ("image.tag=a b", "'/image/tag': 'a b' does not match"),
        ("image.repository=", "'/image/repository': minLength"),
        ("image.repository=null", "'/image': missing property 'repository'"),
        ("image=null", "missing property 'image'"),
        ("image.pullPolicy=Sometimes", "'Always', 'IfNotPresent', 'Never'"),
        ("trainer.repository=x", "'/trainer': additional properties 'repository' not allowed"),
        ("trainer.image.pullPolicy=x", "'/trainer/image/pullPolicy': value must be one of"),
        ("imagePullSecrets[0]=registry", "'/imagePullSecrets/0': got string, want object"),
        ("namespaced=yes", "'/namespaced': got string, want boolean"),
        ("crds.enabled=false", "'/crds': additional properties 'enabled' not allowed"),
        ("userRoles.create=false", "'/userRoles': additional properties 'create' not allowed"),
        ("log.format=xml", "'/log/format': value must be one of 'text', 'json'"),
        ("networkPolicy.apiServerPorts=443", "'/networkPolicy/apiServerPorts': got number, want array"),
        ("networkPolicy.apiServerPorts[0]=70000", "'/networkPolicy/apiServerPorts/0': maximum"),
        ("metrics.enabled=true", "'/metrics': additional properties 'enabled' not allowed"),
        ("metrics.serviceMonitor.interval=often", "'/metrics/serviceMonitor/interval': 'often'"),
        ("metrics.serviceMonitor.labels.a=1", "'/metrics/serviceMonitor/labels/a': got number, want string"),
        ("metrics.prometheusRule.checkpointAgeSeconds=1h", "checkpointAgeSeconds': got string, want integer"),
        ("metrics.dashboard=true", "'/metrics/dashboard': got boolean, want object"),
        ("resources.request.cpu=1", "'/resources': additional properties 'request' not allowed"),
        ("podLabels.app\\.kubernetes\\.io/name=x", "'/podLabels/app.kubernetes.io~1name'"),
        ("podAnnotations.a=true", "'/podAnnotations/a': got boolean, want string"),
        ("tolerations[0].keys=a", "'/tolerations/0': additional properties 'keys' not allowed"),
        ("tolerations[0].effect=None", "'/tolerations/0/effect': value must be one of"),
        ("affinity.node=a", "'/affinity': additional properties 'node' not allowed"),
        ("terminationGracePeriodSeconds=0", "'/terminationGracePeriodSeconds': minimum"),
    ];
    for (value, message) in cases {
        let said = render("growth-operator", &["--set", value]).expect_err(value).to_string();
        assert!(said.contains(message), "{value}: {said}");
    }
}

#[test]
fn the_crd_is_the_generated_file_and_outlives_the_release() -> Result<()> {
    let rendered = render("growth-operator", &["--show-only", "templates/crd.yaml"])?;
    let file = std::fs::read_to_string(workspace().join("crds/growthtrainingjobs.yaml"))?;
    let (head, body) = file.split_once("\nmetadata:\n").unwrap();
    assert!(rendered.contains(head) && rendered.contains(body), "not byte by byte");
    let crd = &objects(&rendered)?[0];
    assert_eq!(crd["metadata"]["annotations"], json!({"helm.sh/resource-policy": "keep"}));
    assert_eq!(crd["metadata"]["labels"]["app.kubernetes.io/instance"], "growth-operator");

    let without = objects(&render("growth-operator", &["--set", "crds.install=false"])?)?;
    assert_eq!(of_kind(&without, "CustomResourceDefinition").count(), 0);
    Ok(())
}

/// <https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted>, as far as these pods can break it.
fn assert_restricted(pod: &Value) {
    for shared in ["hostNetwork", "hostPID", "hostIPC", "volumes", "initContainers"] {
        assert_eq!(pod[shared], Value::Null, "{shared}");
    }
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_ne!(pod["securityContext"]["runAsUser"], 0);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    for container in pod["containers"].as_array().unwrap() {
        let security = &container["securityContext"];
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
        assert_eq!(security["readOnlyRootFilesystem"], true);
        let loosened = ["privileged", "runAsUser", "runAsNonRoot", "seccompProfile", "procMount"];
        assert!(loosened.iter().all(|field| security.get(field).is_none()), "{security}");
        assert!(container["ports"].as_array().unwrap().iter().all(|port| port.get("hostPort").is_none()));
    }
}

#[test]
fn every_pod_meets_the_restricted_profile() -> Result<()> {
    for snapshot in SNAPSHOTS {
        let objects = snapshot.objects()?;
        let pods: Vec<&Value> =
            objects.iter().filter_map(|object| object.pointer("/spec/template/spec")).collect();
        assert_eq!(pods.len(), 1);
        pods.into_iter().for_each(assert_restricted);
    }
    Ok(())
}

#[test]
fn no_right_is_a_wildcard_or_reaches_secrets_nodes_or_other_rights() -> Result<()> {
    for snapshot in SNAPSHOTS {
        let objects = snapshot.objects()?;
        let roles = of_kind(&objects, "Role").chain(of_kind(&objects, "ClusterRole"));
        let rules: Vec<&Value> = roles.flat_map(|role| role["rules"].as_array().unwrap()).collect();
        assert!(rules.len() >= 8, "{rules:#?}");
        for rule in rules {
            let words: Vec<&str> =
                ["apiGroups", "resources", "verbs"].iter().flat_map(|field| texts(&rule[field])).collect();
            assert!(words.iter().all(|word| !word.contains('*')), "{rule}");
            for resource in texts(&rule["resources"]) {
                let kind = resource.split('/').next().unwrap();
                assert!(!["secrets", "nodes", "serviceaccounts", "roles"].contains(&kind), "{rule}");
            }
            let granting = ["escalate", "bind", "impersonate"];
            assert!(texts(&rule["verbs"]).iter().all(|verb| !granting.contains(verb)), "{rule}");
        }
    }
    Ok(())
}

#[test]
fn one_namespace_needs_nothing_of_the_cluster() -> Result<()> {
    let objects = SNAPSHOTS[1].objects()?;
    let of_the_cluster = ["ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"];
    assert!(objects.iter().all(|object| !of_the_cluster.iter().any(|kind| is_kind(object, kind))));
    assert!(objects.iter().all(|object| object["metadata"]["namespace"] == NAMESPACE), "{objects:#?}");
    let egress = one(&objects, "NetworkPolicy")["spec"]["egress"].as_array().unwrap().clone();
    assert_eq!(egress.last().unwrap()["to"][0].get("namespaceSelector"), None, "trainers are here, too");
    Ok(())
}

#[test]
fn what_selects_or_names_something_of_the_chart_finds_it() -> Result<()> {
    for snapshot in SNAPSHOTS {
        let objects = snapshot.objects()?;
        let deployment = one(&objects, "Deployment");
        let pod = &deployment["spec"]["template"];
        let selectors = [
            ("Deployment", "/spec/selector/matchLabels"),
            ("NetworkPolicy", "/spec/podSelector/matchLabels"),
            ("PodDisruptionBudget", "/spec/selector/matchLabels"),
            ("Service", "/spec/selector"),
        ];
        for (kind, path) in selectors {
            let found = of_kind(&objects, kind).map(|object| object.pointer(path).unwrap());
            found.for_each(|selector| assert!(selects(selector, &pod["metadata"]["labels"]), "{kind}"));
        }
        for spread in pod["spec"]["topologySpreadConstraints"].as_array().into_iter().flatten() {
            assert!(selects(&spread["labelSelector"]["matchLabels"], &pod["metadata"]["labels"]));
            assert_eq!(spread["whenUnsatisfiable"], "ScheduleAnyway");
        }
        for binding in of_kind(&objects, "RoleBinding").chain(of_kind(&objects, "ClusterRoleBinding")) {
            let role = &binding["roleRef"];
            let is_it = |object: &&Value| object["metadata"]["name"] == role["name"];
            assert_eq!(of_kind(&objects, role["kind"].as_str().unwrap()).filter(is_it).count(), 1, "{role}");
            let account = one(&objects, "ServiceAccount");
            assert_eq!(binding["subjects"][0]["name"], account["metadata"]["name"]);
            assert_eq!(pod["spec"]["serviceAccountName"], account["metadata"]["name"]);
        }
        for monitor in of_kind(&objects, "ServiceMonitor") {
            let service = one(&objects, "Service");
            assert!(selects(&monitor["spec"]["selector"]["matchLabels"], &service["metadata"]["labels"]));
            assert_eq!(monitor["spec"]["endpoints"][0]["port"], service["spec"]["ports"][0]["name"]);
        }
        let trainers = one(&objects, "NetworkPolicy").pointer("/spec/egress/2").unwrap();
        assert_eq!(trainers["ports"][0]["port"], contract::PROGRESS_PORT);
    }
    Ok(())
}

#[test]
fn one_replica_blocks_no_drain_and_more_share_one() -> Result<()> {
    for (replicas, budgets) in [(1, 0), (2, 1)] {
        let rendered = objects(&render("growth-operator", &["--set", &format!("replicas={replicas}")])?)?;
        assert_eq!(of_kind(&rendered, "PodDisruptionBudget").count(), budgets);
        let pod = &one(&rendered, "Deployment")["spec"]["template"]["spec"];
        assert_eq!(pod.get("topologySpreadConstraints").is_some(), replicas > 1);
    }
    Ok(())
}

/// Names of this project's metrics in an expression.
fn metrics_in(expression: &str) -> Vec<&str> {
    let words = expression.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    words.filter(|word| word.starts_with("growth_")).collect()
}

fn assert_known(expression: &Value) {
    let expression = expression.as_str().unwrap();
    let metrics = metrics_in(expression);
    assert!(!metrics.is_empty(), "{expression}");
    assert!(metrics.iter().all(|metric| METRICS.contains(metric)), "{expression}");
    assert_eq!(expression.matches('(').count(), expression.matches(')').count(), "{expression}");
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() -> Result<()> {
    let objects = SNAPSHOTS[2].objects()?;
    let alerts = one(&objects, "PrometheusRule").pointer("/spec/groups/0/rules").unwrap().as_array().unwrap();
    let manual = std::fs::read_to_string(workspace().join("docs/install.md"))?;
    for alert in alerts {
        assert_known(&alert["expr"]);
        assert!(alert["expr"].as_str().unwrap().contains("namespace=\"growth-system\""), "{alert}");
        assert!(["warning", "critical"].map(Value::from).contains(&alert["labels"]["severity"]), "{alert}");
        assert!(manual.contains(&format!("| `{}` |", alert["alert"].as_str().unwrap())), "{alert}");
        assert!(
            alert["annotations"]["summary"].is_string() && alert["annotations"]["description"].is_string()
        );
    }
    assert!(alerts.iter().any(|alert| alert["expr"].as_str().unwrap().ends_with("> 7200")), "no value");

    let maps = of_kind(&objects, "ConfigMap").collect::<Vec<_>>();
    assert_eq!(maps[0]["metadata"]["labels"]["grafana_dashboard"], "1");
    let dashboard: Value = serde_json::from_str(maps[0]["data"]["growth-operator.json"].as_str().unwrap())?;
    let panels = dashboard["panels"].as_array().unwrap();
    let mut places = std::collections::BTreeSet::new();
    for panel in panels {
        panel["targets"].as_array().unwrap().iter().for_each(|target| assert_known(&target["expr"]));
        assert!(places.insert(panel["id"].as_u64()), "two panels {}", panel["id"]);
    }
    let all = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let shown: Vec<&str> = all.flat_map(|target| metrics_in(target["expr"].as_str().unwrap())).collect();
    let hidden = METRICS.iter().filter(|metric| !shown.contains(metric)).collect::<Vec<_>>();
    assert_eq!(
        hidden,
        [&"growth_operator_watch_last_event_timestamp_seconds"],
        "silence is no figure to show"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_api_server_takes_it() -> Result<()> {
    if std::env::var_os("GROWTH_TEST_CLUSTER").is_some() {
        eprintln!("left out: it installs and removes the CRD, which an external cluster may need");
        return Ok(());
    }
    let (root, name) = (Cluster::default_root(), "chart");
    let cluster = Cluster::up(&root, name, Options { nodes: 0 }).await?;
    let ended = AssertUnwindSafe(api_server::check(&cluster)).catch_unwind().await;
    Cluster::down(&root, name)?;
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

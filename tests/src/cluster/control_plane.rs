//! etcd, the API server, the controller manager and the scheduler.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::Result;

use super::certificates::Authority;
use super::layout::{API_PORT, ETCD_PORT, Layout, Network};
use super::{Options, daemon};
use crate::workspace;

/// In the order in which they start.
pub const COMPONENTS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// The address of the API server: where nodes reach it, or loopback when there are none.
pub fn api_address(network: Network, options: &Options) -> Ipv4Addr {
    if options.nodes == 0 { network.loopback() } else { network.gateway() }
}

/// Writes keys, certificates and kubeconfigs for the whole cluster.
pub fn write_credentials(layout: &Layout, network: Network, options: &Options) -> Result<()> {
    let address = api_address(network, options);
    let authority = Authority::new(layout, format!("https://{address}:{API_PORT}"))?;
    authority.service_account_key()?;
    // 10.96.0.1 is the Service `kubernetes`, as pods see it.
    authority.api_server(&[network.loopback(), network.gateway(), Ipv4Addr::new(10, 96, 0, 1)])?;
    authority.kubelet_client()?;
    authority.administrator()?;
    for component in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
        authority.component(component, &format!("system:{component}"), None)?;
    }
    for number in 1..=options.nodes {
        authority.node(number, network.node(number))?;
    }
    Ok(())
}

/// Starts one of [`COMPONENTS`].
pub fn start(layout: &Layout, network: Network, options: &Options, component: &str) -> Result<()> {
    let arguments = match component {
        "etcd" => etcd(layout, network),
        "kube-apiserver" => api_server(layout, network, options),
        "kube-controller-manager" => controller_manager(layout, network),
        _ => scheduler(layout, network),
    };
    fs::create_dir_all(layout.logs())?;
    daemon::start_detached(layout, component, Command::new(layout.program(component)).args(arguments))
}

fn etcd(layout: &Layout, network: Network) -> Vec<String> {
    let (client, peer) = (
        format!("http://{}:{ETCD_PORT}", network.loopback()),
        format!("http://{}:{}", network.loopback(), ETCD_PORT + 1),
    );
    vec![
        format!("--data-dir={}", layout.folder().join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // A power cut may cost a test cluster its data.
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ]
}

fn api_server(layout: &Layout, network: Network, options: &Options) -> Vec<String> {
    let pki = |file: &str| layout.pki().join(file).display().to_string();
    let address = api_address(network, options);
    let mut arguments = vec![
        format!("--etcd-servers=http://{}:{ETCD_PORT}", network.loopback()),
        format!("--bind-address={address}"),
        format!("--secure-port={API_PORT}"),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--tls-cert-file={}", pki("kube-apiserver.crt")),
        format!("--tls-private-key-file={}", pki("kube-apiserver.key")),
        format!("--kubelet-client-certificate={}", pki("kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("kubelet-client.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        // The names of nodes are in no DNS.
        "--kubelet-preferred-address-types=InternalIP".into(),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!("--service-account-signing-key-file={}", pki("service-account.key")),
        format!("--service-account-key-file={}", pki("service-account.pub")),
        "--service-cluster-ip-range=10.96.0.0/16".into(),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        // Webhooks and aggregated APIs are called at their pods: the host has routes to pods, not to Services.
        "--enable-aggregator-routing=true".into(),
        format!(
            "--audit-policy-file={}",
            workspace().join("tests/cluster/manifests/audit-policy.yaml").display()
        ),
        format!("--audit-log-path={}", layout.log("audit").display()),
        "--profiling=false".into(),
    ];
    if options.nodes == 0 {
        // There are no pods that the Service `kubernetes` should lead to this loopback address.
        arguments.push("--endpoint-reconciler-type=none".into());
    } else {
        arguments.push(format!("--advertise-address={address}"));
    }
    arguments
}

fn controller_manager(layout: &Layout, network: Network) -> Vec<String> {
    let pki = layout.pki();
    vec![
        format!("--kubeconfig={}", pki.join("kube-controller-manager.kubeconfig").display()),
        format!("--bind-address={}", network.loopback()),
        format!("--service-account-private-key-file={}", pki.join("service-account.key").display()),
        format!("--root-ca-file={}", pki.join("ca.crt").display()),
        "--use-service-account-credentials=true".into(),
        "--leader-elect=false".into(),
        // 20 calls a second by default: a thousand Jobs would take minutes.
        "--kube-api-qps=500".into(),
        "--kube-api-burst=1000".into(),
        // 40 s by default; tests lose nodes often.
        "--node-monitor-grace-period=20s".into(),
        "--profiling=false".into(),
    ]
}

fn scheduler(layout: &Layout, network: Network) -> Vec<String> {
    vec![
        format!("--kubeconfig={}", layout.pki().join("kube-scheduler.kubeconfig").display()),
        format!("--bind-address={}", network.loopback()),
        "--kube-api-qps=500".into(),
        "--kube-api-burst=1000".into(),
        "--leader-elect=false".into(),
        "--profiling=false".into(),
    ]
}

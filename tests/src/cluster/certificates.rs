//! The cluster's certificate authority, a client certificate per component with the rights that such a component has in
//! production, and the kubeconfigs that carry them.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use super::layout::{Layout, node_name};

/// Writes the certificates of one cluster into its folder.
pub struct Authority<'a> {
    layout: &'a Layout,
    issuer: CertifiedIssuer<'static, KeyPair>,
    server: String,
}

impl<'a> Authority<'a> {
    /// A new authority for the API server at `address`.
    pub fn new(layout: &'a Layout, server: String) -> Result<Self> {
        fs::create_dir_all(layout.pki())?;
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "growth-operator tests");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?;
        write(&layout.pki().join("ca.crt"), &issuer.pem())?;
        Ok(Authority { layout, issuer, server })
    }

    /// The key that signs the tokens of service accounts.
    pub fn service_account_key(&self) -> Result<()> {
        let key = KeyPair::generate()?;
        write(&self.layout.pki().join("service-account.key"), &key.serialize_pem())?;
        write(&self.layout.pki().join("service-account.pub"), &key.public_key_pem())
    }

    /// The API server's certificate, for all the names and addresses that it is called by.
    pub fn api_server(&self, addresses: &[Ipv4Addr]) -> Result<()> {
        let mut names: Vec<String> = addresses.iter().map(Ipv4Addr::to_string).collect();
        names.extend(
            ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(String::from),
        );
        self.issue("kube-apiserver", "kube-apiserver", None, names)
    }

    /// How the API server shows itself to kubelets.
    pub fn kubelet_client(&self) -> Result<()> {
        self.issue("kubelet-client", "kube-apiserver-kubelet-client", Some("system:masters"), vec![])
    }

    /// A node: its kubelet's rights (the Node authorizer goes by user and group) and its serving certificate.
    pub fn node(&self, number: u8, address: Ipv4Addr) -> Result<()> {
        let name = node_name(number);
        self.component(&name, &format!("system:node:{name}"), Some("system:nodes"))?;
        let names = vec![name.clone(), address.to_string()];
        self.issue(&format!("{name}-kubelet-server"), &format!("system:node:{name}"), None, names)
    }

    /// A client certificate and a kubeconfig `<name>.kubeconfig` with it.
    pub fn component(&self, name: &str, user: &str, group: Option<&str>) -> Result<()> {
        self.issue(name, user, group, vec![])?;
        self.kubeconfig(name, &self.layout.pki().join(format!("{name}.kubeconfig")))
    }

    /// The administrator, whose kubeconfig people and tests use.
    pub fn administrator(&self) -> Result<()> {
        self.issue("admin", "growth-tests", Some("system:masters"), vec![])?;
        self.kubeconfig("admin", &self.layout.kubeconfig())
    }

    fn kubeconfig(&self, name: &str, file: &Path) -> Result<()> {
        let pki = self.layout.pki();
        let content = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "growth-tests",
            "contexts": [{"name": "growth-tests", "context": {"cluster": "growth-tests", "user": name}}],
            "clusters": [{"name": "growth-tests", "cluster": {
                "server": self.server,
                "certificate-authority": pki.join("ca.crt"),
            }}],
            "users": [{"name": name, "user": {
                "client-certificate": pki.join(format!("{name}.crt")),
                "client-key": pki.join(format!("{name}.key")),
            }}],
        });
        write(file, &serde_json::to_string_pretty(&content)?)
    }

    fn issue(&self, file: &str, user: &str, group: Option<&str>, names: Vec<String>) -> Result<()> {
        let mut parameters = CertificateParams::new(names)?;
        parameters.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            parameters.distinguished_name.push(DnType::OrganizationName, group);
        }
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        let pki = self.layout.pki();
        write(&pki.join(format!("{file}.crt")), &certificate.pem())?;
        write(&pki.join(format!("{file}.key")), &key.serialize_pem())
    }
}

fn write(file: &Path, content: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(file)
        .and_then(|mut open| open.write_all(content.as_bytes()))
        .with_context(|| format!("cannot write {}", file.display()))
}

//! The S3 server and the proxy in front of it that injects faults.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::layout::{Layout, Network, S3_PORT, S3_SERVER_PORT};
use super::{Options, daemon, wait_until};

/// In the order in which they start.
pub const COMPONENTS: [&str; 2] = ["s3-server", "s3-proxy"];

/// Where the S3 server is and who may use it. All ways lead through the fault proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3 {
    /// For programs on the host.
    pub endpoint: String,
    /// For pods.
    pub endpoint_in_cluster: String,
    /// It exists from the start.
    pub bucket: String,
    /// Any name will do, but a signature needs one.
    pub region: String,
    /// The owner of all buckets.
    pub access_key_id: String,
    /// The owner's secret: the server lives in a test only.
    pub secret_access_key: String,
}

impl S3 {
    pub(super) fn new(network: Network) -> Self {
        S3 {
            endpoint: format!("http://{}:{S3_PORT}", network.loopback()),
            endpoint_in_cluster: format!("http://s3.storage.svc.cluster.local:{S3_PORT}"),
            bucket: "growth".to_string(),
            region: "us-east-1".to_string(),
            access_key_id: "growth-tests".to_string(),
            secret_access_key: "growth-tests-secret".to_string(),
        }
    }

    /// The credentials as the environment variables that every S3 client reads.
    pub fn credentials(&self) -> [(&'static str, &str); 2] {
        [("AWS_ACCESS_KEY_ID", &self.access_key_id), ("AWS_SECRET_ACCESS_KEY", &self.secret_access_key)]
    }
}

/// Starts both and waits until they listen.
pub fn start(layout: &Layout, network: Network, options: &Options) -> Result<()> {
    let s3 = S3::new(network);
    // A bucket of the server is a folder.
    fs::create_dir_all(layout.s3_objects().join(&s3.bucket))?;
    let server = format!("{}:{S3_SERVER_PORT}", network.loopback());
    let mut command = Command::new(layout.program("versitygw"));
    command
        .args(["--port", &server, "--region", &s3.region, "--quiet", "--keep-alive", "posix"])
        .arg(layout.s3_objects())
        .env("ROOT_ACCESS_KEY", &s3.access_key_id)
        .env("ROOT_SECRET_KEY", &s3.secret_access_key);
    daemon::start_detached(layout, "s3-server", &mut command)?;

    let mut proxy = Command::new(cluster_program()?);
    proxy.args(["s3-proxy", "--upstream", &server, "--faults"]).arg(layout.s3_faults());
    let pods = (options.nodes > 0).then(|| network.gateway());
    for address in std::iter::once(network.loopback()).chain(pods) {
        proxy.args(["--listen", &format!("{address}:{S3_PORT}")]);
    }
    daemon::start_detached(layout, "s3-proxy", &mut proxy)?;
    let listens = |address: Ipv4Addr, port: u16| TcpStream::connect((address, port)).is_ok();
    wait_until("the S3 server", || Ok(listens(network.loopback(), S3_SERVER_PORT)))?;
    wait_until("the S3 proxy", || Ok(listens(network.loopback(), S3_PORT)))
}

/// The program `cluster`, which is also the proxy: this very program, or its neighbour when this is a test.
fn cluster_program() -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    let candidates = this.ancestors().skip(1).take(2).map(|folder| folder.join("cluster"));
    candidates.into_iter().find(|path| path.is_file()).with_context(|| {
        format!("no program `cluster` beside {}: cargo build -p growth-tests --bins", this.display())
    })
}

//! A proxy in front of an S3 server that fails on command: it answers errors, delays, drops connections, cuts uploads
//! and downloads, and loses answers to requests that were carried out. The faults stand in a file that is read at
//! each request, so they can be changed at any time and by any process.
//!
//! The request reaches the server as the client signed it, `Host` included.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clap::Subcommand;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

/// Begins the line of the log that each injected fault leaves.
pub const INJECTED: &str = "injected ";

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Subcommand)]
#[serde(rename_all = "camelCase")]
pub enum FaultKind {
    /// Answer this HTTP status and do nothing else.
    Status {
        /// 503 is what S3 says when it wants fewer requests.
        #[arg(default_value_t = 503)]
        code: u16,
    },
    /// Wait before the request goes on.
    Delay {
        /// How long.
        milliseconds: u64,
    },
    /// Close the connection without an answer; nothing reaches the server.
    Drop,
    /// Close the connection when this much of the request's body has been received.
    CutUpload {
        /// Bytes that still reach the server.
        bytes: u64,
    },
    /// Close the connection when this much of the answer's body has been sent.
    CutDownload {
        /// Bytes that still reach the client.
        bytes: u64,
    },
    /// The server carries the request out, but its answer is lost.
    LoseAnswer,
}

/// A fault and the requests that it befalls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// What goes wrong.
    #[command(subcommand)]
    pub kind: FaultKind,
    /// Only requests with this method.
    #[arg(long)]
    pub method: Option<String>,
    /// Only requests whose path and query contain this.
    #[arg(long)]
    pub path: Option<String>,
    /// Of these requests, this share, by a seeded generator.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub percent: u8,
    /// No more than this many times.
    #[arg(long)]
    pub times: Option<u32>,
}

impl Fault {
    /// `kind` at every request.
    pub fn always(kind: FaultKind) -> Self {
        Fault { kind, method: None, path: None, percent: 100, times: None }
    }

    /// Only at requests with this method.
    pub fn method(self, method: &str) -> Self {
        Fault { method: Some(method.to_string()), ..self }
    }

    /// Only at requests whose path and query contain `text`.
    pub fn path(self, text: &str) -> Self {
        Fault { path: Some(text.to_string()), ..self }
    }

    /// Only this share of the requests.
    pub fn percent(self, percent: u8) -> Self {
        Fault { percent, ..self }
    }

    /// No more than this many times.
    pub fn times(self, times: u32) -> Self {
        Fault { times: Some(times), ..self }
    }

    fn concerns(&self, method: &str, path: &str) -> bool {
        self.method.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(method))
            && self.path.as_ref().is_none_or(|text| path.contains(text))
    }
}

/// Puts faults in force, for requests that arrive from now on.
pub fn write_faults(file: &Path, faults: &[Fault]) -> Result<()> {
    let next = file.with_extension("next");
    fs::write(&next, serde_json::to_vec_pretty(faults)?)?;
    // Renamed, so that the proxy never reads half a file.
    fs::rename(&next, file).with_context(|| format!("cannot write {}", file.display()))
}

/// The faults in force. No file: none.
pub fn read_faults(file: &Path) -> Result<Vec<Fault>> {
    match fs::read(file) {
        Ok(content) => serde_json::from_slice(&content)
            .with_context(|| format!("{} is not a list of faults", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

/// Which fault a request meets: the first of the list that concerns it, that the dice choose, and that has not happened
/// often enough.
struct Chooser {
    file: PathBuf,
    faults: Vec<Fault>,
    happened: Vec<u32>,
    dice: ChaCha8Rng,
}

impl Chooser {
    fn new(file: PathBuf) -> Self {
        Chooser { file, faults: Vec::new(), happened: Vec::new(), dice: ChaCha8Rng::seed_from_u64(0) }
    }

    fn choose(&mut self, method: &str, path: &str) -> Result<Option<FaultKind>> {
        let faults = read_faults(&self.file)?;
        if faults != self.faults {
            // Another list begins to count anew, with the same dice.
            *self = Chooser { happened: vec![0; faults.len()], faults, ..Chooser::new(self.file.clone()) };
        }
        for (fault, happened) in self.faults.iter().zip(&mut self.happened) {
            let may_happen = fault.times.is_none_or(|times| *happened < times);
            if may_happen && fault.concerns(method, path) && self.dice.random_range(0..100) < fault.percent {
                *happened += 1;
                return Ok(Some(fault.kind.clone()));
            }
        }
        Ok(None)
    }
}

struct Proxy {
    upstream: String,
    chooser: Mutex<Chooser>,
    client: Client<HttpConnector, Cut<Incoming>>,
}

/// Serves until it is killed. `upstream` is `address:port`.
pub async fn serve(listen: &[SocketAddr], upstream: String, faults: PathBuf) -> Result<()> {
    let proxy = Arc::new(Proxy {
        upstream,
        chooser: Mutex::new(Chooser::new(faults)),
        client: Client::builder(TokioExecutor::new()).build_http(),
    });
    let mut servers = tokio::task::JoinSet::new();
    for address in listen {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        servers.spawn(accept(listener, proxy.clone()));
    }
    match servers.join_next().await {
        Some(stopped) => stopped?,
        None => bail!("no address to listen on"),
    }
}

async fn accept(listener: TcpListener, proxy: Arc<Proxy>) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let proxy = proxy.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let proxy = proxy.clone();
                async move { proxy.handle(request).await }
            });
            // An error is what a fault looks like from this side.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Answer = Response<Either<Full<Bytes>, Cut<Incoming>>>;

impl Proxy {
    /// An error closes the client's connection.
    async fn handle(&self, request: Request<Incoming>) -> Result<Answer> {
        let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
        let method = request.method().to_string();
        let fault = self.chooser.lock().unwrap_or_else(PoisonError::into_inner).choose(&method, &path)?;
        if let Some(kind) = &fault {
            eprintln!("{INJECTED}{} {method} {path}", serde_json::to_string(kind)?);
        }
        match fault {
            None => self.forward(request, u64::MAX, u64::MAX).await,
            Some(FaultKind::Status { code }) => error_answer(code),
            Some(FaultKind::Delay { milliseconds }) => {
                tokio::time::sleep(Duration::from_millis(milliseconds)).await;
                self.forward(request, u64::MAX, u64::MAX).await
            }
            Some(FaultKind::Drop) => bail!("dropped"),
            Some(FaultKind::CutUpload { bytes }) => self.forward(request, bytes, u64::MAX).await,
            Some(FaultKind::CutDownload { bytes }) => self.forward(request, u64::MAX, bytes).await,
            Some(FaultKind::LoseAnswer) => {
                let answer = self.forward(request, u64::MAX, u64::MAX).await?;
                // Whether the answer arrives here matters as little as what it says.
                let _ = answer.into_body().collect().await;
                bail!("the answer is lost")
            }
        }
    }

    /// The server's answer. Its headers are the server's, so the length that a cut body falls short of is told.
    async fn forward(
        &self,
        request: Request<Incoming>,
        upload_bytes: u64,
        download_bytes: u64,
    ) -> Result<Answer> {
        let (mut head, body) = request.into_parts();
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        head.uri =
            Uri::builder().scheme("http").authority(self.upstream.as_str()).path_and_query(path).build()?;
        let request = Request::from_parts(head, Cut { body, bytes_left: upload_bytes });
        match self.client.request(request).await {
            Ok(answer) => Ok(answer.map(|body| Either::Right(Cut { body, bytes_left: download_bytes }))),
            Err(error) if upload_bytes == u64::MAX => {
                eprintln!("the S3 server does not answer: {error}");
                error_answer(502)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn error_answer(code: u16) -> Result<Answer> {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{}</Code><Message>fault on command</Message></Error>",
        if code == 503 { "SlowDown" } else { "InternalError" }
    );
    let answer =
        Response::builder().status(StatusCode::from_u16(code)?).header("content-type", "application/xml");
    Ok(answer.body(Either::Left(Full::new(Bytes::from(body))))?)
}

/// A body that fails when so many bytes have passed.
struct Cut<B> {
    body: B,
    bytes_left: u64,
}

impl<B: Body<Data = Bytes, Error = hyper::Error> + Unpin> Body for Cut<B> {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(context)) else {
            return Poll::Ready(None);
        };
        let frame = frame.map_err(std::io::Error::other)?;
        let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
        if bytes > self.bytes_left {
            return Poll::Ready(Some(Err(std::io::Error::other("cut"))));
        }
        self.bytes_left -= bytes;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Empty;

    /// A server that stores the last body and answers `stored`, behind a proxy with these faults. Returns the proxy's
    /// address and what the server has seen.
    async fn proxied(faults: &[Fault]) -> (String, Arc<Mutex<Vec<String>>>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("faults.json");
        write_faults(&file, faults).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = server.local_addr().unwrap().to_string();
        let record = seen.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = server.accept().await.unwrap();
                let record = record.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let record = record.clone();
                    async move {
                        let host = request.headers()["host"].to_str().unwrap().to_string();
                        let body = request.into_body().collect().await?.to_bytes();
                        record.lock().unwrap().push(format!("{host} {}", body.len()));
                        Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from_static(b"stored"))))
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(
                    async move { connection.serve_connection(TokioIo::new(stream), service).await.ok() },
                );
            }
        });
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        tokio::spawn(async move { serve(&[free], upstream, file).await });
        while tokio::net::TcpStream::connect(free).await.is_err() {
            tokio::task::yield_now().await;
        }
        (free.to_string(), seen, folder)
    }

    /// The status and the body, or that the connection broke.
    async fn put(address: &str, path: &str, bytes: usize) -> Result<(u16, String)> {
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
        let body = Full::new(Bytes::from(vec![0; bytes]));
        let request = Request::put(format!("http://{address}/{path}")).body(body)?;
        let answer = client.request(request).await?;
        let status = answer.status().as_u16();
        Ok((status, String::from_utf8(answer.into_body().collect().await?.to_bytes().to_vec())?))
    }

    #[tokio::test]
    async fn without_faults_everything_passes_as_it_was_signed() {
        let (address, seen, _folder) = proxied(&[]).await;
        assert_eq!(put(&address, "x", 100_000).await.unwrap(), (200, "stored".to_string()));
        assert_eq!(*seen.lock().unwrap(), [format!("{address} 100000")]);
    }

    #[tokio::test]
    async fn each_kind_fails_as_it_says() {
        let only = |kind, path: &str| Fault::always(kind).path(path);
        let (address, seen, _folder) = proxied(&[
            only(FaultKind::Status { code: 503 }, "busy"),
            only(FaultKind::Drop, "drop"),
            only(FaultKind::CutUpload { bytes: 10 }, "cut-upload"),
            only(FaultKind::CutDownload { bytes: 2 }, "cut-download"),
            only(FaultKind::LoseAnswer, "lose"),
        ])
        .await;
        let (status, body) = put(&address, "busy", 1).await.unwrap();
        assert!(status == 503 && body.contains("<Code>SlowDown</Code>"), "{status} {body}");
        assert!(put(&address, "drop", 1).await.is_err());
        assert!(put(&address, "cut-upload", 1_000_000).await.is_err());
        assert!(seen.lock().unwrap().is_empty());
        assert!(put(&address, "cut-download", 1).await.is_err());
        assert!(put(&address, "lose", 7).await.is_err());
        // These two were carried out.
        assert_eq!(*seen.lock().unwrap(), [format!("{address} 1"), format!("{address} 7")]);
    }

    #[tokio::test]
    async fn an_unreachable_server_is_a_bad_gateway() {
        let folder = tempfile::tempdir().unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let proxy = Proxy {
            upstream: closed,
            chooser: Mutex::new(Chooser::new(folder.path().join("none"))),
            client: Client::builder(TokioExecutor::new()).build_http(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, Arc::new(proxy)));
        let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let answer = client.get(format!("http://{address}/").parse().unwrap()).await.unwrap();
        assert_eq!(answer.status(), 502);
    }

    #[test]
    fn times_percent_and_filters_choose_the_requests() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("faults.json");
        let mut chooser = Chooser::new(file.clone());
        assert_eq!(chooser.choose("GET", "/x").unwrap(), None);

        let twice = Fault::always(FaultKind::Drop).method("put").path("manifest").times(2);
        write_faults(&file, std::slice::from_ref(&twice)).unwrap();
        assert_eq!(chooser.choose("GET", "/manifest").unwrap(), None);
        assert_eq!(chooser.choose("PUT", "/weights").unwrap(), None);
        assert_eq!(chooser.choose("PUT", "/manifest").unwrap(), Some(FaultKind::Drop));
        assert_eq!(chooser.choose("PUT", "/manifest").unwrap(), Some(FaultKind::Drop));
        assert_eq!(chooser.choose("PUT", "/manifest").unwrap(), None);

        write_faults(&file, &[Fault::always(FaultKind::Drop).percent(30)]).unwrap();
        let hits = (0..1000).filter(|_| chooser.choose("GET", "/").unwrap().is_some()).count();
        assert!((250..350).contains(&hits), "{hits}");
    }
}

//! Object storage, seen from the synchronous training code: a local folder and a bucket through one path.

mod stream;

pub use stream::{ObjectReader, ObjectWriter};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, ObjectMeta, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutMode,
    PutOptions, PutPayload, RetryConfig,
};
use std::error::Error;
use std::io;
use std::ops::Range;
use std::path::{Component, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Runtime;
use url::Url;

/// Bytes of one part of a streamed upload to a bucket, and of one ranged read of a download.
const PART_BYTES: usize = 8 << 20;

/// The same of a folder. A part is read, converted, hashed and written one after the other, and stays in the core's cache
/// meanwhile: where memory was busy, a growth step took less than half the time that it took with the parts of a bucket.
const LOCAL_PART_BYTES: usize = 1 << 20;

/// Nice value of threads that wait for others to leave a core free.
#[cfg(target_os = "linux")]
const LOWEST_PRIORITY: i32 = 19;

/// Parts of a streamed upload in flight.
const PARTS_IN_FLIGHT: usize = 4;

/// What can go wrong with object storage; the message names the object.
#[derive(thiserror::Error, Debug)]
pub enum StorageError {
    /// The address itself is wrong.
    #[error("{uri}: {reason}")]
    Address {
        /// The address as written.
        uri: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The object does not exist.
    #[error("{uri} does not exist")]
    NotFound {
        /// The object.
        uri: String,
    },
    /// A create-only put met another object.
    #[error("{uri} already exists with other content")]
    AlreadyExists {
        /// The object.
        uri: String,
    },
    /// The store said no, or could not be reached.
    #[error("{uri}: {source}")]
    Store {
        /// The object.
        uri: String,
        /// What the store said.
        source: object_store::Error,
    },
}

/// Result of a storage operation.
pub type Result<T> = std::result::Result<T, StorageError>;

/// Where a store is, beyond its URI.
#[derive(Debug, Clone, Default)]
pub struct StorageOptions {
    /// Endpoint of an S3-compatible server.
    pub endpoint: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
}

/// A prefix in an object store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Storage {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    uri: String,
    local: Option<Arc<LocalFileSystem>>,
}

/// One object below a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name relative to the prefix.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// ETag where the store has one, else the time of modification: changes when the content does.
    pub version: String,
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    #[expect(clippy::expect_used, reason = "a process that cannot start threads cannot do anything")]
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("storage")
            .on_thread_start(yield_to_computation)
            .enable_all()
            .build()
            .expect("the storage threads start")
    })
}

/// Lets the calling thread run when the compute threads leave a core free: a checkpoint that is written meanwhile must
/// not slow the training. On Linux a thread has a priority of its own; elsewhere nothing happens.
pub(crate) fn yield_to_computation() {
    // Refused only where somebody has set limits; the work is done all the same.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::setpriority_process(None, LOWEST_PRIORITY);
}

/// The folder that a `file://` URI means: `~/` is the home folder, a relative path starts at the current folder, and
/// `..` takes back the name before it, as in a shell.
///
/// # Errors
/// When there is no home folder to expand.
pub fn local_path(uri: &str) -> Result<PathBuf> {
    let path = uri.strip_prefix("file://").unwrap_or(uri);
    let path = match path.strip_prefix("~/") {
        Some(rest) => std::env::home_dir()
            .ok_or_else(|| StorageError::Address {
                uri: uri.to_owned(),
                reason: "there is no home folder; write the whole path".to_owned(),
            })?
            .join(rest),
        None => PathBuf::from(path),
    };
    let path = std::path::absolute(&path)
        .map_err(|error| StorageError::Address { uri: uri.to_owned(), reason: error.to_string() })?;
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            other => plain.push(other),
        }
    }
    Ok(plain)
}

/// What the store is configured with: the environment's variables under their usual names, then what the job says. An
/// endpoint written with `http://` is meant so.
fn settings(
    environment: impl Iterator<Item = (String, String)>,
    uri: &str,
    options: &StorageOptions,
) -> Vec<(String, String)> {
    let mut settings: Vec<(String, String)> =
        environment.map(|(key, value)| (key.to_ascii_lowercase(), value)).collect();
    if let Some(endpoint) = &options.endpoint {
        settings.retain(|(key, _)| !S3_ENDPOINT_KEYS.contains(&key.as_str()));
        settings.push(("aws_endpoint".to_owned(), endpoint.clone()));
    }
    if let Some(region) = &options.region {
        settings.push(("aws_region".to_owned(), region.clone()));
    }
    let is_plain = |(key, value): &(String, String)| {
        S3_ENDPOINT_KEYS.contains(&key.as_str()) && value.starts_with("http://")
    };
    if settings.iter().any(is_plain) {
        settings.push(("aws_allow_http".to_owned(), "true".to_owned()));
    }
    if uri.starts_with("http://") {
        settings.push(("allow_http".to_owned(), "true".to_owned()));
    }
    settings
}

/// A bucket that is away for a minute must not cost an attempt. By default a request is given up after ten tries, which
/// can be two seconds.
fn patience() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() },
        max_retries: usize::MAX,
        retry_timeout: Duration::from_secs(120),
    }
}

/// Makes HTTP clients that know a request which was never sent. object_store 0.14 tries those again, but takes one whose
/// connection was closed before it for an unknown error, and gives up.
#[derive(Debug)]
struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Client(ReqwestConnector::default().connect(options)?)))
    }
}

#[derive(Debug)]
struct Client(HttpClient);

#[async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        self.0.execute(request).await.map_err(|error| match was_never_sent(&error) {
            true => HttpError::new(HttpErrorKind::Request, error),
            false => error,
        })
    }
}

fn was_never_sent(error: &HttpError) -> bool {
    let causes = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
    causes.filter_map(|error| error.downcast_ref()).any(hyper::Error::is_canceled)
}

/// As `object_store::parse_url_opts`, with [`patience`].
fn open_remote(
    url: &Url,
    settings: Vec<(String, String)>,
) -> object_store::Result<(Arc<dyn ObjectStore>, Path)> {
    macro_rules! build {
        ($builder:ty, $url:expr) => {{
            let builder = <$builder>::new().with_url($url).with_retry(patience());
            let builder = builder.with_http_connector(Connector);
            let set = |builder: $builder, (key, value): (String, String)| match key.parse() {
                Ok(key) => builder.with_config(key, value),
                // It concerns another kind of store, or none.
                Err(_) => builder,
            };
            Arc::new(settings.into_iter().fold(builder, set).build()?)
        }};
    }
    let (scheme, path) = ObjectStoreScheme::parse(url)?;
    let store: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => build!(AmazonS3Builder, url.as_str()),
        ObjectStoreScheme::GoogleCloudStorage => build!(GoogleCloudStorageBuilder, url.as_str()),
        ObjectStoreScheme::MicrosoftAzure => build!(MicrosoftAzureBuilder, url.as_str()),
        ObjectStoreScheme::Http => build!(HttpBuilder, &url[..url::Position::BeforePath]),
        _ => object_store::parse_url(url)?.0.into(),
    };
    Ok((store, path))
}

/// The names under which object_store takes an S3 endpoint.
const S3_ENDPOINT_KEYS: [&str; 4] = ["aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"];

impl Storage {
    /// Opens `file://`, `s3://`, `gs://`, `az://` or `http(s)://`, or a bare path. Credentials come from the usual
    /// environment variables. Folders of a `file://` URI are made when something is written.
    ///
    /// # Errors
    /// When the address cannot be understood.
    pub fn open(uri: &str, options: &StorageOptions) -> Result<Self> {
        if uri.starts_with("file://") || !uri.contains("://") {
            return Self::open_local(uri);
        }
        let address = |reason: String| StorageError::Address { uri: uri.to_owned(), reason };
        let url = Url::parse(uri).map_err(|error| address(error.to_string()))?;
        let settings = settings(std::env::vars(), uri, options);
        let (store, prefix) = open_remote(&url, settings).map_err(|error| address(error.to_string()))?;
        Ok(Self { store, prefix, uri: uri.trim_end_matches('/').to_owned(), local: None })
    }

    fn open_local(uri: &str) -> Result<Self> {
        let path = local_path(uri)?;
        let address = |reason: String| StorageError::Address { uri: uri.to_owned(), reason };
        let store = Arc::new(LocalFileSystem::new().with_fsync(true));
        let prefix = Path::from_absolute_path(&path).map_err(|error| address(error.to_string()))?;
        let uri = format!("file://{}", path.display());
        Ok(Self { store: store.clone(), prefix, uri, local: Some(store) })
    }

    /// The prefix `name` below this one.
    pub fn join(&self, name: &str) -> Self {
        Self { prefix: self.path(name), uri: self.uri_of(name), ..self.clone() }
    }

    /// Address of this prefix.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Address of an object.
    pub fn uri_of(&self, name: &str) -> String {
        if name.is_empty() { self.uri.clone() } else { format!("{}/{name}", self.uri) }
    }

    /// Bytes that are best read or written at a time.
    pub(crate) fn part_bytes(&self) -> usize {
        if self.local.is_some() { LOCAL_PART_BYTES } else { PART_BYTES }
    }

    fn path(&self, name: &str) -> Path {
        // As it is: a listed name must not be escaped again. Only what no store would take is escaped.
        let name = Path::parse(name).unwrap_or_else(|_| Path::from(name));
        self.prefix.parts().chain(name.parts()).collect()
    }

    fn error(&self, name: &str) -> impl FnOnce(object_store::Error) -> StorageError {
        let uri = self.uri_of(name);
        move |source| match source {
            object_store::Error::NotFound { .. } => StorageError::NotFound { uri },
            source => StorageError::Store { uri, source },
        }
    }

    /// The whole object.
    ///
    /// # Errors
    /// [`StorageError::NotFound`], or what the store says.
    pub fn get(&self, name: &str) -> Result<Bytes> {
        let path = self.path(name);
        runtime().block_on(async { self.store.get(&path).await?.bytes().await }).map_err(self.error(name))
    }

    /// A range of bytes of an object.
    ///
    /// # Errors
    /// As [`Storage::get`], and when the range is outside the object.
    pub fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let path = self.path(name);
        let read = || self.store.get_range(&path, range.clone());
        // Outside of the runtime a file is read at once and here; asking another thread costs more than reading.
        let at_once = self.local.as_ref().and_then(|_| read().now_or_never());
        at_once.unwrap_or_else(|| runtime().block_on(read())).map_err(self.error(name))
    }

    /// Size and version of an object, or `None` when it does not exist.
    ///
    /// # Errors
    /// What the store says.
    pub fn head(&self, name: &str) -> Result<Option<Entry>> {
        let path = self.path(name);
        match runtime().block_on(self.store.head(&path)) {
            Ok(meta) => Ok(Some(entry(name.to_owned(), &meta))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error(name)(error)),
        }
    }

    /// Writes an object, replacing what was there, atomically.
    ///
    /// # Errors
    /// What the store says.
    pub fn put(&self, name: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let (path, payload) = (self.path(name), PutPayload::from(bytes.into()));
        runtime().block_on(self.store.put(&path, payload)).map(drop).map_err(self.error(name))
    }

    /// Writes an object that must not exist. A retry that finds its own bytes is a success: a put may have
    /// succeeded although its answer was lost.
    ///
    /// # Errors
    /// [`StorageError::AlreadyExists`] when the object exists with other content.
    pub fn create(&self, name: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let (path, bytes) = (self.path(name), bytes.into());
        let options = PutOptions::from(PutMode::Create);
        match runtime().block_on(self.store.put_opts(&path, bytes.clone().into(), options)) {
            Ok(_) => Ok(()),
            // Also for an error whose outcome is unknown: the object decides.
            Err(error) => match self.get(name) {
                Ok(stored) if stored == bytes => Ok(()),
                Ok(_) => Err(StorageError::AlreadyExists { uri: self.uri_of(name) }),
                Err(_) => Err(self.error(name)(error)),
            },
        }
    }

    /// All objects below the prefix, by name.
    ///
    /// # Errors
    /// What the store says; a missing folder is an empty list.
    pub fn list(&self) -> Result<Vec<Entry>> {
        let listing = self.store.list(Some(&self.prefix)).try_collect::<Vec<_>>();
        let metas = match runtime().block_on(listing) {
            Ok(metas) => metas,
            Err(object_store::Error::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(self.error("")(error)),
        };
        let mut entries: Vec<Entry> =
            metas.iter().map(|meta| entry(self.relative(&meta.location), meta)).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Names of the folders directly below the prefix, in order.
    ///
    /// # Errors
    /// What the store says; a missing folder is an empty list.
    pub fn folders(&self) -> Result<Vec<String>> {
        let listing = match runtime().block_on(self.store.list_with_delimiter(Some(&self.prefix))) {
            Ok(listing) => listing,
            Err(object_store::Error::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(self.error("")(error)),
        };
        let mut names: Vec<String> = listing.common_prefixes.iter().map(|path| self.relative(path)).collect();
        names.sort();
        Ok(names)
    }

    fn relative(&self, path: &Path) -> String {
        let prefix = self.prefix.as_ref();
        path.as_ref().strip_prefix(prefix).unwrap_or(path.as_ref()).trim_start_matches('/').to_owned()
    }

    /// Deletes an object; one that does not exist is fine.
    ///
    /// # Errors
    /// What the store says.
    pub fn delete(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        match runtime().block_on(self.store.delete(&path)) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error(name)(error)),
        }
    }

    /// Deletes everything below the prefix.
    ///
    /// # Errors
    /// What the store says.
    pub fn delete_all(&self) -> Result<()> {
        if let Some(local) = &self.local {
            return self.delete_folder(local);
        }
        let paths = self.store.list(Some(&self.prefix)).map_ok(|meta| meta.location).boxed();
        let deleted = self.store.delete_stream(paths).try_for_each(|_| async { Ok(()) });
        runtime().block_on(deleted).map_err(self.error(""))
    }

    /// On a file system a listing hides what an interrupted write left, so the folder goes as a whole.
    fn delete_folder(&self, local: &LocalFileSystem) -> Result<()> {
        let folder = local.path_to_filesystem(&self.prefix).map_err(self.error(""))?;
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StorageError::Store {
                uri: self.uri.clone(),
                source: object_store::Error::Generic { store: "local", source: Box::new(error) },
            }),
            _ => Ok(()),
        }
    }

    /// Reads an object piece by piece.
    ///
    /// # Errors
    /// [`StorageError::NotFound`], or what the store says.
    pub fn reader(&self, name: &str) -> Result<ObjectReader> {
        let Some(entry) = self.head(name)? else {
            return Err(StorageError::NotFound { uri: self.uri_of(name) });
        };
        Ok(ObjectReader::new(self, name, entry.bytes))
    }

    /// Writes an object piece by piece; it appears when [`ObjectWriter::finish`] succeeds, and not otherwise.
    ///
    /// # Errors
    /// What the store says.
    pub fn writer(&self, name: &str) -> Result<ObjectWriter> {
        ObjectWriter::new(self, name)
    }
}

fn entry(name: String, meta: &ObjectMeta) -> Entry {
    let version = meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_rfc3339());
    Entry { name, bytes: meta.size, version }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};

    fn storage() -> (tempfile::TempDir, Storage) {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::open(folder.path().to_str().unwrap(), &StorageOptions::default()).unwrap();
        (folder, storage)
    }

    #[test]
    fn writes_lists_reads_and_deletes() {
        let (_folder, storage) = storage();
        let sub = storage.join("a/b");
        sub.put("x.txt", "hello").unwrap();
        assert_eq!(storage.get("a/b/x.txt").unwrap(), "hello");
        assert_eq!(storage.list().unwrap()[0].name, "a/b/x.txt");
        assert_eq!(storage.join("a").folders().unwrap(), ["b"]);
        assert_eq!(storage.get_range("a/b/x.txt", 1..3).unwrap(), "el");
        sub.delete_all().unwrap();
        assert!(storage.head("a/b/x.txt").unwrap().is_none());
        assert!(sub.list().unwrap().is_empty());
    }

    #[test]
    fn local_addresses_are_those_of_a_shell() {
        assert_eq!(local_path("file:///a/b/../c/./d").unwrap(), PathBuf::from("/a/c/d"));
        assert_eq!(local_path("/../a/").unwrap(), PathBuf::from("/a"));
        let here = std::env::current_dir().unwrap();
        assert_eq!(local_path("file://./a").unwrap(), here.join("a"));
        assert_eq!(local_path("../a").unwrap(), here.parent().unwrap().join("a"));
    }

    #[test]
    fn the_jobs_endpoint_wins_over_the_environments_and_http_is_meant() {
        let environment = || {
            let pairs = [("AWS_ENDPOINT_URL", "http://elsewhere:9000"), ("AWS_ACCESS_KEY_ID", "key")];
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter()
        };
        let has = |settings: &[(String, String)], key: &str, value: &str| {
            settings.iter().any(|(k, v)| k == key && v == value)
        };
        let from_environment = settings(environment(), "s3://bucket", &StorageOptions::default());
        assert!(has(&from_environment, "aws_endpoint_url", "http://elsewhere:9000"));
        assert!(has(&from_environment, "aws_allow_http", "true"));

        let options =
            StorageOptions { endpoint: Some("https://s3.example".to_owned()), region: Some("eu".to_owned()) };
        let from_job = settings(environment(), "s3://bucket", &options);
        assert!(has(&from_job, "aws_endpoint", "https://s3.example"));
        assert!(has(&from_job, "aws_access_key_id", "key"));
        assert!(has(&from_job, "aws_region", "eu"));
        assert!(!from_job.iter().any(|(key, _)| key == "aws_endpoint_url" || key == "aws_allow_http"));
    }

    #[test]
    fn create_refuses_other_content_and_accepts_its_own() {
        let (_folder, storage) = storage();
        storage.create("m", "one").unwrap();
        storage.create("m", "one").unwrap();
        assert!(matches!(storage.create("m", "two"), Err(StorageError::AlreadyExists { .. })));
        assert_eq!(storage.get("m").unwrap(), "one");
    }

    #[test]
    fn a_streamed_object_appears_only_when_finished() {
        let (_folder, storage) = storage();
        let content: Vec<u8> = (0..20_000_000u32).map(|i| (i % 251) as u8).collect();
        let mut dropped = storage.writer("big").unwrap();
        dropped.write_all(&content).unwrap();
        drop(dropped);
        assert!(storage.head("big").unwrap().is_none());
        let mut writer = storage.writer("big").unwrap();
        writer.write_all(&content).unwrap();
        writer.finish().unwrap();
        let mut reader = storage.reader("big").unwrap();
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read == content);
        reader.seek(SeekFrom::End(-3)).unwrap();
        let mut tail = Vec::new();
        reader.read_to_end(&mut tail).unwrap();
        assert_eq!(tail, content[content.len() - 3..]);
        // Wherever it jumps, and whatever was asked for ahead.
        let mut piece = vec![0; 1000];
        for start in [0, 8_388_000, 8_388_608, 16_777_000, 100, 8_389_000, 16_777_216, 1] {
            reader.seek(SeekFrom::Start(start as u64)).unwrap();
            reader.read_exact(&mut piece).unwrap();
            assert!(piece == content[start..start + 1000], "{start}");
        }
    }

    /// More often than object_store's default would bear.
    #[test]
    fn a_store_that_is_away_is_waited_for() {
        const LOST: usize = 12;
        // As the program does when it starts.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            for connection in listener.incoming().skip(LOST).take(1) {
                let mut connection = connection.unwrap();
                let mut request = [0; 4096];
                assert!(connection.read(&mut request).unwrap() > 0);
                connection.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").unwrap();
            }
        });
        let storage = Storage::open(&format!("http://{address}/runs"), &StorageOptions::default()).unwrap();
        let error = storage.get("nothing").unwrap_err();
        assert!(error.to_string().contains("nothing does not exist"), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn a_missing_object_is_named() {
        let (_folder, storage) = storage();
        let error = storage.get("nothing").unwrap_err();
        assert!(error.to_string().contains("nothing does not exist"), "{error}");
    }
}

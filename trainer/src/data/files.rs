//! Which files a source means.

use super::{DataError, Result, field_error};
use crate::storage::{Entry, Storage, StorageError, StorageOptions};
use bytes::Bytes;
use globset::{GlobBuilder, GlobMatcher};
use growth_crds::spec::data::{DataFormat, DataSource};
use serde::Serialize;

/// Keeps the order of a sample apart from other uses of blake3.
const SAMPLE_CONTEXT: &str = "growth-operator 2026-11 sample of files";

/// The files of one source, by name.
#[derive(Debug)]
pub(super) struct SourceFiles {
    /// Path of the source in the job, such as `spec.data.train[0]`.
    pub field: String,
    pub source: DataSource,
    pub storage: Storage,
    pub files: Vec<Entry>,
}

/// What identifies a source's text, for the digest of the dataset.
#[derive(Serialize)]
pub(super) struct SourceIdentity<'a> {
    uri: &'a str,
    format: Option<DataFormat>,
    field: &'a str,
    max_bytes: Option<u64>,
    files: Vec<(&'a str, u64, &'a str)>,
}

impl SourceFiles {
    /// Lists a source. The seed decides which files a sample takes.
    pub fn list(field: String, source: &DataSource, options: &StorageOptions, seed: u64) -> Result<Self> {
        let address =
            Address::parse(&source.uri).map_err(|reason| field_error(format!("{field}.uri"), reason))?;
        let found = Storage::open(&address.folder, options).and_then(|storage| {
            let files = address.find(&storage)?;
            Ok((storage, files))
        });
        let (storage, mut files) = found.map_err(|error| not_found(&field, &source.uri, error))?;
        if files.is_empty() {
            let reason = format!("no file below {} matches {}; check the pattern", storage.uri(), source.uri);
            return Err(field_error(format!("{field}.uri"), reason));
        }
        if let Some(limit) = source.max_bytes {
            sample(&mut files, limit.0, seed);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { field, source: source.clone(), storage, files })
    }

    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    pub fn identity(&self) -> SourceIdentity<'_> {
        let source = &self.source;
        SourceIdentity {
            uri: &source.uri,
            format: source.format,
            field: &source.field,
            max_bytes: source.max_bytes.map(|bytes| bytes.0),
            files: self.files.iter().map(|file| (&*file.name, file.bytes, &*file.version)).collect(),
        }
    }
}

/// The content of the one file that a URI names.
pub(super) fn get(uri: &str, options: &StorageOptions) -> std::result::Result<Bytes, String> {
    let address = Address::parse(uri)?;
    let Name::File(name) = address.name else {
        return Err(format!("{uri} is a pattern; name one file"));
    };
    let content = Storage::open(&address.folder, options).and_then(|storage| storage.get(&name));
    content.map_err(|error| error.to_string())
}

fn not_found(field: &str, uri: &str, error: StorageError) -> DataError {
    let reason = match error {
        StorageError::NotFound { .. } if uri.starts_with("http") => format!("{uri} does not exist"),
        StorageError::NotFound { .. } => {
            format!("{uri} is no file; for a folder write a pattern: {}/**", uri.trim_end_matches('/'))
        }
        error => error.to_string(),
    };
    field_error(format!("{field}.uri"), reason)
}

/// Keeps files in a seeded random order until they hold `limit` bytes.
fn sample(files: &mut Vec<Entry>, limit: u64, seed: u64) {
    files.sort_by_cached_key(|file| random_key(&file.name, seed));
    let mut bytes = 0;
    files.retain(|file| {
        let kept = bytes < limit;
        bytes += file.bytes;
        kept
    });
}

/// The place of a file in a seeded random order.
pub(super) fn random_key(name: &str, seed: u64) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(SAMPLE_CONTEXT);
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    *hasher.finalize().as_bytes()
}

/// A URI as the folder that is opened and what is looked for in it.
#[derive(Debug)]
struct Address {
    folder: String,
    name: Name,
}

#[derive(Debug)]
enum Name {
    File(String),
    Pattern(GlobMatcher),
}

impl Address {
    fn parse(uri: &str) -> std::result::Result<Self, String> {
        let Some((scheme, path)) = uri.split_once("://") else {
            return Err(format!("{uri:?} has no scheme; a local file is file:///folder/file.txt"));
        };
        let web = scheme.starts_with("http");
        if web && path.contains('*') {
            return Err(
                "a web server cannot list its files; name one file, or use file, s3, gs or az".to_owned()
            );
        }
        if web && path.contains('?') {
            return Err(
                "an address with a query is not supported; use one without, or copy the file".to_owned()
            );
        }
        let fixed = path.find('*').unwrap_or(path.len());
        let split = path[..fixed].rfind('/').map_or(0, |slash| slash + 1);
        let (folder, name) = path.split_at(split);
        if scheme != "file" && folder.is_empty() {
            return Err(format!("{uri} names no file; write {scheme}://<bucket>/<file>"));
        }
        if name.is_empty() {
            return Err(format!("{uri} is a folder; write a pattern: {}/**", uri.trim_end_matches('/')));
        }
        let folder = match folder.trim_end_matches('/') {
            "" if folder.is_empty() => ".",
            // The root, or the home folder as storage knows it.
            "" | "~" => folder,
            trimmed => trimmed,
        };
        let name =
            if name.contains('*') { Name::Pattern(pattern(name)?) } else { Name::File(name.to_owned()) };
        Ok(Self { folder: format!("{scheme}://{folder}"), name })
    }

    fn find(&self, storage: &Storage) -> std::result::Result<Vec<Entry>, StorageError> {
        match &self.name {
            Name::File(name) => match storage.head(name)? {
                Some(entry) => Ok(vec![entry]),
                None => Err(StorageError::NotFound { uri: storage.uri_of(name) }),
            },
            Name::Pattern(matcher) => {
                let mut files = storage.list()?;
                files.retain(|file| matcher.is_match(&file.name));
                Ok(files)
            }
        }
    }
}

/// Only `*` and `**` mean more than themselves.
fn pattern(text: &str) -> std::result::Result<GlobMatcher, String> {
    let literal: String =
        text.chars().map(|c| if "?[]{}\\!".contains(c) { format!("\\{c}") } else { c.to_string() }).collect();
    let glob = GlobBuilder::new(&literal).literal_separator(true).backslash_escape(true).build();
    glob.map(|glob| glob.compile_matcher())
        .map_err(|error| format!("{text:?} is no pattern: {}", error.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_and_name(uri: &str) -> (String, bool) {
        let address = Address::parse(uri).unwrap();
        (address.folder, matches!(address.name, Name::Pattern(_)))
    }

    #[test]
    fn an_address_is_a_folder_and_a_name() {
        assert_eq!(folder_and_name("file:///a/b/c.txt"), ("file:///a/b".into(), false));
        assert_eq!(folder_and_name("file:///a.txt"), ("file:///".into(), false));
        assert_eq!(folder_and_name("file://a.txt"), ("file://.".into(), false));
        assert_eq!(folder_and_name("file://~/x/**/*.rs"), ("file://~/x".into(), true));
        assert_eq!(folder_and_name("s3://bucket/a/part-*/x.jsonl"), ("s3://bucket/a".into(), true));
        assert_eq!(folder_and_name("https://host/x/y.txt.gz"), ("https://host/x".into(), false));
    }

    #[test]
    fn addresses_that_mean_nothing_explain_themselves() {
        let reason = |uri| Address::parse(uri).unwrap_err();
        assert!(reason("https://host/*.txt").contains("cannot list"));
        assert!(reason("https://host/a?b").contains("query"));
        assert!(reason("s3://buck*t/a").contains("names no file"));
        assert!(reason("s3://bucket").contains("names no file"));
        assert!(reason("file:///folder/").contains("file:///folder/**"));
        assert!(reason("/a/b").contains("file://"));
    }

    #[test]
    fn stars_match_names_and_two_stars_match_folders() {
        let matches = |text: &str, name: &str| pattern(text).unwrap().is_match(name);
        assert!(matches("*.txt", "a.txt"));
        assert!(!matches("*.txt", "b/a.txt"));
        assert!(matches("**/*.txt", "a.txt"));
        assert!(matches("**/*.txt", "b/c/a.txt"));
        assert!(matches("**", "b/c/a.txt"));
        assert!(matches("[a]{b}?*", "[a]{b}?.txt"));
        assert!(!matches("[a]*", "a.txt"));
    }

    #[test]
    fn a_sample_is_seeded_and_holds_about_the_bytes() {
        let entry = |i: u64| Entry { name: format!("{i}.txt"), bytes: 10, version: String::new() };
        let take = |seed| {
            let mut files: Vec<Entry> = (0..100).map(entry).collect();
            sample(&mut files, 95, seed);
            files.into_iter().map(|file| file.name).collect::<Vec<_>>()
        };
        assert_eq!(take(1).len(), 10);
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
    }
}

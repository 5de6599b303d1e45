//! The tokens of any text, without preparing it.

use super::documents::{Item, Stop};
use super::files::SourceFiles;
use super::pieces::PieceLimits;
use super::{Result, field_error};
use crate::storage::StorageOptions;
use crate::tokenizer::Tokenizer;
use growth_crds::spec::data::DataSource;
use std::sync::atomic::AtomicU64;

/// Up to `max_tokens` tokens of the documents that `source` names, each followed by the tokenizer's separator.
///
/// # Errors
/// When the files cannot be found or read; the message begins with `name`, where the source was written.
pub fn tokens_of(
    name: &str,
    source: &DataSource,
    tokenizer: &Tokenizer,
    max_tokens: usize,
) -> Result<Vec<u32>> {
    let files = SourceFiles::list(name.to_owned(), source, &StorageOptions::default(), 0)?;
    let limits = PieceLimits::for_splitting(tokenizer.splits_at_newlines());
    let consumed = AtomicU64::new(0);
    let mut ids = Vec::new();
    for file in &files.files {
        let read = files.file(file, None, &consumed).read(&mut |item| {
            let Item::Document(document) = item else { return Ok(()) };
            for piece in document.pieces(limits) {
                if ids.len() >= max_tokens {
                    return Err(Stop::Enough);
                }
                ids.extend(tokenizer.encode(&piece?)?);
            }
            ids.push(tokenizer.separator());
            Ok(())
        });
        match read {
            Ok(()) => {}
            Err(Stop::Enough) => break,
            Err(Stop::Failed(error)) => return Err(error),
        }
    }
    ids.truncate(max_tokens);
    match ids.len() {
        0 | 1 => Err(field_error(name, format!("{} holds no text", source.uri))),
        _ => Ok(ids),
    }
}

//! Writes the files that are generated from the types; `--check` only compares.

use growth_crds::generated::{self, GeneratedFile};
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let check = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--check"] => true,
        _ => {
            eprintln!("usage: crdgen [--check]");
            return ExitCode::from(2);
        }
    };
    match run(check) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all files are, or now are, as generated.
fn run(check: bool) -> Result<bool, Box<dyn std::error::Error>> {
    // The files belong to the source tree that this binary was built from.
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut fresh = true;
    for GeneratedFile { path, content } in generated::files(&root)? {
        let file = root.join(path);
        if std::fs::read_to_string(&file).is_ok_and(|stored| stored == content) {
            continue;
        }
        if check {
            eprintln!("{path} is stale; run `cargo run -p growth-crds --bin crdgen`");
            fresh = false;
        } else {
            std::fs::write(&file, content)?;
            eprintln!("wrote {path}");
        }
    }
    Ok(fresh)
}

//! `images`: the project's container images as OCI archives.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use growth_tests::images::{self, Linking, PROGRAMS};
use growth_tests::workspace;

/// Builds the container images from the release binaries, offline, as OCI archives that `cluster load` takes.
///
/// Prints the paths of the archives. The same sources and the same compiler give the same bytes.
#[derive(Parser)]
#[command(name = "images", version)]
struct Cli {
    /// Folder for the archives [default: target/images of the workspace]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Only these programs [default: all]
    #[arg(value_parser = PROGRAMS)]
    programs: Vec<String>,
    /// Only lay out the root file systems here, one folder per program: the Dockerfile's first stage does
    #[arg(long, value_name = "FOLDER", conflicts_with = "out")]
    stage: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let programs = if cli.programs.is_empty() { PROGRAMS.map(String::from).to_vec() } else { cli.programs };
    if let Some(folder) = cli.stage {
        return programs.iter().try_for_each(|program| images::stage(program, &folder, Linking::Static));
    }
    let out = cli.out.unwrap_or_else(|| workspace().join("target/images"));
    for program in programs {
        let started = Instant::now();
        let archive = images::build(&program, &out, Linking::Static)?;
        let bytes = archive.path.metadata()?.len();
        eprintln!(
            "{}@{}: {} in {:.1} s",
            archive.name,
            archive.digest,
            indicatif::HumanBytes(bytes),
            started.elapsed().as_secs_f64()
        );
        print(&archive.path.display().to_string());
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the output of a command")]
fn print(text: &str) {
    println!("{text}");
}

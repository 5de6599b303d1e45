//! The command line of the trainer: a whole job on one machine, or the step that a pod runs.
#![allow(clippy::print_stdout, reason = "a program's answer goes to standard output")]

mod cli;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main()
}

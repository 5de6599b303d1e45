//! What a job may say, what it resolves to, and that all that is generated from the types is fresh. One program: the
//! types and their rules are compiled into it once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod admission;
mod after_growth;
mod cel;
#[path = "../common/mod.rs"]
mod common;
mod examples;
mod generated;
mod masks;
mod properties;
mod resolve;

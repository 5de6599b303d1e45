//! Trains LLaMA models, grows them and goes on training, bit-reproducibly.

pub mod checkpoint;
pub mod collective;
pub mod compare;
pub mod data;
pub mod growth;
pub mod inference;
pub mod job;
pub mod job_file;
pub mod model;
pub mod ops;
pub mod progress;
pub mod random;
pub mod report;
pub mod server;
pub mod storage;
pub mod tokenizer;
pub mod training;

//! Does a checkpoint that is written in the background slow the step after it? Trains the reference step, submits a
//! checkpoint every few steps, and prints one JSON line: the median of the steps during which one is written (its
//! snapshot included), that of the others, and their ratio.
//!
//!     cargo bench -p growth-trainer --bench checkpoint
#![allow(clippy::print_stdout, clippy::expect_used)]

use growth_crds::plan::ModelConfig;
use growth_crds::spec::training::AdamWSpec;
use growth_trainer::checkpoint::{
    AsyncCheckpointer, CheckpointLocation, CheckpointWriter, Retention, TokenIds, TrainingState,
};
use growth_trainer::collective::Alone;
use growth_trainer::storage::{Storage, StorageOptions};
use growth_trainer::training::step::{StepEngine, StepSettings, StepSizes};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps from one checkpoint to the next.
const INTERVAL: u64 = 4;
const STEPS: u64 = 48;
const TOKENS: u32 = 2048;

fn main() {
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().expect("threads start");
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 688,
        num_hidden_layers: 8,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 64,
        vocab_size: 4096,
        max_position_embeddings: 256,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    };
    let tokens = TOKENS as usize;
    let sizes = StepSizes { sequence: 256, micro_batch_tokens: tokens, global_batch_tokens: tokens };
    let mut engine = StepEngine::new(config.clone(), sizes, 0, 1);
    let mut state = TrainingState::zeros(engine.model().layout());
    state.parameters.iter_mut().enumerate().for_each(|(i, p)| *p = 0.02 * ((i % 251) as f32 / 125.0 - 1.0));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut checkpointer = start(&config, folder.path().to_str().expect("a path"));

    let ids: Vec<u32> = (0..TOKENS).map(|i| i * 31 % 4096).collect();
    let adam_w = AdamWSpec::default();
    let settings = StepSettings { adam_w: &adam_w, learning_rate: 3e-4, gradient_clip: 1.0 };
    let (mut during, mut others, mut snapshots) = (Vec::new(), Vec::new(), Vec::new());
    for step in 1..=STEPS {
        let begin = Instant::now();
        let checkpoint = step.is_multiple_of(INTERVAL);
        if checkpoint {
            state.step = step;
            let copied = checkpointer.submit::<std::convert::Infallible>(Vec::new(), |snapshot| {
                snapshot.copy_from(&state, engine.model().layout());
                Ok(())
            });
            if let Ok(Some(Err(error))) = copied {
                eprintln!("{error}");
            }
        }
        snapshots.push(begin.elapsed().as_secs_f64());
        engine.step(&mut Alone, &mut state, &ids, &ids, settings).expect("one rank loses no other");
        let seconds = begin.elapsed().as_secs_f64();
        if step > INTERVAL {
            if checkpoint { during.push(seconds) } else { others.push(seconds) }
        }
    }
    checkpointer.finish().expect("the last checkpoint is written");
    snapshots.sort_by(f64::total_cmp);
    let snapshot = median(snapshots.split_off(snapshots.len() - during.len()));
    let (during, others) = (median(during), median(others));
    println!(
        "{}",
        serde_json::json!({ "checkpoint_step_seconds": during, "snapshot_seconds": snapshot, "other_step_seconds": others, "ratio": during / others })
    );
}

fn start(config: &ModelConfig, folder: &str) -> AsyncCheckpointer {
    let storage = Storage::open(folder, &StorageOptions::default()).expect("a storage");
    let location =
        CheckpointLocation { storage, job: "bench".to_owned(), stage: "stage".to_owned(), attempt: 1 };
    let writer = CheckpointWriter::new(location, config.clone(), TokenIds::default(), Vec::new());
    AsyncCheckpointer::start(writer, Retention { keep_last: 1, ..Retention::default() }, None, None)
        .expect("a thread")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

//! Times one training step on random tokens and prints one JSON line: tokens per second, peak memory, and the
//! tokens per second that the step's matrix products alone would allow (the GEMM limit).
//!
//!     cargo bench -p growth-trainer --bench step -- --layers 8
//!
//! `trainer/benches/compare` runs it beside PyTorch.
#![allow(clippy::print_stdout, clippy::expect_used)]

use clap::Parser;
use growth_crds::plan::ModelConfig;
use growth_crds::spec::training::AdamWSpec;
use growth_trainer::checkpoint::TrainingState;
use growth_trainer::ops::gemm::Output;
use growth_trainer::ops::linear::{self, LinearShape};
use growth_trainer::training::step::{StepEngine, StepSettings};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times a training step; the defaults are the reference step.
#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 256)]
    hidden: u32,
    #[arg(long, default_value_t = 8)]
    layers: u32,
    #[arg(long, default_value_t = 4)]
    heads: u32,
    #[arg(long, default_value_t = 4)]
    kv_heads: u32,
    #[arg(long, default_value_t = 688)]
    intermediate: u32,
    #[arg(long, default_value_t = 4096)]
    vocab: u32,
    #[arg(long, default_value_t = 256)]
    sequence: u32,
    #[arg(long, default_value_t = 8)]
    batch: u32,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Steps before timing starts.
    #[arg(long, default_value_t = 2)]
    warmup: u32,
    /// Timed steps.
    #[arg(long, default_value_t = 8)]
    steps: u32,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let arguments = Arguments::parse();
    rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build_global().expect("threads start");
    let config = ModelConfig {
        hidden_size: arguments.hidden,
        intermediate_size: arguments.intermediate,
        num_hidden_layers: arguments.layers,
        num_attention_heads: arguments.heads,
        num_key_value_heads: arguments.kv_heads,
        head_dim: arguments.hidden / arguments.heads,
        vocab_size: arguments.vocab,
        max_position_embeddings: arguments.sequence,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    };
    let tokens = u64::from(arguments.batch * arguments.sequence);
    let mut engine = StepEngine::new(config.clone(), arguments.sequence, tokens, tokens);
    let mut state = random_state(&engine);
    let ids: Vec<u32> =
        (0..tokens as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) % arguments.vocab).collect();
    let targets: Vec<u32> = ids.iter().cycle().skip(1).take(ids.len()).copied().collect();
    let adam_w = AdamWSpec::default();
    let settings = StepSettings { adam_w: &adam_w, learning_rate: 3e-4, gradient_clip: 1.0 };

    let mut seconds = Vec::new();
    for step in 0..arguments.warmup + arguments.steps {
        let start = Instant::now();
        engine.step(&mut state, &ids, &targets, settings);
        if step >= arguments.warmup {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let limit = gemm_seconds(&config, tokens as usize);
    println!(
        "{}",
        serde_json::json!({
            "tokens_per_second": tokens as f64 / median(&mut seconds.clone()),
            "step_seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "gemm_limit_tokens_per_second": tokens as f64 / limit,
        })
    );
}

fn random_state(engine: &StepEngine) -> TrainingState {
    let len = engine.model().layout().total_len();
    let noise = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5;
    TrainingState {
        step: 0,
        tokens: 0,
        parameters: (0..len).map(|i| 0.07 * noise(i)).collect(),
        exp_avg: vec![0.0; len],
        exp_avg_sq: vec![0.0; len],
        optimizer_step: 0,
    }
}

/// Seconds of the step's linear layers alone, forward and backward, by the same function on the same shapes.
fn gemm_seconds(config: &ModelConfig, rows: usize) -> f64 {
    let (hidden, ffn) = (config.hidden_size as usize, config.intermediate_size as usize);
    let context = (config.num_attention_heads * config.head_dim) as usize;
    let qkv = context + 2 * (config.num_key_value_heads * config.head_dim) as usize;
    let layer = [(hidden, qkv), (context, hidden), (hidden, 2 * ffn), (ffn, hidden)];
    let layers = f64::from(config.num_hidden_layers);
    let of_layers: f64 = layer.iter().map(|&(i, o)| layers * linear_seconds(rows, i, o)).sum();
    of_layers + linear_seconds(rows, hidden, config.vocab_size as usize)
}

fn linear_seconds(rows: usize, inputs: usize, outputs: usize) -> f64 {
    let shape = LinearShape { rows, inputs, outputs };
    let (x, weight, y) = (vec![0.1; rows * inputs], vec![0.1; inputs * outputs], vec![0.1; rows * outputs]);
    let (mut d_x, mut d_weight, mut out) = (x.clone(), weight.clone(), y.clone());
    let mut seconds: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            linear::forward(&mut out, &x, &weight, shape, Output::Overwrite);
            linear::backward_input(&mut d_x, &y, &weight, shape);
            linear::backward_weight(&mut d_weight, &y, &x, shape);
            start.elapsed().as_secs_f64()
        })
        .collect();
    median(&mut seconds)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

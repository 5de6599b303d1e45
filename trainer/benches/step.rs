//! Times one training step on random tokens and prints one JSON line: tokens per second, peak memory, and the
//! tokens per second that the step's matrix products alone would allow (the GEMM limit).
//!
//!     cargo bench -p growth-trainer --bench step -- --layers 8
//!
//! With `--ranks N` it starts N - 1 more processes, which share the step, and also times what goes over the wire by itself.
//! `trainer/benches/compare` runs it beside PyTorch.
#![allow(clippy::print_stdout, clippy::expect_used)]

use clap::Parser;
use growth_crds::plan::ModelConfig;
use growth_crds::spec::training::AdamWSpec;
use growth_trainer::checkpoint::TrainingState;
use growth_trainer::collective::{Alone, Collective, Group, Identity, Secret, meet};
use growth_trainer::ops::gemm::Output;
use growth_trainer::ops::linear::{self, LinearShape};
use growth_trainer::training::step::{StepEngine, StepSettings, StepSizes};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

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
    /// Threads of each rank.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Processes that share the step.
    #[arg(long, default_value_t = 1)]
    ranks: u32,
    /// Forward and backward passes of a step, over all ranks.
    #[arg(long, default_value_t = 1)]
    micro_batches: u32,
    /// The rank of a process that was started by another.
    #[arg(long, hide = true, default_value_t = 0)]
    rank: u32,
    /// Where rank 0 is.
    #[arg(long, hide = true, default_value = "")]
    leader: String,
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
    let config = arguments.config();
    let tokens = arguments.batch * arguments.sequence;
    let sizes = StepSizes {
        sequence: arguments.sequence as usize,
        micro_batch_tokens: (tokens / arguments.micro_batches) as usize,
        global_batch_tokens: tokens as usize,
    };
    let (rank, ranks) = (arguments.rank as usize, arguments.ranks as usize);
    let mut engine = StepEngine::new(config.clone(), sizes, rank, ranks);
    let part_bytes = engine.shards().largest_len() * size_of::<f32>();
    let (mut collective, children) = arguments.join(part_bytes);
    let mut state = random_state(&engine);
    let id = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 7) % arguments.vocab;
    let ids: Vec<u32> = engine.own_tokens().map(id).collect();
    let targets: Vec<u32> = engine.own_tokens().map(|i| id((i + 1) % tokens as usize)).collect();
    let adam_w = AdamWSpec::default();
    let settings = StepSettings { adam_w: &adam_w, learning_rate: 3e-4, gradient_clip: 1.0 };

    let mut seconds = Vec::new();
    let mut waited = collective.waited();
    for step in 0..arguments.warmup + arguments.steps {
        if step == arguments.warmup {
            waited = collective.waited();
        }
        let start = Instant::now();
        engine.step(collective.as_mut(), &mut state, &ids, &targets, settings).expect("no rank is lost");
        if step >= arguments.warmup {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let waited = (collective.waited() - waited).as_secs_f64() / f64::from(arguments.steps);
    let wire = wire_seconds(collective.as_mut(), &engine, &mut state.parameters);
    collective.leave(None);
    for mut child in children {
        assert!(child.wait().expect("a child").success());
    }
    let peak = peak_rss_bytes();
    let limit = if rank == 0 && ranks == 1 { gemm_seconds(&config, tokens as usize) } else { f64::INFINITY };
    println!(
        "{}",
        serde_json::json!({
            "tokens_per_second": f64::from(tokens) / median(&mut seconds.clone()),
            "step_seconds": seconds,
            "waited_seconds": waited,
            "wire_seconds": wire,
            "copy_seconds": copy_seconds(part_bytes * 2 * (ranks - 1)),
            "peak_rss_bytes": peak,
            "gemm_limit_tokens_per_second": f64::from(tokens) / limit,
        })
    );
}

impl Arguments {
    fn config(&self) -> ModelConfig {
        ModelConfig {
            hidden_size: self.hidden,
            intermediate_size: self.intermediate,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.hidden / self.heads,
            vocab_size: self.vocab,
            max_position_embeddings: self.sequence,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
        }
    }

    /// Starts the other ranks, or joins them.
    fn join(&self, part_bytes: usize) -> (Box<dyn Collective>, Vec<Child>) {
        if self.ranks == 1 {
            return (Box::new(Alone), Vec::new());
        }
        const SECRET: &str = "GROWTH_BENCH_SECRET";
        let listener = (self.rank == 0).then(|| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let leader = listener.as_ref().map_or_else(
            || self.leader.clone(),
            |listener| listener.local_addr().expect("an address").to_string(),
        );
        let secret = match std::env::var(SECRET) {
            Ok(text) => Secret::from_hex(&text).expect("a secret"),
            Err(_) => Secret::random().expect("a secret"),
        };
        let others = if self.rank == 0 { 1..self.ranks } else { 0..0 };
        let start = |rank: u32| {
            let mut command = Command::new(std::env::current_exe().expect("this program"));
            command.args(std::env::args().skip(1)).args(["--rank", &rank.to_string(), "--leader", &leader]);
            command.env(SECRET, secret.to_hex()).stdout(Stdio::null()).spawn().expect("a process")
        };
        let children = others.map(start).collect();
        let group = Group {
            rank: self.rank as usize,
            world_size: self.ranks as usize,
            leader: leader.clone(),
            identity: Identity("bench".to_owned()),
            secret: secret.clone(),
            patience: Duration::from_secs(60),
            part_bytes,
        };
        let mesh = meet(&group, listener, &|_| (), &|| None).expect("the ranks meet");
        (Box::new(mesh), children)
    }
}

/// Seconds of the reduce-scatter and the all-gather of a step by themselves.
fn wire_seconds(collective: &mut dyn Collective, engine: &StepEngine, values: &mut [f32]) -> f64 {
    let once = |_| {
        collective.barrier().expect("no rank is lost");
        let begin = Instant::now();
        let buckets = engine.shards().buckets();
        buckets.iter().for_each(|b| collective.start_reduce_scatter(values, &b.slices).expect("sent"));
        buckets.iter().for_each(|b| collective.finish_reduce_scatter(values, &b.slices).expect("summed"));
        buckets.iter().for_each(|b| collective.start_all_gather(values, &b.slices).expect("sent"));
        buckets.iter().for_each(|b| collective.finish_all_gather(values, &b.slices).expect("received"));
        begin.elapsed().as_secs_f64()
    };
    median(&mut (0..7).map(once).collect::<Vec<_>>())
}

/// Seconds in which one thread copies so many bytes in memory.
fn copy_seconds(bytes: usize) -> f64 {
    let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
    let once = |_| {
        let begin = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        begin.elapsed().as_secs_f64()
    };
    median(&mut (0..7).map(once).collect::<Vec<_>>())
}

fn random_state(engine: &StepEngine) -> TrainingState {
    let (len, own) = (engine.model().layout().total_len(), engine.shards().own_len());
    let noise = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5;
    TrainingState {
        step: 0,
        tokens: 0,
        parameters: (0..len).map(|i| 0.07 * noise(i)).collect(),
        exp_avg: vec![0.0; own],
        exp_avg_sq: vec![0.0; own],
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

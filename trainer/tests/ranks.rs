//! Ranks that train together end in the bits of one that trains alone, whatever happens to them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Folder, JOB, read_json, stderr};
use growth_crds::plan::ModelConfig;
use growth_crds::plan::ranks::possible_sizes;
use growth_crds::spec::training::AdamWSpec;
use growth_trainer::collective::{Alone, Collective, Group, Identity, Secret, meet};
use growth_trainer::model::initializer::initialize;
use growth_trainer::training::step::{StepEngine, StepReport, StepSettings, StepSizes, TrainingState};
use proptest::prelude::*;
use std::net::TcpListener;
use std::time::Duration;

/// Runs `work` on every rank of a world, each a thread; results by rank.
fn together<T: Send>(world_size: usize, work: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let leader = listener.local_addr().unwrap().to_string();
    let secret = Secret::random().unwrap();
    let mut listener = Some(listener);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                let group = Group {
                    rank,
                    world_size,
                    leader: leader.clone(),
                    identity: Identity("test".to_owned()),
                    secret: secret.clone(),
                    patience: Duration::from_secs(60),
                    part_bytes: 1 << 22,
                };
                let (listener, work) = (listener.take(), &work);
                scope.spawn(move || {
                    let mut mesh = meet(&group, listener, &|_| (), &|| None).unwrap();
                    let result = work(&mut mesh);
                    mesh.leave(None);
                    result
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// What a rank ends with: weights, moments of its part and where they belong, reports, validation loss.
struct Trained {
    state: TrainingState,
    parts: Vec<std::ops::Range<usize>>,
    reports: Vec<StepReport>,
    validation: f64,
}

fn train(collective: &mut dyn Collective, config: &ModelConfig, sizes: StepSizes, steps: u32) -> Trained {
    let mut engine = StepEngine::new(config.clone(), sizes, collective.rank(), collective.world_size());
    let moments = vec![0.0; engine.shards().own_len()];
    let parameters = initialize(config, growth_crds::plan::Initializer::HuggingFace, 3);
    let mut state = TrainingState {
        parameters,
        exp_avg: moments.clone(),
        exp_avg_sq: moments,
        ..TrainingState::default()
    };
    let token = |step: u32, i: usize| (i as u32 * 31 + step * 17 + 5) % config.vocab_size;
    let own = engine.own_tokens();
    let adam_w = AdamWSpec::default();
    let settings = StepSettings { adam_w: &adam_w, learning_rate: 1e-2, gradient_clip: 0.5 };
    let reports = (0..steps).map(|step| {
        let ids: Vec<u32> = own.clone().map(|i| token(step, i)).collect();
        let targets: Vec<u32> = own.clone().map(|i| token(step, i + 1)).collect();
        engine.step(collective, &mut state, &ids, &targets, settings).unwrap()
    });
    let reports = reports.collect();
    let ids: Vec<u32> = (0..5 * sizes.sequence).map(|i| token(99, i)).collect();
    let targets: Vec<u32> = (0..5 * sizes.sequence).map(|i| token(99, i + 1)).collect();
    let validation = engine.evaluate(collective, &state.parameters, &ids, &targets).unwrap();
    let rank = collective.rank();
    let parts = engine.shards().buckets().iter().map(|bucket| bucket.slices[rank].clone()).collect();
    Trained { state, parts, reports, validation }
}

/// Bits of a whole vector of moments, put together from the parts of all ranks.
fn whole(ranks: &[Trained], moments: impl Fn(&TrainingState) -> &Vec<f32>) -> Vec<u32> {
    let mut whole = vec![u32::MAX; ranks[0].state.parameters.len()];
    for rank in ranks {
        let mut numbers = moments(&rank.state).iter();
        for part in rank.parts.clone() {
            part.for_each(|element| whole[element] = numbers.next().unwrap().to_bits());
        }
        assert!(numbers.next().is_none());
    }
    whole
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_number_of_ranks_computes_the_same_bits(
        hidden in 8u32..70, layers in 1u32..4, tied: bool, micro_batches in 1usize..13, per_micro_batch in 1usize..3,
    ) {
        let config = ModelConfig {
            hidden_size: hidden,
            intermediate_size: 2 * hidden + 1,
            num_hidden_layers: layers,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 6,
            vocab_size: 97,
            max_position_embeddings: 64,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: tied,
        };
        let micro_batch_tokens = 12 * per_micro_batch;
        let global_batch_tokens = micro_batch_tokens * micro_batches;
        let sizes = StepSizes { sequence: 12, micro_batch_tokens, global_batch_tokens };
        let alone = [train(&mut Alone, &config, sizes, 3)];
        for world_size in possible_sizes(micro_batches as u64, 2..7, true) {
            let ranks = together(world_size as usize, |collective| train(collective, &config, sizes, 3));
            for rank in &ranks {
                prop_assert_eq!(bits(&rank.state.parameters), bits(&alone[0].state.parameters), "{} ranks", world_size);
                prop_assert_eq!(&rank.reports, &alone[0].reports);
                prop_assert_eq!(rank.validation, alone[0].validation);
            }
            prop_assert!(whole(&ranks, |state| &state.exp_avg) == whole(&alone, |state| &state.exp_avg));
            prop_assert!(whole(&ranks, |state| &state.exp_avg_sq) == whole(&alone, |state| &state.exp_avg_sq));
        }
    }
}

#[test]
fn other_numbers_of_ranks_come_close_and_repeat_themselves() {
    let config = ModelConfig {
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        vocab_size: 97,
        max_position_embeddings: 64,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    };
    let sizes = StepSizes { sequence: 12, micro_batch_tokens: 12, global_batch_tokens: 60 };
    let alone = train(&mut Alone, &config, sizes, 3);
    let once = together(3, |collective| train(collective, &config, sizes, 3));
    let again = together(3, |collective| train(collective, &config, sizes, 3));
    assert!(once[0].state.parameters == again[2].state.parameters);
    let difference = once[0].state.parameters.iter().zip(&alone.state.parameters).map(|(a, b)| (a - b).abs());
    let largest = difference.fold(0.0, f32::max);
    // One step of AdamW moves a parameter by about the learning rate, 1e-2.
    assert!(largest > 0.0 && largest < 2e-3, "{largest}");
}

#[test]
fn memory_of_a_rank_is_what_the_plan_says() {
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 688,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 64,
        vocab_size: 4096,
        max_position_embeddings: 256,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    };
    let sizes = StepSizes { sequence: 64, micro_batch_tokens: 64, global_batch_tokens: 512 };
    for world_size in [1, 2, 4, 8] {
        let predicted = config.memory(64, 8, world_size as u64);
        for rank in 0..world_size {
            let engine = StepEngine::new(config.clone(), sizes, rank, world_size);
            let moments = 2 * size_of::<f32>() * engine.shards().own_len();
            let found = engine.bytes() + moments as u64;
            let expected =
                predicted.activations_bytes + predicted.gradients_bytes + predicted.optimizer_bytes;
            let ratio = found as f64 / expected as f64;
            println!(
                "{world_size} ranks: {found} bytes, of which {moments} moments; plan / found {ratio:.4}"
            );
            // Slices end at whole units.
            assert!((0.98..1.02).contains(&ratio), "rank {rank} of {world_size}: {ratio}");
        }
    }
}

/// State digests of both stages.
fn digests(folder: &Folder) -> [String; 2] {
    ["small", "large"].map(|stage| folder.final_state(stage))
}

#[test]
fn a_job_on_several_processes_ends_in_the_same_bits() {
    let alone = Folder::new(JOB);
    alone.run_ok(&["run", "job.yaml"]);
    for ranks in ["2", "4"] {
        let folder = Folder::new(JOB);
        let output = folder.run(&["run", "job.yaml", "--ranks", ranks]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(digests(&folder), digests(&alone), "{ranks} ranks");
        assert!(!stderr(&output).contains("warning"), "{}", stderr(&output));
    }
    let folder = Folder::new(&JOB.replace("factor: 2}", "factor: 2}\n    replicas: 2"));
    folder.run_ok(&["run", "job.yaml"]);
    assert_eq!(digests(&folder), digests(&alone), "the job's own replicas");
    let manifest = folder.checkpoints("large").pop().unwrap().join("manifest.json");
    assert!(read_json(&manifest)["objects"].as_array().unwrap().len() > 4);
}

#[test]
fn a_number_that_cannot_share_is_refused_before_any_work() {
    let folder = Folder::new(JOB);
    let output = folder.run(&["run", "job.yaml", "--ranks", "3"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("possible are 1, 2, 4"), "{}", stderr(&output));
    let folder = Folder::new(&JOB.replace("factor: 2}", "factor: 2}\n    replicas: 8"));
    let output = folder.run(&["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("spec.stages[1].replicas"), "{}", stderr(&output));
}

/// What can happen to a running job.
#[cfg(target_os = "linux")]
mod disturbed {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
    use std::collections::BTreeMap;
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    /// A signal to one process, or a pause of it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Disturbance {
        Kill,
        Terminate,
        Pause,
    }

    fn signal(name: &str, process: u32) {
        // A process that has ended in the meantime is beyond harm.
        let _ =
            Command::new("kill").args([name, &process.to_string()]).stderr(Stdio::null()).status().unwrap();
    }

    /// The ranks that the process has started.
    fn children(process: u32) -> Vec<u32> {
        let list = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
        list.unwrap_or_default().split_whitespace().map(|id| id.parse().unwrap()).collect()
    }

    fn start(folder: &Folder, ranks: &str) -> Child {
        let mut command = folder.command(&["run", "job.yaml", "--quiet", "--threads", "2", "--ranks", ranks]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Waits for the end of a process; it must come.
    fn wait(child: &mut Child, within: Duration, what: &str) {
        let deadline = Instant::now() + within;
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "{what}: it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lives of one job with another number of ranks each, until `hits` disturbances have met a running rank.
    fn disturb(hits: usize, seed: u64) -> BTreeMap<Disturbance, usize> {
        let alone = Folder::new(JOB);
        let begin = Instant::now();
        alone.run_ok(&["run", "job.yaml"]);
        let duration = begin.elapsed() * 2;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut met = BTreeMap::new();
        while met.values().sum::<usize>() < hits {
            let folder = Folder::new(JOB);
            for life in 0..random.random_range(2..7) {
                let ranks = ["1", "2", "4"][random.random_range(0..3)];
                let mut child = start(&folder, ranks);
                // The point in time is what this test varies; nothing waits for it.
                std::thread::sleep(duration.mul_f64(random.random_range(0.02..0.9)));
                let mut victims = children(child.id());
                victims.push(child.id());
                let victim = victims[random.random_range(0..victims.len())];
                let kinds =
                    [Disturbance::Kill, Disturbance::Kill, Disturbance::Terminate, Disturbance::Pause];
                let kind = kinds[random.random_range(0..4)];
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                *met.entry(kind).or_default() += 1;
                match kind {
                    Disturbance::Kill => signal("-KILL", victim),
                    Disturbance::Terminate => signal("-TERM", victim),
                    Disturbance::Pause => {
                        signal("-STOP", victim);
                        std::thread::sleep(Duration::from_millis(random.random_range(10..400)));
                        signal("-CONT", victim);
                        continue_or_end(&mut child, &mut random, duration);
                    }
                }
                let within = Duration::from_secs(60);
                wait(&mut child, within, &format!("seed {seed}, life {life}, {ranks} ranks, {kind:?}"));
                for rank in victims {
                    // A rank that lost its parent ends by itself within ten seconds, and must not write meanwhile.
                    let deadline = Instant::now() + Duration::from_secs(15);
                    while runs(rank) {
                        assert!(Instant::now() < deadline, "rank process {rank} stays");
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
            }
            folder.run_ok(&["run", "job.yaml", "--quiet"]);
            assert_eq!(digests(&folder), digests(&alone), "seed {seed}, {met:?}");
        }
        met
    }

    /// After a pause it goes on; it is left to its end, or ended with a signal of its own.
    fn continue_or_end(child: &mut Child, random: &mut ChaCha8Rng, duration: Duration) {
        if random.random_range(0..2) == 0 {
            std::thread::sleep(duration.mul_f64(random.random_range(0.0..0.3)));
            signal("-TERM", child.id());
        }
    }

    fn runs(process: u32) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // A zombie has ended.
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
    }

    #[test]
    fn whatever_happens_to_any_rank_the_job_ends_in_the_same_bits() {
        println!("{:?}", disturb(20, 1));
    }

    #[test]
    #[ignore = "long: half an hour"]
    fn a_thousand_disturbances_end_in_the_same_bits() {
        let mut all: BTreeMap<Disturbance, usize> = BTreeMap::new();
        for seed in 2..12 {
            for (kind, count) in disturb(100, seed) {
                *all.entry(kind).or_default() += count;
            }
        }
        println!("{all:?}");
    }

    #[test]
    fn grown_and_shrunk_in_order_it_ends_in_the_same_bits() {
        let alone = Folder::new(JOB);
        alone.run_ok(&["run", "job.yaml"]);
        let folder = Folder::new(JOB);
        for ranks in ["1", "4", "2", "1"] {
            let newest = || [folder.checkpoints("small"), folder.checkpoints("large")];
            let before = newest();
            let mut child = start(&folder, ranks);
            let deadline = Instant::now() + Duration::from_secs(60);
            while newest() == before && child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "{ranks} ranks write no checkpoint");
                std::thread::yield_now();
            }
            signal("-TERM", child.id());
            let status = child.wait().unwrap();
            assert!(status.code() == Some(130) || status.success(), "{ranks} ranks: {status}");
        }
        folder.run_ok(&["run", "job.yaml", "--ranks", "4"]);
        assert_eq!(digests(&folder), digests(&alone));
    }

    #[test]
    fn a_lost_rank_ends_the_others_within_ten_seconds() {
        let folder = Folder::new(&JOB.replace("tokens: 20480", "tokens: 20480000"));
        for silent in [false, true] {
            let mut command = folder.command(&["run", "job.yaml", "--quiet", "--ranks", "2"]);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            let known = folder.checkpoints("small");
            while folder.checkpoints("small") == known {
                assert!(Instant::now() < deadline, "no checkpoint appeared");
                std::thread::yield_now();
            }
            let rank = children(child.id())[0];
            signal(if silent { "-STOP" } else { "-KILL" }, rank);
            let begin = Instant::now();
            wait(&mut child, Duration::from_secs(20), "rank 0");
            assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
            assert!(stderr(&output).contains("rank 1 is lost"), "{}", stderr(&output));
        }
    }
}

//! Ranks that train together compute the bits of one that trains alone.
#![allow(clippy::unwrap_used)]

use super::step::{StepEngine, StepReport, StepSettings, StepSizes, TrainingState};
use crate::collective::testing::together;
use crate::collective::{Alone, Collective};
use crate::model::initializer::initialize;
use crate::model::mask::WeightMasks;
use growth_crds::plan::ranks::possible_sizes;
use growth_crds::plan::{
    GrowthOperator, GrowthPlan, Initializer, ModelConfig, NewLayersPlan, OptimizerStatePolicy, WidthMap,
    WidthPlan, WidthRule,
};
use growth_crds::spec::training::AdamWSpec;
use proptest::prelude::*;

fn small() -> ModelConfig {
    ModelConfig {
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
    }
}

/// What a rank ends with: weights, moments of its part and where they belong, reports, validation loss.
struct Trained {
    state: TrainingState,
    parts: Vec<std::ops::Range<usize>>,
    reports: Vec<StepReport>,
    validation: f64,
}

fn train(collective: &mut dyn Collective, config: &ModelConfig, sizes: StepSizes, steps: u32) -> Trained {
    train_masked(collective, config, sizes, steps, None)
}

/// As if `growth` had made the model, in the ramp of its masks.
fn train_masked(
    collective: &mut dyn Collective,
    config: &ModelConfig,
    sizes: StepSizes,
    steps: u32,
    growth: Option<&GrowthPlan>,
) -> Trained {
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
        let masks = growth.map(|growth| growth.masks(u64::from(step) + 1, 7));
        let masks = growth
            .zip(masks)
            .map(|(growth, masks)| WeightMasks::new(engine.model().layout(), config, growth, &masks));
        engine.set_masks(masks);
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

/// So the position in the data is exact in tokens, whatever changes between attempts or stages.
#[test]
fn a_step_is_shared_without_gap_or_overlap() {
    for (micro_batch_tokens, ranks) in [(8, 1), (16, 1), (64, 1), (8, 2), (8, 8), (16, 4), (32, 2)] {
        let sizes = StepSizes { sequence: 8, micro_batch_tokens, global_batch_tokens: 64 };
        let own = |rank| StepEngine::new(small(), sizes, rank, ranks).own_tokens();
        let all: Vec<usize> = (0..ranks).flat_map(own).collect();
        assert_eq!(all, (0..64).collect::<Vec<_>>(), "{micro_batch_tokens} tokens, {ranks} ranks");
    }
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
            tie_word_embeddings: tied,
            ..small()
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

/// The growth that could have made the model of half of everything.
fn random_growth(config: &ModelConfig) -> GrowthPlan {
    let half = |size: u32| WidthMap::pad(size.div_ceil(2), size);
    let (initializer, seed) = (Initializer::HuggingFace, 3);
    let old = config.num_hidden_layers.div_ceil(2);
    let count = config.num_hidden_layers - old;
    GrowthPlan {
        from_stage: "small".to_owned(),
        operator: GrowthOperator::RandomWidth,
        layers: (0..old).collect(),
        learn: None,
        new_layers: (count > 0).then_some(NewLayersPlan { count, initializer, seed }),
        zero_output: Vec::new(),
        width: Some(Box::new(WidthPlan {
            hidden: half(config.hidden_size),
            heads: half(config.num_attention_heads),
            key_value_heads: half(config.num_key_value_heads),
            intermediate: half(config.intermediate_size),
            rule: WidthRule::Random { initializer, seed, rms_norm_eps: config.rms_norm_eps },
        })),
        noise: None,
        optimizer_state: OptimizerStatePolicy::Reset,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn any_number_of_ranks_computes_the_same_bits_with_masks(
        hidden in 8u32..70, layers in 1u32..4, tied: bool, micro_batches in 2usize..9,
    ) {
        let config = ModelConfig {
            hidden_size: hidden,
            intermediate_size: 2 * hidden + 1,
            num_hidden_layers: layers,
            tie_word_embeddings: tied,
            ..small()
        };
        let growth = random_growth(&config);
        let sizes = StepSizes { sequence: 12, micro_batch_tokens: 12, global_batch_tokens: 12 * micro_batches };
        // Eight steps: the masks of all kinds rise, and the last step has none.
        let run = |collective: &mut dyn Collective| train_masked(collective, &config, sizes, 8, Some(&growth));
        let alone = [run(&mut Alone)];
        prop_assert!(alone[0].state.parameters != train(&mut Alone, &config, sizes, 8).state.parameters);
        for world_size in possible_sizes(micro_batches as u64, 2..5, true) {
            let ranks = together(world_size as usize, run);
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
    let config = small();
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
        num_key_value_heads: 4,
        head_dim: 64,
        vocab_size: 4096,
        max_position_embeddings: 256,
        ..small()
    };
    let sizes = StepSizes { sequence: 64, micro_batch_tokens: 64, global_batch_tokens: 512 };
    for world_size in [1, 2, 4, 8] {
        let predicted = config.memory(64, 8, world_size as u64);
        for rank in 0..world_size {
            let mut engine = StepEngine::new(config.clone(), sizes, rank, world_size);
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
            let plain = engine.bytes();
            let (growth, layout) = (random_growth(&config), engine.model().layout().clone());
            engine.set_masks(Some(WeightMasks::new(&layout, &config, &growth, &growth.masks(1, 2))));
            let masked = predicted.with_masks();
            let ratio = (engine.bytes() - plain) as f64 / masked.masked_weights_bytes as f64;
            assert!((1.0..1.02).contains(&ratio), "rank {rank} of {world_size}, masks: {ratio}");
            assert_eq!(masked.total_bytes, predicted.total_bytes + masked.masked_weights_bytes);
        }
    }
}

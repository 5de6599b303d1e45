//! Growth operators on whole models: what they do to the function, to the gradients and to the moments, against a
//! LLaMA in f64.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod depth;
mod fixtures;
mod noise;
#[allow(dead_code, reason = "the autograd is for other tests")]
#[path = "../reference/mod.rs"]
mod reference;
mod width;

use fixtures::{Folder, Model, Training, base, grow, resolve, sizes, spec, tied, tokens};
use growth_crds::plan::growth::GrowthEffect;
use growth_crds::plan::{CheckpointGrowth, ModelConfig, resolve_checkpoint_growth};
use growth_crds::protocol::GrowthSample;
use growth_crds::spec::model::ModelSpec;
use growth_trainer::growth::Measure;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Every operator, with the sizes it needs, and what it does to the function.
fn growths() -> Vec<(&'static str, Value, Value, GrowthEffect)> {
    let none = || json!({});
    let (stays, spikes) = (GrowthEffect::Preserving, GrowthEffect::Spike);
    vec![
        ("stack", json!({"operator": "Stack", "factor": 2}), none(), spikes),
        ("interleave", json!({"operator": "Interleave", "factor": 2}), none(), spikes),
        ("list", json!({"operator": "LayerMap", "layerMap": {"layers": [0, 1, 1]}}), none(), spikes),
        ("solar", json!({"operator": "LayerMap", "layerMap": {"solar": {"dropLayers": 0}}}), none(), spikes),
        ("midas", json!({"operator": "LayerMap", "layerMap": {"midas": {"blockLayers": 1}}}), none(), spikes),
        ("lidas", json!({"operator": "LayerMap", "layerMap": {"lidas": {"blockLayers": 2}}}), none(), spikes),
        (
            "llama pro",
            json!({"operator": "LayerMap", "layerMap": {"llamaPro": {"groups": 2}}}),
            none(),
            stays,
        ),
        ("zero depth", json!({"operator": "ZeroDepth", "factor": 2}), none(), stays),
        (
            "zero depth, stacked",
            json!({"operator": "ZeroDepth", "factor": 3, "zeroDepth": {"order": "Stacked"}}),
            none(),
            stays,
        ),
        ("interleave to any depth", json!({"operator": "Interleave"}), json!({"numHiddenLayers": 5}), spikes),
        ("zero depth to any depth", json!({"operator": "ZeroDepth"}), json!({"numHiddenLayers": 5}), stays),
        (
            "zero depth to any depth, stacked",
            json!({"operator": "ZeroDepth", "zeroDepth": {"order": "Stacked"}}),
            json!({"numHiddenLayers": 3}),
            stays,
        ),
        (
            "even",
            json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": "Even"}}),
            none(),
            stays,
        ),
        ("uneven", json!({"operator": "DirectWidth", "factor": 2}), none(), stays),
        (
            "noisy",
            json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": "Noisy"}}),
            none(),
            stays,
        ),
        ("uneven copies", json!({"operator": "DirectWidth"}), json!({"hiddenSize": 24}), spikes),
        (
            "copied neurons and heads",
            json!({"operator": "DirectWidth"}),
            json!({"intermediateSize": 33, "numAttentionHeads": 9, "numKeyValueHeads": 3}),
            stays,
        ),
        ("zero width", json!({"operator": "ZeroWidth", "factor": 2}), none(), stays),
        ("padded stream", json!({"operator": "ZeroWidth"}), json!({"hiddenSize": 25}), stays),
        ("padded neurons", json!({"operator": "ZeroWidth"}), json!({"intermediateSize": 31}), stays),
        ("padded heads", json!({"operator": "ZeroWidth"}), json!({"numAttentionHeads": 8}), stays),
        (
            "padded queries",
            json!({"operator": "ZeroWidth"}),
            json!({"numAttentionHeads": 8, "numKeyValueHeads": 2}),
            stays,
        ),
        (
            "all of it padded unevenly",
            json!({"operator": "ZeroWidth"}),
            json!({"hiddenSize": 19, "intermediateSize": 21, "numAttentionHeads": 9, "numKeyValueHeads": 3}),
            stays,
        ),
        (
            "bert2BERT",
            json!({"operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2}}),
            none(),
            spikes,
        ),
        (
            "wider and deeper",
            json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "ZeroDepth", "factor": 2}}),
            none(),
            stays,
        ),
        ("noise", json!({"operator": "ZeroDepth", "factor": 2, "noise": 0.2}), none(), spikes),
    ]
}

/// Function-preserving operators differ by what rounding of shares and gains to f32 does to the logits.
const SAME: f64 = 1e-6;

#[test]
fn the_function_stays_or_changes_as_the_definition_says() {
    for config in [base(), tied()] {
        let source = Model::random(&config, 1);
        for (name, growth, model, expected) in growths() {
            let grown = grow(&source, growth, model);
            let difference = source.difference(&grown.model);
            println!("{name}, tied {}: {difference:.1e}", config.tie_word_embeddings);
            assert_eq!(grown.record.expected, expected, "{name}");
            match expected {
                GrowthEffect::Preserving => assert!(difference <= SAME, "{name}: {difference}"),
                GrowthEffect::Spike => assert!(difference > 1e-3, "{name}: {difference}"),
            }
            // What grow measured, in f32 on other tokens, says the same.
            let measured = grown.record.measured.unwrap();
            let share = measured.max_logit_difference.unwrap() / measured.max_logit.unwrap();
            assert_eq!(share <= 2e-6, expected == GrowthEffect::Preserving, "{name}: {share}");
            assert_eq!(measured.sample, GrowthSample::Random);
        }
    }
}

#[test]
fn every_operator_is_followed_by_training() {
    for config in [base(), tied()] {
        let source = Model::random(&config, 2);
        for (name, growth, model, _) in growths() {
            let grown = grow(&source, growth, model);
            let mut training = Training::new(&grown.model);
            (0..20).for_each(|_| drop(training.step()));
            assert_eq!(training.dead(), BTreeSet::new(), "{name}");
            let (first, last) = (training.losses[0], training.losses[19]);
            assert!(last.is_finite() && last < first, "{name}: {first} -> {last}");
        }
    }
}

#[test]
fn growing_again_gives_the_same_bits_and_another_seed_others() {
    let source = Model::random(&base(), 1);
    let digest = |growth: &Value, model: &Value, seed: u64| {
        let folder = Folder::new();
        folder.write("source", &source, true);
        let (growth, model) = (spec(growth.clone()), sizes(model.clone()));
        let request = CheckpointGrowth { growth: &growth, model: &model, source: &source.config, seed };
        let plan = resolve_checkpoint_growth(request).unwrap().0;
        folder.grow("source", "grown", &plan, &Measure { tokens: 0, ..Measure::default() }).manifest.digest
    };
    let random = ["noisy", "zero width", "padded heads", "wider and deeper", "noise"];
    for (name, growth, model, _) in growths() {
        for policy in ["Reset", "Keep"] {
            let mut growth = growth.clone();
            growth["optimizerState"] = json!(policy);
            let first = digest(&growth, &model, 1);
            assert_eq!(first, digest(&growth, &model, 1), "{name}, {policy}");
            // What draws nothing does not depend on the seed; in what does, the seed is all that differs.
            if random.contains(&name) {
                assert_ne!(first, digest(&growth, &model, 2), "{name}, {policy}");
            }
        }
    }
}

#[test]
fn what_is_measured_is_what_the_models_compute() {
    measured_is_what_models_compute(&base());
    // Matrices that are read in several parts.
    measured_is_what_models_compute(&ModelConfig { hidden_size: 48, vocab_size: 12_000, ..base() });
}

fn measured_is_what_models_compute(config: &ModelConfig) {
    let folder = Folder::new();
    let source = Model::random(config, 1);
    folder.write("source", &source, false);
    let plan =
        resolve(&source.config, &spec(json!({"operator": "Stack", "factor": 3})), &ModelSpec::default());
    let text = tokens(config.vocab_size, 200, 8);
    let measure = Measure { tokens: 150, text: Some(text.clone()), ..Measure::default() };
    let grown = folder.grow("source", "grown", &plan, &measure);
    let again = folder.grow("source", "grown", &plan, &measure);
    assert!(again.reused && again.record == grown.record);
    let measured = grown.record.unwrap().measured.unwrap();
    let large = folder.load("grown");
    // Two sequences of 64, the longest that the model takes.
    assert_eq!((measured.sample, measured.tokens), (GrowthSample::HeldOut, 128));
    let mean = |model: &Model| model.losses(&text[..128], &text[1..129], 64).iter().sum::<f64>() / 128.0;
    let close = |measured: Option<f64>, expected: f64| (measured.unwrap() / expected - 1.0).abs() < 1e-5;
    assert!(close(measured.loss_before, mean(&source)), "{measured:?}");
    assert!(close(measured.loss_after, mean(&large)), "{measured:?}");
    let largest = text[..128].chunks(64).flat_map(|ids| {
        let pairs = source.logits(ids).into_iter().flatten().zip(large.logits(ids).into_iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).collect::<Vec<_>>()
    });
    assert!(close(measured.max_logit_difference, largest.fold(0.0, f64::max)), "{measured:?}");
}

#[test]
fn a_growth_is_a_checkpoint_like_any_other() {
    let source = Model::random(&tied(), 1);
    let grown = grow(&source, json!({"operator": "DirectWidth", "factor": 2}), json!({}));
    let objects = &grown.checkpoint.manifest.objects;
    let record = objects.iter().find(|object| object.name == "growth.json").unwrap();
    assert!(!record.state);
    assert_eq!(grown.model.layout.parameter_count(), grown.record.target_parameters);
    // All of it is wider, but the width of heads is not.
    assert_eq!(grown.record.widened_tensors.len(), grown.model.layout.tensors().len());
    // The gain before a tied head takes the division, because the head is the embedding too.
    let (wide, narrow) = (grown.model.tensor("model.norm.weight"), source.tensor("model.norm.weight"));
    assert!((wide[0] - 0.7 * narrow[0]).abs() < 1e-6 && (wide[16] - 0.3 * narrow[0]).abs() < 1e-6);
}

prop_compose! {
    /// A source of any shape, and larger sizes for it.
    fn shapes()(
        hidden in 2u32..14, inner in 1u32..12, layers in 1u32..4, keys in 1u32..4, group in 1u32..4,
        half in 1u32..4, vocabulary in 2u32..30, tied in any::<bool>(), times in 1u32..4, more in 0u32..9,
        more_inner in 0u32..14, more_keys in 0u32..3, target_group in 1u32..6, eps in prop::sample::select(vec![1e-5, 1e-2]),
    ) -> (ModelConfig, Value, Value) {
        let config = ModelConfig {
            hidden_size: hidden, intermediate_size: inner, num_hidden_layers: layers,
            num_attention_heads: keys * group, num_key_value_heads: keys, head_dim: 2 * half,
            vocab_size: vocabulary, rms_norm_eps: eps, tie_word_embeddings: tied, ..base()
        };
        // Parts of a group must be equal.
        let target_group = if target_group < group && group % target_group != 0 { group } else { target_group };
        let target_keys = (keys + more_keys).max((keys * group).div_ceil(target_group));
        let heads = json!({"numAttentionHeads": target_keys * target_group, "numKeyValueHeads": target_keys});
        let sizes = |hidden: u32| {
            let mut sizes = heads.clone();
            sizes["hiddenSize"] = json!(hidden);
            sizes["intermediateSize"] = json!(inner + 1 + more_inner);
            sizes
        };
        (config, sizes(hidden * times), sizes(hidden + more))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_keeps_its_function(
        (config, multiple, padded) in shapes(), seed: u64, order in prop::sample::select(vec!["Interleaved", "Stacked"]),
        split in prop::sample::select(vec!["Even", "Uneven", "Noisy"]), deeper in any::<bool>(),
    ) {
        let source = Model::random(&config, seed);
        let mut direct = json!({"operator": "DirectWidth", "directWidth": {"split": split}});
        let mut zero = json!({"operator": "ZeroWidth"});
        if deeper {
            for growth in [&mut direct, &mut zero] {
                growth["depth"] = json!({"operator": "ZeroDepth", "factor": 2});
                growth["zeroDepth"] = json!({"order": order});
            }
        }
        for (growth, model) in [(direct, multiple), (zero, padded)] {
            let grown = grow(&source, growth.clone(), model.clone());
            prop_assert_eq!(grown.record.expected, GrowthEffect::Preserving);
            let difference = source.difference(&grown.model);
            prop_assert!(difference < 1e-5, "{} {}: {:e}", growth, model, difference);
        }
    }
}

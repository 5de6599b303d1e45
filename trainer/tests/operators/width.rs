//! Operators of the width.

use crate::SAME;
use crate::fixtures::{Folder, Model, Training, base, grow, resolve, spec};
use growth_crds::plan::{Initializer, OptimizerStatePolicy, WidthRule};
use growth_crds::spec::model::ModelSpec;
use growth_trainer::growth::Measure;
use growth_trainer::model::initializer::initialize;
use growth_trainer::model::layout::{ParameterLayout, TensorKind};
use serde_json::json;
use std::collections::BTreeSet;

/// Tensors with weights that had no gradient in three steps.
fn dead_after_three_steps(model: &Model) -> BTreeSet<String> {
    let mut training = Training::new(model);
    (0..3).for_each(|_| drop(training.step()));
    training.dead()
}

#[test]
fn no_channel_of_zero_width_is_dead() {
    let source = Model::random(&base(), 1);
    let grow = |model| grow(&source, json!({"operator": "ZeroWidth"}), model).model;
    for model in [
        json!({"hiddenSize": 32, "intermediateSize": 40, "numAttentionHeads": 8}),
        json!({"hiddenSize": 24}),
        json!({"intermediateSize": 40}),
        json!({"numAttentionHeads": 8}),
        json!({"numAttentionHeads": 8, "numKeyValueHeads": 2}),
    ] {
        assert_eq!(dead_after_three_steps(&grow(model.clone())), BTreeSet::new(), "{model}");
    }
    // The test can fail: with both factors of a product zero, none of them ever learns.
    let mut neurons = grow(json!({"intermediateSize": 40}));
    zero_new_rows(&mut neurons, &source, &["mlp.gate_proj", "mlp.up_proj"]);
    let dead = dead_after_three_steps(&neurons);
    for part in ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
        assert!(dead.contains(&format!("model.layers.0.{part}.weight")), "{part}: {dead:?}");
    }
    let mut heads = grow(json!({"numAttentionHeads": 8}));
    zero_new_rows(&mut heads, &source, &["self_attn.q_proj", "self_attn.k_proj"]);
    let dead = dead_after_three_steps(&heads);
    for part in ["self_attn.q_proj", "self_attn.k_proj"] {
        assert!(dead.contains(&format!("model.layers.1.{part}.weight")), "{part}: {dead:?}");
    }
}

fn zero_new_rows(model: &mut Model, source: &Model, parts: &[&str]) {
    for layer in 0..model.config.num_hidden_layers {
        for part in parts {
            let name = format!("model.layers.{layer}.{part}.weight");
            let range = model.layout.find(&name).unwrap().range();
            let old = source.layout.find(&name).unwrap().len;
            model.parameters[range][old..].fill(0.0);
        }
    }
}

#[test]
fn zero_width_needs_its_gains_and_its_eps() {
    let source = Model::random(&base(), 1);
    let exact = grow(&source, json!({"operator": "ZeroWidth", "factor": 2}), json!({}));
    assert_eq!(exact.model.config.rms_norm_eps, 0.5e-5);
    assert!(source.difference(&exact.model) <= SAME);
    // With the eps of the source the error is that of eps alone.
    let same_eps = json!({"rmsNormEps": 1e-5});
    let inexact = grow(&source, json!({"operator": "ZeroWidth", "factor": 2}), same_eps).model;
    let difference = source.difference(&inexact);
    assert!(difference > SAME && difference < 1e-4, "{difference}");
    // Gains that are copied as they are make the norms too large by the root of 2.
    let mut unscaled = exact.model.clone();
    for tensor in unscaled.layout.clone().tensors().iter().filter(|tensor| tensor.kind == TensorKind::Norm) {
        let gains = source.tensor(&tensor.name);
        unscaled.parameters[tensor.offset..tensor.offset + gains.len()].copy_from_slice(gains);
    }
    assert!(source.difference(&unscaled) > 0.1);
    // The random blocks are the target's own first weights.
    let WidthRule::Zero { initializer, seed, .. } = exact.plan.width.unwrap().rule else { panic!() };
    assert_eq!(initializer, Initializer::HuggingFace);
    let fresh = initialize(&exact.model.config, initializer, seed);
    let range = exact.model.layout.layer(1).o.clone();
    let (fresh, grown) = (&fresh[range.clone()], &exact.model.parameters[range]);
    let width = 48;
    assert_eq!(grown[24..width], fresh[24..width], "new columns of an old row");
    assert_eq!(grown[16 * width + 24..17 * width], fresh[16 * width + 24..17 * width], "of a new row");
    assert!(grown[16 * width..16 * width + 24].iter().all(|weight| *weight == 0.0));
}

#[test]
fn copies_share_what_the_source_had() {
    let source = Model::random(&base(), 1);
    for (split, share) in [("Even", 0.5), ("Uneven", 0.7), ("Noisy", f32::NAN)] {
        let growth = json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": split}});
        let grown = grow(&source, growth, json!({})).model;
        // Rows are copied, columns divided: 16 channels to 32, 20 neurons to 40.
        let (wide, narrow) = (grown.of_layer(1, "mlp.down_proj"), source.of_layer(1, "mlp.down_proj"));
        for row in 0..32 {
            for column in 0..20 {
                let (first, second) = (wide[row * 40 + column], wide[row * 40 + 20 + column]);
                let whole = narrow[(row % 16) * 20 + column];
                assert!((first + second - whole).abs() <= 2e-7, "{split}: {first} + {second} != {whole}");
                if !share.is_nan() {
                    assert!((first - share * whole).abs() <= 1e-7, "{split}: {first} of {whole}");
                }
            }
        }
        assert_eq!(grown.of_layer(0, "input_layernorm"), source.of_layer(0, "input_layernorm").repeat(2));
        let embedding =
            |model: &Model, width: usize| model.tensor("model.embed_tokens.weight")[..width].to_vec();
        assert_eq!(embedding(&grown, 32), embedding(&source, 16).repeat(2));
    }
    // Three copies: 49, 21 and 9 of 79.
    let tripled = grow(&source, json!({"operator": "DirectWidth"}), json!({"intermediateSize": 60})).model;
    let (wide, whole) = (tripled.of_layer(0, "mlp.down_proj"), source.of_layer(0, "mlp.down_proj")[0]);
    for (copy, share) in [49.0, 21.0, 9.0].into_iter().enumerate() {
        assert!((wide[copy * 20] - whole * share / 79.0).abs() < 1e-7);
    }
}

/// Moments that a model starts with.
#[derive(Clone, Copy, PartialEq)]
enum Moments {
    /// None: optimizerState Reset.
    Fresh,
    /// The same for a neuron and its copy.
    Copied,
    /// Of the old neurons only: optimizerState Keep.
    OfOld,
}

/// Largest distance of a neuron's gates from those of its copy after every one of `steps` AdamW steps.
fn distances(split: &str, moments: Moments, steps: usize) -> Vec<f32> {
    let source = Model::random(&base(), 1);
    let growth = json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": split}});
    let grown = grow(&source, growth, json!({})).model;
    let gates = grown.layout.find("model.layers.0.mlp.gate_proj.weight").unwrap().range();
    let mut training = Training::new(&grown);
    match moments {
        Moments::Fresh => {}
        Moments::Copied => training.exp_avg[gates.clone()].fill(1e-3),
        Moments::OfOld => training.exp_avg[gates.start..gates.start + gates.len() / 2].fill(1e-3),
    }
    let distance = |_| {
        training.step();
        let (old, new) = training.parameters[gates.clone()].split_at(gates.len() / 2);
        old.iter().zip(new).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()))
    };
    (0..steps).map(distance).collect()
}

/// A defect of the even split, and why it is not the default: copies that have the same gradients are one neuron.
#[test]
fn equal_copies_stay_equal_for_ever() {
    for moments in [Moments::Fresh, Moments::Copied] {
        assert_eq!(distances("Even", moments, 50), [0.0; 50]);
    }
}

/// By what tells copies apart, they part slowly or at once; a step of AdamW moves a weight by about 1e-3.
#[test]
fn copies_part_when_something_tells_them_apart() {
    let uneven = distances("Uneven", Moments::Fresh, 50);
    assert!(uneven[0] < 1e-5, "the first step of AdamW knows signs only: {}", uneven[0]);
    assert!(uneven[49] > 1e-3, "{}", uneven[49]);
    // What is different from the beginning does not need steps to part.
    assert!(distances("Noisy", Moments::Fresh, 1)[0] > 1e-3);
    assert!(distances("Even", Moments::OfOld, 1)[0] > 1e-4);
}

#[test]
fn kept_moments_are_those_of_old_weights() {
    let folder = Folder::new();
    let source = Model::random(&base(), 1);
    let small = folder.write("source", &source, true);
    for operator in ["DirectWidth", "ZeroWidth"] {
        let growth = json!({"operator": operator, "factor": 2, "optimizerState": "Keep"});
        let plan = resolve(&source.config, &spec(growth), &ModelSpec::default());
        assert_eq!(plan.optimizer_state, OptimizerStatePolicy::Keep);
        let grown = folder.grow("source", operator, &plan, &Measure { tokens: 0, ..Measure::default() });
        assert_eq!(grown.record.unwrap().measured, None);
        let layout = ParameterLayout::new(&plan.grown(&source.config));
        let wide = folder.state(operator, &grown.manifest, &layout);
        assert_eq!((wide.step, wide.optimizer_step), (0, 40));
        for (wide, small) in [(&wide.exp_avg, &small.exp_avg), (&wide.exp_avg_sq, &small.exp_avg_sq)] {
            for tensor in layout.tensors() {
                let old = source.layout.find(&tensor.name).unwrap();
                let expected = padded(&small[old.range()], &old.shape, &tensor.shape);
                assert!(wide[tensor.range()] == expected, "{operator}: {}", tensor.name);
            }
        }
    }
}

/// S' = [S, 0].
fn padded(small: &[f32], from: &[usize], to: &[usize]) -> Vec<f32> {
    let (columns, wide) = (*from.last().unwrap(), *to.last().unwrap());
    let mut out = vec![0.0; to.iter().product()];
    for (row, values) in small.chunks_exact(columns).enumerate() {
        out[row * wide..row * wide + columns].copy_from_slice(values);
    }
    out
}

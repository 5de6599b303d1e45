//! Operators of the depth.

use crate::fixtures::{Folder, Model, Training, base, grow, resolve, spec};
use growth_crds::plan::ModelConfig;
use growth_crds::spec::model::ModelSpec;
use growth_trainer::growth::Measure;
use growth_trainer::model::layout::ParameterLayout;
use serde_json::json;
use std::collections::BTreeSet;

#[test]
fn a_stack_is_not_the_function_of_its_source() {
    let source = Model::random(&base(), 1);
    let grown = grow(&source, json!({"operator": "Stack", "factor": 2}), json!({}));
    assert!(source.difference(&grown.model) > 0.05);
    assert_eq!((grown.record.connection_rate.kept, grown.record.connection_rate.pairs), (2, 3));
    assert_eq!(grown.record.new_tensors.len(), 2 * 9);
    assert!(grown.record.widened_tensors.is_empty() && grown.record.zero_tensors.is_empty());
}

#[test]
fn new_layers_of_zero_depth_do_nothing_and_learn() {
    let source = Model::random(&base(), 1);
    for order in ["Interleaved", "Stacked"] {
        let growth = json!({"operator": "ZeroDepth", "factor": 2, "zeroDepth": {"order": order}});
        let grown = grow(&source, growth, json!({}));
        // Nothing is rounded: exactly the same in f64.
        assert_eq!(source.difference(&grown.model), 0.0, "{order}");
        // And in f32, on other tokens, as the growth step has measured it.
        assert_eq!(grown.record.measured.unwrap().max_logit_difference, Some(0.0), "{order}");
        let zero: &[u32] = if order == "Stacked" { &[2, 3] } else { &[1, 3] };
        assert_eq!(grown.plan.zero_output, zero);
        assert_eq!(grown.record.zero_tensors.len(), 4);
        let mut training = Training::new(&grown.model);
        let (first, second) = (training.step(), training.step());
        for layer in 0..4 {
            for part in ["q", "k", "v", "o"]
                .map(|part| format!("self_attn.{part}_proj"))
                .into_iter()
                .chain(["gate", "up", "down"].map(|part| format!("mlp.{part}_proj")))
            {
                let name = format!("model.layers.{layer}.{part}.weight");
                let range = grown.model.layout.find(&name).unwrap().range();
                let alive =
                    |gradients: &[f32]| gradients[range.clone()].iter().any(|gradient| *gradient != 0.0);
                let output = part.ends_with("o_proj") || part.ends_with("down_proj");
                let is_new = zero.contains(&layer);
                if is_new && output {
                    assert!(grown.model.tensor(&name).iter().all(|weight| *weight == 0.0));
                }
                assert_eq!(alive(&first), !is_new || output, "{order}: {name} in the first step");
                assert!(alive(&second), "{order}: {name} in the second step");
            }
        }
    }
}

/// Every new layer adds nothing, wherever it lies: no multiple is needed, and every one of them learns.
#[test]
fn zero_depth_reaches_any_depth() {
    let source = Model::random(&ModelConfig { num_hidden_layers: 3, ..base() }, 1);
    for (depth, order, layers, zero) in [
        (4, "Interleaved", vec![0, 0, 1, 2], vec![1]),
        (5, "Interleaved", vec![0, 0, 1, 1, 2], vec![1, 3]),
        (7, "Interleaved", vec![0, 0, 0, 1, 1, 2, 2], vec![1, 2, 4, 6]),
        (4, "Stacked", vec![0, 1, 2, 0], vec![3]),
        (8, "Stacked", vec![0, 1, 2, 0, 1, 2, 0, 1], vec![3, 4, 5, 6, 7]),
    ] {
        let growth = json!({"operator": "ZeroDepth", "zeroDepth": {"order": order}});
        let grown = grow(&source, growth, json!({"numHiddenLayers": depth}));
        assert_eq!((&grown.plan.layers, &grown.plan.zero_output), (&layers, &zero), "{order} {depth}");
        assert_eq!(source.difference(&grown.model), 0.0, "{order} {depth}");
        let mut training = Training::new(&grown.model);
        (0..2).for_each(|_| drop(training.step()));
        assert_eq!(training.dead(), BTreeSet::new(), "{order} {depth}");
    }
}

#[test]
fn kept_moments_of_zeroed_layers_are_zero() {
    let folder = Folder::new();
    let source = Model::random(&base(), 1);
    let small = folder.write("source", &source, true);
    let growth = json!({"operator": "ZeroDepth", "factor": 2, "optimizerState": "Keep"});
    let plan = resolve(&source.config, &spec(growth), &ModelSpec::default());
    let grown = folder.grow("source", "grown", &plan, &Measure::default());
    let layout = ParameterLayout::new(&plan.grown(&source.config));
    let large = folder.state("grown", &grown.manifest, &layout);
    for (layer, part, is_zero) in [
        (0, "mlp.down_proj", false),
        (1, "mlp.down_proj", true),
        (1, "self_attn.o_proj", true),
        (1, "mlp.up_proj", false),
    ] {
        let range = layout.find(&format!("model.layers.{layer}.{part}.weight")).unwrap().range();
        let from = source.layout.find(&format!("model.layers.0.{part}.weight")).unwrap().range();
        for (large, small) in [(&large.exp_avg, &small.exp_avg), (&large.exp_avg_sq, &small.exp_avg_sq)] {
            if is_zero {
                assert!(large[range.clone()].iter().all(|moment| *moment == 0.0), "{layer} {part}");
            } else {
                assert!(large[range.clone()] == small[from.clone()], "{layer} {part}");
            }
        }
    }
}

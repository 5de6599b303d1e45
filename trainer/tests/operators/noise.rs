//! Noise in the matrices of a grown model.

use crate::fixtures::{Model, base, grow};
use growth_crds::plan::ModelConfig;
use growth_trainer::model::layout::TensorKind;
use serde_json::json;

/// The paper's N(0, 1/(d L^2)) and N(0, 2/(5 d)), in every tensor by itself; d and L are the target's.
#[test]
fn noise_has_the_variance_of_the_ablation() {
    let config = ModelConfig { hidden_size: 48, intermediate_size: 96, vocab_size: 200, ..base() };
    let source = Model::random(&config, 1);
    let share = 0.25f32;
    for growth in [json!({"operator": "Stack", "factor": 2}), json!({"operator": "DirectWidth", "factor": 2})]
    {
        let with = |noise: f32| {
            let mut growth = growth.clone();
            growth["noise"] = json!(noise);
            grow(&source, growth, json!({})).model
        };
        let quiet = grow(&source, growth.clone(), json!({})).model;
        assert_eq!(with(0.0).parameters, quiet.parameters, "a share of 0 is no noise: {growth}");
        let noisy = with(share);
        let (hidden, layers) =
            (f64::from(quiet.config.hidden_size), f64::from(quiet.config.num_hidden_layers));
        for tensor in quiet.layout.tensors() {
            let (noisy, quiet) = (noisy.tensor(&tensor.name), quiet.tensor(&tensor.name));
            if tensor.kind == TensorKind::Norm {
                assert_eq!(noisy, quiet, "{}", tensor.name);
                continue;
            }
            let into_residual = tensor.name.contains("o_proj") || tensor.name.contains("down_proj");
            let variance =
                if into_residual { 1.0 / (hidden * layers * layers) } else { 2.0 / (5.0 * hidden) };
            let pairs = noisy.iter().zip(quiet);
            let noise: Vec<f64> =
                pairs.map(|(noisy, quiet)| f64::from((noisy - (1.0 - share) * quiet) / share)).collect();
            let count = noise.len() as f64;
            let mean = noise.iter().sum::<f64>() / count;
            let measured = noise.iter().map(|x| x * x).sum::<f64>() / count;
            // Standard errors of a sample: sqrt(2 / n) of the variance, sqrt(variance / n) of the mean; four of them.
            let off = (measured / variance - 1.0) / (2.0 / count).sqrt();
            assert!(off.abs() < 4.0, "{growth}, {}: {measured} instead of {variance}", tensor.name);
            assert!(mean.abs() < 4.0 * (variance / count).sqrt(), "{growth}, {}: mean {mean}", tensor.name);
        }
    }
}

//! RandomDepth and RandomWidth in a job: what is new, the ramp of its masks, and what each mistake says.
use crate::common::{Edit, plan};
use growth_crds::plan::growth::GrowthEffect;
use growth_crds::plan::growth_mask::GrowthMasks;
use growth_crds::plan::{GrowthPlan, Initializer, NewLayersPlan, StagePlan, StageStart, WidthMap, WidthRule};
use proptest::prelude::*;
use serde_json::{Value, json};

/// The second stage of a job of steps of 4,096 tokens.
fn stage(edits: &[Edit]) -> Result<StagePlan, Vec<String>> {
    Ok(plan(edits)?.stages.remove(1))
}

fn growth(stage: &StagePlan) -> &GrowthPlan {
    match &stage.start {
        StageStart::Growth(growth) => growth,
        other => panic!("{other:?}"),
    }
}

#[test]
fn new_layers_lie_above_the_old_ones() {
    let stage = stage(&[
        ("/spec/training/seed", json!(5)),
        ("/spec/stages/1/growth", json!({"operator": "RandomDepth"})),
        ("/spec/stages/1/model", json!({"numHiddenLayers": 5, "initializer": "Paper"})),
    ])
    .unwrap();
    let growth = growth(&stage);
    assert_eq!(growth.layers, [0, 1]);
    let new = NewLayersPlan { count: 3, initializer: Initializer::Paper, seed: 5 };
    assert_eq!(growth.new_layers, Some(new));
    assert_eq!(stage.model.num_hidden_layers, 5);
    assert_eq!(growth.effect(2), (GrowthEffect::Preserving, "new layers are masked at first"));
    // The weights that the model runs with are a second buffer.
    let memory = stage.memory;
    assert_eq!(memory.masked_weights_bytes, memory.weights_bytes);
    let plain = stage.model.memory(4096, 1, 1);
    assert_eq!(memory.total_bytes, plain.total_bytes + memory.weights_bytes);
    let factor = self::stage(&[("/spec/stages/1/growth", json!({"operator": "RandomDepth", "factor": 3}))]);
    assert_eq!(factor.unwrap().model.num_hidden_layers, 6);
}

#[test]
fn new_channels_lie_beside_the_old_ones() {
    let stage = stage(&[
        ("/spec/stages/1/growth", json!({"operator": "RandomWidth", "optimizerState": "Keep"})),
        ("/spec/stages/1/model", json!({"hiddenSize": 96, "numAttentionHeads": 6})),
    ])
    .unwrap();
    let width = growth(&stage).width.as_ref().unwrap();
    let rms_norm_eps = 1e-5 * 64.0 / 96.0;
    let initializer = Initializer::HuggingFace;
    assert_eq!(width.rule, WidthRule::Random { initializer, seed: 0, rms_norm_eps });
    assert_eq!((&width.hidden, &width.heads), (&WidthMap::pad(64, 96), &WidthMap::pad(4, 6)));
    assert_eq!(stage.model.rms_norm_eps, rms_norm_eps);
    assert_eq!(growth(&stage).effect(2), (GrowthEffect::Preserving, "new channels are masked at first"));
    // Other growths of the depth go with it, as with any width.
    let deeper =
        json!({"operator": "RandomWidth", "factor": 2, "depth": {"operator": "ZeroDepth", "factor": 2}});
    let deeper = self::stage(&[("/spec/stages/1/growth", deeper)]).unwrap();
    assert_eq!(growth(&deeper).effect(2).0, GrowthEffect::Preserving);
    assert_eq!(growth(&deeper).layers, [0, 0, 1, 1]);
}

#[test]
fn a_ramp_is_a_tenth_of_the_stage_or_what_is_said() {
    let ramp = |growth: Value, tokens: u64| {
        stage(&[("/spec/stages/1/growth", growth), ("/spec/stages/1/tokens", json!(tokens))])
            .unwrap()
            .mask_ramp_tokens
    };
    let default = json!({"operator": "RandomDepth", "factor": 2});
    // Rounded up to whole steps, of which there is at least one.
    assert_eq!(ramp(default.clone(), 100 * 4096), Some(10 * 4096));
    assert_eq!(ramp(default.clone(), 101 * 4096), Some(11 * 4096));
    assert_eq!(ramp(default, 2 * 4096), Some(4096));
    let said = json!({"operator": "RandomWidth", "factor": 2, "randomWidth": {"rampTokens": "10K"}});
    assert_eq!(ramp(said, 100 * 4096), Some(10_000));
    assert_eq!(ramp(json!({"operator": "Stack", "factor": 2}), 4096), None);
    let empty = json!({"operator": "RandomWidth", "factor": 2, "randomWidth": {}});
    assert_eq!(ramp(empty, 100 * 4096), Some(10 * 4096));
}

#[test]
fn masks_are_linear_and_take_turns() {
    let depth = stage(&[("/spec/stages/1/growth", json!({"operator": "RandomDepth", "factor": 2}))]).unwrap();
    let layers = |tokens| growth(&depth).masks(tokens, 1000);
    for tokens in [0, 1, 250, 999] {
        assert_eq!(layers(tokens), GrowthMasks { layers: tokens as f64 / 1000.0, ..GrowthMasks::OPEN });
    }
    assert_eq!((layers(1000), layers(u64::MAX)), (GrowthMasks::OPEN, GrowthMasks::OPEN));

    let width = stage(&[("/spec/stages/1/growth", json!({"operator": "RandomWidth", "factor": 2}))]).unwrap();
    let masks = |tokens| {
        let GrowthMasks { intermediate, hidden, heads, layers } = growth(&width).masks(tokens, 900);
        [intermediate, hidden, heads, layers].map(|mask| (mask * 1e9).round() / 1e9)
    };
    assert_eq!(masks(0), [0.0, 0.0, 0.0, 1.0]);
    assert_eq!(masks(150), [0.5, 0.0, 0.0, 1.0]);
    assert_eq!(masks(300), [1.0, 0.0, 0.0, 1.0]);
    assert_eq!(masks(375), [1.0, 0.25, 0.0, 1.0]);
    assert_eq!(masks(600), [1.0, 1.0, 0.0, 1.0]);
    assert_eq!(masks(750), [1.0, 1.0, 0.5, 1.0]);
    assert_eq!(growth(&width).masks(900, 900), GrowthMasks::OPEN);

    // What does not grow takes no turn.
    let heads = stage(&[
        ("/spec/stages/1/growth", json!({"operator": "RandomWidth"})),
        ("/spec/stages/1/model", json!({"numAttentionHeads": 6})),
    ])
    .unwrap();
    assert_eq!(growth(&heads).masks(25, 100), GrowthMasks { heads: 0.25, ..GrowthMasks::OPEN });
    let stack = stage(&[]).unwrap();
    assert!(!growth(&stack).is_masked());
    assert_eq!(growth(&stack).masks(0, 1), GrowthMasks::OPEN);
}

proptest! {
    #[test]
    fn masks_never_fall(one in any::<u64>(), other in any::<u64>(), ramp in 1u64..) {
        let width = stage(&[("/spec/stages/1/growth", json!({"operator": "RandomWidth", "factor": 2}))]).unwrap();
        let at = |tokens| {
            let GrowthMasks { intermediate, hidden, heads, layers } = growth(&width).masks(tokens, ramp);
            [intermediate, hidden, heads, layers]
        };
        let (early, late) = (at(one.min(other)), at(one.max(other)));
        for (early, late) in early.into_iter().zip(late) {
            prop_assert!(0.0 <= early && early <= late && late <= 1.0);
        }
        prop_assert_eq!(at(ramp), [1.0; 4]);
    }
}

#[test]
fn every_mistake_says_what_to_do() {
    let random_depth =
        |options: Value| json!({"operator": "RandomDepth", "factor": 2, "randomDepth": options});
    let cases: Vec<(Vec<Edit>, &str)> = vec![
        (
            vec![("/spec/stages/1/growth", random_depth(json!({"rampTokens": "100M"})))],
            "spec.stages[1].growth.randomDepth.rampTokens: a ramp of 100M tokens does not end before stage large",
        ),
        (
            vec![
                ("/spec/stages/1/growth", random_depth(json!({"rampTokens": 8192}))),
                ("/spec/stages/1/tokens", json!(8192)),
            ],
            "spec.stages[1].growth.randomDepth.rampTokens: a ramp of 8192 tokens does not end before",
        ),
        (
            vec![("/spec/stages/1/growth", random_depth(json!({"rampTokens": 0})))],
            "spec.stages[1].growth.randomDepth.rampTokens: 0 tokens are less than one step; use at least 4096",
        ),
        (
            vec![("/spec/stages/1/growth", random_depth(json!({}))), ("/spec/stages/1/tokens", json!(4096))],
            "spec.stages[1].tokens: 4096 tokens are a single step, which leaves no room for the ramp of RandomDepth",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "Stack", "factor": 2, "randomDepth": {}}))],
            "spec.stages[1].growth.randomDepth: randomDepth belongs to operator RandomDepth",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "ZeroWidth", "factor": 2, "randomWidth": {}}))],
            "spec.stages[1].growth.randomWidth: randomWidth belongs to operator RandomWidth",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "RandomDepth"}))],
            "spec.stages[1].growth.factor: RandomDepth needs to know how deep",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "RandomDepth"})),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 2})),
            ],
            "spec.stages[1].model.numHiddenLayers: 2 layers are no more than the 2 that grow; use more",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "RandomDepth", "factor": 2})),
                ("/spec/stages/1/model", json!({"rmsNormEps": 1e-6})),
            ],
            "spec.stages[1].model.rmsNormEps: in a stage that grows it belongs to one of [ZeroWidth, RandomWidth]",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "RandomWidth", "factor": 2, "depth": {"operator": "RandomDepth", "factor": 2}}),
            )],
            "spec.stages[1].growth.depth.operator: RandomDepth lets its layers in over a ramp of its own",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "RandomWidth"}))],
            "spec.stages[1].growth: nothing becomes wider",
        ),
    ];
    for (edits, expected) in cases {
        let errors = stage(&edits).expect_err(expected);
        assert!(errors.iter().any(|error| error.contains(expected)), "{expected}: {errors:?}");
    }
}

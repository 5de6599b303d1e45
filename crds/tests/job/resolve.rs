//! From a spec to plans: defaults, growth, tokens, schedules, and what each mistake says.
use crate::common::{Edit, plan};
use growth_crds::plan::growth::GrowthEffect;
use growth_crds::plan::{
    GrowthOperator, GrowthPlan, Initializer, ModelConfig, OptimizerStatePolicy, SchedulePlan, StageStart,
    WidthMap, WidthPlan, WidthRule, WidthSplit,
};
use serde_json::{Value, json};

#[test]
fn everything_has_a_default() {
    let plan = plan(&[]).unwrap();
    assert_eq!(plan.notes, Vec::<String>::new());
    let [small, large] = &plan.stages[..] else { panic!("{} stages", plan.stages.len()) };

    let model = &small.model;
    assert_eq!((model.head_dim, model.num_key_value_heads), (16, 4));
    assert_eq!((model.vocab_size, model.max_position_embeddings), (2048, 256));
    assert_eq!((model.rope_theta, model.rms_norm_eps), (10_000.0, 1e-5));
    assert!(!model.tie_word_embeddings);
    assert!(matches!(small.start, StageStart::Random { .. }));
    assert_eq!((small.steps, small.tokens, small.first_token), (256, 1_048_576, 0));
    assert_eq!(small.training.micro_batch_tokens, 4096);
    assert_eq!(
        small.training.schedule,
        SchedulePlan::Cosine { warmup_tokens: 0, horizon_tokens: 1_048_576, min_ratio: 0.1 }
    );
    assert_eq!((small.checkpoint.every_tokens, small.checkpoint.every_seconds), (None, Some(600)));
    assert_eq!(small.checkpoint.keep_last, 2);
    // A tenth of the stage is 104,858 tokens: 26 steps.
    assert_eq!((small.evaluation.every_tokens, small.evaluation.tokens), (26 * 4096, 65_536));

    let StageStart::Growth(growth) = &large.start else { panic!("{:?}", large.start) };
    assert_eq!(growth.from_stage, "small");
    assert_eq!(growth.operator, GrowthOperator::Stack);
    assert_eq!(growth.layers, [0, 1, 0, 1, 0, 1, 0, 1]);
    assert_eq!(growth.optimizer_state, OptimizerStatePolicy::Reset);
    assert_eq!(large.model.num_hidden_layers, 8);
    assert_eq!(large.first_token, 1_048_576);
    assert_eq!(large.index, 1);
}

#[test]
fn a_stage_overrides_member_by_member() {
    let plan = plan(&[
        ("/spec/training/optimizer", json!({"adamW": {"beta2": 0.99, "learningRate": 1e-3}})),
        ("/spec/stages/1/training/optimizer", json!({"adamW": {"learningRate": 2e-3}})),
        ("/spec/stages/1/training/schedule", json!({"wsd": {"warmupTokens": "100K", "decayTokens": "1M"}})),
        ("/spec/stages/1/training/globalBatchTokens", json!(8192)),
        ("/spec/stages/1/training/microBatchTokens", json!(2048)),
        ("/spec/stages/1/training/gradientClip", json!(0.0)),
    ])
    .unwrap();
    let (small, large) = (&plan.stages[0].training, &plan.stages[1].training);
    assert_eq!((small.adam_w.learning_rate, small.adam_w.beta2), (1e-3, 0.99));
    assert_eq!((large.adam_w.learning_rate, large.adam_w.beta2), (2e-3, 0.99));
    assert_eq!((large.global_batch_tokens, large.micro_batch_tokens), (8192, 2048));
    assert_eq!((small.gradient_clip, large.gradient_clip), (1.0, 0.0));
    assert_eq!(
        large.schedule,
        SchedulePlan::Wsd {
            warmup_tokens: 100_000,
            decay_tokens: 1_000_000,
            end_tokens: 4_194_304,
            min_ratio: 0.0
        }
    );
    // Four micro-batches: three levels of gradients.
    let memory = &plan.stages[1].memory;
    assert_eq!(memory.gradients_bytes, 3 * memory.weights_bytes);
    assert_eq!(memory.optimizer_bytes, 2 * memory.weights_bytes);
}

#[test]
fn tokens_are_rounded_up_to_whole_steps() {
    let plan = plan(&[("/spec/stages/0/tokens", json!(1_000_000))]).unwrap();
    assert_eq!((plan.stages[0].tokens, plan.stages[0].steps), (1_003_520, 245));
    assert_eq!(plan.stages[1].first_token, 1_003_520);
    assert_eq!(
        plan.notes,
        ["spec.stages[0]: 1M tokens are not whole steps of 4096; it trains 1003520 in 245 steps"]
    );
}

#[test]
fn auto_is_clamped_to_a_tenth_and_says_so() {
    let plan = plan(&[("/spec/stages/0/tokens", json!("auto"))]).unwrap();
    // A tenth of 4,194,304 is 102.4 steps.
    assert_eq!(plan.stages[0].tokens, 102 * 4096);
    let note = &plan.notes[0];
    assert!(note.contains("limited to 419K, a tenth of stage large"), "{note}");
    assert!(note.contains("fitted on 400M to 3B parameters and 8e19 to 1.2e21 FLOP"), "{note}");
}

#[test]
fn auto_follows_the_guideline_where_it_was_fitted() {
    let plan = plan(&[
        (
            "/spec/model",
            json!({"hiddenSize": 2048, "intermediateSize": 5632, "numAttentionHeads": 32, "vocabSize": 32000}),
        ),
        ("/spec/training/sequenceLength", json!(2048)),
        ("/spec/training/globalBatchTokens", json!(2_097_152)),
        ("/spec/training/microBatchTokens", json!(16_384)),
        ("/spec/stages/0/model/numHiddenLayers", json!(6)),
        ("/spec/stages/0/tokens", json!("auto")),
        ("/spec/stages/1/tokens", json!("150B")),
    ])
    .unwrap();
    let tokens = plan.stages[0].tokens;
    // N = 1.233 B, C = 6 N 150 B = 1.1e21: about 11 B, inside the tenth.
    assert!((10_000_000_000..13_000_000_000).contains(&tokens), "{tokens}");
    assert_eq!(tokens % 2_097_152, 0);
    assert!(
        !plan.notes.iter().any(|note| note.contains("limited") || note.contains("fitted")),
        "{:?}",
        plan.notes
    );
    assert!(plan.notes.iter().any(|note| note.contains("the guideline says")), "{:?}", plan.notes);
}

#[test]
fn auto_never_trains_less_than_a_step() {
    let plan =
        plan(&[("/spec/stages/0/tokens", json!("auto")), ("/spec/stages/1/tokens", json!(4096))]).unwrap();
    assert_eq!(plan.stages[0].steps, 1);
}

#[test]
fn growth_chains_and_lists() {
    let plan = plan(&[
        ("/spec/stages/1/growth", json!({"operator": "LayerMap", "layerMap": {"pattern": "1-12*2-2"}, "optimizerState": "Keep"})),
        ("/spec/stages/2", json!({"name": "huge", "growth": {"operator": "Stack"}, "model": {"numHiddenLayers": 12}, "tokens": 4096})),
    ])
    .unwrap();
    let StageStart::Growth(growth) = &plan.stages[1].start else { panic!() };
    assert_eq!(growth.layers, [0, 0, 1, 0, 1, 1]);
    assert_eq!(growth.optimizer_state, OptimizerStatePolicy::Keep);
    assert_eq!(plan.stages[2].model.num_hidden_layers, 12);
    let StageStart::Growth(growth) = &plan.stages[2].start else { panic!() };
    assert_eq!(growth.layers, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]);
}

fn growth(edits: &[Edit]) -> (GrowthPlan, ModelConfig) {
    let mut plan = plan(edits).unwrap();
    let stage = plan.stages.remove(1);
    match stage.start {
        StageStart::Growth(growth) => (growth, stage.model),
        other => panic!("{other:?}"),
    }
}

#[test]
fn depth_operators_resolve_to_lists() {
    let of = |growth_spec: Value| growth(&[("/spec/stages/1/growth", growth_spec)]).0;
    let layers = |spec| {
        let plan = of(spec);
        let effect = plan.effect(2).0;
        (plan.layers, plan.zero_output, effect)
    };
    let (spike, preserving) = (GrowthEffect::Spike, GrowthEffect::Preserving);
    let cases = [
        (json!({"operator": "Interleave", "factor": 2}), vec![0, 0, 1, 1], vec![], spike),
        (json!({"operator": "ZeroDepth", "factor": 2}), vec![0, 0, 1, 1], vec![1, 3], preserving),
        (
            json!({"operator": "ZeroDepth", "factor": 2, "zeroDepth": {"order": "Stacked"}}),
            vec![0, 1, 0, 1],
            vec![2, 3],
            preserving,
        ),
        (
            json!({"operator": "LayerMap", "layerMap": {"solar": {"dropLayers": 0}}}),
            vec![0, 1, 0, 1],
            vec![],
            spike,
        ),
        (
            json!({"operator": "LayerMap", "layerMap": {"midas": {"blockLayers": 1}}}),
            vec![0, 0, 1],
            vec![],
            spike,
        ),
        (
            json!({"operator": "LayerMap", "layerMap": {"lidas": {"blockLayers": 2}, "zeroOutput": true}}),
            vec![0, 0, 1, 1],
            vec![1, 3],
            preserving,
        ),
        (
            json!({"operator": "LayerMap", "layerMap": {"llamaPro": {"groups": 2}}}),
            vec![0, 0, 1, 1],
            vec![1, 3],
            preserving,
        ),
        (
            json!({"operator": "LayerMap", "layerMap": {"llamaPro": {"groups": 1}, "zeroOutput": false}}),
            vec![0, 1, 1],
            vec![],
            spike,
        ),
        // The second copy of layer 0 is zeroed, but then layer 1 comes first.
        (
            json!({"operator": "LayerMap", "layerMap": {"layers": [1, 0, 0], "zeroOutput": true}}),
            vec![1, 0, 0],
            vec![2],
            spike,
        ),
    ];
    for (spec, list, zero, effect) in cases {
        assert_eq!(layers(spec.clone()), (list, zero, effect), "{spec}");
    }
}

#[test]
fn interleave_and_zero_depth_reach_any_depth() {
    let of = |operator: &str, order: Option<&str>, layers: u32| {
        let mut spec = json!({"operator": operator});
        if let Some(order) = order {
            spec["zeroDepth"] = json!({"order": order});
        }
        let model = json!({"numHiddenLayers": layers});
        let (plan, model) = growth(&[("/spec/stages/1/growth", spec), ("/spec/stages/1/model", model)]);
        assert_eq!(model.num_hidden_layers, layers);
        (plan.layers.clone(), plan.zero_output.clone(), plan.effect(2).0)
    };
    let (spike, preserving) = (GrowthEffect::Spike, GrowthEffect::Preserving);
    assert_eq!(of("Interleave", None, 3), (vec![0, 0, 1], vec![], spike));
    assert_eq!(of("ZeroDepth", None, 5), (vec![0, 0, 0, 1, 1], vec![1, 2, 4], preserving));
    assert_eq!(of("ZeroDepth", Some("Stacked"), 5), (vec![0, 1, 0, 1, 0], vec![2, 3, 4], preserving));
    // A multiple, said either way, is what it always was.
    let by_factor = growth(&[("/spec/stages/1/growth", json!({"operator": "ZeroDepth", "factor": 3}))]).0;
    assert_eq!(of("ZeroDepth", None, 6), (by_factor.layers, by_factor.zero_output, preserving));
}

fn sources(map: &WidthMap) -> Vec<Option<u32>> {
    map.sources().collect()
}

#[test]
fn a_factor_multiplies_every_width() {
    let (plan, model) = growth(&[
        ("/spec/model/numKeyValueHeads", json!(2)),
        ("/spec/training/seed", json!(5)),
        ("/spec/stages/1/growth", json!({"operator": "DirectWidth", "factor": 2})),
    ]);
    assert_eq!((model.hidden_size, model.intermediate_size, model.head_dim), (128, 352, 16));
    assert_eq!((model.num_attention_heads, model.num_key_value_heads, model.num_hidden_layers), (8, 4, 2));
    let width = plan.width.as_ref().unwrap();
    assert_eq!(width.rule, WidthRule::Direct { split: WidthSplit::Uneven, seed: 5 });
    assert_eq!(width.hidden, WidthMap::repeat(64, 128));
    assert_eq!(sources(&width.heads), [0, 1, 2, 3, 0, 1, 2, 3].map(Some));
    assert_eq!(sources(&width.key_value_heads), [0, 1, 0, 1].map(Some));
    assert_eq!(plan.layers, [0, 1]);
    assert_eq!(plan.effect(2).0, GrowthEffect::Preserving);
}

#[test]
fn query_heads_stay_with_their_keys() {
    let maps = |operator: &str, source: (u32, u32), target: (u32, u32)| {
        let (plan, _) = growth(&[
            ("/spec/model/numAttentionHeads", json!(source.0)),
            ("/spec/model/numKeyValueHeads", json!(source.1)),
            ("/spec/model/headDim", json!(8)),
            ("/spec/stages/1/growth", json!({"operator": operator})),
            (
                "/spec/stages/1/model",
                json!({
                    "intermediateSize": 352, "headDim": 8,
                    "numAttentionHeads": target.0, "numKeyValueHeads": target.1,
                }),
            ),
        ]);
        let width = plan.width.unwrap();
        let text = |map: &WidthMap| {
            let name = |source: Option<u32>| source.map_or("-".to_owned(), |source| source.to_string());
            sources(map).into_iter().map(name).collect::<String>()
        };
        (text(&width.heads), text(&width.key_value_heads))
    };
    let same = |heads: &str, keys: &str| (heads.to_owned(), keys.to_owned());
    // More queries to each key, more keys, both, and the parts of a group on copies of its key.
    assert_eq!(maps("DirectWidth", (4, 2), (8, 2)), same("01012323", "01"));
    assert_eq!(maps("DirectWidth", (4, 2), (6, 3)), same("012301", "010"));
    assert_eq!(maps("DirectWidth", (2, 2), (6, 3)), same("001100", "010"));
    assert_eq!(maps("DirectWidth", (4, 1), (4, 4)), same("0123", "0000"));
    assert_eq!(maps("DirectWidth", (4, 1), (8, 4)), same("01230123", "0000"));
    assert_eq!(maps("ZeroWidth", (4, 2), (8, 2)), same("01--23--", "01"));
    assert_eq!(maps("ZeroWidth", (4, 2), (6, 3)), same("0123--", "01-"));
    assert_eq!(maps("ZeroWidth", (2, 2), (6, 3)), same("0-1---", "01-"));
    assert_eq!(maps("ZeroWidth", (4, 1), (4, 2)), same("0123", "00"));
}

#[test]
fn sizes_of_the_stage_say_what_grows() {
    let (plan, model) = growth(&[
        ("/spec/stages/1/growth", json!({"operator": "ZeroWidth", "optimizerState": "Keep"})),
        ("/spec/stages/1/model", json!({"hiddenSize": 96, "numAttentionHeads": 6, "initializer": "Paper"})),
    ]);
    assert_eq!((model.hidden_size, model.intermediate_size), (96, 176));
    // As many queries to a key as before.
    assert_eq!((model.num_attention_heads, model.num_key_value_heads, model.head_dim), (6, 6, 16));
    let width = plan.width.unwrap();
    let eps = 1e-5 * 64.0 / 96.0;
    assert_eq!(model.rms_norm_eps, eps);
    assert_eq!(width.rule, WidthRule::Zero { initializer: Initializer::Paper, seed: 0, rms_norm_eps: eps });
    assert!(width.intermediate.is_identity() && !width.hidden.is_identity());
    let (_, model) = growth(&[
        ("/spec/stages/1/growth", json!({"operator": "ZeroWidth"})),
        ("/spec/stages/1/model", json!({"hiddenSize": 96, "rmsNormEps": 1e-6})),
    ]);
    assert_eq!(model.rms_norm_eps, 1e-6);
}

#[test]
fn width_and_depth_grow_together() {
    let (plan, model) = growth(&[(
        "/spec/stages/1/growth",
        json!({"operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2}}),
    )]);
    assert_eq!(plan.layers, [0, 1, 0, 1]);
    assert_eq!((model.num_hidden_layers, model.hidden_size), (4, 128));
    assert_eq!(plan.effect(2).0, GrowthEffect::Spike);
    let (plan, _) = growth(&[(
        "/spec/stages/1/growth",
        json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "ZeroDepth", "factor": 2}}),
    )]);
    assert_eq!(plan.effect(2).0, GrowthEffect::Preserving);
}

#[test]
fn learned_operators_learn_as_their_stage_trains() {
    let (plan, model) = growth(&[
        ("/spec/stages/1/growth", json!({"operator": "LearnDepth"})),
        ("/spec/stages/1/model", json!({"numHiddenLayers": 5})),
        (
            "/spec/stages/1/training",
            json!({"gradientClip": 2.0, "optimizer": {"adamW": {"learningRate": 0.01}}}),
        ),
    ]);
    assert_eq!((plan.layers.as_slice(), model.num_hidden_layers), ([0, 1, 0, 1, 0].as_slice(), 5));
    assert_eq!(plan.effect(2).0, GrowthEffect::Spike);
    let learn = plan.learn.unwrap();
    assert!(learn.depth && learn.width.is_none() && plan.width.is_none());
    assert_eq!((learn.steps, learn.adam_w.learning_rate, learn.gradient_clip), (100, 0.01, 2.0));
    assert_eq!((learn.sequence_length, learn.batch_tokens, learn.micro_batches()), (256, 4096, 1));

    let (plan, model) = growth(&[(
        "/spec/stages/1/growth",
        json!({
            "operator": "LearnWidth", "factor": 2, "learn": {"steps": 7, "learningRate": 0.5},
            "depth": {"operator": "ZeroDepth", "factor": 2},
        }),
    )]);
    assert_eq!((model.hidden_size, model.num_hidden_layers, model.rms_norm_eps), (128, 4, 1e-5));
    assert_eq!(plan.zero_output, [1, 3]);
    let learn = plan.learn.unwrap();
    assert_eq!((learn.depth, learn.steps, learn.adam_w.learning_rate), (false, 7, 0.5));
    assert_eq!(learn.width.unwrap().hidden, WidthMap::pad(64, 128));
}

#[test]
fn learning_says_what_it_costs() {
    let edits = [("/spec/stages/1/growth", json!({"operator": "LearnDepth", "factor": 4}))];
    let [note] = &plan(&edits).unwrap().notes[..] else { panic!() };
    assert!(note.starts_with("spec.stages[1]: LearnDepth learns for 100 steps of 4096 tokens"), "{note}");
    assert!(note.contains("about 0.0 GB") || note.contains("about 0.1 GB"), "{note}");
}

#[test]
fn an_uneven_width_is_noted() {
    let plan = plan(&[
        ("/spec/stages/1/growth", json!({"operator": "DirectWidth", "noise": 0.3})),
        ("/spec/stages/1/model", json!({"hiddenSize": 96})),
    ])
    .unwrap();
    assert!(plan.notes[0].contains("hiddenSize 96 is no multiple of 64"), "{:?}", plan.notes);
    assert!(plan.notes[1].contains("noise above 0.2"), "{:?}", plan.notes);
    let heads = self::plan(&[
        ("/spec/stages/1/growth", json!({"operator": "ZeroWidth"})),
        ("/spec/stages/1/model", json!({"hiddenSize": 70, "headDim": 16})),
    ]);
    assert!(heads.unwrap().notes[0].contains("transformers 5 does not open"));
    let StageStart::Growth(growth) = &plan.stages[1].start else { panic!() };
    assert_eq!(growth.effect(2).0, GrowthEffect::Spike);
}

#[test]
fn a_plan_of_an_earlier_version_is_read_and_written_as_it_was() {
    let text = r#"{"fromStage":"small","operator":"Stack","layers":[0,1,0,1],"optimizerState":"Reset"}"#;
    let plan: GrowthPlan = serde_json::from_str(text).unwrap();
    assert_eq!(plan.layers, [0, 1, 0, 1]);
    assert_eq!(serde_json::to_string(&plan).unwrap(), text);
}

#[test]
fn a_width_plan_is_checked_against_its_source() {
    let edits = [("/spec/stages/1/growth", json!({"operator": "DirectWidth", "factor": 2}))];
    let (plan, _) = growth(&edits);
    let source = self::plan(&edits).unwrap().stages[0].model.clone();
    let width = plan.width.unwrap();
    assert_eq!(width.check(&source), Ok(()));
    let refused = |change: &dyn Fn(&mut WidthPlan)| {
        let mut width = width.clone();
        change(&mut width);
        width.check(&source).unwrap_err().to_string()
    };
    let other = refused(&|width| width.hidden = WidthMap::repeat(32, 128));
    assert!(other.contains("is for 32 channels, but the source has 64"), "{other}");
    let outside = refused(&|width| width.intermediate.runs[0].from = Some(1));
    assert!(outside.contains("takes 176 channels from 1, but the source has 176"), "{outside}");
    let new = refused(&|width| width.hidden = WidthMap::pad(64, 128));
    assert!(new.contains("copies have no new channels"), "{new}");
    let lost = refused(&|width| width.heads = WidthMap::from_sources(4, [Some(0); 8]));
    assert!(lost.contains("left out"), "{lost}");
    let moved = refused(&|width| width.heads = WidthMap::from_sources(4, [1, 0, 2, 3, 0, 1, 2, 3].map(Some)));
    assert!(moved.contains("query head 0 with a copy of another key head"), "{moved}");
}

#[test]
fn a_shallow_base_and_a_large_factor_are_noted() {
    let plan = plan(&[
        ("/spec/stages/0/model/numHiddenLayers", json!(1)),
        ("/spec/stages/1/growth/factor", json!(12)),
    ])
    .unwrap();
    assert_eq!(plan.notes.len(), 2, "{:?}", plan.notes);
    assert!(plan.notes[0].contains("factor 12 is far above"));
    assert!(plan.notes[1].contains("a base of 1 layer lost"));
}

#[test]
fn a_given_start_is_kept() {
    let plan = plan(&[("/spec/stages/0/initFrom", json!({"uri": "s3://bucket/base"}))]).unwrap();
    assert_eq!(plan.stages[0].start, StageStart::Checkpoint { uri: "s3://bucket/base".to_owned() });
}

#[test]
fn a_stage_takes_the_place_of_an_equal_one_only() {
    let first = |edits: &[Edit]| plan(edits).unwrap().stages.remove(0);
    let trained_by: Edit = ("/spec/stages/0/trainedBy", json!({"job": "base"}));
    assert_eq!(
        plan(std::slice::from_ref(&trained_by)).unwrap().notes,
        ["spec.stages[0]: job base trains it"]
    );
    let own = first(&[trained_by]);
    assert_eq!(own.trained_by.as_deref(), Some("base"));
    let equal = [
        ("/metadata/name", json!("base")),
        ("/spec/stages/1/growth/factor", json!(2)),
        ("/spec/evaluation/everyTokens", json!(65536)),
        ("/spec/checkpoint/keepLast", json!(7)),
        ("/spec/stages/0/elastic", json!({"minReplicas": 1, "maxReplicas": 1})),
        ("/spec/stages/0/template", json!({"nodeSelector": {"pool": "small"}})),
    ];
    for edit in equal {
        assert_eq!(own.mismatch(&first(std::slice::from_ref(&edit))), None, "{edit:?}");
    }
    let different = [
        ("/spec/stages/0/name", json!("other"), "name"),
        ("/spec/storage/uri", json!("s3://elsewhere/jobs"), "storage"),
        ("/spec/data/train/0/weight", json!(3), "data"),
        ("/spec/stages/0/model/numHiddenLayers", json!(3), "model"),
        ("/spec/stages/0/initFrom", json!({"uri": "s3://bucket/weights"}), "model"),
        ("/spec/stages/0/tokens", json!(4096), "tokens"),
        ("/spec/training/seed", json!(5), "training"),
    ];
    for (path, value, field) in different {
        let other = first(&[("/metadata/name", json!("base")), (path, value)]);
        let message = own.mismatch(&other).unwrap_or_default();
        assert!(message.contains("job base differs in ") && message.contains(field), "{field}: {message}");
    }
}

#[test]
fn every_mistake_says_what_to_do() {
    let cases: Vec<(Vec<Edit>, &str)> = vec![
        (vec![("/metadata/name", json!("A"))], "metadata.name: start it with a letter and use only a-z"),
        (vec![("/metadata/name", json!("a".repeat(33)))], "metadata.name: it is longer than 32 characters"),
        (vec![("/spec/stages", json!([]))], "spec.stages: there are 0 stages; write 1 to 16"),
        (
            vec![("/spec/stages/1/name", json!("small"))],
            "spec.stages[1].name: another stage is called small too",
        ),
        (vec![("/spec/stages/1/name", json!("-"))], "spec.stages[1].name: start it with a letter"),
        (vec![("/spec/model/hiddenSize", Value::Null)], "spec.model.hiddenSize: it is missing; say how wide"),
        (
            vec![("/spec/model/intermediateSize", Value::Null)],
            "spec.model.intermediateSize: it is missing; about 8/3",
        ),
        (vec![("/spec/stages/0/model", Value::Null)], "spec.model.numHiddenLayers: it is missing"),
        (
            vec![("/spec/stages/0/model/numHiddenLayers", json!(0))],
            "spec.stages[0].model.numHiddenLayers: 0 is out of range; use 1 to 1024",
        ),
        (
            vec![("/spec/model/hiddenSize", json!(66))],
            "spec.model.headDim: it is missing, and hiddenSize 66 is no multiple",
        ),
        (
            vec![("/spec/model/numAttentionHeads", json!(64))],
            "spec.model.headDim: a head of 1 channels cannot carry",
        ),
        (vec![("/spec/model/headDim", json!(7))], "spec.model.headDim: a head of 7 channels"),
        (
            vec![("/spec/model/numKeyValueHeads", json!(3))],
            "spec.model.numKeyValueHeads: 3 does not divide the 4",
        ),
        (vec![("/spec/model/numKeyValueHeads", json!(0))], "spec.model.numKeyValueHeads: 0 does not divide"),
        (
            vec![("/spec/model/vocabSize", json!(100))],
            "spec.model.vocabSize: 100 is smaller than data.tokenizer.train.vocabSize 2048",
        ),
        (
            vec![("/spec/data/tokenizer", json!({"uri": "file:///t.json"}))],
            "spec.model.vocabSize: it is missing; set it to the size",
        ),
        (
            vec![("/spec/model/maxPositionEmbeddings", json!(128))],
            "spec.model.maxPositionEmbeddings: 128 is shorter than training.sequenceLength 256",
        ),
        (vec![("/spec/model/ropeTheta", json!(0.0))], "spec.model.ropeTheta: 0 is not above 0"),
        (
            vec![("/spec/training/sequenceLength", json!(1))],
            "spec.training.sequenceLength: a sequence needs at least 2",
        ),
        (
            vec![("/spec/training/globalBatchTokens", json!(4097))],
            "spec.training.globalBatchTokens: 4097 is not a multiple of sequenceLength 256; use 4096 or 4352",
        ),
        (
            vec![("/spec/training/globalBatchTokens", json!(100))],
            "not a multiple of sequenceLength 256; use 256",
        ),
        (
            vec![("/spec/training/globalBatchTokens", json!(0))],
            "spec.training.globalBatchTokens: a step needs tokens",
        ),
        (
            vec![("/spec/training/microBatchTokens", json!(1000))],
            "spec.training.microBatchTokens: 1000 is not a multiple of sequenceLength 256; use 768 or 1024",
        ),
        (
            vec![("/spec/training/microBatchTokens", json!(768))],
            "spec.training.globalBatchTokens: 4096 is not a multiple of microBatchTokens 768; use 3840 or 4608",
        ),
        (
            vec![("/spec/stages/1/training/microBatchTokens", json!(0))],
            "spec.stages[1].training.microBatchTokens: a pass needs tokens",
        ),
        (vec![("/spec/training/seed", json!(-1))], "spec.training.seed: -1 is negative; use 0 or more"),
        (
            vec![("/spec/training/optimizer", json!({"adamW": {"beta1": 1.0}}))],
            "spec.training.optimizer.adamW.beta1: 1 is no decay rate",
        ),
        (
            vec![("/spec/stages/1/training/optimizer", json!({"adamW": {"learningRate": -1.0}}))],
            "spec.stages[1].training.optimizer.adamW.learningRate: -1 is not a finite number from 0 up",
        ),
        (
            vec![("/spec/training/schedule", json!({"constant": {"warmupTokens": "2M"}}))],
            "spec.training.schedule.constant.warmupTokens: a warm-up of 2M tokens is longer than stage small (1048576 tokens)",
        ),
        (
            vec![(
                "/spec/training/schedule",
                json!({"cosine": {"warmupTokens": "1M", "horizonTokens": "500K"}}),
            )],
            "spec.training.schedule.cosine.horizonTokens: the cosine ends at 500K tokens, before its warm-up of 1M",
        ),
        (
            vec![("/spec/training/schedule", json!({"wsd": {"warmupTokens": "1M", "decayTokens": "500K"}}))],
            "spec.training.schedule.wsd.decayTokens: a warm-up of 1M and a decay of 500K tokens do not fit",
        ),
        (
            vec![("/spec/training/schedule", json!({}))],
            "spec.training.schedule: set exactly one of cosine, wsd and constant",
        ),
        (
            vec![("/spec/training/schedule", json!({"cosine": {"minLearningRateRatio": 2.0}}))],
            "spec.training.schedule.cosine.minLearningRateRatio: 2 is no share",
        ),
        (vec![("/spec/stages/0/tokens", json!(0))], "spec.stages[0].tokens: 0 tokens are no stage"),
        (vec![("/spec/stages/1/tokens", json!("auto"))], "spec.stages[1].tokens: auto needs a later stage"),
        (
            vec![("/spec/stages/0/tokens", json!("9000000T")), ("/spec/stages/1/tokens", json!("9000000T"))],
            "spec.stages: all stages together",
        ),
        (
            vec![("/spec/stages/0/growth", json!({"operator": "Stack", "factor": 2}))],
            "spec.stages[0].growth: the first stage has no stage to grow from",
        ),
        (
            vec![("/spec/stages/1/growth", Value::Null)],
            "spec.stages[1].growth: every stage after the first must grow",
        ),
        (
            vec![("/spec/stages/1/initFrom", json!({"uri": "s3://b"}))],
            "spec.stages[1].initFrom: only the first stage",
        ),
        (
            vec![("/spec/stages/1/trainedBy", json!({"job": "base"}))],
            "spec.stages[1].trainedBy: only the first stage",
        ),
        (
            vec![("/spec/stages/0/trainedBy", json!({"job": "tiny"}))],
            "spec.stages[0].trainedBy.job: tiny is this job itself",
        ),
        (
            vec![("/spec/stages/1/model", json!({"hiddenSize": 128}))],
            "spec.stages[1].model.hiddenSize: a stage that grows in depth keeps",
        ),
        (
            vec![("/spec/stages/1/model", json!({"ropeTheta": 5e5}))],
            "spec.stages[1].model.ropeTheta: no growth changes it",
        ),
        (
            vec![("/spec/stages/1/model", json!({"initializer": "Paper"}))],
            "spec.stages[1].model.initializer: in a stage that grows it belongs to one of [ZeroWidth, RandomDepth, RandomWidth]",
        ),
        (
            vec![("/spec/stages/1/model", json!({"numHiddenLayers": 6}))],
            "spec.stages[1].growth.factor: factor 4 makes 8 of 2 layers, but model.numHiddenLayers says 6",
        ),
        (
            vec![("/spec/stages/1/growth/factor", Value::Null)],
            "spec.stages[1].growth.factor: Stack needs to know how deep",
        ),
        (
            vec![("/spec/stages/1/growth/factor", json!(1))],
            "spec.stages[1].growth.factor: factor 1 does not grow",
        ),
        (
            vec![("/spec/stages/1/growth/factor", json!(513))],
            "spec.stages[1].growth.factor: 2 layers times 513 are more than 1024",
        ),
        (
            vec![
                ("/spec/stages/1/growth/factor", Value::Null),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 5})),
            ],
            "spec.stages[1].model.numHiddenLayers: 5 layers are no multiple of the 2 that grow, which Stack repeats",
        ),
        (
            vec![
                ("/spec/stages/1/growth/factor", Value::Null),
                ("/spec/stages/1/growth/operator", json!("ZeroDepth")),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 2})),
            ],
            "spec.stages[1].model.numHiddenLayers: 2 layers are no more than the 2 that grow; use more",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "Stack", "factor": 2, "layerMap": {"layers": [0]}}),
            )],
            "spec.stages[1].growth.layerMap: layerMap belongs to operator LayerMap",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LayerMap"}))],
            "spec.stages[1].growth.layerMap: operator LayerMap needs layerMap",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "factor": 2, "layerMap": {"layers": [0]}}),
            )],
            "spec.stages[1].growth.factor: factor does not go with LayerMap",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "Stack", "factor": 2, "zeroDepth": {}}))],
            "spec.stages[1].growth.zeroDepth: zeroDepth belongs to operator ZeroDepth",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "ZeroWidth", "factor": 2, "directWidth": {}}))],
            "spec.stages[1].growth.directWidth: directWidth belongs to operator DirectWidth",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "Interleave", "factor": 2, "depth": {"operator": "Stack"}}),
            )],
            "spec.stages[1].growth.depth: depth belongs to operators of the width; Interleave grows",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "Stack", "factor": 2, "noise": 1.5}))],
            "spec.stages[1].growth.noise: 1.5 is no share",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "DirectWidth"}}),
            )],
            "spec.stages[1].growth.depth.operator: DirectWidth does not grow the depth",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "Stack"}}),
            )],
            "spec.stages[1].growth.depth.factor: Stack needs to know how deep",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "DirectWidth", "factor": 1}))],
            "spec.stages[1].growth.factor: a factor below 2",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LearnDepth"}))],
            "spec.stages[1].growth.factor: LearnDepth needs to know how deep",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "LearnDepth"})),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 2})),
            ],
            "spec.stages[1].model.numHiddenLayers: 2 layers are no more than the 2 that grow; use more",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LearnWidth"}))],
            "spec.stages[1].growth: nothing becomes wider",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LearnDepth", "factor": 2, "optimizerState": "Keep"}),
            )],
            "spec.stages[1].growth.optimizerState: LearnDepth mixes weights, and moments of a mixture are not defined",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "ZeroWidth", "factor": 2, "learn": {}}))],
            "spec.stages[1].growth.learn: learn belongs to operator LearnDepth or LearnWidth",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LearnDepth", "factor": 2, "learn": {"steps": 10001}}),
            )],
            "spec.stages[1].growth.learn.steps: 10001 steps are more than 10000",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LearnDepth", "factor": 2, "learn": {"learningRate": -1.0}}),
            )],
            "spec.stages[1].growth.learn.learningRate: -1 is no learning rate",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "LearnDepth", "factor": 2}}),
            )],
            "spec.stages[1].growth.depth.operator: LearnDepth is learned together with the width",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LearnWidth", "factor": 2, "depth": {"operator": "LearnWidth", "factor": 2}}),
            )],
            "spec.stages[1].growth.depth.operator: LearnWidth does not grow the depth",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "DirectWidth"}))],
            "spec.stages[1].growth: nothing becomes wider",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth", "factor": 2})),
                ("/spec/stages/1/model", json!({"hiddenSize": 192})),
            ],
            "spec.stages[1].model.hiddenSize: factor makes 128 of 64, but this says 192",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth"})),
                ("/spec/stages/1/model", json!({"hiddenSize": 32})),
            ],
            "spec.stages[1].model.hiddenSize: 32 is smaller than the 64",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "DirectWidth", "factor": 4096}))],
            "spec.stages[1].model.hiddenSize: 262144 is more than 131072",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth"})),
                ("/spec/stages/1/model", json!({"hiddenSize": 128, "headDim": 32})),
            ],
            "spec.stages[1].model.headDim: heads keep their width of 16, not 32",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "ZeroWidth"})),
                ("/spec/stages/1/model", json!({"intermediateSize": 200, "numHiddenLayers": 4})),
            ],
            "spec.stages[1].model.numHiddenLayers: ZeroWidth keeps the 2 layers",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "ZeroWidth", "factor": 2})),
                ("/spec/stages/1/model", json!({"rmsNormEps": 0.0})),
            ],
            "spec.stages[1].model.rmsNormEps: 0 is not above 0",
        ),
        (
            vec![
                ("/spec/model/numAttentionHeads", json!(8)),
                ("/spec/model/numKeyValueHeads", json!(2)),
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth"})),
                ("/spec/stages/1/model", json!({"numAttentionHeads": 10})),
            ],
            "spec.stages[1].model.numKeyValueHeads: it is missing, and 10 query heads cannot be grouped by 4",
        ),
        (
            vec![
                ("/spec/model/numAttentionHeads", json!(8)),
                ("/spec/model/numKeyValueHeads", json!(2)),
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth"})),
                ("/spec/stages/1/model", json!({"numAttentionHeads": 9, "numKeyValueHeads": 3})),
            ],
            "spec.stages[1].model.numKeyValueHeads: 3 query heads to a key head cannot be made of groups of 4",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth"})),
                ("/spec/stages/1/model", json!({"numAttentionHeads": 10, "numKeyValueHeads": 4})),
            ],
            "spec.stages[1].model.numKeyValueHeads: 4 does not divide the 10",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"solar": {"dropLayers": 2}}}),
            )],
            "spec.stages[1].growth.layerMap.solar: 2 layers cannot be dropped of 2",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"midas": {"blockLayers": 3}}}),
            )],
            "spec.stages[1].growth.layerMap.midas: 2 layers are no whole blocks of 3",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"lidas": {"blockLayers": 3}}}),
            )],
            "spec.stages[1].growth.layerMap.lidas: half a block of 3",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"llamaPro": {"groups": 3}}}),
            )],
            "spec.stages[1].growth.layerMap.llamaPro: 3 groups of 2 layers",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LayerMap", "layerMap": {}}))],
            "spec.stages[1].growth.layerMap: set exactly one",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LayerMap", "layerMap": {"layers": []}}))],
            "spec.stages[1].growth.layerMap.layers: it lists 0 layers",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LayerMap", "layerMap": {"layers": [0, 2]}}))],
            "spec.stages[1].growth.layerMap.layers: there is no layer 2; the source has 2 layers, 0 to 1",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LayerMap", "layerMap": {"pattern": "123"}}))],
            "spec.stages[1].growth.layerMap.pattern: there is no layer 3; the source has 2 layers, 1 to 2",
        ),
        (
            vec![("/spec/stages/1/growth", json!({"operator": "LayerMap", "layerMap": {"pattern": "1a"}}))],
            "spec.stages[1].growth.layerMap.pattern: \"1a\" is no part of a pattern",
        ),
        (
            vec![
                ("/spec/stages/1/growth", json!({"operator": "LayerMap", "layerMap": {"pattern": "12*3"}})),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 8})),
            ],
            "spec.stages[1].growth.layerMap.pattern: it lists 6 layers, but model.numHiddenLayers says 8",
        ),
        (
            vec![("/spec/checkpoint/everySeconds", json!(0))],
            "spec.checkpoint.everySeconds: it must be at least 1",
        ),
        (vec![("/spec/checkpoint/keepLast", json!(0))], "spec.checkpoint.keepLast: at least 1"),
        (
            vec![("/spec/checkpoint/everyTokens", json!(0))],
            "spec.checkpoint.everyTokens: 0 tokens are no distance",
        ),
        (
            vec![("/spec/evaluation/everyTokens", json!(0))],
            "spec.evaluation.everyTokens: 0 tokens are no distance",
        ),
        (
            vec![("/spec/evaluation/tokens", json!(255))],
            "spec.evaluation.tokens: 255 tokens are less than one sequence of 256",
        ),
    ];
    for (edits, expected) in cases {
        match plan(&edits) {
            Ok(_) => panic!("{edits:?} resolved"),
            Err(errors) => {
                assert!(
                    errors.iter().any(|error| error.contains(expected)),
                    "{expected}\nnot in {errors:#?}"
                );
            }
        }
    }
}

#[test]
fn all_mistakes_are_found_in_one_pass_and_once() {
    let errors = plan(&[
        ("/spec/model/hiddenSize", Value::Null),
        ("/spec/training/seed", json!(-1)),
        ("/spec/stages/0/name", json!("UPPER")),
        ("/spec/stages/1/initFrom", json!({"uri": "s3://b"})),
        ("/spec/evaluation/tokens", json!(1)),
    ])
    .unwrap_err();
    assert_eq!(errors.len(), 5, "{errors:#?}");
}

#[test]
fn numbers_keep_every_bit_in_a_plan_file() {
    for index in 1..20_000 {
        let number = 1e17 / f64::from(index);
        let read: f64 = serde_json::from_str(&serde_json::to_string(&number).unwrap()).unwrap();
        assert_eq!(read.to_bits(), number.to_bits());
    }
}

//! What holds for every job, and that no job whatever makes the resolution panic.
use crate::common::{example, job};
use growth_crds::plan::growth_map::parse_pattern;
use growth_crds::plan::{JobPlan, ModelConfig, StageStart};
use growth_crds::resolve;
use proptest::prelude::*;
use serde_json::{Value, json};

/// A count that is small, ordinary, or absurd.
fn count() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..4, 4u32..300, any::<u32>()]
}

fn optional<T: Clone + std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    prop::option::weighted(0.8, of)
}

fn tokens() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!("auto")),
        (0i64..10_000_000).prop_map(|n| json!(n)),
        (0..=i64::MAX).prop_map(|n| json!(n))
    ]
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![(-1.0f64..2.0).prop_map(|n| json!(n)), (-1e300f64..1e300).prop_map(|n| json!(n))]
}

prop_compose! {
    fn model()(
        layers in optional(count()), hidden in optional(count()), ffn in optional(count()),
        heads in optional(count()), kv in optional(count()), head_dim in optional(count()),
        vocab in optional(count()), positions in optional(count()), theta in optional(number()),
        tied in any::<bool>(),
    ) -> Value {
        without_nulls(json!({
            "numHiddenLayers": layers, "hiddenSize": hidden, "intermediateSize": ffn, "numAttentionHeads": heads,
            "numKeyValueHeads": kv, "headDim": head_dim, "vocabSize": vocab, "maxPositionEmbeddings": positions,
            "ropeTheta": theta, "tieWordEmbeddings": tied,
        }))
    }
}

fn any_operator() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "Stack",
        "Interleave",
        "LayerMap",
        "ZeroDepth",
        "DirectWidth",
        "ZeroWidth",
        "RandomDepth",
        "RandomWidth",
        "LearnDepth",
        "LearnWidth",
    ])
}

fn preset() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["solar", "midas", "lidas", "llamaPro"])
}

fn growth() -> impl Strategy<Value = Value> {
    prop_oneof![
        optional(count()).prop_map(|factor| without_nulls(json!({"operator": "Stack", "factor": factor}))),
        prop::collection::vec(count(), 0..30)
            .prop_map(|layers| json!({"operator": "LayerMap", "layerMap": {"layers": layers}})),
        (any_operator(), count(), tokens())
            .prop_filter("a ramp has a length", |(.., ramp)| ramp.is_number())
            .prop_map(|(operator, factor, ramp)| json!({
                "operator": operator, "factor": factor, "randomDepth": {"rampTokens": ramp},
            })),
        "[0-9*-]{0,12}".prop_map(|pattern| json!({"operator": "LayerMap", "layerMap": {"pattern": pattern}})),
        Just(json!({"operator": "LayerMap", "factor": 3})),
        (
            any_operator(),
            optional(count()),
            optional((any_operator(), optional(count()))),
            optional(number())
        )
            .prop_map(|(operator, factor, depth, noise)| {
                let depth = depth
                    .map(|(operator, factor)| without_nulls(json!({"operator": operator, "factor": factor})));
                without_nulls(json!({
                    "operator": operator, "factor": factor, "depth": depth, "noise": noise,
                }))
            }),
        (
            prop::sample::select(vec!["Nothing", "Source", "SourceButHead"]),
            prop::sample::select(vec!["Restart", "Continue"]),
            [optional(count()), optional(count()), optional(count())],
            number(),
        )
            .prop_map(|(freeze, schedule, [freeze_tokens, rewarm_tokens, ramp_tokens], ratio)| {
                without_nulls(json!({
                    "operator": "ZeroDepth", "factor": "auto", "freeze": freeze, "freezeTokens": freeze_tokens,
                    "schedule": schedule, "rewarmTokens": rewarm_tokens,
                    "newParameters": without_nulls(json!({"learningRateRatio": ratio, "rampTokens": ramp_tokens})),
                }))
            }),
        (preset(), count(), count()).prop_map(|(preset, size, copies)| {
            let options = match preset {
                "solar" => json!({"dropLayers": size}),
                "llamaPro" => json!({"groups": size, "copies": copies}),
                _ => json!({"blockLayers": size}),
            };
            json!({"operator": "LayerMap", "layerMap": {preset: options}})
        }),
    ]
}

prop_compose! {
    fn stage()(
        name in "[a-c-]{0,14}", model in optional(model()), growth in optional(growth()), tokens in tokens(),
        batch in optional(count()), warmup in optional(count()), learning_rate in optional(number()),
    ) -> Value {
        let training = without_nulls(json!({
            "globalBatchTokens": batch,
            "schedule": warmup.map(|tokens| json!({"constant": {"warmupTokens": tokens}})),
            "optimizer": learning_rate.map(|rate| json!({"adamW": {"learningRate": rate}})),
        }));
        without_nulls(json!({"name": name, "model": model, "growth": growth, "tokens": tokens, "training": training}))
    }
}

prop_compose! {
    /// Any job that can be read, sense or nonsense.
    fn any_job()(
        model in model(), stages in prop::collection::vec(stage(), 0..5), sequence in count(), batch in count(),
        micro in optional(count()), seed in any::<i64>(), every in optional(count()),
        wsd in optional((count(), count())),
    ) -> Value {
        let mut object = example();
        object["spec"]["model"] = model;
        object["spec"]["stages"] = json!(stages);
        object["spec"]["checkpoint"] = without_nulls(json!({"everyTokens": every}));
        object["spec"]["training"] = without_nulls(json!({
            "sequenceLength": sequence, "globalBatchTokens": batch, "microBatchTokens": micro, "seed": seed,
            "schedule": wsd.map(|(warmup, decay)| json!({"wsd": {"warmupTokens": warmup, "decayTokens": decay}})),
        }));
        object
    }
}

prop_compose! {
    /// A job that must resolve.
    fn good_job()(
        heads in 1u32..9, kv_share in 1u32..5, head_dim in 1u32..33, hidden in 2u32..500, ffn in 1u32..900,
        layers in 1u32..7, vocab in 2048u32..5000, tied in any::<bool>(), sequences in 1u64..9, micros in 1u64..9,
        sequence in 2u32..300, tokens in prop::collection::vec(1u64..10_000_000, 1..5), factor in 2u32..5,
    ) -> Value {
        let mut object = example();
        object["spec"]["model"] = json!({
            "hiddenSize": hidden, "intermediateSize": ffn, "numAttentionHeads": heads * kv_share,
            "numKeyValueHeads": heads, "headDim": 2 * head_dim, "vocabSize": vocab, "tieWordEmbeddings": tied,
            "numHiddenLayers": layers,
        });
        let micro = sequences * u64::from(sequence);
        object["spec"]["training"] = json!({
            "sequenceLength": sequence, "globalBatchTokens": micro * micros, "microBatchTokens": micro,
        });
        let stage = |(index, tokens): (usize, &u64)| match index {
            0 => json!({"name": "s0", "tokens": tokens}),
            _ => json!({
                "name": format!("s{index}"), "tokens": tokens, "growth": {"operator": "Stack", "factor": factor},
            }),
        };
        object["spec"]["stages"] = tokens.iter().enumerate().map(stage).collect();
        object
    }
}

fn without_nulls(mut object: Value) -> Value {
    if let Some(members) = object.as_object_mut() {
        members.retain(|_, value| !value.is_null());
    }
    object
}

/// Elements of every tensor of a checkpoint, by the names of Hugging Face.
fn tensor_elements(model: &ModelConfig) -> (u64, u64) {
    let size = |shape: &[u32]| shape.iter().map(|dimension| u64::from(*dimension)).product::<u64>();
    let hidden = model.hidden_size;
    let query = model.num_attention_heads * model.head_dim;
    let key = model.num_key_value_heads * model.head_dim;
    let mut embedding = size(&[model.vocab_size, hidden]);
    if !model.tie_word_embeddings {
        embedding += size(&[model.vocab_size, hidden]);
    }
    let mut rest = size(&[hidden]);
    for _ in 0..model.num_hidden_layers {
        rest += size(&[query, hidden]) + size(&[key, hidden]) + size(&[key, hidden]) + size(&[hidden, query]);
        rest += size(&[model.intermediate_size, hidden]) * 2 + size(&[hidden, model.intermediate_size]);
        rest += size(&[hidden]) * 2;
    }
    (embedding, rest)
}

fn check_plan(plan: &JobPlan) -> Result<(), TestCaseError> {
    let mut position = 0;
    for (index, stage) in plan.stages.iter().enumerate() {
        prop_assert_eq!(stage.tokens, stage.steps * stage.training.global_batch_tokens);
        prop_assert!(stage.steps > 0);
        prop_assert_eq!(stage.first_token, position);
        position += stage.tokens;
        prop_assert_eq!(stage.training.global_batch_tokens % stage.training.micro_batch_tokens, 0);
        prop_assert_eq!(stage.training.micro_batch_tokens % u64::from(stage.training.sequence_length), 0);
        prop_assert_eq!(stage.evaluation.every_tokens % stage.training.global_batch_tokens, 0);
        prop_assert!(stage.training.sequence_length <= stage.model.max_position_embeddings);
        prop_assert_eq!(stage.model.num_attention_heads % stage.model.num_key_value_heads, 0);
        prop_assert!(stage.flops.six_nd > 0.0 && stage.flops.exact.is_finite());
        prop_assert_eq!(stage.flops.exact, stage.exact_flops(stage.tokens));
        let special = &stage.training.after_growth;
        prop_assert!(special.schedule_start_tokens <= stage.first_token);
        if let Some(freeze) = &special.freeze {
            prop_assert!(freeze.tokens > 0 && freeze.tokens <= stage.tokens);
            prop_assert!(freeze.layers.iter().all(|layer| *layer < stage.model.num_hidden_layers));
        }
        prop_assert_eq!(stage.parameters.total, stage.parameters.embedding + stage.parameters.non_embedding);
        if let StageStart::Growth(growth) = &stage.start {
            let source = &plan.stages[index - 1];
            prop_assert_eq!(&growth.from_stage, &source.stage);
            let new = growth.new_layers.map_or(0, |new| new.count);
            prop_assert_eq!(growth.layers.len() as u32 + new, stage.model.num_hidden_layers);
            prop_assert_eq!(growth.is_masked(), stage.mask_ramp_tokens.is_some());
            prop_assert!(stage.mask_ramp_tokens.is_none_or(|ramp| ramp < stage.tokens));
            prop_assert!(growth.layers.iter().all(|layer| *layer < source.model.num_hidden_layers));
            prop_assert!(growth.zero_output.iter().all(|layer| *layer < stage.model.num_hidden_layers));
            prop_assert_eq!(&growth.grown(&source.model), &stage.model);
            if let Some(width) = &growth.width {
                prop_assert_eq!(width.check(&source.model), Ok(()));
            }
            if let Some(learn) = &growth.learn {
                prop_assert!(growth.width.is_none() && (learn.depth || learn.width.is_some()));
                prop_assert_eq!(learn.batch_tokens, stage.training.global_batch_tokens);
                if let Some(width) = &learn.width {
                    prop_assert_eq!(width.check(&source.model), Ok(()));
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn resolution_never_panics(object in any_job()) {
        let job = job(object);
        match resolve("any", &job.spec) {
            Ok(plan) => {
                prop_assert_eq!(plan.stages.len(), job.spec.stages.len());
                check_plan(&plan)?;
            }
            Err(errors) => {
                prop_assert!(!errors.as_slice().is_empty());
                for error in errors {
                    let known = error.field.starts_with("spec.") || error.field == "metadata.name";
                    prop_assert!(known && !error.message.is_empty(), "{}", error);
                }
            }
        }
    }

    #[test]
    fn good_jobs_resolve(object in good_job()) {
        let job = job(object);
        let plan = match resolve("good", &job.spec) {
            Ok(plan) => plan,
            Err(errors) => return Err(TestCaseError::fail(errors.to_string())),
        };
        check_plan(&plan)?;
        for stage in &plan.stages {
            let (embedding, rest) = tensor_elements(&stage.model);
            prop_assert_eq!(stage.parameters.embedding, embedding);
            prop_assert_eq!(stage.parameters.non_embedding, rest);
            // A plan file says what the plan says.
            let written = serde_json::to_string(stage).unwrap();
            prop_assert_eq!(stage, &serde_json::from_str(&written).unwrap());
        }
    }

    #[test]
    fn any_larger_widths_resolve(
        keys in 1u32..5, group in 1u32..5, more_keys in 0u32..5, target_group in 1u32..9, more in 0u32..40,
        operator in prop::sample::select(vec!["DirectWidth", "ZeroWidth", "RandomWidth", "LearnWidth"]),
    ) {
        let (heads, target_keys) = (keys * group, keys + more_keys);
        let target_heads = target_keys * target_group;
        let mut object = example();
        object["spec"]["model"] = json!({
            "hiddenSize": 64, "intermediateSize": 30, "numAttentionHeads": heads, "numKeyValueHeads": keys,
            "headDim": 8,
        });
        object["spec"]["stages"][1]["growth"] = json!({"operator": operator});
        object["spec"]["stages"][1]["model"] = json!({
            "hiddenSize": 64 + more, "intermediateSize": 31 + more, "numAttentionHeads": target_heads,
            "numKeyValueHeads": target_keys,
        });
        let defined = target_heads >= heads && (target_group >= group || group % target_group == 0);
        match resolve("wide", &job(object).spec) {
            Ok(plan) => {
                prop_assert!(defined);
                check_plan(&plan)?;
            }
            Err(errors) => prop_assert!(!defined, "{}", errors),
        }
    }

    #[test]
    fn patterns_never_panic(pattern in "[0-9a*-]{0,24}") {
        if let Ok(layers) = parse_pattern(&pattern) {
            prop_assert!(!layers.is_empty() && layers.len() <= 1024);
            prop_assert!(layers.iter().all(|layer| *layer < 9));
        }
    }
}

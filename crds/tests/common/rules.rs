//! Every CEL rule of the CRD, with a job that it accepts and one that it refuses.

use super::Edit;
use serde_json::{Value, json};

/// What one CEL rule lets pass and what it refuses.
pub struct Case {
    /// A part of what the rule says.
    pub message: &'static str,
    /// Edits of [`super::example`] that the rule lets pass.
    pub accepted: Vec<Edit>,
    /// Edits that it refuses.
    pub refused: Vec<Edit>,
}

fn case(message: &'static str, accepted: Vec<Edit>, refused: Vec<Edit>) -> Case {
    Case { message, accepted, refused }
}

/// Rules on one object. Edits apply to the example of `common`.
pub fn creation_cases() -> Vec<Case> {
    let replace = |path, value| vec![(path, value)];
    vec![
        case(
            "metadata.name must be at most 32 characters",
            replace("/metadata/name", json!("x".repeat(32))),
            replace("/metadata/name", json!("x".repeat(33))),
        ),
        case(
            "metadata.name names Services too",
            replace("/metadata/name", json!("a-1")),
            replace("/metadata/name", json!("1a")),
        ),
        case(
            "the first stage has no stage to grow from",
            vec![],
            replace("/spec/stages/0/growth", json!({"operator": "Stack", "factor": 2})),
        ),
        case(
            "every stage after the first must grow the one before",
            vec![],
            replace("/spec/stages/1/growth", Value::Null),
        ),
        case(
            "only the first stage can start from a given checkpoint",
            replace("/spec/stages/0/initFrom", json!({"uri": "s3://bucket/base"})),
            replace("/spec/stages/1/initFrom", json!({"uri": "s3://bucket/base"})),
        ),
        case(
            "only the first stage can be trained by another job",
            replace("/spec/stages/0/trainedBy", json!({"job": "base"})),
            replace("/spec/stages/1/trainedBy", json!({"job": "base"})),
        ),
        case(
            "the first stage is trained by this job itself",
            vec![("/metadata/name", json!("tiny-2")), ("/spec/stages/0/trainedBy", json!({"job": "tiny"}))],
            vec![("/metadata/name", json!("tiny-2")), ("/spec/stages/0/trainedBy", json!({"job": "tiny-2"}))],
        ),
        case(
            "tokens: auto needs a later stage to grow into",
            replace("/spec/stages/0/tokens", json!("auto")),
            replace("/spec/stages/1/tokens", json!("auto")),
        ),
        case(
            "numHiddenLayers is missing",
            vec![("/spec/stages/0/model", Value::Null), ("/spec/model/numHiddenLayers", json!(2))],
            replace("/spec/stages/0/model", Value::Null),
        ),
        case(
            "hiddenSize is missing",
            vec![("/spec/model/hiddenSize", Value::Null), ("/spec/stages/0/model/hiddenSize", json!(64))],
            replace("/spec/model/hiddenSize", Value::Null),
        ),
        case(
            "intermediateSize is missing",
            vec![
                ("/spec/model/intermediateSize", Value::Null),
                ("/spec/stages/0/model/intermediateSize", json!(176)),
            ],
            replace("/spec/model/intermediateSize", Value::Null),
        ),
        case(
            "numAttentionHeads is missing",
            vec![
                ("/spec/model/numAttentionHeads", Value::Null),
                ("/spec/stages/0/model/numAttentionHeads", json!(4)),
            ],
            replace("/spec/model/numAttentionHeads", Value::Null),
        ),
        case(
            "vocabSize is missing",
            vec![
                ("/spec/data/tokenizer", json!({"uri": "file:///tokenizer.json"})),
                ("/spec/model/vocabSize", json!(4096)),
            ],
            replace("/spec/data/tokenizer", json!({"uri": "file:///tokenizer.json"})),
        ),
        case(
            "model.vocabSize is smaller than data.tokenizer.train.vocabSize",
            replace("/spec/model/vocabSize", json!(4096)),
            replace("/spec/model/vocabSize", json!(1024)),
        ),
        case(
            "training.sequenceLength is longer than model.maxPositionEmbeddings",
            replace("/spec/model/maxPositionEmbeddings", json!(256)),
            replace("/spec/model/maxPositionEmbeddings", json!(128)),
        ),
        case(
            "numKeyValueHeads must divide numAttentionHeads",
            replace("/spec/model/numKeyValueHeads", json!(2)),
            replace("/spec/model/numKeyValueHeads", json!(3)),
        ),
        case(
            "headDim must be even",
            replace("/spec/model/headDim", json!(32)),
            replace("/spec/model/headDim", json!(33)),
        ),
        case(
            "hiddenSize is not a multiple of numAttentionHeads",
            vec![("/spec/model/hiddenSize", json!(66)), ("/spec/model/headDim", json!(16))],
            replace("/spec/model/hiddenSize", json!(66)),
        ),
        case(
            "set replicas for a fixed size or elastic for a range",
            replace("/spec/stages/0/elastic", json!({"minReplicas": 1, "maxReplicas": 2})),
            vec![
                ("/spec/stages/0/elastic", json!({"minReplicas": 1, "maxReplicas": 2})),
                ("/spec/stages/0/replicas", json!(1)),
            ],
        ),
        case(
            "this operator needs to know how deep",
            vec![
                ("/spec/stages/1/growth/factor", Value::Null),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 8})),
            ],
            replace("/spec/stages/1/growth", json!({"operator": "RandomDepth"})),
        ),
        case(
            "growth.depth needs to know how deep",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack"}}),
            ),
        ),
        case(
            "operators of the width need to know how wide",
            vec![
                ("/spec/stages/1/growth", json!({"operator": "ZeroWidth"})),
                ("/spec/stages/1/model", json!({"intermediateSize": 200})),
            ],
            replace("/spec/stages/1/growth", json!({"operator": "RandomWidth"})),
        ),
        case(
            "operators of the width keep the depth",
            vec![
                (
                    "/spec/stages/1/growth",
                    json!({"operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack"}}),
                ),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 4})),
            ],
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth", "factor": 2})),
                ("/spec/stages/1/model", json!({"numHiddenLayers": 4})),
            ],
        ),
        case(
            "this operator changes the depth only",
            replace("/spec/stages/1/model", json!({"numHiddenLayers": 8})),
            replace("/spec/stages/1/model", json!({"numHiddenLayers": 8, "hiddenSize": 128})),
        ),
        case(
            "no growth changes vocabSize",
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth"})),
                ("/spec/stages/1/model", json!({"hiddenSize": 128, "headDim": 16})),
            ],
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth"})),
                ("/spec/stages/1/model", json!({"hiddenSize": 128, "vocabSize": 4096})),
            ],
        ),
        case(
            "rmsNormEps belongs to operators ZeroWidth and RandomWidth",
            vec![
                ("/spec/stages/1/growth", json!({"operator": "ZeroWidth", "factor": 2})),
                ("/spec/stages/1/model", json!({"initializer": "Paper", "rmsNormEps": 1e-6})),
            ],
            vec![
                ("/spec/stages/1/growth", json!({"operator": "RandomDepth", "factor": 2})),
                ("/spec/stages/1/model", json!({"rmsNormEps": 1e-6})),
            ],
        ),
        case(
            "initializer belongs to operators ZeroWidth, RandomDepth and RandomWidth",
            vec![
                ("/spec/stages/1/growth", json!({"operator": "RandomDepth"})),
                ("/spec/stages/1/model", json!({"initializer": "Paper", "numHiddenLayers": 3})),
            ],
            vec![
                ("/spec/stages/1/growth", json!({"operator": "DirectWidth", "factor": 2})),
                ("/spec/stages/1/model", json!({"initializer": "Paper"})),
            ],
        ),
        case(
            "layerMap belongs to operator LayerMap",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"layers": [0, 1, 0, 1]}}),
            ),
            replace("/spec/stages/1/growth", json!({"operator": "LayerMap"})),
        ),
        case(
            "factor does not go with LayerMap",
            replace("/spec/stages/1/growth", json!({"operator": "Stack", "factor": 2})),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "factor": 2, "layerMap": {"layers": [0, 1, 0, 1]}}),
            ),
        ),
        case(
            "zeroDepth belongs to operator ZeroDepth",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroDepth", "factor": 2, "zeroDepth": {"order": "Stacked"}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "Interleave", "factor": 2, "zeroDepth": {"order": "Stacked"}}),
            ),
        ),
        case(
            "directWidth belongs to operator DirectWidth",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "DirectWidth", "factor": 2, "directWidth": {"split": "Noisy"}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "directWidth": {"split": "Noisy"}}),
            ),
        ),
        case(
            "randomDepth belongs to operator RandomDepth",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "RandomDepth", "factor": 2, "randomDepth": {"rampTokens": "1M"}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "RandomWidth", "factor": 2, "randomDepth": {"rampTokens": "1M"}}),
            ),
        ),
        case(
            "randomWidth belongs to operator RandomWidth",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "RandomWidth", "factor": 2, "randomWidth": {"rampTokens": "1M"}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "randomWidth": {"rampTokens": "1M"}}),
            ),
        ),
        case(
            "depth belongs to operators of the width",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "ZeroDepth", "factor": 2}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "Stack", "factor": 2, "depth": {"operator": "ZeroDepth", "factor": 2}}),
            ),
        ),
        case(
            "depth.operator LearnDepth is learned together with LearnWidth",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LearnWidth", "factor": 2, "depth": {"operator": "LearnDepth", "factor": 2}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "DirectWidth", "factor": 2, "depth": {"operator": "LearnDepth", "factor": 2}}),
            ),
        ),
        case(
            "learn belongs to LearnDepth and LearnWidth",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LearnDepth", "factor": 2, "learn": {"steps": 0, "learningRate": 1e-3}}),
            ),
            replace("/spec/stages/1/growth", json!({"operator": "Stack", "factor": 2, "learn": {}})),
        ),
        case(
            "LearnDepth and LearnWidth mix weights",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LearnWidth", "factor": 2, "optimizerState": "Reset"}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LearnWidth", "factor": 2, "optimizerState": "Keep"}),
            ),
        ),
        case(
            "depth.operator is one of Stack, Interleave, LayerMap, ZeroDepth and LearnDepth",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "Interleave", "factor": 2}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "depth": {"operator": "RandomDepth", "factor": 2}}),
            ),
        ),
        case(
            "depth.factor does not go with LayerMap",
            replace(
                "/spec/stages/1/growth",
                json!({
                    "operator": "DirectWidth", "factor": 2, "depth": {"operator": "LayerMap"},
                    "layerMap": {"midas": {"blockLayers": 1}},
                }),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({
                    "operator": "DirectWidth", "factor": 2, "depth": {"operator": "LayerMap", "factor": 2},
                    "layerMap": {"midas": {"blockLayers": 1}},
                }),
            ),
        ),
        case(
            "set exactly one of layers, pattern, solar, midas, lidas and llamaPro in layerMap",
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"llamaPro": {"groups": 1}, "zeroOutput": false}}),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"pattern": "12*2", "solar": {"dropLayers": 1}}}),
            ),
        ),
        case(
            "with growth.schedule: Continue the stage goes on in the schedule of the one before",
            vec![
                ("/spec/stages/1/growth/schedule", json!("Continue")),
                ("/spec/stages/1/training", json!({"gradientClip": 0.5})),
            ],
            vec![
                ("/spec/stages/1/growth/schedule", json!("Continue")),
                ("/spec/stages/1/training", json!({"schedule": {"constant": {}}})),
            ],
        ),
        case(
            "freeze trains new layers only",
            replace(
                "/spec/stages/1/growth",
                json!({
                    "operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2},
                    "freeze": "Source",
                }),
            ),
            replace(
                "/spec/stages/1/growth",
                json!({"operator": "DirectWidth", "factor": 2, "freeze": "Source"}),
            ),
        ),
        case(
            "freezeTokens says how long something is frozen",
            vec![
                ("/spec/stages/1/growth/freeze", json!("SourceButHead")),
                ("/spec/stages/1/growth/freezeTokens", json!("1M")),
            ],
            replace("/spec/stages/1/growth/freezeTokens", json!("1M")),
        ),
        case(
            "rewarmTokens belongs to schedule: Continue",
            vec![
                ("/spec/stages/1/growth/schedule", json!("Continue")),
                ("/spec/stages/1/growth/rewarmTokens", json!("1M")),
            ],
            replace("/spec/stages/1/growth/rewarmTokens", json!("1M")),
        ),
        case(
            "freeze: SourceButHead trains the head, but with tieWordEmbeddings",
            vec![
                ("/spec/stages/1/growth/freeze", json!("SourceButHead")),
                ("/spec/model/tieWordEmbeddings", json!(true)),
                ("/spec/stages/0/model/tieWordEmbeddings", json!(false)),
            ],
            vec![
                ("/spec/stages/1/growth/freeze", json!("SourceButHead")),
                ("/spec/model/tieWordEmbeddings", json!(true)),
            ],
        ),
        case(
            "minReplicas is larger than maxReplicas",
            replace("/spec/stages/1/elastic", json!({"minReplicas": 2, "maxReplicas": 2})),
            replace("/spec/stages/1/elastic", json!({"minReplicas": 3, "maxReplicas": 2})),
        ),
        case(
            "every one of allowedReplicas must lie between",
            replace(
                "/spec/stages/1/elastic",
                json!({"minReplicas": 1, "maxReplicas": 4, "allowedReplicas": [1, 4]}),
            ),
            replace(
                "/spec/stages/1/elastic",
                json!({"minReplicas": 1, "maxReplicas": 4, "allowedReplicas": [1, 8]}),
            ),
        ),
        case(
            "set exactly one of data.validation and data.holdOutPercent",
            vec![("/spec/data/validation", Value::Null), ("/spec/data/holdOutPercent", json!(1.0))],
            replace("/spec/data/holdOutPercent", json!(1.0)),
        ),
        case(
            "set exactly one of tokenizer.uri and tokenizer.train",
            vec![
                ("/spec/data/tokenizer", json!({"uri": "file:///tokenizer.json"})),
                ("/spec/model/vocabSize", json!(4096)),
            ],
            replace("/spec/data/tokenizer/uri", json!("file:///tokenizer.json")),
        ),
        case(
            "endpoint and region belong to s3:// storage",
            vec![
                ("/spec/storage/uri", json!("s3://bucket/runs")),
                ("/spec/storage/endpoint", json!("http://minio:9000")),
            ],
            replace("/spec/storage/endpoint", json!("http://minio:9000")),
        ),
        case(
            "credentialsSecretRef.name is empty",
            replace("/spec/storage/credentialsSecretRef", json!({"name": "keys"})),
            replace("/spec/storage/credentialsSecretRef", json!({"name": ""})),
        ),
        case(
            "set exactly one of cosine, wsd and constant in schedule",
            replace("/spec/training/schedule", json!({"constant": {}})),
            replace("/spec/training/schedule", json!({"constant": {}, "wsd": {}})),
        ),
        case(
            "set exactly one of onExitCodes and onReasons",
            replace(
                "/spec/failurePolicy",
                json!({"rules": [{"name": "oom", "action": "FailJob", "onReasons": ["OOMKilled"]}]}),
            ),
            replace("/spec/failurePolicy", json!({"rules": [{"name": "oom", "action": "FailJob"}]})),
        ),
    ]
}

/// Rules on a change. The old object is the example; edits make the new one.
pub fn update_cases() -> Vec<Case> {
    let replace = |path, value| vec![(path, value)];
    let appended =
        json!({"name": "larger", "growth": {"operator": "Stack", "factor": 2}, "tokens": 1_000_000});
    vec![
        case(
            "stages may be appended but not removed, renamed or reordered; create a new job instead",
            replace("/spec/stages/2", appended),
            replace("/spec/stages/1/name", json!("big")),
        ),
        case(
            "stages may be appended but not removed, renamed or reordered; create a new job instead",
            replace("/spec/stages/1/tokens", json!(4_000_000)),
            replace("/spec/stages/1", Value::Null),
        ),
        case(
            "managedBy cannot be changed",
            replace("/spec/suspend", json!(true)),
            replace("/spec/managedBy", json!("example.com/other")),
        ),
        case(
            "model cannot be changed",
            replace("/spec/replicas", json!(4)),
            replace("/spec/model/hiddenSize", json!(128)),
        ),
        case(
            "data cannot be changed",
            replace("/spec/checkpoint/keepLast", json!(5)),
            replace("/spec/data/train/0/weight", json!(2.0)),
        ),
        case(
            "storage cannot be changed",
            replace("/spec/evaluation/tokens", json!(8192)),
            replace("/spec/storage/uri", json!("file:///elsewhere")),
        ),
        case(
            "training cannot be changed",
            replace("/spec/runPolicy/activeDeadlineSeconds", json!(60)),
            replace("/spec/training/seed", json!(1)),
        ),
        case(
            "the model of a stage cannot be changed",
            replace("/spec/scheduling/queueName", json!("gpus")),
            replace("/spec/stages/0/model/numHiddenLayers", json!(3)),
        ),
        case(
            "the model of a stage cannot be changed",
            replace("/spec/stages/0/replicas", json!(2)),
            replace("/spec/stages/1/model", json!({"numHiddenLayers": 8})),
        ),
        case(
            "the growth of a stage cannot be changed",
            replace("/spec/failurePolicy/maxRestarts", json!(1)),
            replace("/spec/stages/1/growth/factor", json!(2)),
        ),
        case(
            "the growth of a stage cannot be changed",
            replace("/spec/stages/1/growth/freeze", json!("Nothing")),
            replace("/spec/stages/1/growth/freeze", json!("Source")),
        ),
        case(
            "the growth of a stage cannot be changed",
            replace("/spec/stages/1/growth/schedule", json!("Restart")),
            replace("/spec/stages/1/growth/newParameters", json!({"learningRateRatio": 1.3})),
        ),
        case(
            "initFrom cannot be changed",
            replace("/spec/stages/1/elastic", json!({"minReplicas": 1, "maxReplicas": 2})),
            replace("/spec/stages/0/initFrom", json!({"uri": "s3://bucket/base"})),
        ),
        case(
            "trainedBy cannot be changed",
            replace("/spec/stages/1/elastic", json!({"minReplicas": 1, "maxReplicas": 2})),
            replace("/spec/stages/0/trainedBy", json!({"job": "base"})),
        ),
        case(
            "the training of a stage cannot be changed",
            replace("/spec/stages/0/template", json!({"nodeSelector": {"pool": "small"}})),
            replace("/spec/stages/0/training", json!({"gradientClip": 0.5})),
        ),
    ]
}

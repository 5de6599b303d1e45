//! Small models and states for the tests of checkpoints and growth.

use super::{CheckpointLocation, CheckpointWriter, ExtraFile, TokenIds, TrainingState};
use crate::model::layout::ParameterLayout;
use crate::storage::{Storage, StorageOptions};
use growth_crds::plan::ModelConfig;
use std::collections::BTreeMap;

pub(crate) fn storage() -> (tempfile::TempDir, Storage) {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::open(folder.path().to_str().unwrap(), &StorageOptions::default()).unwrap();
    (folder, storage)
}

pub(crate) fn config(layers: u32, tied: bool) -> ModelConfig {
    ModelConfig {
        hidden_size: 12,
        intermediate_size: 20,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        vocab_size: 33,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
    }
}

/// Arbitrary bit patterns, so that equality means equality of bits; zeros in the gaps, where nothing is stored.
pub(crate) fn vector(layout: &ParameterLayout, seed: u64) -> Vec<f32> {
    let mut vector = vec![0.0; layout.total_len()];
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for tensor in layout.tensors() {
        for number in &mut vector[tensor.range()] {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // No NaN: it is not equal to itself.
            *number = f32::from_bits((random >> 32) as u32 & 0xBFFF_FFFF);
        }
    }
    vector
}

pub(crate) fn state(layout: &ParameterLayout, step: u64) -> TrainingState {
    TrainingState {
        step,
        tokens: 100 * step,
        optimizer_step: step + 7,
        parameters: vector(layout, 3 * step),
        exp_avg: vector(layout, 3 * step + 1),
        exp_avg_sq: vector(layout, 3 * step + 2),
    }
}

pub(crate) fn location(storage: &Storage, stage: &str, attempt: u32) -> CheckpointLocation {
    CheckpointLocation { storage: storage.clone(), job: "job".to_owned(), stage: stage.to_owned(), attempt }
}

/// Writes many small objects.
pub(crate) fn writer(storage: &Storage, attempt: u32, config: &ModelConfig) -> CheckpointWriter {
    let files = vec![ExtraFile::new("tokenizer.json", "{}"), ExtraFile::new("tokenizer_config.json", "{}\n")];
    let token_ids = TokenIds { bos: Some(1), eos: vec![2] };
    let mut writer =
        CheckpointWriter::new(location(storage, "small", attempt), config.clone(), token_ids, files);
    writer.shard_bytes = 4000;
    writer
}

/// Every object below a prefix, with its content.
pub(crate) fn contents(storage: &Storage) -> BTreeMap<String, Vec<u8>> {
    let content = |name: String| (name.clone(), storage.get(&name).unwrap().to_vec());
    storage.list().unwrap().into_iter().map(|entry| content(entry.name)).collect()
}

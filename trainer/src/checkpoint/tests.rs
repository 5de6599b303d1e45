//! Tests of the whole: what is written is read back, whatever happens in between.

use super::testing::{config, contents, location, state, storage, vector, writer};
use super::*;
use crate::model::layout::tests::configs;
use growth_crds::plan::ModelConfig;
use growth_crds::protocol::MANIFEST_FILE;
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::convert::Infallible;

fn latest(storage: &Storage) -> (Option<(u64, u32)>, Vec<String>) {
    let mut warnings = Vec::new();
    let found = latest_valid(storage, "job", "small", &mut |warning| warnings.push(warning)).unwrap();
    (found.map(|manifest| (manifest.step, manifest.attempt)), warnings)
}

fn names(storage: &Storage) -> Vec<String> {
    list(storage, "job", "small").unwrap().iter().map(Found::name).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_written_is_loaded(
        config in configs(), moments in any::<bool>(), step in 0u64..1000, shard_bytes in 1u64..20_000,
    ) {
        let (_folder, storage) = storage();
        let mut writer = writer(&storage, 3, &config);
        writer.shard_bytes = shard_bytes;
        let mut state = state(&writer.layout, step);
        if !moments {
            (state.exp_avg, state.exp_avg_sq) = (Vec::new(), Vec::new());
        }
        let manifest = writer.write(&state, &[ExtraFile::new(HISTORY_FILE, "[]")]).unwrap();
        prop_assert_eq!(&load(&storage, &manifest, &writer.layout).unwrap(), &state);
        let found = list(&storage, "job", "small").unwrap();
        prop_assert_eq!(found[0].committed(), Some(&manifest));
        prop_assert_eq!(latest(&storage), (Some((step, 3)), vec![]));
        let folder = checkpoint_folder(&storage, &manifest);
        prop_assert_eq!(parse_config("config.json", &folder.get(CONFIG_FILE).unwrap()).unwrap().0, config);
        let opened = HuggingFaceFolder::open(&folder).unwrap();
        prop_assert_eq!(opened.load().unwrap().parameters, state.parameters);
    }
}

#[test]
fn other_programs_read_the_weights() {
    let (_folder, storage) = storage();
    let writer = writer(&storage, 1, &config(2, false));
    let state = state(&writer.layout, 5);
    let folder = checkpoint_folder(&storage, &writer.write(&state, &[]).unwrap());
    let index: Value = serde_json::from_slice(&folder.get(MODEL_INDEX_FILE).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 4 * writer.layout.parameter_count());
    let objects: BTreeSet<&str> =
        index["weight_map"].as_object().unwrap().values().map(|object| object.as_str().unwrap()).collect();
    assert!(objects.len() > 2, "{objects:?}");
    assert!(objects.contains(&*format!("model-00001-of-{:05}.safetensors", objects.len())));
    for tensor in writer.layout.tensors() {
        let object = folder.get(index["weight_map"][&tensor.name].as_str().unwrap()).unwrap();
        let file = SafeTensors::deserialize(&object).unwrap();
        let view = file.tensor(&tensor.name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (Dtype::F32, &*tensor.shape));
        assert_eq!(view.data(), bytemuck::cast_slice::<f32, u8>(&state.parameters[tensor.range()]));
        assert_eq!(view.data().as_ptr() as usize % 4, object.as_ptr() as usize % 4, "the data is aligned");
    }
    let content: Value = serde_json::from_slice(&folder.get(CONFIG_FILE).unwrap()).unwrap();
    assert_eq!(content["rope_theta"], content["rope_parameters"]["rope_theta"]);
    assert_eq!(content["eos_token_id"], 2);
}

#[test]
fn the_digest_is_that_of_the_state_alone() {
    let (_folder, storage) = storage();
    let config = config(1, true);
    let digest = |attempt, history: &'static str| {
        let writer = writer(&storage, attempt, &config);
        writer.write(&state(&writer.layout, 1), &[ExtraFile::new(HISTORY_FILE, history)]).unwrap().digest
    };
    let first = digest(1, "[1]");
    assert_eq!(first, digest(2, "[2]"));
    let writer = writer(&storage, 2, &config);
    let mut other = state(&writer.layout, 2);
    other.step = 3;
    assert_ne!(first, writer.write(&other, &[]).unwrap().digest);
}

#[test]
fn a_crash_at_any_moment_leaves_the_checkpoint_before() {
    let (_folder, storage) = storage();
    let (_elsewhere, complete) = testing::storage();
    let config = config(1, false);
    let first = writer(&storage, 1, &config);
    first.write(&state(&first.layout, 10), &[]).unwrap();
    let second = writer(&complete, 1, &config);
    let manifest = second.write(&state(&second.layout, 20), &[ExtraFile::new(HISTORY_FILE, "[]")]).unwrap();
    let (from, to) = (checkpoint_folder(&complete, &manifest), checkpoint_folder(&storage, &manifest));
    for object in &manifest.objects {
        to.put(&object.name, from.get(&object.name).unwrap()).unwrap();
        assert_eq!(latest(&storage), (Some((10, 1)), vec![]), "after {}", object.name);
        assert_eq!(next_attempt(&storage, "job", "small").unwrap(), 2);
    }
    to.create(MANIFEST_FILE, from.get(MANIFEST_FILE).unwrap()).unwrap();
    assert_eq!(latest(&storage), (Some((20, 1)), vec![]));
}

#[test]
fn damage_anywhere_is_found_and_named_and_left_alone() {
    let (_folder, storage) = storage();
    let writer = writer(&storage, 1, &config(1, false));
    writer.write(&state(&writer.layout, 10), &[]).unwrap();
    let manifest = writer.write(&state(&writer.layout, 20), &[ExtraFile::new(HISTORY_FILE, "[]")]).unwrap();
    let folder = checkpoint_folder(&storage, &manifest);
    let mut names: Vec<String> = manifest.objects.iter().map(|object| object.name.clone()).collect();
    names.push(MANIFEST_FILE.to_owned());
    for name in &names {
        let good = folder.get(name).unwrap().to_vec();
        for bad in damaged(&good) {
            folder.put(name, bad).unwrap();
            let before = contents(&storage);
            let (found, warnings) = latest(&storage);
            assert_eq!(found, Some((10, 1)), "{name}");
            assert_eq!(warnings.len(), 1);
            // A digest in the manifest that is not the object's may be the fault of either.
            let object = if name == MANIFEST_FILE { "00000020-1" } else { name };
            assert!(warnings[0].contains(object), "{warnings:?}");
            if object == name {
                let problems = verify(&folder, &manifest).unwrap();
                assert_eq!(problems.len(), 1);
                assert!(problems[0].uri.ends_with(name), "{problems:?}");
            }
            let mut warnings = Vec::new();
            let resumed =
                resume(&storage, "job", "small", &writer.layout, &mut |warning| warnings.push(warning));
            assert_eq!(resumed.unwrap().unwrap().1, state(&writer.layout, 10));
            assert!(warnings[0].contains(object), "{warnings:?}");
            assert!(before == contents(&storage));
        }
        folder.put(name, good).unwrap();
    }
    let missing = names.iter().find(|name| is_model_shard(name)).unwrap();
    folder.delete(missing).unwrap();
    let (found, warnings) = latest(&storage);
    assert_eq!(found, Some((10, 1)));
    assert!(warnings[0].contains(&format!("{missing} is damaged: the object is missing")), "{warnings:?}");
}

/// Flips a bit at the start, in the middle and at the end, and cuts the end off (two bytes: a last newline means
/// nothing).
fn damaged(good: &[u8]) -> Vec<Vec<u8>> {
    let flips = [0, good.len() / 2, good.len() - 1].map(|position| {
        let mut bad = good.to_vec();
        bad[position] ^= 0x40;
        bad
    });
    flips.into_iter().chain([good[..good.len() - 2].to_vec(), Vec::new()]).collect()
}

#[test]
fn any_flipped_byte_of_a_header_is_damage_not_another_model() {
    let (_folder, storage) = storage();
    let writer = writer(&storage, 1, &config(1, true));
    let manifest = writer.write(&state(&writer.layout, 1), &[]).unwrap();
    let folder = checkpoint_folder(&storage, &manifest);
    let name = &manifest.objects.iter().find(|object| is_model_shard(&object.name)).unwrap().name;
    let good = folder.get(name).unwrap().to_vec();
    for position in 0..400 {
        let mut bad = good.clone();
        bad[position] ^= 1;
        folder.put(name, bad).unwrap();
        let error = load(&storage, &manifest, &writer.layout).unwrap_err();
        assert!(error.is_damage() && error.to_string().contains(name), "byte {position}: {error}");
    }
}

#[test]
fn a_store_that_does_not_answer_is_not_damage() {
    let (folder, storage) = storage();
    let writer = writer(&storage, 1, &config(1, true));
    writer.write(&state(&writer.layout, 1), &[]).unwrap();
    writer.write(&state(&writer.layout, 2), &[]).unwrap();
    // A name that leads to itself: reading fails, but not because the object is absent.
    let path = folder.path().join("job/checkpoints/small/00000002-1/manifest.json");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&path, &path).unwrap();
    let error = latest_valid(&storage, "job", "small", &mut |_| ()).unwrap_err();
    assert!(!error.is_damage(), "{error}");
}

#[test]
fn a_committed_checkpoint_is_never_written_again() {
    let (_folder, storage) = storage();
    let first = writer(&storage, 1, &config(1, true));
    first.write(&state(&first.layout, 10), &[]).unwrap();
    let before = contents(&storage);
    let error = first.write(&state(&first.layout, 10), &[]).unwrap_err();
    assert!(matches!(error, CheckpointError::AlreadyCommitted { .. }), "{error}");
    assert!(before == contents(&storage));
}

#[test]
fn the_newer_of_two_writers_wins() {
    let (_folder, storage) = storage();
    let config = config(1, true);
    let (old, new) = (writer(&storage, 1, &config), writer(&storage, 2, &config));
    old.write(&state(&old.layout, 10), &[]).unwrap();
    new.write(&state(&new.layout, 10), &[]).unwrap();
    assert_eq!(names(&storage), ["00000010-1", "00000010-2"]);
    assert_eq!(latest(&storage).0, Some((10, 2)));
    let error = old.write(&state(&old.layout, 20), &[]).unwrap_err();
    assert!(matches!(error, CheckpointError::Superseded { attempt: 1, newer: 2, .. }), "{error}");
    assert_eq!(latest(&storage).0, Some((10, 2)));
}

#[test]
fn retention_keeps_what_is_needed() {
    let (_folder, storage) = storage();
    let config = config(1, true);
    let (old, new) = (writer(&storage, 1, &config), writer(&storage, 2, &config));
    let write = |writer: &CheckpointWriter, step| writer.write(&state(&writer.layout, step), &[]).unwrap();
    for step in [10, 20, 30, 40] {
        write(&old, step);
    }
    let written = write(&new, 31);
    let stage = stage_folder(&storage, "job", "small");
    stage.put("00000035-1/config.json", "left over").unwrap();
    stage.put("00000036-3/config.json", "being written").unwrap();
    stage.put("00000030-1/manifest.json", "damaged").unwrap();
    let retention = Retention { keep_last: 2, protected: BTreeSet::from(["00000010-1".to_owned()]) };
    assert_eq!(prune(&storage, &written, &retention).unwrap(), ["00000035-1"]);
    let retention = Retention { keep_last: 0, ..retention };
    assert_eq!(prune(&storage, &written, &retention).unwrap(), ["00000020-1"]);
    let left = ["00000010-1", "00000030-1", "00000031-2", "00000036-3", "00000040-1"];
    assert_eq!(names(&storage), left);
    stage.join("00000020-1").list().unwrap().is_empty().then_some(()).unwrap();
}

#[test]
fn checkpoints_are_written_in_the_background_and_old_ones_deleted() {
    let (_folder, storage) = storage();
    let writer = writer(&storage, 1, &config(1, false));
    let layout = writer.layout.clone();
    let retention = Retention { keep_last: 2, ..Retention::default() };
    let mut checkpointer = AsyncCheckpointer::start(writer, retention, None, None).unwrap();
    let mut addresses = BTreeSet::new();
    let mut committed = Vec::new();
    for step in [1, 2, 3, 4] {
        let before = checkpointer.submit(Vec::new(), |snapshot| {
            let first = StateTensor { part: Part::Parameters, tensor: 0 };
            addresses.insert(snapshot.numbers(first).unwrap().as_ptr() as usize);
            snapshot.copy_from(&state(&layout, step), &layout);
            Ok::<(), Infallible>(())
        });
        committed.extend(before.unwrap().map(|outcome| outcome.unwrap().manifest.step));
    }
    while checkpointer.is_busy() {
        std::thread::yield_now();
    }
    committed.extend(checkpointer.poll().map(|outcome| outcome.unwrap().manifest.step));
    committed.extend(checkpointer.finish().unwrap().map(|committed| committed.manifest.step));
    assert_eq!(committed, [1, 2, 3, 4]);
    assert_eq!(addresses.len(), 1, "the snapshot is allocated once");
    assert_eq!(names(&storage), ["00000003-1", "00000004-1"]);
    let manifest = latest_valid(&storage, "job", "small", &mut |_| ()).unwrap().unwrap();
    assert_eq!(load(&storage, &manifest, &layout).unwrap(), state(&layout, 4));
    assert!(checkpointer.finish().unwrap().is_none());
    assert!(checkpointer.last_good().unwrap().ends_with("00000004-1"));
}

#[test]
fn a_failed_write_leaves_the_last_checkpoint_good_and_can_be_tried_again() {
    let (root, storage) = storage();
    let writer = writer(&storage, 1, &config(1, false));
    let (layout, direct) = (writer.layout.clone(), writer.clone());
    let stage = root.path().join("job/checkpoints/small");
    let mut checkpointer =
        AsyncCheckpointer::start(writer, Retention { keep_last: 1, ..Retention::default() }, None, None)
            .unwrap();
    let mut submit = |step: u64| {
        let outcome = checkpointer.submit(Vec::new(), |snapshot| {
            snapshot.copy_from(&state(&layout, step), &layout);
            Ok::<(), Infallible>(())
        });
        let waited = checkpointer.finish();
        (outcome.unwrap(), waited)
    };
    submit(10).1.unwrap().unwrap();
    // Nothing can be written: a file lies where the folder would be.
    std::fs::write(stage.join("00000020-1"), "").unwrap();
    let error = submit(20).1.unwrap_err();
    assert!(matches!(error, CheckpointError::Final { .. }), "{error}");
    assert!(error.to_string().contains("00000010-1") && error.to_string().contains("00000020-1"), "{error}");
    assert_eq!(latest(&storage), (Some((10, 1)), vec![]));
    std::fs::remove_file(stage.join("00000020-1")).unwrap();
    // The write breaks half way: a folder lies where an object would be.
    let blocked = stage.join("00000030-1/trainer_state.json");
    std::fs::create_dir_all(blocked.join("x")).unwrap();
    direct.write(&state(&layout, 30), &[]).unwrap_err();
    assert!(storage.list().unwrap().iter().any(|entry| entry.name.contains("00000030-1/model-00001")));
    assert_eq!(latest(&storage), (Some((10, 1)), vec![]));
    // What it left is removed before the next one, which may need the space.
    submit(30).1.unwrap().unwrap();
    assert_eq!(latest(&storage), (Some((30, 1)), vec![]));
    assert_eq!(names(&storage), ["00000030-1"]);
    storage.put("job/checkpoints/small/00000033-1/config.json", "left over").unwrap();
    std::fs::write(stage.join("00000040-1"), "").unwrap();
    submit(40).1.unwrap_err();
    assert_eq!(names(&storage), ["00000030-1"]);
}

#[test]
fn an_error_comes_back_at_the_next_submit_and_the_next_is_tried() {
    let (root, storage) = storage();
    let writer = writer(&storage, 1, &config(1, false));
    let layout = writer.layout.clone();
    let mut checkpointer =
        AsyncCheckpointer::start(writer, Retention::default(), Some("start".to_owned()), None).unwrap();
    let blocked = root.path().join("job");
    std::fs::write(&blocked, "").unwrap();
    let mut submit = |step: u64| {
        let outcome = checkpointer.submit(Vec::new(), |snapshot| {
            std::fs::remove_file(&blocked).ok().filter(|()| step == 2);
            snapshot.copy_from(&state(&layout, step), &layout);
            if step == 1 {
                std::fs::write(&blocked, "").unwrap();
            }
            if step == 3 { Err("the copy failed") } else { Ok(()) }
        });
        outcome.map(|before| before.map(|outcome| outcome.map(|committed| committed.manifest.step)))
    };
    assert!(submit(1).unwrap().is_none());
    assert!(submit(2).unwrap().unwrap().is_err());
    assert_eq!(submit(3).unwrap_err(), "the copy failed");
    assert!(submit(4).unwrap().is_none());
    assert_eq!(checkpointer.finish().unwrap().unwrap().manifest.step, 4);
}

#[test]
fn folders_of_other_names_are_no_checkpoints() {
    assert_eq!(parse_folder_name("00000010-2"), Some((10, 2)));
    assert_eq!(parse_folder_name("123456789-2"), Some((123_456_789, 2)));
    for name in ["10-2", "00000010-02", "00000010", "latest", "00000010-2-3", "-1", "+0000010-2"] {
        assert_eq!(parse_folder_name(name), None, "{name}");
    }
    let (_folder, storage) = storage();
    assert_eq!(next_attempt(&storage, "job", "small").unwrap(), 1);
    storage.put("job/checkpoints/small/backup/config.json", "{}").unwrap();
    assert!(list(&storage, "job", "small").unwrap().is_empty());
}

#[test]
fn states_of_another_size_are_refused() {
    let (_folder, storage) = storage();
    let writer = writer(&storage, 1, &config(1, true));
    let mut bad = state(&writer.layout, 1);
    bad.exp_avg_sq.pop();
    assert!(matches!(writer.write(&bad, &[]), Err(CheckpointError::WrongLength { .. })));
    assert!(storage.list().unwrap().is_empty());
    let manifest = writer.write(&state(&writer.layout, 1), &[]).unwrap();
    let deeper = ParameterLayout::new(&config(2, true));
    let error = load(&storage, &manifest, &deeper).unwrap_err();
    assert!(error.to_string().contains("model.layers.1.input_layernorm.weight of shape [12]"), "{error}");
    let wider = ParameterLayout::new(&ModelConfig { vocab_size: 34, ..config(1, true) });
    let error = load(&storage, &manifest, &wider).unwrap_err();
    assert!(
        error.to_string().contains("shape [33, 12]") && error.to_string().contains("[34, 12]"),
        "{error}"
    );
}

/// Files of a foreign model: name, type, shape, data.
struct Foreign {
    config: Value,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Foreign {
    fn new(config: &ModelConfig, dtype: Dtype, encode: impl Fn(f32) -> Vec<u8>) -> (Self, Vec<f32>) {
        let layout = ParameterLayout::new(config);
        let small = |number: &f32| (number.to_bits() % 512) as f32 / 64.0 - 4.0;
        let numbers: Vec<f32> = vector(&layout, 5).iter().map(small).collect();
        let mut exact = vec![0.0; layout.total_len()];
        let tensors = layout.tensors().iter().map(|tensor| {
            let numbers = &numbers[tensor.range()];
            exact[tensor.range()].copy_from_slice(numbers);
            let data = numbers.iter().flat_map(|&number| encode(number)).collect();
            (tensor.name.clone(), dtype, tensor.shape.clone(), data)
        });
        let tensors = tensors.collect();
        let config = serde_json::from_slice(&config_json(config, &TokenIds::default())).unwrap();
        (Self { config, tensors }, exact)
    }

    fn f32(config: &ModelConfig) -> (Self, Vec<f32>) {
        Self::new(config, Dtype::F32, |number| number.to_le_bytes().to_vec())
    }

    fn file(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn write(&self, folder: &Storage) {
        folder.put(CONFIG_FILE, self.config.to_string()).unwrap();
        folder.put("model.safetensors", Self::file(&self.tensors)).unwrap();
    }

    fn write_in_three(&self, folder: &Storage) {
        folder.put(CONFIG_FILE, self.config.to_string()).unwrap();
        let mut weight_map = serde_json::Map::new();
        for (index, part) in self.tensors.chunks(self.tensors.len().div_ceil(3)).enumerate() {
            let name = format!("model-{:05}-of-00003.safetensors", index + 1);
            folder.put(&name, Self::file(part)).unwrap();
            weight_map.extend(part.iter().map(|(tensor, ..)| (tensor.clone(), json!(name))));
        }
        folder.put(MODEL_INDEX_FILE, json!({"metadata": {}, "weight_map": weight_map}).to_string()).unwrap();
    }

    fn open(&self) -> Result<HuggingFaceFolder> {
        let (_folder, storage) = storage();
        self.write(&storage);
        let opened = HuggingFaceFolder::open(&storage)?;
        opened.load()?;
        Ok(opened)
    }
}

#[test]
fn foreign_weights_of_every_type_are_read() {
    let config = config(2, false);
    let foreign = [
        Foreign::f32(&config),
        Foreign::new(&config, Dtype::BF16, |number| bf16::from_f32(number).to_le_bytes().to_vec()),
        Foreign::new(&config, Dtype::F16, |number| f16::from_f32(number).to_le_bytes().to_vec()),
    ];
    for (foreign, numbers) in foreign {
        for several in [false, true] {
            let (_folder, storage) = storage();
            if several {
                foreign.write_in_three(&storage)
            } else {
                foreign.write(&storage)
            }
            storage.put(TOKENIZER_FILE, "a tokenizer").unwrap();
            let opened = HuggingFaceFolder::open(&storage).unwrap();
            assert_eq!(opened.config(), &config);
            let loaded = opened.load().unwrap();
            assert_eq!(loaded.parameters, numbers);
            assert_eq!((loaded.step, loaded.has_moments()), (0, false));
            assert_eq!(opened.tokenizer().unwrap().unwrap(), "a tokenizer");
            assert!(opened.digest().unwrap().starts_with("blake3:"));
        }
    }
}

#[test]
fn a_tied_head_may_be_written_out_but_must_be_the_embedding() {
    let config = config(1, true);
    let (mut foreign, numbers) = Foreign::f32(&config);
    let mut head = foreign.tensors[0].clone();
    head.0 = "lm_head.weight".to_owned();
    foreign.tensors.push(head);
    assert_eq!(foreign.open().unwrap().config().num_hidden_layers, 1);
    let (_folder, storage) = storage();
    foreign.write(&storage);
    assert_eq!(HuggingFaceFolder::open(&storage).unwrap().load().unwrap().parameters, numbers);
    let last = foreign.tensors.len() - 1;
    *foreign.tensors[last].3.last_mut().unwrap() ^= 1;
    let error = foreign.open().unwrap_err();
    assert!(matches!(error, CheckpointError::HeadNotTied { .. }), "{error}");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let config = config(1, false);
    let spoil = |change: &dyn Fn(&mut Foreign)| {
        let (mut foreign, _) = Foreign::f32(&config);
        change(&mut foreign);
        foreign.open().unwrap_err().to_string()
    };
    let error = spoil(&|foreign| drop(foreign.tensors.remove(2)));
    assert!(error.contains("no tensor model.layers.0.self_attn.q_proj.weight of shape [16, 12]"), "{error}");
    let error = spoil(&|foreign| foreign.config["intermediate_size"] = json!(21));
    assert!(
        error.contains("gate_proj.weight has the shape [20, 12]") && error.contains("[21, 12]"),
        "{error}"
    );
    let error = spoil(&|foreign| {
        foreign.tensors.push((
            "model.layers.0.self_attn.q_proj.bias".to_owned(),
            Dtype::F32,
            vec![1],
            vec![0; 4],
        ));
    });
    assert!(error.contains("q_proj.bias has no place"), "{error}");
    let error = spoil(&|foreign| (foreign.tensors[1].1, foreign.tensors[1].2) = (Dtype::F64, vec![6]));
    assert!(error.contains("is stored as F64; convert"), "{error}");
    let error = spoil(&|foreign| foreign.tensors.clear());
    assert!(error.contains("no tensor model.embed_tokens.weight"), "{error}");
}

#[test]
fn configurations_that_cannot_be_run_are_refused_by_field() {
    let refused = [
        ("model_type", json!("mistral")),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("sliding_window", json!(4096)),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4})),
        ("partial_rotary_factor", json!(0.5)),
        ("quantization_config", json!({"bits": 4})),
        ("hidden_size", json!("12")),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(5)),
        ("num_hidden_layers", json!(0)),
        ("rms_norm_eps", json!(-1)),
    ];
    for (field, value) in refused {
        let mut content = foreign_config();
        content[field] = value.clone();
        let error = parse_config("x/config.json", content.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("x/config.json: {field} is {value}")), "{error}");
    }
}

fn foreign_config() -> Value {
    serde_json::from_slice(&config_json(&config(2, false), &TokenIds::default())).unwrap()
}

#[test]
fn older_configurations_are_understood() {
    let mut content = foreign_config();
    for field in ["head_dim", "rope_parameters", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"]
    {
        content.as_object_mut().unwrap().remove(field);
    }
    content["rope_theta"] = json!(500_000);
    content["rope_scaling"] = Value::Null;
    content["hidden_size"] = json!(16);
    content["eos_token_id"] = json!([7, 9]);
    let (parsed, token_ids) = parse_config("config.json", content.to_string().as_bytes()).unwrap();
    assert_eq!((parsed.head_dim, parsed.rope_theta, parsed.num_key_value_heads), (4, 500_000.0, 4));
    assert_eq!((parsed.rms_norm_eps, parsed.tie_word_embeddings), (1e-6, false));
    assert_eq!(token_ids, TokenIds { bos: None, eos: vec![7, 9] });
    let again = parse_config("config.json", &config_json(&parsed, &token_ids)).unwrap();
    assert_eq!(again, (parsed, token_ids));
}

#[test]
fn folders_that_are_no_model_are_explained() {
    let (_folder, storage) = storage();
    let error = HuggingFaceFolder::open(&storage).unwrap_err().to_string();
    assert!(error.contains("holds no config.json; name the folder"), "{error}");
    storage.put(CONFIG_FILE, foreign_config().to_string()).unwrap();
    storage.put("pytorch_model.bin", "x").unwrap();
    let error = HuggingFaceFolder::open(&storage).unwrap_err().to_string();
    assert!(error.contains("convert PyTorch .bin files"), "{error}");
    for (bytes, problem) in [
        (&b"short"[..], "too few"),
        (&[255; 100][..], "claims"),
        (&b"\x02\0\0\0\0\0\0\0xx"[..], "not JSON"),
        (&b"\x02\0\0\0\0\0\0\0{}trailing"[..], "its header describes 10"),
    ] {
        storage.put("model.safetensors", bytes).unwrap();
        let error = HuggingFaceFolder::open(&storage).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains(problem), "{error}");
    }
}

#[test]
fn a_checkpoint_opened_as_a_folder_is_verified() {
    let (_folder, storage) = storage();
    let writer = writer(&storage, 1, &config(1, true));
    let manifest = writer.write(&state(&writer.layout, 1), &[]).unwrap();
    let folder = checkpoint_folder(&storage, &manifest);
    assert_eq!(HuggingFaceFolder::open(&folder).unwrap().digest().unwrap(), manifest.digest);
    let name = &manifest.objects.iter().find(|object| is_model_shard(&object.name)).unwrap().name;
    let mut bytes = folder.get(name).unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    folder.put(name, bytes).unwrap();
    let error = HuggingFaceFolder::open(&folder).unwrap().load().unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("is damaged"), "{error}");
    assert_eq!(location(&storage, "small", 1).folder(1).uri(), folder.uri());
}

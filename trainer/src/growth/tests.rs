use super::*;
use crate::checkpoint::testing::{config, contents, location, state, storage, writer};
use crate::checkpoint::{TrainingState, checkpoint_folder, load};
use growth_crds::plan::GrowthOperator;
use proptest::prelude::*;

fn plan(layers: &[u32], optimizer_state: OptimizerStatePolicy) -> GrowthPlan {
    GrowthPlan {
        from_stage: "small".to_owned(),
        operator: GrowthOperator::LayerMap,
        layers: layers.to_vec(),
        new_layers: None,
        zero_output: Vec::new(),
        width: None,
        learn: None,
        noise: None,
        optimizer_state,
    }
}

/// A small checkpoint in a storage of its own.
struct Source {
    _folder: tempfile::TempDir,
    storage: Storage,
    folder: Storage,
    config: ModelConfig,
    state: TrainingState,
}

impl Source {
    fn new(layers: u32, tied: bool) -> Self {
        let (_folder, storage) = storage();
        let config = config(layers, tied);
        let writer = writer(&storage, 1, &config);
        let state = state(&writer.layout, 40);
        let folder = checkpoint_folder(&storage, &writer.write(&state, &[]).unwrap());
        Self { _folder, storage, folder, config, state }
    }

    fn grow(&self, plan: &GrowthPlan, attempt: u32) -> Result<GrownCheckpoint> {
        let target = GrowthTarget::Stage(location(&self.storage, "large", attempt));
        grow(&self.folder, Some(&self.config), plan, &target, &[], &mut |_, _| ())
    }

    fn grown(&self, plan: &GrowthPlan) -> (ParameterLayout, TrainingState) {
        let grown = self.grow(plan, 1).unwrap();
        let layout = ParameterLayout::new(&grown_config(&self.config, plan).unwrap());
        let state = load(&self.storage, &grown.manifest, &layout).unwrap();
        (layout, state)
    }

    /// Every tensor of the target is, bit for bit, that of the source layer.
    fn assert_grown(&self, layout: &ParameterLayout, layers: &[u32], target: &[f32], source: &[f32]) {
        let small = ParameterLayout::new(&self.config);
        let bits = |vector: &[f32]| vector.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
        for tensor in layout.tensors() {
            let name = match tensor.layer {
                None => tensor.name.clone(),
                Some(layer) => {
                    let source = layers[layer as usize];
                    tensor.name.replace(&format!("layers.{layer}."), &format!("layers.{source}."))
                }
            };
            let range = small.find(&name).unwrap().range();
            assert_eq!(bits(&target[tensor.range()]), bits(&source[range]), "{}", tensor.name);
        }
    }
}

#[test]
fn a_stack_copies_every_block_and_nothing_else() {
    for tied in [false, true] {
        let source = Source::new(2, tied);
        let layers = [0, 1, 0, 1, 0, 1];
        let plan =
            GrowthPlan { operator: GrowthOperator::Stack, ..plan(&layers, OptimizerStatePolicy::Reset) };
        let (layout, state) = source.grown(&plan);
        source.assert_grown(&layout, &layers, &state.parameters, &source.state.parameters);
        assert_eq!((state.step, state.tokens, state.optimizer_step, state.has_moments()), (0, 0, 0, false));
        let blocks = |layout: &ParameterLayout| -> usize {
            layout.tensors().iter().filter(|tensor| tensor.layer.is_some()).map(|tensor| tensor.len).sum()
        };
        assert_eq!(blocks(&layout), 3 * blocks(&ParameterLayout::new(&source.config)));
        assert_eq!(layout.find("lm_head.weight").is_some(), !tied);
    }
}

#[test]
fn copies_do_not_share_memory() {
    let source = Source::new(2, false);
    let (layout, mut state) = source.grown(&plan(&[0, 1, 0, 1], OptimizerStatePolicy::Reset));
    let copy = layout.layer(2).qkv.clone();
    let before = state.parameters[copy.clone()].to_vec();
    state.parameters[layout.layer(0).qkv.clone()].fill(1.0);
    assert_eq!(state.parameters[copy], before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_list_of_layers_grows_weights_and_moments(
        layers in prop::collection::vec(0u32..3, 1..8), keep in any::<bool>(), tied in any::<bool>(),
    ) {
        let source = Source::new(3, tied);
        let policy = if keep { OptimizerStatePolicy::Keep } else { OptimizerStatePolicy::Reset };
        let (layout, state) = source.grown(&plan(&layers, policy));
        source.assert_grown(&layout, &layers, &state.parameters, &source.state.parameters);
        prop_assert_eq!(state.has_moments(), keep);
        prop_assert_eq!((state.step, state.tokens), (0, 0));
        prop_assert_eq!(state.optimizer_step, if keep { source.state.optimizer_step } else { 0 });
        if keep {
            source.assert_grown(&layout, &layers, &state.exp_avg, &source.state.exp_avg);
            source.assert_grown(&layout, &layers, &state.exp_avg_sq, &source.state.exp_avg_sq);
        }
    }
}

#[test]
fn a_list_that_does_not_fit_writes_nothing() {
    let source = Source::new(2, true);
    let before = contents(&source.storage);
    for layers in [&[][..], &[0, 2]] {
        let error = source.grow(&plan(layers, OptimizerStatePolicy::Reset), 1).unwrap_err();
        assert!(matches!(error, GrowthError::Layers { .. }), "{error}");
    }
    let stack =
        GrowthPlan { operator: GrowthOperator::Stack, ..plan(&[0, 0, 1, 1], OptimizerStatePolicy::Reset) };
    assert!(source.grow(&stack, 1).unwrap_err().to_string().contains("use LayerMap"));
    let other = ModelConfig { num_hidden_layers: 4, ..source.config.clone() };
    let target = GrowthTarget::Stage(location(&source.storage, "large", 1));
    let fine = plan(&[0, 1], OptimizerStatePolicy::Reset);
    let error = grow(&source.folder, Some(&other), &fine, &target, &[], &mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("num_hidden_layers is 2 instead of 4"), "{error}");
    assert!(before == contents(&source.storage));
}

#[test]
fn growing_twice_gives_the_same_checkpoint() {
    let source = Source::new(2, false);
    let keep = plan(&[0, 1, 0, 1], OptimizerStatePolicy::Keep);
    let first = source.grow(&keep, 1).unwrap();
    let before = contents(&source.storage);
    let again = source.grow(&keep, 2).unwrap();
    assert_eq!((first.reused, again.reused), (false, true));
    assert_eq!((&again.manifest, &again.uri), (&first.manifest, &first.uri));
    assert!(before == contents(&source.storage), "nothing is written again");
    // Another plan is another checkpoint, and it does not take the place of the first.
    let reset = plan(&[0, 1, 0, 1], OptimizerStatePolicy::Reset);
    let error = source.grow(&reset, 1).unwrap_err();
    assert!(error.to_string().contains("already holds a committed checkpoint"), "{error}");
    let other = source.grow(&reset, 2).unwrap();
    assert!(!other.reused);
    assert_ne!(first.manifest.digest, other.manifest.digest);
    // A damaged one is not used, and written again under the next attempt with the same digest.
    let folder = checkpoint_folder(&source.storage, &first.manifest);
    let shard = "model-00001-of-00001.safetensors";
    let mut bytes = folder.get(shard).unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    folder.put(shard, bytes).unwrap();
    let third = source.grow(&keep, 3).unwrap();
    assert!(!third.reused);
    assert_eq!(third.manifest.digest, first.manifest.digest);
    assert_eq!(third.manifest.origin, first.manifest.origin);
}

#[test]
fn a_growth_step_that_died_is_done_again() {
    let source = Source::new(2, false);
    let reset = plan(&[0, 1, 0, 1], OptimizerStatePolicy::Reset);
    let folder = location(&source.storage, "large", 1).folder(0);
    folder.put("model-00001-of-00001.safetensors", "half a file").unwrap();
    let grown = source.grow(&reset, 1).unwrap();
    assert!(!grown.reused);
    assert!(verify(&folder, &grown.manifest).unwrap().is_empty());
}

#[test]
fn a_damaged_source_is_refused() {
    let source = Source::new(2, false);
    let entries = source.folder.list().unwrap();
    let name = &entries.iter().find(|entry| entry.name.starts_with("model-00002")).unwrap().name;
    let mut bytes = source.folder.get(name).unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    source.folder.put(name, bytes).unwrap();
    let error = source.grow(&plan(&[0, 1, 0], OptimizerStatePolicy::Reset), 1).unwrap_err();
    assert!(error.to_string().contains(name) && error.to_string().contains("is damaged"), "{error}");
    assert!(source.storage.join("job/checkpoints/large").list().unwrap().is_empty());
}

#[test]
fn a_plain_folder_grows_into_a_folder_of_its_own() {
    let source = Source::new(2, true);
    source.folder.delete("manifest.json").unwrap();
    let keep = plan(&[0, 1, 1], OptimizerStatePolicy::Keep);
    let error = source.grow(&keep, 1).unwrap_err();
    assert!(error.to_string().contains("use Reset"), "{error}");
    let target = |name: &str| GrowthTarget::Folder {
        folder: source.storage.join(name),
        job: "cli".to_owned(),
        stage: "grown".to_owned(),
    };
    let reset = plan(&[0, 1, 1], OptimizerStatePolicy::Reset);
    let files = [ExtraFile::new("tokenizer.json", "another")];
    let mut reports = Vec::new();
    let mut progress = |done, total| reports.push((done, total));
    let grown = grow(&source.folder, None, &reset, &target("out"), &files, &mut progress).unwrap();
    let (done, total) = *reports.last().unwrap();
    assert_eq!(done, total);
    assert!(reports.is_sorted());
    let out = HuggingFaceFolder::open(&source.storage.join("out")).unwrap();
    assert_eq!(out.config().num_hidden_layers, 3);
    assert_eq!(out.tokenizer().unwrap().unwrap(), "another");
    assert_eq!(out.token_ids().eos, [2]);
    out.load().unwrap();
    let again = grow(&source.folder, None, &reset, &target("out"), &files, &mut |_, _| ()).unwrap();
    assert!(again.reused);
    assert_eq!(again.manifest, grown.manifest);
    let other = grow(&source.folder, None, &reset, &target("other"), &[], &mut |_, _| ()).unwrap();
    assert_eq!(other.manifest.digest, grown.manifest.digest, "the tokenizer is not part of the state");
    source.storage.put("taken/notes.txt", "mine").unwrap();
    let error = grow(&source.folder, None, &reset, &target("taken"), &[], &mut |_, _| ()).unwrap_err();
    assert!(matches!(error, GrowthError::FolderInUse { .. }), "{error}");
}

#[test]
fn shard_size_bounds_the_objects() {
    let source = Source::new(2, false);
    let keep = plan(&[0, 1, 0, 1], OptimizerStatePolicy::Keep);
    let mut growth = Growth::open(&source.folder, None, &keep).unwrap();
    growth.shard_bytes = 4000;
    let target = GrowthTarget::Stage(location(&source.storage, "large", 1));
    let grown = growth.run(&target, &[], &Measure::default(), &mut |_, _| ()).unwrap();
    assert!(grown.manifest.objects.len() > 10);
    let layout = ParameterLayout::new(&grown_config(&source.config, &keep).unwrap());
    let state = load(&source.storage, &grown.manifest, &layout).unwrap();
    source.assert_grown(&layout, &keep.layers, &state.parameters, &source.state.parameters);
    source.assert_grown(&layout, &keep.layers, &state.exp_avg_sq, &source.state.exp_avg_sq);
}

#[test]
fn moments_are_kept_only_when_there_are_some() {
    let (_folder, storage) = storage();
    let writer = writer(&storage, 1, &config(1, true));
    let keep = plan(&[0, 0], OptimizerStatePolicy::Keep);
    for (step, optimizer_step) in [(1, 0), (2, 5)] {
        let parameters = state(&writer.layout, step).parameters;
        let state = TrainingState { step, optimizer_step, parameters, ..TrainingState::default() };
        let folder = checkpoint_folder(&storage, &writer.write(&state, &[]).unwrap());
        let target = GrowthTarget::Stage(location(&storage, "large", 1));
        let grown = grow(&folder, None, &keep, &target, &[], &mut |_, _| ());
        match grown {
            Ok(grown) => assert!(optimizer_step == 0 && grown.manifest.step == 0),
            Err(error) => {
                assert!(optimizer_step == 5 && error.to_string().contains("holds no moments"), "{error}")
            }
        }
    }
}

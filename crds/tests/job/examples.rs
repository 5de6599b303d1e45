//! Every file in examples/ is a job that an API server accepts and that resolves.
use growth_crds::admission::admission_errors;
use growth_crds::plan::{JobPlan, StageStart};
use growth_crds::{GrowthTrainingJob, resolve};
use std::path::{Path, PathBuf};

fn examples() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let folders = [folder.clone(), folder.join("paper")];
    let entries = folders.into_iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let files = entries.map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|end| end == "yaml")).collect();
    files.sort();
    files
}

fn read(path: &Path) -> GrowthTrainingJob {
    let text = std::fs::read_to_string(path).unwrap();
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn plan(name: &str) -> JobPlan {
    let job = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name));
    resolve(&job.metadata.name.unwrap(), &job.spec).unwrap()
}

#[test]
fn all_are_accepted_and_resolve() {
    let files = examples();
    assert!(files.len() >= 13);
    for path in files {
        let job = read(&path);
        let errors = admission_errors(&job, None).unwrap();
        assert_eq!(errors, [], "{}", path.display());
        let name = job.metadata.name.clone().unwrap();
        if let Err(errors) = resolve(&name, &job.spec) {
            panic!("{}: {errors}", path.display());
        }
        // A job that was read and written again is the same job.
        let written = serde_json::to_value(&job).unwrap();
        assert_eq!(serde_json::from_value::<GrowthTrainingJob>(written).unwrap(), job, "{}", path.display());
    }
}

#[test]
fn no_field_is_misspelt() {
    for path in examples() {
        let text = std::fs::read_to_string(&path).unwrap();
        let written: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        let read = serde_json::to_value(read(&path)).unwrap();
        assert_known(&written, &read, &path.display().to_string());
    }
}

/// What is not in the type is not in what the type writes.
fn assert_known(written: &serde_json::Value, read: &serde_json::Value, place: &str) {
    if let (Some(written), Some(read)) = (written.as_object(), read.as_object()) {
        for (name, value) in written {
            let place = format!("{place}: {name}");
            assert_known(value, read.get(name).unwrap_or_else(|| panic!("{place} is unknown")), &place);
        }
    }
    if let (Some(written), Some(read)) = (written.as_array(), read.as_array()) {
        written.iter().zip(read).for_each(|(written, read)| assert_known(written, read, place));
    }
}

#[test]
fn the_papers_job_is_the_papers() {
    let plan = plan("llama-1b-s3.yaml");
    let [small, large] = &plan.stages[..] else { panic!("{} stages", plan.stages.len()) };
    assert_eq!(small.steps, 5000);
    assert_eq!(large.model.num_hidden_layers, 24);
    assert_eq!(large.parameters.total / 1_000_000, 1_364);
    assert_eq!(small.training.adam_w.learning_rate, 1e-3);
    assert_eq!(large.training.adam_w.learning_rate, 3e-4);
    // The base costs about a fortieth of what the target does.
    let share = small.flops.six_nd / large.flops.six_nd;
    assert!((share - 10.48576 / 97.5 / 4.0).abs() < 1e-3, "{share}");
}

#[test]
fn the_partial_stack_is_table_5s() {
    let plan = plan("layer-map.yaml");
    let StageStart::Growth(growth) = &plan.stages[1].start else { panic!() };
    assert_eq!(growth.layers.len(), 24);
    assert_eq!(growth.layers[..6], [0, 1, 2, 3, 4, 5]);
    assert_eq!(growth.layers[22..], [4, 5]);
}

#[test]
fn gradual_growth_is_a_list_of_stages() {
    let layers = |plan: &JobPlan| -> Vec<u32> {
        plan.stages.iter().map(|stage| stage.model.num_hidden_layers).collect()
    };
    let gradual = plan("gradual.yaml");
    assert_eq!(layers(&gradual), [2, 4, 8]);
    assert!(
        gradual.stages.iter().all(|stage| stage.training.schedule == gradual.stages[0].training.schedule)
    );
    // Of MSLT only the new top layers and the head train, and at the very end everything.
    let mslt = plan("mslt.yaml");
    assert_eq!(layers(&mslt), [2, 4, 6]);
    let frozen = |stage: usize| {
        let stage = &mslt.stages[stage];
        let freeze = stage.training.after_growth.freeze.clone().unwrap();
        (freeze.layers, freeze.head, stage.tokens - freeze.tokens)
    };
    assert_eq!([frozen(1), frozen(2)], [(vec![2, 3], true, 0), (vec![4, 5], true, 819_200)]);
}

#[test]
fn the_papers_runs_have_the_papers_figures() {
    // Layers of base and target, non-embedding parameters of the target in millions, tokens, and the base's share of the
    // arithmetic: 10.5 B tokens at a quarter of the size.
    let table = [
        ("paper/410m.yaml", 6, 24, 308, 750e9),
        ("paper/1b.yaml", 6, 24, 1_233, 97.5e9),
        ("paper/3b.yaml", 8, 32, 2_234, 300e9),
        ("paper/7b.yaml", 8, 32, 5_671, 300e9),
        ("paper/1b-zero-depth.yaml", 6, 24, 1_233, 97.5e9),
        ("paper/1b-direct-width.yaml", 24, 24, 1_233, 97.5e9),
        ("paper/1b-zero-width.yaml", 24, 24, 1_233, 97.5e9),
        ("paper/1b-random-depth.yaml", 6, 24, 1_233, 97.5e9),
        ("paper/1b-random-width.yaml", 24, 24, 1_233, 97.5e9),
    ];
    for (name, base_layers, layers, parameters, tokens) in table {
        let plan = plan(name);
        let [base, target] = &plan.stages[..] else { panic!("{} stages", plan.stages.len()) };
        assert_eq!(
            (base.model.num_hidden_layers, target.model.num_hidden_layers),
            (base_layers, layers),
            "{name}"
        );
        let millions = target.parameters.non_embedding as f64 / 1e6;
        assert!((millions - f64::from(parameters)).abs() < 1.0, "{name}: {millions}");
        assert_eq!((base.steps, base.tokens), (5000, 10_485_760_000), "{name}");
        assert!((target.tokens as f64 / tokens - 1.0).abs() < 1e-4, "{name}: {}", target.tokens);
        // A factor of 4 in parameters, in depth or, doubling every width, in width.
        let factor = target.parameters.non_embedding as f64 / base.parameters.non_embedding as f64;
        assert!((factor - 4.0).abs() < 0.01, "{name}: {factor}");
        let share = base.flops.six_nd / target.flops.six_nd;
        assert!((share / (10.48576e9 / tokens / 4.0) - 1.0).abs() < 1e-2, "{name}: {share}");
    }
}

//! How a stage trains after its growth, from the spec to the plan, and what each mistake says.
use crate::common::{Edit, plan};
use growth_crds::plan::{
    FreezePlan, GrowthTrainingPlan, JobPlan, NewParametersPlan, SchedulePlan, StagePlan, TrainingPlan,
};
use serde_json::{Value, json};

const SMALL: u64 = 1_048_576;
const LARGE: u64 = 4_194_304;

fn stages(edits: &[Edit]) -> Vec<StagePlan> {
    plan(edits).unwrap().stages
}

/// A third stage that goes on in the schedule.
fn third(schedule: &str) -> Edit {
    let growth = json!({"operator": "Stack", "factor": 2, "schedule": schedule});
    ("/spec/stages/2", json!({"name": "huge", "tokens": SMALL, "growth": growth}))
}

#[test]
fn nothing_special_is_the_default_and_is_not_written() {
    for stage in stages(&[]) {
        assert!(stage.training.after_growth.is_ordinary());
        let written = serde_json::to_value(&stage.training).unwrap();
        assert_eq!(written.get("afterGrowth"), None);
        // A plan of an earlier version is read.
        assert_eq!(serde_json::from_value::<TrainingPlan>(written).unwrap(), stage.training);
    }
}

#[test]
fn a_continued_schedule_runs_over_all_its_stages() {
    let edits = [
        ("/spec/training/schedule", json!({"cosine": {"warmupTokens": "100K"}})),
        ("/spec/stages/1/growth/schedule", json!("Continue")),
    ];
    let cosine =
        |tokens| SchedulePlan::Cosine { warmup_tokens: 100_000, horizon_tokens: tokens, min_ratio: 0.1 };
    let of = |edits: &[Edit]| -> Vec<(SchedulePlan, u64)> {
        let of_stage =
            |stage: StagePlan| (stage.training.schedule, stage.training.after_growth.schedule_start_tokens);
        stages(edits).into_iter().map(of_stage).collect()
    };
    let both = cosine(SMALL + LARGE);
    assert_eq!(of(&edits), [(both.clone(), 0), (both.clone(), SMALL)]);
    // A third stage lengthens it, or begins anew.
    let all = cosine(SMALL + LARGE + SMALL);
    let longer = of(&[&edits[..], &[third("Continue")]].concat());
    assert_eq!(longer, [(all.clone(), 0), (all.clone(), SMALL), (all, SMALL + LARGE)]);
    let anew = of(&[&edits[..], &[third("Restart")]].concat());
    assert_eq!(anew, [(both.clone(), 0), (both, SMALL), (cosine(SMALL), 0)]);
    // A chain may begin later, with the schedule that the stage there has.
    let wsd = json!({"wsd": {"warmupTokens": "50K", "decayTokens": "5M"}});
    let later = of(&[third("Continue"), ("/spec/stages/1/training/schedule", wsd)]);
    let wsd = SchedulePlan::Wsd {
        warmup_tokens: 50_000,
        decay_tokens: 5_000_000,
        end_tokens: LARGE + SMALL,
        min_ratio: 0.0,
    };
    assert_eq!(later[1..], [(wsd.clone(), 0), (wsd, LARGE)]);
}

#[test]
fn another_peak_is_noted() {
    let mut edits = vec![("/spec/stages/1/growth/schedule", json!("Continue"))];
    assert_eq!(plan(&edits).unwrap().notes, Vec::<String>::new());
    edits.push(("/spec/stages/0/training/optimizer", json!({"adamW": {"learningRate": 1e-3}})));
    let notes = plan(&edits).unwrap().notes;
    assert!(notes[0].contains("a peak of 0.0003 instead of 0.001: the learning rate jumps"), "{notes:?}");
}

fn special(growth: Value) -> GrowthTrainingPlan {
    stages(&[("/spec/stages/1/growth", growth)]).remove(1).training.after_growth
}

#[test]
fn frozen_are_all_but_new_layers() {
    let freeze = |growth| special(growth).freeze.unwrap();
    let pro = json!({"operator": "LayerMap", "layerMap": {"llamaPro": {"groups": 2}}, "freeze": "Source"});
    assert_eq!(freeze(pro), FreezePlan { layers: vec![1, 3], head: false, tokens: LARGE });
    let top = json!({
        "operator": "LayerMap", "layerMap": {"layers": [0, 1, 1]}, "freeze": "SourceButHead", "freezeTokens": "40960",
    });
    assert_eq!(freeze(top), FreezePlan { layers: vec![2], head: true, tokens: 40_960 });
    let both = json!({
        "operator": "DirectWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2}, "freeze": "Source",
    });
    assert_eq!(freeze(both).layers, [2, 3]);
    let without_source = json!({"operator": "RandomDepth", "factor": 2, "freeze": "Source"});
    assert_eq!(freeze(without_source).layers, [2, 3]);
    let notes = plan(&[
        ("/spec/stages/1/growth/freeze", json!("Source")),
        ("/spec/stages/1/growth/freezeTokens", json!(5000)),
    ]);
    let notes = notes.unwrap().notes;
    assert!(
        notes[0].contains("freezeTokens 5K are not whole steps of 4096; it unfreezes after 8192"),
        "{notes:?}"
    );
}

#[test]
fn new_parameters_have_a_ratio_and_a_ramp() {
    let new = |more: Value| {
        special(json!({"operator": "DirectWidth", "factor": 2, "newParameters": more})).new_parameters
    };
    let plan = NewParametersPlan { learning_rate_ratio: 1.3, ramp_tokens: 512_000 };
    assert_eq!(new(json!({"learningRateRatio": 1.3, "rampTokens": "512K"})), Some(plan));
    let at_once = NewParametersPlan { learning_rate_ratio: 2.0, ramp_tokens: 0 };
    assert_eq!(new(json!({"learningRateRatio": 2})), Some(at_once));
    assert_eq!(
        [at_once.ratio(0), plan.ratio(0), plan.ratio(256_000), plan.ratio(LARGE)],
        [2.0, 1.0, 1.15, 1.3]
    );
}

#[test]
fn flops_are_those_of_the_products_that_are_left() {
    let edits = [
        ("/spec/stages/0/model/numHiddenLayers", json!(3)),
        (
            "/spec/stages/1/growth",
            json!({
                "operator": "LayerMap", "layerMap": {"layers": [0, 1, 1, 2, 2]}, "freeze": "SourceButHead",
                "freezeTokens": 409_600,
            }),
        ),
    ];
    let stage = stages(&edits).remove(1);
    // Multiply-adds of one sequence, product by product: hidden 64, four heads of 16, ffn 176, vocabulary 2048.
    let (rows, hidden, ffn, vocab) = (256u64, 64u64, 176u64, 2048u64);
    let layer: u64 = [4 * hidden * hidden, 3 * hidden * ffn].map(|weights| rows * weights).iter().sum();
    let product: u64 = (1..=rows).map(|visible| visible * hidden).sum();
    let head = rows * hidden * vocab;
    let forward = 5 * (layer + 2 * product) + head;
    // Layers 2 and 4 train. Layer 3 lies between: it passes gradients on. Layers 0 and 1 are below.
    let passes_on = layer + 4 * product;
    let frozen = forward + (passes_on + layer) + passes_on + (passes_on + layer) + 2 * head;
    let sequences = |tokens: u64| (tokens / rows) as f64;
    let expected = |frozen_tokens: u64, free_tokens: u64| {
        2.0 * (frozen as f64 * sequences(frozen_tokens) + 3.0 * forward as f64 * sequences(free_tokens))
    };
    let close =
        |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-12, "{found} {expected}");
    close(stage.exact_flops(4096), expected(4096, 0));
    close(stage.exact_flops(819_200), expected(409_600, 409_600));
    close(stage.flops.exact, expected(409_600, LARGE - 409_600));
    assert_eq!(stage.flops.six_nd, 6.0 * stage.parameters.non_embedding as f64 * LARGE as f64);
    // Nothing of the head's weights with Source.
    let source =
        stages(&[&edits[..], &[("/spec/stages/1/growth/freeze", json!("Source"))]].concat()).remove(1);
    close(stage.exact_flops(4096) - source.exact_flops(4096), 2.0 * head as f64 * 16.0);
}

#[test]
fn auto_is_the_guideline() {
    let of = |growth: Value| plan(&[("/spec/stages/1/growth", growth)]).unwrap();
    let stack = of(json!({"operator": "Stack", "factor": "auto"}));
    assert_eq!(stack.stages[1].model.num_hidden_layers, 8);
    assert_eq!(stack.notes, ["spec.stages[1].growth.factor: auto is 4: the paper's guideline"]);
    let wide = of(json!({"operator": "ZeroWidth", "factor": "auto"}));
    assert_eq!((wide.stages[1].model.hidden_size, wide.notes.len()), (128, 1));
    // Doubled widths are four times the parameters of the layers.
    let parameters = |plan: &JobPlan, stage: usize| plan.stages[stage].parameters.non_embedding as f64;
    let factor = parameters(&wide, 1) / parameters(&wide, 0);
    assert!((3.9..4.1).contains(&factor), "{factor}");
    let both = of(json!({
        "operator": "DirectWidth", "factor": "auto", "depth": {"operator": "ZeroDepth", "factor": "auto"},
    }));
    assert_eq!((both.stages[1].model.hidden_size, both.stages[1].model.num_hidden_layers), (128, 4));
    assert!(
        both.notes.iter().any(|note| note.contains("growth.depth.factor: auto is 2")),
        "{:?}",
        both.notes
    );
    let shallow = plan(&[
        ("/spec/stages/1/growth/factor", json!("auto")),
        ("/spec/stages/0/model/numHiddenLayers", json!(1)),
    ]);
    let notes = shallow.unwrap().notes;
    assert!(notes.iter().any(|note| note.contains("a base of 1 layer lost")), "{notes:?}");
}

#[test]
fn every_mistake_says_what_to_do() {
    let with = |more: Value| {
        let mut growth = json!({"operator": "Stack", "factor": 2});
        growth.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        vec![("/spec/stages/1/growth", growth)]
    };
    let cases: Vec<(Vec<Edit>, &str)> = vec![
        (
            [
                with(json!({"schedule": "Continue"})),
                vec![("/spec/stages/1/training/schedule", json!({"constant": {}}))],
            ]
            .concat(),
            "spec.stages[1].training.schedule: growth.schedule: Continue goes on in the schedule of stage small",
        ),
        (
            [
                with(json!({"schedule": "Continue"})),
                vec![("/spec/training/schedule", json!({"cosine": {"warmupTokens": "6M"}}))],
            ]
            .concat(),
            "spec.training.schedule.cosine.warmupTokens: a warm-up of 6M tokens is longer than stages small to large",
        ),
        (
            with(json!({"rewarmTokens": "1M"})),
            "spec.stages[1].growth.rewarmTokens: a schedule that restarts has a warm-up",
        ),
        (
            with(json!({"schedule": "Continue", "rewarmTokens": "5M"})),
            "spec.stages[1].growth.rewarmTokens: a warm-up of 5M tokens is longer than the stage",
        ),
        (with(json!({"freezeTokens": 4096})), "spec.stages[1].growth.freezeTokens: nothing is frozen"),
        (
            with(json!({"freeze": "Source", "freezeTokens": 0})),
            "spec.stages[1].growth.freezeTokens: 0 tokens are no part of the stage",
        ),
        (
            with(json!({"freeze": "Source", "freezeTokens": "5M"})),
            "spec.stages[1].growth.freezeTokens: 5M tokens are no part of the stage",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "ZeroWidth", "factor": 2, "freeze": "Source"}),
            )],
            "spec.stages[1].growth.freeze: Source trains new layers only, and ZeroWidth adds none here",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LearnDepth", "factor": 2, "freeze": "Source"}),
            )],
            "spec.stages[1].growth.freeze: LearnDepth mixes layers",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LearnWidth", "factor": 2, "newParameters": {"learningRateRatio": 1.3}}),
            )],
            "spec.stages[1].growth.newParameters: LearnWidth mixes weights",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({"operator": "LayerMap", "layerMap": {"layers": [1, 0]}, "freeze": "SourceButHead"}),
            )],
            "spec.stages[1].growth.freeze: SourceButHead trains new layers only, and LayerMap adds none here",
        ),
        (
            [with(json!({"freeze": "SourceButHead"})), vec![("/spec/model/tieWordEmbeddings", json!(true))]]
                .concat(),
            "spec.stages[1].growth.freeze: the head is to train, but with tieWordEmbeddings it is the embedding",
        ),
        (
            with(json!({"newParameters": {"learningRateRatio": -1}})),
            "spec.stages[1].growth.newParameters.learningRateRatio: -1 is no multiple",
        ),
        (
            with(json!({"newParameters": {"learningRateRatio": 1.3, "rampTokens": "5M"}})),
            "spec.stages[1].growth.newParameters.rampTokens: a ramp of 5M tokens is longer than the stage",
        ),
        (
            vec![(
                "/spec/stages/1/growth",
                json!({
                    "operator": "LayerMap", "layerMap": {"layers": [1, 0]}, "newParameters": {"learningRateRatio": 2},
                }),
            )],
            "spec.stages[1].growth.newParameters: this growth adds no parameters",
        ),
    ];
    for (edits, expected) in cases {
        let errors = plan(&edits).map(|_| ()).unwrap_err();
        assert!(errors.iter().any(|error| error.contains(expected)), "{expected}\nnot in {errors:#?}");
    }
    // A tied model may freeze all that is old.
    let tied =
        [with(json!({"freeze": "Source"})), vec![("/spec/model/tieWordEmbeddings", json!(true))]].concat();
    assert!(plan(&tied).is_ok());
}

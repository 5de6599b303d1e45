//! What is special about the steps after a growth: parts that are frozen for a while, and the learning rate of new
//! parameters.

use crate::model::layout::{ParameterLayout, ParameterTensor};
use crate::model::part::{OfWidths, Part};
use crate::model::trainable::Trainable;
use crate::ops::adamw::NewElements;
use growth_crds::plan::{GrowthPlan, NewParametersPlan, StagePlan, StageStart, WidthMap};
use std::sync::Arc;

/// What a stage that has grown does differently; nothing by default.
#[derive(Debug, Clone, Default)]
pub struct AfterGrowth {
    freeze: Option<Freeze>,
    new: Option<NewParameters>,
}

/// What trains in the first steps of the stage.
#[derive(Debug, Clone)]
struct Freeze {
    trainable: Trainable,
    steps: u64,
}

/// Which parameters are new, and their learning rate.
#[derive(Debug, Clone)]
struct NewParameters {
    plan: NewParametersPlan,
    /// In the order of the layout.
    tensors: Vec<NewPart>,
}

/// What of a tensor is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewPart {
    /// Nothing.
    Nothing,
    /// The tensor.
    All,
    /// Some rows and columns.
    Elements(Arc<NewElements>),
}

impl AfterGrowth {
    /// As the plan says, for a model of this layout.
    pub fn of(plan: &StagePlan, layout: &ParameterLayout) -> Self {
        let special = &plan.training.after_growth;
        let freeze = special.freeze.as_ref().map(|freeze| Freeze {
            trainable: Trainable::under(freeze, layout.layers().len()),
            steps: freeze.tokens / plan.training.global_batch_tokens,
        });
        let new = match (special.new_parameters, &plan.start) {
            (Some(new), StageStart::Growth(growth)) => {
                Some(NewParameters { plan: new, tensors: new_parts(growth, plan.model.head_dim, layout) })
            }
            _ => None,
        };
        Self { freeze, new }
    }

    /// What trains in the step after `step` steps of the stage; `None` where it is everything.
    pub fn trainable(&self, step: u64) -> Option<&Trainable> {
        self.freeze.as_ref().filter(|freeze| step < freeze.steps).map(|freeze| &freeze.trainable)
    }

    /// Whether it freezes anything at any time.
    pub fn freezes(&self) -> bool {
        self.freeze.is_some()
    }

    /// Optimizer steps of the stage that a bucket was frozen for, after `step` steps. AdamW's correction of young moments
    /// counts the steps that the moments have seen.
    pub fn missed_steps(&self, bucket: usize, step: u64) -> u64 {
        let frozen = self.freeze.as_ref().filter(|freeze| !freeze.trainable.bucket(bucket));
        frozen.map_or(0, |freeze| freeze.steps.min(step))
    }

    /// What of the tensor at `position` of the layout has a learning rate of its own in the step that begins after
    /// `tokens` tokens of the stage, and that rate as a multiple of the others'.
    pub fn new_part(&self, position: usize, tokens: u64) -> Option<(&NewPart, f64)> {
        let new = self.new.as_ref()?;
        let part = new.tensors.get(position).filter(|part| **part != NewPart::Nothing)?;
        let ratio = new.plan.ratio(tokens);
        (ratio != 1.0).then_some((part, ratio))
    }
}

/// What of every tensor is new: new layers, and in the others rows and columns that are new or further copies.
pub fn new_parts(growth: &GrowthPlan, head_dim: u32, layout: &ParameterLayout) -> Vec<NewPart> {
    let new_layers = growth.added_layers();
    let new = growth.width.as_deref();
    let new = new.map(|width| OfWidths::channels(width, head_dim).map(|map| new_channels(&map)));
    let part = |tensor: &ParameterTensor| match &new {
        _ if tensor.layer.is_some_and(|layer| new_layers.contains(&layer)) => NewPart::All,
        Some(new) => new_elements(tensor, new),
        None => NewPart::Nothing,
    };
    layout.tensors().iter().map(part).collect()
}

fn new_elements(tensor: &ParameterTensor, new: &OfWidths<Vec<bool>>) -> NewPart {
    let (rows, columns) = Part::of(&tensor.name).axes();
    let columns = new.of(columns).clone();
    // The vocabulary does not grow, and a gain is one row.
    let unchanged = || vec![false; tensor.len / columns.len()];
    let rows = rows.map_or_else(unchanged, |rows| new.of(rows).clone());
    if rows.contains(&true) || columns.contains(&true) {
        return NewPart::Elements(Arc::new(NewElements { rows, columns }));
    }
    NewPart::Nothing
}

/// Whether each channel is new or a further copy.
fn new_channels(map: &WidthMap) -> Vec<bool> {
    let mut seen = vec![false; map.source as usize];
    let is_new =
        |source: Option<u32>| source.is_none_or(|source| std::mem::replace(&mut seen[source as usize], true));
    map.sources().map(is_new).collect()
}

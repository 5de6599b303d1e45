//! The masks of a growth (RandomDepth, RandomWidth; MSG, arXiv 2305.02869) as scales of weights.
//!
//! A mask multiplies outputs: of a matrix, whose rows make them, of the embedding and of a norm, whose columns do. So a
//! masked model is a plain one whose weights are `scale * weight`, element by element, and the gradient of a weight is
//! `scale` times that of the scaled one: no operation of the model knows of masks.
//!
//! With D channels in the residual stream and the mask c of a channel (1 where it is old):
//!
//! | tensor | rows | columns |
//! |---|---|---|
//! | embedding | | c |
//! | q, k, v | c of the head | |
//! | o | c, times the mask of a new layer | mask of a new query head beside an old key and value head |
//! | gate, up | c of the channel inside the MLP | |
//! | down | c, times the mask of a new layer | |
//! | gains | | c sqrt(sum(c) / D): the mean square of a row counts channels that are masked |
//! | head | | |
//!
//! Where the head is the embedding it has that one's scale, and the last gain has sqrt(sum(c) / D) alone: the logits and
//! all gradients are the same.

use super::layout::{ParameterLayout, ParameterTensor};
use super::part::Part;
use growth_crds::plan::growth_mask::GrowthMasks;
use growth_crds::plan::{GrowthPlan, ModelConfig, WidthMap, WidthPlan};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Elements that one task scales.
const CHUNK: usize = 1 << 16;

/// The scale of every weight under the masks of a growth.
#[derive(Debug, Clone)]
pub struct WeightMasks {
    /// Those that have a scale, by offset.
    tensors: Vec<Scaled>,
}

/// One tensor; element (i, j) has the scale `factor * rows[i] * columns[j]`.
#[derive(Debug, Clone)]
struct Scaled {
    range: Range<usize>,
    width: usize,
    factor: f32,
    rows: Side,
    columns: Side,
}

/// Scales along one side of a tensor; absent where all are 1.
type Side = Option<Arc<[f32]>>;

impl WeightMasks {
    /// The scales of the weights of a model that `plan` has made, whose widths and layers are those of `layout`.
    pub fn new(
        layout: &ParameterLayout,
        config: &ModelConfig,
        plan: &GrowthPlan,
        masks: &GrowthMasks,
    ) -> Self {
        let sides = Sides::new(plan, config, masks);
        let scaled = |tensor: &ParameterTensor| {
            let part = Part::of(&tensor.name);
            let (rows, columns) = sides.of(part);
            let is_new = tensor.layer.is_some_and(|layer| plan.lacks_source(layer));
            let factor = if is_new && part.writes_residual() { masks.layers as f32 } else { 1.0 };
            let width = tensor.shape.last().copied().unwrap_or(1).max(1);
            let changes = factor != 1.0 || rows.is_some() || columns.is_some();
            changes.then_some(Scaled { range: tensor.range(), width, factor, rows, columns })
        };
        Self { tensors: layout.tensors().iter().filter_map(scaled).collect() }
    }

    /// Multiplies the elements of the flat buffer from `first` on by their scales: weights or gradients.
    pub fn scale(&self, first: usize, numbers: &mut [f32]) {
        let end = first + numbers.len();
        let begin = self.tensors.partition_point(|tensor| tensor.range.end <= first);
        for tensor in self.tensors[begin..].iter().take_while(|tensor| tensor.range.start < end) {
            let part = tensor.range.start.max(first)..tensor.range.end.min(end);
            tensor.scale(part.start - tensor.range.start, &mut numbers[part.start - first..part.end - first]);
        }
    }
}

impl Scaled {
    /// Scales the elements of the tensor from `first` on.
    fn scale(&self, first: usize, numbers: &mut [f32]) {
        numbers.par_chunks_mut(CHUNK).enumerate().for_each(|(index, mut rest)| {
            let mut element = first + index * CHUNK;
            while !rest.is_empty() {
                let (row, column) = (element / self.width, element % self.width);
                let count = rest.len().min(self.width - column);
                let (piece, later) = rest.split_at_mut(count);
                self.scale_row(row, column, piece);
                (element, rest) = (element + count, later);
            }
        });
    }

    fn scale_row(&self, row: usize, column: usize, numbers: &mut [f32]) {
        let scale = self.factor * self.rows.as_ref().map_or(1.0, |rows| rows[row]);
        match &self.columns {
            Some(columns) => {
                let columns = &columns[column..column + numbers.len()];
                numbers.iter_mut().zip(columns).for_each(|(number, column)| *number *= scale * column);
            }
            None if scale != 1.0 => numbers.iter_mut().for_each(|number| *number *= scale),
            None => {}
        }
    }
}

/// The scales that tensors share.
#[derive(Debug, Default)]
struct Sides {
    hidden: Side,
    heads: Side,
    keys: Side,
    inner: Side,
    /// New query heads whose keys and values are old ones, which no mask of theirs keeps out.
    context: Side,
    gains: Side,
    last_gain: Side,
}

impl Sides {
    fn new(plan: &GrowthPlan, config: &ModelConfig, masks: &GrowthMasks) -> Self {
        let Some(width) = plan.masked_width() else { return Self::default() };
        let head_dim = config.head_dim as usize;
        let norm = norm_scale(&width.hidden, masks.hidden);
        let has_new = width.hidden.has_new();
        let gain = |source: Option<u32>| {
            let mask = if source.is_none() { masks.hidden } else { 1.0 };
            (mask * norm) as f32
        };
        let gains: Side = has_new.then(|| width.hidden.sources().map(gain).collect());
        let level: Side = has_new.then(|| width.hidden.sources().map(|_| norm as f32).collect());
        Self {
            hidden: side(&width.hidden, masks.hidden, 1),
            heads: side(&width.heads, masks.heads, head_dim),
            keys: side(&width.key_value_heads, masks.heads, head_dim),
            inner: side(&width.intermediate, masks.intermediate, 1),
            context: context_side(width, masks.heads, head_dim),
            last_gain: if config.tie_word_embeddings { level } else { gains.clone() },
            gains,
        }
    }

    /// Rows and columns of a tensor.
    fn of(&self, part: Part) -> (Side, Side) {
        match part {
            Part::Embedding => (None, self.hidden.clone()),
            Part::Norm => (None, self.gains.clone()),
            Part::FinalNorm => (None, self.last_gain.clone()),
            Part::Head => (None, None),
            Part::Query => (self.heads.clone(), None),
            Part::Key | Part::Value => (self.keys.clone(), None),
            Part::Output => (self.hidden.clone(), self.context.clone()),
            Part::Gate | Part::Up => (self.inner.clone(), None),
            Part::Down => (self.hidden.clone(), None),
        }
    }
}

/// sqrt(sum(c) / D): 1 where nothing is masked, exactly.
fn norm_scale(hidden: &WidthMap, mask: f64) -> f64 {
    let new = hidden.sources().filter(Option::is_none).count() as f64;
    let all = f64::from(hidden.target().max(1));
    (((all - new) + mask * new) / all).sqrt()
}

/// The mask of every channel, `width` of them for each of the map.
fn side(map: &WidthMap, mask: f64, width: usize) -> Side {
    let of = |source: Option<u32>| if source.is_none() { mask as f32 } else { 1.0 };
    map.has_new().then(|| map.sources().flat_map(|source| std::iter::repeat_n(of(source), width)).collect())
}

fn context_side(width: &WidthPlan, mask: f64, head_dim: usize) -> Side {
    let loose = width.new_heads_at_old_keys();
    let scale = |loose: bool| if loose { mask as f32 } else { 1.0 };
    let scales = || loose.iter().flat_map(|loose| std::iter::repeat_n(scale(*loose), head_dim)).collect();
    loose.contains(&true).then(scales)
}

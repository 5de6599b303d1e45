//! Target tensors from source tensors, a piece at a time: memory is bounded by a piece, not by a tensor.
//!
//! A matrix `W` [outputs, inputs] becomes `W'` by two maps: row i of the target comes from row r(i) of the source,
//! column j from column c(j). Where a channel has copies, what reads it is divided among them, so that
//! `sum_j W'[i, j] x[c(j)] = (W x)[r(i)]`. Where a channel is new, the weights that would let it change the function
//! are zero, and the others are random, so that every one of them gets a gradient.

mod fresh;

use super::depth::source_name;
use super::{GrowthError, Result};
use crate::checkpoint::{TensorIndex, TensorSpec};
use crate::model::initializer::standard_deviation;
use crate::model::layout::{ParameterLayout, ParameterTensor};
use crate::model::part::{OfWidths, Part};
use crate::random;
use crate::storage::Storage;
use growth_crds::plan::{GrowthPlan, ModelConfig, WidthMap, WidthPlan, WidthRule, WidthSplit};
use rayon::prelude::*;
use std::ops::Range;

/// Numbers of a piece of zeros.
const ZEROS: usize = 1 << 17;

/// How much smaller than the copy before a copy's share is in an uneven split: 7 to 3.
const UNEVEN_RATIO: f64 = 3.0 / 7.0;

/// One axis of the target: of every index its source, how many copies that has, and which of them it is.
#[derive(Debug)]
struct ChannelMap {
    runs: Vec<(Option<usize>, usize)>,
    source: usize,
    /// Absent where nothing changes.
    channels: Option<Vec<Channel>>,
}

#[derive(Debug, Clone, Copy)]
struct Channel {
    source: Option<u32>,
    /// 0 for the first copy.
    copy: u32,
    /// Share of a weight that reads it.
    share: f32,
    /// First copy of the same source.
    first: u32,
    /// A new channel that is not zero, so that what reads it must be.
    live: bool,
}

impl ChannelMap {
    fn unchanged(size: usize) -> Self {
        Self { runs: vec![(Some(0), size)], source: size, channels: None }
    }

    fn new(map: &WidthMap, split: WidthSplit) -> Self {
        if map.is_identity() {
            return Self::unchanged(map.source as usize);
        }
        let copies = map.copies();
        let mut seen = vec![0u32; map.source as usize];
        let mut first = vec![0u32; map.source as usize];
        let channel = |(target, source): (u32, Option<u32>)| {
            let Some(source) = source else {
                return Channel { source: None, copy: 0, share: 1.0, first: target, live: false };
            };
            let index = source as usize;
            if seen[index] == 0 {
                first[index] = target;
            }
            let copy = seen[index];
            seen[index] += 1;
            let share = share(split, copy, copies[index]);
            Channel { source: Some(source), copy, share, first: first[index], live: false }
        };
        let channels = (0u32..).zip(map.sources()).map(channel).collect();
        let runs = map.runs.iter().map(|run| (run.from.map(|from| from as usize), run.count as usize));
        Self { runs: runs.collect(), source: map.source as usize, channels: Some(channels) }
    }

    fn has_new(&self) -> bool {
        self.runs.iter().any(|(from, _)| from.is_none())
    }

    /// Whether a row is the one that the source had, and no further copy and not new.
    fn is_old(&self, index: usize) -> bool {
        self.channels.as_ref().is_none_or(|channels| {
            let channel = &channels[index];
            channel.source.is_some() && channel.copy == 0
        })
    }
}

/// Share of copy number `copy` of `copies`.
fn share(split: WidthSplit, copy: u32, copies: u32) -> f32 {
    let weight = |copy: u32| UNEVEN_RATIO.powi(copy as i32);
    match split {
        WidthSplit::Uneven => (weight(copy) / (0..copies).map(weight).sum::<f64>()) as f32,
        WidthSplit::Even | WidthSplit::Noisy => 1.0 / copies as f32,
    }
}

/// The channels of every width.
fn channel_maps(plan: &WidthPlan, head_dim: u32) -> OfWidths<ChannelMap> {
    let split = match plan.rule {
        WidthRule::Direct { split, .. } => split,
        WidthRule::Zero { .. } | WidthRule::Random { .. } => WidthSplit::Even,
    };
    let mut maps = OfWidths::channels(plan, head_dim).map(|map| ChannelMap::new(&map, split));
    let live = plan.new_heads_at_old_keys();
    for (index, channel) in maps.heads.channels.iter_mut().flatten().enumerate() {
        channel.live = live[index / head_dim as usize];
    }
    maps
}

/// Which of the three vectors of a training state a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vector {
    Weights,
    Moments,
}

/// Makes the tensors of the target.
pub(super) struct Transform<'a> {
    plan: &'a GrowthPlan,
    target: &'a ModelConfig,
    layout: &'a ParameterLayout,
    axes: Option<OfWidths<ChannelMap>>,
}

/// How one tensor is made.
struct Recipe<'a> {
    transform: &'a Transform<'a>,
    name: &'a str,
    part: Part,
    vector: Vector,
    rows: &'a ChannelMap,
    columns: &'a ChannelMap,
    /// Standard deviation of random weights.
    std: f64,
}

impl<'a> Transform<'a> {
    pub(super) fn new(
        plan: &'a GrowthPlan,
        source: &ModelConfig,
        target: &'a ModelConfig,
        layout: &'a ParameterLayout,
    ) -> Self {
        let axes = plan.width.as_ref().map(|width| channel_maps(width, source.head_dim));
        Self { plan, target, layout, axes }
    }

    /// Writes the numbers of a tensor of the target, in order; `buffers` are reused from call to call.
    pub(super) fn write(
        &self,
        tensor: &TensorSpec,
        (folder, tensors): (&Storage, &TensorIndex),
        buffers: &mut Buffers,
        mut sink: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let (name, vector) = match tensor.name.split_once('/') {
            Some((name, _)) => (name, Vector::Moments),
            None => (tensor.name.as_str(), Vector::Weights),
        };
        let part = Part::of(name);
        if self.is_new(name) {
            return self.write_new(tensor, (name, part, vector), buffers, sink);
        }
        let source = source_name(&tensor.name, &self.plan.layers);
        let has_noise = self.plan.noise.is_some() && vector == Vector::Weights && !part.is_norm();
        if self.is_zero(name, part) && !has_noise {
            return write_zeros(tensor.len(), buffers, sink);
        }
        let whole;
        let (rows, columns) = match &self.axes {
            None if !has_noise => {
                let place = tensors.expect(folder, &source, &tensor.shape)?;
                return place.read(folder, &mut buffers.input, sink);
            }
            None => {
                whole = whole_axes(&tensor.shape);
                (&whole.0, &whole.1)
            }
            Some(axes) => {
                whole = whole_axes(&tensor.shape);
                axes_of(part, axes, &whole)
            }
        };
        let std = self.std(name);
        let recipe = Recipe { transform: self, name, part, vector, rows, columns, std };
        recipe.write(&source, tensor, (folder, tensors), buffers, &mut sink)
    }

    /// Whether it belongs to a layer that adds nothing at first.
    fn is_zero(&self, name: &str, part: Part) -> bool {
        part.writes_residual() && self.layout.find(name).is_some_and(|tensor| is_zeroed(self.plan, tensor))
    }

    fn std(&self, name: &str) -> f64 {
        let initializer = match self.plan.width.as_deref().map(|width| &width.rule) {
            Some(WidthRule::Zero { initializer, .. } | WidthRule::Random { initializer, .. }) => *initializer,
            _ => return 0.0,
        };
        self.layout.find(name).map_or(0.0, |tensor| standard_deviation(tensor, self.target, initializer))
    }
}

/// Standard deviation of the noise of the paper's ablation.
fn noise_std(target: &ModelConfig, part: Part) -> f64 {
    let (hidden, layers) = (f64::from(target.hidden_size), f64::from(target.num_hidden_layers));
    if part.writes_residual() { 1.0 / (hidden.sqrt() * layers) } else { (2.0 / (5.0 * hidden)).sqrt() }
}

/// W = (1 - share) W + share E, on the elements of the tensor `name` from `first` on.
pub(super) fn add_noise(plan: &GrowthPlan, target: &ModelConfig, name: &str, first: usize, out: &mut [f32]) {
    let (Some(noise), part) = (plan.noise, Part::of(name)) else { return };
    if part.is_norm() {
        return;
    }
    let mut values = vec![0.0; out.len()];
    let (std, share) = (noise_std(target, part), noise.share as f32);
    random::normal_from(noise.seed, &format!("{name}/noise"), std, first, &mut values);
    for (out, value) in out.iter_mut().zip(values) {
        *out = (1.0 - share) * *out + share * value;
    }
}

/// Rows and columns of a tensor; a gain is one row.
fn whole_axes(shape: &[usize]) -> (ChannelMap, ChannelMap) {
    match shape {
        [columns] => (ChannelMap::unchanged(1), ChannelMap::unchanged(*columns)),
        _ => (ChannelMap::unchanged(shape[0]), ChannelMap::unchanged(shape[1])),
    }
}

fn axes_of<'a>(
    part: Part,
    axes: &'a OfWidths<ChannelMap>,
    whole: &'a (ChannelMap, ChannelMap),
) -> (&'a ChannelMap, &'a ChannelMap) {
    let (rows, columns) = part.axes();
    (rows.map_or(&whole.0, |rows| axes.of(rows)), axes.of(columns))
}

/// Buffers of a piece.
#[derive(Default)]
pub(super) struct Buffers {
    input: Vec<f32>,
    rows: Vec<f32>,
    output: Vec<f32>,
}

fn write_zeros(
    count: usize,
    buffers: &mut Buffers,
    mut sink: impl FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let piece = count.min(ZEROS);
    buffers.output.clear();
    buffers.output.resize(piece, 0.0);
    for first in (0..count).step_by(piece.max(1)) {
        sink(&buffers.output[..piece.min(count - first)])?;
    }
    Ok(())
}

impl Recipe<'_> {
    fn write(
        &self,
        source: &str,
        tensor: &TensorSpec,
        (folder, tensors): (&Storage, &TensorIndex),
        buffers: &mut Buffers,
        sink: &mut impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let shape: &[usize] = match tensor.shape.as_slice() {
            [_] => &[self.columns.source],
            _ => &[self.rows.source, self.columns.source],
        };
        let place = tensors.expect(folder, source, shape)?;
        let (width, source_width) = (tensor.shape.last().copied().unwrap_or(1), self.columns.source);
        let at_once = (folder.part_bytes() / 4 / width.max(source_width)).max(1);
        let zero = self.transform.is_zero(self.name, self.part);
        let mut target = 0;
        for &(from, count) in &self.rows.runs {
            for first in (0..count).step_by(at_once) {
                let rows = at_once.min(count - first);
                let from = from.filter(|_| !zero).map(|from| from + first);
                if let Some(from) = from {
                    let part = place.part(from * source_width..(from + rows) * source_width);
                    buffers.rows.clear();
                    part.read(folder, &mut buffers.input, |numbers| {
                        buffers.rows.extend_from_slice(numbers);
                        Ok::<(), GrowthError>(())
                    })?;
                }
                buffers.output.resize(rows * width, 0.0);
                let input = from.map(|_| buffers.rows.as_slice());
                self.fill(target..target + rows, input, &mut buffers.output, zero);
                sink(&buffers.output)?;
                target += rows;
            }
        }
        Ok(())
    }

    /// Rows of the target that lie side by side in the source too, or are all new.
    fn fill(&self, rows: Range<usize>, input: Option<&[f32]>, output: &mut [f32], zero: bool) {
        let (width, source_width) = (output.len() / rows.len(), self.columns.source);
        output.par_chunks_mut(width).enumerate().for_each(|(index, out)| {
            let row = rows.start + index;
            let source = input.map(|input| &input[index * source_width..(index + 1) * source_width]);
            if zero {
                out.fill(0.0);
            } else if self.vector == Vector::Moments {
                self.moments(row, source, out);
            } else {
                self.weights(row, source, out);
            }
            if self.vector == Vector::Weights {
                add_noise(self.transform.plan, self.transform.target, self.name, row * width, out);
            }
        });
    }

    /// Moments of old weights stay, those of new ones are zero.
    fn moments(&self, row: usize, source: Option<&[f32]>, out: &mut [f32]) {
        let Some(source) = source.filter(|_| self.rows.is_old(row)) else { return out.fill(0.0) };
        let Some(channels) = &self.columns.channels else { return out.copy_from_slice(source) };
        for (out, channel) in out.iter_mut().zip(channels) {
            *out = match channel.source {
                Some(from) if channel.copy == 0 => source[from as usize],
                _ => 0.0,
            };
        }
    }

    fn weights(&self, row: usize, source: Option<&[f32]>, out: &mut [f32]) {
        match self.transform.plan.width.as_ref().map(|width| &width.rule) {
            None => out.copy_from_slice(source.unwrap_or_default()),
            Some(WidthRule::Direct { split, seed }) => {
                self.direct(row, source.unwrap_or_default(), out, *split, *seed);
            }
            Some(WidthRule::Zero { .. }) if self.part.is_norm() => self.padded_gains(source, out),
            Some(WidthRule::Zero { seed, .. }) => self.padded(row, source, out, *seed),
            Some(WidthRule::Random { seed, .. }) => self.surrounded(row, source, out, *seed),
        }
    }

    /// Copies; a weight that reads a channel is divided among its copies.
    fn direct(&self, row: usize, source: &[f32], out: &mut [f32], split: WidthSplit, seed: u64) {
        let Some(channels) = &self.columns.channels else { return out.copy_from_slice(source) };
        let tied = self.transform.target.tie_word_embeddings;
        let divided = match self.part {
            Part::Embedding | Part::Norm => false,
            // A tied head cannot be divided, being the embedding too; the gain before it can.
            Part::FinalNorm => tied,
            _ => true,
        };
        if divided && split == WidthSplit::Noisy && !self.part.is_norm() {
            return self.divide_with_noise(row, source, out, channels, seed);
        }
        for (out, channel) in out.iter_mut().zip(channels) {
            let value = channel.source.map_or(0.0, |from| source[from as usize]);
            *out = if divided { value * channel.share } else { value };
        }
    }

    /// Further copies get an equal share and noise, the first copy the rest.
    fn divide_with_noise(
        &self,
        row: usize,
        source: &[f32],
        out: &mut [f32],
        channels: &[Channel],
        seed: u64,
    ) {
        let layers = f64::from(self.transform.target.num_hidden_layers);
        let std = 1.0 / ((out.len() as f64).sqrt() * layers);
        random::normal_from(seed, &format!("{}/split", self.name), std, row * out.len(), out);
        for (index, channel) in channels.iter().enumerate() {
            let value = channel.source.map_or(0.0, |from| source[from as usize]);
            if channel.copy == 0 {
                out[index] = value;
            } else {
                out[index] += value * channel.share;
                // First copies come first.
                out[channel.first as usize] -= out[index];
            }
        }
    }

    /// Old gains times sqrt(d / D), for the padded row has a smaller mean square; new ones as at the start.
    fn padded_gains(&self, source: Option<&[f32]>, out: &mut [f32]) {
        let source = source.unwrap_or_default();
        let Some(channels) = &self.columns.channels else { return out.copy_from_slice(source) };
        let scale = (source.len() as f64 / out.len() as f64).sqrt() as f32;
        for (out, channel) in out.iter_mut().zip(channels) {
            *out = channel.source.map_or(1.0, |from| scale * source[from as usize]);
        }
    }

    /// The source's block, and around it zeros where the function would change, random weights elsewhere.
    fn padded(&self, row: usize, source: Option<&[f32]>, out: &mut [f32], seed: u64) {
        let is_random = match source {
            Some(_) => self.part != Part::Embedding && self.columns.has_new(),
            None => true,
        };
        if is_random {
            random::normal_from(seed, self.name, self.std, row * out.len(), out);
        } else {
            out.fill(0.0);
        }
        let reads_old = source.is_none() && self.new_rows_read_old();
        match (&self.columns.channels, source) {
            (None, Some(source)) => out.copy_from_slice(source),
            (None, None) if reads_old => {}
            (None, None) => out.fill(0.0),
            (Some(channels), source) => {
                for (out, channel) in out.iter_mut().zip(channels) {
                    match (channel.source, source) {
                        (Some(from), Some(source)) => *out = source[from as usize],
                        (Some(_), None) if !reads_old => *out = 0.0,
                        (None, _) if channel.live => *out = 0.0,
                        _ => {}
                    }
                }
            }
        }
    }

    /// Of two factors (gate and up; scores and values) only one may be zero, or neither would ever get a gradient.
    /// Where the residual stream grows too, its new channels wake both, and the paper's zeros are kept.
    fn new_rows_read_old(&self) -> bool {
        let hidden_grows = self.transform.axes.as_ref().is_some_and(|axes| axes.hidden.has_new());
        matches!(self.part, Part::Query | Part::Key | Part::Gate) && !hidden_grows
    }
}

/// Whether zeroOutput is about this tensor.
pub(super) fn is_zeroed(plan: &GrowthPlan, tensor: &ParameterTensor) -> bool {
    Part::of(&tensor.name).writes_residual()
        && tensor.layer.is_some_and(|layer| plan.zero_output.contains(&layer))
}

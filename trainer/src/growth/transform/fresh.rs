//! What RandomDepth and RandomWidth add: the first weights that the target would have had, had it been trained from
//! scratch. They need no zeros, because the masks of the growth keep them out of the function at first.

use super::{Buffers, Part, Recipe, Transform, Vector, add_noise, write_zeros};
use crate::checkpoint::{PIECE_BYTES, TensorSpec};
use crate::growth::Result;
use crate::model::initializer::standard_deviation;
use crate::random;
use rayon::prelude::*;

/// Numbers that one task draws; even, since normal numbers come in pairs.
const CHUNK: usize = 1 << 14;

impl Transform<'_> {
    /// Whether it belongs to a layer without a source.
    pub(super) fn is_new(&self, name: &str) -> bool {
        let layer = self.layout.find(name).and_then(|tensor| tensor.layer);
        layer.is_some_and(|layer| self.plan.lacks_source(layer))
    }

    /// Writes a tensor of a new layer: gains of 1, random weights, moments of 0.
    pub(super) fn write_new(
        &self,
        tensor: &TensorSpec,
        (name, part, vector): (&str, Part, Vector),
        buffers: &mut Buffers,
        mut sink: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let (Some(new), Some(place), Vector::Weights) =
            (self.plan.new_layers, self.layout.find(name), vector)
        else {
            return write_zeros(tensor.len(), buffers, sink);
        };
        let std = standard_deviation(place, self.target, new.initializer);
        let (count, piece) = (tensor.len(), PIECE_BYTES / 4);
        for first in (0..count).step_by(piece) {
            buffers.output.resize(piece.min(count - first), 0.0);
            buffers.output.par_chunks_mut(CHUNK).enumerate().for_each(|(index, out)| {
                let first = first + index * CHUNK;
                match part.is_norm() {
                    true => out.fill(1.0),
                    false => random::normal_from(new.seed, name, std, first, out),
                }
                add_noise(self.plan, self.target, name, first, out);
            });
            sink(&buffers.output)?;
        }
        Ok(())
    }
}

impl Recipe<'_> {
    /// `[[W, A], [B, C]]`: the source's block, surrounded by random weights; of gains by 1.
    pub(super) fn surrounded(&self, row: usize, source: Option<&[f32]>, out: &mut [f32], seed: u64) {
        if let (None, Some(source)) = (&self.columns.channels, source) {
            return out.copy_from_slice(source);
        }
        match self.part.is_norm() {
            true => out.fill(1.0),
            false => random::normal_from(seed, self.name, self.std, row * out.len(), out),
        }
        if let (Some(channels), Some(source)) = (&self.columns.channels, source) {
            for (out, channel) in out.iter_mut().zip(channels) {
                *out = channel.source.map_or(*out, |from| source[from as usize]);
            }
        }
    }
}

//! Rotary position embedding (Su et al., 2021) in Hugging Face's order: element i of a head turns with element
//! i + head_dim / 2 by the angle position * theta^(-2 i / head_dim).
//!
//! The rotation rides on the two passes that move heads anyway: from the rows that the QKV projection writes to
//! the head-major layout that attention reads, and back.

use crate::ops::ROW_BLOCK;
use crate::ops::attention::HeadShape;
use rayon::prelude::*;

/// Cosines and sines of every position: [positions, head_dim / 2] each.
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// The table for `positions` positions. Frequencies and angles are f32 numbers, as in Hugging Face.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| (1.0 / libm::pow(theta, (2 * i) as f64 / head_dim as f64)) as f32).collect();
        let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        Self {
            cos: angles().map(|angle| libm::cos(angle) as f32).collect(),
            sin: angles().map(|angle| libm::sin(angle) as f32).collect(),
            half,
        }
    }

    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Moves `rows` [batch * sequence, qkv_width] to the head-major `qkv` (see [`HeadShape`]); queries and keys turn.
pub fn split_heads(qkv: &mut [f32], rows: &[f32], table: &RopeTable, shape: &HeadShape) {
    let HeadShape { sequence, head_dim, .. } = *shape;
    let head_len = sequence * head_dim;
    qkv.par_chunks_mut(head_len).enumerate().for_each(|(index, head)| {
        let (batch, part) = (index / shape.qkv_heads(), index % shape.qkv_heads());
        let column = shape.column_of(part);
        for (position, out) in head.chunks_exact_mut(head_dim).enumerate() {
            let x = &rows[(batch * sequence + position) * shape.qkv_width() + column..][..head_dim];
            if shape.is_value(part) {
                out.copy_from_slice(x);
            } else {
                rotate(out, x, table.at(position), 1.0);
            }
        }
    });
}

/// The gradient of [`split_heads`]: moves the head-major `d_qkv` to `d_rows` and turns queries and keys back.
pub fn split_heads_backward(d_rows: &mut [f32], d_qkv: &[f32], table: &RopeTable, shape: &HeadShape) {
    let HeadShape { sequence, head_dim, .. } = *shape;
    let width = shape.qkv_width();
    d_rows.par_chunks_mut(ROW_BLOCK * width).enumerate().for_each(|(block, d_rows)| {
        for (row, d_row) in d_rows.chunks_exact_mut(width).enumerate() {
            let row = block * ROW_BLOCK + row;
            let (batch, position) = (row / sequence, row % sequence);
            for part in 0..shape.qkv_heads() {
                let head = batch * shape.qkv_heads() + part;
                let x = &d_qkv[(head * sequence + position) * head_dim..][..head_dim];
                let out = &mut d_row[shape.column_of(part)..][..head_dim];
                if shape.is_value(part) {
                    out.copy_from_slice(x);
                } else {
                    rotate(out, x, table.at(position), -1.0);
                }
            }
        }
    });
}

/// `out` = `x` turned by the angles of `(cos, sin)`, or back again with direction -1.
fn rotate(out: &mut [f32], x: &[f32], (cos, sin): (&[f32], &[f32]), direction: f32) {
    let half = cos.len();
    let (out_low, out_high) = out.split_at_mut(half);
    let (low, high) = x.split_at(half);
    for i in 0..half {
        let sin = sin[i] * direction;
        out_low[i] = low[i].mul_add(cos[i], -(high[i] * sin));
        out_high[i] = high[i].mul_add(cos[i], low[i] * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{relative_error, uniform};

    #[test]
    fn the_gradient_turns_back() {
        let shape = HeadShape { batch: 2, sequence: 5, heads: 4, kv_heads: 2, head_dim: 6 };
        let table = RopeTable::new(5, 6, 10_000.0);
        let rows = uniform(1, 10 * shape.qkv_width());
        let mut qkv = vec![0.0; rows.len()];
        split_heads(&mut qkv, &rows, &table, &shape);
        let mut back = vec![0.0; rows.len()];
        split_heads_backward(&mut back, &qkv, &table, &shape);
        assert!(relative_error(&back, &rows) < 1e-6);
    }

    #[test]
    fn turns_by_the_documented_angle() {
        let table = RopeTable::new(4, 4, 100.0);
        let mut out = [0.0; 4];
        rotate(&mut out, &[0.0, 1.0, 0.0, 0.0], table.at(3), 1.0);
        let angle: f32 = 3.0 * 0.1;
        assert!((out[1] - angle.cos()).abs() < 1e-6 && (out[3] - angle.sin()).abs() < 1e-6);
    }
}

//! A linear layer without bias: `out = x W^T`, with W as Hugging Face stores it, [out, in].

use crate::ops::gemm::{Matrix, MatrixMut, Output, gemm};

/// Rows and widths of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct LinearShape {
    /// Rows of the input and of the output.
    pub rows: usize,
    /// Width of a row of the input.
    pub inputs: usize,
    /// Width of a row of the output.
    pub outputs: usize,
}

impl LinearShape {
    fn x<'a>(&self, x: &'a [f32]) -> Matrix<'a> {
        Matrix::new(x, self.rows, self.inputs)
    }

    fn y<'a>(&self, y: &'a [f32]) -> Matrix<'a> {
        Matrix::new(y, self.rows, self.outputs)
    }

    fn w<'a>(&self, weight: &'a [f32]) -> Matrix<'a> {
        Matrix::new(weight, self.outputs, self.inputs)
    }
}

/// `out` [rows, outputs] = `x` [rows, inputs] `weight`^T, or that added to it.
pub fn forward(out: &mut [f32], x: &[f32], weight: &[f32], shape: LinearShape, output: Output) {
    let out = MatrixMut::new(out, shape.rows, shape.outputs);
    gemm(out, shape.x(x), shape.w(weight).t(), output);
}

/// `d_x` [rows, inputs] = `d_out` [rows, outputs] `weight`.
pub fn backward_input(d_x: &mut [f32], d_out: &[f32], weight: &[f32], shape: LinearShape) {
    let d_x = MatrixMut::new(d_x, shape.rows, shape.inputs);
    gemm(d_x, shape.y(d_out), shape.w(weight), Output::Overwrite);
}

/// `d_weight` [outputs, inputs] = `d_out`^T `x`.
pub fn backward_weight(d_weight: &mut [f32], d_out: &[f32], x: &[f32], shape: LinearShape) {
    let d_weight = MatrixMut::new(d_weight, shape.outputs, shape.inputs);
    gemm(d_weight, shape.y(d_out).t(), shape.x(x), Output::Overwrite);
}

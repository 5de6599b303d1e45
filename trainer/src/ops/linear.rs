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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        FORWARD_TOLERANCE, GRADIENT_TOLERANCE, dot, error_against, gradient_error, uniform, widen,
    };
    use proptest::prelude::*;

    fn reference(x: &[f64], weight: &[f64], shape: LinearShape) -> Vec<f64> {
        let rows = x.chunks_exact(shape.inputs);
        rows.flat_map(|x| weight.chunks_exact(shape.inputs).map(move |w| dot(x, w))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn forward_is_the_product(rows in 1usize..90, inputs in 1usize..70, outputs in 1usize..70, add: bool) {
            let shape = LinearShape { rows, inputs, outputs };
            let (x, weight) = (uniform(1, rows * inputs), uniform(2, outputs * inputs));
            let old = uniform(3, rows * outputs);
            let mut expected = reference(&widen(&x), &widen(&weight), shape);
            if add {
                expected.iter_mut().zip(&old).for_each(|(sum, old)| *sum += f64::from(*old));
            }
            let mut out = if add { old } else { vec![f32::NAN; rows * outputs] };
            forward(&mut out, &x, &weight, shape, if add { Output::Accumulate } else { Output::Overwrite });
            prop_assert!(error_against(&out, &expected) < FORWARD_TOLERANCE);
        }

        #[test]
        fn gradients_are_slopes(rows in 1usize..90, inputs in 1usize..70, outputs in 1usize..70) {
            let shape = LinearShape { rows, inputs, outputs };
            let (x, weight) = (uniform(1, rows * inputs), uniform(2, outputs * inputs));
            let d_out = uniform(3, rows * outputs);
            let (mut d_x, mut d_weight) = (vec![f32::NAN; x.len()], vec![f32::NAN; weight.len()]);
            backward_input(&mut d_x, &d_out, &weight, shape);
            backward_weight(&mut d_weight, &d_out, &x, shape);
            let (x64, weight64, d64) = (widen(&x), widen(&weight), widen(&d_out));
            let of_x = gradient_error(&d_x, &x, |x| dot(&reference(x, &weight64, shape), &d64));
            let of_weight = gradient_error(&d_weight, &weight, |w| dot(&reference(&x64, w, shape), &d64));
            prop_assert!(of_x < GRADIENT_TOLERANCE, "input: {of_x}");
            prop_assert!(of_weight < GRADIENT_TOLERANCE, "weight: {of_weight}");
        }
    }
}

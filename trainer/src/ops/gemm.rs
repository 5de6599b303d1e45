//! The one matrix product: `out = a b` or `out += a b`, in f32, row-major, any strides on the inputs.
//!
//! The kernel (crate `matrixmultiply`) adds over the inner dimension in blocks of a fixed size, so an element's
//! bits depend neither on the number of threads nor on how the rows are split.

use rayon::prelude::*;

/// Products of fewer multiply-adds than this run on the calling thread: waking another costs more.
const PARALLEL_WORK: usize = 1 << 18;

/// Rows and columns of the widest kernel's tile; parts of a product are multiples of it.
const KERNEL: usize = 16;

/// A matrix that is read: `rows` x `cols` elements of a buffer.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A contiguous row-major matrix.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that lie `row_stride` elements apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || data.len() >= (rows - 1) * row_stride + cols, "the buffer holds the matrix");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The transposed matrix; moves nothing.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn row_block(self, first: usize, rows: usize) -> Self {
        Self { data: &self.data[first * self.row_stride..], rows, ..self }
    }

    fn column_block(self, first: usize, cols: usize) -> Self {
        Self { data: &self.data[first * self.col_stride..], cols, ..self }
    }
}

/// A matrix that is written: rows lie `row_stride` elements apart.
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// A contiguous row-major matrix.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that lie `row_stride` elements apart.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || data.len() >= (rows - 1) * row_stride + cols, "the buffer holds the matrix");
        assert!(cols <= row_stride, "rows do not overlap");
        Self { data, rows, cols, row_stride }
    }
}

/// What happens to the old content of the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// `out = a b`
    Overwrite,
    /// `out += a b`
    Accumulate,
}

/// `out = a b` or `out += a b`; `a` is [M, K], `b` is [K, N], `out` is [M, N]. Parallel over rows of `out`, or over
/// its columns where there are more of them: a task packs its part of the one matrix and all of the other.
pub fn gemm(out: MatrixMut<'_>, a: Matrix<'_>, b: Matrix<'_>, output: Output) {
    check(&out, a, b);
    let threads = rayon::current_num_threads();
    if threads == 1 || a.rows * a.cols * b.cols < PARALLEL_WORK {
        return gemm_serial(out, a, b, 1.0, output);
    }
    let by_columns = b.cols > a.rows;
    let length = if by_columns { b.cols } else { a.rows };
    let block = length.div_ceil(threads).next_multiple_of(KERNEL);
    let target = SharedOutput(out.data.as_mut_ptr());
    (0..length.div_ceil(block)).into_par_iter().for_each(|index| {
        let first = index * block;
        let count = block.min(length - first);
        let (a, b, offset) = if by_columns {
            (a, b.column_block(first, count), first)
        } else {
            (a.row_block(first, count), b, first * out.row_stride)
        };
        // SAFETY: `check` holds for the whole product, and each task writes rows or columns of its own.
        unsafe { multiply(target.at(offset), out.row_stride, a, b, 1.0, output) };
    });
}

/// Where tasks write disjoint parts of one output.
#[derive(Clone, Copy)]
struct SharedOutput(*mut f32);

// SAFETY: `gemm` alone makes one; its tasks write disjoint elements of a buffer that it borrows mutably.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    /// # Safety
    /// `offset` lies in the buffer.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: see above.
        unsafe { self.0.add(offset) }
    }
}

/// `out = scale a b` or `out += scale a b` on the calling thread.
pub fn gemm_serial(out: MatrixMut<'_>, a: Matrix<'_>, b: Matrix<'_>, scale: f32, output: Output) {
    check(&out, a, b);
    // SAFETY: the constructors and `check` make sure that the three buffers hold what the sizes and strides
    // address, and `out` is borrowed mutably, so nothing aliases it.
    unsafe { multiply(out.data.as_mut_ptr(), out.row_stride, a, b, scale, output) };
}

/// # Safety
/// `out` holds `a.rows` rows of `b.cols` elements, `row_stride` apart, that nobody else touches meanwhile.
unsafe fn multiply(
    out: *mut f32,
    row_stride: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    scale: f32,
    output: Output,
) {
    let beta = match output {
        Output::Overwrite => 0.0,
        Output::Accumulate => 1.0,
    };
    // SAFETY: the constructors of `a` and `b` checked their buffers, the caller vouches for `out`.
    unsafe {
        matrixmultiply::sgemm(
            a.rows,
            a.cols,
            b.cols,
            scale,
            a.data.as_ptr(),
            a.row_stride as isize,
            a.col_stride as isize,
            b.data.as_ptr(),
            b.row_stride as isize,
            b.col_stride as isize,
            beta,
            out,
            row_stride as isize,
            1,
        );
    }
}

fn check(out: &MatrixMut<'_>, a: Matrix<'_>, b: Matrix<'_>) {
    assert!(
        a.cols == b.rows && out.rows == a.rows && out.cols == b.cols,
        "shapes fit: [{}, {}] = [{}, {}] [{}, {}]",
        out.rows,
        out.cols,
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{relative_error, uniform};
    use proptest::prelude::*;

    fn reference(a: Matrix<'_>, b: Matrix<'_>, old: &[f32]) -> Vec<f32> {
        let at = |m: Matrix<'_>, i: usize, j: usize| f64::from(m.data[i * m.row_stride + j * m.col_stride]);
        let mut out = Vec::new();
        for i in 0..a.rows {
            for j in 0..b.cols {
                let sum: f64 = (0..a.cols).map(|k| at(a, i, k) * at(b, k, j)).sum();
                out.push((sum + f64::from(old[i * b.cols + j])) as f32);
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn equals_the_sum_of_products(m in 1usize..70, k in 1usize..300, n in 1usize..70, ta: bool, tb: bool, acc: bool) {
            let (a, b, old) = (uniform(1, m * k), uniform(2, k * n), uniform(3, m * n));
            let a = if ta { Matrix::new(&a, k, m).t() } else { Matrix::new(&a, m, k) };
            let b = if tb { Matrix::new(&b, n, k).t() } else { Matrix::new(&b, k, n) };
            let (output, start) =
                if acc { (Output::Accumulate, old.clone()) } else { (Output::Overwrite, vec![0.0; m * n]) };
            let mut out = old;
            gemm(MatrixMut::new(&mut out, m, n), a, b, output);
            prop_assert!(relative_error(&out, &reference(a, b, &start)) < 1e-5);
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let (m, k, n) = (333, 700, 129);
        let (a, b) = (uniform(1, m * k), uniform(2, k * n));
        let with_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.5; m * n];
            pool.install(|| {
                let out = MatrixMut::new(&mut out, m, n);
                gemm(out, Matrix::new(&a, m, k), Matrix::new(&b, k, n), Output::Accumulate);
            });
            out
        };
        let one = with_threads(1);
        for threads in 2..6 {
            assert!(with_threads(threads) == one, "{threads} threads");
        }
    }

    #[test]
    #[should_panic(expected = "shapes fit")]
    fn wrong_shapes_are_refused() {
        gemm(
            MatrixMut::new(&mut [0.0; 4], 2, 2),
            Matrix::new(&[0.0; 6], 2, 3),
            Matrix::new(&[0.0; 4], 2, 2),
            Output::Overwrite,
        );
    }
}

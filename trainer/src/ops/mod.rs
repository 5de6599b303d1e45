//! The operations of a LLaMA step: one file each, with forward, backward, shapes, equation and tests.
//!
//! Every function takes its outputs first, then its inputs, then its sizes, and works on buffers that the caller
//! owns. Results do not depend on the number of threads: work is split over rows or heads, and every sum runs in
//! an order that the code spells out.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod embedding;
pub mod gemm;
pub mod gradient;
pub mod linear;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;
#[cfg(test)]
pub(crate) mod testing;
pub mod vector;

/// Rows that one task of a row-wise operation handles, and the block in which gains sum over rows.
pub(crate) const ROW_BLOCK: usize = 64;

//! The weights of the target as a function of the learned matrices, and the way back for their gradient.
//!
//! Depth: `W'_l = sum_j D_lj W_j`, with one matrix `D` [target layers, source layers] for each kind of tensor. Width, of
//! every layer of the source before that ("Stacking Your Transformers", eq. 37 to 42; LiGO, arXiv 2303.00980):
//!
//! ```text
//! Q' = B_Q Q B_emb^T    K' = B_K K B_emb^T    V' = B_V V B_emb^T    O' = B_emb O B_C^T
//! gate' = B_mlp gate B_emb^T    up' = B_mlp up B_emb^T    down' = B_emb down B_mlp^T
//! gain' = B_emb gain    E' = E B_emb^T    head' = head B_emb^T
//! ```
//!
//! `B_C` [target query width, source query width] is `B_V` for the attention output, which has the values of a key head
//! once for each of its query heads: its block of two query heads at the same place of their groups is the block of `B_V`
//! of their key heads, and zero at different places.

use super::tables::{KINDS, Kind, Table};
use crate::model::layout::ParameterLayout;
use crate::model::part::Axis;
use crate::ops::gemm::{Matrix, MatrixMut, Output, gemm};
use crate::random;
use growth_crds::plan::{GrowthPlan, LearnPlan, LearnedWidth, ModelConfig, WidthMap};
use std::ops::Range;

/// A learned matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LearnedMatrix {
    /// `depth.<tensor>` or `width.<axis>`.
    pub name: String,
    /// Rows: layers or channels of the target.
    pub rows: usize,
    /// Columns: layers or channels of the source.
    pub columns: usize,
    /// First element in the flat vector of all matrices.
    pub offset: usize,
}

impl LearnedMatrix {
    /// Its elements in the flat vector.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.columns
    }
}

/// Where the layers of the target come from.
enum Depth {
    /// One learned matrix a kind, in the order of [`KINDS`].
    Learned(Vec<LearnedMatrix>),
    /// Copies; in layers of the second list attention output and MLP down projections are zero.
    Copied { layers: Vec<u32>, zero_output: Vec<u32> },
}

/// The learned matrices of the widths.
struct Width {
    maps: LearnedWidth,
    head_dim: usize,
    /// Of every query head of the target its place in a group of the source.
    slots: Vec<Option<u32>>,
    /// In the order of [`Axis::LEARNED`].
    matrices: Vec<LearnedMatrix>,
    /// Sizes of [`Axis::Context`].
    context: (usize, usize),
    /// Query heads of a group, of source and target.
    groups: (usize, usize),
    /// Key heads of the source.
    keys: usize,
}

/// The function from matrices to weights.
pub struct Generator {
    source: Table,
    /// The source's layers in the target's widths.
    wide: Table,
    target: Table,
    depth: Depth,
    width: Option<Width>,
    seed: u64,
    len: usize,
}

/// Buffers that generation and its gradient share.
#[derive(Default)]
pub struct Workspace {
    wide: Vec<f32>,
    d_wide: Vec<f32>,
    context: Vec<f32>,
    d_context: Vec<f32>,
    product: Vec<f32>,
}

impl Generator {
    /// The generator of a plan, which fits `source`.
    pub fn new(source: &ModelConfig, plan: &GrowthPlan, learn: &LearnPlan) -> Self {
        let target = plan.grown(source);
        let wide = ModelConfig { num_hidden_layers: source.num_hidden_layers, ..target.clone() };
        let [source_table, wide, target] = [source, &wide, &target].map(Table::new);
        let mut len = 0;
        let mut matrix = |name: String, rows: usize, columns: usize| {
            let matrix = LearnedMatrix { name, rows, columns, offset: len };
            len += rows * columns;
            matrix
        };
        let depth = if learn.depth {
            let name = |kind: &Kind| format!("depth.{}", kind.name);
            let of = |kind| matrix(name(kind), target.layers, source_table.layers);
            Depth::Learned(KINDS.iter().map(of).collect())
        } else {
            Depth::Copied { layers: plan.layers.clone(), zero_output: plan.zero_output.clone() }
        };
        let width = learn.width.as_ref().map(|maps| {
            let head_dim = source.head_dim as usize;
            let of = |axis: &Axis| {
                let map = axis.map(maps, source.head_dim);
                let name = format!("width.{}", axis.matrix_name());
                matrix(name, map.target() as usize, map.source as usize)
            };
            let (heads, keys) = (source.num_attention_heads as usize, source.num_key_value_heads as usize);
            let (target_heads, target_keys) = (maps.heads.target(), maps.key_value_heads.target());
            Width {
                matrices: Axis::LEARNED.iter().map(of).collect(),
                slots: maps.slots(source),
                context: (target_heads as usize * head_dim, heads * head_dim),
                groups: (heads / keys, (target_heads / target_keys) as usize),
                maps: maps.clone(),
                head_dim,
                keys,
            }
        });
        Self { source: source_table, wide, target, depth, width, seed: learn.seed, len }
    }

    /// Elements of all matrices.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is learned.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The matrices, side by side in the flat vector.
    pub fn matrices(&self) -> impl Iterator<Item = &LearnedMatrix> {
        let depth = match &self.depth {
            Depth::Learned(matrices) => matrices.as_slice(),
            Depth::Copied { .. } => &[],
        };
        depth.iter().chain(self.width.iter().flat_map(|width| &width.matrices))
    }

    /// Layout of the target's weights.
    pub fn target(&self) -> &ParameterLayout {
        &self.target.layout
    }

    /// Matrices before the first step: layer l of the target is layer l mod L of the source; old channels are themselves,
    /// and rows of new channels are N(0, 1 / rows). `layers` is the list of the growth plan.
    pub fn initial(&self, layers: &[u32]) -> Vec<f32> {
        let mut matrices = vec![0.0; self.len];
        if let Depth::Learned(of_kinds) = &self.depth {
            for matrix in of_kinds {
                let rows = matrices[matrix.range()].chunks_exact_mut(matrix.columns);
                rows.zip(layers).for_each(|(row, layer)| row[*layer as usize] = 1.0);
            }
        }
        if let Some(width) = &self.width {
            for (axis, matrix) in Axis::LEARNED.iter().zip(&width.matrices) {
                let map = axis.map(&width.maps, width.head_dim as u32);
                expand(&map, matrix, self.seed, &mut matrices[matrix.range()]);
            }
        }
        matrices
    }

    /// The weights of the target, in its layout, from those of the source.
    pub fn generate(&self, space: &mut Workspace, source: &[f32], matrices: &[f32], target: &mut [f32]) {
        let Some(width) = &self.width else {
            for (from, to) in self.source.outer.iter().zip(&self.target.outer) {
                target[to.clone()].copy_from_slice(&source[from.clone()]);
            }
            return self.mix(source, matrices, target);
        };
        width.expand_context(matrices, &mut space.context);
        self.widen_outer(width, source, matrices, target);
        space.wide.resize(self.wide.layout.total_len(), 0.0);
        self.widen(width, space, source, matrices);
        self.mix(&space.wide, matrices, target);
    }

    /// Layers of the target from as wide layers.
    fn mix(&self, wide: &[f32], matrices: &[f32], target: &mut [f32]) {
        match &self.depth {
            Depth::Learned(of_kinds) => {
                for (kind, matrix) in of_kinds.iter().enumerate() {
                    let weights = Matrix::new(&matrices[matrix.range()], matrix.rows, matrix.columns);
                    let (layers, out) = (self.wide.stacked(kind, wide), &self.target.bands[kind]);
                    let out = MatrixMut::strided(
                        &mut target[out.first..],
                        self.target.layers,
                        out.len(),
                        out.stride,
                    );
                    gemm(out, weights, layers, Output::Overwrite);
                }
            }
            Depth::Copied { layers, zero_output } => {
                for (to, &from) in layers.iter().enumerate() {
                    for (kind, of) in KINDS.iter().enumerate() {
                        let out = &mut target[self.target.range(kind, to)];
                        if of.writes_residual && zero_output.contains(&(to as u32)) {
                            out.fill(0.0);
                        } else {
                            out.copy_from_slice(&wide[self.wide.range(kind, from as usize)]);
                        }
                    }
                }
            }
        }
    }

    /// Embedding, final norm and head: `W' = W B_emb^T`.
    fn widen_outer(&self, width: &Width, source: &[f32], matrices: &[f32], target: &mut [f32]) {
        let hidden = width.matrix(Axis::Hidden, matrices, &[]);
        let (d, wide) = (width.matrices[0].columns, width.matrices[0].rows);
        for (from, to) in self.source.outer.iter().zip(&self.target.outer) {
            let rows = from.len() / d;
            let out = MatrixMut::new(&mut target[to.clone()], rows, wide);
            gemm(out, Matrix::new(&source[from.clone()], rows, d), hidden.t(), Output::Overwrite);
        }
    }

    /// The layers of the source in the widths of the target.
    fn widen(&self, width: &Width, space: &mut Workspace, source: &[f32], matrices: &[f32]) {
        let Workspace { wide, context, product, .. } = space;
        for layer in 0..self.source.layers {
            for (index, kind) in KINDS.iter().enumerate() {
                let (old, new) = (&self.source.bands[index], &self.wide.bands[index]);
                let weights = Matrix::new(&source[self.source.range(index, layer)], old.rows, old.columns);
                let columns = width.matrix(kind.columns, matrices, context).t();
                let out = &mut wide[self.wide.range(index, layer)];
                let Some(rows) = kind.rows else {
                    gemm(MatrixMut::new(out, old.rows, new.columns), weights, columns, Output::Overwrite);
                    continue;
                };
                let half = sized(product, old.rows * new.columns);
                gemm(MatrixMut::new(half, old.rows, new.columns), weights, columns, Output::Overwrite);
                let half = Matrix::new(half, old.rows, new.columns);
                let rows = width.matrix(rows, matrices, context);
                gemm(MatrixMut::new(out, new.rows, new.columns), rows, half, Output::Overwrite);
            }
        }
    }

    /// The gradient of the matrices from that of the target's weights. `space` is as [`Generator::generate`] left it for
    /// the same matrices.
    pub fn pull_back(
        &self,
        space: &mut Workspace,
        source: &[f32],
        matrices: &[f32],
        d_target: &[f32],
        d_matrices: &mut [f32],
    ) {
        d_matrices.fill(0.0);
        if let Depth::Learned(of_kinds) = &self.depth {
            let wide = if self.width.is_some() { &space.wide } else { source };
            for (kind, matrix) in of_kinds.iter().enumerate() {
                let out = MatrixMut::new(&mut d_matrices[matrix.range()], matrix.rows, matrix.columns);
                let layers = self.wide.stacked(kind, wide);
                gemm(out, self.target.stacked(kind, d_target), layers.t(), Output::Overwrite);
            }
        }
        let Some(width) = &self.width else { return };
        space.d_wide.resize(self.wide.layout.total_len(), 0.0);
        self.unmix(&mut space.d_wide, matrices, d_target);
        space.d_context.clear();
        space.d_context.resize(width.context.0 * width.context.1, 0.0);
        self.narrow_outer(width, source, d_target, d_matrices);
        self.narrow(width, space, source, matrices, d_matrices);
        width.fold_context(&space.d_context, d_matrices);
    }

    /// The gradient of the layers that were mixed.
    fn unmix(&self, d_wide: &mut [f32], matrices: &[f32], d_target: &[f32]) {
        match &self.depth {
            Depth::Learned(of_kinds) => {
                for (kind, matrix) in of_kinds.iter().enumerate() {
                    let weights = Matrix::new(&matrices[matrix.range()], matrix.rows, matrix.columns);
                    let band = &self.wide.bands[kind];
                    let out = MatrixMut::strided(
                        &mut d_wide[band.first..],
                        self.wide.layers,
                        band.len(),
                        band.stride,
                    );
                    gemm(out, weights.t(), self.target.stacked(kind, d_target), Output::Overwrite);
                }
            }
            Depth::Copied { layers, zero_output } => {
                d_wide.fill(0.0);
                for (from, &to) in layers.iter().enumerate() {
                    for (kind, of) in KINDS.iter().enumerate() {
                        if of.writes_residual && zero_output.contains(&(from as u32)) {
                            continue;
                        }
                        let out = &mut d_wide[self.wide.range(kind, to as usize)];
                        let gradient = &d_target[self.target.range(kind, from)];
                        out.iter_mut().zip(gradient).for_each(|(out, gradient)| *out += gradient);
                    }
                }
            }
        }
    }

    fn narrow_outer(&self, width: &Width, source: &[f32], d_target: &[f32], d_matrices: &mut [f32]) {
        let hidden = &width.matrices[0];
        for (from, to) in self.source.outer.iter().zip(&self.target.outer) {
            let rows = from.len() / hidden.columns;
            let gradient = Matrix::new(&d_target[to.clone()], rows, hidden.rows);
            let weights = Matrix::new(&source[from.clone()], rows, hidden.columns);
            let out = MatrixMut::new(&mut d_matrices[hidden.range()], hidden.rows, hidden.columns);
            gemm(out, gradient.t(), weights, Output::Accumulate);
        }
    }

    /// Of `W' = R W C^T`: `dR += dW' (W C^T)^T`, `dC += (dW'^T R) W`.
    fn narrow(
        &self,
        width: &Width,
        space: &mut Workspace,
        source: &[f32],
        matrices: &[f32],
        d_matrices: &mut [f32],
    ) {
        let Workspace { d_wide, context, d_context, product, .. } = space;
        for layer in 0..self.source.layers {
            for (index, kind) in KINDS.iter().enumerate() {
                let (old, new) = (&self.source.bands[index], &self.wide.bands[index]);
                let weights = Matrix::new(&source[self.source.range(index, layer)], old.rows, old.columns);
                let gradient = Matrix::new(&d_wide[self.wide.range(index, layer)], new.rows, new.columns);
                let half = sized(product, old.rows * new.columns);
                if let Some(axis) = kind.rows {
                    let columns = width.matrix(kind.columns, matrices, context).t();
                    gemm(MatrixMut::new(half, old.rows, new.columns), weights, columns, Output::Overwrite);
                    let right = Matrix::new(half, old.rows, new.columns).t();
                    gemm(width.gradient(axis, d_matrices, d_context), gradient, right, Output::Accumulate);
                    let rows = width.matrix(axis, matrices, context);
                    let out = MatrixMut::new(half, new.columns, old.rows);
                    gemm(out, gradient.t(), rows, Output::Overwrite);
                    let left = Matrix::new(half, new.columns, old.rows);
                    let out = width.gradient(kind.columns, d_matrices, d_context);
                    gemm(out, left, weights, Output::Accumulate);
                } else {
                    let out = width.gradient(kind.columns, d_matrices, d_context);
                    gemm(out, gradient.t(), weights, Output::Accumulate);
                }
            }
        }
    }
}

impl Width {
    fn matrix<'a>(&self, axis: Axis, matrices: &'a [f32], context: &'a [f32]) -> Matrix<'a> {
        match axis.learned() {
            Some(index) => {
                let matrix = &self.matrices[index];
                Matrix::new(&matrices[matrix.range()], matrix.rows, matrix.columns)
            }
            None => Matrix::new(context, self.context.0, self.context.1),
        }
    }

    fn gradient<'a>(&self, axis: Axis, d_matrices: &'a mut [f32], d_context: &'a mut [f32]) -> MatrixMut<'a> {
        match axis.learned() {
            Some(index) => {
                let matrix = &self.matrices[index];
                MatrixMut::new(&mut d_matrices[matrix.range()], matrix.rows, matrix.columns)
            }
            None => MatrixMut::new(d_context, self.context.0, self.context.1),
        }
    }

    /// Every element of `B_C` that is not zero, with the element of `B_V` that it is.
    fn context_elements(&self) -> impl Iterator<Item = (usize, usize)> {
        let (width, (group, target_group)) = (self.head_dim, self.groups);
        let (context_columns, value_columns) = (self.context.1, self.keys * width);
        let places = self.slots.iter().enumerate().filter_map(|(head, slot)| Some((head, (*slot)? as usize)));
        places.flat_map(move |(head, slot)| {
            (0..self.keys).flat_map(move |key| {
                (0..width * width).map(move |element| {
                    let (i, j) = (element / width, element % width);
                    let row = head * width + i;
                    let column = (key * group + slot) * width + j;
                    let value_row = head / target_group * width + i;
                    (row * context_columns + column, value_row * value_columns + key * width + j)
                })
            })
        })
    }

    fn expand_context(&self, matrices: &[f32], context: &mut Vec<f32>) {
        context.clear();
        context.resize(self.context.0 * self.context.1, 0.0);
        let value = &matrices[self.matrices[Axis::VALUE].range()];
        self.context_elements().for_each(|(to, from)| context[to] = value[from]);
    }

    fn fold_context(&self, d_context: &[f32], d_matrices: &mut [f32]) {
        let d_value = &mut d_matrices[self.matrices[Axis::VALUE].range()];
        self.context_elements().for_each(|(from, to)| d_value[to] += d_context[from]);
    }
}

/// Ones where channels are old, random rows where they are new.
fn expand(map: &WidthMap, matrix: &LearnedMatrix, seed: u64, out: &mut [f32]) {
    let std = 1.0 / (matrix.rows as f64).sqrt();
    let name = format!("learn/{}", matrix.name);
    for (index, (row, source)) in out.chunks_exact_mut(matrix.columns).zip(map.sources()).enumerate() {
        match source {
            Some(source) => row[source as usize] = 1.0,
            None => random::normal_from(seed, &name, std, index * matrix.columns, row),
        }
    }
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

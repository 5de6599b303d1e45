//! Which tensors there are, where they lie, and which matrices stand on their sides.

use crate::model::layout::ParameterLayout;
use crate::model::part::{Axis, Part};
use growth_crds::plan::{LearnedWidth, ModelConfig, WidthMap};
use std::ops::Range;

impl Axis {
    /// The axes with a matrix of their own.
    pub(super) const LEARNED: [Self; 5] = [Self::Hidden, Self::Query, Self::Key, Self::Value, Self::Inner];

    /// Place of [`Axis::Value`] among them.
    pub(super) const VALUE: usize = 3;

    /// Its place among [`Axis::LEARNED`].
    pub(super) fn learned(self) -> Option<usize> {
        Self::LEARNED.iter().position(|axis| *axis == self)
    }

    pub(super) fn matrix_name(self) -> &'static str {
        match self {
            Self::Hidden => "hidden",
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Inner => "intermediate",
            Self::Context => "context",
        }
    }

    /// Where its channels come from.
    pub(super) fn map(self, maps: &LearnedWidth, head_dim: u32) -> WidthMap {
        match self {
            Self::Hidden => maps.hidden.clone(),
            Self::Query | Self::Context => maps.heads.times(head_dim),
            Self::Key | Self::Value => maps.key_value_heads.times(head_dim),
            Self::Inner => maps.intermediate.clone(),
        }
    }
}

/// One of the tensors that every layer has.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// Absent for gains, which are one row.
    pub(super) rows: Option<Axis>,
    pub(super) columns: Axis,
    /// Whether it writes into the residual stream.
    pub(super) writes_residual: bool,
}

/// Every kind, in the order of the layout.
pub(super) const KINDS: [Kind; 9] = [
    kind("input_layernorm", Part::Norm),
    kind("self_attn.q_proj", Part::Query),
    kind("self_attn.k_proj", Part::Key),
    kind("self_attn.v_proj", Part::Value),
    kind("self_attn.o_proj", Part::Output),
    kind("post_attention_layernorm", Part::Norm),
    kind("mlp.gate_proj", Part::Gate),
    kind("mlp.up_proj", Part::Up),
    kind("mlp.down_proj", Part::Down),
];

const fn kind(name: &'static str, part: Part) -> Kind {
    let (rows, columns) = part.axes();
    Kind { name, rows, columns, writes_residual: part.writes_residual() }
}

/// Tensors of one kind: those of neighbouring layers lie `stride` elements apart.
#[derive(Debug)]
pub(super) struct Band {
    pub(super) first: usize,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Band {
    pub(super) fn len(&self) -> usize {
        self.rows * self.columns
    }
}

/// The tensors of a model.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) layout: ParameterLayout,
    pub(super) layers: usize,
    /// In the order of [`KINDS`].
    pub(super) bands: Vec<Band>,
    /// Embedding, final norm, and the head where it is not tied.
    pub(super) outer: Vec<Range<usize>>,
}

impl Table {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let layout = ParameterLayout::new(config);
        let layers = layout.layers().len();
        let mut outer = vec![layout.embedding(), layout.final_norm()];
        if !config.tie_word_embeddings {
            outer.push(layout.head());
        }
        let bands = KINDS.iter().map(|kind| band(&layout, kind.name)).collect();
        Self { bands, layers, outer, layout }
    }

    pub(super) fn range(&self, kind: usize, layer: usize) -> Range<usize> {
        let band = &self.bands[kind];
        let first = band.first + layer * band.stride;
        first..first + band.len()
    }

    /// The tensors of a kind as rows: [layers, elements of one].
    pub(super) fn stacked<'a>(&self, kind: usize, vector: &'a [f32]) -> crate::ops::gemm::Matrix<'a> {
        let band = &self.bands[kind];
        crate::ops::gemm::Matrix::strided(&vector[band.first..], self.layers, band.len(), band.stride)
    }
}

/// Every layer begins at an aligned element, so that all of them look alike.
fn band(layout: &ParameterLayout, name: &str) -> Band {
    let of = |layer: u32| layout.find(&format!("model.layers.{layer}.{name}.weight"));
    let Some(first) = of(0) else { return Band { first: 0, stride: 0, rows: 0, columns: 0 } };
    let stride = of(1).map_or(first.len, |second| second.offset - first.offset);
    let (rows, columns) = match first.shape.as_slice() {
        [columns] => (1, *columns),
        shape => (shape[0], shape[1]),
    };
    Band { first: first.offset, stride, rows, columns }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::layout::tests::configs;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_table_is_the_layout(config in configs()) {
            let table = Table::new(&config);
            let mut found: Vec<Range<usize>> = table.outer.clone();
            for (index, kind) in KINDS.iter().enumerate() {
                for layer in 0..table.layers {
                    let name = format!("model.layers.{layer}.{}.weight", kind.name);
                    prop_assert_eq!(table.range(index, layer), table.layout.find(&name).unwrap().range());
                    found.push(table.range(index, layer));
                }
            }
            found.sort_by_key(|range| range.start);
            let all: Vec<Range<usize>> = table.layout.tensors().iter().map(|tensor| tensor.range()).collect();
            prop_assert_eq!(found, all);
        }
    }
}

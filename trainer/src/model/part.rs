//! What the tensors of a LLaMA are for, by their names.

use growth_crds::plan::{WidthMap, WidthPlan};

/// What a tensor does in a layer; decides which axis is which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Embedding,
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
    Norm,
    FinalNorm,
    Head,
}

/// An axis of a tensor, as long as a width of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    /// The residual stream.
    Hidden,
    /// Queries of all heads.
    Query,
    /// Keys of all key heads.
    Key,
    /// Values of all key heads.
    Value,
    /// Inside the MLP.
    Inner,
    /// Attention output of all query heads.
    Context,
}

/// Something for every width that a growth changes.
#[derive(Debug)]
pub(crate) struct OfWidths<T> {
    pub hidden: T,
    /// Channels of query heads.
    pub heads: T,
    /// Channels of key and value heads.
    pub keys: T,
    pub inner: T,
}

impl OfWidths<WidthMap> {
    /// Where every channel of a growth comes from.
    pub(crate) fn channels(plan: &WidthPlan, head_dim: u32) -> Self {
        Self {
            hidden: plan.hidden.clone(),
            heads: plan.heads.times(head_dim),
            keys: plan.key_value_heads.times(head_dim),
            inner: plan.intermediate.clone(),
        }
    }
}

impl<T> OfWidths<T> {
    pub(crate) fn map<U>(self, of: impl Fn(T) -> U) -> OfWidths<U> {
        let Self { hidden, heads, keys, inner } = self;
        OfWidths { hidden: of(hidden), heads: of(heads), keys: of(keys), inner: of(inner) }
    }

    pub(crate) fn of(&self, axis: Axis) -> &T {
        match axis {
            Axis::Hidden => &self.hidden,
            Axis::Query | Axis::Context => &self.heads,
            Axis::Key | Axis::Value => &self.keys,
            Axis::Inner => &self.inner,
        }
    }
}

impl Part {
    pub(crate) fn of(name: &str) -> Self {
        let is = |part: &str| name.ends_with(part);
        match name {
            "model.embed_tokens.weight" => Self::Embedding,
            "model.norm.weight" => Self::FinalNorm,
            "lm_head.weight" => Self::Head,
            _ if is("q_proj.weight") => Self::Query,
            _ if is("k_proj.weight") => Self::Key,
            _ if is("v_proj.weight") => Self::Value,
            _ if is("o_proj.weight") => Self::Output,
            _ if is("gate_proj.weight") => Self::Gate,
            _ if is("up_proj.weight") => Self::Up,
            _ if is("down_proj.weight") => Self::Down,
            _ => Self::Norm,
        }
    }

    /// Its rows, where they are a width (those of embedding and head are the vocabulary, and a gain is one row), and its
    /// columns.
    pub(crate) const fn axes(self) -> (Option<Axis>, Axis) {
        match self {
            Self::Embedding | Self::Head | Self::Norm | Self::FinalNorm => (None, Axis::Hidden),
            Self::Query => (Some(Axis::Query), Axis::Hidden),
            Self::Key => (Some(Axis::Key), Axis::Hidden),
            Self::Value => (Some(Axis::Value), Axis::Hidden),
            Self::Output => (Some(Axis::Hidden), Axis::Context),
            Self::Gate | Self::Up => (Some(Axis::Inner), Axis::Hidden),
            Self::Down => (Some(Axis::Hidden), Axis::Inner),
        }
    }

    pub(crate) fn is_norm(self) -> bool {
        matches!(self, Self::Norm | Self::FinalNorm)
    }

    /// Whether it writes into the residual stream.
    pub(crate) const fn writes_residual(self) -> bool {
        matches!(self, Self::Output | Self::Down)
    }
}

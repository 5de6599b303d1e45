//! What the tensors of a LLaMA are for, by their names.

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

    pub(crate) fn is_norm(self) -> bool {
        matches!(self, Self::Norm | Self::FinalNorm)
    }

    /// Whether it writes into the residual stream.
    pub(crate) fn writes_residual(self) -> bool {
        matches!(self, Self::Output | Self::Down)
    }
}

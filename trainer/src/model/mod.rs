//! The LLaMA: its parameters, its activations, its forward and backward pass.

pub mod activations;
pub mod block;
pub mod initializer;
pub mod layout;
pub mod llama;
pub mod mask;
pub(crate) mod part;
pub mod trainable;

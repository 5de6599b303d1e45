//! Which parts of a model train, as `requires_grad` says it in PyTorch: embedding, layers, and final norm with head,
//! the buckets of the layout.

use growth_crds::plan::FreezePlan;

/// The parts that train; the rest is frozen: its gradients are not computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trainable {
    /// Whether the embedding trains, and a head that is tied to it.
    pub embedding: bool,
    /// Whether each layer trains.
    pub layers: Vec<bool>,
    /// Whether the final norm and an untied head train.
    pub head: bool,
}

impl Trainable {
    /// Everything, of a model with so many layers.
    pub fn everything(layers: usize) -> Self {
        Self { embedding: true, layers: vec![true; layers], head: true }
    }

    /// What trains while the plan holds, of a model with so many layers.
    pub fn under(freeze: &FreezePlan, layers: usize) -> Self {
        let trains = |layer: usize| freeze.layers.iter().any(|trained| *trained as usize == layer);
        Self { embedding: false, layers: (0..layers).map(trains).collect(), head: freeze.head }
    }

    /// Whether a bucket of [`ParameterLayout::buckets`](super::layout::ParameterLayout::buckets) trains.
    pub fn bucket(&self, bucket: usize) -> bool {
        match bucket.checked_sub(1) {
            None => self.embedding,
            Some(layer) => self.layers.get(layer).copied().unwrap_or(self.head),
        }
    }

    /// The lowest layer that the backward pass has to go through; as many as there are layers when it need not begin.
    pub fn lowest_layer(&self) -> usize {
        if self.embedding {
            return 0;
        }
        self.layers.iter().position(|trains| *trains).unwrap_or(self.layers.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_embedding_layers_head() {
        let freeze = FreezePlan { layers: vec![1, 3], head: true, tokens: 1 };
        let trainable = Trainable::under(&freeze, 4);
        let buckets: Vec<bool> = (0..6).map(|bucket| trainable.bucket(bucket)).collect();
        assert_eq!(buckets, [false, false, true, false, true, true]);
        assert_eq!(trainable.lowest_layer(), 1);
        assert_eq!(Trainable::everything(4).lowest_layer(), 0);
        assert!((0..6).all(|bucket| Trainable::everything(4).bucket(bucket)));
        let head_only = Trainable { layers: vec![false; 4], ..trainable };
        assert_eq!(head_only.lowest_layer(), 4);
    }
}

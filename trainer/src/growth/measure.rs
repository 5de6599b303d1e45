//! Does the grown model compute what the source computed? Both run on the same tokens, a piece of a matrix at a time,
//! so that measuring needs no more memory than growing.

use super::{GrowthError, Result};
use crate::checkpoint::{PIECE_BYTES, TensorIndex};
use crate::data::Dataset;
use crate::model::layout::ParameterLayout;
use crate::model::mask::WeightMasks;
use crate::ops::attention::{self, HeadShape};
use crate::ops::gemm::{Matrix, MatrixMut, Output, gemm};
use crate::ops::rope::{self, RopeTable};
use crate::ops::{rmsnorm, swiglu};
use crate::random;
use crate::storage::Storage;
use growth_crds::plan::ModelConfig;
use growth_crds::protocol::{GrowthMeasurement, GrowthSample};
use rand::RngExt;
use std::borrow::Cow;
use std::ops::Range;

/// Tokens that are predicted, if nothing else is said.
pub const DEFAULT_MEASURED_TOKENS: usize = 512;

/// Longest sequence of a measurement.
const LONGEST_SEQUENCE: usize = 256;

/// Most logits that are kept (64 MB): a large vocabulary means fewer tokens.
const MAX_LOGITS: usize = 1 << 24;

/// What a growth step is measured on.
#[derive(Debug, Clone)]
pub struct Measure<'a> {
    /// Tokens to predict; 0 measures nothing.
    pub tokens: usize,
    /// Tokens of a text, where the caller has one.
    pub text: Option<Vec<u32>>,
    /// Data of the job, whose validation part is used where there is no text.
    pub held_out: Option<&'a Dataset>,
}

impl Default for Measure<'_> {
    fn default() -> Self {
        Self { tokens: DEFAULT_MEASURED_TOKENS, text: None, held_out: None }
    }
}

/// Sequences of equal length, and the token after each of their tokens.
pub(super) struct Sample {
    kind: GrowthSample,
    ids: Vec<u32>,
    targets: Vec<u32>,
    sequence: usize,
}

impl Sample {
    /// The text that was handed in, else the held-out text of the job, else random tokens: that a text cannot be had
    /// is no reason not to grow.
    pub(super) fn choose(measure: &Measure<'_>, config: &ModelConfig) -> Option<Self> {
        let sequence = LONGEST_SEQUENCE.min(config.max_position_embeddings as usize).min(measure.tokens);
        let most = MAX_LOGITS / config.vocab_size as usize;
        let tokens = measure.tokens.min(most.max(1));
        let sequence = sequence.min(tokens);
        if sequence == 0 {
            return None;
        }
        let tokens = tokens / sequence * sequence;
        let text = measure.text.as_deref().and_then(|ids| Self::of_text(ids, tokens, sequence));
        let text = text.or_else(|| Self::of_dataset(measure.held_out?, tokens, sequence));
        let known =
            |sample: &Self| sample.ids.iter().chain(&sample.targets).all(|id| *id < config.vocab_size);
        Some(text.filter(known).unwrap_or_else(|| Self::random(config.vocab_size, tokens, sequence)))
    }

    fn of_text(ids: &[u32], tokens: usize, sequence: usize) -> Option<Self> {
        let tokens = tokens.min(ids.len().saturating_sub(1) / sequence * sequence);
        let (ids, targets) = (ids.get(..tokens)?.to_vec(), ids.get(1..tokens + 1)?.to_vec());
        (tokens > 0).then_some(Self { kind: GrowthSample::HeldOut, ids, targets, sequence })
    }

    fn of_dataset(dataset: &Dataset, tokens: usize, sequence: usize) -> Option<Self> {
        let (ids, targets) = dataset.validation_tokens(sequence, tokens as u64).ok()?;
        Some(Self { kind: GrowthSample::HeldOut, ids, targets, sequence })
    }

    fn random(vocabulary: u32, tokens: usize, sequence: usize) -> Self {
        let mut generator = random::generator(0, "growth sample", 0);
        let mut draw = || (0..tokens).map(|_| generator.random_range(0..vocabulary)).collect();
        Self { kind: GrowthSample::Random, ids: draw(), targets: draw(), sequence }
    }
}

/// A model whose weights stay in its folder.
pub(super) struct StoredModel<'a> {
    pub folder: &'a Storage,
    pub tensors: &'a TensorIndex,
    pub config: &'a ModelConfig,
    /// Masks of its growth, and where the tensors that they scale lie.
    pub masks: Option<(WeightMasks, &'a ParameterLayout)>,
}

/// Compares source and target on the sample. The logits of the source are kept, those of the target are looked at as
/// they come.
pub(super) fn compare(
    source: &StoredModel<'_>,
    target: &StoredModel<'_>,
    sample: &Sample,
) -> Result<GrowthMeasurement> {
    let vocabulary = source.config.vocab_size as usize;
    let mut kept = vec![0.0; sample.targets.len() * vocabulary];
    let (mut before, mut after) = (Predictions::of(&sample.targets), Predictions::of(&sample.targets));
    let (mut logits, mut differences) = (Largest::default(), Largest::default());
    source.logits(sample, |columns, piece| {
        before.see(&columns, piece);
        for (kept, row) in kept.chunks_exact_mut(vocabulary).zip(piece.chunks_exact(columns.len())) {
            kept[columns.clone()].copy_from_slice(row);
        }
        piece.iter().for_each(|logit| logits.see(f64::from(*logit)));
    })?;
    target.logits(sample, |columns, piece| {
        after.see(&columns, piece);
        for (kept, row) in kept.chunks_exact(vocabulary).zip(piece.chunks_exact(columns.len())) {
            let pairs = kept[columns.clone()].iter().zip(row);
            pairs.for_each(|(before, after)| differences.see(f64::from(*before) - f64::from(*after)));
        }
    })?;
    Ok(GrowthMeasurement {
        sample: sample.kind,
        tokens: sample.targets.len() as u64,
        max_logit_difference: differences.finite(),
        max_logit: logits.finite(),
        loss_before: before.mean_loss(),
        loss_after: after.mean_loss(),
    })
}

/// The largest absolute value so far.
#[derive(Default)]
struct Largest(f64);

impl Largest {
    fn see(&mut self, value: f64) {
        self.0 = if value.is_finite() { self.0.max(value.abs()) } else { f64::INFINITY };
    }

    /// `None` when one was not finite.
    fn finite(&self) -> Option<f64> {
        Some(self.0).filter(|largest| largest.is_finite())
    }
}

/// The loss of a model whose logits come some columns of the vocabulary at a time.
struct Predictions<'a> {
    targets: &'a [u32],
    rows: Vec<Prediction>,
}

/// One token: log(sum(exp(logits))) is `largest + log(sum)`.
#[derive(Clone)]
struct Prediction {
    largest: f64,
    sum: f64,
    of_target: f64,
}

impl<'a> Predictions<'a> {
    fn of(targets: &'a [u32]) -> Self {
        let nothing = Prediction { largest: f64::NEG_INFINITY, sum: 0.0, of_target: 0.0 };
        Self { targets, rows: vec![nothing; targets.len()] }
    }

    /// `piece` [tokens, columns].
    fn see(&mut self, columns: &Range<usize>, piece: &[f32]) {
        let tokens = self.rows.iter_mut().zip(self.targets);
        for ((row, target), logits) in tokens.zip(piece.chunks_exact(columns.len())) {
            let largest = logits.iter().fold(row.largest, |largest, logit| largest.max(f64::from(*logit)));
            let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
            row.sum = row.sum * (row.largest - largest).exp() + sum;
            row.largest = largest;
            if let Some(place) = (*target as usize).checked_sub(columns.start)
                && let Some(logit) = logits.get(place)
            {
                row.of_target = f64::from(*logit);
            }
        }
    }

    /// In nats; `None` when it is not finite.
    fn mean_loss(&self) -> Option<f64> {
        let sum: f64 = self.rows.iter().map(|row| row.largest + row.sum.ln() - row.of_target).sum();
        Some(sum / self.rows.len() as f64).filter(|mean| mean.is_finite())
    }
}

impl StoredModel<'_> {
    /// Logits of all positions, piece by piece: columns of the vocabulary, and [tokens, columns].
    fn logits(&self, sample: &Sample, mut see: impl FnMut(Range<usize>, &[f32])) -> Result<()> {
        let config = self.config;
        let rows = sample.ids.len();
        let heads = HeadShape {
            batch: rows / sample.sequence,
            sequence: sample.sequence,
            heads: config.num_attention_heads as usize,
            kv_heads: config.num_key_value_heads as usize,
            head_dim: config.head_dim as usize,
        };
        let table = RopeTable::new(sample.sequence, config.head_dim as usize, config.rope_theta);
        let mut stream = self.embed(&sample.ids)?;
        for layer in 0..config.num_hidden_layers {
            self.block(layer, &mut stream, &heads, &table)?;
        }
        let normed = self.norm("model.norm.weight", &stream)?;
        let head = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let mut logits = Vec::new();
        self.pieces(head, normed.len() / rows, |first, weights| {
            let count = weights.rows();
            logits.resize(rows * count, 0.0);
            let out = MatrixMut::new(&mut logits, rows, count);
            gemm(out, Matrix::new(&normed, rows, normed.len() / rows), weights.t(), Output::Overwrite);
            see(first..first + count, &logits);
        })
    }

    fn block(&self, layer: u32, stream: &mut [f32], heads: &HeadShape, table: &RopeTable) -> Result<()> {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let rows = heads.batch * heads.sequence;
        let normed = self.norm(&name("input_layernorm"), stream)?;
        let mut qkv = vec![0.0; rows * heads.qkv_width()];
        let parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(name);
        self.project_side_by_side(&parts, &normed, &mut qkv)?;
        let mut by_head = vec![0.0; qkv.len()];
        rope::split_heads(&mut by_head, &qkv, table, heads);
        let mut context = vec![0.0; rows * heads.context_width()];
        let mut log_sums = vec![0.0; rows * heads.heads];
        attention::forward(&mut context, &mut log_sums, &by_head, heads);
        let mut context_rows = vec![0.0; context.len()];
        attention::merge_heads(&mut context_rows, &context, heads);
        self.project(&name("self_attn.o_proj"), &context_rows, stream, Output::Accumulate)?;

        let normed = self.norm(&name("post_attention_layernorm"), stream)?;
        let ffn = self.config.intermediate_size as usize;
        let mut gate_up = vec![0.0; rows * 2 * ffn];
        let parts = ["mlp.gate_proj", "mlp.up_proj"].map(name);
        self.project_side_by_side(&parts, &normed, &mut gate_up)?;
        let mut inner = vec![0.0; rows * ffn];
        swiglu::forward(&mut inner, &gate_up, ffn);
        self.project(&name("mlp.down_proj"), &inner, stream, Output::Accumulate)
    }

    /// The rows of the embedding that the tokens name, from one pass over it.
    fn embed(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let hidden = self.config.hidden_size as usize;
        let shape = [self.config.vocab_size as usize, hidden];
        let place = self.tensors.expect(self.folder, "model.embed_tokens.weight", &shape)?;
        let mut rows = vec![0.0; ids.len() * hidden];
        let (mut buffer, mut first) = (Vec::new(), 0);
        place.read(self.folder, &mut buffer, |numbers| {
            let numbers = &*self.masked("model.embed_tokens.weight", first, numbers);
            let piece = first..first + numbers.len();
            first = piece.end;
            for (row, &id) in rows.chunks_exact_mut(hidden).zip(ids) {
                let start = id as usize * hidden;
                let (from, to) = (start.max(piece.start), (start + hidden).min(piece.end));
                if from < to {
                    let numbers = &numbers[from - piece.start..to - piece.start];
                    row[from - start..to - start].copy_from_slice(numbers);
                }
            }
            Ok::<(), GrowthError>(())
        })?;
        Ok(rows)
    }

    fn norm(&self, name: &str, x: &[f32]) -> Result<Vec<f32>> {
        let hidden = self.config.hidden_size as usize;
        let place = self.tensors.expect(self.folder, name, &[hidden])?;
        let (mut gain, mut buffer) = (Vec::with_capacity(hidden), Vec::new());
        place.read(self.folder, &mut buffer, |numbers| {
            let masked = self.masked(name, gain.len(), numbers);
            gain.extend_from_slice(&masked);
            Ok::<(), GrowthError>(())
        })?;
        let (mut out, mut inverse_rms) = (vec![0.0; x.len()], vec![0.0; x.len() / hidden]);
        rmsnorm::forward(&mut out, &mut inverse_rms, x, &gain, self.config.rms_norm_eps as f32);
        Ok(out)
    }

    /// `out` [rows, outputs] from `x` [rows, inputs] and a matrix [outputs, inputs].
    fn project(&self, name: &str, x: &[f32], out: &mut [f32], output: Output) -> Result<()> {
        let rows = out.len() / self.outputs(name);
        let stride = out.len() / rows;
        self.project_into(name, x, out, (rows, stride, 0), output)
    }

    /// Several matrices with the same input, their outputs next to each other in each row.
    fn project_side_by_side(&self, names: &[String], x: &[f32], out: &mut [f32]) -> Result<()> {
        let stride: usize = names.iter().map(|name| self.outputs(name)).sum();
        let (rows, mut column) = (out.len() / stride, 0);
        for name in names {
            self.project_into(name, x, out, (rows, stride, column), Output::Overwrite)?;
            column += self.outputs(name);
        }
        Ok(())
    }

    /// The weights that the model runs with: the elements from `first` on of a tensor, times their masks.
    fn masked<'b>(&self, name: &str, first: usize, numbers: &'b [f32]) -> Cow<'b, [f32]> {
        let Some((masks, layout)) = &self.masks else { return Cow::Borrowed(numbers) };
        let Some(tensor) = layout.find(name) else { return Cow::Borrowed(numbers) };
        let mut numbers = numbers.to_vec();
        masks.scale(tensor.offset + first, &mut numbers);
        Cow::Owned(numbers)
    }

    fn outputs(&self, name: &str) -> usize {
        self.tensors.get(name).and_then(|place| place.shape.first().copied()).unwrap_or(1)
    }

    /// Each piece of the matrix is some columns of the output.
    fn project_into(
        &self,
        name: &str,
        x: &[f32],
        out: &mut [f32],
        (rows, stride, column): (usize, usize, usize),
        output: Output,
    ) -> Result<()> {
        let inputs = x.len() / rows;
        self.pieces(name, inputs, |first, weights| {
            let out = MatrixMut::strided(&mut out[column + first..], rows, weights.rows(), stride);
            gemm(out, Matrix::new(x, rows, inputs), weights.t(), output);
        })
    }

    /// Reads a matrix [outputs, inputs] in pieces of whole rows, each with the number of its first one.
    fn pieces(&self, name: &str, inputs: usize, mut see: impl FnMut(usize, Matrix<'_>)) -> Result<()> {
        let outputs = self.outputs(name);
        let place = self.tensors.expect(self.folder, name, &[outputs, inputs])?;
        let at_once = (PIECE_BYTES / 4 / inputs).max(1);
        let (mut buffer, mut numbers) = (Vec::new(), Vec::new());
        for first in (0..outputs).step_by(at_once) {
            let count = at_once.min(outputs - first);
            let part = place.part(first * inputs..(first + count) * inputs);
            numbers.clear();
            part.read(self.folder, &mut buffer, |part| {
                numbers.extend_from_slice(part);
                Ok::<(), GrowthError>(())
            })?;
            let weights = self.masked(name, first * inputs, &numbers);
            see(first, Matrix::new(&weights, count, inputs));
        }
        Ok(())
    }
}

//! The summary of a job: a table, a plot of validation loss against FLOPs (SVG and in the terminal), all made from
//! what lies in the job's storage.

mod goodput;
mod growth;
mod svg;
mod table;
mod terminal;

use crate::training::history::History;
use growth_crds::plan::StagePlan;
use serde::Serialize;

pub use goodput::{Goodput, goodput_table};
pub use growth::{GrowthReport, ModelSizes, growth_table};
pub use svg::svg;
pub use table::table;
pub use terminal::plot;

/// What is known of one stage.
#[derive(Serialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
pub struct StageReport {
    /// Name of the stage.
    pub stage: String,
    /// All parameters.
    pub parameters: u64,
    /// Parameters without embedding and head.
    pub non_embedding_parameters: u64,
    /// Layers.
    pub layers: u32,
    /// Tokens trained so far.
    pub tokens: u64,
    /// Tokens that the stage trains.
    pub target_tokens: u64,
    /// FLOPs so far, exact count.
    pub flops: f64,
    /// FLOPs of all stages before.
    pub flops_before: f64,
    /// Seconds spent in steps.
    pub training_seconds: f64,
    /// Validation loss before the first step.
    pub validation_loss_before: Option<f64>,
    /// The latest validation loss.
    pub validation_loss_after: Option<f64>,
    /// Validation loss along the way.
    pub curve: Vec<CurvePoint>,
    /// Folder of the latest checkpoint.
    pub checkpoint: Option<String>,
    /// What the time went into.
    pub goodput: Goodput,
    /// The growth step before it, where there was one and its record is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthReport>,
}

/// One measurement of the validation loss.
#[derive(Serialize, Debug, Clone, Copy, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CurvePoint {
    /// FLOPs of the whole job up to here.
    pub flops: f64,
    /// Loss in nats.
    pub loss: f64,
}

impl StageReport {
    /// The report of a stage at `tokens` tokens, after stages that took `flops_before` FLOPs.
    pub fn new(
        plan: &StagePlan,
        tokens: u64,
        history: &History,
        flops_before: f64,
        checkpoint: Option<String>,
        goodput: Goodput,
    ) -> Self {
        let curve = history.evaluations.iter().map(|evaluation| CurvePoint {
            flops: flops_before + plan.exact_flops(evaluation.tokens),
            loss: evaluation.loss,
        });
        Self {
            stage: plan.stage.clone(),
            parameters: plan.parameters.total,
            non_embedding_parameters: plan.parameters.non_embedding,
            layers: plan.model.num_hidden_layers,
            tokens,
            target_tokens: plan.tokens,
            flops: plan.exact_flops(tokens),
            flops_before,
            training_seconds: history.training_seconds,
            validation_loss_before: history.first_loss(),
            validation_loss_after: history.last_loss(),
            curve: curve.collect(),
            checkpoint,
            goodput,
            growth: None,
        }
    }
}

/// Smallest box around all points: (FLOPs from, to, loss from, to); `None` with fewer than two points.
fn bounds(stages: &[StageReport]) -> Option<(f64, f64, f64, f64)> {
    let points = || stages.iter().flat_map(|stage| &stage.curve);
    if points().count() < 2 {
        return None;
    }
    let range = |value: fn(&CurvePoint) -> f64| {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for point in points() {
            low = low.min(value(point));
            high = high.max(value(point));
        }
        if high > low { (low, high) } else { (low - 0.5, low + 0.5) }
    };
    let ((x0, x1), (y0, y1)) = (range(|point| point.flops), range(|point| point.loss));
    Some((x0, x1, y0, y1))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn stages() -> Vec<StageReport> {
        let stage = |name: &str, first: f64, losses: &[f64]| StageReport {
            stage: name.to_owned(),
            parameters: 1_000_000,
            non_embedding_parameters: 800_000,
            layers: 2,
            tokens: 1000,
            target_tokens: 1000,
            flops: 1e12,
            flops_before: first,
            training_seconds: 61.0,
            validation_loss_before: losses.first().copied(),
            validation_loss_after: losses.last().copied(),
            curve: losses
                .iter()
                .enumerate()
                .map(|(i, &loss)| CurvePoint { flops: first + i as f64 * 1e11, loss })
                .collect(),
            checkpoint: Some(format!("file:///{name}")),
            goodput: Goodput::default(),
            growth: None,
        };
        vec![stage("small", 0.0, &[8.0, 6.0, 5.0]), stage("large", 3e11, &[5.5, 4.5, 4.0])]
    }

    #[test]
    fn the_table_has_a_row_a_stage() {
        let table = table(&stages());
        assert!(table.contains("small") && table.contains("large") && table.contains("1m01s"), "{table}");
        assert!(table.contains("8.000") && table.contains("4.000"), "{table}");
    }

    #[test]
    fn the_svg_has_a_line_a_stage_and_its_axes() {
        let svg = svg(&stages()).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("FLOPs") && svg.contains("validation loss"));
        assert!(svg.contains("small (2 layers)") && svg.contains("large (2 layers)"));
        assert_eq!(svg.matches("<circle").count(), 6, "one dot a measurement");
    }

    #[test]
    fn the_terminal_plot_falls_from_left_to_right() {
        let plot = plot(&stages(), 60, 12).unwrap();
        let lines: Vec<&str> = plot.lines().collect();
        assert!(lines.len() >= 12, "{plot}");
        assert!(plot.contains("small") && plot.contains("large"), "{plot}");
    }

    #[test]
    fn without_points_there_is_no_plot() {
        assert!(svg(&[]).is_none() && plot(&[], 60, 12).is_none());
    }
}

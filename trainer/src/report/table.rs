//! The summary table.

use super::StageReport;
use crate::progress::{self, count, duration};

/// One row a stage.
pub fn table(stages: &[StageReport]) -> String {
    let titles = [
        "STAGE",
        "LAYERS",
        "PARAMETERS",
        "NON-EMBEDDING",
        "TOKENS",
        "FLOPS",
        "TIME",
        "LOSS BEFORE",
        "LOSS AFTER",
    ];
    let rows = stages.iter().map(|stage| {
        [
            stage.stage.clone(),
            stage.layers.to_string(),
            count(stage.parameters as f64),
            count(stage.non_embedding_parameters as f64),
            count(stage.tokens as f64),
            format!("{:.2e}", stage.flops),
            duration(stage.training_seconds),
            loss(stage.validation_loss_before),
            loss(stage.validation_loss_after),
        ]
    });
    progress::table(titles, 1, rows)
}

fn loss(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.3}"))
}

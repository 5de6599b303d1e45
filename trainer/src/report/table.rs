//! The summary table.

use super::StageReport;
use crate::progress::{count, duration};
use comfy_table::{CellAlignment, Table, presets};

/// One row a stage.
pub fn table(stages: &[StageReport]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "STAGE",
        "LAYERS",
        "PARAMETERS",
        "NON-EMBEDDING",
        "TOKENS",
        "FLOPS",
        "TIME",
        "LOSS BEFORE",
        "LOSS AFTER",
    ]);
    for stage in stages {
        table.add_row([
            stage.stage.clone(),
            stage.layers.to_string(),
            count(stage.parameters as f64),
            count(stage.non_embedding_parameters as f64),
            count(stage.tokens as f64),
            format!("{:.2e}", stage.flops),
            duration(stage.training_seconds),
            loss(stage.validation_loss_before),
            loss(stage.validation_loss_after),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn loss(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.3}"))
}

//! What the growth steps of a job did, from the records that they left in the checkpoints.

use crate::progress::{self, count};
use growth_crds::plan::StagePlan;
use growth_crds::protocol::{GrowthRecord, growth_status};
use serde::Serialize;

/// What is known of one growth step.
#[derive(Serialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GrowthReport {
    /// The model before.
    pub from: ModelSizes,
    /// The model after.
    pub to: ModelSizes,
    /// Its record, without the names of tensors.
    #[serde(flatten)]
    pub record: GrowthRecord,
}

/// Sizes that growth changes.
#[derive(Serialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ModelSizes {
    /// Layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width inside the MLP.
    pub intermediate_size: u32,
    /// Query heads.
    pub attention_heads: u32,
    /// Key and value heads.
    pub key_value_heads: u32,
    /// All parameters.
    pub parameters: u64,
}

impl ModelSizes {
    /// Of the model that a stage trains.
    pub fn of(stage: &StagePlan) -> Self {
        Self {
            layers: stage.model.num_hidden_layers,
            hidden_size: stage.model.hidden_size,
            intermediate_size: stage.model.intermediate_size,
            attention_heads: stage.model.num_attention_heads,
            key_value_heads: stage.model.num_key_value_heads,
            parameters: stage.parameters.total,
        }
    }

    /// The widths that differ, in words.
    fn widths(&self, to: &Self) -> String {
        let widths = [
            ("hidden", self.hidden_size, to.hidden_size),
            ("MLP", self.intermediate_size, to.intermediate_size),
            ("heads", self.attention_heads, to.attention_heads),
            ("keys", self.key_value_heads, to.key_value_heads),
        ];
        let changed = widths.iter().filter(|(_, from, to)| from != to);
        let changed: Vec<String> = changed.map(|(name, from, to)| format!("{name} {from} -> {to}")).collect();
        if changed.is_empty() { "-".to_owned() } else { changed.join(", ") }
    }
}

impl GrowthReport {
    /// Of the growth step between two stages.
    pub fn new(from: &StagePlan, to: &StagePlan, record: &GrowthRecord) -> Self {
        let (from, to) = (ModelSizes::of(from), ModelSizes::of(to));
        let mut record = record.clone();
        for names in [&mut record.new_tensors, &mut record.widened_tensors, &mut record.zero_tensors] {
            names.clear();
        }
        Self { from, to, record }
    }
}

/// One row a growth step; nothing where none is known.
pub fn growth_table<'a>(growths: impl IntoIterator<Item = (&'a str, &'a GrowthReport)>) -> Option<String> {
    let titles = [
        "STAGE",
        "GROWTH",
        "LAYERS",
        "WIDTHS",
        "PARAMETERS",
        "R_C",
        "EXPECTED",
        "LOSS BEFORE",
        "RIGHT AFTER",
        "LOGITS DIFFER BY",
    ];
    let rows: Vec<_> = growths
        .into_iter()
        .map(|(stage, GrowthReport { from, to, record })| {
            let summary = growth_status(record);
            let cell = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            [
                stage.to_owned(),
                format!("{:?}", record.operator),
                format!("{} -> {}", from.layers, to.layers),
                from.widths(to),
                format!("{} -> {}", count(from.parameters as f64), count(to.parameters as f64)),
                summary.connection_rate,
                record.expected.to_string(),
                cell(summary.loss_before),
                cell(summary.loss_after),
                cell(summary.max_logit_difference),
            ]
        })
        .collect();
    (!rows.is_empty()).then(|| progress::table(titles, 7, rows))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use growth_crds::plan::growth::GrowthEffect;
    use growth_crds::plan::{GrowthOperator, OptimizerStatePolicy};
    use growth_crds::protocol::{ConnectionRate, GrowthMeasurement, GrowthSample};

    fn report() -> GrowthReport {
        let from = ModelSizes {
            layers: 2,
            hidden_size: 32,
            intermediate_size: 80,
            attention_heads: 4,
            key_value_heads: 2,
            parameters: 30_000,
        };
        let to = ModelSizes { layers: 4, hidden_size: 64, parameters: 90_000, ..from };
        let measured = GrowthMeasurement {
            sample: GrowthSample::HeldOut,
            tokens: 512,
            max_logit_difference: Some(4.29e-6),
            max_logit: Some(3.0),
            loss_before: Some(4.5),
            loss_after: Some(4.50001),
        };
        let record = GrowthRecord {
            operator: GrowthOperator::DirectWidth,
            layers: vec![0, 0, 1, 1],
            new_layers: 0,
            connection_rate: ConnectionRate { kept: 1, pairs: 3 },
            source_parameters: 30_000,
            target_parameters: 90_000,
            optimizer_state: OptimizerStatePolicy::Reset,
            expected: GrowthEffect::Preserving,
            reason: "new layers add nothing at first".to_owned(),
            measured: Some(measured),
            learned: None,
            new_tensors: Vec::new(),
            widened_tensors: Vec::new(),
            zero_tensors: Vec::new(),
        };
        GrowthReport { from, to, record }
    }

    #[test]
    fn the_table_has_a_row_a_growth() {
        let report = report();
        let table = growth_table([("large", &report)]).unwrap();
        let row = table.lines().nth(1).unwrap();
        let cells = ["large", "DirectWidth", "2 -> 4", "hidden 32 -> 64", "1/3", "the function stays"];
        for cell in cells.into_iter().chain(["4.5000", "4.29e-6"]) {
            assert!(row.contains(cell), "{cell}: {table}");
        }
        assert!(!row.contains("MLP"), "only what changes: {table}");
        assert_eq!(growth_table([]), None);
    }

    #[test]
    fn what_was_not_measured_is_left_open() {
        let mut report = report();
        report.record.measured = None;
        let table = growth_table([("large", &report)]).unwrap();
        let cells: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(cells[cells.len() - 3..], ["-"; 3], "{table}");
    }
}

//! Tables: what will be done, what came of it, and the page for the docs.

use super::jobs::Comparison;
use super::measures::Estimate;
use super::results::{ComparisonReport, RecipeReport};
use crate::progress::{self, count};
use std::fmt::Write as _;

/// Titles of the results, in the order of [`cells`].
const TITLES: [&str; 9] = [
    "recipe",
    "paper",
    "parameters",
    "base FLOPs",
    "final loss",
    "less scratch",
    "speedup",
    "loss at growth",
    "max logit diff",
];

/// What every recipe will train, and how near to the budget it comes.
pub fn budget_table(comparison: &Comparison) -> String {
    let titles = ["RECIPE", "PARAMETERS", "STAGES", "TOKENS", "FLOPS", "OF BUDGET", "BASE"];
    let rows = comparison.recipes.iter().map(|recipe| {
        let stages = recipe.plan().map_or(&[][..], |plan| &plan.stages);
        let join = |value: fn(&growth_crds::plan::StagePlan) -> f64| {
            let values: Vec<String> = stages.iter().map(|stage| count(value(stage))).collect();
            values.join(" -> ")
        };
        [
            recipe.name.clone(),
            join(|stage| stage.parameters.total as f64),
            stages.len().to_string(),
            join(|stage| stage.tokens as f64),
            format!("{:.3e}", recipe.flops()),
            format!("{:.2} %", 100.0 * recipe.flops() / comparison.budget_flops),
            format!("{:.1} %", 100.0 * recipe.base_share()),
        ]
    });
    progress::table(titles, 1, rows)
}

/// The results, for a terminal.
pub fn result_table(report: &ComparisonReport) -> String {
    let titles = TITLES.map(str::to_uppercase);
    progress::table(titles.each_ref().map(String::as_str), 1, report.recipes.iter().map(cells))
}

fn cells(recipe: &RecipeReport) -> [String; 9] {
    let parameters = match recipe.base_parameters == recipe.parameters {
        true => count(recipe.parameters as f64),
        false => format!("{} -> {}", count(recipe.base_parameters as f64), count(recipe.parameters as f64)),
    };
    let is_scratch = recipe.operator.is_none();
    let at_growth = recipe.loss_before_growth.zip(recipe.loss_after_growth);
    [
        recipe.name.clone(),
        recipe.paper_name.unwrap_or(if is_scratch { "scratch" } else { "-" }).to_owned(),
        parameters,
        if is_scratch { "-".to_owned() } else { format!("{:.1} %", 100.0 * recipe.base_flops_share) },
        estimate(recipe.final_loss, 1.0, 4, ""),
        if is_scratch { "-".to_owned() } else { estimate(recipe.difference, 1.0, 4, "") },
        if is_scratch { "-".to_owned() } else { estimate(recipe.speedup, 100.0, 1, " %") },
        at_growth
            .map_or("-".to_owned(), |(before, after)| format!("{:.3} -> {:.3}", before.mean, after.mean)),
        recipe.max_logit_difference.map_or("-".to_owned(), |difference| format!("{difference:.2e}")),
    ]
}

fn estimate(value: Option<Estimate>, factor: f64, decimals: usize, unit: &str) -> String {
    let Some(Estimate { mean, standard_error, .. }) = value else { return "-".to_owned() };
    let mean = factor * mean;
    match standard_error {
        Some(error) => format!("{mean:.decimals$} ± {:.decimals$}{unit}", factor * error),
        None => format!("{mean:.decimals$}{unit}"),
    }
}

/// The results as Markdown, with every seed. `plots` are (title, address) of pictures beside it.
pub fn markdown(report: &ComparisonReport, plots: &[(&str, &str)]) -> String {
    let seeds: Vec<String> = report.seeds.iter().map(i64::to_string).collect();
    let mut text = format!(
        "# {}\n\nBudget of each run, base included: {:.3e} FLOPs (exact count), which is {} tokens from scratch. Seeds: \
         {}. Values are means over finished seeds ± standard error; \"less scratch\" and speedup are taken seed by \
         seed.\n\n",
        report.name,
        report.budget_flops,
        report.scratch_tokens,
        seeds.join(", "),
    );
    rows(&mut text, &TITLES.map(str::to_owned), report.recipes.iter().map(|recipe| cells(recipe).to_vec()));
    text.push_str("\nFinal validation loss, less that of scratch, and speedup, seed by seed:\n\n");
    let mut titles = vec!["recipe".to_owned()];
    titles.extend(seeds.iter().map(|seed| format!("seed {seed}")));
    let by_seed = report.recipes.iter().map(|recipe| {
        let runs = recipe.runs.iter().map(|run| match (run.final_loss, run.difference, run.speedup) {
            (Some(loss), Some(difference), Some(speedup)) if recipe.operator.is_some() => {
                format!("{loss:.4}, {difference:+.4}, {:+.1} %", 100.0 * speedup)
            }
            (Some(loss), ..) => format!("{loss:.4}"),
            (None, ..) => "-".to_owned(),
        });
        std::iter::once(recipe.name.clone()).chain(runs).collect()
    });
    rows(&mut text, &titles, by_seed);
    for (title, address) in plots {
        let _ = write!(text, "\n![{title}]({address})\n");
    }
    text
}

fn rows(text: &mut String, titles: &[String], rows: impl Iterator<Item = Vec<String>>) {
    let _ = writeln!(text, "| {} |\n|{}", titles.join(" | "), "---|".repeat(titles.len()));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
}

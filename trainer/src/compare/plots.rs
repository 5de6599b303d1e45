//! Plots of a comparison as SVG: validation loss against FLOPs, and the last losses side by side.

use super::measures::Estimate;
use super::results::{ComparisonReport, RecipeReport};
use crate::report::CurvePoint;
use plotters::prelude::*;

/// Colours of the recipes, in turn: black for scratch, then Okabe and Ito's, which also the colour-blind tell apart.
const COLORS: [RGBColor; 9] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(150, 150, 150),
    RGBColor(140, 86, 75),
];

/// Share of the budget from which on scratch's curve is shown: before, all curves fall together.
const SHOWN_FROM: f64 = 0.2;

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// A point of a mean curve.
#[derive(Clone, Copy)]
struct Mean {
    flops: f64,
    loss: f64,
    error: f64,
}

/// Mean validation loss over finished seeds against FLOPs, with a band of one standard error; thin: the stages before
/// the last. `None` while nothing has finished.
pub fn curves_svg(report: &ComparisonReport) -> Option<String> {
    let curves: Vec<(&RecipeReport, Vec<Vec<Mean>>)> =
        report.recipes.iter().map(|recipe| (recipe, mean_curves(recipe))).collect();
    let last = || curves.iter().filter_map(|(_, stages)| stages.last());
    let lowest = last().flatten().map(|point| point.loss - point.error).reduce(f64::min)?;
    let from = SHOWN_FROM * report.budget_flops;
    let highest = last().filter_map(|points| points.iter().find(|point| point.flops >= from));
    let highest = highest.map(|point| point.loss + point.error).reduce(f64::max)?;
    let margin = 0.03 * (highest - lowest).max(1e-3);
    let mut text = String::new();
    draw_curves(&mut text, &curves, 0.0..1.01 * report.budget_flops, lowest - margin..highest + margin)
        .ok()?;
    Some(text)
}

/// Means over the finished seeds, stage by stage; all seeds are measured at the same tokens.
fn mean_curves(recipe: &RecipeReport) -> Vec<Vec<Mean>> {
    let finished: Vec<_> = recipe.runs.iter().filter(|run| run.finished).collect();
    let Some(first) = finished.first() else { return Vec::new() };
    let stage = |(stage, curve): (usize, &super::results::StageCurve)| {
        let point = |(index, point): (usize, &CurvePoint)| {
            let of_seed =
                |run: &&super::results::RunReport| Some(run.curves.get(stage)?.points.get(index)?.loss);
            let losses: Vec<f64> = finished.iter().filter_map(of_seed).collect();
            let Estimate { mean, standard_error, .. } = Estimate::of(&losses)?;
            Some(Mean { flops: point.flops, loss: mean, error: standard_error.unwrap_or(0.0) })
        };
        curve.points.iter().enumerate().filter_map(point).collect()
    };
    first.curves.iter().enumerate().map(stage).collect()
}

fn draw_curves(
    text: &mut String,
    curves: &[(&RecipeReport, Vec<Vec<Mean>>)],
    flops: std::ops::Range<f64>,
    loss: std::ops::Range<f64>,
) -> Drawn {
    let root = SVGBackend::with_string(text, (900, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(20)
        .x_label_area_size(45)
        .y_label_area_size(60)
        .build_cartesian_2d(flops, loss.clone())?;
    chart
        .configure_mesh()
        .x_desc("training FLOPs, base included")
        .y_desc("validation loss (nats per token), mean and standard error")
        .x_label_formatter(&|x| format!("{x:.1e}"))
        .light_line_style(WHITE)
        .draw()?;
    for (index, (recipe, stages)) in curves.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let Some((last, before)) = stages.split_last() else { continue };
        for stage in before {
            let points = shown(stage, loss.end).into_iter().map(|point| (point.flops, point.loss));
            chart.draw_series(LineSeries::new(points, color.mix(0.4).stroke_width(1)))?;
        }
        let points = shown(last, loss.end);
        let band = points.iter().map(|point| (point.flops, (point.loss + point.error).min(loss.end)));
        let below = points.iter().rev().map(|point| (point.flops, point.loss - point.error));
        chart.draw_series([Polygon::new(band.chain(below).collect::<Vec<_>>(), color.mix(0.15).filled())])?;
        chart
            .draw_series(LineSeries::new(
                points.iter().map(|point| (point.flops, point.loss)),
                color.stroke_width(2),
            ))?
            .label(recipe.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}

/// The part of a curve below `top`, beginning on it.
fn shown(points: &[Mean], top: f64) -> Vec<Mean> {
    let Some(first) = points.iter().position(|point| point.loss <= top) else { return Vec::new() };
    let mut shown = points[first..].to_vec();
    shown.retain(|point| point.loss <= top);
    if let Some(before) = first.checked_sub(1).map(|before| points[before]) {
        let share = (before.loss - top) / (before.loss - points[first].loss);
        let flops = before.flops + share * (points[first].flops - before.flops);
        shown.insert(0, Mean { flops, loss: top, error: points[first].error });
    }
    shown
}

/// Last validation losses with their standard errors, a dot a seed, and scratch as a line across. `None` while nothing
/// has finished.
pub fn bars_svg(report: &ComparisonReport) -> Option<String> {
    // A recipe has the same colour in both plots.
    let rows: Vec<(RGBColor, &RecipeReport, Estimate)> = COLORS
        .iter()
        .cycle()
        .zip(&report.recipes)
        .filter_map(|(color, recipe)| Some((*color, recipe, recipe.final_loss?)))
        .collect();
    let losses =
        || rows.iter().flat_map(|(_, recipe, _)| recipe.runs.iter().filter_map(|run| run.final_loss));
    let (low, high) = (losses().reduce(f64::min)?, losses().reduce(f64::max)?);
    let margin = 0.1 * (high - low).max(1e-3);
    let mut text = String::new();
    draw_bars(&mut text, &rows, low - 2.0 * margin, high + margin).ok()?;
    Some(text)
}

/// Pixels of a row of the bar chart.
const ROW: i32 = 34;
/// Where its bars begin and end.
const BAR_LEFT: i32 = 150;
const BAR_RIGHT: i32 = 760;

fn draw_bars(text: &mut String, rows: &[(RGBColor, &RecipeReport, Estimate)], low: f64, high: f64) -> Drawn {
    let height = 70 + ROW * rows.len() as i32;
    let root = SVGBackend::with_string(text, (900, height.unsigned_abs())).into_drawing_area();
    root.fill(&WHITE)?;
    let x =
        |loss: f64| BAR_LEFT + ((loss - low) / (high - low) * f64::from(BAR_RIGHT - BAR_LEFT)).round() as i32;
    let font = ("sans-serif", 14).into_font();
    for (row, (color, recipe, estimate)) in rows.iter().enumerate() {
        let top = 20 + ROW * row as i32;
        let (middle, end) = (top + ROW / 2 - 4, x(estimate.mean));
        root.draw(&Text::new(recipe.name.clone(), (14, middle - 6), font.clone()))?;
        root.draw(&Rectangle::new([(BAR_LEFT, top), (end, top + ROW - 8)], color.mix(0.5).filled()))?;
        if let Some(error) = estimate.standard_error {
            let (from, to) = (x(estimate.mean - error), x(estimate.mean + error));
            root.draw(&PathElement::new([(from, middle), (to, middle)], BLACK.stroke_width(2)))?;
            for end in [from, to] {
                root.draw(&PathElement::new([(end, middle - 5), (end, middle + 5)], BLACK.stroke_width(2)))?;
            }
        }
        for loss in recipe.runs.iter().filter_map(|run| run.final_loss) {
            root.draw(&Circle::new((x(loss), middle), 2, BLACK.filled()))?;
        }
        root.draw(&Text::new(format!("{:.3}", estimate.mean), (BAR_RIGHT + 30, middle - 6), font.clone()))?;
    }
    let bottom = 20 + ROW * rows.len() as i32;
    if let Some((_, _, scratch)) = rows.first().filter(|(_, recipe, _)| recipe.operator.is_none()) {
        let at = x(scratch.mean);
        root.draw(&PathElement::new([(at, 14), (at, bottom)], BLACK.stroke_width(1)))?;
    }
    let caption = format!("final validation loss (nats per token), from {low:.3} to {high:.3}");
    root.draw(&Text::new(caption, (BAR_LEFT, bottom + 14), font))?;
    root.present()?;
    Ok(())
}

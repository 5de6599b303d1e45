//! Validation loss against FLOPs as an SVG.

use super::{StageReport, bounds};
use plotters::prelude::*;

/// Colours of the stages, in turn (Okabe and Ito's, which also the colour-blind tell apart).
const COLORS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];

/// The plot, or `None` while there are fewer than two measurements.
pub fn svg(stages: &[StageReport]) -> Option<String> {
    let (x0, x1, y0, y1) = bounds(stages)?;
    let mut text = String::new();
    draw(&mut text, stages, x0..x1, y0..y1 + 0.05 * (y1 - y0)).ok()?;
    Some(text)
}

fn draw(
    text: &mut String,
    stages: &[StageReport],
    flops: std::ops::Range<f64>,
    loss: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, (800, 500)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(20)
        .x_label_area_size(45)
        .y_label_area_size(60)
        .build_cartesian_2d(flops, loss)?;
    chart
        .configure_mesh()
        .x_desc("training FLOPs of the whole job")
        .y_desc("validation loss (nats per token)")
        .x_label_formatter(&|x| format!("{x:.1e}"))
        .light_line_style(WHITE)
        .draw()?;
    for (index, stage) in stages.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let points = || stage.curve.iter().map(|point| (point.flops, point.loss));
        chart
            .draw_series(LineSeries::new(points(), color.stroke_width(2)))?
            .label(format!("{} ({} layers)", stage.stage, stage.layers))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart.draw_series(points().map(|point| Circle::new(point, 3, color.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}

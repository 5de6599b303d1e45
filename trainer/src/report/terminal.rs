//! Validation loss against FLOPs in a terminal, in Braille dots: each character is a grid of 2 x 4.

use super::{CurvePoint, StageReport, bounds};

/// Bit of each dot of a Braille character, by row and column.
const DOTS: [[u32; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];

/// The plot in `width` x `height` characters, or `None` while there are fewer than two measurements.
pub fn plot(stages: &[StageReport], width: usize, height: usize) -> Option<String> {
    let (x0, x1, y0, y1) = bounds(stages)?;
    let mut canvas = Canvas::new(width, height);
    let place = |point: &CurvePoint| {
        let x = (point.flops - x0) / (x1 - x0) * (2 * width - 1) as f64;
        let y = (y1 - point.loss) / (y1 - y0) * (4 * height - 1) as f64;
        (x, y)
    };
    for stage in stages {
        for pair in stage.curve.windows(2) {
            canvas.line(place(&pair[0]), place(&pair[1]));
        }
    }
    let mut text = String::from("validation loss\n");
    for (row, line) in canvas.rows().enumerate() {
        let label = match row {
            0 => format!("{y1:8.3}"),
            row if row + 1 == height => format!("{y0:8.3}"),
            _ => " ".repeat(8),
        };
        text.push_str(&format!("{label} │{line}\n"));
    }
    text.push_str(&format!("{} └{}\n", " ".repeat(8), "─".repeat(width)));
    text.push_str(&format!("{}{}\n", " ".repeat(10), stage_ruler(stages, x0, x1, width)));
    let (from, to) = (format!("{x0:.1e}"), format!("{x1:.1e} FLOPs"));
    let gap = width.saturating_sub(from.len() + to.len());
    text.push_str(&format!("{}{from}{}{to}", " ".repeat(10), " ".repeat(gap)));
    Some(text)
}

/// Names of the stages below the point where each begins.
fn stage_ruler(stages: &[StageReport], x0: f64, x1: f64, width: usize) -> String {
    let mut ruler = String::new();
    for stage in stages {
        let Some(first) = stage.curve.first() else { continue };
        let column = ((first.flops - x0) / (x1 - x0) * (width - 1) as f64) as usize;
        let used = ruler.chars().count();
        let gap = column.saturating_sub(used).max(usize::from(used > 0));
        ruler.push_str(&" ".repeat(gap));
        ruler.push_str(&format!("^{}", stage.stage));
    }
    ruler
}

struct Canvas {
    width: usize,
    cells: Vec<u32>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self { width, cells: vec![0; width * height] }
    }

    fn line(&mut self, (x0, y0): (f64, f64), (x1, y1): (f64, f64)) {
        let steps = (x1 - x0).abs().max((y1 - y0).abs()).ceil().max(1.0);
        for step in 0..=steps as usize {
            let share = step as f64 / steps;
            self.dot(x0 + share * (x1 - x0), y0 + share * (y1 - y0));
        }
    }

    fn dot(&mut self, x: f64, y: f64) {
        let (x, y) = (x.round() as usize, y.round() as usize);
        if let Some(cell) = self.cells.get_mut(y / 4 * self.width + x / 2) {
            *cell |= DOTS[y % 4][x % 2];
        }
    }

    fn rows(&self) -> impl Iterator<Item = String> {
        let braille = |cell: &u32| char::from_u32(0x2800 + cell).unwrap_or(' ');
        self.cells.chunks(self.width).map(move |row| row.iter().map(braille).collect())
    }
}

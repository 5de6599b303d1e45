//! What a person sees while a job works: a bar per step of the job on a terminal, a line every few seconds
//! elsewhere, nothing when asked for machine-readable output.

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What a step of the job counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes read or written.
    Bytes,
    /// Tokens trained.
    Tokens,
}

/// Shows one step of a job at a time.
pub struct Reporter {
    style: Style,
    current: Option<Step>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Bars,
    Lines,
    Quiet,
}

struct Step {
    name: String,
    unit: Unit,
    total: u64,
    first: u64,
    done: u64,
    detail: String,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Reporter {
    /// Bars on a terminal, lines otherwise.
    pub fn for_people() -> Self {
        let style = if std::io::stderr().is_terminal() { Style::Bars } else { Style::Lines };
        Self { style, current: None }
    }

    /// Says nothing but notes.
    pub fn quiet() -> Self {
        Self { style: Style::Quiet, current: None }
    }

    /// Begins a step of `total` units, `done` of which an earlier run has done.
    pub fn begin(&mut self, name: &str, unit: Unit, total: u64, done: u64) {
        self.finish();
        let now = Instant::now();
        let bar = (self.style == Style::Bars).then(|| bar(name, unit, total, done));
        self.current = Some(Step {
            name: name.to_owned(),
            unit,
            total,
            first: done,
            done,
            detail: String::new(),
            started: now,
            last_line: now,
            bar,
        });
    }

    /// Reports how much of the current step is done, of a total that may have become known only now.
    pub fn advance(&mut self, done: u64, total: u64, detail: String) {
        let Some(step) = &mut self.current else { return };
        (step.done, step.total, step.detail) = (done, total, detail);
        if let Some(bar) = &step.bar {
            bar.set_length(total);
            bar.set_message(step.detail.clone());
            bar.set_position(done);
        } else if self.style == Style::Lines && step.last_line.elapsed() >= LINE_INTERVAL {
            step.last_line = Instant::now();
            print(&step.line());
        }
    }

    /// Ends the current step.
    pub fn finish(&mut self) {
        let Some(step) = self.current.take() else { return };
        match &step.bar {
            Some(bar) => bar.abandon(),
            None if self.style == Style::Lines => print(&step.line()),
            None => {}
        }
    }

    /// Says something beside the bar.
    pub fn note(&self, text: &str) {
        match self.current.as_ref().and_then(|step| step.bar.as_ref()) {
            Some(bar) => bar.println(text),
            None => print(text),
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A reader that went away is no reason to stop training.
fn print(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl Step {
    fn line(&self) -> String {
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = (self.done - self.first) as f64 / seconds.max(1e-9);
        let percent = if self.total == 0 { 0.0 } else { 100.0 * self.done as f64 / self.total as f64 };
        let mut line =
            format!("{:<8} {percent:3.0}%  {}", self.name, self.unit.amounts(self.done, self.total));
        if !self.detail.is_empty() {
            let _ = write!(line, "  {}", self.detail);
        }
        let _ = write!(line, "  {}", self.unit.rate(rate));
        if rate > 0.0 && self.done < self.total {
            let _ = write!(line, "  {} left", duration((self.total - self.done) as f64 / rate));
        }
        line
    }
}

impl Unit {
    fn amounts(self, done: u64, total: u64) -> String {
        match self {
            Self::Bytes => format!("{}/{}", count(done as f64), bytes(total)),
            Self::Tokens => format!("{}/{} tokens", count(done as f64), count(total as f64)),
        }
    }

    fn rate(self, per_second: f64) -> String {
        match self {
            Self::Bytes => format!("{}B/s", count(per_second)),
            Self::Tokens => format!("{} tokens/s", count(per_second)),
        }
    }
}

fn bar(name: &str, unit: Unit, total: u64, done: u64) -> ProgressBar {
    let template = "{prefix:<8} [{bar:24}] {percent:>3}%  {amounts}  {msg}  {rate}  {eta} left";
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
        .with_key("amounts", move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&unit.amounts(state.pos(), state.len().unwrap_or(0)));
        })
        .with_key("rate", move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&unit.rate(state.per_sec()));
        });
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(4))
        .with_style(style)
        .with_prefix(name.to_owned())
        .with_position(done);
    // What an earlier run did must not count into the rate.
    bar.reset_eta();
    bar
}

/// A table in plain text: all columns from `first_number` on stand at the right.
pub fn table<const N: usize>(
    titles: [&str; N],
    first_number: usize,
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(titles);
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(first_number) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// `1.23M`: three digits and a decimal unit.
pub fn count(value: f64) -> String {
    let (scaled, unit) = match value {
        v if v >= 1e12 => (v / 1e12, "T"),
        v if v >= 1e9 => (v / 1e9, "B"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e3 => (v / 1e3, "K"),
        v => return format!("{v:.0}"),
    };
    let decimals = if scaled >= 100.0 {
        0
    } else if scaled >= 10.0 {
        1
    } else {
        2
    };
    format!("{scaled:.decimals$}{unit}")
}

/// `1.23 GB`
pub fn bytes(value: u64) -> String {
    let text = count(value as f64).replace('B', "G");
    match text.find(|c: char| c.is_ascii_alphabetic()) {
        Some(unit) => format!("{} {}B", &text[..unit], &text[unit..]),
        None => format!("{text} B"),
    }
}

/// `1h05m`, `2m07s`, `12s`
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(count(999.0), "999");
        assert_eq!(count(1234.0), "1.23K");
        assert_eq!(count(45_600_000.0), "45.6M");
        assert_eq!(count(7e9), "7.00B");
        assert_eq!(bytes(1_500_000_000), "1.50 GB");
        assert_eq!(bytes(12), "12 B");
        assert_eq!(duration(12.4), "12s");
        assert_eq!(duration(127.0), "2m07s");
        assert_eq!(duration(3900.0), "1h05m");
    }

    #[test]
    fn a_resumed_step_counts_only_its_own_work() {
        let mut reporter = Reporter { style: Style::Quiet, current: None };
        reporter.begin("small", Unit::Tokens, 100, 50);
        reporter.advance(75, 100, "loss 3.2".to_owned());
        let line = reporter.current.as_ref().unwrap().line();
        assert!(line.starts_with("small     75%  75/100 tokens  loss 3.2"), "{line}");
    }
}

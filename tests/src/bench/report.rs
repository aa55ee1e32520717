//! What a benchmark found: a table for people, JSON for scripts.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// What a figure must reach.
#[derive(Clone, Debug, PartialEq)]
pub enum Must {
    /// Nothing: shown beside the others.
    Shown,
    /// At most this.
    AtMost(f64),
    /// Less than this.
    Below(f64),
    /// At least this.
    AtLeast(f64),
    /// More than this.
    Above(f64),
    /// Exactly this; a miss is a wrong count, and makes the run fail.
    Exactly(f64),
    /// A count that is wrong if it is more than this; a miss makes the run fail.
    CountAtMost(f64),
    /// It could not be measured, and why.
    Skipped(String),
}

/// How a figure stands to what it must reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was asked, or nothing measured.
    None,
    /// Reached.
    Ok,
    /// A speed or size that is not reached.
    Missed,
    /// A count that is wrong.
    Wrong,
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Ok => "ok",
            Self::Missed => "MISSED",
            Self::Wrong => "WRONG",
        }
    }
}

/// One row.
#[derive(Clone, Debug)]
pub struct Figure {
    name: String,
    measured: f64,
    unit: &'static str,
    must: Must,
}

impl Figure {
    /// How it stands.
    pub fn verdict(&self) -> Verdict {
        let (good, miss) = match self.must {
            Must::Shown | Must::Skipped(_) => return Verdict::None,
            Must::AtMost(limit) => (self.measured <= limit, Verdict::Missed),
            Must::Below(limit) => (self.measured < limit, Verdict::Missed),
            Must::AtLeast(limit) => (self.measured >= limit, Verdict::Missed),
            Must::Above(limit) => (self.measured > limit, Verdict::Missed),
            // Counts of packets are whole numbers far below 2^53.
            Must::Exactly(count) => (self.measured == count, Verdict::Wrong),
            Must::CountAtMost(count) => (self.measured <= count, Verdict::Wrong),
        };
        if good { Verdict::Ok } else { miss }
    }

    fn cells(&self) -> [String; 4] {
        let value = |value: f64| match self.unit {
            "" => number(value),
            unit => format!("{} {unit}", number(value)),
        };
        let measured = value(self.measured);
        let (measured, must) = match &self.must {
            Must::Shown => (measured, String::new()),
            Must::AtMost(limit) | Must::CountAtMost(limit) => {
                (measured, format!("<= {}", value(*limit)))
            }
            Must::Below(limit) => (measured, format!("< {}", value(*limit))),
            Must::AtLeast(limit) => (measured, format!(">= {}", value(*limit))),
            Must::Above(limit) => (measured, format!("> {}", value(*limit))),
            Must::Exactly(count) => (measured, format!("= {}", value(*count))),
            Must::Skipped(why) => ("skipped".to_owned(), why.clone()),
        };
        [
            self.name.clone(),
            measured,
            must,
            self.verdict().as_str().to_owned(),
        ]
    }

    fn json(&self) -> Value {
        let (relation, limit) = match &self.must {
            Must::Shown | Must::Skipped(_) => (None, None),
            Must::AtMost(limit) | Must::CountAtMost(limit) => (Some("<="), Some(*limit)),
            Must::Below(limit) => (Some("<"), Some(*limit)),
            Must::AtLeast(limit) => (Some(">="), Some(*limit)),
            Must::Above(limit) => (Some(">"), Some(*limit)),
            Must::Exactly(limit) => (Some("="), Some(*limit)),
        };
        let skipped = if let Must::Skipped(why) = &self.must {
            Some(why)
        } else {
            None
        };
        json!({
            "figure": self.name,
            "measured": if skipped.is_some() { None } else { Some(self.measured) },
            "unit": self.unit,
            "relation": relation,
            "must_reach": limit,
            "ok": match self.verdict() {
                Verdict::None => None,
                verdict => Some(verdict == Verdict::Ok),
            },
            "skipped": skipped,
        })
    }
}

/// The figures of one benchmark.
pub struct Report {
    name: &'static str,
    about: &'static str,
    figures: Vec<Figure>,
    grids: Vec<String>,
    rounds: Vec<Value>,
}

impl Report {
    /// An empty one.
    pub fn new(name: &'static str, about: &'static str) -> Self {
        Self {
            name,
            about,
            figures: Vec::new(),
            grids: Vec::new(),
            rounds: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn figure(
        &mut self,
        name: impl Into<String>,
        measured: f64,
        unit: &'static str,
        must: Must,
    ) {
        self.figures.push(Figure {
            name: name.into(),
            measured,
            unit,
            must,
        });
    }

    /// Adds a count of packets or of anything else that is counted.
    pub fn count(&mut self, name: impl Into<String>, measured: u64, must: Must) {
        self.figure(name, measured as f64, "", must);
    }

    /// Adds a row for what this machine cannot measure.
    pub fn skipped(&mut self, name: impl Into<String>, why: impl Into<String>) {
        self.figure(name, 0.0, "", Must::Skipped(why.into()));
    }

    /// Adds what was measured in one round, for the JSON only.
    pub fn round(&mut self, round: Value) {
        self.rounds.push(round);
    }

    /// Adds a table of many columns below the figures; for people only.
    pub fn grid(&mut self, title: &str, head: &[String], rows: Vec<Vec<String>>) {
        let all = || std::iter::once(head).chain(rows.iter().map(Vec::as_slice));
        let width = |column: usize| {
            let cells = all().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let mut text = format!("\n  {title}\n");
        for row in all() {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                line += &match column {
                    0 => format!("  {cell:<width$}"),
                    _ => format!("  {cell:>width$}"),
                };
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        self.grids.push(text);
    }

    /// The rows so far.
    pub fn figures(&self) -> &[Figure] {
        &self.figures
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut text = format!("\n{}: {}\n", self.name, self.about);
        text += &table(&self.figures.iter().map(Figure::cells).collect::<Vec<_>>());
        text + &self.grids.concat()
    }

    /// One table of everything that several benchmarks had to reach, or could not measure.
    pub fn summary(reports: &[Self]) -> String {
        let rows: Vec<[String; 4]> = reports
            .iter()
            .flat_map(|report| {
                let asked = report
                    .figures
                    .iter()
                    .filter(|figure| figure.must != Must::Shown);
                asked.map(|figure| {
                    let mut cells = figure.cells();
                    cells[0] = format!("{}: {}", report.name, cells[0]);
                    cells
                })
            })
            .collect();
        format!("\nsummary\n{}", table(&rows))
    }

    /// Writes `NAME.json` into the directory.
    ///
    /// # Errors
    /// The directory cannot be made or the file not written.
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("create {}", directory.display()))?;
        let path = directory.join(format!("{}.json", self.name));
        let text = serde_json::to_string_pretty(&json!({
            "name": self.name,
            "about": self.about,
            "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "cpus": cpus(),
            "figures": self.figures.iter().map(Figure::json).collect::<Vec<_>>(),
            "rounds": self.rounds,
        }))?;
        std::fs::write(&path, text + "\n").with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

/// CPUs that this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The value in the middle; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The value that `percent` of all do not exceed (nearest rank); 0 of none.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

fn table(rows: &[[String; 4]]) -> String {
    let head = ["figure", "measured", "must reach", ""].map(str::to_owned);
    let all = || std::iter::once(&head).chain(rows);
    let width = |column: usize| {
        all()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths = [width(0), width(1), width(2)];
    let mut text = String::new();
    for [name, measured, must, verdict] in all() {
        let line = format!(
            "  {name:<a$}  {measured:>b$}  {must:<c$}  {verdict}",
            a = widths[0],
            b = widths[1],
            c = widths[2],
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Whole numbers with commas between thousands, others with three digits that matter.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        whole if whole.fract() == 0.0 => 0,
        large if large >= 100.0 => 0,
        medium if medium >= 10.0 => 1,
        small if small >= 0.1 => 3,
        _ => 4,
    };
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
    let (sign, digits) = whole.split_at(usize::from(whole.starts_with('-')));
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}{fraction}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middles_and_ranks() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&hundred, 50), 50.0);
        assert_eq!(percentile(&hundred, 99), 99.0);
        assert_eq!(percentile(&hundred, 100), 100.0);
        assert_eq!(percentile(&[7.0], 99), 7.0);
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(1_000_000.0), "1,000,000");
        assert_eq!(number(-1234.6), "-1,235");
        assert_eq!(number(999.0), "999");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(0.9876), "0.988");
        assert_eq!(number(0.0012), "0.0012");
    }

    #[test]
    fn a_wrong_count_is_worse_than_a_miss() {
        let verdict = |measured, must| {
            Figure {
                name: String::new(),
                measured,
                unit: "",
                must,
            }
            .verdict()
        };
        assert_eq!(verdict(5.0, Must::Exactly(5.0)), Verdict::Ok);
        assert_eq!(verdict(4.0, Must::Exactly(5.0)), Verdict::Wrong);
        assert_eq!(verdict(6.0, Must::CountAtMost(5.0)), Verdict::Wrong);
        assert_eq!(verdict(1.6, Must::AtMost(1.5)), Verdict::Missed);
        assert_eq!(verdict(0.9, Must::AtLeast(0.98)), Verdict::Missed);
        assert_eq!(verdict(1.0, Must::Above(1.0)), Verdict::Missed);
        assert_eq!(verdict(50.0, Must::Below(50.0)), Verdict::Missed);
        assert_eq!(verdict(1.0, Must::Shown), Verdict::None);
    }
}

//! What a benchmark leaves behind: a table on the terminal, `target/bench/NAME.json` with every round, and
//! `target/bench/NAME.html` with the same figures as bars ([`plot`]). Measuring is the benchmarks' own business.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;

use super::goals::Goal;
use super::plot;
use super::stats::{Summary, ratio};
use crate::cmd;

/// One figure that is measured for every case and contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Metric {
    /// Name with its unit, as a column title.
    pub(crate) title: &'static str,
    /// Whether more is better.
    pub(crate) more_is_better: bool,
    /// Digits after the point.
    pub(crate) digits: usize,
}

/// All rounds of one contender in one case.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// The workload.
    pub(crate) case: String,
    /// Who did it.
    pub(crate) contender: String,
    /// For each metric its value in every round.
    pub(crate) rounds: Vec<Vec<f64>>,
    /// For each metric the summary; filled by [`Report::finish`].
    pub(crate) summary: Vec<Summary>,
}

/// A finished comparison.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// File name stem.
    pub(crate) name: &'static str,
    /// What was compared, how, on what: for the reader.
    pub(crate) preface: Vec<String>,
    /// The columns.
    pub(crate) metrics: Vec<Metric>,
    /// Every case times every contender; the first contender of a case is ours.
    pub(crate) rows: Vec<Row>,
    /// Goals and what came of them; filled by [`Report::finish`].
    pub(crate) goals: Vec<Goal>,
}

impl Report {
    /// Computes the summaries, judges them, prints the table, writes JSON, HTML and plots.
    ///
    /// # Errors
    /// A file cannot be written.
    pub(crate) fn finish(mut self, judge: impl FnOnce(&[Row]) -> Vec<Goal>) -> Result<()> {
        for row in &mut self.rows {
            row.summary = row.rounds.iter().map(|values| Summary::of(values.iter().copied())).collect();
        }
        self.goals = judge(&self.rows);
        let mut table = self.table();
        if !self.goals.is_empty() {
            table.push('\n');
        }
        for goal in &self.goals {
            let _ = writeln!(table, "{goal}");
        }
        for line in &self.preface {
            println!("{line}");
        }
        println!("\n{table}");
        let directory = cmd::target_dir().join("bench");
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let json = directory.join(format!("{}.json", self.name));
        std::fs::write(&json, serde_json::to_string_pretty(&self)?)
            .with_context(|| format!("cannot write {}", json.display()))?;
        for (name, svg) in plot::all(&self)? {
            let path = directory.join(name);
            std::fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let html = directory.join(format!("{}.html", self.name));
        std::fs::write(&html, self.html(&table)?)
            .with_context(|| format!("cannot write {}", html.display()))?;
        println!("written: {} and {}", json.display(), html.display());
        Ok(())
    }

    /// The first row of the same case: what others are compared with.
    fn ours(&self, case: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.case == case)
    }

    fn table(&self) -> String {
        let mut lines = vec![vec!["workload".to_owned(), "backend".to_owned()]];
        lines[0].extend(self.metrics.iter().map(|metric| metric.title.to_owned()));
        for row in &self.rows {
            let mut line = vec![row.case.clone(), row.contender.clone()];
            let ours = self.ours(&row.case).filter(|ours| ours.contender != row.contender);
            for (index, (metric, summary)) in self.metrics.iter().zip(&row.summary).enumerate() {
                let mut cell = format!("{:.*}", metric.digits, summary.median);
                if let Some(ours) = ours {
                    let _ = write!(cell, " ({:.2}x)", ratio(ours.summary[index].median, summary.median));
                }
                line.push(cell);
            }
            lines.push(line);
        }
        let widths: Vec<usize> = (0..lines[0].len())
            .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for line in &lines {
            for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
                let _ = if column < 2 {
                    write!(text, "{cell:<width$}  ")
                } else {
                    write!(text, "{cell:>width$}  ")
                };
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text.push_str("medians of the rounds; (Nx) is ours divided by this one\n");
        text
    }

    fn html(&self, table: &str) -> Result<String> {
        let mut page = format!(
            "<!doctype html><meta charset=utf-8><title>bench {0}</title><h1>bench {0}</h1>",
            self.name
        );
        for line in &self.preface {
            let _ = write!(page, "<p>{}</p>", escape(line));
        }
        let _ = write!(page, "<pre>{}</pre>", escape(table));
        for (_, svg) in plot::all(self)? {
            page.push_str(&svg);
        }
        Ok(page)
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

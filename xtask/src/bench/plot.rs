//! Pictures of a comparison: bars, each in proportion to what the last contender of its case measured, so that loads of
//! any size stand beside each other. The figures themselves are written at the bars.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::report::{Metric, Report, Row};
use super::stats::ratio;

/// More would be a picture that nobody can look at as a whole.
const CASES_PER_PLOT: usize = 9;
const WIDTH: u32 = 1000;
/// Pixels for the names, for a bar, and between two cases.
const NAMES: i32 = 340;
const BAR: i32 = 18;
const GAP: i32 = 12;
const TOP: i32 = 48;
/// Pixels at the right end, for the figures.
const FIGURES: i32 = 90;
const TEXT: (&str, i32) = ("sans-serif", 13);

/// File name and picture of every metric, of a few cases each.
///
/// # Errors
/// The picture cannot be drawn.
pub(super) fn all(report: &Report) -> Result<Vec<(String, String)>> {
    let mut cases: Vec<&str> = Vec::new();
    for row in &report.rows {
        if !cases.contains(&row.case.as_str()) {
            cases.push(&row.case);
        }
    }
    let mut plots = Vec::new();
    for (index, metric) in report.metrics.iter().enumerate() {
        for (part, cases) in cases.chunks(CASES_PER_PLOT).enumerate() {
            let groups: Vec<Vec<&Row>> = cases
                .iter()
                .map(|case| report.rows.iter().filter(|row| row.case == *case).collect())
                .collect();
            let title: String =
                metric.title.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
            plots.push((format!("{}-{title}-{}.svg", report.name, part + 1), plot(*metric, index, &groups)?));
        }
    }
    Ok(plots)
}

/// One metric of some cases: a group of bars for each case, a colour for each contender.
fn plot(metric: Metric, index: usize, groups: &[Vec<&Row>]) -> Result<String> {
    let bars: i32 = groups.iter().map(|group| BAR * group.len() as i32 + GAP).sum();
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, (TOP + bars + GAP) as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let better = if metric.more_is_better { "more is better" } else { "less is better" };
        let title = format!("{} in proportion to the last of each group; {better}", metric.title);
        area.draw(&Text::new(title, (12, 12), ("sans-serif", 18)))?;
        let relative = |group: &[&Row], figure: f64| {
            ratio(figure, group.last().map_or(0.0, |last| last.summary[index].median))
        };
        let longest = groups
            .iter()
            .flat_map(|group| group.iter().map(|row| relative(group, row.summary[index].max)))
            .fold(1.0, f64::max);
        // One round that went wrong must not make all other bars short.
        let longest = longest.min(6.0);
        let room = f64::from(WIDTH as i32 - NAMES - FIGURES);
        let x = |value: f64| NAMES + (value.min(longest) / longest * room) as i32;
        let mut y = TOP;
        for group in groups {
            for (place, row) in group.iter().enumerate() {
                let summary = row.summary[index];
                let middle = y + BAR / 2;
                area.draw(&Text::new(format!("{}  {}", row.case, row.contender), (12, middle - 7), TEXT))?;
                let end = x(relative(group, summary.median));
                area.draw(&Rectangle::new(
                    [(NAMES, y + 2), (end, y + BAR - 2)],
                    Palette99::pick(place).filled(),
                ))?;
                let (least, most) = (x(relative(group, summary.min)), x(relative(group, summary.max)));
                area.draw(&PathElement::new(vec![(least, middle), (most, middle)], BLACK.stroke_width(1)))?;
                let figure = format!("{:.*}", metric.digits, summary.median);
                area.draw(&Text::new(figure, (end.max(most) + 6, middle - 7), TEXT))?;
                y += BAR;
            }
            y += GAP;
        }
        one(&area, x(1.0), y)?;
        area.present()?;
    }
    Ok(svg)
}

/// The line at which a bar is as long as the last one's.
fn one<B: DrawingBackend>(area: &DrawingArea<B, Shift>, x: i32, bottom: i32) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.draw(&PathElement::new(vec![(x, TOP - 6), (x, bottom)], BLACK.mix(0.4).stroke_width(1)))
        .map_err(|error| anyhow::anyhow!("cannot draw: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Summary;

    #[test]
    fn every_metric_and_case_is_in_a_picture() {
        let row = |case: usize, contender: &str, figure: f64| Row {
            case: format!("case{case}"),
            contender: contender.into(),
            rounds: vec![vec![figure]],
            summary: vec![Summary::of([figure])],
        };
        let rows = (0..10).flat_map(|case| [row(case, "ours", 40.0), row(case, "theirs", 0.0)]).collect();
        let metrics = vec![Metric { title: "MiB/s", more_is_better: true, digits: 1 }];
        let report = Report { name: "x", preface: Vec::new(), metrics, rows, goals: Vec::new() };
        let plots = all(&report).unwrap();
        let names: Vec<&str> = plots.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["x-MiB-s-1.svg", "x-MiB-s-2.svg"]);
        assert!(plots[0].1.contains("case0  ours") && plots[0].1.contains("40.0"), "{}", plots[0].1);
        assert!(plots[1].1.contains("case9  theirs") && !plots[1].1.contains("case8"));
    }
}

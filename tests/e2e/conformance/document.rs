//! The lists in `docs/conformance-initiator.md` and `docs/conformance-net.md` are true: what they name exists, and nothing is
//! missing from them.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use vcp_tests::Result;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Names of all functions under a directory.
fn functions(dir: &Path, found: &mut HashSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("{}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            functions(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path)?;
            // Some are tests, and part of another test as well: those are seen by its module.
            let names = text
                .lines()
                .map(str::trim_start)
                .filter_map(|line| line.strip_prefix("pub(super) ").unwrap_or(line).strip_prefix("fn "));
            found.extend(names.filter_map(|rest| rest.split('(').next()).map(str::to_owned));
        }
    }
    Ok(())
}

/// Rows of the tables: cells, with what stands in backticks in the last.
fn rows(text: &str) -> Vec<(Vec<String>, Vec<String>)> {
    let table = text.lines().filter(|line| line.starts_with('|') && !line.starts_with("| ---"));
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect()
    };
    table
        .map(|line| {
            let cells = cells(line);
            let last = cells.last().cloned().unwrap_or_default();
            let names = last.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            (cells, names)
        })
        .collect()
}

#[test]
fn every_test_that_the_document_names_exists() -> Result<()> {
    let text = fs::read_to_string(root().join("docs/conformance-initiator.md"))?;
    let mut known = HashSet::new();
    for dir in ["tests/e2e", "iscsi/src", "vcp-iscsi/src", "vcp-iscsi/tests"] {
        functions(&root().join(dir), &mut known)?;
    }
    let mut named = HashSet::new();
    for (cells, names) in rows(&text) {
        for name in names {
            ensure!(known.contains(&name), "row {:?} names {name}, which does not exist", cells[0]);
            named.insert(name);
        }
    }
    // The other way round: each test of the lists is in the document.
    let lists =
        |name: &&String| name.starts_with("line_") || name.starts_with("ffp_") || name.starts_with("defect_");
    let mut here = HashSet::new();
    functions(&root().join("tests/e2e/conformance"), &mut here)?;
    let missing: Vec<_> = here.iter().filter(lists).filter(|name| !named.contains(*name)).collect();
    ensure!(missing.is_empty(), "not in the document: {missing:?}");
    Ok(())
}

#[test]
fn every_line_and_every_case_has_a_row() -> Result<()> {
    let text = fs::read_to_string(root().join("docs/conformance-initiator.md"))?;
    let rows = rows(&text);
    let row = |key: &str| rows.iter().find(|(cells, _)| cells[0] == key);
    for line in 1..=42 {
        let (cells, names) = row(&line.to_string()).with_context(|| format!("no row for line {line}"))?;
        ensure!(!names.is_empty(), "line {line} has no test: {cells:?}");
    }
    for letter in 'A'..='I' {
        let (_, names) = row(&letter.to_string()).with_context(|| format!("no row for defect {letter}"))?;
        ensure!(!names.is_empty(), "defect {letter} has no test");
    }
    let cases: Vec<_> = rows
        .iter()
        .filter(|(cells, _)| cells[0].contains('.') && cells[0].starts_with(|c: char| c.is_ascii_digit()))
        .collect();
    ensure!(cases.len() == 66, "{} cases of the UNH-IOL list in place of 66", cases.len());
    for (cells, names) in cases {
        let why = cells.last().is_some_and(|last| last.starts_with("does not apply:"));
        ensure!(why == names.is_empty(), "case {}: a test or a reason: {cells:?}", cells[0]);
    }
    Ok(())
}

#[test]
fn every_promise_of_the_network_has_a_test_or_a_reason() -> Result<()> {
    let text = fs::read_to_string(root().join("docs/conformance-net.md"))?;
    let mut known = HashSet::new();
    for dir in ["tests/e2e", "vcp-net/src", "vcp-net/tests", "vcp-core/src", "vmm/src"] {
        functions(&root().join(dir), &mut known)?;
    }
    let mut promises = 0;
    for (cells, names) in rows(&text) {
        if cells[0] == "promise" {
            continue;
        }
        promises += 1;
        for name in &names {
            ensure!(known.contains(name), "row {:?} names {name}, which does not exist", cells[0]);
        }
        let reason = cells.last().is_some_and(|last| last.starts_with("no test:"));
        ensure!(reason == names.is_empty(), "{:?}: a test or a reason: {cells:?}", cells[0]);
    }
    ensure!(promises >= 65, "{promises} rows");
    Ok(())
}

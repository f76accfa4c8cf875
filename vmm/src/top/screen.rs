//! The view on a terminal, for 80 columns and more. Whatever does not fit is scrolled, not cut: the lines that matter are
//! never wider than 80.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::view::{GuestView, VcpView};
use crate::text;

/// What the user has chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Choices {
    /// First line that is shown.
    pub scroll: usize,
    /// vCPUs are not shown.
    pub hide_vcpus: bool,
    /// The view stands still.
    pub frozen: bool,
    /// No colours.
    pub plain: bool,
}

/// Draws everything; returns the number of lines below the head, and how many of them fit.
pub fn draw(
    frame: &mut Frame<'_>,
    guests: &[GuestView],
    time: &str,
    interval_s: f64,
    choices: Choices,
) -> (usize, usize) {
    let [head, body] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(frame.area());
    let style = |style: Style| if choices.plain { Style::new() } else { style };
    let answering = guests.iter().filter(|guest| guest.answers).count();
    let frozen = if choices.frozen { " STOPPED" } else { "" };
    let left =
        format!("vcp top  {time}  {answering} of {} guests  every {interval_s} s{frozen}", guests.len());
    let keys = "q quit  space stop  v vCPUs";
    let gap = usize::from(head.width).saturating_sub(left.chars().count() + keys.len());
    let title = if gap == 0 { left } else { format!("{left}{}{keys}", " ".repeat(gap)) };
    frame.render_widget(
        Paragraph::new(title).style(style(Style::new().add_modifier(Modifier::REVERSED))),
        head,
    );
    let lines: Vec<Line<'_>> = guests.iter().flat_map(|guest| guest_lines(guest, choices, &style)).collect();
    let (all, room) = (lines.len(), usize::from(body.height));
    let shown: Vec<Line<'_>> =
        lines.into_iter().skip(choices.scroll.min(all.saturating_sub(room))).take(room).collect();
    frame.render_widget(Paragraph::new(shown), body);
    (all, room)
}

fn guest_lines<'a>(guest: &'a GuestView, choices: Choices, style: &dyn Fn(Style) -> Style) -> Vec<Line<'a>> {
    let (bold, dim, alarm) = (
        style(Style::new().add_modifier(Modifier::BOLD)),
        style(Style::new().fg(Color::DarkGray)),
        style(Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)),
    );
    let name = Span::styled(printable(&guest.name), bold);
    if !guest.answers {
        let why = Span::styled(printable(&guest.state), alarm);
        return vec![Line::from(vec![name, Span::raw("  "), why]), Line::raw("")];
    }
    let state = match guest.state.as_str() {
        "running" => Span::raw("running"),
        other => Span::styled(other, alarm),
    };
    let rest =
        format!("  up {}  {} vCPUs  {}  pid {}", guest.uptime, guest.vcpus.len(), guest.memory, guest.pid);
    let mut lines = vec![Line::from(vec![name, Span::raw("  "), state, Span::raw(rest)])];
    if !choices.hide_vcpus && !guest.vcpus.is_empty() {
        lines.push(Line::styled(VCPU_HEAD, dim));
        lines.extend(guest.vcpus.iter().map(|vcpu| {
            Line::raw(format!(
                " {:<4}{:>9}{:>10}{:>9}{:>9}{:>10}{:>7}{:>7}{:>7}{:>6}",
                vcpu.id,
                cut(&vcpu.cpus, 8),
                rate(vcpu.kvm("exits")),
                rate(vcpu.kvm("halt_exits")),
                rate(vcpu.kvm("irq_exits")),
                rate(vcpu.exits),
                short(vcpu.kinds(&["io_in", "io_out"])),
                short(vcpu.kinds(&["mmio_read", "mmio_write"])),
                short(vcpu.kinds(&["interrupted"])),
                short(vcpu.kinds(&["other"])),
            ))
        }));
    }
    if !guest.vcps.is_empty() {
        lines.push(Line::styled(VCP_HEAD, dim));
        lines.extend(guest.vcps.iter().map(|vcp| vcp_line(vcp, alarm)));
    }
    lines.push(Line::raw(""));
    lines
}

const VCPU_HEAD: &str = " vCPU     CPUs   exits/s   halt/s    irq/s monitor/s   port   mmio signal other";
const VCP_HEAD: &str = " VCP    CPU  busy  look sleep   r/s   w/s  read/s write/s    p50    p99  now rst";

fn vcp_line<'a>(vcp: &VcpView, alarm: Style) -> Line<'a> {
    let start = format!(
        " {:<6}{:>4}",
        cut(&printable(&vcp.device), 6),
        vcp.cpu.map_or("-".into(), |cpu| cpu.to_string())
    );
    let end = format!("{:>4}", if vcp.restarts > 999 { "999+".into() } else { vcp.restarts.to_string() });
    if vcp.state != "up" {
        let state = format!("  {:<62}", cut(&printable(&vcp.state), 62));
        return Line::from(vec![Span::raw(start), Span::styled(state, alarm), Span::raw(end)]);
    }
    let share = |at: usize| vcp.load.map_or("-".into(), |load| format!("{:.0}%", load[at] * 100.0));
    let failed = vcp.failed.is_some_and(|failed| failed > 0.0);
    let figures = format!(
        "{:>6}{:>6}{:>6}{:>6}{:>6}{:>8}{:>8}{:>7}{:>7}{:>5}",
        share(0),
        share(1),
        share(2),
        short(vcp.reads),
        short(vcp.writes),
        traffic(vcp.read_bytes),
        traffic(vcp.write_bytes),
        latency(vcp.p50_ns),
        latency(vcp.p99_ns),
        vcp.inflight.map_or("-".into(), |inflight| inflight.min(9999).to_string()),
    );
    let mark = if failed { Span::styled("!", alarm) } else { Span::raw("") };
    Line::from(vec![Span::raw(start), Span::raw(figures), Span::raw(end), mark])
}

fn rate(rate: Option<f64>) -> String {
    rate.map_or("-".into(), text::rate)
}

/// A rate in five characters.
fn short(rate: Option<f64>) -> String {
    let Some(rate) = rate else { return "-".into() };
    match rate {
        ..9_999.5 => format!("{rate:.0}"),
        ..99_950.0 => format!("{:.1}k", rate / 1e3),
        ..999_500.0 => format!("{:.0}k", rate / 1e3),
        _ => format!("{:.1}M", rate / 1e6),
    }
}

/// Bytes per second in seven characters.
fn traffic(rate: Option<f64>) -> String {
    rate.map_or("-".into(), |rate| text::bytes(rate as u64).replace(" ", "").replace("iB", ""))
}

/// A latency in six characters.
fn latency(ns: Option<u64>) -> String {
    let Some(ns) = ns else { return "-".into() };
    match ns {
        ..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{}us", ns.div_ceil(1_000)),
        1_000_000..10_000_000_000 => format!("{}ms", ns.div_ceil(1_000_000)),
        _ => format!("{}s", ns.div_ceil(1_000_000_000)),
    }
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        text.into()
    } else {
        text.chars().take(width - 1).chain(['+']).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::top::testing::look;
    use crate::top::view;

    /// The lines of a screen.
    fn screen(guests: &[GuestView], width: u16, height: u16, choices: Choices) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal
            .draw(|frame| {
                draw(frame, guests, "12:00:00Z", 1.0, choices);
            })
            .unwrap();
        let buffer = terminal.backend().buffer();
        let row =
            |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(row).collect()
    }

    fn guests() -> Vec<GuestView> {
        let start = Instant::now();
        let (before, now) = (look(start, 0), look(start + Duration::from_secs(2), 1));
        vec![view::guest(Some(&before), &now), view::gone("vm2", "the monitor has ended")]
    }

    #[test]
    fn heads_fit_80_columns() {
        assert!(VCPU_HEAD.len() <= 80 && VCP_HEAD.len() <= 80);
    }

    #[test]
    fn columns_stand_below_their_heads() {
        let lines = screen(&guests(), 80, 24, Choices::default());
        assert!(
            lines[0].starts_with("vcp top  12:00:00Z  1 of 2 guests") && lines[0].ends_with("v vCPUs"),
            "{lines:#?}"
        );
        assert!(lines[1].starts_with("vm1  running  up "), "{lines:#?}");
        assert_eq!(lines[2], VCPU_HEAD.trim_end());
        let vcpu = &lines[3];
        for (title, value) in [
            ("CPUs", "0-1"),
            ("exits/s", "500"),
            ("halt/s", "10"),
            ("monitor/s", "50"),
            ("port", "50"),
            ("other", "0"),
        ] {
            let at = VCPU_HEAD.find(title).map(|at| at + title.len()).unwrap();
            assert!(vcpu[..at].ends_with(value), "{title} {value}:\n{VCPU_HEAD}\n{vcpu}");
        }
        let head = lines.iter().position(|line| line == VCP_HEAD).unwrap();
        let vcp = &lines[head + 1];
        let ends = |word: &str, line: &str| line.find(word).map(|at| at + word.len());
        for (title, value) in [
            ("CPU", "3"),
            ("busy", "25%"),
            ("sleep", "50%"),
            ("read/s", "3.91M"),
            ("p99", "132us"),
            ("now", "7"),
            ("rst", "2"),
        ] {
            let at = ends(title, VCP_HEAD).unwrap();
            assert!(vcp[..at].ends_with(value), "{title} {value}:\n{VCP_HEAD}\n{vcp}");
        }
        assert!(lines.iter().any(|line| line == "vm2  the monitor has ended"), "{lines:#?}");
        assert!(lines.iter().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn a_small_terminal_scrolls() {
        let first = screen(&guests(), 80, 4, Choices::default());
        assert!(first[1].starts_with("vm1"));
        let scrolled = screen(&guests(), 80, 4, Choices { scroll: 1, ..Choices::default() });
        assert_eq!(scrolled[1], first[2]);
        // Never beyond the end, and a tiny one is no reason to fail.
        let end = screen(&guests(), 80, 4, Choices { scroll: 1000, ..Choices::default() });
        assert_eq!(end[2], "vm2  the monitor has ended");
        screen(&guests(), 1, 1, Choices::default());
    }

    #[test]
    fn vcpus_can_be_hidden() {
        let lines = screen(&guests(), 80, 24, Choices { hide_vcpus: true, ..Choices::default() });
        assert_eq!(lines[2], VCP_HEAD);
    }

    #[test]
    fn a_lost_backend_stands_out() {
        let mut guests = guests();
        guests[0].vcps[0].state = "AWAY".into();
        let lines = screen(&guests, 80, 24, Choices::default());
        let line = lines.iter().find(|line| line.starts_with(" disk0")).unwrap();
        assert!(line.contains("AWAY") && line.ends_with(" 2"), "{line}");
    }

    #[test]
    fn numbers_keep_to_their_columns() {
        for (value, expected) in
            [(0.2, "0"), (9_999.0, "9999"), (12_345.0, "12.3k"), (999_000.0, "999k"), (2.5e6, "2.5M")]
        {
            assert_eq!(short(Some(value)), expected);
        }
        for (ns, expected) in [(512, "512ns"), (1 << 17, "132us"), (1 << 23, "9ms"), (1 << 39, "550s")] {
            assert_eq!(latency(Some(ns)), expected);
        }
        assert_eq!(traffic(Some(1023.0 * 1024.0 * 1024.0)), "1023M");
        assert_eq!(cut("0,2,4,6,8,10", 9), "0,2,4,6,+");
    }
}

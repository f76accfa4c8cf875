//! The view while it lives: drawn at every interval, on every key, and when the terminal changes its size.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use super::guests::Guests;
use super::screen::{self, Choices};
use super::{TopArgs, clock};
use crate::signal;

/// Longest wait for a key: a signal to end is seen within it.
const TICK: Duration = Duration::from_millis(100);

/// Shows the view until the user ends it.
pub(super) fn run(args: &TopArgs, guests: &mut Guests) -> Result<()> {
    let mut terminal = ratatui::try_init().context("cannot use the terminal")?;
    let result = show(&mut terminal, args, guests);
    // Also restored by the hook for panics that `try_init` has set.
    ratatui::try_restore().context("cannot restore the terminal")?;
    result
}

fn show(terminal: &mut ratatui::DefaultTerminal, args: &TopArgs, guests: &mut Guests) -> Result<()> {
    let mut choices = Choices { plain: std::env::var_os("NO_COLOR").is_some(), ..Choices::default() };
    let mut views = guests.views();
    let mut time = clock();
    // The first rates come soon.
    let mut next = Instant::now() + args.interval.min(Duration::from_millis(300));
    let mut shown = 0;
    loop {
        let mut size = (0, 0);
        terminal
            .draw(|frame| size = screen::draw(frame, &views, &time, args.interval.as_secs_f64(), choices))
            .context("cannot draw")?;
        let (lines, room) = size;
        let last = lines.saturating_sub(room);
        choices.scroll = choices.scroll.min(last);
        loop {
            if signal::received().is_some() {
                return Ok(());
            }
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if !event::poll(left.min(TICK)).context("cannot read the terminal")? {
                continue;
            }
            match event::read().context("cannot read the terminal")? {
                Event::Key(key) if key.kind != KeyEventKind::Release => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Char(' ') => choices.frozen = !choices.frozen,
                    KeyCode::Char('v') => choices.hide_vcpus = !choices.hide_vcpus,
                    KeyCode::Up | KeyCode::Char('k') => choices.scroll = choices.scroll.saturating_sub(1),
                    KeyCode::Down | KeyCode::Char('j') => choices.scroll = (choices.scroll + 1).min(last),
                    KeyCode::PageUp => choices.scroll = choices.scroll.saturating_sub(room.max(1)),
                    KeyCode::PageDown => choices.scroll = (choices.scroll + room.max(1)).min(last),
                    KeyCode::Home => choices.scroll = 0,
                    KeyCode::End => choices.scroll = last,
                    _ => continue,
                },
                Event::Resize(..) => {}
                _ => continue,
            }
            break;
        }
        if next <= Instant::now() {
            next = Instant::now() + args.interval;
            if !choices.frozen {
                guests.look()?;
                (views, time) = (guests.views(), clock());
            }
            shown += 1;
            if args.count.is_some_and(|count| shown >= count) {
                return Ok(());
            }
        }
    }
}

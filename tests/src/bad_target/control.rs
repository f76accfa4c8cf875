//! The control socket: lines of text, one answer line to each.
//!
//! - a line of a script (see [the module](super)): `ok`, or `error: ...`;
//! - `now ACTION`, on the newest session: `close`, `reset`, `stall`, `window N`, `thaw`, `release` (carries out what
//!   hangs), `resize BLOCKS` (without telling anybody), or something to send, as behind `first`;
//! - `wait WAY LABEL COUNT MS`: waits until as many notes are written down; `ok` or `late`;
//! - `log`: the notes, then `end`; `breaches`: what the initiator did against RFC 7143, then `end`;
//! - `forget`: drops the notes of PDUs so far.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};

use super::answer::Out;
use super::script::{Line, action, extra, line};
use super::server::{Shared, State};
use crate::Result;

/// Serves one client until it goes.
pub fn serve(shared: &Arc<Shared>, mut stream: TcpStream) {
    let Ok(reader) = stream.try_clone() else { return };
    let _ = stream.set_nodelay(true);
    for text in BufReader::new(reader).lines() {
        let Ok(text) = text else { return };
        let answer = answer(shared, &text).unwrap_or_else(|error| format!("error: {error:#}"));
        if stream.write_all(format!("{answer}\n").as_bytes()).is_err() {
            return;
        }
    }
}

fn answer(shared: &Arc<Shared>, text: &str) -> Result<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let listed =
        |lines: Vec<String>| lines.into_iter().chain(["end".to_owned()]).collect::<Vec<_>>().join("\n");
    match words[..] {
        ["log"] => return Ok(listed(shared.lock().notes.iter().map(super::server::Note::line).collect())),
        ["breaches"] => return Ok(listed(shared.lock().breaches.clone())),
        ["forget"] => shared.update(|s| s.notes.retain(|note| note.way == "event")),
        ["wait", way, label, count, ms] => {
            let (count, ms): (usize, u64) = (count.parse()?, ms.parse()?);
            let seen =
                |s: &State| s.notes.iter().filter(|n| n.way == way && n.label == label).count() >= count;
            return Ok(if shared.wait(Duration::from_millis(ms), seen) { "ok" } else { "late" }.into());
        }
        _ => match line(text)? {
            Line::Now(words) => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                shared.update(|s| now(s, &words))?;
            }
            _ => shared.update(|s| s.script(text))?,
        },
    }
    Ok("ok".into())
}

fn now(state: &mut State, words: &[&str]) -> Result<()> {
    match *words {
        ["release"] => state.release(),
        ["thaw"] => state.thaw(),
        ["resize", blocks] => state.disk.resize(blocks.parse()?),
        _ => {
            let newest = state.conns.iter().rposition(|c| c.open && c.negotiated.is_some());
            let id = newest.context("there is no session")?;
            if let Ok(extra) = extra(words) {
                let out = Out::extra(&extra, state.lun(), None);
                state.send(id, vec![out], None);
            } else if !state.at_once(id, &action(words)?) {
                bail!("not to be done at once: {words:?}");
            }
        }
    }
    Ok(())
}

//! The script language: rules, actions, settings.

use std::time::Duration;

use anyhow::{Context, bail};
use iscsi::scsi::SenseKey;

use super::event::Event;
use super::fields::{Field, hex, number};
use crate::Result;

/// A PDU of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// `dataN`: the Nth Data-In, from 0.
    Data(usize),
    /// `r2tN`: the Nth R2T of the command, from 0.
    R2t(usize),
    /// `status`: the one that carries the status, or the only one (Login Response, NOP-In...).
    Status,
}

/// A PDU made up for the occasion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extra {
    /// `async EVENT [P1 P2 P3]`: an Asynchronous Message.
    Async(u8, [u16; 3]),
    /// `async-sense KEY CODE`: Async event 0 with this sense.
    AsyncSense(SenseKey, u16),
    /// `nop TTT`: a NOP-In that wants an answer under this tag; `nop none`: one that only tells counters.
    Nop(u32),
    /// `nop-both`: a NOP-In with both tags, which is a format error (7.7).
    NopBoth,
    /// `reject REASON`: a Reject of the command.
    Reject(u8),
    /// `stray`: a Data-In for a task that never was.
    Stray,
    /// `raw HEX`: bytes as they are; take no numbers.
    Raw(Vec<u8>),
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// `status CODE`: this SCSI status; the command is not carried out.
    Status(u8),
    /// `sense KEY CODE`: CHECK CONDITION with key and ASC/ASCQ; not carried out.
    Sense(SenseKey, u16),
    /// `deferred KEY CODE`: the same as a deferred error.
    Deferred(SenseKey, u16),
    /// `response CODE`: this iSCSI response with status GOOD; not carried out.
    Response(u8),
    /// `reject REASON`: a Reject in place of the answer; not carried out.
    Reject(u8),
    /// `pretend`: answered as usual, but not carried out.
    Pretend,
    /// `early`: a WRITE is answered GOOD before its data was asked for.
    Early,
    /// `refuse-early KEY CODE`: CHECK CONDITION before the data was asked for.
    RefuseEarly(SenseKey, u16),
    /// `short N`: the last N bytes of data are missing, the residual says so.
    Short(usize),
    /// `missing N`: the last N bytes of data are missing, and nothing says so.
    Missing(usize),
    /// `apart`: the status comes in a PDU of its own.
    Apart,
    /// `empty`: a Data-In without data comes first.
    Empty,
    /// `sense-length N`: SenseLength says so, whatever there is.
    SenseLength(u16),
    /// `segment N`: at most N bytes in each Data-In.
    Segment(usize),
    /// `burst N`: at most N bytes in each R2T.
    Burst(u32),
    /// `underflow N` / `overflow N`: this residual with the status.
    Residual(bool, u32),
    /// `drop PDU`.
    Drop(Which),
    /// `repeat PDU`.
    Repeat(Which),
    /// `swap PDU`: with the one behind it.
    Swap(Which),
    /// `cut PDU N`: the first N bytes of its data are not there; the rest stands where it belongs.
    Cut(Which, usize),
    /// `set PDU FIELD VALUE`.
    Set(Which, Field, u64),
    /// `add PDU FIELD VALUE`.
    Add(Which, Field, u64),
    /// `or PDU FIELD MASK`.
    Or(Which, Field, u64),
    /// `spoil-header PDU`: the header digest is wrong.
    SpoilHeader(Which),
    /// `spoil-data PDU`: the data digest is wrong (the data itself is too).
    SpoilData(Which),
    /// `first EXTRA` / `last EXTRA`: before or behind the answer.
    Insert(bool, Extra),
    /// `slow MS`: the answer comes later.
    Slow(Duration),
    /// `hang`: no answer, until `now release`. The command is carried out then, not before.
    Hang,
    /// `close`: FIN without an answer, not carried out; `reset`: RST.
    Close {
        /// By RST.
        reset: bool,
    },
    /// `close-after`: carried out and FIN without an answer.
    CloseUnanswered,
    /// `truncate N`: N bytes of the answer, then FIN.
    Truncate(usize),
    /// `stall`: the connection stays open, and nothing more is read or sent on it until `now thaw`.
    Stall,
    /// `resize BLOCKS`: the unit has another size before the command is looked at.
    Resize(u64),
    /// `window N`: MaxCmdSN is ExpCmdSN + N - 1 from here on; 0 closes the window.
    Window(u32),
    /// Login: `refuse CLASS DETAIL`.
    Refuse(u8, u8),
    /// Login: `redirect ADDRESS`, class 1.
    Redirect(String),
    /// Login: `text KEY=VALUE`, added to the response.
    Text(String),
    /// Login: `strip KEY`: the response says nothing of it.
    Strip(String),
    /// Task management: `respond CODE`.
    Respond(u8),
    /// Task management: `lie`: "function complete", but the task lives on and answers with `now release`.
    Lie,
    /// Text: `pieces BYTES`: the answer comes in PDUs of so many bytes, each of which has to be asked for.
    Pieces(usize),
    /// Logout: `keep-open`: no FIN behind the response.
    KeepOpen,
}

/// When a rule applies, counted from when it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    first: u32,
    last: u32,
}

/// A rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    event: Event,
    turns: Turns,
    seen: u32,
    action: Action,
}

impl Rule {
    /// Takes note of an event; the action, if it is its turn.
    pub fn turn(&mut self, event: Event) -> Option<Action> {
        if !self.event.covers(event) {
            return None;
        }
        self.seen += 1;
        (self.turns.first..=self.turns.last).contains(&self.seen).then(|| self.action.clone())
    }

    /// Whether it will never apply again.
    pub fn is_over(&self) -> bool {
        self.seen >= self.turns.last
    }
}

/// Settings; those of the login apply to logins to come.
#[derive(Clone, Debug)]
pub struct Options {
    /// `initial-r2t yes|no`.
    pub initial_r2t: bool,
    /// `immediate-data yes|no`.
    pub immediate_data: bool,
    /// `max-burst BYTES`.
    pub max_burst_bytes: u32,
    /// `first-burst BYTES`.
    pub first_burst_bytes: u32,
    /// `segment BYTES`: our MaxRecvDataSegmentLength.
    pub segment_bytes: u32,
    /// `max-r2t N`.
    pub max_r2t: u16,
    /// `window N`: size of the command window.
    pub window: u32,
    /// `group N`: TargetPortalGroupTag.
    pub group: u16,
    /// `apart yes|no`: status never in Data-In.
    pub apart: bool,
    /// `in-segment BYTES`: longest Data-In.
    pub in_segment_bytes: usize,
    /// `lun N`: number of the only unit.
    pub lun: u64,
    /// `depth N`: with so many answers still to come (see `slow`), further commands get TASK SET FULL; 0: no limit.
    pub depth: usize,
    /// `time2wait S`, of Logout Responses.
    pub time2wait_s: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            initial_r2t: false,
            immediate_data: true,
            max_burst_bytes: 65536,
            first_burst_bytes: 16384,
            segment_bytes: 8192,
            max_r2t: 4,
            window: 32,
            group: 1,
            apart: false,
            in_segment_bytes: 16384,
            lun: 0,
            depth: 0,
            time2wait_s: 0,
        }
    }
}

/// A line of a script.
#[derive(Clone, Debug)]
pub enum Line {
    /// Nothing.
    Empty,
    /// A rule.
    Rule(Rule),
    /// `option KEY VALUE`.
    Option(String, String),
    /// `now ACTION...`: its words.
    Now(Vec<String>),
}

/// Reads a line.
///
/// # Errors
/// It makes no sense.
pub fn line(text: &str) -> Result<Line> {
    let text = text.split_once('#').map_or(text, |(before, rest)| {
        // `read#2`: a number, no comment.
        if rest.starts_with(|c: char| c.is_ascii_digit()) && !before.ends_with(' ') { text } else { before }
    });
    let text = text.split_once(" #").map_or(text, |(before, _)| before).trim();
    let words: Vec<&str> = text.split_whitespace().collect();
    Ok(match words[..] {
        [] => Line::Empty,
        ["option", key, value] => Line::Option(key.into(), value.into()),
        ["now", ref rest @ ..] if !rest.is_empty() => Line::Now(rest.iter().map(|&w| w.into()).collect()),
        [event, ref rest @ ..] => {
            let (event, turns) = turns(event)?;
            let action = action(rest).with_context(|| format!("in {text:?}"))?;
            Line::Rule(Rule { event, turns, seen: 0, action })
        }
    })
}

fn turns(word: &str) -> Result<(Event, Turns)> {
    let named = |name| Event::parse(name).with_context(|| format!("no event {name:?}"));
    if let Some(name) = word.strip_suffix('*') {
        return Ok((named(name)?, Turns { first: 1, last: u32::MAX }));
    }
    let Some((name, range)) = word.split_once('#') else {
        return Ok((named(word)?, Turns { first: 1, last: 1 }));
    };
    let (first, last) = match range.split_once('-') {
        None => (range.parse()?, range.parse()?),
        Some((first, "")) => (first.parse()?, u32::MAX),
        Some((first, last)) => (first.parse()?, last.parse()?),
    };
    Ok((named(name)?, Turns { first, last }))
}

fn which(word: &str) -> Result<Which> {
    Ok(match word {
        "status" => Which::Status,
        _ if word.starts_with("data") => Which::Data(word[4..].parse()?),
        _ if word.starts_with("r2t") => Which::R2t(word[3..].parse()?),
        _ => bail!("no PDU {word:?}"),
    })
}

fn small<T: TryFrom<u64>>(word: &str) -> Result<T> {
    T::try_from(number(word)?).ok().with_context(|| format!("{word} is too large"))
}

fn sense(key: &str, code: &str) -> Result<(SenseKey, u16)> {
    Ok((SenseKey::from_bits(small(key)?), small(code)?))
}

/// Reads what is to be sent beside an answer.
///
/// # Errors
/// It makes no sense.
pub fn extra(words: &[&str]) -> Result<Extra> {
    Ok(match *words {
        ["async", event, ref rest @ ..] if rest.len() <= 3 => {
            let mut parameters = [0; 3];
            for (slot, word) in parameters.iter_mut().zip(rest) {
                *slot = small(word)?;
            }
            Extra::Async(small(event)?, parameters)
        }
        ["async-sense", key, code] => {
            let (key, code) = sense(key, code)?;
            Extra::AsyncSense(key, code)
        }
        ["nop", "none"] => Extra::Nop(u32::MAX),
        ["nop", ttt] => Extra::Nop(small(ttt)?),
        ["nop-both"] => Extra::NopBoth,
        ["reject", reason] => Extra::Reject(small(reason)?),
        ["stray"] => Extra::Stray,
        ["raw", bytes] => Extra::Raw(hex(bytes)?),
        _ => bail!("nothing to insert: {words:?}"),
    })
}

/// Reads an action.
///
/// # Errors
/// It makes no sense.
pub fn action(words: &[&str]) -> Result<Action> {
    Ok(match *words {
        ["status", code] => Action::Status(small(code)?),
        ["sense", key, code] => sense(key, code).map(|(k, c)| Action::Sense(k, c))?,
        ["deferred", key, code] => sense(key, code).map(|(k, c)| Action::Deferred(k, c))?,
        ["refuse-early", key, code] => sense(key, code).map(|(k, c)| Action::RefuseEarly(k, c))?,
        ["response", code] => Action::Response(small(code)?),
        ["reject", reason] => Action::Reject(small(reason)?),
        ["pretend"] => Action::Pretend,
        ["early"] => Action::Early,
        ["short", n] => Action::Short(small(n)?),
        ["missing", n] => Action::Missing(small(n)?),
        ["empty"] => Action::Empty,
        ["sense-length", n] => Action::SenseLength(small(n)?),
        ["apart"] => Action::Apart,
        ["segment", n] => Action::Segment(small(n)?),
        ["burst", n] => Action::Burst(small(n)?),
        ["underflow", n] => Action::Residual(false, small(n)?),
        ["overflow", n] => Action::Residual(true, small(n)?),
        ["drop", pdu] => Action::Drop(which(pdu)?),
        ["repeat", pdu] => Action::Repeat(which(pdu)?),
        ["swap", pdu] => Action::Swap(which(pdu)?),
        ["cut", pdu, n] => Action::Cut(which(pdu)?, small(n)?),
        ["set", pdu, field, value] => Action::Set(which(pdu)?, Field::parse(field)?, number(value)?),
        ["add", pdu, field, value] => Action::Add(which(pdu)?, Field::parse(field)?, number(value)?),
        ["or", pdu, field, value] => Action::Or(which(pdu)?, Field::parse(field)?, number(value)?),
        ["spoil-header", pdu] => Action::SpoilHeader(which(pdu)?),
        ["spoil-data", pdu] => Action::SpoilData(which(pdu)?),
        ["first", ref rest @ ..] => Action::Insert(true, extra(rest)?),
        ["last", ref rest @ ..] => Action::Insert(false, extra(rest)?),
        ["slow", ms] => Action::Slow(Duration::from_millis(number(ms)?)),
        ["hang"] => Action::Hang,
        ["close"] => Action::Close { reset: false },
        ["reset"] => Action::Close { reset: true },
        ["close-after"] => Action::CloseUnanswered,
        ["truncate", n] => Action::Truncate(small(n)?),
        ["stall"] => Action::Stall,
        ["resize", blocks] => Action::Resize(number(blocks)?),
        ["window", n] => Action::Window(small(n)?),
        ["refuse", class, detail] => Action::Refuse(small(class)?, small(detail)?),
        ["redirect", address] => Action::Redirect(address.into()),
        ["strip", key] => Action::Strip(key.into()),
        ["text", pair] => Action::Text(pair.into()),
        ["respond", code] => Action::Respond(small(code)?),
        ["lie"] => Action::Lie,
        ["pieces", n] => Action::Pieces(small(n)?),
        ["keep-open"] => Action::KeepOpen,
        _ => bail!("no action: {}", words.join(" ")),
    })
}

impl Options {
    /// Takes `option KEY VALUE`, if the key is one of the session's.
    ///
    /// # Errors
    /// The value makes no sense.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        let yes = || match value {
            "yes" => Ok(true),
            "no" => Ok(false),
            _ => bail!("{key} is yes or no"),
        };
        match key {
            "initial-r2t" => self.initial_r2t = yes()?,
            "immediate-data" => self.immediate_data = yes()?,
            "max-burst" => self.max_burst_bytes = small(value)?,
            "first-burst" => self.first_burst_bytes = small(value)?,
            "segment" => self.segment_bytes = small(value)?,
            "max-r2t" => self.max_r2t = small(value)?,
            "window" => self.window = small(value)?,
            "group" => self.group = small(value)?,
            "apart" => self.apart = yes()?,
            "in-segment" => self.in_segment_bytes = small(value)?,
            "lun" => self.lun = small(value)?,
            "depth" => self.depth = small(value)?,
            "time2wait" => self.time2wait_s = small(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

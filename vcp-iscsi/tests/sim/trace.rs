//! What happened, line by line; off unless a run is repeated to be looked at.

/// Lines, with the time of each.
#[derive(Debug, Default)]
pub struct Trace {
    pub on: bool,
    pub lines: Vec<String>,
    /// Told at once, for a run that does not end.
    pub live: bool,
}

impl Trace {
    pub fn line(&mut self, now_ns: u64, text: &str) {
        let line = format!("{:>14.6} ms  {text}", now_ns as f64 / 1e6);
        if self.live {
            println!("{line}");
        }
        self.lines.push(line);
    }
}

/// Adds a line if the trace is on; formats nothing otherwise.
macro_rules! trace {
    ($trace:expr, $now:expr, $($what:tt)*) => {
        if $trace.on {
            let text = format!($($what)*);
            $trace.line($now, &text);
        }
    };
}
pub(crate) use trace;

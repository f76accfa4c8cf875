//! `vcp top`: what running guests and their VCPs do, live. On a terminal it is a view that is drawn anew; anywhere else
//! it is plain rows, one after the other, for scripts and files.
//!
//! | module | is |
//! | --- | --- |
//! | `guests` | asks the monitors |
//! | [`view`] | what two answers say about the time between them |
//! | [`screen`] | the view on a terminal |
//! | [`rows`] | the same as rows |
//! | `terminal` | keys and drawing |

mod guests;
pub mod rows;
pub mod screen;
mod terminal;
#[cfg(test)]
mod testing;
pub mod view;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use self::guests::Guests;
use crate::signal;

/// `vcp top`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Example: all guests of a host, and the rows of ten seconds for a script
  vcp top -S /run/vcp
  vcp top -S /run/vcp/vm1.sock -n 10 | grep vcp

Keys: q quits, space stops and goes on, v hides the vCPUs, arrows and Page keys scroll.
Where the output is no terminal, each interval prints rows: time, guest, what it is, and name=value pairs.
Latencies are upper bounds: powers of two of nanoseconds. A dash is a number that is not known.")]
pub struct TopArgs {
    /// API socket of a monitor, or a directory with several; may be given several times
    #[arg(long = "api-socket", short = 'S', value_name = "PATH", required = true)]
    pub api_sockets: Vec<PathBuf>,
    /// Time between two looks, in seconds
    #[arg(long, short = 'd', value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub interval: Duration,
    /// End after so many intervals
    #[arg(long, short = 'n', value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Print rows also where the output is a terminal
    #[arg(long)]
    pub rows: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let good = |s: &f64| (0.1..=3600.0).contains(s);
    let seconds =
        text.parse::<f64>().ok().filter(good).ok_or("a number of seconds from 0.1 to 3600 is needed")?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Shows it until the user has seen enough, or all guests are gone.
///
/// # Errors
/// None of the monitors can be asked, or the terminal cannot be used.
pub fn run(args: &TopArgs) -> Result<()> {
    let mut guests = Guests::new(&args.api_sockets);
    guests.look()?;
    if !guests.any_answers() {
        // A directory without guests is no error where a view would wait for some.
        match guests.first_failure() {
            Some(failure) => bail!("{failure}"),
            None => bail!("there is no monitor's API socket in {}", args.api_sockets[0].display()),
        }
    }
    // SIGTERM and SIGINT end it in order: a terminal is left as it was.
    let signals = signal::install_end_handlers()?;
    if std::io::stdout().is_terminal() && !args.rows {
        return terminal::run(args, &mut guests);
    }
    let mut out = std::io::stdout().lock();
    for at in 0.. {
        if args.count.is_some_and(|count| at >= count) || signal::wait(&signals, args.interval)? {
            break;
        }
        guests.look()?;
        let text = rows::rows(&guests.views(), &clock(), at == 0);
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => break,
            other => other?,
        }
        if !guests.any_answers() {
            break;
        }
    }
    Ok(())
}

/// The time of day, in UTC.
fn clock() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let day = now.as_secs() % 86_400;
    format!("{:02}:{:02}:{:02}Z", day / 3600, day / 60 % 60, day % 60)
}

/// A moment and what was known then.
#[derive(Clone, Debug)]
pub struct Look {
    /// When.
    pub at: Instant,
    /// What.
    pub status: crate::api::types::GuestStatus,
}

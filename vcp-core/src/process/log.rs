//! Logging to standard error, with a level that can change while the process runs.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a log filter: use error, warn, info, debug, trace, or a filter such as vcp_core=debug,warn"
)]
pub struct LogError(String);

static FORMAT: OnceLock<LogFormat> = OnceLock::new();
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, coloured on a terminal.
    #[default]
    Text,
    /// One JSON object a line: `timestamp`, `level`, `target`, and the fields of the event, `message` among them.
    Json,
}

/// Names the format for processes that have no option for it: `json` or `text`. A monitor sets it for its VCPs, so that
/// what comes out of its standard error is of one kind.
pub const LOG_FORMAT_VARIABLE: &str = "VCP_LOG_FORMAT";

/// Sets logging up: `level` (`--log`) before `RUST_LOG` before `warn`, in the format that [`LOG_FORMAT_VARIABLE`] names.
/// A second call changes nothing.
///
/// # Errors
/// [`LogError`]: not a filter.
pub fn init_log(level: Option<&str>) -> Result<(), LogError> {
    let is_json = std::env::var_os(LOG_FORMAT_VARIABLE).is_some_and(|format| format == "json");
    init_log_as(level, if is_json { LogFormat::Json } else { LogFormat::Text })
}

/// The same in a given format.
///
/// # Errors
/// [`LogError`]: not a filter.
pub fn init_log_as(level: Option<&str>, format: LogFormat) -> Result<(), LogError> {
    let wanted = level.map(str::to_owned).or_else(|| std::env::var("RUST_LOG").ok());
    let filter = parse(wanted.as_deref().unwrap_or("warn"))?;
    let (layer, handle) = reload::Layer::new(filter);
    let output = fmt::layer().with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry().with(layer);
    let done = match format {
        LogFormat::Text => registry.with(output.with_ansi(std::io::stderr().is_terminal())).try_init(),
        LogFormat::Json => registry.with(output.json().flatten_event(true)).try_init(),
    };
    if done.is_ok() {
        let _ = FILTER.set(handle);
        let _ = FORMAT.set(format);
    }
    Ok(())
}

/// The format that logging was set up with.
pub fn log_format() -> LogFormat {
    FORMAT.get().copied().unwrap_or_default()
}

/// Changes the level of a process whose logging was set up by [`init_log`].
///
/// # Errors
/// A line that says what is wrong.
pub fn set_log_level(level: &str) -> Result<(), String> {
    let filter = parse(level).map_err(|error| error.to_string())?;
    let handle = FILTER.get().ok_or("logging is not set up")?;
    handle.reload(filter).map_err(|error| error.to_string())
}

fn parse(text: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder().parse(text).map_err(|_| LogError(text.to_owned()))
}

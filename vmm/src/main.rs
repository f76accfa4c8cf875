//! The command `vcp`: reads options, sets up logging, calls the library, prints errors as one line.

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use tracing_subscriber::EnvFilter;
use vmm::cli::{Cli, Command};

/// Wrong usage, as clap exits.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    let filter = match &cli.log {
        Some(level) => EnvFilter::try_new(level),
        None => EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new("warn")),
    };
    let filter = match filter {
        Ok(filter) => filter,
        Err(e) => {
            eprintln!("vcp: --log: {e}: write error, warn, info, debug or trace");
            return ExitCode::from(USAGE);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    let result = match cli.command {
        Command::Run(args) => vmm::machine::run(&args).map_err(anyhow::Error::from),
        Command::Check(args) => vmm::check::run(&args).map_err(anyhow::Error::from),
        Command::Bench(args) => vmm::bench::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vcp: {}", vmm::chain(e.as_ref()));
            let usage = e.downcast_ref::<vmm::Error>().is_some_and(vmm::Error::is_usage);
            if usage { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}

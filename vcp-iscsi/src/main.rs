//! `vcp-iscsi`: see `vcp-iscsi --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;
use vcp_core::process::{Signals, chain, init_log};
use vcp_iscsi::cli::{Cli, Command, parse};
use vcp_iscsi::{discover, info, serve};

fn main() -> ExitCode {
    match run(parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vcp-iscsi: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    init_log(cli.log.as_deref()).unwrap_or_else(|error| usage(&error.to_string()));
    match cli.command {
        Command::Serve(args) => {
            let disks = args.disks().unwrap_or_else(|error| usage(&error));
            // Before any thread is started.
            let signals = Signals::block()?;
            serve::run(&args, disks, &signals)
        }
        Command::Discover(args) => discover::run(&args),
        Command::Info(args) => info::run(&args),
    }
}

/// Wrong usage that `clap` cannot see.
fn usage(message: &str) -> ! {
    Cli::command().error(ErrorKind::ValueValidation, message).exit()
}

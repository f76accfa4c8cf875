//! `vcp-net`: see `vcp-net --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use vcp_core::handover::{anchor, upgrade};
use vcp_core::process::{Signals, chain, init_log};
use vcp_core::vu::End;
use vcp_net::cli::{Cli, Command};
use vcp_net::handover::take_over;
use vcp_net::serve;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vcp-net: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    init_log(cli.log.as_deref()).unwrap_or_else(|error| usage(&error.to_string()));
    match cli.command {
        Command::Serve(mut args) => {
            args.check().unwrap_or_else(|error| usage(&error));
            // Before any thread is started.
            let signals = Signals::block()?;
            let end = serve::run(&args, cli.log.as_deref(), &signals)?;
            ended(end, &signals)
        }
        Command::TakeOver(args) => {
            let signals = Signals::block()?;
            let end = take_over::run(&args, cli.log.as_deref(), &signals)?;
            ended(end, &signals)
        }
        Command::Upgrade(args) => {
            upgrade::run(&args, "vcp-net")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The end of a server, or its rest as the anchor of the process that took over.
fn ended(end: End, signals: &Signals) -> anyhow::Result<ExitCode> {
    match end {
        End::HandedOver(Some(lifeline)) => {
            let well = anchor::hold(lifeline, signals)?;
            Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        End::Signal | End::HandedOver(None) => Ok(ExitCode::SUCCESS),
    }
}

/// Wrong usage that `clap` cannot see.
fn usage(message: &str) -> ! {
    Cli::command().error(ErrorKind::ValueValidation, message).exit()
}

//! `vcp-iscsi`: see `vcp-iscsi --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;
use vcp_core::handover::anchor;
use vcp_core::handover::upgrade;
use vcp_core::process::{Signals, chain, init_log};
use vcp_core::vu::End;
use vcp_iscsi::cli::{Cli, Command, parse};
use vcp_iscsi::handover::take_over;
use vcp_iscsi::{dial, discover, info, serve};

fn main() -> ExitCode {
    match run(parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vcp-iscsi: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    init_log(cli.log.as_deref()).unwrap_or_else(|error| usage(&error.to_string()));
    if cli.shows_a_password() {
        tracing::warn!(
            "the password in the URL shows in the process list; give --chap-secret-file, or --url-file to serve"
        );
    }
    match cli.command {
        Command::Serve(args) => {
            let disks = args.disks().unwrap_or_else(|error| usage(&error));
            // Before any thread is started.
            let signals = Signals::block()?;
            let end = serve::run(&args, disks, cli.log.as_deref(), &signals)?;
            return ended(end, &signals);
        }
        Command::TakeOver(args) => {
            let signals = Signals::block()?;
            let end = take_over::run(&args, cli.log.as_deref(), &signals)?;
            return ended(end, &signals);
        }
        Command::Upgrade(args) => upgrade::run(&args, "vcp-iscsi")?,
        Command::Dial(args) => dial::server::run(&args)?,
        Command::Discover(args) => discover::run(&args)?,
        Command::Info(args) => info::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
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

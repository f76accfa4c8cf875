//! The command `vcp`: reads options, sets up logging, calls the library, prints errors as one line.

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use vcp_core::process::{LogFormat, init_log_as};
use vmm::cli::{Cli, Command};

/// Wrong usage, as clap exits.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vcp: {}", vmm::chain(e.as_ref()));
            let usage = e.downcast_ref::<vmm::Error>().is_some_and(vmm::Error::is_usage);
            if usage || vmm::ctl::is_usage(&e) { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let init_log = |level: Option<&str>, json: bool| {
        let format = if json { LogFormat::Json } else { LogFormat::Text };
        init_log_as(cli.log.as_deref().or(level), format)
            .map_err(|e| vmm::Error::Usage(format!("--log: {e}")))
    };
    if let Command::Run(args) = cli.command {
        // Before logging: the file may say how.
        let mut config = args.config()?;
        config.log = cli.log.clone().or(config.log);
        config.log_json |= cli.log_json;
        if args.print_config {
            print!("{}", config.to_toml()?);
            return Ok(());
        }
        let from_file = config.log.as_deref().filter(|_| std::env::var_os("RUST_LOG").is_none());
        init_log(from_file, config.log_json)?;
        return Ok(vmm::machine::run(config)?);
    }
    init_log(None, cli.log_json)?;
    match cli.command {
        Command::Ctl(args) => vmm::ctl::run(&args),
        Command::Top(args) => vmm::top::run(&args),
        Command::Check(args) => Ok(vmm::check::run(&args)?),
        Command::Bench(args) => vmm::bench::run(args),
        Command::Run(_) => Ok(()),
    }
}

//! `bad-target`: an iSCSI target that misbehaves by a script; see `vcp_tests::bad_target` for the language.

use std::io::Read;

use anyhow::{Context, Result};

const USAGE: &str = "\
An iSCSI target in memory that misbehaves by a script, for tests of initiators.

Usage: bad-target [--script TEXT | FILE | -]

It prints `ready: portal=ADDR control=ADDR` and takes further lines of script on the control address.

Example: bad-target --script 'read#2 add data1 data-sn 1'
";

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let script = match words[..] {
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return 0.into();
        }
        [] => Ok(String::new()),
        ["--script", text] => Ok(text.to_owned()),
        ["-"] => stdin(),
        [file] if !file.starts_with('-') => {
            std::fs::read_to_string(file).with_context(|| format!("cannot read the script {file}"))
        }
        _ => {
            eprintln!("bad-target: wrong usage; try --help");
            return 2.into();
        }
    };
    match script.and_then(|script| vcp_tests::bad_target::run(&script)) {
        Ok(()) => 0.into(),
        Err(error) => {
            eprintln!("bad-target: {error:#}");
            1.into()
        }
    }
}

fn stdin() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

//! `soak msgq`: either side of a message queue is killed at random points against a ledger, a peer scribbles over all that
//! it may write, floods descriptors, attacks bells and seals; and the same under AddressSanitizer.

use anyhow::Result;

use crate::cmd;

/// How long.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask soak msgq --kills 10000 --asan")]
pub(crate) struct Args {
    /// Kills
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    kills: u64,
    /// Peers that scribble, 20 ms each
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    scribblers: u64,
    /// Seed of the moments, of who is killed and of what is scribbled
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Run the unit tests, the scribbler and the kills under AddressSanitizer as well (with a tenth of both)
    #[arg(long)]
    asan: bool,
}

/// The instrumented build needs a flag that stable rustc refuses without this.
const BOOTSTRAP: (&str, &str) = ("RUSTC_BOOTSTRAP", "1");
/// With a target given, build scripts and macros are built without the sanitizer.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Runs it.
///
/// # Errors
/// Something was lost, done twice without a mark, or read outside.
pub(crate) fn run(args: &Args) -> Result<()> {
    let extent = |part: u64| {
        [
            ("MSGQ_KILLS", (args.kills / part).to_string()),
            ("MSGQ_ROUNDS", (args.scribblers / part).to_string()),
            ("MSGQ_SEED", args.seed.to_string()),
        ]
    };
    // The attacks on set-up, bells and seals are among the unit tests.
    let tests = ["--lib", "--test", "scribbler", "--test", "kill", "--", "--nocapture"];
    if args.asan {
        let mut test = cmd::cargo();
        test.args(["test", "-p", "msgq", "--target", TARGET]);
        test.arg("--target-dir").arg(cmd::target_dir().join("asan"));
        test.args(tests).envs(extent(10)).env(BOOTSTRAP.0, BOOTSTRAP.1);
        cmd::run(test.env("RUSTFLAGS", "-Zsanitizer=address"))?;
    }
    let mut test = cmd::cargo();
    test.args(["test", "--release", "-p", "msgq"]).args(tests);
    cmd::run(test.envs(extent(1)))
}

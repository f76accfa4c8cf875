//! Builds guest images and runs scripts in the helper VM from the command line.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use guest_images::helper::HelperVm;
use guest_images::linux::Initramfs;
use guest_images::modules::Kernel;
use guest_images::rootfs::RootFs;
use guest_images::tree::Tree;
use guest_images::{bare, cache};

/// Builds guests and runs scripts in the helper VM.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  guest-images build rootfs --out root.ext4 --size 256M --fio\n  \
                  guest-images build bare --out guest.elf\n  \
                  guest-images helper --script job.sh --file target/release/vcp"
)]
struct Args {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Builds an image and writes it to a file
    #[command(subcommand)]
    Build(Build),
    /// Runs a script in the helper VM (emulated CPU with working /dev/kvm) and exits with its status
    #[command(
        after_help = "Example:\n  guest-images helper --script job.sh --file /usr/bin/fio --module iscsi_tcp"
    )]
    Helper(Helper),
}

#[derive(Debug, Subcommand)]
enum Build {
    /// The bare-metal guest, an ELF file for `vcp run --kernel`
    #[command(after_help = "Example:\n  guest-images build bare --out guest.elf")]
    Bare {
        /// Where to write it
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// The initramfs for Debian's cloud kernel
    #[command(after_help = "Example:\n  guest-images build initramfs --out initramfs.cpio --job job.sh")]
    Initramfs {
        /// Where to write it
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Shell script to run where the kernel command line names no root= and no job
        #[arg(long, value_name = "FILE")]
        job: Option<PathBuf>,
        /// Program or file of this host to put in, with its libraries, at the same path; may be repeated
        #[arg(long, value_name = "FILE")]
        file: Vec<PathBuf>,
    },
    /// An ext4 root file system image
    #[command(after_help = "Example:\n  guest-images build rootfs --out root.ext4 --size 256M --fio")]
    Rootfs {
        /// Where to write it
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Size of the image (K, M, G: powers of 1024)
        #[arg(long, default_value = "128M", value_parser = parse_size)]
        size: u64,
        /// Shell script to run instead of a shell on the console
        #[arg(long, value_name = "FILE")]
        job: Option<PathBuf>,
        /// Put fio in
        #[arg(long)]
        fio: bool,
        /// Program or file of this host to put in, with its libraries, at the same path; may be repeated
        #[arg(long, value_name = "FILE")]
        file: Vec<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
struct Helper {
    /// Shell script to run as root in the machine
    #[arg(long, value_name = "FILE")]
    script: PathBuf,
    /// Program or file of this host to put in, with its libraries, at the same path; may be repeated
    #[arg(long, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Kernel module to insert, with those it needs; may be repeated
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// Raw image to attach as a virtio disk, writable; may be repeated
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// Memory in MiB
    #[arg(long, default_value_t = 3072, value_name = "MIB")]
    memory_mib: u32,
    /// Seconds after which the machine is killed
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    deadline: u64,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("guest-images: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Task::Build(build) => run_build(build).map(|()| ExitCode::SUCCESS),
        Task::Helper(helper) => run_helper(&helper),
    }
}

fn run_build(build: Build) -> Result<()> {
    match build {
        Build::Bare { out } => copy(&bare::build()?, &out),
        Build::Initramfs { out, job, file } => {
            let mut image = Initramfs::new().tree(&programs(&file)?);
            if let Some(job) = job {
                image = image.job(&read(&job)?)?;
            }
            copy(&image.build(&Kernel::find()?)?, &out)
        }
        Build::Rootfs { out, size, job, fio, file } => {
            let mut image = RootFs::new().size_bytes(size).tree(&programs(&file)?);
            if let Some(job) = job {
                image = image.job(&read(&job)?)?;
            }
            if fio {
                image = image.fio()?;
            }
            image.build_to(&out)?;
            println!("{}", out.display());
            Ok(())
        }
    }
}

fn run_helper(args: &Helper) -> Result<ExitCode> {
    let script = read(&args.script)?;
    let mut vm =
        HelperVm::new().memory_mib(args.memory_mib).deadline(Duration::from_secs(args.deadline)).echo(true);
    for file in &args.file {
        vm = vm.program(file)?;
    }
    for module in &args.module {
        vm = vm.module(module);
    }
    for disk in &args.disk {
        vm = vm.disk(disk);
    }
    let done = vm.run(&script)?;
    Ok(ExitCode::from(u8::try_from(done.status).unwrap_or(1)))
}

fn programs(files: &[PathBuf]) -> Result<Tree> {
    let mut tree = Tree::new();
    for file in files {
        let path = std::path::absolute(file).with_context(|| format!("cannot find {}", file.display()))?;
        let at = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
        tree.program(at, &path)?;
    }
    Ok(tree)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    cache::copy_sparse(from, to)?;
    println!("{}", to.display());
    Ok(())
}

/// Parses a size in bytes with an optional K, M, G or T (powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size such as 128M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("128M"), Ok(128 << 20));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(parse_size("M").is_err());
        assert!(parse_size("99999999999T").is_err());
    }

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}

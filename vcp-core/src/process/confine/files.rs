//! Landlock: the file system, TCP ports and signals (kernel 5.13 and later; what a kernel does not know is reported).

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::{Confinement, Report};

/// The newest interface that was looked through for this: later rights are not restricted by surprise.
const KNOWN: ABI = ABI::V6;

pub(super) fn apply(confinement: &Confinement, report: &mut Report) {
    match restrict(confinement) {
        Ok(RulesetStatus::FullyEnforced) => report.done.push("files, ports and signals (Landlock)"),
        Ok(RulesetStatus::PartiallyEnforced) => {
            report.done.push("files (Landlock)");
            report.missing.push("ports and signals (Landlock): this kernel's Landlock is too old".into());
        }
        Ok(RulesetStatus::NotEnforced) => {
            report.missing.push("files, ports and signals (Landlock): this kernel has no Landlock".into());
        }
        Err(error) => report.missing.push(format!("files, ports and signals (Landlock): {error}")),
    }
}

fn restrict(confinement: &Confinement) -> Result<RulesetStatus, RulesetError> {
    let files = AccessFs::from_all(KNOWN);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let remove = BitFlags::from(AccessFs::RemoveFile);
    let write = read | remove | AccessFs::MakeReg | AccessFs::WriteFile | AccessFs::Truncate;
    let mut rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(files)?;
    if !confinement.listens {
        // Connections go wherever targets are and redirect to. Nothing is listened on from here on.
        rules = rules.handle_access(AccessNet::BindTcp)?;
    }
    if !confinement.network {
        rules = rules.handle_access(AccessNet::ConnectTcp)?;
    }
    let rules = rules.scope(Scope::AbstractUnixSocket | Scope::Signal)?.create()?;
    let rules = add(rules, &confinement.read, read)?;
    let rules = add(rules, &confinement.remove, remove)?;
    let rules = add(rules, &confinement.write, write)?;
    Ok(rules.restrict_self()?.ruleset)
}

/// Adds what exists of `paths`.
fn add(
    mut rules: RulesetCreated,
    paths: &[PathBuf],
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    for path in paths {
        let Ok(fd) = PathFd::new(path) else { continue };
        // Of a file, only the rights that a file can have.
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(KNOWN) };
        rules = rules.add_rule(PathBeneath::new(fd, access))?;
    }
    Ok(rules)
}

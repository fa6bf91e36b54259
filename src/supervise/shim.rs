//! Finds the terraform behind a shim: a program that only leads to a terraform, such as tenv or a script.
//!
//! A shim that gets the one interrupt in place of terraform does with it what it likes. tenv discards it, because it
//! expects the terminal to have sent one to terraform as well. Others pass it on, or die of it. So the interrupt is
//! sent to terraform itself.

use std::os::fd::OwnedFd;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::sys::process::{self, Process};
use crate::terraform::binary::MIN_TERRAFORM_BYTES;
use crate::trace::trace;

/// The maximum length of a chain of shims.
const MAX_SHIM_DEPTH: usize = 8;

/// The device and the inode number of the file that terraform logs into. `None` if they are not known.
pub(crate) type LogFile = Option<(u64, u64)>;

/// Sends `signal` to the terraform that `child` is or leads to. If none can be identified, `child` gets the signal.
pub(crate) fn signal(child: Pid, signal: Signal, log: LogFile) {
    match behind(child, log) {
        Some((pid, terraform)) => {
            trace!("{signal} goes to {pid}, behind {child}");
            let _ = process::signal(&terraform, signal);
        }
        None => {
            let _ = kill(child, signal);
        }
    }
}

/// Sends the one interrupt of a first stop to the process group of `child`, and to that of the terraform behind it,
/// which a shim may have put into another group (timeout, `set -m`). The shims that lead to terraform do not get it:
/// what one of them passes on would be terraform's second interrupt.
///
/// Returns the terraform that was interrupted. `None` if no terraform behind `child` can be identified, because `child`
/// is a terraform itself, or has not started one. Then the whole group of `child` gets the interrupt.
pub(crate) fn interrupt_group(child: Pid, log: LogFile) -> Option<Pid> {
    let found = behind(child, log).map(|(terraform, _)| terraform);
    let Some((terraform, chain)) = found.and_then(|terraform| Some((terraform, chain(child, terraform)?))) else {
        let _ = killpg(child, Signal::SIGINT);
        return None;
    };
    let all = Process::all();
    let group = all.iter().find(|process| process.pid == terraform).map_or(child, |process| process.group);
    let members = all.iter().filter(|process| [child, group].contains(&process.group) && !process.is_dead());
    for process in members.filter(|process| !chain.contains(&process.pid)) {
        trace!("SIGINT goes to {}, behind {child}", process.pid);
        let _ = kill(process.pid, Signal::SIGINT);
    }
    Some(terraform)
}

/// Returns the pids of the shims from the one that started `terraform` up to `child`. `None` if one of them no longer
/// exists, or if there are too many.
fn chain(child: Pid, terraform: Pid) -> Option<Vec<Pid>> {
    let mut chain = Vec::new();
    let mut current = terraform;
    for _ in 0..=MAX_SHIM_DEPTH {
        current = Process::look_up(current)?.parent;
        chain.push(current);
        if current == child {
            return Some(chain);
        }
    }
    None
}

/// Returns the pid of the terraform behind `child`, and a descriptor of that process. `None` if `child` is a terraform
/// itself, or if it is not certain which process is the terraform.
pub(crate) fn behind(child: Pid, log: LogFile) -> Option<(Pid, OwnedFd)> {
    let mut current = child;
    let is_terraform = |process: &Process| is_terraform(process, log);
    if Process::look_up(child).is_none_or(|child| is_terraform(&child)) {
        return None;
    }
    for _ in 0..MAX_SHIM_DEPTH {
        let children: Vec<Process> = Process::children(current).into_iter().filter(|child| !child.is_dead()).collect();
        let terraforms: Vec<Pid> = children.iter().filter(|child| is_terraform(child)).map(|child| child.pid).collect();
        match (terraforms.as_slice(), children.as_slice()) {
            ([terraform], _) => {
                let descriptor = process::open_pidfd(*terraform).ok()?;
                // It must still be the process that was found, and not another one with the same pid.
                let same = |process: &Process| process.parent == current && is_terraform(process);
                return Process::look_up(*terraform).filter(same).map(|_| (*terraform, descriptor));
            }
            ([], [only]) => current = only.pid,
            _ => return None,
        }
    }
    None
}

/// Whether the process runs a terraform, and not a program that only leads to one. The size of its program is not
/// enough: node, vault and kubectl are as large. A terraform also has its name, or has this run's log file open.
fn is_terraform(process: &Process, log: LogFile) -> bool {
    let is_large = std::fs::metadata(format!("/proc/{}/exe", process.pid))
        .is_ok_and(|program| program.len() >= MIN_TERRAFORM_BYTES);
    let is_named = || ["terraform", "tofu"].iter().any(|name| process.program().contains(name));
    is_large && (is_named() || log.is_some_and(|log| process.has_open(log)))
}

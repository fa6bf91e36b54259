//! Finds the terraform behind a shim. A shim is a program that starts terraform, such as tenv or a script.
//!
//! If a shim got the one interrupt, terraform might not get it. tenv discards an interrupt, because it assumes that the
//! terminal has sent one to terraform as well. Other shims pass the interrupt on, or are killed by it. So `tf` sends
//! the interrupt to terraform itself.

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::sys::file_id::FileId;
use crate::sys::process::{Process, ProcessHandle};
use crate::terraform::binary::MIN_TERRAFORM_BYTES;
use crate::trace::trace;

/// The maximum number of shims between `tf` and terraform.
const MAX_SHIM_DEPTH: usize = 8;

/// The file that terraform logs into. `None` if it is unknown.
pub(crate) type LogFile = Option<FileId>;

/// Sends `signal` to the terraform behind the shim `child`. If `child` is terraform itself, or no terraform can be
/// identified, sends `signal` to `child`.
pub(crate) fn signal(child: Pid, signal: Signal, log: LogFile) {
    match behind(child, log) {
        Some((pid, terraform)) => {
            trace!("{signal} goes to {pid}, behind {child}");
            let _ = terraform.signal(signal);
        }
        None => {
            let _ = kill(child, signal);
        }
    }
}

/// Sends the one interrupt of a first stop to the process group of `child`, and to the process group of the terraform
/// behind `child`. A shim may have put that terraform into another group (timeout, `set -m`). `child` and the other
/// shims above terraform do not get the interrupt: if one of them passed it on, terraform would get a second interrupt.
///
/// Returns the terraform that was interrupted. `None` if no terraform behind `child` can be identified, for example
/// because `child` is terraform itself, or has not started terraform yet. In this case, the whole group of `child` gets
/// the interrupt.
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

/// Returns the pids of the shims, from the parent of `terraform` up to `child`. `None` if one of them has exited, or if
/// there are more than [`MAX_SHIM_DEPTH`] + 1.
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

/// Returns the pid of the terraform behind `child`, and a handle of that process. `None` if `child` is terraform itself
/// or has exited, or if the terraform cannot be identified with certainty.
pub(crate) fn behind(child: Pid, log: LogFile) -> Option<(Pid, ProcessHandle)> {
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
                let descriptor = ProcessHandle::open(*terraform).ok()?;
                // Checks that the pid still belongs to the process that was found.
                let same = |process: &Process| process.parent == current && is_terraform(process);
                return Process::look_up(*terraform).filter(same).map(|_| (*terraform, descriptor));
            }
            ([], [only]) => current = only.pid,
            _ => return None,
        }
    }
    None
}

/// Returns whether the process runs terraform and not a shim. The size of the program alone does not prove that it is
/// terraform: node, vault and kubectl are as large. The program must also have terraform's name, or the process must
/// have this run's log file open.
fn is_terraform(process: &Process, log: LogFile) -> bool {
    let is_named = || ["terraform", "tofu"].iter().any(|name| process.program().contains(name));
    process.has_large_program(MIN_TERRAFORM_BYTES) && (is_named() || log.is_some_and(|log| process.has_open(log)))
}

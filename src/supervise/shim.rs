//! The terraform behind a program that only leads to one: tenv, a script of somebody's own. Such a program hears our one
//! interrupt in terraform's place, and what becomes of it there is its own affair: tenv throws it away, for it expects that
//! the terminal has sent one to terraform as well; others pass it on, or die of it. So it goes to terraform itself.

use std::os::fd::OwnedFd;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::sys::process::{self, Process};
use crate::terraform::binary::LARGE;
use crate::trace::trace;

/// No chain of shims is longer.
const MAX_SHIM_DEPTH: usize = 8;

/// The file that terraform logs into, by its device and its number there. `None` where it has none.
pub(crate) type LogFile = Option<(u64, u64)>;

/// Sends `signal` to the terraform that `child` is or leads to.
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

/// Sends the one interrupt of a first stop to the group of `child`, and to that of the terraform behind it, which a shim may
/// have put into another one (timeout, `set -m`); but not to the shims that lead to terraform: what one of them passes on would
/// be terraform's second. Gives the terraform that was interrupted. `None`: what was started is terraform itself, or has not
/// started one.
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

/// The shims from `child` down to the one that started `terraform`. `None` when one of them is gone.
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

/// The terraform behind `child`, and its number. `None` where `child` is one itself, or where nothing tells for sure which one
/// is meant.
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
                // Still the one that was seen, and not another with its number.
                let same = |process: &Process| process.parent == current && is_terraform(process);
                return Process::look_up(*terraform).filter(same).map(|_| (*terraform, descriptor));
            }
            ([], [only]) => current = only.pid,
            _ => return None,
        }
    }
    None
}

/// Whether a process runs a terraform, and nothing that only leads to one. Its size alone does not tell: node, vault and kubectl
/// are as large. A terraform has its name, or logs into our file.
fn is_terraform(process: &Process, log: LogFile) -> bool {
    let is_large = std::fs::metadata(format!("/proc/{}/exe", process.pid)).is_ok_and(|program| program.len() >= LARGE);
    let is_named = || ["terraform", "tofu"].iter().any(|name| process.program().contains(name));
    is_large && (is_named() || log.is_some_and(|log| process.has_open(log)))
}

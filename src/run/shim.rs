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
const DEEPEST: usize = 8;

/// Sends `signal` to the terraform that `child` is or leads to.
pub(crate) fn signal(child: Pid, signal: Signal) {
    match behind(child) {
        Some((pid, terraform)) => {
            trace!("{signal} goes to {pid}, behind {child}");
            let _ = process::signal(&terraform, signal);
        }
        None => {
            let _ = kill(child, signal);
        }
    }
}

/// Sends the one interrupt of a first stop to the group of `child`, but not to the shims that lead to terraform: what one of
/// them passes on would be terraform's second.
pub(crate) fn interrupt_group(child: Pid) {
    let Some(chain) = chain(child) else {
        // What was started is terraform itself, or has not started one yet.
        let _ = killpg(child, Signal::SIGINT);
        return;
    };
    let members = Process::all().into_iter().filter(|process| process.group == child && !process.is_dead());
    for process in members.filter(|process| !chain.contains(&process.pid)) {
        trace!("SIGINT goes to {}, behind {child}", process.pid);
        let _ = kill(process.pid, Signal::SIGINT);
    }
}

/// The shims from `child` down to the one that started terraform. `None` as in [`behind`].
fn chain(child: Pid) -> Option<Vec<Pid>> {
    let (terraform, _) = behind(child)?;
    let mut chain = Vec::new();
    let mut current = terraform;
    for _ in 0..=DEEPEST {
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
pub(crate) fn behind(child: Pid) -> Option<(Pid, OwnedFd)> {
    let mut current = child;
    if is_terraform(current) {
        return None;
    }
    for _ in 0..DEEPEST {
        let children: Vec<Process> = Process::children(current).into_iter().filter(|child| !child.is_dead()).collect();
        let terraforms: Vec<Pid> = children.iter().map(|child| child.pid).filter(|pid| is_terraform(*pid)).collect();
        match (terraforms.as_slice(), children.as_slice()) {
            ([terraform], _) => {
                let descriptor = process::watch_end(*terraform).ok()?;
                // Still the one that was seen, and not another with its number.
                let same = Process::look_up(*terraform).is_some_and(|process| process.parent == current);
                return (same && is_terraform(*terraform)).then_some((*terraform, descriptor));
            }
            ([], [only]) => current = only.pid,
            _ => return None,
        }
    }
    None
}

/// Whether a process runs a terraform, and nothing that only leads to one.
pub(crate) fn is_terraform(pid: Pid) -> bool {
    std::fs::metadata(format!("/proc/{pid}/exe")).is_ok_and(|program| program.len() >= LARGE)
}

//! Which machine, which boot of it and which view of its processes a run belonged to: whether what we see from here can
//! prove that it is dead.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sys::{filesystem, process};

/// Where something ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Host {
    /// machine-id(5); none in many containers.
    machine: Option<String>,
    /// `/proc/sys/kernel/random/boot_id`: another after each boot, and the same in every container of one.
    boot: Option<String>,
    /// The pid namespace, and whether it is the machine's first.
    processes: Option<(u64, bool)>,
    /// The file system of the journal.
    filesystem: u64,
}

/// What can be said about a run on `Host` from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standpoint {
    /// It ran since this machine started, and its processes are to be seen from here.
    ThisBoot,
    /// This machine was started anew since: nothing of it can be alive.
    EarlierBoot,
    /// Nothing that is seen from here proves anything.
    Foreign(&'static str),
}

impl Host {
    /// The one that we are on; `journal` is a directory on the journal's file system.
    pub(crate) fn here(journal: &Path) -> Self {
        let line = |path| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let is_id = |id: &String| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        Self {
            machine: line("/etc/machine-id").filter(is_id),
            boot: line("/proc/sys/kernel/random/boot_id").filter(|id| !id.is_empty()),
            processes: process::pid_namespace(),
            filesystem: filesystem::identity(journal),
        }
    }

    /// Whether a pid of a run on `self` means the same process to us, `here`.
    pub(crate) fn numbers_processes_as(&self, here: &Self) -> bool {
        self.processes == here.processes
    }

    /// The pid namespace of a run on `self`, where that was not the machine's first. None as well where it is not known.
    pub(crate) fn container(&self) -> Option<u64> {
        self.processes.filter(|(_, first)| !first).map(|(namespace, _)| namespace)
    }

    /// How a run on `self` looks from `here`.
    ///
    /// The same boot: its processes must be in our pid namespace, or below it. The number of a namespace comes again, but
    /// only when the old one is gone with all its processes. Another boot: only this very machine started anew can be
    /// meant, and a machine-id is one only outside of containers, whose images carry theirs from host to host.
    pub(crate) fn seen_from(&self, here: &Self) -> Standpoint {
        if self.machine != here.machine {
            return Standpoint::Foreign("it ran on another machine");
        }
        let (Some(then), Some(now)) = (&self.boot, &here.boot) else {
            return Standpoint::Foreign("this system does not tell one boot from the next");
        };
        if then == now {
            return match (self.processes, here.processes) {
                (_, Some((_, true))) => Standpoint::ThisBoot,
                (Some((then, _)), Some((now, _))) if then == now => Standpoint::ThisBoot,
                _ => Standpoint::Foreign("it ran in another container, whose processes are not to be seen from here"),
            };
        }
        let first = |host: &Self| host.processes.is_some_and(|(_, first)| first);
        if self.machine.is_none() {
            Standpoint::Foreign("it ran before a restart, on a machine without a machine-id")
        } else if !first(self) || !first(here) {
            Standpoint::Foreign("it ran before a restart, in a container that may live on elsewhere")
        } else if self.filesystem == 0 || self.filesystem != here.filesystem {
            Standpoint::Foreign("it ran before a restart, with its journal on another file system")
        } else {
            Standpoint::EarlierBoot
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            machine: Some("0123456789abcdef0123456789abcdef".into()),
            boot: Some("b1".into()),
            processes: Some((0xEFFF_FFFC, true)),
            filesystem: 7,
        }
    }

    #[test]
    fn only_what_is_seen_whole_proves_anything() {
        type Change = (fn(&mut Host), fn(&mut Host), bool, bool);
        let changes: &[Change] = &[
            // then, now, proves on the same boot, proves on another
            (|_| {}, |_| {}, true, true),
            (|then| then.machine = Some("f".repeat(32)), |_| {}, false, false),
            (|then| then.machine = None, |_| {}, false, false),
            (|then| then.machine = None, |now| now.machine = None, true, false),
            (|then| then.boot = None, |_| {}, false, false),
            (|_| {}, |now| now.boot = None, false, false),
            (|then| then.filesystem = 8, |_| {}, true, false),
            (|then| then.filesystem = 0, |now| now.filesystem = 0, true, false),
            // A container, seen from the machine, from itself, from another.
            (|then| then.processes = Some((5, false)), |_| {}, true, false),
            (|then| then.processes = Some((5, false)), |now| now.processes = Some((5, false)), true, false),
            (|then| then.processes = Some((5, false)), |now| now.processes = Some((6, false)), false, false),
            (|_| {}, |now| now.processes = Some((6, false)), false, false),
            (|_| {}, |now| now.processes = None, false, false),
        ];
        for (number, (earlier, later, same, other)) in changes.iter().enumerate() {
            for reboot in [false, true] {
                let (mut then, mut now) = (host(), host());
                if reboot {
                    now.boot = Some("b2".into());
                }
                earlier(&mut then);
                later(&mut now);
                let expected = if reboot { *other } else { *same };
                let seen = then.seen_from(&now);
                assert_eq!(!matches!(seen, Standpoint::Foreign(_)), expected, "{number}, reboot {reboot}: {seen:?}");
                if expected {
                    assert_eq!(seen == Standpoint::EarlierBoot, reboot);
                }
            }
        }
    }
}

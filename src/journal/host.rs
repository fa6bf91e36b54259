//! The machine, the boot and the pid namespace of a run. They decide whether this process can prove that the run is
//! dead.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::sys::{connections, filesystem, machine, process};

/// The host on which a run was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostIdentity {
    /// [`machine::id`]. `None` in many containers.
    machine: Option<String>,
    /// [`machine::boot_id`]: an ID that changes at each boot, and that is the same in every container of one boot.
    /// `None` if it cannot be read.
    boot: Option<String>,
    /// The number of the pid namespace, and whether it is the machine's first pid namespace. `None` if /proc does not
    /// show the namespace.
    processes: Option<(u64, bool)>,
    /// The ID of the journal's file system ([`filesystem::identity`]). 0 if the ID is not known.
    filesystem: u64,
    /// Hashes of the hardware identities, by kind ([`machine::identities`]). They distinguish two machines of which one
    /// runs from a copy of the other machine's disk. Empty in the records of earlier versions.
    #[serde(default)]
    hardware: BTreeMap<String, Vec<String>>,
    /// The number of the network namespace ([`connections::network_namespace`]). `None` if it is not known, and in the
    /// records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    network: Option<u64>,
}

/// Returns the first 64 bits of the SHA-256 of `kind` and `identity`, in hexadecimal digits. 64 bits are enough for a
/// comparison. Records contain the hashes so that they do not contain serial numbers.
pub(crate) fn hash(kind: &str, identity: &str) -> String {
    let digest = Sha256::new().chain_update(kind).chain_update([0]).chain_update(identity).finalize();
    digest.iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn hashes(kind: &str, identities: &[String]) -> Vec<String> {
    identities.iter().map(|identity| hash(kind, identity)).collect()
}

/// What this process can prove about a run that was started on a [`HostIdentity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standpoint {
    /// The run was started in this boot of this machine, and this process can see the processes of the run.
    ThisBoot,
    /// This machine has been rebooted since the start of the run, so no process of the run can be alive.
    EarlierBoot,
    /// This process cannot prove anything about the run. The text is the reason.
    Foreign(&'static str),
}

impl HostIdentity {
    /// Returns the identity of this host. `journal` is a directory on the file system of the journal.
    pub(crate) fn here(journal: &Path) -> Self {
        Self {
            machine: machine::id(),
            boot: machine::boot_id(),
            processes: process::pid_namespace(),
            filesystem: filesystem::identity(journal),
            hardware: machine::identities()
                .into_iter()
                .map(|(kind, all)| (kind.to_owned(), hashes(kind, &all)))
                .collect(),
            network: connections::network_namespace(),
        }
    }

    /// Whether this process would see what the kernel still sends for a run on this host whose processes have ended
    /// ([`connections::StillSending`]): both have the same network namespace, or the machine was rebooted since.
    pub(crate) fn shows_its_connections(&self) -> bool {
        self.shows_connections_to(machine::id().as_ref(), machine::boot_id().as_ref(), connections::network_namespace())
    }

    /// Does the same as [`Self::shows_its_connections`] for a process on the machine `machine`, in the boot `boot` and
    /// the network namespace `network`.
    fn shows_connections_to(&self, machine: Option<&String>, boot: Option<&String>, network: Option<u64>) -> bool {
        match self.boot.as_ref().zip(boot) {
            Some((then, now)) if then == now => network.is_some() && self.network == network,
            // On every machine, the first network namespace has the same number.
            Some(_) => machine.is_some() && self.machine.as_ref() == machine,
            None => false,
        }
    }

    /// Whether `self` and `here` have different hardware. True if, for some kind of identity, both have values and no
    /// value is the same. If so, one machine may run from a copy of the other machine's disk, including the machine-id
    /// and the journal. A kind may have several values, such as network addresses. One common value of a kind is enough
    /// for the same hardware, because network devices are added and removed.
    fn is_other_hardware(&self, here: &Self) -> bool {
        self.hardware.iter().any(|(kind, then)| {
            here.hardware.get(kind).is_some_and(|now| {
                !then.is_empty() && !now.is_empty() && !then.iter().any(|identity| now.contains(identity))
            })
        })
    }

    /// Whether `self` and `here` have the same pid namespace, so that a recorded pid identifies the same process on
    /// both.
    pub(crate) fn numbers_processes_as(&self, here: &Self) -> bool {
        self.processes == here.processes
    }

    /// Returns the number of the pid namespace of a run on `self`. `None` if that namespace was the machine's first pid
    /// namespace, or is not known.
    pub(crate) fn container(&self) -> Option<u64> {
        self.processes.filter(|(_, first)| !first).map(|(namespace, _)| namespace)
    }

    /// Returns what a process on `here` can prove about a run on `self`.
    ///
    /// In the same boot, this process can see the run's processes only if it is in the machine's first pid namespace or
    /// in the pid namespace of the run. Two namespaces with the same number are the same namespace, because the kernel
    /// reuses a number only after the old namespace and all its processes are gone.
    ///
    /// In another boot, the run is dead if it was on this very machine before the reboot. A machine-id proves that only
    /// outside of containers, because a container image has the same machine-id on every host. The file system and the
    /// hardware must also be the same, because a copy of a disk has the same machine-id as the original disk, and the
    /// machine with the original disk may still be running.
    pub(crate) fn seen_from(&self, here: &Self) -> Standpoint {
        if self.machine != here.machine {
            return Standpoint::Foreign("that run was on another machine");
        }
        let (Some(then), Some(now)) = (&self.boot, &here.boot) else {
            return Standpoint::Foreign("this system has no boot ID");
        };
        if then == now {
            return match (self.processes, here.processes) {
                (_, Some((_, true))) => Standpoint::ThisBoot,
                (Some((then, _)), Some((now, _))) if then == now => Standpoint::ThisBoot,
                _ => Standpoint::Foreign("that run was in another container, whose processes cannot be seen from here"),
            };
        }
        let first = |host: &Self| host.processes.is_some_and(|(_, first)| first);
        if self.machine.is_none() {
            Standpoint::Foreign("that run was before a restart, on a machine without a machine-id")
        } else if !first(self) || !first(here) {
            Standpoint::Foreign("that run was before a restart, in a container that may still be running elsewhere")
        } else if self.filesystem == 0 || self.filesystem != here.filesystem {
            Standpoint::Foreign("that run was before a restart, with its journal on another file system")
        } else if self.is_other_hardware(here) {
            Standpoint::Foreign("that run may have been on another machine, of which this one is a copy")
        } else {
            Standpoint::EarlierBoot
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostIdentity {
        HostIdentity {
            machine: Some("0123456789abcdef0123456789abcdef".into()),
            boot: Some("b1".into()),
            processes: Some((0xEFFF_FFFC, true)),
            filesystem: 7,
            hardware: BTreeMap::new(),
            network: Some(9),
        }
    }

    /// Tests two kinds of hardware identity. Each kind is unknown or has values, both in the record and on this host.
    /// All combinations are tested.
    #[test]
    fn a_copy_of_the_disk_is_told_from_the_machine_where_any_kind_differs() {
        let networks: [&[&str]; 5] = [&[], &["m1"], &["m2"], &["m1", "m2"], &["m3"]];
        let uuids: [&[&str]; 3] = [&[], &["u1"], &["u2"]];
        let hardware = |network: &[&str], uuid: &[&str]| {
            let known = [("network", network), ("product_uuid", uuid)].into_iter().filter(|(_, all)| !all.is_empty());
            known.map(|(kind, all)| (kind.to_owned(), all.iter().map(|one| (*one).to_owned()).collect())).collect()
        };
        let differs = |then: &[&str], now: &[&str]| {
            !then.is_empty() && !now.is_empty() && then.iter().all(|one| !now.contains(one))
        };
        for (network, uuid) in networks.iter().flat_map(|network| uuids.map(|uuid| (network, uuid))) {
            for (network_now, uuid_now) in networks.iter().flat_map(|network| uuids.map(|uuid| (network, uuid))) {
                let then = HostIdentity { hardware: hardware(network, uuid), ..host() };
                let same_boot = HostIdentity { hardware: hardware(network_now, uuid_now), ..host() };
                let now = HostIdentity { boot: Some("b2".into()), ..same_boot.clone() };
                let copy = differs(network, network_now) || differs(uuid, uuid_now);
                let seen = then.seen_from(&now);
                assert_eq!(matches!(seen, Standpoint::Foreign(_)), copy, "{then:?} {now:?}");
                // In the same boot, different network devices are ignored, because they may belong to another network
                // namespace.
                assert_eq!(then.seen_from(&same_boot), Standpoint::ThisBoot);
            }
        }
    }

    #[test]
    fn a_record_of_an_older_version_is_judged_as_it_was() {
        let record = r#"{"machine":"0123456789abcdef0123456789abcdef","boot":"b1","processes":[4026531836,true],"filesystem":7}"#;
        let then: HostIdentity = serde_json::from_str(record).unwrap();
        let hardware = BTreeMap::from([("network".to_owned(), hashes("network", &["52:54:00:00:00:01".to_owned()]))]);
        let now = HostIdentity { boot: Some("b2".into()), hardware, ..host() };
        assert_eq!(then.seen_from(&now), Standpoint::EarlierBoot);
        let kept = serde_json::to_string(&now).unwrap();
        assert!(!kept.contains("52:54"), "{kept}");
        assert_eq!(serde_json::from_str::<HostIdentity>(&kept).unwrap(), now);
    }

    #[test]
    fn only_what_is_seen_whole_proves_anything() {
        type Case = (fn(&mut HostIdentity), fn(&mut HostIdentity), bool, bool);
        let changes: &[Case] = &[
            // A change to the recorded host, a change to this host, whether the result proves something in the same
            // boot, and whether it proves something in another boot.
            (|_| {}, |_| {}, true, true),
            (|then| then.machine = Some("f".repeat(32)), |_| {}, false, false),
            (|then| then.machine = None, |_| {}, false, false),
            (|then| then.machine = None, |now| now.machine = None, true, false),
            (|then| then.boot = None, |_| {}, false, false),
            (|_| {}, |now| now.boot = None, false, false),
            (|then| then.filesystem = 8, |_| {}, true, false),
            (|then| then.filesystem = 0, |now| now.filesystem = 0, true, false),
            // A container, seen from the machine, from itself and from another container.
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

    #[test]
    fn what_the_kernel_still_sends_is_seen_only_in_the_same_network_namespace_or_after_a_reboot() {
        let boots = || [None, Some("b1".to_owned()), Some("b2".to_owned())];
        let machines = || [None, Some("m1".to_owned()), Some("m2".to_owned())];
        let networks = [None, Some(9), Some(10)];
        let all = || {
            let of = |boot: Option<String>| machines().into_iter().map(move |machine| (boot.clone(), machine));
            boots().into_iter().flat_map(of).flat_map(move |(boot, machine)| {
                networks.map(|network| HostIdentity { boot: boot.clone(), machine: machine.clone(), network, ..host() })
            })
        };
        for (then, now) in all().flat_map(|then| all().map(move |now| (then.clone(), now))) {
            let shows = then.shows_connections_to(now.machine.as_ref(), now.boot.as_ref(), now.network);
            let are_boots_known = then.boot.is_some() && now.boot.is_some();
            let is_rebooted = then.boot != now.boot && then.machine.is_some() && then.machine == now.machine;
            let is_same = then.boot == now.boot && then.network.is_some() && then.network == now.network;
            assert_eq!(shows, are_boots_known && (is_rebooted || is_same), "{then:?} {now:?}");
        }
    }

    #[test]
    fn a_recorded_pid_means_the_same_process_only_in_the_same_pid_namespace() {
        assert!(host().numbers_processes_as(&host()));
        for processes in [None, Some((0xEFFF_FFFC, false)), Some((4_026_532_000, true))] {
            assert!(!host().numbers_processes_as(&HostIdentity { processes, ..host() }), "{processes:?}");
        }
    }
}

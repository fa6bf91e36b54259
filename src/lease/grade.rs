//! Decides whether this host can promise that the kernel stops terraform before its lease lapses.
//!
//! The promise rests on two things. `CLOCK_BOOTTIME` never stands still while the service's time goes on, and a process
//! that the kernel has frozen is stopped before it runs another instruction. Where `tf` does not know both, the promise
//! is not made, and no other host takes over the lock without being asked.

use std::fmt;

use super::record::Promise;
use crate::sys::host_facts::{Dmi, HostFacts};

/// What this host promises, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grade {
    /// Terraform is stopped before its lease lapses.
    Stop(FenceReason),
    /// There is no such promise.
    None(NoFenceReason),
}

impl Grade {
    /// Returns what the lease's record says.
    pub(crate) fn fence(self) -> Promise {
        match self {
            Self::Stop(_) => Promise::Stop,
            Self::None(_) => Promise::None,
        }
    }
}

/// What the user says about the clock of this host (`TFW_CLOCK`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Clock {
    #[default]
    NotVouchedFor,
    /// `TFW_CLOCK=steady`: `CLOCK_BOOTTIME` never stands still. It matters only where `tf` cannot know that.
    Steady,
}

/// Why the clock of this host is known to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FenceReason {
    /// The machine is one of a cloud, whose users cannot pause it so that its clock stands still.
    Cloud(Cloud),
    /// The machine is not virtual.
    NotVirtual,
    /// `TFW_CLOCK=steady`.
    UserVouches,
}

impl fmt::Display for FenceReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cloud(cloud) => write!(formatter, "this host is a machine of {cloud}"),
            Self::NotVirtual => formatter.write_str("this host is not a virtual machine"),
            Self::UserVouches => formatter.write_str("TFW_CLOCK=steady says that this host is never paused"),
        }
    }
}

/// Why this host makes no promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoFenceReason {
    /// The kernel is not Linux. Only Linux sends the signals that stop a frozen process.
    OtherSystem,
    /// `TFW_TTY=shared`: terraform has no process group of its own that could be stopped.
    SharedTerminal,
    /// The sandbox has a kernel of its own, which does not freeze as Linux does.
    Gvisor,
    /// A process that the freezer of cgroup v1 has frozen runs for a moment when it is thawed, before it stops.
    OldFreezer,
    /// The control groups of this process cannot be read.
    UnknownFreezer,
    /// A virtual machine whose clock stands still while it is paused. The text is its kind.
    PausedMachine(&'static str),
    /// A machine of which it is not known whether its clock can stand still.
    UnknownMachine,
}

impl NoFenceReason {
    /// Returns whether `TFW_CLOCK=steady` makes this host promise a stop.
    pub(crate) fn can_be_vouched_for(self) -> bool {
        self == Self::UnknownMachine
    }
}

impl fmt::Display for NoFenceReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherSystem => formatter.write_str("only Linux can stop a terraform that is frozen"),
            Self::SharedTerminal => {
                formatter.write_str("with TFW_TTY=shared, terraform is not in a process group of its own")
            }
            Self::Gvisor => formatter.write_str("gVisor cannot stop a terraform that is frozen"),
            Self::OldFreezer => formatter
                .write_str("this process is in a container that is frozen with cgroup v1, which thaws it too soon"),
            Self::UnknownFreezer => formatter
                .write_str("/proc/self/cgroup cannot be read, so it is not known how this process can be frozen"),
            Self::PausedMachine(kind) => {
                write!(
                    formatter,
                    "this host is a virtual machine ({kind}), whose clock stands still while it is paused"
                )
            }
            Self::UnknownMachine => {
                formatter.write_str("it is not known whether the clock of this host stands still while it is paused")
            }
        }
    }
}

/// A cloud that `tf` recognizes by what its machines say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cloud {
    Akamai,
    Alibaba,
    Aws,
    Azure,
    DigitalOcean,
    Google,
    Hetzner,
    Oracle,
    Scaleway,
    Tencent,
    Vultr,
}

impl fmt::Display for Cloud {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Akamai => "Akamai",
            Self::Alibaba => "Alibaba Cloud",
            Self::Aws => "Amazon EC2",
            Self::Azure => "Azure",
            Self::DigitalOcean => "DigitalOcean",
            Self::Google => "Google Compute Engine",
            Self::Hetzner => "Hetzner Cloud",
            Self::Oracle => "Oracle Cloud",
            Self::Scaleway => "Scaleway",
            Self::Tencent => "Tencent Cloud",
            Self::Vultr => "Vultr",
        })
    }
}

impl Cloud {
    /// Returns the cloud of a machine. `None` if it is of no cloud, or of one that is not known.
    ///
    /// Most texts are those by which cloud-init recognizes the clouds (tools/ds-identify). OpenStack is left out,
    /// because its users can pause a machine (`openstack server pause`).
    pub(crate) fn of(dmi: &Dmi) -> Option<Self> {
        /// The asset tag of every machine of Azure: `MSFT AZURE VM` in decimal (cloudinit/sources/azure/identity.py).
        /// Other machines of Hyper-V have the same vendor and another tag.
        const AZURE: &str = "7783-7084-3265-9085-8269-3286-77";
        // EC2's older machines are Xen's, with a BIOS such as `4.2.amazon` or `4.11.amazon`.
        let is_old_ec2 = dmi.sys_vendor == "Xen" && dmi.bios_version.ends_with(".amazon");
        match (dmi.sys_vendor.as_str(), dmi.product_name.as_str(), dmi.chassis_asset_tag.as_str()) {
            ("Microsoft Corporation", _, AZURE) => Some(Self::Azure),
            // systemd, src/basic/virt.c. Laptops of Google have its name as their vendor, but another product.
            ("Amazon EC2", ..) => Some(Self::Aws),
            (_, "Google Compute Engine", _) => Some(Self::Google),
            (_, _, "OracleCloud.com") => Some(Self::Oracle),
            (_, "Alibaba Cloud ECS", _) => Some(Self::Alibaba),
            ("DigitalOcean", ..) => Some(Self::DigitalOcean),
            ("Hetzner", ..) => Some(Self::Hetzner),
            ("Akamai" | "Linode", ..) => Some(Self::Akamai),
            ("Scaleway", ..) => Some(Self::Scaleway),
            ("Vultr", ..) => Some(Self::Vultr),
            // Its kernels log `DMI: Tencent Cloud CVM`.
            ("Tencent Cloud", ..) => Some(Self::Tencent),
            _ if is_old_ec2 => Some(Self::Aws),
            _ => None,
        }
    }
}

/// Decides what the host with these facts promises. `shares_terminal` is `TFW_TTY=shared`.
pub(crate) fn grade(facts: &HostFacts, shares_terminal: bool, clock: Clock) -> Grade {
    let obstacle = if facts.system != "linux" {
        Some(NoFenceReason::OtherSystem)
    } else if shares_terminal {
        Some(NoFenceReason::SharedTerminal)
    } else if is_gvisor(&facts.kernel) {
        Some(NoFenceReason::Gvisor)
    } else if let Some(reason) = freezer(facts.cgroups.as_deref(), facts.cgroup_namespace) {
        Some(reason)
    } else {
        paused_machine(facts).map(NoFenceReason::PausedMachine)
    };
    if let Some(reason) = obstacle {
        return Grade::None(reason);
    }
    if let Some(cloud) = Cloud::of(&facts.dmi) {
        Grade::Stop(FenceReason::Cloud(cloud))
    } else if is_bare_metal(facts) {
        Grade::Stop(FenceReason::NotVirtual)
    } else if clock == Clock::Steady {
        Grade::Stop(FenceReason::UserVouches)
    } else {
        Grade::None(NoFenceReason::UnknownMachine)
    }
}

/// The release of a kernel in the text of `/proc/version`: the third word (proc_version(5)). Empty if there is none.
fn release(kernel: &str) -> &str {
    kernel.split_whitespace().nth(2).unwrap_or_default()
}

/// Returns whether the kernel is gVisor's. It has the release `4.19.0-gvisor`. Earlier versions had `4.4.0`, built at a
/// time that no other kernel has.
fn is_gvisor(kernel: &str) -> bool {
    release(kernel).to_ascii_lowercase().contains("gvisor") || kernel.ends_with("#1 SMP Sun Jan 10 15:06:54 PST 2016")
}

/// Returns why a process in these control groups may run for a moment after it was frozen. `None` if it cannot.
///
/// A line of `/proc/self/cgroup` is `ID:CONTROLLERS:PATH`. Version 2 has no controllers there, and its freezer acts on
/// signals at once. The root of version 1's freezer cannot be frozen. The path is that of the real root only in the
/// first cgroup namespace (cgroup_namespaces(7)).
fn freezer(cgroups: Option<&str>, namespace: Option<u64>) -> Option<NoFenceReason> {
    /// The number of the first cgroup namespace (include/linux/proc_ns.h, `PROC_CGROUP_INIT_INO`).
    const FIRST: u64 = 0xEFFF_FFFB;
    let Some(cgroups) = cgroups else { return Some(NoFenceReason::UnknownFreezer) };
    let freezers = cgroups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        controllers.split(',').any(|controller| controller == "freezer").then_some(path)
    });
    let mut freezers = freezers.peekable();
    let has_any = freezers.peek().is_some();
    let is_in_root = freezers.all(|path| path == "/") && namespace == Some(FIRST);
    (has_any && !is_in_root).then_some(NoFenceReason::OldFreezer)
}

/// Returns the kind of virtual machine if its users can pause it, and its clock then stands still. `None` if this is
/// not known.
fn paused_machine(facts: &HostFacts) -> Option<&'static str> {
    // WSL's kernels are `5.15.153.1-microsoft-standard-WSL2`, and `4.4.0-19041-Microsoft` in its first version
    // (systemd, src/basic/virt.c, tests for `Microsoft` and `WSL`). Docker Desktop's are `6.10.14-linuxkit`, and
    // OrbStack's are `6.19.13-orbstack-gbd1dc07b8cf4`. The kernels of Lima, Colima and Podman have no names of their
    // own.
    let release = release(&facts.kernel).to_ascii_lowercase();
    for (part, kind) in [("microsoft", "WSL"), ("wsl", "WSL"), ("linuxkit", "Docker Desktop"), ("orbstack", "OrbStack")]
    {
        if release.contains(part) {
            return Some(kind);
        }
    }
    // The texts are those by which systemd recognizes the machines (src/basic/virt.c, `dmi_vendor_table`). The machines
    // of Lima, Colima, Podman and UTM are `Apple Inc.`, `Apple Virtualization Generic Platform`, or QEMU's. Those of QEMU
    // are the same on a laptop and on a server, so they are machines of unknown kind.
    let Dmi { sys_vendor, product_name, board_vendor, .. } = &facts.dmi;
    for (start, kind) in [
        ("Apple Virtualization", "Apple Virtualization"),
        ("Parallels", "Parallels"),
        ("VMware", "VMware"),
        ("VirtualBox", "VirtualBox"),
        ("innotek GmbH", "VirtualBox"),
    ] {
        if [sys_vendor, product_name, board_vendor].into_iter().any(|text| text.starts_with(start)) {
            return Some(kind);
        }
    }
    None
}

/// Returns whether the machine is known not to be virtual. That is known only on x86-64, where a hypervisor sets the
/// flag `hypervisor` (CPUID leaf 1, ECX bit 31). Other processors have no such flag, and neither has an emulated one.
fn is_bare_metal(facts: &HostFacts) -> bool {
    /// The makers of x86-64 processors (Linux, arch/x86/kernel/cpu). Rosetta says `VirtualApple`, and User Mode Linux
    /// says `User Mode Linux`.
    const MAKERS: [&str; 5] = ["GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls", "Shanghai"];
    /// What virtual machines say that may hide the flag (systemd, src/basic/virt.c, `dmi_vendor_table`; Hyper-V and
    /// Xen say `Virtual Machine` and `HVM domU`).
    const VIRTUAL: [&str; 10] =
        ["KVM", "OpenStack", "KubeVirt", "QEMU", "Standard PC", "Xen", "Bochs", "BHYVE", "Virtual Machine", "HVM domU"];
    let Dmi { sys_vendor, product_name, board_vendor, .. } = &facts.dmi;
    let says_virtual = [sys_vendor, product_name, board_vendor]
        .into_iter()
        .any(|text| VIRTUAL.iter().any(|start| text.starts_with(start)));
    let values = |name: &'static str| {
        facts.processors.lines().filter_map(move |line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim())
        })
    };
    let has_known_makers = values("vendor_id").next().is_some() && values("vendor_id").all(|all| MAKERS.contains(&all));
    let has_flags = values("flags").next().is_some();
    let has_flag = values("flags").any(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"));
    facts.architecture == "x86_64"
        && facts.hypervisor.is_empty()
        && !says_virtual
        && has_known_makers
        && has_flags
        && !has_flag
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Option<u64> = Some(4_026_531_835);
    const UBUNTU: &str = "Linux version 6.8.0-41-generic (buildd@lcy02-amd64-100) (x86_64-linux-gnu-gcc-13 (Ubuntu \
         13.2.0-23ubuntu4) 13.2.0, GNU ld (GNU Binutils for Ubuntu) 2.42) #41-Ubuntu SMP PREEMPT_DYNAMIC Fri Aug 2 \
         20:41:06 UTC 2024";
    const INTEL: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel name\t: Intel(R) Core(TM) \
         i7-8550U CPU @ 1.80GHz\nflags\t\t: fpu vme de pse tsc msr pae mce cx8 apic sep\nbugs\t\t: spectre_v1\n";
    const INTEL_GUEST: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vme de pse hypervisor lahf_lm\n\n\
         processor\t: 1\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vme de pse hypervisor lahf_lm\n";
    const ARM: &str = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32\n\
         CPU implementer\t: 0x41\nCPU architecture: 8\n";

    fn dmi(sys_vendor: &str, product_name: &str) -> Dmi {
        Dmi { sys_vendor: sys_vendor.to_owned(), product_name: product_name.to_owned(), ..Dmi::default() }
    }

    /// A laptop: no virtual machine, and no container.
    fn laptop() -> HostFacts {
        HostFacts {
            system: "linux",
            architecture: "x86_64",
            kernel: UBUNTU.to_owned(),
            cgroups: Some("0::/user.slice/user-1000.slice/session-2.scope\n".to_owned()),
            cgroup_namespace: FIRST,
            processors: INTEL.to_owned(),
            hypervisor: String::new(),
            dmi: Dmi { board_vendor: "LENOVO".to_owned(), ..dmi("LENOVO", "20KHCTO1WW") },
        }
    }

    fn guest(dmi: Dmi) -> HostFacts {
        HostFacts { processors: INTEL_GUEST.to_owned(), dmi, ..laptop() }
    }

    fn arm_guest(dmi: Dmi) -> HostFacts {
        HostFacts { architecture: "aarch64", processors: ARM.to_owned(), dmi, ..laptop() }
    }

    fn kernel(text: &str) -> HostFacts {
        HostFacts { kernel: text.to_owned(), ..guest(Dmi::default()) }
    }

    /// Asserts the grade without and with `TFW_CLOCK=steady`.
    fn assert_grades(facts: &HostFacts, expected: Grade) {
        assert_eq!(grade(facts, false, Clock::NotVouchedFor), expected, "{facts:?}");
        let vouched = match expected {
            Grade::None(NoFenceReason::UnknownMachine) => Grade::Stop(FenceReason::UserVouches),
            known => known,
        };
        assert_eq!(grade(facts, false, Clock::Steady), vouched, "{facts:?}");
        for clock in [Clock::NotVouchedFor, Clock::Steady] {
            let shared = grade(facts, true, clock);
            assert!(shared.fence() == Promise::None, "{facts:?}: {shared:?}");
        }
        match expected {
            Grade::Stop(_) => assert_eq!(expected.fence(), Promise::Stop),
            Grade::None(reason) => {
                assert_eq!(expected.fence(), Promise::None);
                assert_eq!(reason.can_be_vouched_for(), vouched != expected);
            }
        }
    }

    const UNKNOWN: Grade = Grade::None(NoFenceReason::UnknownMachine);

    #[test]
    fn a_cloud_is_recognized_by_its_firmware() {
        let tagged =
            |vendor: &str, product: &str, tag: &str| Dmi { chassis_asset_tag: tag.to_owned(), ..dmi(vendor, product) };
        let xen = |version: &str| Dmi { bios_version: version.to_owned(), ..dmi("Xen", "HVM domU") };
        for (dmi, cloud) in [
            (tagged("Amazon EC2", "m5.large", "Amazon EC2"), Some(Cloud::Aws)),
            (tagged("Amazon EC2", "c6g.metal", "Amazon EC2"), Some(Cloud::Aws)),
            (xen("4.2.amazon"), Some(Cloud::Aws)),
            (xen("4.11.amazon"), Some(Cloud::Aws)),
            (dmi("Google", "Google Compute Engine"), Some(Cloud::Google)),
            (
                tagged("Microsoft Corporation", "Virtual Machine", "7783-7084-3265-9085-8269-3286-77"),
                Some(Cloud::Azure),
            ),
            (tagged("QEMU", "Standard PC (i440FX + PIIX, 1996)", "OracleCloud.com"), Some(Cloud::Oracle)),
            (dmi("Alibaba Cloud", "Alibaba Cloud ECS"), Some(Cloud::Alibaba)),
            (dmi("DigitalOcean", "Droplet"), Some(Cloud::DigitalOcean)),
            (dmi("Hetzner", "vServer"), Some(Cloud::Hetzner)),
            (dmi("Linode", "Compute Instance"), Some(Cloud::Akamai)),
            (dmi("Akamai", "Compute Instance"), Some(Cloud::Akamai)),
            (dmi("Scaleway", "SCW-DEV1-S"), Some(Cloud::Scaleway)),
            (dmi("Vultr", "VHF"), Some(Cloud::Vultr)),
            (dmi("Tencent Cloud", "CVM"), Some(Cloud::Tencent)),
            // Not a cloud, or one whose users can pause a machine.
            (xen("4.17.4"), None),
            (dmi("Google", "Eve"), None),
            (tagged("Microsoft Corporation", "Virtual Machine", "1234-5678-9012-3456-7890-1234-56"), None),
            (tagged("QEMU", "Standard PC", "7783-7084-3265-9085-8269-3286-77"), None),
            (dmi("OpenStack Foundation", "OpenStack Nova"), None),
            (dmi("QEMU", "Standard PC (Q35 + ICH9, 2009)"), None),
            (Dmi::default(), None),
        ] {
            assert_eq!(Cloud::of(&dmi), cloud, "{dmi:?}");
            let expected = cloud.map_or(UNKNOWN, |cloud| Grade::Stop(FenceReason::Cloud(cloud)));
            assert_grades(&guest(dmi.clone()), expected);
            assert_grades(&arm_guest(dmi), expected);
        }
    }

    #[test]
    fn a_machine_that_is_paused_with_its_clock_makes_no_promise() {
        for (kernel_version, kind) in [
            (
                "Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com) (gcc version 5.4.0 (GCC) ) #488-Microsoft Mon \
              Sep 01 13:43:00 PST 2020",
                "WSL",
            ),
            (
                "Linux version 5.15.90.1-microsoft-standard-WSL2 (oe-user@oe-host) (x86_64-msft-linux-gcc (GCC) 9.3.0, GNU \
              ld (GNU Binutils) 2.34.0.20200220) #1 SMP Fri Jan 27 02:56:13 UTC 2023",
                "WSL",
            ),
            (
                "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@439a258ad544) (gcc (GCC) 11.2.0, GNU ld (GNU \
              Binutils) 2.37) #1 SMP PREEMPT_DYNAMIC Thu Jun 5 18:30:46 UTC 2025",
                "WSL",
            ),
            (
                "Linux version 6.12.76-linuxkit (root@buildkitsandbox) (gcc (Alpine 15.2.0) 15.2.0, GNU ld (GNU Binutils) \
              2.45.1) #1 SMP Sun Mar  8 14:41:59 UTC 2026",
                "Docker Desktop",
            ),
            (
                "Linux version 6.19.13-orbstack-gbd1dc07b8cf4 (orbstack@builder) (clang version 21.1.8, LLD 21.1.8) #1 SMP \
              PREEMPT Thu Jan 1 00:00:00 UTC 1970",
                "OrbStack",
            ),
        ] {
            let expected = Grade::None(NoFenceReason::PausedMachine(kind));
            assert_grades(&kernel(kernel_version), expected);
            // arm64 has no flag of a hypervisor.
            assert_grades(&HostFacts { kernel: kernel_version.to_owned(), ..arm_guest(Dmi::default()) }, expected);
        }
        let board = |vendor: &str| Dmi { board_vendor: vendor.to_owned(), ..Dmi::default() };
        for (dmi, kind) in [
            (dmi("Apple Inc.", "Apple Virtualization Generic Platform"), "Apple Virtualization"),
            (dmi("Parallels International GmbH.", "Parallels ARM Virtual Machine"), "Parallels"),
            (dmi("Parallels Software International Inc.", "Parallels Virtual Platform"), "Parallels"),
            (dmi("VMware, Inc.", "VMware Virtual Platform"), "VMware"),
            (dmi("VMware, Inc.", "VMware20,1"), "VMware"),
            (dmi("innotek GmbH", "VirtualBox"), "VirtualBox"),
            (dmi("", "VirtualBox"), "VirtualBox"),
            (board("Parallels ARM Virtual Machine"), "Parallels"),
        ] {
            let expected = Grade::None(NoFenceReason::PausedMachine(kind));
            assert_grades(&guest(dmi.clone()), expected);
            assert_grades(&arm_guest(dmi), expected);
        }
    }

    /// They run below Apple's Virtualization framework (`vmType: vz` of Lima and Colima, "Apple Virtualization" of UTM) or
    /// QEMU. The clock of each stands still while it is paused, and while the laptop below it sleeps.
    #[test]
    fn a_guest_of_lima_colima_or_utm_makes_no_promise_of_its_own() {
        // systemd, pull request 24419: a guest of UTM on a Mac with an M1.
        let vz = || dmi("Apple Inc.", "Apple Virtualization Generic Platform");
        let known = Grade::None(NoFenceReason::PausedMachine("Apple Virtualization"));
        assert_grades(&arm_guest(vz()), known);
        // An x86-64 program that Rosetta runs in it.
        let rosetta = INTEL.replace("GenuineIntel", "VirtualApple");
        assert_grades(&HostFacts { processors: rosetta, ..guest(vz()) }, known);
        // On a Mac with an Intel processor, DMI does not name Apple's framework (systemd, pull request 31007).
        assert_grades(&guest(Dmi::default()), UNKNOWN);
        // A guest of QEMU on a laptop says the same as one on a server. So `TFW_CLOCK=steady` is believed.
        let virt = || dmi("QEMU", "QEMU Virtual Machine");
        assert_grades(&arm_guest(virt()), UNKNOWN);
        for product in ["Standard PC (Q35 + ICH9, 2009)", "Standard PC (i440FX + PIIX, 1996)"] {
            assert_grades(&guest(dmi("QEMU", product)), UNKNOWN);
            // Its processor is emulated.
            assert_grades(&HostFacts { dmi: dmi("QEMU", product), ..laptop() }, UNKNOWN);
        }
        // Without UEFI, the machine `virt` has no DMI.
        assert_grades(&arm_guest(Dmi::default()), UNKNOWN);
        // A container in such a guest reads the same files.
        let cgroups = Some("0::/\n".to_owned());
        for (facts, expected) in [(arm_guest(vz()), known), (arm_guest(virt()), UNKNOWN)] {
            let private = Some(4_026_532_511);
            assert_grades(&HostFacts { cgroups: cgroups.clone(), cgroup_namespace: private, ..facts }, expected);
        }
    }

    #[test]
    fn another_virtual_machine_makes_a_promise_only_if_its_user_vouches_for_it() {
        for dmi in [
            dmi("QEMU", "Standard PC (Q35 + ICH9, 2009)"),
            dmi("QEMU", "QEMU Virtual Machine"),
            dmi("Red Hat", "KVM"),
            dmi("Red Hat", "KubeVirt"),
            dmi("OpenStack Foundation", "OpenStack Nova"),
            dmi("Xen", "HVM domU"),
            dmi("Bochs", "Bochs"),
            dmi("", "BHYVE"),
            dmi("Microsoft Corporation", "Virtual Machine"),
        ] {
            assert_grades(&guest(dmi.clone()), UNKNOWN);
            assert_grades(&arm_guest(dmi.clone()), UNKNOWN);
            // A machine that hides its hypervisor.
            assert_grades(&HostFacts { dmi, ..laptop() }, UNKNOWN);
        }
        // Firecracker, Fargate, crosvm, libkrun: no DMI.
        assert_grades(&guest(Dmi::default()), UNKNOWN);
        assert_grades(&arm_guest(Dmi::default()), UNKNOWN);
        // Bare metal that is not x86-64 cannot be told from them.
        assert_grades(&arm_guest(dmi("ASUSTeK COMPUTER INC.", "Ampere Server")), UNKNOWN);
        assert_grades(&HostFacts { hypervisor: "xen".to_owned(), ..laptop() }, UNKNOWN);
    }

    #[test]
    fn a_processor_without_a_hypervisor_is_believed_only_if_it_is_one() {
        let with = |processors: &str| HostFacts { processors: processors.to_owned(), ..laptop() };
        let amd = INTEL.replace("GenuineIntel", "AuthenticAMD");
        assert_grades(&laptop(), Grade::Stop(FenceReason::NotVirtual));
        assert_grades(&with(&amd), Grade::Stop(FenceReason::NotVirtual));
        // A Mac or a laptop of Microsoft with Linux, and a container in which /sys is hidden.
        for dmi in [dmi("Apple Inc.", "MacBookPro14,1"), dmi("Microsoft Corporation", "Surface Laptop"), Dmi::default()]
        {
            assert_grades(&HostFacts { dmi, ..laptop() }, Grade::Stop(FenceReason::NotVirtual));
        }
        for processors in [
            "",
            INTEL_GUEST,
            // qemu-user shows the processor of its host, and says that it is an x86-64 one.
            ARM,
            &INTEL.replace("GenuineIntel", "VirtualApple"),
            &INTEL.replace("GenuineIntel", "User Mode Linux"),
            &INTEL.replace("flags", "Features"),
            "flags\t\t: fpu vme\n",
            &format!("{INTEL}\n{INTEL_GUEST}"),
        ] {
            assert_grades(&with(processors), UNKNOWN);
        }
    }

    #[test]
    fn another_kernel_makes_no_promise() {
        for system in ["macos", "freebsd", ""] {
            assert_grades(&HostFacts { system, ..laptop() }, Grade::None(NoFenceReason::OtherSystem));
        }
        let google = || dmi("Google", "Google Compute Engine");
        for version in [
            "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016",
            "Linux version 4.19.0-gvisor #1 SMP Sun Jan 10 15:06:54 PST 2016",
            "Linux version 4.19.0-gvisor #1 SMP",
        ] {
            let facts = HostFacts { kernel: version.to_owned(), ..guest(google()) };
            assert_grades(&facts, Grade::None(NoFenceReason::Gvisor));
            assert_grades(&HostFacts { kernel: version.to_owned(), ..laptop() }, Grade::None(NoFenceReason::Gvisor));
        }
    }

    #[test]
    fn only_the_freezer_of_version_1_outside_its_root_is_one() {
        let old = Some(NoFenceReason::OldFreezer);
        let private = Some(4_026_532_511);
        for (cgroups, namespace, expected) in [
            (Some("0::/\n"), FIRST, None),
            (Some("0::/\n"), private, None),
            (Some("0::/system.slice/docker-3f2a1b.scope\n"), None, None),
            (Some(""), None, None),
            // A hybrid system: the freezer is not mounted with version 1, or only its root is used.
            (Some("1:name=systemd:/init.scope\n0::/init.scope\n"), FIRST, None),
            (Some("9:name=systemd:/\n6:freezer:/\n4:memory:/a\n0::/\n"), FIRST, None),
            (Some("6:freezer:/\n0::/\n"), private, old),
            (Some("6:freezer:/\n0::/\n"), None, old),
            (Some("11:freezer:/docker/3f2a1b9c4d5e\n0::/\n"), FIRST, old),
            (Some("11:freezer:/kubepods/besteffort/podd05ceb29\n"), private, old),
            (Some("3:cpu,freezer,cpuacct:/a\n"), FIRST, old),
            (Some("3:freezer:/\n4:freezer:/a\n"), FIRST, old),
            // Not the freezer.
            (Some("3:name=freezer:/a\n4:cpu:/freezer\n5:cpu:/a:freezer:/b\nnonsense\n"), FIRST, None),
            (None, FIRST, Some(NoFenceReason::UnknownFreezer)),
        ] {
            assert_eq!(freezer(cgroups, namespace), expected, "{cgroups:?} {namespace:?}");
            let facts = HostFacts { cgroups: cgroups.map(str::to_owned), cgroup_namespace: namespace, ..laptop() };
            assert_grades(&facts, expected.map_or(Grade::Stop(FenceReason::NotVirtual), Grade::None));
        }
    }

    #[test]
    fn every_reason_is_one_line() {
        let clouds = [Cloud::Aws, Cloud::Azure, Cloud::Google].map(FenceReason::Cloud);
        let stop = clouds.into_iter().chain([FenceReason::NotVirtual, FenceReason::UserVouches]);
        let none = [
            NoFenceReason::OtherSystem,
            NoFenceReason::SharedTerminal,
            NoFenceReason::Gvisor,
            NoFenceReason::OldFreezer,
            NoFenceReason::UnknownFreezer,
            NoFenceReason::PausedMachine("WSL"),
            NoFenceReason::UnknownMachine,
        ];
        let texts = stop.map(|reason| reason.to_string()).chain(none.map(|reason| reason.to_string()));
        for text in texts {
            assert!(!text.is_empty() && !text.contains('\n') && !text.ends_with('.'), "{text}");
        }
    }
}

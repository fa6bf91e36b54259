//! Reads what the kernel and the firmware say about this machine. [`crate::lease::grade`] decides by these facts
//! whether this host can promise to stop terraform in time.

use std::fs;
use std::path::Path;

/// What one machine says about itself. A text is empty if it cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostFacts {
    /// The operating system for which this program was built ([`std::env::consts::OS`]).
    pub(crate) system: &'static str,
    /// The architecture for which this program was built ([`std::env::consts::ARCH`]). An emulator may run it on
    /// another one.
    pub(crate) architecture: &'static str,
    /// `/proc/version`: the kernel's name, release and builder.
    pub(crate) kernel: String,
    /// `/proc/self/cgroup`: the control groups of this process (cgroups(7)). `None` if it cannot be read.
    pub(crate) cgroups: Option<String>,
    /// The number of this process's cgroup namespace (cgroup_namespaces(7)). `None` if it cannot be read, or if the
    /// kernel has no such namespaces.
    pub(crate) cgroup_namespace: Option<u64>,
    /// `/proc/cpuinfo`.
    pub(crate) processors: String,
    /// `/sys/hypervisor/type`, which Xen's guests have (Documentation/ABI/stable/sysfs-hypervisor-xen).
    pub(crate) hypervisor: String,
    pub(crate) dmi: Dmi,
}

/// What the firmware says about the machine (`/sys/class/dmi/id`). Every user can read these files. Machines without
/// DMI, such as those of Firecracker, have none of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Dmi {
    pub(crate) sys_vendor: String,
    pub(crate) product_name: String,
    pub(crate) chassis_asset_tag: String,
    pub(crate) board_vendor: String,
    /// The ID of the instance on EC2's Nitro machines.
    pub(crate) board_asset_tag: String,
    pub(crate) bios_version: String,
}

impl HostFacts {
    /// Reads the facts of this host. It starts nothing and sends nothing.
    pub(crate) fn read() -> Self {
        Self::read_below(Path::new("/"))
    }

    fn read_below(root: &Path) -> Self {
        let line = |path: &str| text(&root.join(path)).unwrap_or_default().trim().to_owned();
        let namespace = fs::read_link(root.join("proc/self/ns/cgroup")).ok();
        Self {
            system: std::env::consts::OS,
            architecture: std::env::consts::ARCH,
            kernel: line("proc/version"),
            cgroups: text(&root.join("proc/self/cgroup")),
            cgroup_namespace: namespace.and_then(|link| namespace_number(link.to_str()?)),
            processors: line("proc/cpuinfo"),
            hypervisor: line("sys/hypervisor/type"),
            dmi: Dmi {
                sys_vendor: line("sys/class/dmi/id/sys_vendor"),
                product_name: line("sys/class/dmi/id/product_name"),
                chassis_asset_tag: line("sys/class/dmi/id/chassis_asset_tag"),
                board_vendor: line("sys/class/dmi/id/board_vendor"),
                board_asset_tag: line("sys/class/dmi/id/board_asset_tag"),
                bios_version: line("sys/class/dmi/id/bios_version"),
            },
        }
    }
}

/// Returns a file's text, with a replacement character in place of what is not UTF-8. `None` if it cannot be read.
fn text(path: &Path) -> Option<String> {
    fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Returns the number in the text of a namespace's link, such as `cgroup:[4026531835]` (namespaces(7)).
fn namespace_number(link: &str) -> Option<u64> {
    link.strip_prefix("cgroup:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fact_is_read_from_its_file() {
        let root = tempfile::tempdir().unwrap();
        let nothing = HostFacts::read_below(root.path());
        assert_eq!((nothing.cgroups, nothing.cgroup_namespace, nothing.kernel.as_str()), (None, None, ""));
        let put = |path: &str, text: &[u8]| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("proc/version", b"Linux version 6.1.0\n");
        put("proc/self/cgroup", b"6:freezer:/\n0::/\n");
        put("proc/self/ns/.exists", b"");
        std::os::unix::fs::symlink("cgroup:[4026531835]", root.path().join("proc/self/ns/cgroup")).unwrap();
        put("proc/cpuinfo", b"flags\t\t: fpu\n");
        put("sys/hypervisor/type", b"xen\n");
        for name in
            ["sys_vendor", "product_name", "chassis_asset_tag", "board_vendor", "board_asset_tag", "bios_version"]
        {
            put(&format!("sys/class/dmi/id/{name}"), format!("the {name} \n").as_bytes());
        }
        put("sys/class/dmi/id/board_vendor", b"not \xff UTF-8\n");
        let facts = HostFacts::read_below(root.path());
        let expected = HostFacts {
            system: std::env::consts::OS,
            architecture: std::env::consts::ARCH,
            kernel: "Linux version 6.1.0".to_owned(),
            cgroups: Some("6:freezer:/\n0::/\n".to_owned()),
            cgroup_namespace: Some(4_026_531_835),
            processors: "flags\t\t: fpu".to_owned(),
            hypervisor: "xen".to_owned(),
            dmi: Dmi {
                sys_vendor: "the sys_vendor".to_owned(),
                product_name: "the product_name".to_owned(),
                chassis_asset_tag: "the chassis_asset_tag".to_owned(),
                board_vendor: "not \u{fffd} UTF-8".to_owned(),
                board_asset_tag: "the board_asset_tag".to_owned(),
                bios_version: "the bios_version".to_owned(),
            },
        };
        assert_eq!(facts, expected);
    }

    #[test]
    fn only_the_link_of_a_namespace_has_its_number() {
        for (link, expected) in [
            ("cgroup:[4026531835]", Some(4_026_531_835)),
            ("cgroup:[]", None),
            ("pid:[4026531836]", None),
            ("cgroup:[4026531835", None),
            ("", None),
        ] {
            assert_eq!(namespace_number(link), expected, "{link}");
        }
    }
}

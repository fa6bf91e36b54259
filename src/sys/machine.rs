//! Identifies the machine and its boot.
//!
//! [`identities`] are for a copy of the machine's disk on another machine. They are values that the hardware or the
//! hypervisor reports, and no value that is stored on the disk. A value that the current user cannot read is left out.

use std::collections::BTreeMap;
#[cfg(any(target_os = "linux", test))]
use std::fs;
#[cfg(any(target_os = "linux", test))]
use std::path::Path;

use super::plain_host;

/// Returns this machine's ID, 32 hexadecimal digits: machine-id(5), or on macOS its hardware UUID. `None` in many
/// containers.
pub(crate) fn id() -> Option<String> {
    #[cfg(target_os = "linux")]
    let id = line(Path::new("/etc/machine-id"));
    #[cfg(not(target_os = "linux"))]
    let id = super::macos::host::machine_id();
    let is_id = |id: &String| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    id.filter(is_id).or_else(plain_host::machine_id)
}

/// Returns the ID of this boot: `/proc/sys/kernel/random/boot_id`, or `kern.bootsessionuuid` on macOS. `None` if it
/// cannot be read.
pub(crate) fn boot_id() -> Option<String> {
    #[cfg(target_os = "linux")]
    return line(Path::new("/proc/sys/kernel/random/boot_id"));
    #[cfg(not(target_os = "linux"))]
    super::macos::host::boot_id()
}

/// Returns the identities of this machine, by kind. A kind that cannot be read is left out.
pub(crate) fn identities() -> BTreeMap<&'static str, Vec<String>> {
    #[cfg(target_os = "linux")]
    return identities_below(Path::new("/"));
    #[cfg(not(target_os = "linux"))]
    BTreeMap::from([("network", super::macos::host::network_addresses())])
}

#[cfg(any(target_os = "linux", test))]
fn identities_below(root: &Path) -> BTreeMap<&'static str, Vec<String>> {
    /// The kinds and their files. The first three are from DMI. Only root can read most of DMI, but every user can read
    /// the board's asset tag, which on EC2 is the instance ID. The fourth is from Xen. The last one is the instance ID
    /// that cloud-init found at this boot (cloudinit/stages.py). cloud-init has another copy of it on the disk, which
    /// is not used.
    const FILES: [(&str, &str); 5] = [
        ("product_uuid", "sys/class/dmi/id/product_uuid"),
        ("product_serial", "sys/class/dmi/id/product_serial"),
        ("board_asset_tag", "sys/class/dmi/id/board_asset_tag"),
        ("hypervisor_uuid", "sys/hypervisor/uuid"),
        ("instance_id", "run/cloud-init/.instance-id"),
    ];
    let files = FILES.into_iter().filter_map(|(kind, path)| Some((kind, vec![line(&root.join(path))?])));
    let network = network_addresses(&root.join("sys/class/net"));
    files.chain((!network.is_empty()).then_some(("network", network))).collect()
}

#[cfg(any(target_os = "linux", test))]
fn line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

/// Returns the permanent addresses of the network interfaces that have a device, sorted. Addresses that the kernel
/// generated at random and addresses that were set are left out (Documentation/ABI/testing/sysfs-class-net,
/// `addr_assign_type`).
#[cfg(any(target_os = "linux", test))]
fn network_addresses(interfaces: &Path) -> Vec<String> {
    let entries = fs::read_dir(interfaces).into_iter().flatten().flatten();
    let mut addresses: Vec<String> = entries
        .map(|entry| entry.path())
        .filter(|interface| interface.join("device").exists())
        .filter(|interface| line(&interface.join("addr_assign_type")).is_some_and(|kind| kind == "0"))
        .filter_map(|interface| line(&interface.join("address")))
        .filter(|address| address.bytes().any(|byte| !matches!(byte, b'0' | b':')))
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_hardware_says_is_read_and_what_was_drawn_or_set_is_not() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert!(identities_below(root.path()).is_empty());
        for (name, address, kind, device) in [
            ("eth1", "52:54:00:00:00:02", "0", true),
            ("eth0", "52:54:00:00:00:01", "0", true),
            ("lo", "00:00:00:00:00:00", "0", false),
            ("dummy", "00:00:00:00:00:00", "0", true),
            ("veth7", "aa:aa:aa:aa:aa:aa", "0", false),
            ("random", "bb:bb:bb:bb:bb:bb", "1", true),
            ("bonded", "cc:cc:cc:cc:cc:cc", "3", true),
        ] {
            put(&format!("sys/class/net/{name}/address"), &format!("{address}\n"));
            put(&format!("sys/class/net/{name}/addr_assign_type"), &format!("{kind}\n"));
            if device {
                put(&format!("sys/class/net/{name}/device/uevent"), "");
            }
        }
        put("sys/class/dmi/id/board_asset_tag", "i-0123456789abcdef0\n");
        put("sys/class/dmi/id/product_serial", "\n");
        let expected = BTreeMap::from([
            ("board_asset_tag", vec!["i-0123456789abcdef0".to_owned()]),
            ("network", vec!["52:54:00:00:00:01".to_owned(), "52:54:00:00:00:02".to_owned()]),
        ]);
        assert_eq!(identities_below(root.path()), expected);
    }
}

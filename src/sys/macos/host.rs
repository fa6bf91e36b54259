//! Identifies this machine and this boot.

use crate::sys::macos::sysctl;

/// Returns the ID of this machine in 32 hexadecimal digits: its hardware UUID (gethostuuid(3)). `None` if the system
/// does not tell it.
pub(crate) fn machine_id() -> Option<String> {
    let mut id = [0u8; 16];
    let wait = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    // SAFETY: the call writes 16 bytes (uuid_t) and reads `wait`.
    let asked = unsafe { libc::gethostuuid(id.as_mut_ptr(), &raw const wait) };
    (asked == 0 && id != [0; 16]).then(|| hexadecimal(&id, ""))
}

/// Returns the ID of this boot: a UUID that the kernel generates when it starts (`kern.bootsessionuuid`, sysctl(3)). A
/// sleep does not change it.
pub(crate) fn boot_id() -> Option<String> {
    sysctl::text(c"kern.bootsessionuuid")
}

/// Returns each byte as two digits, with `separator` between them.
fn hexadecimal(bytes: &[u8], separator: &str) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(separator)
}

/// Returns the link-level addresses of the network interfaces whose name begins with `en`, sorted (getifaddrs(3)). A
/// virtual machine that is a copy of another one may have its hardware UUID, but has another address. An interface may
/// have a random address, which changes: then this machine may count as another one, and the lock stays.
pub(crate) fn network_addresses() -> Vec<String> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let mut addresses: Vec<String> = interfaces
        .filter(|interface| interface.interface_name.starts_with("en"))
        .filter_map(|interface| interface.address?.as_link_addr()?.addr())
        .filter(|address| *address != [0; 6])
        .map(|address| hexadecimal(&address, ":"))
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

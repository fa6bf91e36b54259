//! The arguments and the environment of a process, in the format of the kernel.
//!
//! `KERN_PROCARGS2` (sysctl(3), sys/sysctl.h) returns a copy of the strings that execve(2) put at the end of the stack
//! (`sysctl_procargsx`, bsd/kern/kern_sysctl.c of xnu):
//!
//! - the number of arguments, an `int`
//! - the path of the program, with one or more zero bytes after it
//! - the arguments, each with a zero byte after it
//! - the environment, in the same form, and then strings for the dynamic linker
//!
//! The kernel leaves out everything after the arguments if the process is restricted, as every program of the system is
//! while System Integrity Protection is on.
//!
//! An empty argument before all others looks like one more zero byte after the path. For each of them, one entry of the
//! environment counts as an argument. Only a process that has overwritten its arguments has such arguments.

/// Returns the entries after the arguments: the environment, and then strings for the dynamic linker, such as
/// `ptr_munge=`. `None` if nothing follows the arguments. Then the kernel has left the environment out, or the process
/// has cleared it, or `bytes` is not in the format.
pub(crate) fn environment(bytes: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let (count, strings) = bytes.split_first_chunk()?;
    let count = usize::try_from(i32::from_ne_bytes(*count)).ok()?;
    let path = strings.iter().position(|&byte| byte == 0)?;
    let padding = strings[path..].iter().position(|&byte| byte != 0)?;
    let mut rest = &strings[path + padding..];
    for _ in 0..count {
        let end = rest.iter().position(|&byte| byte == 0)?;
        rest = &rest[end + 1..];
    }
    rest.iter().any(|&byte| byte != 0).then(|| rest.split(|&byte| byte == 0).filter(|entry| !entry.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the bytes that the kernel returns for a process.
    fn bytes(arguments: &[&str], environment: &[&str]) -> Vec<u8> {
        let count = i32::try_from(arguments.len()).unwrap();
        let strings = arguments.iter().chain(environment).flat_map(|string| [string.as_bytes(), b"\0"].concat());
        count.to_ne_bytes().into_iter().chain(*b"/usr/local/bin/terraform\0\0\0\0").chain(strings).collect()
    }

    fn found(bytes: &[u8]) -> Option<Vec<String>> {
        let text = |entry: &[u8]| String::from_utf8_lossy(entry).into_owned();
        environment(bytes).map(|entries| entries.map(text).collect())
    }

    #[test]
    fn what_follows_the_arguments_is_the_environment() {
        let linker = "ptr_munge=";
        for arguments in [&["terraform", "apply"][..], &["terraform"], &["sh", "", "TFW_RUN=argument", ""], &[]] {
            let expected = ["HOME=/Users/x", "TFW_RUN=a/b", linker];
            assert_eq!(found(&bytes(arguments, &expected)).unwrap(), expected, "{arguments:?}");
            assert_eq!(found(&bytes(arguments, &["", "A=", "", linker])).unwrap(), ["A=", linker], "{arguments:?}");
        }
    }

    #[test]
    fn without_anything_after_the_arguments_the_environment_is_unknown() {
        for environment in [&[][..], &[""], &["", ""]] {
            assert_eq!(found(&bytes(&["sh", "-c", "TFW_RUN=a"], environment)), None);
        }
    }

    /// A process may have overwritten its arguments and its environment.
    #[test]
    fn a_torn_text_is_no_environment_or_the_start_of_one() {
        let whole = bytes(&["terraform", "apply"], &["HOME=/Users/x", "TFW_RUN=a"]);
        for length in 0..whole.len() {
            let torn = found(&whole[..length]).unwrap_or_default();
            assert!(torn.len() <= 2 && torn.iter().zip(["HOME=/Users/x", "TFW_RUN=a"]).all(|(a, b)| b.starts_with(a)));
        }
        for count in [-1, 3, 5, i32::MAX] {
            let mut wrong = whole.clone();
            wrong[..4].copy_from_slice(&i32::to_ne_bytes(count));
            assert!(found(&wrong).is_none_or(|entries| count == 3 && entries == ["TFW_RUN=a"]), "{count}");
        }
    }

    #[test]
    fn no_bytes_panic() {
        let start = String::from_utf8(bytes(&["terraform", "apply"], &["HOME=/Users/x", "TFW_RUN=a"])).unwrap();
        crate::generated_input::for_all(file!(), &crate::generated_input::changed_text(&start), |text| {
            let _ = found(text.as_bytes());
            Ok(())
        });
    }
}

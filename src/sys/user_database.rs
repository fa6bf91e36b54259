//! The names of users in the database of macOS.

use nix::unistd::Uid;

/// Returns the name of this process's user, whose ID is `uid` (getpwuid(3)). Another process of the system answers, so it
/// is asked once: a forked process has the answer of its parent. `None` if the database has no such user, or on another
/// system than macOS, where terraform reads only /etc/passwd.
pub(crate) fn name(uid: Uid) -> Option<String> {
    #[cfg(target_os = "macos")]
    {
        static NAME: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        NAME.get_or_init(|| Some(nix::unistd::User::from_uid(uid).ok()??.name)).clone()
    }
    #[cfg(not(target_os = "macos"))]
    {
        let _ = uid;
        None
    }
}

//! Prevents that an idle machine sleeps.
//!
//! While a machine sleeps, terraform does nothing and nothing renews its credentials, but its lock stays. Only macOS
//! has a command for this that every user may call and that is always installed: caffeinate(8). It does not keep a
//! laptop awake whose lid is closed.

#[cfg(any(target_os = "macos", test))]
use std::path::Path;
#[cfg(any(target_os = "macos", test))]
use std::process::{Child, Command, Stdio};

use nix::unistd::Pid;

/// The machine does not sleep until this value is dropped.
#[derive(Debug)]
pub(crate) struct NoIdleSleep {
    #[cfg(any(target_os = "macos", test))]
    caffeinate: Child,
}

impl NoIdleSleep {
    /// Prevents the sleep of this machine until the value is dropped, and at most until the process `until` has exited:
    /// so it may sleep again even if this process is killed. `None` on Linux, or if caffeinate(8) cannot be started.
    pub(crate) fn while_running(until: Pid) -> Option<Self> {
        #[cfg(target_os = "macos")]
        return Self::start(Path::new("/usr/bin/caffeinate"), until).ok();
        #[cfg(not(target_os = "macos"))]
        {
            let _ = until;
            None
        }
    }

    #[cfg(any(target_os = "macos", test))]
    fn start(caffeinate: &Path, until: Pid) -> std::io::Result<Self> {
        let mut command = Command::new(caffeinate);
        command.args(["-i", "-w", &until.to_string()]).env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // A ^C at the terminal must not end it.
        super::session::of_its_own(&mut command);
        #[expect(clippy::disallowed_methods, reason = "it is not terraform and needs only the settings above")]
        let caffeinate = command.spawn()?;
        Ok(Self { caffeinate })
    }

    /// Returns the pid of the process that prevents the sleep. It is a child of this process.
    pub(crate) fn pid(&self) -> Option<Pid> {
        #[cfg(any(target_os = "macos", test))]
        return i32::try_from(self.caffeinate.id()).ok().map(Pid::from_raw);
        #[cfg(not(any(target_os = "macos", test)))]
        {
            let Self { .. } = self;
            None
        }
    }
}

#[cfg(any(target_os = "macos", test))]
impl Drop for NoIdleSleep {
    fn drop(&mut self) {
        let _ = self.caffeinate.kill();
        let _ = self.caffeinate.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_command_waits_for_terraform_and_ends_with_the_value() {
        let directory = tempfile::tempdir().unwrap();
        let (program, said) = (directory.path().join("caffeinate"), directory.path().join("said"));
        let script = format!("#!/bin/sh\necho \"$*\" >{0}.new\nmv {0}.new {0}\nexec sleep 60\n", said.display());
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let kept = NoIdleSleep::start(&program, Pid::from_raw(123)).unwrap();
        while !said.exists() {
            crate::sys::poll::wait(&[], Some(std::time::Duration::from_millis(5)));
        }
        assert_eq!(std::fs::read_to_string(said).unwrap(), "-i -w 123\n");
        let pid = kept.pid().unwrap();
        assert!(crate::sys::wait::is_child(pid));
        drop(kept);
        assert!(!crate::sys::wait::is_child(pid));
    }
}

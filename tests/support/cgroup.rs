//! A cgroup v2 of a test, which can be frozen.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long the kernel may take on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A new cgroup v2. At the end of the test, its processes are killed, and it is removed.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// # Errors
    /// Returns the reason if it cannot be created: there is no cgroup v2, or an ordinary user may not create one.
    pub fn create(name: &str) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
        let root = mount.and_then(|line| line.split(' ').nth(1)).ok_or("there is no cgroup v2")?;
        let path = Path::new(root).join(name);
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }

    /// Returns the line of a shell script that puts the shell into this cgroup.
    pub fn enter(&self) -> String {
        format!("echo $$ > '{}/cgroup.procs'", self.0.display())
    }

    /// Freezes or thaws it, and waits until that is done.
    #[track_caller]
    pub fn freeze(&self, is_frozen: bool) {
        let number = i32::from(is_frozen).to_string();
        fs::write(self.0.join("cgroup.freeze"), &number).unwrap();
        let is_so = || self.text("cgroup.events").lines().any(|line| line == format!("frozen {number}"));
        assert!(is_so_in_time(is_so), "waited for frozen {number}: {}", self.text("cgroup.events"));
    }

    fn text(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let is_removed = is_so_in_time(|| {
            // It fails in a kernel before 5.14.
            let _ = fs::write(self.0.join("cgroup.kill"), "1");
            fs::remove_dir(&self.0).is_ok()
        });
        assert!(is_removed || std::thread::panicking(), "processes are left in it: {}", self.text("cgroup.procs"));
    }
}

/// Waits until `is_so` returns true. False if it does not in [`TIMEOUT`].
fn is_so_in_time(is_so: impl Fn() -> bool) -> bool {
    let until = Instant::now() + TIMEOUT;
    while !is_so() {
        if Instant::now() > until {
            return false;
        }
        sleep(Duration::from_millis(1));
    }
    true
}

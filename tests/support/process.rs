//! A process under test. It is started with pipes in its own session.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

pub use super::system::{SystemCall, state, waits_in};
use super::system::{environment, is_dying, processes};
use super::{LONGEST, wait_for, wait_within};

/// The exit status and the output of a process.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// Removes the line that says that a recovery takes more than 1 s. The load of the machine decides whether there is
    /// one.
    pub fn without_progress(mut self) -> Self {
        self.err = self.err.replace("tf: cleaning up after an earlier run; press ^C twice to skip this\n", "");
        self
    }

    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Whether a terraform with `-lock-timeout` has given up because the lock that refused it was gone when it read it.
    /// Bare terraform does so, too.
    pub fn met_a_lock_that_went(&self) -> bool {
        self.code() == Some(1)
            && ["unexpected end of JSON input", "NoSuchKey"].iter().any(|text| self.err.contains(text))
    }

    /// Returns stdout without the lines that terraform prints if it waits more than 400 ms for a lock or an unlock
    /// (clistate/state.go, `LockThreshold`). On a busy machine, any terraform may print them.
    pub fn out_without_slow_locks(&self) -> String {
        let slow =
            ["Acquiring", "Releasing"].map(|what| format!("{what} state lock. This may take a few moments...\n"));
        self.out.split_inclusive('\n').filter(|line| !slow.iter().any(|slow| slow == line)).collect()
    }

    pub fn core_dumped(&self) -> bool {
        self.status.core_dumped()
    }
}

type Captured = Arc<Mutex<Vec<u8>>>;

pub struct Run {
    child: Child,
    out: Captured,
    err: Captured,
    readers: Vec<JoinHandle<()>>,
    pub stdin: Option<ChildStdin>,
}

fn capture(mut source: impl Read + Send + 'static, into: &Captured) -> JoinHandle<()> {
    let into = Arc::clone(into);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(length @ 1..) = source.read(&mut bytes) {
            into.lock().unwrap().extend(&bytes[..length]);
        }
    })
}

fn text(captured: &Captured) -> String {
    String::from_utf8_lossy(&captured.lock().unwrap()).into_owned()
}

impl Run {
    pub fn start(mut command: Command) -> Self {
        // SAFETY: setsid is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        Self::start_as_is(command)
    }

    /// Like [`Run::start`], but in the session of the tests.
    pub fn start_as_is(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (out, err) = (Captured::default(), Captured::default());
        let readers = vec![capture(child.stdout.take().unwrap(), &out), capture(child.stderr.take().unwrap(), &err)];
        let stdin = child.stdin.take();
        Self { child, out, err, readers, stdin }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    pub fn out(&self) -> String {
        text(&self.out)
    }

    pub fn err(&self) -> String {
        text(&self.err)
    }

    #[track_caller]
    pub fn wait_for_out(&self, what: &str) {
        wait_for(what, || self.out().contains(what).then_some(()), || format!("{}\n{}", self.out(), self.err()));
    }

    #[track_caller]
    pub fn wait_for_err(&self, what: &str) {
        wait_for(what, || self.err().contains(what).then_some(()), || format!("{}\n{}", self.out(), self.err()));
    }

    pub fn send(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Sends SIGKILL to the terraform below this process.
    #[track_caller]
    pub fn kill_terraform(&self) {
        kill(terraform_below(self.pid()), Signal::SIGKILL).unwrap();
    }

    pub fn send_to_group(&self, signal: Signal) {
        killpg(self.pid(), signal).unwrap();
    }

    /// Waits until the process has exited and its output is complete.
    #[track_caller]
    pub fn wait(self) -> Ended {
        self.wait_at_most(LONGEST)
    }

    /// Does the same as [`Run::wait`], for a process that may take longer than any other.
    #[track_caller]
    pub fn wait_at_most(mut self, limit: Duration) -> Ended {
        drop(self.stdin.take());
        let (out, err) = (Arc::clone(&self.out), Arc::clone(&self.err));
        let status = wait_within(
            limit,
            "the end of the process",
            || self.child.try_wait().unwrap(),
            || format!("{}\n{}\n{}", text(&out), text(&err), all_processes()),
        );
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        Ended { status, out: text(&self.out), err: text(&self.err) }
    }
}

/// Copies the program at `from` to `to`, in a process of its own. A process that another test forks at the same moment
/// would inherit a descriptor of this one that can write to the copy, and until its exec, nobody could execute the copy
/// (ETXTBSY, execve(2)).
#[track_caller]
pub fn copy_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let status = Command::new("cp").arg(from.as_ref()).arg(to.as_ref()).status().unwrap();
    assert!(status.success(), "{}", to.as_ref().display());
}

impl Drop for Run {
    /// Kills a run that has not ended, with all its processes. The guardian of a `tf` that the test has killed works
    /// on.
    fn drop(&mut self) {
        if is_dying(self.pid()) {
            let _ = self.child.wait();
        } else if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            kill_tree(self.pid());
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn all_processes() -> String {
    let output = Command::new("ps").args(["-eo", "pid,ppid,pgid,sid,tpgid,stat,args", "--forest"]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Returns `root` and all processes below it: (pid, name, state, process group).
pub fn tree(root: Pid) -> Vec<(Pid, String, char, Pid)> {
    let all = processes();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(all.iter().filter(|process| process.parent == parent).map(|process| process.pid));
        next += 1;
    }
    let below = all.into_iter().filter(|process| found.contains(&process.pid));
    below.map(|process| (process.pid, process.name, process.state, process.group)).collect()
}

fn kill_tree(root: Pid) {
    for (pid, ..) in tree(root) {
        let _ = kill(pid, Signal::SIGKILL);
    }
}

/// Returns the path of the file into which the terraform `pid` logs.
#[track_caller]
pub fn log_path(pid: Pid) -> PathBuf {
    let entries = environment(pid).unwrap();
    entries.iter().find_map(|entry| entry.strip_prefix("TF_LOG_PATH=")).unwrap().into()
}

/// Returns the terraform below `root`.
#[track_caller]
pub fn terraform_below(root: Pid) -> Pid {
    wait_for(
        "terraform",
        || tree(root).into_iter().find(|(_, name, ..)| name == "terraform").map(|(pid, ..)| pid),
        || format!("{:?}", tree(root)),
    )
}

//! A process under test. It is started with pipes in its own session.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::{LONGEST, wait_for, wait_within};

/// The exit status and the output of a process.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Ended {
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

/// Copies the program at `from` to `to`, in a process of its own. A process that another test forks at the same moment would
/// inherit a descriptor of this one that can write to the copy, and until its exec, nobody could execute the copy (ETXTBSY,
/// execve(2)).
#[track_caller]
pub fn copy_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let status = Command::new("cp").arg(from.as_ref()).arg(to.as_ref()).status().unwrap();
    assert!(status.success(), "{}", to.as_ref().display());
}

/// Whether a SIGKILL to the process has not ended it yet. Its descriptors may be closed by then, so that others act on its
/// death, while it still has children.
fn is_dying(pid: Pid) -> bool {
    /// The bit of SIGKILL in the sets of proc_pid_status(5).
    const KILL: u64 = 1 << (Signal::SIGKILL as u64 - 1);
    /// The flag of the kernel's include/linux/sched.h, in field 9 of proc_pid_stat(5).
    const PF_EXITING: u64 = 4;
    let read = |name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let (status, stat) = (read("status"), read("stat"));
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let is_pending = pending.filter_map(|set| u64::from_str_radix(set.trim(), 16).ok()).any(|set| set & KILL != 0);
    let flags = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(6)?.parse::<u64>().ok());
    is_pending || flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

impl Drop for Run {
    /// Kills a run that has not ended, with all its processes. The guardian of a `tf` that the test has killed works on.
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

/// Returns `root` and all processes below it, from /proc: (pid, name, state, process group).
pub fn tree(root: Pid) -> Vec<(Pid, String, char, Pid)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat).into_owned();
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        let fields: Vec<&str> = stat[close + 2..].split(' ').collect();
        let number = |place: usize| Pid::from_raw(fields[place].parse().unwrap_or(0));
        all.push((
            Pid::from_raw(pid),
            stat[open + 1..close].to_owned(),
            fields[0].chars().next().unwrap(),
            number(1),
            number(2),
        ));
    }
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(all.iter().filter(|process| process.3 == parent).map(|process| process.0));
        next += 1;
    }
    all.into_iter()
        .filter(|(pid, ..)| found.contains(pid))
        .map(|(pid, name, state, _, group)| (pid, name, state, group))
        .collect()
}

fn kill_tree(root: Pid) {
    for (pid, ..) in tree(root) {
        let _ = kill(pid, Signal::SIGKILL);
    }
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

/// The system calls that [`waits_in`] knows.
#[derive(Clone, Copy, Debug)]
pub enum SystemCall {
    Read,
    Write,
}

/// Whether a process waits in this system call (proc_pid_syscall(5)). False on systems other than Linux.
pub fn waits_in(pid: Pid, call: SystemCall) -> bool {
    #[cfg(target_os = "linux")]
    {
        let number = match call {
            SystemCall::Read => libc::SYS_read,
            SystemCall::Write => libc::SYS_write,
        };
        let current = std::fs::read_to_string(format!("/proc/{pid}/syscall"));
        current.is_ok_and(|current| current.starts_with(&format!("{number} ")))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (pid, call);
        false
    }
}

/// Returns the state of a process: `S`, `T`, `Z`... `None` if it no longer exists. A process whose first thread has
/// exited is no zombie as long as another thread has not: it still has its descriptors, and so its file locks.
pub fn state(pid: Pid) -> Option<char> {
    let of = |thread: &str| {
        let stat = std::fs::read(format!("/proc/{pid}/task/{thread}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat).into_owned();
        stat[stat.rfind(')')? + 2..].chars().next()
    };
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let states = threads.filter_map(|thread| of(thread.file_name().to_str()?));
    states.reduce(|one, other| if matches!(one, 'Z' | 'X') { other } else { one })
}

//! A command of the user's that is run for what it prints, in a process group of its own.
//!
//! It may start others, and it may ask a person for something: so its group is the terminal's foreground group while it
//! runs, if ours is, and all of the group is killed when nobody waits for it any more.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::{Pid, getpgrp};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::sleep;

use super::terminal::Terminal;

/// What is printed beyond this many bytes is not kept.
const KEPT: usize = 1 << 16;

/// Between two looks at whether it has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Runs `command` by /bin/sh and gives its exit status and the first 64 KiB that it printed. Its stderr is ours, and its
/// stdin too where that is a terminal. Dropping the future kills the command with its process group. So does, as far as the
/// shell's own process, the end of the thread that calls this (Linux only: PR_SET_PDEATHSIG, prctl(2)).
///
/// # Errors
/// When no process or no pipe can be had.
pub(crate) async fn output(command: &str) -> io::Result<(ExitStatus, Vec<u8>)> {
    let mut running = Running::start(command)?;
    let stdout = running.child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut stdout = Receiver::from_owned_fd(OwnedFd::from(stdout))?;
    let mut printed = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            read = stdout.read(&mut buffer) => match read {
                Ok(length @ 1..) => keep(&mut printed, &buffer[..length]),
                // The end of its output. What remains is its own end.
                _ => break,
            },
            () = sleep(POLL_INTERVAL) => {
                if let Some(status) = running.ended()? {
                    // Something that it has left in the background holds the pipe. What is in it is all that it printed.
                    while let Ok(length @ 1..) = stdout.try_read(&mut buffer) {
                        keep(&mut printed, &buffer[..length]);
                    }
                    return Ok((status, printed));
                }
            }
        }
    }
    loop {
        if let Some(status) = running.ended()? {
            return Ok((status, printed));
        }
        sleep(POLL_INTERVAL).await;
    }
}

fn keep(printed: &mut Vec<u8>, bytes: &[u8]) {
    let room = KEPT.saturating_sub(printed.len());
    printed.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

/// The command while it runs.
struct Running {
    child: Child,
    /// Its process group. The number stays its own until the child is waited for.
    group: Pid,
    /// It has ended and was waited for.
    is_over: bool,
    /// The terminal whose foreground group it is, in place of ours.
    terminal: Option<Terminal>,
}

impl Running {
    fn start(command: &str) -> io::Result<Self> {
        use std::io::IsTerminal;
        let stdin = if io::stdin().is_terminal() { Stdio::inherit() } else { Stdio::null() };
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).stdin(stdin).stdout(Stdio::piped()).process_group(0);
        #[cfg(target_os = "linux")]
        // SAFETY: prctl(2) with PR_SET_PDEATHSIG is one system call, and touches nothing of this process's memory.
        unsafe {
            shell.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        #[expect(clippy::disallowed_methods, reason = "no terraform: nothing of it must be in order but what is above")]
        let child = shell.spawn()?;
        let group = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        let terminal = Terminal::open().filter(|terminal| terminal.foreground().is_ok_and(|group| group == getpgrp()));
        let mut running = Self { child, group, is_over: false, terminal };
        if running.set_foreground(group) {
            // It may have been stopped for reading too early.
            let _ = killpg(group, Signal::SIGCONT);
        } else {
            running.terminal = None;
        }
        Ok(running)
    }

    /// Makes `group` the foreground group of the terminal. False if there is none, or it is gone.
    fn set_foreground(&self, group: Pid) -> bool {
        let Some(terminal) = &self.terminal else { return false };
        let mut only = SigSet::empty();
        only.add(Signal::SIGTTOU);
        // A background process that does this is stopped otherwise (tcsetpgrp(3)).
        let Ok(mask) = only.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK) else { return false };
        let set = terminal.set_foreground(group);
        let _ = mask.thread_set_mask();
        set.is_ok()
    }

    /// Its exit status, when it has ended.
    fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        self.is_over |= status.is_some();
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_over {
            let _ = killpg(self.group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
        self.set_foreground(getpgrp());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn what_it_prints_is_kept_and_its_end_is_told() {
        let (status, printed) = run(output("printf hello; exit 3")).unwrap();
        assert_eq!((status.code(), printed.as_slice()), (Some(3), &b"hello"[..]));
        let (status, printed) = run(output("head -c 200000 /dev/zero")).unwrap();
        assert_eq!((status.code(), printed.len()), (Some(0), KEPT));
    }

    #[test]
    fn what_it_leaves_in_the_background_is_not_waited_for() {
        let (status, printed) = run(output("printf hello; sleep 60 & echo $!")).unwrap();
        let text = String::from_utf8(printed).unwrap();
        let left: i32 = text.strip_prefix("hello").unwrap().trim().parse().unwrap();
        assert_eq!(status.code(), Some(0));
        nix::sys::signal::kill(Pid::from_raw(left), Signal::SIGKILL).expect("it was left alone");
    }

    #[test]
    fn when_nobody_waits_any_more_all_of_its_group_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let command = format!("sleep 60 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
        let pid: i32 = run(async {
            tokio::select! {
                _ = output(&command) => panic!("it waits"),
                pid = async {
                    loop {
                        match std::fs::read_to_string(&file) {
                            Ok(text) => return text.trim().parse().unwrap(),
                            Err(_) => sleep(POLL_INTERVAL).await,
                        }
                    }
                } => pid,
            }
        });
        let begun = std::time::Instant::now();
        // It is init's child now, and its end takes a moment.
        while crate::sys::process::Process::look_up(Pid::from_raw(pid)).is_some_and(|process| !process.is_dead()) {
            assert!(begun.elapsed() < Duration::from_secs(20), "process {pid} of the group is still there");
            run(async { sleep(POLL_INTERVAL).await });
        }
    }
}

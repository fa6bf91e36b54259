//! Runs a command of the user and returns its output.
//!
//! A command that may prompt a person runs in the same way as it does when terraform starts it. It is in the process
//! group of this process, can read the terminal if this process can, receives the signals of the same keys, and is
//! stopped and continued together with this process. A command that may not prompt a person has no terminal.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
#[cfg(target_os = "linux")]
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg, raise};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::time::sleep;

use super::process::{Process, ProcessHandle};
use super::terminal::{Modes, Terminal};
use super::{descriptor, session, wait};

/// The maximum number of bytes of output that are kept: 64 KiB. The rest is discarded.
pub(crate) const MAX_OUTPUT_BYTES: usize = 1 << 16;

/// The interval between two checks whether the command has exited.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Whether a command may prompt a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asks {
    /// It may prompt the person at the terminal of this process.
    Person,
    /// It may not prompt anybody. It is in its own session, without a terminal.
    Nobody,
}

/// Runs `command` with /bin/sh and returns its exit status and the first 64 KiB of its stdout. The command inherits
/// stderr. It inherits stdin if stdin is a terminal and the command may prompt a person; otherwise the command's stdin
/// is /dev/null. Dropping the future kills the command and all its descendants. If this process is killed, the kernel
/// kills the shell as well (Linux only: PR_SET_PDEATHSIG, prctl(2)), but not the processes that the shell has started.
///
/// # Errors
/// An error if no process or no pipe can be created, or if waiting for the command fails.
pub(crate) async fn output(command: &str, asks: Asks) -> io::Result<(ExitStatus, Vec<u8>)> {
    use std::io::IsTerminal;
    let may_ask = asks == Asks::Person && io::stdin().is_terminal();
    let mut shell = shell(OsStr::new(command));
    shell.stdin(if may_ask { Stdio::inherit() } else { Stdio::null() });
    let mut running = Running::start(shell, asks)?;
    let mut stdout = Printed::by(running.child.stdout.take().map(OwnedFd::from))?;
    let status = running.over(&mut stdout, &mut Printed::default(), std::future::ready(())).await?;
    Ok((status, stdout.bytes))
}

/// The result of a command that has answered a question.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) status: ExitStatus,
    /// The first 64 KiB of its stdout.
    pub(crate) stdout: Vec<u8>,
    /// The first 64 KiB of its stderr.
    pub(crate) stderr: Vec<u8>,
}

/// Runs `command` with /bin/sh and with `question` on its stdin. It may not prompt a person, inherits no other
/// descriptor, and does not get the environment variables `without`. Dropping the future kills the command, its process
/// group and all its descendants.
///
/// # Errors
/// As [`output`].
pub(crate) async fn answer(command: &OsStr, question: &[u8], without: &[&str]) -> io::Result<Answered> {
    let mut shell = shell(command);
    shell.stdin(Stdio::piped()).stderr(Stdio::piped());
    for name in without {
        shell.env_remove(name);
    }
    descriptor::inherit_only_standard(&mut shell);
    let mut running = Running::start(shell, Asks::Nobody)?;
    let stdin = running.child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut stdin = Sender::from_owned_fd(OwnedFd::from(stdin))?;
    let mut stdout = Printed::by(running.child.stdout.take().map(OwnedFd::from))?;
    let mut stderr = Printed::by(running.child.stderr.take().map(OwnedFd::from))?;
    let told = async move {
        // A command that answers without reading the question closes the pipe. The end of this block closes it too, so
        // that the command reads end of file.
        let _ = stdin.write_all(question).await;
    };
    let status = running.over(&mut stdout, &mut stderr, told).await?;
    Ok(Answered { status, stdout: stdout.bytes, stderr: stderr.bytes })
}

/// Returns `command` for /bin/sh, with a pipe as its stdout.
fn shell(command: &OsStr) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).stdout(Stdio::piped());
    shell
}

/// What a command has printed into a pipe.
#[derive(Default)]
struct Printed {
    /// The first 64 KiB.
    bytes: Vec<u8>,
    /// The read end of the pipe. `None` after every writer has closed the pipe.
    pipe: Option<Receiver>,
}

impl Printed {
    fn by(pipe: Option<OwnedFd>) -> io::Result<Self> {
        let pipe = pipe.ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { bytes: Vec::new(), pipe: Some(Receiver::from_owned_fd(pipe)?) })
    }

    /// Reads once. Never returns if the pipe is closed.
    async fn more(&mut self) {
        let Some(pipe) = &mut self.pipe else { return std::future::pending().await };
        let mut buffer = [0; 4096];
        match pipe.read(&mut buffer).await {
            Ok(length @ 1..) => keep(&mut self.bytes, &buffer[..length]),
            _ => self.pipe = None,
        }
    }

    /// Adds everything that is in the pipe now.
    fn rest(&mut self) {
        if let Some(pipe) = &self.pipe {
            keep_rest(&mut self.bytes, pipe);
        }
    }
}

/// Adds everything that is in the pipe now, and at most 64 KiB. `Receiver::try_read` could miss it: without a new poll
/// of the runtime, it does not read a pipe that was empty at the last poll.
fn keep_rest(printed: &mut Vec<u8>, pipe: &Receiver) {
    let mut buffer = [0; 4096];
    for _ in 0..MAX_OUTPUT_BYTES / buffer.len() {
        let Ok(length @ 1..) = nix::unistd::read(pipe, &mut buffer) else { break };
        keep(printed, &buffer[..length]);
    }
}

fn keep(printed: &mut Vec<u8>, bytes: &[u8]) {
    let room = MAX_OUTPUT_BYTES.saturating_sub(printed.len());
    printed.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

/// A command that was started. Dropping this kills the command if it is still running.
struct Running {
    child: Child,
    pid: Pid,
    asks: Asks,
    /// Whether the command has exited and was reaped.
    is_over: bool,
    /// The terminal that the command may read, and its modes before the command started. `None` if the command may read
    /// no terminal, or has exited successfully.
    terminal: Option<(Terminal, Modes)>,
}

impl Running {
    /// Starts `shell`, whose stdin and stdout are set.
    fn start(mut shell: Command, asks: Asks) -> io::Result<Self> {
        let may_ask = asks == Asks::Person;
        if !may_ask {
            session::of_its_own(&mut shell);
        }
        #[cfg(target_os = "linux")]
        // SAFETY: prctl(2) with PR_SET_PDEATHSIG is a single system call and does not access the memory of this
        // process.
        unsafe {
            shell.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let terminal = if may_ask && Terminal::is_our_turn() { Terminal::open() } else { None };
        let terminal = terminal.and_then(|terminal| terminal.modes().map(|modes| (terminal, modes)));
        #[expect(clippy::disallowed_methods, reason = "it is not terraform and needs only the settings above")]
        let child = shell.spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        Ok(Self { child, pid, asks, is_over: false, terminal })
    }

    /// Waits until the command has exited, while `told` runs, and returns its exit status. A process that the command
    /// has left in the background is not waited for, even if it keeps a pipe open.
    async fn over(
        &mut self,
        stdout: &mut Printed,
        stderr: &mut Printed,
        told: impl Future<Output = ()>,
    ) -> io::Result<ExitStatus> {
        let mut told = std::pin::pin!(told);
        let mut is_told = false;
        loop {
            tokio::select! {
                () = stdout.more() => {}
                () = stderr.more() => {}
                () = &mut told, if !is_told => is_told = true,
                () = sleep(POLL_INTERVAL) => {
                    if let Some(status) = self.ended()? {
                        // The pipes now contain all the output of the command itself.
                        stdout.rest();
                        stderr.rest();
                        return Ok(status);
                    }
                }
            }
        }
    }

    /// Returns the exit status of the command, or `None` if it has not exited. If the command was stopped by a key, or
    /// because it read the terminal in the background, this process stops too. The shell of which this process is a job
    /// then notices that the job is stopped, and later continues both processes.
    fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        let stopped = if self.asks == Asks::Person { wait::stopped(self.pid) } else { None };
        // Any other stop signal is from a process, not from the terminal.
        if let Some(signal @ (Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU)) = stopped {
            // The command may have been stopped because it was in the background. If the shell has made this group the
            // foreground process group since then, this process must not stop.
            if signal == Signal::SIGTSTP || !Terminal::is_our_turn() {
                raise(Signal::SIGSTOP)?;
            }
            // The shell may have continued this process only, so continue the command too.
            let _ = kill(self.pid, Signal::SIGCONT);
        }
        let status = self.child.try_wait()?;
        self.is_over |= status.is_some();
        if status.is_some_and(|status| status.success()) {
            // A successful command has restored the terminal's modes, or has changed them on purpose.
            self.terminal = None;
        }
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_over {
            kill_with_descendants(self.pid);
            if self.asks == Asks::Nobody {
                // A descendant whose parent has exited is below init, but still in the group of the command.
                let _ = killpg(self.pid, Signal::SIGKILL);
            }
            let _ = self.child.wait();
        }
        // A command that was killed, by this process or by a key, has not restored the terminal's modes. For example,
        // the terminal might not echo what a person types.
        if let Some((terminal, modes)) = self.terminal.as_ref().filter(|_| Terminal::is_our_turn()) {
            let _ = terminal.set_modes(modes);
        }
    }
}

/// Kills the child process `root`, which must not have been reaped, and all its descendants. They are stopped first,
/// because a stopped process starts no other process. It does not exit either, so its children are not reparented.
fn kill_with_descendants(root: Pid) {
    let _ = kill(root, Signal::SIGSTOP);
    let mut stopped: Vec<(Process, ProcessHandle)> = Vec::new();
    loop {
        let known = |process: &Process| stopped.iter().any(|(other, _)| other.pid == process.pid);
        let new: Vec<Process> =
            Process::below(root).into_iter().filter(|process| !process.is_dead() && !known(process)).collect();
        if new.is_empty() {
            break;
        }
        for process in new {
            let Ok(handle) = ProcessHandle::open(process.pid) else { continue };
            // Before the descriptor was opened, the pid may have been reused for another process.
            let same = |now: &Process| now.parent == process.parent && now.start == process.start;
            if Process::look_up(process.pid).as_ref().is_some_and(same) {
                let _ = handle.signal(Signal::SIGSTOP);
                stopped.push((process, handle));
            }
        }
        if stopped.len() > 10_000 {
            break;
        }
    }
    for (_, handle) in &stopped {
        let _ = handle.signal(Signal::SIGKILL);
    }
    let _ = kill(root, Signal::SIGKILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn what_it_prints_is_kept_and_its_end_is_told() {
        let (status, printed) = run(output("printf hello; exit 3", Asks::Nobody)).unwrap();
        assert_eq!((status.code(), printed.as_slice()), (Some(3), &b"hello"[..]));
        let (status, printed) = run(output("head -c 200000 /dev/zero", Asks::Nobody)).unwrap();
        assert_eq!((status.code(), printed.len()), (Some(0), MAX_OUTPUT_BYTES));
    }

    #[test]
    fn what_it_prints_just_before_its_end_is_kept() {
        let (end, write_end) = std::io::pipe().unwrap();
        let printed = run(async {
            let stdout = Receiver::from_owned_fd(end.into()).unwrap();
            // The runtime has not polled the pipe since this write.
            nix::unistd::write(&write_end, &[b'x'; 5000]).unwrap();
            assert!(stdout.try_read(&mut [0]).is_err());
            let mut printed = b"begun".to_vec();
            keep_rest(&mut printed, &stdout);
            printed
        });
        assert_eq!((printed.len(), &printed[..6]), (5005, &b"begunx"[..]));
    }

    #[test]
    fn what_it_leaves_in_the_background_is_not_waited_for() {
        let (status, printed) = run(output("printf hello; sleep 60 & echo $!", Asks::Nobody)).unwrap();
        let text = String::from_utf8(printed).unwrap();
        let left: i32 = text.strip_prefix("hello").unwrap().trim().parse().unwrap();
        assert_eq!(status.code(), Some(0));
        nix::sys::signal::kill(Pid::from_raw(left), Signal::SIGKILL).expect("it was left alone");
    }

    #[test]
    fn a_question_is_answered_with_three_descriptors_and_no_more() {
        let (end, other) = std::io::pipe().unwrap();
        let inheritable = descriptor::inheritable_high(&end).unwrap();
        let command = "cat; echo /proc/self/fd/* /dev/fd/* >&2; echo ${HOME-unset}; exit 3";
        let question = vec![b'q'; 200_000];
        let answered = run(answer(OsStr::new(command), b"question ", &["HOME"])).unwrap();
        assert_eq!((answered.status.code(), answered.stdout.as_slice()), (Some(3), &b"question unset\n"[..]));
        let listed = String::from_utf8(answered.stderr).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&inheritable);
        assert!(listed.contains("/fd/2") && !listed.contains(&format!("/fd/{number}")), "{listed}");
        // A question that does not fit into the pipe is neither waited for nor an error.
        let answered = run(answer(OsStr::new("echo deaf"), &question, &[])).unwrap();
        assert_eq!(answered.stdout, b"deaf\n");
        let answered = run(answer(OsStr::new("wc -c"), &question, &[])).unwrap();
        assert_eq!(String::from_utf8(answered.stdout).unwrap().trim(), "200000");
        drop(other);
    }

    #[test]
    fn when_nobody_waits_any_more_it_is_killed_with_all_that_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let command = format!("sleep 60 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
        let pid: i32 = run(async {
            tokio::select! {
                _ = output(&command, Asks::Person) => panic!("it waits"),
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
        // The process is a child of init by now, and takes a moment to exit.
        while crate::sys::process::Process::look_up(Pid::from_raw(pid)).is_some_and(|process| !process.is_dead()) {
            assert!(begun.elapsed() < Duration::from_secs(20), "process {pid} below it is still there");
            run(async { sleep(POLL_INTERVAL).await });
        }
    }
}

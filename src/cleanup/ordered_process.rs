//! Another `tf` process that works beside this one while terraform runs: it reads its orders from stdin, and ends when
//! its stdin ends. So it ends with the process that has started it.
//!
//! It has a session of its own, so that it does not get a ^C that interrupts terraform, and it cannot prompt at the
//! terminal from which terraform reads. It reports on stderr.

use std::io::{BufRead, BufReader, ErrorKind, Read, Stdin, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, ExitStatus, Stdio};

use nix::poll::PollFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::another_tf;
use crate::sys::{poll, session};

/// The process, as seen by the process that has started it.
#[derive(Debug)]
pub(crate) struct OrderedProcess {
    child: Child,
}

impl OrderedProcess {
    /// Starts `tf locks` with the internal word `word`, and gives it `orders` as one line of JSON on stdin, because
    /// they may contain credentials. Its stdout is a pipe: the end of stdout shows that the process has ended.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub(crate) fn start(word: &str, orders: &impl Serialize) -> std::io::Result<Self> {
        let mut line = serde_json::to_vec(orders)?;
        line.push(b'\n');
        let mut command = another_tf::locks(&[word])?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        session::of_its_own(&mut command);
        #[expect(clippy::disallowed_methods, reason = "this starts `tf`, not terraform; it needs only the setup above")]
        let mut child = command.spawn()?;
        // The pipe has room for more than any orders. A process that has ended is noticed by its stdout.
        let _ = child.stdin.as_mut().map(|stdin| stdin.write_all(&line));
        Ok(Self { child })
    }

    /// Returns the process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends one byte, which follows the orders. Returns whether it was sent. A process that does not read, for example
    /// because it is stopped, does not block this one.
    pub(crate) fn send(&mut self, byte: u8) -> bool {
        let Some(stdin) = self.child.stdin.as_mut() else { return false };
        poll::ready_now(stdin.as_fd(), PollFlags::POLLOUT) && stdin.write_all(&[byte]).is_ok()
    }

    /// Tells the process to end.
    pub(crate) fn tell_to_end(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Returns how the process has ended. `None` if it is still running.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok()?
    }

    /// Returns the stdout of the process, to read what it has written. `None` if it was returned by
    /// [`OrderedProcess::take_stdout`].
    pub(crate) fn stdout(&mut self) -> Option<&mut ChildStdout> {
        self.child.stdout.as_mut()
    }

    /// Returns the stdout of the process, which ends with it. `None` if it was returned before.
    pub(crate) fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Kills the process.
    pub(crate) fn kill(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
    }

    /// Waits until the process has ended. `None` if its status cannot be read.
    pub(crate) fn wait(&mut self) -> Option<ExitStatus> {
        self.child.wait().ok()
    }

    /// Tells the process to end, and returns its child process for the wait.
    pub(crate) fn into_child(mut self) -> Child {
        self.tell_to_end();
        self.child
    }
}

/// The stdin of a process that was started by [`OrderedProcess::start`].
pub(crate) struct Orders {
    stdin: BufReader<Stdin>,
}

impl Orders {
    /// Reads the orders. `None` if stdin has none, or if they cannot be parsed.
    pub(crate) fn read<T: DeserializeOwned>() -> Option<(T, Self)> {
        let mut line = String::new();
        let mut stdin = BufReader::new(std::io::stdin());
        stdin.read_line(&mut line).ok()?;
        Some((serde_json::from_str(&line).ok()?, Self { stdin }))
    }

    /// Returns a future that is ready when stdin has ended. `None` if no thread can be started. The thread that reads
    /// stdin ends with the process. It calls `hear` for each byte that follows the orders.
    pub(crate) fn end(self, hear: impl Fn(u8) + Send + 'static) -> Option<impl Future<Output = ()>> {
        let (end_of_stdin, told) = tokio::sync::oneshot::channel::<()>();
        let listens = std::thread::Builder::new().spawn(move || {
            for byte in self.stdin.bytes() {
                match byte {
                    Ok(byte) => hear(byte),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            drop(end_of_stdin);
        });
        listens.ok()?;
        Some(async {
            let _ = told.await;
        })
    }
}

//! `TFW_ON_EVENT`: a command that receives each event on its stdin. `tf` does not wait for the command.
//!
//! The command is started by an intermediate process, another `tf`. The reason is that this process may have threads.
//! Between fork and exec, the child of a process with threads may call only async-signal-safe functions (fork(2)). The
//! intermediate process has one thread. It forks the process that runs the command, and exits at once. `tf` waits only
//! for that exit. The forked process has a session of its own, inherits no descriptor but that of the log, and is a child
//! of init, or of the nearest subreaper ([`crate::sys::detached`]).

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::another_tf;
use crate::sys::{detached, poll};
use crate::trace::{self, trace};

/// The variable with the command, which is passed to `/bin/sh -c`.
const ON_EVENT: &str = "TFW_ON_EVENT";

/// The argument with which `tf locks` runs as the intermediate process. This argument is not documented.
pub(crate) const WORD: &str = "tell-event";

/// The maximum length of a line that the command receives, with its newline: 64 KiB. No event is longer, because the
/// history limits its texts.
pub(crate) const MAX_LINE_BYTES: u64 = 1 << 16;

/// How long the command may run before it is killed.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts the command in `TFW_ON_EVENT`, if there is one, with `line` on its stdin. An error is only traced.
pub(crate) fn start(line: &str) {
    if named().is_none() {
        return;
    }
    if let Err(error) = between(line) {
        trace!("{ON_EVENT} was not started: {error}");
    }
}

/// Returns the command in `TFW_ON_EVENT`. `None` if it is not set or empty.
fn named() -> Option<OsString> {
    std::env::var_os(ON_EVENT).filter(|command| !command.is_empty())
}

/// Passes `line` to the intermediate process and waits until that process has exited.
fn between(line: &str) -> std::io::Result<()> {
    let mut command = another_tf::locks(&[WORD])?;
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    #[expect(clippy::disallowed_methods, reason = "this process is another `tf`, which exits at once")]
    let mut child = command.spawn()?;
    // An event normally fits into the buffer of a pipe (64 KiB, pipe(7)), so this does not wait for the reader.
    let told = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(line.as_bytes()));
    child.wait()?;
    told
}

/// Runs in the intermediate process. Reads the event from stdin, and forks the process that runs the command.
pub(crate) fn stand_between() {
    let mut line = Vec::new();
    let (Some(command), Ok(_)) = (named(), std::io::stdin().lock().take(MAX_LINE_BYTES).read_to_end(&mut line)) else {
        return;
    };
    let directory = std::env::current_dir();
    let keep: Vec<RawFd> = trace::descriptor().into_iter().collect();
    let forked = detached::run(c"tf-event", detached::Parent::Init, &keep, || {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        if let Ok(directory) = directory {
            shell.current_dir(directory);
        }
        // Unset these variables, so that a terraform that the command starts does not belong to the run, and so that an
        // event of such a terraform does not start the command again.
        for name in [ON_EVENT, "TFW_RUN", "TFW_CHAIN"] {
            shell.env_remove(name);
        }
        #[expect(clippy::disallowed_methods, reason = "this is the command of the user, not terraform")]
        match shell.spawn() {
            Ok(child) => attend(child, &line),
            Err(error) => trace!("{ON_EVENT} was not started: {error}"),
        }
    });
    if let Err(error) = forked {
        trace!("{ON_EVENT} was not started: {error}");
    }
}

/// Writes `line` to the stdin of the command `child`, and waits until the command exits. If the command takes longer
/// than [`COMMAND_TIMEOUT`], kills the command's process group.
fn attend(mut child: Child, line: &[u8]) {
    // The end of this block drops `stdin`, so that the command reads end of file.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(line);
    }
    let begun = Instant::now();
    loop {
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) if status.success() => return,
            Ok(Some(status)) => return trace!("{ON_EVENT} failed: {status}"),
            Err(error) => return trace!("{ON_EVENT} has an unknown end: {error}"),
        }
        if begun.elapsed() > COMMAND_TIMEOUT {
            if let Ok(group) = i32::try_from(child.id()) {
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
            let _ = child.wait();
            return trace!("{ON_EVENT} took more than {} s and was killed", COMMAND_TIMEOUT.as_secs());
        }
        poll::wait(&[], Some(Duration::from_millis(50)));
    }
}

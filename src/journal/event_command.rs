//! `TFW_ON_EVENT`: a command that is told of each event, and that nobody waits for.
//!
//! It is started by a process of its own, another `tf`: we may have threads, and a fork of a process with threads may do
//! next to nothing. That one forks what stays behind ([`crate::sys::detached`]: a session of its own, none of anybody's
//! descriptors, a child of init's) and ends at once, which is all that is waited for.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::another_tf;
use crate::sys::detached;
use crate::sys::poll;
use crate::trace::trace;

/// The variable.
const ON_EVENT: &str = "TFW_ON_EVENT";

/// The word behind `tf locks` that makes a `tf` stand between. No command that people know.
pub(crate) const WORD: &str = "tell-event";

/// So long it may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts the command, if one is named, with `line` on its stdin.
pub(crate) fn start(line: &str) {
    if named().is_none() {
        return;
    }
    if let Err(error) = between(line) {
        trace!("{ON_EVENT} was not started: {error}");
    }
}

fn named() -> Option<OsString> {
    std::env::var_os(ON_EVENT).filter(|command| !command.is_empty())
}

fn between(line: &str) -> std::io::Result<()> {
    let mut command = another_tf::locks(&[WORD])?;
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    #[expect(clippy::disallowed_methods, reason = "it is no terraform, and ends at once")]
    let mut child = command.spawn()?;
    // Shorter than a pipe is long, so that this does not wait for a reader.
    let told = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(line.as_bytes()));
    child.wait()?;
    told
}

/// The process in between: reads the event, and leaves behind who runs the command.
pub(crate) fn stand_between() {
    let mut line = Vec::new();
    let (Some(command), Ok(_)) = (named(), std::io::stdin().lock().take(1 << 16).read_to_end(&mut line)) else {
        return;
    };
    let directory = std::env::current_dir();
    let forked = detached::run(c"tf-event", detached::Parent::Init, &[], || {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        if let Ok(directory) = directory {
            shell.current_dir(directory);
        }
        // A terraform that it starts is no part of the run; and it is not told of its own events.
        for name in [ON_EVENT, "TFW_RUN", "TFW_CHAIN"] {
            shell.env_remove(name);
        }
        #[expect(clippy::disallowed_methods, reason = "the user's own command, in a session of its own")]
        if let Ok(child) = shell.spawn() {
            attend(child, &line);
        }
    });
    if let Err(error) = forked {
        trace!("{ON_EVENT} was not started: {error}");
    }
}

fn attend(mut child: Child, line: &[u8]) {
    // Dropped with this: the command sees the end of its input.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(line);
    }
    let begun = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if begun.elapsed() > COMMAND_TIMEOUT {
            if let Ok(group) = i32::try_from(child.id()) {
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
            let _ = child.wait();
            return;
        }
        poll::wait(&[], Some(Duration::from_millis(50)));
    }
}

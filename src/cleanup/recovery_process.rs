//! Starts another `tf` process that finishes one dead run, and waits for it.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::another_tf;
use crate::cleanup::waiter::Waiter;
use crate::sys::session;

/// The exit code of `tf locks recover --say` if no credentials were available. No other result has it.
pub(crate) const NO_CREDENTIALS: u8 = 4;

/// How often to check whether the other `tf` has exited.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How long to wait for another `tf` that finishes a dead run. After an outage it may wait for 4 min for a write of
/// that run, and then needs the time of a release. One that is stopped (SIGSTOP) never ends.
pub(crate) const RECOVERY_TIMEOUT: Duration = Duration::from_mins(6);

/// How long to wait for another `tf` after SIGKILL. One that hangs in the kernel, for example in a mount whose server is
/// gone, or that is frozen, does not exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// Waits until another `tf` has exited. A second ^C kills that `tf`, and so does the end of `limit`. Nothing is lost by
/// this: a dead run is still in the journal. If the process does not exit after the SIGKILL, this function returns, and
/// init reaps the process later.
pub(crate) fn wait_for(mut child: Child, limit: Duration, waiter: &mut Waiter<'_>) {
    let mut interrupts = 0;
    let end = Instant::now() + limit;
    let mut given_up_at = None;
    while matches!(child.try_wait(), Ok(None)) && given_up_at.is_none_or(|at| Instant::now() < at) {
        waiter.wait(POLL_INTERVAL);
        interrupts += waiter.interrupts();
        if interrupts > 1 || Instant::now() >= end {
            let _ = child.kill();
            given_up_at.get_or_insert_with(|| Instant::now() + KILL_TIMEOUT);
        }
    }
}

/// Starts another `tf`, which finishes the run with the ID `name`. The new `tf` reports on stderr which locks it has
/// released. If `before` is false, it also reports which locks it could not release. If `before` is true, it does not
/// report these locks, because an earlier attempt has reported them. The new `tf` is in a session of its own. So it
/// does not get a ^C that interrupts terraform, and it cannot prompt at the terminal from which terraform reads.
///
/// # Errors
/// If the other `tf` cannot be started.
pub(crate) fn start(name: &str, before: bool) -> std::io::Result<Child> {
    let mut command = another_tf::locks(&["recover", "--say", "--run", name])?;
    if before {
        command.arg("--again");
    }
    command.stdout(Stdio::null());
    session::of_its_own(&mut command);
    #[expect(clippy::disallowed_methods, reason = "this starts `tf`, not terraform; it needs only the setup above")]
    command.spawn()
}

//! Waits for a write of a dead terraform that may still be in flight.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::context::{ReleaseContext, SERVICE_TIMEOUT};
use super::services::{POLL_INTERVAL, Services, remaining, within};
use crate::aws::failure::Failure;
use crate::console;
use crate::lock::outcome::Write;
use crate::lock::release_step::{LateWrites, QuietLimits, QuietStep, QuietWait};
use crate::sys::connections::StillSending;
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

/// The maximum time of a [`QuietWait`], in windows. There is a limit because a process may keep writing the state
/// without a lock.
const MAX_QUIET_TIMEOUT_IN_WINDOWS: u32 = 6;

/// Waits until nothing that a write of the dead terraform would change has changed for the window of a [`QuietWait`],
/// and the kernel of this host has delivered or given up what ended processes had sent. Returns whether the state
/// changed during the wait. `None` if the lock disappears during the wait: then there is no lock to release, and
/// nothing is known about a write.
///
/// # Errors
/// Returns a [`Failure`] if a service does not respond for [`SERVICE_TIMEOUT`], or if something still changes
/// [`MAX_QUIET_TIMEOUT_IN_WINDOWS`] after everything was delivered.
pub(super) async fn wait_for_quiet(
    services: &Services<'_>,
    recorded: &RecordedLock,
    ReleaseContext { run, is_network_shared, late_writes, .. }: &ReleaseContext,
) -> Result<Option<Write>, Failure> {
    trace!("waiting for a write that may be on its way");
    // The kernel gives up after four minutes at the latest, so this wait ends.
    let mut sending = StillSending::begin(*is_network_shared);
    let limits = QuietLimits::of(sending.is_seen());
    // If the end of the log is lost, terraform may have been writing.
    let is_write = recorded.progress.may_be_writing() || *late_writes == LateWrites::Any;
    console::say(&if is_write { waiting_for_write(limits.window) } else { waiting_for_undo(limits.window) });
    if sending.has_bytes() {
        console::say(STILL_SENDING);
    } else if !limits.not_before.is_zero() {
        console::say(&sending_is_unseen(limits.not_before));
    }
    let first = within(SERVICE_TIMEOUT, "AWS", services.look(recorded, run)).await?;
    let mut wait = QuietWait::begin(first, limits);
    // The first read shows everything that has arrived until it was completed, so the wait begins only now.
    let begun = Instant::now();
    let mut seen = begun;
    let mut delivered = begun;
    loop {
        if delivered.elapsed() > wait.limits().not_before + wait.limits().window * MAX_QUIET_TIMEOUT_IN_WINDOWS {
            return Err(Failure::refusal("S3", "the state keeps changing: something writes it without locking it"));
        }
        sleep(POLL_INTERVAL).await;
        if sending.look() {
            // The last bytes may arrive until this look at the connections, so the wait begins with the read after it.
            delivered = Instant::now();
            wait.begin_anew(QuietLimits::of(sending.is_seen()));
        }
        let now = match within(remaining(SERVICE_TIMEOUT, seen), "AWS", services.look(recorded, run)).await {
            Ok(now) => now,
            // Continue after a failed read. The wait begins anew with the next successful one.
            Err(failure) if !failure.is_final() && seen.elapsed() < SERVICE_TIMEOUT => {
                trace!("not seen: {failure}");
                wait.begin_anew(wait.limits());
                continue;
            }
            Err(failure) => return Err(failure),
        };
        seen = Instant::now();
        match wait.see(now, begun.elapsed()) {
            QuietStep::Wait => {}
            QuietStep::Changed => trace!("it landed"),
            QuietStep::Gone => {
                trace!("its lock is gone");
                return Ok(None);
            }
            QuietStep::Quiet(write) => return Ok(Some(write)),
        }
    }
}

/// The message that the wait lasts longer, because the kernel has not delivered everything.
const STILL_SENDING: &str = "this host is still sending data of a process that has ended; waiting until it has \
                             arrived, for 4 min at most";

/// Returns the message that `tf` waits for `time` first, because it does not see the connections that terraform had.
fn sending_is_unseen(time: Duration) -> String {
    format!(
        "tf cannot see whether the system is still sending data of that terraform, so it waits {} s before that",
        time.as_secs()
    )
}

/// Returns the message that a write may be in flight, and that `tf` waits for it.
fn waiting_for_write(quiet: Duration) -> String {
    format!(
        "terraform's last write may still arrive; waiting until nothing has arrived for {} s before releasing the lock",
        quiet.as_secs()
    )
}

/// Returns the message that terraform's delete of one part of its lock may be in flight, and that `tf` waits for it.
fn waiting_for_undo(quiet: Duration) -> String {
    format!(
        "terraform exited while it took the two parts of its lock; waiting until nothing has arrived for {} s before \
         releasing them",
        quiet.as_secs()
    )
}

//! `tf locks recover`: does the recovery that the next `tf` would do, without starting terraform. It is for a step of a
//! job that always runs (`if: always()`), and for a scheduled job.

use clap::Args;

use super::Finding;
use super::connection::Trouble;
use crate::cleanup::recovery::every_run::{Request, every_run};
use crate::cleanup::recovery::forget::{self, Forgotten};
use crate::console::visible;
use crate::sys::signals::Signals;
use crate::{another_tf, console};

pub(super) const EXAMPLES: &str = "Examples:
  tf locks recover              in an `if: always()` step, or from cron
  tf locks recover --dry-run
  tf locks recover --forget 5e75cb05-d70c-4132-39e0-d2abba1b3077

Exit codes: 0 nothing is left, 2 a lock was not released (the output shows which), 1 the command failed.";

#[derive(Args, Clone, Debug)]
pub(super) struct Recover {
    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,
    /// Drop the record of this lock, which no longer exists; nothing is released
    #[arg(long, value_name = "ID", conflicts_with = "dry_run")]
    forget: Option<String>,
    /// Only recover this run of the journal
    #[arg(long, hide = true)]
    run: Option<String>,
    /// Print to stderr, as tf does before it starts terraform
    #[arg(long, hide = true)]
    say: bool,
    /// Do not report locks that could not be released, because they were reported before
    #[arg(long, hide = true)]
    again: bool,
    /// The reason, for the history
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

impl Recover {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        if let Some(what) = &self.forget {
            return forget(what);
        }
        let mut signals = Signals::listen().map_err(|error| Trouble::Said(error.to_string()))?;
        let say = if self.say { console::say } else { console::print };
        let request = Request {
            dry_run: self.dry_run,
            only: self.run.as_deref(),
            again: self.again,
            reason: self.reason.as_deref(),
        };
        let recovered = every_run(request, say, &mut signals);
        Ok(match recovered.asked {
            Some(signal) => Finding::Stopped(signal),
            // The `tf` that started this process waits longer before it tries again.
            None if recovered.lacks_credentials && self.say => Finding::NoCredentials,
            None if recovered.left > 0 => Finding::Stale,
            None => Finding::Nothing,
        })
    }
}

/// Drops the record of a lock that the user knows to be gone and that `tf` cannot check, for example because the
/// credentials of its run no longer exist. `what` is the lock's ID or the name of the run.
///
/// # Errors
/// Fails if the run is still alive, if no run has such a record, or if the journal cannot be changed.
fn forget(what: &str) -> Result<Finding, Trouble> {
    match forget::forget(what) {
        Forgotten::Yes(pid) => {
            console::print(&format!(
                "dropped the record of {what}, left by a run on this host (pid {pid}); nothing was released"
            ));
            Ok(Finding::Nothing)
        }
        Forgotten::Alive(pid) => {
            Err(Trouble::Said(format!("nothing was dropped: the run of {what} (pid {pid}) is still running")))
        }
        Forgotten::Failed(error) => Err(Trouble::Said(format!(
            "nothing was dropped: the record of {} cannot be changed\n{error}",
            visible(what)
        ))),
        Forgotten::Unknown => Err(Trouble::Said(format!(
            "no run on this host has a record of {}\nto see what dead runs have left, type: tf locks recover --dry-run",
            visible(what)
        ))),
    }
}

/// Recovers the dead run `run`, or all dead runs if `run` is `None`, in a child process. A child process is necessary
/// because recovery forks, and this process may have several threads after it has sent requests to AWS. The exit code
/// of the child process is ignored.
///
/// # Errors
/// Fails if the child process cannot be started.
pub(super) fn in_a_process(run: Option<&str>, reason: Option<&str>) -> Result<(), Trouble> {
    let failed = |error: std::io::Error| Trouble::Said(format!("could not start tf for the recovery: {error}"));
    let mut command = another_tf::locks(&["recover"]).map_err(failed)?;
    command.args(run.into_iter().flat_map(|run| ["--run", run]));
    // The user asked for this release with `tf locks release`, so the user's own TFW_RELEASE does not apply.
    command.env("TFW_RELEASE", "auto");
    if let Some(reason) = reason {
        command.arg(format!("--reason={reason}"));
    }
    #[expect(clippy::disallowed_methods, reason = "the program is tf, which runs in the foreground like this process")]
    let ended = command.status();
    ended.map(drop).map_err(failed)
}

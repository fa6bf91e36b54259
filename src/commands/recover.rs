//! `tf locks recover`: what the next `tf` would do, without a terraform behind it. For the `if: always()` step of a job, and
//! for a schedule.

use crate::console;
use clap::Args;

use super::Finding;
use super::connection::Trouble;
use crate::another_tf;
use crate::cleanup::recovery;
use crate::cleanup::recovery::{Forgotten, Request};
use crate::console::visible;
use crate::sys::signals::Signals;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks recover              in an `if: always()` step, or from cron
  tf locks recover --dry-run
  tf locks recover --forget 5e75cb05-d70c-4132-39e0-d2abba1b3077

Exit codes: 0 nothing is left, 2 a lock could not be given back (it is named), 1 it could not be done.";

#[derive(Args, Clone, Debug)]
pub(super) struct Recover {
    /// Only say what would be finished
    #[arg(long)]
    dry_run: bool,
    /// Drop the record of this lock, which is gone; nothing is released
    #[arg(long, value_name = "ID", conflicts_with = "dry_run")]
    forget: Option<String>,
    /// Only this run of the journal
    #[arg(long, hide = true)]
    run: Option<String>,
    /// On stderr, as what tf says in front of terraform
    #[arg(long, hide = true)]
    say: bool,
    /// Say nothing of what could not be done: it was said before
    #[arg(long, hide = true)]
    again: bool,
    /// Why, for the history
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
        let recovered = recovery::everything(request, say, &mut signals);
        Ok(match recovered.asked {
            Some(signal) => Finding::Stopped(signal),
            // For the tf that has started us: it does not try this again so soon.
            None if recovered.lacks_credentials && self.say => Finding::Failed,
            None if recovered.left > 0 => Finding::Stale,
            None => Finding::Nothing,
        })
    }
}

/// For a lock that a person knows to be gone, and that cannot be seen to be: its credentials do not exist any more.
fn forget(what: &str) -> Result<Finding, Trouble> {
    match recovery::forget(what) {
        Forgotten::Yes(pid) => {
            console::print(&format!(
                "dropped the record of {what}, which a run here (pid {pid}) left; nothing was released"
            ));
            Ok(Finding::Nothing)
        }
        Forgotten::Alive(pid) => {
            Err(Trouble::Said(format!("the run of {what} (pid {pid}) is still alive: nothing was dropped")))
        }
        Forgotten::Unknown => Err(Trouble::Said(format!(
            "no run here has a record of {}\nto see what dead runs have left, type: tf locks recover --dry-run",
            visible(what)
        ))),
    }
}

/// Finishes one dead run, or everything that is dead. In a process of its own: recovery forks, and whoever has talked to AWS may
/// have threads.
///
/// # Errors
/// We could not be started once more.
pub(super) fn in_a_process(run: Option<&str>, reason: Option<&str>) -> Result<(), Trouble> {
    let failed = |error: std::io::Error| Trouble::Said(format!("tf could not be started once more: {error}"));
    let mut command = another_tf::locks(&["recover"]).map_err(failed)?;
    command.args(run.into_iter().flat_map(|run| ["--run", run]));
    // Who types `release` has asked for it.
    command.env("TFW_RELEASE", "auto");
    if let Some(reason) = reason {
        command.arg(format!("--reason={reason}"));
    }
    #[expect(clippy::disallowed_methods, reason = "it is no terraform, and sits in front of the same person as we do")]
    let ended = command.status();
    ended.map(drop).map_err(failed)
}

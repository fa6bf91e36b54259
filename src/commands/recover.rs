//! `tf locks recover`: what the next `tf` would do, without a terraform behind it. For the `if: always()` step of a job, and
//! for a schedule.

use clap::Args;

use super::Finding;
use super::reach::Trouble;
use crate::another_tf;
use crate::report;
use crate::run::recovery;
use crate::sys::signals::Signals;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks recover              in an `if: always()` step, or from cron
  tf locks recover --dry-run

Exit codes: 0 nothing is left, 2 a lock could not be given back (it is named), 1 it could not be done.";

#[derive(Args, Clone, Debug)]
pub(super) struct Recover {
    /// Only say what would be finished
    #[arg(long)]
    dry_run: bool,
    /// Only this run of the journal
    #[arg(long, hide = true)]
    run: Option<String>,
    /// On stderr, as what tf says in front of terraform
    #[arg(long, hide = true)]
    say: bool,
    /// Why, for the history
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

impl Recover {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let mut signals = Signals::listen().map_err(|error| Trouble::Said(error.to_string()))?;
        let say = if self.say { report::say } else { report::print };
        let recovered =
            recovery::everything(self.dry_run, self.run.as_deref(), self.reason.as_deref(), say, &mut signals);
        Ok(match recovered.asked {
            Some(signal) => Finding::Stopped(signal),
            None if recovered.left > 0 => Finding::Stale,
            None => Finding::Nothing,
        })
    }
}

/// Finishes one dead run. In a process of its own: recovery forks, and whoever has talked to AWS may have threads.
///
/// # Errors
/// We could not be started once more.
pub(super) fn in_a_process(run: &str, reason: Option<&str>) -> Result<(), Trouble> {
    let failed = |error: std::io::Error| Trouble::Said(format!("tf could not be started once more: {error}"));
    let mut command = another_tf::locks(&["recover", "--run", run]).map_err(failed)?;
    // Who types `release` has asked for it.
    command.env("TFW_RELEASE", "auto");
    if let Some(reason) = reason {
        command.arg(format!("--reason={reason}"));
    }
    #[expect(clippy::disallowed_methods, reason = "it is no terraform, and sits in front of the same person as we do")]
    let ended = command.status();
    ended.map(drop).map_err(failed)
}

//! `tf locks recover`: what the next `tf` would do, without a terraform behind it. For the `if: always()` step of a job, and
//! for a schedule.

use clap::Args;

use super::Finding;
use crate::report;
use crate::run::outcome;
use crate::run::recovery;
use crate::sys::signals::Signals;
use crate::sys::wait::Ended;

#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Recover {
    /// Only say what would be finished.
    #[arg(long)]
    dry_run: bool,
}

impl Recover {
    pub(super) fn run(self) -> u8 {
        let mut signals = match Signals::listen() {
            Ok(signals) => signals,
            Err(error) => {
                report::say(&error.to_string());
                return Finding::Failed.code();
            }
        };
        let recovered = recovery::everything(self.dry_run, &mut signals);
        if let Some(signal) = recovered.asked {
            return outcome::end_as(Ended::Killed(signal));
        }
        let finding = if recovered.left > 0 { Finding::Stale } else { Finding::Nothing };
        finding.code()
    }
}

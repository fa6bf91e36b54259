//! `tf locks ...`: the commands that are ours. Terraform has none of that name, and these never see its arguments.
//!
//! They end with 0 when there is nothing to worry about, with 2 when something is left that somebody must look at, and
//! with 1 when they could not do what they were asked for.

mod recover;

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::report;

/// What a command found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// All is well.
    Nothing,
    /// Something is left.
    Stale,
    /// It could not be done.
    Failed,
}

impl Finding {
    /// The exit code.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Nothing => 0,
            Self::Failed => 1,
            Self::Stale => 2,
        }
    }
}

/// Gives back the state locks that dead runs of terraform have left.
#[derive(Debug, Parser)]
#[command(name = "tf locks", bin_name = "tf locks")]
struct Locks {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Finish what dead runs on this host have left: give their locks back, a line for each.
    ///
    /// A run that somebody takes care of at this moment is waited for. Nothing to do is silent. Ends with 0, or with 2
    /// when a lock could not be given back, which is then named.
    Recover(recover::Recover),
}

/// Whether `arguments`, without the program's name, are for us.
pub(crate) fn are_ours(arguments: &[OsString]) -> bool {
    arguments.first().is_some_and(|first| first == "locks")
}

/// Runs `tf locks`, with `arguments` behind that word. Gives the exit code.
pub(crate) fn run(arguments: &[OsString]) -> u8 {
    let words = std::iter::once(OsString::from("tf locks")).chain(arguments.iter().cloned());
    match Locks::try_parse_from(words) {
        Ok(Locks { command: Command::Recover(recover) }) => recover.run(),
        Err(error) if error.use_stderr() => {
            report::say(error.render().to_string().trim_end());
            Finding::Failed.code()
        }
        Err(help) => {
            report::print(&help.render().to_string());
            Finding::Nothing.code()
        }
    }
}

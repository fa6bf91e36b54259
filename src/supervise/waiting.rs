//! While terraform waits for a lock that it was refused (`-lock-timeout`): one whose holder is dead is given back, so that
//! terraform's own next try succeeds. What died before our start was finished then; what dies meanwhile is seen here.
//!
//! It is finished by a process of its own, as everything that talks to AWS before terraform has ended: another `tf`, which
//! is asked for that one run. We are its parent and keep it apart from terraform's tree.

use crate::cleanup::recovery_process;
use crate::console;
use std::collections::HashMap;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::messages;
use crate::cleanup::process_tree::Tree;
use crate::cleanup::recovery;
use crate::cleanup::recovery::Tried;
use crate::cleanup::waiter::Waiter;
use crate::journal::state_directory::StateDirectory;
use crate::terraform::log::Log;
use crate::trace::trace;

/// From when on a lock that is not answered counts as refused, and how often is looked then.
const JOURNAL_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// After how long a dead run that could not be finished is tried again: the lock service may be back.
const RETRY_INTERVAL: Duration = Duration::from_secs(15);

/// The same where nobody gave credentials: each try asks for them, and a few that fail may lock an account.
const CREDENTIALS_RETRY_INTERVAL: Duration = Duration::from_mins(10);

/// The exit code of `tf locks recover --say` that says so.
const LACKS_CREDENTIALS: i32 = 1;

/// What is done while terraform waits.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// When the journal is looked at next. None: terraform does not wait.
    look_at: Option<Instant>,
    /// The dead runs that were tried, and when each may be tried again.
    tried: HashMap<String, Instant>,
    /// What finishes a run, and which one.
    at_work: Vec<(Child, String)>,
}

impl Waiting {
    /// `tried` are the dead runs that could not be finished before terraform was started, a moment ago.
    pub(crate) fn new(tried: Vec<Tried>) -> Self {
        let now = Instant::now();
        let tried = tried.into_iter().map(|Tried { run, lacks_credentials }| {
            (run, now + if lacks_credentials { CREDENTIALS_RETRY_INTERVAL } else { RETRY_INTERVAL })
        });
        Self { tried: tried.collect(), ..Self::default() }
    }

    /// Looks at what terraform's log says, and starts what is to be done about it. To be called as often as that is read.
    pub(crate) fn step(&mut self, log: &Log, here: &CandidateBackends, tree: &Tree) {
        let waits = log.unreleased().any(|lock| lock.progress.held.is_none());
        let now = Instant::now();
        match self.look_at {
            _ if !waits => self.look_at = None,
            None => self.look_at = Some(now + JOURNAL_POLL_INTERVAL),
            Some(at) if at > now => {}
            Some(_) => {
                self.look_at = Some(now + JOURNAL_POLL_INTERVAL);
                self.finish_the_dead(here, tree);
            }
        }
    }

    fn finish_the_dead(&mut self, here: &CandidateBackends, tree: &Tree) {
        let tried = &mut self.tried;
        self.at_work.retain_mut(|(child, run)| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) if status.code() == Some(LACKS_CREDENTIALS) => {
                tried.insert(run.clone(), Instant::now() + CREDENTIALS_RETRY_INTERVAL);
                false
            }
            _ => false,
        });
        if !self.at_work.is_empty() {
            return;
        }
        for state in StateDirectory::all(|name| std::env::var_os(name)) {
            for (name, pid) in recovery::dead(&state, here) {
                let due = self.tried.get(&name);
                if due.is_some_and(|due| *due > Instant::now()) {
                    continue;
                }
                let before = due.is_some();
                if !before {
                    console::say(&messages::waiting_for_the_dead(pid));
                }
                match recovery_process::start(&name, before) {
                    Ok(child) => {
                        if let Ok(pid) = i32::try_from(child.id()) {
                            tree.exclude(Pid::from_raw(pid));
                        }
                        self.at_work.push((child, name.clone()));
                    }
                    Err(error) => trace!("no other tf for run {name}: {error}"),
                }
                self.tried.insert(name, Instant::now() + RETRY_INTERVAL);
            }
        }
    }

    /// Waits for what was started: terraform has ended, and whoever reads our stderr waits for it too. Gives the runs that were
    /// tried.
    pub(crate) fn finish(self, waiter: &mut Waiter<'_>) -> Vec<String> {
        for (child, _) in self.at_work {
            recovery_process::wait_for(child, waiter);
        }
        self.tried.into_keys().collect()
    }
}

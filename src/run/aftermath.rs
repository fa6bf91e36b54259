//! After terraform has ended: does it leave a lock, is its tree dead, and giving the lock back.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::Signal;

use super::Invocation;
use super::poll;
use super::stop::Stop;
use super::tombstone::{Graveyard, Tombstone};
use super::tree::{Fate, Tree};
use crate::lock::place::{self, Place};
use crate::lock::proof::Run;
use crate::lock::release::{self, Outcome, Situation};
use crate::report;
use crate::sys::process::Process;
use crate::sys::signals::Signals;
use crate::sys::wait::Ended;
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::lock_info;
use crate::terraform::log::{Log, RecordedLock};
use crate::trace::trace;

/// All that is known when terraform has ended.
pub(crate) struct Aftermath<'a> {
    pub(crate) ended: Ended,
    pub(crate) stop: &'a Stop,
    pub(crate) out_of_memory: bool,
    pub(crate) started: Timestamp,
    pub(crate) log: &'a Log,
    pub(crate) tree: &'a Tree,
    pub(crate) invocation: &'a Invocation,
    pub(crate) before: &'a DataDirectory,
    pub(crate) data_directory: &'a Path,
    pub(crate) graveyard: Option<&'a Graveyard>,
    pub(crate) release: bool,
}

/// Whether terraform died, or left its work, rather than ended by itself.
///
/// Exit code 11 is a panic that terraform caught (internal/logging/panic.go). 2 is both "there are changes"
/// (`plan -detailed-exitcode`) and Go's own crash; only a crash leaves a lock.
fn died(ended: Ended, forced: bool, leaves_lock: bool) -> bool {
    match ended {
        Ended::Killed(_) | Ended::Exited(11) => true,
        Ended::Exited(2) => leaves_lock || forced,
        Ended::Exited(_) => forced,
    }
}

impl Aftermath<'_> {
    /// Does what is to be done, and says it.
    pub(crate) fn settle(&self, signals: &mut Signals) {
        let standing: Vec<&RecordedLock> = self.log.standing().collect();
        let died = died(self.ended, self.stop.was_forced(), !standing.is_empty());
        let lost = died && (!self.log.tells_locks() || self.log.is_torn());
        if standing.is_empty() && !lost {
            if self.stop.was_interrupted() && !died {
                self.name_survivors();
            }
            return;
        }
        trace!("{} locks may stand; died: {died}, log lost: {lost}", standing.len());
        let ending = report::ending(self.ended, self.stop.killed(), self.out_of_memory);
        let keep = self.reason_to_keep(died, signals);
        let after = DataDirectory::read(self.data_directory);
        let places = Places::new(self.before.clone(), after, self.invocation);
        let situation = Situation {
            run: Run {
                who: lock_info::who(),
                started: self.started,
                disordered: self.log.disordered,
                locking_disabled: self.log.locking_disabled,
            },
            died,
        };
        // A migration holds two, and gives back the second first.
        for recorded in standing.iter().rev() {
            let outcome = match &keep {
                Some(reason) => may_stand(recorded, died).then(|| Outcome::Kept(reason.clone())),
                None => release_wherever_it_is(recorded, &places.of(recorded), &situation, signals)
                    .or_else(|| may_stand(recorded, died).then(|| Outcome::Kept(report::NO_PLACE.to_owned()))),
            };
            trace!("lock {}: {outcome:?}", recorded.id);
            match outcome {
                Some(Outcome::Released(released)) => {
                    report::say(&report::released(&ending, recorded, &released, Timestamp::now()));
                }
                Some(Outcome::Kept(reason)) => {
                    report::say(&report::kept(&ending, recorded, &reason, &self.unlock_command()));
                }
                Some(Outcome::Absent { anothers }) => {
                    if died && recorded.locked.is_none() {
                        self.bury(recorded, &situation, &ending);
                    }
                    if let Some(id) = anothers {
                        self.release_late(signals, &id, &places);
                    }
                }
                None => {}
            }
        }
        if lost && standing.is_empty() {
            self.name_suspect(signals, &ending, &places, &situation);
        }
    }

    /// Names what runs on after an interrupt. Terraform's providers may be dying at this moment: those are no survivors.
    fn name_survivors(&self) {
        let mut living = self.tree.living();
        if !living.is_empty() {
            poll::wait(&[], Some(Duration::from_millis(100)));
            let later = self.tree.living();
            living.retain(|process| later.iter().any(|other| other.pid == process.pid));
        }
        if !living.is_empty() {
            report::say(&report::survivors(&living));
        }
    }

    /// Keeps the facts of a lock whose request may still land.
    fn bury(&self, recorded: &RecordedLock, situation: &Situation, ending: &str) {
        let tombstone = Tombstone { since: Timestamp::now(), lock: recorded.clone(), run: situation.run.clone() };
        let kept = self.graveyard.is_some_and(|graveyard| graveyard.put(&tombstone).is_ok());
        report::say(&report::may_still_come(ending, recorded, kept, &self.unlock_command()));
    }

    /// We were refused by the lock `id`: if a dead run's request took it late, it goes.
    fn release_late(&self, signals: &mut Signals, id: &str, places: &Places) {
        let Some(graveyard) = self.graveyard else { return };
        for tombstone in graveyard.read(Timestamp::now()).iter().filter(|tombstone| tombstone.lock.id == id) {
            if visit(tombstone, places, graveyard, signals) {
                report::say(report::TRY_AGAIN);
            }
        }
    }

    /// Makes sure that the operation is over: ends what is left of the tree of a terraform that died, and leaves alone
    /// what one that ended by itself has left on purpose. A reason is why no lock may go.
    fn reason_to_keep(&self, died: bool, signals: &mut Signals) -> Option<String> {
        if !self.release {
            return Some(report::NEVER.to_owned());
        }
        if died {
            return match self.tree.end(signals, self.stop.killed().is_some()) {
                Fate::Dead(_) => None,
                Fate::Alive(processes) => Some(report::still_alive(&processes)),
                Fate::LifelineHeld => Some(report::LIFELINE_HELD.to_owned()),
            };
        }
        // A terraform that a provisioner started without us writes into our recorder, and may hold what we see there.
        self.tree.living().iter().find(|process| is_terraform(process)).map(report::another_terraform)
    }

    /// Names a lock that only its own JSON connects with this run.
    fn name_suspect(&self, signals: &mut Signals, ending: &str, places: &Places, situation: &Situation) {
        let Some(place) = places.selected() else { return };
        if let Some(Some(info)) = wait_for(signals, release::suspect(&place, situation)) {
            report::say(&report::suspected(ending, &info, &self.unlock_command()));
        }
    }

    /// What a person would type, without the ID.
    fn unlock_command(&self) -> String {
        let name = Path::new(&self.invocation.name).file_name().unwrap_or(&self.invocation.name).to_string_lossy();
        match &self.invocation.command_line.directory {
            None => format!("{name} force-unlock"),
            Some(directory) => format!("{name} -chdir={} force-unlock", quoted(&directory.to_string_lossy())),
        }
    }
}

/// Before a run: gives back what requests of dead runs took here after everybody had looked.
pub(crate) fn release_what_came_late(
    graveyard: &Graveyard,
    before: &DataDirectory,
    invocation: &Invocation,
    signals: &mut Signals,
) {
    let tombstones = graveyard.read(Timestamp::now());
    if tombstones.is_empty() {
        return;
    }
    let places = Places::new(before.clone(), before.clone(), invocation);
    for tombstone in &tombstones {
        visit(tombstone, &places, graveyard, signals);
    }
}

/// Looks once whether the lock has come, and gives it back. True if it had.
fn visit(tombstone: &Tombstone, places: &Places, graveyard: &Graveyard, signals: &mut Signals) -> bool {
    // Its terraform is long dead, and one look is enough: the next `tf` looks again.
    let situation = Situation { run: tombstone.run.clone(), died: false };
    let outcome = release_wherever_it_is(&tombstone.lock, &places.of(&tombstone.lock), &situation, signals);
    trace!("tombstone of {}: {outcome:?}", tombstone.lock.id);
    let Some(Outcome::Released(_)) = outcome else { return false };
    // Terraform asks for one half after the other: what came was the last that it asked for.
    graveyard.take_away(&tombstone.lock.id);
    report::say(&report::came_late(&tombstone.lock));
    true
}

/// Gives the lock back in the place where it is. `None` where there is no place to look in.
fn release_wherever_it_is(
    recorded: &RecordedLock,
    places: &[Place],
    situation: &Situation,
    signals: &mut Signals,
) -> Option<Outcome> {
    let mut worst = None;
    for place in places {
        let outcome = wait_for(signals, release::release(recorded, place, situation))
            .unwrap_or_else(|| Outcome::Kept(report::ENOUGH.to_owned()));
        match outcome {
            Outcome::Released(_) => return Some(outcome),
            Outcome::Kept(_) => worst = Some(outcome),
            Outcome::Absent { .. } => worst = worst.or(Some(outcome)),
        }
    }
    worst
}

/// A recorded lock is named when it was had, or when its holder died before it knew. One that was refused is
/// somebody else's.
fn may_stand(recorded: &RecordedLock, died: bool) -> bool {
    recorded.locked.is_some() || died
}

fn is_terraform(process: &Process) -> bool {
    let program = process.program();
    let named = |name: &str| {
        program == name || program.starts_with(&format!("{name}_")) || program.starts_with(&format!("{name}-v"))
    };
    named("terraform") || named("tofu")
}

/// A word that a shell takes as it is.
fn quoted(word: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:@%+,".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The places that this run can have locked.
struct Places {
    before: DataDirectory,
    after: DataDirectory,
    workspaces: Vec<String>,
}

impl Places {
    fn new(before: DataDirectory, after: DataDirectory, invocation: &Invocation) -> Self {
        let command_line = &invocation.command_line;
        // TF_WORKSPACE wins over what is selected (internal/command/meta.go, `WorkspaceOverridden`).
        let mut workspaces = match std::env::var("TF_WORKSPACE") {
            Ok(name) if !name.is_empty() => vec![name],
            _ => vec![after.workspace.clone(), before.workspace.clone()],
        };
        if command_line.command().starts_with("workspace ") {
            workspaces.extend(command_line.operands.iter().map(|operand| operand.to_string_lossy().into_owned()));
        }
        Self { before, after, workspaces }
    }

    fn of(&self, recorded: &RecordedLock) -> Vec<Place> {
        place::find(recorded, &[&self.after, &self.before], &self.workspaces)
    }

    /// Where a command without further words would lock.
    fn selected(&self) -> Option<Place> {
        let backend =
            self.after.backend.as_ref().or(self.before.backend.as_ref()).filter(|backend| backend.kind == "s3")?;
        let place = Place {
            bucket: backend.string("bucket")?.to_owned(),
            key: backend.state_key(self.workspaces.first()?)?,
            table: backend.string("dynamodb_table").map(ToOwned::to_owned),
            lock_file: backend.flag("use_lockfile"),
            backend: backend.clone(),
        };
        (place.table.is_some() || place.lock_file).then_some(place)
    }
}

/// Waits for `work`, which talks to the lock service. A person may end the waiting: the first ^C is answered, the
/// second ends it (`None`). What a supervisor sends does not: it is bounded anyway, and the lock matters more.
fn wait_for<T>(signals: &mut Signals, work: impl Future<Output = T>) -> Option<T> {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            trace!("no runtime: {error}");
            return None;
        }
    };
    let finished = runtime.block_on(async {
        tokio::select! {
            finished = work => Some(finished),
            () = enough(signals) => None,
        }
    });
    // A name look-up that hangs in its thread must not hold us.
    runtime.shutdown_background();
    finished
}

async fn enough(signals: &mut Signals) {
    let mut asked = 0;
    loop {
        while let Some(arrival) = signals.next() {
            if arrival.signal == Signal::SIGINT {
                asked += 1;
                if asked == 1 {
                    report::say(&report::still_releasing());
                }
            }
        }
        if asked > 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_terraform_that_ended_by_itself_did_not_die() {
        for forced in [false, true] {
            for leaves_lock in [false, true] {
                assert!(died(Ended::Killed(Signal::SIGKILL), forced, leaves_lock));
                assert!(died(Ended::Exited(11), forced, leaves_lock));
                assert_eq!(died(Ended::Exited(0), forced, leaves_lock), forced);
                assert_eq!(died(Ended::Exited(1), forced, leaves_lock), forced);
                assert_eq!(died(Ended::Exited(2), forced, leaves_lock), forced || leaves_lock);
            }
        }
    }

    #[test]
    fn a_word_for_the_shell_stays_one_word() {
        assert_eq!(quoted("envs/prod"), "envs/prod");
        assert_eq!(quoted("my dir"), "'my dir'");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }
}

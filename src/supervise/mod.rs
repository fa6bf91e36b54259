//! One supervised run of terraform: starts terraform, watches it until it has exited, and then cleans up.
//!
//! The process that supervises terraform sends no request to DynamoDB or S3. [`crate::lock`] does that after
//! terraform's end, and [`keeper`] in a process of its own.

pub(crate) mod awake;
pub(crate) mod event_loop;
pub(crate) mod fence;
pub(crate) mod foreground;
pub(crate) mod fuse;
pub(crate) mod guardian;
pub(crate) mod keeper;
pub(crate) mod keepers;
pub(crate) mod outcome;
pub(crate) mod pipes;
pub(crate) mod routing;
pub(crate) mod run_lease;
pub(crate) mod run_record;
pub(crate) mod shim;
pub(crate) mod step_outputs;
pub(crate) mod stop;
pub(crate) mod waiting;

use std::cell::{LazyCell, RefCell};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::cleanup::after_run::AfterRun;
use crate::cleanup::clean_up::Permission;
use crate::cleanup::end_of_run::Why;
use crate::cleanup::invocation::Invocation;
use crate::cleanup::process_tree::Tree;
use crate::cleanup::run_context::RunContext;
use crate::cleanup::terminal_report::TerminalReporter;
use crate::cleanup::waiter::Waiter;
use crate::cleanup::{messages, recovery, takeover_process};
use crate::holder::facts;
use crate::journal::history::By;
use crate::journal::known_programs::Program;
use crate::journal::pending_requests::PendingRequests;
use crate::journal::recorder::Recorder;
use crate::journal::run_mark;
use crate::journal::runs::{Journal, JournalEntry, JournalRecord, Unfinished};
use crate::journal::state_directory::StateDirectory;
use crate::lease::fence::{CleanupPoint, LateWrite, Withdrawal};
use crate::lease::grade::{self, Cloud};
use crate::lock::reached::Reached;
use crate::settings::Settings;
use crate::supervise::awake::Awake;
use crate::supervise::event_loop::Supervision;
use crate::supervise::foreground::ForegroundControl;
use crate::supervise::guardian::{Guardian, GuardianContext};
use crate::supervise::pipes::Pipes;
use crate::supervise::routing::TerraformGroup;
use crate::supervise::run_lease::RunLease;
use crate::supervise::run_record::{LateStop, RunRecord, Told};
use crate::supervise::stop::Stop;
use crate::supervise::waiting::{BeforeTerraform, Waiting};
use crate::sys::host_facts::HostFacts;
use crate::sys::process::{self, ProcessHandle, ProcessList};
use crate::sys::signals::Signals;
use crate::sys::spawn::{self, Image, Setup};
use crate::sys::terminal::Terminal;
use crate::sys::wait::Ended;
use crate::sys::{environment, poll};
use crate::terraform::log::Log;
use crate::terraform::version::Version;
use crate::trace::trace;
use crate::{console, crash_point};

/// Why terraform was not supervised.
#[derive(Debug)]
pub(crate) enum NotSupervised {
    /// A resource that `tf` needs to supervise terraform is not available, such as a descriptor or a process. Terraform
    /// was not started.
    Unprepared(io::Error),
    /// Terraform could not be started.
    NotStarted(io::Error),
}

/// Runs terraform, releases its lock if terraform did not, and returns how terraform ended. If a signal asks `tf` to
/// stop while it recovers earlier runs, terraform is not started, and the result is [`Ended::Killed`] with that signal.
///
/// # Errors
/// - [`NotSupervised::Unprepared`] if something that must exist before terraform starts cannot be created, or if there
///   are not enough descriptors, processes or memory to start terraform.
/// - [`NotSupervised::NotStarted`] if terraform cannot be started for another reason.
pub(crate) fn supervise(invocation: &Invocation, settings: &Settings) -> Result<Ended, NotSupervised> {
    use NotSupervised::Unprepared;
    let mut signals = Signals::listen().map_err(Unprepared)?;
    let terminal = if settings.shared_terminal { None } else { Terminal::open() };
    // The parent may exit while `tf` waits for the release of another lock.
    let parent = event_loop::parent_to_watch(settings.ci, &signals, terminal.as_ref());
    let context = RunContext::new(invocation, settings.release, Instant::now());
    let mut before = BeforeTerraform {
        recovers: settings.release,
        takes_over: settings.lease.terms.filter(|_| settings.release),
        ..BeforeTerraform::default()
    };
    if settings.release {
        let states = StateDirectory::existing();
        let recovery = recovery::before_run(&states, &context.candidates, &mut signals);
        if let Some(signal) = recovery.asked {
            return Ok(Ended::Killed(signal));
        }
        before.tried = recovery.tried;
    }
    // If a recovery got no credentials, a taker gets none either. Each attempt may send a message to a person's phone.
    if let Some(terms) = before.takes_over
        && !before.tried.iter().any(|tried| tried.lacks_credentials)
        && invocation.command_line.locks_selected_state(&invocation.arguments, |name| std::env::var(name).ok())
    {
        let watched = parent.as_ref().map(|(_, end)| end.as_fd());
        let takeover = takeover_process::before_run(&context.candidates, terms, &mut signals, watched);
        if let Some(signal) = takeover.asked {
            return Ok(Ended::Killed(signal));
        }
        before.taker = takeover.ended;
    }
    if parent.as_ref().is_some_and(|(_, end)| poll::ready_now(end.as_fd(), PollFlags::POLLIN)) {
        return Ok(Ended::Killed(takeover_process::PARENT_GONE));
    }
    crash_point::reached("tf: begun");
    match Prepared::new(context, settings, terminal, parent) {
        Ok(prepared) => prepared.run(Waiting::new(before), &mut signals),
        Err(error) => {
            signals.stop_listening();
            Err(Unprepared(error))
        }
    }
}

/// The data that are set up before terraform is started.
struct Prepared<'a> {
    context: RunContext<'a>,
    settings: &'a Settings,
    program: Program,
    recorder: Recorder,
    tree: Tree,
    /// The descriptors that terraform must inherit: the write end of the lifeline, and the lock file of the run's entry
    /// in the journal.
    inherited: Vec<OwnedFd>,
    pipes: Pipes,
    terminal: Option<Terminal>,
    /// Readable when the parent of `tf` has exited. `None` if the exit of the parent is not a request to stop, or if
    /// the parent cannot be watched ([`event_loop::parent_to_watch`]).
    parent: Option<ProcessHandle>,
    stop: Stop,
    run_record: RunRecord,
    /// The lease of the run's lock. `None` without `TFW_LEASE`.
    lease: Option<RunLease>,
    image: Image,
}

/// A terraform that has been started.
struct Started {
    terraform: Pid,
    /// The number of processes that the kernel had killed because memory ran out, read right after terraform was
    /// started. `None` if the kernel does not report it.
    memory_kills: Option<u64>,
    /// The identities with which the run reaches its backends.
    reached: Reached,
}

impl<'a> Prepared<'a> {
    fn new(
        mut context: RunContext<'a>,
        settings: &'a Settings,
        terminal: Option<Terminal>,
        parent: Option<(Pid, ProcessHandle)>,
    ) -> io::Result<Self> {
        let variable = |name: &str| std::env::var_os(name);
        let Invocation { terraform, command_line, .. } = context.invocation;
        let state = StateDirectory::open(variable);
        let program = Program::look(state.as_ref().ok(), &terraform.path, &context.data_directory);
        let backend = context.before.backend.as_ref().map(|backend| backend.kind.as_str());
        let mut recorder = Recorder::open(&context.id, program.level(backend), program.opens, variable)?;
        let (mut tree, lifeline) = Tree::new(&context.id)?;
        tree.set_log_file(recorder.descriptor(), !program.itself);
        if !settings.shared_terminal {
            tree.has_own_group();
        }
        let mut inherited = vec![lifeline];
        let mut pipes = Pipes::create_pipes(terraform.for_a_step)?;
        let stop = Stop::new(command_line.ignores_interrupts(), settings.stop_timeout);

        let mut changes = recorder.changes();
        changes.push((run_mark::RUN, Some(nested(variable(run_mark::RUN), &context.id))));
        if program.version.as_ref().map_or(!program.itself, Version::is_two_processes) {
            // With `TF_FORK=0` this old terraform runs in one process. That process gets the one interrupt of `tf` and
            // does not change the TF_TEMP_LOG_PATH that `tf` sets (panicwrap, main.go). Later versions ignore TF_FORK.
            changes.push(("TF_FORK", Some("0".into())));
        }
        let image = context.invocation.image(&changes)?;
        let entry = enter_in_journal(&mut context, state, parent.as_ref().map(|(pid, _)| *pid), &mut inherited);
        crash_point::reached("tf: prepared");
        let mut lease = settings.lease.terms.map(|terms| {
            let host = HostFacts::read();
            let grade = grade::grade(&host, settings.shared_terminal, settings.lease.clock);
            trace!("a lease of {:?}, {grade:?}", terms.length());
            let asks = settings.lease.notice.provider(Cloud::of(&host.dmi) == Some(Cloud::Aws));
            RunLease::new(terms, facts::here(&host), grade.fence(), asks)
        });
        if let Some(lease) = &mut lease {
            inherited.extend(lease.inheritable()?);
        }
        let guardian = Guardian::fork(GuardianContext {
            run: &context,
            tf: nix::unistd::getpid(),
            tree: &mut tree,
            pipes: &mut pipes,
            recorder: &mut recorder,
            entry: entry.as_ref().map(|(entry, _)| entry),
            record: entry.as_ref().map(|(_, record)| record.clone()),
            stop: stop.clone(),
            lease: lease.as_mut(),
        });
        let guardian = guardian.inspect_err(|error| trace!("no guardian: {error}")).ok();
        crash_point::reached("tf: guarded");
        if let Some(pid) = guardian.as_ref().and_then(Guardian::pid) {
            tree.exclude(pid);
        }
        for fuse in lease.iter_mut().flat_map(|lease| lease.fork_fuse(guardian::parent())) {
            tree.exclude(fuse);
        }
        if !process::become_subreaper() {
            // Init gets the orphans of the tree, so they are found as the guardian finds them.
            tree.observe_as_guardian();
        }
        let run_record = RunRecord {
            guardian,
            entry,
            told: Told::default(),
            outside_group: Vec::new(),
            failed: false,
            late_stop: LateStop::default(),
        };
        let parent = parent.map(|(_, end)| end);
        Ok(Self {
            context,
            settings,
            program,
            recorder,
            tree,
            inherited,
            pipes,
            terminal,
            parent,
            stop,
            run_record,
            lease,
            image,
        })
    }

    /// Starts terraform, watches it, and cleans up after it.
    fn run(mut self, mut waiting: Waiting, signals: &mut Signals) -> Result<Ended, NotSupervised> {
        let started = self.start(signals)?;
        let ended = self.watch(started.terraform, &mut waiting, signals);
        // No renewal may come between a read and a delete of the lock.
        if let Some(lease) = &mut self.lease {
            lease.end_renewals();
        }
        crash_point::reached("tf: terraform ended");
        let all_written = self.pipes.flush();
        let needs_recorder = self.clean_up(ended, &started, waiting, signals);
        write_the_rest(&mut self.pipes, all_written, signals);
        say_the_rest(signals);
        self.write_step_outputs(ended);
        if needs_recorder {
            self.recorder.leave();
        }
        Ok(ended)
    }

    fn start(&mut self, signals: &mut Signals) -> Result<Started, NotSupervised> {
        let setup = Setup {
            own_group: !self.settings.shared_terminal,
            redirect: self.pipes.writers(),
            mask: signals.mask_at_entry(),
            ignored: signals.inherited().ignored(),
            announce: self.run_record.awaited().map(|socket| (socket, &guardian::STARTED_PREFIX[..])),
        };
        let terraform = match spawn::spawn(&self.image, &setup) {
            Ok(terraform) => terraform,
            Err(error) => {
                let _ = self.run_record.close(Unfinished::default(), &Log::default(), Vec::new());
                // The system has no free process, descriptor or memory. The caller can still run terraform without
                // supervision, by replacing this process with terraform.
                let lacking = [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::ENOMEM];
                if error.raw_os_error().is_some_and(|number| lacking.contains(&number)) {
                    signals.stop_listening();
                    return Err(NotSupervised::Unprepared(error));
                }
                return Err(NotSupervised::NotStarted(error));
            }
        };
        self.inherited.clear();
        self.pipes.close_writers();
        let identity = self.tree.started(terraform);
        self.run_record.started(terraform, identity);
        if let Some(lease) = &mut self.lease {
            lease.started(terraform);
        }
        crash_point::reached("tf: started");
        // Terraform does not need the following steps, so they are done after its start.
        let memory_kills = process::out_of_memory_kills();
        environment::unset_empty("AWS_");
        let (access, surroundings) = self.context.candidates.identified(&self.context.id);
        let reached = Reached::of(&self.context.id, &access, &surroundings);
        if let Some((_, record)) = &mut self.run_record.entry {
            record.surroundings = surroundings;
        }
        trace!("started terraform as {terraform}, run {}", self.context.id);
        Ok(Started { terraform, memory_kills, reached })
    }

    /// Watches terraform until it has exited, and returns how it ended.
    fn watch(&mut self, terraform: Pid, waiting: &mut Waiting, signals: &mut Signals) -> Ended {
        Supervision {
            terraform,
            context: &self.context,
            waiting,
            group: if self.settings.shared_terminal { TerraformGroup::Shared } else { TerraformGroup::Own },
            signals,
            stop: &mut self.stop,
            foreground: ForegroundControl::new(self.terminal.take(), terraform),
            pipes: &mut self.pipes,
            recorder: &mut self.recorder,
            tree: &self.tree,
            run_record: &mut self.run_record,
            awake: Awake::new(self.settings.keep_awake),
            lease: self.lease.as_mut(),
            is_ci: self.settings.ci,
            parent: self.parent.take(),
            children_changed: false,
            outlived: false,
            unit_stop: None,
            interrupted: None,
        }
        .watch()
    }

    /// Reports how terraform ended, releases its locks, ends the lease, and closes the run's record. `waiting` has the
    /// processes of `tf` that have worked while terraform waited for a lock. Returns whether the next `tf` needs the
    /// recorder: because what is left could not be written to the run's record (the disk is full), or because a process
    /// of the run may still write into the recorder.
    ///
    /// The fence of the lease may stay after the end of `tf` ([`CleanupPoint`]).
    fn clean_up(&mut self, ended: Ended, started: &Started, waiting: Waiting, signals: &mut Signals) -> bool {
        let out_of_memory =
            ended == Ended::Killed(Signal::SIGKILL) && started.memory_kills < process::out_of_memory_kills();
        let mut log = self.recorder.read().clone();
        self.program.learn(log.program.as_ref());
        if ended == Ended::Exited(0) && !self.stop.was_forced() {
            log.ended_well();
        }
        let cannot_write = self.run_record.failed.then_some("it cannot be written");
        let survivor_record = RefCell::new(|processes| self.run_record.note_outside_group(processes, &self.recorder));
        let after = AfterRun {
            context: &self.context,
            tree: &self.tree,
            end: self.stop.end_of_run(Some(ended), out_of_memory),
            log: &log,
            reached: &started.reached,
            has_no_log: self.recorder.is_closed(),
            survivor_record: &survivor_record,
        };
        // The candidate backends are read at most once, and only if the run may have left a lock.
        let candidates = LazyCell::new(|| self.context.candidates_after().with_plan(&self.context.planned_backends));
        let ended_at = Timestamp::now();
        let ending = after.judge(&candidates);
        let may_hold = ending.may_have_left_a_lock(&log);
        let waiter = &mut Waiter::Interactive(signals);
        if let Some(lease) = &mut self.lease {
            lease.end_at(CleanupPoint::Judged { has_died: ending.died, may_hold }, Some(ended), &self.tree);
        }
        // With a lease, the processes of a dead terraform are ended first, because its time is limited. Without a list
        // of processes, they can be told from other children only after the others have ended.
        let mut waiting = Some(waiting);
        let mut tried = Vec::new();
        if self.lease.is_none() || process::list() != ProcessList::Available {
            tried.extend(waiting.take().into_iter().flat_map(|waiting| waiting.finish(waiter)));
        }
        let permission = may_hold.then(|| {
            crash_point::reached("tf: locks may be held");
            after.permission(ending, &candidates, By::Tf, run_lease::fence_of(self.lease.as_ref()), waiter)
        });
        if let Some(lease) = &mut self.lease {
            let may_release = matches!(permission, Some(Permission::Release));
            lease.end_at(CleanupPoint::TreeEnded { may_release }, Some(ended), &self.tree);
        }
        tried.extend(waiting.into_iter().flat_map(|waiting| waiting.finish(waiter)));
        let mut reporter = TerminalReporter {
            after: &after,
            ended_at,
            unprotected: cannot_write.or(self.context.journal.as_ref().err().map(String::as_str)),
            tried: &tried,
            wants_lease: self.settings.lease.terms.is_some(),
        };
        reporter.terraform_ended(ending, &candidates, waiter);
        if self.stop.killed() == Some(Why::LockLost) {
            let lease = self.lease.as_ref();
            let has_exited = matches!(ended, Ended::Exited(_));
            let write = lease.map_or(LateWrite::No, |lease| lease.late_write(log.written, has_exited));
            let plan = reporter.plan_command(&candidates);
            if lease.is_some_and(RunLease::is_lost_in_unlock) {
                console::say(&messages::lease::lost_in_unlock(&plan));
            } else {
                console::say(&messages::lease::lock_lost(lease.and_then(RunLease::loss), write, &plan));
            }
        }
        if self.stop.killed() == Some(Why::LeaseUnknown)
            && let Some(reason) = self.lease.as_ref().and_then(RunLease::reason)
        {
            console::say(&messages::lease::cannot_renew(reason));
        }
        let may_still_work = permission.as_ref().is_some_and(|permission| after.may_still_work(permission));
        let unfinished = if let Some(permission) = permission {
            let left = after.clean_up(ending, &candidates, (By::Tf, permission), &mut reporter, waiter);
            // Nobody may take a lock that is kept on purpose without being asked.
            if let Some(lease) = &mut self.lease {
                let withdrawal = lease.withdraw_or_remember(&left.kept_on_purpose, self.context.journal(), waiter);
                lease.end_at(CleanupPoint::CleanedUp(withdrawal), Some(ended), &self.tree);
                if withdrawal == Withdrawal::Failed {
                    console::say(messages::lease::LEASE_STANDS);
                }
            }
            left.unfinished
        } else {
            Unfinished::default()
        };
        crash_point::reached("tf: cleaned up");
        let survivors = self.tree.survivors();
        let needs_recorder = if may_still_work {
            self.run_record.leave_open(&self.recorder, survivors)
        } else {
            self.run_record.close(unfinished, &log, survivors).is_err()
        };
        crash_point::reached("tf: closed");
        needs_recorder
    }

    fn write_step_outputs(&self, ended: Ended) {
        let is_step = self.context.invocation.terraform.for_a_step;
        let path = std::env::var_os("GITHUB_OUTPUT").filter(|path| is_step && !path.is_empty());
        if let Some(path) = path
            && let Err(error) = step_outputs::write(&path, self.pipes.copies(), ended)
        {
            console::say(&messages::run::no_outputs(&path, &error));
        }
    }
}

/// Opens the journal in `state` for `context`, and creates the run's entry in it. Adds the lock file that terraform
/// must inherit to `inherited`. Returns the entry and its record. `None` if the journal cannot be opened or written. In
/// this case, terraform is started all the same, and the missing journal is reported only if terraform dies and may
/// have left a lock.
fn enter_in_journal(
    context: &mut RunContext<'_>,
    state: io::Result<StateDirectory>,
    parent: Option<Pid>,
    inherited: &mut Vec<OwnedFd>,
) -> Option<(JournalEntry, JournalRecord)> {
    context.started = Timestamp::now();
    context.pending_requests = state.as_ref().ok().map(PendingRequests::of);
    let made = state.and_then(|state| Journal::open(&state)).and_then(|journal| {
        let mut record = context.record(&journal);
        record.parent = parent.map(Pid::as_raw);
        let (entry, tree_lock) = journal.begin(&record)?;
        inherited.push(tree_lock);
        Ok((journal, entry, record))
    });
    match made {
        Ok((journal, entry, record)) => {
            context.journal = Ok(journal);
            context.pending_requests = context.pending_requests.take().map(|pending| pending.of_run(&record));
            Some((entry, record))
        }
        Err(error) => {
            trace!("no journal: {error}");
            context.journal = Err(error.to_string());
            None
        }
    }
}

/// Passes the rest of terraform's output on, and waits for a slow reader as long as necessary. A request to stop ends
/// the wait. Does nothing if `all_written` is true.
fn write_the_rest(pipes: &mut Pipes, all_written: bool, signals: &mut Signals) {
    use nix::poll::PollFlags;
    while !all_written && !pipes.flush() {
        let mut awaited = vec![(signals.as_fd(), PollFlags::POLLIN)];
        awaited.extend(pipes.awaited());
        poll::wait(&awaited, None);
        if signals.next_stop().is_some() {
            return;
        }
    }
}

/// How long to wait for a slow reader of the messages of `tf`. The wait is limited, because a pager that nobody uses
/// would block `tf` for ever.
const READER_TIMEOUT: Duration = Duration::from_mins(1);

/// Writes the rest of the messages of `tf`, and waits for a slow reader for at most [`READER_TIMEOUT`]. The messages
/// may be the only report of a lock that was not released. A request to stop ends the wait.
fn say_the_rest(signals: &mut Signals) {
    use nix::poll::PollFlags;
    let stderr = std::io::stderr();
    let until = Instant::now() + READER_TIMEOUT;
    while !console::say_the_rest() && Instant::now() < until {
        let awaited = [(signals.as_fd(), PollFlags::POLLIN), (stderr.as_fd(), PollFlags::POLLOUT)];
        poll::wait(&awaited, Some(until.saturating_duration_since(Instant::now())));
        if signals.next_stop().is_some() {
            return;
        }
    }
}

/// Returns the value of `TFW_RUN` for the run `id`. If this run is nested in an outer run, the value is `outer`, which
/// is the value of the outer run, followed by `/` and `id`. Otherwise, the value is `id`.
fn nested(outer: Option<OsString>, id: &str) -> OsString {
    match outer {
        Some(mut outer) if outer.as_os_str() != OsStr::new("") => {
            outer.push("/");
            outer.push(id);
            outer
        }
        _ => id.into(),
    }
}

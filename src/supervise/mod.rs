//! One supervised run of terraform: from its start to the moment when its lock is known to be gone.
//!
//! Nothing here knows of DynamoDB or S3: [`crate::lock`] does.

pub(crate) mod event_loop;
pub(crate) mod foreground;
pub(crate) mod guardian;
pub(crate) mod outcome;
pub(crate) mod pipes;
pub(crate) mod run_record;
pub(crate) mod shim;
pub(crate) mod step_outputs;
pub(crate) mod stop;
pub(crate) mod waiting;

use crate::cleanup::invocation::Invocation;
use crate::console;
use crate::journal::run_mark;
use crate::journal::runs::run_id;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::Signal;

use crate::cleanup::after_run::Aftermath;
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::messages;
use crate::cleanup::planned_backends::PlannedBackends;
use crate::cleanup::process_tree::Tree;
use crate::cleanup::recovery;
use crate::cleanup::waiter::Waiter;
use crate::crash_point;
use crate::journal::known_programs::Program;
use crate::journal::pending_requests::PendingRequests;
use crate::journal::recorder::Recorder;
use crate::journal::runs;
use crate::journal::runs::{Journal, JournalRecord, Unfinished};
use crate::journal::state_directory::StateDirectory;
use crate::lock::reached::Reached;
use crate::settings::Settings;
use crate::supervise::event_loop::Supervision;
use crate::supervise::foreground::ForegroundControl;
use crate::supervise::guardian::{Guardian, GuardianContext};
use crate::supervise::pipes::Pipes;
use crate::supervise::run_record::RunRecord;
use crate::supervise::stop::Stop;
use crate::supervise::waiting::Waiting;
use crate::sys::poll;
use crate::sys::signals::Signals;
use crate::sys::spawn::{self, Image, Setup};
use crate::sys::terminal::Terminal;
use crate::sys::wait::Ended;
use crate::sys::{environment, process};
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::lock_info;
use crate::terraform::log::Log;
use crate::terraform::version::Version;
use crate::trace::trace;

/// Why there was no supervised run.
#[derive(Debug)]
pub(crate) enum NotSupervised {
    /// What it needs cannot be had: no descriptors, no process. Nothing was started.
    Unprepared(io::Error),
    /// Terraform could not be started.
    NotStarted(io::Error),
}

/// Runs terraform, gives its lock back if it did not, and tells how it ended.
///
/// # Errors
/// [`NotSupervised`].
pub(crate) fn supervise(invocation: &Invocation, settings: &Settings) -> Result<Ended, NotSupervised> {
    use NotSupervised::Unprepared;
    let mut signals = Signals::listen().map_err(Unprepared)?;
    let begun = Instant::now();
    let current = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    let data_directory = DataDirectory::path(&current, &invocation.command_line);
    let before = DataDirectory::read(&data_directory);
    let planned_backends = PlannedBackends::of(&invocation.command_line, &current);
    let here = CandidateBackends::new(&current, &before, before.clone(), &invocation.command_line, &planned_backends);

    let mut tried = Vec::new();
    if settings.release {
        let states = StateDirectory::all(|name: &str| std::env::var_os(name));
        let recovery = recovery::before_run(&states, &here, &mut signals);
        if let Some(signal) = recovery.asked {
            return Ok(Ended::Killed(signal));
        }
        tried = recovery.tried;
    }
    crash_point::reached("tf: begun");

    let prepared = Prepared::new(
        invocation,
        settings,
        &signals,
        begun,
        [&current, &data_directory],
        &before,
        (&here, &planned_backends),
    );
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            signals.stop_listening();
            return Err(Unprepared(error));
        }
    };
    let waiting = settings.release.then(|| Waiting::new(tried));
    prepared.run(invocation, settings, &mut signals, &before, (&here, waiting))
}

/// Everything that stands before terraform does.
struct Prepared<'a> {
    run: String,
    /// `user@host` at the start: the host may have another name at the end.
    who: String,
    begun: Instant,
    started: Timestamp,
    current: &'a Path,
    data_directory: &'a Path,
    planned_backends: &'a PlannedBackends,
    journal: Result<Journal, String>,
    pending_requests: Option<PendingRequests>,
    program: Program,
    recorder: Recorder,
    tree: Tree,
    /// What terraform must inherit: the lifeline, and the file of the journal.
    inherited: Vec<OwnedFd>,
    pipes: Pipes,
    terminal: Option<Terminal>,
    parent: Option<OwnedFd>,
    stop: Stop,
    run_record: RunRecord,
    image: Image,
}

impl<'a> Prepared<'a> {
    fn new(
        invocation: &Invocation,
        settings: &Settings,
        signals: &Signals,
        begun: Instant,
        [current, data_directory]: [&'a Path; 2],
        before: &DataDirectory,
        (here, planned_backends): (&CandidateBackends, &'a PlannedBackends),
    ) -> io::Result<Self> {
        let variable = |name: &str| std::env::var_os(name);
        let run = run_id();
        let who = lock_info::who();
        let state = StateDirectory::open(variable);
        let pending_requests = state.as_ref().ok().map(PendingRequests::of);
        let program = Program::look(state.as_ref().ok(), &invocation.terraform.path, data_directory);
        let backend = before.backend.as_ref().map(|backend| backend.kind.as_str());
        let mut recorder = Recorder::open(&run, program.level(backend), program.opens, variable)?;
        let (mut tree, lifeline) = Tree::new(&run)?;
        tree.set_log_file(recorder.descriptor(), !program.itself);
        if !settings.shared_terminal {
            tree.has_own_group();
        }
        let mut inherited = vec![lifeline];
        let mut pipes = Pipes::create_pipes(invocation.terraform.for_a_step)?;
        let terminal = if settings.shared_terminal { None } else { Terminal::open() };
        let parent = event_loop::parent_to_watch(settings.ci, signals, terminal.is_some());
        let stop = Stop::new(invocation.command_line.ignores_interrupts(), settings.stop_timeout);

        let mut changes = recorder.changes();
        changes.push((run_mark::RUN, Some(nested(variable(run_mark::RUN), &run))));
        if program.version.as_ref().map_or(!program.itself, Version::is_two_processes) {
            // In one process it hears our one interrupt, and keeps our TF_TEMP_LOG_PATH (panicwrap, main.go). Later versions
            // do not know the variable.
            changes.push(("TF_FORK", Some("0".into())));
        }
        let image = invocation.image(&changes)?;
        let started = Timestamp::now();
        let journal = state.and_then(|state| Journal::open(&state));
        // Without a journal terraform runs all the same, and nothing is said of it unless it would have mattered.
        let mut entry = None;
        let journal = journal.and_then(|journal| {
            let mut record = record((&run, &who), &journal, started, invocation, current, (here, planned_backends));
            record.parent = parent.as_ref().map(|(pid, _)| pid.as_raw());
            record.named_only = !settings.release;
            let (made, life) = journal.begin(&record)?;
            inherited.push(life);
            entry = Some((made, record));
            Ok(journal)
        });
        let pending_requests = match &entry {
            Some((_, record)) => pending_requests.map(|pending_requests| pending_requests.of_run(record)),
            None => pending_requests,
        };
        let journal = journal.map_err(|error: io::Error| error.to_string());
        if let Err(reason) = &journal {
            trace!("no journal: {reason}");
        }
        crash_point::reached("tf: prepared");
        let guardian = Guardian::fork(GuardianContext {
            run: &run,
            tf: nix::unistd::getpid(),
            begun,
            who: &who,
            started,
            tree: &mut tree,
            pipes: &mut pipes,
            recorder: &mut recorder,
            journal: journal.as_ref().ok(),
            entry: entry.as_ref().map(|(entry, _)| entry),
            record: entry.as_ref().map(|(_, record)| record.clone()),
            pending_requests: pending_requests.as_ref(),
            stop: stop.clone(),
            here,
            before,
            current,
            data_directory,
            program: &invocation.terraform.path,
            command_line: &invocation.command_line,
            planned_backends,
            release: settings.release,
        });
        let guardian = guardian.inspect_err(|error| trace!("no guardian: {error}")).ok();
        crash_point::reached("tf: guarded");
        if let Some(pid) = guardian.as_ref().and_then(Guardian::pid) {
            tree.exclude(pid);
        }
        process::become_subreaper();
        let told = (0, Vec::new(), Vec::new());
        let run_record = RunRecord { guardian, entry, told, outside_group: Vec::new(), failed: false };
        Ok(Self {
            run,
            who,
            begun,
            started,
            current,
            data_directory,
            planned_backends,
            journal,
            pending_requests,
            program,
            recorder,
            tree,
            inherited,
            pipes,
            terminal,
            parent: parent.map(|(_, end)| end),
            stop,
            run_record,
            image,
        })
    }

    fn run(
        mut self,
        invocation: &Invocation,
        settings: &Settings,
        signals: &mut Signals,
        before: &DataDirectory,
        (here, mut waiting): (&CandidateBackends, Option<Waiting>),
    ) -> Result<Ended, NotSupervised> {
        let setup = Setup {
            own_group: !settings.shared_terminal,
            redirect: self.pipes.writers(),
            mask: signals.mask_at_entry(),
            ignored: signals.inherited().ignored(),
            announce: self.run_record.awaited().map(|socket| (socket, &guardian::STARTED_PREFIX[..])),
        };
        let terraform = match spawn::spawn(&self.image, &setup) {
            Ok(terraform) => terraform,
            Err(error) => {
                self.run_record.close(Unfinished::default(), &Log::default(), Vec::new());
                // No process, or no descriptor for what must be watched about it: it may still run in our place.
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
        crash_point::reached("tf: started");
        // What terraform need not wait for comes after its start.
        let memory_kills = process::out_of_memory_kills();
        environment::unset_empty("AWS_");
        let (access, surroundings) = here.identified(&self.run);
        let reached = Reached::of(&self.run, &access, &surroundings);
        if let Some((_, record)) = &mut self.run_record.entry {
            record.surroundings = surroundings;
        }
        trace!("started terraform as {terraform}, run {}", self.run);

        let ended = Supervision {
            terraform,
            here,
            waiting: waiting.as_mut(),
            shared: settings.shared_terminal,
            signals: &mut *signals,
            stop: &mut self.stop,
            foreground: ForegroundControl::new(self.terminal, terraform),
            pipes: &mut self.pipes,
            recorder: &mut self.recorder,
            tree: &self.tree,
            run_record: &mut self.run_record,
            parent: self.parent,
            begun: self.begun,
            children_changed: false,
            outlived: false,
            unit_stop: None,
            interrupted: None,
        }
        .watch();
        crash_point::reached("tf: terraform ended");
        let tried = waiting.map(|waiting| waiting.finish(&mut Waiter::Interactive(signals))).unwrap_or_default();
        let all_written = self.pipes.flush();

        let out_of_memory = ended == Ended::Killed(Signal::SIGKILL) && memory_kills < process::out_of_memory_kills();
        let mut log = self.recorder.read().clone();
        self.program.learn(log.program.as_ref());
        if ended == Ended::Exited(0) && !self.stop.was_forced() {
            log.ended_well();
        }
        let end = self.stop.end_of_run(ended, out_of_memory);
        let failed = self.run_record.failed.then(|| "it cannot be written".to_owned());
        let unfinished = Aftermath {
            run: &self.run,
            end,
            who: &self.who,
            reached: &reached,
            started: self.started,
            log: &log,
            unlogged: self.recorder.is_closed(),
            tree: &self.tree,
            invocation,
            before,
            current: self.current,
            data_directory: self.data_directory,
            planned_backends: self.planned_backends,
            journal: self.journal.as_ref().ok(),
            unprotected: failed.as_deref().or(self.journal.as_ref().err().map(String::as_str)),
            pending_requests: self.pending_requests.as_ref(),
            release: settings.release,
            tried: &tried,
        }
        .settle(&mut Waiter::Interactive(signals));
        crash_point::reached("tf: settled");
        self.run_record.close(unfinished, &log, self.tree.survivors());
        crash_point::reached("tf: closed");
        write_the_rest(&mut self.pipes, all_written, signals);
        say_the_rest(signals);
        if let Some(path) =
            std::env::var_os("GITHUB_OUTPUT").filter(|path| invocation.terraform.for_a_step && !path.is_empty())
            && let Err(error) = step_outputs::write(&path, self.pipes.copies(), ended)
        {
            console::say(&messages::no_outputs(&path, &error));
        }
        Ok(ended)
    }
}

/// What the journal says of a run before it has begun.
fn record(
    (run, who): (&str, &str),
    journal: &Journal,
    started: Timestamp,
    invocation: &Invocation,
    current: &Path,
    (here, planned_backends): (&CandidateBackends, &PlannedBackends),
) -> JournalRecord {
    let (access, surroundings) = here.identified_without_files(run);
    JournalRecord {
        who: who.to_owned(),
        started,
        program: Path::new(&invocation.name).file_name().unwrap_or_default().to_string_lossy().into_owned(),
        chdir: invocation.command_line.directory.as_ref().map(|path| path.to_string_lossy().into_owned()),
        command: invocation.command_line.command(),
        flags: runs::flag_names(invocation.arguments.iter().map(OsString::as_os_str)),
        directory: current.to_string_lossy().into_owned(),
        data_directory: here.data_directory.clone(),
        workspaces: here.workspaces.clone(),
        plan: planned_backends.plan().map(|path| path.to_string_lossy().into_owned()),
        surroundings,
        access,
        ..JournalRecord::new(run, journal)
    }
}

/// Waits for a slow reader of terraform's last words. Whoever asks us to stop meanwhile need not wait for that reader.
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

/// How long a reader of what `tf` has to say is waited for: a pager that was left alone must not hold us for ever.
const READER_TIMEOUT: Duration = Duration::from_mins(1);

/// Waits for a slow reader of what `tf` has to say: it may be the only word about a lock that stays. Whoever asks us to stop
/// meanwhile need not wait.
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

/// The value of `TFW_RUN` for a run below the one that `outer` names, if any.
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

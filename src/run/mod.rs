//! One supervised run of terraform: from its start to the moment when its lock is known to be gone.
//!
//! Nothing here knows of DynamoDB or S3: [`crate::lock`] does.

mod aftermath;
mod lending;
pub(crate) mod outcome;
mod pipes;
mod poll;
mod recorder;
pub(crate) mod stop;
mod supervision;
mod tombstone;
mod tree;

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::settings::Settings;
use crate::sys::process;
use crate::sys::signals::Signals;
use crate::sys::spawn::{self, Image, Setup};
use crate::sys::terminal::Terminal;
use crate::sys::wait::Ended;
use crate::terraform::binary::{self, Binary};
use crate::terraform::command_line::CommandLine;
use crate::terraform::data_directory::DataDirectory;
use crate::trace::trace;
use aftermath::Aftermath;
use lending::Lending;
use pipes::Pipes;
use recorder::{Change, Recorder};
use stop::Stop;
use supervision::Supervision;
use tombstone::Graveyard;
use tree::Tree;

/// What is to be run.
pub(crate) struct Invocation {
    /// The terraform that was found.
    pub(crate) terraform: Binary,
    /// argv\[0\] for it.
    pub(crate) name: OsString,
    /// The rest of argv, as we got it.
    pub(crate) arguments: Vec<OsString>,
    /// What we understand of it.
    pub(crate) command_line: CommandLine,
}

impl Invocation {
    /// The program with its arguments and our environment, changed by `changes`.
    ///
    /// # Errors
    /// See [`Image::new`].
    pub(crate) fn image(&self, changes: &[Change]) -> io::Result<Image> {
        let chain = (binary::CHAIN, Some(self.terraform.chain.clone()));
        let changes: Vec<&Change> = changes.iter().chain([&chain]).collect();
        let environment = std::env::vars_os()
            .filter(|(name, _)| !changes.iter().any(|(changed, _)| name == changed))
            .chain(changes.iter().filter_map(|(name, value)| Some((OsString::from(name), value.clone()?))));
        let arguments = std::iter::once(self.name.as_os_str()).chain(self.arguments.iter().map(OsString::as_os_str));
        Image::new(&self.terraform.path, arguments, environment)
    }
}

/// Runs terraform, gives its lock back if it did not, and tells how it ended.
///
/// # Errors
/// When terraform could not be started; nothing was done then.
pub(crate) fn supervise(invocation: &Invocation, settings: &Settings) -> io::Result<Ended> {
    let mut signals = Signals::listen()?;
    let begun = Instant::now();
    let current = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    let data_directory = DataDirectory::path(&current, &invocation.command_line);
    let before = DataDirectory::read(&data_directory);

    let variable = |name: &str| std::env::var_os(name);
    let graveyard = Graveyard::of_user(variable);
    if let Some(graveyard) = graveyard.as_ref().filter(|_| settings.release) {
        aftermath::release_what_came_late(graveyard, &before, invocation, &mut signals);
    }

    let id = run_id();
    let mut recorder = Recorder::open(&id, variable)?;
    let (mut tree, lifeline) = Tree::new(&id)?;
    let mut pipes = Pipes::interpose()?;
    let terminal = if settings.shared_terminal { None } else { Terminal::open() };
    let parent = supervision::parent_to_watch(settings.ci, &signals, terminal.is_some());
    process::adopt_orphans();

    let mut changes = recorder.changes();
    changes.push((tree::RUN, Some(nested(variable(tree::RUN), &id))));
    let image = invocation.image(&changes)?;
    let started = jiff::Timestamp::now();
    let terraform = spawn::spawn(
        &image,
        &Setup {
            own_group: !settings.shared_terminal,
            redirect: pipes.writers(),
            mask: signals.mask_at_entry(),
            ignored: signals.inherited().ignored(),
        },
    )?;
    drop((lifeline, image));
    pipes.close_writers();
    tree.started(terraform);
    // What terraform need not wait for comes after its start.
    let memory_kills = process::out_of_memory_kills();
    trace!("started terraform as {terraform}, run {id}");

    let mut stop = Stop::new(invocation.command_line.ignores_interrupts(), settings.stop_timeout);
    let ended = Supervision {
        terraform,
        shared: settings.shared_terminal,
        signals: &mut signals,
        stop: &mut stop,
        lending: Lending::new(terminal, terraform),
        pipes: &mut pipes,
        recorder: &mut recorder,
        tree: &tree,
        parent,
        begun,
        children_changed: false,
    }
    .watch();
    let all_written = pipes.flush();

    let out_of_memory = ended == Ended::Killed(Signal::SIGKILL) && memory_kills < process::out_of_memory_kills();
    Aftermath {
        ended,
        stop: &stop,
        out_of_memory,
        started,
        log: recorder.read(),
        tree: &tree,
        invocation,
        before: &before,
        data_directory: &data_directory,
        graveyard: graveyard.as_ref(),
        release: settings.release,
    }
    .settle(&mut signals);
    if !all_written {
        write_the_rest(&mut pipes, &mut signals);
    }
    Ok(ended)
}

/// Waits for a slow reader of terraform's last words. Whoever asks us to stop meanwhile need not wait for that reader.
fn write_the_rest(pipes: &mut Pipes, signals: &mut Signals) {
    use nix::poll::PollFlags;
    use nix::sys::signal::Signal::{SIGHUP, SIGINT, SIGTERM};
    while !pipes.flush() {
        let mut awaited = vec![(signals.as_fd(), PollFlags::POLLIN)];
        awaited.extend(pipes.awaited());
        poll::wait(&awaited, None);
        while let Some(arrival) = signals.next() {
            if [SIGINT, SIGTERM, SIGHUP].contains(&arrival.signal) {
                return;
            }
        }
    }
}

/// A name for this run that no other has.
fn run_id() -> String {
    let random = RandomState::new().build_hasher().finish();
    format!("{}-{random:016x}", std::process::id())
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

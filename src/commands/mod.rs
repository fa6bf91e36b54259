//! The `tf locks` commands. Terraform has no command of that name, and this module never sees terraform's arguments.
//!
//! Exit codes: 0 if nothing needs attention, 2 if something does, 1 if the command could not do what was asked, and 3
//! for both, if a command has several targets.

mod agreement;
mod ask_system;
mod audit;
mod choose;
mod connection;
mod doctor;
mod fix_digest;
mod found;
mod history;
mod history_page;
mod inventory;
mod lease_view;
mod list;
mod output;
mod own_path;
mod recover;
mod release;
mod scan;
mod shell_init;
mod shim;
mod show;
mod staleness;
mod stop_requests;
mod targets;
mod version;
mod watch;

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{CommandFactory, Parser, Subcommand};
use connection::Trouble;
use nix::sys::signal::Signal;

use crate::aws::ask_system::WORD as ASK_SYSTEM;
use crate::cleanup::{messages, recovery_process, takeover_process, wait_explanation};
use crate::journal::event_command;
use crate::settings::{self, LeaseSettings, UnreadableSetting};
use crate::supervise::{keeper, outcome};
use crate::sys::environment;
use crate::sys::wait::Ended;
use crate::{console, panics, runtime};

/// The result of a command, which decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// Nothing needs attention. The exit code is 0.
    Nothing,
    /// Something needs attention, for example a stale lock. The exit code is 2.
    Stale,
    /// The command did not do what was asked. The exit code is 1.
    Failed,
    /// Of several targets, at least one has something that needs attention, and at least one could not be read. The
    /// exit code is 3.
    StaleAndFailed,
    /// A recovery that another `tf` has started got no credentials.
    NoCredentials,
    /// A signal stopped the command, or, for SIGPIPE, the reader of stdout has exited. This process then dies of that
    /// signal.
    Stopped(Signal),
}

impl Finding {
    /// Returns the exit code. For [`Self::Stopped`], this process kills itself with that signal instead of returning;
    /// only PID 1 of a namespace survives the signal and returns 128 + N ([`outcome::end_as`]).
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Nothing => 0,
            Self::Failed => 1,
            Self::Stale => 2,
            Self::StaleAndFailed => 3,
            Self::NoCredentials => recovery_process::NO_CREDENTIALS,
            Self::Stopped(signal) => outcome::end_as(Ended::Killed(signal)),
        }
    }
}

/// Show who holds terraform's state locks, check whether the holder is still running, and release the locks of dead
/// runs.
///
/// Without a command, list the locks of this directory's backend, like `tf locks list`.
#[derive(Debug, Parser)]
#[command(version, name = "tf locks", bin_name = "tf locks", args_conflicts_with_subcommands = true)]
#[command(after_help = list::EXAMPLES)]
struct Locks {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    list: list::List,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List all locks in this directory's backend, in a DynamoDB table or in an S3 bucket
    #[command(after_help = list::EXAMPLES)]
    List(list::List),
    /// Show one lock and all evidence for and against its holder being alive
    #[command(after_help = show::EXAMPLES)]
    Show(show::Show),
    /// Release a lock if its holder is dead; ask if it is likely dead; refuse if it is alive or unknown
    #[command(after_help = release::EXAMPLES)]
    Release(release::Release),
    /// Count all locks, for a scheduled job; exit with 2 if any lock is stale
    #[command(after_help = audit::EXAMPLES)]
    Audit(audit::Audit),
    /// Check everything that a release in this directory needs; fix a state's digest
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::Doctor),
    /// Show past releases, forced releases, refused releases, takeovers and replaced locks
    #[command(after_help = history::EXAMPLES)]
    History(history::History),
    /// Release the locks that dead runs on this host left, and print one line for each
    ///
    /// If a run is still stopping, or another process is recovering it, the command waits for that run, for at most
    /// 30 s in total. If there is nothing to do, it prints nothing. It exits with 2 if a lock may still be held; the
    /// output shows that lock.
    #[command(after_help = recover::EXAMPLES)]
    Recover(recover::Recover),
    /// Print shell code that defines the alias `terraform=tf` and Tab completion for both names
    ///
    /// The command does not write any file. To use no alias, or for scripts, see `tf locks shim`.
    #[command(after_help = shell_init::EXAMPLES)]
    ShellInit(shell_init::ShellInit),
    /// Create links named terraform and tofu in a directory, for scripts, which do not see aliases
    ///
    /// With that directory first on PATH, an unchanged script runs terraform under tf. Existing files are never
    /// overwritten.
    #[command(after_help = shim::EXAMPLES)]
    Shim(shim::Shim),
    /// Print the version, commit and target of tf, and the terraform that it would run
    ///
    /// If that terraform does not report its version within 3 s, it is killed, and the output says so.
    #[command(after_help = version::EXAMPLES)]
    Version(version::Version),
}

impl Command {
    /// Whether the command judges or releases locks, so that it needs the settings of the lease.
    fn judges_locks(&self) -> bool {
        match self {
            Self::List(_) | Self::Show(_) | Self::Release(_) | Self::Audit(_) | Self::Doctor(_) | Self::Recover(_) => {
                true
            }
            Self::History(_) | Self::ShellInit(_) | Self::Shim(_) | Self::Version(_) => false,
        }
    }

    /// Reads the settings that the command needs: those of the lease, and whether locks may be released. `doctor` reads
    /// the others itself, because it reports what is wrong with them.
    ///
    /// # Errors
    /// [`UnreadableSetting`] if a value is invalid.
    fn settings(&self) -> Result<LeaseSettings, UnreadableSetting> {
        let variable = |name: &str| std::env::var_os(name);
        if !self.judges_locks() {
            return Ok(LeaseSettings::default());
        }
        if matches!(self, Self::Release(_) | Self::Recover(_)) {
            settings::release(variable)?;
        }
        LeaseSettings::read(variable)
    }
}

/// Returns the arguments of `tf locks` if `arguments` are those of a `tf locks` command. Returns `None` if they are
/// terraform's. `arguments` do not include the program's name. A `-chdir=DIR` before the word `locks` is accepted, as
/// terraform accepts it before a command, and becomes `--chdir=DIR`. If there are several, the last one counts. A
/// command that works in no directory ignores them.
pub(crate) fn ours(arguments: &[OsString]) -> Option<Vec<OsString>> {
    let directories = arguments.iter().take_while(|argument| argument.as_bytes().starts_with(b"-chdir=")).count();
    let (directories, rest) = arguments.split_at(directories);
    let (first, rest) = rest.split_first()?;
    if first != "locks" {
        return None;
    }
    let mut words = rest.to_vec();
    if let Some(directory) = directories.last().and_then(|last| last.as_bytes().strip_prefix(b"-chdir=")) {
        add_directory(&mut words, directory);
    }
    Some(words)
}

/// Adds `--chdir=` and `directory` to `words`, the arguments after `locks`, unless their command has no such option.
fn add_directory(words: &mut Vec<OsString>, directory: &[u8]) {
    let locks = Locks::command();
    let command = words.first().filter(|word| !word.as_bytes().starts_with(b"-"));
    let has_option = match command {
        None => true,
        Some(word) => locks
            .find_subcommand(word)
            .is_some_and(|command| command.get_arguments().any(|argument| argument.get_long() == Some("chdir"))),
    };
    if has_option {
        // Directly after the command: the words after a `--` are no options.
        let at = usize::from(command.is_some());
        let option = [b"--chdir=", directory].concat();
        words.insert(at, OsString::from_vec(option));
    }
}

/// Runs `tf locks` with `words`, the arguments after `locks`, and returns the exit code.
pub(crate) fn run(words: Vec<OsString>) -> u8 {
    // These words are internal. Clap does not know them, because clap would offer them to users in help, completions
    // and suggestions.
    if words == [event_command::WORD] {
        event_command::stand_between();
        return Finding::Nothing.code();
    }
    if let Some((word, descriptors)) = words.split_first()
        && word == keeper::WORD
    {
        return keeper::keeper_process::keep(descriptors);
    }
    if let Some((word, question)) = words.split_first()
        && word == ASK_SYSTEM
    {
        ask_system::answer(question);
        return Finding::Nothing.code();
    }
    environment::unset_empty("AWS_");
    if words == [takeover_process::WORD] {
        return takeover_process::run();
    }
    if words == [wait_explanation::WORD] {
        return wait_explanation::run();
    }
    let words = std::iter::once(OsString::from("tf locks")).chain(words);
    let found = match Locks::try_parse_from(words) {
        Ok(Locks { command, list }) => {
            let command = command.unwrap_or(Command::List(list));
            let lease = match command.settings() {
                Ok(lease) => lease,
                Err(reason) => {
                    console::say(&reason.to_string());
                    return Finding::Failed.code();
                }
            };
            match command {
                Command::List(list) => list.run(),
                Command::Show(show) => show.run(),
                Command::Release(release) => release.run(),
                Command::Audit(audit) => audit.run(),
                Command::Recover(recover) => recover.run(),
                Command::Doctor(doctor) => doctor.run(lease),
                Command::History(history) => history.run(),
                Command::ShellInit(shell_init) => shell_init.run(),
                Command::Shim(shim) => shim.run(),
                Command::Version(version) => version.run(),
            }
        }
        Err(error) if error.use_stderr() => {
            console::say(error.render().to_string().trim_end());
            return Finding::Failed.code();
        }
        Err(help) => {
            console::print_for_program(&help.render().to_string());
            Ok(Finding::Nothing)
        }
    };
    let finding = found.unwrap_or_else(|trouble| match trouble {
        Trouble::Stopped(signal) => Finding::Stopped(signal),
        trouble => {
            console::say(&trouble.to_string());
            Finding::Failed
        }
    });
    // If the output could not be written, that failure decides the exit code, and not the finding.
    match console::print_failure() {
        None => finding.code(),
        Some(ErrorKind::BrokenPipe) => Finding::Stopped(Signal::SIGPIPE).code(),
        Some(ErrorKind::NotConnected) => {
            console::say(console::STDOUT_CLOSED);
            Finding::Failed.code()
        }
        Some(kind) => {
            console::say(&format!(
                "could not write the result to stdout, although the command was carried out: {kind}"
            ));
            Finding::Failed.code()
        }
    }
}

/// Runs `work`, which sends requests to AWS, on a new single-threaded tokio runtime.
///
/// # Errors
/// Fails if the runtime cannot be created, if `work` fails, or if it panics.
fn block_on(work: impl Future<Output = Result<Finding, Trouble>>) -> Result<Finding, Trouble> {
    match panics::caught(|| runtime::block_on(work)) {
        Some(Ok(found)) => found,
        Some(Err(error)) => Err(Trouble::Said(format!("could not start the AWS client: {error}"))),
        None => Err(Trouble::Said(messages::release::CLIENT_FAILED.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use clap_complete::Shell;

    use super::*;

    /// Returns every generated file by its path in the repository. The shell completions and the manual pages come from
    /// the clap definitions of `tf locks`. The documents come from the lists of backends and attributes.
    fn generated() -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        for (shell, name, by_hand, registration) in [
            (
                Shell::Bash,
                "tf.bash",
                include_str!("../../shell/complete.bash"),
                "if [[ \"${BASH_VERSINFO[0]}\" -eq 4 &&",
            ),
            (Shell::Zsh, "_tf", include_str!("../../shell/complete.zsh"), "if [ \"$funcstack[1]\" = \"_tf\" ]"),
            (Shell::Fish, "tf.fish", include_str!("../../shell/complete.fish"), ""),
        ] {
            // Terraform's own commands are not listed here: the completion code that is written by hand asks terraform
            // for them.
            let locks = Locks::command().name("locks").bin_name("tf locks");
            let mut tf =
                clap::Command::new("tf").disable_help_flag(true).disable_help_subcommand(true).subcommand(locks);
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut tf, "tf", &mut text);
            let mut text = String::from_utf8(text).unwrap();
            if !registration.is_empty() {
                let (functions, _) =
                    text.split_once(registration).expect("the generated text ends with its registration");
                text = functions.trim_end().to_owned() + "\n";
            }
            files.insert(Path::new("shell/completions").join(name), (text + by_hand).into_bytes());
        }
        let directory = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(Locks::command().name("tf-locks"), directory.path()).unwrap();
        for page in std::fs::read_dir(directory.path()).unwrap() {
            let page = page.unwrap().path();
            files.insert(Path::new("man").join(page.file_name().unwrap()), std::fs::read(&page).unwrap());
        }
        files.insert("docs/backends.md".into(), crate::terraform::other_backends::document().into_bytes());
        files.insert("docs/backend-s3.md".into(), crate::aws::attributes::document().into_bytes());
        files
    }

    /// An unset variable in a script gives an empty value.
    #[test]
    fn an_empty_value_of_an_option_that_says_where_to_look_is_refused() {
        for command in ["list", "show", "release", "audit"] {
            for option in ["--table", "--bucket", "--region", "--profile", "--endpoint-url", "--chdir", "--from"] {
                if option == "--from" && matches!(command, "show" | "release") {
                    continue;
                }
                let table: &[&str] =
                    if matches!(option, "--region" | "--profile" | "--endpoint-url") { &["--table", "t"] } else { &[] };
                for empty in [vec![option.to_owned(), String::new()], vec![format!("{option}=")]] {
                    let mut words = vec!["tf locks".to_owned(), command.to_owned()];
                    words.extend(table.iter().map(|word| (*word).to_owned()).chain(empty));
                    let error = Locks::try_parse_from(words).unwrap_err().to_string();
                    let expected = format!("a value is required for '{option} <");
                    assert!(error.contains(&expected), "{command} {option}: {error}");
                }
            }
        }
    }

    /// Compares the generated files with those in the repository. `make generated` sets TF_WRITE_GENERATED, which
    /// writes them.
    #[test]
    fn what_is_generated_is_what_the_commands_are() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let files = generated();
        if std::env::var_os("TF_WRITE_GENERATED").is_some() {
            for directory in ["man", "shell/completions"] {
                let _ = std::fs::remove_dir_all(root.join(directory));
                std::fs::create_dir_all(root.join(directory)).unwrap();
            }
            for (path, text) in &files {
                std::fs::write(root.join(path), text).unwrap();
            }
        }
        for (path, text) in &files {
            let stored = std::fs::read(root.join(path)).unwrap_or_default();
            assert!(stored == *text, "{} is not what the commands are: type make generated", path.display());
        }
        for directory in ["man", "shell/completions"] {
            for entry in std::fs::read_dir(root.join(directory)).unwrap() {
                let path = Path::new(directory).join(entry.unwrap().file_name());
                assert!(files.contains_key(&path), "{} belongs to no command: type make generated", path.display());
            }
        }
    }

    #[test]
    fn the_definitions_are_sound_and_every_command_has_examples() {
        let command = Locks::command();
        command.clone().debug_assert();
        for subcommand in command.get_subcommands() {
            let help = subcommand.clone().render_long_help().to_string();
            assert!(help.contains("Examples:") && help.contains("xit codes:"), "{}", subcommand.get_name());
        }
    }

    fn words(text: &str) -> Option<Vec<String>> {
        let arguments: Vec<OsString> = text.split_whitespace().map(OsString::from).collect();
        ours(&arguments).map(|words| words.into_iter().map(|word| word.into_string().unwrap()).collect())
    }

    #[test]
    fn only_the_word_locks_is_ours() {
        assert_eq!(words("locks list"), Some(vec!["list".into()]));
        for line in ["", "plan", "-chdir=a plan", "plan locks", "-help locks", "state locks", "-chdir locks"] {
            assert_eq!(words(line), None, "{line}");
        }
    }

    #[test]
    fn the_directory_before_the_word_locks_is_that_of_every_command_that_works_in_one() {
        for (line, expected) in [
            ("-chdir=a locks", "--chdir=a"),
            ("-chdir=a -chdir=-b locks --json", "--chdir=-b --json"),
            ("-chdir=a locks list", "list --chdir=a"),
            ("-chdir=a locks show -- -id", "show --chdir=a -- -id"),
            ("-chdir=a locks release x", "release --chdir=a x"),
            ("-chdir=a locks audit", "audit --chdir=a"),
            ("-chdir=a locks doctor", "doctor --chdir=a"),
            ("-chdir=a locks version", "version --chdir=a"),
            ("-chdir=a locks recover --dry-run", "recover --dry-run"),
            ("-chdir=a locks history", "history"),
            ("-chdir=a locks shell-init bash", "shell-init bash"),
            ("-chdir=a locks shim /x", "shim /x"),
            ("-chdir=a locks help show", "help show"),
            ("-chdir=a locks nothing", "nothing"),
        ] {
            let expected = expected.split(' ').map(Into::into).collect();
            assert_eq!(words(line), Some(expected), "{line}");
        }
        for line in ["-chdir=a locks recover --dry-run", "-chdir=a locks history", "-chdir=-b locks show -- -id"] {
            let words = std::iter::once("tf locks".to_owned()).chain(words(line).unwrap());
            assert!(Locks::try_parse_from(words).is_ok(), "{line}");
        }
    }
}

//! `tf locks ...`: the commands that are ours. Terraform has none of that name, and these never see its arguments.
//!
//! They end with 0 when there is nothing to worry about, with 2 when something is left that somebody must look at, and
//! with 1 when they could not do what they were asked for.

mod agreement;
mod audit;
mod choose;
mod connection;
mod doctor;
mod fix_digest;
mod found;
mod history;
mod inventory;
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

use crate::console;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;

use clap::{Parser, Subcommand};
use nix::sys::signal::Signal;

use crate::journal::event_command;
use crate::supervise::outcome;
use crate::sys::environment;
use crate::sys::wait::Ended;
use connection::Trouble;

/// What a command found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// All is well.
    Nothing,
    /// Something is left.
    Stale,
    /// It could not be done.
    Failed,
    /// Somebody ended it.
    Stopped(Signal),
}

impl Finding {
    /// The exit code. Does not come back where a signal was the end.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Nothing => 0,
            Self::Failed => 1,
            Self::Stale => 2,
            Self::Stopped(signal) => outcome::end_as(Ended::Killed(signal)),
        }
    }
}

/// See who holds terraform's state locks, whether that holder lives, and release what is proven dead.
///
/// Without a command: the locks of this directory's backend, as `tf locks list`.
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
    /// Every lock of this directory's backend, of a table or of a bucket
    #[command(after_help = list::EXAMPLES)]
    List(list::List),
    /// One lock, and every piece of evidence for and against its holder being alive
    #[command(after_help = show::EXAMPLES)]
    Show(show::Show),
    /// Release a lock whose holder is proven dead; ask if it is likely dead; refuse if it is alive
    #[command(after_help = release::EXAMPLES)]
    Release(release::Release),
    /// For a schedule: count what stands, and end with 2 if something is stale
    #[command(after_help = audit::EXAMPLES)]
    Audit(audit::Audit),
    /// Try everything that a release in this directory needs; mend a digest
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::Doctor),
    /// What was released, forced and refused
    #[command(after_help = history::EXAMPLES)]
    History(history::History),
    /// Finish what dead runs on this host have left: give their locks back, a line for each
    ///
    /// A run that somebody takes care of at this moment is waited for. Nothing to do is silent. Ends with 0, or with 2
    /// when a lock could not be given back, which is then named.
    #[command(after_help = recover::EXAMPLES)]
    Recover(recover::Recover),
    /// Print what a shell has to read: the alias `terraform=tf`, and what completes both
    ///
    /// Nothing is written anywhere. Without an alias and for a script there is `tf locks shim`.
    #[command(after_help = shell_init::EXAMPLES)]
    ShellInit(shell_init::ShellInit),
    /// Put links named terraform and tofu into a directory, for scripts, which see no alias
    ///
    /// With that directory first on PATH an unchanged script runs terraform under tf. Nothing that stands there is
    /// overwritten.
    #[command(after_help = shim::EXAMPLES)]
    Shim(shim::Shim),
}

/// What `arguments`, without the program's name, ask `tf locks` for; `None` when they are terraform's. A `-chdir=DIR`
/// before that word is for us, as it would be for terraform.
pub(crate) fn ours(arguments: &[OsString]) -> Option<Vec<OsString>> {
    let directories = arguments.iter().take_while(|argument| argument.as_bytes().starts_with(b"-chdir=")).count();
    let (directories, rest) = arguments.split_at(directories);
    let (first, rest) = rest.split_first()?;
    if first != "locks" {
        return None;
    }
    let mut words = rest.to_vec();
    if let Some(directory) = directories.last().and_then(|last| last.as_bytes().strip_prefix(b"-chdir=")) {
        words.extend([OsString::from("--chdir"), OsStr::from_bytes(directory).to_owned()]);
    }
    Some(words)
}

/// Runs `tf locks`, with the words behind that. Gives the exit code.
pub(crate) fn run(words: Vec<OsString>) -> u8 {
    // For ourselves alone: what clap knows is offered to people by help, completions and did-you-mean.
    if words == [event_command::WORD] {
        event_command::stand_between();
        return Finding::Nothing.code();
    }
    environment::unset_empty("AWS_");
    let words = std::iter::once(OsString::from("tf locks")).chain(words);
    let found = match Locks::try_parse_from(words) {
        Ok(Locks { command, list }) => match command.unwrap_or(Command::List(list)) {
            Command::List(list) => list.run(),
            Command::Show(show) => show.run(),
            Command::Release(release) => release.run(),
            Command::Audit(audit) => audit.run(),
            Command::Recover(recover) => recover.run(),
            Command::Doctor(doctor) => doctor.run(),
            Command::History(history) => history.run(),
            Command::ShellInit(shell_init) => shell_init.run(),
            Command::Shim(shim) => shim.run(),
        },
        Err(error) if error.use_stderr() => {
            console::say(error.render().to_string().trim_end());
            return Finding::Failed.code();
        }
        Err(help) => {
            console::print(&help.render().to_string());
            Ok(Finding::Nothing)
        }
    };
    let finding = found.unwrap_or_else(|trouble| match trouble {
        Trouble::ReaderGone => Finding::Stopped(Signal::SIGPIPE),
        trouble => {
            console::say(&trouble.to_string());
            Finding::Failed
        }
    });
    // What nobody could read is no answer, whatever it was.
    match console::print_failure() {
        None => finding.code(),
        Some(ErrorKind::BrokenPipe) => Finding::Stopped(Signal::SIGPIPE).code(),
        Some(ErrorKind::NotConnected) => {
            console::say(console::STDOUT_CLOSED);
            Finding::Failed.code()
        }
        Some(kind) => {
            console::say(&format!("the result could not be written: {kind}"));
            Finding::Failed.code()
        }
    }
}

/// Runs `work`, which talks to AWS.
fn block_on(work: impl Future<Output = Result<Finding, Trouble>>) -> Result<Finding, Trouble> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Trouble::Said(format!("no runtime: {error}")))?;
    let found = runtime.block_on(work);
    // A name look-up that hangs in its thread must not hold us.
    runtime.shutdown_background();
    found
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use clap::CommandFactory;
    use clap_complete::Shell;

    use super::*;

    /// Everything that is made from the definitions of the commands: what completes `tf locks` in a shell, and its pages
    /// of the manual.
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
            // Terraform's own words are terraform's to say: what is written by hand asks it.
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

    /// `make generated` writes them.
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
        assert_eq!(words("-chdir=a locks show x"), Some(["show", "x", "--chdir", "a"].map(Into::into).to_vec()));
        for line in ["", "plan", "-chdir=a plan", "plan locks", "-help locks", "state locks", "-chdir locks"] {
            assert_eq!(words(line), None, "{line}");
        }
    }
}

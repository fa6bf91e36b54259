//! A clean environment for the processes that the tests start. The variables, ignored signals and file mode creation
//! mask of the tests' caller have no influence on the results.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::sys::signal::{self, SigHandler, Signal};
use nix::sys::stat::{Mode, umask};

/// Removes from a command everything that the tests' caller has set, except PATH: variables, ignored signals, and the
/// file mode creation mask.
pub fn clean(command: &mut Command) -> &mut Command {
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", home()).env("LANG", "C.UTF-8");
    with_defaults(command)
}

/// Like [`clean`], but keeps the variables.
pub fn with_defaults(command: &mut Command) -> &mut Command {
    // SAFETY: sigaction and umask are async-signal-safe, and SIG_DFL is no handler.
    unsafe {
        command.pre_exec(|| {
            for signal in Signal::iterator().filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP)) {
                signal::signal(signal, SigHandler::SigDfl)?;
            }
            umask(Mode::from_bits_truncate(0o022));
            Ok(())
        })
    }
}

/// Returns an empty home directory.
fn home() -> &'static Path {
    static HOME: OnceLock<tempfile::TempDir> = OnceLock::new();
    HOME.get_or_init(|| tempfile::Builder::new().prefix("tf-test-home-").tempdir_in(place()).unwrap()).path()
}

/// Returns the directory in which the tests create their files: the first one in which programs can be started (by
/// root: also as another user), and whose path a shell does not need to quote.
pub fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let all = [std::env::temp_dir(), PathBuf::from("/var/tmp"), PathBuf::from(env!("CARGO_TARGET_TMPDIR"))];
        let reasons: Vec<_> = all.iter().map(|path| (path, why_not(path))).collect();
        let found = reasons.iter().find(|(_, why)| why.is_none());
        let (path, _) =
            found.unwrap_or_else(|| panic!("no directory can be used for the tests: {reasons:?}; set TMPDIR"));
        path.canonicalize().unwrap()
    })
}

/// Returns why a directory cannot be used. `None` if it can.
fn why_not(path: &Path) -> Option<&'static str> {
    use std::os::unix::fs::MetadataExt;

    use nix::sys::statvfs::{FsFlags, statvfs};
    let path = path.canonicalize().ok()?;
    let flags = statvfs(&path).map_or(FsFlags::empty(), |system| system.flags());
    let is_root = nix::unistd::geteuid().is_root();
    let is_closed = |path: &Path| path.metadata().is_ok_and(|place| place.mode() & 0o001 == 0);
    if path.to_string_lossy().contains(|character: char| !character.is_ascii() || " '\"$\\%".contains(character)) {
        Some("a shell would take its name apart")
    } else if tempfile::tempfile_in(&path).is_err() {
        Some("no file can be made there")
    } else if super::system::is_noexec(flags) {
        Some("no program can be started there (noexec)")
    } else if is_root && flags.contains(FsFlags::ST_NOSUID) {
        Some("no program changes its user there (nosuid)")
    } else if is_root && path.ancestors().any(is_closed) {
        Some("another user cannot get there")
    } else {
        None
    }
}

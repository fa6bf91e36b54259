//! Determines the version of a program that is a terraform or starts one, so that `tf` can set the level at which this
//! version logs its locks.
//!
//! `tf` runs `terraform version` once for each program that is itself a terraform, and remembers the result as long as
//! the file does not change. It does not do this for a program that only starts a terraform (a tfenv script, tenv, a
//! wrapper): such a program may choose a version by directory, download a version, or do anything else. For such a
//! program, `tf` reads the version from the log of the first run in a directory. The version is not known before that
//! run, so that run logs at TRACE.
//!
//! A program that only starts a terraform may also run it as another user (sudo, setpriv), and may choose the user
//! again for each run. A terraform itself may be setuid, or confined by AppArmor or SELinux. In these cases, terraform
//! may be unable to open a file of this user. When `tf` runs `terraform version`, it also tests whether that terraform
//! can open such a file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use crate::journal::state_directory::{Durability, StateDirectory, clear_unfinished, open_private, replace};
use crate::sys::memory::MemoryFile;
use crate::sys::poll;
use crate::terraform::binary::MIN_TERRAFORM_BYTES;
use crate::terraform::version::{LogDetail, Version};
use crate::trace::trace;

/// How long `terraform version` may take before it is killed.
const VERSION_TIMEOUT: Duration = Duration::from_secs(3);

/// How much of the output of `terraform version` is read, in bytes. The version is in its first line.
const MAX_OUTPUT_BYTES: usize = 60 << 10;

/// The maximum number of programs and directories that are remembered. When this number is reached, all of them are
/// deleted from the file.
const MAX_PROGRAMS: usize = 256;

/// The facts that are known about the program of one run.
#[derive(Debug)]
pub(crate) struct Program {
    /// The file with the known programs. `None` if there is no state directory, or no file at the path of the program.
    file: Option<PathBuf>,
    /// The key of the program in `file`: device, inode, size and modification time. For a program that only starts a
    /// terraform, the key also contains the data directory.
    key: String,
    /// Whether the program is a terraform itself. False if it only starts a terraform.
    pub(crate) itself: bool,
    /// Whether the program can open a file that only this user can open. Assumed to be true for a terraform that does
    /// not change its user, until `terraform version` shows the opposite. False for a program that only starts a
    /// terraform.
    pub(crate) opens: bool,
    /// The version of the program. `None` if it is not known.
    pub(crate) version: Option<Version>,
}

impl Program {
    /// Returns the known facts about the program at `path`, which runs with this data directory. Runs `terraform
    /// version` if the program is a terraform itself, its version is not known yet, and there is a file for the result.
    /// This process must have only one thread.
    pub(crate) fn look(state: Option<&StateDirectory>, path: &Path, data_directory: &Path) -> Self {
        let file = state.map(|state| state.join("programs.json"));
        let Ok(place) = fs::metadata(path) else {
            return Self { file: None, key: String::new(), itself: true, opens: true, version: None };
        };
        let mut key =
            format!("{}.{} {} {}.{:09}", place.dev(), place.ino(), place.size(), place.mtime(), place.mtime_nsec());
        let itself = place.size() >= MIN_TERRAFORM_BYTES && is_executable_file(path);
        if !itself {
            key = format!("{key} {}", data_directory.display());
        }
        let known = file.as_deref().map(read).unwrap_or_default();
        let closed = format!("{key}{CLOSED}");
        let mut opens = itself && !changes_user(&place);
        if known.contains_key(&closed) {
            (opens, key) = (false, closed);
        }
        let mut program = Self { file, itself, opens, version: known.get(&key).cloned(), key };
        // Without a file, the version could not be stored, and `terraform version` would run at each start of `tf`. So
        // `terraform version` runs only if there is a file.
        if program.version.is_none() && itself && program.file.is_some() {
            match ask(path) {
                Some((version, wrote)) => {
                    if !wrote && version.log_detail() != LogDetail::None {
                        program.opens = false;
                        program.key.push_str(CLOSED);
                    }
                    program.remember(&version);
                }
                None => trace!("{} does not say its version", path.display()),
            }
        }
        trace!("program: {:?}; opens our files: {}", program.version, program.opens);
        program
    }

    /// Returns the value of `TF_LOG_CORE` at which the program logs the locks of a backend of this kind. `backend` is
    /// `None` if the kind is not known. The level depends on the version if the kind is not known, for the S3 backend,
    /// and for the local, pg and inmem backends, which leave no lock behind. The locks of all other backends appear in
    /// the log only at TRACE.
    pub(crate) fn level(&self, backend: Option<&str>) -> &'static str {
        match (&self.version, backend) {
            (Some(version), None | Some("s3" | "local" | "pg" | "inmem")) => version.log_detail().level(),
            (Some(version), _) if version.log_detail() == LogDetail::None => version.log_detail().level(),
            _ => LogDetail::AcquireOnly.level(),
        }
    }

    /// Remembers `told`, the version in the log of the run, if it differs from the known version. `told` is `None` if
    /// the log has no version.
    pub(crate) fn learn(&mut self, told: Option<&Version>) {
        if let Some(told) = told.filter(|told| self.version.as_ref() != Some(*told)) {
            self.remember(told);
        }
    }

    fn remember(&mut self, version: &Version) {
        self.version = Some(version.clone());
        let Some(file) = &self.file else { return };
        for entry in file.parent().and_then(|directory| fs::read_dir(directory).ok()).into_iter().flatten().flatten() {
            clear_unfinished(&entry.path(), |name| name == "programs");
        }
        let mut known = read(file);
        if known.len() >= MAX_PROGRAMS {
            known.clear();
        }
        known.insert(self.key.clone(), version.clone());
        let written = serde_json::to_vec(&known)
            .map_err(io::Error::from)
            .and_then(|text| replace(file, &text, Durability::Processes));
        if let Err(error) = written {
            trace!("{}: {error}", file.display());
        }
    }
}

/// Returns the known programs in `file`. Empty if the file cannot be read or is invalid.
fn read(file: &Path) -> BTreeMap<String, Version> {
    let mut text = Vec::new();
    let opened = open_private(File::options().read(true), file);
    let read = opened.and_then(|file| file.take(1 << 20).read_to_end(&mut text));
    read.ok().and_then(|_| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// The suffix of the key of a program that cannot open a file of this user.
const CLOSED: &str = " closed";

/// Whether the program runs as another user than this process, because it is setuid.
fn changes_user(place: &fs::Metadata) -> bool {
    /// S_ISUID (inode(7)).
    const SET_USER_ID: u32 = 0o4000;
    place.mode() & SET_USER_ID != 0 && place.uid() != nix::unistd::geteuid().as_raw()
}

/// Whether the file is an executable in machine code. False for a script, and if the file cannot be read.
fn is_executable_file(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    // The magic numbers of ELF, of 64-bit Mach-O, and of universal Mach-O (code for several kinds of processors).
    read.is_ok() && matches!(magic, [0x7f, b'E', b'L', b'F'] | [0xcf, 0xfa, 0xed, 0xfe] | [0xca, 0xfe, 0xba, 0xbe])
}

/// Runs `terraform version` and returns the version. It is not remembered. `None` in the same cases as for [`ask`].
pub(crate) fn version_of(path: &Path) -> Option<Version> {
    ask(path).map(|(version, _)| version)
}

/// Runs `terraform version`. Returns the version, and whether the program could write its log to a file of this user.
/// `None` if the program cannot be run, prints no version, or takes longer than [`VERSION_TIMEOUT`]. Does not wait for
/// a process that the program has left in the background, even if it keeps the pipe open.
#[expect(clippy::disallowed_methods, reason = "this command requests no lock, and only `tf` reads its output")]
fn ask(path: &Path) -> Option<(Version, bool)> {
    let log = MemoryFile::create(&format!("tf-{}.version", std::process::id())).ok()?;
    let kept = std::env::vars_os().filter(|(name, _)| name == "PATH" || name == "HOME");
    let mut child = Command::new(path)
        .arg("version")
        .env_clear()
        .envs(kept)
        // Without this variable, terraform sends a request to HashiCorp to check for a newer version.
        .env("CHECKPOINT_DISABLE", "1")
        .env("TF_LOG_CORE", "INFO")
        .env("TF_LOG_PATH", &log.path)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let begun = Instant::now();
    while child.try_wait().ok()?.is_none() {
        if begun.elapsed() > VERSION_TIMEOUT {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        poll::wait(&[], Some(Duration::from_millis(2)));
    }
    let said = in_pipe(child.stdout.take()?);
    let wrote = log.file.metadata().is_ok_and(|file| file.len() > 0);
    Version::of_command(&String::from_utf8_lossy(&said)).map(|version| (version, wrote))
}

/// Returns what is in the pipe now: all output of a program that has exited, or at least the first 60 KiB of it.
fn in_pipe(mut pipe: ChildStdout) -> Vec<u8> {
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    while said.len() < MAX_OUTPUT_BYTES && poll::ready_now(pipe.as_fd(), PollFlags::POLLIN) {
        let Ok(length @ 1..) = pipe.read(&mut buffer) else { break };
        said.extend_from_slice(&buffer[..length]);
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(version: Option<Version>) -> Program {
        Program { file: None, key: String::new(), itself: true, opens: true, version }
    }

    /// A level that logs too little would hide a lock, so an unknown version or backend has the level that logs most.
    #[test]
    fn the_level_logs_the_locks_of_every_version_and_backend() {
        let (most, least) = ("TRACE", "INFO");
        for (version, s3, other) in [
            (None, most, most),
            (Some("1.11.4"), least, most),
            (Some("1.6.0"), least, most),
            (Some("1.5.7"), "DEBUG", most),
        ] {
            let version = version.map(|text| Version::of_record("Terraform version", text).unwrap());
            let program = program(version.clone());
            for kind in [None, Some("s3"), Some("local"), Some("pg"), Some("inmem")] {
                assert_eq!(program.level(kind), s3, "{version:?} {kind:?}");
            }
            for kind in ["gcs", "azurerm", "kubernetes", "consul", "http", "one of tomorrow"] {
                assert_eq!(program.level(Some(kind)), other, "{version:?} {kind}");
            }
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "it is no terraform")]
    fn a_pipe_that_another_process_keeps_open_is_not_waited_for() {
        let mut child =
            Command::new("/bin/sh").args(["-c", "sleep 60 & echo $!"]).stdout(Stdio::piped()).spawn().unwrap();
        child.wait().unwrap();
        let begun = Instant::now();
        let said = String::from_utf8(in_pipe(child.stdout.take().unwrap())).unwrap();
        let left = nix::unistd::Pid::from_raw(said.trim().parse().unwrap());
        nix::sys::signal::kill(left, nix::sys::signal::Signal::SIGKILL).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn known_programs_with_any_change_are_forgotten_or_read_back() {
        let version = Version::of_record("Terraform version", "1.11.4").unwrap();
        let known = BTreeMap::from([("8.7 90 1.000000002 /d".to_owned(), version)]);
        let text = serde_json::to_vec(&known).unwrap();
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(text), |text| {
            crate::generated_input::is_read_back::<BTreeMap<String, Version>>(&text)
        });
    }
}

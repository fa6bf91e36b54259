//! Which program stands behind terraform's name, so that its log is asked for at the level at which it tells of its locks.
//!
//! A program is asked once (`terraform version`), and what it says is remembered for as long as the file is the same one.
//! What only leads to a terraform (a script of tfenv's, tenv, a wrapper of somebody's own) is not asked: it may choose by
//! directory, download, or do anything else. What it leads to is told by the log of the first run in a directory, which is
//! therefore asked for everything.
//!
//! Such a script may also run terraform as another user (sudo, setpriv), and decide that anew each time; and a terraform
//! itself may be setuid, or confined by AppArmor or SELinux. Then it cannot open a file of this user's. Whether a terraform
//! can is tried when it is asked for its version.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::journal::state_directory::{StateDirectory, open_private};
use crate::sys::memory::MemoryFile;
use crate::sys::poll;
use crate::terraform::binary::LARGE;
use crate::terraform::version::{LogDetail, Version};
use crate::trace::trace;

/// How long it may take to say its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(3);

/// So many programs and directories are remembered.
const MAX_PROGRAMS: usize = 256;

/// What is known of the program of one run.
#[derive(Debug)]
pub(crate) struct Program {
    /// Where that is written down.
    file: Option<PathBuf>,
    key: String,
    /// It is a terraform itself, and nothing that only leads to one.
    pub(crate) itself: bool,
    /// It can open a file that is this user's alone.
    pub(crate) opens: bool,
    /// None: nobody knows.
    pub(crate) version: Option<Version>,
}

impl Program {
    /// What is known of the program at `path`, which is run with this data directory. There must be one thread.
    pub(crate) fn look(state: Option<&StateDirectory>, path: &Path, data_directory: &Path) -> Self {
        let file = state.map(|state| state.join("programs.json"));
        let Ok(place) = fs::metadata(path) else {
            return Self { file: None, key: String::new(), itself: true, opens: true, version: None };
        };
        let mut key =
            format!("{}.{} {} {}.{:09}", place.dev(), place.ino(), place.size(), place.mtime(), place.mtime_nsec());
        let itself = place.size() >= LARGE && is_executable_file(path);
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
        // Where nothing can be remembered nobody is asked: it would be asked each time.
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

    /// What `TF_LOG_CORE` must be, so that its log tells of locks of a backend of this kind. Of the other backends' locks a
    /// trace alone tells anything.
    pub(crate) fn level(&self, backend: Option<&str>) -> &'static str {
        match (&self.version, backend) {
            (Some(version), None | Some("s3" | "local" | "pg" | "inmem")) => version.log_detail().level(),
            (Some(version), _) if version.log_detail() == LogDetail::None => version.log_detail().level(),
            _ => LogDetail::AcquireOnly.level(),
        }
    }

    /// Takes what its log has told.
    pub(crate) fn learn(&mut self, told: Option<&Version>) {
        if let Some(told) = told.filter(|told| self.version.as_ref() != Some(*told)) {
            self.remember(told);
        }
    }

    fn remember(&mut self, version: &Version) {
        self.version = Some(version.clone());
        let Some(file) = &self.file else { return };
        let mut known = read(file);
        if known.len() >= MAX_PROGRAMS {
            known.clear();
        }
        known.insert(self.key.clone(), version.clone());
        let unfinished = file.with_extension(std::process::id().to_string());
        let written = (|| {
            let mut new = File::options().write(true).create_new(true).mode(0o600).open(&unfinished)?;
            new.write_all(&serde_json::to_vec(&known)?)?;
            fs::rename(&unfinished, file)
        })();
        if let Err(error) = written {
            trace!("{}: {error}", file.display());
            let _ = fs::remove_file(&unfinished);
        }
    }
}

fn read(file: &Path) -> BTreeMap<String, Version> {
    let mut text = Vec::new();
    let opened = open_private(File::options().read(true), file);
    let read = opened.and_then(|file| file.take(1 << 20).read_to_end(&mut text));
    read.ok().and_then(|_| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// What the key of a program ends with that cannot open a file of this user's.
const CLOSED: &str = " closed";

/// Whether a program runs as another user than whoever starts it.
fn changes_user(place: &fs::Metadata) -> bool {
    /// S_ISUID (inode(7)).
    const SET_USER_ID: u32 = 0o4000;
    place.mode() & SET_USER_ID != 0 && place.uid() != nix::unistd::geteuid().as_raw()
}

/// Not a script.
fn is_executable_file(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    // ELF; Mach-O in its 64-bit form, and as a file for several machines.
    read.is_ok() && matches!(magic, [0x7f, b'E', b'L', b'F'] | [0xcf, 0xfa, 0xed, 0xfe] | [0xca, 0xfe, 0xba, 0xbe])
}

/// Asks for its version, and whether it could write its log into a file of this user's.
#[expect(clippy::disallowed_methods, reason = "it locks nothing, and says its version to us alone")]
fn ask(path: &Path) -> Option<(Version, bool)> {
    let log = MemoryFile::create(&format!("tf-{}.version", std::process::id())).ok()?;
    let kept = std::env::vars_os().filter(|(name, _)| name == "PATH" || name == "HOME");
    let mut child = Command::new(path)
        .arg("version")
        .env_clear()
        .envs(kept)
        // It would ask HashiCorp whether there is a newer one.
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
    let mut said = String::new();
    child.stdout.take()?.take(1 << 16).read_to_string(&mut said).ok()?;
    let wrote = log.file.metadata().is_ok_and(|file| file.len() > 0);
    Version::of_command(&said).map(|version| (version, wrote))
}

//! Releases the lock of a backend other than S3 with terraform's own `force-unlock`. It does so only if the service
//! itself makes the delete conditional on the lock's ID ([`crate::terraform::other_backends`]).
//!
//! No log contains the ID of a lock in these backends. `tf` gets it by requesting the lock again: `terraform taint` of
//! a resource that does not exist is refused with a message that contains the whole lock. If no lock is held, that
//! command gets the lock for a moment, finds no such resource and changes nothing. (`force-unlock` with a wrong ID
//! would also show the lock. But if the service does not compare the ID, it would release the lock.) The creation time
//! of the lock then shows whether it belongs to the dead run, as for an OpenTofu that does not log the lock's ID
//! ([`crate::lock::proof::judge_unnamed`]).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::messages;
use crate::cleanup::messages::release::Wording;
use crate::cleanup::waiter::Waiter;
use crate::console;
use crate::journal::history;
use crate::journal::history::{LockEvent, What};
use crate::lock::outcome::Because;
use crate::lock::proof::{Match, judge_unnamed};
use crate::lock::release::ReleaseContext;
use crate::lock::release_step::QuietLimits;
use crate::sys::connections::StillSending;
use crate::terraform::backend::CachedBackend;
use crate::terraform::kubernetes_cluster::FINGERPRINT;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::{LockIdentity, Log, UnnamedLock};
use crate::terraform::other_backends::{OtherBackend, UnlockPolicy};
use crate::trace::trace;

/// The address of a resource that does not exist.
const NOTHING: &str = "tf_asks.who_holds_the_lock";

/// How long one terraform command may take.
const TERRAFORM_TIMEOUT: Duration = Duration::from_mins(1);

/// How often `tf` checks whether a terraform command has exited.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The data that are needed to release the lock of a dead run in a backend other than S3.
pub(crate) struct NonS3Release<'a> {
    backend: &'a CachedBackend,
    kind: &'static OtherBackend,
    /// The terraform program.
    program: &'a Path,
    current: &'a Path,
    chdir: Option<&'a Path>,
    workspace: String,
    /// Why a terraform command in the run's directory may not reach the lock of the run. `None` if it reaches the lock.
    moved: Option<&'static str>,
    /// The last lock in the run's log. `None` if the log shows no lock.
    pub(crate) had: Option<UnnamedLock>,
}

/// Whether the run uses a backend other than S3 in which a dead terraform can leave a lock.
pub(crate) fn may_be_left(places: &CandidateBackends) -> bool {
    let backend = places.directories.iter().find_map(|directory| directory.backend.as_ref());
    backend.and_then(OtherBackend::of).is_some_and(|other| other.unlock_policy != UnlockPolicy::Nothing)
}

/// Returns why the blocks `one` and `other`, which the same directory had at two moments, may not reach the same lock.
/// `None` if they reach the same lock. `kind` is the entry for `one`.
fn moved(kind: &OtherBackend, one: &CachedBackend, other: &CachedBackend) -> Option<&'static str> {
    if one.kind != other.kind || kind.place(one) != kind.place(other) {
        return Some("the run's directory has been set up for another backend since");
    }
    // A block from a plan or from the configuration has no fingerprint. The data directory's block has one at each
    // moment.
    let clusters = one.string(FINGERPRINT).zip(other.string(FINGERPRINT));
    let is_other = clusters.is_some_and(|(one, other)| one != other);
    is_other.then_some("a kubeconfig, or a variable that selects the cluster, has changed since the run")
}

/// The result of a release in a backend other than S3.
#[derive(Debug, Default)]
pub(crate) struct NonS3Result {
    /// The messages to report. Empty if there is nothing to report.
    pub(crate) messages: Vec<String>,
    /// Whether a later attempt may release the lock.
    pub(crate) later: bool,
    /// Whether the lock was released.
    pub(crate) released: bool,
}

impl NonS3Result {
    /// Whether a lock that was reported may still be held.
    pub(crate) fn leaves_one(&self) -> bool {
        !self.released && !self.messages.is_empty()
    }
}

impl<'a> NonS3Release<'a> {
    /// Returns the data for a run of `program` with the log `log`, started in `current`. `None` if the run's backend is
    /// S3 or is unknown.
    pub(crate) fn of(
        places: &'a CandidateBackends,
        log: &Log,
        program: &'a Path,
        current: &'a Path,
        chdir: Option<&'a Path>,
    ) -> Option<Self> {
        let mut backends = places.directories.iter().filter_map(|directory| directory.backend.as_ref());
        let backend = backends.next()?;
        let kind = OtherBackend::of(backend)?;
        let moved = backends.find_map(|other| moved(kind, backend, other));
        let had = log.of_workspaces().last().cloned();
        let workspace = match had.as_ref().map(|lock| &lock.identity) {
            Some(LockIdentity::Workspace(name)) => name.clone(),
            _ => places.workspaces.first().cloned().unwrap_or_default(),
        };
        Some(Self { backend, kind, program, current, chdir, workspace, moved, had })
    }

    /// The workspace of the lock.
    pub(crate) fn workspace(&self) -> &str {
        &self.workspace
    }

    /// Releases the lock, or reports why it was not released. `brackets` is true if the run's command logs that it got
    /// a lock. If so, a log without a lock shows that the run had no lock. `keep` is the reason why the lock may not be
    /// released, or `None` if it may be released.
    pub(crate) fn settle(
        &self,
        context: &ReleaseContext,
        brackets: bool,
        keep: Option<(&str, Because)>,
        wording: Wording<'_>,
        waiter: &mut Waiter<'_>,
    ) -> NonS3Result {
        let run = &context.run;
        let variable = |name: &str| std::env::var(name).ok();
        let unlock_policy = self.kind.unlock_policy(self.backend, variable);
        trace!("backend {}: {unlock_policy:?}; had: {:?}", self.kind.kind, self.had);
        // A run with `-lock=false` had no lock. If the log shows both a lock and `-lock=false`, the `-lock=false` is
        // from another terraform that wrote into the same log.
        if unlock_policy == UnlockPolicy::Nothing || (self.had.is_none() && (brackets || run.locking_disabled)) {
            return NonS3Result::default();
        }
        let place = self.kind.place(self.backend);
        let named = |why: &str, because: Because, info: Option<&LockInfo>| NonS3Result {
            messages: vec![messages::release::left_elsewhere(wording, self.kind, &place, (why, because), info)],
            ..NonS3Result::default()
        };
        if unlock_policy == UnlockPolicy::Name {
            return named("an unlock could remove the lock of another run", Because::Doubt, None);
        }
        if let Some(why) = self.moved {
            return NonS3Result { later: true, ..named(why, Because::Doubt, None) };
        }
        if let Some((why, because)) = keep {
            return NonS3Result { later: true, ..named(why, because, None) };
        }
        let held = match self.ask(waiter) {
            Ok(held) => held,
            Err(why) => return NonS3Result { later: true, ..named(&why, Because::NoAnswer, None) },
        };
        let Some(info) = held else { return NonS3Result::default() };
        let verdict = match &self.had {
            Some(had) => judge_unnamed(had, &info, "", run, true),
            None => Match::Doubt("the log of the run does not say whether it held a lock"),
        };
        trace!("{} holds {}: {verdict:?}", self.kind.kind, info.id);
        match verdict {
            Match::Ours => {}
            Match::Doubt(reason) if run.is_of(&info.who) => return named(reason, Because::Doubt, Some(&info)),
            Match::Doubt(_) | Match::Anothers => return NonS3Result::default(),
        }
        self.release(&info, StillSending::begin(context.is_network_shared), wording, waiter)
    }

    /// Releases the lock `info`. `sending` is what the kernel still sends for the dead terraform.
    fn release(
        &self,
        info: &LockInfo,
        mut sending: StillSending,
        wording: Wording<'_>,
        waiter: &mut Waiter<'_>,
    ) -> NonS3Result {
        let Wording { ending, by, .. } = wording;
        let place = self.kind.place(self.backend);
        let named = |why: &str| NonS3Result {
            messages: vec![messages::release::left_elsewhere(
                wording,
                self.kind,
                &place,
                (why, Because::NotYet),
                Some(info),
            )],
            later: true,
            released: false,
        };
        // A write of the dead terraform may still be in flight. In these backends, `tf` cannot check whether it
        // arrives.
        console::say(&messages::release::waiting_blindly(QuietLimits::of(sending.is_seen()).shortest()));
        let mut begun = Instant::now();
        while begun.elapsed() < QuietLimits::of(sending.is_seen()).shortest() {
            if waiter.interrupts() > 0 {
                return named(messages::release::INTERRUPTED);
            }
            waiter.wait(POLL_INTERVAL);
            if sending.look() {
                begun = Instant::now();
            }
        }
        let unlocked = self.terraform(&["force-unlock", "-force", "-no-color", &info.id], waiter);
        // The result of `force-unlock` does not prove that the lock is gone, so the lock is requested again.
        match self.ask(waiter) {
            Ok(Some(left)) if left.id == info.id => {
                let said = unlocked.map_or_else(|error| error.to_string(), |(_, said)| first_line(&said));
                named(&format!("force-unlock did not remove the lock: {said}"))
            }
            Err(why) => named(&why),
            Ok(_) => {
                history::record(&LockEvent::of_lock(What::Released, by, info, &info.path, ending, None));
                let message = messages::release::released_elsewhere(ending, self.kind, info);
                NonS3Result { messages: vec![message], later: false, released: true }
            }
        }
    }

    /// Returns the lock that is held now, or `None` if no lock is held. If that could not be determined, returns the
    /// reason as `Err`.
    fn ask(&self, waiter: &mut Waiter<'_>) -> Result<Option<LockInfo>, String> {
        let asked = self.terraform(&["taint", "-no-color", "-lock-timeout=0s", NOTHING], waiter);
        let (_, said) = asked.map_err(|error| error.to_string())?;
        held_lock(&said)
    }

    /// Runs terraform in the same directory as the run. Returns the exit code (`None` if a signal killed terraform),
    /// and the first 64 KiB of stderr. Returns an error if terraform cannot be started, if its stderr cannot be read,
    /// if it takes longer than [`TERRAFORM_TIMEOUT`], or if a person interrupts the wait twice.
    ///
    /// This terraform may hold the lock itself for a moment, so it must not be killed. `tf` never kills it. It is in a
    /// process group of its own, so the terminal's keys do not signal it. It writes into a file, so it gets no SIGPIPE
    /// if `tf` dies. If `tf` stops waiting for it, it continues until it exits by itself.
    fn terraform(&self, arguments: &[&str], waiter: &mut Waiter<'_>) -> io::Result<(Option<i32>, String)> {
        let mut said = tempfile::tempfile()?;
        let mut child = self.start(arguments, said.try_clone()?)?;
        let begun = Instant::now();
        let mut enough = 0;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            let interrupts = waiter.interrupts();
            if interrupts > 0 {
                trace!("an interrupt while terraform is asked");
            }
            enough += interrupts;
            if begun.elapsed() > TERRAFORM_TIMEOUT || enough > 1 {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "terraform did not answer"));
            }
            waiter.wait(POLL_INTERVAL);
        };
        let mut text = String::new();
        said.rewind()?;
        said.take(1 << 16).read_to_string(&mut text)?;
        Ok((status.code(), text))
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the run has ended; this terraform only reads and releases the run's lock"
    )]
    fn start(&self, arguments: &[&str], said: File) -> io::Result<Child> {
        let mut command = Command::new(self.program);
        if let Some(chdir) = self.chdir {
            let mut flag = OsString::from("-chdir=");
            flag.push(chdir);
            command.arg(flag);
        }
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_unwanted)) {
            command.env_remove(name);
        }
        command
            .args(arguments)
            .env("TF_WORKSPACE", &self.workspace)
            .env("TF_INPUT", "0")
            .env("CHECKPOINT_DISABLE", "1")
            .current_dir(self.current)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .process_group(0)
            .spawn()
    }
}

/// Returns the lock that is held, according to `said`, the output of `terraform taint` of [`NOTHING`]. `None` if no
/// lock is held. If that is not in the output, returns the reason as `Err`.
fn held_lock(said: &str) -> Result<Option<LockInfo>, String> {
    match LockInfo::of_refusal(said) {
        Some(info) => Ok(Some(info)),
        None if said.contains("No such resource instance") || said.contains("state is empty") => Ok(None),
        None => Err(format!("terraform could not read the lock: {}", first_line(said))),
    }
}

/// Whether the variable `name` must not be in the environment of this terraform. The user has set such a variable for
/// other commands.
fn is_unwanted(name: &str) -> bool {
    name.starts_with("TF_CLI_ARGS") || name.starts_with("TF_LOG") || name == "TF_TEMP_LOG_PATH"
}

/// Returns the first two lines of terraform's output that are not empty, joined by a space. The frame that terraform
/// draws around an error is left out.
fn first_line(said: &str) -> String {
    let lines = said.lines().map(|line| line.trim_matches(['\u{2502}', '\u{2577}', '\u{2575}', ' ']));
    lines.filter(|line| !line.is_empty()).take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::proof::Run;
    use crate::lock::reached::Reached;
    use crate::lock::release_step::LateWrites;
    use crate::terraform::data_directory::DataDirectory;
    use crate::terraform::log::LoggedLock;
    use crate::terraform::logged_lock::Progress;

    fn directory(kind: &str, config: &str) -> DataDirectory {
        let json = format!(r#"{{"version":3,"backend":{{"type":"{kind}","config":{{{config}}}}}}}"#);
        DataDirectory { backend: CachedBackend::parse(json.as_bytes()), workspace: "default".into() }
    }

    fn candidates(directories: Vec<DataDirectory>) -> CandidateBackends {
        CandidateBackends {
            directories,
            workspaces: vec!["selected".into()],
            any_workspace: false,
            data_directory: "/x/.terraform".into(),
            working_directory: "/x".into(),
        }
    }

    /// Returns a log that shows that the lock of `workspace` was acquired.
    fn log(workspace: Option<&str>) -> Log {
        let at = "2026-11-23T01:46:07Z".parse().unwrap();
        let mut log = Log::default();
        log.set_locks(workspace.map(|name| {
            let mut progress = Progress::asked(at);
            progress.grant(at);
            LoggedLock::Unnamed(UnnamedLock { identity: LockIdentity::Workspace(name.into()), progress })
        }));
        log
    }

    fn run(locking_disabled: bool) -> Run {
        Run {
            who: "root@vm".into(),
            who_now: "root@vm".into(),
            started: "2026-11-23T01:46:07Z".parse().unwrap(),
            disordered: false,
            locking_disabled,
            excessive: false,
            program: None,
        }
    }

    /// Returns the number of messages, and whether a later attempt may succeed. `had` is whether the log shows a lock,
    /// `brackets` whether the command logs its lock, and `keep` whether the lock must not be released. No terraform can
    /// be started.
    fn settled(directories: Vec<DataDirectory>, [had, brackets, keep]: [bool; 3]) -> (usize, bool) {
        let candidates = candidates(directories);
        let missing = Path::new("/no/such/terraform");
        let release = NonS3Release::of(&candidates, &log(had.then_some("default")), missing, Path::new("/"), None);
        let wording = Wording { ending: "x", unlock: "y", by: history::By::Recovery, has_journal: true };
        let keep = keep.then_some(("kept", Because::Never));
        let context = ReleaseContext {
            run: run(false),
            request_may_land: false,
            late_writes: LateWrites::Logged,
            is_network_shared: true,
            reached: Reached::default(),
        };
        let result = release.unwrap().settle(&context, brackets, keep, wording, &mut Waiter::Unattended);
        assert!(!result.released && result.leaves_one() != result.messages.is_empty());
        (result.messages.len(), result.later)
    }

    fn azure(key: &str) -> DataDirectory {
        directory("azurerm", &format!(r#""key":"{key}""#))
    }

    #[test]
    fn a_lock_is_left_only_in_a_backend_that_keeps_it_after_a_death() {
        for (kind, expected) in [("local", false), ("pg", false), ("s3", false), ("http", true), ("azurerm", true)] {
            assert_eq!(may_be_left(&candidates(vec![directory(kind, "")])), expected, "{kind}");
        }
        assert!(!may_be_left(&candidates(vec![])));
        assert!(!may_be_left(&candidates(vec![directory("s3", ""), azure("k")])), "the first one was used");
    }

    #[test]
    fn the_workspace_is_that_of_the_lock_or_the_selected_one() {
        let places = candidates(vec![azure("k")]);
        for (had, expected) in [(Some("green"), "green"), (None, "selected")] {
            let log = log(had);
            let release = NonS3Release::of(&places, &log, Path::new("t"), Path::new("/"), None).unwrap();
            assert_eq!(release.workspace, expected);
        }
        for kind in ["s3", "unknown"] {
            let places = candidates(vec![directory(kind, "")]);
            assert!(NonS3Release::of(&places, &log(None), Path::new("t"), Path::new("/"), None).is_none(), "{kind}");
        }
    }

    #[test]
    fn another_place_of_the_same_directory_means_that_the_backend_has_moved() {
        for (others, expected) in [
            (vec![], false),
            (vec![azure("k")], false),
            (vec![azure("other")], true),
            (vec![directory("gcs", "")], true),
            (vec![directory("s3", "")], true),
        ] {
            let places = candidates([azure("k")].into_iter().chain(others).collect());
            let log = log(None);
            let release = NonS3Release::of(&places, &log, Path::new("t"), Path::new("/"), None).unwrap();
            assert_eq!(release.moved.is_some(), expected, "{:?}", places.directories.last());
        }
    }

    /// With the wrong cluster, the question whether the lock is held would be answered with no, and would write there.
    #[test]
    fn a_kubeconfig_that_has_changed_since_the_run_keeps_tf_from_asking_another_cluster() {
        let cluster = |fingerprint: &str| {
            directory("kubernetes", &format!(r#""secret_suffix":"s","{FINGERPRINT}":"{fingerprint}""#))
        };
        let planned = directory("kubernetes", r#""secret_suffix":"s""#);
        for (directories, expected) in [
            (vec![cluster("1"), cluster("1")], None),
            (vec![cluster("1"), cluster("1"), planned], None),
            (vec![cluster("1"), cluster("2")], Some("a kubeconfig")),
        ] {
            let places = candidates(directories.clone());
            let log = log(Some("default"));
            let release = NonS3Release::of(&places, &log, Path::new("t"), Path::new("/"), None).unwrap();
            assert!(release.moved.map(|why| &why[..12]) == expected, "{:?}", release.moved);
            assert_eq!(settled(directories, [true, true, false]), (1, true));
        }
    }

    #[test]
    fn terraform_is_asked_only_where_it_may_release_and_everything_before_is_reported() {
        for brackets in [false, true] {
            assert_eq!(settled(vec![directory("pg", "")], [true, brackets, false]), (0, false), "nothing to release");
            assert_eq!(settled(vec![directory("http", "")], [true, brackets, false]), (1, false), "only reported");
            assert_eq!(settled(vec![azure("k"), azure("l")], [true, brackets, false]), (1, true), "moved");
            assert_eq!(settled(vec![azure("k")], [true, brackets, true]), (1, true), "must be kept");
            assert_eq!(settled(vec![azure("k")], [true, brackets, false]), (1, true), "no terraform can be started");
            // The log does not show a lock. That proves something only if the command logs its lock.
            let expected = if brackets { (0, false) } else { (1, true) };
            assert_eq!(settled(vec![azure("k")], [false, brackets, false]), expected);
        }
    }

    #[test]
    fn terraforms_refusal_shows_the_lock_and_a_missing_resource_shows_that_there_is_none() {
        let refusal = "Error: Error acquiring the state lock\n\nLock Info:\n  ID:        7\n  Path:      p\n  \
                       Operation: OperationTypeApply\n  Who:       root@vm\n  Version:   1.11.4\n  \
                       Created:   2026-11-22 23:26:03.031578055 +0000 UTC\n";
        assert_eq!(held_lock(refusal).unwrap().unwrap().id, "7");
        for none in ["Error: No such resource instance\n", "Error: The state is empty", "The state is empty"] {
            assert_eq!(held_lock(none), Ok(None), "{none}");
        }
        for (unclear, reason) in [
            ("", ""),
            (
                "\u{2577}\n\u{2502} Error: no network\n\u{2502} \n\u{2502} dial tcp\n\u{2502} more",
                "Error: no network dial tcp",
            ),
            ("Lock Info:\n  ID: 7", "Lock Info: ID: 7"),
        ] {
            assert_eq!(held_lock(unclear), Err(format!("terraform could not read the lock: {reason}")));
        }
    }

    #[test]
    fn variables_for_other_commands_do_not_reach_this_terraform() {
        for name in ["TF_CLI_ARGS", "TF_CLI_ARGS_taint", "TF_LOG", "TF_LOG_PATH", "TF_LOG_CORE", "TF_TEMP_LOG_PATH"] {
            assert!(is_unwanted(name), "{name}");
        }
        for name in ["TF_DATA_DIR", "TF_VAR_x", "TF_CLI_CONFIG_FILE", "TF_TEMP_LOG_PATH2", "PATH", "ARM_ACCESS_KEY"] {
            assert!(!is_unwanted(name), "{name}");
        }
    }
}

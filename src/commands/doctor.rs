//! `tf locks doctor`: checks everything that a release in this directory needs, before a release is needed.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;

use super::connection::{Connection, Directory, LocationArgs, ScanTarget, Trouble};
use super::{Finding, fix_digest, inventory, stop_requests};
use crate::aws::connect;
use crate::aws::failure::Failure;
use crate::cleanup::messages;
use crate::commands::fix_digest::Change;
use crate::console;
use crate::console::{length_of_time, quoted, visible, visible_whole};
use crate::holder::lease_text;
use crate::holder::witness::{self, WitnessVerdict};
use crate::journal::known_programs::Program;
use crate::journal::runs::Journal;
use crate::journal::state_directory::StateDirectory;
use crate::lease::grade::{self, Cloud, FenceReason, Grade};
use crate::lease::notice::{NoticeSetting, Provider};
use crate::lease::obstacle::LeaseObstacle;
use crate::lock::probe::{self, IfMatch, IfNoneMatch, Trial};
use crate::lock::release::SERVICE_TIMEOUT;
use crate::lock::s3::ObjectKey;
use crate::lock::stores::{LOCK_FILE, StoreKey, StoredLock, Stores};
use crate::lock::{digest, dynamodb, s3};
use crate::notice::requests;
use crate::notice::service::Service;
use crate::settings::{LeaseSettings, Settings};
use crate::sys::host_facts::HostFacts;
use crate::sys::lock_file;
use crate::sys::process::ProcessHandle;
use crate::terraform::command_line::CommandLine;
use crate::terraform::data_directory::{CommandDirectories, DataDirectory};
use crate::terraform::other_backends::{OtherBackend, UnlockPolicy};
use crate::terraform::version::LogDetail;
use crate::terraform::{binary, configuration, errored_state};

pub(super) const EXAMPLES: &str = "Examples:
  tf locks doctor
  tf locks doctor --chdir envs/prod
  tf locks doctor --fix-digest             fix the digest of the selected workspace, after confirmation
  tf locks doctor --fix-digest green --yes

Exit codes: 0 no check failed, 2 a check failed (the line below each failed check says what to do), 1 the command failed.";

#[derive(Args, Clone, Debug)]
pub(super) struct Doctor {
    #[arg(long, value_name = "DIR", help = "The working directory, as terraform's own -chdir")]
    chdir: Option<std::path::PathBuf>,
    /// Make the recorded digest of a workspace's state match the state, while holding its lock
    #[arg(long, value_name = "WORKSPACE", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "the option is absent, has no value, or has a value")]
    fix_digest: Option<Option<String>>,
    /// Do not ask for confirmation
    #[arg(long, short, requires = "fix_digest")]
    yes: bool,
    /// Only print what would be done
    #[arg(long, requires = "fix_digest")]
    dry_run: bool,
}

/// The result of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Ok,
    /// Nothing is wrong, but the user should know this.
    Note,
    Wrong,
}

/// What the user can do about the result of a check.
#[derive(Clone, Copy)]
enum Next<'a> {
    Nothing,
    /// A sentence, or a command to type.
    Do(&'a str),
}

/// Prints the result of each check and remembers whether any of them was [`Health::Wrong`].
struct Findings {
    wrong: bool,
}

impl Findings {
    /// Prints one result: what was checked, the result, and below it the next step.
    fn tell(&mut self, health: Health, name: &str, text: &str, next: Next<'_>) {
        self.wrong |= health == Health::Wrong;
        let mark = match health {
            Health::Ok => "ok   ",
            Health::Note => "note ",
            Health::Wrong => "WRONG",
        };
        console::print(&format!("{mark}  {name}: {}", text.replace('\n', "\n       ")));
        if let Next::Do(next) = next {
            console::print(&format!("       {}", next.replace('\n', "\n       ")));
        }
    }

    fn ok(&mut self, name: &str, text: &str) {
        self.tell(Health::Ok, name, text, Next::Nothing);
    }

    fn note(&mut self, name: &str, text: &str, next: Next<'_>) {
        self.tell(Health::Note, name, text, next);
    }

    fn wrong(&mut self, name: &str, text: &str, next: Next<'_>) {
        self.tell(Health::Wrong, name, text, next);
    }
}

impl Doctor {
    /// Returns whether the digest may be changed, according to the options.
    fn change(&self) -> Change {
        match (self.dry_run, self.yes) {
            (true, _) => Change::None,
            (false, true) => Change::Unasked,
            (false, false) => Change::IfAgreed,
        }
    }

    pub(super) fn run(self, lease_settings: LeaseSettings) -> Result<Finding, Trouble> {
        let own_files = own_files(self.chdir.clone());
        let change = self.change();
        let place = LocationArgs::directory_of(self.chdir);
        if let Some(workspace) = self.fix_digest {
            return fix_digest::run(&place, workspace.as_deref(), change);
        }
        let mut findings = Findings { wrong: false };
        terraform(&mut findings, &own_files);
        journal(&mut findings);
        let settings = Settings::read(|name| std::env::var_os(name));
        let shares_terminal = settings.as_ref().is_ok_and(|settings| settings.shared_terminal);
        if let Err(reason) = settings {
            let next = "correct or unset this variable: tf does not start terraform with it";
            findings.wrong("settings", &reason.to_string(), Next::Do(next));
        }
        lease(&mut findings, lease_settings, shares_terminal);
        notice(&mut findings, lease_settings)?;
        witness(&mut findings)?;
        let backend_there = DataDirectory::read(&own_files, Path::new("")).backend;
        if let Some((backend, other)) = backend_there.as_ref().and_then(|there| Some((there, OtherBackend::of(there)?)))
        {
            let said = format!("{}, {}", other.kind, visible(&other.place(backend)));
            match other.unlock_policy(backend, |name| std::env::var(name).ok()) {
                UnlockPolicy::Nothing => {
                    findings.ok("backend", &format!("{said}: a lock there is released when its process exits"));
                }
                UnlockPolicy::ForceUnlock => {
                    findings.ok(
                        "backend",
                        &format!(
                            "{said}: tf releases a lock there with {} force-unlock, after 10 s",
                            binary::name_to_type()
                        ),
                    );
                }
                UnlockPolicy::Name => {
                    let look = other.look.map(|look| format!("to see who holds the lock: {look}"));
                    findings.note(
                        "backend",
                        &format!(
                            "{said}: tf only reports a lock there, because an unlock could remove the lock of another run"
                        ),
                        look.as_deref().map_or(Next::Nothing, Next::Do),
                    );
                }
            }
            return Ok(if findings.wrong { Finding::Stale } else { Finding::Nothing });
        }
        if backend_there.is_none() && is_local(&place) {
            findings.ok(
                "backend",
                "none: the state is a local file, whose lock the kernel releases when the process exits",
            );
            return Ok(if findings.wrong { Finding::Stale } else { Finding::Nothing });
        }
        super::block_on(async {
            match place.reach().await {
                Ok(Connection { target: ScanTarget::Directory(directory), stores }) => {
                    backend(&mut findings, &directory, &stores, lease_settings.terms.is_some()).await;
                }
                Ok(_) => {}
                Err(trouble) => findings.wrong("backend", &trouble.to_string(), Next::Nothing),
            }
            Ok(if findings.wrong { Finding::Stale } else { Finding::Nothing })
        })
    }
}

fn terraform(findings: &mut Findings, own_files: &Path) {
    let replaced = binary::replaced_name();
    match binary::find(replaced) {
        Ok(found) => {
            let shown = visible(&found.path.display().to_string());
            let state = StateDirectory::open(|name| std::env::var_os(name)).ok();
            let program = Program::look(state.as_ref(), &found.path, own_files);
            match &program.version {
                Some(version) if version.log_detail() == LogDetail::None => findings.note(
                    "terraform",
                    &format!("{shown}, {version}: its log does not report its locks"),
                    Next::Do("tf cannot release a lock that this version leaves; tf can read the logs of Terraform since 0.15 and of OpenTofu"),
                ),
                Some(version) if version.log_detail() == LogDetail::AcquireOnly => findings.note(
                    "terraform",
                    &format!("{shown}, {version}: its log reports that it held a lock, but not which one"),
                    Next::Do("if this version leaves a lock, tf waits 10 s and then releases it; tf only reports the locks of state and workspace \
                     commands\nOpenTofu since 1.11 logs more"),
                ),
                Some(version) => findings.ok("terraform", &format!("{shown}, {version}: tf can release the locks that this version leaves")),
                None => findings.note(
                    "terraform",
                    &format!("{shown}: a program that starts a terraform; tf does not know yet which one"),
                    Next::Do("tf will know after the first run in this directory"),
                ),
            }
        }
        Err(reason) => {
            findings.wrong(
                "terraform",
                &reason.to_string(),
                Next::Do(&format!("put {replaced} on PATH, or set TFW_TERRAFORM to its path")),
            );
        }
    }
}

/// Returns whether the directory has a configuration that names no backend or the local one. Its state is then a local
/// file, whether or not `terraform init` has run.
fn is_local(place: &LocationArgs) -> bool {
    let directory = place.chdir.clone().unwrap_or_else(|| PathBuf::from("."));
    configuration::is_there(&directory)
        && configuration::backends(&directory, &[]).iter().all(|there| there.kind == "local")
}

/// Returns terraform's data directory for the working directory `chdir`, or for the current directory if `chdir` is
/// `None`.
pub(super) fn own_files(chdir: Option<PathBuf>) -> PathBuf {
    let mut command_line = CommandLine::parse(&[]);
    command_line.directory = chdir;
    DataDirectory::path(&std::env::current_dir().unwrap_or_default(), &command_line)
}

/// Checks that the journal can be opened and that file locks work in its directory. Without a journal, terraform still
/// runs, but nothing recovers the locks that a killed `tf` leaves.
fn journal(findings: &mut Findings) {
    let next = "set TFW_STATE_DIR to a directory of your own on a local disk";
    let state = match StateDirectory::open(|name| std::env::var_os(name)) {
        Ok(state) => state,
        Err(error) => return findings.wrong("journal", &error.to_string(), Next::Do(next)),
    };
    let shown = visible(&state.join("").display().to_string());
    let file = match Journal::open(&state).and_then(|_| test_file(&state)) {
        Ok(file) => file,
        Err(error) => return findings.wrong("journal", &format!("{shown}: {error}"), Next::Do(next)),
    };
    findings.ok("journal", &shown);
    // Two separately opened files of one process exclude each other as those of two processes do.
    let works = || -> std::io::Result<bool> {
        let (holder, other) = (file.reopen()?, file.reopen()?);
        Ok(lock_file::try_lock(&holder, 0)? && !lock_file::try_lock(&other, 0)?)
    };
    match works() {
        Ok(true) => findings.ok("file locks", "they work in that directory"),
        Ok(false) => findings.wrong(
            "file locks",
            "they do not work in that directory, so two processes can hold the same lock",
            Next::Do(next),
        ),
        Err(error) => findings.wrong("file locks", &format!("{shown}: {error}"), Next::Do(next)),
    }
}

/// Creates a file in the directory of the journal, and writes as much into it as the records of a run need. The file is
/// removed when it is dropped.
///
/// # Errors
/// Fails if the file cannot be created or written, for example because the disk is full.
fn test_file(state: &StateDirectory) -> std::io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::NamedTempFile::new_in(state.join(""))?;
    file.write_all(&[b' '; RECORD_BYTES])?;
    // Some file systems find out only now that there is no room.
    file.as_file().sync_data()?;
    Ok(file)
}

/// The room that the records of a run need, in bytes. A record has a few KiB, and the next one is written beside it.
const RECORD_BYTES: usize = 16 << 10;

/// Says whether this host can promise to stop terraform before its lease lapses. Says nothing if there is no lease.
fn lease(findings: &mut Findings, settings: LeaseSettings, shares_terminal: bool) {
    let Some(terms) = settings.terms else { return };
    let grade = grade::grade(&HostFacts::read(), shares_terminal, settings.clock);
    let length = length_of_time(terms.length());
    // The keeper of a lease must see when terraform ends.
    if let Err(error) = ProcessHandle::open(nix::unistd::getpid()) {
        let obstacle = LeaseObstacle::Unwatchable(error.to_string());
        let text = format!("{length}, but a run has no lease: {obstacle}");
        findings.note("lease", &text, Next::Do("use Linux 5.3 or later, and a sandbox that allows pidfd_open"));
        return;
    }
    match grade {
        Grade::Stop(reason) => findings.tell(
            Health::Ok,
            "lease",
            &format!("{length}, grade stop: {reason}"),
            if reason == FenceReason::UserVouches { Next::Do(VOUCHED) } else { Next::Nothing },
        ),
        Grade::None(reason) => findings.note(
            "lease",
            &format!("{length}, grade none: {reason}"),
            Next::Do(&format!(
                "other hosts see whether a run on this host renews its lease, but they ask before they release its lock\n{}",
                if reason.can_be_vouched_for() { VOUCH } else { CANNOT_VOUCH }
            )),
        ),
    }
}

/// Says which metadata service a run asks whether this host is about to end, and whether it answers. Says nothing if
/// there is no lease, because nothing is asked then.
///
/// # Errors
/// If the client cannot be started.
fn notice(findings: &mut Findings, settings: LeaseSettings) -> Result<(), Trouble> {
    const NAME: &str = "host end notice";
    if settings.terms.is_none() {
        return Ok(());
    }
    let cloud = Cloud::of(&HostFacts::read().dmi);
    let Some(provider) = settings.notice.provider(cloud == Some(Cloud::Aws)) else {
        let (reason, next) = match (settings.notice, cloud) {
            (NoticeSetting::Off, _) => ("TFW_NOTICE is off", Next::Nothing),
            (_, Some(Cloud::Azure)) => ("TFW_NOTICE is not set", Next::Do("on this machine, set TFW_NOTICE=azure")),
            (_, Some(Cloud::Google)) => ("TFW_NOTICE is not set", Next::Do("on this machine, set TFW_NOTICE=gcp")),
            _ => ("this host is not known to be a machine of Amazon EC2, and TFW_NOTICE is not set", Next::Nothing),
        };
        findings.tell(Health::Ok, NAME, &format!("no metadata is asked: {reason}"), next);
        return Ok(());
    };
    let service = match Service::of(provider, |name| std::env::var_os(name)) {
        Ok(service) => service,
        Err(reason) => {
            findings.note(NAME, &format!("no {provider} metadata is asked: {reason}"), Next::Nothing);
            return Ok(());
        }
    };
    let shown = visible(&service.to_string());
    super::block_on(async {
        match requests::ask_once(service).await {
            Ok(None) => findings.ok(NAME, &format!("{shown} answers: this host is not about to end")),
            Ok(Some(notice)) => {
                let why = lease_text::interruption(&notice.into());
                findings.note(NAME, &format!("{shown} answers: {}", why.replacen("its", "this", 1)), Next::Nothing);
            }
            Err(failure) => findings.note(
                NAME,
                &format!("{shown} gives no useful answer: {}", visible(&failure.to_string())),
                Next::Do(match provider {
                    Provider::Azure => "Azure's first answer may take two minutes, so ask again; without one, terraform is not interrupted before this host ends",
                    _ => "a run asks it ever more rarely; terraform is not interrupted before this host ends",
                }),
            ),
        }
        Ok(Finding::Nothing)
    })?;
    Ok(())
}

/// Asks the witness about a lock that does not exist.
fn witness(findings: &mut Findings) -> Result<(), Trouble> {
    const NAME: &str = "witness";
    super::block_on(async {
        // A signal must end the processes of the witness too.
        match stop_requests::unless_stopped(async { Ok(Box::pin(witness::try_out()).await) }).await? {
            None => {}
            Some(Ok(WitnessVerdict::Unknown)) => findings.ok(
                NAME,
                "TFW_WITNESS answers; whether it can ask its platform shows only with a lock that has a lease",
            ),
            Some(Ok(verdict)) => findings.wrong(
                NAME,
                &format!("TFW_WITNESS says {} of a lock that does not exist", verdict.word()),
                Next::Do("correct or unset this variable: its answers may make somebody release a lock that is in use"),
            ),
            Some(Err(failure)) => findings.wrong(
                NAME,
                &format!("TFW_WITNESS does not answer: {failure}"),
                Next::Do("correct or unset this variable: until then, no holder is judged by a witness"),
            ),
        }
        Ok(Finding::Nothing)
    })?;
    Ok(())
}

const VOUCHED: &str =
    "if this host is paused and its clock stands still, other hosts can release its lock while terraform is running";
const VOUCH: &str = "if this host is never paused (not by a person, a snapshot or a laptop that sleeps below it), set TFW_CLOCK=steady: \
     other hosts then release its lock without asking when its lease has lapsed";
const CANNOT_VOUCH: &str = "TFW_CLOCK=steady does not change that";

async fn backend(findings: &mut Findings, directory: &Directory, stores: &Stores, wants_leases: bool) {
    let Directory { bucket, key, workspace, .. } = directory;
    let table = directory.table.as_deref();
    let locks = match (directory.lock_file, table) {
        (true, Some(table)) => format!("the state's {LOCK_FILE} object and DynamoDB table {}", visible(table)),
        (true, None) => format!("the state's {LOCK_FILE} object"),
        (false, Some(table)) => format!("DynamoDB table {}", visible(table)),
        (false, None) => String::new(),
    };
    let state = format!("s3, {} in {}", visible(&format!("{bucket}/{key}")), visible(stores.region()));
    if locks.is_empty() {
        findings.note(
            "backend",
            &format!("{state}, without a lock"),
            Next::Do("two runs can write the state at the same time; set use_lockfile = true in the backend block"),
        );
    } else {
        findings.ok("backend", &format!("{state}, workspace {}; locked with {locks}", visible(workspace)));
    }
    match connect::identity(&directory.backend).await {
        Ok(arn) => findings.ok("credentials", &visible(&arn)),
        // A release does not need STS. Requests that need credentials are tried below.
        Err(reason) => {
            findings.note(
                "credentials",
                &format!("could not ask STS who they belong to: {}", visible(&reason)),
                Next::Nothing,
            );
        }
    }
    let mut clock = None;
    if let Some(table) = table {
        describe_table(findings, stores, table).await;
        let path = directory.backend.state_key(workspace).map_or_else(String::new, |key| format!("{bucket}/{key}"));
        let read = stores.read(&stores.item(table, &*path)).await;
        lock_place(findings, directory, &read, &stores.item(table, &*path));
        permission(findings, "dynamodb:GetItem", table, &read.map(drop), stores);
        let Trial { answer, clock: told } = probe::delete_item(&stores.dynamodb, table, &path).await;
        permission(findings, "dynamodb:DeleteItem", table, &answer, stores);
        clock = clock.or(told);
    }
    let lock_key = directory.backend.state_key(workspace).map_or_else(String::new, |key| format!("{key}{LOCK_FILE}"));
    // List with the prefix that terraform uses, because a policy may permit only that.
    let (before_workspaces, _) = inventory::around_workspaces(directory).unwrap_or_default();
    match s3::keys(&stores.s3, bucket, &before_workspaces).next().await {
        Some(Err(failure)) => permission(findings, "s3:ListBucket", bucket, &Err(failure), stores),
        _ => permission(findings, "s3:ListBucket", bucket, &Ok(()), stores),
    }
    if directory.lock_file {
        let read = stores.read(&stores.object(bucket, &lock_key)).await;
        lock_place(findings, directory, &read, &stores.object(bucket, &lock_key));
        permission(findings, "s3:GetObject", &format!("{bucket}/{lock_key}"), &read.map(drop), stores);
        let probe_key = probe::test_key(key);
        let (Trial { answer, clock: told }, if_match) =
            probe::delete_object(&stores.s3, bucket, &probe_key, Duration::MAX).await;
        match &answer {
            // The trial deletes another key than the lock's. If a policy permits only the lock's key, the trial is
            // denied although a release would succeed.
            Err(failure) if failure.denied().is_some() => findings.wrong(
                "s3:DeleteObject",
                &visible(&failure.to_string()),
                Next::Do(&format!(
                    "allow these credentials s3:DeleteObject on {}\nif they already have this permission on exactly that \
                     key, ignore this: the test uses another key, so that it touches no lock",
                    visible(&format!("{bucket}/{lock_key}"))
                )),
            ),
            _ => permission(findings, "s3:DeleteObject", bucket, &answer, stores),
        }
        clock = clock.or(told);
        conditional_delete(findings, bucket, if_match.unwrap_or(IfMatch::Unknown));
        // Do not create an object that could not be deleted again.
        let if_none_match =
            if answer.is_ok() { probe::put_object(&stores.s3, bucket, &probe_key).await } else { IfNoneMatch::Untried };
        conditional_put(findings, bucket, if_none_match);
        if table.is_none() && answer.is_ok() && wants_leases {
            let lock = stores.object(bucket, &lock_key);
            let treatment = stores.treatment_of_renewals(&lock, SERVICE_TIMEOUT).await;
            renewals(findings, bucket, treatment.unwrap_or(IfMatch::Unknown));
        }
        versions(findings, stores, bucket).await;
    }
    skew(findings, clock);
    digests(findings, directory, stores).await;
    errored_state(findings, directory);
}

/// Reports an entry that is in the lock's place but is not a lock. Such an entry blocks every run, and no terraform
/// command removes it.
fn lock_place(
    findings: &mut Findings,
    directory: &Directory,
    read: &Result<Option<StoredLock>, Failure>,
    place: &StoreKey,
) {
    if let Ok(Some(stored)) = read
        && stored.info().is_none()
    {
        findings.wrong(
            "lock",
            &format!(
                "its place holds something that is not a lock, so every run is refused\n{}, in {}",
                stored.describe_no_lock(),
                visible(&place.describe())
            ),
            Next::Do(&format!(
                "once you know that nobody needs it, type: {} {}",
                in_directories(directory, |there| there.locks(messages::next_step::RELEASE_NO_LOCK)),
                console::argument(&place.path())
            )),
        );
    }
}

async fn describe_table(findings: &mut Findings, stores: &Stores, table: &str) {
    let name = format!("table {}", visible(table));
    match dynamodb::describe(&stores.dynamodb, table).await {
        Ok(described) if described.keys != ["LockID"] => findings.wrong(
            &name,
            &format!("its key is {}", visible(&described.keys.join(", "))),
            Next::Do("terraform needs a table with LockID (a string) as its only key\ncreate one, and set dynamodb_table in the backend block to it"),
        ),
        Ok(described) if described.last_writer_wins() => findings.note(
            &name,
            &format!("a global table ({}): writes of several regions overwrite each other", described.replicas.join(", ")),
            Next::Do("tf only reports a lock in this table, because a delete can remove the lock of a run in another region\nif \
             every run uses the same region, set TFW_RELEASE=auto"),
        ),
        Ok(_) => findings.ok(&name, "its key is LockID"),
        Err(failure) if failure.denied().is_some() => {
            findings.note(&name, "permission denied: dynamodb:DescribeTable; a release does not need this permission", Next::Nothing);
        }
        Err(failure) => {
            findings.wrong(&name, &Trouble::failed(failure, &format!("table {table}"), stores).to_string(), Next::Nothing);
        }
    }
}

fn permission(findings: &mut Findings, action: &str, what: &str, answer: &Result<(), Failure>, stores: &Stores) {
    match answer {
        Ok(()) => findings.ok(action, "permitted"),
        Err(failure) if failure.denied().is_some() => findings.wrong(
            action,
            &visible(&failure.to_string()),
            Next::Do(&format!("allow these credentials {action} on {}", visible(what))),
        ),
        Err(failure) => {
            findings.wrong(
                action,
                &Trouble::failed(failure.clone(), &visible(what), stores).to_string(),
                Next::Nothing,
            );
        }
    }
}

fn conditional_delete(findings: &mut Findings, bucket: &str, if_match: IfMatch) {
    match if_match {
        IfMatch::Obeyed => findings.ok("If-Match", "conditional deletes are obeyed"),
        IfMatch::Ignored => findings.wrong(
            "If-Match",
            &format!("the service of {} ignores it, so a delete removes any lock that is there", visible(bucket)),
            Next::Do("also lock with a DynamoDB table, or set TFW_RELEASE=never so that tf only reports locks"),
        ),
        IfMatch::Unknown => {
            findings.note("If-Match", "could not find out whether conditional deletes are obeyed", Next::Nothing);
        }
    }
}

fn renewals(findings: &mut Findings, bucket: &str, if_match: IfMatch) {
    let why = match if_match {
        IfMatch::Obeyed => return findings.ok("lease", "conditional writes are obeyed"),
        IfMatch::Ignored => "ignores If-Match on a put, so that a renewal could bring a released lock back",
        IfMatch::Unknown => "could not be asked whether it obeys If-Match on a put",
    };
    findings.note(
        "lease",
        &format!("the service of {} {why}: locks there get no lease", visible(bucket)),
        Next::Do("to use leases, also lock with a DynamoDB table"),
    );
}

fn conditional_put(findings: &mut Findings, bucket: &str, if_none_match: IfNoneMatch) {
    match if_none_match {
        IfNoneMatch::Obeyed => findings.ok("If-None-Match", "a second lock is refused"),
        IfNoneMatch::Ignored => findings.wrong(
            "If-None-Match",
            &format!(
                "the service of {} ignores it, so use_lockfile does not lock there, and two runs can write the state at the same time",
                visible(bucket)
            ),
            Next::Do("lock with a DynamoDB table: set dynamodb_table in the backend block"),
        ),
        IfNoneMatch::Unsupported => findings.wrong(
            "If-None-Match",
            &format!("the service of {} does not support it, so use_lockfile cannot lock there", visible(bucket)),
            Next::Do("lock with a DynamoDB table: set dynamodb_table in the backend block"),
        ),
        IfNoneMatch::Unknown(failure) => findings.note(
            "If-None-Match",
            &format!("could not test whether a second lock is refused: {}", visible(&failure.to_string())),
            Next::Nothing,
        ),
        IfNoneMatch::Untried => findings.note(
            "If-None-Match",
            "did not test whether a second lock is refused, because the test object could not be deleted again",
            Next::Nothing,
        ),
    }
}

async fn versions(findings: &mut Findings, stores: &Stores, bucket: &str) {
    match probe::keeps_versions(&stores.s3, bucket).await {
        Ok(true) => findings.note(
            "versioning",
            "on: each lock leaves an old version and a delete marker, which are billed",
            Next::Do("a lifecycle rule that expires old versions removes them; keep old versions of the state itself for some time"),
        ),
        Ok(false) => findings.note(
            "versioning",
            "off, so a lost state cannot be restored",
            Next::Do(&format!(
                "to turn it on, type: aws s3api put-bucket-versioning --bucket {} --versioning-configuration Status=Enabled",
                quoted(bucket)
            )),
        ),
        Err(failure) => findings.note("versioning", &format!("could not read the setting: {}", visible(&failure.to_string())), Next::Nothing),
    }
}

/// Compares this host's clock with the service's; `service` is `None` if no answer had a time. A signed request is
/// refused if the clock is 5 min off (DynamoDB) or 15 min off (S3, RequestTimeTooSkewed).
fn skew(findings: &mut Findings, service: Option<Timestamp>) {
    let Some(service) = service else {
        return findings.note("clock", "the service did not send its time", Next::Nothing);
    };
    let apart = Timestamp::now().duration_since(service).unsigned_abs();
    let text = format!("it differs from the service's clock by {}", length_of_time(apart));
    if is_wrong_clock(apart) {
        findings.wrong(
            "clock",
            &text,
            Next::Do("set this host's clock: the ages of locks are wrong, and a service refuses requests if the clock is wrong by 5 min or more"),
        );
    } else {
        findings.ok("clock", &text);
    }
}

/// Whether a clock that differs by `apart` from that of a service must be set.
fn is_wrong_clock(apart: Duration) -> bool {
    apart.as_secs() > 60
}

async fn digests(findings: &mut Findings, directory: &Directory, stores: &Stores) {
    let states = match inventory::states(directory, stores, &inventory::NO_OTHERS).await {
        Ok((states, incomplete)) => {
            if let Some(why) = incomplete {
                let lines: Vec<String> = why.lines().map(visible).collect();
                findings.note("workspaces", &lines.join("\n"), Next::Nothing);
            }
            states
        }
        Err(trouble) => return findings.wrong("workspaces", &trouble.to_string(), Next::Nothing),
    };
    for state in states {
        let Some(table) = &state.table else { continue };
        let name = format!("digest of {}", visible(&state.workspace));
        match digest::compare(stores, ObjectKey { bucket: &state.bucket, key: &state.key }, table).await {
            Ok(compared) if compared.fits() => findings.ok(&name, "it matches the state"),
            Ok(compared) => {
                // The two digests also differ after a run has written the state and before it has written the digest.
                let locked = stores.read(&stores.item(table, state.path())).await.is_ok_and(|lock| lock.is_some());
                let text = format!(
                    "the recorded digest is {}, but the digest of the state is {}",
                    visible(compared.recorded.as_deref().unwrap_or("none")),
                    compared.computed.as_deref().unwrap_or("none, because there is no state")
                );
                if locked {
                    findings.note(
                        &name,
                        &format!("{text}; the state is locked, so a run may be writing it"),
                        Next::Nothing,
                    );
                } else {
                    let words = format!("doctor{}", console::option("--fix-digest", &visible_whole(&state.workspace)));
                    let command = in_directories(directory, |there| there.locks(&words));
                    findings.wrong(&name, &text, Next::Do(&format!("to fix it, type: {command}")));
                }
            }
            Err(failure) => findings.wrong(&name, &visible(&failure.to_string()), Next::Nothing),
        }
    }
}

/// Returns the directory's path for a command line, or `None` if `tf` was started in that directory.
fn other(directory: &Directory) -> Option<String> {
    (directory.asked_from != directory.path).then(|| directory.path.to_string_lossy().into_owned())
}

/// Calls `command` with the directories and the workspace that a command for `directory` names, and returns its result.
fn in_directories(directory: &Directory, command: impl FnOnce(CommandDirectories<'_>) -> String) -> String {
    let (chdir, data, workspace) = (other(directory), DataDirectory::named_here(), std::env::var("TF_WORKSPACE").ok());
    command(CommandDirectories { chdir: chdir.as_deref(), data: data.as_deref(), workspace: workspace.as_deref() })
}

fn errored_state(findings: &mut Findings, directory: &Directory) {
    if !directory.path.join("errored.tfstate").exists() {
        return findings.ok("errored.tfstate", "none");
    }
    findings.wrong(
        "errored.tfstate",
        &format!("it exists: {}", errored_state::ERRORED_STATE),
        Next::Do(&in_directories(directory, |there| errored_state::push_errored_state(&binary::name_to_type(), there))),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_changes_nothing_even_with_yes() {
        for (dry_run, yes, expected) in [
            (false, false, Change::IfAgreed),
            (false, true, Change::Unasked),
            (true, false, Change::None),
            (true, true, Change::None),
        ] {
            let doctor = Doctor { chdir: None, fix_digest: Some(None), yes, dry_run };
            assert_eq!(doctor.change(), expected, "{dry_run} {yes}");
        }
    }

    #[test]
    fn a_clock_is_wrong_long_before_a_service_refuses_its_requests() {
        assert!(!is_wrong_clock(Duration::ZERO) && !is_wrong_clock(Duration::from_mins(1)));
        assert!(is_wrong_clock(Duration::from_secs(61)) && is_wrong_clock(Duration::from_mins(5)));
    }

    #[test]
    fn only_a_directory_whose_configuration_names_no_other_backend_has_a_local_state() {
        for (configuration, expected) in [
            (None, false),
            (Some(""), true),
            (Some("terraform {}"), true),
            (Some("terraform {\n  backend \"local\" {}\n}"), true),
            (Some("terraform {\n  backend \"s3\" {}\n}"), false),
            (Some("terraform {\n  cloud {\n    organization = \"o\"\n  }\n}"), false),
        ] {
            let directory = tempfile::tempdir().unwrap();
            if let Some(text) = configuration {
                std::fs::write(directory.path().join("main.tf"), text).unwrap();
            }
            let place = LocationArgs::directory_of(Some(directory.path().to_owned()));
            assert_eq!(is_local(&place), expected, "{configuration:?}");
        }
    }
}

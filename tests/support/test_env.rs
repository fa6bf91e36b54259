//! A working directory with its own backend in the loopback cloud, and commands that run in it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::clean::{place, with_defaults};
use super::cloud::cloud;
use super::process::Run;
use super::wait_for;

/// How the state is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    DynamoDb,
    File,
    Both,
}

impl Lock {
    pub const ALL: [Self; 3] = [Self::DynamoDb, Self::File, Self::Both];
}

/// The program under test: terraform alone, or `tf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    Bare,
    Tf,
}

impl Subject {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bare => "terraform",
            Self::Tf => "tf",
        }
    }
}

pub struct TestEnv {
    pub directory: PathBuf,
    pub bucket: String,
    pub table: String,
    pub lock: Lock,
    /// Additional environment variables for every process that is started here.
    pub environment: Vec<(OsString, OsString)>,
    _temporary: tempfile::TempDir,
}

/// The arguments of an apply that asks nothing and prints no colors.
pub const APPLY: [&str; 3] = ["apply", "-auto-approve", "-no-color"];

/// Returns the path of the real terraform: the program that `TF_TEST_TERRAFORM` names, or else the first one on PATH. A
/// terraform that is only a wrapper, such as a script of a version manager or `tf` under that name, is skipped.
pub fn terraform() -> PathBuf {
    static TERRAFORM: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        let named = std::env::var_os("TF_TEST_TERRAFORM").map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).map(|directory| directory.join("terraform")).collect::<Vec<_>>();
        named.into_iter().chain(on_path).find(|path| is_itself(path)).expect(
            "no terraform on PATH that is the program itself: the tests run the real one; name it by TF_TEST_TERRAFORM, see \
             README.md, Building and testing",
        )
    };
    TERRAFORM.get_or_init(find).clone()
}

/// Whether a file is an executable for this kind of machine, and not `tf`.
fn is_itself(path: &Path) -> bool {
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;
    let mut magic = [0; 4];
    let is_program = fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok();
    let same = |one: &fs::Metadata, other: &fs::Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
    let ours = fs::metadata(env!("CARGO_BIN_EXE_tf")).unwrap();
    let is_ours = fs::metadata(path).is_ok_and(|file| same(&file, &ours));
    is_program && (magic == *b"\x7fELF" || magic == 0xfeed_facf_u32.to_le_bytes()) && !is_ours
}

pub fn which(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// A command for a provisioner. It creates the file `began`, and waits until the test creates `go`. It ignores an
/// interrupt that its process group gets. Otherwise terraform might exit because of its death, before it logs the
/// interrupt.
pub const WAITS: &str = "trap '' INT; touch began; while test -e began && ! test -e go; do sleep 0.02; done";

/// A library that gives a program another time of day, or a clock of another speed: faketime(1).
pub const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// The variable that makes a debug build of `tf` count this host as one on which a dead process can be proved dead.
pub const TEST_HOST: &str = "TFW_TEST_HOST";

/// The value of a variable that is removed from the environment.
pub const UNSET: &str = "(unset)";

impl TestEnv {
    /// Returns an initialized directory with one resource, whose provisioner runs `command`.
    pub fn new(lock: Lock, command: &str) -> Self {
        let env = Self::empty(lock);
        env.write_main("", command);
        env.init();
        env
    }

    /// Returns an empty directory that is not initialized.
    pub fn empty(lock: Lock) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let temporary = tempfile::Builder::new()
            .prefix("tf-test-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(place())
            .unwrap();
        let directory = temporary.path().canonicalize().unwrap();
        let bin = directory.join("bin");
        fs::create_dir(&bin).unwrap();
        symlink(env!("CARGO_BIN_EXE_tf"), bin.join("tf")).unwrap();
        symlink(terraform(), bin.join("terraform")).unwrap();
        fs::create_dir(directory.join("home")).unwrap();
        let pid = std::process::id();
        let env = Self {
            directory: directory.join("work"),
            bucket: format!("bucket-{pid}-{number}"),
            table: format!("locks-{pid}-{number}"),
            lock,
            environment: Vec::new(),
            _temporary: temporary,
        };
        fs::create_dir(&env.directory).unwrap();
        assert_eq!(cloud().s3("PUT", &env.bucket, b"").status(), 200);
        if lock != Lock::File {
            cloud().create_table(&env.table);
        }
        env
    }

    /// Returns the lines of the backend block.
    pub fn backend(&self, key: &str) -> String {
        let mut lines =
            format!("bucket = \"{}\"\nkey = \"{key}\"\nregion = \"us-east-1\"\nuse_path_style = true\n", self.bucket);
        if self.lock != Lock::File {
            lines.extend(["dynamodb_table = \"", &self.table, "\"\n"]);
        }
        if self.lock != Lock::DynamoDb {
            lines += "use_lockfile = true\n";
        }
        lines
    }

    pub fn write_main(&self, more: &str, command: &str) {
        let command = serde_json::to_string(command).unwrap().replace("${", "$${");
        let text = format!(
            "terraform {{\nbackend \"s3\" {{\n{}}}\n}}\n{more}\nresource \"terraform_data\" \"a\" {{\n\
             provisioner \"local-exec\" {{\ncommand = {command}\n}}\n}}\n",
            self.backend("dir/prod.tfstate")
        );
        self.write("main.tf", &text);
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.join(name), text).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.join(name)).unwrap_or_default()
    }

    pub fn exists(&self, name: &str) -> bool {
        self.directory.join(name).exists()
    }

    #[track_caller]
    pub fn wait_for_file(&self, name: &str) {
        wait_for(name, || self.exists(name).then_some(()), || self.trace());
    }

    /// Lets a provisioner that runs [`WAITS`] continue.
    pub fn unblock(&self) {
        self.write("go", "");
    }

    #[track_caller]
    pub fn init(&self) {
        let end = self.run(Subject::Bare, &["init", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{}{}", end.out, end.err);
    }

    pub fn bin(&self) -> PathBuf {
        self.directory.parent().unwrap().join("bin")
    }

    /// Returns the environment of every process here. It has only PATH from the tests' caller.
    pub fn environment(&self) -> Vec<(OsString, OsString)> {
        let cloud = cloud();
        let mut path = self.bin().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        let home = self.directory.parent().unwrap().join("home");
        let trace = self.directory.join("trace");
        let mut all: Vec<(OsString, OsString)> = vec![
            ("PATH".into(), path),
            ("HOME".into(), home.into()),
            ("TFW_LOG".into(), trace.into()),
            ("TERM".into(), "xterm".into()),
            ("CHECKPOINT_DISABLE".into(), "1".into()),
            ("AWS_ACCESS_KEY_ID".into(), "test".into()),
            ("AWS_SECRET_ACCESS_KEY".into(), "test".into()),
            ("AWS_EC2_METADATA_DISABLED".into(), "true".into()),
            // The result must not depend on this machine's name, or on whether it is a container
            // (src/sys/plain_host.rs).
            (TEST_HOST.into(), "0123456789abcdef0123456789abcdef".into()),
            ("AWS_ENDPOINT_URL".into(), format!("http://127.0.0.1:{}", cloud.port).into()),
        ];
        // `make leased` runs all tests with a lease.
        if let Some(length) = std::env::var_os("TF_TEST_LEASE") {
            all.extend([("TFW_LEASE".into(), length), ("TFW_CLOCK".into(), "steady".into())]);
        }
        for (name, value) in &self.environment {
            all.retain(|(known, _)| known != name);
            if value != UNSET {
                all.push((name.clone(), value.clone()));
            }
        }
        all
    }

    pub fn set(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Returns a command in this directory and environment. It ignores no signals: a background job of a script, or a
    /// process under nohup, would ignore signals that the tests send.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.current_dir(&self.directory).env_clear().envs(self.environment());
        with_defaults(&mut command);
        command
    }

    /// Starts terraform or `tf` with pipes, in its own session.
    pub fn start(&self, subject: Subject, arguments: &[&str]) -> Run {
        let mut command = self.command(self.bin().join(subject.name()));
        command.args(arguments);
        Run::start(command)
    }

    /// Runs terraform or `tf` until it exits.
    pub fn run(&self, subject: Subject, arguments: &[&str]) -> super::Ended {
        self.start(subject, arguments).wait()
    }

    /// Runs a command line in a shell.
    pub fn run_in_shell(&self, line: &str) -> super::Ended {
        let mut shell = self.command("sh");
        shell.args(["-c", line]);
        Run::start(shell).wait()
    }

    /// Starts an apply whose provisioner runs [`WAITS`], and waits until the provisioner has begun.
    #[track_caller]
    pub fn start_apply(&self, subject: Subject) -> Run {
        let run = self.start(subject, &["apply", "-auto-approve", "-no-color"]);
        self.wait_for_began(&run);
        run
    }

    #[track_caller]
    pub fn wait_for_began(&self, run: &Run) {
        wait_for(
            "the provisioner",
            || self.exists("began").then_some(()),
            || format!("{}{}{}", run.out(), run.err(), self.trace()),
        );
    }

    /// If runs have a lease here, waits until the first renewal of one was confirmed, and until the keeper has done
    /// with the lock's other part, if there is one. Otherwise returns at once.
    #[track_caller]
    pub fn wait_for_lease(&self) {
        let is_leased = |(name, value): &(OsString, OsString)| name == "TFW_LEASE" && value != "off";
        if self.environment().iter().any(is_leased) {
            self.wait_for_trace("keeper: Renewed");
            if self.lock == Lock::Both {
                self.wait_for_trace("keeper: the lock's object ");
            }
        }
    }

    pub fn trace(&self) -> String {
        self.read("trace")
    }

    #[track_caller]
    pub fn wait_for_trace(&self, text: &str) {
        wait_for(text, || self.trace().contains(text).then_some(()), || self.trace());
    }

    /// Returns everything about a run that a failed assertion should show.
    pub fn dump(&self, end: &super::Ended) -> String {
        format!("{:?}\n-- stdout\n{}\n-- stderr\n{}\n-- trace\n{}", end.status, end.out, end.err, self.trace())
    }

    /// Replaces terraform by a program that records each signal that it gets, and exits when the test creates `go`. The
    /// test can count the signals with it; terraform itself reports only its first two interrupts.
    pub fn count_signals(&mut self) -> &mut Self {
        let script = format!(
            r#"#!{}
import os, signal, time
def seen(number, frame):
    with open("seen", "a") as file:
        file.write(signal.Signals(number).name + "\n")
for name in ("SIGINT", "SIGTERM", "SIGQUIT", "SIGABRT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT"):
    signal.signal(getattr(signal, name), seen)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signal.signal(signal.SIGHUP, seen)
open("began", "w").close()
while not os.path.exists("go"):
    time.sleep(0.005)
"#,
            super::cloud::tool("python3").display()
        );
        self.stand_in("counts-signals", &script)
    }

    /// Replaces terraform by `program`, which is written to this directory under `name`.
    pub fn stand_in(&mut self, name: &str, program: &str) -> &mut Self {
        self.write(name, program);
        let path = self.directory.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self.set("TFW_TERRAFORM", path)
    }

    /// Returns the signals that the program of [`TestEnv::count_signals`] got, in order.
    pub fn received_signals(&self) -> Vec<String> {
        self.read("seen").lines().map(ToOwned::to_owned).collect()
    }

    pub fn path(&self) -> String {
        format!("{}/dir/prod.tfstate", self.bucket)
    }

    /// Returns the parts of the lock that exist, as JSON.
    pub fn locks(&self) -> Vec<String> {
        self.locks_at("dir/prod.tfstate")
    }

    pub fn locks_at(&self, key: &str) -> Vec<String> {
        let item =
            (self.lock != Lock::File).then(|| cloud().item(&self.table, &format!("{}/{key}", self.bucket))).flatten();
        let object = cloud().object(&format!("{}/{key}.tflock", self.bucket));
        item.into_iter().chain(object).collect()
    }

    #[track_caller]
    pub fn assert_locked(&self) {
        let halves = if self.lock == Lock::Both { 2 } else { 1 };
        assert_eq!(self.locks().len(), halves, "{:?}\n{}", self.locks(), self.trace());
    }

    #[track_caller]
    pub fn wait_for_locked(&self) {
        let halves = if self.lock == Lock::Both { 2 } else { 1 };
        wait_for("the lock", || (self.locks().len() == halves).then_some(()), || self.trace());
    }

    #[track_caller]
    pub fn assert_unlocked(&self) {
        assert!(self.locks().is_empty(), "left: {:?}\n{}", self.locks(), self.trace());
    }

    /// Creates another run's lock at the location of this directory's lock.
    pub fn lock_of_another(&self) -> String {
        let info = lock_json("11111111-2222-3333-4444-555555555555", &self.path());
        self.put_lock(&info);
        info
    }

    pub fn put_lock(&self, info: &str) {
        if self.lock != Lock::File {
            cloud().put_item(&self.table, &self.path(), info);
        }
        if self.lock != Lock::DynamoDb {
            cloud().s3("PUT", &format!("{}.tflock", self.path()), info.as_bytes());
        }
    }

    pub fn delete_lock(&self) {
        if self.lock != Lock::File {
            cloud().delete_item(&self.table, &self.path());
        }
        cloud().s3("DELETE", &format!("{}.tflock", self.path()), b"");
    }

    /// Deletes the state and its digest.
    pub fn forget_state(&self) {
        cloud().s3("DELETE", &self.path(), b"");
        if self.lock != Lock::File {
            cloud().delete_item(&self.table, &format!("{}-md5", self.path()));
        }
    }

    /// Returns the state as text. `None` if there is none.
    pub fn state(&self) -> Option<String> {
        cloud().object(&self.path())
    }
}

/// Returns `user@host` of this machine, as terraform writes it. A user ID that is not in /etc/passwd has no name,
/// because nothing here sets USER.
pub fn who() -> String {
    let uid = nix::unistd::getuid().to_string();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2) == Some(&uid.as_str())).then(|| fields[0].to_owned())
    });
    format!("{}@{}", user.unwrap_or_default(), nix::unistd::gethostname().unwrap().to_string_lossy())
}

/// Returns a lock of this user on this host, created now.
pub fn lock_json(id: &str, path: &str) -> String {
    serde_json::json!({
        "ID": id, "Operation": "OperationTypeApply", "Info": "", "Who": who(), "Version": "1.11.4",
        "Created": jiff::Timestamp::now().to_string(), "Path": path,
    })
    .to_string()
}

/// Returns the ID in a lock's JSON.
pub fn id_of(json: &str) -> String {
    serde_json::from_str::<serde_json::Value>(json).unwrap()["ID"].as_str().unwrap().to_owned()
}

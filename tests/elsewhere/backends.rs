//! Backends other than S3, each with a real terraform that is killed: which locks are released, which are only
//! reported, and which end on their own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::support::authority::Authority;
use crate::support::cloud::{Server, free_port, keep, tool};
use crate::support::http::{self, Message};
use crate::support::process::terraform_below;
use crate::support::processes::{KillOnDrop, guardian_of, home, kill_all, tf_of, wait_until_gone};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{WAITS, who};
use crate::support::{Ended, Lock, Run, Subject, TestEnv, wait_for};
use crate::versions::program;

/// Writes a configuration with another backend, and with a provisioner that runs `command`.
fn write_main(env: &TestEnv, backend: &str, command: &str) {
    let command = serde_json::to_string(command).unwrap();
    env.write(
        "main.tf",
        &format!(
            "terraform {{\n  {backend}\n}}\nresource \"terraform_data\" \"a\" {{\n  provisioner \"local-exec\" {{\n    command = {command}\n  }}\n}}\n"
        ),
    );
}

#[track_caller]
fn init(env: &TestEnv) {
    let end = env.run(Subject::Tf, &["init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
}

#[track_caller]
fn apply_again(env: &TestEnv) -> Ended {
    env.unblock();
    let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    end
}

#[track_caller]
fn start_bare(env: &TestEnv) -> Run {
    let run = env.start(Subject::Bare, &["apply", "-auto-approve", "-no-color"]);
    env.wait_for_began(&run);
    run
}

/// Google Cloud Storage: a real implementation of its protocol behind Google's own host name. The implementation
/// deletes an object whatever generation the request names. The proxy in front compares the generation, as Google does.
struct Storage {
    port: u16,
    /// The requests that deleted a lock, by their first lines.
    deletes: Arc<Mutex<Vec<String>>>,
    /// Which of them is held: 1 is the first. 0 holds none.
    held: Arc<AtomicUsize>,
    front: Proxy,
    authority: Arc<Authority>,
    _server: Server,
}

const LOCK: &str = "env%2Fprod%2Fdefault.tflock";

impl Storage {
    fn start() -> Self {
        let port = free_port();
        let binary = program("fake-gcs-server");
        let (own, url) = (port.to_string(), format!("http://127.0.0.1:{port}"));
        let command = [
            binary.to_str().unwrap(),
            "-scheme",
            "http",
            "-host",
            "127.0.0.1",
            "-port",
            &own,
            "-backend",
            "memory",
            "-public-host",
            "storage.googleapis.com",
            "-external-url",
            &url,
        ];
        let server = keep(&command, &[]);
        wait_for(
            "the storage",
            || http::ask(port, "GET", "/storage/v1/b?project=t", &[], b""),
            || format!("port {port}"),
        );
        let json = [("Content-Type", "application/json")];
        http::ask(port, "POST", "/storage/v1/b?project=t", &json, b"{\"name\":\"tfb\"}").unwrap();
        let (authority, deletes) = (Authority::new(), Arc::new(Mutex::new(Vec::new())));
        let (for_front, seen) = (Arc::clone(&authority), Arc::clone(&deletes));
        let held = Arc::new(AtomicUsize::new(0));
        let which = Arc::clone(&held);
        let front = Proxy::start(port, move |request| {
            if request.start.starts_with("CONNECT ") {
                return ProxyAction::Tunnel(Arc::clone(&for_front));
            }
            if !request.start.starts_with("DELETE ") || !request.start.contains(".tflock") {
                return ProxyAction::Pass;
            }
            let mut seen = seen.lock().unwrap();
            seen.push(request.start.clone());
            if seen.len() == which.load(Ordering::SeqCst) {
                return ProxyAction::Hold;
            }
            let wanted =
                request.start.split("ifGenerationMatch=").nth(1).and_then(|rest| rest.split(['&', ' ']).next());
            let standing = generation(port);
            if wanted.is_some_and(|wanted| standing.as_deref() != Some(wanted)) {
                return ProxyAction::Answer(Message::answer("412 Precondition Failed", "{\"error\":{\"code\":412}}"));
            }
            ProxyAction::Pass
        });
        Self { port, deletes, held, front, authority, _server: server }
    }

    /// Returns an initialized directory with this backend.
    fn test_env(&self, command: &str) -> TestEnv {
        let mut env = TestEnv::empty(Lock::File);
        let above = env.directory.parent().unwrap().to_owned();
        std::fs::write(above.join("ca.pem"), &self.authority.pem).unwrap();
        env.set("HTTPS_PROXY", format!("http://127.0.0.1:{}", self.front.port));
        env.set("SSL_CERT_FILE", above.join("ca.pem")).set("GOOGLE_OAUTH_ACCESS_TOKEN", "fake");
        write_main(&env, "backend \"gcs\" {\n    bucket = \"tfb\"\n    prefix = \"env/prod\"\n  }", command);
        init(&env);
        env
    }

    fn is_locked(&self) -> bool {
        generation(self.port).is_some()
    }

    /// Replaces the lock by another run's lock. Returns its generation.
    fn put_lock(&self, created: &str) -> String {
        http::ask(self.port, "DELETE", &format!("/storage/v1/b/tfb/o/{LOCK}"), &[], b"");
        let info = json!({"ID": "22222222-3333-4444-5555-666666666666", "Operation": "OperationTypeApply", "Info": "", "Who": who(),
                          "Version": "1.11.4", "Created": created, "Path": "gs://tfb/env/prod/default.tflock"});
        let path = "/upload/storage/v1/b/tfb/o?uploadType=media&name=env/prod/default.tflock";
        http::ask(self.port, "POST", path, &[("Content-Type", "application/json")], info.to_string().as_bytes())
            .unwrap();
        generation(self.port).unwrap()
    }
}

/// Returns the generation of the lock's object. `None` if there is none.
fn generation(port: u16) -> Option<String> {
    let answer = http::ask(port, "GET", &format!("/storage/v1/b/tfb/o/{LOCK}"), &[], b"")?;
    let object: Value = serde_json::from_slice(&answer.body).ok()?;
    object["generation"].as_str().map(ToOwned::to_owned)
}

#[test]
fn gcs_a_killed_terraform_leaves_its_lock_and_under_tf_none() {
    let storage = Storage::start();
    let env = storage.test_env(WAITS);
    let run = start_bare(&env);
    kill(run.pid(), Signal::SIGKILL).unwrap();
    env.unblock();
    run.wait();
    assert!(storage.is_locked(), "bare leaves it");

    for name in ["terraform", "tofu-1.6.2"] {
        let storage = Storage::start();
        let mut env = storage.test_env(WAITS);
        if name != "terraform" {
            env.set("TFW_TERRAFORM", program(name));
        }
        init(&env);
        let run = env.start_apply(Subject::Tf);
        assert!(storage.is_locked());
        let own = generation(storage.port).unwrap();
        let terraform = crate::versions::terraform_of(&run);
        kill(terraform, Signal::SIGKILL).unwrap();
        let end = run.wait();
        assert!(end.err.contains("released the lock") && end.err.contains(&own), "{name}: {}", env.dump(&end));
        assert!(!storage.is_locked(), "{name}: {}", env.dump(&end));
        let deletes = storage.deletes.lock().unwrap().clone();
        assert!(deletes.iter().any(|delete| delete.contains(&format!("ifGenerationMatch={own}"))), "{deletes:?}");
        apply_again(&env);
    }
}

#[test]
fn gcs_anothers_lock_stands_whenever_it_came() {
    let storage = Storage::start();
    let env = storage.test_env("(trap '' TERM; touch began; while test -e began && ! test -e go; do sleep 0.02; done)");
    // The lock is replaced before `tf` looks for it. The new lock is created a moment later than the run's own.
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    env.wait_for_trace("ending ");
    let theirs = storage.put_lock(&jiff::Timestamp::now().to_string());
    env.unblock();
    let end = run.wait();
    assert_eq!(generation(storage.port).as_ref(), Some(&theirs), "{}", env.dump(&end));
    assert!(end.err.contains(&theirs) && !end.err.contains("released the lock"), "{}", env.dump(&end));
    http::ask(storage.port, "DELETE", &format!("/storage/v1/b/tfb/o/{LOCK}"), &[], b"");

    // The lock is replaced after `tf` has looked at it and before it deletes it.
    let _ = std::fs::remove_file(env.directory.join("began"));
    let _ = std::fs::remove_file(env.directory.join("go"));
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    env.unblock();
    run.wait_for_err("waiting 10 s before releasing the lock");
    let theirs = storage.put_lock(&jiff::Timestamp::now().to_string());
    let end = run.wait();
    assert_eq!(generation(storage.port).as_ref(), Some(&theirs), "{}", env.dump(&end));
}

#[test]
fn gcs_when_tf_is_killed_the_guardian_or_the_next_tf_gives_it_back() {
    for everything in [false, true] {
        let storage = Storage::start();
        let env = storage.test_env(WAITS);
        let _kill_on_drop = KillOnDrop(home(&env));
        let run = env.start_apply(Subject::Tf);
        let (tf, terraform) = (tf_of(&env), terraform_below(run.pid()));
        let guardian = guardian_of(&env, tf);
        if everything {
            wait_for(
                "the journal",
                || (env.trace().matches("guardian: journal written: true").count() > 0).then_some(()),
                || env.trace(),
            );
            kill_all(&env);
            run.wait();
            assert!(storage.is_locked());
            let end = env.run(Subject::Tf, &["locks", "recover"]);
            assert!(end.out.contains("released the lock"), "{}", env.dump(&end));
        } else {
            kill(tf, Signal::SIGKILL).unwrap();
            kill(terraform, Signal::SIGKILL).unwrap();
            run.wait();
            wait_until_gone(&env, guardian);
        }
        assert!(!storage.is_locked(), "{everything}: {}", env.trace());
        apply_again(&env);
    }
}

/// A terraform reads the lock for `tf`, and holds the lock itself for a moment. If `tf` does not wait for it, or exits,
/// that lock must not be left.
#[test]
fn gcs_a_question_that_nobody_waits_for_leaves_no_lock_of_its_own() {
    for closed in [false, true] {
        let storage = Storage::start();
        let env = storage.test_env(WAITS);
        let run = env.start_apply(Subject::Tf);
        // The first delete belongs to the release, the second to the reading terraform.
        storage.held.store(2, Ordering::SeqCst);
        run.kill_terraform();
        storage.front.wait_until_held();
        assert!(storage.is_locked());
        if closed {
            run.send_to_group(Signal::SIGKILL);
        } else {
            // Two pending signals at once count as one for the kernel.
            run.send(Signal::SIGINT);
            env.wait_for_trace("an interrupt while terraform is asked");
            run.send(Signal::SIGINT);
        }
        run.wait();
        storage.front.let_go();
        wait_for("the end of the question", || (!storage.is_locked()).then_some(()), || env.trace());
    }
}

#[test]
fn gcs_a_run_that_ends_by_itself_is_left_alone_and_so_is_a_service_that_is_not_googles() {
    let storage = Storage::start();
    let mut env = storage.test_env(WAITS);
    let run = env.start_apply(Subject::Tf);
    run.send(Signal::SIGINT);
    run.wait_for_out("Interrupt received");
    env.unblock();
    let end = run.wait();
    assert!(end.code() == Some(1) && !end.err.contains("tf: "), "{}", env.dump(&end));
    assert!(!storage.is_locked());

    let _ = std::fs::remove_file(env.directory.join("began"));
    let _ = std::fs::remove_file(env.directory.join("go"));
    env.set("GOOGLE_BACKEND_STORAGE_CUSTOM_ENDPOINT", format!("http://127.0.0.1:{}/storage/v1/b", storage.port));
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(
        end.err.contains("was not released") && end.err.contains("bucket tfb, prefix env/prod"),
        "{}",
        env.dump(&end)
    );
    assert!(storage.is_locked());
}

/// Azure Blob Storage: Microsoft's own emulator behind Azure's host name.
struct Blobs {
    port: u16,
    signature: String,
    front: Proxy,
    authority: Arc<Authority>,
    _server: Server,
}

impl Blobs {
    fn start() -> Self {
        let port = free_port();
        let own = port.to_string();
        let program = program("azurite-blob");
        let command = [
            program.to_str().unwrap(),
            "--silent",
            "--skipApiVersionCheck",
            "--disableTelemetry",
            "--inMemoryPersistence",
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            &own,
        ];
        let server = keep(&command, &[]);
        wait_for("the blobs", || http::ask(port, "GET", "/", &[], b""), || format!("port {port}"));
        // A signature for the emulator's only account, whose key is in its manual.
        let script = "import base64, hashlib, hmac, urllib.parse\n\
            key = base64.b64decode('Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==')\n\
            p = dict(sv='2021-06-08', ss='b', srt='sco', sp='rwdlacupx', st='2020-01-01T00:00:00Z', se='2099-01-01T00:00:00Z', spr='https,http')\n\
            text = '\\n'.join(['devstoreaccount1', p['sp'], p['ss'], p['srt'], p['st'], p['se'], '', p['spr'], p['sv'], '', ''])\n\
            p['sig'] = base64.b64encode(hmac.new(key, text.encode(), hashlib.sha256).digest()).decode()\n\
            print(urllib.parse.urlencode(p))\n";
        let output = Command::new(tool("python3")).args(["-c", script]).output().unwrap();
        let signature = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let authority = Authority::new();
        let for_front = Arc::clone(&authority);
        let front = Proxy::start(port, move |request| {
            if request.start.starts_with("CONNECT ") {
                ProxyAction::Tunnel(Arc::clone(&for_front))
            } else {
                ProxyAction::Pass
            }
        });
        let blobs = Self { port, signature, front, authority, _server: server };
        assert_eq!(blobs.ask("PUT", "tfc?restype=container&", &[]).status(), 201);
        blobs
    }

    fn ask(&self, method: &str, what: &str, headers: &[(&str, &str)]) -> Message {
        let path = format!("/devstoreaccount1/{what}{}", self.signature);
        http::ask(self.port, method, &path, headers, b"").unwrap()
    }

    fn is_locked(&self) -> bool {
        let answer = self.ask("HEAD", "tfc/prod.tfstate?", &[]);
        answer.header("x-ms-lease-state") == Some("leased")
    }

    fn test_env(&self, command: &str) -> TestEnv {
        let mut env = TestEnv::empty(Lock::File);
        let above = env.directory.parent().unwrap().to_owned();
        std::fs::write(above.join("ca.pem"), &self.authority.pem).unwrap();
        env.set("HTTPS_PROXY", format!("http://127.0.0.1:{}", self.front.port));
        env.set("SSL_CERT_FILE", above.join("ca.pem"));
        let backend = format!(
            "backend \"azurerm\" {{\n    storage_account_name = \"devstoreaccount1\"\n    container_name = \"tfc\"\n    key = \"prod.tfstate\"\n    sas_token = \"{}\"\n  }}",
            self.signature
        );
        write_main(&env, &backend, command);
        init(&env);
        env
    }
}

#[test]
fn azurerm_a_killed_terraform_leaves_its_lease_and_under_tf_none() {
    let blobs = Blobs::start();
    let env = blobs.test_env(WAITS);
    let run = start_bare(&env);
    kill(run.pid(), Signal::SIGKILL).unwrap();
    env.unblock();
    run.wait();
    assert!(blobs.is_locked(), "bare leaves it");

    let blobs = Blobs::start();
    let env = blobs.test_env(WAITS);
    let run = env.start_apply(Subject::Tf);
    assert!(blobs.is_locked());
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(!end.err.contains("sig=") && !env.trace().contains("sig="), "{}", env.dump(&end));
    assert!(!blobs.is_locked(), "{}", env.dump(&end));
    apply_again(&env);
}

#[test]
fn azurerm_anothers_lease_stands() {
    let blobs = Blobs::start();
    let env = blobs.test_env("(trap '' TERM; touch began; while test -e began && ! test -e go; do sleep 0.02; done)");
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    env.wait_for_trace("ending ");
    // A person breaks the lease, and another terraform acquires it.
    let broken = blobs.ask(
        "PUT",
        "tfc/prod.tfstate?comp=lease&",
        &[("x-ms-lease-action", "break"), ("x-ms-lease-break-period", "0")],
    );
    assert_eq!(broken.status(), 202, "{}", broken.text());
    let id = "22222222-3333-4444-5555-666666666666";
    let headers = [("x-ms-lease-action", "acquire"), ("x-ms-lease-duration", "-1"), ("x-ms-proposed-lease-id", id)];
    assert_eq!(blobs.ask("PUT", "tfc/prod.tfstate?comp=lease&", &headers).status(), 201);
    env.unblock();
    let end = run.wait();
    assert!(!end.err.contains("released the lock"), "{}", env.dump(&end));
    let still = [("x-ms-lease-action", "renew"), ("x-ms-lease-id", id)];
    assert_eq!(blobs.ask("PUT", "tfc/prod.tfstate?comp=lease&", &still).status(), 200, "{}", env.dump(&end));
}

/// A server for the `http` backend. It unlocks for any request, whatever its ID, as the protocol allows.
struct States {
    proxy: Proxy,
    held: Arc<Mutex<Option<String>>>,
}

impl States {
    fn start() -> Self {
        let held: Arc<Mutex<Option<String>>> = Arc::default();
        let states: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::default();
        let lock = Arc::clone(&held);
        let proxy = Proxy::start(0, move |request| {
            let (mut held, mut states) = (lock.lock().unwrap(), states.lock().unwrap());
            let method = request.start.split(' ').next().unwrap_or_default();
            let ok = || ProxyAction::Answer(Message::answer("200 OK", ""));
            match method {
                "LOCK" => {
                    if let Some(theirs) = held.as_ref() {
                        return ProxyAction::Answer(Message::answer("423 Locked", theirs));
                    }
                    *held = Some(request.text());
                    ok()
                }
                "UNLOCK" => {
                    *held = None;
                    ok()
                }
                "POST" => {
                    states.insert("state".into(), request.body.clone());
                    ok()
                }
                _ => match states.get("state") {
                    Some(state) => ProxyAction::Answer(Message::answer("200 OK", &String::from_utf8_lossy(state))),
                    None => ProxyAction::Answer(Message::answer("404 Not Found", "")),
                },
            }
        });
        Self { proxy, held }
    }

    fn test_env(&self, command: &str) -> TestEnv {
        let env = TestEnv::empty(Lock::File);
        let url = format!("http://127.0.0.1:{}/state", self.proxy.port);
        let backend = format!(
            "backend \"http\" {{\n    address = \"{url}?token=hunter2\"\n    lock_address = \"{url}\"\n    unlock_address = \"{url}\"\n  }}"
        );
        write_main(&env, &backend, command);
        init(&env);
        env
    }
}

#[test]
fn http_its_lock_is_named_and_never_unlocked_for_its_unlock_hits_anybody() {
    let states = States::start();
    let env = states.test_env(WAITS);
    let run = env.start_apply(Subject::Tf);
    let own = states.held.lock().unwrap().clone().unwrap();
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(states.held.lock().unwrap().as_ref(), Some(&own), "{}", env.dump(&end));
    assert!(end.err.contains("backend http") && end.err.contains("was not released"), "{}", env.dump(&end));
    assert!(end.err.contains(&format!("http://127.0.0.1:{}/state", states.proxy.port)), "{}", env.dump(&end));
    assert!(!end.err.contains("hunter2"), "{}", end.err);
    // The reason: terraform's own unlock takes the lock from any holder, with any ID.
    let end = env.run(Subject::Bare, &["force-unlock", "-force", "00000000-0000-0000-0000-000000000000"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(*states.held.lock().unwrap(), None);
    // A run that exits successfully leaves no lock and reports nothing.
    assert!(apply_again(&env).err.is_empty());
}

#[test]
fn http_a_lock_that_the_guardian_can_only_name_the_next_tf_names() {
    let states = States::start();
    let env = states.test_env(WAITS);
    let _kill_on_drop = KillOnDrop(home(&env));
    let run = env.start_apply(Subject::Tf);
    let (tf, terraform) = (tf_of(&env), terraform_below(run.pid()));
    let guardian = guardian_of(&env, tf);
    kill(tf, Signal::SIGKILL).unwrap();
    kill(terraform, Signal::SIGKILL).unwrap();
    run.wait();
    wait_until_gone(&env, guardian);
    for named in [true, false] {
        let end = env.run(Subject::Tf, &["locks", "recover"]);
        let said = end.out.clone() + &end.err;
        assert_eq!(said.contains("backend http") && said.contains("was not released"), named, "{}", env.dump(&end));
    }
    assert!(states.held.lock().unwrap().is_some());
}

#[test]
fn local_a_lock_ends_with_its_process_and_nothing_is_said() {
    let env = TestEnv::empty(Lock::File);
    write_main(&env, "backend \"local\" {}", WAITS);
    init(&env);
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(!end.err.contains("lock"), "{}", env.dump(&end));
    assert!(env.exists(".terraform.tfstate.lock.info"), "what stays is ignored");
    assert!(apply_again(&env).err.is_empty());
}

/// PostgreSQL. It refuses to run as root.
struct Postgres {
    port: u16,
    directory: tempfile::TempDir,
    bin: PathBuf,
}

impl Postgres {
    fn start() -> Self {
        let found = Command::new("sh")
            .args([
                "-c",
                "ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -1; dirname \"$(command -v initdb)\" 2>/dev/null",
            ])
            .output()
            .unwrap();
        let found = String::from_utf8(found.stdout).unwrap();
        let bin = found.lines().map(PathBuf::from).find(|bin| bin.join("initdb").exists());
        let bin = bin.expect("initdb is missing: apt install postgresql");
        let directory = tempfile::Builder::new().prefix("tf-test-pg-").tempdir().unwrap();
        let postgres = Self { port: free_port(), directory, bin };
        postgres.run("true");
        if nix::unistd::geteuid().is_root() {
            let owned = Command::new("chown").args(["postgres"]).arg(postgres.directory.path()).status().unwrap();
            assert!(owned.success());
        }
        let options = format!("-p {} -c listen_addresses=127.0.0.1 -c unix_socket_directories=DIR", postgres.port);
        postgres.run("BIN/initdb -D DIR/data -A trust -U postgres");
        postgres.run(&format!("BIN/pg_ctl -D DIR/data -w -l DIR/log -o '{options}' start"));
        postgres.run(&format!("BIN/createdb -h 127.0.0.1 -p {} -U postgres tf", postgres.port));
        postgres
    }

    #[track_caller]
    fn run(&self, command: &str) {
        let directory = self.directory.path().to_str().unwrap();
        let command = command.replace("BIN", self.bin.to_str().unwrap()).replace("DIR", directory);
        let mut shell = if nix::unistd::geteuid().is_root() {
            let mut shell = Command::new("su");
            shell.args(["postgres", "-s", "/bin/sh", "-c", &command]);
            shell
        } else {
            let mut shell = Command::new("sh");
            shell.args(["-c", &command]);
            shell
        };
        // The server must not inherit a pipe of the tests.
        let log = tempfile::NamedTempFile::new().unwrap();
        let out = || Stdio::from(log.reopen().unwrap());
        let status = shell.current_dir("/").stdin(Stdio::null()).stdout(out()).stderr(out()).status().unwrap();
        assert!(status.success(), "{command}: {}", std::fs::read_to_string(log.path()).unwrap());
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.run("BIN/pg_ctl -D DIR/data -m immediate stop");
        // The files belong to another user, so that user deletes them.
        self.run("rm -rf DIR/data");
    }
}

#[test]
fn pg_a_lock_ends_with_its_connection_and_nothing_is_said() {
    let postgres = Postgres::start();
    let env = TestEnv::empty(Lock::File);
    let url = format!("postgres://postgres:hunter2@127.0.0.1:{}/tf?sslmode=disable", postgres.port);
    write_main(&env, &format!("backend \"pg\" {{\n    conn_str = \"{url}\"\n  }}"), WAITS);
    init(&env);
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(!end.err.contains("lock") && !end.err.contains("hunter2"), "{}", env.dump(&end));
    assert!(apply_again(&env).err.is_empty());
    // The reason why nothing is done: its force-unlock reports success for any ID.
    let end = env.run(Subject::Bare, &["force-unlock", "-force", "00000000-0000-0000-0000-000000000000"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
}

#[test]
fn what_tf_locks_says_of_another_backend_is_what_the_table_says() {
    let states = States::start();
    let env = states.test_env("true");
    let end = env.run(Subject::Tf, &["locks"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("is \"http\"") && end.err.contains("ask the server of the state"), "{}", env.dump(&end));
    assert!(!end.err.contains("hunter2"), "{}", end.err);
    let end = env.run(Subject::Tf, &["locks", "doctor"]);
    assert!(
        end.out.contains("note   backend: http, ") && end.out.contains("tf only reports a lock there"),
        "{}",
        env.dump(&end)
    );
    assert!(!end.out.contains("hunter2"), "{}", end.out);
}

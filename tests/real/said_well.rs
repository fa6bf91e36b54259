//! "One or two lines on stderr after a release", and the command to type if there was no release.

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use super::locks_recover::recover;
use super::survived::{edit, killed_whole};
use crate::support::cloud::cloud;
use crate::support::process::terraform_below;
use crate::support::terminal::Terminal;
use crate::support::test_env::{APPLY, WAITS, id_of};
use crate::support::{Lock, Run, Subject, TestEnv, wait_for};

#[test]
fn a_release_is_told_in_two_lines() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    let id = id_of(&env.locks()[0]);
    run.kill_terraform();
    let end = run.wait();
    let lines: Vec<&str> = end.err.lines().collect();
    assert_eq!(lines.len(), 2, "{}", end.err);
    assert_eq!(lines[0], "tf: terraform was killed by SIGKILL without releasing its state lock");
    let told = format!("tf: released the lock: OperationTypeApply on {}, ID {id}, held for ", env.path());
    assert!(lines[1].starts_with(&told), "{}", end.err);
    assert!(!end.out.contains("tf:"), "stdout carries not one byte of ours");
}

#[test]
fn what_could_not_be_released_is_told_with_the_command_that_mends_it() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("TFW_RELEASE", "never");
    let run = env.start_apply(Subject::Tf);
    let id = id_of(&env.locks()[0]);
    run.kill_terraform();
    let end = run.wait();
    env.assert_locked();
    assert!(end.err.contains("TFW_RELEASE is set to never"), "{}", end.err);
    let command = end.err.split("type: ").nth(1).unwrap().lines().next().unwrap().trim();
    assert_eq!(command, format!("terraform force-unlock {id}"));
    let end = env.run_in_shell(&format!("{} -force {id}", command.rsplit_once(' ').unwrap().0));
    assert_eq!(end.code(), Some(0));
    env.assert_unlocked();
}

#[test]
fn a_lock_service_that_refuses_is_quoted() {
    use crate::support::http::Message;
    use crate::support::proxy::{Proxy, ProxyAction};
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let proxy = Proxy::start(cloud().port, |request| {
        if request.header("x-amz-target").is_some_and(|target| target.ends_with(".DeleteItem")) {
            let body =
                r#"{"__type":"com.amazon.coral.service#AccessDeniedException","message":"not allowed to delete"}"#;
            ProxyAction::Answer(Message::answer("400 Bad Request", body))
        } else {
            ProxyAction::Pass
        }
    });
    env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{}", proxy.port));
    let run = env.start_apply(Subject::Tf);
    let id = id_of(&env.locks()[0]);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("AccessDeniedException: not allowed to delete"), "{}", env.dump(&end));
    assert!(end.err.contains(&format!("terraform force-unlock {id}")), "{}", end.err);
    assert_eq!(end.signal(), Some(9), "it ends as terraform ended all the same");
    env.assert_locked();
}

#[test]
fn what_cannot_be_followed_is_named_and_the_lock_kept() {
    use crate::support::http::Message;
    use crate::support::proxy::{Proxy, ProxyAction};
    let credentials = Proxy::start(cloud().port, |_| {
        ProxyAction::Answer(Message::answer(
            "200 OK",
            r#"{"AccessKeyId":"test","SecretAccessKey":"test","Token":"t","Expiration":"2099-01-01T00:00:00Z"}"#,
        ))
    });
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.write_main("", WAITS);
    // This terraform's SDK does not know the key, and asks the container. The SDK of `tf` knows it, but does not
    // support it.
    env.write("config", "[profile login]\nlogin_session = x\n");
    env.set("AWS_CONFIG_FILE", env.directory.join("config")).set("AWS_PROFILE", "login");
    env.set("AWS_ACCESS_KEY_ID", "").set("AWS_SECRET_ACCESS_KEY", "");
    env.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://127.0.0.1:{}/", credentials.port));
    env.init();
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("the profile sets login_session"), "{}", env.dump(&end));
    env.assert_locked();
    let end = env.run(Subject::Tf, &["locks", "doctor"]);
    assert!(end.out.contains("WRONG  backend: the profile sets login_session"), "{}", env.dump(&end));
}

#[test]
fn a_lock_service_that_does_not_answer_is_not_waited_for_when_a_person_says_so() {
    use crate::support::proxy::{Proxy, ProxyAction};
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let killed = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = std::sync::Arc::clone(&killed);
    let proxy = Proxy::start(cloud().port, move |_| {
        if flag.load(std::sync::atomic::Ordering::SeqCst) { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{}", proxy.port));
    let run = env.start_apply(Subject::Tf);
    killed.store(true, std::sync::atomic::Ordering::SeqCst);
    run.kill_terraform();
    // With a lease, the first held request may be the keeper's.
    env.wait_for_trace("a lock may be held");
    proxy.wait_until_held();
    run.send(Signal::SIGINT);
    run.wait_for_err("press ^C again to leave it");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(end.err.contains("force-unlock"), "{}", env.dump(&end));
    env.assert_locked();
    proxy.let_go();
}

#[test]
fn colour_is_for_a_terminal_that_wants_it() {
    for (no_color, coloured) in [(None, true), (Some("1"), false)] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        if let Some(value) = no_color {
            env.set("NO_COLOR", value);
        }
        let mut command = env.command(env.bin().join("tf"));
        command.args(APPLY);
        let mut terminal = Terminal::start(command);
        env.wait_for_file("began");
        kill(terraform_below(terminal.pid()), Signal::SIGKILL).unwrap();
        terminal.wait_for("released the lock");
        terminal.wait();
        let escapes =
            terminal.screen().split("without releasing").next().unwrap().lines().last().unwrap().contains('\u{1b}');
        assert_eq!(escapes, coloured, "{}", terminal.screen());
    }
}

#[test]
fn a_dead_stderr_never_stops_a_release() {
    for closed in [false, true] {
        let env = TestEnv::new(Lock::Both, WAITS);
        let mut command = env.command("sh");
        let redirect = if closed { "2>&-" } else { "2>/dev/full" };
        command.args(["-c", &format!("exec tf apply -auto-approve -no-color {redirect}")]);
        let run = Run::start(command);
        env.wait_for_began(&run);
        run.kill_terraform();
        let end = run.wait();
        assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
        env.assert_unlocked();
    }
    // A terminal that was closed: every write to it fails with EIO.
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut command = env.command(env.bin().join("tf"));
    command.args(APPLY);
    let mut terminal = Terminal::start(command);
    env.wait_for_file("began");
    let terraform = terraform_below(terminal.pid());
    kill(terraform, Signal::SIGSTOP).unwrap();
    terminal.close();
    env.wait_for_trace("got SIGHUP");
    kill(terraform, Signal::SIGKILL).unwrap();
    wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
}

#[test]
fn what_a_full_stderr_did_not_take_is_said_once_its_reader_goes_on() {
    use std::io::Read as _;
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("TFW_RELEASE", "never");
    let mut command = env.command(env.bin().join("tf"));
    command.args(APPLY);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut filler = writer.try_clone().unwrap();
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(writer);
    let mut child = command.spawn().unwrap();
    drop(command);
    env.wait_for_file("began");
    // The reader does not read, and the pipe is full.
    nix::fcntl::fcntl(&filler, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    while std::io::Write::write(&mut filler, &[b'.'; 512]).is_ok() {}
    drop(filler);
    let tf = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(crate::support::process::terraform_below(tf), nix::sys::signal::Signal::SIGKILL).unwrap();
    env.wait_for_trace("terraform ended");
    // Longer than `tf` waits to write one message.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    assert!(said.contains("was not released"), "{said:?}\n{}", env.trace());
}

/// Returns the command that `said` shows, with no question to answer.
fn command_in(said: &str) -> String {
    let command = said.lines().find_map(|line| line.split_once("type: ")).expect("a command").1;
    command.replace("force-unlock", "force-unlock -force")
}

#[test]
fn the_command_that_a_killed_run_of_another_workspace_names_works_where_it_is_typed() {
    for (selected, used, key) in
        [("default", "green", "env:/green/dir/prod.tfstate"), ("green", "default", "dir/prod.tfstate")]
    {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        assert_eq!(env.run(Subject::Bare, &["workspace", "new", "green"]).code(), Some(0));
        assert_eq!(env.run(Subject::Bare, &["workspace", "select", selected]).code(), Some(0));
        env.set("TFW_RELEASE", "never").set("TF_WORKSPACE", used);
        let run = env.start_apply(Subject::Tf);
        run.kill_terraform();
        let end = run.wait();
        let command = command_in(&end.err);
        assert!(!env.locks_at(key).is_empty(), "{}", env.dump(&end));
        env.set("TF_WORKSPACE", crate::support::test_env::UNSET);
        let mut shell = env.command("sh");
        shell.args(["-c", &command]);
        let typed = crate::support::Run::start(shell).wait();
        assert_eq!(typed.code(), Some(0), "{command}: {}", env.dump(&typed));
        assert!(env.locks_at(key).is_empty(), "{command}");
    }
}

/// A person may select another workspace between the run and the recovery.
#[test]
fn the_command_that_a_recovery_names_works_with_any_selected_workspace() {
    let mut env = killed_whole(Lock::Both);
    assert_eq!(env.run(Subject::Bare, &["workspace", "new", "green"]).code(), Some(0));
    env.set("TFW_RELEASE", "never");
    // A run of a `workspace` command locks another workspace than the selected one.
    for (command, workspaces, expected) in [
        ("workspace delete", json!(["green", "default"]), "tf locks release --chdir "),
        ("apply", json!(["green", "default"]), "TF_WORKSPACE=default terraform "),
        ("apply", json!(["default"]), "TF_WORKSPACE=default terraform "),
    ] {
        edit(&env, |record| {
            record["command"] = command.into();
            record["workspaces"] = workspaces.clone();
        });
        let end = recover(&env, &[]);
        assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
        assert!(command_in(&end.out).starts_with(expected), "{command} {workspaces}: {}", env.dump(&end));
    }
    let end = recover(&env, &[]);
    let mut shell = env.command("sh");
    shell.current_dir("/").args(["-c", &command_in(&end.out)]);
    let typed = crate::support::Run::start(shell).wait();
    assert_eq!(typed.code(), Some(0), "{}\n{}", end.out, env.dump(&typed));
    env.assert_unlocked();
}

//! The location of the run's backend. It is not always the one in the working directory, and it may change during the
//! run.

use std::fs;

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::terraform_below;
use crate::support::processes::{KillOnDrop, guardian_of, home, kill_all, tf_of, wait_until_gone};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{APPLY, WAITS, id_of};
use crate::support::{Lock, Run, Subject, TestEnv, wait_for};

/// A second backend: a bucket, and a table in another region.
struct Destination {
    bucket: String,
    table: String,
}

const REGION: &str = "eu-west-1";

impl Destination {
    fn new(env: &TestEnv) -> Self {
        let destination = Self { bucket: format!("{}-dst", env.bucket), table: format!("{}-dst", env.table) };
        assert_eq!(cloud().s3("PUT", &destination.bucket, b"").status(), 200);
        let table = json!({
            "TableName": destination.table, "BillingMode": "PAY_PER_REQUEST",
            "AttributeDefinitions": [{"AttributeName": "LockID", "AttributeType": "S"}],
            "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
        });
        cloud().dynamodb_in(REGION, "CreateTable", &table);
        destination
    }

    fn block(&self) -> String {
        format!(
            "bucket = \"{}\"\nkey = \"new/prod.tfstate\"\nregion = \"{REGION}\"\nuse_path_style = true\n\
             dynamodb_table = \"{}\"\nuse_lockfile = true\n",
            self.bucket, self.table
        )
    }

    /// Returns the parts of the default workspace's lock that exist.
    fn locks(&self) -> Vec<String> {
        self.locks_of("new/prod.tfstate")
    }

    fn locks_of(&self, key: &str) -> Vec<String> {
        let query = json!({"TableName": self.table, "Key": {"LockID": {"S": format!("{}/{key}", self.bucket)}}, "ConsistentRead": true});
        let item = cloud().dynamodb_in(REGION, "GetItem", &query)["Item"]["Info"]["S"].as_str().map(ToOwned::to_owned);
        item.into_iter().chain(cloud().object(&format!("{}/{key}.tflock", self.bucket))).collect()
    }
}

/// Returns a directory with a state in the first backend, and with a configuration for the second one.
fn about_to_move() -> (TestEnv, Destination) {
    let env = TestEnv::new(Lock::Both, "true");
    let end = env.run(Subject::Bare, &APPLY);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let destination = Destination::new(&env);
    let text = env.read("main.tf").replace(&env.backend("dir/prod.tfstate"), &destination.block());
    env.write("main.tf", &text);
    (env, destination)
}

/// Holds every write of a state whose path contains `what`. Requests to S3 are changed to the region of the buckets.
fn hold(env: &mut TestEnv, what: &str) -> Proxy {
    let what = what.to_owned();
    let holds = move |request: &Message| {
        request.start.starts_with("PUT ") && request.start.contains(&what) && !request.start.contains(".tflock")
    };
    let proxy = Proxy::start_changing(
        cloud().port,
        |request| {
            let to_s3 = request.header("x-amz-target").is_none();
            for (name, value) in request.headers.iter_mut().filter(|_| to_s3) {
                if name.eq_ignore_ascii_case("authorization") {
                    *value = value.replace("/eu-west-1/", "/us-east-1/");
                }
            }
        },
        move |request| if holds(request) { ProxyAction::Hold } else { ProxyAction::Pass },
    );
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    proxy
}

/// Starts a migration, which is held when it has both of its locks.
fn start_migration(env: &TestEnv, proxy: &Proxy, destination: &Destination, subject: Subject, more: &[&str]) -> Run {
    let arguments = [&["init", "-migrate-state", "-force-copy", "-no-color"], more].concat();
    let run = env.start(subject, &arguments);
    proxy.wait_until_held();
    wait_for("both locks", || (env.locks().len() == 2 && destination.locks().len() == 2).then_some(()), || env.trace());
    run
}

#[test]
fn bare_a_killed_migration_leaves_two_locks_in_two_backends() {
    let (mut env, destination) = about_to_move();
    let proxy = hold(&mut env, &destination.bucket);
    let run = start_migration(&env, &proxy, &destination, Subject::Bare, &[]);
    kill(run.pid(), Signal::SIGKILL).unwrap();
    proxy.let_go();
    run.wait();
    assert_eq!((env.locks().len(), destination.locks().len()), (2, 2));
}

#[test]
fn a_killed_migration_gives_both_locks_back_across_regions_and_tables() {
    let (mut env, destination) = about_to_move();
    let proxy = hold(&mut env, &destination.bucket);
    let run = start_migration(&env, &proxy, &destination, Subject::Tf, &[]);
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert_eq!(end.err.matches("released the lock").count(), 2, "{}", env.dump(&end));
    assert!(env.locks().is_empty() && destination.locks().is_empty(), "{}", env.dump(&end));
}

/// The destination is only in arguments: in a file and on the command line.
#[test]
fn a_migration_whose_destination_is_on_the_command_line_gives_both_back() {
    let (mut env, destination) = about_to_move();
    let text = env.read("main.tf").replace(&destination.block(), "");
    env.write("main.tf", &text);
    let block = destination.block();
    let (first, last) = block.split_at(block.find("region").unwrap());
    env.write("prod.tfbackend", last);
    let own: Vec<String> =
        first.lines().map(|line| format!("-backend-config={}", line.replace(" = ", "=").replace('"', ""))).collect();
    env.set("TF_CLI_ARGS_init", own[0].clone());
    let proxy = hold(&mut env, &destination.bucket);
    let run = start_migration(&env, &proxy, &destination, Subject::Tf, &["-backend-config", "prod.tfbackend", &own[1]]);
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert_eq!(end.err.matches("released the lock").count(), 2, "{}", env.dump(&end));
    assert!(env.locks().is_empty() && destination.locks().is_empty(), "{}", env.dump(&end));
}

#[test]
fn of_a_migration_whose_tf_is_killed_too_both_go_by_the_guardian_or_the_next_tf() {
    for everything in [false, true] {
        let (mut env, destination) = about_to_move();
        let _kill_on_drop = KillOnDrop(home(&env));
        let proxy = hold(&mut env, &destination.bucket);
        let run = start_migration(&env, &proxy, &destination, Subject::Tf, &[]);
        let tf = tf_of(&env);
        let guardian = guardian_of(&env, tf);
        if everything {
            env.wait_for_trace("guardian: journal written: true");
            kill_all(&env);
        } else {
            let terraform = terraform_below(run.pid());
            kill(tf, Signal::SIGKILL).unwrap();
            kill(terraform, Signal::SIGKILL).unwrap();
        }
        proxy.let_go();
        run.wait();
        if everything {
            let end = env.run(Subject::Tf, &["locks", "recover"]);
            assert_eq!(end.out.matches("released the lock").count(), 2, "{}", env.dump(&end));
        } else {
            wait_until_gone(&env, guardian);
        }
        assert!(env.locks().is_empty() && destination.locks().is_empty(), "{everything}: {}", env.trace());
    }
}

#[test]
fn a_migration_of_another_workspace_than_the_selected_gives_its_locks_back() {
    let env = TestEnv::new(Lock::Both, "true");
    for arguments in
        [&["workspace", "new", "green"][..], &["apply", "-auto-approve"], &["workspace", "select", "default"]]
    {
        let end = env.run(Subject::Bare, arguments);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    }
    let destination = Destination::new(&env);
    let text = env.read("main.tf").replace(&env.backend("dir/prod.tfstate"), &destination.block());
    env.write("main.tf", &text);
    let mut env = env;
    let proxy = hold(&mut env, "green");
    let run = env.start(Subject::Tf, &["init", "-migrate-state", "-force-copy", "-no-color"]);
    proxy.wait_until_held();
    let path = "env:/green/new/prod.tfstate";
    wait_for("a lock", || (!destination.locks_of(path).is_empty()).then_some(()), || env.trace());
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(destination.locks_of(path).is_empty(), "{}", env.dump(&end));
    assert!(env.locks_at("env:/green/dir/prod.tfstate").is_empty(), "{}", env.dump(&end));
}

#[test]
fn a_plan_is_locked_where_it_was_made_for_whatever_the_directory_says_by_then() {
    for everything in [false, true] {
        let env = TestEnv::new(Lock::Both, WAITS);
        let _kill_on_drop = KillOnDrop(home(&env));
        let end = env.run(Subject::Bare, &["plan", "-out=plan.out", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        // Another backend was initialized since then. Terraform applies the plan to the backend for which the plan was
        // made.
        let other = env.read(".terraform/terraform.tfstate").replace("dir/prod.tfstate", "other/prod.tfstate");
        env.write(".terraform/terraform.tfstate", &other);
        let run = env.start(Subject::Tf, &["apply", "-no-color", "plan.out"]);
        env.wait_for_began(&run);
        env.assert_locked();
        if everything {
            env.wait_for_trace("guardian: journal written: true");
            kill_all(&env);
            let end = env.run(Subject::Tf, &["locks", "recover"]);
            assert!(end.out.contains("released the lock"), "{}", env.dump(&end));
        } else {
            // The plan was read before, so it may be gone now.
            fs::remove_file(env.directory.join("plan.out")).unwrap();
            run.kill_terraform();
            let end = run.wait();
            assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
        }
        env.assert_unlocked();
    }
}

#[test]
fn a_working_directory_that_is_removed_during_the_run_hides_no_lock() {
    let env = TestEnv::empty(Lock::Both);
    // The provisioner's files and the trace are in the parent directory, because they are written during the run.
    env.write_main("", &format!("cd {}; {WAITS}", env.directory.display()));
    let sub = env.directory.join("sub");
    fs::create_dir(&sub).unwrap();
    fs::rename(env.directory.join("main.tf"), sub.join("main.tf")).unwrap();
    let end = env.run(Subject::Bare, &["-chdir=sub", "init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let mut command = env.command(env.bin().join("tf"));
    command.args(APPLY).current_dir(&sub);
    let run = Run::start(command);
    env.wait_for_began(&run);
    fs::remove_dir_all(&sub).unwrap();
    env.assert_locked();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_backend_that_is_set_up_anew_during_the_run_hides_no_lock() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    let other = env.read("main.tf").replace("dir/prod.tfstate", "other/prod.tfstate");
    env.write("main.tf", &other);
    let end = env.run(Subject::Bare, &["init", "-reconfigure", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(env.read(".terraform/terraform.tfstate").contains("other/prod.tfstate"));
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// `terraform_remote_state` of a workspace that does not exist takes a lock in a location that no block contains: its
/// region and its table are in an expression, and not in the log.
#[test]
fn a_lock_that_no_block_points_to_is_named_and_left_and_ours_is_given_back() {
    let mut env = TestEnv::empty(Lock::Both);
    let other = Destination::new(&env);
    let config = other.block().replace('\n', "\n    ");
    let data = format!(
        "data \"terraform_remote_state\" \"other\" {{\n  backend = \"s3\"\n  workspace = \"nope\"\n  config = {{\n    {config}\n  }}\n}}\n"
    );
    env.write_main(&data, "true");
    let proxy = hold(&mut env, "nope");
    env.init();
    let run = env.start(Subject::Tf, &["plan", "-no-color"]);
    proxy.wait_until_held();
    let path = "env:/nope/new/prod.tfstate";
    wait_for("the other lock", || (other.locks_of(path).len() == 2).then_some(()), || env.trace());
    let id = id_of(&other.locks_of(path)[0]);
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(end.err.contains(&id) && end.err.contains(&format!("{}/{path}", other.bucket)), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_eq!(other.locks_of(path).len(), 2, "{}", env.dump(&end));
}

/// Returns a [`TestEnv`] with a directory `sub`, whose backend has its credentials in a file with a relative path.
fn with_keys_in_sub() -> TestEnv {
    let mut env = TestEnv::empty(Lock::Both);
    env.set("AWS_ACCESS_KEY_ID", "").set("AWS_SECRET_ACCESS_KEY", "").set("AWS_PROFILE", "there");
    env.write_main("", "trap '' INT; touch ../began; while test -e ../began && ! test -e ../go; do sleep 0.02; done");
    let sub = env.directory.join("sub");
    fs::create_dir(&sub).unwrap();
    let block = env.read("main.tf").replace("region =", "shared_credentials_files = [\"keys\"]\nregion =");
    fs::write(sub.join("main.tf"), block).unwrap();
    fs::remove_file(env.directory.join("main.tf")).unwrap();
    fs::write(sub.join("keys"), "[there]\naws_access_key_id = test\naws_secret_access_key = test\n").unwrap();
    let end = env.run(Subject::Bare, &["-chdir=sub", "init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env
}

#[test]
fn files_that_are_named_relative_to_chdir_are_found_there() {
    let env = with_keys_in_sub();
    let run = env.start(Subject::Tf, &["-chdir=sub", "apply", "-auto-approve", "-no-color"]);
    env.wait_for_began(&run);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
    let end = env.run(Subject::Tf, &["locks", "list", "--chdir", "sub"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
}

/// The recovery runs in another directory, which may have a file of the same name with other keys.
#[test]
fn files_that_are_gone_with_their_directory_are_not_sought_elsewhere() {
    let env = with_keys_in_sub();
    let _kill_on_drop = KillOnDrop(home(&env));
    let run = env.start(Subject::Tf, &["-chdir=sub", "apply", "-auto-approve", "-no-color"]);
    env.wait_for_began(&run);
    env.wait_for_trace("guardian: journal written: true");
    kill_all(&env);
    let [sub, away] = ["sub", "away"].map(|name| env.directory.join(name));
    fs::rename(&sub, &away).unwrap();
    fs::copy(away.join("keys"), env.directory.join("keys")).unwrap();
    let end = env.run(Subject::Tf, &["locks", "recover"]);
    assert!(end.out.contains("keys does not exist"), "{}", env.dump(&end));
    env.assert_locked();
    // The record was kept as well. A recovery works in no directory, and accepts one as every command does.
    fs::rename(&away, &sub).unwrap();
    let end = env.run(Subject::Tf, &["-chdir=sub", "locks", "recover"]);
    assert!(end.out.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

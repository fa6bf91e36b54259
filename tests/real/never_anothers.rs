//! "A lock that it did not hold is never touched."

use std::path::PathBuf;
use std::time::Duration;

use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{APPLY, WAITS, id_of, lock_json, who};
use crate::support::{Lock, Subject, TestEnv};

const OTHER: &str = "22222222-3333-4444-5555-666666666666";

fn the_lock_that_we_waited_for_stands_when_we_are_killed(lock: Lock) {
    let env = TestEnv::new(lock, "true");
    // The lock has the same user and host, and is taken after the start of the run. Only the ID differs.
    let first = env.lock_of_another();
    let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=60s"]);
    run.wait_for_out("Acquiring state lock");
    let _ = first;
    let second = lock_json(OTHER, &env.path());
    env.put_lock(&second);
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    assert!(env.locks().iter().all(|standing| *standing == second), "{:?}", env.locks());
    env.assert_locked();
    assert!(!end.err.contains("released"), "{}", end.err);
}
for_each_lock!(the_lock_that_we_waited_for_stands_when_we_are_killed);

fn a_refused_run_touches_nothing(lock: Lock) {
    let env = TestEnv::new(lock, "true");
    let theirs = env.lock_of_another();
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(1));
    // locks_release.rs checks what is reported about the holder.
    assert!(!end.err.contains("released"), "{}", env.dump(&end));
    assert!(!env.locks().is_empty() && env.locks().iter().all(|standing| *standing == theirs));
    env.assert_locked();
}
for_each_lock!(a_refused_run_touches_nothing);

fn a_lock_that_replaced_ours_before_the_release_stands(lock: Lock) {
    let env =
        TestEnv::new(lock, "(trap '' TERM; touch began; while test -e began && ! test -e go; do sleep 0.02; done)");
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    // The script that ignores TERM delays the release. Meanwhile the lock is removed by force, and another run takes
    // it.
    env.wait_for_trace("ending ");
    env.delete_lock();
    let theirs = lock_json(OTHER, &env.path());
    env.put_lock(&theirs);
    env.unblock();
    let end = run.wait();
    assert!(env.locks().iter().all(|standing| *standing == theirs), "{:?}", env.locks());
    env.assert_locked();
    assert!(!end.err.contains("released the lock"), "{}", env.dump(&end));
}
for_each_lock!(a_lock_that_replaced_ours_before_the_release_stands);

#[test]
fn a_lock_that_replaces_ours_between_our_read_and_our_delete_stands() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let mut env = TestEnv::new(lock, WAITS);
        let proxy = Proxy::start(cloud().port, move |request| {
            let item = request.header("x-amz-target").is_some_and(|target| target.ends_with(".DeleteItem"));
            // With a lease, a keeper deletes its test object as well.
            let object = request.start.starts_with("DELETE ") && request.start.contains("tfstate.tflock");
            if item || object { ProxyAction::Hold } else { ProxyAction::Pass }
        });
        let url = format!("http://127.0.0.1:{}", proxy.port);
        env.set("AWS_ENDPOINT_URL", &url);
        let run = env.start_apply(Subject::Tf);
        run.kill_terraform();
        proxy.wait_until_held();
        env.delete_lock();
        let theirs = lock_json(OTHER, &env.path());
        env.put_lock(&theirs);
        proxy.let_go();
        let end = run.wait();
        assert_eq!(env.locks(), [theirs], "{}", env.dump(&end));
        assert!(!end.err.contains("released the lock"), "{}", env.dump(&end));
    }
}

/// Returns the lines with which terraform logs that it took a lock, forged by another process.
fn forged(id: &str, path: &str) -> String {
    let now = jiff::Timestamp::now();
    let (bucket, key) = path.split_once('/').unwrap();
    let line = |message: &str| {
        format!(
            "{now:.3} [INFO]  backend-s3: {message}: tf_backend.lock.id={id} tf_backend.lock.info=\"\" \
             tf_backend.lock.operation=OperationTypeApply tf_backend.lock.path={path} tf_backend.lock.version=1.11.4 \
             tf_backend.lock.who={} tf_backend.operation=Lock tf_backend.req_id=f tf_backend.s3.bucket={bucket} \
             tf_backend.s3.path={key}",
            who()
        )
    };
    format!(
        "{}\n{}\n",
        line("Attempting to lock remote state (S3 Native and DynamoDB)..."),
        line("Locked remote state (S3 Native and DynamoDB)")
    )
}

#[test]
fn what_a_provisioner_writes_into_the_recorder_deletes_no_living_lock() {
    // A living lock of another state in the same bucket and table, and then one with the same path that is older than
    // the run.
    let env = TestEnv::new(Lock::Both, "true");
    let other_path = format!("{}/other.tfstate", env.bucket);
    let living = lock_json(OTHER, &other_path);
    cloud().put_item(&env.table, &other_path, &living);
    env.write_main(
        "",
        "touch began; while ! test -e forged; do sleep 0.02; done; cat forged >> $TF_LOG_PATH; touch appended; \
         while test -e began && ! test -e go; do sleep 0.02; done",
    );
    let run = env.start_apply(Subject::Tf);
    // The times in the log must not go backwards, however long terraform took to come to the provisioner.
    env.write("forged.new", &forged(OTHER, &other_path));
    std::fs::rename(env.directory.join("forged.new"), env.directory.join("forged")).unwrap();
    env.wait_for_file("appended");
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(cloud().item(&env.table, &other_path), Some(living), "{}", env.dump(&end));
    // The run's own lock is released, and the other one is reported as what it is.
    env.assert_unlocked();
    assert!(end.err.contains("the lock matches no backend of this directory"), "{}", env.dump(&end));

    let env = TestEnv::new(Lock::DynamoDb, "true");
    let living = lock_json(OTHER, &env.path());
    env.write("forged", &forged(OTHER, &env.path()));
    env.write_main(
        "",
        "cat forged >> $TF_LOG_PATH; touch began; while test -e began && ! test -e go; do sleep 0.02; done",
    );
    let run = env.start_apply(Subject::Tf);
    // The run's lock was removed by force. Another run holds it, and by that run's clock since before this run.
    env.delete_lock();
    let older = living.replace(&jiff::Timestamp::now().strftime("%Y").to_string(), "2020");
    env.put_lock(&older);
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(env.locks(), [older], "{}", env.dump(&end));
    assert!(end.err.contains("was not released"), "{}", env.dump(&end));
}

#[test]
fn a_torn_or_empty_id_in_the_recorder_deletes_nothing() {
    for tail in ["", "5e75cb05-d70c", "5e75cb05-d70c-4132-39e0-d2abba1b3077"] {
        let env = TestEnv::new(Lock::DynamoDb, "true");
        env.write("torn", forged(tail, &env.path()).split_inclusive("lock.id=").next().unwrap());
        env.write_main("", &format!(
            "head -c -0 torn >> $TF_LOG_PATH; printf '%s' '{tail}' >> $TF_LOG_PATH; touch began; while test -e began && ! test -e go; do sleep 0.02; done"
        ));
        let run = env.start_apply(Subject::Tf);
        let ours = id_of(&env.locks()[0]);
        let theirs = env.lock_of_another();
        run.kill_terraform();
        let end = run.wait();
        assert_ne!(id_of(&theirs), ours);
        assert_eq!(env.locks(), [theirs], "{tail:?}: {}", env.dump(&end));
    }
}

#[test]
fn what_only_the_locks_own_json_suggests_is_named_and_kept() {
    // A program between tf and terraform removes the log: nothing shows which lock belongs to the run.
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.stand_in("forgets", "#!/bin/sh\nexec env -u TF_TEMP_LOG_PATH -u TF_LOG_PATH -u TF_LOG_CORE terraform \"$@\"\n");
    let run = env.start_apply(Subject::Tf);
    let id = id_of(&env.locks()[0]);
    run.kill_terraform();
    let end = run.wait();
    env.assert_locked();
    assert!(end.err.contains(&format!("type: tf locks show {id}")), "{}", env.dump(&end));
    assert!(end.err.contains(&format!("force-unlock {id}")), "{}", env.dump(&end));
    assert!(end.err.contains("was not released"), "{}", env.dump(&end));
    // The command that is reported works.
    let mended = env.run(Subject::Bare, &["force-unlock", "-force", &id]);
    assert_eq!(mended.code(), Some(0), "{}{}", mended.out, mended.err);
    env.assert_unlocked();
}

#[test]
fn a_provisioner_that_wipes_the_recorder_hides_no_lock_that_was_read_before() {
    let env = TestEnv::new(
        Lock::Both,
        "touch began; while ! test -e wipe; do sleep 0.02; done; : > $TF_LOG_PATH; touch wiped; while ! test -e go; do sleep 0.02; done",
    );
    let run = env.start_apply(Subject::Tf);
    env.assert_locked();
    env.wait_for_trace("journal written");
    env.write("wipe", "");
    env.wait_for_file("wiped");
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Returns a directory with an inner directory that has its own state. A provisioner of the outer terraform starts a
/// terraform in it, which locks that state.
fn nested(inner: &str) -> TestEnv {
    let env = TestEnv::empty(Lock::Both);
    std::fs::create_dir(env.directory.join("inner")).unwrap();
    let backend = env.backend("inner.tfstate");
    env.write("inner/main.tf", &format!(
        "terraform {{\nbackend \"s3\" {{\n{backend}}}\n}}\nresource \"terraform_data\" \"i\" {{\nprovisioner \"local-exec\" {{\n\
         command = \"touch ../began; while test -e ../began && ! test -e ../go; do sleep 0.02; done\"\n}}\n}}\n"
    ));
    assert_eq!(env.run(Subject::Bare, &["-chdir=inner", "init"]).code(), Some(0));
    env.write_main("", &format!("{inner} -chdir=inner apply -auto-approve"));
    env.init();
    env
}

#[test]
fn a_nested_terraforms_lock_is_named_and_left_and_a_nested_tfs_is_given_back() {
    for (inner, left) in [("terraform", true), ("tf", false)] {
        let env = nested(inner);
        let run = env.start_apply(Subject::Tf);
        assert_eq!(env.locks_at("inner.tfstate").len(), 2);
        run.kill_terraform();
        let end = run.wait();
        env.assert_unlocked();
        let inner_locks = env.locks_at("inner.tfstate");
        if left {
            // The nested terraform was told to exit with TERM, which counts as an interrupt: it may have unlocked
            // itself.
            let named = inner_locks.iter().all(|lock| end.err.contains(&id_of(lock)));
            assert!(named, "{}", env.dump(&end));
        } else {
            assert!(inner_locks.is_empty(), "{}", env.dump(&end));
        }
    }
}

#[test]
fn a_nested_terraform_that_goes_on_keeps_its_lock() {
    // It writes to the same log as the outer terraform, and keeps running after that has exited successfully.
    let env = nested("nohup terraform");
    let text = env
        .read("main.tf")
        .replace("-auto-approve", "-auto-approve >/dev/null 2>&1 & while ! test -e began; do sleep 0.02; done; true");
    env.write("main.tf", &text);
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(env.locks_at("inner.tfstate").len(), 2, "{}", env.dump(&end));
    env.unblock();
    crate::support::wait_for(
        "the nested terraform to unlock",
        || env.locks_at("inner.tfstate").is_empty().then_some(()),
        || env.trace(),
    );
}

#[test]
fn an_api_error_that_forges_the_log_deletes_no_living_lock() {
    // The real AWS provider asks a stand-in for SQS about a queue. The response is an error whose text continues, after
    // a newline, with perfect lines of terraform's log. Core logs the text without escapes.
    let mut env = TestEnv::empty(Lock::DynamoDb);
    let other_path = env.path();
    // The lock and the lines are created at the moment of the request, so the living lock exists and the lines are
    // right.
    let table = env.table.clone();
    let path = other_path.clone();
    let sqs = Proxy::start(cloud().port, move |_| {
        cloud().put_item(&table, &path, &lock_json(OTHER, &path));
        let text = forged(OTHER, &path);
        let answer =
            serde_json::json!({"__type": "com.amazonaws.sqs#InvalidAddress", "message": format!("no\n{text}")});
        ProxyAction::Answer(Message::answer("400 Bad Request", &answer.to_string()))
    });
    if let Some(plugins) = plugin_mirror() {
        let mirror = format!("provider_installation {{\nfilesystem_mirror {{\npath = {plugins:?}\n}}\n}}\n");
        env.write("cli.tfrc", &mirror);
        let config = env.directory.join("cli.tfrc");
        env.set("TF_CLI_CONFIG_FILE", config);
    }
    env.write_main(
        &format!(
            "provider \"aws\" {{\nregion = \"us-east-1\"\nskip_credentials_validation = true\nskip_requesting_account_id = true\n\
             skip_metadata_api_check = true\nmax_retries = 1\nendpoints {{\nsqs = \"http://127.0.0.1:{}\"\n}}\n}}\n\
             data \"aws_sqs_queue\" \"q\" {{\nname = \"q\"\n}}\n",
            sqs.port
        ),
        "true",
    );
    if plugin_mirror().is_some() {
        env.init();
    } else {
        fetch_providers(&env);
    }
    for arguments in [["plan", "-no-color", "-lock=false"], ["plan", "-no-color", "-lock=true"]] {
        env.delete_lock();
        // Terraform starts the provider several times. It has hundreds of megabytes.
        let end = env.start(Subject::Tf, &arguments).wait_at_most(Duration::from_mins(5));
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        if arguments[2] == "-lock=false" {
            assert_eq!(env.locks().iter().map(|lock| id_of(lock)).collect::<Vec<_>>(), [OTHER], "{}", env.dump(&end));
            assert!(
                end.err.contains("was not released"),
                "the forgery reached the log, and was seen: {}",
                env.dump(&end)
            );
        }
    }
}

/// Runs `init` with the caller's network settings for the registry, and without a time limit: the provider has hundreds
/// of megabytes.
fn fetch_providers(env: &TestEnv) {
    let mut init = env.command(env.bin().join("terraform"));
    init.args(["init", "-no-color"]);
    for name in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "SSL_CERT_FILE", "TF_PLUGIN_CACHE_DIR"] {
        if let Some(value) = std::env::var_os(name) {
            init.env(name, value);
        }
    }
    init.env("NO_PROXY", "127.0.0.1");
    let output = init.output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Returns a filesystem mirror with the AWS provider: the one in TF_TEST_PLUGINS, one in a directory in which terraform
/// looks, or one below /opt. `None` if there is none; then `init` downloads the provider.
fn plugin_mirror() -> Option<PathBuf> {
    let named = std::env::var_os("TF_TEST_PLUGINS").map(PathBuf::from);
    let usual = ["/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins"].map(PathBuf::from);
    let below_opt = std::fs::read_dir("/opt").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut all = named.into_iter().chain(usual).chain(below_opt);
    all.find(|path| path.join("registry.terraform.io/hashicorp/aws").is_dir())
}

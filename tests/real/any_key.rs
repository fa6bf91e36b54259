//! A lock is found and released whatever key its state has, as long as terraform accepts the key.

use serde_json::Value;

use super::locks_release::locks;
use crate::support::test_env::APPLY;
use crate::support::{Lock, Subject, TestEnv};

/// A provisioner's command that kills its terraform.
const DIES: &str = "kill -9 $PPID; sleep 60";

/// Returns a directory whose state has the key `key`, in the workspace `workspace`, with `prefix` as the prefix of
/// workspaces.
fn test_env(key: &str, prefix: &str, workspace: &str) -> TestEnv {
    let env = TestEnv::empty(Lock::Both);
    // HCL has the same escapes as JSON.
    let quoted = serde_json::to_string(key).unwrap();
    let backend = env.backend("KEY").replace("\"KEY\"", &quoted) + &format!("workspace_key_prefix = {prefix:?}\n");
    let main = format!(
        "terraform {{\nbackend \"s3\" {{\n{backend}}}\n}}\nresource \"terraform_data\" \"a\" {{\n\
         provisioner \"local-exec\" {{\ncommand = \"{DIES}\"\n}}\n}}\n"
    );
    env.write("main.tf", &main);
    env.init();
    if workspace != "default" {
        let end = env.run(Subject::Bare, &["workspace", "new", workspace]);
        assert_eq!(end.code(), Some(0), "{key:?}: {}", env.dump(&end));
    }
    env
}

#[track_caller]
fn assert_bare_can_lock(env: &TestEnv, key: &str) {
    let end = env.run(Subject::Bare, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{key:?}: {}", env.dump(&end));
}

fn is_released(key: &str, prefix: &str, workspace: &str) {
    let mut env = test_env(key, prefix, workspace);
    let end = env.run(Subject::Tf, &APPLY);
    assert!(end.err.contains("tf: released the lock"), "{key:?}: {}", env.dump(&end));
    assert_bare_can_lock(&env, key);

    // If the lock is only reported, `tf locks` lists it and can release it.
    env.set("TFW_RELEASE", "never");
    let end = env.run(Subject::Tf, &APPLY);
    assert!(!end.err.contains("released the lock"), "{key:?}: {}", env.dump(&end));
    let refused = env.run(Subject::Bare, &["plan", "-no-color"]);
    assert_eq!(refused.code(), Some(1), "{key:?}: {}", env.dump(&refused));
    let end = locks(&env, &["list", "--json"]);
    let listed: Value = serde_json::from_str(&end.out).unwrap();
    let id = listed.pointer("/locks/0/id").and_then(Value::as_str).unwrap_or_else(|| panic!("{key:?}: {listed}"));
    assert_eq!(listed["locks"].as_array().map(Vec::len), Some(1), "{key:?}: {listed}");
    let end = locks(&env, &["release", "--force", id]);
    assert_eq!(end.code(), Some(0), "{key:?}: {}", env.dump(&end));
    assert_bare_can_lock(&env, key);
}

#[test]
fn a_key_that_hclog_quotes_or_escapes() {
    for key in [
        "a b",
        "a\"b",
        "a\\b",
        "a\\\"b",
        "tab\tb",
        "return\rb",
        "a\u{1}b\u{7f}",
        "a\u{a0}b",
        "\u{e9}/\u{200b}",
        "a=b c=d",
    ] {
        is_released(key, "env:", "default");
    }
}

#[test]
fn a_key_with_a_newline() {
    for key in ["a\nb", "dir/a\n\nb \"c\" tf_backend.s3.path=x", "\nx"] {
        is_released(key, "env:", "default");
    }
    is_released("a\nb", "p q", "green");
}

#[test]
fn a_key_that_path_join_cleans() {
    for (key, prefix) in [("../x", "env:"), ("a/../b", "env:"), ("./a", "env:"), ("a", "p/../q"), ("a", "./p")] {
        is_released(key, prefix, "green");
    }
}

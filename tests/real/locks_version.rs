//! `tf locks version` says which `tf` this is and which terraform it would run, and never waits for that terraform.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::locks_list::assert_fits;
use super::locks_release::locks;
use crate::support::process::copy_program;
use crate::support::test_env::{terraform, which};
use crate::support::{Lock, Subject, TestEnv};

#[test]
fn it_says_its_own_version_and_the_terraform_that_it_would_run() {
    let env = TestEnv::empty(Lock::Both);
    let told = env.run(Subject::Bare, &["version", "-json"]);
    let told: Value = serde_json::from_str(&told.out).unwrap();
    let version = told["terraform_version"].as_str().unwrap();
    let own = format!("tf {}", env!("CARGO_PKG_VERSION"));
    // The second time, the version is remembered.
    for _ in 0..2 {
        let end = locks(&env, &["version"]);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
        let lines: Vec<&str> = end.out.lines().collect();
        let [first, commit, target, last] = lines[..] else { panic!("not four lines: {}", end.out) };
        assert_eq!(first, own);
        assert!(commit.starts_with("commit: ") && target.starts_with("target: "), "{}", end.out);
        assert!(last.starts_with("terraform: /") && last.ends_with(&format!(", Terraform {version}")), "{last}");

        let end = locks(&env, &["version", "--json"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert_fits(&env, "version", &end.out);
        let json: Value = serde_json::from_str(&end.out).unwrap();
        assert_eq!(json["terraform"]["version"], version);
        let path = json["terraform"]["path"].as_str().unwrap();
        assert_eq!(fs::canonicalize(path).unwrap(), fs::canonicalize(terraform()).unwrap());
    }
}

#[test]
fn without_a_terraform_it_says_so_and_still_what_it_is_itself() {
    let mut env = TestEnv::empty(Lock::Both);
    env.set("TFW_TERRAFORM", "/nowhere/terraform");
    let end = locks(&env, &["version"]);
    assert_eq!((end.code(), end.err.as_str()), (Some(2), ""), "{}", env.dump(&end));
    assert!(end.out.starts_with("tf ") && end.out.contains("\nterraform: none: TFW_TERRAFORM is "), "{}", end.out);
    assert!(end.out.ends_with("\nput terraform on PATH, or set TFW_TERRAFORM to its path\n"), "{}", end.out);
    let end = locks(&env, &["version", "--json"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert_fits(&env, "version", &end.out);
}

#[test]
fn a_directory_that_does_not_exist_is_an_error() {
    let env = TestEnv::empty(Lock::Both);
    env.write("file", "");
    for directory in ["/nonexistent", "file"] {
        let end = locks(&env, &["version", "--chdir", directory]);
        assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{}", env.dump(&end));
        assert!(end.err.contains(&format!("tf: {directory} is not a directory\n")), "{}", env.dump(&end));
    }
}

/// A program in machine code that is as large as a terraform and never exits, and a script, which is not run.
#[test]
fn a_terraform_that_hangs_is_killed_and_a_script_is_not_run() {
    let mut env = TestEnv::empty(Lock::Both);
    let hangs = env.directory.join("hangs");
    copy_program(fs::canonicalize(which("yes").unwrap()).unwrap(), &hangs);
    fs::File::options().write(true).open(&hangs).unwrap().set_len(64 << 20).unwrap();
    fs::set_permissions(&hangs, fs::Permissions::from_mode(0o755)).unwrap();
    env.set("TFW_TERRAFORM", &hangs);
    let begun = Instant::now();
    let end = locks(&env, &["version"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.ends_with(", version unknown: it did not report its version within 3 s\n"), "{}", end.out);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    let script = env.directory.join("script");
    fs::write(&script, format!("#!/bin/sh\ntouch {}\n", env.directory.join("was-run").display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    env.set("TFW_TERRAFORM", &script);
    let end = locks(&env, &["version", "--json"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_fits(&env, "version", &end.out);
    assert!(!env.exists("was-run"), "{}", end.out);
}

//! What is concluded from a host's name and from a machine's identity never applies to another machine.

use std::fs;

use serde_json::{Value, json};

use super::locks_release::locks;
use super::survived::{assert_nothing_left, edit, killed_whole, records};
use crate::support::process::Run;
use crate::support::system::is_root_on_linux;
use crate::support::test_env::{TEST_HOST, UNSET, lock_json};
use crate::support::{Lock, Subject, TestEnv};

const PLAN: [&str; 2] = ["plan", "-no-color"];

#[test]
fn a_lock_from_a_host_whose_name_many_have_is_released_by_force_alone() {
    if !is_root_on_linux() {
        // This test is listed in tests/left-out.
        return;
    }
    for host in ["localhost", "localhost.localdomain", "debian", "vm-of-a-test"] {
        let mut env = TestEnv::new(Lock::Both, "true");
        // The name of this host matters here, and not whether it is a container.
        env.set(TEST_HOST, UNSET);
        if !sees_all() {
            // In a container no holder is likely dead. This test is listed in tests/left-out.
            return;
        }
        let mut info: Value =
            serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &env.path())).unwrap();
        info["Created"] = "2020-01-01T00:00:00Z".into();
        info["Who"] = format!("{}@{host}", user()).into();
        env.put_lock(&info.to_string());
        let here = |words: &str| {
            let mut command = env.command("unshare");
            command.args([
                "--uts",
                "sh",
                "-c",
                &format!("echo {host} > /proc/sys/kernel/hostname && exec tf locks {words}"),
            ]);
            Run::start(command).wait()
        };
        let is_a_name = host == "vm-of-a-test";
        let end = here("list");
        assert_eq!(end.out.contains("likely_dead"), is_a_name, "{host}: {}", env.dump(&end));
        let end = here("release --yes");
        assert_eq!(end.code(), Some(i32::from(!is_a_name)), "{host}: {}", env.dump(&end));
        assert_eq!(env.locks().is_empty(), is_a_name, "{host}: {}", env.dump(&end));
    }
}

/// Whether this is the initial PID namespace of the machine.
fn sees_all() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == 0xEFFF_FFFC)
}

fn user() -> String {
    crate::support::test_env::who().split_once('@').unwrap().0.to_owned()
}

/// If a snapshot of a machine's disk was started elsewhere, it has the machine-id and the journal of the original,
/// which may still be running.
#[test]
fn a_copy_of_a_machine_does_not_release_the_originals_lock() {
    let boot = |record: &mut Value| record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into();
    let env = killed_whole(Lock::Both);
    let [path] = records(&env).try_into().unwrap();
    let record: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let hardware = record["host"]["hardware"].as_object().unwrap();
    let known = ["network", "product_uuid"].iter().any(|kind| hardware.contains_key(*kind));
    edit(&env, |record| {
        boot(record);
        record["host"]["hardware"] = json!({ "network": ["0123456789abcdef"], "product_uuid": ["0123456789abcdef"] });
    });
    // If nothing distinguishes machines, as in some containers, there is nothing to test.
    if known {
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        env.assert_locked();
        let end = locks(&env, &["show"]);
        assert!(end.out.contains("of which this one is a copy"), "{}", end.out);
        assert_eq!(locks(&env, &["release", "--yes"]).code(), Some(1));
        env.assert_locked();
    }
    // A record of an older version does not contain the hardware.
    edit(&env, |record| drop(record["host"].as_object_mut().unwrap().remove("hardware")));
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("released the lock"), "{}", end.err);
    assert_nothing_left(&env);
}

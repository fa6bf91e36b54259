//! `tf` writes its files only where no other user can replace them: the log, which contains `-var` in clear text, and
//! the journal.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, chown};

use crate::support::process::{log_path, terraform_below};
use crate::support::system::{IS_LINUX, is_root_on_linux};
use crate::support::test_env::{APPLY, WAITS};
use crate::support::{Lock, Subject, TestEnv};

/// Returns a directory in memory, for one test.
fn in_memory() -> tempfile::TempDir {
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    tempfile::Builder::new().prefix("tf-test-").permissions(private).tempdir_in("/dev/shm").unwrap()
}

/// Returns where terraform writes its log if XDG_RUNTIME_DIR is `directory`.
fn log_of_a_run(directory: &Path) -> PathBuf {
    let mut env = TestEnv::new(Lock::File, WAITS);
    env.set("XDG_RUNTIME_DIR", directory);
    let run = env.start_apply(Subject::Tf);
    let log = log_path(terraform_below(run.pid()));
    env.unblock();
    let end = run.wait();
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    log
}

#[test]
fn the_log_lies_only_where_nobody_else_can_replace_it() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let root = in_memory();
    let at = |name: &str, mode: u32| {
        let path = root.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    };
    let private = at("private", 0o700);
    assert!(log_of_a_run(&private).starts_with(&private));
    // The link can be changed, but the directory to which it leads now cannot.
    let link = root.path().join("link");
    symlink(&private, &link).unwrap();
    assert!(log_of_a_run(&link).starts_with(&private));
    let open = at("open", 0o777);
    let below = at("open/below", 0o700);
    for directory in [&open, &below] {
        let log = log_of_a_run(directory);
        assert!(!log.starts_with(&open), "{}: {}", directory.display(), log.display());
    }
    if !is_root_on_linux() {
        // This test is listed in tests/left-out.
        return;
    }
    // XDG_RUNTIME_DIR as su(1) leaves it to root, and a directory of root in it.
    let theirs = at("theirs", 0o700);
    let below = at("theirs/below", 0o700);
    chown(&theirs, Some(Uid::from_raw(4711)), None).unwrap();
    for directory in [&theirs, &below] {
        let log = log_of_a_run(directory);
        assert!(!log.starts_with(&theirs), "{}: {}", directory.display(), log.display());
    }
}

#[test]
fn the_journal_does_not_lie_in_another_users_directory() {
    if !is_root_on_linux() {
        // This test is listed in tests/left-out.
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let theirs = root.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(Uid::from_raw(4711)), None).unwrap();
    for name in ["TFW_STATE_DIR", "XDG_STATE_HOME"] {
        let mut env = TestEnv::new(Lock::File, "true");
        env.set(name, theirs.join("state/of/root"));
        let end = env.run(Subject::Tf, &APPLY);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
        assert_eq!(fs::read_dir(&theirs).unwrap().count(), 0, "{name}: nothing was made in there");
    }
}

//! Tells the program its commit and its target, and makes the linker place it at a fixed address.
//!
//! In a position-independent program, 17,000 pointers would have to be corrected at each start. The corrections would
//! be a third of the cost of an exec through `tf`. Most of these pointers are in tables of the AWS SDK. A run that ends
//! well never reads these tables.

#![expect(clippy::disallowed_macros, clippy::disallowed_methods, reason = "cargo reads the stdout of this program")]

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=TF_COMMIT");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
    println!("cargo::rustc-env=TF_TARGET={}", env::var("TARGET").unwrap_or_default());
    // A debug build does not ask git, because cargo would compile everything again after each commit.
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let told = env::var("TF_COMMIT").ok().filter(|commit| is_commit(commit));
    let commit = told.or_else(|| is_release.then(commit_of_checkout).flatten());
    println!("cargo::rustc-env=TF_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}

/// Whether `text` is a full commit ID, with or without the suffix of `git describe --dirty`.
fn is_commit(text: &str) -> bool {
    let id = text.strip_suffix("-dirty").unwrap_or(text);
    [40, 64].contains(&id.len()) && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns the commit that is checked out in this directory, with `-dirty` if a file differs from it. `None` if this
/// directory is not the top of a git checkout: it may be the unpacked archive of a crate inside the checkout of another
/// project.
fn commit_of_checkout() -> Option<String> {
    let top = git(&["rev-parse", "--show-toplevel"])?;
    let here = env::var_os("CARGO_MANIFEST_DIR")?;
    if Path::new(&top).canonicalize().ok()? != Path::new(&here).canonicalize().ok()? {
        return None;
    }
    // The commit changes with the first two, and what is compiled with the others.
    for path in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", path]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    for path in ["Cargo.toml", "Cargo.lock", "src", "shell"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // No tag matches, so this is the full ID.
    let commit = git(&["describe", "--always", "--dirty", "--abbrev=64", "--exclude=*"])?;
    is_commit(&commit).then_some(commit)
}

/// Returns what git prints for these arguments, without the end of the line. `None` if it fails or is not installed.
fn git(arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    // A hook of git sets these variables, and they may name the repository of another project.
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(name);
    }
    // Without this variable, git would write into the checkout.
    let output = command.args(arguments).env("GIT_OPTIONAL_LOCKS", "0").output().ok()?;
    let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    Some(text.trim_end().to_owned())
}

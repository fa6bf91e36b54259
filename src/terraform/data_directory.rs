//! Terraform's data directory, `.terraform`. It contains the cached backend and the selected workspace.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::backend::CachedBackend;
use super::command_line::CommandLine;
use super::kubernetes_cluster::{self, FINGERPRINT};
use crate::console::{option, quoted, visible_whole};
use crate::sys::plain_file;

/// The name of the data directory if `TF_DATA_DIR` is not set.
const DEFAULT: &str = ".terraform";

/// The content of the data directory at one moment.
///
/// `tf` reads the directory before and after a run, because an `init` or a `workspace select` changes it in between. If
/// such a command is killed, the directory may still have the old content.
#[derive(Clone, Debug)]
pub(crate) struct DataDirectory {
    /// The backend that `init` cached, with the values of `-backend-config`. It may contain secrets. `None` if no
    /// backend is cached, or if the cached one cannot be read.
    pub(crate) backend: Option<CachedBackend>,
    /// The selected workspace. It is `default` if none was selected.
    pub(crate) workspace: String,
}

impl DataDirectory {
    /// Returns the path of the data directory: `TF_DATA_DIR` or `.terraform`, in the directory that `-chdir` names
    /// (internal/command/meta.go, `DataDir`; main.go changes the directory before that).
    pub(crate) fn path(current: &Path, command_line: &CommandLine) -> PathBuf {
        let name =
            std::env::var_os("TF_DATA_DIR").filter(|name| !name.is_empty()).unwrap_or_else(|| OsString::from(DEFAULT));
        command_line.working_directory(current).join(name)
    }

    /// Returns `TF_DATA_DIR` of this process, for a command that a person types. `None` if it is not set, or names the
    /// default directory.
    pub(crate) fn named_here() -> Option<String> {
        let name = std::env::var_os("TF_DATA_DIR").filter(|name| !name.is_empty())?;
        (Path::new(&name) != Path::new(DEFAULT)).then(|| name.to_string_lossy().into_owned())
    }

    /// Returns the `TF_DATA_DIR` with which terraform uses the data directory at `path` in `working_directory`. `None`
    /// if it uses that directory without the variable, or if `path` is empty.
    pub(crate) fn named<'a>(path: &'a str, working_directory: &Path) -> Option<&'a str> {
        (!path.is_empty() && Path::new(path) != working_directory.join(DEFAULT)).then_some(path)
    }

    /// Reads the current content of the data directory at `path`, which terraform uses in `working_directory`. To a
    /// block of the backend `kubernetes`, adds the [`FINGERPRINT`] of the cluster that it names now.
    pub(crate) fn read(path: &Path, working_directory: &Path) -> Self {
        let json = plain_file::read(&path.join("terraform.tfstate")).ok();
        let mut backend = json.and_then(|json| CachedBackend::parse(&json));
        if let Some(block) = backend.as_mut().filter(|block| block.kind == "kubernetes") {
            let variable = |name: &str| std::env::var(name).ok();
            block.add(FINGERPRINT, kubernetes_cluster::fingerprint(block, working_directory, variable));
        }
        let workspace = plain_file::read_text(&path.join("environment")).unwrap_or_default();
        Self {
            backend,
            workspace: match workspace.trim() {
                "" => "default".to_owned(),
                name => name.to_owned(),
            },
        }
    }
}

/// The directories and the workspace that a command names, so that it does the same wherever a person types it. They are
/// printed whole: a command with a part of a path would not work.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CommandDirectories<'a> {
    /// The value of `-chdir`. `None` for the current directory.
    pub(crate) chdir: Option<&'a str>,
    /// The value of `TF_DATA_DIR`, which may be set for one run only. `None` for the default data directory.
    pub(crate) data: Option<&'a str>,
    /// The value of `TF_WORKSPACE`. `None` if the command acts on the selected workspace. Empty is the same as `None`.
    pub(crate) workspace: Option<&'a str>,
}

impl CommandDirectories<'_> {
    /// Returns the command of terraform with the arguments `words`. It names every workspace, `default` too: without
    /// `TF_WORKSPACE`, terraform acts on the selected workspace.
    pub(crate) fn terraform(self, program: &str, words: &str) -> String {
        let chdir = self.chdir.map_or_else(String::new, |chdir| format!(" -chdir={}", quoted(&visible_whole(chdir))));
        self.with_variables(&format!("{program}{chdir} {words}"))
    }

    /// Returns the `tf locks` command with the arguments `words`. If they are empty, the command lists the locks.
    pub(crate) fn locks(self, words: &str) -> String {
        let chdir = self.chdir.map_or_else(String::new, |chdir| option("--chdir", &visible_whole(chdir)));
        let space = if words.is_empty() { "" } else { " " };
        self.before_locks(&format!("tf locks{space}{words}{chdir}"))
    }

    /// Returns `command`, a `tf locks` command, with the variables. `tf locks` always looks at the default workspace, so
    /// that name is left out.
    pub(crate) fn before_locks(self, command: &str) -> String {
        let workspace = self.workspace.filter(|name| *name != "default");
        Self { workspace, ..self }.with_variables(command)
    }

    fn with_variables(self, command: &str) -> String {
        let variable = |name: &str, value: Option<&str>| {
            let value = value.filter(|value| !value.is_empty());
            value.map_or_else(String::new, |value| format!("{name}={} ", quoted(&visible_whole(value))))
        };
        format!("{}{}{command}", variable("TF_WORKSPACE", self.workspace), variable("TF_DATA_DIR", self.data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_names_a_directory_exactly_if_it_is_not_the_default_one() {
        let long = format!("/{}", "a b/".repeat(100));
        for (chdir, terraform, locks) in [
            (None, "tofu x 7".to_owned(), "tf locks y".to_owned()),
            (Some("../d"), "tofu -chdir=../d x 7".into(), "tf locks y --chdir ../d".into()),
            (Some("it's"), r"tofu -chdir='it'\''s' x 7".into(), r"tf locks y --chdir 'it'\''s'".into()),
            (Some("-d"), "tofu -chdir=-d x 7".into(), "tf locks y --chdir=-d".into()),
            (Some(&long), format!("tofu -chdir='{long}' x 7"), format!("tf locks y --chdir '{long}'")),
        ] {
            for (data, prefix) in [
                (None, String::new()),
                (Some(".tf-prod"), "TF_DATA_DIR=.tf-prod ".into()),
                (Some("$HOME"), "TF_DATA_DIR='$HOME' ".into()),
                (Some(&*long), format!("TF_DATA_DIR='{long}' ")),
            ] {
                let directories = CommandDirectories { chdir, data, workspace: None };
                assert_eq!(directories.terraform("tofu", "x 7"), format!("{prefix}{terraform}"));
                assert_eq!(directories.locks("y"), format!("{prefix}{locks}"));
            }
        }
        let here = CommandDirectories { chdir: Some("d"), ..CommandDirectories::default() };
        assert_eq!(here.locks(""), "tf locks --chdir d");
    }

    #[test]
    fn a_command_names_the_workspace_and_that_of_terraform_the_default_one_too() {
        for (workspace, terraform, locks) in [
            (None, "", ""),
            (Some(""), "", ""),
            (Some("default"), "TF_WORKSPACE=default ", ""),
            (Some("green"), "TF_WORKSPACE=green ", "TF_WORKSPACE=green "),
            (Some("a b"), "TF_WORKSPACE='a b' ", "TF_WORKSPACE='a b' "),
        ] {
            let there = CommandDirectories { chdir: None, data: Some("d"), workspace };
            assert_eq!(there.terraform("tofu", "x"), format!("{terraform}TF_DATA_DIR=d tofu x"));
            assert_eq!(there.locks("y"), format!("{locks}TF_DATA_DIR=d tf locks y"));
        }
    }

    #[test]
    fn the_default_data_directory_is_not_named() {
        let named = |path| DataDirectory::named(path, Path::new("/w/d"));
        for path in ["/w/d/.terraform", "/w/d/./.terraform", "/w/d/.terraform/", ""] {
            assert_eq!(named(path), None, "{path}");
        }
        for path in ["/w/.terraform", "/w/d/.tf-prod", "/w/d", "/.terraform"] {
            assert_eq!(named(path), Some(path));
        }
    }
}

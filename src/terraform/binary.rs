//! Selects the terraform to run: the first one on PATH that is neither this program nor already in the chain.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::console::visible_whole;
use crate::sys::file_id::FileId;

/// The environment variable that contains the path or the name of the terraform to run.
pub(crate) const OVERRIDE: &str = "TFW_TERRAFORM";

/// The environment variable in which a `tf` lists, for its descendants, the programs that are already in the chain of
/// wrappers.
///
/// The format is `PID:DEPTH:DEVICE.INODE,...`. If a wrapper starts another `tf`, that `tf` must not start any of these
/// programs again. A `tf` that is not part of the chain must ignore the list: for example, a `tf` inside a provisioner
/// inherits the variable, and the list contains the terraform that it has to start.
pub(crate) const CHAIN: &str = "TFW_CHAIN";

/// The chain length at which [`find`] reports a loop. No real chain has this many wrappers.
const MAX_CHAIN_DEPTH: u32 = 16;

/// The minimum size of a terraform or tofu executable: 40 MiB, in bytes. Every release is larger (0.15: 80 MB), and a
/// wrapper that only starts terraform is smaller. A large file is not necessarily terraform, because other programs are
/// as large (node, vault, kubectl).
pub(crate) const MIN_TERRAFORM_BYTES: u64 = 40 << 20;

/// A terraform to run, and the way to run it.
#[derive(Debug)]
pub(crate) struct Binary {
    /// The path of the executable.
    pub(crate) path: PathBuf,
    /// The value of [`CHAIN`] in the environment of the executable.
    pub(crate) chain: OsString,
    /// Whether the parent process is a `tf` that started this process in place of terraform. The parent supervises this
    /// process, so this process only execs terraform.
    pub(crate) supervised_already: bool,
    /// Whether `tf` runs terraform directly, in place of setup-terraform's wrapper. That wrapper would have reported
    /// the result to the workflow, so `tf` must report it.
    pub(crate) for_a_step: bool,
}

impl Binary {
    /// Returns the name with which a user runs this terraform: the name of its file, or `terraform` in place of
    /// setup-terraform's wrapper.
    pub(crate) fn name(&self) -> OsString {
        let own = self.path.file_name().unwrap_or(self.path.as_os_str());
        if self.for_a_step { "terraform".into() } else { own.to_owned() }
    }
}

/// Why no terraform was found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotFound {
    /// PATH has no program with that name, except this program and those that are already in the chain.
    #[error("could not find {name} on PATH after {us}; looked in {}", places(.looked_in))]
    OnPath {
        /// The name that was searched for.
        name: String,
        /// The path of this program.
        us: String,
        /// The directories on PATH.
        looked_in: Vec<PathBuf>,
    },
    /// `TFW_TERRAFORM` is not an executable program.
    #[error("{OVERRIDE} is {0:?}, but there is no such program")]
    Override(OsString),
    /// The wrappers start each other in a loop.
    #[error("the {0} on PATH starts tf again, in a loop; set {OVERRIDE} to the real one")]
    Loop(String),
}

fn places(directories: &[PathBuf]) -> String {
    if directories.is_empty() {
        return "no directory, because PATH is empty or not set".to_owned();
    }
    directories.iter().map(|directory| directory.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Returns the name of the program that `tf` replaces: `tofu` if `tf` was started under that name, otherwise
/// `terraform`.
pub(crate) fn name(called_as: Option<&OsStr>) -> &'static str {
    match called_as.and_then(|path| Path::new(path).file_name()) {
        Some(name) if name == "tofu" => "tofu",
        _ => "terraform",
    }
}

/// Returns the name of the program that `tf` replaces, by the name under which this process was started.
pub(crate) fn replaced_name() -> &'static str {
    name(std::env::args_os().next().as_deref())
}

/// Returns the name of the terraform that this `tf` would run, for a command that a person types. If there is none, it
/// is the name of the program that `tf` replaces.
pub(crate) fn name_to_type() -> String {
    let replaced = replaced_name();
    find(replaced).map_or_else(|_| replaced.to_owned(), |found| visible_whole(&found.name().to_string_lossy()))
}

/// Finds the program `name`: the one in `TFW_TERRAFORM`, otherwise the first on PATH that is neither this program nor
/// already in the chain.
///
/// # Errors
/// - [`NotFound::OnPath`] if there is no such program on PATH.
/// - [`NotFound::Override`] if `TFW_TERRAFORM` is not an executable program.
/// - [`NotFound::Loop`] if the chain already has [`MAX_CHAIN_DEPTH`] programs or more.
pub(crate) fn find(name: &str) -> Result<Binary, NotFound> {
    let us = std::env::current_exe().ok();
    let own = std::process::id();
    let mut chain = Chain::from_environment();
    if chain.depth >= MAX_CHAIN_DEPTH {
        return Err(NotFound::Loop(name.to_owned()));
    }
    let descent = chain.descent(own, std::os::unix::process::parent_id());
    if descent == Descent::Far {
        chain.seen.clear();
    }
    let supervised_already = descent == Descent::Child;
    if !supervised_already {
        // A process that is already supervised does not become the writer. The supervisor remains the writer, because
        // after the exec, the next program in the chain is a child of the supervisor too.
        chain.writer = own;
    }
    chain.depth += 1;
    chain.seen.extend(us.as_deref().and_then(|path| FileId::at(path).ok()));
    let seen = chain.seen.clone();
    let mut found = |path: PathBuf| {
        let behind = behind_wrapper(&path, std::env::var_os("TERRAFORM_CLI_PATH"));
        let for_a_step = behind.is_some() && !supervised_already;
        let path = behind.filter(|_| for_a_step).unwrap_or(path);
        // The program to start is added too. If it is a script that starts a `tf` again, that `tf` skips the script and
        // searches further.
        chain.seen.extend(FileId::at(&path).ok());
        Binary { path, chain: chain.value(), supervised_already, for_a_step }
    };
    if let Some(wanted) = std::env::var_os(OVERRIDE).filter(|wanted| !wanted.is_empty()) {
        let path = which::which(&wanted).map_err(|_| NotFound::Override(wanted))?;
        // If the variable names a wrapper, a `tf` below that wrapper inherits the variable and must ignore it.
        if FileId::at(&path).map_or(true, |file| !seen.contains(&file)) {
            return Ok(found(path));
        }
    }
    let mut candidates = which::which_all(name).ok().into_iter().flatten();
    match candidates.find(|path| FileId::at(path).map_or(true, |file| !seen.contains(&file))) {
        Some(path) => Ok(found(path)),
        None => Err(NotFound::OnPath {
            name: name.to_owned(),
            us: us.map_or_else(|| "tf".to_owned(), |path| path.display().to_string()),
            looked_in: std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default(),
        }),
    }
}

/// Returns the terraform that the wrapper of hashicorp/setup-terraform would start (wrapper/lib/terraform-bin.js).
/// `installed` is the directory in which setup-terraform has installed the wrapper. `None` if `path` is not that
/// wrapper, or if there is no terraform next to it.
fn behind_wrapper(path: &Path, installed: Option<OsString>) -> Option<PathBuf> {
    let installed = installed.filter(|installed| !installed.is_empty())?;
    let behind = Path::new(&installed).join("terraform-bin");
    let is_wrapper = path.file_name()? == "terraform"
        && path.parent()?.canonicalize().ok()? == Path::new(&installed).canonicalize().ok()?;
    (is_wrapper && behind.is_file()).then_some(behind)
}

/// The content of [`CHAIN`].
#[derive(Debug, Default, PartialEq, Eq)]
struct Chain {
    /// The PID of the `tf` that wrote the value.
    writer: u32,
    depth: u32,
    seen: Vec<FileId>,
}

/// The relation of this process to the `tf` that wrote the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Descent {
    /// The writer supervises this process, and started it in place of terraform.
    Child,
    /// The writer is this process itself, before an exec.
    Same,
    /// There is another program between the writer and this process: a script, or a terraform with a provisioner.
    Far,
}

impl Chain {
    fn parse(value: &OsStr) -> Option<Self> {
        let mut parts = value.to_str()?.splitn(3, ':');
        let writer = parts.next()?.parse().ok()?;
        let depth = parts.next()?.parse().ok()?;
        let seen = parts.next()?.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { writer, depth, seen })
    }

    fn from_environment() -> Self {
        std::env::var_os(CHAIN).and_then(|value| Self::parse(&value)).unwrap_or_default()
    }

    fn descent(&self, own: u32, parent: u32) -> Descent {
        match self.writer {
            writer if writer == parent && writer != 0 => Descent::Child,
            writer if writer == own => Descent::Same,
            _ => Descent::Far,
        }
    }

    fn value(&self) -> OsString {
        let seen: Vec<_> = self.seen.iter().map(FileId::to_string).collect();
        format!("{}:{}:{}", self.writer, self.depth, seen.join(",")).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_survives_the_environment() {
        let chain = Chain { writer: 7, depth: 2, seen: vec!["1.2".parse().unwrap(), "3.4".parse().unwrap()] };
        assert_eq!(Chain::parse(&chain.value()), Some(chain));
    }

    #[test]
    fn junk_in_the_variable_is_no_chain() {
        for junk in ["", "7", "7:2", "x:2:1.2", "7:2:1", "7:2:1.2,", "7:-1:1.2"] {
            assert_eq!(Chain::parse(OsStr::new(junk)), None, "{junk:?}");
        }
    }

    #[test]
    fn only_the_child_of_a_supervisor_passes_through() {
        let chain = Chain { writer: 10, depth: 1, seen: vec![] };
        assert_eq!(chain.descent(11, 10), Descent::Child);
        assert_eq!(chain.descent(10, 1), Descent::Same);
        assert_eq!(chain.descent(12, 11), Descent::Far);
        assert_eq!(Chain::default().descent(12, 0), Descent::Far);
    }

    #[test]
    fn a_terraform_has_the_name_of_its_file_and_behind_the_wrapper_that_of_the_wrapper() {
        for (path, for_a_step, expected) in [
            ("/x/tofu", false, "tofu"),
            ("/x/terraform1.11.4", false, "terraform1.11.4"),
            ("/x/terraform-bin", true, "terraform"),
        ] {
            let chain = OsString::new();
            let binary = Binary { path: path.into(), chain, supervised_already: false, for_a_step };
            assert_eq!(binary.name(), expected);
        }
    }

    #[test]
    fn called_as_tofu_we_stand_in_for_tofu() {
        assert_eq!(name(Some(OsStr::new("/x/tofu"))), "tofu");
        assert_eq!(name(Some(OsStr::new("tf"))), "terraform");
        assert_eq!(name(None), "terraform");
    }
}

//! Which terraform to run: the next one on PATH that is not us.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The variable that names the terraform to run.
pub(crate) const OVERRIDE: &str = "TFW_TERRAFORM";

/// The variable by which a `tf` tells one that it starts which programs it came through.
///
/// `PID:DEPTH:DEVICE.INODE,...`. Wherever a chain of wrappers leads back to a `tf`, that one must neither start one of
/// those again, nor take the chain for its own when it is not part of it: a `tf` inside a provisioner finds the same
/// variable in its environment, and the terraform that it looks for in the list.
pub(crate) const CHAIN: &str = "TFW_CHAIN";

/// More wrappers in a row than anybody has. A chain that grows longer leads back to itself.
const MAX_CHAIN_DEPTH: u32 = 16;

/// Every terraform and tofu is larger (0.15: 80 MB), and nothing that only leads to one is.
pub(crate) const LARGE: u64 = 40 << 20;

/// A terraform to run.
#[derive(Debug)]
pub(crate) struct Binary {
    /// Its path.
    pub(crate) path: PathBuf,
    /// The value of `TFW_CHAIN` for its environment.
    pub(crate) chain: OsString,
    /// A `tf` is our parent and has us run where it expects terraform: it supervises, we only pass through.
    pub(crate) supervised_already: bool,
    /// It is run in the place of setup-terraform's wrapper, which would have told the workflow how it came out.
    pub(crate) for_a_step: bool,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotFound {
    /// Nothing on PATH has the name, or only we do.
    #[error("found no {name} behind {us}; looked in {}", places(.looked_in))]
    OnPath {
        /// The name that was looked for.
        name: String,
        /// Our own path.
        us: String,
        /// The directories on PATH.
        looked_in: Vec<PathBuf>,
    },
    /// TFW_TERRAFORM names nothing that can be run.
    #[error("{OVERRIDE} is {0:?}, and there is no such program")]
    Override(OsString),
    /// Wrappers that start each other for ever.
    #[error("the {0} on PATH leads back to tf again and again; set {OVERRIDE} to the real one")]
    Loop(String),
}

fn places(directories: &[PathBuf]) -> String {
    if directories.is_empty() {
        return "no directory: PATH is empty or not set".to_owned();
    }
    directories.iter().map(|directory| directory.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A file, whatever name it goes by.
type FileIdentity = (u64, u64);

fn identity(path: &Path) -> Option<FileIdentity> {
    fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// The name of the program that we stand in for: `tofu` when called so, else `terraform`.
pub(crate) fn name(called_as: Option<&OsStr>) -> &'static str {
    match called_as.and_then(|path| Path::new(path).file_name()) {
        Some(name) if name == "tofu" => "tofu",
        _ => "terraform",
    }
}

/// Finds the program `name`: the one that TFW_TERRAFORM names, else the first on PATH that is neither this program nor
/// one that we came through.
///
/// # Errors
/// [`NotFound`], with where it looked.
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
        // Where we pass through, the supervisor stays the writer: the next in the chain is its child as well.
        chain.writer = own;
    }
    chain.depth += 1;
    chain.seen.extend(us.as_deref().and_then(identity));
    let seen = chain.seen.clone();
    let mut found = |path: PathBuf| {
        let behind = behind_wrapper(&path, std::env::var_os("TERRAFORM_CLI_PATH"));
        let for_a_step = behind.is_some() && !supervised_already;
        let path = behind.filter(|_| for_a_step).unwrap_or(path);
        // What we start is passed on too: should it be a script that leads back to a tf, that one looks further.
        chain.seen.extend(identity(&path));
        Binary { path, chain: chain.value(), supervised_already, for_a_step }
    };
    if let Some(wanted) = std::env::var_os(OVERRIDE).filter(|wanted| !wanted.is_empty()) {
        let path = which::which(&wanted).map_err(|_| NotFound::Override(wanted))?;
        // A wrapper behind us inherits the variable that named it: there it says nothing.
        if identity(&path).is_none_or(|identity| !seen.contains(&identity)) {
            return Ok(found(path));
        }
    }
    let mut candidates = which::which_all(name).ok().into_iter().flatten();
    match candidates.find(|path| identity(path).is_none_or(|identity| !seen.contains(&identity))) {
        Some(path) => Ok(found(path)),
        None => Err(NotFound::OnPath {
            name: name.to_owned(),
            us: us.map_or_else(|| "tf".to_owned(), |path| path.display().to_string()),
            looked_in: std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default(),
        }),
    }
}

/// The terraform behind the wrapper that hashicorp/setup-terraform has put into the directory `installed`, if `path` is that
/// wrapper (wrapper/lib/terraform-bin.js).
fn behind_wrapper(path: &Path, installed: Option<OsString>) -> Option<PathBuf> {
    let installed = installed.filter(|installed| !installed.is_empty())?;
    let behind = Path::new(&installed).join("terraform-bin");
    let is_wrapper = path.file_name()? == "terraform"
        && path.parent()?.canonicalize().ok()? == Path::new(&installed).canonicalize().ok()?;
    (is_wrapper && behind.is_file()).then_some(behind)
}

/// What `TFW_CHAIN` tells.
#[derive(Debug, Default, PartialEq, Eq)]
struct Chain {
    /// The `tf` that wrote it.
    writer: u32,
    depth: u32,
    seen: Vec<FileIdentity>,
}

/// How this process came to be, seen from the `tf` that wrote the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Descent {
    /// That `tf` supervises, and started us where it meant to start terraform.
    Child,
    /// That `tf` became us by exec.
    Same,
    /// Something else lies in between: a script, or a terraform with a provisioner.
    Far,
}

impl Chain {
    fn parse(value: &OsStr) -> Option<Self> {
        let mut parts = value.to_str()?.splitn(3, ':');
        let writer = parts.next()?.parse().ok()?;
        let depth = parts.next()?.parse().ok()?;
        let seen = parts
            .next()?
            .split(',')
            .map(|pair| {
                let (device, inode) = pair.split_once('.')?;
                Some((device.parse().ok()?, inode.parse().ok()?))
            })
            .collect::<Option<_>>()?;
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
        let seen: Vec<_> = self.seen.iter().map(|(device, inode)| format!("{device}.{inode}")).collect();
        format!("{}:{}:{}", self.writer, self.depth, seen.join(",")).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_survives_the_environment() {
        let chain = Chain { writer: 7, depth: 2, seen: vec![(1, 2), (3, 4)] };
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
    fn called_as_tofu_we_stand_in_for_tofu() {
        assert_eq!(name(Some(OsStr::new("/x/tofu"))), "tofu");
        assert_eq!(name(Some(OsStr::new("tf"))), "terraform");
        assert_eq!(name(None), "terraform");
    }
}

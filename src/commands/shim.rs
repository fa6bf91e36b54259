//! `tf locks shim`: links named `terraform` and `tofu` to this program. A script does not see aliases; what is first on
//! PATH, it does.
//!
//! Whatever else stands there stays: a link is made only where nothing is (symlink(2) fails otherwise), and taken away only
//! when it is one that this program would make.

use crate::console;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::Finding;
use super::connection::Trouble;
use super::own_path::{self, same_file};

pub(super) const EXAMPLES: &str = "Examples:
  tf locks shim ~/.local/share/tf/shim
  PATH=\"$HOME/.local/share/tf/shim:$PATH\" ./deploy.sh
  tf locks shim --remove ~/.local/share/tf/shim

Exit codes: 0 they are there (or, with --remove, are not), 1 something else stands there, or it could not be done.";

/// A name that a script calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    Terraform,
    Tofu,
}

impl Name {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Terraform => "terraform",
            Self::Tofu => "tofu",
        }
    }
}

#[derive(Args, Clone, Debug)]
pub(super) struct Shim {
    /// Where the links are to be. Made, if it is not there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Take the links away again. Only what is a link to this program goes
    #[arg(long)]
    remove: bool,
    /// Only this name, where a script would take a tofu on PATH for a reason to use it
    #[arg(long, value_name = "NAME")]
    only: Option<Name>,
}

/// What stands at a link's place.
#[derive(Debug, PartialEq, Eq)]
enum LinkState {
    Nothing,
    Ours,
    /// Something else: what it is.
    Another(String),
}

impl Shim {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let own = own_path::find().map_err(|error| Trouble::Said(format!("where tf lies is not known: {error}")))?.path;
        let names = [Name::Terraform, Name::Tofu].into_iter().filter(|name| self.only.is_none_or(|only| only == *name));
        let links: Vec<PathBuf> = names.map(|name| self.directory.join(name.as_str())).collect();
        let done = if self.remove { remove(&links, &own) } else { self.make(&links, &own) };
        done.map_err(Trouble::Said)?;
        Ok(Finding::Nothing)
    }

    /// All of them, or none where something else stands.
    fn make(&self, links: &[PathBuf], own: &Path) -> Result<(), String> {
        fs::create_dir_all(&self.directory).map_err(|error| format!("{}: {error}", self.directory.display()))?;
        let mut missing = Vec::new();
        for link in links {
            match link_state(link, own).map_err(|error| format!("{}: {error}", link.display()))? {
                LinkState::Nothing => missing.push(link),
                LinkState::Ours => {}
                LinkState::Another(what) => return Err(not_ours(link, &what, own, "no link was made")),
            }
        }
        for link in missing {
            // Whoever put something there meanwhile keeps it.
            symlink(own, link).map_err(|error| format!("{}: {error}", link.display()))?;
        }
        for link in links {
            console::print(&format!("{} -> {}", link.display(), own.display()));
        }
        Ok(())
    }
}

/// Those that are ours.
fn remove(links: &[PathBuf], own: &Path) -> Result<(), String> {
    let mut kept = Vec::new();
    for link in links {
        match link_state(link, own).and_then(|stored| match stored {
            LinkState::Nothing => Ok(None),
            LinkState::Ours => take_away(link, own),
            LinkState::Another(what) => Ok(Some(what)),
        }) {
            Ok(None) => {}
            Ok(Some(what)) => kept.push(not_ours(link, &what, own, "it was left")),
            Err(error) => kept.push(format!("{}: {error}", link.display())),
        }
    }
    if kept.is_empty() { Ok(()) } else { Err(kept.join("\n")) }
}

/// Takes our link away. Gives what it is, if by now it is something else.
///
/// Between a look and an unlink(2) anybody may put a file of theirs at that name. So the entry is moved first, into a new
/// directory that nobody else can write to: what was moved is looked at there, and nobody can change it any more.
fn take_away(link: &Path, own: &Path) -> io::Result<Option<String>> {
    let directory = link.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Not one that is cleared away by itself: it may have somebody's file in it.
    let aside = tempfile::Builder::new().prefix(".tf-shim-").tempdir_in(directory)?.keep();
    let moved = aside.join("link");
    let done = (|| {
        fs::rename(link, &moved)?;
        match link_state(&moved, own)? {
            LinkState::Ours => fs::remove_file(&moved).map(|()| None),
            LinkState::Nothing => Ok(None),
            LinkState::Another(what) => {
                // Back, unless there is again something at its place: link(2) overwrites nothing, and rename(2) of a
                // directory nothing that has anything in it.
                if fs::symlink_metadata(&moved)?.is_dir() {
                    fs::rename(&moved, link)?;
                } else {
                    fs::hard_link(&moved, link)?;
                    fs::remove_file(&moved)?;
                }
                Ok(Some(what))
            }
        }
    })();
    let _ = fs::remove_dir(&aside);
    done
}

fn not_ours(link: &Path, what: &str, own: &Path, done: &str) -> String {
    format!("{} is {what}, and no link to {}: {done}", link.display(), own.display())
}

fn link_state(link: &Path, own: &Path) -> io::Result<LinkState> {
    let file = match fs::symlink_metadata(link) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(LinkState::Nothing),
        Err(error) => return Err(error),
    };
    if !file.is_symlink() {
        return Ok(LinkState::Another(if file.is_dir() { "a directory" } else { "a file" }.to_owned()));
    }
    let target = fs::read_link(link)?;
    // By name as well: an upgrade puts another file at the same path.
    if target == own || same_file(link, own) {
        return Ok(LinkState::Ours);
    }
    Ok(LinkState::Another(format!("a link to {}", target.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_link_to_this_program_is_ours() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let own = at("tf");
        fs::write(&own, "").unwrap();
        fs::write(at("file"), "").unwrap();
        fs::create_dir(at("directory")).unwrap();
        symlink("tf", at("relative")).unwrap();
        symlink("relative", at("indirect")).unwrap();
        symlink(at("file"), at("another")).unwrap();
        symlink(at("gone/tf"), at("dangling")).unwrap();
        for (name, ours) in [
            ("relative", true),
            ("indirect", true),
            ("another", false),
            ("dangling", false),
            ("file", false),
            ("directory", false),
        ] {
            assert_eq!(link_state(&at(name), &own).unwrap() == LinkState::Ours, ours, "{name}");
        }
        // The program that an upgrade has just taken away.
        fs::remove_file(&own).unwrap();
        symlink(&own, at("dangling to us")).unwrap();
        assert_eq!(link_state(&at("dangling to us"), &own).unwrap(), LinkState::Ours);
        assert_eq!(link_state(&at("nothing"), &own).unwrap(), LinkState::Nothing);
    }

    #[test]
    fn what_was_put_in_a_links_place_meanwhile_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("terraform");
        fs::write(&link, "somebody's").unwrap();
        assert!(take_away(&link, Path::new("/usr/bin/tf")).unwrap().is_some());
        assert_eq!(fs::read_to_string(&link).unwrap(), "somebody's");
        fs::remove_file(&link).unwrap();
        fs::create_dir_all(link.join("theirs")).unwrap();
        assert!(take_away(&link, Path::new("/usr/bin/tf")).unwrap().is_some());
        assert!(link.join("theirs").is_dir());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

//! `tf locks shim`: creates links named `terraform` and `tofu` to this program. A script does not see aliases, but it
//! runs the first program of that name on PATH.
//!
//! Other files are never overwritten or removed: a link is created only if nothing exists at its path (symlink(2) fails
//! otherwise), and removed only if it is one that this program would create.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::Finding;
use super::connection::Trouble;
use super::own_path::{self, same_file};
use crate::console;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks shim ~/.local/share/tf/shim
  PATH=\"$HOME/.local/share/tf/shim:$PATH\" ./deploy.sh
  tf locks shim --remove ~/.local/share/tf/shim

Exit codes: 0 the links exist (with --remove: they do not), 1 something else is in their place, or the command failed.";

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
    /// The directory for the links; created if it does not exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Remove the links again, but only links to this program, and the directory if it is empty then
    #[arg(long)]
    remove: bool,
    /// Only this name, for a script that uses tofu whenever it finds tofu on PATH
    #[arg(long, value_name = "NAME")]
    only: Option<Name>,
}

/// What exists at the path of a link.
#[derive(Debug, PartialEq, Eq)]
enum LinkState {
    Nothing,
    /// A link to this program.
    Ours,
    /// Something else, with a description of it.
    Another(String),
}

impl Shim {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let own =
            own_path::find().map_err(|error| Trouble::Said(format!("could not find the path of tf: {error}")))?.path;
        let names = [Name::Terraform, Name::Tofu].into_iter().filter(|name| self.only.is_none_or(|only| only == *name));
        let links: Vec<PathBuf> = names.map(|name| self.directory.join(name.as_str())).collect();
        let done = if self.remove { remove(&self.directory, &links, &own) } else { self.make(&links, &own) };
        done.map_err(Trouble::Said)?;
        Ok(Finding::Nothing)
    }

    /// Creates the links that do not exist yet, and the directory.
    ///
    /// # Errors
    /// Fails if something else exists at the path of a link, in which case no link is created, or if the directory or a
    /// link cannot be created.
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
            // If something has been created at this path in the meantime, symlink(2) fails and does not overwrite it.
            symlink(own, link).map_err(|error| format!("{}: {error}", link.display()))?;
        }
        for link in links {
            console::print(&format!("{} -> {}", link.display(), own.display()));
        }
        Ok(())
    }
}

/// Removes the links that lead to this program, and then their directory if it is empty. If the directory's parent has
/// the name `tf` and is empty by then, it is removed too: README.md proposes `~/.local/share/tf/shim`. A directory from
/// which no link was removed stays, because it was perhaps never used for links.
///
/// # Errors
/// Fails, after it has removed the others, if something else exists at the path of a link or if a link cannot be
/// removed.
fn remove(directory: &Path, links: &[PathBuf], own: &Path) -> Result<(), String> {
    let mut kept = Vec::new();
    let mut has_removed = false;
    for link in links {
        let was_there = fs::symlink_metadata(link).is_ok();
        match link_state(link, own).and_then(|stored| match stored {
            LinkState::Nothing => Ok(None),
            LinkState::Ours => take_away(link, own),
            LinkState::Another(what) => Ok(Some(what)),
        }) {
            Ok(None) => has_removed |= was_there,
            Ok(Some(what)) => kept.push(not_ours(link, &what, own, "it was not removed")),
            Err(error) => kept.push(format!("{}: {error}", link.display())),
        }
    }
    // rmdir(2) fails if a directory is not empty.
    if has_removed
        && fs::remove_dir(directory).is_ok()
        && let Some(parent) = directory.parent().filter(|parent| parent.ends_with("tf"))
    {
        let _ = fs::remove_dir(parent);
    }
    if kept.is_empty() { Ok(()) } else { Err(kept.join("\n")) }
}

/// Removes a link to this program. Returns `None` if the link is gone. If the entry is something else by now, moves it
/// back and returns its description.
///
/// Between a check and unlink(2), another process may put a file at that path. So the entry is first moved into a new
/// directory that no other user can write to, and is checked there, where it can no longer be replaced.
///
/// # Errors
/// Fails if the entry cannot be moved, checked or removed. If it cannot be moved back, because something exists at the
/// path again, it stays in the new directory.
fn take_away(link: &Path, own: &Path) -> io::Result<Option<String>> {
    let directory = link.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Turn off the automatic removal of the directory, because it may contain another program's file.
    let aside = tempfile::Builder::new().prefix(".tf-shim-").tempdir_in(directory)?.keep();
    let moved = aside.join("link");
    let done = (|| {
        fs::rename(link, &moved)?;
        match link_state(&moved, own)? {
            LinkState::Ours => fs::remove_file(&moved).map(|()| None),
            LinkState::Nothing => Ok(None),
            LinkState::Another(what) => {
                // Move it back unless something exists at the path again: link(2) overwrites nothing, and rename(2) of
                // a directory overwrites at most an empty directory.
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
    format!("{} is {what}, not a link to {}: {done}", link.display(), own.display())
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
    // Compare the paths too, because an upgrade puts another file at the same path.
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
        // An upgrade has just removed the program.
        fs::remove_file(&own).unwrap();
        symlink(&own, at("dangling to us")).unwrap();
        assert_eq!(link_state(&at("dangling to us"), &own).unwrap(), LinkState::Ours);
        assert_eq!(link_state(&at("nothing"), &own).unwrap(), LinkState::Nothing);
    }

    #[test]
    fn an_empty_directory_of_links_is_removed_and_any_other_stays() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("program");
        fs::write(&own, "").unwrap();
        for (name, has_link, has_file, left) in [
            ("share/tf/shim", true, false, "share"),
            ("bin/shim", true, false, "bin"),
            ("other/tf/shim", true, true, "other/tf/shim"),
            ("empty/tf/shim", false, false, "empty/tf/shim"),
        ] {
            let directory = root.path().join(name);
            fs::create_dir_all(&directory).unwrap();
            let links = [directory.join("terraform"), directory.join("tofu")];
            for link in links.iter().filter(|_| has_link) {
                symlink(&own, link).unwrap();
            }
            if has_file {
                fs::write(directory.join("another"), "").unwrap();
            }
            assert_eq!(remove(&directory, &links, &own), Ok(()), "{name}");
            let there: Vec<&Path> = directory.ancestors().take_while(|path| *path != root.path()).collect();
            assert_eq!(there.iter().find(|path| path.exists()), Some(&root.path().join(left).as_path()), "{name}");
        }
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
